"""Logits to log-probs and to the gradient of the loss in one kernel, where the coefficient of a row is its own matter.

    logp, H as in `row_statistics.py`,  g = scale * d token_loss / d logp,  dlogits = g / temperature * (onehot - p)

One program per row sweeps it forward for its statistics, computes the coefficient as `policy_loss.py` does, and sweeps
it back, writing the gradient under an upstream gradient of 1. Two kernels read every row twice from memory; this one
finds it in the L2 cache the second time, if the rows that are under way fit: so a row gets many warps, and they take
several of its chunks abreast. No bit of a log-prob depends on how many. Backward multiplies the gradient by its
upstream factor, which is one more read and write of it: it is left out where the factor is 1.
"""

# Triton's decorated functions are launched, not called, and their annotations are constexprs: pyright knows neither.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from srpo_kernels import launch
from srpo_kernels.device import (
    LOG2E,
    VECTORS,
    add_block,
    finish_statistics,
    merge_statistics,
    pick_column,
    reduce_lanes,
    token_loss,
)
from srpo_kernels.policy_loss import log_ratio_of, ratio_bounds, token_inputs
from srpo_kernels.row_statistics import (
    add_edge,
    batch_stride,
    column_of_id,
    load_block,
    load_columns,
    row_pointer,
    store_edge,
    whole_vectors_end,
    write_gradient,
    write_zeros,
)
from srpo_kernels.rules import LossRule


@triton.jit
def _columns_abreast(ABREAST: tl.constexpr, LANES: tl.constexpr, CHUNK_V: tl.constexpr, VECTOR: tl.constexpr):
    """Return the columns of the first block of each chunk, in the order in which lane follows lane, chunk by chunk."""
    place = tl.arange(0, VECTORS * ABREAST * LANES * VECTOR)
    lane = place // VECTOR % (ABREAST * LANES)
    inside = place // (VECTOR * ABREAST * LANES) * (LANES * VECTOR) + lane % LANES * VECTOR + place % VECTOR
    return lane // LANES * CHUNK_V + inside


