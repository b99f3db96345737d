"""Score a rollout in three contexts with one model: as it is, without its image, without its perception text."""

import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srpo import checks
from srpo.errors import ConfigError, ShapeError
from srpo.hidden import selected_logps_from_hidden
from srpo.loss import selected_logps
from srpo.roles import Role
from srpo.vision.ablation import hide, swap
from srpo.vision.access import (
    counted_positions,
    counts_columns,
    evaluating,
    has_head,
    head_of,
    head_states,
    is_encoder_decoder,
    is_sharded,
    keeps_state,
    own_logits,
    positions_given,
    rope_positions,
    takes_positions,
    vision_features,
)
from srpo.vision.contexts import check_corrupted, corrupted_context
from srpo.vision.corruption import PatchMask, PixelLayout
from srpo.vision.inputs import ModelInputs, check_inputs, row_cuts

_STREAMS = ("clean", "corrupted", "ablated")


class StreamLogps(NamedTuple):
    """Log-probs of the completion tokens in each context; none carries a gradient.

    Args:
        logps: `[B, T]` fp32 nats, 0 on padding.
        corrupted_logps: `[B, T]` with the image corrupted: scored on perception tokens, elsewhere the clean value, so
            that the contrast is 0; None when not asked for.
        ablated_logps: `[B, T]` with the perception tokens hidden: scored on reasoning tokens, elsewhere the clean
            value; None when not asked for.
        entropy: `[B, T]` nats, of the clean context.
    """

    logps: Tensor
    corrupted_logps: Tensor | None
    ablated_logps: Tensor | None
    entropy: Tensor


