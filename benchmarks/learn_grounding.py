"""Ask whether a method grounds: measure where its gradient points, with controls, on a task with a shortcut.

    python benchmarks/learn_grounding.py                     twenty policies a setting; goes on where it was stopped
    python benchmarks/learn_grounding.py --quick             one policy, for the controls: a minute
    python benchmarks/learn_grounding.py --seeds 4           ... at policies from four warm starts
    python benchmarks/learn_grounding.py --train --seeds 8   whole runs, paired over seeds
    python benchmarks/learn_grounding.py --spread --seeds 3  the luck of sampled tokens: log-ratio, k3, whole vocabulary
    python benchmarks/learn_grounding.py --json --plot       write benchmarks/results/grounding/cpu.json and charts
    python benchmarks/learn_grounding.py --readme            rewrite the tables of benchmarks/grounding/README.md

A small vision-language model is warmed up on rows of handwritten digits, and asked to compute with two of them beside a
hint that is often right in training and useless at test. Controls with a known outcome are measured too; where one
comes out wrong the run says so and exits with 1. The same seed gives the same numbers on the same machine.
"""

import argparse
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

import torch
from bench_loss import environment
from grounding import checks, gradient, keep, report, spread, train, variants
from grounding.model import PrefixVLM, warm_started
from grounding.workers import Workers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from srpo import METHODS


class Setting(NamedTuple):
    """Where gradients are measured: hints of the rollouts, updates since the warm start; on how many batches.

    Lengths of gradients are measured on `lengths` of the batches, the objective on `parts` of 256 rollouts.
    """

    p_hint: float
    updates: int
    batches: int
    lengths: int
    parts: int


SETTINGS = {
    "start": Setting(0.5, 0, 32, 4, 16),
    "after 100 updates": Setting(0.5, 100, 32, 4, 16),
    "after 300 updates": Setting(0.5, 300, 32, 4, 16),
    "strong shortcut": Setting(0.8, 0, 32, 4, 16),
}
QUICK = {"start": Setting(0.5, 0, 12, 2, 8)}
SEED_STRIDE = 10_000_000  # between the random streams of two seeds


def checkpoint(seed: int, updates: int) -> PrefixVLM:
    """Return the warm start of a seed after some updates of GRPO."""
    model = warm_started(seed, train.HINT)
    if updates:
        name = f"{seed} after {updates}"
        made_by = keep.code(keep.OF_POLICIES)
        model.load_state_dict(keep.kept(made_by, name, lambda: _updated(seed, updates).state_dict()))
    return model


def _updated(seed: int, updates: int) -> PrefixVLM:
    """Go on from the last point that another setting stops at, with a new optimizer."""
    before = max((s.updates for s in SETTINGS.values() if s.updates < updates), default=0)
    return train.trained(checkpoint(seed, before), "grpo", seed, range(before, updates))


def measure(seed: int, setting: Setting) -> gradient.Measured:
    """Measure everything at one policy."""

    def made() -> tuple[torch.Tensor, torch.Tensor]:
        own = SEED_STRIDE * (seed + 1) + int(1000 * setting.p_hint) + 10 * setting.updates
        policy = checkpoint(seed, setting.updates)
        target = gradient.objective(policy, setting.parts, own)
        found = gradient.measure(policy, setting.p_hint, target, setting.batches, setting.lengths, own + 1)
        return torch.from_numpy(found.efficiency), torch.from_numpy(found.agreement)

    efficiency, agreement = keep.kept(keep.code(keep.OF_NUMBERS), f"{seed} {tuple(setting)}", made)
    return gradient.Measured(efficiency.numpy(), agreement.numpy())


def gradient_run(workers: Workers, options: argparse.Namespace) -> dict[str, Any]:
    """Measure gradients, check the controls, and return what the file keeps.

    Policies are the units; of a single one the batches are.
    """
    settings = QUICK if options.quick else SETTINGS
    seeds = list(range(options.seed, options.seed + options.seeds))
    workers.map("warm starts", checkpoint, [(seed, 0) for seed in seeds])
    for updates in sorted({s.updates for s in settings.values()} - {0}):
        workers.map(f"{updates} updates", checkpoint, [(seed, updates) for seed in seeds])
    jobs = [(seed, name) for seed in seeds for name in settings]
    measured = dict(zip(jobs, workers.map("policies", measure, [(s, settings[n]) for s, n in jobs]), strict=True))
    single, rows, checked = len(seeds) == 1, [], []
    for name, setting in settings.items():
        own = [measured[seed, name] for seed in seeds]
        table = own[0].efficiency if single else torch.tensor([x.efficiency.mean(1).tolist() for x in own]).T.numpy()
        units = range(setting.batches) if single else seeds
        rows += [
            [name, unit, method, float(f"{x:.5g}")]
            for method, line in zip(variants.NAMES, table, strict=True)
            for unit, x in zip(units, line, strict=True)
        ]
        agreed = sum(x.agreement for x in own) / len(own)
        by_method = dict(zip(variants.NAMES, table, strict=True))
        follow = dict(zip(variants.NAMES, agreed.tolist(), strict=True))
        checked += checks.check(name, by_method, follow, updated=setting.updates > 0)
    return {
        "seeds": seeds, "unit": "batch" if single else "policy", "looking": seeds[::2], "confirming": seeds[1::2],
        "settings": {name: setting._asdict() for name, setting in settings.items()}, "checks": checked, "rows": rows,
    }  # fmt: skip


