"""Logits to log-probs of selected ids, and back: the only kernels that touch N x V.

    z = (x - max x) / temperature,  logp = z[id] - log sum exp z,  H = log sum exp z - sum p z
    dlogits = (g * (onehot - p) - h * p * (log p + H)) / temperature

Forward reads each needed row of each stream once: `[B, T or T+1, V]`, any strides, and writes `logps`, `row_max` and
`log_sum` `[S, B, T]` and `entropy` `[B, T]` in fp32. Rows whose mask is 0 are not read and give 0. `row_max` and
`log_sum` are saved for backward, which reads a row once and writes it once; a row without gradient is not read.
128-bit accesses need the row strides to be multiples of 16 elements (and a row to start at one): so they are for a
contiguous vocabulary of 151936 or 152064, and for 151665 columns cut from rows of 151936, whose last column is loaded
alone. Rows that start anywhere (a contiguous 92553, 151674 or 151665) are loaded column by column, at twice the
instructions: pad the head to a multiple of 16 and cut its logits, `logits[..., :V]`. The layout moves no bit.
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
    edge_statistics,
    finish_statistics,
    merge_statistics,
    pick_column,
    reduce_lanes,
)


@triton.jit
def row_pointer(logits_ptr, b, t, stride_b, stride_t):
    return logits_ptr + b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t


@triton.jit
def column_offsets(cols, stride_v, UNIT_STRIDE: tl.constexpr):
    if UNIT_STRIDE:
        return cols
    else:
        return cols.to(tl.int64) * stride_v


@triton.jit
def _stream_row_ptr(
    logits_ptr, corrupted_ptr, ablated_ptr, stream, b, t,
    stride_b, stride_t, corrupted_stride_b, corrupted_stride_t, ablated_stride_b, ablated_stride_t,
    N_STREAMS: tl.constexpr,
):  # fmt: skip
    row_ptr = row_pointer(logits_ptr, b, t, stride_b, stride_t)
    if N_STREAMS > 1:
        row_ptr = tl.where(
            stream == 1, row_pointer(corrupted_ptr, b, t, corrupted_stride_b, corrupted_stride_t), row_ptr
        )
    if N_STREAMS > 2:
        row_ptr = tl.where(stream == 2, row_pointer(ablated_ptr, b, t, ablated_stride_b, ablated_stride_t), row_ptr)
    return row_ptr


@triton.jit
def whole_vectors_end(end, VECTOR: tl.constexpr, HAS_EDGE: tl.constexpr):
    """Return where the last whole vector before `end` ends: as a mask it does not narrow loads and stores."""
    if HAS_EDGE:
        end = tl.cast(end, tl.int32)  # a vocabulary of 1 is a constant
        return tl.multiple_of(end - end % VECTOR, VECTOR)
    else:
        return end


@triton.jit
def load_columns(row_ptr, cols, end, stride_v, UNIT_STRIDE: tl.constexpr):
    """Load columns, -inf from `end` on."""
    pointers = row_ptr + column_offsets(cols, stride_v, UNIT_STRIDE)
    return tl.load(pointers, mask=cols < end, other=float("-inf"))


@triton.jit
def load_block(row_ptr, start, end, stride_v, UNIT_STRIDE: tl.constexpr, BLOCK_V: tl.constexpr):
    """Load a block of columns, -inf from `end` on."""
    return load_columns(row_ptr, start + tl.arange(0, BLOCK_V), end, stride_v, UNIT_STRIDE)


@triton.jit
def store_edge(row_ptr, values, first, V, stride_v, UNIT_STRIDE: tl.constexpr, VECTOR: tl.constexpr):
    cols = first + tl.arange(0, VECTOR)
    tl.store(row_ptr + column_offsets(cols, stride_v, UNIT_STRIDE), values, mask=cols < V)


@triton.jit
def column_of_id(target_id, V):
    """Return an id as int32; one outside the vocabulary is in no column."""
    return tl.where((target_id >= 0) & (target_id < V), target_id, -1).to(tl.int32)


@triton.jit
def add_edge(
    row_ptr, last, stride_v, target_id, chunk_max, chunk_sum, weighted, target, scale,
    UNIT_STRIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Merge the columns before `last` that fill no vector into the statistics of their chunk and the target."""
    first_of_edge = last - last % VECTOR
    edge = load_block(row_ptr, first_of_edge, last, stride_v, UNIT_STRIDE, VECTOR).to(tl.float32)
    if (target_id >= first_of_edge) & (target_id < last):
        target = tl.sum(tl.where(first_of_edge + tl.arange(0, VECTOR) == target_id, edge, 0.0), 0)
    edge_max, edge_sum, edge_weighted = edge_statistics(edge, scale)
    chunk_max, chunk_sum, weighted = merge_statistics(
        chunk_max, chunk_sum, weighted, edge_max, edge_sum, edge_weighted, scale
    )
    return chunk_max, chunk_sum, weighted, target