@torch.no_grad()
def score_streams(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    *,
    role_ids: Tensor,
    corruption: Any = PatchMask(),  # noqa: B008 - frozen
    corrupted_inputs: Mapping[str, Any] | None = None,
    generator: torch.Generator | int | None = None,
    streams: Sequence[str] = _STREAMS,
    temperature: float = 1.0,
    batch_size: int | None = None,
    method: str | None = None,
    pixel_layout: PixelLayout | None = None,
    other_perception_ids: Tensor | None = None,
    other_perception_mask: Tensor | None = None,
    **multimodal_inputs: Any,
) -> StreamLogps:
    """Score the last `logits_to_keep` tokens as they are, with the image corrupted, and with the perception hidden.

    Args:
        model: a Hugging Face causal model, vision-language or text, DDP-wrapped or not.
        input_ids: `[B, S]` prompt and completion, prompts padded on the left.
        attention_mask: `[B, S]` 0/1.
        logits_to_keep: T, the columns of the completion.
        role_ids: `[B, T]` integers, 0 other, 1 perception, 2 reasoning.
        corruption: one of `srpo.vision.corruption`, for families whose `pixel_layout` is known.
        corrupted_inputs: for every family, what the processor made of corrupted pictures (`corrupt_images`), by the
            names it has in `multimodal_inputs` and of the same shapes; takes the place of `corruption`, `generator`
            and `pixel_layout`. Inputs with an entry per token are those of the clean context.
        generator: a CPU generator, which advances by one draw per picture, or a seed; None: a seed for each sequence,
            made of its pictures and its prompt: all rollouts of a prompt see the same corrupted pictures, and neither
            batch, padding nor rank matters (`ShuffleImages`, which mixes sequences, takes one of all prompts).
        streams: which of `"clean"`, `"corrupted"`, `"ablated"`; the clean one is always scored.
        temperature: sampling temperature.
        batch_size: sequences per forward; None: all. The result does not depend on it beyond rounding.
        method: how perception is hidden. None or `"delete"` cuts the tokens out and keeps the positions of the others;
            `"mask"` zeroes their attention mask, which is the same but for models whose state or window a mask does
            not reach (linear attention, SSM, short sliding windows): those refuse it.
        pixel_layout: where pictures lie in `pixel_values`; None: `PixelLayout.of_model(model)`.
        other_perception_ids: `[B, M]` perception tokens of another rollout (`perception_tokens`), put in the place of
            the own ones in the ablated context: reasoning is then contrasted with a mismatched perception instead of
            none, at the positions that the new text has.
        other_perception_mask: `[B, M]` 0/1; None means all valid.
        multimodal_inputs: everything else that the model is called with (`pixel_values`, `image_grid_thw`,
            `mm_token_type_ids`, ...), passed through unread but for the split into batches; `num_images`, the number
            of images (or of tiles, where the pixels are tiles) of each sequence, is believed.

    Returns: StreamLogps.

    A token after hidden ones is scored by the last visible state before it. The corrupted forward stops at the last
    perception token of the batch; clean and ablated share the output of the vision tower where the model allows it;
    the head is run on the rows of the role alone. Where the head alone does not make the logits (caps, scales,
    adapters) the model's own logits of the completion are taken. Dropout is off; training modes, gradients and random
    generators are as before.

    Gradient: none.

    Memory: a forward without cache of `batch_size` sequences, and what `selected_logps_from_hidden` takes.

    Raises: ShapeError, DtypeError, DeviceError, ConfigError, RoleParseError.

    Source: Jiang & Zou, arXiv 2605.07274.
    """
    call = checks.Call("score_streams", input_ids, "input_ids")
    if not has_head(model):
        fix = "pass the model that returns logits, not its backbone"
        call.fail(ConfigError, "model", type(model).__name__, "a transformers model with a language head", fix)
    if is_encoder_decoder(model):
        fix = "score such models with their own forward and pass the log-probs to role_weighted_grpo_loss"
        call.fail(ConfigError, "model", type(model).__name__, "a decoder, whose input ends with the completion", fix)
    if input_ids.dim() != 2:
        call.fail(ShapeError, "input_ids", checks.describe(input_ids), "[B, S]", "stack the sequences, padded left")
    streams = _streams_of(call, streams)
    _check_settings(call, input_ids, logits_to_keep, batch_size, method, corruption)
    checks.temperature(call, temperature)
    whole = check_inputs(call, model, input_ids, attention_mask, logits_to_keep, multimodal_inputs)
    B, T = len(input_ids), logits_to_keep
    call.tensor("role_ids", role_ids, [(B, T)], "[B, T] with T = logits_to_keep", "int")
    valid = attention_mask[:, -T:] != 0
    call.within("role_ids", role_ids, 0, 2, valid, "roles (0 other, 1 perception, 2 reasoning)", "see RoleParse")
    unreachable = keeps_state(model) or counts_columns(model, input_ids.shape[1])
    if method == "mask" and unreachable:
        fix = "pass method=None"
        call.fail(ConfigError, "method", "'mask'", "'delete' for a model whose state a mask does not reach", fix)
    other = _check_other(call, whole, other_perception_ids, other_perception_mask)
    if corrupted_inputs is not None:
        check_corrupted(call, whole, corrupted_inputs)
    cuts = row_cuts(call, whole) if batch_size is not None and batch_size < B else None
    corrupted = None
    if "corrupted" in streams and not whole.has_pixels():
        _warn_without_image()
    elif "corrupted" in streams:
        settings = (corrupted_inputs, corruption, generator, pixel_layout)
        corrupted = corrupted_context(call, model, whole, T, *settings)
    if cuts is not None and whole.position_ids is None:
        positions = rope_positions(model, input_ids, attention_mask, whole.multimodal)
        whole = replace(whole, position_ids=positions)
        corrupted = None if corrupted is None else replace(corrupted, position_ids=positions)
    scorer = _Scorer(model, temperature, method or "delete", streams)
    parts = []
    with evaluating(model):
        for first in range(0, B, batch_size or max(B, 1)):
            rows = slice(first, min(first + (batch_size or B), B))
            bad = None if corrupted is None else corrupted.rows(rows, cuts)
            swapped = None if other is None else (other[0][rows], other[1][rows])
            parts.append(scorer.streams(whole.rows(rows, cuts), bad, role_ids[rows], swapped))
    return _joined(parts, valid, streams)


