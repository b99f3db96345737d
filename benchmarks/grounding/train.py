"""Whole runs: update the policy by a method, and see on held-out digits what it learned to look at."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grounding import task
from grounding.model import LAYOUT, PrefixVLM
from grounding.rollouts import PROMPTS, ROLLOUTS, Rollouts, loss, policy_logps, roll_out, score
from grounding.variants import contrast
from srpo import METHODS, Blank, Role, ShuffleImages

LEARNING_RATE = 2.5e-5  # slow enough that failures are left after 300 updates
STEPS, EVERY = 300, 50
TEST_PROBLEMS, LAST_TEST_PROBLEMS = 512, 2048
STATISTICS_PROMPTS = 32
HINT = 0.5  # chance that a hint is right in training
MEASURES = {
    "accuracy": "held-out accuracy",
    "seen": "both digits stated right",
    "grounded": "right answers with right digits",
    "shuffled": "accuracy, shuffled pictures",
    "blank": "accuracy, blank pictures",
    "copies": "answers that are a wrong hint",
    "entropy": "entropy, nats",
    "perception": "perception tokens",
    "formed": "well-formed responses",
}


class Run(NamedTuple):
    """What a run measured: `curve` holds a dict of `MEASURES` for each of `steps`, `rewards` one number per update."""

    method: str
    seed: int
    steps: list[int]
    curve: list[dict[str, float]]
    rewards: list[float]
    statistics: dict[str, dict[str, float]]
    histograms: dict[str, list[int]]


def trained(model: PrefixVLM, method: str, seed: int, steps: range) -> PrefixVLM:
    """Update a model in place by a method."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for step in steps:
        update(model, optimizer, method, seed, step)
    return model


def update(model: PrefixVLM, optimizer: torch.optim.Optimizer, method: str, seed: int, step: int) -> float:
    """Do one update on new problems, which depend on seed and step alone; return the mean reward."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    problems = task.draw(PROMPTS, generator, held_out=False, p_hint=HINT)
    rollouts = roll_out(model, problems, ROLLOUTS, generator)
    signals = score(model, rollouts, generator, METHODS[method].needs) | {"step": step}
    weights = METHODS[method](**signals)
    optimizer.zero_grad()
    loss(method, policy_logps(model, rollouts), weights, signals).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(rollouts.rewards.mean())


def run(model: PrefixVLM, method: str, seed: int, steps: int, last: int = LAST_TEST_PROBLEMS) -> Run:
    """Train a copy of a model, test it on the way, and on more problems at the end."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    tested, curve, rewards = [], [], []
    for step in range(steps + 1):
        if step % EVERY == 0 or step == steps:
            tested.append(step)
            curve.append(test(model, seed, last if step == steps else TEST_PROBLEMS))
        if step < steps:
            rewards.append(update(model, optimizer, method, seed, step))
    statistics, histograms = weight_statistics(model, method, seed)
    return Run(method, seed, tested, curve, rewards, statistics, histograms)


@torch.no_grad()
def test(model: PrefixVLM, seed: int, n: int) -> dict[str, float]:
    """Measure one sampled response to each of `n` problems of held-out digits with a useless hint."""
    generator = torch.Generator().manual_seed(7_000_003 + seed)
    problems = task.draw(n, generator, held_out=True, p_hint=0.0)
    rollouts = roll_out(model, problems, 1, generator)
    right, seen, reading = rollouts.rewards, rollouts.is_seen_right, rollouts.reading
    misled = problems.hint != problems.answer
    entropy = score(model, rollouts, generator, ())["entropy"]
    accuracies = {}
    for name, corruption in (("shuffled", ShuffleImages()), ("blank", Blank())):
        pixels = corruption.on_inputs({"pixel_values": problems.pixels}, LAYOUT, generator=generator)["pixel_values"]
        other = roll_out(model, problems._replace(pixels=pixels), 1, generator)
        accuracies[name] = float(other.rewards.mean())
    return accuracies | {
        "accuracy": float(right.mean()),
        "seen": float(seen.float().mean()),
        "grounded": float((right * seen).sum() / right.sum().clamp(min=1)),
        "copies": float((reading.answer == problems.hint)[misled].float().mean()),
        "entropy": float(entropy[rollouts.mask].mean()),
        "perception": float((reading.role_ids == Role.PERCEPTION).sum(1).float().mean()),
        "formed": float(reading.parsed.float().mean()),
    }


BINS = torch.linspace(0.0, 2.5, 51)  # of weights


def weight_statistics(
    model: PrefixVLM, method: str, seed: int
) -> tuple[dict[str, dict[str, float]], dict[str, list[int]]]:
    """Return mean and deviation of weights and contrasts per role and sign of the advantage, and histograms."""
    generator = torch.Generator().manual_seed(9_000_003 + seed)
    problems = task.draw(STATISTICS_PROMPTS, generator, held_out=False, p_hint=HINT)
    rollouts = roll_out(model, problems, ROLLOUTS, generator)
    signals = score(model, rollouts, generator)
    weights, contrasts = METHODS[method](**signals), contrast("srpo", signals)
    statistics, histograms = {}, {}
    for name, tokens in cells(rollouts, signals).items():
        w, c = weights[tokens].double(), contrasts[tokens].double()
        histograms[name] = torch.histogram(w.clamp(0.0, 2.499), BINS.double()).hist.long().tolist()
        if len(w):
            values = {"weight": w.mean(), "weight_sd": w.std(correction=0)}
            values |= {"contrast": c.mean(), "contrast_sd": c.std(correction=0)}
            statistics[name] = {"tokens": len(w)} | {k: float(v) for k, v in values.items()}
    return statistics, histograms


def cells(rollouts: Rollouts, signals: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tokens of each role and sign of the advantage, and of each kind that a label oracle knows."""
    sign, roles = signals["advantages"].sign()[:, None], signals["role_ids"]
    found = {
        f"{role.name.lower()}, A {symbol} 0": (roles == role) & (sign == value)
        for role in (Role.PERCEPTION, Role.REASONING)
        for value, symbol in ((1, ">"), (-1, "<"))
    }
    stated = rollouts.reading.stated
    for name, chosen in (("right digits", ~rollouts.digit_is_wrong), ("wrong digits", rollouts.digit_is_wrong)):
        marked = torch.zeros_like(rollouts.mask).scatter(1, stated.clamp(min=0), chosen & (stated >= 0))
        found |= {f"{name}, A {symbol} 0": marked & (sign == value) for value, symbol in ((1, ">"), (-1, "<"))}
    return found | {"fillers": rollouts.fillers & (sign != 0)}
