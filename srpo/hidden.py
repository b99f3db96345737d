"""The loss and the log-probs from hidden states and the vocabulary head: logits `[B, T, V]` never exist."""

import functools
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from srpo import checks
from srpo.config import CreditConfig, LossConfig
from srpo.credit import as_dtype, compute_dtype
from srpo.errors import ConfigError
from srpo.loss import Divergence, SelectedLogps
from srpo.request import TokenLoss, check_request
from srpo.stage import LossOutput, check_uncoupled, finish, kept_tokens, loss_terms, weigh
from srpo.streams import Streams
from srpo_kernels import head_ops
from srpo_kernels.layout import Layout
from srpo_kernels.rules import couples_tokens


def role_weighted_grpo_loss_from_hidden(
    hidden: Tensor,
    lm_head_weight: Tensor,
    completion_ids: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    role_ids: Tensor | None = None,
    completion_mask: Tensor | None = None,
    corrupted_logps: Tensor | None = None,
    ablated_logps: Tensor | None = None,
    corrupted_hidden: Tensor | None = None,
    ablated_hidden: Tensor | None = None,
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
    workspace_bytes: int | None = None,
    process_group: Any = None,
    validate_values: bool | None = None,
    backend: str = "auto",
) -> LossOutput:
    """Compute the role-weighted GRPO loss from hidden states, without ever holding their logits.

    logits = hidden @ lm_head_weight^T + bias, for one chunk of rows at a time; from there as `role_weighted_grpo_loss`

    The gradient of a chunk is computed while its logits exist: forward and backward cost 6NVH operations for N rows,
    4NVH with a frozen head. N counts the rows that can change the loss: valid, and with an advantage other than 0
    (every valid row with a KL term, an entropy bonus or a `token_loss`; all rows of a trajectory that has such a row
    when the coefficient of a token depends on the others: weights from the current log-probs, `"sequence_token"`,
    `"vespo"`, an off-policy mask, a `token_loss`; a trajectory that the workspace does not hold then costs 8NVH, and
    one without such a row shows weight 1). Live contrasts add 2NVH for the rows of their role, 4NVH with
    `contrast_kind="kl"`; `top_entropy_quantile` adds 2NVH.

    Args:
        hidden: `[B, T, H]`, or `[B, T + 1, H]` whose last position is ignored; the states that the head is called on.
            fp32, bf16, fp16 or fp64, any strides. Position t predicts token t.
        lm_head_weight: `[V, H]`, tied to the embedding or not; a shard of the vocabulary with `process_group`.
        completion_ids, advantages: as in `role_weighted_grpo_loss`.
        bias: `[V]` of the head.
        corrupted_hidden: as `hidden`, in place of `corrupted_logps`: only rows of the role are multiplied, no gradient.
        ablated_hidden: as `hidden`, in place of `ablated_logps`.
        role_ids, completion_mask, corrupted_logps, ablated_logps, corrupted_kl, ablated_kl, weights, contrast,
            old_logps, ref_logps, importance_sampling_ratio, cu_seqlens, num_items_in_batch, token_loss, credit,
            loss, validate_values, backend: as in `role_weighted_grpo_loss`. A `token_loss` is called for some
            trajectories at a time (the log-probs of the others are then made up), and once more to see that none
            depends on another.
        workspace_bytes: what the logits of a chunk and their gradient may take. None: 768 rows on a CPU; elsewhere
            4096 rows, or 1024 for a frozen head, in at most 2 GiB. Fewer rows cost time, above all for a head that
            trains (its gradient is read and written once a chunk); the result does not depend on it beyond rounding.
        process_group: the ranks that hold the shards of the vocabulary, in rank order; shards may differ in size.
            Everything else is the same on all of them, and so is the loss; the gradient of `hidden` is summed over
            them, that of the head is local. An id that no shard holds gets a NaN log-prob.

    Returns: LossOutput. `logps` and `entropy` are 0 on rows that were skipped; `srpo/rows_scored` and
        `srpo/rows_skipped` count them.

    Gradient: from `loss` to `hidden`, `lm_head_weight` and `bias`, of those that require one.

    Memory: the workspace, the gradients (that of the head once more in fp32 while it is summed), and vectors of
        `[B, T]`. It does not grow with T beyond `hidden`, its gradient and the vectors.

    Raises: ShapeError, DtypeError, DeviceError, ConfigError, RoleParseError, NonFiniteError, KernelUnavailableError.

    Source: Jiang & Zou, arXiv 2605.07274; GRPO, arXiv 2402.03300; loss types as TRL's `GRPOTrainer`.

    Example:
        >>> hidden = torch.randn(2, 7, 16, requires_grad=True)  # [B, T + 1, H]
        >>> head = torch.nn.Linear(16, 100, bias=False)
        >>> out = role_weighted_grpo_loss_from_hidden(
        ...     hidden, head.weight, torch.randint(100, (2, 6)), torch.tensor([1.0, 0.0])
        ... )
        >>> out.loss.backward()
        >>> out.metrics.floats()["srpo/rows_skipped"]  # an advantage of 0 learns nothing
        6.0
    """
    call = checks.Call("role_weighted_grpo_loss_from_hidden", hidden, "hidden", validate_values)
    checks.configs(call, credit, loss)
    chosen = checks.backend_of(call, backend, hidden.dtype)
    head = _head_settings(call, chosen, loss.temperature, workspace_bytes, process_group)
    check_head = functools.partial(_check_head, call, hidden, lm_head_weight, bias, process_group)
    layout, mask, ids = checks.selection(call, completion_ids, completion_mask, cu_seqlens, check_head)
    request = check_request(
        call, layout, mask, credit, loss, chosen,
        advantages=advantages, role_ids=role_ids, weights=weights, contrast=contrast,
        streams=Streams(corrupted_logps, ablated_logps), old_logps=old_logps, ref_logps=ref_logps,
        importance_sampling_ratio=importance_sampling_ratio, num_items_in_batch=num_items_in_batch,
        token_loss=token_loss, divergences=Streams(corrupted_kl, ablated_kl),
        live=Streams(corrupted_hidden, ablated_hidden), live_kind="hidden",
        check_live=lambda name, x: checks.hidden_of(call, name, x, layout, hidden),
    )  # fmt: skip

    states, weight, bias = _autocast(hidden, lm_head_weight, bias)
    learns = mask & (request.advantages != 0)
    all_learn = loss.beta != 0.0 or loss.entropy_coef != 0.0 or token_loss is not None
    reached = mask if all_learn else mask & layout.spread(layout.token_counts(learns) > 0)
    weighs_first = request.weighs_first
    if token_loss is not None and torch.compiler.is_compiling():
        fix = "call it outside of torch.compile, or role_weighted_grpo_loss_from_logps inside"
        call.fail(ConfigError, "token_loss", "a function under torch.compile", "an eager call", fix)
    if request.scores and credit.reads_kl and process_group is not None:
        got, fix = "a head in shards with contrast_kind='kl'", "score the streams before, and pass corrupted_kl"
        call.fail(ConfigError, "process_group", got, "a whole head, or divergences that are given", fix)
    if request.scores or not weighs_first:  # what is not scored gets no credit: its weight would meet an advantage of 0
        request = replace(request, role_ids=torch.where(reached, request.role_ids, 0))
    depends_on_row = weighs_first and not couples_tokens(loss) and not all_learn
    rows = learns if depends_on_row else reached
    streams, kept = request.streams, None
    with torch.no_grad():
        if loss.top_entropy_quantile != 1.0:
            _, entropies = _logps(states, weight, bias, ids, mask, layout, True, **head)
            kept = kept_tokens(request, entropies)
        for name, live in request.scores.items():
            read = credit.rows(name, request.role_ids, mask)
            contrast_states = _autocast(live)[0]
            if credit.reads_kl:
                scored, _ = _pairs(states, contrast_states, weight, bias, ids, read, layout, **head)
            else:
                scored, _ = _logps(contrast_states, weight, bias, ids, read, layout, False, **head)
            streams = streams._replace(**{name: scored})

    nothing = torch.zeros(layout.shape, dtype=compute_dtype(states, chosen), device=call.device)
    weighed = weigh(request, nothing, streams) if weighs_first else None
    terms = loss_terms(request, nothing if weighed is None else weighed.weights)
    of_credit = (None, None, None)
    if weighed is None:
        terms = terms._replace(weights=None)
        of_credit = (request.role_ids, *(as_dtype(x, nothing.dtype) for x in streams))
    counted = mask if kept is None else kept
    entropy_slopes = None
    if loss.entropy_coef != 0.0:
        entropy_slopes = counted * (-loss.entropy_coef / counted.sum().clamp(min=1)).to(nothing.dtype)
    anchor, logps, entropy = head_ops.linear_head_training(
        _batched(layout, states), weight, bias, _batched(layout, ids), _batched(layout, rows), *terms, *of_credit,
        cu_seqlens, kept, entropy_slopes, token_loss=token_loss, loss_rule=loss.rule, credit_rule=credit.rule, **head,
    )  # fmt: skip
    logps, entropy = logps.view(layout.shape), entropy.view(layout.shape)
    weighed = weighed or weigh(request, logps, streams)
    old = terms.old_logps
    shown = logps if old is None else torch.where(rows, logps, old.detach())  # a row that was skipped has ratio 1
    check_uncoupled(request, shown)
    out = finish(request, shown, entropy, weighed, rows, kept)
    # not out._replace(...): Dynamo of torch 2.11 cannot rebuild what that makes
    return LossOutput(out.loss + anchor, logps, out.weights, out.entropy, out.metrics)


