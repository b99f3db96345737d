"""The inputs of a vision-language model, cut by rows and by columns: pixels follow the sequences they belong to."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from srpo.checks import Call
from srpo.errors import ConfigError, ShapeError, describe, nearest
from srpo.vision.access import backbone_of, names_taken
from srpo.vision.cuts import Offsets, Placeholders, alike_units, cuts_of, grids_of, is_pixels, kind_of

_CALLER_ONLY = ("num_images",)  # TRL's bookkeeping; no model takes it
# What a forward takes and scoring has no use for, and why.
_NOT_INPUTS = {
    "inputs_embeds": "tokens are scored by their ids",
    "labels": "the tokens that are scored are those of input_ids",
    "return_dict": "logits are read by name",
    "cache": "sequences are scored as they are",
    "past_key_values": "sequences are scored as they are",
    "output_hidden_states": "log-probs are returned",
    "output_attentions": "log-probs are returned",
}
_TYPES = ("token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class ModelInputs:
    """Inputs of a batch.

    Args:
        input_ids, attention_mask: `[B, S]`.
        position_ids: `[B, S]`, `[k, B, S]` with mRoPE, or None for a model that takes none.
        multimodal: everything else the model is called with.
        image_token, video_token: the ids that stand for a part of an image or a video; None where the config names
            none: pictures then lie beside the tokens, or where only the model knows.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor | None
    multimodal: dict[str, Any]
    image_token: int | None
    video_token: int | None

    def kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of the model."""
        mask = self.attention_mask
        mask = torch.where(mask.any(dim=1, keepdim=True), mask, torch.ones_like(mask))  # mRoPE asks for a token a row
        named = {"input_ids": self.input_ids, "attention_mask": mask}
        if self.position_ids is not None:
            named["position_ids"] = self.position_ids
        return named | {name: x for name, x in self.multimodal.items() if name not in _CALLER_ONLY}

    def has_pixels(self, kind: str | None = None) -> bool:
        """Say whether there is an `"image"`, or a `"video"`, or any of the two."""
        kinds = ("image", "video") if kind is None else (kind,)
        return any(is_pixels(name) and kind_of(name) in kinds and len(x) for name, x in self.multimodal.items())

    def tokens_of(self, kind: str) -> Tensor | None:
        """Return `[B, S]`, true where a part of an `"image"` or `"video"` is put; None where nothing tells."""
        marked = self.multimodal.get("image_embeds_position_mask") if kind == "image" else None
        if marked is not None:  # Kosmos-2: the tokens there are of no one kind
            return marked != 0
        token = self.image_token if kind == "image" else self.video_token
        return None if token is None else self.input_ids == token

    def picture_tokens(self) -> Tensor:
        """Return `[B, S]`, true where a part of a picture is known to be put."""
        found = [x for kind in ("image", "video") if (x := self.tokens_of(kind)) is not None]
        return torch.stack(found).any(dim=0) if found else torch.zeros_like(self.input_ids, dtype=torch.bool)

    def with_picture(self) -> Tensor:
        """Return `[B]`, true where a sequence has a picture; all that might have one where nothing tells."""
        has = torch.zeros(len(self.input_ids), dtype=torch.bool, device=self.input_ids.device)
        for kind in ("image", "video"):
            if self.has_pixels(kind):
                tokens = self.tokens_of(kind)
                has = has | (True if tokens is None else tokens.any(dim=1))
        return has

    def with_features(self, features: dict[str, Any] | None) -> "ModelInputs":
        """Return the inputs with the output of the vision tower in place of the pixels."""
        if features is None:
            return self
        rest = {name: x for name, x in self.multimodal.items() if not is_pixels(name)}
        return replace(self, multimodal=rest | {"mm_encoder_outputs": features})

    def is_aligned(self, name: str, x: Any) -> bool:
        """Say whether a multimodal input `[B, S, ...]` has one entry per token."""
        shape = tuple(getattr(x, "shape", ()))
        if shape[:2] != tuple(self.input_ids.shape) or is_pixels(name):
            return False
        # A picture may have as many patches as a sequence has tokens: its patches are then those of the pixels.
        pixels = (y for other, y in self.multimodal.items() if is_pixels(other) and isinstance(y, Tensor))
        return kind_of(name) is None or all(tuple(y.shape[:2]) != shape[:2] for y in pixels)

    def columns(self, index: slice | Tensor) -> "ModelInputs":
        """Take columns of everything that has one per token: a slice, or an index `[B, S']` for each row."""

        def take(x: Tensor, dim: int = 1) -> Tensor:
            if isinstance(index, slice):
                return x[..., index] if dim == -1 else x[:, index]
            if dim == -1:
                return x.gather(-1, index.expand(*x.shape[:-2], *index.shape))
            return x.gather(1, index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))

        aligned = {name: take(x) if self.is_aligned(name, x) else x for name, x in self.multimodal.items()}
        positions = None if self.position_ids is None else take(self.position_ids, -1).contiguous()  # Kosmos-2 views it
        return replace(
            self, input_ids=take(self.input_ids), attention_mask=take(self.attention_mask), position_ids=positions,
            multimodal=aligned,
        )  # fmt: skip

    def rows(self, rows: slice, cuts: Mapping[str, Offsets] | None) -> "ModelInputs":
        """Take consecutive sequences with what belongs to them, as `row_cuts` says; None: these are all of them."""
        if cuts is None:
            return self
        chosen: dict[str, Any] = {}
        gone = {kind for kind in ("image", "video") if self._has_none(kind, rows)}
        for name, x in self.multimodal.items():
            if self.is_aligned(name, x):
                chosen[name] = x[rows]
            elif kind_of(name) not in gone:  # a model that is given no image must not be given empty pixels
                offsets = cuts.get(name)
                chosen[name] = x if offsets is None else x[offsets[rows.start] : offsets[rows.stop]]
        positions = None if self.position_ids is None else self.position_ids[..., rows, :]
        return replace(
            self, input_ids=self.input_ids[rows], attention_mask=self.attention_mask[rows], position_ids=positions,
            multimodal=chosen,
        )  # fmt: skip

    def _has_none(self, kind: str, rows: slice) -> bool:
        tokens = self.tokens_of(kind)
        return tokens is not None and not bool(tokens[rows].any())


def row_cuts(call: Call, inputs: ModelInputs) -> dict[str, Offsets]:
    """Return where to cut what has entries, so that each sequence gets its own.

    Raises: ShapeError, which names the tensor that nothing tells how to cut.
    """
    rest = {name: x for name, x in inputs.multimodal.items() if not inputs.is_aligned(name, x)}
    where = {kind: inputs.tokens_of(kind) for kind in ("image", "video")}
    placeholders = {kind: None if x is None else Placeholders.of(x) for kind, x in where.items()}
    return cuts_of(call, rest, placeholders, len(inputs.input_ids))


def check_inputs(
    call: Call, model: Any, input_ids: Tensor, attention_mask: Any, T: int, multimodal: Mapping[str, Any],
    padding_counts: bool,
) -> ModelInputs:  # fmt: skip
    """Check the inputs of a model against each other; positions are still missing. The last T columns are sampled."""
    call.tensor("input_ids", input_ids, [tuple(input_ids.shape)], "[B, S]", "int")
    call.tensor("attention_mask", attention_mask, [tuple(input_ids.shape)], "[B, S]", "mask")
    backbone = backbone_of(model)
    _check_names(call, model, multimodal)
    given = {name: x for name, x in multimodal.items() if x is not None and name != "use_cache"}
    for name in (*_TYPES, "position_ids"):
        x = given.get(name)
        if x is not None and tuple(x.shape[-2:]) != tuple(input_ids.shape):
            fix = "give them one entry per token of prompt and completion"
            call.fail(ShapeError, name, describe(x), f"[B, S] = {list(input_ids.shape)}", fix)
    _check_positions(call, given.get("position_ids"), attention_mask != 0, T)
    fix = "mask what is no token: only masked cells may hold -100"
    call.within("input_ids", input_ids, 0, torch.iinfo(input_ids.dtype).max, attention_mask != 0, "token ids", fix)
    inputs = model_inputs(model, input_ids.clamp(min=0), attention_mask, given)
    merge = getattr(getattr(backbone.config, "vision_config", None), "spatial_merge_size", 1)
    _check_placeholders(call, inputs, T, merge)
    _check_masks(call, inputs, T)
    if not padding_counts:
        _check_padding(call, inputs, _pad_token_of(backbone.config))
    _check_questions(call, given.get("qformer_attention_mask"))
    if inputs.has_pixels():
        _check_token_types(call, inputs, inspect.signature(backbone.forward).parameters, T)
    return inputs


def _check_positions(call: Call, positions: Tensor | None, visible: Tensor, T: int) -> None:
    """Check where the axes of mRoPE are: verl has them second, which looks alike where B is as many."""
    if positions is None or positions.dim() != 3:
        return
    swapped = positions.shape[0] not in (3, 4)
    if positions.shape[0] == positions.shape[1]:
        # text, such as every completion, has one position on all axes; only pictures have several
        axes, rows = (_all_equal(positions.movedim(axis, 0), visible) for axis in (0, 1))
        swapped = (not axes[:, -T:].all() and bool(rows[:, -T:].all())) or (bool(axes.all()) and not rows.all())
    if swapped:
        got, fix = describe(positions), "pass position_ids.transpose(0, 1) where they are verl's [B, 3, S]"
        call.fail(ShapeError, "position_ids", got, "[B, S], or [3, B, S] or [4, B, S] with mRoPE", fix)


def _all_equal(positions: Tensor, visible: Tensor) -> Tensor:
    """Say where all of the first axis agree, `[B, S]`; hidden cells do."""
    return (positions == positions[:1]).all(dim=0) | ~visible


def model_inputs(model: Any, input_ids: Tensor, attention_mask: Tensor, given: Mapping[str, Any]) -> ModelInputs:
    """Return the inputs of a model, with the tokens that its config names; nothing is checked."""
    tokens = (_token_of(backbone_of(model).config, kind) for kind in ("image", "video"))
    rest = {name: x for name, x in given.items() if name != "position_ids"}
    return ModelInputs(input_ids, attention_mask, given.get("position_ids"), rest, *tokens)


def _check_names(call: Call, model: Any, multimodal: Mapping[str, Any]) -> None:
    """Refuse names that nobody reads: a model takes any keyword, and a misspelt option would do nothing."""
    known = names_taken(model) | {*_CALLER_ONLY, *_TYPES}  # processors make token types for models that read none
    for name, why in _NOT_INPUTS.items():
        if multimodal.get(name) is not None:
            call.fail(ConfigError, name, describe(multimodal[name]), f"no such input: {why}", "leave it out")
    for name, x in multimodal.items():
        if x is not None and name not in known:
            own = [*_own_options(), *known]
            close = {"seed": "generator"}.get(name) or nearest(name, own, "")
            fix = f"write {close}" if close else "leave it out"
            expected = "an option of score_streams, or an input of the model's forward"
            call.fail(ConfigError, name, describe(x), expected, fix)


def _own_options() -> tuple[str, ...]:
    from srpo.vision.scoring import score_streams

    return tuple(inspect.signature(score_streams).parameters)


def _token_of(config: Any, kind: str) -> int | None:
    """Return the id that stands for a part of a picture: the config's, or that of its vision half (Phi-4)."""
    for holder in (config, getattr(config, "vision_config", None)):
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            token = getattr(holder, name, None)
            if isinstance(token, int):
                return token
    return None