@triton.jit
def _chunk_statistics(
    row_ptr, x, first, last, end, stride_v, target_id, target, scale,
    HAS_ENTROPY: tl.constexpr, UNIT_STRIDE: tl.constexpr, BLOCK_V: tl.constexpr, VECTOR: tl.constexpr,
    HAS_EDGE: tl.constexpr,
):  # fmt: skip
    """Reduce columns `[first, last)`, of which `x` holds the first block.

    Returns max, sum and weighted of the chunk, the target, and the block that follows, whose vectors end at `end`.
    """
    LANES: tl.constexpr = BLOCK_V // (VECTORS * VECTOR)
    lane_max = tl.full([LANES], float("-inf"), tl.float32)
    lane_sum, lane_weighted = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    for start in range(first, last, BLOCK_V):
        following = load_block(row_ptr, start + BLOCK_V, end, stride_v, UNIT_STRIDE, BLOCK_V)
        values = x.to(tl.float32)
        lane_max, lane_sum, lane_weighted = add_block(
            lane_max, lane_sum, lane_weighted, values, scale, HAS_ENTROPY, VECTOR
        )
        # The target comes out of the sweep itself: the same memory value as the sum's, and no second read.
        if (target_id >= start) & (target_id < start + BLOCK_V):
            target = pick_column(values, target_id - start, VECTOR)
        x = following
    chunk_max, chunk_sum, weighted = reduce_lanes(lane_max, lane_sum, lane_weighted, scale)
    if HAS_EDGE and last % VECTOR != 0:
        chunk_max, chunk_sum, weighted, target = add_edge(
            row_ptr, last, stride_v, target_id, chunk_max, chunk_sum, weighted, target, scale, UNIT_STRIDE, VECTOR
        )
    return chunk_max, chunk_sum, weighted, target, x


@triton.jit
def sweep_row(
    row_ptr, target_id, V, stride_v, inv_temperature,
    HAS_ENTROPY: tl.constexpr, UNIT_STRIDE: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK_V: tl.constexpr,
    VECTOR: tl.constexpr, HAS_EDGE: tl.constexpr,
):  # fmt: skip
    """Return (logp, row_max, log_sum, entropy) of a row."""
    scale = inv_temperature * LOG2E
    target_id = column_of_id(target_id, V)
    target = tl.cast(float("nan"), tl.float32)  # of an id outside the vocabulary
    row_max, row_sum, weighted = tl.cast(float("-inf"), tl.float32), 0.0, 0.0
    end = whole_vectors_end(V, VECTOR, HAS_EDGE)
    x = load_block(row_ptr, 0, end, stride_v, UNIT_STRIDE, BLOCK_V)
    for first in range(0, V, CHUNK_V):
        chunk_max, chunk_sum, chunk_weighted, target, x = _chunk_statistics(
            row_ptr, x, first, tl.minimum(first + CHUNK_V, V), end, stride_v, target_id, target, scale,
            HAS_ENTROPY, UNIT_STRIDE, BLOCK_V, VECTOR, HAS_EDGE,
        )  # fmt: skip
        row_max, row_sum, weighted = merge_statistics(
            row_max, row_sum, weighted, chunk_max, chunk_sum, chunk_weighted, scale
        )
    logp, log_sum, entropy = finish_statistics(target, row_max, row_sum, weighted, inv_temperature)
    return logp, row_max, log_sum, entropy