class _Scorer:
    """The model, and what the first forward tells about its head."""

    def __init__(self, model: Any, temperature: float, method: str, streams: tuple[str, ...]) -> None:
        self.model, self.temperature, self.method, self.wanted = model, temperature, method, streams
        self.in_step = is_sharded(model)
        self.head_is_bare = False if self.in_step else None  # None: not known yet

    def streams(
        self, inputs: ModelInputs, corrupted: ModelInputs | None, roles: Tensor, other: tuple[Tensor, Tensor] | None
    ) -> list[Tensor | None]:
        """Score the streams of some sequences: logps, corrupted, ablated, entropy."""
        B, T = roles.shape
        start = inputs.input_ids.shape[1] - T
        ids, valid = inputs.input_ids[:, start:], inputs.attention_mask[:, start:] != 0
        before = torch.arange(start - 1, start + T - 1, device=ids.device).expand(B, T)
        seen, reasoned = valid & (roles == Role.PERCEPTION), valid & (roles == Role.REASONING)
        reasoned = reasoned & seen.any(dim=1, keepdim=True)
        shares = "ablated" in self.wanted and inputs.has_pixels() and bool(reasoned.any())
        if shares:
            inputs = inputs.with_features(vision_features(self.model, inputs.multimodal))
        with positions_given(self.model, *inputs.input_ids.shape) as positions:
            logps, entropy = self.score(inputs, before, ids, valid, return_entropy=True)
        results: list[Tensor | None] = [logps, None, None, entropy]
        if "corrupted" in self.wanted:
            results[1] = self._without_image(inputs, corrupted, seen, before, ids, logps)
        if "ablated" in self.wanted:
            results[2] = logps
            if reasoned.any():
                context, source = self._ablated(inputs, seen, other, positions)
                results[2] = torch.where(reasoned, self.score(context, source, ids, reasoned), logps)
            else:
                self._keep_in_step(inputs)
        return results

    def _without_image(
        self,
        inputs: ModelInputs,
        corrupted: ModelInputs | None,
        seen: Tensor,
        before: Tensor,
        ids: Tensor,
        clean: Tensor,
    ) -> Tensor:
        """Score perception tokens with the image corrupted; return the clean log-probs of all others."""
        start = inputs.input_ids.shape[1] - seen.shape[1]
        if corrupted is not None:
            seen = seen & corrupted.with_picture()[:, None]
        if corrupted is None or not seen.any():
            self._keep_in_step(inputs)
            return clean
        end = self._last_needed(corrupted, seen, start)
        short = corrupted.columns(slice(0, start + end - 1))
        scored = self.score(short, before[:, :end], ids[:, :end], seen[:, :end])
        return torch.cat([torch.where(seen[:, :end], scored, clean[:, :end]), clean[:, end:]], dim=1)

    def _keep_in_step(self, inputs: ModelInputs) -> None:
        """Run a forward that this rank has no use for: others gather parameters in theirs, and would wait for ever."""
        if self.in_step:
            own_logits(self.model, inputs.kwargs(), 1)

    def _ablated(
        self, inputs: ModelInputs, seen: Tensor, other: tuple[Tensor, Tensor] | None, positions: list[Tensor]
    ) -> tuple[ModelInputs, Tensor]:
        if other is not None:
            return swap(inputs, seen, *other)
        if inputs.position_ids is None and takes_positions(self.model):
            found = positions[0] if positions else self._counted(inputs)
            inputs = replace(inputs, position_ids=found)
        return hide(inputs, seen, cut=self.method == "delete")

    def _counted(self, inputs: ModelInputs) -> Tensor:
        found = counted_positions(self.model, inputs.input_ids, inputs.attention_mask)
        if found is None:
            call = checks.Call("score_streams", inputs.input_ids, "input_ids")
            fix = "pass position_ids of prompt and completion, or streams=('clean', 'corrupted')"
            got, expected = f"{type(self.model).__name__}, whose positions do not show", "positions to keep"
            call.fail(ConfigError, "model", got, expected, fix)
        return found

    def score(self, inputs: ModelInputs, source: Tensor, ids: Tensor, mask: Tensor, **options: Any) -> Any:
        """Score `ids` `[B, T]` from the states at columns `source` where `mask` is set, as `selected_logps`."""
        S = inputs.input_ids.shape[1]
        keep = S - int(source.min()) if source.numel() else 1
        index = (source - (S - keep))[..., None]
        options |= {"temperature": self.temperature, "mask": mask}
        if self.head_is_bare is not False:
            states, self.head_is_bare = head_states(self.model, inputs.kwargs(), keep)
            if self.head_is_bare:
                head = head_of(self.model)
                bias = getattr(head, "bias", None)
                return selected_logps_from_hidden(_at(states, index), head.weight, ids, bias=bias, **options)
        return selected_logps(_at(own_logits(self.model, inputs.kwargs(), keep), index), ids, **options)

    @staticmethod
    def _last_needed(inputs: ModelInputs, seen: Tensor, start: int) -> int:
        """Return how many completion tokens the corrupted forward needs: images in the rest would lack their place."""
        end = int(seen.any(dim=0).nonzero()[-1]) + 1
        return seen.shape[1] if inputs.picture_tokens()[:, start + end - 1 :].any() else end


