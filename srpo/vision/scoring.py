"""Score a rollout in three contexts with one model: as it is, without its image, without its perception text."""

import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srpo import checks
from srpo.config import CreditConfig
from srpo.errors import ConfigError, ShapeError, describe, is_int
from srpo.methods.table import Method, credit_of
from srpo.streams import STREAMS
from srpo.vision.access import (
    can_be_fp32,
    counts_columns,
    evaluating,
    has_head,
    head_in_fp32,
    head_of,
    is_encoder_decoder,
    is_hooked,
    keeps_state,
    rope_positions,
)
from srpo.vision.contexts import check_corrupted, corrupted_context
from srpo.vision.corruption import PatchMask, PixelLayout
from srpo.vision.in_step import Batch, run_in_step
from srpo.vision.inputs import ModelInputs, check_inputs, row_cuts
from srpo.vision.scorer import Scorer


class StreamLogps(NamedTuple):
    """Log-probs of the completion tokens in each context; none carries a gradient.

    Args:
        logps: `[B, T]` fp32 nats, 0 on padding.
        corrupted_logps: `[B, T]` with the image corrupted, on the tokens that the credit reads; None when it reads
            none.
        ablated_logps: `[B, T]` with the perception tokens hidden, on the tokens that the credit reads; None when it
            reads none.
        entropy: `[B, T]` nats, of the clean context.

    Cells that the credit does not read are NaN, and so are those of a row that has nothing to be contrasted with: no
    picture, or no perception. The losses tell the two apart: a row of the second kind has weights of exactly 1, a cell
    of the first kind that is read after all is refused, or counted in `srpo/cells_not_scored`.
    """

    logps: Tensor
    corrupted_logps: Tensor | None
    ablated_logps: Tensor | None
    entropy: Tensor

    @property
    def corrupted_kl(self) -> None:
        """Be None: the credit reads no divergences."""

    @property
    def ablated_kl(self) -> None:
        """Be None: the credit reads no divergences."""


class StreamDivergences(NamedTuple):
    """Log-probs as in `StreamLogps`, and divergences of the contexts; what a credit is given that reads divergences.

    Args:
        logps, corrupted_logps, ablated_logps, entropy: as in `StreamLogps`.
        corrupted_kl: `[B, T]` nats at least 0, KL(clean || corrupted) over the vocabulary, in the cells of
            `corrupted_logps`.
        ablated_kl: `[B, T]`, KL(clean || ablated), in those of `ablated_logps`.
    """

    logps: Tensor
    corrupted_logps: Tensor | None
    ablated_logps: Tensor | None
    entropy: Tensor
    corrupted_kl: Tensor | None
    ablated_kl: Tensor | None


