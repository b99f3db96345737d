"""The CPU path's own machinery: which rows it visits, on which threads, in which memory."""

import os
import pathlib
import re

import pytest
import torch

from srpo_kernels import row_chunks

ROW_BYTES = 128 << 10  # a run of one such row is worth its own op
SHORT_ROW_BYTES = 4 << 10  # of these it takes sixteen


@pytest.mark.parametrize("row_bytes", [ROW_BYTES, SHORT_ROW_BYTES])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_chunks_visit_every_active_row_once_and_in_order(share, row_bytes):
    mask = torch.rand(3, 101, generator=torch.Generator().manual_seed(0)) < share
    mask[1, 40:90] = share > 0.0
    chunks = list(row_chunks._Rows(mask).chunks(16, row_bytes))
    visited = [(c.b, t) for c in chunks for t in torch.arange(101)[c.rows].tolist()]
    assert visited == [tuple(x) for x in mask.nonzero().tolist()]
    assert [t for c in chunks for t in range(c.place.start, c.place.stop)] == list(range(int(mask.sum())))
    assert all(0 < c.place.stop - c.place.start <= 16 for c in chunks)


def test_rows_are_gathered_only_where_runs_are_short():
    mask = torch.ones(1, 64, dtype=torch.bool)
    mask[0, 5::7] = False
    assert all(isinstance(c.rows, slice) for c in row_chunks._Rows(mask).chunks(16, ROW_BYTES))
    assert all(isinstance(c.rows, torch.Tensor) for c in row_chunks._Rows(mask).chunks(16, SHORT_ROW_BYTES))


@pytest.mark.parametrize("V", [40, 20000])
def test_scattered_rows_give_what_contiguous_ones_give(V):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 37, V, generator=generator)
    ids = torch.randint(0, V, (2, 37), generator=generator)
    mask = torch.rand(2, 37, generator=generator) < 0.7
    full = row_chunks.row_statistics(logits, ids, torch.ones_like(mask), 0.7, True)
    some = row_chunks.row_statistics(logits.masked_fill(~mask[..., None], torch.nan), ids, mask, 0.7, True)
    for a, b in zip(full, some, strict=True):
        assert torch.equal(torch.where(mask, a, 0.0), b)

    upstream = torch.randn(2, 37, generator=generator)
    grads = []
    for g in (upstream, torch.where(mask, upstream, 0.0)):
        out = torch.full_like(logits, torch.nan)
        row_chunks.logits_gradient(out, logits, ids, full[1], full[2], None, g, None, 0.7)
        grads.append(out)
    assert torch.equal(torch.where(mask[..., None], grads[0], 0.0), grads[1])


def test_ops_in_the_worker_threads_are_serial():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        workers = row_chunks._workers(2, os.getpid())

        def threads_of_an_op(_: int) -> int:
            torch.randn(1 << 18).sum()  # the first parallel op of a thread is what used to undo its setting
            return torch.get_num_threads()

        assert list(workers.map(threads_of_an_op, range(4))) == [1] * 4
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_large_results_ask_for_huge_pages():
    maps = pathlib.Path("/proc/self/smaps")
    if not maps.exists() or not pathlib.Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("no huge pages on this system")
    out = row_chunks.in_huge_pages(torch.empty(64 << 18))  # 64 MiB: a mapping of its own
    middle = out.data_ptr() + out.nbytes // 2
    inside = False
    for line in maps.read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= middle < int(span[2], 16)
        elif inside and line.startswith("VmFlags:"):
            assert "hg" in line.split()
            return
    raise AssertionError("no mapping holds the gradient")
