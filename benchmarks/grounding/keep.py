"""Keep what was computed, so that a measurement that was stopped goes on where it was.

What is kept is found by the code that made it, by its arguments and by the number of threads, which orders sums: a
change of any makes it anew.
"""

import functools
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import torch

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = pathlib.Path(tempfile.gettempdir()) / "srpo-learn-grounding"
# what numbers depend on: the small model's world, and the library itself
OF_POLICIES = ("task.py", "model.py", "rollouts.py", "train.py")
OF_NUMBERS = (*OF_POLICIES, "gradient.py", "variants.py")


@functools.cache
def code(names: tuple[str, ...], library: bool = True) -> str:
    """Return a digest of modules of this folder, and of the library."""
    paths = [pathlib.Path(__file__).parent / name for name in names]
    for package in ("srpo", "srpo_kernels") if library else ():
        paths += sorted((ROOT / package).rglob("*.py"))
    digest = hashlib.blake2b(torch.__version__.encode(), digest_size=8)
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def kept(digest: str, name: str, make: Callable[[], Any]) -> Any:
    """Load what was made under this name by this code, or make and keep it."""
    threads = torch.get_num_threads()
    path = FOLDER / (f"{digest} {name}.pt" if threads == 1 else f"{digest} {name}, {threads} threads.pt")
    if not path.exists():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save(made, partial)
        partial.replace(path)
    return torch.load(path, weights_only=True)
