"""PGPO: redistribute the weight of a response to the tokens that depend on the image."""

import torch
from torch import Tensor

from srpo.methods.signals import divergence, min_max, number


def pgpo_weights(
    logps: Tensor,
    corrupted_logps: Tensor | None,
    completion_mask: Tensor | None = None,
    *,
    threshold: float = 0.4,
    boost: float = 2.0,
    corrupted_kl: Tensor | None = None,
) -> Tensor:
    """Suppress tokens below a threshold of visual dependency I, boost those above, and keep the sum of a response.

    I = minmax of log(1 + k3(logps - corrupted_logps)),  r = I / threshold below it, 1 + boost * (I - threshold) /
    (1 - threshold) above,  w = r * T_i / sum of r

    Args:
        logps: `[B, T]` nats, of the policy that made the rollout.
        corrupted_logps: `[B, T]` nats, of the same tokens with the image corrupted; None with `corrupted_kl`.
        completion_mask: `[B, T]` 0/1; None means all valid.
        threshold: of I, in (0, 1).
        boost: slope above the threshold.
        corrupted_kl: `[B, T]` nats at least 0: the divergence KL(clean || corrupted) over the vocabulary, by which the
            paper defines dependency, in the place of k3 of the sampled token, which its code computes.

    Returns: `[B, T]` fp32 (fp64 for fp64), 0 on masked tokens; the weights of a response sum to its length, and are 1
        where all its tokens depend equally on the image.

    Gradient: none.

    Memory: a few `[B, T]` tensors.

    Raises: ShapeError, DtypeError, DeviceError, ConfigError.

    Source: PGPO, arXiv 2604.01840. k3 is not clipped here, its argument is clamped to +-20 nats.
    """
    with torch.no_grad():
        call, mask, dependency = divergence(
            "pgpo_weights", logps, corrupted_logps, corrupted_kl, completion_mask, torch.inf
        )
    number(call, "threshold", threshold, 1e-6, 1.0 - 1e-6, 0.4)
    number(call, "boost", boost, 0.0, torch.inf, 2.0)
    with torch.no_grad():
        I = min_max(dependency.log1p(), mask)  # noqa: E741 - the paper's name
        raised = 1.0 + boost * (I - threshold) / (1.0 - threshold)
        raw = torch.where(mask, torch.where(threshold > I, I / threshold, raised), 0.0)
        total = raw.sum(-1, keepdim=True)
        scaled = raw * mask.sum(-1, keepdim=True) / total
        return torch.where(mask, torch.where(total > 0, scaled, 1.0), 0.0)
