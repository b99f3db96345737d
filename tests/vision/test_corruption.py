"""Corruption of pictures: equal before and after the processor, whole cells, reproducible, geometry kept."""

import json
import random

import numpy as np
import pytest
import tiny_vlms
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from processes import run_python
from tiny_vlms import FAMILIES, MERGED_PATCH, picture

from srpo import ConfigError, DtypeError, ShapeError
from srpo.vision.corruption import Blank, Blur, GaussianNoise, PatchMask, PixelLayout, ShuffleImages

CORRUPTIONS = [
    PatchMask(),
    PatchMask(probability=0.3, cell=16, fill="grey"),
    GaussianNoise(),
    GaussianNoise(sigma=5.0),
    Blur(radius=2.5),
    Blank(),
    Blank(fill="grey"),
    ShuffleImages(),
]
HALF = ((0.5,) * 3, (0.5,) * 3)
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
LAYOUTS = {
    "flattened": PixelLayout("flattened", 2, *CLIP, merge_size=2, temporal_patch_size=2),
    "tiled": PixelLayout("tiled", 2, *HALF, merge_size=2),
    "images": PixelLayout("images", 4, *CLIP),
}
every_corruption = pytest.mark.parametrize("corruption", CORRUPTIONS, ids=repr)
every_layout = pytest.mark.parametrize("kind", LAYOUTS)


@pytest.fixture(scope="module", params=FAMILIES)
def vlm(request):
    return request.param, *tiny_vlms.build(request.param)


