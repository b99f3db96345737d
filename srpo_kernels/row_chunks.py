"""The "torch" backend of the row ops: `reference.py` run over cache-sized chunks of rows.

On a CPU each thread takes whole chunks and runs them serially: a chunk stays in the thread's own cache, and no bit
depends on how many rows or threads there are. (Parallel ops on small chunks would meet at a barrier every few hundred
microseconds, which on a busy machine costs more than the arithmetic.) Masked rows are never read there. On other
devices finding them would need a sync, so they are computed and discarded.

Memory beyond the outputs: two chunks in the compute dtype, 8 MiB a CPU thread or 128 MiB on other devices.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from srpo_kernels import reference

_CHUNK_BYTES = 4 << 20
_CHUNK_BYTES_OFF_CPU = 64 << 20


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that maths on `dtype` runs in: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_statistics(
    logits: Tensor, ids: Tensor, row_mask: Tensor, temperature: float, return_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `logps`, `row_max`, `log_sum`, `entropy` `[B, T]` of one stream of logits `[B, T or T+1, V]`."""
    outputs = ids.new_zeros(4, *ids.shape, dtype=compute_dtype(logits.dtype))
    ids = torch.where(row_mask, ids, 0)

    def work(b: int, rows: Rows, buffers: Tensor) -> None:
        chunk, *workspace = _load(logits[b], rows, buffers)
        results = reference.row_statistics(chunk, ids[b, rows], temperature, return_entropy, tuple(workspace))
        known = [x for x in results if x is not None]
        outputs[: len(known), b, rows] = torch.stack(known)

    _for_each_chunk(work, row_mask, logits)
    if logits.device.type != "cpu":
        outputs = torch.where(row_mask, outputs, 0.0)
    return tuple(x.clone() for x in outputs)  # what an op returns must not share memory


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
) -> None:
    """Write the gradient of `logits` into `out` (which may be `logits`); rows without upstream gradient become 0."""
    needed = grad_logps != 0 if grad_entropy is None else (grad_logps != 0) | (grad_entropy != 0)
    ids = torch.where(needed, ids, 0)
    writes_directly = out.dtype == compute_dtype(out.dtype) and out.data_ptr() != logits.data_ptr()

    def work(b: int, rows: Rows, buffers: Tensor) -> None:
        chunk, z, probs = _load(logits[b], rows, buffers)
        direct = writes_directly and isinstance(rows, slice)
        grad = reference.logits_gradient(
            chunk,
            ids[b, rows],
            row_max[b, rows],
            log_sum[b, rows],
            None if entropy is None else entropy[b, rows],
            grad_logps[b, rows],
            None if grad_entropy is None else grad_entropy[b, rows],
            temperature,
            (z, out[b, rows] if direct else probs),
        )
        if not direct:
            out[b, rows] = grad.to(out.dtype)

    def clear(b: int, rows: Rows, _buffers: Tensor) -> None:
        out[b, rows] = 0

    _for_each_chunk(work, needed, logits)
    out[:, ids.shape[1] :].zero_()
    if logits.device.type == "cpu":
        _for_each_chunk(clear, ~needed, logits)
    else:
        out[:, : ids.shape[1]].masked_fill_(~needed[..., None], 0)


Rows = slice | Tensor


def _for_each_chunk(work: Callable[[int, Rows, Tensor], None], mask: Tensor, logits: Tensor) -> None:
    """Call `work(trajectory, rows, workspace)` on every chunk of active rows."""
    V, dtype = logits.shape[-1], compute_dtype(logits.dtype)
    on_cpu = logits.device.type == "cpu"
    size = max(4, (_CHUNK_BYTES if on_cpu else _CHUNK_BYTES_OFF_CPU) // (4 * V))
    chunks = list(_chunks(mask, size))
    new_workspace = functools.partial(torch.empty, 2, min(size, mask.shape[1]), V, dtype=dtype, device=logits.device)

    def run(share: list[tuple[int, Rows]]) -> None:
        with torch.no_grad():  # a thread starts with autograd on
            workspace = new_workspace()
            for b, rows in share:
                work(b, rows, workspace)

    threads = torch.get_num_threads() if on_cpu else 1
    if min(threads, len(chunks)) <= 1:
        run(chunks)
        return
    list(_workers(threads, os.getpid()).map(run, (chunks[k::threads] for k in range(threads))))


@functools.lru_cache(maxsize=1)
def _workers(threads: int, _process: int) -> ThreadPoolExecutor:
    """Return threads whose torch ops are serial. Kept: starting one costs milliseconds."""
    pool = ThreadPoolExecutor(threads, "srpo", torch.set_num_threads, (1,))
    everyone = threading.Barrier(threads)
    try:
        list(pool.map(lambda _: everyone.wait(), range(threads)))  # start them all now
    finally:
        torch.set_num_threads(threads)  # the workers' 1 is theirs alone, yet threads born later would start with it
    return pool


def _chunks(mask: Tensor, size: int) -> Iterator[tuple[int, Rows]]:
    """Yield (trajectory, rows): slices where the active rows are contiguous, else an index tensor."""
    for b in range(mask.shape[0]):
        if mask.device.type != "cpu":
            yield from ((b, slice(t, min(t + size, mask.shape[1]))) for t in range(0, mask.shape[1], size))
            continue
        for rows in mask[b].nonzero().flatten().split(size):
            if len(rows):
                first, last = int(rows[0]), int(rows[-1])
                yield b, slice(first, last + 1) if last - first + 1 == len(rows) else rows


def _load(logits: Tensor, rows: Rows, buffers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows in the compute dtype and two buffers of their size; the first may hold the rows."""
    chunk = logits[rows]
    first, second = buffers[0, : chunk.shape[0]], buffers[1, : chunk.shape[0]]
    if chunk.dtype != buffers.dtype:
        chunk = first.copy_(chunk)
    return chunk, first, second