def _pad_token_of(config: Any) -> int | None:
    token = getattr(config.get_text_config(), "pad_token_id", None)
    token = getattr(config, "pad_token_id", None) if token is None else token
    return token if isinstance(token, int) else None


def _check_masks(call: Call, inputs: ModelInputs, T: int) -> None:
    """Check what masks show: prompts padded on the right, completions without a prompt."""
    valid = inputs.attention_mask != 0
    prompt, completion = valid[:, :-T], valid[:, -T:]
    name, fix = "attention_mask", "pad prompts on the left: processor(..., padding_side='left')"
    gaps = prompt.any(dim=1) & ~prompt[:, -1]  # BLIP-2 pads between picture and text
    if bool(gaps.any()):
        rows = gaps.nonzero()[:, 0].tolist()
        call.fail(ShapeError, name, f"padding behind tokens of the prompts {rows[:8]}", "prompts padded left", fix)
    alone = completion.any(dim=1) & ~prompt.any(dim=1)
    if bool(alone.any()):
        rows, expected = alone.nonzero()[:, 0].tolist(), "a token before each completion, which predicts its first"
        call.fail(ShapeError, name, f"completions without a prompt in rows {rows[:8]}", expected, "keep the prompt")


def _check_padding(call: Call, inputs: ModelInputs, pad: int | None) -> None:
    """Check that padding at the ends of sequences has a mask of 0."""
    if pad is None or inputs.input_ids.shape[1] < 2:
        return
    counted = (inputs.attention_mask != 0) & (inputs.input_ids == pad)
    twice = (counted[:, 0] & counted[:, 1]) | (counted[:, -1] & counted[:, -2])  # once may be a text that ends
    if bool(twice.any()):
        rows, fix = twice.nonzero()[:, 0].tolist(), "pass the tokenizer's mask, and the completion mask behind it"
        got = f"1 on padding at the ends of rows {rows[:8]} (id {pad})"
        expected = "0 on padding, or padding_counts=True where the policy saw it"
        call.fail(ShapeError, "attention_mask", got, expected, fix)


