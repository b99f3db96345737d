"""Two rows of logits to the statistics of the first and the divergence of the second from it, each row read once.

    KL(p || q) = sum p z - sum p z' - log sum exp z + log sum exp z',  z, z' as in `row_statistics.py`

A row of the clean stream is read together with the row of the one stream that contrasts with it, in a launch for each
stream; clean rows without a contrast are swept by `row_statistics.py`. The sweep is the same: no bit of a clean
log-prob depends on a contrast. Writes `kl` `[S - 1, B, T]` beside what the single sweep writes.
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
    add_cross,
    banned_columns,
    edge_cross,
    edge_statistics,
    finish_kl,
    finish_statistics,
    merge_cross,
    merge_statistics,
    pick_column,
    reduce_cross,
    reduce_lanes,
)
from srpo_kernels.row_statistics import (
    batch_stride,
    column_of_id,
    load_block,
    row_pointer,
    row_statistics_fwd,
    whole_vectors_end,
)


@triton.jit
def _pair_chunk(
    row_ptr, against_ptr, x, y, first, last, end, stride_v, against_stride_v, target_id, target, against_target, scale,
    UNIT_STRIDE: tl.constexpr, BLOCK_V: tl.constexpr, VECTOR: tl.constexpr, HAS_EDGE: tl.constexpr,
):  # fmt: skip
    """Reduce columns `[first, last)` of two rows, of which `x` and `y` hold the first block unless `HAS_EDGE`.

    Returns max, sum and weighted of the first row, max and sum of the second, the cross sum, the largest x where y is
    banned, both targets, and the blocks that follow, whose vectors end at `end`.
    """
    LANES: tl.constexpr = BLOCK_V // (VECTORS * VECTOR)
    lane_max = tl.full([LANES], float("-inf"), tl.float32)
    lane_sum, lane_weighted = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    against_lane_max, lane_banned = (
        tl.full([LANES], float("-inf"), tl.float32),
        tl.full([LANES], float("-inf"), tl.float32),
    )
    against_lane_sum, lane_cross = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    for start in range(first, last, BLOCK_V):
        if HAS_EDGE:  # columns that may not be aligned come one a register: none are left for the next block
            x = load_block(row_ptr, start, end, stride_v, UNIT_STRIDE, BLOCK_V)
            y = load_block(against_ptr, start, end, against_stride_v, UNIT_STRIDE, BLOCK_V)
            x_next, y_next = x, y
        else:
            x_next = load_block(row_ptr, start + BLOCK_V, end, stride_v, UNIT_STRIDE, BLOCK_V)
            y_next = load_block(against_ptr, start + BLOCK_V, end, against_stride_v, UNIT_STRIDE, BLOCK_V)
        x, y = x.to(tl.float32), y.to(tl.float32)
        if (target_id >= start) & (target_id < start + BLOCK_V):
            target = pick_column(x, target_id - start, VECTOR)
            against_target = pick_column(y, target_id - start, VECTOR)
        new_max, new_sum, lane_weighted = add_block(lane_max, lane_sum, lane_weighted, x, scale, True, VECTOR)
        against_new_max, against_lane_sum, _ = add_block(
            against_lane_max, against_lane_sum, lane_cross, y, scale, False, VECTOR
        )
        lane_cross, lane_banned = add_cross(
            lane_cross, lane_banned, lane_sum, lane_max, new_max, against_lane_max, against_new_max, x, y, scale, VECTOR
        )
        lane_max, lane_sum, against_lane_max = new_max, new_sum, against_new_max
        x, y = x_next, y_next
    chunk_max, chunk_sum, weighted = reduce_lanes(lane_max, lane_sum, lane_weighted, scale)
    against_max, against_sum, _ = reduce_lanes(against_lane_max, against_lane_sum, lane_weighted, scale)
    cross = reduce_cross(lane_cross, lane_sum, lane_max, chunk_max, against_lane_max, against_max, scale)
    banned = tl.max(lane_banned, 0)
    if HAS_EDGE and last % VECTOR != 0:
        edge_first = last - last % VECTOR
        edge = load_block(row_ptr, edge_first, last, stride_v, UNIT_STRIDE, VECTOR).to(tl.float32)
        against_edge = load_block(against_ptr, edge_first, last, against_stride_v, UNIT_STRIDE, VECTOR).to(tl.float32)
        if (target_id >= edge_first) & (target_id < last):
            here = edge_first + tl.arange(0, VECTOR) == target_id
            target, against_target = tl.sum(tl.where(here, edge, 0.0), 0), tl.sum(tl.where(here, against_edge, 0.0), 0)
        edge_max, edge_sum, edge_weighted = edge_statistics(edge, scale)
        against_edge_max, against_edge_sum, _ = edge_statistics(against_edge, scale)
        cross = merge_cross(
            chunk_max, chunk_sum, against_max, cross, edge_max, edge_sum, against_edge_max,
            edge_cross(edge, against_edge, edge_max, against_edge_max, scale), scale,
        )  # fmt: skip
        chunk_max, chunk_sum, weighted = merge_statistics(
            chunk_max, chunk_sum, weighted, edge_max, edge_sum, edge_weighted, scale
        )
        against_max, against_sum, _ = merge_statistics(
            against_max, against_sum, 0.0, against_edge_max, against_edge_sum, 0.0, scale
        )
        banned = tl.maximum(banned, tl.max(banned_columns(edge, against_edge), 0))
    return chunk_max, chunk_sum, weighted, against_max, against_sum, cross, banned, target, against_target, x, y


@triton.jit
def _store_pair(
    logps_ptr, row_max_ptr, log_sum_ptr, entropy_ptr, kl_ptr, against_logps_ptr, row, logp, row_max, log_sum, entropy,
    kl, against_logp,
):  # fmt: skip
    tl.store(logps_ptr + row, logp)
    tl.store(row_max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(entropy_ptr + row, entropy)
    tl.store(kl_ptr + row, kl)
    tl.store(against_logps_ptr + row, against_logp)


@triton.jit(
    do_not_specialize=["T"],
    do_not_specialize_on_alignment=[
        "ids_ptr",
        "row_mask_ptr",
        "logps_ptr",
        "row_max_ptr",
        "log_sum_ptr",
        "entropy_ptr",
        "kl_ptr",
        "against_logps_ptr",
    ],
)
def _row_pairs_fwd_kernel(
    logits_ptr, against_ptr,  # [B, T or T+1, V] each
    ids_ptr, row_mask_ptr,  # [B, T]
    logps_ptr, row_max_ptr, log_sum_ptr, entropy_ptr, kl_ptr, against_logps_ptr,  # [B, T]
    T, V,
    stride_b: tl.int64, stride_t: tl.int64, stride_v: tl.int64,
    against_stride_b: tl.int64, against_stride_t: tl.int64, against_stride_v: tl.int64,
    inv_temperature,
    UNIT_STRIDE: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK_V: tl.constexpr, VECTOR: tl.constexpr,
    HAS_EDGE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if tl.load(row_mask_ptr + row) == 0:
        return
    inv_temperature = tl.cast(inv_temperature, tl.float32)
    scale = inv_temperature * LOG2E
    row_ptr = row_pointer(logits_ptr, row // T, row % T, stride_b, stride_t)
    against_row_ptr = row_pointer(against_ptr, row // T, row % T, against_stride_b, against_stride_t)
    target_id = column_of_id(tl.load(ids_ptr + row), V)
    target, against_target = tl.cast(float("nan"), tl.float32), tl.cast(float("nan"), tl.float32)
    row_max, row_sum, weighted = tl.cast(float("-inf"), tl.float32), 0.0, 0.0
    against_max, against_sum = tl.cast(float("-inf"), tl.float32), 0.0
    cross, banned = 0.0, tl.cast(float("-inf"), tl.float32)
    end = whole_vectors_end(V, VECTOR, HAS_EDGE)
    ahead = 0 if HAS_EDGE else end
    x = load_block(row_ptr, 0, ahead, stride_v, UNIT_STRIDE, BLOCK_V)
    y = load_block(against_row_ptr, 0, ahead, against_stride_v, UNIT_STRIDE, BLOCK_V)
    for first in range(0, V, CHUNK_V):
        c_max, c_sum, c_weighted, k_max, k_sum, c_cross, c_banned, target, against_target, x, y = _pair_chunk(
            row_ptr, against_row_ptr, x, y, first, tl.minimum(first + CHUNK_V, V), end, stride_v, against_stride_v,
            target_id, target, against_target, scale, UNIT_STRIDE, BLOCK_V, VECTOR, HAS_EDGE,
        )  # fmt: skip
        cross = merge_cross(row_max, row_sum, against_max, cross, c_max, c_sum, k_max, c_cross, scale)
        row_max, row_sum, weighted = merge_statistics(row_max, row_sum, weighted, c_max, c_sum, c_weighted, scale)
        against_max, against_sum, _ = merge_statistics(against_max, against_sum, 0.0, k_max, k_sum, 0.0, scale)
        banned = tl.maximum(banned, c_banned)
    logp, log_sum, entropy = finish_statistics(target, row_max, row_sum, weighted, inv_temperature)
    against_logp, against_log_sum, _ = finish_statistics(against_target, against_max, against_sum, 0.0, inv_temperature)
    kl = finish_kl(row_sum, weighted, cross, log_sum, against_log_sum, banned)
    _store_pair(
        logps_ptr, row_max_ptr, log_sum_ptr, entropy_ptr, kl_ptr, against_logps_ptr, row, logp, row_max, log_sum,
        entropy, kl, against_logp,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["n_rows", "n_chunks", "T"],
    do_not_specialize_on_alignment=["ids_ptr", "row_mask_ptr"],
)
def _row_pair_chunks_fwd_kernel(
    logits_ptr, against_ptr, ids_ptr, row_mask_ptr,
    partials_ptr,  # [B, T, n_chunks, 7]: those of `_pair_chunk`
    targets_ptr,  # [2, B, T]
    n_rows, n_chunks, T, V,
    stride_b: tl.int64, stride_t: tl.int64, stride_v: tl.int64,
    against_stride_b: tl.int64, against_stride_t: tl.int64, against_stride_v: tl.int64,
    inv_temperature,
    UNIT_STRIDE: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK_V: tl.constexpr,
    VECTOR: tl.constexpr, HAS_EDGE: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0) // n_chunks, tl.program_id(0) % n_chunks
    if tl.load(row_mask_ptr + row) == 0:
        return
    row_ptr = row_pointer(logits_ptr, row // T, row % T, stride_b, stride_t)
    against_row_ptr = row_pointer(against_ptr, row // T, row % T, against_stride_b, against_stride_t)
    scale = tl.cast(inv_temperature, tl.float32) * LOG2E
    target_id = column_of_id(tl.load(ids_ptr + row), V)
    first = chunk * CHUNK_V
    last = tl.minimum(first + CHUNK_V, V)
    end = whole_vectors_end(last, VECTOR, HAS_EDGE)
    ahead = first if HAS_EDGE else end
    x = load_block(row_ptr, first, ahead, stride_v, UNIT_STRIDE, BLOCK_V)
    y = load_block(against_row_ptr, first, ahead, against_stride_v, UNIT_STRIDE, BLOCK_V)
    nan = tl.cast(float("nan"), tl.float32)
    row_max, row_sum, weighted, against_max, against_sum, cross, banned, target, against_target, x, y = _pair_chunk(
        row_ptr, against_row_ptr, x, y, first, last, end, stride_v, against_stride_v, target_id, nan, nan, scale,
        UNIT_STRIDE, BLOCK_V, VECTOR, HAS_EDGE,
    )  # fmt: skip
    partial_ptr = partials_ptr + tl.program_id(0).to(tl.int64) * 7
    tl.store(partial_ptr, row_max)
    tl.store(partial_ptr + 1, row_sum)
    tl.store(partial_ptr + 2, weighted)
    tl.store(partial_ptr + 3, against_max)
    tl.store(partial_ptr + 4, against_sum)
    tl.store(partial_ptr + 5, cross)
    tl.store(partial_ptr + 6, banned)
    if (target_id >= first) & (target_id < last):
        tl.store(targets_ptr + row, target)
        tl.store(targets_ptr + n_rows + row, against_target)


@triton.jit(
    do_not_specialize=["n_rows", "n_chunks"],
    do_not_specialize_on_alignment=[
        "ids_ptr",
        "row_mask_ptr",
        "logps_ptr",
        "row_max_ptr",
        "log_sum_ptr",
        "entropy_ptr",
        "kl_ptr",
        "against_logps_ptr",
    ],
)
def _merge_pair_chunks_fwd_kernel(
    partials_ptr, targets_ptr, ids_ptr, row_mask_ptr, logps_ptr, row_max_ptr, log_sum_ptr, entropy_ptr, kl_ptr,
    against_logps_ptr, n_rows, n_chunks, V, inv_temperature,
):  # fmt: skip
    row = tl.program_id(0)
    if tl.load(row_mask_ptr + row) == 0:
        return
    inv_temperature = tl.cast(inv_temperature, tl.float32)
    scale = inv_temperature * LOG2E
    row_max, row_sum, weighted = tl.cast(float("-inf"), tl.float32), 0.0, 0.0
    against_max, against_sum = tl.cast(float("-inf"), tl.float32), 0.0
    cross, banned = 0.0, tl.cast(float("-inf"), tl.float32)
    for chunk in range(0, n_chunks):
        partial_ptr = partials_ptr + (row.to(tl.int64) * n_chunks + chunk) * 7
        c_max, c_sum, c_weighted = tl.load(partial_ptr), tl.load(partial_ptr + 1), tl.load(partial_ptr + 2)
        k_max, k_sum = tl.load(partial_ptr + 3), tl.load(partial_ptr + 4)
        cross = merge_cross(row_max, row_sum, against_max, cross, c_max, c_sum, k_max, tl.load(partial_ptr + 5), scale)
        row_max, row_sum, weighted = merge_statistics(row_max, row_sum, weighted, c_max, c_sum, c_weighted, scale)
        against_max, against_sum, _ = merge_statistics(against_max, against_sum, 0.0, k_max, k_sum, 0.0, scale)
        banned = tl.maximum(banned, tl.load(partial_ptr + 6))
    target_id = tl.load(ids_ptr + row)
    known = (target_id >= 0) & (target_id < V)
    target = tl.load(targets_ptr + row, mask=known, other=float("nan"))
    against_target = tl.load(targets_ptr + n_rows + row, mask=known, other=float("nan"))
    logp, log_sum, entropy = finish_statistics(target, row_max, row_sum, weighted, inv_temperature)
    against_logp, against_log_sum, _ = finish_statistics(against_target, against_max, against_sum, 0.0, inv_temperature)
    kl = finish_kl(row_sum, weighted, cross, log_sum, against_log_sum, banned)
    _store_pair(
        logps_ptr, row_max_ptr, log_sum_ptr, entropy_ptr, kl_ptr, against_logps_ptr, row, logp, row_max, log_sum,
        entropy, kl, against_logp,
    )  # fmt: skip


def row_pairs_fwd(
    streams: list[Tensor], ids: Tensor, row_mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return `logps` `[S, B, T]`, `row_max` and `log_sum` `[1, B, T]`, `entropy` `[B, T]` and `kl` `[S - 1, B, T]`.

    A row has one contrast at most: the masks of the streams after the first are disjoint.
    """
    contrasts = row_mask[1:]
    alone = row_mask[:1] & ~contrasts.any(0)
    clean, row_max, log_sum, entropy = row_statistics_fwd(streams[:1], ids, alone, temperature, True)
    kl = clean.new_zeros(contrasts.shape)
    logps = torch.cat([clean, kl])
    if ids.numel() and streams[0].shape[-1]:
        for s, against in enumerate(streams[1:], 1):
            outputs = (logps[0], row_max, log_sum, entropy, kl[s - 1], logps[s])
            _launch_pairs(streams[0], against, ids, row_mask[s], temperature, outputs)
    return logps, row_max, log_sum, entropy, kl