@overload
def selected_logps_from_hidden(
    hidden: Tensor,
    lm_head_weight: Tensor,
    completion_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[False] = ...,
    workspace_bytes: int | None = ...,
    process_group: Any = ...,
    validate_values: bool | None = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def selected_logps_from_hidden(
    hidden: Tensor,
    lm_head_weight: Tensor,
    completion_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[True],
    workspace_bytes: int | None = ...,
    process_group: Any = ...,
    validate_values: bool | None = ...,
    backend: str = ...,
) -> SelectedLogps: ...
def selected_logps_from_hidden(
    hidden: Tensor,
    lm_head_weight: Tensor,
    completion_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    workspace_bytes: int | None = None,
    process_group: Any = None,
    validate_values: bool | None = None,
    backend: str = "auto",
) -> Tensor | SelectedLogps:
    """Compute the log-probs of given ids from hidden states, without ever holding their logits.

    z = (hidden @ lm_head_weight^T + bias) / temperature,  logp = z[id] - log sum exp z,  H = -sum p log p

    Costs 2NVH operations for the N rows of the mask. Any loss may be built on the result: backward computes the logits
    of a chunk again, 6NVH, for the rows whose upstream gradient is not 0. (When that loss is GRPO's,
    `role_weighted_grpo_loss_from_hidden` saves the second 2NVH.)

    Args:
        hidden: `[B, T, H]` or `[B, T + 1, H]`, or packed `[N, H]`; any strides.
        lm_head_weight: `[V, H]`; a shard of the vocabulary with `process_group`.
        completion_ids: `[B, T]` or `[N]` integers.
        bias: `[V]` of the head.
        temperature: sampling temperature.
        mask: `[B, T]` or `[N]` 0/1; rows with 0 are not multiplied and give 0.
        return_entropy: also return the entropy.
        workspace_bytes, process_group: as in `role_weighted_grpo_loss_from_hidden`.
        validate_values: None checks values of CPU tensors, True of all, False of none.
        backend: `"auto"`, `"triton"` or `"torch"`.

    Returns: `[B, T]` fp32 nats (fp64 for fp64 on the torch backend), or `SelectedLogps(logps, entropy)`.

    Gradient: from log-probs and entropy to `hidden`, `lm_head_weight` and `bias`.

    Memory: the workspace and vectors of `[B, T]`; backward the gradients, that of the head once more in fp32.

    Raises: ShapeError, DtypeError, DeviceError, ConfigError, RoleParseError, KernelUnavailableError.

    Source: TRL's chunked log-prob head, which this replaces.

    Example:
        >>> hidden, head = torch.randn(2, 7, 16), torch.nn.Linear(16, 100, bias=False)
        >>> selected_logps_from_hidden(hidden, head.weight, torch.randint(100, (2, 6))).shape
        torch.Size([2, 6])
    """
    call = checks.Call("selected_logps_from_hidden", hidden, "hidden", validate_values, {"completion_mask": "mask"})
    checks.temperature(call, temperature)
    packed = isinstance(completion_ids, Tensor) and completion_ids.dim() == 1
    one = torch.arange(2, device=call.device) * completion_ids.numel() if packed else None
    chosen = checks.backend_of(call, backend, hidden.dtype)
    run = _head_settings(call, chosen, temperature, workspace_bytes, process_group)
    check_head = functools.partial(_check_head, call, hidden, lm_head_weight, bias, process_group)
    layout, valid, ids = checks.selection(call, completion_ids, mask, one, check_head)
    hidden, lm_head_weight, bias = _autocast(hidden, lm_head_weight, bias)
    logps, entropy = _logps(hidden, lm_head_weight, bias, ids, valid, layout, return_entropy, **run)
    return SelectedLogps(logps, entropy) if return_entropy else logps


@torch.no_grad()
def vocabulary_kl_from_hidden(
    hidden: Tensor,
    contrast_hidden: Tensor,
    lm_head_weight: Tensor,
    completion_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    workspace_bytes: int | None = None,
    validate_values: bool | None = None,
    backend: str = "auto",
) -> Divergence:
    """Compute the divergence of one context from another from hidden states, without ever holding their logits.

    KL(p || q) = sum p (z - z') - log sum exp z + log sum exp z',  z = (hidden @ lm_head_weight^T + bias) / temperature

    Costs 4NVH operations for the N rows of the mask.

    Args:
        hidden: `[B, T, H]` or `[B, T + 1, H]`, or packed `[N, H]`; any strides.
        contrast_hidden: as `hidden`, in the same dtype: of a context that lacks something.
        lm_head_weight: `[V, H]`.
        completion_ids: `[B, T]` or `[N]` integers.
        bias: `[V]` of the head.
        temperature: sampling temperature.
        mask: `[B, T]` or `[N]` 0/1; rows with 0 are not multiplied and give 0.
        workspace_bytes: as in `role_weighted_grpo_loss_from_hidden`; the logits of both contexts share it.
        validate_values: None checks values of CPU tensors, True of all, False of none.
        backend: `"auto"`, `"triton"` or `"torch"`.

    Returns: Divergence, as `vocabulary_kl`.

    Gradient: none.

    Memory: the workspace and vectors of `[B, T]`.

    Raises: ShapeError, DtypeError, DeviceError, ConfigError, RoleParseError, KernelUnavailableError.

    Source: as `vocabulary_kl`.

    Example:
        >>> hidden, head = torch.randn(2, 7, 16), torch.nn.Linear(16, 100, bias=False)
        >>> ids = torch.randint(100, (2, 6))
        >>> vocabulary_kl_from_hidden(hidden, hidden + 0.1, head.weight, ids).kl.shape
        torch.Size([2, 6])
    """
    call = checks.Call("vocabulary_kl_from_hidden", hidden, "hidden", validate_values, {"completion_mask": "mask"})
    checks.temperature(call, temperature)
    packed = isinstance(completion_ids, Tensor) and completion_ids.dim() == 1
    one = torch.arange(2, device=call.device) * completion_ids.numel() if packed else None
    chosen = checks.backend_of(call, backend, hidden.dtype)
    run = _head_settings(call, chosen, temperature, workspace_bytes, None)

    def check_both(layout: Layout) -> int | None:
        checks.hidden_of(call, "contrast_hidden", contrast_hidden, layout, hidden)
        return _check_head(call, hidden, lm_head_weight, bias, None, layout)

    layout, valid, ids = checks.selection(call, completion_ids, mask, one, check_both)
    hidden, against, lm_head_weight, bias = _autocast(hidden, contrast_hidden, lm_head_weight, bias)
    return Divergence(*_pairs(hidden, against, lm_head_weight, bias, ids, valid, layout, **run))


def _logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    rows: Tensor,
    layout: Layout,
    return_entropy: bool,
    **run: Any,
) -> tuple[Tensor, Tensor]:
    logps, entropy = head_ops.linear_head_logps(
        _batched(layout, hidden), weight, bias, _batched(layout, ids), _batched(layout, rows),
        return_entropy=return_entropy, **run,
    )  # fmt: skip
    return logps.reshape(layout.shape), entropy.reshape(layout.shape) if return_entropy else entropy


