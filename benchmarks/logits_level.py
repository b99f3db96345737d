"""The ways to get from logits to a weighted GRPO loss and its gradient that the benchmark compares."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from measure import Measurement
from torch import Tensor

from srpo import role_weighted_grpo_loss

FLOOR = "two reads and one write of the logits at the copy bandwidth"


@dataclass(frozen=True)
class Rollout:
    """What the loss takes beside logits or hidden states; `weights` multiply the advantages."""

    completion_ids: Tensor  # [B, T]
    advantages: Tensor  # [B]
    old_logps: Tensor  # [B, T]
    weights: Tensor  # [B, T]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Rollout":
        """Apply a function to every tensor."""
        return Rollout(*(function(getattr(self, field.name)) for field in fields(self)))

    def double(self) -> "Rollout":
        """Return the rollout in float64."""
        return self.map(lambda x: x.double() if x.is_floating_point() else x)

    def clipped_loss(self, logps: Tensor) -> Tensor:
        """Compute TRL's `dapo` loss in plain PyTorch."""
        ratio = (logps - self.old_logps).exp()
        advantages = self.advantages[:, None] * self.weights
        return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum() / self.weights.numel()


def make_rollout(ids: Tensor, logps: Tensor, generator: torch.Generator) -> Rollout:
    """Draw advantages, weights, and old log-probs near the current ones."""
    old = logps + 0.2 * torch.randn(ids.shape, generator=generator)
    weights = 0.8 + 0.4 * torch.rand(ids.shape, generator=generator)
    return Rollout(ids, torch.randn(ids.shape[0], generator=generator), old, weights)


def eager(logits: Tensor, rollout: Rollout) -> Tensor:
    """Take `log_softmax` and gather, in at least fp32."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return rollout.clipped_loss(wide.log_softmax(-1).gather(-1, rollout.completion_ids[..., None]).squeeze(-1))


def trl(logits: Tensor, rollout: Rollout) -> Tensor:
    """Take TRL's `selective_log_softmax`."""
    from trl.trainer.utils import selective_log_softmax

    return rollout.clipped_loss(selective_log_softmax(logits, rollout.completion_ids).float())


def srpo(logits: Tensor, rollout: Rollout) -> Tensor:
    """Take this library."""
    return role_weighted_grpo_loss(
        logits, rollout.completion_ids, rollout.advantages, weights=rollout.weights, old_logps=rollout.old_logps
    ).loss


PROVIDERS: dict[str, Callable[[Tensor, Rollout], Tensor]] = {"eager": eager, "trl": trl, "srpo": srpo}


@dataclass(frozen=True)
class Inputs:
    """One batch at the logits level."""

    logits: Tensor  # [B, T, V]
    rollout: Rollout

    def double(self) -> "Inputs":
        """Return the batch in float64."""
        return Inputs(self.logits.double(), self.rollout.double())

    def loss_and_gradients(self, provider: Callable) -> tuple[Tensor, list[Tensor]]:
        """Run one forward and backward."""
        leaf = self.logits.detach().requires_grad_()
        loss = provider(leaf, self.rollout)
        loss.backward()
        return loss.detach(), [leaf.grad]


def make_inputs(B: int, T: int, V: int, _H: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Draw a batch with one peak a row, as a trained model gives it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (B, T), generator=generator)
    logits = torch.randn(B, T, V, generator=generator) * 2
    logits.scatter_(-1, ids[..., None], 9.0)
    logps = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    rollout = make_rollout(ids, logps, generator).map(lambda x: x.to(device))
    return Inputs(logits.to(device, dtype), rollout)


def extra_cases(_inputs: Inputs) -> dict[str, Callable]:
    """Return what is timed beside the providers: nothing."""
    return {}


def floor(_name: str, inputs: Inputs, _results: dict[str, Measurement], bandwidth: float) -> float:
    """Return the milliseconds that the memory traffic alone takes."""
    return 3 * inputs.logits.nbytes / bandwidth / 1e6
