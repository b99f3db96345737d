"""Run the public functions on emulated machine code and compare them with float64.

    PYTHONPATH=.:tests python -m compiled.emulator.compare [--targets sm_80 sm_90] [--only TEXT] [--quick] [--json FILE]

Columns: blocks of threads run, and different machine codes; the worst error of each quantity as a fraction of the floor
of the project's tests (without what those add for eager's error); the worst of all when every approximate instruction
is off by up to 2 units in the last place; whether other noise in unset registers changes a bit; races.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

import torch
from compiled.emulator.launcher import EMULATED_TARGETS, Run, Session, emulated
from compiled.emulator.machine import Options
from compiled.emulator.memory import KernelError
from compiled.emulator.scenarios import Result, scenarios
from tolerances import FLOORS
from torch import Tensor

QUANTITIES = ("logps", "entropy", "kl", "weights", "loss", "gradient", "metric")


@dataclass(frozen=True)
class Comparison:
    """One row of the table; errors are fractions of the floor."""

    target: str
    scenario: str
    blocks: int = 0
    variants: tuple[str, ...] = ()  # hashes of the machine codes that ran
    errors: dict[str, float] = field(default_factory=dict)
    rough_error: float = 0.0  # the worst with approximate instructions off by 2 ulp
    same_bits: bool = True
    races: list[str] = field(default_factory=list)
    fault: str = ""

    @property
    def well(self) -> bool:
        """Say whether the machine code did what it should."""
        return not self.fault and not self.races and self.same_bits and max(self.errors.values()) <= 1

    def __str__(self) -> str:
        start = f"{self.target:7}{self.scenario:40}"
        if self.fault:
            return start + self.fault
        cells = "".join(f"{self.errors[k]:9.3f}" if k in self.errors else " " * 9 for k in QUANTITIES)
        bits = "same" if self.same_bits else "MOVED"
        counts = f"{self.blocks:6}{len(self.variants):6}"
        return f"{start}{counts}{cells}{self.rough_error:9.3f}  {bits:5}  {'; '.join(self.races) or '-'}"


def fraction_of_floor(quantity: str, got: Tensor, truth: Tensor, precision: torch.dtype) -> float:
    """Return the worst error in units of the floor; what is not finite must be met exactly."""
    absolute, relative = FLOORS[quantity][precision]
    got, truth = got.detach().double(), truth.detach().double()
    same = (got == truth) | (got.isnan() & truth.isnan())
    excess = ((got - truth).abs() / (absolute + relative * truth.abs())).nan_to_num(torch.inf, torch.inf, torch.inf)
    return torch.where(same, 0.0, excess).max().item() if got.numel() else 0.0


def run(call: Callable[[], Result], target: str, options: Options, **changes) -> tuple[Result, Session]:
    """Run a comparison on emulated machine code; tensors that nobody has written hold NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        with emulated(target, options, **changes) as session:
            return call(), session
    finally:
        torch.use_deterministic_algorithms(False)


def same_bits(left: Result, right: Result) -> bool:
    """Say whether two results are equal, signs of zeros and NaN included."""
    pairs = ((left[k][0].detach(), right[k][0].detach()) for k in left)
    return all(x.flatten().view(torch.uint8).equal(y.flatten().view(torch.uint8)) for x, y in pairs)


def compare(name: str, call: Callable[[], Result], target: str) -> tuple[Comparison, list[Run]]:
    """Return a row of the table and the launches."""
    try:
        result, session = run(call, target, Options(seed=0))
        again, _ = run(call, target, Options(seed=1))
        rough, _ = run(call, target, Options(seed=0, ulps=2))
    except (KernelError, NotImplementedError) as error:
        return Comparison(target, name, fault=f"{type(error).__name__}: {error}"), []
    row = Comparison(
        target,
        name,
        blocks=sum(r.blocks for r in session.runs),
        variants=tuple(sorted({r.variant for r in session.runs})),
        errors={k: fraction_of_floor(k, *x) for k, x in result.items()},
        rough_error=max(fraction_of_floor(k, *x) for k, x in rough.items()),
        same_bits=same_bits(result, again),
        races=session.races,
    )
    return row, session.runs


def reached(runs: Iterable[Run]) -> tuple[int, float]:
    """Return how many machine codes have run, and the share of their instructions that a thread has reached."""
    counts: dict[str, list] = {}
    for r in runs:
        entry = counts.setdefault(r.variant, [r.code, 0])
        entry[1] = entry[1] + r.executed
    blocks = [(len(b), n > 0) for code, executed in counts.values() for b, n in zip(code.blocks, executed, strict=True)]
    return len(counts), sum(n for n, hit in blocks if hit) / max(1, sum(n for n, _ in blocks))


def table(targets: Iterable[str], quick: bool, only: str = "") -> tuple[list[Comparison], float]:
    """Print the comparisons as they come; return them and the share of instructions that a thread has reached."""
    columns = "".join(f"{k:>9}" for k in QUANTITIES)
    print(f"{'target':7}{'scenario':40}{'blocks':>6}{'codes':>6}{columns}{'2 ulp':>9}  bits   races")
    rows, runs, start = [], [], time.perf_counter()
    for target in targets:
        for name, call in scenarios(quick).items():
            if only in name:
                row, found = compare(name, call, target)
                print(row, flush=True)
                rows.append(row)
                runs += found
    codes, share = reached(runs)
    seconds = time.perf_counter() - start
    print(f"{codes} machine codes, {share:.1%} of their instructions reached, in {seconds:.0f} s")
    return rows, share


def report(targets: Iterable[str], quick: bool, only: str = "", file: pathlib.Path | None = None) -> None:
    """Print the table and write it as JSON; fail when something is beyond its floor."""
    rows, share = table(targets, quick, only)
    if file:
        content = {"rows": [asdict(row) | {"well": row.well} for row in rows], "reached": share}
        file.write_text(json.dumps(content, indent=1))
    if failures := [f"{row.target} {row.scenario}" for row in rows if not row.well]:
        raise SystemExit(f"FAILED: {failures}")


def main() -> None:
    """Parse the command line and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=EMULATED_TARGETS, default=EMULATED_TARGETS)
    parser.add_argument("--only", default="", help="scenarios whose name contains this")
    parser.add_argument("--quick", action="store_true", help="one size of everything")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the rows there")
    options = parser.parse_args()
    report(options.targets, options.quick, options.only, options.json)


if __name__ == "__main__":
    main()
