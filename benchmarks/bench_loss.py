"""Compare the loss with what people use today: from logits, from hidden states, and the credit stage alone.

    python benchmarks/bench_loss.py                                  the default shapes of this device
    python benchmarks/bench_loss.py --level hidden --shape qwen2.5-vl-3b --dtype bfloat16
    python benchmarks/bench_loss.py --shape 8 256 32768 896          B T V H
    python benchmarks/bench_loss.py --provider eager srpo off-by-one the last is wrong on purpose, and refused
    python benchmarks/bench_loss.py --growth --json --plot           cost against rows, vocabulary, active rows

Every provider must first agree with float64 on the inputs that are timed; one that does not is reported, not timed.
Providers run in turn in one process. "of floor" is the share of the measured time that the work named above a table
takes by itself; "peak" is memory above the inputs. Compare ratios: times of one machine vary from run to run.
"""

import argparse
import importlib.metadata
import pathlib
import platform
import subprocess
import time
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

import credit_level
import growth
import hidden_level
import logits_level
import report
import torch
from measure import copy_bandwidth, gemm_rate, measure
from providers import Case, Table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from shapes import MODELS, Shape, gib_free, gib_needed, shape_of

LEVELS = {"logits": logits_level, "hidden": hidden_level, "credit": credit_level}
SECONDS = {"logits": 3.0, "hidden": 10.0, "credit": 1.0}  # of timing a table, at least three rounds
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "flash-attn", "numpy")
ROOT = pathlib.Path(__file__).parents[1]


@dataclass
class Session:
    """What all levels of a run share."""

    device: torch.device
    bandwidth: float
    repeats: int
    wanted: list[str] | None
    progress: Progress
    tables: list[dict[str, Any]] = field(default_factory=list)

    def run(self, level: str, shape: Shape, dtype: torch.dtype) -> None:
        """Check and time the tables of a level, and print each."""
        needed, free = gib_needed(level, shape, dtype), gib_free(self.device)
        if needed > free:
            self.say(f"{level} {shape}: skipped, needs about {needed:.0f} GiB, {free:.0f} are free")
            return
        for table in LEVELS[level].tables(shape, dtype, self.device, self.wanted, self.bandwidth):
            name = str(dtype).removeprefix("torch.") if level != "credit" else "float32"
            record = {"level": level, "title": table.title, "shape": asdict(shape), "dtype": name}
            record |= {"floor": table.floor, "rows": [], "skipped": dict(table.skipped)}
            self._time(level, table, record)
            self.tables.append(record)
            self.say("\n" + report.text_table(record))

    def _time(self, level: str, table: Table, record: dict[str, Any]) -> None:
        task = self.progress.add_task(f"{level}: {table.title}", total=len(table.cases) * (self.repeats + 1))
        right: dict[str, Case] = {}
        for name, case in table.cases.items():
            wrong = self._checked(case)
            self.progress.advance(task)
            if wrong:
                record["skipped"][name] = f"not timed: {wrong}"
            else:
                right[name] = case
        runs = {name: case.run for name, case in right.items()}
        advance = lambda: self.progress.advance(task)  # noqa: E731
        results = measure(runs, self.device, self.repeats, SECONDS[level], advance)
        self.progress.remove_task(task)
        for name, case in right.items():
            r, floor = results[name], case.floor(results)
            share = None if floor is None else floor / r.median
            eager = results["eager"].median / r.median if "eager" in results else None
            times = {"ms": r.median, "p20": r.p20, "p80": r.p80, "x_eager": eager, "of_floor": share, "peak": r.peak}
            record["rows"].append({"provider": name, **times, "note": case.note})

    @staticmethod
    def _checked(case: Case) -> str | None:
        """Run a case once: it is compared with float64, and warm afterwards."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of peers
                return case.check(case.run())
        except Exception as error:  # whatever a peer raises on this device
            return f"{type(error).__name__}: {error}".splitlines()[0][:160]

    def say(self, text: str) -> None:
        """Print above the progress bar."""
        self.progress.stop()
        print(text, flush=True)
        self.progress.start()


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a number is worth nothing without."""
    git = ["git", "-C", str(ROOT)]
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    found["commit"] = commit.stdout.strip() + ("+changes" if changed.stdout.strip() else "") or "unknown"
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), **found}
    return {"device": f"CPU, {torch.get_num_threads()} threads", "cpu": _cpu_name(), **found}


def _cpu_name() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def measured_floors(device: torch.device, dtypes: list[torch.dtype]) -> dict[str, float]:
    """Return the copy bandwidth in GB/s, and the rate of matrix products in TFLOP/s by dtype."""
    rates = {str(dtype).removeprefix("torch."): gemm_rate(device, dtype) for dtype in dtypes}
    return {"copy": copy_bandwidth(device), **rates}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", nargs="+", choices=list(LEVELS), default=list(LEVELS))
    parser.add_argument("--shape", nargs="+", metavar="X", help="B T V H, or one of " + ", ".join(MODELS))
    names = sorted({name for level in LEVELS.values() for name in level.PROVIDERS})
    parser.add_argument("--provider", nargs="+", choices=names, help="only these; eager is needed for ratios")
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16"), help="default: float32 on a CPU, bfloat16 on a GPU"
    )
    parser.add_argument("--repeats", type=int, default=15, help="rounds at most; fewer where a round is slow")
    parser.add_argument("--growth", action="store_true", help="time growth instead: takes ten minutes on a CPU")
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help="default: benchmarks/results/<device>.json")
    parser.add_argument("--plot", action="store_true", help="draw the charts of the JSON file beside it")
    options = parser.parse_args(arguments)
    numbers = options.shape and len(options.shape) == 4 and all(x.isdecimal() and int(x) for x in options.shape)
    if options.shape and not numbers and (len(options.shape) != 1 or options.shape[0] not in MODELS):
        parser.error(f"--shape got {' '.join(options.shape)}, expected B T V H or one of {', '.join(MODELS)}")
    if options.repeats < 1:
        parser.error(f"--repeats got {options.repeats}, expected at least 1")
    if options.plot and options.json is None:
        parser.error("--plot draws what is in the JSON file; add --json")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Check the providers, time them, print the tables, write the JSON."""
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = options.dtype or ["bfloat16" if device.type == "cuda" else "float32"]
    dtypes = [getattr(torch, name) for name in names]
    where, floors = environment(device), measured_floors(device, dtypes)
    print(report.heading(where, floors))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        session = Session(device, floors["copy"], options.repeats, options.provider, progress)
        points: list[dict[str, Any]] = []
        if options.growth:
            points = growth.run(device, dtypes[0], floors, progress)
        else:
            for level in options.level:
                for dtype in dtypes if level != "credit" else dtypes[:1]:
                    session.run(level, shape_of(level, options.shape, device), dtype)
    if points:
        print(report.growth_text(points))
    if options.json is not None:
        path = pathlib.Path(options.json) if options.json else report.path_of(where["device"])
        path.parent.mkdir(parents=True, exist_ok=True)
        report.save(path, where, floors, session.tables, points)
        print(f"\nwrote {path}")
        if options.plot:
            for chart in report.plot(path):
                print(f"wrote {chart}")


if __name__ == "__main__":
    main()
