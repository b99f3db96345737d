"""Launch Triton's kernels on CPU tensors: compiled for a GPU by the JIT's own rules, run by the emulator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from compiled.dry_launch import TARGETS, Launch, dry_launch
from compiled.emulator import ptx
from compiled.emulator.machine import Machine, Options
from compiled.emulator.memory import GlobalMemory, KernelError, Traffic

EMULATED_TARGETS = ("sm_80", "sm_90")
Change = Callable[[str, str], str]  # a kernel's name and PTX to other PTX

_kernels: dict[str, ptx.Kernel] = {}  # by hash of the machine code


@dataclass(frozen=True)
class Run:
    """One emulated launch."""

    kernel: str
    variant: str  # hash of the machine code
    blocks: int
    traffic: Traffic
    shared_races: list[str]
    executed: np.ndarray  # how often each basic block ran, by warps
    code: ptx.Kernel

    @property
    def races(self) -> list[str]:
        """Return the races in global and shared memory."""
        return self.traffic.races + self.shared_races


@dataclass
class Session:
    """The launches inside one `emulated`."""

    options: Options
    change: Change | None
    runs: list[Run] = field(default_factory=list)

    @property
    def races(self) -> list[str]:
        """Return all races with the name of their kernel."""
        return [f"{run.kernel}: {race}" for run in self.runs for race in run.races]

    def execute(self, launch: Launch, bound: dict[str, object]) -> None:
        """Run a compiled launch on the arguments it was given, by name."""
        kernel = self._parsed(launch)
        size = launch.grid(bound) if callable(launch.grid) else launch.grid
        passed = [bound[name] for name, kind in launch.compiled.src.signature.items() if kind != "constexpr"]
        values = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in passed]
        scratch = len(kernel.parameters) - len(values)  # pointers to memory that these kernels ask none of
        memory = GlobalMemory([x for x in passed if isinstance(x, torch.Tensor)])
        machine = Machine(kernel, values + [0] * scratch, memory, launch.compiled.metadata.shared, self.options)
        try:
            shared_races = machine.run(tuple(size))
        except KernelError as fault:
            raise KernelError(f"{kernel.name}: {fault}") from None
        report = memory.report()
        run = Run(kernel.name, launch.compiled.hash, math.prod(size), report, shared_races, machine.executed, kernel)
        self.runs.append(run)

    def _parsed(self, launch: Launch) -> ptx.Kernel:
        text, variant = launch.compiled.asm["ptx"], launch.compiled.hash
        if self.change is not None:
            return ptx.parse(self.change(launch.kernel, text))
        if variant not in _kernels:
            _kernels[variant] = ptx.parse(text)
        return _kernels[variant]


@contextmanager
def emulated(target: str = "sm_90", options: Options | None = None, change: Change | None = None) -> Iterator[Session]:
    """Run every `kernel[grid](...)` of the block in the emulator; `change` rewrites a kernel before it runs."""
    session = Session(options or Options(), change)
    with dry_launch(TARGETS[target], session.execute):
        yield session
