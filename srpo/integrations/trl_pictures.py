"""The pictures that TRL showed the model, corrupted, and the processor called on them as TRL calls it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.image_utils import load_image
from trl.data_utils import apply_chat_template

from srpo.checks import Call
from srpo.vision.inputs import model_inputs, row_cuts
from srpo.vision.pictures import corrupt_images


class Shown(NamedTuple):
    """What a rollout was generated from: a prompt, and a list of pictures or None, for each row.

    `images` is None where TRL had none; `by_tools` says that tools returned some: TRL then processes all pictures at
    once, without a text.
    """

    prompts: list[Any]
    images: list[Any] | None
    by_tools: bool


def dataset_images(inputs: list[dict[str, Any]]) -> list[Any] | None:
    """Return the pictures of each row of a dataset, as TRL reads them."""
    if "images" in inputs[0]:
        return [x.get("images") for x in inputs]
    if "image" in inputs[0]:
        return [None if x.get("image") is None else [x["image"]] for x in inputs]
    return None


def shown_pictures(
    trainer: Any, shown: Shown | None, rows: list[int], corruption: Any
) -> tuple[list[Any] | None, list[Any] | None]:
    """Return the pictures of some rows, and the same corrupted as `corrupted_inputs` corrupts them.

    None where the rollout had no pictures; a corruption that mixes pictures of a batch is that of the whole batch.
    """
    if shown is None or shown.images is None:
        return None, None
    opened = [None if x is None else [_opened(picture) for picture in x] for x in shown.images]
    wanted = rows if corruption.is_per_picture else list(range(len(opened)))
    texts = _texts(trainer, shown.prompts)
    processor: Any = trainer.processing_class
    seeds = [texts[i] for i in wanted]
    dark = corrupt_images([opened[i] for i in wanted], corruption, seed=seeds, processor=processor)
    by_row = dict(zip(wanted, dark, strict=True))
    return [opened[i] for i in rows], [by_row[i] for i in rows]


def corrupted_inputs(trainer: Any, shown: Shown, clean: Mapping[str, Any], corruption: Any) -> dict[str, Tensor]:
    """Return what replaces the tensors of `clean`; each prompt is corrupted and processed once, not once a rollout.

    Args:
        trainer: a GRPOTrainer, of which the processor and the chat template are taken.
        shown: the rollout's prompts and pictures.
        clean: model inputs by name; `num_images` counts the entries of each row.
        corruption: one of `srpo.vision.corruption`; seeds are those of a picture and the text of its prompt.

    Raises: DtypeError, ShapeError.
    """
    texts = _texts(trainer, shown.prompts)
    images = [None if row is None else [_opened(x) for x in row] for row in shown.images or ()]
    places: dict[Any, int] = {}
    index = [places.setdefault(_key(*row), len(places)) for row in zip(texts, images, strict=True)]
    first = [index.index(place) for place in range(len(places))]
    processor: Any = trainer.processing_class
    seeds = [texts[i] for i in first]
    dark = corrupt_images([images[i] for i in first], corruption, seed=seeds, processor=processor)
    if shown.by_tools:
        flat = [image for place in index for image in dark[place] or ()]
        made = dict(processor.image_processor(images=flat, return_tensors="pt"))
    else:
        made = dict(processor(images=dark, text=seeds, padding=True, return_tensors="pt"))
        made = _repeated(trainer.model, made, clean, first, index)
    return {name: x.to(clean[name]) for name, x in made.items() if isinstance(clean.get(name), Tensor)}


def _texts(trainer: Any, prompts: list[Any]) -> list[str]:
    """Return the texts of the prompts, a place for each picture in them."""
    tools = [trainer.tools] * len(prompts)
    if trainer.environment_factories is not None:
        tools = [trainer._env_tools[name] for name in trainer._batch_environments]
    settings, processor = trainer.chat_template_kwargs, trainer.processing_class
    return [
        apply_chat_template({"prompt": prompt}, processor, tools=own, **settings)["prompt"]
        for prompt, own in zip(prompts, tools, strict=True)
    ]


def _opened(image: Any) -> Any:
    """Return a picture where there is its address."""
    return load_image(image) if isinstance(image, str) else image


def _key(text: str, images: Any) -> Any:
    pictures = [(x.mode, x.size, x.tobytes()) if hasattr(x, "tobytes") else id(x) for x in images or ()]
    return text, *pictures


def _repeated(
    model: Any, made: dict[str, Any], clean: Mapping[str, Any], first: list[int], index: list[int]
) -> dict[str, Any]:
    """Give each rollout what was made of its prompt."""
    ids = made.pop("input_ids")
    if len(first) == len(index):
        return made
    given = {name: x for name, x in made.items() if name in clean}
    if "num_images" in clean:
        given["num_images"] = [clean["num_images"][i] for i in first]
    cuts = row_cuts(Call("SRPOTrainer", ids, "input_ids"), model_inputs(model, ids, made["attention_mask"], given))
    return {
        name: torch.cat([x[cuts[name][i] : cuts[name][i + 1]] for i in index])
        for name, x in given.items()
        if name in cuts and isinstance(x, Tensor)
    }
