"""The share of a picture that is hidden, in whatever a family's processor makes of it."""

from __future__ import annotations

import pytest
import torch
from families import grids, others, tiles
from families.harness import FAMILIES, Family, built
from PIL import Image
from torch import Tensor

from srpo import PatchMask, corrupt_images

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
TABLES = (grids, tiles, others)  # reading them fills FAMILIES
NAMES = ("image_patches", "image_pixel_values", "pixel_values_images", "pixel_values")
ONE_TOKEN = ("fast_vlm",)  # a picture is hidden or not


def views(family: Family, processor, image: Image.Image) -> Tensor:
    """The pixels that a processor makes of a picture: `[views, channels, height, width]`, or `[1, patches, values]`."""
    images = [[image]] if family.nested else [image]
    made = processor(text=[family.block], images=images, padding=True, return_tensors="pt")
    x = torch.as_tensor(made[next(name for name in NAMES if name in made)]).float()
    return x.reshape(-1, *x.shape[-3:]) if x.dim() > 3 else x[None]


def hidden(name: str, size: tuple[int, int], seeds: int) -> Tensor:
    """How often each pixel of a white picture comes out nearer to black; NaN on padding."""
    family, (_, processor) = FAMILIES[name], built(FAMILIES[name])
    white, black = (views(family, processor, Image.new("RGB", size, colour)) for colour in ("white", "black"))
    found = torch.zeros_like(white)
    for seed in range(seeds):
        dark = corrupt_images([[Image.new("RGB", size, "white")]], PatchMask(0.6), seed=seed, processor=processor)
        found += views(family, processor, dark[0][0]) < (white + black) / 2
    return torch.where(white == black, torch.nan, found / seeds)


SLOW = [pytest.param(size, marks=pytest.mark.slow) for size in ((64, 64), (50, 90))]


@pytest.mark.parametrize("size", [(70, 30), *SLOW], ids=str)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ONE_TOKEN])
def test_as_much_is_hidden_as_was_asked(name, size):
    assert abs(hidden(name, size, seeds=40).nanmean() - 0.6) < 0.05


TILED = ["internvl", "idefics2_split", "smolvlm_split", "llava_next", "llava_onevision", "aya_vision", "cohere2_vision"]
TILED += ["llama4", "mllama", "ovis2", "perception_lm"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [(128, 64), (70, 30)], ids=str)
@pytest.mark.parametrize("name", TILED)
def test_as_much_is_hidden_in_each_tile_and_in_the_thumbnail(name, size):
    shares = hidden(name, size, seeds=300).flatten(1).nanmean(dim=1)
    shares = shares[~shares.isnan()]
    assert len(shares) > 1
    assert (shares - 0.6).abs().max() < 0.05


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("side", [64, 128])
def test_a_picture_is_hidden_alike_in_all_its_views(side, share):
    """A place of a white picture is hidden if less than half of its light is left, in its tile and in the thumbnail."""
    _, processor = built(FAMILIES["idefics3_split"])
    processor.image_processor.size = {"longest_edge": side}
    white, n, found = Image.new("RGB", (side, side), "white"), side // 32, []
    for seed in range(40):
        dark = corrupt_images([[white]], PatchMask(share), seed=seed, processor=processor)
        black = processor(text=["<image>"], images=dark, return_tensors="pt")["pixel_values"][0].mean(dim=1) < 0
        tiles = torch.cat([torch.cat(list(black[n * row : n * row + n]), dim=1) for row in range(n)])
        thumbnail = black[n * n].repeat_interleave(n, 0).repeat_interleave(n, 1)
        found.append(torch.stack([x.float().mean() for x in (tiles, thumbnail, tiles & thumbnail)]))
    for hidden in torch.stack(found).mean(dim=0):
        assert abs(hidden - share) < 0.05
