"""ToR: train the tokens of highest entropy, and half as much those that depend on the image most."""

import torch
from torch import Tensor

from srpo.methods.signals import at_least_kth, difference, number, opened, share_of


def tor_weights(
    logps: Tensor,
    corrupted_logps: Tensor,
    entropy: Tensor,
    completion_mask: Tensor | None = None,
    *,
    share: float = 0.3,
    perception_weight: float = 0.5,
) -> Tensor:
    """Weight 1 on reasoning tokens (top entropy), less on perception tokens (top |logps - corrupted_logps|), 0 else.

    Args:
        logps: `[B, T]` nats, of the policy that made the rollout.
        corrupted_logps: `[B, T]` nats, of the same tokens with the image corrupted.
        entropy: `[B, T]` nats, of the policy: `score_streams(...).entropy`.
        completion_mask: `[B, T]` 0/1; None means all valid.
        share: of the valid tokens of the batch in each set, rounded up; ties with the last are kept.
        perception_weight: weight of tokens that are in the perception set only.

    Returns: `[B, T]` fp32 (fp64 for fp64), 0 on masked tokens.

    Gradient: none.

    Memory: a few `[B, T]` tensors.

    Raises: ShapeError, DtypeError, DeviceError, ConfigError.

    Source: ToR, arXiv 2603.25077. There is no released code.
    """
    given = {"corrupted_logps": corrupted_logps, "entropy": entropy}
    call, mask, (clean, corrupted, entropy) = opened("tor_weights", "logps", logps, completion_mask, given)
    number(call, "share", share, 0.0, 1.0, 0.3)
    number(call, "perception_weight", perception_weight, 0.0, 1.0, 0.5)
    call.finite("entropy", entropy, mask)
    with torch.no_grad():
        flat = mask.flatten()
        k = share_of(flat.sum(), share, up=True)
        reasoning, perception = (
            (at_least_kth(x.flatten(), flat, k) & (k > 0)).view_as(mask)
            for x in (entropy, difference(clean, corrupted).abs())
        )
        weights = torch.where(perception, torch.full_like(clean, perception_weight), 0.0)
        return torch.where(reasoning, 1.0, weights)
