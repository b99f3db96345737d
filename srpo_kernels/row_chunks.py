"""The "torch" backend of the row ops: `reference.py` run over cache-sized chunks of rows.

On a CPU each thread takes whole chunks and runs them serially: a chunk stays in the thread's own cache, and no bit
depends on how many rows or threads there are. (Parallel ops on small chunks would meet at a barrier every few hundred
microseconds, which on a busy machine costs more than the arithmetic.) Masked rows are never read there. On other
devices finding them would need a sync, so they are computed and discarded.

Memory beyond the outputs: two chunks in the compute dtype (three for pairs of rows), 4 MiB a CPU thread or 128 MiB on
other devices.
"""

import ctypes
import functools
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srpo_kernels import reference

_CHUNK_BYTES = 2 << 20
_CHUNK_BYTES_OFF_CPU = 64 << 20
_RUN_BYTES = 64 << 10  # shorter runs of rows are gathered: an op on fewer bytes costs more than the copy


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that maths on `dtype` runs in: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_statistics(
    logits: Tensor, ids: Tensor, row_mask: Tensor, temperature: float, return_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `logps`, `row_max`, `log_sum`, `entropy` `[B, T]` of one stream of logits `[B, T or T+1, V]`."""
    rows = _Rows(row_mask)
    ids = rows.take(torch.where(row_mask, ids, 0))
    sums = ids.new_zeros(5, *ids.shape, dtype=compute_dtype(logits.dtype))

    def work(chunk: _Chunk, buffers: Tensor) -> None:
        x, *workspace = _load(logits, chunk, buffers)
        out = tuple(sums[:, chunk.place])
        reference.row_sums(x, ids[chunk.place], temperature, return_entropy, tuple(workspace), out)

    _for_each_chunk(work, rows, logits)
    row_max, target, total, largest, weighted = sums.unbind()
    statistics = reference.finish_statistics(row_max, target, total, largest, weighted if return_entropy else None)
    logps, row_max, log_sum, entropy = (rows.spread(weighted if x is None else x) for x in statistics)
    return logps, row_max, log_sum, entropy


def row_pairs(
    logits: Tensor, against: Tensor, ids: Tensor, row_mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the `row_statistics` of `logits`, and `kl` and `logps` of `against`, all `[B, T]`."""
    rows = _Rows(row_mask)
    ids = rows.take(torch.where(row_mask, ids, 0))
    sums = ids.new_zeros(9, *ids.shape, dtype=compute_dtype(logits.dtype))

    def work(chunk: _Chunk, buffers: Tensor) -> None:
        x, z, probs, other = _load(logits, chunk, buffers)
        y = against[chunk.b, chunk.rows]
        y = y if y.dtype == other.dtype else other.copy_(y)
        out = sums[:, chunk.place]
        of_row = ids[chunk.place]
        _, second, cross = reference.pair_sums(x, y, of_row, temperature, (z, probs, other), tuple(out[:5]))
        for result, values in zip(out[5:], (*second[1:4], cross), strict=True):
            result.copy_(values)

    _for_each_chunk(work, rows, logits, n_buffers=3)
    row_max, target, total, largest, weighted, *second, cross = sums.unbind()
    logps, row_max, log_sum, entropy = reference.finish_statistics(row_max, target, total, largest, weighted)
    against_logps, _, against_log_sum, _ = reference.finish_statistics(row_max, second[0], second[1], second[2], None)
    kl = reference.finish_kl(total, weighted, cross, log_sum, against_log_sum)
    results = (logps, row_max, log_sum, entropy, kl, against_logps)
    return tuple(rows.spread(weighted if x is None else x) for x in results)  # pyright: ignore[reportReturnType]


def in_huge_pages(x: Tensor) -> Tensor:
    """Return `x`, freshly allocated and untouched, after asking Linux for huge pages under it.

    The first touch of 4 KiB pages costs a CPU more than the arithmetic of a gradient that is written to them.
    """
    if x.device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE"):
        start = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = x.data_ptr() + x.untyped_storage().nbytes() - start
        if size >= mmap.PAGESIZE:  # a hint: where the kernel refuses it, nothing is lost
            _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return x


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def logits_gradient(
    out: Tensor,
    logits: Tensor,
    ids: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
    whole_rows: bool = True,
) -> None:
    """Write the gradient of `logits` into `out` (which may be `logits`); rows without upstream gradient become 0.

    `whole_rows` says that a row holds its whole vocabulary. In a shard the id -1 stands for a token of another one.
    """
    needed = grad_logps != 0 if grad_entropy is None else (grad_logps != 0) | (grad_entropy != 0)
    rows, idle = _Rows(needed), _Rows(~needed)
    ids = rows.take(torch.where(needed, ids, 0))
    vectors: list[Any] = [
        None if x is None else rows.take(x) for x in (row_max, log_sum, entropy, grad_logps, grad_entropy)
    ]
    writes_directly = out.dtype == compute_dtype(out.dtype)

    def work(chunk: _Chunk, buffers: Tensor) -> None:
        x, z, probs = _load(logits, chunk, buffers)
        direct = writes_directly and isinstance(chunk.rows, slice)
        of_chunk: list[Any] = [None if v is None else v[chunk.place] for v in vectors]
        workspace = (z, out[chunk.b, chunk.rows] if direct else probs)
        grad = reference.logits_gradient(
            x, ids[chunk.place], *of_chunk, temperature=temperature, whole_rows=whole_rows, workspace=workspace
        )
        if not direct:
            out[chunk.b, chunk.rows] = grad.to(out.dtype)

    def clear(chunk: _Chunk, _buffers: Tensor) -> None:
        out[chunk.b, chunk.rows] = 0

    _for_each_chunk(work, rows, logits)
    out[:, needed.shape[1] :].zero_()
    if logits.device.type == "cpu":
        _for_each_chunk(clear, idle, logits)
    else:
        out[:, : needed.shape[1]].masked_fill_(~needed[..., None], 0)


class _Chunk(NamedTuple):
    """Rows `rows` of trajectory `b`, which are the rows `place` among the active ones."""

    b: int
    rows: slice | Tensor
    place: slice


class _Rows:
    """The active rows of a mask `[B, T]`: on a CPU those that are set, elsewhere all."""

    def __init__(self, mask: Tensor):
        self.mask, self.shape = mask, mask.shape
        self.compact = mask.device.type == "cpu"

    def take(self, x: Tensor) -> Tensor:
        """Return `x` `[B, T]` on the active rows."""
        return x[self.mask] if self.compact else x.reshape(-1)

    def spread(self, x: Tensor) -> Tensor:
        """Return `[B, T]` with `x` on the active rows and 0 elsewhere."""
        if self.compact:
            return x.new_zeros(self.shape).masked_scatter_(self.mask, x)
        return torch.where(self.mask, x.view(self.shape), 0.0)

    def chunks(self, size: int, row_bytes: int) -> Iterator[_Chunk]:
        """Yield chunks of at most `size` active rows: views where runs of them are long, else gathers."""
        start = 0
        for b in range(self.shape[0]):
            for part in self._active(b).split(size):
                if not len(part):
                    continue
                breaks = (part.diff() != 1).nonzero().flatten() + 1
                long_runs = len(part) * row_bytes >= (len(breaks) + 1) * _RUN_BYTES
                for run in part.tensor_split(breaks) if long_runs else (part,):
                    rows = slice(int(run[0]), int(run[-1]) + 1) if long_runs or not len(breaks) else run
                    yield _Chunk(b, rows, slice(start, start + len(run)))
                    start += len(run)

    def _active(self, b: int) -> Tensor:
        return self.mask[b].nonzero().flatten() if self.compact else torch.arange(self.shape[1])


def _for_each_chunk(work: Callable[[_Chunk, Tensor], None], rows: _Rows, logits: Tensor, n_buffers: int = 2) -> None:
    """Call `work(chunk, workspace)` on every chunk of active rows."""
    V, dtype = logits.shape[-1], compute_dtype(logits.dtype)
    on_cpu = logits.device.type == "cpu"
    size = max(4, (_CHUNK_BYTES if on_cpu else _CHUNK_BYTES_OFF_CPU) // (4 * V))
    chunks = list(rows.chunks(size, 4 * V))
    shape = (n_buffers, min(size, rows.shape[1]), V)

    inference = torch.is_inference_mode_enabled()

    def run(queue: Iterator[_Chunk]) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # a thread starts with autograd on, in no mode
            workspace = torch.empty(shape, dtype=dtype, device=logits.device)
            for chunk in queue:
                work(chunk, workspace)

    queue = iter(chunks)  # each thread takes the next chunk: one that lost its core does not hold up the others
    threads = min(torch.get_num_threads() if on_cpu else 1, len(chunks))
    if threads <= 1:
        run(queue)
        return
    list(_workers(torch.get_num_threads(), os.getpid()).map(run, [queue] * threads))


@functools.lru_cache(maxsize=1)
def _workers(threads: int, _process: int) -> ThreadPoolExecutor:
    """Return threads whose torch ops are serial. Kept: starting one costs milliseconds."""
    pool = ThreadPoolExecutor(threads, "srpo", _make_ops_serial)
    everyone = threading.Barrier(threads)
    try:
        list(pool.map(lambda _: everyone.wait(), range(threads)))  # start them all now
    finally:
        torch.set_num_threads(threads)  # the workers' 1 is theirs alone, yet threads born later would start with it
    return pool


def _make_ops_serial() -> None:
    torch.get_num_threads()  # a thread's first look at the number sets it to the process's own: look before, not after
    torch.set_num_threads(1)


def _load(logits: Tensor, chunk: _Chunk, buffers: Tensor) -> tuple[Tensor, ...]:
    """Return the rows in the compute dtype and buffers of their size; the first may hold the rows."""
    x = logits[chunk.b, chunk.rows]
    workspace = buffers[:, : x.shape[0]].unbind()
    if x.dtype != buffers.dtype:
        x = workspace[0].copy_(x)
    return x, *workspace
