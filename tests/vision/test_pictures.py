"""Pictures corrupted before the processor: seeds, cells, videos, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_vlms
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_vlms import FAMILIES, IMAGE_BLOCKS

from srpo import Blank, Blur, ConfigError, DtypeError, GaussianNoise, PatchMask, PixelLayout, ShapeError, ShuffleImages
from srpo import corrupt_images as corrupt

EVERY = [PatchMask(0.6), PatchMask(0.5, cell=8, fill="grey"), GaussianNoise(), Blur(), Blank(), ShuffleImages()]


def photograph(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A picture without a black pixel."""
    pixels = np.random.default_rng(seed).integers(1, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def equal(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and a.tobytes() == b.tobytes()


def hidden(image: Image.Image) -> np.ndarray:
    return (np.asarray(image) == 0).all(axis=2)


def test_lists_come_back_as_they_were():
    one, two = photograph(0), photograph(1, (30, 70)).convert("L")
    out = corrupt([[one, two], None, [], [one]], Blank(), seed=0)
    assert [None if row is None else len(row) for row in out] == [2, None, 0, 1]
    assert [image.size for image in out[0]] == [one.size, two.size]
    assert all(image.mode == "RGB" and hidden(image).all() for image in out[0] + out[3])
    (alone,) = corrupt([one], Blank(), seed=0)
    assert equal(alone, out[3][0])
    assert corrupt([], seed=0) == []


@pytest.mark.parametrize("corruption", EVERY, ids=repr)
def test_a_picture_is_corrupted_alike_wherever_it_is(corruption):
    images = [photograph(i) for i in range(4)]
    prompts = ["how many?", [1, 2, 3], torch.tensor([1, 2, 4]), 7]
    for seed in (5, prompts):
        whole = corrupt(images, corruption, seed=seed)
        order = [2, 0, 3, 1]
        moved_seed = seed if seed == 5 else [prompts[i] for i in order]
        moved = corrupt([images[i] for i in order], corruption, seed=moved_seed)
        assert all(equal(moved[k], whole[i]) for k, i in enumerate(order))
        twice = corrupt([images[0], images[0]], corruption, seed=seed if seed == 5 else [prompts[0]] * 2)
        assert equal(*twice)
        if corruption.is_per_picture:
            alone = [5] * 4 if seed == 5 else [[prompt] for prompt in prompts]
            split = [corrupt([x], corruption, seed=own)[0] for x, own in zip(images, alone, strict=True)]
            assert all(map(equal, split, whole))


def test_picture_prompt_and_number_decide():
    image, other = photograph(0), photograph(1)
    masks = [
        hidden(corrupt([x], seed=seed)[0]).tobytes()
        for x, seed in [(image, 0), (image, 1), (other, 0), (image, ["a"]), (image, ["b"]), (image, [[97]])]
    ]
    assert len(set(masks)) == len(masks)


@given(share=st.floats(0, 1), width=st.integers(8, 700), height=st.integers(8, 700), seed=st.integers(0, 9))
def test_the_share_that_is_hidden_is_the_one_asked_for(share, width, height, seed):
    (masked,) = corrupt([Image.new("RGB", (width, height), "white")], PatchMask(share), seed=seed)
    cells = max(1, round(height / max(min(width, height) / 16, 8))) * max(
        1, round(width / max(min(width, height) / 16, 8))
    )
    assert abs(hidden(masked).mean() - share) <= 1 / cells + 0.05


def test_cells_follow_the_image_tokens_of_the_processor():
    _, processor = tiny_vlms.build("qwen25vl")
    image = photograph(3, (32, 24))  # 4 x 3 tokens of 8 pixels
    block = np.ones((8, 8), dtype=bool)
    (masked,) = corrupt([image], PatchMask(0.5), seed=1, processor=processor)
    cells = hidden(masked)[::8, ::8]
    assert cells.shape == (3, 4)
    assert np.array_equal(hidden(masked), np.kron(cells, block))
    assert cells.sum() == 6


@pytest.mark.parametrize("corruption", EVERY, ids=repr)
def test_the_frames_of_a_video_share_one_corruption(corruption):
    frame, other = photograph(0), photograph(1)
    (((first, second),),) = corrupt([[[frame, frame]]], corruption, seed=0)
    assert equal(first, second)
    if isinstance(corruption, PatchMask):
        (((first, second),),) = corrupt([[[frame, other]]], PatchMask(0.5), seed=0)
        assert np.array_equal(hidden(first), hidden(second))


def test_no_shuffled_picture_is_its_own():
    images = [photograph(i) for i in (0, 1, 0, 2)]
    out = corrupt(images, ShuffleImages(), seed=0)
    assert not any(map(equal, out, images))
    assert equal(out[0], out[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_both_roads_give_the_same_pixels_where_nothing_is_resized(family):
    """A picture is one picture: the tensors of corrupted pictures are those that the layout road would corrupt."""
    model, processor = tiny_vlms.build(family)
    images = [[tiny_vlms.picture(3, seed=i)] for i in range(2)]
    flat = [image for row in images for image in row]
    texts = [f"<|user|>{IMAGE_BLOCKS[family]}{i}<|assistant|>" for i in range(2)]

    def process(pictures):
        given = [[x] for x in pictures] if family == "idefics3" else pictures
        return dict(processor(text=texts, images=given, padding=True, return_tensors="pt"))

    layout = PixelLayout.of_model(model)
    inside = Blank().on_inputs(process(flat), layout, generator=0)["pixel_values"]
    outside = process([row[0] for row in corrupt(images, Blank(), seed=0)])["pixel_values"]
    torch.testing.assert_close(inside, outside, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"images": photograph(0)}, DtypeError, "images"),
        ({"images": [np.zeros((4, 4, 3))]}, DtypeError, "images"),
        ({"images": ["a.png"]}, DtypeError, "PIL.Image.open"),
        ({"images": [[[photograph(0), photograph(0, (8, 8))]]]}, DtypeError, "frames of one size"),
        ({"images": [[[[photograph(0)]]]]}, DtypeError, "images"),
        ({"seed": None}, ConfigError, "seed"),
        ({"seed": 0.5}, ConfigError, "seed"),
        ({"seed": True}, ConfigError, "seed"),
        ({"seed": "prompt"}, ConfigError, "seed"),
        ({"seed": torch.Generator()}, ConfigError, "seed"),
        ({"seed": ["one", "two"]}, ShapeError, "seed got 2 prompts"),
        ({"corruption": PatchMask}, ConfigError, "corruption"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        corrupt(**{"images": [photograph(0)], "seed": 0} | arguments)
