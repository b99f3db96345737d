"""Show what SRPOTrainer costs in TRL: the streams and the credit stage of a step, and the loss at a real vocabulary.

    python benchmarks/bench_trl.py [--steps 10] [--model idefics3|qwen2_5_vl|qwen3_vl|llava] [--vocabulary 151936]

The task is that of `python -m srpo demo --trainer trl`. Both trainers start from the same warmed-up model and take
their steps in turn: A B A B. Then the head is widened, and the loss of one rollout batch and its backward are timed as
TRL computes them, and with `fused_loss=True`; on the same inputs the two must agree.
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

import srpo.rollout
from srpo.demo import trainer as demo
from srpo.demo.task import FAMILIES, TinyVLM, build_tiny_vlm, warm_start
from srpo.integrations import trl as integration

STAGES = {
    "streams": (integration, "score_streams"),
    "roles": (srpo.rollout, "role_ids_from_completions"),
    "weights and metrics": (srpo.rollout, "weigh_rollout"),
}


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


def trainer_of(vlm: TinyVLM, steps: int, folder: str, credit: str) -> integration.SRPOTrainer:
    """Build a trainer of a copy of the model, without pages."""
    own = vlm._replace(model=copy.deepcopy(vlm.model))
    trainer = demo.make_trainer(own, steps, 0, torch.Generator().manual_seed(0), folder, credit)
    trainer._credit_log = None
    return trainer


def step_rows(vlm: TinyVLM, steps: int) -> list[list[Any]]:
    """Return rows of what the streams and the credit stage add to a step."""
    times: dict[str, list[float]] = defaultdict(list)
    for stage, (module, name) in STAGES.items():
        setattr(module, name, timed(getattr(module, name), times[stage]))
    seconds, peaks = defaultdict(list), {}
    for credit in ("grpo", "srpo") * 3:
        clock = Steps()
        with tempfile.TemporaryDirectory() as folder:
            run = trainer_of(vlm, steps, folder, credit)
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
    return [*rows, ["  credit stage: all but the streams", credit, credit / plain, None]]


def loss_rows(vlm: TinyVLM, vocabulary: int, repeats: int = 3) -> tuple[list[list[Any]], str]:
    """Return rows of the loss of one rollout batch and its backward, and what they were computed on."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(vlm, 2, folder, "srpo")
        trainer.current_gradient_accumulation_steps = 1
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.resize_token_embeddings(vocabulary, mean_resizing=False)
    inputs = {**inputs, "old_per_token_logps": None}  # of a narrower head
    seconds, results, peaks = defaultdict(list), {}, {}

    def run(fused: bool) -> None:
        trainer.args.fused_loss = fused
        trainer.model.zero_grad()
        start = time.perf_counter()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        seconds[fused].append(time.perf_counter() - start)
        norms = torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None])
        results[fused] = float(loss.detach()), float(norms.norm())

    for _ in range(repeats):
        for fused in (False, True):
            peak = peak_memory(lambda fused=fused: run(fused), torch.device("cpu"))
            peaks[fused] = max(peak, peaks.get(fused, 0))
    for mine, theirs in zip(results[True], results[False], strict=True):
        if abs(mine - theirs) > 1e-3 * abs(theirs) + 1e-5:
            raise SystemExit(f"the fused loss is off: loss and gradient norm {results[True]}, TRL has {results[False]}")
    theirs, mine = (1e3 * statistics.median(seconds[fused]) for fused in (False, True))
    mask, advantages = inputs["completion_mask"] != 0, inputs["advantages"]
    learning = int((mask & (advantages != 0)).sum())
    said = f"{int(mask.sum())} valid tokens, {learning} with an advantage, H = {trainer.model.lm_head.in_features}"
    rows = [["TRL's loss", theirs, 1.0, peaks[False]], ["fused_loss=True", mine, mine / theirs, peaks[True]]]
    return rows, said


def main() -> None:
    """Run both comparisons and print where time and memory go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--model", choices=tuple(FAMILIES), default="idefics3")
    parser.add_argument("--vocabulary", type=int, default=151936, help="of the head whose loss is timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vlm = build_tiny_vlm(options.model)
    for _ in warm_start(vlm, torch.Generator().manual_seed(0), 200):
        pass
    style = {"floatfmt": ("", ".1f", ".3f", ".0f"), "missingval": ""}
    rows, said = loss_rows(vlm, options.vocabulary)
    print(f"{options.model}, loss and backward of one batch at V = {options.vocabulary}: {said}; medians")
    print(tabulate(rows, ["", "ms", "of TRL's", "peak MiB"], **style))
    print(f"\n{options.model}, {demo.PROMPTS} x {demo.ROLLOUTS} rollouts a step, medians")
    print(tabulate(step_rows(vlm, options.steps), ["", "ms a step", "of a GRPO step", "peak MiB of a run"], **style))


if __name__ == "__main__":
    main()
