"""The credit and the loss stage of one call, on checked arguments: data flows one way, nothing is filled in."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from srpo import checks
from srpo.config import LossConfig
from srpo.credit import Credit, as_dtype, compute_dtype, run_credit
from srpo.errors import ConfigError
from srpo.metrics import MetricSums, credit_sums, loss_sums
from srpo.request import Request
from srpo.streams import STREAMS, Streams
from srpo_kernels import ops
from srpo_kernels.policy_factor import policy_factor, times_factor


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
    """Run both stages on log-probs, and on entropies, that carry the gradient."""
    logps = logps.to(compute_dtype(logps, request.backend))
    return finish(request, logps, entropy, weigh(request, logps, streams), kept=kept_tokens(request, entropy))


def kept_tokens(request: Request, entropy: Tensor | None) -> Tensor | None:
    """Tell the valid tokens of the highest entropies, whose policy term counts; None: all of them."""
    share = request.loss.top_entropy_quantile
    if share == 1.0 or entropy is None or not entropy.numel():
        return None
    known = torch.where(request.mask, entropy.detach().float(), torch.nan)
    return known >= known.flatten().nanquantile(1.0 - share)


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
    request: Request,
    logps: Tensor,
    entropy: Tensor | None,
    weighed: Weighed,
    scored: Tensor | None = None,
    kept: Tensor | None = None,
) -> LossOutput:
    """Reduce log-probs and weights to the loss and its metrics.

    Args:
        scored: the rows that a head was run on; None: all valid ones.
        kept: the tokens whose policy term counts; None: all.
    """
    loss, mask, layout = request.loss, request.mask, request.layout
    given = loss_terms(request, weighed.weights)
    ratio = given.importance_sampling_ratio
    factor = policy_factor(logps, given.old_logps, ratio, kept, given.advantages, mask, layout, loss)
    terms = Terms(*given[:2], factor, *given[3:])
    if request.token_loss is None:
        per_trajectory, clip_and_kl = ops.policy_loss(logps, *terms, layout, loss.rule, request.backend)
        total = per_trajectory.sum()
    else:
        total, clip_and_kl = _own_loss(request, logps, terms)
    if loss.entropy_coef and entropy is not None:
        total = total - loss.entropy_coef * mean_entropy(entropy, mask if kept is None else kept)
    own = {"clip": "clip", "cispo": "cispo"}.get(loss.rule_kind) if request.token_loss is None else None
    groups = {own} if own else set()
    groups |= {"ratio"} if terms.old_logps is not None else set()
    groups |= {"kl"} if loss.beta != 0.0 else set()
    groups |= {"entropy"} if entropy is not None else set()
    groups |= {"rows"} if scored is not None else set()
    rows = mask if scored is None else scored
    log_ratio = None if terms.old_logps is None else logps.detach() - terms.old_logps
    shown_entropy = None if entropy is None else entropy.detach()
    sums = [loss_sums(mask, rows, request.advantages, clip_and_kl, shown_entropy, layout, log_ratio)]
    if weighed.credit is not None:
        groups.add("credit")
        sums.append(credit_sums(weighed.credit, request.role_ids, mask, request.advantages))
    shown = torch.where(mask, logps.detach(), 0.0)
    metrics = MetricSums(torch.cat(sums), frozenset(groups))
    return LossOutput(total, shown, weighed.weights, shown_entropy, metrics)


def mean_entropy(entropy: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean over some tokens, 0 where there are none."""
    return torch.where(tokens, entropy, 0.0).sum() / tokens.sum().clamp(min=1)


def _own_loss(request: Request, logps: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Reduce the caller's own losses, weighted, and the KL term, which is not; return that and the metric sums."""
    assert request.token_loss is not None
    mask, layout, rule = request.mask, request.layout, request.loss.rule
    inside = torch.where(mask, logps, 0.0)  # what is masked gets no gradient, whatever the function makes of it
    losses = checks.token_losses(request.call, request.token_loss(inside), inside, mask)
    factor = times_factor(terms.weights, terms.importance_sampling_ratio, mask)
    policy = (torch.where(mask, losses.to(logps.dtype), 0.0) * factor * layout.spread(terms.scale)).sum()
    without = Terms(*terms[:2], None, torch.zeros_like(terms.advantages), *terms[4:])
    kl, sums = ops.policy_loss(logps, *without, layout, rule, request.backend)
    return policy + kl.sum(), sums


def check_uncoupled(request: Request, logps: Tensor) -> None:
    """Refuse a `token_loss` that couples trajectories where it was computed for some of them at a time.

    Half of the trajectories get other log-probs: the losses of the others, and their slopes, must not move. A sync.
    """
    layout, mask = request.layout, request.mask
    if request.token_loss is None or layout.n_trajectories < 2:
        return
    half = layout.spread(torch.arange(layout.n_trajectories, device=logps.device) % 2 == 0) & mask
    inside = torch.where(mask, logps.detach(), 0.0)
    found = []
    for x in (inside, torch.where(half, inside, inside - 0.5 * mask)):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            losses = torch.where(half, request.token_loss(leaf), 0.0)
            (slopes,) = torch.autograd.grad(losses.sum(), leaf)
        found.append(torch.stack([losses.detach(), torch.where(half, slopes, 0.0)]))
    moved = ~torch.isclose(found[0], found[1], rtol=1e-4, atol=1e-6, equal_nan=True)
    if bool(moved.any()):
        got = f"a loss that moves on {int(moved[0].sum())} tokens with the log-probs of other trajectories"
        fix = "call role_weighted_grpo_loss_from_logps on selected_logps_from_hidden(...)"
        request.call.fail(ConfigError, "token_loss", got, "losses of each trajectory by itself", fix)


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
    if loss.loss_type in ("grpo", "sapo"):
        return 1.0 / (counts.clamp(min=1.0) * R) if R else counts
    if loss.loss_type == "luspo":
        return torch.full_like(counts, 1.0 / max(R, 1))
    if loss.loss_type == "dr_grpo":
        return torch.full_like(counts, 1.0 / (max(R, 1) * (loss.max_completion_length or 1)))
    items = counts.sum() if loss.loss_type == "bnpo" or num_items_in_batch is None else num_items_in_batch
    if isinstance(items, Tensor):
        items = items.reshape(())
    items = counts.new_ones(()) * items  # to the device and dtype without a sync
    return torch.where(items > 0, 1.0 / items, 1.0).expand_as(counts)
