"""Roll the policy out and score its rollouts in all contexts, as a trainer does before it calls the loss."""

from collections.abc import Container
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grounding import task
from grounding.model import LAYOUT, PATCHES, PREFIX, PrefixVLM
from srpo import (
    METHODS,
    CreditConfig,
    PatchMask,
    Role,
    group_advantages,
    role_weighted_grpo_loss_from_logps,
    score_streams,
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
        """Tell which of the stated digits `[N, 4]` are wrong; False where they are not stated."""
        return (self.reading.stated >= 0) & (self.stated_digits != self.problems.digits)

    @property
    def is_seen_right(self) -> Tensor:
        """Tell whether the digits that count are stated, both right."""
        right = (self.reading.stated >= 0) & ~self.digit_is_wrong
        return right.gather(1, self.problems.asked).all(1)

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
    group_ids = torch.arange(len(problems.hint)).repeat_interleave(rollouts)
    repeated = problems.rows(group_ids)
    ids, mask = model.sample(repeated, generator)
    reading = task.read(ids, mask)
    return Rollouts(repeated, ids, mask, reading, (reading.answer == repeated.answer).float(), group_ids)


def policy_logps(model: PrefixVLM, rollouts: Rollouts) -> Tensor:
    """Return the log-probs `[N, T]` of the completions, with their graph."""
    return _logps(model, rollouts, rollouts.problems)


@torch.no_grad()
def score(
    model: PrefixVLM, rollouts: Rollouts, generator: torch.Generator, needs: Container[str] = tuple(SIGNALS)
) -> dict[str, Any]:
    """Return the signals that a method needs; the default is all that any method of the library reads."""
    problems, reading = rollouts.problems, rollouts.reading
    # the corrupted stream on all tokens, since some methods read it there; one forward less where nobody reads it
    first = "vppo" if "corrupted_logps" in needs else "grpo"
    streams = streams_of(model, rollouts, credit=first, generator=generator)
    signals = {
        "logps": streams.logps,
        "completion_mask": rollouts.mask,
        "completion_ids": rollouts.ids,
        "role_ids": reading.role_ids,
        "advantages": rollouts.advantages,
        "entropy": streams.entropy,
        "group_ids": rollouts.group_ids,
        "step": 0,
    }
    if "corrupted_logps" in needs:
        signals["corrupted_logps"] = streams.corrupted_logps
    if "ablated_logps" in needs:
        ablated = streams_of(model, rollouts, credit="srpo", streams=("clean", "ablated"))
        signals["ablated_logps"] = ablated.ablated_logps
    if "corrupted_kl" in needs:
        by_divergence = {"credit": CreditConfig(contrast_kind="kl"), "streams": ("corrupted",)}
        signals["corrupted_kl"] = streams_of(model, rollouts, **by_divergence).corrupted_kl
    if "teacher_logps" in needs:  # the teacher is the policy with the right answer as its hint
        signals["teacher_logps"] = _logps(model, rollouts, problems._replace(hint=problems.answer))
    if "similarity" in needs:
        states = model.states(problems.pixels, torch.cat([problems.prompt_ids, rollouts.ids], 1))
        image_tokens = (torch.arange(states.shape[1]) < PATCHES).expand(len(states), -1)
        signals["similarity"] = visual_similarity(states, image_tokens, rollouts.ids.shape[1])
    return signals


def loss(name: str, logps: Tensor, weights: Tensor, signals: dict[str, Any]) -> Tensor:
    """Return the loss of a method, on-policy, with its weights."""
    out = role_weighted_grpo_loss_from_logps(
        logps, signals["advantages"], weights=weights, completion_mask=signals["completion_mask"]
    )
    return out.loss + METHODS[name].loss_term(logps, **signals)


def model_inputs(model: PrefixVLM, rollouts: Rollouts) -> dict[str, Tensor]:
    """Return what the model is called with: pictures, prompts and completions."""
    image = torch.full((len(rollouts.ids), PATCHES), model.config.image_token_id)
    prompt = torch.cat([image, rollouts.problems.prompt_ids], 1)
    return {
        "input_ids": torch.cat([prompt, rollouts.ids], 1),
        "attention_mask": torch.cat([torch.ones_like(prompt), rollouts.mask.long()], 1),
        "pixel_values": rollouts.problems.pixels,
    }


def streams_of(model: PrefixVLM, rollouts: Rollouts, **options: Any) -> Any:
    """Score a batch as any user of the library does."""
    settings = {"corruption": CORRUPTION, "pixel_layout": LAYOUT} | options
    length, roles = rollouts.ids.shape[1], rollouts.reading.role_ids
    return score_streams(model, logits_to_keep=length, role_ids=roles, **model_inputs(model, rollouts), **settings)


def _logps(model: PrefixVLM, rollouts: Rollouts, problems: task.Problems) -> Tensor:
    states = model.states(problems.pixels, torch.cat([problems.prompt_ids, rollouts.ids], 1))
    return selected_logps_from_hidden(states[:, PREFIX - 1 : -1], model.head.weight, rollouts.ids, mask=rollouts.mask)
