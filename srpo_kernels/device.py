"""Triton building blocks shared by all kernels: the one copy of the maths in this language.

The twin of each function in plain PyTorch is in `reference.py`. Everything is fp32; callers convert right after a load.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
RATIO_LOG_MAX = tl.constexpr(60.0)
K3_SERIES_BELOW = tl.constexpr(0.5)
K3_MAX = tl.constexpr(10.0)
NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def block_statistics(x, scale, HAS_ENTROPY: tl.constexpr):
    """Reduce one block of logits to (max, sum of e, sum of e * z), z = (x - max) * scale, e = 2^z.

    The maximum is subtracted before scaling: exact near the maximum, unmoved by a common offset.
    """
    block_max = tl.max(x, 0)
    z = (x - tl.where(block_max == NEG_INF, 0.0, block_max)) * scale
    e = tl.exp2(z)
    block_sum = tl.sum(e, 0)
    weighted = 0.0
    if HAS_ENTROPY:
        weighted = tl.sum(e * tl.where(e == 0.0, 0.0, z), 0)
    return block_max, block_sum, weighted


@triton.jit
def merge_statistics(max_a, sum_a, weighted_a, max_b, sum_b, weighted_b, scale):
    """Merge the statistics of two disjoint sets of columns."""
    new_max = tl.maximum(max_a, max_b)
    shift_a = tl.where(max_a == NEG_INF, 0.0, (max_a - new_max) * scale)
    shift_b = tl.where(max_b == NEG_INF, 0.0, (max_b - new_max) * scale)
    factor_a, factor_b = tl.exp2(shift_a), tl.exp2(shift_b)
    # a shift so large that its factor is 0 must not meet it as 0 * inf
    merged = tl.where(factor_a == 0.0, 0.0, factor_a * (weighted_a + sum_a * shift_a))
    merged += tl.where(factor_b == 0.0, 0.0, factor_b * (weighted_b + sum_b * shift_b))
    return new_max, sum_a * factor_a + sum_b * factor_b, merged


@triton.jit
def finish_statistics(target, row_max, row_sum, weighted, inv_temperature):
    """Return (logp, log_sum, entropy) of a row from its merged statistics."""
    log_sum = tl.log(row_sum)
    return (target - row_max) * inv_temperature - log_sum, log_sum, log_sum - LN2 * (weighted / row_sum)


@triton.jit
def k3(d):
    """Return exp(-d) + d - 1, accurate for small d."""
    series = d * 2.755731922e-7 - 2.755731922e-6
    series = series * d + 2.48015873e-5
    series = series * d - 1.98412698e-4
    series = series * d + 1.388888889e-3
    series = series * d - 8.333333333e-3
    series = series * d + 4.166666667e-2
    series = series * d - 1.666666667e-1
    series = series * d + 0.5
    return tl.where(tl.abs(d) < K3_SERIES_BELOW, d * d * series, tl.exp(-d) + d - 1.0)


@triton.jit
def difference(a, b):
    """Return (a - b, slope): 0 and slope 0 where both are -inf."""
    both_banned = (a == b) & (tl.abs(a) == float("inf"))
    return tl.where(both_banned, 0.0, a - b), tl.where(both_banned, 0.0, 1.0)


@triton.jit
def capped_exp(log_ratio):
    """Return exp(min(log_ratio, RATIO_LOG_MAX)) and its derivative."""
    ratio = tl.exp(tl.minimum(log_ratio, RATIO_LOG_MAX))
    return ratio, tl.where(log_ratio <= RATIO_LOG_MAX, ratio, 0.0)


@triton.jit
def clipped_surrogate(ratio, advantage, lowest, highest, delta):
    """Return min(min(ratio, delta) * A, clip(ratio) * A) and its slope in the ratio.

    Ties follow torch: clamp passes the gradient at its bounds, min splits it evenly between equal arguments.
    """
    free = tl.minimum(ratio, delta) * advantage
    bound = tl.minimum(tl.maximum(ratio, lowest), highest) * advantage
    free_slope = tl.where(ratio <= delta, advantage, 0.0)
    bound_slope = tl.where((ratio >= lowest) & (ratio <= highest), advantage, 0.0)
    tie = 0.5 * free_slope + 0.5 * bound_slope
    slope = tl.where(free < bound, free_slope, tl.where(free > bound, bound_slope, tie))
    return tl.where(free < bound, free, bound), slope


@triton.jit
def contrast_of(d, KIND: tl.constexpr):
    """Map a clamped log-prob difference to a contrast."""
    if KIND == "abs":
        return tl.abs(d)
    elif KIND == "k3":
        return tl.minimum(k3(d), K3_MAX)
    else:
        return d


@triton.jit
def trajectory_range(cu_seqlens_ptr, trajectory, T, PACKED: tl.constexpr):
    """Return the first token and one past the last token of a trajectory, as int64."""
    if PACKED:
        start = tl.load(cu_seqlens_ptr + trajectory).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + trajectory + 1).to(tl.int64)
    else:
        start = trajectory.to(tl.int64) * T
        end = start + T
    return start, end
