"""One fault at a time in a real kernel, and how the emulator finds it.

    PYTHONPATH=.:tests python -m compiled.emulator.faults     # prints what was found, as JSON

Not here: a merged chunk beyond 2^31 would need a grid of 2^29 programs; `compiled.mutants` holds its address to int64.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from compiled import mutants
from compiled.emulator.batches import Batch
from compiled.emulator.compare import fraction_of_floor, run
from compiled.emulator.machine import Options
from compiled.emulator.memory import KernelError
from compiled.emulator.scenarios import (
    Result,
    far_pairs,
    far_rows,
    far_tokens,
    log_probs,
    loss,
    one_kernel,
    pairs,
    split_rows,
)
from compiled.mutants import (
    CREDIT,
    GRADIENT,
    LOSS,
    MERGE,
    PAIR_MERGE,
    PAIR_SPLIT,
    PAIRS,
    SCALE,
    SPLIT,
    STATISTICS,
    TRAINING,
    Mutant,
)


@dataclass(frozen=True)
class Fault:
    """Another text of `srpo_kernels`, or a pattern and its replacement in the PTX of one kernel, and what finds it."""

    change: Mutant | tuple[str, str]
    scenario: Callable[[], Result]
    found: str  # "race", "wrong", an address "out of bounds" or another message; "right" is nothing


def _source(file: str, old: str, new: str) -> Mutant:
    return Mutant(file, ((old, new),), ())


_ROWS = functools.partial(log_probs, Batch(B=2, T=3, V=4112, layout="rows"))
_ODD = functools.partial(log_probs, Batch(B=1, T=3, V=1003, layout="rows"))
_UNALIKE = functools.partial(log_probs, Batch(B=1, T=3, V=4107, layout="wide rows"))
_SPLIT = functools.partial(split_rows, log_probs, Batch(B=1, T=3, V=17008, layout="rows"))
_SPLIT_ODD = functools.partial(split_rows, log_probs, Batch(B=1, T=3, V=17003, layout="rows"))
_SPLIT_FAR = functools.partial(split_rows, far_rows, 17008)
_LOW = functools.partial(log_probs, Batch(B=1, T=3, V=17003, layout="rows", offset=-400.0))
_EXTRA = functools.partial(log_probs, Batch(B=1, T=3, V=130))
_TRAINED = functools.partial(one_kernel, loss, Batch(B=1, T=3, V=34003, layout="padded rows", seed=1), "none")
_TRAINED_EXTRA = functools.partial(one_kernel, loss, Batch(B=1, T=3, V=144), "none")
_SCALED = functools.partial(_TRAINED, upstream=0.25)
_SCALED_EDGE = functools.partial(
    one_kernel, loss, Batch(B=1, T=3, V=1003, layout="padded rows", seed=1), "none", upstream=0.25
)
_PAIRED = functools.partial(pairs, Batch(B=1, T=2, V=9003, layout="padded rows", seed=1))
_PAIRED_CHUNKS = functools.partial(pairs, Batch(B=1, T=2, V=17003, layout="padded rows", seed=1))
_PAIRED_BANNED = functools.partial(pairs, Batch(B=1, T=3, V=1000, banned=True))
_PAIRED_SPLIT = functools.partial(split_rows, pairs, Batch(B=1, T=2, V=17003, layout="padded rows", seed=1))
_TOKENS = functools.partial(loss, Batch(B=2, T=5, V=2, layout="rows"), entry="logps")
_BARRIER = (r"bar\.sync[ \t]+0;", "")
_ROW_MASK, _CREDIT_MASK, _LOSS_MASK, _FAR = (
    mutants.INTERPRETED[f"{name}"]
    for name in ("row mask one too far", "credit mask one too far", "loss mask one too far", "rows in int32")
)
_OTHER_BASE = (r"0f3FB8AA3B", "0f3FB8AB3B")  # log2 e, off by its 17th bit

_INFINITE, _ZERO = 'tl.cast(float("-inf"), tl.float32)', "tl.cast(0.0, tl.float32)"

FAULTS: dict[tuple[str, str], Fault] = {
    (STATISTICS, "a barrier less"): Fault(_BARRIER, _ROWS, "race"),
    (STATISTICS, "mask one too far"): Fault(_ROW_MASK, _ODD, "out of bounds"),
    (STATISTICS, "no mask"): Fault(
        _source("row_statistics", "mask=cols < end, other", "mask=cols >= 0, other"), _ROWS, "wrong"
    ),
    (STATISTICS, "rows in int32"): Fault(_FAR, far_rows, "out of bounds"),
    (STATISTICS, "0 behind the row"): Fault(
        _source("row_statistics", 'other=float("-inf")', "other=0.0"), _ODD, "wrong"
    ),
    (STATISTICS, "maximum of a lane from 0"): Fault(
        _source("row_statistics", 'tl.full([LANES], float("-inf")', "tl.full([LANES], 0.0"), _LOW, "wrong"
    ),
    (STATISTICS, "half a warp reduced"): Fault(
        (r"(shfl\.sync\.bfly\.b32 .*?), 16, 31, -1;", r"\1, 8, 31, -1;"), _ROWS, "wrong"
    ),
    (STATISTICS, "partial sums not written"): Fault((r"@%p\d+ st\.shared\.b32 .*", ""), _ROWS, "uninitialised"),
    (STATISTICS, "address off by two bytes"): Fault(
        (r"(ld\.global\.v4\.b32 .*?) \+ 0 \];", r"\1 + 2 ];"), _ROWS, "misaligned"
    ),
    (STATISTICS, "another base"): Fault(_OTHER_BASE, _ROWS, "wrong"),
    (STATISTICS, "flush where nothing is subnormal"): Fault((r"fma\.rn\.f32", "fma.rn.ftz.f32"), _ROWS, "right"),
    (SPLIT, "a barrier less"): Fault(_BARRIER, _SPLIT, "race"),
    (SPLIT, "mask one too far"): Fault(_ROW_MASK, _SPLIT_ODD, "out of bounds"),
    (SPLIT, "rows in int32"): Fault(_FAR, _SPLIT_FAR, "out of bounds"),
    (SPLIT, "0 behind the row"): Fault(
        _source("row_statistics", 'other=float("-inf")', "other=0.0"), _SPLIT_ODD, "wrong"
    ),
    (MERGE, "a chunk too many"): Fault(
        _source("row_statistics", "for chunk in range(0, n_chunks)", "for chunk in range(0, n_chunks + 1)"),
        _SPLIT, "out of bounds",
    ),
    (MERGE, "maximum from 0"): Fault(
        _source("row_statistics", f"{_INFINITE}, 0.0, 0.0\n    for c", f"{_ZERO}, 0.0, 0.0\n    for c"),
        functools.partial(split_rows, _LOW), "wrong",
    ),
    (GRADIENT, "a barrier less"): Fault(_BARRIER, _UNALIKE, "race"),
    (GRADIENT, "no barrier before an edge is overwritten"): Fault(
        _source("row_statistics", "tl.debug_barrier()", "pass"),
        functools.partial(loss, Batch(B=3, T=4, V=1003), inplace=True), "race",
    ),
    (GRADIENT, "mask one too far"): Fault(
        _source("row_statistics", "values, mask=cols < V)", "values, mask=cols <= V)"),
        _ODD, "out of bounds",
    ),
    (GRADIENT, "rows in int32"): Fault(
        Mutant(
            "row_statistics",
            (
                ("out_stride_b: tl.int64, out_stride_t: tl.int64", "out_stride_b, out_stride_t"),
                ("row_pointer(out_ptr, b, t, out_stride_b", "(out_ptr + b * out_stride_b + t * out_stride_t"),
                ("* out_stride_t, out_stride_t)", "* out_stride_t)"),
            ),
            (),
        ),
        far_rows, "out of bounds",
    ),
    (GRADIENT, "no mask behind the tokens"): Fault(
        _source("row_statistics", "grad_logps_ptr + cell, mask=has_token, other=0.0", "grad_logps_ptr + cell"),
        _EXTRA, "out of bounds",
    ),
    (GRADIENT, "a gradient where there is no token"): Fault(
        _source("row_statistics", "grad_logps_ptr + cell, mask=has_token, other=0.0",
                "grad_logps_ptr + cell, mask=has_token, other=1.0"),
        _EXTRA, "out of bounds",
    ),
    (TRAINING, "a barrier less"): Fault(_BARRIER, _TRAINED, "race"),
    (TRAINING, "rows in int32"): Fault(
        Mutant(
            "row_training",
            (
                ("stride_b: tl.int64, stride_t: tl.int64, out_stride_b", "stride_b, stride_t, out_stride_b"),
                ("row_pointer(logits_ptr, b, t, stride_b, stride_t)", "logits_ptr + b * stride_b + t * stride_t"),
            ),
            (),
        ),
        functools.partial(one_kernel, far_rows, dtype=torch.bfloat16, inplace=False), "out of bounds",
    ),
    (TRAINING, "mask one too far"): Fault(
        _source("row_statistics", "values, mask=cols < V)", "values, mask=cols <= V)"), _TRAINED, "out of bounds"
    ),
    (TRAINING, "chunks in another place"): Fault(
        _source("row_training", "lane // LANES * CHUNK_V", "lane // LANES % 2 * CHUNK_V"), _TRAINED, "wrong"
    ),
    (TRAINING, "the id in another place"): Fault(
        _source("row_training", "ABREAST + column // CHUNK_V)", "ABREAST + column // CHUNK_V + 1)"), _TRAINED, "wrong"
    ),
    (TRAINING, "the first block is not written"): Fault(
        _source("row_training", "for read in range(0, V,", "for read in range(0, V - BLOCK_V,"), _TRAINED, "wrong"
    ),
    (TRAINING, "a row where there is no token"): Fault(
        _source("row_training", "row_mask_ptr + cell, mask=has_token, other=0",
                "row_mask_ptr + cell, mask=has_token, other=1"),
        _TRAINED_EXTRA, "out of bounds",
    ),
    (TRAINING, "no scale"): Fault(
        _source("row_training", "slope * tl.load(scale_ptr + cell).to(tl.float32)", "slope"), _TRAINED, "wrong"
    ),
    (SCALE, "the edge keeps its scale"): Fault(
        _source("row_training", "edge * factor", "edge"), _SCALED_EDGE, "wrong"
    ),
    (SCALE, "no barrier before an edge is overwritten"): Fault(
        _source("row_training", "tl.debug_barrier()", "pass"), _SCALED, "race"
    ),
    (SCALE, "no factor is applied"): Fault(
        _source("row_training", "factor == 1.0:", "factor != 0.0:"), _SCALED, "wrong"
    ),
    (PAIRS, "a barrier less"): Fault(_BARRIER, _PAIRED, "race"),
    (PAIRS, "rows in int32"): Fault(
        Mutant(
            "row_pairs",
            (
                ("against_stride_t: tl.int64", "against_stride_t"),
                (
                    "row_pointer(against_ptr, row // T, row % T, against_stride_b, against_stride_t)",
                    "against_ptr + row % T * against_stride_t",
                ),
            ),
            (),
        ),
        far_pairs, "out of bounds",
    ),
    (PAIRS, "the contrast keeps its first maximum"): Fault(
        _source("device", "tl.fma(tl.fma(lane_sum, shift, lane_cross), factor, block_cross)",
                "tl.fma(lane_cross, factor, block_cross)"),
        _PAIRED, "wrong",
    ),
    (PAIRS, "chunks keep their maximum"): Fault(
        _source("device", "tl.fma(tl.fma(sum_a, shift_a, cross_a), factor_a,", "tl.fma(cross_a, factor_a,"),
        _PAIRED_CHUNKS, "wrong",
    ),
    (PAIRS, "the edge against itself"): Fault(
        _source("row_pairs", "edge_cross(edge, against_edge,", "edge_cross(edge, edge,"), _PAIRED, "wrong"
    ),
    (PAIRS, "a banned token is not seen"): Fault(
        _source("device", "banned > NEG_INF", "banned != banned"), _PAIRED_BANNED, "wrong"
    ),
    (PAIR_SPLIT, "mask one too far"): Fault(_ROW_MASK, _PAIRED_SPLIT, "out of bounds"),
    (PAIR_MERGE, "a chunk too many"): Fault(
        _source("row_pairs", "for chunk in range(0, n_chunks)", "for chunk in range(0, n_chunks + 1)"),
        _PAIRED_SPLIT, "out of bounds",
    ),
    (CREDIT, "a barrier less"): Fault(_BARRIER, _TOKENS, "race"),
    (CREDIT, "mask one too far"): Fault(_CREDIT_MASK, _TOKENS, "out of bounds"),
    (CREDIT, "tokens in int32"): Fault(
        _source("device", "trajectory).to(tl.int64)", "trajectory).to(tl.int32)"), far_tokens, "out of bounds"
    ),
    (CREDIT, "contrasts of other roles count 1"): Fault(
        _source("token_credit", "tl.where(role == 1, c, 0.0)", "tl.where(role == 1, c, 1.0)"), _TOKENS, "wrong"
    ),
    (LOSS, "a barrier less"): Fault(_BARRIER, _TOKENS, "race"),
    (LOSS, "mask one too far"): Fault(_LOSS_MASK, _TOKENS, "out of bounds"),
    (LOSS, "masked tokens count 1"): Fault(
        _source("policy_loss", "tl.where(valid, policy, 0.0)", "tl.where(valid, policy, 1.0)"), _TOKENS, "wrong"
    ),
}  # fmt: skip


def finding(kernel: str, fault: Fault) -> str:
    """Return how a fault is found."""
    mutant = fault.change if isinstance(fault.change, Mutant) else None

    def rewritten(name: str, text: str) -> str:
        return re.sub(*fault.change, text) if name == kernel else text

    with tempfile.TemporaryDirectory() as folder, mutants.installed(mutant, folder) if mutant else nullcontext():
        try:
            result, session = run(fault.scenario, "sm_90", Options(), change=None if mutant else rewritten)
        except KernelError as error:
            return str(error)
    if session.races:
        return session.races[0]
    worst = max(fraction_of_floor(k, *x) for k, x in result.items())
    return "right" if worst <= 1 else f"wrong: {worst:.3g} times the floor"


def main() -> None:
    """Print what is found of each fault."""
    json.dump([[*name, finding(name[0], fault)] for name, fault in FAULTS.items()], sys.stdout, indent=1)


if __name__ == "__main__":
    main()
