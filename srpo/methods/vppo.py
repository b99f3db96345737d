"""VPPO: train only the tokens that depend on the image most, and trajectories by how much they do."""

import torch
from torch import Tensor

from srpo.methods.signals import divergence, mean, min_max, number, share_of
from srpo_kernels.reference import K3_MAX


def vppo_token_mask(
    logps: Tensor,
    corrupted_logps: Tensor | None,
    completion_mask: Tensor | None = None,
    *,
    keep: float = 0.4,
    corrupted_kl: Tensor | None = None,
) -> Tensor:
    """Keep the ceil(keep * T_i) tokens of each response with the largest k3(logps - corrupted_logps).

    Args: as `vppo_weights`.

    Returns: `[B, T]` fp32 (fp64 for fp64), 1 or 0. Among equals, to fp32, the earlier token is kept.

    Gradient: none.

    Raises: ShapeError, DtypeError, DeviceError, ConfigError.

    Source: VPPO, arXiv 2510.09285. The released sort is not stable.
    """
    score, mask = _scores("vppo_token_mask", logps, corrupted_logps, corrupted_kl, completion_mask, keep, 0.9)
    return _kept(score, mask, keep).to(score.dtype)


def vppo_trajectory_factors(
    logps: Tensor,
    corrupted_logps: Tensor | None,
    completion_mask: Tensor | None = None,
    *,
    factor_min: float = 0.9,
    corrupted_kl: Tensor | None = None,
) -> Tensor:
    """Scale trajectories by their mean dependency s on the image, to a mean factor of 1 over the batch.

    n = minmax over the batch of mean s,  factor = factor_min + n * (1 - factor_min) / (mean n + 1e-8)

    Args: as `vppo_weights`.

    Returns: `[B]` fp32 (fp64 for fp64). 1 for all where the means lie within 1e-6 or fewer than two rows have a valid
        token; a row without one has 1 and takes part in nothing.

    Gradient: none.

    Raises: ShapeError, DtypeError, DeviceError, ConfigError.

    Source: VPPO, arXiv 2510.09285. The released code takes its means over a micro-batch; here over the rows given.
    """
    score, mask = _scores(
        "vppo_trajectory_factors", logps, corrupted_logps, corrupted_kl, completion_mask, 0.4, factor_min
    )
    return _factors(score, mask, factor_min)


def vppo_weights(
    logps: Tensor,
    corrupted_logps: Tensor | None,
    completion_mask: Tensor | None = None,
    *,
    keep: float = 0.4,
    factor_min: float = 0.9,
    corrupted_kl: Tensor | None = None,
) -> Tensor:
    """Multiply token mask and trajectory factor.

    Args:
        logps: `[B, T]` nats, of the policy that made the rollout.
        corrupted_logps: `[B, T]` nats, of the same tokens with the image corrupted; None with `corrupted_kl`.
        completion_mask: `[B, T]` 0/1; None means all valid.
        keep: share of the tokens of a response that is trained.
        factor_min: smallest trajectory factor.
        corrupted_kl: `[B, T]` nats at least 0: the divergence KL(clean || corrupted) over the vocabulary, by which the
            paper defines dependency, in the place of k3 of the sampled token, which its code computes.

    Returns: `[B, T]` fp32 (fp64 for fp64). Pass it as `weights`: the denominator of the loss stays all valid tokens.

    Gradient: none.

    Memory: a few `[B, T]` tensors.

    Raises: ShapeError, DtypeError, DeviceError, ConfigError.

    Source: VPPO, arXiv 2510.09285.
    """
    score, mask = _scores("vppo_weights", logps, corrupted_logps, corrupted_kl, completion_mask, keep, factor_min)
    return _kept(score, mask, keep) * _factors(score, mask, factor_min)[:, None]


def _scores(
    function: str,
    logps: Tensor,
    corrupted_logps: Tensor | None,
    corrupted_kl: Tensor | None,
    completion_mask: Tensor | None,
    keep: float,
    low: float,
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        call, mask, score = divergence(function, logps, corrupted_logps, corrupted_kl, completion_mask, K3_MAX)
    number(call, "keep", keep, 0.0, 1.0, 0.4)
    number(call, "factor_min", low, 0.0, 1.0, 0.9)
    return score, mask


def _kept(score: Tensor, mask: Tensor, keep: float) -> Tensor:
    # fp32 makes a tie of two scores that differ by the rounding of fp64 log-probs.
    ranked = score.float().masked_fill(~mask, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.arange(mask.shape[1], device=mask.device) < share_of(mask.sum(-1, keepdim=True), keep, up=True)
    return torch.zeros_like(mask).scatter(-1, ranked, chosen)


def _factors(score: Tensor, mask: Tensor, low: float) -> Tensor:
    counts = mask.any(-1)
    means = mean(score, mask).squeeze(-1)
    n = min_max(means, counts)
    high = low + (1.0 - low) / (torch.where(counts, n, 0.0).sum() / counts.sum().clamp(min=1) + 1e-8)
    if not len(means):
        return means
    largest, smallest = means.masked_fill(~counts, -torch.inf).amax(), means.masked_fill(~counts, torch.inf).amin()
    return torch.where(counts & (largest - smallest > 1e-6), low + n * (high - low), 1.0)
