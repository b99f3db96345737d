"""The credit and the loss stage of one call, on checked arguments: data flows one way, nothing is filled in."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from srpo.config import LossConfig
from srpo.credit import Credit, as_dtype, compute_dtype, run_credit
from srpo.metrics import MetricSums, credit_sums, loss_sums
from srpo.request import Request
from srpo.streams import STREAMS, Streams
from srpo_kernels import ops


class LossOutput(NamedTuple):
    """What a loss call returns. Only `loss` carries a gradient.

    Args:
        loss: 0-d.
        logps: `[B, T]` log-probs of the completion tokens under the current policy, 0 on masked tokens, and from
            hidden states on tokens that cannot change the loss.
        weights: `[B, T]` token weights that were multiplied into the advantages, 0 on masked tokens.
        entropy: `[B, T]` entropy of the next-token distribution in nats, 0 where `logps` is; None from log-probs.
        metrics: sums and counts, read as a mapping from metric names to 0-d tensors.
    """

    loss: Tensor
    logps: Tensor
    weights: Tensor
    entropy: Tensor | None
    metrics: MetricSums


class Weighed(NamedTuple):
    """Token weights, 0 where masked, and what the credit stage found on the way; None where it did not run."""

    weights: Tensor
    credit: Credit | None


class Terms(NamedTuple):
    """What the loss is made of beside the log-probs, in the order of `ops.policy_loss`."""

    old_logps: Tensor | None
    ref_logps: Tensor | None
    importance_sampling_ratio: Tensor | None
    advantages: Tensor
    weights: Tensor
    mask: Tensor
    scale: Tensor


def run(request: Request, logps: Tensor, entropy: Tensor | None, streams: Streams) -> LossOutput:
    """Run both stages on log-probs that carry the gradient."""
    logps = logps.to(compute_dtype(logps, request.backend))
    return finish(request, logps, entropy, weigh(request, logps, streams))


def weigh(request: Request, logps: Tensor, streams: Streams) -> Weighed:
    """Run the credit stage; `logps` are the base where there are no `old_logps`."""
    credit = None
    if request.weighs:
        base = logps.detach() if request.old_logps is None else request.old_logps
        read = Streams(*(x if name in request.reads else None for name, x in zip(STREAMS, streams, strict=True)))
        credit = run_credit(
            request.call, request.layout, request.mask, request.role_ids, request.advantages, request.credit,
            request.backend, contrast=request.contrast, base=base, streams=read,
        )  # fmt: skip
    weights = credit.weights if credit else request.mask if request.weights is None else request.weights
    return Weighed(torch.where(request.mask, weights.to(compute_dtype(logps, request.backend)), 0.0), credit)


def finish(
    request: Request, logps: Tensor, entropy: Tensor | None, weighed: Weighed, scored: Tensor | None = None
) -> LossOutput:
    """Reduce log-probs and weights to the loss and its metrics; `scored` are the rows that a head was run on."""
    loss, mask, layout = request.loss, request.mask, request.layout
    terms = loss_terms(request, weighed.weights)
    per_trajectory, clip_and_kl = ops.policy_loss(logps, *terms, layout, loss.rule, request.backend)
    groups = {"cispo" if loss.loss_type == "cispo" else "clip"}
    groups |= {"ratio"} if terms.old_logps is not None else set()
    groups |= {"kl"} if loss.beta != 0.0 else set()
    groups |= {"entropy"} if entropy is not None else set()
    groups |= {"rows"} if scored is not None else set()
    rows = mask if scored is None else scored
    log_ratio = None if terms.old_logps is None else logps.detach() - terms.old_logps
    sums = [loss_sums(mask, rows, request.advantages, clip_and_kl, entropy, layout, log_ratio)]
    if weighed.credit is not None:
        groups.add("credit")
        sums.append(credit_sums(weighed.credit, request.role_ids, mask, request.advantages))
    shown = torch.where(mask, logps.detach(), 0.0)
    metrics = MetricSums(torch.cat(sums), frozenset(groups))
    return LossOutput(per_trajectory.sum(), shown, weighed.weights, entropy, metrics)


def loss_terms(request: Request, weights: Tensor) -> Terms:
    """Return what the loss is made of, in the dtype of the weights."""
    dtype = weights.dtype
    old, ref, ratio = (as_dtype(x, dtype) for x in (request.old_logps, request.ref_logps, request.ratio))
    counts = request.layout.token_counts(request.mask).to(dtype)
    scale = loss_scale(request.loss, counts, request.normaliser)
    return Terms(old, ref, ratio, request.advantages.to(dtype), weights, request.mask, scale)


def loss_scale(loss: LossConfig, counts: Tensor, num_items_in_batch: Any) -> Tensor:
    """Return the factor `[R]` that each trajectory's sum of token losses is reduced with."""
    R = counts.shape[0]
    if loss.loss_type == "grpo":
        return 1.0 / (counts.clamp(min=1.0) * R) if R else counts
    if loss.loss_type == "dr_grpo":
        return torch.full_like(counts, 1.0 / (max(R, 1) * (loss.max_completion_length or 1)))
    items = counts.sum() if loss.loss_type == "bnpo" or num_items_in_batch is None else num_items_in_batch
    if isinstance(items, Tensor):
        items = items.reshape(())
    items = counts.new_ones(()) * items  # to the device and dtype without a sync
    return torch.where(items > 0, 1.0 / items, 1.0).expand_as(counts)
