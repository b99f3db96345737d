"""Logits to log-probs of selected ids, and back: the only kernels that touch N x V.

    z = (x - max x) / temperature,  logp = z[id] - log sum exp z,  H = log sum exp z - sum p z
    dlogits = (g * (onehot - p) - h * p * (log p + H)) / temperature

Forward reads each needed row of each stream once: `[B, T or T+1, V]`, any strides, and writes `logps`, `row_max` and
`log_sum` `[S, B, T]` and `entropy` `[B, T]` in fp32. Rows whose mask is 0 are not read and give 0. `row_max` and
`log_sum` are saved for backward, which reads a row once and writes it once; a row without gradient is not read.
128-bit accesses need the row strides to be multiples of 16 elements (V = 151936 is); other strides load scalars.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from srpo_kernels import launch
from srpo_kernels.device import LOG2E, NEG_INF, block_statistics, finish_statistics, merge_statistics


@triton.jit
def _row_ptr(logits_ptr, b, t, stride_b, stride_t):
    return logits_ptr + b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t


@triton.jit
def _column_offsets(cols, stride_v, UNIT_STRIDE: tl.constexpr):
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
    row_ptr = _row_ptr(logits_ptr, b, t, stride_b, stride_t)
    if N_STREAMS > 1:
        row_ptr = tl.where(stream == 1, _row_ptr(corrupted_ptr, b, t, corrupted_stride_b, corrupted_stride_t), row_ptr)
    if N_STREAMS > 2:
        row_ptr = tl.where(stream == 2, _row_ptr(ablated_ptr, b, t, ablated_stride_b, ablated_stride_t), row_ptr)
    return row_ptr


@triton.jit
def _load_block(row_ptr, cols, V, stride_v, UNIT_STRIDE: tl.constexpr):
    offsets = _column_offsets(cols, stride_v, UNIT_STRIDE)
    return tl.load(row_ptr + offsets, mask=cols < V, other=float("-inf")).to(tl.float32)


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
    inv_temperature = tl.cast(inv_temperature, tl.float32)
    scale = inv_temperature * LOG2E
    target_id = tl.load(ids_ptr + row)
    target = float("nan")  # of an id outside the vocabulary
    row_max, row_sum, weighted = NEG_INF, 0.0, 0.0
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        x = _load_block(row_ptr, cols, V, stride_v, UNIT_STRIDE)
        block_max, block_sum, block_weighted = block_statistics(x, scale, HAS_ENTROPY)
        row_max, row_sum, weighted = merge_statistics(
            row_max, row_sum, weighted, block_max, block_sum, block_weighted, scale
        )
        # The target comes out of the sweep itself: the same memory value as the sum's, and no second read.
        if (target_id >= start) & (target_id < tl.minimum(start + BLOCK_V, V)):
            target = tl.sum(tl.where(cols == target_id, x, 0.0), 0)
    logp, log_sum, entropy = finish_statistics(target, row_max, row_sum, weighted, inv_temperature)
    _store_row(
        logps_ptr, row_max_ptr, log_sum_ptr, entropy_ptr, cell, stream, row,
        logp, row_max, log_sum, entropy, HAS_ENTROPY,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "n_blocks", "T"], do_not_specialize_on_alignment=["ids_ptr", "row_mask_ptr"])
def _row_blocks_fwd_kernel(
    logits_ptr, corrupted_ptr, ablated_ptr, ids_ptr, row_mask_ptr,
    partials_ptr,  # [S, B, T, n_blocks, 3]: max, sum, weighted
    targets_ptr,  # [S, B, T]
    n_rows, n_blocks, T, V,
    stride_b: tl.int64, stride_t: tl.int64, corrupted_stride_b: tl.int64, corrupted_stride_t: tl.int64,
    ablated_stride_b: tl.int64, ablated_stride_t: tl.int64, stride_v: tl.int64,
    inv_temperature,
    HAS_ENTROPY: tl.constexpr, UNIT_STRIDE: tl.constexpr, N_STREAMS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    cell, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    stream, row = cell // n_rows, cell % n_rows
    if tl.load(row_mask_ptr + cell) == 0:
        return
    row_ptr = _stream_row_ptr(
        logits_ptr, corrupted_ptr, ablated_ptr, stream, row // T, row % T,
        stride_b, stride_t, corrupted_stride_b, corrupted_stride_t, ablated_stride_b, ablated_stride_t, N_STREAMS,
    )  # fmt: skip
    scale = tl.cast(inv_temperature, tl.float32) * LOG2E
    target_id = tl.load(ids_ptr + row)
    start = block * BLOCK_V
    cols = start + tl.arange(0, BLOCK_V)
    x = _load_block(row_ptr, cols, V, stride_v, UNIT_STRIDE)
    block_max, block_sum, block_weighted = block_statistics(x, scale, HAS_ENTROPY)
    partial_ptr = partials_ptr + tl.program_id(0).to(tl.int64) * 3
    tl.store(partial_ptr, block_max)
    tl.store(partial_ptr + 1, block_sum)
    tl.store(partial_ptr + 2, block_weighted)
    if (target_id >= start) & (target_id < tl.minimum(start + BLOCK_V, V)):
        tl.store(targets_ptr + cell, tl.sum(tl.where(cols == target_id, x, 0.0), 0))


@triton.jit(
    do_not_specialize=["n_rows", "n_blocks"],
    do_not_specialize_on_alignment=["ids_ptr", "row_mask_ptr", "logps_ptr", "row_max_ptr", "log_sum_ptr"],
)
def _merge_blocks_fwd_kernel(
    partials_ptr, targets_ptr, ids_ptr, row_mask_ptr,
    logps_ptr, row_max_ptr, log_sum_ptr, entropy_ptr,
    n_rows, n_blocks, V, inv_temperature, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0)
    stream, row = cell // n_rows, cell % n_rows
    needed = tl.load(row_mask_ptr + cell) != 0
    inv_temperature = tl.cast(inv_temperature, tl.float32)
    scale = inv_temperature * LOG2E
    row_max, row_sum, weighted = NEG_INF, 0.0, 0.0
    for block in range(0, n_blocks):
        partial_ptr = partials_ptr + (cell.to(tl.int64) * n_blocks + block) * 3
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
    HAS_ENTROPY_GRAD: tl.constexpr, UNIT_STRIDE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    line, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    b, t = line // L, line % L
    cell = b * T + t
    has_token = t < T
    g = tl.load(grad_logps_ptr + cell, mask=has_token, other=0.0).to(tl.float32)
    needed = g != 0.0
    if HAS_ENTROPY_GRAD:
        h = tl.load(grad_entropy_ptr + cell, mask=has_token, other=0.0).to(tl.float32)
        needed = needed | (h != 0.0)
    cols = block * BLOCK_V + tl.arange(0, BLOCK_V)
    out = _row_ptr(out_ptr, b, t, out_stride_b, out_stride_t) + _column_offsets(cols, out_stride_v, UNIT_STRIDE)
    if needed:
        inv_temperature = tl.cast(inv_temperature, tl.float32)
        x = _load_block(_row_ptr(logits_ptr, b, t, stride_b, stride_t), cols, V, stride_v, UNIT_STRIDE)
        log_sum = tl.load(log_sum_ptr + cell)
        log_p = (x - tl.load(row_max_ptr + cell)) * inv_temperature - log_sum
        p = tl.exp2(log_p * LOG2E)
        slope = g
        if HAS_ENTROPY_GRAD:
            slope += h * (tl.where(p == 0.0, 0.0, log_p) + tl.load(entropy_ptr + cell))
        onehot = tl.where(cols == tl.load(ids_ptr + cell), g, 0.0)
        tl.store(out, (onehot - slope * p) * inv_temperature, mask=cols < V)
    else:
        tl.store(out, tl.zeros([BLOCK_V], tl.float32), mask=cols < V)


def row_statistics_fwd(
    streams: list[Tensor], ids: Tensor, row_mask: Tensor, temperature: float, return_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `logps`, `row_max`, `log_sum` `[S, B, T]` and `entropy` `[B, T]` (empty unless asked for)."""
    logps, row_max, log_sum = (torch.empty(row_mask.shape, dtype=torch.float32, device=ids.device) for _ in range(3))
    entropy = torch.empty(ids.shape if return_entropy else 0, dtype=torch.float32, device=ids.device)
    first = streams[0]
    together = all(x.dtype == first.dtype and (x.stride(-1) == 1) == (first.stride(-1) == 1) for x in streams)
    together = together and (first.stride(-1) == 1 or len(streams) == 1)
    groups = [slice(0, len(streams))] if together else [slice(s, s + 1) for s in range(len(streams))]
    if ids.numel() and first.shape[-1]:
        for group in groups:
            wants_entropy = return_entropy and group.start == 0
            outputs = (logps[group], row_max[group], log_sum[group], entropy)
            _launch_streams(streams[group], ids, row_mask[group], temperature, wants_entropy, outputs)
    return logps, row_max, log_sum, entropy


