"""Rollouts of a tiny model in the columns of verl's transfer queue, and what its workers do with them, row by row."""

from __future__ import annotations

from typing import Any

import tiny_vlms
import torch
from torch import Tensor, nn
from torch.nn import functional

from srpo.vision.access import rope_positions

COMPLETIONS = (
    "<look>red 3</look><think>so 4</think>",
    "<look>blue</look> <think>x+1=2</think>7",
    "no tags",
    "<think>a</think><look>12</look><think>bb</think>",
)
TEMPERATURE = 0.7
FAMILY = "qwen25vl"


def trajectories(model: Any, processor: Any, completions: tuple[str, ...] = COMPLETIONS) -> list[dict[str, Any]]:
    """Make one row per completion: two rollouts of each prompt, one picture each, text and mRoPE positions `[4, L]`."""
    made = []
    for i, completion in enumerate(completions):
        pictures = [tiny_vlms.picture(9 + i, seed=i)]
        inputs = dict(processor(text=[tiny_vlms.PROMPTS[FAMILY]], images=pictures, return_tensors="pt"))
        prompt, _, kinds = (inputs.pop(name) for name in ("input_ids", "attention_mask", "mm_token_type_ids"))
        response = torch.tensor(processor.tokenizer.encode(completion, add_special_tokens=False))
        ids = torch.cat([prompt[0], response])
        kinds = functional.pad(kinds, (0, len(response)))
        positions = rope_positions(model, ids[None], torch.ones_like(ids)[None], {**inputs, "mm_token_type_ids": kinds})
        valid = torch.ones_like(response)
        scores = torch.zeros(len(response))
        scores[-1] = i % 2
        made.append(
            {
                "prompts": prompt[0],
                "responses": response,
                "input_ids": ids,
                "position_ids": torch.cat([torch.arange(len(ids))[None], positions.reshape(-1, len(ids))[-3:]]),
                "response_mask": valid,
                "loss_mask": valid,
                "multi_modal_inputs": inputs,
                "uid": f"u{i // 2}",
                "rm_scores": scores,
                "pictures": pictures,
            }
        )
    return made


def score_streams_arguments(rows: list[dict[str, Any]], tokenizer: Any) -> dict[str, Any]:
    """Return what `score_streams` is called with for the same trajectories, padded on the right."""
    ids, mask = (
        nn.utils.rnn.pad_sequence([x(row["input_ids"]) for row in rows], batch_first=True)
        for x in (lambda ids: ids, torch.ones_like)
    )
    kinds = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
    names = ("pixel_values", "image_grid_thw")
    pictures = {name: torch.cat([row["multi_modal_inputs"][name] for row in rows]) for name in names}
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds, **pictures}


@torch.no_grad()
def next_token_logps(model: Any, ids: Tensor, positions: Tensor, pictures: dict[str, Any]) -> Tensor:
    """Score one unpadded row: at each token `[L]`, the log-prob of the next one (of the first, at the last)."""
    logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], position_ids=positions[:, None],
                   **pictures, use_cache=False).logits[0]  # fmt: skip
    return (logits / TEMPERATURE).log_softmax(-1).gather(1, ids.roll(-1)[:, None])[:, 0]