def _pairs(
    hidden: Tensor,
    against: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    rows: Tensor,
    layout: Layout,
    **run: Any,
) -> tuple[Tensor, Tensor]:
    """Return the divergence of one context from another, and the log-probs of the second."""
    kl, logps = head_ops.linear_head_pairs(
        _batched(layout, hidden), _batched(layout, against), weight, bias, _batched(layout, ids),
        _batched(layout, rows), **run,
    )  # fmt: skip
    return kl.reshape(layout.shape), logps.reshape(layout.shape)


def _check_head(
    call: checks.Call, hidden: Tensor, weight: Any, bias: Any, process_group: Any, layout: Layout
) -> int | None:
    """Check hidden states and head; return the vocabulary, None when only a shard of it is here."""
    checks.hidden_of(call, "hidden", hidden, layout)
    V = checks.head_of(call, hidden, weight, bias)
    return V if process_group is None else None


def _head_settings(
    call: checks.Call, backend: str, temperature: float, workspace_bytes: Any, process_group: Any
) -> dict[str, Any]:
    checks.workspace(call, workspace_bytes)
    group = checks.process_group_name(call, process_group)
    budget = workspace_bytes or 0  # 0: the head chooses
    return {"temperature": float(temperature), "workspace_bytes": budget, "process_group": group, "backend": backend}


def _autocast(*tensors: Any) -> list[Any]:
    """Cast what a head would cast under autocast; the gradients are cast back."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def _batched(layout: Layout, x: Tensor) -> Tensor:
    """Return packed tokens as a batch of one."""
    return x if layout.cu_seqlens is None else x[None]