def _launch_streams(streams, ids, row_mask, temperature, has_entropy, outputs) -> None:
    n_rows, T, V = ids.numel(), ids.shape[1], streams[0].shape[-1]
    block, warps = launch.row_block(V)
    n_cells, n_blocks = row_mask.numel(), triton.cdiv(V, block)
    clean, corrupted, ablated = [*streams, *[streams[0]] * (3 - len(streams))]
    strides = [s for x in (clean, corrupted, ablated) for s in (_batch_stride(x), x.stride(1))] + [clean.stride(2)]
    flags = {
        "HAS_ENTROPY": has_entropy,
        "UNIT_STRIDE": clean.stride(2) == 1,
        "N_STREAMS": len(streams),
        "BLOCK_V": block,
        "num_warps": warps,
    }
    inputs = (clean, corrupted, ablated, ids, row_mask)
    if n_blocks == 1 or not launch.split_rows(n_cells, ids.device):
        _row_statistics_fwd_kernel[(n_cells,)](*inputs, *outputs, n_rows, T, V, *strides, 1.0 / temperature, **flags)
        return
    partials = torch.empty(n_cells, n_blocks, 3, dtype=torch.float32, device=ids.device)
    targets = torch.empty(n_cells, dtype=torch.float32, device=ids.device)
    _row_blocks_fwd_kernel[(n_cells * n_blocks,)](
        *inputs, partials, targets, n_rows, n_blocks, T, V, *strides, 1.0 / temperature, **flags
    )
    _merge_blocks_fwd_kernel[(n_cells,)](
        partials, targets, ids, row_mask, *outputs, n_rows, n_blocks, V, 1.0 / temperature,
        HAS_ENTROPY=has_entropy, num_warps=1,
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
    n_blocks = triton.cdiv(V, block)
    unused = grad_logps
    _logits_gradient_bwd_kernel[(B * L * n_blocks,)](
        out, logits, ids, row_max, log_sum,
        unused if grad_entropy is None else entropy, grad_logps, unused if grad_entropy is None else grad_entropy,
        n_blocks, ids.shape[1], L, V,
        _batch_stride(logits), logits.stride(1), logits.stride(2),
        _batch_stride(out), out.stride(1), out.stride(2),
        1.0 / temperature,
        HAS_ENTROPY_GRAD=grad_entropy is not None,
        UNIT_STRIDE=logits.stride(2) == 1 and out.stride(2) == 1,
        BLOCK_V=block,
        num_warps=warps,
    )  # fmt: skip


def _batch_stride(x: Tensor) -> int:
    # A lone batch entry is never stepped over; 0 keeps its stride from choosing another compiled variant.
    return x.stride(0) if x.shape[0] > 1 else 0
