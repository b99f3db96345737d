"""Ask whether a method grounds: measure where its gradient points, with controls, on a task with a shortcut.

    python benchmarks/learn_grounding.py                     the gradient check at three policies: one to two minutes
    python benchmarks/learn_grounding.py --quick             one policy, fewer batches: under a minute
    python benchmarks/learn_grounding.py --seeds 4           ... at policies from four warm starts
    python benchmarks/learn_grounding.py --train --seeds 8   whole runs, paired over seeds
    python benchmarks/learn_grounding.py --spread --seeds 3  the luck of sampled tokens: log-ratio, k3, whole vocabulary
    python benchmarks/learn_grounding.py --json --plot       write benchmarks/results/grounding/cpu.json and charts
    python benchmarks/learn_grounding.py --readme            rewrite the tables of benchmarks/grounding/README.md

A small vision-language model is warmed up on pairs of handwritten digits, and asked to compute with them beside a hint
that is often right in training and useless at test. Controls with a known outcome are measured too; where one comes
out wrong the run says so and exits with 1. The same seed gives the same numbers on the same machine.
"""

import argparse
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from bench_loss import environment
from grounding import checks, gradient, report, spread, train
from grounding.model import PrefixVLM, warm_started
from grounding.workers import Workers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from srpo import METHODS


class Setting(NamedTuple):
    """Where gradients are measured, and on how many batches; `parts` of the gradient of each objective."""

    p_hint: float
    updates: int
    batches: int
    parts: int


SETTINGS = {
    "start": Setting(0.5, 0, 64, 12),
    "after 100 steps": Setting(0.5, 100, 96, 16),  # gradients are small there, so more of them
    "strong shortcut": Setting(0.7, 0, 64, 12),
}
QUICK = {"start": Setting(0.5, 0, 32, 6)}
SEED_STRIDE = 10_000_000  # between the random streams of two seeds


def checkpoint(seed: int, p_hint: float, updates: int) -> PrefixVLM:
    """Return the warm start of a seed after some updates of GRPO."""
    return train.trained(warm_started(seed, p_hint), "grpo", seed, updates, p_hint)


def measure(workers: Workers, settings: dict[str, Setting], seeds: list[int]) -> dict[str, list[gradient.Products]]:
    """Measure every setting at the policies of every seed."""
    jobs = [(name, seed, setting) for name, setting in settings.items() for seed in seeds]
    firsts = list(dict.fromkeys((seed, setting.p_hint, 0) for _, seed, setting in jobs))
    workers.map("warm starts", checkpoint, firsts)
    policies = workers.map("policies", checkpoint, [(seed, s.p_hint, s.updates) for _, seed, s in jobs])
    draws, pieces = [], []
    for policy, (_, seed, setting) in zip(policies, jobs, strict=True):
        own = SEED_STRIDE * (seed + 1) + int(1000 * setting.p_hint) + 10 * setting.updates
        draws.append([(policy, own + 10_000 * k) for k in range(setting.parts)])
        pieces.append(setting.batches // gradient.TOGETHER)
    found = iter(workers.map("objectives", gradient.objective_part, [draw for own in draws for draw in own]))
    objectives = [torch.stack([next(found) for _ in own]) for own in draws]
    batches = [
        (policy, setting.p_hint, objective, gradient.TOGETHER, own[0][1] + 10_000 * k + 1)
        for policy, (_, _, setting), objective, own, n in zip(policies, jobs, objectives, draws, pieces, strict=True)
        for k in range(n)
    ]
    measured = iter(workers.map("batches", gradient.measure, batches))
    joined: dict[str, list[gradient.Products]] = {name: [] for name in settings}
    for (name, _, _), n in zip(jobs, pieces, strict=True):
        joined[name].append(gradient.joined(next(measured) for _ in range(n)))
    return joined


def gradient_run(workers: Workers, options: argparse.Namespace) -> dict[str, Any]:
    """Check the gradients, and return what the file keeps."""
    settings = QUICK if options.quick else SETTINGS
    seeds = list(range(options.seed, options.seed + options.seeds))
    names, kept, checked = [*METHODS, *gradient.CONTROLS], {}, []
    for name, products in measure(workers, settings, seeds).items():
        each = [gradient.efficiencies(p, seed) for p, seed in zip(products, seeds, strict=True)]
        mean = gradient.averaged(each)
        agreed = np.mean([p.agreement.mean(1) for p in products], axis=0)
        rows = [
            {
                "method": method,
                "relative": [gradient.interval(mean.relative[:, i, o]) for o in range(len(gradient.OBJECTIVES))],
                "absolute": [gradient.interval(mean.absolute[:, i, o]) for o in range(len(gradient.OBJECTIVES))],
                "by_seed": [float(x.relative[0, i, 0]) for x in each],
                "agreement": None if np.isnan(agreed[i]) else float(agreed[i]),
            }
            for i, method in enumerate(names)
        ]
        kept[name] = {**settings[name]._asdict(), "rows": rows}
        checked += checks.check(name, names, mean, agreed, updated=settings[name].updates > 0)
    return {"seeds": seeds, "objectives": list(gradient.OBJECTIVES), "settings": kept, "checks": checked}


def train_run(workers: Workers, options: argparse.Namespace) -> dict[str, Any]:
    """Train by each method from each warm start, and return what the file keeps."""
    seeds = list(range(options.seed, options.seed + options.seeds))
    policies = workers.map("policies", checkpoint, [(seed, train.HINT, 0) for seed in seeds])
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
    policies = workers.map("policies", checkpoint, [(seed, train.HINT, 0) for seed in seeds])
    jobs = [(policy, train.HINT, seed) for policy, seed in zip(policies, seeds, strict=True)]
    return {"seeds": seeds, "p_hint": train.HINT, "policies": workers.map("spreads", spread.measure, jobs)}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one setting, fewer batches")
    parser.add_argument("--train", action="store_true", help="whole runs instead of gradients")
    parser.add_argument("--spread", action="store_true", help="spread of contrasts over resampled tokens")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="warm starts; with --train, paired runs")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=["grpo", "srpo", "srpo_signed"], help="of --train"
    )
    parser.add_argument("--steps", type=int, default=train.STEPS, help="updates of --train")
    parser.add_argument("--test", type=int, default=train.LAST_TEST_PROBLEMS, help="held-out problems after --train")
    parser.add_argument("--workers", type=int, default=min(len(os.sched_getaffinity(0)), 16), help="processes")
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help=f"default: {report.PATH.name}")
    parser.add_argument("--plot", action="store_true", help="draw the charts of the JSON file beside it")
    parser.add_argument("--readme", action="store_true", help="rewrite the guide's tables from the JSON file")
    options = parser.parse_args(arguments)
    if options.train + options.quick + options.spread > 1:
        parser.error("--train, --quick and --spread are different runs: pass one")
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
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
        Workers(options.workers, progress) as workers,
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
