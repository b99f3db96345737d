"""Show what SRPOTrainer adds to a step of TRL's GRPOTrainer: the streams, and the credit stage on top.

    python benchmarks/bench_trl.py [--steps 10] [--model idefics3|qwen2_5_vl|qwen3_vl|llava]

The task is that of `python -m srpo demo --trainer trl`. Both trainers start from the same warmed-up model and take
their steps in turn: A B A B.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from measure import peak_memory
from tabulate import tabulate
from transformers import TrainerCallback

from srpo.demo.task import FAMILIES, build_tiny_vlm, warm_start
from srpo.integrations import trl as integration
from srpo.integrations import trl_demo

STAGES = {"score_streams": "streams", "role_ids_from_completions": "roles", "weigh": "weights"}


class Steps(TrainerCallback):
    """Time whole steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def timed(function: Callable, times: list[float]) -> Callable:
    """Add the duration of each call to a list."""

    def call(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            times.append(time.perf_counter() - start)

    return call


def main() -> None:
    """Run both trainers and print where the time goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--model", choices=tuple(FAMILIES), default="idefics3")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vlm = build_tiny_vlm(options.model)
    for _ in warm_start(vlm, torch.Generator().manual_seed(0), 200):
        pass
    times: dict[str, list[float]] = defaultdict(list)
    for name, stage in STAGES.items():
        setattr(integration, name, timed(getattr(integration, name), times[stage]))
    trainer = integration.SRPOTrainer
    trainer._log_credit = timed(trainer._log_credit, times["metrics"])
    seconds, peaks = defaultdict(list), {}
    for credit in ("grpo", "srpo") * 3:
        own = vlm._replace(model=copy.deepcopy(vlm.model))
        clock = Steps()
        with tempfile.TemporaryDirectory() as folder:
            run = trl_demo.make_trainer(own, options.steps, 0, torch.Generator().manual_seed(0), folder, credit)
            run.add_callback(clock)
            peaks[credit] = peak_memory(run.train, torch.device("cpu"))
        seconds[credit] += clock.seconds[1:]
    plain, ours = (1e3 * statistics.median(seconds[credit]) for credit in ("grpo", "srpo"))
    parts = {name: 1e3 * statistics.median(x) for name, x in times.items()}
    rows = [
        ["GRPOTrainer (credit='grpo')", plain, 1.0, peaks["grpo"]],
        ["SRPOTrainer", ours, ours / plain, peaks["srpo"]],
    ]
    rows += [[f"  {name}", x, x / plain, None] for name, x in parts.items()]
    credit = sum(x for name, x in parts.items() if name != "streams")
    rows += [["  credit stage: all but the streams", credit, credit / plain, None]]
    print(f"{options.model}, {trl_demo.PROMPTS} x {trl_demo.ROLLOUTS} rollouts a step, medians")
    print(
        tabulate(
            rows,
            ["", "ms a step", "of a GRPO step", "peak MiB of a run"],
            floatfmt=("", ".1f", ".3f", ".0f"),
            missingval="",
        )
    )


if __name__ == "__main__":
    main()
