"""Corrupt pictures and never their geometry: the contrast stream of perception tokens.

    dark = corrupt_images(images, PatchMask(probability=0.6), seed=0)               # then the user's own processor
    inputs = PatchMask(probability=0.6).on_inputs(inputs, PixelLayout.of_model(model), generator=seed)

Each corruption works on the pictures before a processor, which serves every family and masks a picture once however
often it appears, and on what the processor made of them (`on_inputs`), where the layout is known; both give the same
pixels for the same seed where the processor does not resize. Shapes, grids, masks and token counts stay.

`corrupt_images` seeds each picture by its bytes and its prompt. The two methods draw one 63-bit seed per picture from a
generator, in order. So the same seed gives the same corruption in every process and on every device, a batch that is
split gives what the whole batch gives, and the global generators of torch, numpy and random are not touched.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from srpo.errors import ConfigError, DtypeError, check_fields, checked_fields, describe, is_int, refuse, require
from srpo.vision.pixels import PixelLayout

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Blank", "Blur", "GaussianNoise", "PatchMask", "PixelLayout", "ShuffleImages"]

Cell = int | tuple[int, int]  # pixels per side, or into how many rows and columns a picture is cut

_LEVELS = {"black": 0, "grey": 127}  # grey is not 0 in any published normalisation: a picture of zeros is padding
RGB = PixelLayout("images", 1, (0.0,) * 3, (1.0,) * 3)  # pictures outside a processor: uint8 [3, H, W]


class Corruption:
    """The two entrances that all corruptions share."""

    is_per_picture = True  # what a picture becomes does not depend on the others

    def on_images(
        self, images: "Sequence[Image]", *, generator: torch.Generator | int, cell: int | None = None
    ) -> "list[Image]":
        """Corrupt pictures; the processor comes after.

        Args:
            images: PIL images of any size and mode.
            generator: a CPU generator, which advances by one draw per picture, or a seed.
            cell: pixels per side of the model's image token (`PixelLayout.merged_patch`); `PatchMask` works in
                multiples of it and needs it when its own `cell` is None.

        Returns: as many new RGB images of the same sizes.

        Raises: ConfigError, DtypeError.
        """
        from PIL import Image

        function = f"{type(self).__name__}.on_images"
        for image in images:
            if not isinstance(image, Image.Image):
                fix = "pass a flat list of pictures"
                refuse(DtypeError, function, "images", describe(image), "PIL.Image.Image items", fix)
        cell = self._cell_of(cell, function)
        pixels = [pixels_of(image) for image in images]
        draws = _draws(generator, len(pixels), function)
        corrupted = self._corrupt_all(pixels, list(range(len(pixels))), RGB, [cell] * len(pixels), draws)
        return [image_of(x) for x in corrupted]

    @torch.no_grad()
    def on_inputs(
        self, inputs: Mapping[str, Any], layout: PixelLayout, *, generator: torch.Generator | int
    ) -> dict[str, Any]:
        """Corrupt what a processor made of pictures.

        Args:
            inputs: keyword arguments of the model. `pixel_values` is read, with a flattened layout `image_grid_thw`
                and the same two of videos, with a tiled one `pixel_attention_mask`; others pass through as they are.
            layout: where the pictures lie in `pixel_values`.
            generator: a CPU generator, which advances by one draw per picture, or a seed.

        Returns: a new dict with other `pixel_values` of the same shape, dtype and device; the same ones when there is
            no picture. Pixels that are not corrupted keep their bits, and so does padding.

        Gradient: none.

        Memory: a copy of `pixel_values`.

        Raises: ConfigError, DtypeError, ShapeError.
        """
        function = f"{type(self).__name__}.on_inputs"
        if not isinstance(inputs, Mapping):
            refuse(DtypeError, function, "inputs", describe(inputs), "a mapping", "pass the output of the processor")
        if not isinstance(layout, PixelLayout):
            refuse(
                ConfigError, function, "layout", describe(layout), "a PixelLayout", "pass PixelLayout.of_model(model)"
            )
        cell = self._cell_of(layout.merged_patch, function)
        pictures = layout.pictures(inputs, function)
        draws = _draws(generator, len(pictures), function)
        if not pictures:
            return dict(inputs)
        groups = [(picture.name, picture.group) for picture in pictures]
        corrupted = self._corrupt_all(
            [picture.values for picture in pictures], groups, layout, [cell] * len(pictures), draws
        )
        return {**inputs, **layout.replaced(inputs, pictures, corrupted, function)}

    def _cell_of(self, merged_patch: int | None, function: str) -> int:
        """Check the size of an image token in pixels, and return the size of a cell."""
        if merged_patch is not None and not (is_int(merged_patch) and merged_patch > 0):
            fix = "pass cell=layout.merged_patch"
            refuse(ConfigError, function, "cell", repr(merged_patch), "a positive int", fix)
        return merged_patch or 1

    def _corrupt_all(
        self,
        pictures: list[Tensor],
        groups: Sequence[Any],
        layout: PixelLayout,
        cells: Sequence[Cell],
        draws: Sequence[np.random.Generator],
    ) -> list[Tensor]:
        """Corrupt pictures `[..., C, H, W]`, 8-bit or normalised as `layout` says."""
        given = zip(pictures, cells, draws, strict=True)
        return [self._corrupt(picture, layout, cell, draw) for picture, cell, draw in given]

    def _corrupt(self, picture: Tensor, layout: PixelLayout, cell: Cell, draw: np.random.Generator) -> Tensor:
        raise NotImplementedError


@checked_fields
@dataclass(frozen=True)
class PatchMask(Corruption):
    """Paint a random share of the cells of each picture over, all cells with the same probability.

    A picture has as many painted cells as the share says, rounded up or down at random. Cells are counted from the top
    left corner; those at the right and lower edge may be cut.

    Args:
        probability: share of the cells that is painted over, in [0, 1].
        cell: pixels per side, a multiple of the model's image token; None means one image token, or what
            `corrupt_images` says.
        fill: `"black"` (0) or `"grey"` (127 of 255), exact in the processor's normalised space.

    Raises:
        ConfigError: a value is outside its range.

    Source: PAPO, arXiv 2507.06448.
    """

    probability: float = 0.6
    cell: int | None = None
    fill: Literal["black", "grey"] = "black"

    def __post_init__(self) -> None:
        check_fields(self)
        require(self, "probability", 0.0 <= self.probability <= 1.0, "a number in [0.0, 1.0]")
        require(self, "cell", self.cell is None or self.cell > 0, "None or a positive int")

    def _cell_of(self, merged_patch: int | None, function: str) -> int:
        unit = super()._cell_of(merged_patch, function)
        if self.cell is None:
            if merged_patch is None:
                fix = "pass cell=layout.merged_patch, or set PatchMask(cell=...)"
                refuse(ConfigError, function, "cell", "None", "the pixels per side of an image token", fix)
            return unit
        if self.cell % unit:
            expected = f"a multiple of {unit}, the pixels per side of an image token"
            refuse(ConfigError, function, "cell", repr(self.cell), expected, "use cell=None")
        return self.cell

    def _corrupt(self, picture: Tensor, layout: PixelLayout, cell: Cell, draw: np.random.Generator) -> Tensor:
        rows, columns = (_cell_of_each_pixel(n, cell, side) for side, n in enumerate(picture.shape[-2:]))
        n = (rows[-1] + 1) * (columns[-1] + 1)
        chosen = draw.permutation(n) < math.floor(self.probability * n + draw.random())
        painted = chosen.reshape(rows[-1] + 1, columns[-1] + 1)[np.ix_(rows, columns)]
        where = torch.from_numpy(painted).to(picture.device)
        return torch.where(where, layout.filled(_LEVELS[self.fill], picture), picture)


def _cell_of_each_pixel(n: int, cell: Cell, side: int) -> np.ndarray:
    """Return the row, or the column, of cells that each of n pixels lies in."""
    pixels = np.arange(n)
    return pixels // cell if isinstance(cell, int) else pixels * min(cell[side], n) // n


@checked_fields
@dataclass(frozen=True)
class GaussianNoise(Corruption):
    """Add independent Gaussian noise to every channel of every pixel, then round and clip to 8 bits.

    In half precision the 8-bit pixels are known to one level only where the values are large; so are the results.

    Args:
        sigma: standard deviation, for pixels in 0..255.

    Raises:
        ConfigError: `sigma` is negative or not finite.
    """

    sigma: float = 80.0

    def __post_init__(self) -> None:
        check_fields(self)
        require(self, "sigma", self.sigma >= 0.0, "a number of at least 0")

    def _corrupt(self, picture: Tensor, layout: PixelLayout, cell: Cell, draw: np.random.Generator) -> Tensor:
        pixels = layout.to_bytes(picture).cpu().numpy()
        noise = self.sigma * draw.standard_normal(pixels.shape[-3:], dtype=np.float32)
        noisy = torch.from_numpy(np.rint(pixels + noise).clip(0, 255).astype(np.uint8))
        return layout.from_bytes(noisy.to(picture.device), picture.dtype)


@checked_fields
@dataclass(frozen=True)
class Blur(Corruption):
    """Blur with Pillow's Gaussian filter. Half precision: as `GaussianNoise`.

    Args:
        radius: standard deviation of the filter, in pixels that the model sees.

    Raises:
        ConfigError: `radius` is negative or not finite.
    """

    radius: float = 8.0

    def __post_init__(self) -> None:
        check_fields(self)
        require(self, "radius", self.radius >= 0.0, "a number of at least 0")

    def _corrupt(self, picture: Tensor, layout: PixelLayout, cell: Cell, draw: np.random.Generator) -> Tensor:
        from PIL import Image, ImageFilter

        blur = ImageFilter.GaussianBlur(self.radius)
        pixels = layout.to_bytes(picture).cpu()
        planes = [Image.fromarray(plane.numpy()).filter(blur) for plane in pixels.flatten(0, -3).contiguous()]
        blurred = torch.from_numpy(np.stack([np.asarray(plane) for plane in planes])).reshape(pixels.shape)
        return layout.from_bytes(blurred.to(picture.device), picture.dtype)


@checked_fields
@dataclass(frozen=True)
class Blank(Corruption):
    """Replace pictures by one colour.

    Args:
        fill: `"black"` (0) or `"grey"` (127 of 255), exact in the processor's normalised space.

    Raises:
        ConfigError: an unknown `fill`.
    """

    fill: Literal["black", "grey"] = "black"

    def __post_init__(self) -> None:
        check_fields(self)

    def _corrupt(self, picture: Tensor, layout: PixelLayout, cell: Cell, draw: np.random.Generator) -> Tensor:
        return layout.filled(_LEVELS[self.fill], picture).expand_as(picture)


@dataclass(frozen=True)
class ShuffleImages(Corruption):
    """Replace each picture by another picture of the batch that has the same size.

    Equal pictures count as one, since the completions of a prompt share theirs, and all get the same replacement: no
    picture is replaced by its equal. A picture without another of its size becomes black. In a tiled layout all tiles
    of a sample move together.

    The result depends on the whole batch: corrupt first, split into smaller batches afterwards.
    """

    is_per_picture = False

    def _corrupt_all(
        self,
        pictures: list[Tensor],
        groups: Sequence[Any],
        layout: PixelLayout,
        cells: Sequence[Cell],
        draws: Sequence[np.random.Generator],
    ) -> list[Tensor]:
        members: dict[Any, list[int]] = {}
        for index, group in enumerate(groups):
            members.setdefault(group, []).append(index)
        contents: dict[Any, dict[bytes, list[list[int]]]] = {}
        for indices in members.values():
            sizes = tuple(pictures[i].shape for i in indices)
            digest = b"".join(_digest(pictures[i]) for i in indices)
            contents.setdefault(sizes, {}).setdefault(digest, []).append(indices)
        out = list(pictures)
        for of_one_size in contents.values():
            equals = list(of_one_size.values())
            order = draws[0].permutation(len(equals)).tolist()
            for k, replaced in enumerate(order):
                source = equals[order[k - 1]][0]
                for indices in equals[replaced]:
                    for i, j in zip(indices, source, strict=True):
                        black = layout.filled(_LEVELS["black"], pictures[i]).expand_as(pictures[i])
                        out[i] = black if len(equals) == 1 else pictures[j]
        return out


def pixels_of(image: "Image") -> Tensor:
    """Return 8-bit pixels `[3, H, W]`."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)


def image_of(pixels: Tensor) -> "Image":
    """Return the picture of 8-bit pixels `[3, H, W]`."""
    from PIL import Image

    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _draws(generator: Any, n: int, function: str) -> list[np.random.Generator]:
    """Draw the seeds of n pictures, and return a generator for each."""
    if (is_int(generator) or isinstance(generator, np.integer)) and 0 <= generator < 2**63:
        generator = torch.Generator().manual_seed(int(generator))
    elif not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        got = f"a generator on {generator.device}" if isinstance(generator, torch.Generator) else repr(generator)
        fix = "pass torch.Generator().manual_seed(seed)"
        refuse(ConfigError, function, "generator", got, "a CPU torch.Generator or a seed in [0, 2**63)", fix)
    seeds = torch.randint(2**63 - 1, (n,), generator=generator)
    return [np.random.Generator(np.random.PCG64(seed)) for seed in seeds.tolist()]


def _digest(picture: Tensor) -> bytes:
    pixels = picture.contiguous().cpu().flatten().view(torch.uint8)
    return hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).digest()
