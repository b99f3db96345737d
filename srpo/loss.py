"""The loss: clipped GRPO with role-aware token weights, from logits or from log-probs."""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from srpo import checks
from srpo.config import CreditConfig, LossConfig
from srpo.credit import Credit, as_dtype, compute_dtype, run_credit, settings_of
from srpo.errors import ConfigError
from srpo.metrics import MetricSums, credit_sums, loss_sums
from srpo_kernels import ops
from srpo_kernels.layout import Layout


class LossOutput(NamedTuple):
    """What a loss call returns. Only `loss` carries a gradient.

    Args:
        loss: 0-d.
        logps: `[B, T]` log-probs of the completion tokens under the current policy, 0 on masked tokens.
        weights: `[B, T]` token weights that were multiplied into the advantages, 0 on masked tokens.
        entropy: `[B, T]` entropy of the next-token distribution in nats, 0 on masked tokens; None without logits.
        metrics: sums and counts, read as a mapping from metric names to 0-d tensors.
    """

    loss: Tensor
    logps: Tensor
    weights: Tensor
    entropy: Tensor | None
    metrics: MetricSums


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
    weights: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
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
        weights: `[B, T]`, at least 0; replace the credit stage.
        old_logps: `[B, T]` nats of the policy that made the rollout; None: on-policy, the ratio is exactly 1.
        ref_logps: `[B, T]` nats of the reference model; needed when `loss.beta` is not 0.
        importance_sampling_ratio: `[B, T]` or `[B, 1]`, multiplies the policy term; NaN counts as 1.
        cu_seqlens: `[R + 1]` offsets of packed trajectories: tensors are `[N, ...]` instead of `[B, T, ...]`.
        num_items_in_batch: normaliser of `"dapo"` and `"cispo"`; None: valid tokens of this call.
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
    """
    call = checks.Call("role_weighted_grpo_loss", logits, "logits", validate_values)
    checks.configs(call, credit, loss)
    stage = _Stage(call, credit, loss, backend, logits.dtype)
    layout, mask, ids = _check_selection(call, logits, completion_ids, completion_mask, cu_seqlens)
    stage.check(layout, mask, advantages, role_ids, weights, old_logps, ref_logps, importance_sampling_ratio)
    checks.normaliser(call, num_items_in_batch)
    given = {"corrupted": corrupted_logps, "ablated": ablated_logps}
    live = {"corrupted": corrupted_logits, "ablated": ablated_logits}
    stage.check_contrasts(given, live, logits.shape[-1])
    if inplace_backward:
        _check_inplace(call, logits)

    needs = {s: x for s, x in live.items() if x is not None and s in stage.streams}
    row_masks = [mask, *(_rows_read(s, stage.role_ids, mask, credit) for s in needs)]
    padded = layout.cu_seqlens is None
    streams = {s: x if padded else x[None] for s, x in needs.items()}
    logps, _, _, entropy = ops.row_statistics(
        logits if padded else logits[None],
        ids if padded else ids[None],
        torch.stack([m if padded else m[None] for m in row_masks]),
        corrupted_logits=_detached(streams.get("corrupted")),
        ablated_logits=_detached(streams.get("ablated")),
        temperature=loss.temperature,
        return_entropy=True,
        inplace_backward=inplace_backward,
        backend=stage.backend,
    )
    if not padded:
        logps, entropy = logps[:, 0], entropy[0]
    contrasts = given | {s: logps[k + 1].detach() for k, s in enumerate(needs)}
    return stage.run(logps[0], entropy.detach(), contrasts, num_items_in_batch)


def role_weighted_grpo_loss_from_logps(
    logps: Tensor,
    advantages: Tensor,
    *,
    role_ids: Tensor | None = None,
    completion_mask: Tensor | None = None,
    corrupted_logps: Tensor | None = None,
    ablated_logps: Tensor | None = None,
    weights: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
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
        role_ids, completion_mask, corrupted_logps, ablated_logps, weights, old_logps, ref_logps,
            importance_sampling_ratio, cu_seqlens, num_items_in_batch, credit, loss, validate_values, backend: as in
            `role_weighted_grpo_loss`.

    Returns: LossOutput, with `entropy=None`.

    Gradient: from `loss` to `logps`.

    Memory: a few `[B, T]` tensors.

    Raises: ShapeError, DtypeError, DeviceError, ConfigError, RoleParseError, NonFiniteError, KernelUnavailableError.

    Source: Jiang & Zou, arXiv 2605.07274; GRPO, arXiv 2402.03300; loss types as TRL's `GRPOTrainer`.
    """
    call = checks.Call("role_weighted_grpo_loss_from_logps", logps, "logps", validate_values)
    checks.configs(call, credit, loss)
    stage = _Stage(call, credit, loss, backend, logps.dtype)
    layout = checks.layout_of(call, "logps", logps, cu_seqlens)
    call.tensor("logps", logps, [layout.shape], checks.tokens(layout), "float")
    mask = checks.mask_of(call, completion_mask, layout)
    stage.check(layout, mask, advantages, role_ids, weights, old_logps, ref_logps, importance_sampling_ratio)
    checks.normaliser(call, num_items_in_batch)
    contrasts = {"corrupted": corrupted_logps, "ablated": ablated_logps}
    stage.check_contrasts(contrasts, {}, 0)
    return stage.run(logps, None, contrasts, num_items_in_batch)


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
    """
    call = checks.Call("selected_logps", logits, "logits", validate_values)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0.0 < temperature < torch.inf:
        fix = "pass the temperature that the rollout was sampled with"
        call.fail(ConfigError, "temperature", repr(temperature), "a positive number", fix)
    packed = isinstance(completion_ids, Tensor) and completion_ids.dim() == 1
    one = torch.arange(2, device=logits.device) * completion_ids.numel() if packed else None
    layout, valid, ids = _check_selection(call, logits, completion_ids, mask, one)
    chosen = checks.backend_of(call, backend, logits.dtype)
    logps, _, _, entropy = ops.row_statistics(
        logits[None] if packed else logits,
        ids[None] if packed else ids,
        (valid[None] if packed else valid)[None],
        temperature=temperature,
        return_entropy=return_entropy,
        backend=chosen,
    )
    shaped = logps.reshape(layout.shape)
    return SelectedLogps(shaped, entropy.reshape(layout.shape)) if return_entropy else shaped


class _Stage:
    """The credit and the loss stage of one call, on checked and canonical arguments."""

    def __init__(self, call: checks.Call, credit: CreditConfig, loss: LossConfig, backend: str, dtype: torch.dtype):
        self.call, self.credit, self.loss = call, credit, loss
        self.backend = checks.backend_of(call, backend, dtype)
        self.streams: tuple[str, ...] = ()

    def check(
        self,
        layout: Layout,
        mask: Tensor,
        advantages: Any,
        role_ids: Any,
        weights: Any,
        old_logps: Any,
        ref_logps: Any,
        importance_sampling_ratio: Any,
    ) -> None:
        self.layout, self.mask = layout, mask
        self.advantages = checks.advantages_of(self.call, advantages, mask, layout)
        self.has_roles = role_ids is not None
        self.role_ids = checks.roles_of(self.call, role_ids, mask, layout) if self.has_roles else torch.zeros_like(mask)
        self.weights = weights
        if self.has_roles and weights is None:
            self.streams = self.credit.streams
        ratio = importance_sampling_ratio
        checks.loss_inputs(self.call, self.loss, layout, mask, old_logps, ref_logps, ratio)
        self.old_logps, self.ref_logps = old_logps, ref_logps
        if ratio is not None and tuple(ratio.shape) != layout.shape:
            ratio = layout.spread(ratio[:, 0])
        self.is_ratio = ratio

    def check_contrasts(self, given: dict[str, Any], live: dict[str, Any], vocabulary: int) -> None:
        call, layout = self.call, self.layout
        named = {f"{s}_logps": x for s, x in given.items()} | {f"{s}_logits": x for s, x in live.items()}
        if self.weights is not None:
            self.weights = checks.given_weights(call, self.weights, self.mask, layout, named)
        elif not self.has_roles:
            for name, x in named.items():
                if x is not None:
                    fix = "pass role_ids from role_ids_from_completions, or drop the contrast streams"
                    call.fail(ConfigError, "role_ids", f"None together with {name}", "role ids [B, T]", fix)
        else:
            checks.contrast_inputs(call, self.credit, layout, given, live, vocabulary)

    def run(self, logps: Tensor, entropy: Tensor | None, contrasts: dict[str, Any], normaliser: Any) -> LossOutput:
        dtype = compute_dtype(logps, self.backend)
        logps = logps.to(dtype)
        mask, layout = self.mask, self.layout
        credit = self._credit(logps, contrasts) if self.streams else None
        weights = credit.weights if credit else mask if self.weights is None else self.weights
        weights = torch.where(mask, weights.to(dtype), 0.0)
        advantages = self.advantages.to(dtype)
        counts = layout.token_counts(mask).to(dtype)
        per_trajectory, clip_and_kl = ops.policy_loss(
            logps,
            as_dtype(self.old_logps, dtype),
            as_dtype(self.ref_logps, dtype),
            as_dtype(self.is_ratio, dtype),
            advantages,
            weights,
            mask,
            _scale(self.loss, counts, normaliser),
            layout,
            backend=self.backend,
            **settings_of(self.loss, without=("temperature", "max_completion_length")),
        )
        metrics = self._metrics(credit, advantages, counts, clip_and_kl, entropy)
        shown = torch.where(mask, logps.detach(), 0.0)
        return LossOutput(per_trajectory.sum(), shown, weights, entropy, metrics)

    def _credit(self, logps: Tensor, contrasts: dict[str, Any]) -> Credit:
        base = logps.detach() if self.old_logps is None else self.old_logps
        chosen = {s: contrasts[s] for s in self.streams}
        return run_credit(
            self.call, self.layout, self.mask, self.role_ids, self.advantages, self.credit, self.backend,
            base=base, **chosen,
        )  # fmt: skip

    def _metrics(
        self, credit: Credit | None, advantages: Tensor, counts: Tensor, clip_and_kl: Tensor, entropy: Tensor | None
    ) -> MetricSums:
        groups = {"cispo" if self.loss.loss_type == "cispo" else "clip"}
        groups |= {"kl"} if self.loss.beta != 0.0 else set()
        groups |= {"entropy"} if entropy is not None else set()
        sums = [loss_sums(self.mask, advantages, counts, clip_and_kl, entropy, self.layout)]
        if credit is not None:
            groups.add("credit")
            sums.append(credit_sums(*credit, self.role_ids, self.mask, advantages))
        return MetricSums(torch.cat(sums), frozenset(groups))


def _scale(loss: LossConfig, counts: Tensor, num_items_in_batch: Any) -> Tensor:
    """Return the factor `[R]` that each trajectory's sum of token losses is reduced with."""
    R = counts.shape[0]
    if loss.loss_type == "grpo":
        return 1.0 / (counts.clamp(min=1.0) * R) if R else counts
    if loss.loss_type == "dr_grpo":
        return torch.full_like(counts, 1.0 / (max(R, 1) * (loss.max_completion_length or 1)))
    items = counts.sum() if loss.loss_type == "bnpo" or num_items_in_batch is None else num_items_in_batch
    if isinstance(items, Tensor):
        items = items.reshape(())
    items = counts.new_ones(()) * items  # to the device and dtype without a sync
    return torch.where(items > 0, 1.0 / items, 1.0).expand_as(counts)


