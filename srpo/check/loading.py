"""A model, its processor and pictures, from a path or the hub."""

import contextlib
import importlib.util
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch

from srpo.errors import ConfigError, IncompatibleVersionError, house_message, refuse

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TORCHVISION = (
    "install the torchvision that fits your torch: "
    "pip install torchvision \"torch==$(python -c 'import torch; print(torch.__version__)')\""
)


def load(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """Load a model in eval mode and its processor; raise ConfigError that says which of them failed, and a fix."""
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging
    except ImportError as error:
        text = house_message("check", "transformers", str(error), "5.5 or later", "pip install -e '.[vlm]'")
        raise IncompatibleVersionError(text) from error
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    with _explained("processor", name):
        processor = AutoProcessor.from_pretrained(name)
    with _explained("model", name):
        model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=getattr(torch, dtype))
        model = model.to(device).eval()
    return model, processor


@contextlib.contextmanager
def _explained(what: str, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers and the hub raise many kinds
        reason = re.split(r"\n|\. ", str(error).strip())[0] or type(error).__name__
        fix = "pass a folder that save_pretrained wrote, or the name of a vision-language model on the hub"
        if importlib.util.find_spec("torchvision") is None and what == "processor":
            fix = f"{fix}; of families that take videos too, {TORCHVISION}"
        got, expected = f"{name!r} ({reason})", "one that transformers loads"
        raise ConfigError(house_message("check", what, got, expected, fix)) from error


def pictures(folder: str | None, count: int) -> list[Any]:
    """Return the first pictures of a folder in RGB, or drawn ones where none is given."""
    from PIL import Image, ImageDraw, UnidentifiedImageError

    if folder is None:
        drawn = []
        for number in range(1, count + 1):
            picture = Image.new("RGB", (224, 224), "white")
            draw = ImageDraw.Draw(picture)
            for row in range(number + 1):
                draw.ellipse([24, 20 + 60 * row, 72 + 40 * number, 70 + 60 * row], fill=("red", "blue", "green")[row])
            drawn.append(picture)
        return drawn
    paths = sorted(path for path in pathlib.Path(folder).glob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        refuse(ConfigError, "check", "images", repr(folder), "a folder with pictures", "try one with a .png or .jpg")
    try:
        opened = [Image.open(path).convert("RGB") for path in paths[:count]]
    except (OSError, UnidentifiedImageError) as error:
        text = house_message("check", "images", str(error), "pictures", "take the file out of the folder")
        raise ConfigError(text) from error
    return [opened[i % len(opened)] for i in range(count)]
