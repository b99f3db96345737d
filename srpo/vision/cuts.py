"""Which entries of each vision tensor belong to which sequence, read off the inputs.

The first dimension of a vision tensor counts pictures, tiles, patches, or sequences, as the processor pleases. Three
things tell: the tokens that pictures take in each sequence, the runs that these tokens form, and what describes the
pictures (grids, sizes, counts). An answer that these do not force is refused by name.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from srpo.checks import Call
from srpo.errors import ShapeError, describe

# Where the entries of each sequence start, and the last ones end: B + 1 offsets.
Offsets = list[int]

_IMAGE_WORDS = ("pixel", "image", "patch", "spatial", "tile", "crop", "grid", "target_size", "aspect")
_VIDEO_WORDS = ("video", "second_per_grid")


class Placeholders(NamedTuple):
    """The tokens that stand for the pictures or videos of each sequence: their number, and the runs they form."""

    tokens: list[int]
    runs: list[int]

    @classmethod
    def of(cls, where: Tensor) -> "Placeholders":
        """Count them in `where` `[B, S]`."""
        starts = where & ~torch.nn.functional.pad(where, (1, 0))[:, :-1]
        return cls(where.sum(dim=1).tolist(), starts.sum(dim=1).tolist())


def kind_of(name: str) -> str | None:
    """Say whether a model input describes `"video"`s or `"image"`s, by its name."""
    if any(word in name for word in _VIDEO_WORDS):
        return "video"
    return "image" if any(word in name for word in _IMAGE_WORDS) else None


def is_pixels(name: str) -> bool:
    """Say whether a model input holds the pixels themselves, by its name."""
    return "pixel_values" in name or name in ("image_patches", "flattened_patches")


def cuts_of(
    call: Call, inputs: Mapping[str, Any], placeholders: Mapping[str, Placeholders | None], B: int
) -> dict[str, Offsets]:
    """Return where to cut each input that has entries; what is missing is the same for every sequence.

    Args:
        call: for messages.
        inputs: model inputs without those that have an entry per token.
        placeholders: of `"image"` and `"video"`; None: nothing in the sequences stands for one.
        B: number of sequences.

    Raises: ShapeError, which names the tensor.
    """
    cuts: dict[str, Offsets] = {}
    given = {name: [int(n) for n in x] for name, x in inputs.items() if "num_images" in name}
    images = placeholders["image"]
    shown = [True] * B if images is None else [n > 0 for n in images.tokens]
    for kind in ("image", "video"):
        own = {name: x for name, x in inputs.items() if kind_of(name) == kind and name not in given}
        own = {name: x for name, x in own.items() if _length(x) is not None}
        if own:
            counts = next(iter(given.values()), None) if kind == "image" else None
            if counts is not None and len(counts) == sum(shown):  # a processor counts where there is something
                rest = iter(counts)
                counts = [next(rest) if here else 0 for here in shown]
            cuts |= _of_kind(call, own, placeholders[kind], counts, B)
    for name, x in inputs.items():
        if name in given and len(x) == sum(shown) < B:
            cuts[name] = _summed(shown)
        elif name in given or (kind_of(name) is None and _length(x) == B):
            cuts[name] = list(range(B + 1))
        elif name not in cuts and _length(x) is not None:
            _refuse(call, name, x)
    return cuts


def _of_kind(
    call: Call, own: Mapping[str, Any], placeholders: Placeholders | None, counts: Sequence[int] | None, B: int
) -> dict[str, Offsets]:
    """Cut the tensors of one kind; those with equally many entries are cut alike."""
    name = next((name for name in own if is_pixels(name)), next(iter(own)))
    pixels, n = own[name], len(own[name])
    grids = grids_of(own)
    units: dict[int, Offsets] = {}
    if grids is not None and len(grids) != n and sum(_products(grids)) == n:
        patches = _products(grids)
        pictures = _offsets(own, len(grids), None, placeholders, counts, B, patches)
        if pictures is None:
            _refuse(call, name, pixels)
        units = {len(grids): pictures, n: _grouped(pictures, patches)}
    else:
        offsets = _offsets(own, n, pixels, placeholders, counts, B) or _by_groups(own, n, placeholders, counts, B)
        if offsets is None:
            _refuse(call, name, pixels)
        units = {n: offsets}
    known = {name, *(other for other, x in own.items() if x is grids)}
    doubtful = set()  # numbers that count two things
    for other, x in own.items():
        groups = units.get(len(x))
        if groups is not None and _is_counts(other, x):
            known.add(other)
            parts = _grouped(groups, x.tolist())
            if units.setdefault(parts[-1], parts) != parts:
                doubtful.add(parts[-1])
    if counts is not None:
        units.setdefault(sum(counts), _summed(counts))
    for other, x in own.items():
        if len(x) not in units or (len(x) in doubtful and other not in known):
            _refuse(call, other, x)
    return {other: units[len(x)] for other, x in own.items()}


def _offsets(
    own: Mapping[str, Any],
    n: int,
    pixels: Any,
    placeholders: Placeholders | None,
    counts: Sequence[int] | None,
    B: int,
    patches: Sequence[int] | None = None,
) -> Offsets | None:
    """Return where the n entries of each sequence start; None where nothing tells."""
    # As many entries as sequences: with a picture in each sequence it is one in each. Where a sequence has none, its
    # own entry is padding, or there is no entry of its own and another one has several.
    if n == B and placeholders is not None and [x > 0 for x in placeholders.tokens] == _filled(pixels, n):
        return list(range(B + 1))
    if counts is not None and len(counts) == B and sum(counts) == n:
        return _summed(counts)
    if placeholders is None:
        return list(range(B + 1)) if n == B else None
    tokens, runs = placeholders
    total = sum(tokens)
    if patches is not None and total and sum(patches) % total == 0:
        walked = _walked(tokens, [x * total for x in patches], sum(patches))
        if walked is not None:
            return walked
    if sum(runs) == n:  # no entry is without a token, so each has one run
        return _summed(runs)
    if n == 0 or total == 0:
        return None
    units = alike_units(own) if isinstance(pixels, Tensor) and len(pixels) == n else None
    if units is not None:
        shares = _filled_tiles(pixels) if pixels.dim() >= 5 else [1] * n
        return _walked(tokens, [x * total for x in shares], units)
    described = [x for name, x in own.items() if x is not pixels and _length(x) == n and "mask" not in name]
    if all(_is_constant(x) for x in described) and all(x * n % total == 0 for x in tokens):
        return _summed([x * n // total for x in tokens])
    areas = next((_products(x) for x in described if isinstance(x, Tensor) and x.shape[1:] == (2,)), None)
    return None if areas is None else _walked(tokens, [x * total for x in areas], sum(areas))


def alike_units(own: Mapping[str, Any]) -> int | None:
    """Count the pictures, or tiles, that take equally many tokens because nothing beside the pixels describes them."""
    pixels = [x for name, x in own.items() if is_pixels(name)]
    rest = [name for name in own if not is_pixels(name) and "mask" not in name]
    if rest or len({len(x) for x in pixels}) != 1 or not isinstance(pixels[0], Tensor) or pixels[0].dim() < 4:
        return None
    return sum(_filled_tiles(pixels[0])) if pixels[0].dim() >= 5 else len(pixels[0])


def _by_groups(
    own: Mapping[str, Any], n: int, placeholders: Placeholders | None, counts: Sequence[int] | None, B: int
) -> Offsets | None:
    """Return where the entries start that come in groups, of which a vector says how large they are."""
    for name, x in own.items():
        if _is_counts(name, x) and int(x.sum()) == n:
            groups = _offsets(own, len(x), None, placeholders, counts, B)
            if groups is not None:
                return _grouped(groups, x.tolist())
    return None


def grids_of(own: Mapping[str, Any]) -> Tensor | None:
    """Return the grids `[n, 2 or 3]` of pictures that are cut into patches."""
    for name, x in own.items():
        if "grid" in name and isinstance(x, Tensor) and x.dim() == 2 and not x.is_floating_point():
            return x
    return None


def _walked(tokens: Sequence[int], shares: Sequence[int], unit: int) -> Offsets | None:
    """Deal entries to sequences in order, entry i taking `shares[i] / unit` tokens; None where the sums do not meet."""
    offsets, i = [0], 0
    for needed in tokens:
        left = needed * unit
        while left > 0 and i < len(shares):
            left, i = left - shares[i], i + 1
        if left:
            return None
        offsets.append(i)
    return offsets if i == len(shares) else None


def _grouped(groups: Offsets, sizes: Sequence[int]) -> Offsets:
    ends = _summed(sizes)
    return [ends[i] for i in groups]


def _summed(counts: Sequence[int]) -> Offsets:
    return [0, *itertools.accumulate(int(x) for x in counts)]


def _filled(pixels: Any, n: int) -> list[bool]:
    """Tell the entries that are not padding, by a value that is not 0."""
    if not isinstance(pixels, Tensor):
        return [True] * n
    return (pixels != 0).flatten(1).any(dim=1).tolist()


def _filled_tiles(pixels: Tensor) -> list[int]:
    return (pixels != 0).flatten(-3).any(dim=-1).flatten(1).sum(dim=1).tolist()


def _is_constant(x: Any) -> bool:
    return not isinstance(x, Tensor) or x.is_floating_point() or bool((x == x[:1]).all())


def _is_counts(name: str, x: Any) -> bool:
    """Tell how many tiles each picture has, for example."""
    return "num_" in name and isinstance(x, Tensor) and x.dim() == 1 and not x.is_floating_point()


def _products(x: Tensor) -> list[int]:
    return x.long().prod(dim=1).tolist()


def _length(x: Any) -> int | None:
    if isinstance(x, Tensor):
        return len(x) if x.dim() else None
    return len(x) if isinstance(x, list | tuple) and any(isinstance(item, Tensor | float) for item in x) else None


def _refuse(call: Call, name: str, x: Any) -> NoReturn:
    fix = "pass batch_size=None, or num_images, the number of entries of each sequence"
    call.fail(ShapeError, name, describe(x), "entries that the image tokens tell apart by sequence", fix)
