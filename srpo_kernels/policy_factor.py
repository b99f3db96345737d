"""What multiplies the policy term of a token without a gradient: engine mismatch, VESPO's gamma weight, masks.

Vectors of tokens alone: plain PyTorch on any device, one copy for both backends.
"""

import math
from typing import Any

import torch
from torch import Tensor

from srpo_kernels.layout import Layout

_LOWEST_LOG_WEIGHT = math.log(1e-8)  # of TRL's VESPO, after its authors
_LARGEST_LOG_WEIGHT = 20.0


def policy_factor(
    logps: Tensor,
    old_logps: Tensor | None,
    importance_sampling_ratio: Tensor | None,
    kept: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    layout: Layout,
    rule: Any,
) -> Tensor | None:
    """Return the factor of each token, in the shape of the tokens; None: 1 everywhere.

    off-policy mask    0 for a trajectory with A < 0 whose mean of old - current log-probs exceeds the threshold
    vespo              phi(w) = e^lambda w^k e^(-lambda w),  w = prod of ratios, times those of the engines

    Args:
        logps: nats of the current policy; nothing flows back.
        importance_sampling_ratio: per token; NaN counts as 1. It is a part of w for `"vespo"`.
        kept: bool, tokens whose policy term counts.
        rule: a `LossRule`, or a config with its fields.
    """
    factor = importance_sampling_ratio
    if rule.loss_type == "vespo" or rule.off_policy_mask_threshold is not None:
        zero = torch.zeros_like(logps)
        current = torch.where(mask, logps.detach(), zero)
        old = current if old_logps is None else torch.where(mask, old_logps, zero)
        log_ratio = torch.where(current == old, zero, current - old)  # two banned tokens have ratio 1
        if rule.loss_type == "vespo":
            factor = _gamma_weight(log_ratio, importance_sampling_ratio, advantages, mask, layout, rule)
        if rule.off_policy_mask_threshold is not None:
            counts = layout.token_counts(mask).to(log_ratio.dtype).clamp(min=1.0)
            drift = layout.sums(-log_ratio.nan_to_num(0.0)) / counts
            on_policy = (advantages >= 0) | layout.spread(drift <= rule.off_policy_mask_threshold)
            kept = on_policy if kept is None else kept & on_policy
    if kept is None:
        return factor
    if factor is None:
        return kept.to(logps.dtype)
    return torch.where(kept, torch.where(factor.isnan(), 1.0, factor), 0.0)


def times_factor(weights: Tensor, factor: Tensor | None, mask: Tensor) -> Tensor:
    """Return what multiplies a loss that no kernel multiplies: weights times factor, a NaN of it being 1; 0 outside."""
    product = weights if factor is None else weights * torch.where(factor.isnan(), 1.0, factor)
    return torch.where(mask, product, 0.0)


def _gamma_weight(
    log_ratio: Tensor, is_ratio: Tensor | None, advantages: Tensor, mask: Tensor, layout: Layout, rule: Any
) -> Tensor:
    """Return VESPO's weight of each token: that of its trajectory, by the sign of its advantage."""
    log_w = log_ratio.clamp(-_LARGEST_LOG_WEIGHT, _LARGEST_LOG_WEIGHT)
    if is_ratio is not None:
        known = mask & ~is_ratio.isnan()
        log_w = log_w + torch.where(known, is_ratio, 1.0).log().clamp(_LOWEST_LOG_WEIGHT, _LARGEST_LOG_WEIGHT)
    log_w = layout.spread(layout.sums(torch.where(mask, log_w, 0.0)).clamp(_LOWEST_LOG_WEIGHT, _LARGEST_LOG_WEIGHT))
    rises = advantages >= 0
    k = torch.where(rises, rule.vespo_k_pos, rule.vespo_k_neg).to(log_w.dtype)
    rate = torch.where(rises, rule.vespo_lambda_pos, rule.vespo_lambda_neg).to(log_w.dtype).clamp(min=1e-4)
    return (rate + k * log_w - rate * log_w.exp()).exp().nan_to_num(0.0, 0.0, 0.0)
