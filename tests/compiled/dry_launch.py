"""Compile what a GPU would run, on a machine that has none.

Inside `dry_launch(target)` ordinary host code runs on CPU tensors. Every `kernel[grid](...)` is specialised as Triton's
JIT does it (types, alignment, values of 1), compiled for the target, recorded, and not launched: outputs keep whatever
their memory held, unless something is given that executes launches. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: str
    grid: tuple
    compiled: CompiledKernel

    @property
    def flags(self) -> dict[str, object]:
        """Return the constexpr arguments by name; values of 1 that the JIT made constant are no flags."""
        names, signature = self.compiled.src.fn.arg_names, self.compiled.src.signature
        constants = {names[path[0]]: value for path, value in self.compiled.src.constants.items()}
        written = {p.name for p in self.compiled.src.fn.params if p.is_constexpr}
        return {name: constants[name] for name in signature if name in written}


class _AbsentGPU:
    """The part of Triton's driver that compilation asks; anything that would load or time a binary is missing."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return zlib.crc32(str(self.target).encode()) & 0x7FFFFFFF  # the JIT keeps one cache per device index

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


@contextmanager
def dry_launch(
    target: GPUTarget, execute: Callable[[Launch, dict[str, object]], None] | None = None
) -> Iterator[list[Launch]]:
    """Record the launches of the block, compiled for `target`; `execute` gets each with its arguments by name."""
    launches: list[Launch] = []
    stock_run, stock_driver = JITFunction.run, getattr(driver, "_active", None)

    def run(self, *args, grid, warmup, **keywords):
        compiled = stock_run(self, *args, grid=grid, warmup=True, **keywords)
        launches.append(Launch(self.fn.__name__, grid, compiled))
        if execute is not None and not warmup:
            execute(launches[-1], dict(zip(self.arg_names, args, strict=False)) | keywords)
        return compiled

    driver.set_active(_AbsentGPU(target))
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = stock_run
        driver._active = stock_driver
