"""Contrasts to positive token weights: one program per trajectory.

    c = f(clip(base - against)),  u = (c - b) / tau,  w = clip(exp(u), w_min, w_max), normalised over the credit set

Reads log-probs, role ids and mask `[N]` of padded or packed trajectories; writes `contrast`, `weights` (fp32) and
`flags` (uint8) `[N]` and `baseline` `[R]`. Blocks start at the trajectory and sums run over them in order, so no bit
depends on padding or neighbours. Between passes `weights` holds u and `flags` the role: a barrier separates the passes.
"""

# Triton's decorated functions are launched, not called, and their annotations are constexprs: pyright knows neither.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from srpo_kernels import launch
from srpo_kernels.device import contrast_of, trajectory_range
from srpo_kernels.rules import CreditRule

SOLVE_STEPS = tl.constexpr(40)
AT_LOWER_BOUND, AT_UPPER_BOUND, NO_VALUE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)


@triton.jit
def _contrast_block(
    contrast_in_ptr, base_ptr, corrupted_ptr, ablated_ptr, tokens, role, clamp,
    GIVEN: tl.constexpr, KIND: tl.constexpr, ONE_PASS: tl.constexpr,
):  # fmt: skip
    """Return (contrast, no_value) of a block of tokens; both are 0 where the role is 0."""
    credited = role != 0
    if GIVEN:
        raw = tl.load(contrast_in_ptr + tokens, mask=credited, other=0.0).to(tl.float32)
        no_value = raw != raw
        bounded = tl.where(raw > 0, clamp, -clamp)
        c = tl.where(tl.abs(raw) == float("inf"), bounded, tl.where(no_value, 0.0, raw))
    else:
        if ONE_PASS:
            against = tl.load(corrupted_ptr + tokens, mask=credited, other=0.0).to(tl.float32)
        else:
            corrupted = tl.load(corrupted_ptr + tokens, mask=role == 1, other=0.0).to(tl.float32)
            ablated = tl.load(ablated_ptr + tokens, mask=role == 2, other=0.0).to(tl.float32)
            against = tl.where(role == 1, corrupted, ablated)
        if KIND == "kl":  # a stream holds its divergences, which are at least 0; what nobody credits is loaded as 0
            no_value = against != against
            c = tl.minimum(tl.where(no_value, 0.0, against), clamp)
            if ONE_PASS:
                c = tl.where(role == 2, -c, c)
        else:
            raw = tl.load(base_ptr + tokens, mask=credited, other=0.0).to(tl.float32) - against
            if ONE_PASS:
                raw = tl.where(role == 2, -raw, raw)
            no_value = raw != raw
            d = tl.minimum(tl.maximum(tl.where(no_value, 0.0, raw), -clamp), clamp)
            c = tl.where(credited, contrast_of(d, KIND), 0.0)
    return c, no_value


@triton.jit
def _exponents(weights_ptr, flags_ptr, tokens, end):
    """Return (u, credited) of a block, as the exponent pass left them."""
    credited = (tl.load(flags_ptr + tokens, mask=tokens < end, other=0) & 3) != 0
    return tl.load(weights_ptr + tokens, mask=credited, other=0.0), credited


@triton.jit
def _clipped_exp(u, weight_min, weight_max):
    return tl.minimum(tl.maximum(tl.exp(u), weight_min), weight_max)


@triton.jit
def _sum_of_weights(weights_ptr, flags_ptr, start, end, offset, weight_min, weight_max, BLOCK_T: tl.constexpr):
    total = 0.0
    for first in range(start, end, BLOCK_T):
        u, credited = _exponents(weights_ptr, flags_ptr, first + tl.arange(0, BLOCK_T), end)
        total += tl.sum(tl.where(credited, _clipped_exp(u - offset, weight_min, weight_max), 0.0), 0)
    return total


@triton.jit
def _solve_offset(weights_ptr, flags_ptr, start, end, n, weight_min, weight_max, BLOCK_T: tl.constexpr):
    """Find the shift of u under which the clipped weights have mean 1.

    Bisection between the smallest and the largest u; one exact step on the weights that are not clipped then removes
    what the resolution of u left over.
    """
    lo, hi = float("inf"), float("-inf")
    for first in range(start, end, BLOCK_T):
        u, credited = _exponents(weights_ptr, flags_ptr, first + tl.arange(0, BLOCK_T), end)
        lo = tl.minimum(lo, tl.min(tl.where(credited, u, float("inf")), 0))
        hi = tl.maximum(hi, tl.max(tl.where(credited, u, float("-inf")), 0))
    for _ in range(SOLVE_STEPS):
        middle = 0.5 * (lo + hi)
        above = _sum_of_weights(weights_ptr, flags_ptr, start, end, middle, weight_min, weight_max, BLOCK_T) > n
        lo, hi = tl.where(above, middle, lo), tl.where(above, hi, middle)
    offset = 0.5 * (lo + hi)
    free, clipped = 0.0, 0.0
    for first in range(start, end, BLOCK_T):
        u, credited = _exponents(weights_ptr, flags_ptr, first + tl.arange(0, BLOCK_T), end)
        w = tl.exp(u - offset)
        inside = (w > weight_min) & (w < weight_max)
        free += tl.sum(tl.where(credited & inside, w, 0.0), 0)
        clipped += tl.sum(tl.where(credited & ~inside, tl.minimum(tl.maximum(w, weight_min), weight_max), 0.0), 0)
    usable = (free > 0.0) & (n > clipped)
    return offset - tl.where(usable, tl.log(tl.where(usable, n - clipped, 1.0) / tl.where(usable, free, 1.0)), 0.0)


