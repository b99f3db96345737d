"""The inputs of a vision-language model, cut by rows and by columns: pixels follow the sequences they belong to."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from srpo.checks import Call, describe
from srpo.errors import ConfigError, ShapeError
from srpo.vision.access import backbone_of

# What one entry of a vision tensor belongs to, where that is not the image. Anything else is one entry a sequence.
_UNITS = {"pixel_values": "pixels", "pixel_attention_mask": "sequence", "spatial_shapes": "pixels"}
_VISION = ("pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes", "spatial_shapes",
           "image_position_ids", "mm_encoder_outputs")  # fmt: skip
_CALLER_ONLY = ("num_images",)  # TRL's bookkeeping; no model takes it


@dataclass(frozen=True)
class ModelInputs:
    """Inputs of a batch.

    Args:
        input_ids, attention_mask: `[B, S]`.
        position_ids: `[B, S]`, `[k, B, S]` with mRoPE, or None for a model that takes none.
        multimodal: everything else the model is called with.
        image_token: the id that stands for a part of an image; None for a model without.
        merge: `spatial_merge_size`: patches per side of an image token, where grids are given.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor | None
    multimodal: dict[str, Any]
    image_token: int | None
    merge: int

    def kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of the model."""
        named = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.position_ids is not None:
            named["position_ids"] = self.position_ids
        return named | {name: x for name, x in self.multimodal.items() if name not in _CALLER_ONLY}

    @property
    def has_pixels(self) -> bool:
        """Say whether there is an image."""
        pixels = self.multimodal.get("pixel_values")
        return pixels is not None and pixels.numel() > 0

    def image_tokens(self) -> Tensor:
        """Return `[B, S]`, true where an image feature is put."""
        if self.image_token is None:
            return torch.zeros_like(self.input_ids, dtype=torch.bool)
        return self.input_ids == self.image_token

    def with_features(self, features: dict[str, Any] | None) -> "ModelInputs":
        """Return the inputs with the output of the vision tower in place of the pixels."""
        if features is None:
            return self
        rest = {name: x for name, x in self.multimodal.items() if name != "pixel_values"}
        return replace(self, multimodal=rest | {"mm_encoder_outputs": features})

    def is_aligned(self, name: str, x: Any) -> bool:
        """Say whether a multimodal input has one entry per token."""
        return name not in _VISION and getattr(x, "shape", None) == self.input_ids.shape

    def columns(self, index: slice | Tensor) -> "ModelInputs":
        """Take columns of everything that has one per token: a slice, or an index `[B, S']` for each row."""

        def take(x: Tensor) -> Tensor:
            if isinstance(index, slice):
                return x[..., index]
            return x.gather(-1, index if x.dim() == 2 else index.expand(*x.shape[:-2], *index.shape))

        aligned = {name: take(x) if self.is_aligned(name, x) else x for name, x in self.multimodal.items()}
        positions = None if self.position_ids is None else take(self.position_ids)
        return replace(
            self, input_ids=take(self.input_ids), attention_mask=take(self.attention_mask), position_ids=positions,
            multimodal=aligned,
        )  # fmt: skip

    def rows(self, rows: slice, images: list[int] | None) -> "ModelInputs":
        """Take consecutive sequences with the pixels of their images, of which `images` says how many each has."""
        chosen: dict[str, Any] = {}
        has_any = bool(self.image_tokens()[rows].any())
        spans = self._spans(rows, images)
        for name, x in self.multimodal.items():
            if name not in _VISION:
                chosen[name] = x[rows] if name in _CALLER_ONLY or self._is_per_sequence(x) else x
            elif has_any:  # a model that is given no image must not be given empty pixels
                chosen[name] = x[spans[_UNITS.get(name, "image")]]
        positions = None if self.position_ids is None else self.position_ids[..., rows, :]
        return replace(
            self, input_ids=self.input_ids[rows], attention_mask=self.attention_mask[rows], position_ids=positions,
            multimodal=chosen,
        )  # fmt: skip

    def _is_per_sequence(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == self.input_ids.shape[0]

    def _spans(self, rows: slice, images: list[int] | None) -> dict[str, slice]:
        """Return which entries of vision tensors belong to some sequences, by unit."""
        if images is None:
            return dict.fromkeys(("sequence", "image", "pixels"), rows)
        first, last = sum(images[: rows.start]), sum(images[: rows.stop])
        pixels = slice(first, last)
        grid = self.multimodal.get("image_grid_thw")
        if grid is not None:
            patches = grid.prod(dim=1).tolist()
            pixels = slice(sum(patches[:first]), sum(patches[:last]))
        return {"sequence": rows, "image": slice(first, last), "pixels": pixels}


def check_inputs(
    call: Call, model: Any, input_ids: Tensor, attention_mask: Any, T: int, multimodal: Mapping[str, Any]
) -> ModelInputs:
    """Check the inputs of a model against each other; positions are still missing. The last T columns are sampled."""
    call.tensor("input_ids", input_ids, [tuple(input_ids.shape)], "[B, S]", "int")
    call.tensor("attention_mask", attention_mask, [tuple(input_ids.shape)], "[B, S]", "mask")
    config = backbone_of(model).config
    names = ("image_token_id", "image_token_index")
    image_token = next((x for name in names if (x := getattr(config, name, None)) is not None), None)
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1)
    given = {name: x for name, x in multimodal.items() if x is not None and name != "use_cache"}
    for name in ("mm_token_type_ids", "position_ids"):
        x = given.get(name)
        if x is not None and tuple(x.shape[-2:]) != tuple(input_ids.shape):
            fix = "give them one entry per token of prompt and completion"
            call.fail(ShapeError, name, describe(x), f"[B, S] = {list(input_ids.shape)}", fix)
    inputs = ModelInputs(input_ids, attention_mask, given.pop("position_ids", None), given, image_token, merge)
    _check_image_tokens(call, inputs, T)
    return inputs


def _check_image_tokens(call: Call, inputs: ModelInputs, T: int) -> None:
    """Check that there is a picture for the image tokens, and one of the right size where sizes are given."""
    if "inputs_embeds" in inputs.multimodal:
        return
    tokens = inputs.image_tokens()
    n_tokens, sampled = int(tokens.sum()), int(tokens[:, -T:].sum())
    if inputs.image_token is not None and inputs.has_pixels and not n_tokens:
        fix = "pass the input_ids that the processor made, or no pixels"
        got = describe(inputs.multimodal["pixel_values"])
        call.fail(ConfigError, "pixel_values", got, "image tokens in input_ids too", fix)
    n_taken = _tokens_taken(call, inputs, n_tokens - sampled, sampled) if inputs.has_pixels else 0
    if n_tokens == n_taken:
        return
    if sampled and n_tokens - sampled == n_taken:
        fix = "forbid the image token while sampling (suppress_tokens)"
        call.fail(ConfigError, "input_ids", f"{sampled} image tokens in the completion", "images for them", fix)
    if not inputs.has_pixels:
        fix = "pass the pixel_values that the processor made"
        call.fail(ConfigError, "pixel_values", "None", f"pixels for the {n_tokens} image tokens of input_ids", fix)
    expected = f"grids of {n_tokens} tokens, as input_ids holds"
    fix = "pass what the processor made of these images"
    call.fail(ShapeError, "image_grid_thw", f"grids of {n_taken} tokens", expected, fix)


def _tokens_taken(call: Call, inputs: ModelInputs, prompted: int, sampled: int) -> int:
    """Return how many image tokens the pictures take, of those in prompts and completions."""
    pixels, grid = inputs.multimodal["pixel_values"], inputs.multimodal.get("image_grid_thw")
    if grid is None:  # sizes are the model's business, but no picture takes fewer tokens than its share of the prompts'
        pictures = int((pixels != 0).flatten(2).any(dim=2).sum()) if pixels.dim() == 5 else len(pixels)
        return prompted if sampled * pictures < prompted else prompted + sampled
    n_patches = int(grid.prod(dim=-1).sum())
    if n_patches != len(pixels):
        fix = "pass what the processor made of these images"
        expected = f"{len(pixels)} patches, as pixel_values holds"
        call.fail(ShapeError, "image_grid_thw", f"grids of {n_patches} patches", expected, fix)
    return n_patches // inputs.merge**2


def images_per_row(call: Call, inputs: ModelInputs) -> list[int] | None:
    """Count the images of each sequence by its image tokens; None where pixels come one entry a sequence."""
    pixels = inputs.multimodal.get("pixel_values")
    if pixels is None or not inputs.has_pixels:
        return None
    grid = inputs.multimodal.get("image_grid_thw")
    if pixels.dim() == 5 and grid is None and len(pixels) == len(inputs.input_ids):
        return None
    tokens = inputs.image_tokens().sum(dim=1).tolist()
    if grid is None:
        size = sum(tokens) / max(len(pixels), 1)  # without grids all images take equally many tokens
        sizes = [size] * len(pixels)
    else:
        sizes = (grid.prod(dim=1) // inputs.merge**2).tolist()
    given = _given_counts(call, inputs, tokens, sizes)
    if given is not None:
        return given
    counts, remaining = [], iter(sizes)
    for left in tokens:
        n = 0
        while left > 0:
            left, n = left - next(remaining, left + 1), n + 1  # noqa: PLW2901
        if left < 0:
            fix = "pass num_images, the number of images of each sequence"
            call.fail(ShapeError, "pixel_values", describe(pixels), "images that end where sequences do", fix)
        counts.append(n)
    return counts


def _given_counts(call: Call, inputs: ModelInputs, tokens: list[int], sizes: list[float]) -> list[int] | None:
    """Return the caller's `num_images` after comparing it with the image tokens of each sequence."""
    given = inputs.multimodal.get("num_images")
    if given is None:
        return None
    counts, expected = [int(n) for n in given], f"numbers of images whose tokens are {tokens} a sequence"
    ends = [0, *itertools.accumulate(counts)]
    found = [sum(sizes[first:last]) for first, last in itertools.pairwise(ends)]
    if ends[-1] != len(sizes) or len(counts) != len(tokens) or found != tokens:
        call.fail(ShapeError, "num_images", repr(counts), expected, "drop it: images are counted by their tokens")
    return counts
