"""Slow, obvious oracles written from the equations of the method, token by token, in float64.

They share nothing with the library: plain Python floats for the credit stage, `torch.log_softmax` and autograd for the
loss. `log_probs` and `loss` compute in the dtype of their input, so the same lines give the truth (float64) and the
eager result of a tested dtype. Layout is padded: tensors are [B, T] or [B, T, V].
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

PERCEPTION, REASONING = 1, 2


def log_probs(logits: Tensor, completion_ids: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each completion token, 0 where masked; differentiable."""
    rows, tokens = completion_ids.shape
    out = torch.where(mask.bool(), logits[:, :tokens, 0], 0.0) * 0.0  # attached to the graph even when nothing is valid
    for i in range(rows):
        for t in range(tokens):
            if mask[i, t]:
                out[i, t] = torch.log_softmax(logits[i, t] / temperature, dim=-1)[completion_ids[i, t]]
    return out


def entropies(logits: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of the distribution at each token, 0 where masked."""
    rows, tokens = mask.shape
    out = logits.new_zeros(rows, tokens)
    for i in range(rows):
        for t in range(tokens):
            if mask[i, t]:
                logp = torch.log_softmax(logits[i, t].detach() / temperature, dim=-1)
                out[i, t] = -torch.where(logp > -math.inf, logp.exp() * logp, 0.0).sum()
    return out


def kl(logits: Tensor, against: Tensor, temperature: float = 1.0) -> Tensor:
    """KL of the last axis between two contexts: a token that both ban adds 0, one that the second alone bans: inf."""
    p, q = (torch.log_softmax(x / temperature, dim=-1) for x in (logits, against))
    terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
    banned = ((q == -math.inf) & (p > -math.inf)).any(-1)
    return terms.sum(-1).masked_fill(banned, math.inf)


def contrast_of_token(positive: float, negative: float, credit: Any) -> float:
    """Equation (1) for one token: clamp the difference, then apply the kind; no value at all counts as 0."""
    difference = positive - negative
    if math.isnan(difference):
        return 0.0
    difference = max(-credit.contrast_clamp, min(credit.contrast_clamp, difference))
    if credit.contrast_kind == "abs":
        return abs(difference)
    if credit.contrast_kind == "k3":
        return min(10.0, max(0.0, math.expm1(-difference) + difference))
    return difference


def contrast(base, corrupted, ablated, role_ids, mask, credit) -> Tensor:
    """Equation (1) for a batch; 0 outside the credit set. `ablated` may be None for `image_independence`.

    Of `contrast_kind="kl"` the streams hold divergences, and the base is 0: c = 0 - (-KL).
    """
    if credit.contrast_kind == "kl":
        base, corrupted = torch.zeros_like(base), -corrupted
        ablated = None if ablated is None else -ablated
    base, corrupted = base.double().tolist(), corrupted.double().tolist()
    ablated = None if ablated is None else ablated.double().tolist()
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for i, t in credit_set(role_ids, mask):
        if role_ids[i, t] == PERCEPTION:
            out[i, t] = contrast_of_token(base[i][t], corrupted[i][t], credit)
        elif credit.reasoning_signal == "image_independence":
            out[i, t] = contrast_of_token(corrupted[i][t], base[i][t], credit)
        else:
            out[i, t] = contrast_of_token(base[i][t], ablated[i][t], credit)
    return out


def credit_set(role_ids: Tensor, mask: Tensor) -> list[tuple[int, int]]:
    rows, tokens = mask.shape
    return [
        (i, t) for i in range(rows) for t in range(tokens) if mask[i, t] and role_ids[i, t] in (PERCEPTION, REASONING)
    ]


def without_evidence(base, corrupted, ablated, role_ids, mask, credit) -> Tensor:
    """Set to 0 the roles of a trajectory of which no difference has a value."""
    out = role_ids.clone()
    for i in range(mask.shape[0]):
        for role in (PERCEPTION, REASONING):
            stream = ablated if role == REASONING and credit.reasoning_signal != "image_independence" else corrupted
            members = [t for row, t in credit_set(role_ids, mask) if row == i and role_ids[i, t] == role]
            if members and all(math.isnan(float(base[i][t] - stream[i][t])) for t in members):
                out[i, members] = 0
    return out


def weights(contrasts, role_ids, mask, credit, advantages=None) -> Tensor:
    """Equations (2) to (6): 1 on valid tokens outside the credit set, 0 on masked tokens."""
    out = mask.double().cpu().clone()
    for i in range(mask.shape[0]):
        members = [t for row, t in credit_set(role_ids, mask) if row == i]
        roles = [int(role_ids[i, t]) for t in members]
        if not members or (len(set(roles)) == 1 and credit.missing_role == "uniform"):
            continue
        values = [float(contrasts[i, t]) for t in members]
        signs = [1.0] * len(members)
        if credit.direction == "advantage":
            signs = [sign_of(advantages[i] if advantages.dim() == 1 else advantages[i, t]) for t in members]
        for t, weight in zip(members, trajectory_weights(values, roles, signs, credit), strict=True):
            out[i, t] = 1.0 - credit.strength + credit.strength * weight
    return out


def trajectory_weights(values: list[float], roles: list[int], signs: list[float], credit: Any) -> list[float]:
    """Equations (2) to (4) for the credit set of one trajectory."""
    if max(values) == min(values):
        return [1.0] * len(values)

    def baseline_of(role):
        if credit.baseline == "none":
            return 0.0
        pool = [c for c, r in zip(values, roles, strict=True) if credit.baseline == "mean" or r == role]
        return math.fsum(pool) / len(pool)

    exponents = [s * (c - baseline_of(r)) / credit.tau for c, r, s in zip(values, roles, signs, strict=True)]

    def clipped(shift):
        low, high = math.log(credit.weight_min), math.log(credit.weight_max)
        return [math.exp(min(high, max(low, u - shift))) for u in exponents]

    if credit.normalize == "none":
        return clipped(0.0)
    if credit.normalize == "mean":
        unnormalised = clipped(0.0)
        mean = math.fsum(unnormalised) / len(unnormalised)
        return [w / mean for w in unnormalised]
    # "solve": the mean falls as the shift grows; at the two ends every weight sits at one bound.
    low_shift = min(exponents) - math.log(credit.weight_max)
    high_shift = max(exponents) - math.log(credit.weight_min)
    for _ in range(200):
        shift = 0.5 * (low_shift + high_shift)
        if math.fsum(clipped(shift)) / len(exponents) >= 1.0:
            low_shift = shift
        else:
            high_shift = shift
    return clipped(low_shift)


def sign_of(value) -> float:
    return float(value > 0) - float(value < 0)


class OracleLoss(NamedTuple):
    loss: Tensor
    metrics: dict[str, float]


def loss(
    logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: Any,
    *,
    weights: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    num_items_in_batch: float | None = None,
) -> OracleLoss:
    """Equation (7) and its reductions, one token at a time, in the dtype of `logps`; differentiable in `logps`."""
    rows, tokens = logps.shape
    number = logps.new_tensor
    row_terms: list[list[Tensor]] = []
    observed: dict[str, list[float]] = {"kl": [], "low": [], "high": [], "cispo": []}
    for i in range(rows):
        valid = [t for t in range(tokens) if mask[i, t]]
        old = {t: logps[i, t].detach() if old_logps is None else old_logps[i, t].to(logps.dtype) for t in valid}
        sequence_ratio = None
        if config.importance_sampling_level == "sequence_token" and valid:
            sequence_ratio = torch.stack([logps[i, t].detach() - old[t] for t in valid]).mean().exp()
        terms = []
        for t in valid:
            advantage = (advantages[i] if advantages.dim() == 1 else advantages[i, t]).to(logps.dtype)
            weighted = advantage if weights is None else advantage * weights[i, t].to(logps.dtype)
            if sequence_ratio is None:
                ratio = torch.exp(logps[i, t] - old[t])
            else:
                ratio = sequence_ratio * torch.exp(logps[i, t] - logps[i, t].detach())
            if config.loss_type == "cispo":
                term = -torch.clamp(ratio, max=config.epsilon_high).detach() * weighted * logps[i, t]
            else:
                clipped = torch.clamp(ratio, 1 - config.epsilon_low, 1 + config.epsilon_high)
                if config.delta is not None:
                    ratio = torch.clamp(ratio, max=config.delta)
                term = -torch.min(ratio * weighted, clipped * weighted)
            if importance_sampling_ratio is not None:
                column = t if importance_sampling_ratio.shape[1] > 1 else 0
                factor = importance_sampling_ratio[i, column].to(logps.dtype)
                term = term * (number(1.0) if factor.isnan() else factor)
            if config.beta != 0.0:
                gap = ref_logps[i, t].to(logps.dtype) - logps[i, t]
                kl = torch.exp(gap) - gap - 1
                term = term + config.beta * kl
                observed["kl"].append(kl.item())
            terms.append(term)
            ratio, advantage = ratio.item(), advantage.item()
            observed["low"].append(float(ratio < 1 - config.epsilon_low and advantage < 0))
            observed["high"].append(float(ratio > 1 + config.epsilon_high and advantage > 0))
            observed["cispo"].append(float(ratio > config.epsilon_high and advantage > 0))
        row_terms.append(terms)

    attached_zero = torch.where(mask.bool(), logps, 0.0).sum() * 0.0
    count = sum(len(terms) for terms in row_terms)
    total = attached_zero + sum((sum(terms) for terms in row_terms if terms), number(0.0))
    if config.loss_type == "grpo":
        row_means = [sum(terms) / len(terms) for terms in row_terms if terms]
        value = attached_zero + sum(row_means, number(0.0)) / max(rows, 1)
    elif config.loss_type == "bnpo":
        value = total / max(count, 1)
    elif config.loss_type == "dr_grpo":
        value = total / (max(rows, 1) * config.max_completion_length)
    else:
        value = total / max(float(count if num_items_in_batch is None else num_items_in_batch), 1.0)
    return OracleLoss(value, metrics_of(observed, config))


def metrics_of(observed: dict[str, list[float]], config: Any) -> dict[str, float]:
    """Means over the valid tokens of the batch, under TRL's names."""

    def mean(values):
        return math.fsum(values) / max(len(values), 1)

    metrics = {}
    if config.beta != 0.0:
        metrics["kl"] = mean(observed["kl"])
    if config.loss_type == "cispo":
        metrics["cispo_clip_ratio"] = mean(observed["cispo"])
    else:
        metrics["clip_ratio/low_mean"] = mean(observed["low"])
        metrics["clip_ratio/high_mean"] = mean(observed["high"])
        metrics["clip_ratio/region_mean"] = mean(observed["low"]) + mean(observed["high"])
    return metrics
