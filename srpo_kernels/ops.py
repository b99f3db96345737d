"""The ops of `srpo`, registered with `torch.library`: schemas, fake kernels, autograd, declared mutation.

    row_statistics     logits -> logps, row_max, log_sum, entropy, kl      differentiable in the first stream of logits
    logits_gradient    coefficients -> dlogits                             `logits_gradient_` overwrites its logits
    row_training       logits, weights, advantages -> anchor, logps, entropy, dlogits    behind `launch.TRAINS_ROWS`
    token_credit       contrasts -> contrast, weights, flags, baseline     never differentiable
    role_contrast      log-probs -> contrast, where it has no value        the first part of it
    policy_loss        logps, weights, advantages -> loss, metric sums     differentiable in logps

Each takes the backend as an argument; `backends.py` runs it.
"""

from typing import Any

import torch
from torch import Tensor

from srpo_kernels import backends, row_chunks, rules
from srpo_kernels.layout import Layout


@torch.library.custom_op("srpo::row_statistics", mutates_args=())
def _row_statistics(
    logits: Tensor,
    corrupted_logits: Tensor | None,
    ablated_logits: Tensor | None,
    ids: Tensor,
    row_mask: Tensor,
    temperature: float,
    return_entropy: bool,
    return_kl: bool,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    streams = [x for x in (logits, corrupted_logits, ablated_logits) if x is not None]
    if return_kl:
        return backends.row_pairs(streams, ids, row_mask, temperature, backend)
    statistics = backends.row_statistics(streams, ids, row_mask, temperature, return_entropy, backend)
    return *statistics, statistics[0].new_empty(0)


@_row_statistics.register_fake
def _(
    logits, corrupted_logits, ablated_logits, ids, row_mask, temperature, return_entropy, return_kl, inplace_backward,
    backend,
):  # fmt: skip
    dtype = backends.statistics_dtype(logits.dtype, backend)
    S, rows = row_mask.shape[0], tuple(ids.shape)
    statistics = (1 if return_kl else S, *rows)
    of_clean, of_contrasts = rows if return_entropy else (0,), (S - 1, *rows) if return_kl else (0,)
    shapes = ((S, *rows), statistics, statistics, of_clean, of_contrasts)
    return tuple(row_mask.new_empty(shape, dtype=dtype) for shape in shapes)


def _save_row_statistics(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, _, _, ids, row_mask, temperature, return_entropy, _, inplace_backward, backend = inputs
    _, row_max, log_sum, entropy, _ = output
    ctx.save_for_backward(logits, ids, row_mask, row_max, log_sum, entropy)
    ctx.settings = temperature, return_entropy, inplace_backward, backend
    ctx.set_materialize_grads(False)


def _row_statistics_backward(
    ctx: Any, grad_logps: Tensor | None, _max: Any, _sum: Any, grad_entropy: Tensor | None, _kl: Any
):  # fmt: skip
    logits, ids, row_mask, row_max, log_sum, entropy = ctx.saved_tensors
    temperature, return_entropy, inplace_backward, backend = ctx.settings
    mask = row_mask[0]

    def upstream(grad: Tensor | None) -> Tensor:
        return torch.where(mask, grad, 0.0).contiguous() if grad is not None else torch.zeros_like(row_max[0])

    g = upstream(None if grad_logps is None else grad_logps[0])
    h = upstream(grad_entropy) if return_entropy and grad_entropy is not None else None
    arguments = (ids, row_max[0], log_sum[0], None if h is None else entropy, g, h, temperature, backend)
    if inplace_backward:
        torch.ops.srpo.logits_gradient_(logits, *arguments)
        grad = logits.detach()
    else:
        grad = torch.ops.srpo.logits_gradient(logits, *arguments)
    return grad, *[None] * 9


_row_statistics.register_autograd(_row_statistics_backward, setup_context=_save_row_statistics)


@torch.library.custom_op("srpo::logits_gradient", mutates_args=())
def _logits_gradient(
    logits: Tensor,
    ids: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
    backend: str,
) -> Tensor:
    out = row_chunks.in_huge_pages(_empty_like_rows(logits))
    backends.logits_gradient(
        out, logits, ids, row_max, log_sum, entropy, grad_logps, grad_entropy, temperature, backend=backend
    )
    return out


@_logits_gradient.register_fake
def _(logits, ids, row_max, log_sum, entropy, grad_logps, grad_entropy, temperature, backend):
    return _empty_like_rows(logits)


def _empty_like_rows(logits: Tensor) -> Tensor:
    """Return memory for a gradient; rows cut from slightly wider ones keep their stride: wide stores need it."""
    B, L, V = logits.shape
    width = logits.stride(1)
    if logits.stride(2) == 1 and V < width <= V + V // 8:
        return logits.new_empty(B, L, width)[..., :V]
    return torch.empty_like(logits)


@torch.library.custom_op("srpo::logits_gradient_", mutates_args={"logits"})
def _logits_gradient_inplace(
    logits: Tensor,
    ids: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
    backend: str,
) -> None:
    backends.logits_gradient(
        logits, logits, ids, row_max, log_sum, entropy, grad_logps, grad_entropy, temperature, backend=backend
    )


@_logits_gradient_inplace.register_fake
def _(logits, ids, row_max, log_sum, entropy, grad_logps, grad_entropy, temperature, backend):
    return None


@torch.library.custom_op("srpo::row_training", mutates_args=())
def _row_training(
    logits: Tensor,
    ids: Tensor,
    row_mask: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    importance_sampling_ratio: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    scale: Tensor,
    temperature: float,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradient = _empty_aligned_rows(logits)
    logps, entropy = backends.row_training(
        gradient, logits, ids, row_mask, old_logps, ref_logps, importance_sampling_ratio, advantages, weights, scale,
        temperature, rules.loss_rule(rule),
    )  # fmt: skip
    return logps.new_zeros(()), logps, entropy, gradient


@_row_training.register_fake
def _(logits, ids, *arguments):
    vectors = (ids.new_empty(shape, dtype=torch.float32) for shape in ((), ids.shape, ids.shape))
    return *vectors, _empty_aligned_rows(logits)


def _empty_aligned_rows(logits: Tensor) -> Tensor:
    """Return memory for a gradient whose rows start at multiples of 16 columns, as those of the logits do."""
    B, L, V = logits.shape
    width = logits.stride(1)
    return logits.new_empty(B, L, width if V <= width <= V + V // 8 else -(-V // 16) * 16)[..., :V]


def _save_row_training(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(output[3])
    ctx.n_inputs = len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _row_training_backward(ctx: Any, grad_anchor: Tensor | None, *_: Any):
    refuse_create_graph("role_weighted_grpo_loss")
    (gradient,) = ctx.saved_tensors
    if grad_anchor is None:
        gradient = None
    elif saved_tensors_are_needed_again():
        gradient = torch.ops.srpo.scaled_gradient(gradient, grad_anchor)
    else:
        torch.ops.srpo.scale_gradient_(gradient, grad_anchor)
    return gradient, *[None] * (ctx.n_inputs - 1)


def refuse_create_graph(function: str) -> None:
    """Refuse to differentiate gradients that were formed in forward."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{function}(): create_graph got True, expected False: gradients are formed in "
            "forward and are not differentiable; take role_weighted_grpo_loss_from_logps of selected log-probs."
        )


def saved_tensors_are_needed_again() -> bool:
    """Say whether backward must leave what forward saved as it is."""
    if torch.compiler.is_compiling():
        return True
    autograd: Any = getattr(torch._C, "_autograd", None)
    keeps_graph = getattr(autograd, "_get_current_graph_task_keep_graph", None)
    return keeps_graph is None or keeps_graph()


_row_training.register_autograd(_row_training_backward, setup_context=_save_row_training)


@torch.library.custom_op("srpo::scaled_gradient", mutates_args=())
def _scaled_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    out = torch.empty_strided(gradient.shape, gradient.stride(), dtype=gradient.dtype, device=gradient.device)
    backends.scale_gradient(out, gradient, factor)
    return out


@_scaled_gradient.register_fake
def _(gradient, factor):
    return torch.empty_strided(gradient.shape, gradient.stride(), dtype=gradient.dtype, device=gradient.device)


@torch.library.custom_op("srpo::scale_gradient_", mutates_args={"gradient"})
def _scale_gradient_inplace(gradient: Tensor, factor: Tensor) -> None:
    backends.scale_gradient(gradient, gradient, factor)


@_scale_gradient_inplace.register_fake
def _(gradient, factor):
    return None


@torch.library.custom_op("srpo::token_credit", mutates_args=())
def _token_credit(
    contrast: Tensor | None,
    base: Tensor | None,
    corrupted: Tensor | None,
    ablated: Tensor | None,
    role_ids: Tensor,
    mask: Tensor,
    advantages: Tensor | None,
    cu_seqlens: Tensor | None,
    n_trajectories: int,
    rule: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (contrast, base, corrupted, ablated, role_ids, mask, advantages)
    return backends.token_credit(*tensors, cu_seqlens, n_trajectories, rules.credit_rule(rule), backend)


@_token_credit.register_fake
def _(contrast, base, corrupted, ablated, role_ids, mask, advantages, cu_seqlens, n_trajectories, rule, backend):
    dtype = (base if contrast is None else contrast).dtype
    per_token = [mask.new_empty(mask.shape, dtype=dtype) for _ in range(2)]
    flags = mask.new_empty(mask.shape, dtype=torch.uint8)
    return *per_token, flags, mask.new_empty(n_trajectories, dtype=dtype)


@torch.library.custom_op("srpo::role_contrast", mutates_args=())
def _role_contrast(
    base: Tensor,
    corrupted: Tensor | None,
    ablated: Tensor | None,
    role_ids: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    n_trajectories: int,
    rule: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tensors = (base, corrupted, ablated, role_ids, mask, cu_seqlens)
    return backends.role_contrast(*tensors, n_trajectories, rules.credit_rule(rule), backend)


@_role_contrast.register_fake
def _(base, corrupted, ablated, role_ids, mask, cu_seqlens, n_trajectories, rule, backend):
    return mask.new_empty(mask.shape, dtype=base.dtype), torch.empty_like(mask)


@torch.library.custom_op("srpo::policy_loss", mutates_args=())
def _policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    importance_sampling_ratio: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    mask: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor | None,
    rule: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (logps, old_logps, ref_logps, importance_sampling_ratio, advantages, weights, mask, scale)
    return backends.policy_loss(*tensors, cu_seqlens, rules.loss_rule(rule), backend)


@_policy_loss.register_fake
def _(logps, old_logps, ref_logps, ratio, advantages, weights, mask, scale, cu_seqlens, rule, backend):
    n_trajectories = scale.shape[0]
    shapes = ((n_trajectories,), (n_trajectories, 3), tuple(logps.shape))
    return tuple(logps.new_empty(shape) for shape in shapes)


def _save_policy_loss(ctx: Any, inputs: tuple, output: tuple) -> None:
    mask, cu_seqlens = inputs[6], inputs[8]
    ctx.save_for_backward(output[2], cu_seqlens)
    ctx.shape = mask.shape
    ctx.n_inputs = len(inputs)


def _policy_loss_backward(ctx: Any, grad_loss: Tensor, _sums: Any, _coefficient: Any):
    coefficient, cu_seqlens = ctx.saved_tensors
    layout = Layout(tuple(ctx.shape), cu_seqlens)
    return coefficient * layout.spread(grad_loss), *[None] * (ctx.n_inputs - 1)


_policy_loss.register_autograd(_policy_loss_backward, setup_context=_save_policy_loss)


def row_statistics(
    logits: Tensor,
    ids: Tensor,
    row_mask: Tensor,
    *,
    corrupted_logits: Tensor | None = None,
    ablated_logits: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    return_kl: bool = False,
    inplace_backward: bool = False,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return `logps`, `row_max`, `log_sum` `[S, B, T]` and `entropy` `[B, T]` of up to three streams of logits.

    With `return_kl`, which takes `return_entropy` too, also `kl` `[S - 1, B, T]`, the divergence of each stream from
    the first on its rows; `row_max` and `log_sum` are then `[1, B, T]`.

    Args:
        logits: `[B, T or T+1, V]`, any strides. The streams after the first carry no gradient.
        ids: `[B, T]` int64, contiguous.
        row_mask: `[S, B, T]` bool, contiguous: the rows of each stream that are needed. With `return_kl` those of the
            streams after the first are disjoint, and rows of the first.

    Gradient: from `logps[0]` and `entropy` to `logits`. `row_max`, `log_sum` and `kl` carry none.
    """
    streams = (logits, corrupted_logits, ablated_logits)
    return torch.ops.srpo.row_statistics(
        *streams, ids, row_mask, float(temperature), return_entropy, return_kl, inplace_backward, backend
    )


def row_training(
    logits: Tensor,
    ids: Tensor,
    row_mask: Tensor,
    vectors: tuple[Tensor | None, ...],
    scale: Tensor,
    layout: Layout,
    temperature: float,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `anchor`, a differentiable zero whose gradient is that of the loss, and `logps` and `entropy` `[B, T]`.

    Args:
        logits: `[B, T or T+1, V]`, any strides.
        ids, row_mask: `[B, T]`, contiguous.
        vectors: `old_logps`, `ref_logps`, `importance_sampling_ratio`, `advantages` and `weights` in the shape of the
            tokens.
        scale: `[R]` factor of each trajectory's loss.
    """
    flat = (None if x is None else x.detach().contiguous() for x in (*vectors, layout.spread(scale)))
    anchor, logps, entropy, _ = torch.ops.srpo.row_training(logits, ids, row_mask, *flat, float(temperature), rule)
    return anchor, logps, entropy


def token_credit(
    contrast: Tensor | None,
    base: Tensor | None,
    corrupted: Tensor | None,
    ablated: Tensor | None,
    role_ids: Tensor,
    mask: Tensor,
    advantages: Tensor | None,
    layout: Layout,
    rule: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `contrast`, `weights`, `flags` in the shape of the tokens and `baseline` `[R]`, all detached."""
    tensors = (contrast, base, corrupted, ablated, role_ids, mask, advantages)
    flat = (None if x is None else x.detach().contiguous() for x in tensors)
    return torch.ops.srpo.token_credit(*flat, layout.cu_seqlens, layout.n_trajectories, rule, backend)


def role_contrast(
    base: Tensor,
    corrupted: Tensor | None,
    ablated: Tensor | None,
    role_ids: Tensor,
    mask: Tensor,
    layout: Layout,
    rule: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the contrast in the shape of the tokens, detached, and where it has no value."""
    flat = (None if x is None else x.detach().contiguous() for x in (base, corrupted, ablated, role_ids, mask))
    return torch.ops.srpo.role_contrast(*flat, layout.cu_seqlens, layout.n_trajectories, rule, backend)


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    importance_sampling_ratio: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    mask: Tensor,
    scale: Tensor,
    layout: Layout,
    rule: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the loss `[R]` of each trajectory, differentiable in `logps`, and metric sums `[R, 3]`."""
    constants = (old_logps, ref_logps, importance_sampling_ratio, advantages, weights, mask, scale)
    flat = (None if x is None else x.detach().contiguous() for x in constants)
    loss, sums, _ = torch.ops.srpo.policy_loss(logps.contiguous(), *flat, layout.cu_seqlens, rule, backend)
    return loss, sums
