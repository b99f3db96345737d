"""Streams of a model that FSDP2 shards: the same numbers, and no rank waits for one that has nothing to score."""

import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_vlms
import torch
import torch.distributed as dist
from processes import run_in_group
from torch.distributed.device_mesh import init_device_mesh

from srpo import Blank, score_streams

T = 6
ROLES = ([1, 1, 0, 2, 2, 2], [0, 0, 0, 0, 0, 0])  # the second rank has nothing for the contrast streams
NAMES = ("logps", "corrupted_logps", "ablated_logps")


def scored(model: Any, processor: Any, family: str, rank: int) -> list[torch.Tensor]:
    pictures = [[tiny_vlms.picture(9)], [tiny_vlms.picture(7, seed=1)]]
    prompt = dict(processor(text=[tiny_vlms.PROMPTS[family]] * 2, images=pictures, return_tensors="pt", padding=True))
    ids, mask = prompt.pop("input_ids"), prompt.pop("attention_mask")
    completion = torch.randint(20, 40, (2, T), generator=torch.Generator().manual_seed(rank))
    if "mm_token_type_ids" in prompt:
        prompt["mm_token_type_ids"] = torch.nn.functional.pad(prompt["mm_token_type_ids"], (0, T))
    streams = score_streams(
        model, torch.cat([ids, completion], dim=1), torch.cat([mask, torch.ones_like(completion)], dim=1), T,
        role_ids=torch.tensor([ROLES[rank]] * 2), corruption=Blank(), batch_size=1, **prompt,
    )  # fmt: skip
    return [getattr(streams, name) for name in NAMES]


def sharded_and_whole() -> Iterator[tuple[str, Any]]:
    from torch.distributed.fsdp import fully_shard

    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    for family in ("idefics3", "qwen25vl"):
        model, processor = tiny_vlms.build(family)
        yield f"{family}-whole", scored(model, processor, family, rank)
        for reshard in (True, False):
            model, _ = tiny_vlms.build(family)
            text = model.model.text_model if family == "idefics3" else model.model.language_model
            for layer in text.layers:
                fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
            fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
            yield f"{family}-{reshard}", scored(model, processor, family, rank)


# Pictures of each sequence of both ranks, and the batch size: a rank without a picture, ragged counts, an empty rank.
RAGGED = {
    "one rank has no picture": (((1, 1), (0, 0)), 1),
    "pictures in one batch each": (((1, 0), (0, 1)), 1),
    "a batch without pictures": (((1,), (0,)), None),
    "ragged": (((1, 0, 1), (1,)), 1),
    "ragged, the second more": (((0,), (1, 0, 1)), 2),
    "an empty rank": (((), (1, 0)), 1),
    "an empty rank without batch_size": (((0, 1), ()), None),
}


def ragged(model: Any, processor: Any, family: str, images: tuple[int, ...], batch_size: int | None) -> list[Any]:
    pictures = [[tiny_vlms.picture(9 - n, seed=n)] * count for n, count in enumerate(images)]
    block = tiny_vlms.IMAGE_BLOCKS[family]
    texts = [f"<|user|>{block * count}how many?<|assistant|>" for count in images]
    flat = [x for row in pictures for x in row]
    given = {"images": (pictures if family == "idefics3" else flat) if flat else None}
    # an empty rank still has tensors, with no row
    prompt = dict(processor(text=texts or ["x"], return_tensors="pt", padding=True, padding_side="left", **given))
    if not images:
        prompt = {name: x[:0] for name, x in prompt.items()}
    ids, mask = prompt.pop("input_ids"), prompt.pop("attention_mask")
    n = len(images)
    completion = torch.randint(20, 40, (n, T), generator=torch.Generator().manual_seed(n))
    if "mm_token_type_ids" in prompt:
        prompt["mm_token_type_ids"] = torch.nn.functional.pad(prompt["mm_token_type_ids"], (0, T))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "score_streams.*there is no image")
        streams = score_streams(
            model, torch.cat([ids, completion], dim=1), torch.cat([mask, torch.ones_like(completion)], dim=1), T,
            role_ids=torch.tensor([ROLES[i % 2] for i in range(n)], dtype=torch.long).reshape(n, T), corruption=Blank(),
            batch_size=batch_size, **prompt,
        )  # fmt: skip
    return [getattr(streams, name) for name in NAMES]


def ragged_sharded_and_whole() -> Iterator[tuple[str, Any]]:
    from torch.distributed.fsdp import fully_shard

    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    for family in ("idefics3", "qwen25vl"):
        model, processor = tiny_vlms.build(family)
        sharded, _ = tiny_vlms.build(family)
        inner = sharded.model
        text, tower = (
            (inner.text_model.layers, inner.vision_model.encoder.layers)
            if family == "idefics3"
            else (inner.language_model.layers, inner.visual.blocks)
        )
        for layer in (*tower, *text):
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        for name, (images, batch_size) in RAGGED.items():
            yield f"{family}-{name}-whole", ragged(model, processor, family, images[rank], batch_size)
            yield f"{family}-{name}", ragged(sharded, processor, family, images[rank], batch_size)


@pytest.fixture(scope="module")
def ragged_results(tmp_path_factory) -> Any:
    return run_in_group(ragged_sharded_and_whole, 2, tmp_path_factory.mktemp("ragged"))


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize("family", ["idefics3", "qwen25vl"])
def test_ranks_stay_in_step(ragged_results, family, name):
    found = f"{family}-{name}"
    for whole, sharded in zip(ragged_results[f"{found}-whole"], ragged_results[found], strict=True):
        for a, b in zip(whole, sharded, strict=True):
            torch.testing.assert_close(b, a, atol=2e-6, rtol=2e-6, equal_nan=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Any:
    folder: pathlib.Path = tmp_path_factory.mktemp("sharded")
    return run_in_group(sharded_and_whole, 2, folder)


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("family", ["idefics3", "qwen25vl"])
def test_sharded_is_whole(results, family, reshard):
    for whole, sharded in zip(results[f"{family}-whole"], results[f"{family}-{reshard}"], strict=True):
        for name, a, b in zip(NAMES, whole, sharded, strict=True):
            torch.testing.assert_close(
                b, a, atol=2e-6, rtol=2e-6, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
            )
    first = results[f"{family}-{reshard}"][0]
    for stream in first[1:]:
        assert (stream - first[0]).abs().nan_to_num().max() > 1e-3  # the contrasts are not nothing
