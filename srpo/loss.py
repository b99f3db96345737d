"""The loss: clipped GRPO with role-aware token weights, from logits or from log-probs."""

import functools
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from srpo import checks
from srpo.config import CreditConfig, LossConfig
from srpo.errors import ConfigError
from srpo.request import Request, TokenLoss, check_request
from srpo.stage import LossOutput, finish, loss_terms, run, weigh
from srpo.streams import Streams
from srpo_kernels import backends, ops
from srpo_kernels.layout import Layout
from srpo_kernels.rules import couples_tokens


class SelectedLogps(NamedTuple):
    """Log-probs `[B, T]` of the selected ids and the entropy `[B, T]` of their distributions, both differentiable."""

    logps: Tensor
    entropy: Tensor


def role_weighted_grpo_loss(
    logits: Tensor,
    completion_ids: Tensor,
    advantages: Tensor,
    *,
    role_ids: Tensor | None = None,
    completion_mask: Tensor | None = None,
    corrupted_logps: Tensor | None = None,
    ablated_logps: Tensor | None = None,
    corrupted_logits: Tensor | None = None,
    ablated_logits: Tensor | None = None,
    corrupted_kl: Tensor | None = None,
    ablated_kl: Tensor | None = None,
    weights: Tensor | None = None,
    contrast: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
    token_loss: TokenLoss | None = None,
    credit: CreditConfig = CreditConfig(),  # noqa: B008 - frozen
    loss: LossConfig = LossConfig(),  # noqa: B008 - frozen
    inplace_backward: bool = False,
    validate_values: bool | None = None,
    backend: str = "auto",
) -> LossOutput:
    """Compute the role-weighted GRPO loss from logits.

    A_it = A_i * w_it,  rho = exp(logps - old_logps)
    l_it = -min(min(rho, delta) * A_it, clip(rho, 1 - epsilon_low, 1 + epsilon_high) * A_it) + beta * KL

    Args:
        logits: `[B, T, V]`, or `[B, T + 1, V]` whose last position is ignored (what a model returns: no slice, no
            second gradient buffer). fp32, bf16, fp16 or fp64, any strides. Position t predicts token t.
        completion_ids: `[B, T]` integers; any value, -100 included, on masked tokens.
        advantages: `[B]` or `[B, T]`.
        role_ids: `[B, T]` integers, 0 other, 1 perception, 2 reasoning. None: no credit stage, exact GRPO.
        completion_mask: `[B, T]` 0/1; None means all valid. Masked cells are never read.
        corrupted_logps: `[B, T]` nats, scored with the corrupted image; read on perception tokens.
        ablated_logps: `[B, T]` nats, scored with the perception span hidden; read on reasoning tokens.
        corrupted_logits: as `logits`, in place of `corrupted_logps`; only rows of the role are read, no gradient.
        ablated_logits: as `logits`, in place of `ablated_logps`.
        corrupted_kl: `[B, T]` nats, what `contrast_kind="kl"` reads in place of `corrupted_logps` unless it has
            `corrupted_logits` to compare with `logits` here: each row of both is then read once, together.
        ablated_kl: as `corrupted_kl`, of `ablated_logps`.
        weights: `[B, T]`, at least 0; replace the credit stage.
        contrast: `[B, T]` nats, in place of the streams: a contrast of your own goes through the credit stage, read on
            both roles; NaN has no value.
        old_logps: `[B, T]` nats of the policy that made the rollout; None: on-policy, the ratio is exactly 1.
        ref_logps: `[B, T]` nats of the reference model; needed when `loss.beta` is not 0.
        importance_sampling_ratio: `[B, T]` or `[B, 1]`, multiplies the policy term; NaN counts as 1. For `"vespo"` it
            enters the weight of the trajectory, one of `[B, 1]` once.
        cu_seqlens: `[R + 1]` offsets of packed trajectories: tensors are `[N, ...]` instead of `[B, T, ...]`.
        num_items_in_batch: normaliser of `"dapo"`, `"cispo"` and `"vespo"`; None: valid tokens of this call.
        token_loss: a loss of your own: a function of log-probs `[B, T]` (0 on masked tokens) that returns the loss of
            each token, and that autograd differentiates on `[B, T]` alone. Token weights and
            `importance_sampling_ratio` multiply it, `beta` adds the KL term, `loss_type` reduces it; it closes over
            what else it needs, such as advantages and old log-probs.
        credit: settings of the credit stage.
        loss: settings of the loss.
        inplace_backward: write the gradient into the memory of `logits`. Their values are gone after backward, a
            second backward raises, and `logits` must not be a leaf.
        validate_values: None checks values of CPU tensors, True of all (a device sync), False of none.
            `SRPO_VALIDATE=1` in the environment turns None into True.
        backend: `"auto"` (kernels on a GPU, PyTorch for CPU tensors and fp64), `"triton"` or `"torch"`.

    Returns: LossOutput.

    Gradient: from `loss` to `logits`. Weights, contrasts and all other inputs are constants.

    Memory: the gradient of `logits` (nothing with `inplace_backward`), and vectors of `[B, T]`. Forward reads each
        needed row of each stream once; the CPU path adds two chunks of rows, about 4 MiB a thread.

    Raises: ShapeError, DtypeError, DeviceError, ConfigError, RoleParseError, NonFiniteError, KernelUnavailableError.

    Source: Jiang & Zou, arXiv 2605.07274; GRPO, arXiv 2402.03300; loss types as TRL's `GRPOTrainer`.

    Example:
        >>> logits = torch.randn(2, 7, 100, requires_grad=True)  # [B, T + 1, V]
        >>> ids = torch.randint(100, (2, 6))
        >>> old_logps = selected_logps(logits.detach(), ids)
        >>> out = role_weighted_grpo_loss(
        ...     logits,
        ...     ids,
        ...     torch.tensor([1.0, -1.0]),
        ...     role_ids=torch.tensor([[1, 1, 1, 2, 2, 2]] * 2),
        ...     old_logps=old_logps,
        ...     corrupted_logps=old_logps - torch.rand(2, 6),
        ...     ablated_logps=old_logps - torch.rand(2, 6),
        ... )
        >>> out.loss.backward()
        >>> bool((out.weights.mean(dim=1) - 1).abs().max() < 1e-6)
        True
    """
    call = checks.Call("role_weighted_grpo_loss", logits, "logits", validate_values)
    checks.configs(call, credit, loss)
    chosen = checks.backend_of(call, backend, logits.dtype)
    check_logits = functools.partial(checks.logits_of, call, "logits", logits)
    layout, mask, ids = checks.selection(call, completion_ids, completion_mask, cu_seqlens, check_logits)
    request = check_request(
        call, layout, mask, credit, loss, chosen,
        advantages=advantages, role_ids=role_ids, weights=weights, contrast=contrast,
        streams=Streams(corrupted_logps, ablated_logps), old_logps=old_logps, ref_logps=ref_logps,
        importance_sampling_ratio=importance_sampling_ratio, num_items_in_batch=num_items_in_batch,
        token_loss=token_loss, divergences=Streams(corrupted_kl, ablated_kl),
        live=Streams(corrupted_logits, ablated_logits),
        check_live=lambda name, x: checks.logits_of(call, name, x, layout, logits.shape[-1]),
    )  # fmt: skip
    if inplace_backward:
        _check_inplace(call, logits)

    learns = torch.is_grad_enabled() and logits.requires_grad and not inplace_backward
    whole = couples_tokens(loss) or token_loss is not None
    of_rows = not request.scores and request.weighs_first and not whole and not _reads_entropy(loss)
    if learns and of_rows and backends.trains_rows(logits, mask.numel(), chosen):
        return _train_rows(request, logits, ids)

    live = request.scores
    row_masks = [mask, *(credit.rows(name, request.role_ids, mask) for name in live)]
    padded = layout.cu_seqlens is None
    streams = {name: x.detach() if padded else x.detach()[None] for name, x in live.items()}
    logps, _, _, entropy, kl = ops.row_statistics(
        logits if padded else logits[None],
        ids if padded else ids[None],
        torch.stack([m if padded else m[None] for m in row_masks]),
        corrupted_logits=streams.get("corrupted"),
        ablated_logits=streams.get("ablated"),
        temperature=loss.temperature,
        return_entropy=True,
        return_kl=credit.reads_kl and bool(live),
        inplace_backward=inplace_backward,
        backend=chosen,
    )
    if not padded:
        logps, entropy, kl = logps[:, 0], entropy[0], kl[:, 0] if kl.numel() else kl
    read = kl if credit.reads_kl else logps[1:]
    scored = request.streams._replace(**{name: read[k].detach() for k, name in enumerate(live)})
    return run(request, logps[0], entropy if loss.entropy_coef else entropy.detach(), scored)


