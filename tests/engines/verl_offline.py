"""Compare what a run of verl dumped with `score_streams` on its rollouts: `POLICY FOLDER FIRST_STEP LAST_STEP`.

The weights of step N are those of the checkpoint that the run saved after step N - 1. A difference is printed as
`compared {...}`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from srpo import PRESETS, PatchMask, role_contrast, role_ids_from_completions, score_streams, token_weights


def padded(rows: Any) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def largest(x: Tensor, y: Tensor, where: Tensor) -> float:
    """Return the largest difference; NaN, which says that there is no evidence, must be at the same places."""
    assert torch.equal(x[where].isnan(), y[where].isnan())
    where = where & ~x.isnan()
    return float((x - y)[where].abs().max()) if where.any() else 0.0


def compare(model: Any, tokenizer: Any, dumped: dict[str, Any]) -> dict[str, float]:
    before, after = dumped["before"], dumped["after"]
    ids, attention = padded(before["input_ids"]), padded([torch.ones_like(x) for x in before["input_ids"]])
    completions, mask = padded(before["responses"]), padded(before["response_mask"]) != 0
    starts = {len(row) - len(own) for row, own in zip(before["input_ids"], before["responses"], strict=True)}
    assert len(starts) == 1, "prompts are of one length: pictures are of one size"
    roles = role_ids_from_completions(completions, tokenizer, completion_mask=mask).role_ids
    pictures = before["multi_modal_inputs"]
    vision = {name: torch.cat([x[name] for x in pictures]) for name in ("pixel_values", "image_grid_thw")}
    streams = score_streams(
        model, ids, attention, completions.shape[1], role_ids=roles, corruption=PatchMask(0.6),
        mm_token_type_ids=(ids == model.config.image_token_id).long(), **vision,
    )  # fmt: skip
    weights = token_weights(
        role_contrast(
            streams.logps, corrupted_logps=streams.corrupted_logps, ablated_logps=streams.ablated_logps,
            role_ids=roles, completion_mask=mask,
        ), roles, mask, credit=PRESETS["srpo"],
    )  # fmt: skip
    advantages = padded(before["advantages"]) * weights
    return {
        "roles": float((padded(after["role_ids"]) != roles).sum()),
        "old": largest(padded(before["old_log_probs"]), streams.logps, mask),
        "corrupted": largest(padded(after["corrupted_log_probs"]), streams.corrupted_logps, mask & (roles == 1)),
        "ablated": largest(padded(after["ablated_log_probs"]), streams.ablated_logps, mask & (roles == 2)),
        "advantages": largest(padded(after["advantages"]), advantages, mask),
        "changed": float(((padded(after["advantages"]) - padded(before["advantages"])).abs() > 1e-4).sum()),
        "parsed": float(((roles == 1).any(dim=1) & (roles == 2).any(dim=1)).float().mean()),
    }


def main() -> None:
    policy, folder, first, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy)
    for step in range(first, last + 1):
        saved = folder / f"ckpt/global_step_{step - 1}/actor/huggingface"
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            policy if step == 1 else saved, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        dumped = torch.load(folder / f"step{step}.pt", weights_only=False)
        print("compared", json.dumps({"step": step, **compare(model, tokenizer, dumped)}), flush=True)


if __name__ == "__main__":
    main()
