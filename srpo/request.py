"""The checked arguments of one loss call: what its two stages read, and nothing that they change."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srpo import checks
from srpo.config import CreditConfig, LossConfig
from srpo.errors import ConfigError
from srpo.streams import Streams
from srpo_kernels.layout import Layout

TokenLoss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Request:
    """Hold the arguments of a loss call after all checks.

    Args:
        mask, advantages, role_ids: per token; without roles all are 0.
        has_roles: whether the caller gave roles: without them there is no credit stage.
        weights, contrast: what the caller gave in place of the credit stage, or of its streams.
        streams: log-probs that were scored before, or their divergences where the credit reads those.
        live: logits or hidden states of the streams, to be scored in this call.
        ratio: importance sampling ratio per token.
        normaliser: `num_items_in_batch`.
        backend: `"triton"` or `"torch"`.
        token_loss: the caller's own loss of the tokens, in the place of the clipped one.
    """

    call: checks.Call
    layout: Layout
    mask: Tensor
    advantages: Tensor
    role_ids: Tensor
    has_roles: bool
    weights: Tensor | None
    contrast: Tensor | None
    streams: Streams
    live: Streams
    old_logps: Tensor | None
    ref_logps: Tensor | None
    ratio: Tensor | None
    normaliser: Any
    credit: CreditConfig
    loss: LossConfig
    backend: str
    token_loss: TokenLoss | None

    @property
    def weighs(self) -> bool:
        """Say whether the credit stage runs."""
        return self.has_roles and self.weights is None and self.credit.strength != 0.0

    @property
    def reads(self) -> tuple[str, ...]:
        """Name the streams that the credit stage reads."""
        return self.credit.streams if self.weighs and self.contrast is None else ()

    @property
    def scores(self) -> dict[str, Any]:
        """Return the live streams that the credit stage reads, by name."""
        return {name: x for name, x in self.live._asdict().items() if x is not None and name in self.reads}

    @property
    def weighs_first(self) -> bool:
        """Say whether the weights are known before the current log-probs are: these are no part of any contrast."""
        return not self.reads or self.old_logps is not None or self.credit.reads_kl


def check_request(
    call: checks.Call,
    layout: Layout,
    mask: Tensor,
    credit: CreditConfig,
    loss: LossConfig,
    backend: str,
    *,
    advantages: Any,
    role_ids: Any,
    weights: Any,
    contrast: Any,
    streams: Streams,
    old_logps: Any,
    ref_logps: Any,
    importance_sampling_ratio: Any,
    num_items_in_batch: Any,
    token_loss: Any = None,
    divergences: Streams = Streams(),  # noqa: B008 - immutable
    live: Streams = Streams(),  # noqa: B008 - immutable
    live_kind: str = "logits",
    check_live: Callable[[str, Any], Any] | None = None,
) -> Request:
    """Check what the entries of the loss share, beside what their log-probs come from."""
    per_token = checks.advantages_of(call, advantages, mask, layout)
    roles = torch.zeros_like(mask) if role_ids is None else checks.roles_of(call, role_ids, mask, layout)
    ratio = checks.loss_inputs(call, loss, layout, mask, old_logps, ref_logps, importance_sampling_ratio)
    checks.normaliser(call, num_items_in_batch)
    checks.token_loss_of(call, loss, token_loss)
    given = streams.named("logps") | divergences.named("kl") | live.named(live_kind)
    if weights is not None:
        weights = checks.given_weights(call, weights, mask, layout, {"contrast": contrast} | given)
    elif contrast is not None:
        contrast = checks.given_contrast(call, contrast, None if role_ids is None else roles, mask, layout, given)
    elif role_ids is None:
        for name, x in given.items():
            if x is not None:
                fix = "pass role_ids from role_ids_from_completions, or drop the contrast streams"
                call.fail(ConfigError, "role_ids", f"None together with {name}", "role ids [B, T]", fix)
    else:
        streams = checks.contrast_streams(
            call, credit, layout, roles, mask, streams, divergences, live, live_kind, check_live
        )
    return Request(
        call, layout, mask, per_token, roles, role_ids is not None, weights, contrast, streams, live, old_logps,
        ref_logps, ratio, num_items_in_batch, credit, loss, backend, token_loss,
    )  # fmt: skip
