"""Public sets of questions about pictures, and one's own, as rows of `prompt`, `images` and `answer`."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value, load_dataset

from srpo.errors import ConfigError, refuse
from srpo.recipes.prompts import conversation

MESSAGE = {"role": Value("string"), "content": Value("string")}
FEATURES = Features({"prompt": List(MESSAGE), "images": List(Image()), "answer": Value("string")})


def row(question: str, images: list[Any], answer: str) -> dict[str, Any]:
    """Return one example; the marks of pictures go, because the trainer writes the model's own."""
    return {
        "prompt": conversation(question.replace("<image>", "").strip()),
        "images": images,
        "answer": answer.strip(),
    }


def geometry3k(split: str = "train") -> Dataset:
    """Load Geometry3K, `hiyouga/geometry3k`: questions about diagrams, with a test split."""
    found = load_dataset("hiyouga/geometry3k", split=split)
    return found.map(
        lambda x: row(x["problem"], x["images"], x["answer"]), remove_columns=found.column_names, features=FEATURES
    )


def virl39k(split: str = "train") -> Dataset:
    """Load ViRL39K, `TIGER-Lab/ViRL39K`: questions of many kinds; a quarter have several pictures."""
    from huggingface_hub import hf_hub_download

    if split != "train":
        refuse(ConfigError, "virl39k", "split", repr(split), "'train', the only one", "evaluate on another set")
    table, pictures = (
        Path(hf_hub_download("TIGER-Lab/ViRL39K", name, repo_type="dataset"))
        for name in ("39Krelease.parquet", "images.zip")
    )
    folder = pictures.parent / "unpacked"
    if not folder.exists():
        unpack(pictures, folder)
    return from_virl39k(table, folder)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive so that a folder that was left half-way is not taken for a whole one."""
    part = folder.with_name(f"{folder.name}.part")
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(part)
    part.rename(folder)


def from_virl39k(table: Path, folder: Path) -> Dataset:
    """Return the rows of the parquet file of ViRL39K, whose pictures lie in `folder`."""
    found = load_dataset("parquet", data_files=str(table), split="train")
    return found.map(
        lambda x: row(x["question"], [str(folder / path) for path in x["image"]], x["answer"]),
        remove_columns=found.column_names,
        features=FEATURES,
    )


def own(path: Path) -> Dataset:
    """Load lines of JSON with `question`, `images` (paths beside the file) and `answer`."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            rows.append(_own_row(path, number, line))
    if not rows:
        refuse(ConfigError, "own", "path", str(path), "lines of JSON", "write a line for each question")
    return Dataset.from_list(rows, features=FEATURES)


def _own_row(path: Path, number: int, line: str) -> dict[str, Any]:
    where, expected = f"{path.name}, line {number}", '{"question": ..., "images": ["a.png"], "answer": ...}'
    try:
        found = json.loads(line)
        pictures = [str(path.parent / name) for name in found["images"]]
        made = row(str(found["question"]), pictures, str(found["answer"]))
    except (ValueError, KeyError, TypeError) as error:
        refuse(ConfigError, "own", "path", f"{where}: {type(error).__name__} {error}", expected, "mend the line")
    missing = [name for name in pictures if not Path(name).is_file()]
    if missing:
        refuse(ConfigError, "own", "path", f"{where}: no file {missing[0]}", "pictures beside the file", "copy it")
    return made


SETS: dict[str, Callable[[], Dataset]] = {"geometry3k": geometry3k, "virl39k": virl39k}


def load(name: str) -> Dataset:
    """Load a set by name, or a file of one's own."""
    if name in SETS:
        return SETS[name]()
    if not Path(name).is_file():
        refuse(ConfigError, "load", "name", repr(name), f"{', '.join(SETS)} or a .jsonl file", "pass --data geometry3k")
    return own(Path(name))