def _launch_pairs(logits, against, ids, row_mask, temperature, outputs) -> None:
    n_rows, T, V = ids.numel(), ids.shape[1], logits.shape[-1]
    vector = 16 // logits.element_size()
    block, warps = launch.row_block(V)
    block = block * vector // 8  # the block and the chunk of the single sweep: the same bits
    chunk = launch.BLOCKS_PER_CHUNK * block
    n_chunks = -(-V // chunk)
    strides = [s for x in (logits, against) for s in (batch_stride(x), x.stride(1), x.stride(2))]
    flags = {
        "UNIT_STRIDE": logits.stride(2) == 1 and against.stride(2) == 1,
        "BLOCK_V": block,
        "CHUNK_V": chunk,
        "VECTOR": vector,
        "HAS_EDGE": V % vector != 0,
        "num_warps": warps,
        **launch.FUSION,
    }
    inputs, sizes = (logits, against, ids, row_mask), (T, V, *strides, 1.0 / temperature)
    if n_chunks == 1 or not launch.split_rows(n_rows, ids.device):
        _row_pairs_fwd_kernel[(n_rows,)](*inputs, *outputs, *sizes, **flags)
        return
    partials = torch.empty(n_rows, n_chunks, 7, dtype=torch.float32, device=ids.device)
    targets = torch.empty(2, n_rows, dtype=torch.float32, device=ids.device)
    _row_pair_chunks_fwd_kernel[(n_rows * n_chunks,)](*inputs, partials, targets, n_rows, n_chunks, *sizes, **flags)
    _merge_pair_chunks_fwd_kernel[(n_rows,)](
        partials, targets, ids, row_mask, *outputs, n_rows, n_chunks, V, 1.0 / temperature,
        num_warps=1, **launch.FUSION,
    )  # fmt: skip
