"""The ops of the vocabulary head, registered with `torch.library`; `linear_head.py` runs them.

    linear_head_logps       hidden, head -> logps, row_max, log_sum, entropy     differentiable in hidden, weight, bias
    linear_head_pairs       hidden, hidden of a contrast, head -> kl, logps      not differentiable
    linear_head_gradient    upstream gradients -> dhidden, dweight, dbias
    linear_head_training    hidden, head, terms of the loss -> anchor, logps, entropy, dhidden, dweight, dbias

The gradients of the last are those of the loss; backward multiplies them by the upstream gradient of `anchor`, a zero
that the loss is added to. Active rows are found on the device, so each op waits for it once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from srpo_kernels import backends, linear_head, ops, rules
from srpo_kernels.loss_terms import LossTerms


@torch.library.custom_op("srpo::linear_head_logps", mutates_args=())
def _linear_head_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_mask: Tensor,
    temperature: float,
    return_entropy: bool,
    workspace_bytes: int,
    process_group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    head = linear_head.Head(weight, bias, temperature, workspace_bytes, process_group, backend)
    return linear_head.score(head, hidden, ids, row_mask, return_entropy)


@_linear_head_logps.register_fake
def _(hidden, weight, bias, ids, row_mask, temperature, return_entropy, workspace_bytes, process_group, backend):
    dtype = backends.statistics_dtype(hidden.dtype, backend)
    shapes = [ids.shape] * 3 + [ids.shape if return_entropy else (0,)]
    return tuple(ids.new_empty(shape, dtype=dtype) for shape in shapes)


def _save_logps(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, ids, row_mask, temperature, return_entropy, workspace_bytes, process_group, backend = inputs
    _, row_max, log_sum, entropy = output
    ctx.save_for_backward(hidden, weight, bias, ids, row_mask, row_max, log_sum, entropy if return_entropy else None)
    ctx.settings = temperature, workspace_bytes, process_group, backend
    ctx.set_materialize_grads(False)


def _logps_backward(ctx: Any, grad_logps: Tensor | None, _max: Any, _sum: Any, grad_entropy: Tensor | None):
    hidden, weight, bias, ids, row_mask, row_max, log_sum, entropy = ctx.saved_tensors
    temperature, workspace_bytes, process_group, backend = ctx.settings
    upstream = (grad_logps, None if entropy is None else grad_entropy)
    g, h = (None if x is None else torch.where(row_mask, x, 0.0) for x in upstream)
    wants = list(ctx.needs_input_grad[:3])
    grads = torch.ops.srpo.linear_head_gradient(
        hidden, weight, bias, ids, row_max, log_sum, None if h is None else entropy,
        torch.zeros_like(log_sum) if g is None else g, h,
        temperature, wants, workspace_bytes, process_group, backend,
    )  # fmt: skip
    return *(x if wanted else None for x, wanted in zip(grads, wants, strict=True)), *[None] * 7


_linear_head_logps.register_autograd(_logps_backward, setup_context=_save_logps)


@torch.library.custom_op("srpo::linear_head_pairs", mutates_args=())
def _linear_head_pairs(
    hidden: Tensor,
    against: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_mask: Tensor,
    temperature: float,
    workspace_bytes: int,
    process_group: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    head = linear_head.Head(weight, bias, temperature, workspace_bytes, process_group, backend)
    return linear_head.pairs(head, hidden, against, ids, row_mask)


@_linear_head_pairs.register_fake
def _(hidden, against, weight, bias, ids, row_mask, temperature, workspace_bytes, process_group, backend):
    dtype = backends.statistics_dtype(hidden.dtype, backend)
    return tuple(ids.new_empty(ids.shape, dtype=dtype) for _ in range(2))


@torch.library.custom_op("srpo::linear_head_gradient", mutates_args=())
def _linear_head_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
    wants: list[bool],
    workspace_bytes: int,
    process_group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    head = linear_head.Head(weight, bias, temperature, workspace_bytes, process_group, backend)
    d = linear_head.gradient(head, hidden, ids, row_max, log_sum, entropy, grad_logps, grad_entropy, tuple(wants))
    return d.hidden, d.weight, d.bias


@_linear_head_gradient.register_fake
def _(
    hidden, weight, bias, ids, row_max, log_sum, entropy, grad_logps, grad_entropy, temperature, wants,
    workspace_bytes, process_group, backend,
):  # fmt: skip
    return _fake_gradients(hidden, weight, bias, wants)


def _fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, wants: list[bool]) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(hidden) if wants[0] else hidden.new_empty(0),
        weight.new_empty(weight.shape if wants[1] else (0,)),
        weight.new_empty(bias.shape if wants[2] and bias is not None else (0,)),
    )


@torch.library.custom_op("srpo::linear_head_training", mutates_args=())
def _linear_head_training(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_mask: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    importance_sampling_ratio: Tensor | None,
    advantages: Tensor,
    weights: Tensor | None,
    mask: Tensor,
    scale: Tensor,
    role_ids: Tensor | None,
    corrupted: Tensor | None,
    ablated: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor | None,
    entropy_slopes: Tensor | None,
    temperature: float,
    wants: list[bool],
    workspace_bytes: int,
    process_group: str,
    loss_rule: str,
    credit_rule: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    vectors = (
        old_logps, ref_logps, importance_sampling_ratio, advantages, weights, mask, scale, role_ids, corrupted, ablated,
        cu_seqlens, kept, entropy_slopes,
    )  # fmt: skip
    settings = (temperature, wants, workspace_bytes, process_group, loss_rule, credit_rule, backend)
    return _train(hidden, weight, bias, ids, row_mask, vectors, None, *settings)


def _train(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_mask: Tensor,
    vectors: tuple[Any, ...],
    token_loss: Callable[[Tensor], Tensor] | None,
    temperature: float,
    wants: list[bool],
    workspace_bytes: int,
    process_group: str,
    loss_rule: str,
    credit_rule: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = linear_head.Head(weight, bias, temperature, workspace_bytes, process_group, backend)
    of_loss, of_credit = rules.loss_rule(loss_rule), rules.credit_rule(credit_rule)
    terms = LossTerms(*vectors, token_loss=token_loss, loss=of_loss, credit=of_credit, backend=backend)
    logps, entropy, d, unit = linear_head.train(head, hidden, ids, row_mask, terms, tuple(wants))
    return logps.new_zeros(()), logps, entropy, d.hidden, d.weight, d.bias, unit


@_linear_head_training.register_fake
def _(hidden, weight, bias, ids, row_mask, *arguments):
    wants, backend = arguments[14], arguments[-1]
    dtype = backends.statistics_dtype(hidden.dtype, backend)
    vectors = (ids.new_empty(shape, dtype=dtype) for shape in ((), ids.shape, ids.shape))
    unit = ids.new_empty((), dtype=torch.float32)
    return *vectors, *_fake_gradients(hidden, weight, bias, wants), unit


def _save_training(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*output[3:])
    ctx.wants, ctx.n_inputs = inputs[19], len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _training_backward(ctx: Any, grad_anchor: Tensor | None, *_: Any):
    return *_scaled_gradients(ctx, grad_anchor), *[None] * (ctx.n_inputs - 3)


def _scaled_gradients(ctx: Any, grad_anchor: Tensor | None) -> list[Tensor | None]:
    """Return the gradients that forward formed, times what arrives at the anchor."""
    ops.refuse_create_graph("role_weighted_grpo_loss_from_hidden")
    *saved, unit = ctx.saved_tensors
    gradients = [x if wanted else None for x, wanted in zip(saved, ctx.wants, strict=True)]
    if grad_anchor is None:
        return [None] * 3
    factor = grad_anchor / unit
    if ops.saved_tensors_are_needed_again():
        return [None if x is None else x * factor for x in gradients]
    return [None if x is None else x.mul_(factor) for x in gradients]  # a head's gradient is large: where it is


class _OwnTraining(torch.autograd.Function):
    """`linear_head_training` with a loss of the caller's own: an op's schema takes no function, nor its autograd."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, wants: list[bool], run: Any) -> Any:
        anchor, logps, entropy, *gradients = run(
            hidden.detach(), weight.detach(), None if bias is None else bias.detach()
        )
        ctx.save_for_backward(*gradients)
        ctx.wants = wants
        ctx.mark_non_differentiable(logps, entropy)
        ctx.set_materialize_grads(False)
        return anchor, logps, entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        return *_scaled_gradients(ctx, upstream[0]), None, None