@triton.jit(
    do_not_specialize=["T"],
    do_not_specialize_on_alignment=[
        "contrast_in_ptr", "base_ptr", "corrupted_ptr", "ablated_ptr", "role_ids_ptr", "mask_ptr", "advantages_ptr",
        "cu_seqlens_ptr",
    ],
)  # fmt: skip
def _token_credit_fwd_kernel(
    contrast_in_ptr, base_ptr, corrupted_ptr, ablated_ptr, role_ids_ptr, mask_ptr, advantages_ptr,  # [N]
    cu_seqlens_ptr,  # [R + 1]
    contrast_ptr, weights_ptr, flags_ptr,  # [N]
    baseline_ptr,  # [R]
    T, tau, weight_min, weight_max, strength, clamp,
    GIVEN: tl.constexpr, KIND: tl.constexpr, ONE_PASS: tl.constexpr, BASELINE: tl.constexpr,
    SIGNED: tl.constexpr, NORMALIZE: tl.constexpr, UNIFORM_IF_MISSING: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    trajectory = tl.program_id(0)
    start, end = trajectory_range(cu_seqlens_ptr, trajectory, T, PACKED)
    tau, strength, clamp = tl.cast(tau, tl.float32), tl.cast(strength, tl.float32), tl.cast(clamp, tl.float32)
    weight_min, weight_max = tl.cast(weight_min, tl.float32), tl.cast(weight_max, tl.float32)

    n_p, n_r, sum_p, sum_r, valued_p, valued_r = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    smallest, largest = float("inf"), float("-inf")
    for first in range(start, end, BLOCK_T):
        tokens = first + tl.arange(0, BLOCK_T)
        valid = tl.load(mask_ptr + tokens, mask=tokens < end, other=0) != 0
        role = tl.load(role_ids_ptr + tokens, mask=valid, other=0).to(tl.int32)
        role = tl.where((role == 1) | (role == 2), role, 0)
        c, no_value = _contrast_block(
            contrast_in_ptr, base_ptr, corrupted_ptr, ablated_ptr, tokens, role, clamp, GIVEN, KIND, ONE_PASS
        )
        tl.store(contrast_ptr + tokens, c, mask=tokens < end)
        tl.store(flags_ptr + tokens, (role + tl.where(no_value, NO_VALUE, 0)).to(tl.uint8), mask=tokens < end)
        n_p += tl.sum(tl.where(role == 1, 1.0, 0.0), 0)
        n_r += tl.sum(tl.where(role == 2, 1.0, 0.0), 0)
        sum_p += tl.sum(tl.where(role == 1, c, 0.0), 0)
        sum_r += tl.sum(tl.where(role == 2, c, 0.0), 0)
        valued = tl.where(no_value, 0, role)
        valued_p += tl.sum(tl.where(valued == 1, 1.0, 0.0), 0)
        valued_r += tl.sum(tl.where(valued == 2, 1.0, 0.0), 0)
        smallest = tl.minimum(smallest, tl.min(tl.where(valued != 0, c, float("inf")), 0))
        largest = tl.maximum(largest, tl.max(tl.where(valued != 0, c, float("-inf")), 0))
    # a role none of whose contrasts has a value is missing; beside others that have one, no value counts as 0
    has_zeros = ((valued_p > 0.0) & (valued_p < n_p)) | ((valued_r > 0.0) & (valued_r < n_r))
    smallest = tl.where(has_zeros, tl.minimum(smallest, 0.0), smallest)
    largest = tl.where(has_zeros, tl.maximum(largest, 0.0), largest)
    n_p, n_r = tl.where(valued_p > 0.0, n_p, 0.0), tl.where(valued_r > 0.0, n_r, 0.0)
    n = n_p + n_r
    mean = (sum_p + sum_r) / tl.maximum(n, 1.0)
    baseline_p, baseline_r = mean, mean
    if BASELINE == "none":
        baseline_p, baseline_r = mean * 0.0, mean * 0.0
    if BASELINE == "role_mean":
        baseline_p, baseline_r = sum_p / tl.maximum(n_p, 1.0), sum_r / tl.maximum(n_r, 1.0)
    lacking = n == 0.0
    if UNIFORM_IF_MISSING:
        lacking = lacking | (n_p == 0.0) | (n_r == 0.0)
    uniform = lacking | (largest <= smallest)
    tl.store(baseline_ptr + trajectory, tl.where(lacking, float("nan"), mean))

    tl.debug_barrier()
    for first in range(start, end, BLOCK_T):
        tokens = first + tl.arange(0, BLOCK_T)
        flags = tl.load(flags_ptr + tokens, mask=tokens < end, other=0)
        role = flags & 3
        missing = tl.where(role == 1, n_p, tl.where(role == 2, n_r, 1.0)) == 0.0
        role = tl.where(missing, 0, role)
        tl.store(contrast_ptr + tokens, float("nan"), mask=missing)
        tl.store(flags_ptr + tokens, (flags & NO_VALUE).to(tl.uint8), mask=missing)
        c = tl.load(contrast_ptr + tokens, mask=role != 0, other=0.0)
        u = (c - tl.where(role == 1, baseline_p, baseline_r)) / tau
        if SIGNED:
            advantage = tl.load(advantages_ptr + tokens, mask=role != 0, other=0.0).to(tl.float32)
            u *= tl.where(advantage > 0.0, 1.0, tl.where(advantage < 0.0, -1.0, 0.0))
        tl.store(weights_ptr + tokens, u, mask=tokens < end)

    tl.debug_barrier()
    offset, divisor = 0.0, 1.0
    if NORMALIZE == "solve":
        offset = _solve_offset(weights_ptr, flags_ptr, start, end, n, weight_min, weight_max, BLOCK_T)
    if NORMALIZE == "mean":
        total = _sum_of_weights(weights_ptr, flags_ptr, start, end, offset, weight_min, weight_max, BLOCK_T)
        divisor = tl.where(uniform, 1.0, total / tl.maximum(n, 1.0))

    tl.debug_barrier()
    for first in range(start, end, BLOCK_T):
        tokens = first + tl.arange(0, BLOCK_T)
        u, credited = _exponents(weights_ptr, flags_ptr, tokens, end)
        valid = tl.load(mask_ptr + tokens, mask=tokens < end, other=0) != 0
        no_value = tl.load(flags_ptr + tokens, mask=tokens < end, other=0) & NO_VALUE
        raw = tl.exp(u - offset)
        w = _clipped_exp(u - offset, weight_min, weight_max) / divisor
        w = tl.where(strength == 1.0, w, 1.0 + strength * (w - 1.0))
        weighted = credited & (uniform == 0)
        tl.store(weights_ptr + tokens, tl.where(weighted, w, tl.where(valid, 1.0, 0.0)), mask=tokens < end)
        low = tl.where(weighted & (raw < weight_min), AT_LOWER_BOUND, 0)
        high = tl.where(weighted & (raw > weight_max), AT_UPPER_BOUND, 0)
        tl.store(flags_ptr + tokens, (no_value + low + high).to(tl.uint8), mask=tokens < end)


def token_credit_fwd(
    contrast: Tensor | None,
    base: Tensor | None,
    corrupted: Tensor | None,
    ablated: Tensor | None,
    role_ids: Tensor,
    mask: Tensor,
    advantages: Tensor | None,
    cu_seqlens: Tensor | None,
    n_trajectories: int,
    rule: CreditRule,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `contrast`, `weights`, `flags` `[N]` and `baseline` `[R]` of contiguous inputs `[N]`."""
    out, weights = (torch.empty(mask.shape, dtype=torch.float32, device=mask.device) for _ in range(2))
    flags = torch.empty(mask.shape, dtype=torch.uint8, device=mask.device)
    means = torch.empty(n_trajectories, dtype=torch.float32, device=mask.device)
    if not n_trajectories:
        return out, weights, flags, means
    unused = mask
    _token_credit_fwd_kernel[(n_trajectories,)](
        *(unused if x is None else x for x in (contrast, base, corrupted, ablated)), role_ids, mask,
        unused if advantages is None else advantages, unused if cu_seqlens is None else cu_seqlens,
        out, weights, flags, means,
        mask.numel() // n_trajectories, rule.tau, rule.weight_min, rule.weight_max, rule.strength,
        rule.contrast_clamp,
        GIVEN=contrast is not None,
        KIND=rule.contrast_kind,
        ONE_PASS=rule.reasoning_signal == "image_independence",
        BASELINE=rule.baseline,
        SIGNED=rule.direction == "advantage",
        NORMALIZE=rule.normalize,
        UNIFORM_IF_MISSING=rule.missing_role == "uniform",
        PACKED=cu_seqlens is not None,
        BLOCK_T=launch.TOKENS_PER_BLOCK,
        num_warps=launch.TOKEN_WARPS,
        **launch.FUSION,
    )  # fmt: skip
    return out, weights, flags, means
