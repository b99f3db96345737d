"""VGPO: weights by how visual the last hidden state of a token is, compensated late in a response."""

from typing import Any

import torch
from torch import Tensor

from srpo import checks
from srpo.credit import compute_dtype
from srpo.errors import ConfigError, DtypeError, ShapeError, describe, is_int, refuse
from srpo.methods.signals import at_least_kth, mean, min_max, number, opened, share_of


@torch.no_grad()
def visual_similarity(outputs: Any, image_token_mask: Tensor, logits_to_keep: int | None = None) -> Tensor:
    """Return the cosine of the last hidden state of each token with the mean one of the image tokens of its row.

    Args:
        outputs: what a transformers model returned with `output_hidden_states=True`, or its last hidden states
            `[B, S, H]`, over prompt and completion.
        image_token_mask: `[B, S]` 0/1, 1 on image tokens: `input_ids == model.config.image_token_id`.
        logits_to_keep: T, the columns of the completion; None: all columns.

    Returns: `[B, T]` fp32 (fp64 for fp64) in [-1, 1], without a shift: the state at a token's own column. 0 in a row
        without image tokens. What a padded column holds is the caller's to mask.

    Gradient: none.

    Memory: `[B, S, H]` once in fp32.

    Raises: ShapeError, DtypeError, DeviceError, ConfigError.

    Source: VGPO, arXiv 2604.09349.
    """
    states = outputs if isinstance(outputs, Tensor) else _last_states(outputs)
    call = checks.Call("visual_similarity", states, "outputs")
    if states.dim() != 3:
        fix = "pass hidden_states[-1], or what the model returned"
        call.fail(ShapeError, "outputs", describe(states), "last hidden states [B, S, H]", fix)
    B, S, _ = states.shape
    call.tensor("outputs", states, [tuple(states.shape)], "[B, S, H]", "float")
    call.tensor("image_token_mask", image_token_mask, [(B, S)], "[B, S]", "mask")
    T = S if logits_to_keep is None else logits_to_keep
    if not is_int(T) or not 0 <= T <= S:
        call.fail(ConfigError, "logits_to_keep", repr(T), f"an int in [0, {S}]", "pass completion_ids.size(1)")
    states, image = states.to(compute_dtype(states)), image_token_mask != 0
    prototype = mean(states.mT, image[:, None, :]).mT  # [B, 1, H]
    return torch.cosine_similarity(states[:, S - T :], prototype, dim=-1)


def _last_states(outputs: Any) -> Tensor:
    states = getattr(outputs, "last_hidden_state", None)
    if states is not None:
        return states
    layers = getattr(outputs, "hidden_states", None)
    if not layers:
        expected = "hidden states [B, S, H], or model outputs that hold them"
        fix = "call the model with output_hidden_states=True"
        refuse(DtypeError, "visual_similarity", "outputs", type(outputs).__name__, expected, fix)
    return layers[-1]


def vgpo_token_factors(
    similarity: Tensor,
    completion_mask: Tensor | None = None,
    *,
    compensation: float = 0.3,
    top: float = 0.2,
    factor_min: float = 0.1,
    factor_max: float = 2.0,
) -> Tensor:
    """Scale the tokens of each response around 1 by their compensated visual similarity v, min-maxed per response.

    f = clip(1 + v - mean of v, factor_min, factor_max)

    Args: as `vgpo_weights`.

    Returns: `[B, T]` fp32 (fp64 for fp64); 0 on masked tokens, 1 where all v of a response are equal.

    Gradient: none.

    Raises: ShapeError, DtypeError, DeviceError, ConfigError.

    Source: VGPO, arXiv 2604.09349.
    """
    _, mask, score = _opened("vgpo_token_factors", similarity, completion_mask, compensation, top)
    v = _focus(score, mask, compensation, top)
    return _token_factors(v, mask, factor_min, factor_max)


