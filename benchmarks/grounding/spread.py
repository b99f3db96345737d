"""How much of a contrast is the luck of the token that was sampled: log-ratio and k3 beside the whole vocabulary.

At a token of a rollout, p are the chances in the clean context and q those in the contrast. The log-ratio log p / q and
k3 = q / p - 1 - log q / p of a token drawn from p both have the mean KL(p || q). `contrast_kind="kl"` is that mean, so
it does not depend on the draw. Spreads over the draw are exact here: sums over all tokens, weighted with p.
"""

import time
from typing import Any

import torch
from torch import Tensor

from grounding import task
from grounding.model import LAYOUT, PREFIX, PrefixVLM
from grounding.rollouts import CORRUPTION, ROLLOUTS, Rollouts, model_inputs, roll_out, streams_of
from srpo import CreditConfig, Role, StreamDivergences

PROBLEMS, REPEATS = 64, 7
KL = CreditConfig(contrast_kind="kl")
KINDS = ("log-ratio", "k3", "kl")
TOLERANCE = 1e-4  # nats between the library's divergence and the sum over the vocabulary


def measure(model: PrefixVLM, p_hint: float, seed: int) -> dict[str, Any]:
    """Return the spread of each kind of contrast for each role, and the time of scoring for it."""
    generator = torch.Generator().manual_seed(seed)
    rollouts = roll_out(model, task.draw(PROBLEMS, generator, held_out=True, p_hint=p_hint), ROLLOUTS, generator)
    inputs = model_inputs(model, rollouts)
    dark = CORRUPTION.on_inputs(inputs, LAYOUT, generator=seed)["pixel_values"]
    found = streams_of(model, rollouts, credit=KL, corrupted_inputs={"pixel_values": dark})
    assert isinstance(found, StreamDivergences)
    roles, hidden = rollouts.reading.role_ids, inputs["attention_mask"].clone()
    hidden[:, PREFIX:][roles == Role.PERCEPTION] = 0
    clean = _chances(model, inputs)
    contrasts = {
        "perception": (Role.PERCEPTION, _chances(model, inputs | {"pixel_values": dark}), found.corrupted_kl),
        "reasoning": (Role.REASONING, _chances(model, inputs | {"attention_mask": hidden}), found.ablated_kl),
    }
    rows = []
    for name, (role, against, kl) in contrasts.items():
        assert kl is not None
        at = (roles == role) & rollouts.mask
        rows += _spreads(name, clean[at], against[at], kl[at])
    times = _times(model, rollouts, dark)
    return {"seed": seed, "rollouts": len(rollouts.ids), "rows": rows, "kl_over_log_ratio": times}


@torch.no_grad()
def _chances(model: PrefixVLM, inputs: dict[str, Tensor]) -> Tensor:
    """Return the log-probs `[B, T, words]` of every word at every token of the completions, in float64."""
    return model(**inputs).logits[:, PREFIX - 1 : -1].double().log_softmax(-1)


def _spreads(role: str, clean: Tensor, against: Tensor, kl: Tensor) -> list[dict[str, Any]]:
    p, d = clean.exp(), clean - against
    mean = (p * d).sum(-1)
    gap = (mean - kl).abs().max().item()
    if gap > TOLERANCE:
        raise AssertionError(f"{role}: contrast_kind='kl' is {gap:.2g} nats off the sum over the vocabulary")
    drawn = {"log-ratio": d, "k3": (-d).exp() - 1 + d}
    noise = {kind: (p * x.square()).sum(-1) - mean.square() for kind, x in drawn.items()} | {"kl": mean * 0}
    signal = mean.var().item()
    return [
        {
            "role": role,
            "kind": kind,
            "tokens": len(mean),
            "mean": mean.mean().item(),
            "between": signal**0.5,
            "within": noise[kind].clamp(min=0).mean().item() ** 0.5,
            "luck": noise[kind].mean().item() / (noise[kind].mean().item() + signal),
        }
        for kind in KINDS
    ]


def _times(model: PrefixVLM, rollouts: Rollouts, dark: Tensor) -> float:
    """Return the time of scoring for divergences over that for log-ratios: the median of runs in turn."""
    ratios = []
    for _ in range(REPEATS):
        taken = []
        for credit in ("srpo", KL):
            began = time.perf_counter()
            streams_of(model, rollouts, credit=credit, corrupted_inputs={"pixel_values": dark})
            taken.append(time.perf_counter() - began)
        ratios.append(taken[1] / taken[0])
    return sorted(ratios)[len(ratios) // 2]
