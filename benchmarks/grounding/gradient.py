"""How well the gradient of each method points where it should, at a fixed policy.

efficiency(w, d) = <E g_w, d> / (|d| sqrt(E |g_w|^2)),  g_w: the gradient of one batch, d: the gradient of an objective

It is what a small step of a given expected length gains. All methods see the same batches; d comes from others, on
held-out digits with a useless hint. Products with each part of d are kept, so that a bootstrap can redraw both.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from grounding import task
from grounding.model import PrefixVLM
from grounding.rollouts import PROMPTS, ROLLOUTS, Rollouts, loss, policy_logps, roll_out, score
from srpo import METHODS, PRESETS, Role, group_advantages, role_contrast, token_weights

OBJECTIVES = ("hint-free", "grounded-correct", "hint copying")
CONTROLS = ("negated contrast", "oracle: fillers", "oracle: wrong digits")
TOGETHER = 4  # batches that are sampled and scored in one piece
OBJECTIVE_PROMPTS, OBJECTIVE_ROLLOUTS = 64, 16  # of one part of d
RESAMPLES = 4000


class Products(NamedTuple):
    """What efficiencies are made of.

    Args:
        with_objective: `[methods, batches, objectives, parts]`, <g_w, part of d>.
        squares: `[methods, batches]`, |g_w|^2.
        objective: `[objectives, parts, parts]`, <part of d, part of d>.
        agreement: `[methods, batches]`, see `agreement`.
    """

    with_objective: np.ndarray
    squares: np.ndarray
    objective: np.ndarray
    agreement: np.ndarray


def objective_part(model: PrefixVLM, seed: int) -> Tensor:
    """Estimate the gradients `[objectives, parameters]` of the objectives from rollouts of their own."""
    generator = torch.Generator().manual_seed(seed)
    problems = task.draw(OBJECTIVE_PROMPTS, generator, held_out=True, p_hint=0.0)
    rollouts = roll_out(model, problems, OBJECTIVE_ROLLOUTS, generator)
    right, copied = rollouts.rewards, (rollouts.reading.answer == rollouts.problems.hint).float()
    logps = policy_logps(model, rollouts)
    found = []
    for rewards in (right, right * rollouts.is_seen_right, copied):
        advantages = group_advantages(rewards, rollouts.group_ids, scale="none")
        found.append(_gradient(model, logps, advantages[:, None] * rollouts.mask / len(advantages)))
    return torch.stack(found)


def measure(model: PrefixVLM, p_hint: float, parts: Tensor, batches: int, seed: int) -> Products:
    """Compute the gradients of all methods on some batches, and their products with `parts` of the objectives.

    Args:
        parts: `[parts, objectives, parameters]`.
    """
    generator = torch.Generator().manual_seed(seed)
    problems = task.draw(batches * PROMPTS, generator, held_out=False, p_hint=p_hint)
    together = roll_out(model, problems, ROLLOUTS, generator)
    signals = score(model, together, generator)
    flat = parts.flatten(0, 1)
    products, squares, agreements = [], [], []
    for rows in (slice(i, i + PROMPTS * ROLLOUTS) for i in range(0, len(together.ids), PROMPTS * ROLLOUTS)):
        batch, own = together.rows(rows), {k: v if k == "step" else v[rows] for k, v in signals.items()}
        weights = all_weights(batch, own)
        gradients = method_gradients(model, batch, own, weights)
        products.append((gradients @ flat.T).view(len(gradients), *parts.shape[:2]).mT)
        squares.append(gradients.square().sum(1))
        agreements.append(torch.tensor([agreement(name, w, own) for name, w in weights.items()]))
    inner = torch.einsum("kop,lop->okl", parts, parts)
    stacked = (torch.stack(x, 1) for x in (products, squares, agreements))
    with_objective, of_methods, agreed = (x.double().numpy() for x in stacked)
    return Products(with_objective, of_methods, inner.double().numpy(), agreed)


def joined(pieces: Iterable[Products]) -> Products:
    """Put the batches of several calls together."""
    pieces = list(pieces)
    along_batches = ("with_objective", "squares", "agreement")
    found = {name: np.concatenate([getattr(p, name) for p in pieces], axis=1) for name in along_batches}
    return Products(objective=pieces[0].objective, **found)


def all_weights(rollouts: Rollouts, signals: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights `[B, T]` of every method of the library, and of the controls."""
    roles, mask = signals["role_ids"], signals["completion_mask"]
    weights = {name: method(**signals) for name, method in METHODS.items()}
    opposite, signed = -contrast("srpo_signed", signals), PRESETS["srpo_signed"]
    negated = token_weights(opposite, roles, mask, advantages=signals["advantages"], credit=signed)
    controls = (negated, emphasis(rollouts, rollouts.fillers), blame(rollouts, signals))
    return weights | dict(zip(CONTROLS, controls, strict=True))


def contrast(preset: str, signals: dict[str, Any]) -> Tensor:
    """Return the contrasts that a preset reads; 0 where a response has nothing to be contrasted with."""
    names = ("corrupted_logps", "ablated_logps", "role_ids", "completion_mask")
    found = role_contrast(signals["logps"], **{name: signals[name] for name in names}, credit=PRESETS[preset])
    return found.nan_to_num(0.0)