def vgpo_trajectory_factors(
    similarity: Tensor,
    group_ids: Tensor,
    completion_mask: Tensor | None = None,
    *,
    compensation: float = 0.3,
    top: float = 0.2,
    factor_min: float = 0.9,
    factor_max: float = 2.0,
) -> Tensor:
    """Scale the trajectories of a prompt by their sum of v, min-maxed over the group.

    g = clip(1 + phi - mean of phi, factor_min, factor_max),  phi = minmax over the group of sum v

    Args: as `vgpo_weights`.

    Returns: `[B]` fp32 (fp64 for fp64); 1 for a group of one or of equals. A row without a valid token has 1 and is
        not part of its group.

    Gradient: none.

    Raises: ShapeError, DtypeError, DeviceError, ConfigError.

    Source: VGPO, arXiv 2604.09349. The released code groups adjacent rows; here rows of one group id, wherever.
    """
    call, mask, score = _opened("vgpo_trajectory_factors", similarity, completion_mask, compensation, top)
    call.tensor("group_ids", group_ids, [(len(mask),)], "[B]", "int")
    v = _focus(score, mask, compensation, top)
    return _trajectory_factors(v, mask, group_ids, factor_min, factor_max)


def vgpo_weights(
    similarity: Tensor,
    group_ids: Tensor,
    completion_mask: Tensor | None = None,
    *,
    compensation: float = 0.3,
    top: float = 0.2,
) -> Tensor:
    """Multiply token and trajectory factors of visual similarity.

    Visual attention compensation: in the last half of a response the `top` share of the tokens, by similarity, is
    multiplied by 1 + compensation * t / (T_i - 1).

    Args:
        similarity: `[B, T]`, as `visual_similarity` returns it.
        group_ids: `[B]` integers, the prompt of each row; rows of a group need not be adjacent.
        completion_mask: `[B, T]` 0/1; None means all valid.
        compensation: strength at the last token.
        top: share of the last half that is compensated, at least one token, ties kept.

    Returns: `[B, T]` fp32 (fp64 for fp64), 0 on masked tokens.

    Gradient: none.

    Memory: a few `[B, T]` tensors and one `[B, B]`.

    Raises: ShapeError, DtypeError, DeviceError, ConfigError.

    Source: VGPO, arXiv 2604.09349. The released code offsets negative similarities by the minimum of the micro-batch,
        padding included; here by that of the response, so that rows are independent.
    """
    call, mask, score = _opened("vgpo_weights", similarity, completion_mask, compensation, top)
    call.tensor("group_ids", group_ids, [(len(mask),)], "[B]", "int")
    v = _focus(score, mask, compensation, top)
    trajectories = _trajectory_factors(v, mask, group_ids, 0.9, 2.0)
    return trajectories[:, None] * _token_factors(v, mask, 0.1, 2.0)


def _opened(
    function: str, similarity: Tensor, completion_mask: Tensor | None, compensation: float, top: float
) -> tuple[checks.Call, Tensor, Tensor]:
    """Check what all three functions take; return the call, the mask, and the similarity with 0 where masked."""
    call, mask, (score,) = opened(function, "similarity", similarity, completion_mask, {})
    number(call, "compensation", compensation, 0.0, torch.inf, 0.3)
    number(call, "top", top, 0.0, 1.0, 0.2)
    call.finite("similarity", similarity, mask)
    return call, mask, score


@torch.no_grad()
def _focus(score: Tensor, mask: Tensor, compensation: float, top: float) -> Tensor:
    """Return v `[B, T]`, 0 where masked."""
    if not mask.shape[1]:
        return score
    score = score - score.masked_fill(~mask, 0.0).amin(-1, keepdim=True).clamp(max=0.0)
    n, t = mask.sum(-1, keepdim=True), mask.long().cumsum(-1) - 1
    late = mask & (t >= n // 2)
    gate = at_least_kth(score, late, share_of(late.sum(-1), top, up=False).clamp(min=1))
    ramp = 1.0 + compensation * t.to(score.dtype) / (n - 1).clamp(min=1)
    return min_max(torch.where(gate, score * ramp, score), mask)


def _token_factors(v: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    return torch.where(mask, (1.0 + v - mean(v, mask)).clamp(low, high), 0.0)


def _trajectory_factors(v: Tensor, mask: Tensor, group_ids: Tensor, low: float, high: float) -> Tensor:
    counts = mask.any(-1)
    together = (group_ids[:, None] == group_ids[None, :]) & counts[None, :]  # [B, B]: no scatter, no sync
    total = v.sum(-1).expand(len(v), -1)
    phi = min_max(total, together)
    factors = 1.0 + phi.diagonal() - mean(phi, together).squeeze(-1)
    return torch.where(counts, factors.clamp(low, high), 1.0)
