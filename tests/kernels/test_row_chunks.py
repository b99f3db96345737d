"""The CPU path's own machinery: which rows it visits, on which threads, in which memory."""

import pathlib
import re
import threading

import pytest
import torch

from srpo_kernels import reference, row_chunks

# Vocabularies by the bytes of a row: a run of one long row is worth its own op, of short ones it takes sixteen.
LONG_ROWS, SHORT_ROWS = 32 << 10, 1 << 10


@pytest.fixture
def chunks(monkeypatch):
    """The rows of logits that each call of the reference gets."""
    seen = []
    plain = reference.row_sums

    def spy(x, *rest):
        seen.append(x)
        return plain(x, *rest)

    monkeypatch.setattr(reference, "row_sums", spy)
    return seen


def numbered_rows(mask, V):
    """Logits of which each row holds its own number, in memory for one number a row."""
    numbers = torch.arange(mask.numel(), dtype=torch.float32).view(*mask.shape, 1)
    return numbers.expand(*mask.shape, V)


@pytest.mark.parametrize("V", [LONG_ROWS, SHORT_ROWS])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_chunks_visit_every_active_row_once_and_in_order(chunks, share, V):
    mask = torch.rand(3, 101, generator=torch.Generator().manual_seed(0)) < share
    mask[1, 40:90] = share > 0.0
    logits, ids = numbered_rows(mask, V), torch.zeros(mask.shape, dtype=torch.long)
    logps, row_max, *_ = row_chunks.row_statistics(logits, ids, mask, 1.0, False)
    assert [int(n) for x in chunks for n in x[:, 0]] == mask.flatten().nonzero().flatten().tolist()
    assert all(0 < len(x) <= (2 << 20) // (4 * V) for x in chunks)
    assert torch.equal(row_max, torch.where(mask, logits[..., 0], 0.0))
    assert torch.equal(logps != 0, mask)


def test_rows_are_gathered_only_where_runs_are_short(chunks):
    mask = torch.ones(1, 64, dtype=torch.bool)
    mask[0, 5::7] = False
    for V, gathered in ((LONG_ROWS, False), (SHORT_ROWS, True)):
        logits, ids = numbered_rows(mask, V), torch.zeros(mask.shape, dtype=torch.long)
        chunks.clear()
        row_chunks.row_statistics(logits, ids, mask, 1.0, False)
        copied = [x.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr() for x in chunks]
        assert copied == [gathered] * len(chunks)


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


def test_ops_in_the_worker_threads_are_serial(monkeypatch):
    before, plain = torch.get_num_threads(), reference.row_sums
    seen = []

    def spy(*arguments):
        torch.randn(1 << 18).sum()  # the first parallel op of a thread is what used to undo its setting
        seen.append((torch.get_num_threads(), threading.current_thread() is threading.main_thread()))
        return plain(*arguments)

    monkeypatch.setattr(reference, "row_sums", spy)
    torch.set_num_threads(2)
    try:
        mask = torch.ones(4, 16, dtype=torch.bool)
        ids = torch.zeros(mask.shape, dtype=torch.long)
        row_chunks.row_statistics(numbered_rows(mask, LONG_ROWS), ids, mask, 1.0, False)
        assert seen == [(1, False)] * 4
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