def photograph(size, seed):
    """A picture of smooth colours, none of which is the fill of a mask."""
    width, height = size
    coarse = np.random.default_rng(seed).integers(1, 127, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def photographs(family):
    """Several pictures that the processor does not resize: Qwen takes different sizes, the others one."""
    sizes = [(32, 32)] * 4 if family in ("idefics3", "llava") else [(32, 32), (48, 32), (32, 48), (32, 32), (48, 32)]
    return [photograph(size, seed) for seed, size in enumerate(sizes)]


def process(family, processor, images):
    """Run the image processor; with Idefics3 the pictures belong to one sample each."""
    nested = [[image] for image in images] if family == "idefics3" else images
    return dict(processor.image_processor(nested, return_tensors="pt"))


def random_inputs(kind, seed=0, n=3, side=8, dtype=torch.float32):
    """Random values where processors write pictures, one sample each; no value is a fill."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "flattened":
        grid = torch.tensor([[1, side // 2, side // 2 + 2 * (i % 2)] for i in range(n)])
        values = torch.rand(int(grid.prod(dim=1).sum()), 3 * 2 * 4, generator=generator) + 0.01
        return {"pixel_values": values.to(dtype), "image_grid_thw": grid}
    shape = (n, 1, 3, side, side) if kind == "tiled" else (n, 3, side, side)
    return {"pixel_values": (torch.rand(shape, generator=generator) + 0.01).to(dtype)}


def changed_cells(kind, before, after, cell=4):
    """Tell per cell of 4 pixels which values changed, `[cells, values]`."""
    changed = before != after
    if kind == "flattened":
        return changed.reshape(-1, 4 * changed.shape[1])  # four adjacent patches are an image token
    changed = changed.flatten(0, -4)
    n, C, H, W = changed.shape
    return changed.reshape(n, C, H // cell, cell, W // cell, cell).permute(0, 2, 4, 1, 3, 5).reshape(-1, C * cell**2)


# Both entrances


@every_corruption
def test_corrupting_the_processors_output_equals_processing_corrupted_pictures(vlm, corruption):
    family, model, processor = vlm
    layout = PixelLayout.of_model(model)
    images = photographs(family)
    clean = process(family, processor, images)
    inside = corruption.on_inputs(clean, layout, generator=11)
    before = corruption.on_images(images, generator=11, cell=layout.merged_patch)
    outside = process(family, processor, before)
    assert torch.equal(inside["pixel_values"], outside["pixel_values"])
    assert not torch.equal(inside["pixel_values"], clean["pixel_values"])
    assert {name: x for name, x in inside.items() if x is clean[name]}.keys() == clean.keys() - {"pixel_values"}
    assert [image.size for image in before] == [image.size for image in images]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@every_corruption
def test_other_precisions(vlm, corruption, dtype):
    family, _, processor = vlm
    layout = PixelLayout.of_processor(processor)
    clean = process(family, processor, photographs(family))
    whole = corruption.on_inputs(clean, layout, generator=1)["pixel_values"]
    cast = corruption.on_inputs(clean | {"pixel_values": clean["pixel_values"].to(dtype)}, layout, generator=1)
    assert cast["pixel_values"].dtype == dtype
    one_level = 1 / 255 / min(layout.image_std) if isinstance(corruption, GaussianNoise | Blur) else 0.0
    rounding = torch.finfo(dtype).eps * 4
    torch.testing.assert_close(cast["pixel_values"].double(), whole.double(), rtol=0, atol=one_level + rounding)


def test_layouts_of_model_and_processor_agree(vlm):
    family, model, processor = vlm
    of_model, of_processor = PixelLayout.of_model(model), PixelLayout.of_processor(processor)
    assert of_model.merged_patch == of_processor.merged_patch == MERGED_PATCH[family]
    assert (of_model.kind, of_model.image_mean, of_model.image_std, of_model.temporal_patch_size) == (
        of_processor.kind,
        of_processor.image_mean,
        of_processor.image_std,
        of_processor.temporal_patch_size,
    )
    assert hash(of_model)


def test_every_corruption_runs_through_every_model_and_changes_its_logits(vlm):
    family, model, processor = vlm
    images = photographs(family)[:2]
    block = tiny_vlms.IMAGE_BLOCKS[family]
    inputs = processor(text=[f"{block}{block}what?"], images=images, return_tensors="pt")
    with torch.no_grad():
        clean = model(**inputs).logits[:, -1]
        for corruption in CORRUPTIONS:
            dark = corruption.on_inputs(inputs, PixelLayout.of_model(model), generator=0)
            difference = (model(**dark).logits[:, -1] - clean).abs().max()
            assert difference > 1e-3, corruption


def test_siglip_towers_and_wrapped_models():
    _, processor = tiny_vlms.build("llava")
    model, _ = tiny_vlms.build("llava")
    wrapped = torch.nn.Module()
    wrapped.module = model
    assert PixelLayout.of_model(wrapped) == PixelLayout.of_processor(processor)
    model.config.vision_config.model_type = "siglip_vision_model"
    assert PixelLayout.of_model(model).image_mean == (0.5,) * 3


@pytest.mark.parametrize("settings", [{"do_rescale": False}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5}])
def test_processors_with_another_scale(settings):
    _, processor = tiny_vlms.build("qwen25vl")
    for name, value in settings.items():
        setattr(processor.image_processor, name, value)
    layout = PixelLayout.of_processor(processor)
    images = photographs("qwen25vl")
    clean = process("qwen25vl", processor, images)
    for corruption in CORRUPTIONS:
        inside = corruption.on_inputs(clean, layout, generator=2)["pixel_values"]
        outside = process("qwen25vl", processor, corruption.on_images(images, generator=2, cell=8))["pixel_values"]
        torch.testing.assert_close(inside, outside, rtol=1e-5, atol=1e-5)


# Masks


@every_layout
@given(seed=st.integers(0, 2**63 - 1), probability=st.floats(0, 1), fill=st.sampled_from(["black", "grey"]))
def test_masks_paint_whole_cells_and_nothing_else(kind, seed, probability, fill):
    inputs, layout = random_inputs(kind, seed % 5), LAYOUTS[kind]
    out = PatchMask(probability, fill=fill).on_inputs(inputs, layout, generator=seed)
    before, after = inputs["pixel_values"], out["pixel_values"]
    assert (after.shape, after.dtype, after.device) == (before.shape, before.dtype, before.device)
    cells = changed_cells(kind, before, after)
    assert torch.equal(cells.all(dim=1), cells.any(dim=1))
    level = {"black": 0, "grey": 127}[fill] / 255
    fills = (level - torch.tensor(layout.image_mean)) / torch.tensor(layout.image_std)
    painted = after[before != after]
    assert not len(painted) or (painted[:, None] - fills).abs().min(dim=1).values.max() < 1e-6
    if probability in (0.0, 1.0):
        assert cells.all(dim=1).float().mean() == probability


@every_layout
@pytest.mark.parametrize("probability", [0.0, 0.25, 0.6, 1.0])
def test_share_of_masked_cells(kind, probability):
    inputs = random_inputs(kind, n=8, side=64)
    out = PatchMask(probability).on_inputs(inputs, LAYOUTS[kind], generator=5)
    cells = changed_cells(kind, inputs["pixel_values"], out["pixel_values"]).all(dim=1)
    deviation = (probability * (1 - probability) / len(cells)) ** 0.5
    assert abs(cells.float().mean() - probability) <= 4 * deviation


@given(factor=st.integers(1, 4), width=st.integers(1, 40), height=st.integers(1, 40), seed=st.integers(0, 99))
def test_larger_cells_and_cut_cells(factor, width, height, seed):
    cell = 4 * factor
    image = photograph((width, height), seed)
    (masked,) = PatchMask(0.5, cell=cell).on_images([image], generator=seed, cell=4)
    changed = (np.asarray(masked) != np.asarray(image)).all(axis=2)
    assert np.array_equal(changed, (np.asarray(masked) == 0).all(axis=2))
    for y in range(0, height, cell):
        for x in range(0, width, cell):
            block = changed[y : y + cell, x : x + cell]
            assert block.all() == block.any()


def test_both_frames_of_a_still_picture_get_the_same_corruption():
    model, processor = tiny_vlms.build("qwen25vl")
    inputs = process("qwen25vl", processor, photographs("qwen25vl"))
    for corruption in CORRUPTIONS:
        out = corruption.on_inputs(inputs, PixelLayout.of_model(model), generator=0)["pixel_values"]
        frames = out.reshape(len(out), 3, 2, -1)
        assert torch.equal(frames[:, :, 0], frames[:, :, 1])


# Seeds


@every_layout
@pytest.mark.parametrize("corruption", CORRUPTIONS[:-1], ids=repr)
def test_a_split_batch_under_one_generator_equals_the_whole(kind, corruption):
    inputs, layout = random_inputs(kind, n=4, side=16), LAYOUTS[kind]
    whole = corruption.on_inputs(inputs, layout, generator=9)["pixel_values"]
    generator, parts = torch.Generator().manual_seed(9), []
    for rows in (slice(0, 1), slice(1, 4)):
        part = {name: x[rows] for name, x in inputs.items()}
        if kind == "flattened":
            ends = [0, *inputs["image_grid_thw"].prod(dim=1).cumsum(dim=0).tolist()]
            part["pixel_values"] = inputs["pixel_values"][ends[rows.start] : ends[rows.stop]]
        parts.append(corruption.on_inputs(part, layout, generator=generator)["pixel_values"])
    assert torch.equal(torch.cat(parts), whole)


def test_seeds_differ_and_pictures_differ():
    twins = [photograph((32, 32), 0)] * 2
    one, two = PatchMask().on_images(twins, generator=0, cell=4)
    other, _ = PatchMask().on_images(twins, generator=1, cell=4)
    assert len({one.tobytes(), two.tobytes(), other.tobytes()}) == 3


def test_same_result_in_another_process_without_heavy_imports():
    code = (
        "import hashlib, json, sys, torch\n"
        "from srpo.vision.corruption import *\n"
        "heavy = [m for m in ('transformers', 'PIL', 'triton', 'trl') if m in sys.modules]\n"
        "pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)\n"
        "layout = PixelLayout('images', 4, (0.5,) * 3, (0.5,) * 3)\n"
        "corruptions = [PatchMask(), GaussianNoise(), Blur(), Blank(), ShuffleImages()]\n"
        "outs = [c.on_inputs({'pixel_values': pixels}, layout, generator=7)['pixel_values'] for c in corruptions]\n"
        "digests = [hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in outs]\n"
    )
    run = run_python("-c", code + "print(json.dumps([digests, heavy]))")
    assert run.returncode == 0, run.stderr
    here: dict = {}
    exec(code, here)
    assert json.loads(run.stdout) == [here["digests"], []]


@every_corruption
def test_global_generators_and_arguments_stay_as_they_were(corruption):
    inputs = random_inputs("images")
    inputs["pixel_values"].requires_grad_()
    copy = inputs["pixel_values"].clone()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    out = corruption.on_inputs(inputs, LAYOUTS["images"], generator=0)
    corruption.on_images(photographs("llava"), generator=0, cell=4)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert torch.equal(inputs["pixel_values"], copy)
    assert not out["pixel_values"].requires_grad


@every_layout
@every_corruption
def test_strided_pixel_values(kind, corruption):
    inputs, layout = random_inputs(kind), LAYOUTS[kind]
    strided = inputs["pixel_values"].repeat_interleave(2, dim=-1)[..., ::2]
    assert not strided.is_contiguous()
    expected = corruption.on_inputs(inputs, layout, generator=4)["pixel_values"]
    assert torch.equal(
        corruption.on_inputs(inputs | {"pixel_values": strided}, layout, generator=4)["pixel_values"], expected
    )


@every_layout
@every_corruption
def test_no_picture_and_other_keys(kind, corruption):
    others = {"input_ids": torch.ones(1, 2), "num_images": [0], "x": None}
    for inputs in (others, others | {"pixel_values": None}):
        out = corruption.on_inputs(inputs, LAYOUTS[kind], generator=0)
        assert out is not inputs
        assert out.keys() == inputs.keys()
        assert all(out[name] is inputs[name] for name in inputs)
    assert corruption.on_images([], generator=0, cell=4) == []


# Padding


def test_padding_of_tiled_pixels_stays_and_draws_nothing():
    _, processor = tiny_vlms.build("idefics3")
    images = [photograph((64, 32), 0), photograph((32, 32), 1)]
    settings = {"do_image_splitting": True, "size": {"longest_edge": 64}, "return_tensors": "pt"}
    inputs = dict(processor.image_processor([[images[0]], images], **settings))
    layout = PixelLayout.of_processor(processor)
    real = inputs["pixel_attention_mask"].flatten(2).any(dim=2)
    assert not real.all()
    for corruption in CORRUPTIONS:
        out = corruption.on_inputs(inputs, layout, generator=0)["pixel_values"]
        assert torch.equal((out != 0).flatten(2).any(dim=2), real)
    second = {name: x[1:] for name, x in inputs.items()}
    generator = torch.Generator().manual_seed(0)
    alone = [
        GaussianNoise().on_inputs(x, layout, generator=generator)["pixel_values"]
        for x in ({name: x[:1] for name, x in inputs.items()}, second)
    ]
    assert torch.equal(torch.cat(alone), GaussianNoise().on_inputs(inputs, layout, generator=0)["pixel_values"])


@every_corruption
def test_pixels_outside_the_attention_mask_stay(corruption):
    pixels = random_inputs("tiled", n=3, side=16)["pixel_values"]
    mask = torch.zeros(3, 1, 16, 16, dtype=torch.long)
    mask[1, 0, :12, :9] = 1  # the first sample is padding whatever its pixels hold
    mask[2, 0, :5] = 1
    masked = {"pixel_values": pixels, "pixel_attention_mask": mask}
    out = corruption.on_inputs(masked, LAYOUTS["tiled"], generator=5)
    padding = (mask == 0)[:, :, None].expand_as(pixels)
    assert torch.equal(out["pixel_values"][padding], pixels[padding])
    assert not torch.equal(out["pixel_values"], pixels)
    assert out["pixel_attention_mask"] is mask
    others = {name: x[1:] for name, x in masked.items()}
    without = corruption.on_inputs(others, LAYOUTS["tiled"], generator=5)
    assert torch.equal(without["pixel_values"], out["pixel_values"][1:])


def test_a_black_that_the_model_takes_for_padding_is_refused():
    layout = PixelLayout("tiled", 4, (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(ConfigError, match="a tile of zeros for padding; use fill='grey'"):
        Blank().on_inputs(random_inputs("tiled"), layout, generator=0)
    assert Blank("grey").on_inputs(random_inputs("tiled"), layout, generator=0)["pixel_values"].all()


# Shuffles


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=10), st.integers(0, 2**63 - 1))
def test_shuffles_exchange_different_pictures_of_one_size(drawn, seed):
    images = [photograph((16, 8 if wide else 16), n) for n, wide in drawn]
    contents = [(image.size, image.tobytes()) for image in images]
    shuffled = ShuffleImages().on_images(images, generator=seed)
    replaced: dict = {}
    for before, image in zip(contents, shuffled, strict=True):
        rivals = {x for x in contents if x[0] == before[0]} - {before}
        after = (image.size, image.tobytes())
        assert after in rivals if rivals else after == (before[0], bytes(len(before[1])))
        assert replaced.setdefault(before, after) == after
    for size in {size for size, _ in contents}:
        targets = [after for before, after in replaced.items() if before[0] == size]
        assert len(set(targets)) == len(targets)


def test_tiles_of_a_sample_move_together():
    pixels = torch.rand(3, 2, 3, 8, 8) + 0.5
    pixels[2, 1] = 0  # padding: the third sample has one tile
    out = ShuffleImages().on_inputs({"pixel_values": pixels}, LAYOUTS["tiled"], generator=0)["pixel_values"]
    assert torch.equal(out[0], pixels[1])
    assert torch.equal(out[1], pixels[0])
    assert torch.equal(out[2, 0], torch.full((3, 8, 8), -1.0))
    assert not out[2, 1].any()


# Pictures


def test_pictures_of_any_mode_become_rgb():
    modes = ["RGB", "L", "RGBA", "P", "1", "CMYK"]
    images = [picture(3, (16, 24)).convert(mode) for mode in modes]
    for corruption in CORRUPTIONS:
        out = corruption.on_images(images, generator=0, cell=4)
        assert {(image.mode, image.size) for image in out} == {("RGB", (16, 24))}


@given(sigma=st.floats(0, 200), level=st.sampled_from([0, 100, 255]), seed=st.integers(0, 99))
def test_noise_has_the_width_that_was_asked_for_and_is_clipped(sigma, level, seed):
    image = Image.new("RGB", (64, 64), (level,) * 3)
    (noisy,) = GaussianNoise(sigma).on_images([image], generator=seed)
    expected = np.random.default_rng(0).normal(level, sigma, (64, 64, 3)).round().clip(0, 255)
    tolerance = 0.03 * (sigma + 1)  # below a level of grey, a handful of the 12,288 values is all that is seen
    assert abs(np.asarray(noisy).mean() - expected.mean()) <= tolerance
    assert abs(np.asarray(noisy).std() - expected.std()) <= tolerance


# Bad input


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: PatchMask(probability=1.5), r"PatchMask\(\): probability got 1.5, expected a number in \[0.0, 1.0\]"),
        (lambda: PatchMask(probability=True), "probability got True"),
        (lambda: PatchMask(probability=float("nan")), "probability got nan"),
        (lambda: PatchMask(cell=0), "cell got 0, expected None or a positive int"),
        (lambda: PatchMask(cell=8.0), "cell got 8.0"),
        (lambda: PatchMask(fill="white"), "fill got 'white', expected one of 'black', 'grey'"),
        (lambda: Blank(fill=0), "fill got 0"),
        (lambda: GaussianNoise(sigma=-1), "sigma got -1, expected a number of at least 0"),
        (lambda: Blur(radius=float("inf")), "radius got inf"),
        (lambda: Blur(radius="4"), "radius got '4'"),
        (lambda: PixelLayout("packed", 4, *HALF), "kind got 'packed'"),
        (lambda: PixelLayout("images", 0, *HALF), "patch_size got 0"),
        (lambda: PixelLayout("images", 4, 0.5, 0.5), "image_mean got 0.5, expected one number per channel"),
        (lambda: PixelLayout("images", 4, (0.5,) * 3, (0.5, 0.5, 0.0)), "image_std got"),
        (lambda: PixelLayout.of_model(torch.nn.Linear(1, 1)), "'Linear', expected a model of qwen2_vl"),
        (lambda: PixelLayout.of_processor(None), r"processor got NoneType.*corrupted_inputs=processor"),
    ],
)
def test_bad_settings(construct, message):
    with pytest.raises(ConfigError, match=message):
        construct()


def test_an_unknown_family_is_sent_to_its_pictures():
    model, _ = tiny_vlms.build("llava")
    model.config.model_type = "another"
    with pytest.raises(ConfigError, match=r"'another'.*corrupted_inputs=processor"):
        PixelLayout.of_model(model)


@pytest.mark.parametrize("generator", [None, -1, 2**63, True, 0.5, "seed"])
def test_a_generator_is_required(generator):
    for call in (
        lambda: PatchMask().on_inputs(random_inputs("images"), LAYOUTS["images"], generator=generator),
        lambda: Blank().on_images([], generator=generator),
    ):
        with pytest.raises(ConfigError, match=r"generator got .* expected a CPU torch.Generator or a seed"):
            call()


FLAT, GRID = torch.rand(32, 24), torch.tensor([[1, 4, 4], [1, 4, 4]])


@pytest.mark.parametrize(
    ("kind", "inputs", "error", "message"),
    [
        ("flattened", {"pixel_values": FLAT}, ConfigError, "image_grid_thw got None"),
        ("flattened", {"pixel_values": FLAT, "image_grid_thw": GRID[:1]}, ShapeError, "got 16 patches, expected 32"),
        ("flattened", {"pixel_values": FLAT, "image_grid_thw": GRID[0]}, ShapeError, "an integer tensor"),
        ("flattened", {"pixel_values": FLAT, "image_grid_thw": GRID.float()}, ShapeError, "an integer tensor"),
        ("flattened", {"pixel_values": FLAT, "image_grid_thw": [[1, 4, 8]]}, ShapeError, "an integer tensor"),
        ("flattened", {"pixel_values": FLAT, "image_grid_thw": torch.tensor([[1, 1, 32]])}, ShapeError, "multiples of"),
        ("flattened", {"pixel_values": FLAT, "image_grid_thw": torch.tensor([[0, 4, 4]])}, ShapeError, "positive"),
        ("flattened", {"pixel_values": FLAT[:, :20], "image_grid_thw": GRID}, ShapeError, "24 values per patch"),
        ("flattened", random_inputs("images"), ShapeError, "float32.3, 3, 8, 8., expected .patches"),
        ("tiled", random_inputs("images"), ShapeError, r"expected \[B, tiles, C, H, W\] for kind='tiled'"),
        ("images", random_inputs("tiled"), ShapeError, r"expected \[n_images, C, H, W\]"),
        ("images", {"pixel_values": torch.rand(2, 4, 8, 8)}, ShapeError, "the 3 channels of image_mean"),
        ("images", {"pixel_values": torch.ones(2, 3, 8, 8).long()}, DtypeError, "floating point or uint8"),
        ("images", {"pixel_values": [torch.rand(3, 8, 8)]}, DtypeError, "expected a torch.Tensor"),
        ("images", [1], DtypeError, "inputs got list"),
        ("tiled", random_inputs("tiled") | {"pixel_attention_mask": torch.ones(3, 1, 8)}, ShapeError, "3, 1, 8, 8"),
        (
            "tiled",
            random_inputs("tiled") | {"pixel_attention_mask": torch.ones(3, 1, 8, 8).tril()},
            ShapeError,
            "one rectangle",
        ),
    ],
)
def test_bad_inputs(kind, inputs, error, message):
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    for corruption in (PatchMask(), ShuffleImages()):
        with pytest.raises(error, match=message) as caught:
            corruption.on_inputs(inputs, LAYOUTS[kind], generator=generator)
        assert f"{type(corruption).__name__}.on_inputs()" in str(caught.value)
    assert torch.equal(generator.get_state(), state)


def test_other_bad_arguments():
    inputs, layout, image = random_inputs("images"), LAYOUTS["images"], picture(1)
    with pytest.raises(ConfigError, match=r"layout got .*, expected a PixelLayout; pass PixelLayout.of_model\(model\)"):
        PatchMask().on_inputs(inputs, "images", generator=0)
    with pytest.raises(ConfigError, match="cell got 6, expected a multiple of 4"):
        PatchMask(cell=6).on_inputs(inputs, layout, generator=0)
    with pytest.raises(ConfigError, match="cell got None, expected the pixels per side"):
        PatchMask().on_images([image], generator=0)
    with pytest.raises(ConfigError, match="cell got 0, expected a positive int"):
        Blank().on_images([image], generator=0, cell=0)
    with pytest.raises(DtypeError, match="images got list"):
        Blank().on_images([[image]], generator=0)
