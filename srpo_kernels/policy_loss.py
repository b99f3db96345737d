"""Log-probs, weights and advantages to the loss and its coefficients: one program per trajectory.

    l = -min(min(rho, delta) * A * w, clip(rho) * A * w) * is_ratio + beta * k3(logps - ref),  loss_i = scale_i * sum l

Reads fp32 `[N]` vectors of padded or packed trajectories; writes `coefficient` = d loss / d logps `[N]`, `loss` `[R]`
and metric sums `[R, 3]` (tokens clipped below, tokens clipped above, KL). Nothing is left to do in backward but to
multiply the coefficient by the upstream scalar.
"""

# Triton's decorated functions are launched, not called, and their annotations are constexprs: pyright knows neither.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from srpo_kernels import launch
from srpo_kernels.device import difference, token_loss, trajectory_range
from srpo_kernels.rules import LossRule


@triton.jit
def log_ratio_of(logps, old_logps_ptr, tokens, valid, HAS_OLD: tl.constexpr):
    """Return (log ratio, its slope in logps); the ratio is exactly 1 without old log-probs."""
    old = logps
    if HAS_OLD:
        old = tl.load(old_logps_ptr + tokens, mask=valid, other=0.0).to(tl.float32)
    return difference(logps, old)


@triton.jit
def token_inputs(
    advantages_ptr, weights_ptr, is_ratio_ptr, ref_logps_ptr, tokens, valid,
    HAS_KL: tl.constexpr, HAS_IS_RATIO: tl.constexpr,
):  # fmt: skip
    """Return (advantage, weight, importance sampling ratio, reference log-prob); what is not there is 0."""
    advantage = tl.load(advantages_ptr + tokens, mask=valid, other=0.0).to(tl.float32)
    weight = tl.load(weights_ptr + tokens, mask=valid, other=0.0).to(tl.float32)
    is_ratio, ref = tl.zeros_like(advantage), tl.zeros_like(advantage)
    if HAS_IS_RATIO:
        is_ratio = tl.load(is_ratio_ptr + tokens, mask=valid, other=0.0).to(tl.float32)
    if HAS_KL:
        ref = tl.load(ref_logps_ptr + tokens, mask=valid, other=0.0).to(tl.float32)
    return advantage, weight, is_ratio, ref