@triton.jit
def _place_of(column, ABREAST: tl.constexpr, LANES: tl.constexpr, CHUNK_V: tl.constexpr, VECTOR: tl.constexpr):
    """Return where `_columns_abreast` has a column."""
    vector = column % CHUNK_V // VECTOR
    lane = (vector // LANES * ABREAST + column // CHUNK_V) * LANES + vector % LANES
    return lane * VECTOR + column % VECTOR


@triton.jit
def _sweep_abreast(
    row_ptr, target_id, V, inv_temperature,
    ABREAST: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK_V: tl.constexpr, VECTOR: tl.constexpr, HAS_EDGE: tl.constexpr,
):  # fmt: skip
    """Return (logp, row_max, log_sum, entropy) of a row: those of `sweep_row`, bit by bit."""
    PART: tl.constexpr = BLOCK_V // ABREAST  # the block of one chunk
    LANES: tl.constexpr = PART // (VECTORS * VECTOR)
    STRIDE: tl.constexpr = ABREAST * CHUNK_V
    scale = inv_temperature * LOG2E
    target_id = column_of_id(target_id, V)
    target = tl.cast(float("nan"), tl.float32)  # of an id outside the vocabulary
    row_max, row_sum, weighted = tl.cast(float("-inf"), tl.float32), 0.0, 0.0
    end = whole_vectors_end(V, VECTOR, HAS_EDGE)
    columns = _columns_abreast(ABREAST, LANES, CHUNK_V, VECTOR)
    x = load_columns(row_ptr, columns, end, 1, True)
    for first in range(0, V, STRIDE):
        lane_max = tl.full([ABREAST * LANES], float("-inf"), tl.float32)
        lane_sum, lane_weighted = tl.zeros([ABREAST * LANES], tl.float32), tl.zeros([ABREAST * LANES], tl.float32)
        for offset in range(0, CHUNK_V, PART):
            next_start = tl.where(offset + PART < CHUNK_V, first + offset + PART, first + STRIDE)
            following = load_columns(row_ptr, next_start + columns, end, 1, True)
            values = x.to(tl.float32)
            lane_max, lane_sum, lane_weighted = add_block(
                lane_max, lane_sum, lane_weighted, values, scale, True, VECTOR
            )
            column = target_id - first - offset
            if (column >= 0) & (column < STRIDE) & (column % CHUNK_V < PART):
                target = pick_column(values, _place_of(column, ABREAST, LANES, CHUNK_V, VECTOR), VECTOR)
            x = following
        maxima, sums, all_weighted = reduce_lanes(
            tl.reshape(lane_max, [ABREAST, LANES]), tl.reshape(lane_sum, [ABREAST, LANES]),
            tl.reshape(lane_weighted, [ABREAST, LANES]), scale,
        )  # fmt: skip
        for k in tl.static_range(ABREAST):
            mine = tl.arange(0, ABREAST) == k
            chunk_max, chunk_sum = tl.sum(tl.where(mine, maxima, 0.0), 0), tl.sum(tl.where(mine, sums, 0.0), 0)
            chunk_weighted = tl.sum(tl.where(mine, all_weighted, 0.0), 0)
            last = first + (k + 1) * CHUNK_V
            if HAS_EDGE and (last - CHUNK_V < V) & (last >= V):
                chunk_max, chunk_sum, chunk_weighted, target = add_edge(
                    row_ptr, V, 1, target_id, chunk_max, chunk_sum, chunk_weighted, target, scale, True, VECTOR
                )  # fmt: skip
            row_max, row_sum, weighted = merge_statistics(
                row_max, row_sum, weighted, chunk_max, chunk_sum, chunk_weighted, scale
            )
    logp, log_sum, entropy = finish_statistics(target, row_max, row_sum, weighted, inv_temperature)
    return logp, row_max, log_sum, entropy


@triton.jit(
    do_not_specialize=["T", "L"],
    do_not_specialize_on_alignment=[
        "ids_ptr", "row_mask_ptr", "old_logps_ptr", "ref_logps_ptr", "is_ratio_ptr", "advantages_ptr", "weights_ptr",
        "scale_ptr", "logps_ptr", "entropy_ptr",
    ],
)  # fmt: skip
def _row_training_fwd_kernel(
    out_ptr,  # [B, L, V], L = T or T+1
    logits_ptr,  # [B, L, V]
    ids_ptr, row_mask_ptr, old_logps_ptr, ref_logps_ptr, is_ratio_ptr, advantages_ptr, weights_ptr, scale_ptr,  # [B, T]
    logps_ptr, entropy_ptr,  # [B, T]
    T, L, V,
    stride_b: tl.int64, stride_t: tl.int64, out_stride_b: tl.int64, out_stride_t: tl.int64,
    inv_temperature, lowest, highest, delta, beta,
    KIND: tl.constexpr, HAS_OLD: tl.constexpr, HAS_KL: tl.constexpr, CORRECTS_KL: tl.constexpr,
    HAS_IS_RATIO: tl.constexpr,
    ABREAST: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK_V: tl.constexpr, VECTOR: tl.constexpr, HAS_EDGE: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0)
    b, t = line // L, line % L
    cell, has_token = b * T + t, t < T
    row_ptr = row_pointer(logits_ptr, b, t, stride_b, stride_t)
    out_row_ptr = row_pointer(out_ptr, b, t, out_stride_b, out_stride_t)
    inv_temperature = tl.cast(inv_temperature, tl.float32)
    g, logp, entropy = tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32)
    row_max, log_sum = tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32)
    target_id = tl.load(ids_ptr + cell, mask=has_token, other=-1)
    if tl.load(row_mask_ptr + cell, mask=has_token, other=0) != 0:
        logp, row_max, log_sum, entropy = _sweep_abreast(
            row_ptr, target_id, V, inv_temperature, ABREAST, BLOCK_V, CHUNK_V, VECTOR, HAS_EDGE
        )  # fmt: skip
        log_ratio, log_slope = log_ratio_of(logp, old_logps_ptr, cell, True, HAS_OLD)
        sign, weight, is_ratio, ref = token_inputs(
            advantages_ptr, weights_ptr, is_ratio_ptr, ref_logps_ptr, cell, True, HAS_KL, HAS_IS_RATIO
        )
        _, slope, _, _, _ = token_loss(
            logp, log_ratio, log_slope, sign, weight, is_ratio, ref, tl.cast(lowest, tl.float32),
            tl.cast(highest, tl.float32), tl.cast(delta, tl.float32), tl.cast(beta, tl.float32),
            KIND, HAS_KL, CORRECTS_KL, HAS_IS_RATIO,
        )  # fmt: skip
        g = slope * tl.load(scale_ptr + cell).to(tl.float32)
    tl.store(logps_ptr + cell, logp, mask=has_token)
    tl.store(entropy_ptr + cell, entropy, mask=has_token)
    if g != 0.0:
        last = V - 1 - (V - 1) % BLOCK_V
        for read in range(0, V, BLOCK_V):  # backward: the end of the row is what was read last
            start = tl.multiple_of(last - read, BLOCK_V)
            write_gradient(
                out_row_ptr, row_ptr, start, V, 1, 1, target_id, row_max, log_sum, 0.0, g, 0.0, inv_temperature,
                False, True, BLOCK_V, VECTOR, HAS_EDGE,
            )  # fmt: skip
    else:
        for start in range(0, V, BLOCK_V):
            write_zeros(out_row_ptr, start, V, 1, True, BLOCK_V, VECTOR, HAS_EDGE)