def _check_placeholders(call: Call, inputs: ModelInputs, T: int, merge: int) -> None:
    """Check that there is a picture for the image tokens, and one of the right size where sizes are known."""
    where = inputs.tokens_of("image")
    if where is None:
        return
    tokens, sampled = where.sum(dim=1).tolist(), int(where[:, -T:].sum())
    if not inputs.has_pixels("image"):
        if any(tokens) and not inputs.has_pixels("video"):  # GLM-4.xV puts frames where the image token is
            fix = "pass the pixel_values that the processor made"
            expected = f"pixels for the {sum(tokens)} image tokens of input_ids"
            call.fail(ConfigError, "pixel_values", "None", expected, fix)
        return
    own = {name: x for name, x in inputs.multimodal.items() if kind_of(name) == "image" and isinstance(x, Tensor)}
    name = next((name for name in own if is_pixels(name)), None)
    if name is None:
        return
    fix = "pass what the processor made of these images"
    if not any(tokens):
        fix = "pass the input_ids that the processor made, or no pixels"
        call.fail(ConfigError, name, describe(own[name]), "image tokens in input_ids too", fix)
    grids, n, explained = grids_of(own), len(own[name]), False
    if grids is not None:
        n_patches = int(grids.prod(dim=-1).sum())
        if n not in (n_patches, len(grids)):
            expected = f"{n} patches, as {name} holds"
            call.fail(ShapeError, "image_grid_thw", f"grids of {n_patches} patches", expected, fix)
        explained = n_patches // merge**2 == sum(tokens) - sampled
    _check_counts(call, inputs, None if grids is None else len(grids))
    units = alike_units(own)
    if units is not None and any(x * units % sum(tokens) for x in tokens) and not sampled:
        expected = f"pictures for {tokens} image tokens a sequence"
        call.fail(ShapeError, name, describe(own[name]), expected, fix)
    # Sampled image tokens: the prompts' are what the pictures take, or they are fewer than the share of a picture.
    if sampled and (explained or (units is not None and sampled * units < sum(tokens) - sampled)):
        fix = "forbid the image token while sampling (suppress_tokens)"
        call.fail(ConfigError, "input_ids", f"{sampled} image tokens in the completion", "images for them", fix)


