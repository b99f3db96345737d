"""The credit stage alone: from log-probs of three streams to an advantage for each token."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import Any

import torch
from providers import Case, Provider, Table, fixed, off, split
from shapes import Shape
from torch import Tensor

from srpo import METHODS, role_contrast, token_advantages, token_weights


@dataclass(frozen=True)
class Scored:
    """Log-probs `[B, T]` of three streams, roles, mask, and advantages `[B]`."""

    old_logps: Tensor
    corrupted_logps: Tensor
    ablated_logps: Tensor
    role_ids: Tensor
    completion_mask: Tensor
    advantages: Tensor

    def tensors(self) -> list[Tensor]:
        """Return all tensors."""
        return [getattr(self, field.name) for field in fields(self)]

    def double(self) -> "Scored":
        """Return the log-probs in float64."""
        return Scored(*(x.double() if x.is_floating_point() else x for x in self.tensors()))


def eager(scored: Scored) -> Tensor:
    """Compute the default weights in plain PyTorch, each equation a line."""
    credited = scored.completion_mask & (scored.role_ids > 0)
    negative = torch.where(scored.role_ids == 1, scored.corrupted_logps, scored.ablated_logps)
    contrast = torch.where(credited, (scored.old_logps - negative).clamp(-20.0, 20.0), 0.0)
    n = credited.sum(dim=1, keepdim=True).clamp(min=1)
    raw = (contrast - contrast.sum(dim=1, keepdim=True) / n).exp().clamp(0.8, 1.2)
    mean = torch.where(credited, raw, 0.0).sum(dim=1, keepdim=True) / n
    weights = torch.where(credited, raw / mean, scored.completion_mask.to(raw))
    return scored.advantages[:, None] * weights


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(lambda *tensors: eager(Scored(*tensors)))


def compiled(scored: Scored) -> Tensor:
    """Compile the same."""
    return _compiled()(*scored.tensors())


def srpo(scored: Scored) -> Tensor:
    """Take this library's three functions."""
    s = scored
    contrast = role_contrast(
        s.old_logps, corrupted_logps=s.corrupted_logps, ablated_logps=s.ablated_logps, role_ids=s.role_ids,
        completion_mask=s.completion_mask,
    )  # fmt: skip
    return token_advantages(s.advantages, token_weights(contrast, s.role_ids, s.completion_mask))


PROVIDERS: dict[str, Provider] = {
    "eager": Provider(eager),
    "torch.compile": Provider(compiled, compiles=True),
    "srpo": Provider(srpo),
}


def make_inputs(shape: Shape, device: torch.device, seed: int = 0) -> Scored:
    """Draw ragged rollouts: perception, then reasoning, then padding; contrasts from noise to several nats."""
    B, T, *_ = vars(shape).values()
    generator = torch.Generator().manual_seed(seed)
    columns, lengths = torch.arange(T), torch.randint(T // 2, T + 1, (B, 1), generator=generator)
    old = -3 * torch.rand(B, T, generator=generator)
    lower = [old - 3 * torch.randn(B, T, generator=generator).abs() ** 3 for _ in range(2)]
    roles = (1 + (columns >= lengths // 2)).to(torch.int8)
    advantages = torch.randn(B, generator=generator)
    return Scored(*(x.to(device) for x in (old, *lower, roles, columns < lengths, advantages)))


def tables(
    shape: Shape, dtype: torch.dtype, device: torch.device, wanted: list[str] | None, bandwidth: float
) -> Iterator[Table]:
    """Yield the table of the level. Log-probs are fp32 whatever the model's dtype."""
    providers, skipped = split(PROVIDERS, wanted, device)
    scored = make_inputs(shape, device)
    true = eager(scored.double())
    moved = sum(x.nbytes for x in scored.tensors()) + scored.old_logps.nbytes
    cases = {
        name: Case(
            partial(p.loss, scored), fixed(moved / bandwidth / 1e6),
            lambda x: off(x, true, "advantage", torch.float32),
        )
        for name, p in providers.items()
    }  # fmt: skip
    yield Table("contrast, weights, advantages", "one read of each input and one write", cases, skipped)
    signals = _signals(scored)
    methods = {name: Case(partial(method, **signals)) for name, method in METHODS.items()}
    yield Table("every method", "none named", methods)


def _signals(scored: Scored) -> dict[str, Any]:
    """Return what `METHODS` read; log-probs and the like stand in for each other where only time matters."""
    s = scored
    return {
        "logps": s.old_logps, "completion_mask": s.completion_mask, "role_ids": s.role_ids,
        "corrupted_logps": s.corrupted_logps, "ablated_logps": s.ablated_logps, "advantages": s.advantages,
        "entropy": -s.old_logps, "teacher_logps": s.ablated_logps, "similarity": s.old_logps.exp(),
        "group_ids": torch.arange(len(s.advantages), device=s.advantages.device) % 8, "step": 0,
        "completion_ids": (-100 * s.old_logps).long(), "corrupted_kl": -s.corrupted_logps,
    }  # fmt: skip