@triton.jit(
    do_not_specialize=["T"],
    do_not_specialize_on_alignment=[
        "logps_ptr", "old_logps_ptr", "ref_logps_ptr", "is_ratio_ptr", "advantages_ptr", "weights_ptr", "mask_ptr",
        "cu_seqlens_ptr", "scale_ptr",
    ],
)  # fmt: skip
def _policy_loss_fwd_kernel(
    logps_ptr, old_logps_ptr, ref_logps_ptr, is_ratio_ptr, advantages_ptr, weights_ptr, mask_ptr,  # [N]
    cu_seqlens_ptr,  # [R + 1]
    scale_ptr,  # [R]
    coefficient_ptr,  # [N]
    loss_ptr,  # [R]
    sums_ptr,  # [R, 3]
    T, lowest, highest, delta, beta,
    KIND: tl.constexpr, SEQUENCE_TOKEN: tl.constexpr, HAS_OLD: tl.constexpr, HAS_KL: tl.constexpr,
    CORRECTS_KL: tl.constexpr, HAS_IS_RATIO: tl.constexpr, PACKED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    trajectory = tl.program_id(0)
    start, end = trajectory_range(cu_seqlens_ptr, trajectory, T, PACKED)
    scale = tl.load(scale_ptr + trajectory).to(tl.float32)
    lowest, highest = tl.cast(lowest, tl.float32), tl.cast(highest, tl.float32)
    delta, beta = tl.cast(delta, tl.float32), tl.cast(beta, tl.float32)

    sequence_log_ratio = 0.0
    if SEQUENCE_TOKEN:
        total, count = 0.0, 0.0
        for first in range(start, end, BLOCK_T):
            tokens = first + tl.arange(0, BLOCK_T)
            valid = tl.load(mask_ptr + tokens, mask=tokens < end, other=0) != 0
            logps = tl.load(logps_ptr + tokens, mask=valid, other=0.0).to(tl.float32)
            log_ratio, _ = log_ratio_of(logps, old_logps_ptr, tokens, valid, HAS_OLD)
            total += tl.sum(tl.where(valid, log_ratio, 0.0), 0)
            count += tl.sum(tl.where(valid, 1.0, 0.0), 0)
        sequence_log_ratio = total / tl.maximum(count, 1.0)

    loss, n_low, n_high, kl_sum = 0.0, 0.0, 0.0, 0.0
    for first in range(start, end, BLOCK_T):
        tokens = first + tl.arange(0, BLOCK_T)
        valid = tl.load(mask_ptr + tokens, mask=tokens < end, other=0) != 0
        logps = tl.load(logps_ptr + tokens, mask=valid, other=0.0).to(tl.float32)
        log_ratio, log_slope = log_ratio_of(logps, old_logps_ptr, tokens, valid, HAS_OLD)
        if SEQUENCE_TOKEN:
            log_ratio = tl.where(valid, sequence_log_ratio, 0.0)
        sign, weight, is_ratio, ref = token_inputs(
            advantages_ptr, weights_ptr, is_ratio_ptr, ref_logps_ptr, tokens, valid, HAS_KL, HAS_IS_RATIO
        )
        policy, slope, low, high, kl = token_loss(
            logps, log_ratio, log_slope, sign, weight, is_ratio, ref, lowest, highest, delta, beta,
            KIND, HAS_KL, CORRECTS_KL, HAS_IS_RATIO,
        )  # fmt: skip
        if HAS_KL:
            kl_sum += tl.sum(tl.where(valid, kl, 0.0), 0)
        loss += tl.sum(tl.where(valid, policy, 0.0), 0)
        n_low += tl.sum(tl.where(valid & low, 1.0, 0.0), 0)
        n_high += tl.sum(tl.where(valid & high, 1.0, 0.0), 0)
        tl.store(coefficient_ptr + tokens, tl.where(valid, slope * scale, 0.0), mask=tokens < end)
    tl.store(loss_ptr + trajectory, loss * scale)
    tl.store(sums_ptr + trajectory * 3, n_low)
    tl.store(sums_ptr + trajectory * 3 + 1, n_high)
    tl.store(sums_ptr + trajectory * 3 + 2, kl_sum)


def ratio_bounds(rule: LossRule) -> tuple[float, float, float]:
    """Return `lowest`, `highest` and `delta` of `token_loss`."""
    if rule.kind == "sapo":
        return rule.sapo_temperature_neg, rule.sapo_temperature_pos, float("inf")
    highest = rule.epsilon_high if rule.kind == "cispo" else 1.0 + rule.epsilon_high
    return 1.0 - rule.epsilon_low, highest, float("inf") if rule.delta is None else rule.delta


def policy_loss_fwd(
    logps: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    importance_sampling_ratio: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    mask: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor | None,
    rule: LossRule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `loss` `[R]`, metric sums `[R, 3]` and `coefficient` `[N]` of contiguous inputs `[N]`."""
    n_trajectories = scale.numel()
    options = {"dtype": torch.float32, "device": logps.device}
    coefficient = torch.empty(logps.shape, **options)
    loss, sums = torch.empty(n_trajectories, **options), torch.empty(n_trajectories, 3, **options)
    if not n_trajectories:
        return loss, sums, coefficient
    _policy_loss_fwd_kernel[(n_trajectories,)](
        logps, *(logps if x is None else x for x in (old_logps, ref_logps, importance_sampling_ratio)),
        advantages, weights, mask, mask if cu_seqlens is None else cu_seqlens, scale,
        coefficient, loss, sums,
        mask.numel() // n_trajectories, *ratio_bounds(rule), float(rule.beta),
        KIND=rule.kind,
        CORRECTS_KL=rule.use_bias_correction_kl,
        SEQUENCE_TOKEN=rule.importance_sampling_level == "sequence_token",
        HAS_OLD=old_logps is not None,
        HAS_KL=rule.beta != 0.0,
        HAS_IS_RATIO=importance_sampling_ratio is not None,
        PACKED=cu_seqlens is not None,
        BLOCK_T=launch.TOKENS_PER_BLOCK,
        num_warps=launch.TOKEN_WARPS,
        **launch.FUSION,
    )  # fmt: skip
    return loss, sums, coefficient