_linear_head_training.register_autograd(_training_backward, setup_context=_save_training)


def linear_head_pairs(
    hidden: Tensor,
    against: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_mask: Tensor,
    *,
    temperature: float,
    workspace_bytes: int,
    process_group: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return `kl`, the divergence of the rows of `against` from those of `hidden`, and their `logps`, all `[B, T]`.

    Not differentiable. 4NVH for the rows of the mask; 0 elsewhere.
    """
    return torch.ops.srpo.linear_head_pairs(
        hidden.detach(), against.detach(), weight.detach(), None if bias is None else bias.detach(), ids, row_mask,
        temperature, workspace_bytes, process_group, backend,
    )  # fmt: skip


def linear_head_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_mask: Tensor,
    *,
    temperature: float,
    return_entropy: bool,
    workspace_bytes: int,
    process_group: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return `logps` and `entropy` `[B, T]` (empty unless asked for), differentiable in hidden, weight and bias.

    Args:
        hidden: `[B, T or T+1, H]`, any strides.
        weight, bias: `[V, H]` and `[V]`, this rank's shard of the vocabulary with `process_group`.
        ids: `[B, T]` int64.
        row_mask: `[B, T]` bool: the rows that are multiplied.
    """
    logps, _, _, entropy = torch.ops.srpo.linear_head_logps(
        hidden, weight, bias, ids, row_mask, float(temperature), return_entropy, workspace_bytes, process_group,
        backend,
    )  # fmt: skip
    return logps, entropy


def linear_head_training(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_mask: Tensor,
    *vectors: Any,
    token_loss: Callable[[Tensor], Tensor] | None = None,
    temperature: float,
    workspace_bytes: int,
    process_group: str,
    loss_rule: str,
    credit_rule: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `anchor`, a differentiable zero, and `logps` and `entropy` `[B, T]` without gradient.

    The gradient of `anchor` is that of the loss; it is computed here where autograd will ask for it.
    """
    ids, row_mask = ids.contiguous(), row_mask.contiguous()
    own = tuple(None if x is None else x.detach().contiguous() for x in vectors)
    learns = torch.is_grad_enabled()
    wants = [learns and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    settings = (temperature, wants, workspace_bytes, process_group, loss_rule, credit_rule, backend)
    if token_loss is not None:

        def run(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
            return _train(hidden, weight, bias, ids, row_mask, own, token_loss, *settings)

        return _OwnTraining.apply(hidden, weight, bias, wants, run)
    anchor, logps, entropy, *_ = torch.ops.srpo.linear_head_training(
        hidden, weight, bias, ids, row_mask, *own, *settings
    )
    return anchor, logps, entropy