def _check_counts(call: Call, inputs: ModelInputs, n_pictures: int | None) -> None:
    """Compare the caller's `num_images` with the sequences, and with the pictures where they can be counted."""
    given = inputs.multimodal.get("num_images")
    if given is None:
        return
    counts, B = [int(n) for n in given], len(inputs.input_ids)
    if len(counts) != B or n_pictures not in (None, sum(counts)):
        total = "" if n_pictures is None else f", {n_pictures} in all"
        expected = f"the number of pictures of each of {B} sequences{total}"
        call.fail(ShapeError, "num_images", repr(counts), expected, "leave it out, or count again")


def _check_questions(call: Call, mask: Tensor | None) -> None:
    """Check the padding of a Q-Former's question, whose positions count from the first column."""
    if mask is not None and bool((mask.any(dim=1) & (mask[:, 0] == 0)).any()):
        fix = "pass what processor.qformer_tokenizer(texts, padding=True, padding_side='right') returns"
        got, expected = "padding on the left", "padding on the right, which moves no position of the Q-Former"
        call.fail(ConfigError, "qformer_attention_mask", got, expected, fix)


def _check_token_types(call: Call, inputs: ModelInputs, accepted: Mapping[str, Any], T: int) -> None:
    """Check that token types, where the model reads them, tell pictures from what was sampled.

    They decide positions (Qwen) or who sees whom (Gemma 3, PaliGemma), and a model does without in silence.
    """
    tokens, valid = inputs.picture_tokens(), inputs.attention_mask != 0
    if not inputs.has_pixels("video") and (video := inputs.tokens_of("video")) is not None:
        tokens = tokens & ~video  # sampled: to a model that is given no video they are text
    for name in _TYPES:
        if name not in accepted or not bool(tokens.any()):
            continue
        types = inputs.multimodal.get(name)
        if types is None:
            fix = "pass them for the whole sequence, the completion with the value of text"
            call.fail(ConfigError, name, "None", "the processor's, which the model reads without saying so", fix)
        of_pictures = set(types[tokens & valid].tolist())
        of_text = set(types[:, -T:][(valid & ~tokens)[:, -T:]].tolist())
        if of_pictures & of_text or (0 in of_pictures and len(of_pictures) > 1):
            got = f"{sorted(of_pictures)} on image tokens and {sorted(of_text)} on the completion"
            fix = "pad them like input_ids, on the left, and give the completion the value of text"
            call.fail(ConfigError, name, got, "values that tell the two apart", fix)