def _train_rows(request: Request, logits: Tensor, ids: Tensor) -> LossOutput:
    """Compute the loss and, while the logits are at hand, its gradient: weights do not depend on them."""
    layout, mask, loss = request.layout, request.mask, request.loss
    nothing = torch.zeros(layout.shape, dtype=torch.float32, device=logits.device)
    weighed = weigh(request, nothing, request.streams)
    terms = loss_terms(request, weighed.weights)
    batch = (logits, ids, mask) if layout.cu_seqlens is None else (logits[None], ids[None], mask[None])
    anchor, logps, entropy = ops.row_training(*batch, terms[:5], terms.scale, layout, loss.temperature, loss.rule)
    out = finish(request, logps.view(layout.shape), entropy.view(layout.shape), weighed)
    return LossOutput(out.loss + anchor, out.logps, out.weights, out.entropy, out.metrics)


def role_weighted_grpo_loss_from_logps(
    logps: Tensor,
    advantages: Tensor,
    *,
    role_ids: Tensor | None = None,
    completion_mask: Tensor | None = None,
    corrupted_logps: Tensor | None = None,
    ablated_logps: Tensor | None = None,
    corrupted_kl: Tensor | None = None,
    ablated_kl: Tensor | None = None,
    weights: Tensor | None = None,
    contrast: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
    token_loss: TokenLoss | None = None,
    credit: CreditConfig = CreditConfig(),  # noqa: B008 - frozen
    loss: LossConfig = LossConfig(),  # noqa: B008 - frozen
    validate_values: bool | None = None,
    backend: str = "auto",
) -> LossOutput:
    """Compute the role-weighted GRPO loss from log-probs that a trainer already has.

    The formula is that of `role_weighted_grpo_loss`; `loss.temperature` is not applied again.

    Args:
        logps: `[B, T]` nats of the completion tokens under the current policy, with the temperature applied.
        advantages: `[B]` or `[B, T]`.
        role_ids, completion_mask, corrupted_logps, ablated_logps, corrupted_kl, ablated_kl, weights, contrast,
            old_logps, ref_logps, importance_sampling_ratio, cu_seqlens, num_items_in_batch, token_loss, credit,
            loss, validate_values, backend: as in `role_weighted_grpo_loss`.

    Returns: LossOutput, with `entropy=None`.

    Gradient: from `loss` to `logps`.

    Memory: a few `[B, T]` tensors.

    Raises: ShapeError, DtypeError, DeviceError, ConfigError, RoleParseError, NonFiniteError, KernelUnavailableError.

    Source: Jiang & Zou, arXiv 2605.07274; GRPO, arXiv 2402.03300; loss types as TRL's `GRPOTrainer`.

    Example:
        >>> logps = -torch.rand(2, 6).requires_grad_()
        >>> out = role_weighted_grpo_loss_from_logps(
        ...     logps, torch.tensor([1.0, -1.0]), weights=torch.full((2, 6), 1.1), old_logps=logps.detach()
        ... )
        >>> out.loss.backward()
    """
    call = checks.Call("role_weighted_grpo_loss_from_logps", logps, "logps", validate_values)
    checks.configs(call, credit, loss)
    chosen = checks.backend_of(call, backend, logps.dtype)
    if _reads_entropy(loss):
        name = "entropy_coef" if loss.entropy_coef else "top_entropy_quantile"
        got, fix = f"{getattr(loss, name)} without logits", "call role_weighted_grpo_loss or its _from_hidden"
        call.fail(ConfigError, name, got, "a loss from logits or hidden states, which have an entropy", fix)
    layout = checks.layout_of(call, "logps", logps, cu_seqlens)
    call.tensor("logps", logps, [layout.shape], checks.tokens(layout), "float")
    mask = checks.mask_of(call, completion_mask, layout)
    call.log_probs("logps", logps.detach(), mask, of_stream=True)
    request = check_request(
        call, layout, mask, credit, loss, chosen,
        advantages=advantages, role_ids=role_ids, weights=weights, contrast=contrast,
        streams=Streams(corrupted_logps, ablated_logps), old_logps=old_logps, ref_logps=ref_logps,
        importance_sampling_ratio=importance_sampling_ratio, num_items_in_batch=num_items_in_batch,
        token_loss=token_loss, divergences=Streams(corrupted_kl, ablated_kl),
    )  # fmt: skip
    return run(request, logps, None, request.streams)


