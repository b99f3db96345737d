"""PAPO: an extra term of the loss that drives the policy away from itself without the image."""

import warnings

import torch
from torch import Tensor

from srpo import checks
from srpo.errors import ConfigError, ConfigWarning
from srpo.methods.signals import difference, number, opened
from srpo_kernels.reference import k3

_MOST = 10.0  # of a token's k3


def papo_loss_term(
    logps: Tensor,
    corrupted_logps: Tensor,
    completion_mask: Tensor | None = None,
    *,
    gamma: float = 0.01,
    entropy_weight: float = 0.0,
    corrupted_entropy_weight: float = 0.0,
    num_items_in_batch: Tensor | float | None = None,
) -> Tensor:
    """Return what PAPO adds to the loss: the mean over valid tokens of

    -gamma * k3(logps - corrupted_logps) - entropy_weight * logps - corrupted_entropy_weight * corrupted_logps

    Args:
        logps: `[B, T]` nats, of the current policy, with their graph: `selected_logps` or the trainer's own.
        corrupted_logps: `[B, T]` nats, of the same tokens with the image corrupted; with their graph where the masked
            pass is to be trained too.
        completion_mask: `[B, T]` 0/1; None means all valid.
        gamma: weight of the KL term; 0.01 and 0.02 as published.
        entropy_weight: first weight of the double entropy loss; 0.03 or 0.05 as published, 0 without.
        corrupted_entropy_weight: second weight.
        num_items_in_batch: the divisor; None: valid tokens of this batch.

    Returns: 0-d fp32 (fp64 for fp64): add it to `LossOutput.loss`. k3(d) = exp(-d) + d - 1, d clamped to +-20 and k3
        to [-10, 10]; a clamped token has no gradient.

    Gradient: to `logps`, and to `corrupted_logps` when it carries one.

    Memory: a few `[B, T]` tensors.

    Raises: ShapeError, DtypeError, DeviceError; ConfigError where gradients are on and `logps` carries none.

    Warns: ConfigWarning, where `corrupted_entropy_weight` is set and `corrupted_logps` carries no gradient, so that
        the term trains nothing (as in the released default).

    Source: PAPO, arXiv 2507.06448. TRL's former PAPO averaged without the mask; here masked tokens do not count.
    """
    given = {"corrupted_logps": corrupted_logps}
    call, mask, (own, corrupted) = opened("papo_loss_term", "logps", logps, completion_mask, given)
    weights = {"gamma": gamma, "entropy_weight": entropy_weight, "corrupted_entropy_weight": corrupted_entropy_weight}
    for (name, x), default in zip(weights.items(), (0.01, 0.0, 0.0), strict=True):
        number(call, name, x, 0.0, torch.inf, default)
    checks.normaliser(call, num_items_in_batch)
    if torch.is_grad_enabled():
        if not logps.requires_grad:
            expected = "log-probs with their graph: without it the term trains nothing"
            fix = "pass selected_logps(logits, completion_ids), not LossOutput.logps"
            call.fail(ConfigError, "logps", "a tensor without gradient", expected, fix)
        if corrupted_entropy_weight > 0.0 and not corrupted_logps.requires_grad:
            message = (
                "papo_loss_term(): corrupted_logps carries no gradient, so corrupted_entropy_weight trains nothing; "
                "score the masked pass with gradient, or set it to 0."
            )
            warnings.warn(message, ConfigWarning, stacklevel=2)
    term = -gamma * k3(difference(own, corrupted)).clamp(-_MOST, _MOST)
    if entropy_weight:
        term = term - entropy_weight * own
    if corrupted_entropy_weight:
        term = term - corrupted_entropy_weight * corrupted
    divisor = mask.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=term.device)
    return torch.where(mask, term, 0.0).sum() / divisor.clamp(min=1)
