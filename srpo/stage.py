"""The credit and the loss stage of one call: what the entries of the loss share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srpo import checks
from srpo.config import CreditConfig, LossConfig
from srpo.credit import Credit, as_dtype, compute_dtype, run_credit
from srpo.errors import ConfigError
from srpo.metrics import MetricSums, credit_sums, loss_sums
from srpo_kernels import ops
from srpo_kernels.layout import Layout


class LossOutput(NamedTuple):
    """What a loss call returns. Only `loss` carries a gradient.

    Args:
        loss: 0-d.
        logps: `[B, T]` log-probs of the completion tokens under the current policy, 0 on masked tokens, and from
            hidden states on tokens that cannot change the loss.
        weights: `[B, T]` token weights that were multiplied into the advantages, 0 on masked tokens.
        entropy: `[B, T]` entropy of the next-token distribution in nats, 0 where `logps` is; None from log-probs.
        metrics: sums and counts, read as a mapping from metric names to 0-d tensors.
    """

    loss: Tensor
    logps: Tensor
    weights: Tensor
    entropy: Tensor | None
    metrics: MetricSums


class Stage:
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

    def check_contrasts(
        self,
        given: dict[str, Any],
        live: dict[str, Any],
        check_live: Callable[[str, Any], Any] | None = None,
        kind: str = "logits",
    ) -> None:
        """Check the contrast streams: log-probs `given`, or `live` inputs of a kind, which `check_live` knows."""
        call, layout = self.call, self.layout
        named = {f"{s}_logps": x for s, x in given.items()} | {f"{s}_{kind}": x for s, x in live.items()}
        if self.weights is not None:
            self.weights = checks.given_weights(call, self.weights, self.mask, layout, named)
        elif not self.has_roles:
            for name, x in named.items():
                if x is not None:
                    fix = "pass role_ids from role_ids_from_completions, or drop the contrast streams"
                    call.fail(ConfigError, "role_ids", f"None together with {name}", "role ids [B, T]", fix)
        else:
            checks.contrast_inputs(call, self.credit, layout, given, live, check_live, kind)

    def run(self, logps: Tensor, entropy: Tensor | None, contrasts: dict[str, Any], normaliser: Any) -> LossOutput:
        """Run both stages on log-probs that carry the gradient."""
        logps = logps.to(compute_dtype(logps, self.backend))
        weights, credit = self.weigh(logps, contrasts)
        return self.finish(logps, entropy, weights, credit, normaliser)

    def weigh(self, logps: Tensor, contrasts: dict[str, Any]) -> tuple[Tensor, Credit | None]:
        """Return the token weights, and what the credit stage found; `logps` are the base without `old_logps`."""
        credit = None
        if self.streams:
            base = logps.detach() if self.old_logps is None else self.old_logps
            credit = run_credit(
                self.call, self.layout, self.mask, self.role_ids, self.advantages, self.credit, self.backend,
                base=base, **{s: contrasts[s] for s in self.streams},
            )  # fmt: skip
        weights = credit.weights if credit else self.mask if self.weights is None else self.weights
        return torch.where(self.mask, weights.to(compute_dtype(logps, self.backend)), 0.0), credit

    def finish(
        self,
        logps: Tensor,
        entropy: Tensor | None,
        weights: Tensor,
        credit: Credit | None,
        normaliser: Any,
        scored: Tensor | None = None,
    ) -> LossOutput:
        """Reduce log-probs and weights to the loss and its metrics; `scored` are the rows that a head was run on."""
        terms = self.terms(weights, normaliser)
        per_trajectory, clip_and_kl = ops.policy_loss(logps, *terms, self.layout, self.loss.rule, self.backend)
        groups = {"cispo" if self.loss.loss_type == "cispo" else "clip"}
        groups |= {"kl"} if self.loss.beta != 0.0 else set()
        groups |= {"entropy"} if entropy is not None else set()
        groups |= {"rows"} if scored is not None else set()
        rows = self.mask if scored is None else scored
        sums = [loss_sums(self.mask, rows, self.advantages, clip_and_kl, entropy, self.layout)]
        if credit is not None:
            groups.add("credit")
            sums.append(credit_sums(*credit, self.role_ids, self.mask, self.advantages))
        shown = torch.where(self.mask, logps.detach(), 0.0)
        return LossOutput(per_trajectory.sum(), shown, weights, entropy, MetricSums(torch.cat(sums), frozenset(groups)))

    def terms(self, weights: Tensor, normaliser: Any) -> tuple[Any, ...]:
        """Return what the loss is made of beside the log-probs, in the order of `ops.policy_loss`."""
        constants = (self.old_logps, self.ref_logps, self.is_ratio, self.advantages)
        counts = self.layout.token_counts(self.mask).to(weights.dtype)
        scale = loss_scale(self.loss, counts, normaliser)
        return *(as_dtype(x, weights.dtype) for x in constants), weights, self.mask, scale


def loss_scale(loss: LossConfig, counts: Tensor, num_items_in_batch: Any) -> Tensor:
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


def check_selection(
    call: checks.Call,
    completion_ids: Any,
    completion_mask: Any,
    cu_seqlens: Any,
    check_source: Callable[[Layout], int | None],
) -> tuple[Layout, Tensor, Tensor]:
    """Return layout, mask and ids; `check_source` checks what log-probs come from, and returns its vocabulary."""
    if not isinstance(completion_ids, Tensor):
        call.tensor("completion_ids", completion_ids, [], "[B, T]", "int")
    layout = checks.layout_of(call, "completion_ids", completion_ids, cu_seqlens)
    call.tensor("completion_ids", completion_ids, [layout.shape], checks.tokens(layout), "int")
    vocabulary = check_source(layout)
    mask = checks.mask_of(call, completion_mask, layout)
    fix = "mask tokens that are not to be scored"
    highest = torch.iinfo(torch.int32).max if vocabulary is None else vocabulary - 1
    call.within("completion_ids", completion_ids, 0, highest, mask, "token ids", fix)
    return layout, mask.contiguous(), completion_ids.long().contiguous()


def rows_read(stream: str, role_ids: Tensor, mask: Tensor, credit: CreditConfig) -> Tensor:
    """Return which rows of a live contrast stream the credit stage reads."""
    if stream == "ablated":
        return mask & (role_ids == 2)
    reads = role_ids == 1
    if credit.reasoning_signal == "image_independence":
        reads = reads | (role_ids == 2)
    return mask & reads
