"""How well the gradient of each method points where it should, at a fixed policy.

efficiency(w) = <E g_w, d> / (|d| sqrt(E |g_w|^2)),  g_w: the gradient of one batch, d: that of the objective

It is what a small step of a given expected length gains: the cosine of a batch's gradient. All methods see the same
batches; d comes from others, on held-out digits with a useless hint. g_w is a sum over tokens of a coefficient times
the gradient of the token's log-prob, so one derivative of all log-probs along d serves every method; lengths need a
backward pass for each method and are measured on fewer batches.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from grounding import task, variants
from grounding.model import PREFIX, PrefixVLM
from grounding.rollouts import PROMPTS, ROLLOUTS, Rollouts, loss, policy_logps, roll_out, score
from srpo import METHODS, group_advantages

TOGETHER = 4  # batches that are sampled and scored in one piece
OBJECTIVE_PROMPTS, OBJECTIVE_ROLLOUTS = 16, 16  # of one part of d


class Objective(NamedTuple):
    """The direction d `[parameters]`, and its length."""

    direction: Tensor
    length: float


class Measured(NamedTuple):
    """What a policy showed: efficiencies `[methods, batches]`, and agreements `[methods]`, see `variants.agreement`."""

    efficiency: np.ndarray
    agreement: np.ndarray


def objective(model: PrefixVLM, parts: int, seed: int) -> Objective:
    """Estimate the gradient of the reward on held-out digits with useless hints."""
    found = torch.stack([objective_part(model, seed + 10_000 * k) for k in range(parts)])
    inner = (found @ found.T).double()
    # two parts share no rollout: their product is |d|^2 without bias
    squared = (inner.sum() - inner.trace()).item() / (parts * (parts - 1))
    return Objective(found.mean(0), squared**0.5 if squared > 0 else float("nan"))


def objective_part(model: PrefixVLM, seed: int) -> Tensor:
    """Estimate the gradient `[parameters]` from rollouts of its own."""
    generator = torch.Generator().manual_seed(seed)
    problems = task.draw(OBJECTIVE_PROMPTS, generator, held_out=True, p_hint=0.0)
    rollouts = roll_out(model, problems, OBJECTIVE_ROLLOUTS, generator)
    advantages = group_advantages(rollouts.rewards, rollouts.group_ids, scale="none")
    return _gradient(model, policy_logps(model, rollouts), advantages[:, None] * rollouts.mask / len(advantages))


def measure(model: PrefixVLM, p_hint: float, target: Objective, batches: int, lengths: int, seed: int) -> Measured:
    """Measure all methods at a policy, on some batches; their lengths on the first `lengths` of those."""
    along, squares, agreements = [], [], []
    for k in range(0, batches, TOGETHER):
        generator = torch.Generator().manual_seed(seed + 10_000 * k)
        problems = task.draw(TOGETHER * PROMPTS, generator, held_out=False, p_hint=p_hint)
        together = roll_out(model, problems, ROLLOUTS, generator)
        signals, more = score(model, together, generator), variants.more_streams(model, together, generator)
        slope = slopes(model, together, target.direction)
        for first in range(0, len(together.ids), PROMPTS * ROLLOUTS):
            rows = slice(first, first + PROMPTS * ROLLOUTS)
            batch, own, own_more = together.rows(rows), _rows(signals, rows), _rows(more, rows)
            weights = variants.all_weights(batch, own, own_more)
            steps = {name: uphill(name, w, own) for name, w in weights.items()}
            along.append(torch.stack([(step * slope[rows]).sum() for step in steps.values()]))
            agreements.append(torch.tensor([variants.agreement(name, w, own) for name, w in weights.items()]))
            if len(squares) < lengths:
                squares.append(gradients(model, batch, steps.values()).square().sum(1))
    gain = torch.stack(along, 1).double()
    length = torch.stack(squares, 1).double().mean(1, keepdim=True).sqrt()
    efficiency = gain / (length * target.length)
    return Measured(efficiency.numpy(), torch.stack(agreements, 1).mean(1).double().numpy())


def _rows(signals: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {name: x[rows] if isinstance(x, Tensor) else x for name, x in signals.items()}


def uphill(name: str, weights: Tensor, signals: dict[str, Any]) -> Tensor:
    """Return minus the derivative `[B, T]` of a method's loss by the log-probs."""
    leaf = signals["logps"].clone().requires_grad_()
    loss(name if name in METHODS else "grpo", leaf, weights, signals).backward()
    assert leaf.grad is not None
    return -leaf.grad


def gradients(model: PrefixVLM, rollouts: Rollouts, steps: Iterable[Tensor]) -> Tensor:
    """Return the gradients `[methods, parameters]`, uphill: one forward pass, one backward pass for each."""
    logps = policy_logps(model, rollouts)
    return torch.stack([_gradient(model, logps, step) for step in steps])


def _gradient(model: PrefixVLM, logps: Tensor, of_logps: Tensor) -> Tensor:
    parts = torch.autograd.grad(logps, list(model.parameters()), of_logps.to(logps.dtype), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


class _Logps(nn.Module):
    """The policy's log-probs in plain operations, which differentiate forward."""

    def __init__(self, model: PrefixVLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, rollouts: Rollouts) -> Tensor:
        states = self.model.states(rollouts.problems.pixels, torch.cat([rollouts.problems.prompt_ids, rollouts.ids], 1))
        logps = self.model.head(states[:, PREFIX - 1 : -1]).log_softmax(-1)
        return logps.gather(-1, rollouts.ids[..., None]).squeeze(-1)


def slopes(model: PrefixVLM, rollouts: Rollouts, direction: Tensor) -> Tensor:
    """Return the derivative `[N, T]` of each log-prob along a direction `[parameters]`; 0 on masked tokens."""
    module = _Logps(model)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    pieces = direction.split([p.numel() for p in parameters.values()])
    tangents = {name: piece.view_as(p) for (name, p), piece in zip(parameters.items(), pieces, strict=True)}
    _, found = torch.func.jvp(
        lambda own: torch.func.functional_call(module, own, (rollouts,)), (parameters,), (tangents,)
    )
    return torch.where(rollouts.mask, found, 0.0)
