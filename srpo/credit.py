"""The credit stage: contrasts, positive token weights, token advantages, group advantages.

Everything here is detached: weights are constants of the loss. All of it works on `[B, T]` tensors, so the product,
`token_advantages`, fits any trainer that accepts per-token advantages.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from srpo import checks
from srpo.config import CreditConfig
from srpo.errors import ConfigError, NonFiniteError
from srpo.streams import STREAMS, Streams, is_no_evidence, is_not_scored, not_scored
from srpo_kernels import ops
from srpo_kernels.layout import Layout
from srpo_kernels.reference import NO_VALUE


class Credit(NamedTuple):
    """What the credit stage computes.

    Args:
        contrast: per token, 0 outside the credit set, NaN where a role of a trajectory has no evidence.
        weights, flags: per token.
        baseline: per trajectory.
        not_scored: 0-d, how many cells were read that nobody had scored.
        infinite: 0-d, how many divergences were infinite.
    """

    contrast: Tensor
    weights: Tensor
    flags: Tensor
    baseline: Tensor
    not_scored: Tensor
    infinite: Tensor


def role_contrast(
    logps: Tensor,
    *,
    corrupted_logps: Tensor | None = None,
    ablated_logps: Tensor | None = None,
    corrupted_kl: Tensor | None = None,
    ablated_kl: Tensor | None = None,
    role_ids: Tensor,
    completion_mask: Tensor | None = None,
    credit: CreditConfig = CreditConfig(),  # noqa: B008 - frozen
    cu_seqlens: Tensor | None = None,
    validate_values: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """Contrast the log-probs of a rollout with those of its corrupted and ablated streams.

    c = f(logps - corrupted_logps) on perception tokens
    c = f(logps - ablated_logps) on reasoning tokens, or f(corrupted_logps - logps) with `image_independence`
    c = corrupted_kl, ablated_kl or -corrupted_kl in their places with `contrast_kind="kl"`

    Args:
        logps: `[B, T]` nats, of the policy that made the rollout. `[N]` with `cu_seqlens`, as all others.
        corrupted_logps: `[B, T]`, read on perception tokens (on both roles with `image_independence`).
        ablated_logps: `[B, T]`, read on reasoning tokens.
        corrupted_kl, ablated_kl: `[B, T]` nats at least 0, as `score_streams` returns them for `contrast_kind="kl"`,
            which reads them in the place of log-probs.
        role_ids: `[B, T]` integers, 0 other, 1 perception, 2 reasoning.
        completion_mask: `[B, T]` 0/1; None means all valid.
        credit: the settings; `contrast_kind`, `reasoning_signal`, `contrast_clamp`, `strict_finite` matter here.
        cu_seqlens: `[R + 1]` offsets of packed trajectories.
        validate_values: None checks values of CPU tensors, True of all, False of none.
        backend: `"auto"`, `"triton"` or `"torch"`.

    Returns: `[B, T]` fp32 (fp64 for fp64 on the torch backend), 0 outside the credit set. A difference without a
        value (NaN, or both sides -inf) counts as 0. Where `score_streams` found nothing to score with, as in a row
        without a picture, it is NaN, and `token_weights` takes the role for missing.

    Gradient: none.

    Memory: a few `[B, T]` tensors.

    Raises: ShapeError, DtypeError, DeviceError, RoleParseError, NonFiniteError (`strict_finite`); ConfigError, also
        where a cell is read that `score_streams` did not score (it stays NaN where values are not checked).

    Source: Jiang & Zou, arXiv 2605.07274.

    Example:
        >>> logps, role_ids = torch.tensor([[-0.5, -1.0, -0.2]]), torch.tensor([[1, 1, 2]])
        >>> role_contrast(logps, corrupted_logps=logps - 1.5, ablated_logps=logps - 0.5, role_ids=role_ids)
        tensor([[1.5000, 1.5000, 0.5000]])
    """
    call = checks.Call("role_contrast", logps, "logps", validate_values)
    checks.credit_config(call, credit)
    layout = checks.layout_of(call, "logps", logps, cu_seqlens)
    call.tensor("logps", logps, [layout.shape], checks.tokens(layout), "float")
    mask = checks.mask_of(call, completion_mask, layout)
    roles = checks.roles_of(call, role_ids, mask, layout)
    call.log_probs("logps", logps.detach(), mask, of_stream=True)
    plain = CreditConfig(
        contrast_kind=credit.contrast_kind,
        reasoning_signal=credit.reasoning_signal,
        contrast_clamp=credit.contrast_clamp,
    )
    logps_of, divergences = Streams(corrupted_logps, ablated_logps), Streams(corrupted_kl, ablated_kl)
    streams = checks.contrast_streams(call, plain, layout, roles, mask, logps_of, divergences)
    chosen = checks.backend_of(call, backend, logps.dtype)
    dtype = compute_dtype(logps, chosen)
    corrupted, ablated = (as_dtype(x, dtype) for x in streams)
    contrast, no_value = ops.role_contrast(logps.to(dtype), corrupted, ablated, roles, mask, layout, plain.rule, chosen)
    if credit.strict_finite:
        _refuse_no_value(call, no_value)
    if call.validates and not int(no_value.sum()):
        return contrast
    lost, kept = (_read_and(kind, plain, roles, mask, streams) for kind in (is_not_scored, is_no_evidence))
    return torch.where(lost, not_scored(contrast), torch.where(contrast.isnan() & ~kept, 0.0, contrast))


def token_weights(
    contrast: Tensor,
    role_ids: Tensor,
    completion_mask: Tensor | None = None,
    *,
    advantages: Tensor | None = None,
    credit: CreditConfig = CreditConfig(),  # noqa: B008 - frozen
    cu_seqlens: Tensor | None = None,
    validate_values: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """Turn contrasts into positive token weights around one baseline per trajectory.

    u = (c - mean of c over the credit set) / tau,  w = clip(exp(u), weight_min, weight_max)
    w <- w / mean of w over the credit set,  w <- 1 + strength * (w - 1)

    Args:
        contrast: `[B, T]` nats, as `role_contrast` returns it; NaN has no value. `[N]` with `cu_seqlens`, as the
            others.
        role_ids: `[B, T]` integers, 0 other, 1 perception, 2 reasoning.
        completion_mask: `[B, T]` 0/1; None means all valid.
        advantages: `[B]` or `[B, T]`; needed with `direction="advantage"`, which reads their sign.
        credit: the settings.
        cu_seqlens: `[R + 1]` offsets of packed trajectories.
        validate_values: None checks values of CPU tensors, True of all, False of none.
        backend: `"auto"`, `"triton"` or `"torch"`.

    Returns: `[B, T]` fp32 (fp64 for fp64 on the torch backend): the weight on the credit set, 1 on other valid tokens,
        0 on masked ones. Exactly 1 where a role is missing (`missing_role`), also for want of a single contrast with a
        value, or where all contrasts of a trajectory are equal.

    Gradient: none.

    Memory: a few `[B, T]` tensors.

    Raises: ShapeError, DtypeError, DeviceError, RoleParseError, ConfigError, NonFiniteError (`strict_finite`).

    Source: Jiang & Zou, arXiv 2605.07274.

    Example:
        >>> token_weights(torch.tensor([[0.1, -0.1, 0.0]]), torch.tensor([[1, 2, 0]]))
        tensor([[1.0997, 0.9003, 1.0000]])
    """
    call = checks.Call("token_weights", contrast, "contrast", validate_values)
    checks.credit_config(call, credit)
    layout = checks.layout_of(call, "contrast", contrast, cu_seqlens)
    call.tensor("contrast", contrast, [layout.shape], checks.tokens(layout), "float")
    mask = checks.mask_of(call, completion_mask, layout)
    roles = checks.roles_of(call, role_ids, mask, layout)
    if advantages is not None:
        advantages = checks.advantages_of(call, advantages, mask, layout)
    elif credit.direction == "advantage":
        fix = "pass the advantages, or use direction='evidence'"
        call.fail(ConfigError, "advantages", "None", "advantages because direction='advantage'", fix)
    if call.validates and bool(contrast.detach().sum().isnan()):
        checks.scored(call, "contrast", contrast, mask & ((roles == 1) | (roles == 2)), "role_contrast reads")
    chosen = checks.backend_of(call, backend, contrast.dtype)
    if credit.strength == 0.0:
        return mask.to(compute_dtype(contrast, chosen))
    weights = run_credit(call, layout, mask, roles, advantages, credit, chosen, contrast=contrast).weights
    if call.validates:
        return weights
    # where values are not checked, a loss that is NaN says what nobody else can
    return torch.where(mask & ((roles == 1) | (roles == 2)) & is_not_scored(contrast), torch.nan, weights)


def token_advantages(advantages: Tensor, weights: Tensor) -> Tensor:
    """Multiply weights into advantages: A_it = A_i * w_it.

    Args:
        advantages: `[B]` or `[B, T]`, or `[N]` when packed.
        weights: `[B, T]`, or `[N]` when packed, as `token_weights` returns them.

    Returns: `[B, T]`, detached: what TRL, verl and EasyR1 accept as per-token advantages. 0 on masked tokens.

    Gradient: none.

    Raises: ShapeError, DtypeError, DeviceError.

    Source: Jiang & Zou, arXiv 2605.07274.

    Example:
        >>> token_advantages(torch.tensor([2.0]), torch.tensor([[1.2, 0.8, 0.0]]))
        tensor([[2.4000, 1.6000, 0.0000]])
    """
    call = checks.Call("token_advantages", weights, "weights")
    call.tensor("weights", weights, [tuple(weights.shape)], "[B, T] or [N]", "float")
    shapes = [tuple(weights.shape)]
    if weights.dim() == 2:
        shapes.append((weights.shape[0],))
    call.tensor("advantages", advantages, shapes, "[B] or [B, T]", "float")
    per_token = advantages[:, None] if advantages.dim() < weights.dim() else advantages
    # where: an advantage that is NaN on a masked token must not survive the multiplication by 0
    product = per_token.detach() * weights.detach()
    if call.validates and bool(product.sum().isfinite()):
        return product
    return torch.where(weights == 0, 0.0, product)


def group_advantages(rewards: Tensor, group_ids: Tensor, *, scale: str = "group") -> Tensor:
    """Normalise rewards within the groups of rollouts that share a prompt.

    A = (R - mean of the group) / (std + 1e-4), unbiased std of the group (`"group"`), of the batch (`"batch"`), or no
    division (`"none"`)

    Args:
        rewards: `[B]`.
        group_ids: `[B]` integers, any values; rows of one group need not be adjacent.
        scale: `"group"`, `"batch"` or `"none"`, as TRL's `scale_rewards`.

    Returns: `[B]` in the dtype of `rewards` (at least fp32). A group of one gives 0, never NaN.

    Gradient: none.

    Raises: ShapeError, DtypeError, DeviceError, ConfigError, NonFiniteError.

    Source: DeepSeekMath, arXiv 2402.03300; Dr. GRPO, arXiv 2503.20783, for `"none"`.

    Example:
        >>> group_advantages(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([7, 7, 8]))
        tensor([ 0.7070, -0.7070,  0.0000])
    """
    call = checks.Call("group_advantages", rewards, "rewards")
    shape = tuple(rewards.shape)
    call.tensor("rewards", rewards, [shape if rewards.dim() == 1 else (rewards.numel(),)], "[B]", "float")
    call.tensor("group_ids", group_ids, [shape], "[B]", "int")
    if scale not in ("group", "batch", "none"):
        call.fail(ConfigError, "scale", repr(scale), "'group', 'batch' or 'none'", "pass scale='group'")
    call.finite("rewards", rewards, torch.ones_like(rewards, dtype=torch.bool))
    if not rewards.numel():
        return rewards.detach().to(compute_dtype(rewards))
    x = rewards.detach().to(compute_dtype(rewards))
    _, index = group_ids.unique(return_inverse=True)
    same = index[:, None] == index[None, :]  # [B, B]: deterministic sums, no scatter
    size = same.sum(-1)
    centred = x - torch.where(same, x[None, :], 0.0).sum(-1) / size
    if scale == "none":
        return torch.where(size > 1, centred, 0.0)
    if scale == "batch":
        std = x.std() if x.numel() > 1 else x.new_zeros(())
    else:
        squares = torch.where(same, centred.square()[None, :], 0.0).sum(-1)
        std = (squares / (size - 1).clamp(min=1)).sqrt()
    return torch.where(size > 1, centred / (std + 1e-4), 0.0)


def run_credit(
    call: checks.Call,
    layout: Layout,
    mask: Tensor,
    role_ids: Tensor,
    advantages: Tensor | None,
    credit: CreditConfig,
    backend: str,
    *,
    contrast: Tensor | None = None,
    base: Tensor | None = None,
    streams: Streams = Streams(),  # noqa: B008 - immutable
) -> Credit:
    """Run the credit op on checked arguments; a given `contrast` replaces the three streams."""
    dtype = compute_dtype(base if contrast is None else contrast, backend)
    of_contrast = (contrast, None, None, None) if contrast is not None else (None, base, *streams)
    given, base, corrupted, ablated = (as_dtype(x, dtype) for x in of_contrast)
    signs = as_dtype(advantages, dtype)
    found, weights, flags, baseline = ops.token_credit(
        given, base, corrupted, ablated, role_ids, mask, signs, layout, credit.rule, backend
    )
    zero = mask.new_zeros((), dtype=torch.long)
    lost = zero if call.validates else _read_and(is_not_scored, credit, role_ids, mask, streams).sum()
    infinite = _read_and(torch.isinf, credit, role_ids, mask, streams).sum() if credit.reads_kl else zero
    result = Credit(found, weights, flags, baseline, lost, infinite)
    if credit.strict_finite:
        _refuse_no_value(call, (result.flags & NO_VALUE) != 0)
    return result


def _refuse_no_value(call: checks.Call, no_value: Tensor) -> None:
    """Refuse contrasts without a value; a sync."""
    n = int(no_value.sum())
    if n:
        fix = "look at the log-probs of the streams, or set strict_finite=False to count them as 0"
        call.fail(NonFiniteError, "corrupted_logps or ablated_logps", f"{n} contrasts without a value", "none", fix)


def _read_and(
    kind: Callable[[Tensor], Tensor], credit: CreditConfig, role_ids: Tensor, mask: Tensor, streams: Streams
) -> Tensor:
    """Tell the cells that `credit` reads and that are of a kind."""
    found = torch.zeros_like(mask)
    for name, x in zip(STREAMS, streams, strict=True):
        if x is not None:
            found = found | (credit.rows(name, role_ids, mask) & kind(x))
    return found


def compute_dtype(x: Tensor | None, backend: str = "torch") -> torch.dtype:
    """Return float64 for float64 tensors on the torch backend, float32 for everything else."""
    return torch.float64 if backend == "torch" and x is not None and x.dtype == torch.float64 else torch.float32


def as_dtype(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Convert a tensor that may be None."""
    return None if x is None else x.to(dtype)
