"""Compile every kernel for GPUs that are not here and print what the compilers made of it.

    python benchmarks/compile_report.py [--targets sm_90 gfx942] [--shape B T V --dtype bfloat16] [--json FILE]
    python benchmarks/compile_report.py --peers     # TRL's and Liger's kernels beside ours
    python benchmarks/compile_report.py --sweep     # BLOCK and warps of the two kernels that touch logits
    python benchmarks/compile_report.py --execute [--quick]    # run the machine code in an emulator, against float64

Columns: registers, stack, shared memory (bytes) and instructions of the whole kernel; loads and stores of global memory
as count x bits; occ, the share of warp slots that registers and shared memory leave filled; per element of the hot path
(the innermost loop over memory): bytes, exponentials, instructions. Counts from machine code, not measurements.
`--execute` prints the table of `compiled.emulator.compare` instead: errors as fractions of the tests' floors, races.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: it decides what a kernel is
    _cache = tempfile.TemporaryDirectory(prefix="compile_report_")  # nothing from an older compiler
    os.environ["TRITON_CACHE_DIR"] = _cache.name
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

import torch
from compiled.cases import CASES, Shape, few_rows, log_probs, loss, split
from compiled.dry_launch import TARGETS
from compiled.emulator import compare as emulator
from compiled.emulator.launcher import EMULATED_TARGETS
from compiled.survey import launches_of, row
from tabulate import tabulate

HEADERS = ["target", "kernel", "block", "warps", "regs", "stack", "spills", "smem", "instr", "loads", "stores", "fp64",
           "occ", "B/elem", "exp/elem", "instr/elem", "broken rules"]  # fmt: skip

FORWARD = [(1024, 1), (2048, 2), (2048, 4), (4096, 2), (4096, 4), (4096, 8), (8192, 4), (8192, 8), (8192, 16),
           (16384, 8), (16384, 16), (32768, 32)]  # fmt: skip
BACKWARD = [(1024, 4), (2048, 4), (4096, 4), (4096, 8), (8192, 4), (8192, 8), (8192, 16), (16384, 8), (16384, 16)]


def collect(calls: dict[str, Callable[[], None]], targets: list[str], streams: str | None) -> list[dict]:
    """Return one row for every different machine code that the calls compile."""
    rows = []
    for target in targets:
        seen = set()
        for name, call in calls.items():
            for launch in launches_of(call, target):
                if launch.compiled.hash not in seen:
                    seen.add(launch.compiled.hash)
                    rows.append(row(name, target, launch, streams))
    return rows


def our_calls(shape: Shape) -> dict[str, Callable[[], None]]:
    """Return calls that reach every kernel once in its usual form."""
    return {
        "loss": lambda: loss(shape),
        "loss, live contrasts": lambda: loss(shape, "live"),
        "log-probs and entropy": lambda: log_probs(shape, entropy=True),
        "loss, few rows": lambda: split(loss, shape, "none"),
    }


def peer_calls(shape: Shape) -> dict[str, Callable[[], None]]:
    """Return the same work by TRL's and Liger's kernels: log-probs with entropy, and the loss, both with backward."""

    def trl() -> None:
        from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

        logits = shape.logits()[:, : shape.T].contiguous().requires_grad_()
        logps, entropy = selective_log_softmax_and_entropy(logits, shape.tokens(torch.int64))
        (logps + entropy).sum().backward()

    def liger() -> None:
        from liger_kernel.ops.grpo_loss import GrpoLossFunction

        zeros, ids = shape.tokens(torch.float32), shape.tokens(torch.int64)
        mask, advantages = shape.tokens(torch.int64, 1), torch.ones(shape.B)
        logits = shape.logits().requires_grad_()
        out = GrpoLossFunction.apply(logits, zeros, None, ids, advantages, mask, 0.9, 0.0, 0.2, 0.2, False)
        out[0].backward()

    return {"TRL log-probs and entropy": trl, "Liger GRPO loss": liger}


@contextmanager
def block_sizes(name: str, block: int, warps: int) -> Iterator[None]:
    """Replace one launch heuristic."""
    from srpo_kernels import launch

    stock = getattr(launch, name)
    setattr(launch, name, lambda vocabulary: (block, warps))
    try:
        yield
    finally:
        setattr(launch, name, stock)


def sweep(shape: Shape, targets: list[str]) -> list[dict]:
    """Return rows of the kernels that touch logits, over block sizes and warps."""
    rows = []
    for heuristic, settings, kernels in (
        ("row_block", FORWARD, {"_row_statistics_fwd_kernel", "_row_blocks_fwd_kernel"}),
        ("gradient_block", BACKWARD, {"_logits_gradient_bwd_kernel"}),
    ):
        for block, warps in settings:
            for context in (nullcontext, few_rows) if heuristic == "row_block" else (nullcontext,):
                with block_sizes(heuristic, block, warps), context():
                    found = collect({"sweep": lambda: loss(shape, "none")}, targets, None)
                rows += [r for r in found if r["kernel"] in kernels]
    return sorted(rows, key=lambda r: (list(TARGETS).index(r["target"]), r["kernel"]))


def table(rows: list[dict]) -> str:
    """Return the rows as text."""

    def counts(accesses: dict) -> str:
        return " ".join(f"{count}x{width}" for width, count in accesses.items())

    cells = []
    for r in rows:
        path = r["hot_path"]
        block = next((value for name, value in r["flags"].items() if name.startswith("BLOCK")), None)
        per_element = (path[f"{what}_per_element"] for what in ("bytes", "exp2", "instructions"))
        cells.append(
            [r["target"], f"{r['kernel'].strip('_')} ({r['case']})", block, r["warps"], r["registers"], r["stack"],
             r["spills"], r["shared"], r["instructions"], counts(r["loads"]), counts(r["stores"]), r["fp64"],
             r["occupancy"], *per_element, "; ".join(r["broken"])]
        )  # fmt: skip
    return tabulate(cells, HEADERS, floatfmt=".2f")


def main() -> None:
    """Parse the command line, compile, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--shape", type=int, nargs=3, metavar=("B", "T", "V"), default=(2, 5, 151936))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--cases", action="store_true", help="all cases of the contract instead of one shape")
    parser.add_argument("--peers", action="store_true", help="also TRL's and Liger's kernels")
    parser.add_argument("--sweep", action="store_true", help="BLOCK and warps of the kernels that touch logits")
    parser.add_argument("--execute", action="store_true", help="emulate sm_80 and sm_90: 10 to 20 minutes")
    parser.add_argument("--quick", action="store_true", help="emulate one size of everything: a minute a target")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write all figures there")
    options = parser.parse_args()
    if options.execute:
        emulator.report([t for t in options.targets if t in EMULATED_TARGETS], options.quick, file=options.json)
        return
    B, T, V = options.shape
    shape = Shape(B, T, V, getattr(torch, options.dtype))
    streams = {"bfloat16": "bf16", "float16": "f16"}.get(options.dtype) if V % 16 == 0 else None
    if options.sweep:
        rows = sweep(shape, options.targets)
    elif options.cases:
        rows = [r for name, case in CASES.items() for r in collect({name: case.run}, options.targets, case.streams)]
    else:
        rows = collect(our_calls(shape), options.targets, streams)
    if options.peers:
        rows += [r | {"broken": []} for r in collect(peer_calls(shape), options.targets, None)]  # the rules are ours
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
