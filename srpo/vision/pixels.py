"""Where the pictures lie in `pixel_values` and how their 8-bit pixels were normalised, as each family does it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from srpo.errors import ConfigError, DtypeError, ShapeError, SRPOError, describe, is_int, refuse

Kind = Literal["flattened", "tiled", "images"]

# Mean and standard deviation per channel, as the preprocessor_config.json of published weights has them.
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

_MODELS: dict[str, tuple[Kind, tuple[tuple[float, ...], tuple[float, ...]]]] = {
    "qwen2_vl": ("flattened", _CLIP),
    "qwen2_5_vl": ("flattened", _CLIP),
    "qwen3_vl": ("flattened", _HALF),
    "qwen3_vl_moe": ("flattened", _HALF),
    "idefics3": ("tiled", _HALF),
    "smolvlm": ("tiled", _HALF),
    "llava": ("images", _CLIP),
}
_RANKS = {
    "flattened": (2, "[patches, C * temporal * patch * patch]"),
    "tiled": (5, "[B, tiles, C, H, W]"),
    "images": (4, "[n_images, C, H, W]"),
}
# Where a layout does not know, the user's own processor does.
PICTURE_ROAD = (
    "corrupt the pictures and pass score_streams(corrupted_inputs=processor(text=texts, images=corrupt_images(images, "
    "PatchMask(), seed=0), padding=True, return_tensors='pt'))"
)
_NAMES = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8)


class Picture(NamedTuple):
    """One picture or video: its pixels `[..., C, H, W]`, the index they came from, its group, the name of its tensor.

    The tiles of one sample form a group; elsewhere each picture is its own.
    """

    values: Tensor
    place: tuple[Any, ...]
    group: int
    name: str = "pixel_values"

    def one_frame(self) -> Tensor:
        """Return the pixels without the copies of each frame that a flattened layout makes."""
        return self.values[:, 0] if self.values.dim() == 5 else self.values


@dataclass(frozen=True)
class PixelLayout:
    """Say how `pixel_values` holds pictures. Build it with `of_model` or `of_processor`.

    flattened   `[sum of t*h*w, C * temporal * patch * patch]` with `image_grid_thw [n_images, 3]`; the patches of one
                image token are adjacent (Qwen2-VL, Qwen2.5-VL, Qwen3-VL); videos lie in `pixel_values_videos` alike
    tiled       `[B, tiles, C, H, W]`, perhaps with `pixel_attention_mask [B, tiles, H, W]`; a tile of zeros, and
                pixels that the mask leaves out on the right and below, are padding (Idefics3, SmolVLM)
    images      `[n_images, C, H, W]` (LLaVA), perhaps with `image_sizes [n_images, 2]` inside of padding (Pixtral)

    Args:
        kind: one of the three.
        patch_size: pixels per side of a patch of the vision tower.
        image_mean: mean per channel that the processor subtracted, for pixels in [0, 1].
        image_std: standard deviation per channel that the processor divided by.
        merge_size: patches per side of one image token.
        temporal_patch_size: frames that a flattened patch repeats a still picture over.

    Raises:
        ConfigError: a value is outside its range.
    """

    kind: Kind
    patch_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    merge_size: int = 1
    temporal_patch_size: int = 1

    def __post_init__(self) -> None:
        if self.kind not in _RANKS:
            refuse(ConfigError, "PixelLayout", "kind", repr(self.kind), " or ".join(map(repr, _RANKS)), "use of_model")
        for name in ("patch_size", "merge_size", "temporal_patch_size"):
            size = getattr(self, name)
            if not is_int(size) or size < 1:
                fix = "read it from the config of the model"
                refuse(ConfigError, "PixelLayout", name, repr(size), "a positive integer", fix)
        for name in ("image_mean", "image_std"):
            try:
                object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))
            except (TypeError, ValueError):
                fix = "copy it from the image processor"
                refuse(ConfigError, "PixelLayout", name, repr(getattr(self, name)), "one number per channel", fix)
        if len(self.image_mean) != len(self.image_std) or not self.image_std or min(self.image_std) <= 0.0:
            expected = f"a positive number for each of the {len(self.image_mean)} channels of image_mean"
            refuse(ConfigError, "PixelLayout", "image_std", repr(self.image_std), expected, "use the processor's")

    @classmethod
    def of_processor(cls, processor: Any) -> Self:
        """Read the layout off a processor of transformers, or off an image processor that knows its patches.

        A processor of Idefics3 knows the merged patch only: it is `patch_size` here, with `merge_size` 1.

        Raises:
            ConfigError: the processor does not say how large its patches are, or makes several pictures of one.
        """
        images = getattr(processor, "image_processor", processor)
        n_tokens, edges = getattr(processor, "image_seq_len", None), getattr(images, "max_image_size", None)
        kind: Kind = "images"
        temporal = 1
        if hasattr(images, "temporal_patch_size") and hasattr(images, "merge_size"):
            kind, patch, merge = "flattened", images.patch_size, images.merge_size
            temporal = images.temporal_patch_size
        elif n_tokens and edges:
            kind, merge, patch = "tiled", 1, round(edges["longest_edge"] / n_tokens**0.5)
        elif isinstance(getattr(processor, "patch_size", None), int) and not edges:
            patch, merge = processor.patch_size, _probed_merge(processor, images)
        else:
            expected = "a processor that knows the size of its patches"
            refuse(
                ConfigError, "PixelLayout.of_processor", "processor", type(processor).__name__, expected, PICTURE_ROAD
            )
        # scale is 1 for every published processor
        scale = 255.0 * images.rescale_factor if getattr(images, "do_rescale", True) else 255.0
        mean, std = (images.image_mean, images.image_std) if images.do_normalize else ((0.0,) * 3, (1.0,) * 3)
        scaled_mean, scaled_std = (tuple(x / scale for x in values) for values in (mean, std))
        layout = cls(kind, patch, scaled_mean, scaled_std, merge, temporal)
        if kind != "tiled" and not layout._reads_back(images):
            got = f"{type(images).__name__}, whose pixels are not where this class finds them"
            expected = "a processor of Qwen2-VL's or LLaVA's kind"
            refuse(ConfigError, "PixelLayout.of_processor", "processor", got, expected, PICTURE_ROAD)
        return layout

    @classmethod
    def of_model(cls, model: Any) -> Self:
        """Read the layout off the config of a model, with the mean and std that its family was published with.

        Raises:
            ConfigError: the family is not in the table; `of_processor` reads the mean and std of any processor.
        """
        config = getattr(getattr(model, "module", model), "config", None)
        family = getattr(config, "model_type", type(model).__name__)
        if config is None or family not in _MODELS:
            expected = "a model of " + ", ".join(_MODELS)
            fix = PICTURE_ROAD
            refuse(ConfigError, "PixelLayout.of_model", "model", repr(family), expected, fix)
        kind, (mean, std) = _MODELS[family]
        vision, merge, temporal = config.vision_config, 1, 1
        if kind == "flattened":
            merge, temporal = vision.spatial_merge_size, vision.temporal_patch_size
        elif kind == "tiled":
            merge = config.scale_factor
        if getattr(vision, "model_type", "").startswith("siglip"):
            mean, std = _HALF
        return cls(kind, vision.patch_size, mean, std, merge, temporal)

    @property
    def merged_patch(self) -> int:
        """Pixels per side of one image token."""
        return self.patch_size * self.merge_size

    def to_bytes(self, values: Tensor) -> Tensor:
        """Return the 8-bit pixels that the processor was given, from normalised `[..., C, H, W]`."""
        if values.dtype == torch.uint8:
            return values
        mean, std = self._scale(values.device)
        return ((values.float() * std + mean) * 255.0).round_().clamp_(0.0, 255.0).to(torch.uint8)

    def from_bytes(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalise 8-bit pixels `[..., C, H, W]`, bit for bit as the Pillow processors of transformers do."""
        if dtype == torch.uint8:
            return pixels
        mean, std = self._scale(pixels.device)
        return pixels.double().mul_(1.0 / 255.0).float().sub_(mean).div_(std).to(dtype)

    def filled(self, level: int, like: Tensor) -> Tensor:
        """Return `[C, 1, 1]` of one 8-bit level, in the normalised space of `like`."""
        pixels = torch.full((len(self.image_mean), 1, 1), level, dtype=torch.uint8, device=like.device)
        return self.from_bytes(pixels, like.dtype)

    def pictures(self, inputs: Mapping[str, Any], function: str) -> list[Picture]:
        """Return the pictures of `inputs` in order, then the videos; padding is left out."""
        found = []
        for name, grid_name in _NAMES:
            pixels = inputs.get(name)
            if pixels is not None:
                self._check(pixels, name, function)
                if self.kind == "flattened":
                    found += self._flattened(pixels, self._grid(inputs, pixels, grid_name, function), name, function)
                elif self.kind == "tiled":
                    found += self._tiled(pixels, inputs.get("pixel_attention_mask"), function)
                else:
                    found += self._images(pixels, inputs.get("image_sizes"))
        return found

    def _check(self, pixels: Any, name: str, function: str) -> None:
        if not isinstance(pixels, Tensor):
            fix = "call the processor with return_tensors='pt'"
            refuse(DtypeError, function, name, describe(pixels), "a torch.Tensor", fix)
        if pixels.dtype not in _DTYPES:
            fix = "pass the output of the processor"
            refuse(DtypeError, function, name, describe(pixels), "floating point or uint8", fix)
        if self.kind != "flattened" and name != "pixel_values":
            refuse(ConfigError, function, name, describe(pixels), "pictures alone in this layout", PICTURE_ROAD)
        rank, shape = _RANKS[self.kind]
        if pixels.dim() != rank:
            fix = "build the layout with PixelLayout.of_model(model)"
            refuse(ShapeError, function, name, describe(pixels), f"{shape} for kind={self.kind!r}", fix)
        if self.kind != "flattened" and pixels.shape[-3] != len(self.image_mean):
            expected = f"the {len(self.image_mean)} channels of image_mean"
            refuse(ShapeError, function, name, describe(pixels), expected, "use the processor's mean and std")

    def replaced(
        self, inputs: Mapping[str, Any], pictures: list[Picture], values: list[Tensor], function: str
    ) -> dict[str, Tensor]:
        """Return copies of the tensors, by name, in which the pictures have other values of the same shape."""
        names = dict.fromkeys(picture.name for picture in pictures)
        out = {name: inputs[name].clone(memory_format=torch.contiguous_format) for name in names}
        for picture, new in zip(pictures, values, strict=True):
            out[picture.name][picture.place] = self._flatten(new) if self.kind == "flattened" else new
        if self.kind == "tiled" and not all(torch.equal(_is_real(out[name]), _is_real(inputs[name])) for name in names):
            expected = "pictures with a value other than 0: the model takes a tile of zeros for padding"
            refuse(ConfigError, function, "pixel_values", "a picture of zeros", expected, "use fill='grey'")
        return out

    def _reads_back(self, images: Any) -> bool:
        """Say whether a picture that the processor does not resize is found again, pixel by pixel."""
        from PIL import Image

        def pictures(image: Any) -> list[Picture]:
            return self.pictures(images(images=[image], return_tensors="pt"), "PixelLayout.of_processor")

        try:
            H, W = pictures(Image.new("RGB", (448, 448), "grey"))[0].values.shape[-2:]
            noise = torch.randint(256, (H, W, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
            found = pictures(Image.fromarray(noise.numpy()))
        except SRPOError:
            return False
        frames = [x.values.flatten(0, -4) if x.values.dim() > 3 else x.values[None] for x in found]
        same = [self.to_bytes(x).int() - noise.permute(2, 0, 1) for x in frames if x.shape[-2:] == (H, W)]
        return len(same) == len(found) == 1 and bool((same[0].abs() <= 1).all())

    def _scale(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = torch.tensor([self.image_mean, self.image_std], device=device)[..., None, None]
        return mean, std

    def _grid(self, inputs: Mapping[str, Any], pixels: Tensor, name: str, function: str) -> list[list[int]]:
        grid = inputs.get(name)
        fix = f"pass the {name} that the processor returned with the pixels"
        if grid is None:
            refuse(ConfigError, function, name, "None", "a tensor [n_images, 3]", fix)
        if not isinstance(grid, Tensor) or grid.dtype.is_floating_point or grid.dim() != 2 or grid.shape[1] != 3:
            refuse(ShapeError, function, name, describe(grid), "an integer tensor [n_images, 3]", fix)
        rows = grid.tolist()
        merge = self.merge_size
        for t, h, w in rows:
            if min(t, h, w) < 1 or h % merge or w % merge:
                expected = f"positive (t, h, w), h and w multiples of merge_size={merge}"
                refuse(ShapeError, function, name, f"({t}, {h}, {w})", expected, fix)
        n = sum(t * h * w for t, h, w in rows)
        if n != len(pixels):
            refuse(ShapeError, function, name, f"{n} patches", f"{len(pixels)}, those of the pixels", fix)
        return rows

    def _flattened(self, pixels: Tensor, grid: list[list[int]], name: str, function: str) -> list[Picture]:
        C, T, m, p = len(self.image_mean), self.temporal_patch_size, self.merge_size, self.patch_size
        if pixels.shape[1] != C * T * p * p:
            expected = f"{C * T * p * p} values per patch ({C} channels, {T} frames, {p} x {p} pixels)"
            fix = "build the layout with PixelLayout.of_model(model)"
            refuse(ShapeError, function, name, describe(pixels), expected, fix)
        found, start = [], 0
        for index, (t, h, w) in enumerate(grid):
            place = slice(start, start + t * h * w)
            blocks = pixels[place].reshape(t, h // m, w // m, m, m, C, T, p, p)
            values = blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(t, T, C, h * p, w * p)
            found.append(Picture(values, (place,), index, name))
            start = place.stop
        return found

    def _images(self, pixels: Tensor, sizes: Any) -> list[Picture]:
        whole = list(pixels.shape[-2:])
        sizes = sizes.tolist() if isinstance(sizes, Tensor) and sizes.shape == (len(pixels), 2) else []
        if [max(side) for side in zip(*sizes, strict=True)] != whole:  # sizes of pictures before they were resized
            sizes = [whole] * len(pixels)
        places = [(i, slice(None), slice(h), slice(w)) for i, (h, w) in enumerate(sizes)]
        return [Picture(pixels[place], place, place[0]) for place in places]

    def _flatten(self, values: Tensor) -> Tensor:
        m, p = self.merge_size, self.patch_size
        t, T, C, H, W = values.shape
        blocks = values.reshape(t, T, C, H // (m * p), m, p, W // (m * p), m, p)
        return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, C * T * p * p)

    def _tiled(self, pixels: Tensor, mask: Any, function: str) -> list[Picture]:
        B, n, _, H, W = pixels.shape
        real, sizes = _is_real(pixels), torch.tensor([H, W]).expand(B, n, 2)
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.shape != (B, n, H, W):
                fix = "pass the mask that the processor returned with pixel_values"
                refuse(ShapeError, function, "pixel_attention_mask", describe(mask), f"[{B}, {n}, {H}, {W}]", fix)
            valid = mask.to(pixels.device) != 0
            sizes = torch.stack([valid.any(-1).sum(-1), valid.any(-2).sum(-1)], dim=-1)
            corner = torch.stack([valid[..., 0].sum(-1), valid[..., 0, :].sum(-1)], dim=-1)
            if not torch.equal(sizes, corner) or not torch.equal(valid.sum((-2, -1)), sizes.prod(-1)):
                expected = "one rectangle per tile, with padding on the right and below"
                refuse(ShapeError, function, "pixel_attention_mask", "another region", expected, "use the processor's")
            real = real & (sizes.prod(-1) > 0)
        found = []
        for (b, i), (h, w) in zip(real.nonzero().tolist(), sizes[real.to(sizes.device)].tolist(), strict=True):
            place = (b, i, slice(None), slice(h), slice(w))
            found.append(Picture(pixels[place], place, b))
        return found


def _is_real(pixels: Tensor) -> Tensor:
    """Tell the tiles `[B, tiles]` that are not padding as the models do: by a value that is not 0."""
    return (pixels != 0).flatten(2).any(dim=2)


def _probed_merge(processor: Any, images: Any) -> int:
    """Return how many patches per side an image token has, from what a processor makes of a picture.

    Raises: ConfigError, where it makes several of one.
    """
    from PIL import Image

    size = 2048  # of a picture that is cut into tiles wherever pictures are
    pixels = images(images=[Image.new("RGB", (size, size), "grey")], return_tensors="pt")["pixel_values"]
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    if pixels.dim() != 4 or len(pixels) != 1 or count is None:
        got, expected = f"{type(processor).__name__}, which makes {describe(pixels)} of a picture", "[1, C, H, W]"
        refuse(ConfigError, "PixelLayout.of_processor", "processor", got, expected, PICTURE_ROAD)
    (n_tokens,) = count(image_sizes=[[size, size]])["num_image_tokens"]
    area = pixels.shape[-2] * pixels.shape[-1]
    return max(1, round((area / n_tokens) ** 0.5 / processor.patch_size))