def _check_other(
    call: checks.Call, inputs: ModelInputs, other_ids: Any, other_mask: Any
) -> tuple[Tensor, Tensor] | None:
    """Check the perception tokens of other rollouts."""
    if other_ids is None:
        return None
    name = "other_perception_ids"
    M = other_ids.shape[1] if isinstance(other_ids, Tensor) and other_ids.dim() == 2 else 0
    shape = (len(inputs.input_ids), M)
    call.tensor(name, other_ids, [shape], "[B, M]", "int")
    if other_mask is not None:
        call.tensor("other_perception_mask", other_mask, [shape], "[B, M]", "mask")
    mask = torch.ones_like(other_ids, dtype=torch.bool) if other_mask is None else other_mask != 0
    if inputs.image_token is not None and bool(((other_ids == inputs.image_token) & mask).any()):
        call.fail(ConfigError, name, "image tokens", "text", "mask them with other_perception_mask")
    return other_ids, mask


def _at(rows: Tensor, index: Tensor) -> Tensor:
    return rows.gather(1, index.expand(-1, -1, rows.shape[-1]))


@functools.cache
def _warn_without_image() -> None:
    message = "score_streams(): there is no image in this batch, so its perception contrasts are 0 (said once)"
    warnings.warn(message, stacklevel=4)  # past the cache and no_grad, to the caller


def _joined(parts: list[list[Tensor | None]], valid: Tensor, streams: Sequence[str]) -> StreamLogps:
    if not parts:
        nothing = torch.zeros(valid.shape, device=valid.device)
        parts = [[nothing, *(nothing if name in streams else None for name in _STREAMS[1:]), nothing]]
    joined = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
    return StreamLogps(*joined)  # pyright: ignore[reportArgumentType]


def _streams_of(call: checks.Call, streams: Any) -> tuple[str, ...]:
    chosen = tuple(streams) if isinstance(streams, Iterable) and not isinstance(streams, str) else (streams,)
    if isinstance(streams, str) or not all(isinstance(x, str) and x in _STREAMS for x in chosen):
        fix = "pass ('clean', 'corrupted') for a single extra pass"
        call.fail(ConfigError, "streams", repr(streams), f"a selection of {_STREAMS}", fix)
    return chosen


def _check_settings(
    call: checks.Call,
    input_ids: Tensor,
    logits_to_keep: Any,
    batch_size: Any,
    method: Any,
    corruption: Any,
) -> None:
    S = input_ids.shape[1]
    if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, int) or not 0 < logits_to_keep < S:
        fix = "pass completion_ids.size(1)"
        call.fail(ConfigError, "logits_to_keep", repr(logits_to_keep), f"an int in [1, {S - 1}]", fix)
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        call.fail(ConfigError, "batch_size", repr(batch_size), "None or a positive int", "pass batch_size=None")
    if method not in (None, "mask", "delete"):
        call.fail(ConfigError, "method", repr(method), "None, 'mask' or 'delete'", "pass method=None")
    if isinstance(corruption, type) or not callable(getattr(corruption, "on_inputs", None)):
        fix = "pass PatchMask() or another of srpo.vision.corruption"
        call.fail(ConfigError, "corruption", checks.describe(corruption), "a corruption with on_inputs", fix)
