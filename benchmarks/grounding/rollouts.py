"""Roll the policy out and score its rollouts in all contexts, as a trainer does before it calls the loss."""

from collections.abc import Container
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from grounding import task
from grounding.model import LAYOUT, PATCHES, PREFIX, PrefixVLM
from srpo import (
    METHODS,
    PatchMask,
    Role,
    group_advantages,
    role_weighted_grpo_loss_from_logps,
    selected_logps_from_hidden,
    visual_similarity,
)
from srpo.methods import SIGNALS

PROMPTS, ROLLOUTS = 8, 8  # of a batch
CORRUPTION = PatchMask(0.6)


class Rollouts(NamedTuple):
    """Completions of a batch, what they say, and what they earned."""

    problems: task.Problems
    ids: Tensor
    mask: Tensor
    reading: task.Reading
    rewards: Tensor
    group_ids: Tensor

    @property
    def advantages(self) -> Tensor:
        return group_advantages(self.rewards, self.group_ids)

    @property
    def digit_is_wrong(self) -> Tensor:
        """Tell whether the stated left and right digit `[N, 2]` are wrong; False where none is stated."""
        truth = torch.stack([self.problems.left, self.problems.right], 1)
        return (self.reading.stated >= 0) & (self.stated_digits != truth)

    @property
    def is_seen_right(self) -> Tensor:
        """Tell whether two digits are stated, both right."""
        return (self.reading.stated >= 0).all(1) & ~self.digit_is_wrong.any(1)

    @property
    def stated_digits(self) -> Tensor:
        return self.ids.gather(1, self.reading.stated.clamp(min=0)) - task.ZERO

    @property
    def fillers(self) -> Tensor:
        """Mark fillers of the perception and the reasoning."""
        return task.is_filler(self.ids) & (self.reading.role_ids != Role.OTHER)

    def rows(self, rows: slice) -> "Rollouts":
        return Rollouts(
            self.problems.rows(rows), self.ids[rows], self.mask[rows],
            task.Reading(*(x[rows] for x in self.reading)), self.rewards[rows], self.group_ids[rows],
        )  # fmt: skip


def roll_out(model: PrefixVLM, problems: task.Problems, rollouts: int, generator: torch.Generator) -> Rollouts:
    """Sample completions of each problem, and reward right answers."""
    group_ids = torch.arange(len(problems.left)).repeat_interleave(rollouts)
    repeated = problems.rows(group_ids)
    ids, mask = model.sample(repeated, generator)
    reading = task.read(ids, mask)
    return Rollouts(repeated, ids, mask, reading, (reading.answer == repeated.answer).float(), group_ids)


def policy_logps(model: PrefixVLM, rollouts: Rollouts) -> Tensor:
    """Return the log-probs `[N, T]` of the completions, with their graph."""
    return _scored(model, _states(model, rollouts, rollouts.problems.prompt_ids), rollouts)


@torch.no_grad()
def score(
    model: PrefixVLM, rollouts: Rollouts, generator: torch.Generator, needs: Container[str] = tuple(SIGNALS)
) -> dict[str, Any]:
    """Return the signals that a method needs; the default is all that any method of the library reads."""
    problems, reading = rollouts.problems, rollouts.reading
    states = _states(model, rollouts, problems.prompt_ids)
    logps, entropy = _scored(model, states, rollouts, return_entropy=True)
    signals = {
        "logps": logps,
        "completion_mask": rollouts.mask,
        "role_ids": reading.role_ids,
        "advantages": rollouts.advantages,
        "entropy": entropy,
        "group_ids": rollouts.group_ids,
        "step": 0,
    }
    if "corrupted_logps" in needs:
        pixels = CORRUPTION.on_inputs({"pixel_values": problems.pixels}, LAYOUT, generator=generator)["pixel_values"]
        corrupted = rollouts._replace(problems=problems._replace(pixels=pixels))
        signals["corrupted_logps"] = _scored(model, _states(model, corrupted, problems.prompt_ids), rollouts)
    if "ablated_logps" in needs:
        hidden = reading.role_ids == Role.PERCEPTION
        signals["ablated_logps"] = _scored(model, _states(model, rollouts, problems.prompt_ids, hidden), rollouts)
    if "teacher_logps" in needs:  # the teacher is the policy with the right answer as its hint
        told = problems._replace(hint=problems.answer).prompt_ids
        signals["teacher_logps"] = _scored(model, _states(model, rollouts, told), rollouts)
    if "similarity" in needs:
        image_tokens = (torch.arange(states.shape[1]) < PATCHES).expand(len(states), -1)
        signals["similarity"] = visual_similarity(states, image_tokens, rollouts.ids.shape[1])
    return signals


def loss(name: str, logps: Tensor, weights: Tensor, signals: dict[str, Any]) -> Tensor:
    """Return the loss of a method, on-policy, with its weights."""
    out = role_weighted_grpo_loss_from_logps(
        logps, signals["advantages"], weights=weights, completion_mask=signals["completion_mask"]
    )
    return out.loss + METHODS[name].loss_term(logps, **signals)


def _states(model: PrefixVLM, rollouts: Rollouts, prompt_ids: Tensor, hidden: Tensor | None = None) -> Tensor:
    gone = None if hidden is None else functional.pad(hidden, (prompt_ids.shape[1], 0))
    return model(rollouts.problems.pixels, torch.cat([prompt_ids, rollouts.ids], 1), gone)


def _scored(model: PrefixVLM, states: Tensor, rollouts: Rollouts, **options: Any) -> Any:
    before = states[:, PREFIX - 1 : -1]
    return selected_logps_from_hidden(before, model.head.weight, rollouts.ids, mask=rollouts.mask, **options)
