"""Draw the README's picture: a right and a wrong rollout of the demo's last step, under GRPO and under SRPO.

python benchmarks/credit_picture.py [--seed 0] [--steps 5] [--out benchmarks/results/credit.svg]
"""

import argparse
import pathlib

import matplotlib
import torch

from srpo.demo.loop import LEARNING_RATE, PROMPTS, ROLLOUTS, records_of, srpo_step, warmed_up
from srpo.viz import CreditRecord, credit_figure

PATH = pathlib.Path(__file__).parents[1] / "benchmarks" / "results" / "credit.svg"


def rollouts(seed: int, steps: int) -> list[CreditRecord]:
    """Return the rollouts of the last of `steps` updates."""
    _, vlm, generator = warmed_up("idefics3", seed, PROMPTS, ROLLOUTS, "a loop of its own")
    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=LEARNING_RATE)
    for _ in range(steps):
        step = srpo_step(vlm, optimizer, generator)
    return records_of(vlm, step)


def one_of_each(records: list[CreditRecord]) -> list[CreditRecord]:
    """Return the first right and the first wrong rollout of the first group that has both and parses."""
    parsed = [record for record in records if record.parsed]
    for group in dict.fromkeys(record.group for record in parsed):
        own = [record for record in parsed if record.group == group]
        picked = [next((record for record in own if record.reward == reward), None) for reward in (1.0, 0.0)]
        if all(picked):
            return picked
    raise SystemExit("no group has a right and a wrong rollout: try another --seed")


def main() -> None:
    """Train the demo's model for some steps and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=PATH)
    options = parser.parse_args()
    if options.steps < 1:
        parser.error("--steps got less than 1")
    matplotlib.rcParams["svg.hashsalt"] = "srpo"  # the same drawing is the same file
    figure = credit_figure(one_of_each(rollouts(options.seed, options.steps)))
    figure.savefig(options.out, metadata={"Date": None} if options.out.suffix == ".svg" else None, dpi=160)
    print(options.out)


if __name__ == "__main__":
    main()