def blame(rollouts: Rollouts, signals: dict[str, Any]) -> Tensor:
    """Put the blame for a wrong answer on the digits that are wrong; other responses keep weight 1."""
    wrong = torch.zeros_like(rollouts.mask)
    wrong.scatter_(1, rollouts.reading.stated.clamp(min=0), rollouts.digit_is_wrong)
    blamed = wrong.any(1) & (signals["advantages"] < 0)
    return torch.where(blamed[:, None], emphasis(rollouts, wrong), rollouts.mask.float())


def emphasis(rollouts: Rollouts, up: Tensor) -> Tensor:
    """Return weight 2 on some tokens of both roles and 0.5 on the others, with mean 1 in each response."""
    credited = rollouts.reading.role_ids != Role.OTHER
    raw = torch.where(up, 2.0, 0.5)
    mean = torch.where(credited, raw, 0.0).sum(1, keepdim=True) / credited.sum(1, keepdim=True).clamp(min=1)
    return torch.where(credited, raw / mean, 1.0) * rollouts.mask


def agreement(name: str, weights: Tensor, signals: dict[str, Any]) -> float:
    """Return the correlation, within responses, of the weights of a method with what they should follow.

    It has the sign that the method promises: negated weights give a negative number. NaN where weights follow nothing.
    """
    followed = _followed(name, signals)
    if followed is None:
        return float("nan")
    counts = signals["completion_mask"] & (signals["advantages"] != 0)[:, None]
    if name in PRESETS:
        counts = counts & (signals["role_ids"] != Role.OTHER)
    n = counts.sum(1, keepdim=True).clamp(min=1)
    x, y = (
        torch.where(counts, v - torch.where(counts, v, 0.0).sum(1, keepdim=True) / n, 0.0) for v in (followed, weights)
    )
    return float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt().clamp(min=1e-12))


def _followed(name: str, signals: dict[str, Any]) -> Tensor | None:
    """Return the signal that the weights of a method grow with."""
    sign = signals["advantages"].sign()[:, None]
    if name in PRESETS:
        if PRESETS[name].strength == 0.0:
            return None
        return contrast(name, signals) * (sign if PRESETS[name].direction == "advantage" else 1.0)
    if name == "rlsd":
        return sign * (signals["teacher_logps"] - signals["logps"])
    if name in ("vppo", "pgpo"):
        d = signals["logps"] - signals["corrupted_logps"]
        return (-d).exp() + d
    return signals[{"vgpo": "similarity", "tor": "entropy"}[name]] if name in ("vgpo", "tor") else None


def method_gradients(
    model: PrefixVLM, rollouts: Rollouts, signals: dict[str, Any], weights: dict[str, Tensor]
) -> Tensor:
    """Return the gradients `[methods, parameters]`, uphill: one forward pass, one backward pass for each method."""
    logps = policy_logps(model, rollouts)
    found = []
    for name, own in weights.items():
        leaf = signals["logps"].clone().requires_grad_()
        loss(name if name in METHODS else "grpo", leaf, own, signals).backward()
        found.append(_gradient(model, logps, -leaf.grad))
    return torch.stack(found)


def _gradient(model: PrefixVLM, logps: Tensor, of_logps: Tensor) -> Tensor:
    parts = torch.autograd.grad(logps, list(model.parameters()), of_logps.to(logps.dtype), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


class Efficiency(NamedTuple):
    """Efficiencies `[draws, methods, objectives]`; draw 0 is the estimate, the others are of a bootstrap."""

    absolute: np.ndarray
    relative: np.ndarray


def efficiencies(products: Products, seed: int = 0, resamples: int = RESAMPLES) -> Efficiency:
    """Compute efficiencies, and those of redrawn batches and redrawn parts of the objectives."""
    random = np.random.default_rng(seed)
    _, batches, _, parts = products.with_objective.shape
    of_batches, of_parts = (
        np.concatenate([np.full((1, n), 1 / n), random.multinomial(n, np.full(n, 1 / n), resamples) / n])
        for n in (batches, parts)
    )
    along = np.einsum("rb,mbok,rk->rmo", of_batches, products.with_objective, of_parts, optimize=True)
    length = np.sqrt(of_batches @ products.squares.T)
    apart = products.objective * ~np.eye(parts, dtype=bool)  # two parts share no rollout: |d|^2 without bias
    squared = apart.sum((1, 2)) / (parts * (parts - 1))
    with np.errstate(invalid="ignore", divide="ignore"):  # a policy that earns nothing has no gradient: NaN
        gain = along / length[:, :, None]
        return Efficiency(gain / np.sqrt(np.where(squared > 0, squared, np.nan)), gain / gain[:, :1])


def averaged(found: list[Efficiency]) -> Efficiency:
    """Average over policies."""
    return Efficiency(*(np.mean(x, axis=0) for x in zip(*found, strict=True)))


def interval(draws: np.ndarray) -> list[float]:
    """Return estimate and 95 % interval of draws whose first is the estimate."""
    return [float(x) for x in (draws[0], *np.percentile(draws[1:], [2.5, 97.5]))]