def train_run(workers: Workers, options: argparse.Namespace) -> dict[str, Any]:
    """Train by each method from each warm start, and return what the file keeps."""
    seeds = list(range(options.seed, options.seed + options.seeds))
    policies = workers.map("policies", checkpoint, [(seed, 0) for seed in seeds])
    jobs = [
        (policy, method, seed, options.steps, options.test)
        for policy, seed in zip(policies, seeds, strict=True)
        for method in options.methods
    ]
    runs = workers.map("runs", train.run, jobs)
    return {"seeds": seeds, "steps": options.steps, "p_hint": train.HINT, "runs": [run._asdict() for run in runs]}


def spread_run(workers: Workers, options: argparse.Namespace) -> dict[str, Any]:
    """Measure how much of a contrast is luck, at the warm start of each seed."""
    seeds = list(range(options.seed, options.seed + options.seeds))
    policies = workers.map("policies", checkpoint, [(seed, 0) for seed in seeds])
    jobs = [(policy, train.HINT, seed) for policy, seed in zip(policies, seeds, strict=True)]
    return {"seeds": seeds, "p_hint": train.HINT, "policies": workers.map("spreads", spread.measure, jobs)}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one policy, for the controls")
    parser.add_argument("--train", action="store_true", help="whole runs instead of gradients")
    parser.add_argument("--spread", action="store_true", help="spread of contrasts over resampled tokens")
    parser.add_argument("--seeds", type=int, metavar="N", help="warm starts: 20, or 1 with another kind of run")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=["grpo", "srpo", "srpo_signed"], help="of --train"
    )
    parser.add_argument("--steps", type=int, default=train.STEPS, help="updates of --train")
    parser.add_argument("--test", type=int, default=train.LAST_TEST_PROBLEMS, help="held-out problems after --train")
    parser.add_argument(
        "--workers", type=int, default=min(len(os.sched_getaffinity(0)), 16), help="processes, or threads of --quick"
    )
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help=f"default: {report.PATH.name}")
    parser.add_argument("--plot", action="store_true", help="draw the charts of the JSON file beside it")
    parser.add_argument("--readme", action="store_true", help="rewrite the guide's tables from the JSON file")
    options = parser.parse_args(arguments)
    if options.train + options.quick + options.spread > 1:
        parser.error("--train, --quick and --spread are different runs: pass one")
    if options.seeds is None:
        options.seeds = 1 if options.train or options.quick or options.spread else 20
    for name in ("seeds", "steps", "test", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} got {getattr(options, name)}, expected at least 1")
    if options.seed < 0:
        parser.error(f"--seed got {options.seed}, expected at least 0")
    if options.train and "grpo" not in options.methods:
        parser.error("--methods lacks grpo, which the others are compared with")
    if options.plot and options.json is None:
        parser.error("--plot draws what is in the JSON file; add --json")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; return 1 where a control came out wrong."""
    options = parse(arguments)
    if options.readme:
        report.GUIDE.write_text(report.with_section(report.GUIDE.read_text()))
        return 0
    where, began = environment(torch.device("cpu")), time.perf_counter()
    count, threads = (1, options.workers) if options.quick else (options.workers, 1)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
        Workers(count, progress, threads) as workers,
    ):
        part = "runs" if options.train else "spread" if options.spread else "gradient"
        measured = {"runs": train_run, "spread": spread_run, "gradient": gradient_run}[part](workers, options)
    found = {"environment": where, **measured}
    print({"runs": report.runs_text, "spread": report.spread_text, "gradient": report.gradient_text}[part](found))
    print(f"\n{time.perf_counter() - began:.0f} s with {options.workers} workers")
    if options.json is not None:
        path = pathlib.Path(options.json) if options.json else report.PATH
        report.save(path, part, found)
        print(f"wrote {path}")
        for chart in report.plot(path) if options.plot else ():
            print(f"wrote {chart}")
    return int(part == "gradient" and bool(checks.broken(found["checks"], next(iter(found["settings"])))))


if __name__ == "__main__":
    sys.exit(main())
