"""The inputs of the corrupted stream: what the caller's processor made, or pixels corrupted where they lie."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from srpo.checks import Call
from srpo.errors import ConfigError, DeviceError, DtypeError, ShapeError, describe
from srpo.vision.corruption import PatchMask
from srpo.vision.cuts import is_pixels
from srpo.vision.inputs import ModelInputs, row_cuts
from srpo.vision.pixels import PICTURE_ROAD, PixelLayout
from srpo.vision.seeds import Prompt, bytes_of, picture_bytes, seed_of

_TEXT = ("input_ids", "attention_mask")


def check_corrupted(call: Call, whole: ModelInputs, corrupted: Any) -> None:
    """Check what the processor made of corrupted pictures against what it made of the clean ones."""
    name = "corrupted_inputs"
    if not isinstance(corrupted, Mapping):
        fix = "pass dict(processor(text=..., images=corrupt_images(...), ...))"
        call.fail(DtypeError, name, describe(corrupted), "a mapping of model inputs", fix)
    given = taken_from(whole, corrupted)
    if not any(is_pixels(key) for key in given):
        fix = "pass what the processor made of corrupt_images(...)"
        call.fail(ConfigError, name, f"the names {sorted(corrupted)}", "pixels such as pixel_values", fix)
    for key, x in given.items():
        clean, argument = whole.multimodal.get(key), f"{name}[{key!r}]"
        if clean is None:
            fix = f"pass {key} of the clean pictures to score_streams too, or leave it out"
            call.fail(ConfigError, argument, describe(x), "names of the clean inputs", fix)
        fix = "corrupt pictures with corrupt_images, which keeps their sizes, and process them like the clean ones"
        if not isinstance(x, Tensor) or not isinstance(clean, Tensor):
            if type(x) is not type(clean) or (isinstance(x, list | tuple) and len(x) != len(clean)):
                call.fail(ShapeError, argument, describe(x), describe(clean), fix)
            continue
        sizes = not x.is_floating_point() and not is_pixels(key)  # grids, sizes, masks: the geometry stays
        if x.shape != clean.shape:
            call.fail(ShapeError, argument, describe(x), f"{list(clean.shape)}, as the clean pictures have", fix)
        if x.device != clean.device:
            call.fail(DeviceError, argument, str(x.device), str(clean.device), f"move it with .to({clean.device})")
        if sizes and not torch.equal(x, clean.to(x.dtype)):
            call.fail(ShapeError, argument, "other values", "those of the clean pictures", fix)


def taken_from(whole: ModelInputs, corrupted: Mapping[str, Any]) -> dict[str, Any]:
    """Return what replaces clean inputs; what has an entry per token stays as it is."""
    return {
        name: x
        for name, x in corrupted.items()
        if x is not None and name not in _TEXT and not whole.is_aligned(name, whole.multimodal.get(name))
    }


def corrupted_context(
    call: Call,
    model: Any,
    whole: ModelInputs,
    T: int,
    corrupted_inputs: Mapping[str, Any] | None,
    corruption: Any,
    generator: torch.Generator | int | None,
    layout: PixelLayout | None,
) -> ModelInputs:
    """Corrupt the whole batch before it is split: what a picture becomes must not depend on the split."""
    if corrupted_inputs is not None:
        return replace(whole, multimodal=whole.multimodal | taken_from(whole, corrupted_inputs))
    layout = PixelLayout.of_model(model) if layout is None else layout
    if not isinstance(layout, PixelLayout):
        fix = "pass None, or PixelLayout.of_processor(processor)"
        call.fail(ConfigError, "pixel_layout", describe(layout), "a PixelLayout", fix)
    if isinstance(corruption, PatchMask) and layout.kind == "tiled":
        _check_views(call, whole, corruption)
    if generator is None and getattr(corruption, "is_per_picture", False):
        return _by_row(whole, row_cuts(call, whole), T, corruption, layout)
    if generator is None:
        prompts = sorted(bytes_of(ids[mask != 0]) for ids, mask in _prompts(whole, T))
        generator = seed_of(*dict.fromkeys(prompts))
    return replace(whole, multimodal=corruption.on_inputs(whole.multimodal, layout, generator=generator))


def _by_row(whole: ModelInputs, cuts: Mapping[str, Any], T: int, corruption: Any, layout: PixelLayout) -> ModelInputs:
    """Corrupt each sequence by a seed of its pictures and its prompt."""
    parts: dict[str, list[Tensor]] = {name: [] for name in whole.multimodal if is_pixels(name)}
    rows = [whole.rows(slice(i, i + 1), cuts).multimodal for i in range(len(whole.input_ids))]
    prompts = [ids[mask != 0] for ids, mask in _prompts(whole, T)]
    for i, dark in enumerate(corrupted_rows(rows, prompts, corruption, layout, "score_streams")):
        for name, kept in parts.items():
            if name in dark:
                kept.append(dark[name])
            elif name in cuts and cuts[name] == list(range(len(whole.input_ids) + 1)):
                kept.append(whole.multimodal[name][i : i + 1])  # padding, in the place of a picture
    return replace(whole, multimodal=whole.multimodal | {name: torch.cat(kept) for name, kept in parts.items()})


def corrupted_rows(
    rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt], corruption: Any, layout: PixelLayout, function: str
) -> list[Mapping[str, Any]]:
    """Corrupt the pixels of each sequence by a seed of its pictures and its prompt; its rollouts share the work."""
    known: dict[int, dict[str, Any]] = {}  # pixels by seed
    out = []
    for row, prompt in zip(rows, prompts, strict=True):
        seen = [picture_bytes(layout.to_bytes(x.one_frame())) for x in layout.pictures(row, function)]
        seed = seed_of(bytes_of(prompt), *seen)
        if seen and seed not in known:
            dark = corruption.on_inputs(row, layout, generator=seed)
            known[seed] = {name: x for name, x in dark.items() if is_pixels(name)}
        out.append({**row, **known.get(seed, {})})
    return out


def _prompts(whole: ModelInputs, T: int) -> list[tuple[Tensor, Tensor]]:
    ids, mask = whole.input_ids[:, :-T].cpu(), whole.attention_mask[:, :-T].cpu()
    return list(zip(ids, mask, strict=True))


def _check_views(call: Call, whole: ModelInputs, corruption: Any) -> None:
    """Refuse masks per tile for pictures that appear as several tiles and a thumbnail: they would show through.

    The tiles of a picture are introduced by other tokens than its thumbnail, or than a picture that is whole.
    """
    where = whole.tokens_of("image")
    if where is None:
        return
    starts = where[:, 1:] & ~where[:, :-1]
    if len(set(whole.input_ids[:, :-1][starts].tolist())) > 1:
        got, expected = f"{type(corruption).__name__} for pictures in several tiles", "one mask for each picture"
        call.fail(ConfigError, "corruption", got, expected, PICTURE_ROAD)
