"""Fill memory that `srpo` allocates without a value: NaN, or the largest integer, in place of what lay there before.

Fresh memory is often zero, and zero is often right: a cell that nobody wrote then passes every test. PyTorch's own
`fill_uninitialized_memory` needs `use_deterministic_algorithms`, which runs other code than users run and raises on a
GPU; this changes only what modules of `srpo` and `srpo_kernels` allocate, on any device.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor


@functools.cache
def install() -> None:
    """Poison what the packages allocate, once; later calls do nothing."""
    with torch.device("cpu"):
        torch.ones(0)  # PyTorch now remembers which functions a default device redirects: the stock ones
    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (Tensor, ("new_empty",))):
        for name in names:
            setattr(owner, name, poisoning(getattr(owner, name)))


def poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `allocate`, poisoned for callers in the packages and in mutants of them."""

    @functools.wraps(allocate)
    def poisoned(*arguments, **options):
        out = allocate(*arguments, **options)
        if torch.compiler.is_compiling():
            return out
        if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0].startswith("srpo"):
            with torch.no_grad():
                out.fill_(poison_of(out.dtype))
        return out

    return poisoned


def poison_of(dtype: torch.dtype) -> float:
    """Return the value that shows itself most: NaN, the largest integer, True."""
    if dtype == torch.bool:
        return True
    return torch.nan if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).max
