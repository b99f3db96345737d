"""What the trainers share: weights by a setting or a method, and the sums behind their metrics."""

import torch
from torch import Tensor

from srpo import checks
from srpo.config import CreditConfig
from srpo.credit import Credit, run_credit
from srpo.methods import Method
from srpo.metrics import credit_sums, loss_sums
from srpo.streams import Streams
from srpo_kernels.layout import Layout


def weigh(
    call: checks.Call,
    credit: CreditConfig | Method,
    role_ids: Tensor,
    mask: Tensor,
    advantages: Tensor,
    *,
    logps: Tensor,
    corrupted_logps: Tensor | None = None,
    ablated_logps: Tensor | None = None,
    entropy: Tensor | None = None,
) -> Credit:
    """Return the weights `[B, T]` of checked tensors, and what the metrics need; `advantages` are per token.

    A method has weights alone: its contrast is that of the image, it clips nothing and has no baseline.
    """
    if isinstance(credit, CreditConfig):
        backend, layout = checks.backend_of(call, "auto", logps.dtype), Layout(tuple(mask.shape))
        given = {"corrupted": corrupted_logps, "ablated": ablated_logps}
        streams = Streams(**{name: given[name] for name in credit.streams})
        return run_credit(call, layout, mask, role_ids, advantages, credit, backend, base=logps, streams=streams)
    weights = credit(
        logps=logps, completion_mask=mask, role_ids=role_ids, advantages=advantages, entropy=entropy,
        corrupted_logps=corrupted_logps, ablated_logps=ablated_logps,
    )  # fmt: skip
    contrast = torch.zeros_like(weights) if corrupted_logps is None else logps - corrupted_logps
    no_baseline = weights.new_full((len(mask),), torch.nan)
    return Credit(contrast, weights, torch.zeros_like(mask, dtype=torch.uint8), no_baseline, mask.new_zeros(()))


def metric_sums(weighed: Credit, role_ids: Tensor, mask: Tensor, advantages: Tensor, entropy: Tensor | None) -> Tensor:
    """Return the sums of `MetricSums` with the group `"credit"`: they add up over batches and ranks."""
    no_clips = weighed.weights.new_zeros(1, 3)
    sums = loss_sums(mask, mask, advantages, no_clips, entropy, Layout(tuple(mask.shape)))
    return torch.cat([sums, credit_sums(weighed, role_ids, mask, advantages)])
