"""What every level shares: a provider, a line of a table, a rollout, and the gate that a provider has to pass."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from measure import Measurement
from torch import Tensor

from srpo import PRESETS, role_contrast, token_weights

# The relative error, in the 2-norm, of a gradient or of log-probs against float64; of a loss, in mean advantages.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
TRUTH_ROWS = 256  # of logits that stand in float64 at once


@dataclass(frozen=True)
class Provider:
    """One way to compute the loss.

    Args:
        loss: what the level says.
        logps: what the level says; None for a provider that gives a loss only.
        package: what must be installed.
        gpu: whether it needs a GPU.
        compiles: whether it calls a C++ compiler on a CPU.
        weighted: whether each token can have its own coefficient.
        on_request: whether it is left out unless asked for.
    """

    loss: Callable[..., Tensor]
    logps: Callable[..., Tensor] | None = None
    package: str | None = None
    gpu: bool = False
    compiles: bool = False
    weighted: bool = True
    on_request: bool = False

    def missing(self, device: torch.device) -> str | None:
        """Return why it cannot run here, or None."""
        if self.gpu and device.type != "cuda":
            return "needs a GPU"
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.compiles and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            return "torch.compile needs a C++ compiler"
        return None


@dataclass(frozen=True)
class Case:
    """One line of a table.

    Args:
        run: what is timed.
        floor: milliseconds that nothing can be faster than, from the measurements of the table.
        check: takes what `run` returned, before any timing, and returns what is wrong with it, or None.
    """

    run: Callable[[], object]
    floor: Callable[[dict[str, Measurement]], float | None] = lambda _: None
    check: Callable[[Any], str | None] = lambda _: None
    note: str = ""


def fixed(milliseconds: float) -> Callable[[dict[str, Measurement]], float]:
    """Return a floor that depends on no measurement of the table."""
    return lambda _: milliseconds


@dataclass(frozen=True)
class Table:
    """Cases that are timed together, and the providers that cannot run."""

    title: str
    floor: str
    cases: dict[str, Case]
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rollout:
    """What the loss takes beside logits or hidden states."""

    completion_ids: Tensor  # [B, T]
    advantages: Tensor  # [B]
    old_logps: Tensor  # [B, T]
    weights: Tensor  # [B, T]
    role_ids: Tensor  # [B, T]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Rollout":
        """Apply a function to every tensor."""
        return Rollout(*(function(getattr(self, field.name)) for field in fields(self)))

    def double(self) -> "Rollout":
        """Return the rollout in float64."""
        return self.map(lambda x: x.double() if x.is_floating_point() else x)

    def loss(self, logps: Tensor, streams: list[Tensor] | None = None) -> Tensor:
        """Compute TRL's `dapo` loss in plain PyTorch, with the given weights or those of contrast streams."""
        weights = credit(self, streams) if streams else self.weights
        return surrogate(logps, self.old_logps, self.advantages[:, None] * weights).mean()


def surrogate(logps: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:
    """Compute the clipped loss of each token, as TRL writes it."""
    ratio = (logps - old_logps).exp()
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def credit(rollout: Rollout, streams: list[Tensor]) -> Tensor:
    """Return the weights of contrast streams: without an image, and without the perception text."""
    config = PRESETS["srpo" if len(streams) == 2 else "srpo_one_pass"]
    corrupted, ablated = (*streams, None)[:2]
    contrast = role_contrast(
        rollout.old_logps, corrupted_logps=corrupted, ablated_logps=ablated, role_ids=rollout.role_ids, credit=config
    )
    return token_weights(contrast, rollout.role_ids, credit=config)


def make_rollout(ids: Tensor, logps: Tensor, generator: torch.Generator) -> Rollout:
    """Draw advantages, weights, old log-probs near the current ones, and roles: half perception, half reasoning."""
    old = logps + 0.2 * torch.randn(ids.shape, generator=generator)
    weights = 0.8 + 0.4 * torch.rand(ids.shape, generator=generator)
    roles = 1 + (torch.arange(ids.shape[1]) >= ids.shape[1] // 2).to(torch.int8).expand(ids.shape)
    return Rollout(ids, torch.randn(ids.shape[0], generator=generator), old, weights, roles)


def split(providers: dict[str, Provider], wanted: list[str] | None, device: torch.device):
    """Return the providers that can run, and why others cannot."""
    chosen = {name: p for name, p in providers.items() if (name in wanted if wanted else not p.on_request)}
    why = {name: reason for name, p in chosen.items() if (reason := p.missing(device))}
    return {name: p for name, p in chosen.items() if name not in why}, why


def off(got: Tensor, true: Tensor, name: str, dtype: torch.dtype) -> str | None:
    """Compare in the 2-norm; return what is wrong, or None."""
    error = float((got.detach().double() - true).norm() / true.norm())
    return None if error <= ALLOWED[dtype] else f"{name} is {error:.1e} off fp64, {ALLOWED[dtype]:.0e} allowed"


def loss_off(got: Tensor, true: Tensor, advantages: Tensor, dtype: torch.dtype) -> str | None:
    """Compare a loss, which is a difference near 0, in mean advantages; return what is wrong, or None."""
    error = float((got.detach().double() - true).abs() / advantages.abs().mean())
    return None if error <= ALLOWED[dtype] else f"loss is {error:.1e} off fp64, {ALLOWED[dtype]:.0e} allowed"
