"""Triton building blocks shared by all kernels: the one copy of the maths in this language.

The twin of each function in plain PyTorch is in `reference.py`. Everything is fp32; callers convert right after a load.
"""

# Triton's decorated functions are launched, not called, and their annotations are constexprs: pyright knows neither.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportIndexIssue=false

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
RATIO_LOG_MAX = tl.constexpr(60.0)
K3_SERIES_BELOW = tl.constexpr(0.5)
K3_MAX = tl.constexpr(10.0)
NEG_INF = tl.constexpr(float("-inf"))
FLOOR = tl.constexpr(-1e30)  # stands for -inf: a power of two of it is 0, and so is 0 times it
VECTORS = tl.constexpr(4)  # of a block that a lane takes


@triton.jit
def _neighbours(x):
    """Split [..., 2n] into its even and its odd elements, as [n] each."""
    return tl.split(tl.reshape(x, [x.numel // 2, 2]))


@triton.jit
def _halves(x):
    """Split [2n] into its first and its last n elements."""
    return tl.split(tl.permute(tl.reshape(x, [2, x.shape[0] // 2]), [1, 0]))


@triton.jit
def _fold(x, k: tl.constexpr, VECTOR: tl.constexpr):
    """Split the columns of a block in two: neighbours in the first folds, until vectors are gone, then halves."""
    if 2**k < VECTOR:
        return _neighbours(x)
    else:
        return _halves(x)


@triton.jit
def _finite(x):
    """Return what to subtract from numbers whose maximum is `x`: -inf - -inf would be NaN."""
    return tl.where(x == NEG_INF, 0.0, x)


@triton.jit
def _vector_sums(x, subtracted, scale, HAS_ENTROPY: tl.constexpr, VECTOR: tl.constexpr):
    """Return sum e and sum e * z over each vector of a block, pair by pair: few values live at a time."""
    if VECTOR == 2:
        LANES: tl.constexpr = subtracted.shape[0]
        a, b = _neighbours(x)
        z_a = (tl.reshape(a, [a.shape[0] // LANES, LANES]) - subtracted[None, :]) * scale
        z_b = (tl.reshape(b, [b.shape[0] // LANES, LANES]) - subtracted[None, :]) * scale
        e_b, weighted = tl.exp2(z_b), 0.0
        if HAS_ENTROPY:
            weighted = e_b * tl.maximum(z_b, FLOOR)
        e_a = tl.exp2(z_a)
        if HAS_ENTROPY:
            weighted = tl.fma(e_a, tl.maximum(z_a, FLOOR), weighted)
        return e_a + e_b, weighted
    else:
        a, b = _neighbours(x)
        total_a, weighted_a = _vector_sums(a, subtracted, scale, HAS_ENTROPY, VECTOR // 2)
        total_b, weighted_b = _vector_sums(b, subtracted, scale, HAS_ENTROPY, VECTOR // 2)
        return total_a + total_b, weighted_a + weighted_b


@triton.jit
def _sum_of_halves(x):
    """Add up the rows of [n, LANES], half by half."""
    if x.shape[0] == 1:
        return tl.reshape(x, [x.shape[1]])
    else:
        a, b = tl.split(tl.permute(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), [1, 2, 0]))
        return _sum_of_halves(a + b)


@triton.jit
def add_block(lane_max, lane_sum, lane_weighted, x, scale, HAS_ENTROPY: tl.constexpr, VECTOR: tl.constexpr):
    """Add a block of logits to its lanes' (max, sum of e, sum of e * z), z = (x - max) * scale, e = 2^z.

    A lane is what one thread has of a block that is loaded `VECTOR` columns at a time. The order of its sum is written
    out, so that no bit depends on how wide the loads really are, and on which thread columns land on. The maximum is
    subtracted before scaling: exact near the maximum, unmoved by a common offset.
    """
    block_max = x
    for k in tl.static_range(VECTOR // 4 + 3):  # log2(VECTORS * VECTOR), of a vector of 4 or 8
        a, b = _fold(block_max, k, VECTOR)
        block_max = tl.maximum(a, b)
    new_max = tl.maximum(lane_max, block_max)
    subtracted = _finite(new_max)
    shift = tl.maximum((lane_max - subtracted) * scale, FLOOR)
    factor = tl.exp2(shift)
    block_sum, weighted = _vector_sums(x, subtracted, scale, HAS_ENTROPY, VECTOR)
    if HAS_ENTROPY:
        lane_weighted = tl.fma(tl.fma(lane_sum, shift, lane_weighted), factor, _sum_of_halves(weighted))
    return new_max, tl.fma(lane_sum, factor, _sum_of_halves(block_sum)), lane_weighted


@triton.jit
def pick_column(x, column, VECTOR: tl.constexpr):
    """Return the element of a block at `column`, which one fold after the other narrows down.

    To compare every column with an id would cost a register each.
    """
    for k in tl.static_range(VECTOR // 4 + 3):
        a, b = _fold(x, k, VECTOR)
        if 2**k < VECTOR:
            x = tl.where(column % 2 == 1, b, a)
            column = column // 2
        else:
            x = tl.where(column >= x.shape[0] // 2, b, a)
            column = column % x.shape[0]
    return tl.sum(tl.where(tl.arange(0, x.shape[0]) == column, x, 0.0), 0)


@triton.jit
def reduce_lanes(lane_max, lane_sum, lane_weighted, scale):
    """Merge the statistics of lanes, the last axis, into those of a chunk."""
    chunk_max = tl.max(lane_max, -1)
    shift = tl.maximum((lane_max - tl.expand_dims(_finite(chunk_max), -1)) * scale, FLOOR)
    factor = tl.exp2(shift)
    # fma with 0: a product that must not be fused into the sum, which adds it in some order of the compiler's
    chunk_sum = tl.sum(tl.fma(lane_sum, factor, 0.0), -1)
    return chunk_max, chunk_sum, tl.sum(tl.fma(tl.fma(lane_sum, shift, lane_weighted), factor, 0.0), -1)


@triton.jit
def edge_statistics(x, scale):
    """Reduce the columns that fill no vector: a tensor too small for its layout to differ."""
    edge_max = tl.max(x, 0)
    z = (x - _finite(edge_max)) * scale
    e = tl.exp2(z)
    return edge_max, tl.sum(e, 0), tl.sum(tl.fma(e, tl.maximum(z, FLOOR), 0.0), 0)


@triton.jit
def merge_statistics(max_a, sum_a, weighted_a, max_b, sum_b, weighted_b, scale):
    """Merge the statistics of two disjoint sets of columns."""
    new_max = tl.maximum(max_a, max_b)
    subtracted = _finite(new_max)
    shift_a = tl.maximum((max_a - subtracted) * scale, FLOOR)
    shift_b = tl.maximum((max_b - subtracted) * scale, FLOOR)
    factor_a, factor_b = tl.exp2(shift_a), tl.exp2(shift_b)
    merged = tl.fma(tl.fma(sum_a, shift_a, weighted_a), factor_a, tl.fma(sum_b, shift_b, weighted_b) * factor_b)
    return new_max, tl.fma(sum_a, factor_a, sum_b * factor_b), merged


@triton.jit
def finish_statistics(target, row_max, row_sum, weighted, inv_temperature):
    """Return (logp, log_sum, entropy) of a row from its merged statistics."""
    log_sum = tl.log(row_sum)
    return (target - row_max) * inv_temperature - log_sum, log_sum, log_sum - LN2 * (weighted / row_sum)


@triton.jit
def _cross_sums(x, y, subtracted, against, scale, VECTOR: tl.constexpr):
    """Return sum e * z over each vector, e of `x` and z of `y`: `_vector_sums` for two rows."""
    if VECTOR == 2:
        LANES: tl.constexpr = subtracted.shape[0]
        x_a, x_b = _neighbours(x)
        y_a, y_b = _neighbours(y)
        ROWS: tl.constexpr = x_a.shape[0] // LANES
        e_a = tl.exp2((tl.reshape(x_a, [ROWS, LANES]) - subtracted[None, :]) * scale)
        e_b = tl.exp2((tl.reshape(x_b, [ROWS, LANES]) - subtracted[None, :]) * scale)
        z_a = tl.maximum((tl.reshape(y_a, [ROWS, LANES]) - against[None, :]) * scale, FLOOR)
        z_b = tl.maximum((tl.reshape(y_b, [ROWS, LANES]) - against[None, :]) * scale, FLOOR)
        return tl.fma(e_a, z_a, e_b * z_b)
    else:
        x_a, x_b = _neighbours(x)
        y_a, y_b = _neighbours(y)
        cross_a = _cross_sums(x_a, y_a, subtracted, against, scale, VECTOR // 2)
        return cross_a + _cross_sums(x_b, y_b, subtracted, against, scale, VECTOR // 2)


@triton.jit
def banned_columns(x, y):
    """Return x where y alone is banned, -inf elsewhere: its maximum says whether the divergence is infinite."""
    return tl.where(y == NEG_INF, x, NEG_INF)


@triton.jit
def add_cross(
    lane_cross, lane_banned, lane_sum, lane_max, new_max, against_max, new_against_max, x, y, scale,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Add a block of two rows to its lanes' (sum of e * z, e of `x` and z of `y`; largest `x` where `y` is banned).

    `lane_sum`, `lane_max` and `against_max` are those before `add_block` took the block of each row.
    """
    banned = banned_columns(x, y)
    for k in tl.static_range(VECTOR // 4 + 3):
        a, b = _fold(banned, k, VECTOR)
        banned = tl.maximum(a, b)
    subtracted, against = _finite(new_max), _finite(new_against_max)
    factor = tl.exp2(tl.maximum((lane_max - subtracted) * scale, FLOOR))
    shift = tl.maximum((against_max - against) * scale, FLOOR)
    block_cross = _sum_of_halves(_cross_sums(x, y, subtracted, against, scale, VECTOR))
    lane_cross = tl.fma(tl.fma(lane_sum, shift, lane_cross), factor, block_cross)
    return lane_cross, tl.maximum(lane_banned, banned)


@triton.jit
def reduce_cross(lane_cross, lane_sum, lane_max, chunk_max, against_max, chunk_against_max, scale):
    """Merge the cross sums of lanes into that of a chunk."""
    factor = tl.exp2(tl.maximum((lane_max - _finite(chunk_max)) * scale, FLOOR))
    shift = tl.maximum((against_max - _finite(chunk_against_max)) * scale, FLOOR)
    return tl.sum(tl.fma(tl.fma(lane_sum, shift, lane_cross), factor, 0.0), 0)


@triton.jit
def edge_cross(x, y, edge_max, against_max, scale):
    """Return the cross sum of the columns that fill no vector."""
    e = tl.exp2((x - _finite(edge_max)) * scale)
    return tl.sum(tl.fma(e, tl.maximum((y - _finite(against_max)) * scale, FLOOR), 0.0), 0)


@triton.jit
def merge_cross(max_a, sum_a, against_a, cross_a, max_b, sum_b, against_b, cross_b, scale):
    """Merge the cross sums of two disjoint sets of columns."""
    subtracted, against = _finite(tl.maximum(max_a, max_b)), _finite(tl.maximum(against_a, against_b))
    factor_a = tl.exp2(tl.maximum((max_a - subtracted) * scale, FLOOR))
    factor_b = tl.exp2(tl.maximum((max_b - subtracted) * scale, FLOOR))
    shift_a = tl.maximum((against_a - against) * scale, FLOOR)
    shift_b = tl.maximum((against_b - against) * scale, FLOOR)
    return tl.fma(tl.fma(sum_a, shift_a, cross_a), factor_a, tl.fma(sum_b, shift_b, cross_b) * factor_b)


@triton.jit
def finish_kl(row_sum, weighted, cross, log_sum, against_log_sum, banned):
    """Return KL(p || q) >= 0 of a row from its merged statistics; infinite where q alone bans a token."""
    kl = LN2 * ((weighted - cross) / row_sum) - log_sum + against_log_sum
    return tl.where(banned > NEG_INF, float("inf"), tl.where(kl < 0.0, 0.0, kl))


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
def soft_gate(ratio, sign, temperature_pos, temperature_neg):
    """Return SAPO's gate 4 / tau * sigmoid(tau * (ratio - 1)) and its slope in the ratio; tau by the sign of A."""
    tau = tl.where(sign > 0.0, temperature_pos, temperature_neg)
    gate = 1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))
    return 4.0 / tau * gate, 4.0 * gate * (1.0 - gate)


@triton.jit
def token_loss(
    logps, log_ratio, log_slope, sign, weight, is_ratio, ref, lowest, highest, delta, beta,
    KIND: tl.constexpr, HAS_KL: tl.constexpr, CORRECTS_KL: tl.constexpr, HAS_IS_RATIO: tl.constexpr,
):  # fmt: skip
    """Return the loss of a token, its slope in logps, whether it is clipped below and above, and its KL term.

    `sign` is the advantage without its weight; `log_slope` is the slope of `log_ratio` in logps. `lowest` and `highest`
    bound the ratio; of "sapo" they are the temperatures of negative and of positive advantages.
    """
    ratio, ratio_slope = capped_exp(log_ratio)
    advantage = sign * weight
    low, high = sign != sign, sign != sign
    if KIND == "cispo" or KIND == "reinforce":
        bound = tl.zeros_like(ratio) + 1.0
        if KIND == "cispo":
            bound = tl.minimum(ratio, highest)
            high = (ratio > highest) & (sign > 0.0)
        # without the where, a banned token (logps = -inf) with advantage 0 would be 0 * inf
        policy, slope = tl.where(advantage == 0.0, 0.0, -bound * advantage * logps), -bound * advantage
    elif KIND == "sapo":
        value, value_slope = soft_gate(ratio, sign, highest, lowest)
        policy, slope = -value * advantage, -value_slope * advantage * ratio_slope * log_slope
    else:
        value, value_slope = clipped_surrogate(ratio, advantage, lowest, highest, delta)
        policy, slope = -value, -value_slope * ratio_slope * log_slope
        free = tl.minimum(ratio, delta)
        low, high = (free < lowest) & (sign < 0.0), (free > highest) & (sign > 0.0)
    if HAS_IS_RATIO:
        is_ratio = tl.where(is_ratio != is_ratio, 1.0, is_ratio)
        # a token that a factor of 0 leaves out may have no finite loss
        policy = tl.where(is_ratio == 0.0, 0.0, policy * is_ratio)
        slope = tl.where(is_ratio == 0.0, 0.0, slope * is_ratio)
    kl = tl.zeros_like(policy)
    if HAS_KL:
        log_ref_ratio, ref_slope = difference(ref, logps)
        kl = k3(-tl.minimum(log_ref_ratio, RATIO_LOG_MAX))
        ref_ratio, _ = capped_exp(log_ref_ratio)
        kl_slope = tl.where(log_ref_ratio <= RATIO_LOG_MAX, (1.0 - ref_ratio) * ref_slope, 0.0)
        if CORRECTS_KL:
            kl_slope = kl_slope * ratio + kl * ratio_slope * log_slope
            kl = kl * ratio
        policy, slope = policy + beta * kl, slope + beta * kl_slope
    return policy, slope, low, high, kl


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