@torch.no_grad()
def score_streams(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    *,
    role_ids: Tensor | None = None,
    credit: CreditConfig | Method | str = "srpo",
    corruption: Any = PatchMask(),  # noqa: B008 - frozen
    corrupted_inputs: Mapping[str, Any] | None = None,
    generator: torch.Generator | int | None = None,
    streams: Sequence[str] | None = None,
    temperature: float = 1.0,
    batch_size: int | None = None,
    cache_bytes: int = 1 << 30,
    ablation: str | None = None,
    method: str | None = None,
    pixel_layout: PixelLayout | None = None,
    other_perception_ids: Tensor | None = None,
    other_perception_mask: Tensor | None = None,
    cast_lm_head_to_fp32: bool = False,
    padding_counts: bool = False,
    **multimodal_inputs: Any,
) -> StreamLogps | StreamDivergences:
    """Score the last `logits_to_keep` tokens as they are, with the image corrupted, and with the perception hidden.

    Args:
        model: a Hugging Face causal model, vision-language or text, DDP-wrapped or not.
        input_ids: `[B, S]` prompt and completion, prompts padded on the left.
        attention_mask: `[B, S]` 0/1.
        logits_to_keep: T, the columns of the completion.
        role_ids: `[B, T]` integers, 0 other, 1 perception, 2 reasoning; None for a credit that reads no roles.
        credit: a `CreditConfig`, or the name of a preset or a method of `METHODS`: what will read the streams decides
            which of them are scored, and on which tokens. Pass the same to the loss.
        corruption: one of `srpo.vision.corruption`, for families whose `pixel_layout` is known.
        corrupted_inputs: for every family, what the processor made of corrupted pictures (`corrupt_images`), by the
            names it has in `multimodal_inputs` and of the same shapes; takes the place of `corruption`, `generator`
            and `pixel_layout`. Inputs with an entry per token are those of the clean context.
        generator: a CPU generator, which advances by one draw per picture, or a seed; None: a seed for each sequence,
            made of its pictures and its prompt: all rollouts of a prompt see the same corrupted pictures, and neither
            batch, padding nor rank matters (`ShuffleImages`, which mixes sequences, takes one of all prompts).
        streams: which of `"clean"` and the streams that the credit reads; None: all. The clean one is always scored.
        temperature: sampling temperature.
        batch_size: sequences per forward; None: all. The result does not depend on it beyond rounding.
        cache_bytes: what the caches of repeated prompts may take; sequences continue in parts that fit.
        ablation: how perception is hidden. None or `"delete"` cuts the tokens out and keeps the positions of the
            others; `"mask"` zeroes their attention mask, which is the same but for models whose state or window a mask
            does not reach (linear attention, SSM, short sliding windows): those refuse it.
        method: the old name of `ablation`.
        pixel_layout: where pictures lie in `pixel_values`; None: `PixelLayout.of_model(model)`.
        other_perception_ids: `[B, M]` perception tokens of another rollout (`perception_tokens`), put in the place of
            the own ones in the ablated context: reasoning is then contrasted with a mismatched perception instead of
            none, at the positions that the new text has.
        other_perception_mask: `[B, M]` 0/1; None means all valid.
        cast_lm_head_to_fp32: run the head in fp32, outside of autocast, as TRL does under this name; pass what the
            loss is computed with.
        padding_counts: padding tokens whose mask is 1 are what the policy was given, or sampled; otherwise two of them
            at an end of a sequence are taken for a mask that was forgotten.
        multimodal_inputs: everything else that the model is called with (`pixel_values`, `image_grid_thw`,
            `mm_token_type_ids`, ...), passed through unread but for the split into batches; `num_images`, the number
            of images (or of tiles, where the pixels are tiles) of each sequence, is believed.

    Returns: StreamLogps; StreamDivergences, which has `corrupted_kl` and `ablated_kl` too, for a credit that reads
        divergences (`contrast_kind="kl"`, `METHODS["vppo"].with_kl("full")`).

    Sequences with the same prompt and the same pictures share one computation of them a context, and their completions
    continue from its cache, where a first comparison with a plain forward finds no difference beyond rounding (both
    sides of a contrast always go the same way); equal rollouts are scored once. Sharded models, models with states or
    caches of other kinds, and prompts that occur once are scored as whole sequences.

    A token after hidden ones is scored by the last visible state before it. The corrupted forward stops at the last
    perception token of the batch; clean and ablated share the output of the vision tower where the model allows it;
    the head is run on the rows of the role alone. Where the head alone does not make the logits (caps, scales,
    adapters) the model's own logits of the completion are taken. Dropout is off; training modes, gradients and random
    generators are as before.

    Gradient: none.

    Memory: a forward without cache of `batch_size` sequences, or their prompts' caches within `cache_bytes`, and what
        `selected_logps_from_hidden` takes. A credit that reads divergences keeps the clean hidden states of the
        completion as well (or the clean logits, of a model whose head alone does not make them). Nothing of it outlives
        the call.

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
        call.fail(ShapeError, "input_ids", describe(input_ids), "[B, S]", "stack the sequences, padded left")
    reader = credit_of("score_streams", credit)
    streams = _streams_of(call, streams, reader)
    ablation = _renamed(call, ablation, method)
    _check_settings(call, input_ids, logits_to_keep, batch_size, ablation, corruption)
    checks.temperature(call, temperature)
    if cast_lm_head_to_fp32 and not can_be_fp32(model):
        got, fix = f"True with a {type(head_of(model)).__name__} of 16 bits", "call .float() of the head"
        call.fail(ConfigError, "cast_lm_head_to_fp32", got, "a linear head, or one whose parameters are fp32", fix)
    whole = check_inputs(call, model, input_ids, attention_mask, logits_to_keep, multimodal_inputs, padding_counts)
    B, T = len(input_ids), logits_to_keep
    valid = attention_mask[:, -T:] != 0
    if role_ids is None and isinstance(reader, Method) and "role_ids" not in reader.needs:
        role_ids = torch.zeros_like(valid, dtype=torch.int8)
    call.tensor("role_ids", role_ids, [(B, T)], "[B, T] with T = logits_to_keep", "int")
    roles: Any = role_ids
    call.within("role_ids", roles, 0, 2, valid, "roles (0 other, 1 perception, 2 reasoning)", "see RoleParse")
    unreachable = keeps_state(model) or counts_columns(model, input_ids.shape[1])
    if ablation == "mask" and unreachable:
        fix = "pass ablation=None"
        call.fail(ConfigError, "ablation", "'mask'", "'delete' for a model whose state a mask does not reach", fix)
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
    if (cuts is not None or is_hooked(model)) and whole.position_ids is None:
        positions = rope_positions(model, input_ids, attention_mask, whole.multimodal)
        whole = replace(whole, position_ids=positions)
        corrupted = None if corrupted is None else replace(corrupted, position_ids=positions)
    scorer = Scorer(model, temperature, ablation or "delete", streams, reader)
    precision = head_in_fp32(model) if cast_lm_head_to_fp32 else nullcontext()
    with evaluating(model), precision:
        shared = scorer.shared(whole, corrupted, roles, other, batch_size or max(B, 1), cache_bytes)
        if shared is not None:
            return _named(shared)
        batches = []
        for first in range(0, B, batch_size or max(B, 1)):
            rows = slice(first, min(first + (batch_size or B), B))
            bad = None if corrupted is None else corrupted.rows(rows, cuts)
            swapped = None if other is None else (other[0][rows], other[1][rows])
            batches.append(Batch(whole.rows(rows, cuts), bad, roles[rows], swapped))
        if scorer.in_step:
            parts = run_in_step(model, batches, lambda batch: scorer.streams(*batch))
        else:
            parts = [scorer.streams(*batch) for batch in batches]
    return _joined(parts, valid, streams, reader.reads_kl)


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


@functools.cache
def _warn_without_image() -> None:
    message = "score_streams(): there is no image in this batch, so nothing is contrasted with one (said once)"
    warnings.warn(message, stacklevel=4)  # past the cache and no_grad, to the caller


def _joined(
    parts: list[list[Tensor | None]], valid: Tensor, streams: Sequence[str], reads_kl: bool
) -> StreamLogps | StreamDivergences:  # fmt: skip
    if not parts:
        nothing = torch.zeros(valid.shape, device=valid.device)
        of_streams = [nothing if name in streams else None for name in STREAMS]
        parts = [[nothing, *of_streams, nothing, *(of_streams if reads_kl else [])]]
    joined = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
    return _named(joined)


def _named(columns: list[Tensor | None]) -> Any:
    kind: Any = StreamLogps if len(columns) == len(StreamLogps._fields) else StreamDivergences
    return kind(*columns)


def _streams_of(call: checks.Call, streams: Any, reader: CreditConfig | Method) -> tuple[str, ...]:
    """Return the streams to score: all that are read, or those of them that were chosen."""
    known = ("clean", *reader.streams)
    if streams is None:
        return known
    chosen = tuple(streams) if isinstance(streams, Iterable) and not isinstance(streams, str) else (streams,)
    if isinstance(streams, str) or not all(isinstance(x, str) and x in known for x in chosen):
        fix = "pass streams=None, and the credit that will read them as credit="
        call.fail(ConfigError, "streams", repr(streams), f"a selection of {known}, which the credit reads", fix)
    return chosen


def _renamed(call: checks.Call, ablation: Any, method: Any) -> Any:
    """Return `ablation`, also under its old name."""
    if method is not None:
        message = "srpo: score_streams(method=) is now ablation=; the old name goes with the next release"
        warnings.warn(message, DeprecationWarning, stacklevel=4)  # past no_grad, to the caller
        if ablation is not None:
            call.fail(ConfigError, "method", repr(method), "None beside ablation=", "drop method")
    return method if ablation is None else ablation


def _check_settings(
    call: checks.Call,
    input_ids: Tensor,
    logits_to_keep: Any,
    batch_size: Any,
    ablation: Any,
    corruption: Any,
) -> None:
    S = input_ids.shape[1]
    if not is_int(logits_to_keep) or not 0 < logits_to_keep < S:
        fix = "pass completion_ids.size(1)"
        call.fail(ConfigError, "logits_to_keep", repr(logits_to_keep), f"an int in [1, {S - 1}]", fix)
    if batch_size is not None and not (is_int(batch_size) and batch_size > 0):
        call.fail(ConfigError, "batch_size", repr(batch_size), "None or a positive int", "pass batch_size=None")
    if ablation not in (None, "mask", "delete"):
        call.fail(ConfigError, "ablation", repr(ablation), "None, 'mask' or 'delete'", "pass ablation=None")
    if isinstance(corruption, type) or not callable(getattr(corruption, "on_inputs", None)):
        fix = "pass PatchMask() or another of srpo.vision.corruption"
        call.fail(ConfigError, "corruption", describe(corruption), "a corruption with on_inputs", fix)