@overload
def selected_logps(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    temperature: float = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[False] = ...,
    validate_values: bool | None = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def selected_logps(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    temperature: float = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[True],
    validate_values: bool | None = ...,
    backend: str = ...,
) -> SelectedLogps: ...
def selected_logps(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    validate_values: bool | None = None,
    backend: str = "auto",
) -> Tensor | SelectedLogps:
    """Compute the log-probs of given ids without a log-softmax tensor.

    logp = z[id] - log sum exp z,  H = -sum p log p,  z = logits / temperature

    Args:
        logits: `[B, T, V]` or `[B, T + 1, V]`, or packed `[N, V]`; any strides.
        completion_ids: `[B, T]` or `[N]` integers.
        temperature: sampling temperature.
        mask: `[B, T]` or `[N]` 0/1; rows with 0 are not read and give 0.
        return_entropy: also return the entropy.
        validate_values: None checks values of CPU tensors, True of all, False of none.
        backend: `"auto"`, `"triton"` or `"torch"`.

    Returns: `[B, T]` fp32 nats (fp64 for fp64 logits on the torch backend), or `SelectedLogps(logps, entropy)`.

    Gradient: from log-probs and entropy to `logits`.

    Memory: forward vectors of `[B, T]`; backward the gradient of `logits`.

    Raises: ShapeError, DtypeError, DeviceError, ConfigError, RoleParseError, KernelUnavailableError.

    Source: TRL's `selective_log_softmax`, which this replaces.

    Example:
        >>> logits, ids = torch.randn(2, 7, 100), torch.randint(100, (2, 6))
        >>> selected_logps(logits, ids, temperature=0.7).shape
        torch.Size([2, 6])
        >>> bool((selected_logps(logits, ids, return_entropy=True).entropy > 0).all())
        True
    """
    call = checks.Call("selected_logps", logits, "logits", validate_values, {"completion_mask": "mask"})
    checks.temperature(call, temperature)
    packed = isinstance(completion_ids, Tensor) and completion_ids.dim() == 1
    one = torch.arange(2, device=logits.device) * completion_ids.numel() if packed else None
    check_logits = functools.partial(checks.logits_of, call, "logits", logits)
    layout, valid, ids = checks.selection(call, completion_ids, mask, one, check_logits)
    chosen = checks.backend_of(call, backend, logits.dtype)
    logps, _, _, entropy, _ = ops.row_statistics(
        logits[None] if packed else logits,
        ids[None] if packed else ids,
        (valid[None] if packed else valid)[None],
        temperature=temperature,
        return_entropy=return_entropy,
        backend=chosen,
    )
    shaped = logps.reshape(layout.shape)
    return SelectedLogps(shaped, entropy.reshape(layout.shape)) if return_entropy else shaped


class Divergence(NamedTuple):
    """`kl` `[B, T]` nats, at least 0: of a context from the clean one; and `logps` `[B, T]` of the ids in it."""

    kl: Tensor
    logps: Tensor


@torch.no_grad()
def vocabulary_kl(
    logits: Tensor,
    contrast_logits: Tensor,
    completion_ids: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    validate_values: bool | None = None,
    backend: str = "auto",
) -> Divergence:
    """Compute the divergence of one context from another over the whole vocabulary, each row of both read once.

    KL(p || q) = sum p (z - z') - log sum exp z + log sum exp z',  z and z' the logits of both contexts / temperature

    Args:
        logits: `[B, T, V]` or `[B, T + 1, V]`, or packed `[N, V]`; any strides.
        contrast_logits: as `logits`, of the same tokens in a context that lacks something; another dtype is fine.
        completion_ids: `[B, T]` or `[N]` integers.
        temperature: sampling temperature.
        mask: `[B, T]` or `[N]` 0/1; rows with 0 are not read and give 0.
        validate_values: None checks values of CPU tensors, True of all, False of none.
        backend: `"auto"`, `"triton"` or `"torch"`.

    Returns: Divergence, fp32 (fp64 for fp64 on the torch backend). A token that both contexts ban (-inf) adds 0; one
        that `contrast_logits` alone ban makes the divergence infinite.

    Gradient: none.

    Memory: vectors of `[B, T]`.

    Raises: ShapeError, DtypeError, DeviceError, ConfigError, RoleParseError, KernelUnavailableError.

    Source: the token dependency of VPPO, arXiv 2510.09285, and PGPO, arXiv 2604.01840, whose code samples it.

    Example:
        >>> logits, ids = torch.randn(2, 6, 100), torch.randint(100, (2, 6))
        >>> bool((vocabulary_kl(logits, logits + 1.0, ids).kl < 1e-6).all())  # the same distribution
        True
    """
    call = checks.Call("vocabulary_kl", logits, "logits", validate_values, {"completion_mask": "mask"})
    checks.temperature(call, temperature)
    packed = isinstance(completion_ids, Tensor) and completion_ids.dim() == 1
    one = torch.arange(2, device=logits.device) * completion_ids.numel() if packed else None

    def check_both(layout: Layout) -> int:
        V = checks.logits_of(call, "logits", logits, layout)
        return checks.logits_of(call, "contrast_logits", contrast_logits, layout, V)

    layout, valid, ids = checks.selection(call, completion_ids, mask, one, check_both)
    chosen = checks.backend_of(call, backend, logits.dtype)
    logps, _, _, _, kl = ops.row_statistics(
        logits[None] if packed else logits,
        ids[None] if packed else ids,
        torch.stack([valid[None] if packed else valid] * 2),
        corrupted_logits=contrast_logits[None] if packed else contrast_logits,
        temperature=temperature,
        return_entropy=True,
        return_kl=True,
        backend=chosen,
    )
    return Divergence(kl[0].reshape(layout.shape), logps[1].reshape(layout.shape))


def _reads_entropy(loss: LossConfig) -> bool:
    return loss.entropy_coef != 0.0 or loss.top_entropy_quantile != 1.0


def _check_inplace(call: checks.Call, logits: Tensor) -> None:
    overlaps = any(size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride(), strict=True))
    if (logits.is_leaf and logits.requires_grad) or overlaps:
        got = "True with expanded logits" if overlaps else "True with leaf logits"
        fix = "drop inplace_backward, or pass the output of the head itself"
        call.fail(ConfigError, "inplace_backward", got, "logits that an op computed and nothing else needs", fix)