@triton.jit
def _store_row(
    logps_ptr, row_max_ptr, log_sum_ptr, entropy_ptr, cell, stream, row,
    logp, row_max, log_sum, entropy, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    tl.store(logps_ptr + cell, logp)
    tl.store(row_max_ptr + cell, row_max)
    tl.store(log_sum_ptr + cell, log_sum)
    if HAS_ENTROPY and stream == 0:
        tl.store(entropy_ptr + row, entropy)


@triton.jit(
    do_not_specialize=["n_rows", "T"],
    do_not_specialize_on_alignment=["ids_ptr", "row_mask_ptr", "logps_ptr", "row_max_ptr", "log_sum_ptr"],
)
def _row_statistics_fwd_kernel(
    logits_ptr, corrupted_ptr, ablated_ptr,  # [B, T or T+1, V] each
    ids_ptr,  # [B, T]
    row_mask_ptr,  # [S, B, T]
    logps_ptr, row_max_ptr, log_sum_ptr,  # [S, B, T]
    entropy_ptr,  # [B, T]
    n_rows, T, V,
    stride_b: tl.int64, stride_t: tl.int64, corrupted_stride_b: tl.int64, corrupted_stride_t: tl.int64,
    ablated_stride_b: tl.int64, ablated_stride_t: tl.int64, stride_v: tl.int64,
    inv_temperature,
    HAS_ENTROPY: tl.constexpr, UNIT_STRIDE: tl.constexpr, N_STREAMS: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK_V: tl.constexpr, VECTOR: tl.constexpr, HAS_EDGE: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0)
    stream, row = cell // n_rows, cell % n_rows
    if tl.load(row_mask_ptr + cell) == 0:
        _store_row(
            logps_ptr, row_max_ptr, log_sum_ptr, entropy_ptr, cell, stream, row, 0.0, 0.0, 0.0, 0.0, HAS_ENTROPY
        )  # fmt: skip
        return
    row_ptr = _stream_row_ptr(
        logits_ptr, corrupted_ptr, ablated_ptr, stream, row // T, row % T,
        stride_b, stride_t, corrupted_stride_b, corrupted_stride_t, ablated_stride_b, ablated_stride_t, N_STREAMS,
    )  # fmt: skip
    logp, row_max, log_sum, entropy = sweep_row(
        row_ptr, tl.load(ids_ptr + row), V, stride_v, tl.cast(inv_temperature, tl.float32),
        HAS_ENTROPY, UNIT_STRIDE, BLOCK_V, CHUNK_V, VECTOR, HAS_EDGE,
    )  # fmt: skip
    _store_row(
        logps_ptr, row_max_ptr, log_sum_ptr, entropy_ptr, cell, stream, row,
        logp, row_max, log_sum, entropy, HAS_ENTROPY,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "n_chunks", "T"], do_not_specialize_on_alignment=["ids_ptr", "row_mask_ptr"])
def _row_chunks_fwd_kernel(
    logits_ptr, corrupted_ptr, ablated_ptr, ids_ptr, row_mask_ptr,
    partials_ptr,  # [S, B, T, n_chunks, 3]: max, sum, weighted
    targets_ptr,  # [S, B, T]
    n_rows, n_chunks, T, V,
    stride_b: tl.int64, stride_t: tl.int64, corrupted_stride_b: tl.int64, corrupted_stride_t: tl.int64,
    ablated_stride_b: tl.int64, ablated_stride_t: tl.int64, stride_v: tl.int64,
    inv_temperature,
    HAS_ENTROPY: tl.constexpr, UNIT_STRIDE: tl.constexpr, N_STREAMS: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK_V: tl.constexpr, VECTOR: tl.constexpr, HAS_EDGE: tl.constexpr,
):  # fmt: skip
    cell, chunk = tl.program_id(0) // n_chunks, tl.program_id(0) % n_chunks
    stream, row = cell // n_rows, cell % n_rows
    if tl.load(row_mask_ptr + cell) == 0:
        return
    row_ptr = _stream_row_ptr(
        logits_ptr, corrupted_ptr, ablated_ptr, stream, row // T, row % T,
        stride_b, stride_t, corrupted_stride_b, corrupted_stride_t, ablated_stride_b, ablated_stride_t, N_STREAMS,
    )  # fmt: skip
    scale = tl.cast(inv_temperature, tl.float32) * LOG2E
    target_id = column_of_id(tl.load(ids_ptr + row), V)
    first = chunk * CHUNK_V
    last = tl.minimum(first + CHUNK_V, V)
    end = whole_vectors_end(last, VECTOR, HAS_EDGE)
    x = load_block(row_ptr, first, end, stride_v, UNIT_STRIDE, BLOCK_V)
    chunk_max, chunk_sum, weighted, target, x = _chunk_statistics(
        row_ptr, x, first, last, end, stride_v, target_id, tl.cast(float("nan"), tl.float32), scale,
        HAS_ENTROPY, UNIT_STRIDE, BLOCK_V, VECTOR, HAS_EDGE,
    )  # fmt: skip
    partial_ptr = partials_ptr + tl.program_id(0).to(tl.int64) * 3
    tl.store(partial_ptr, chunk_max)
    tl.store(partial_ptr + 1, chunk_sum)
    tl.store(partial_ptr + 2, weighted)
    if (target_id >= first) & (target_id < last):
        tl.store(targets_ptr + cell, target)