def _check_selection(
    call: checks.Call, logits: Tensor, completion_ids: Any, completion_mask: Any, cu_seqlens: Any
) -> tuple[Layout, Tensor, Tensor]:
    if not isinstance(completion_ids, Tensor):
        call.tensor("completion_ids", completion_ids, [], "[B, T]", "int")
    layout = checks.layout_of(call, "completion_ids", completion_ids, cu_seqlens)
    call.tensor("completion_ids", completion_ids, [layout.shape], checks.tokens(layout), "int")
    checks.logits_of(call, "logits", logits, layout)
    mask = checks.mask_of(call, completion_mask, layout)
    fix = "mask tokens that are not to be scored"
    call.within("completion_ids", completion_ids, 0, logits.shape[-1] - 1, mask, "token ids", fix)
    return layout, mask.contiguous(), completion_ids.long().contiguous()


def _check_inplace(call: checks.Call, logits: Tensor) -> None:
    overlaps = any(size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride(), strict=True))
    if (logits.is_leaf and logits.requires_grad) or overlaps:
        got = "True with expanded logits" if overlaps else "True with leaf logits"
        fix = "drop inplace_backward, or pass the output of the head itself"
        call.fail(ConfigError, "inplace_backward", got, "logits that an op computed and nothing else needs", fix)


def _rows_read(stream: str, role_ids: Tensor, mask: Tensor, credit: CreditConfig) -> Tensor:
    """Return which rows of a live contrast stream the credit stage reads."""
    if stream == "ablated":
        return mask & (role_ids == 2)
    reads = role_ids == 1
    if credit.reasoning_signal == "image_independence":
        reads = reads | (role_ids == 2)
    return mask & reads


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
