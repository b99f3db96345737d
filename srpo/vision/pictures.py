"""Corrupt pictures before the processor: the road that every family of models has."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srpo.errors import ConfigError, DtypeError, ShapeError, describe, is_int, refuse
from srpo.vision.corruption import RGB, Cell, Corruption, PatchMask, image_of, pixels_of
from srpo.vision.seeds import Prompt, bytes_of, picture_bytes, seed_of

# Cells where no processor tells: so many on the shorter side, and none so small that resizing would blur it away.
_CELLS_A_SIDE, _SMALLEST = 16, 8


def corrupt_images(
    images: Sequence[Any],
    corruption: Any = PatchMask(),  # noqa: B008 - frozen
    *,
    seed: int | Sequence[Prompt],
    processor: Any = None,
) -> list[Any]:
    """Corrupt pictures before the processor, which then makes the `corrupted_inputs` of `score_streams`.

        dark = corrupt_images(images, PatchMask(), seed=prompts)
        corrupted = processor(text=prompts, images=dark, padding=True, return_tensors="pt")

    Args:
        images: a list of PIL pictures, or of what each sequence has: a picture, None, or a list of pictures. A list in
            the place of a picture is a video: all its frames get the same corruption.
        corruption: one of `srpo.vision.corruption`. A `PatchMask` without `cell` cuts a picture into cells of one image
            token where `processor` tells how many a picture takes, else of 1/16 of the shorter side, or 8 pixels.
        seed: a number, or for each entry of `images` its prompt, as text or token ids. A picture is corrupted by the
            seed of its own pixels and of this: alike in all rollouts of a prompt, wherever they are in whatever batch.
        processor: of the model, which is asked for the number of image tokens.

    Returns: lists as they came, with new RGB pictures of the same sizes.

    Gradient: none.

    Memory: the corrupted pictures, equal ones once.

    Raises: ConfigError, DtypeError, ShapeError.

    Example:
        >>> from PIL import Image
        >>> picture = Image.new("RGB", (64, 48), "white")
        >>> (dark,), none = corrupt_images([[picture], None], srpo.PatchMask(0.6), seed=["how many?", "what?"])
        >>> dark.size, none, dark.getpixel((0, 0)) in ((0, 0, 0), (255, 255, 255))
        ((64, 48), None, True)
    """
    function = "corrupt_images"
    if not isinstance(corruption, Corruption):
        expected, fix = "one of srpo.vision.corruption", "pass PatchMask(), or corrupt the pictures yourself"
        refuse(ConfigError, function, "corruption", describe(corruption), expected, fix)
    if isinstance(images, str) or not isinstance(images, Sequence):
        refuse(DtypeError, function, "images", describe(images), "a list", "pass [picture]")
    found: list[tuple[Tensor, int]] = []  # the frames of each picture, and its seed
    keys = _prompt_keys(seed, len(images), function)
    for item, key in zip(images, keys, strict=True):
        _map_pictures(item, 0, lambda frames, key=key: found.append((frames, seed_of(key, picture_bytes(frames)))))
    seeds = [own for _, own in found]
    unique = dict(sorted({own: frames for frames, own in found}.items()))  # in whatever order they came
    pixels = list(unique.values())
    cells = [_cells(corruption, frames, processor) for frames in pixels]
    if not corruption.is_per_picture:
        whole = seed_of(*(str(own).encode() for own in unique))
        unique_seeds = [whole] * len(unique)
    else:
        unique_seeds = list(unique)
    draws = [np.random.Generator(np.random.PCG64(own)) for own in unique_seeds]
    dark = dict(zip(unique, corruption._corrupt_all(pixels, range(len(pixels)), RGB, cells, draws), strict=True))
    ready = iter([[image_of(frame) for frame in dark[own]] for own in seeds])
    return [_map_pictures(item, 0, lambda _: next(ready)) for item in images]


def _prompt_keys(seed: Any, n: int, function: str) -> list[bytes]:
    """Return for each of n entries the bytes that its prompt adds to the seeds of its pictures."""
    if is_int(seed) or isinstance(seed, np.integer):
        return [bytes_of(int(seed))] * n
    if not isinstance(seed, Sequence) or isinstance(seed, str | bytes):
        expected, fix = "an int, or the prompt of each entry of images", "pass seed=0, or seed=prompts"
        refuse(ConfigError, function, "seed", describe(seed), expected, fix)
    if len(seed) != n:
        refuse(
            ShapeError, function, "seed", f"{len(seed)} prompts", f"{n}, one for each entry of images", "pass seed=0"
        )
    return [bytes_of(prompt) for prompt in seed]


def _map_pictures(item: Any, depth: int, change: Callable[[Tensor], Any]) -> Any:
    """Change each picture, or each list of frames, as pixels `[frames, 3, H, W]`; lists and None stay what they are."""
    from PIL import Image

    function, fix = "corrupt_images", "open files with PIL.Image.open; one list for a sequence, one more for a video"
    if item is None:
        return None
    if isinstance(item, Image.Image):
        made = change(pixels_of(item)[None])
        return made[0] if made else made
    if not isinstance(item, list | tuple) or depth > 1:
        refuse(DtypeError, function, "images", describe(item), "PIL.Image.Image items", fix)
    if depth == 0:
        return [_map_pictures(x, 1, change) for x in item]
    frames = [x for x in item if isinstance(x, Image.Image)]
    if len(frames) != len(item) or len({frame.size for frame in frames}) > 1:
        refuse(DtypeError, function, "images", describe(item), "a video: PIL.Image.Image frames of one size", fix)
    return change(torch.stack([pixels_of(frame) for frame in frames])) if frames else []


def _cells(corruption: Corruption, frames: Tensor, processor: Any) -> Cell:
    """Return into which cells a picture is cut: those of the corruption, image tokens, or a share of the side."""
    own = getattr(corruption, "cell", None)
    if own is not None:
        return own
    H, W = frames.shape[-2:]
    side = max(min(H, W) / _CELLS_A_SIDE, _SMALLEST)
    with contextlib.suppress(Exception):  # a private method of many authors, which few of them call
        (n,) = processor._get_num_multimodal_tokens(image_sizes=[[H, W]])["num_image_tokens"]
        side = math.sqrt(H * W / n)
    return max(1, round(H / side)), max(1, round(W / side))