@triton.jit(
    do_not_specialize=["n_rows", "n_chunks"],
    do_not_specialize_on_alignment=["ids_ptr", "row_mask_ptr", "logps_ptr", "row_max_ptr", "log_sum_ptr"],
)
def _merge_chunks_fwd_kernel(
    partials_ptr, targets_ptr, ids_ptr, row_mask_ptr,
    logps_ptr, row_max_ptr, log_sum_ptr, entropy_ptr,
    n_rows, n_chunks, V, inv_temperature, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0)
    stream, row = cell // n_rows, cell % n_rows
    needed = tl.load(row_mask_ptr + cell) != 0
    inv_temperature = tl.cast(inv_temperature, tl.float32)
    scale = inv_temperature * LOG2E
    row_max, row_sum, weighted = tl.cast(float("-inf"), tl.float32), 0.0, 0.0
    for chunk in range(0, n_chunks):
        partial_ptr = partials_ptr + (cell.to(tl.int64) * n_chunks + chunk) * 3
        row_max, row_sum, weighted = merge_statistics(
            row_max, row_sum, weighted,
            tl.load(partial_ptr, mask=needed, other=0.0),
            tl.load(partial_ptr + 1, mask=needed, other=0.0),
            tl.load(partial_ptr + 2, mask=needed, other=0.0),
            scale,
        )  # fmt: skip
    target_id = tl.load(ids_ptr + row)
    known = needed & (target_id >= 0) & (target_id < V)
    target = tl.load(targets_ptr + cell, mask=known, other=float("nan"))
    logp, log_sum, entropy = finish_statistics(target, row_max, row_sum, weighted, inv_temperature)
    _store_row(
        logps_ptr, row_max_ptr, log_sum_ptr, entropy_ptr, cell, stream, row,
        tl.where(needed, logp, 0.0), tl.where(needed, row_max, 0.0), tl.where(needed, log_sum, 0.0),
        tl.where(needed, entropy, 0.0), HAS_ENTROPY,
    )  # fmt: skip


@triton.jit
def _away_from_target(x, row_max, log_sum, entropy, g, h, inv_temperature, HAS_ENTROPY_GRAD: tl.constexpr):
    """Return temperature * dlogits of columns that are not the target, which adds g."""
    log_p = (x - row_max) * inv_temperature - log_sum
    p = tl.exp2(log_p * LOG2E)
    slope = g
    if HAS_ENTROPY_GRAD:
        slope += h * (tl.where(p == 0.0, 0.0, log_p) + entropy)
    return -(slope * p)