@triton.jit(do_not_specialize=["L"], do_not_specialize_on_alignment=["factor_ptr"])
def _scale_gradient_bwd_kernel(
    out_ptr, gradient_ptr,  # [B, L, V], maybe the same
    factor_ptr,  # [1]
    L, V,
    stride_b: tl.int64, stride_t: tl.int64,
    IN_PLACE: tl.constexpr, BLOCK_V: tl.constexpr, VECTOR: tl.constexpr, HAS_EDGE: tl.constexpr,
):  # fmt: skip
    factor = tl.load(factor_ptr).to(tl.float32)
    if IN_PLACE and factor == 1.0:
        return
    b, t = tl.program_id(0) // L, tl.program_id(0) % L
    row_ptr = row_pointer(gradient_ptr, b, t, stride_b, stride_t)
    out_row_ptr = row_pointer(out_ptr, b, t, stride_b, stride_t)
    end = whole_vectors_end(V, VECTOR, HAS_EDGE)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        x = load_block(row_ptr, start, end, 1, True, BLOCK_V).to(tl.float32)
        tl.store(out_row_ptr + cols, x * factor, mask=cols < end)
    if HAS_EDGE:
        edge = load_block(row_ptr, end, V, 1, True, VECTOR).to(tl.float32)
        tl.debug_barrier()  # every warp loads a copy: in place, none may find what another has stored
        store_edge(out_row_ptr, edge * factor, end, V, 1, True, VECTOR)


def row_training_fwd(
    out: Tensor,
    logits: Tensor,
    ids: Tensor,
    row_mask: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    importance_sampling_ratio: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    scale: Tensor,
    temperature: float,
    rule: LossRule,
) -> tuple[Tensor, Tensor]:
    """Write the gradient of `logits` `[B, L, V]` into `out`, both of contiguous rows.

    Returns: `logps` and `entropy` `[B, T]`.
    """
    (B, L, V), T = logits.shape, ids.shape[1]
    logps, entropy = (torch.empty(ids.shape, dtype=torch.float32, device=ids.device) for _ in range(2))
    vector = 16 // logits.element_size()
    block, warps = launch.row_block(V)
    block = block * vector // 8
    chunk = launch.BLOCKS_PER_CHUNK * block
    abreast = min(launch.CHUNKS_ABREAST, triton.next_power_of_2(triton.cdiv(V, chunk)))
    _row_training_fwd_kernel[(B * L,)](
        out, logits, ids, row_mask,
        *(logps if x is None else x for x in (old_logps, ref_logps, importance_sampling_ratio)),
        advantages, weights, scale, logps, entropy,
        T, L, V,
        batch_stride(logits), logits.stride(1), batch_stride(out), out.stride(1),
        1.0 / temperature, *ratio_bounds(rule), float(rule.beta),
        KIND=rule.kind,
        CORRECTS_KL=rule.use_bias_correction_kl,
        HAS_OLD=old_logps is not None,
        HAS_KL=rule.beta != 0.0,
        HAS_IS_RATIO=importance_sampling_ratio is not None,
        ABREAST=abreast,
        BLOCK_V=block * abreast,
        CHUNK_V=chunk,
        VECTOR=vector,
        HAS_EDGE=V % vector != 0,
        num_warps=warps * abreast,
        **launch.FUSION,
    )  # fmt: skip
    return logps, entropy


def scale_gradient_bwd(out: Tensor, gradient: Tensor, factor: Tensor) -> None:
    """Write `gradient * factor` into `out`, of its strides.

    It may be `gradient` itself: then a factor of 1 reads and writes nothing.
    """
    B, L, V = gradient.shape
    block, warps = launch.gradient_block(V)
    vector = 16 // gradient.element_size()
    _scale_gradient_bwd_kernel[(B * L,)](
        out, gradient, factor, L, V, batch_stride(gradient), gradient.stride(1),
        IN_PLACE=out is gradient,
        BLOCK_V=block,
        VECTOR=vector,
        HAS_EDGE=V % vector != 0,
        num_warps=warps,
        **launch.FUSION,
    )  # fmt: skip
