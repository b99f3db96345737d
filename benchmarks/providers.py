"""The ways to get from logits to a weighted GRPO loss and its gradient that the benchmark compares."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from srpo import role_weighted_grpo_loss


@dataclass(frozen=True)
class Inputs:
    """One batch at the logits level; `weights` multiply the advantages."""

    logits: Tensor  # [B, T, V]
    completion_ids: Tensor  # [B, T]
    advantages: Tensor  # [B]
    old_logps: Tensor  # [B, T]
    weights: Tensor  # [B, T]


def clipped_loss(logps: Tensor, inputs: Inputs) -> Tensor:
    """TRL's `dapo` loss in plain PyTorch."""
    ratio = (logps - inputs.old_logps).exp()
    advantages = inputs.advantages[:, None] * inputs.weights
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum() / inputs.weights.numel()


def eager(logits: Tensor, inputs: Inputs) -> Tensor:
    """Take `log_softmax` and gather, in fp32."""
    logps = logits.float().log_softmax(-1).gather(-1, inputs.completion_ids[..., None]).squeeze(-1)
    return clipped_loss(logps, inputs)


def trl(logits: Tensor, inputs: Inputs) -> Tensor:
    """Take TRL's `selective_log_softmax`."""
    from trl.trainer.utils import selective_log_softmax

    return clipped_loss(selective_log_softmax(logits, inputs.completion_ids).float(), inputs)


def srpo(logits: Tensor, inputs: Inputs) -> Tensor:
    """Take this library."""
    return role_weighted_grpo_loss(
        logits, inputs.completion_ids, inputs.advantages, weights=inputs.weights, old_logps=inputs.old_logps
    ).loss


PROVIDERS: dict[str, Callable[[Tensor, Inputs], Tensor]] = {"eager": eager, "trl": trl, "srpo": srpo}


def make_inputs(B: int, T: int, V: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Draw a batch with one peak a row, as a trained model gives it, and old log-probs near the current ones."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (B, T), generator=generator)
    logits = torch.randn(B, T, V, generator=generator) * 2
    logits.scatter_(-1, ids[..., None], 9.0)
    logps = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    old = logps + 0.2 * torch.randn(B, T, generator=generator)
    weights = 0.8 + 0.4 * torch.rand(B, T, generator=generator)
    advantages = torch.randn(B, generator=generator)
    return Inputs(logits.to(device, dtype), *(x.to(device) for x in (ids, advantages, old, weights)))