@triton.jit
def write_gradient(
    out_row_ptr, row_ptr, start, V, out_stride_v, stride_v, target_id, row_max, log_sum, entropy, g, h, inv_temperature,
    HAS_ENTROPY_GRAD: tl.constexpr, UNIT_STRIDE: tl.constexpr, BLOCK_V: tl.constexpr, VECTOR: tl.constexpr,
    HAS_EDGE: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a block of columns, and of the edge behind the last; it may replace its logits."""
    cols = start + tl.arange(0, BLOCK_V)
    end = whole_vectors_end(V, VECTOR, HAS_EDGE)
    x = load_block(row_ptr, start, end, stride_v, UNIT_STRIDE, BLOCK_V).to(tl.float32)
    gradient = _away_from_target(x, row_max, log_sum, entropy, g, h, inv_temperature, HAS_ENTROPY_GRAD)
    if (target_id >= start) & (target_id < start + BLOCK_V):
        gradient += tl.where(tl.arange(0, BLOCK_V) == (target_id - start).to(tl.int32), g, 0.0)
    out = out_row_ptr + column_offsets(cols, out_stride_v, UNIT_STRIDE)
    tl.store(out, gradient * inv_temperature, mask=cols < end)
    if HAS_EDGE and start + BLOCK_V >= V:
        edge = load_block(row_ptr, end, V, stride_v, UNIT_STRIDE, VECTOR).to(tl.float32)
        tl.debug_barrier()  # every warp loads a copy: in place, none may find what another has stored
        edge = _away_from_target(edge, row_max, log_sum, entropy, g, h, inv_temperature, HAS_ENTROPY_GRAD)
        edge += tl.where(end + tl.arange(0, VECTOR) == target_id, g, 0.0)
        store_edge(out_row_ptr, edge * inv_temperature, end, V, out_stride_v, UNIT_STRIDE, VECTOR)


@triton.jit
def write_zeros(
    out_row_ptr, start, V, out_stride_v,
    UNIT_STRIDE: tl.constexpr, BLOCK_V: tl.constexpr, VECTOR: tl.constexpr, HAS_EDGE: tl.constexpr,
):  # fmt: skip
    """Write zeros over a block of columns, and over the edge behind the last."""
    cols = start + tl.arange(0, BLOCK_V)
    end = whole_vectors_end(V, VECTOR, HAS_EDGE)
    out = out_row_ptr + column_offsets(cols, out_stride_v, UNIT_STRIDE)
    tl.store(out, tl.zeros([BLOCK_V], tl.float32), mask=cols < end)
    if HAS_EDGE and start + BLOCK_V >= V:
        store_edge(out_row_ptr, tl.zeros([VECTOR], tl.float32), end, V, out_stride_v, UNIT_STRIDE, VECTOR)


@triton.jit(
    do_not_specialize=["n_blocks", "T", "L"],
    do_not_specialize_on_alignment=["ids_ptr", "grad_logps_ptr", "grad_entropy_ptr"],
)
def _logits_gradient_bwd_kernel(
    out_ptr,  # [B, L, V], L = T or T+1; may be logits_ptr
    logits_ptr,  # [B, L, V]
    ids_ptr, row_max_ptr, log_sum_ptr, entropy_ptr, grad_logps_ptr, grad_entropy_ptr,  # [B, T]
    n_blocks, T, L, V,
    stride_b: tl.int64, stride_t: tl.int64, stride_v: tl.int64,
    out_stride_b: tl.int64, out_stride_t: tl.int64, out_stride_v: tl.int64,
    inv_temperature,
    HAS_ENTROPY_GRAD: tl.constexpr, UNIT_STRIDE: tl.constexpr, BLOCK_V: tl.constexpr, VECTOR: tl.constexpr,
    HAS_EDGE: tl.constexpr,
):  # fmt: skip
    line, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    b, t = line // L, line % L
    cell = b * T + t
    has_token = t < T
    g = tl.load(grad_logps_ptr + cell, mask=has_token, other=0.0).to(tl.float32)
    needed, h = g != 0.0, 0.0
    if HAS_ENTROPY_GRAD:
        h = tl.load(grad_entropy_ptr + cell, mask=has_token, other=0.0).to(tl.float32)
        needed = needed | (h != 0.0)
    start = block * BLOCK_V
    row_ptr = row_pointer(logits_ptr, b, t, stride_b, stride_t)
    out_row_ptr = row_pointer(out_ptr, b, t, out_stride_b, out_stride_t)
    if needed:
        inv_temperature = tl.cast(inv_temperature, tl.float32)
        row_max, log_sum, entropy = tl.load(row_max_ptr + cell), tl.load(log_sum_ptr + cell), 0.0
        if HAS_ENTROPY_GRAD:
            entropy = tl.load(entropy_ptr + cell)
        write_gradient(
            out_row_ptr, row_ptr, start, V, out_stride_v, stride_v, tl.load(ids_ptr + cell), row_max, log_sum, entropy,
            g, h, inv_temperature, HAS_ENTROPY_GRAD, UNIT_STRIDE, BLOCK_V, VECTOR, HAS_EDGE,
        )  # fmt: skip
    else:
        write_zeros(out_row_ptr, start, V, out_stride_v, UNIT_STRIDE, BLOCK_V, VECTOR, HAS_EDGE)


def row_statistics_fwd(
    streams: list[Tensor], ids: Tensor, row_mask: Tensor, temperature: float, return_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `logps`, `row_max`, `log_sum` `[S, B, T]` and `entropy` `[B, T]` (empty unless asked for)."""
    logps, row_max, log_sum = (torch.empty(row_mask.shape, dtype=torch.float32, device=ids.device) for _ in range(3))
    entropy = torch.empty(ids.shape if return_entropy else 0, dtype=torch.float32, device=ids.device)
    first = streams[0]
    alike = {(x.dtype, x.stride(-1) == 1) for x in streams}
    whole_vectors = first.stride(-1) == 1 and first.shape[-1] * first.element_size() % 16 == 0
    together = len(streams) == 1 or (len(alike) == 1 and whole_vectors)  # else a launch of all spills registers
    groups = [slice(0, len(streams))] if together else [slice(s, s + 1) for s in range(len(streams))]
    if ids.numel() and first.shape[-1]:
        for group in groups:
            wants_entropy = return_entropy and group.start == 0
            outputs = (logps[group], row_max[group], log_sum[group], entropy)
            _launch_streams(streams[group], ids, row_mask[group], temperature, wants_entropy, outputs)
    return logps, row_max, log_sum, entropy


def _launch_streams(streams, ids, row_mask, temperature, has_entropy, outputs) -> None:
    n_rows, T, V = ids.numel(), ids.shape[1], streams[0].shape[-1]
    vector = 16 // streams[0].element_size()
    block, warps = launch.row_block(V)
    block = block * vector // 8  # of the same bytes, whatever the dtype
    chunk = launch.BLOCKS_PER_CHUNK * block
    n_cells, n_chunks = row_mask.numel(), -(-V // chunk)
    clean, corrupted, ablated = [*streams, *[streams[0]] * (3 - len(streams))]
    strides = [s for x in (clean, corrupted, ablated) for s in (batch_stride(x), x.stride(1))] + [clean.stride(2)]
    flags = {
        "HAS_ENTROPY": has_entropy,
        "UNIT_STRIDE": clean.stride(2) == 1,
        "N_STREAMS": len(streams),
        "BLOCK_V": block,
        "CHUNK_V": chunk,
        "VECTOR": vector,
        "HAS_EDGE": V % vector != 0,
        "num_warps": warps,
        **launch.FUSION,
    }
    inputs = (clean, corrupted, ablated, ids, row_mask)
    if n_chunks == 1 or not launch.split_rows(n_cells, ids.device):
        _row_statistics_fwd_kernel[(n_cells,)](*inputs, *outputs, n_rows, T, V, *strides, 1.0 / temperature, **flags)
        return
    partials = torch.empty(n_cells, n_chunks, 3, dtype=torch.float32, device=ids.device)
    targets = torch.empty(n_cells, dtype=torch.float32, device=ids.device)
    _row_chunks_fwd_kernel[(n_cells * n_chunks,)](
        *inputs, partials, targets, n_rows, n_chunks, T, V, *strides, 1.0 / temperature, **flags
    )
    _merge_chunks_fwd_kernel[(n_cells,)](
        partials, targets, ids, row_mask, *outputs, n_rows, n_chunks, V, 1.0 / temperature,
        HAS_ENTROPY=has_entropy, num_warps=1, **launch.FUSION,
    )  # fmt: skip


def logits_gradient_bwd(
    out: Tensor,
    logits: Tensor,
    ids: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
) -> None:
    """Write the gradient of `logits` `[B, L, V]` into `out`, which may be `logits` itself."""
    B, L, V = logits.shape
    if not logits.numel():
        return
    block, warps = launch.gradient_block(V)
    vector = 16 // min(logits.element_size(), out.element_size())
    warps = warps * 8 // vector  # of fp32 alone a thread has half the columns: 32 spill
    n_blocks = triton.cdiv(V, block)
    unused = grad_logps
    _logits_gradient_bwd_kernel[(B * L * n_blocks,)](
        out, logits, ids, row_max, log_sum,
        unused if grad_entropy is None else entropy, grad_logps, unused if grad_entropy is None else grad_entropy,
        n_blocks, ids.shape[1], L, V,
        batch_stride(logits), logits.stride(1), logits.stride(2),
        batch_stride(out), out.stride(1), out.stride(2),
        1.0 / temperature,
        HAS_ENTROPY_GRAD=grad_entropy is not None,
        UNIT_STRIDE=logits.stride(2) == 1 and out.stride(2) == 1,
        BLOCK_V=block,
        VECTOR=vector,
        HAS_EDGE=V % vector != 0,
        num_warps=warps,
        **launch.FUSION,
    )  # fmt: skip


def batch_stride(x: Tensor) -> int:
    # A lone batch entry is never stepped over; 0 keeps its stride from choosing another compiled variant.
    return x.stride(0) if x.shape[0] > 1 else 0
