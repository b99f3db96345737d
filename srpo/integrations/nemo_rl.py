"""SRPO in NeMo-RL (commit 7ea279a): one call behind its advantages.

A recipe: **not run with NeMo-RL**, which needs CUDA; tested against stand-ins of its data and of its policy.

Its estimators are a fixed chain of ifs and see no policy, so the call belongs into `nemo_rl/algorithms/grpo.py`, below
`train_data["advantages"] = adv_estimator.compute_advantage(...)`:

    from srpo.integrations.nemo_rl import credited_advantages

    train_data["advantages"], credit_metrics = credited_advantages(
        policy, train_data, tokenizer, PixelLayout.of_processor(processor), CreditSettings.of({"credit": "srpo"}), step
    )

Losses with a ratio of whole sequences (`sequence_level_importance_ratios`) average token weights away.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from srpo.integrations.padded import PaddedBatch, credit_batches
from srpo.settings import CreditSettings
from srpo.vision.corruption import PixelLayout

_VISION = ("pixel_values", "image_grid_thw")


def credited_advantages(
    policy: Any, data: Any, tokenizer: Any, layout: PixelLayout | None, settings: CreditSettings, step: int = 0
) -> tuple[Tensor, dict[str, float]]:
    """Return the advantages `[B, S]` of a batch with token weights in them, and metrics.

    Args:
        policy: what has `get_logprobs(data)["logprobs"]`, `[B, S]`, each token's in its own column.
        data: `train_data`: `input_ids`, `token_mask`, `prev_logprobs` and `advantages` `[B, S]`, `sample_mask` and
            `input_lengths` `[B]`, and for rows with pictures `pixel_values` and `image_grid_thw` as packed tensors.
        tokenizer: of the policy.
        layout: of its pictures; None: it sees none.
        settings: of the credit stage.
        step: optimisation steps done.
    """
    ids, lengths = data["input_ids"], data["input_lengths"]
    attention = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
    mask = (data["token_mask"] * data["sample_mask"][:, None])[:, 1:]
    given = {name: data[name] for name in _VISION if name in data}
    rows = [{name: x.tensors[i] for name, x in given.items() if x.tensors[i] is not None} for i in range(len(ids))]
    (weighed,) = credit_batches(
        [PaddedBatch(ids, attention, mask, rows)], [data["advantages"][:, 1:]], [data["prev_logprobs"][:, 1:]],
        tokenizer, lambda batches: [_score(policy, data, given, batch) for batch in batches], layout, settings, step,
    )  # fmt: skip
    return torch.cat([data["advantages"][:, :1], weighed.advantages], dim=1), weighed.metrics


def _score(policy: Any, data: Any, given: Mapping[str, Any], batch: PaddedBatch) -> Tensor:
    """Let the policy score a batch; its rows are padded on the right and have lengths."""
    order = (batch.attention_mask == 0).long().argsort(dim=1, stable=True)
    ids, valid = batch.input_ids.gather(1, order), batch.attention_mask.gather(1, order)
    columns = {
        "input_ids": ids,
        "input_lengths": valid.sum(dim=1),
        "token_mask": valid,
        "sample_mask": data["sample_mask"],
    }
    for name, x in given.items():
        columns[name] = type(x)([row.get(name) for row in batch.pictures], dim_to_pack=x.dim_to_pack)
    scored = policy.get_logprobs(type(data)(columns))["logprobs"]
    return scored.gather(1, order.argsort(dim=1))[:, -batch.completion_mask.shape[1] :]
