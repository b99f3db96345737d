"""Run blocks of threads through the instructions of a kernel, one block after the other.

All threads of a block step together through the basic block that comes first in the text; the others wait, so threads
that part meet again as early as they can. Registers start as noise, drawn from `seed`: a result that depends on one
that nobody set changes with the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from compiled.emulator import arithmetic
from compiled.emulator.memory import GlobalMemory, KernelError, SharedMemory
from compiled.emulator.ptx import REGISTER_BITS, Address, Immediate, Instruction, Kernel, Operand, Register
from compiled.emulator.races import Access, find_races

WARP = 32
LONGEST = 50_000  # basic blocks that a block of threads runs, at most: a loop that a fault made endless is found
Lanes = np.ndarray | bool  # the threads that take part; True is all of them
Step = Callable[[Lanes], None]

DTYPES = {
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f64": np.dtype("f8"), "f32": np.dtype("f4"), "f16": np.dtype("f2"), "pred": np.dtype("?"),
}  # fmt: skip
ADDRESS = np.dtype(np.uint64)


@dataclass(frozen=True)
class Options:
    """How to run: the noise in registers, and the errors of approximate instructions in units in the last place."""

    seed: int = 0
    ulps: int = 0  # ex2.approx and div.full are off by up to so many (the ISA allows 2), as a function of their input


class Machine:
    """One kernel, bound to the arguments of one launch."""

    def __init__(self, kernel: Kernel, arguments: list, memory: GlobalMemory, shared: int, options: Options):
        self.kernel, self.memory, self.options = kernel, memory, options
        self.shared = SharedMemory(shared)
        self.arguments = {
            name: np.array(x, DTYPES[kind]) for (name, kind), x in zip(kernel.parameters, arguments, strict=True)
        }
        self.threads = kernel.threads
        self.noise = {kind: _noise(kind, (n, self.threads), options.seed) for kind, n in kernel.registers.items()}
        self.registers = {kind: x.copy() for kind, x in self.noise.items()}
        self.tid, self.ctaid, self.grid = np.arange(self.threads), np.zeros(3, np.uint32), np.ones(3, np.uint32)
        self.cta, self.epoch, self.warp_epochs = 0, 0, np.zeros(self.threads, np.int64)
        self.executed = np.zeros(len(kernel.blocks), np.int64)  # how often each basic block ran, by warps
        self.steps = [[self._step(i) for i in block if not i.ends_block] for block in kernel.blocks]

    def run(self, grid: tuple[int, ...]) -> list[str]:
        """Run every block of the grid and return the races in shared memory."""
        self.grid[: len(grid)] = grid
        with np.errstate(all="ignore"):
            for cta in range(math.prod(grid)):
                self.ctaid[:] = (
                    cta % self.grid[0],
                    cta // self.grid[0] % self.grid[1],
                    cta // (self.grid[0] * self.grid[1]),
                )
                self._run_block(cta)
        return find_races(self.shared.log, across_blocks=False)

    def _run_block(self, cta: int) -> None:
        self.cta, self.epoch, self.warp_epochs[:] = cta, 0, 0
        self.shared.forget()
        for kind, x in self.registers.items():
            np.copyto(x, self.noise[kind])
        at = np.zeros(self.threads, np.int64)  # the basic block that a thread is about to run
        waits, done = np.zeros(self.threads, bool), np.zeros(self.threads, bool)
        for _ in range(LONGEST):
            if done.all():
                return
            ready = ~(waits | done)
            if not ready.any():
                self._pass_barrier(at, waits, done)
                continue
            block = int(at[ready].min())
            lanes = ready & (at == block)
            self.executed[block] += len(np.unique(self.tid[lanes] // WARP))
            for step in self.steps[block]:
                step(True if lanes.all() else lanes)
            at[lanes] = block + 1
            last = self.kernel.blocks[block][-1] if self.kernel.blocks[block] else None
            if last is None or not last.ends_block:
                continue
            taken = lanes & self._guard(last)
            if last.opcode.startswith("bra"):
                at[taken] = self.kernel.labels[last.operands[0]]
            elif last.opcode in ("ret", "exit"):
                done |= taken
            elif last.opcode in ("bar.sync", "barrier.sync") and last.operands == (Immediate(0),):
                waits |= taken
            else:
                raise NotImplementedError(last.text)
        raise KernelError(f"block {cta} does not end")

    def _pass_barrier(self, at: np.ndarray, waits: np.ndarray, done: np.ndarray) -> None:
        if done.any():
            raise KernelError(f"{int(done.sum())} threads have left while the others wait at a barrier")
        places = at.reshape(-1, WARP)
        if (places != places[:, :1]).any():
            raise KernelError("threads of one warp wait at different barriers")
        waits[:] = False
        self.epoch += 1

    def _guard(self, instruction: Instruction) -> Lanes:
        if instruction.guard is None:
            return True
        register, wanted = instruction.guard
        predicate = self.registers["p"][register.index]
        return predicate if wanted else ~predicate

    def _step(self, instruction: Instruction) -> Step:
        """Return what an instruction does to the registers of the threads that take part."""
        base, *modifiers = instruction.opcode.split(".")
        builder = getattr(self, f"_{base}", None)
        step = builder(instruction, modifiers) if builder else self._compute(instruction, base, modifiers)
        if instruction.guard is None:
            return step
        return lambda lanes: step(self._guard(instruction) & lanes)

    def _compute(self, instruction: Instruction, base: str, modifiers: list[str]) -> Step:
        operation = arithmetic.operation(base, modifiers, self.options.ulps)
        target, *sources = instruction.operands
        values = [self._value(x, DTYPES[t]) for x, t in zip(sources, operation.sources, strict=True)]
        out = self._view(target, DTYPES[operation.target])
        if isinstance(operation.function, np.ufunc):
            return lambda lanes: operation.function(*values, out=out, where=lanes)
        return lambda lanes: np.copyto(out, operation.function(*values), where=lanes)

    def _view(self, register: Operand, dtype: np.dtype) -> np.ndarray:
        """Return the values of a register; integers keep its width, whatever width the instruction names."""
        if register == "_":  # the sink: nobody reads it
            return np.empty(self.threads, dtype)
        own = self.registers[register.kind][register.index]
        if dtype.kind == "b":
            return own
        return own.view(np.dtype(f"{dtype.kind}{own.itemsize}") if dtype.kind in "iu" else dtype)

    def _value(self, operand: Operand, dtype: np.dtype) -> np.ndarray:
        """Return what an operand holds, as an array that follows its register."""
        if isinstance(operand, Register):
            return self._view(operand, dtype)
        if isinstance(operand, Immediate):
            return np.array(operand.bits & ((1 << 8 * dtype.itemsize) - 1), f"u{dtype.itemsize}").view(dtype)
        if operand == "global_smem":
            return np.array(0, dtype)
        name, _, axis = operand.partition(".")
        k = "xyz".index(axis or "x")
        special = {
            "%tid": (self.tid if k == 0 else 0 * self.tid).astype(dtype), "%laneid": (self.tid % WARP).astype(dtype),
            "%ntid": np.array(self.threads if k == 0 else 1, dtype),
            "%ctaid": self.ctaid[k : k + 1].view(dtype), "%nctaid": self.grid[k : k + 1].view(dtype),
        }  # fmt: skip
        return special[name]

    def _mov(self, instruction: Instruction, modifiers: list[str]) -> Step:
        """Copy a value, or take a word apart, or put it together."""
        target, source = instruction.operands
        dtype = DTYPES[modifiers[0]]
        if isinstance(target, tuple):
            whole, bits = self._value(source, dtype), 8 * dtype.itemsize // len(target)
            outs = [self._view(x, DTYPES[f"b{bits}"]) for x in target]

            def take_apart(lanes: Lanes) -> None:
                for k, out in enumerate(outs):
                    np.copyto(out, (whole >> dtype.type(k * bits)).astype(out.dtype), where=lanes)

            return take_apart
        out = self._view(target, dtype)
        if isinstance(source, tuple):
            bits = 8 * dtype.itemsize // len(source)
            parts = [self._value(x, DTYPES[f"b{bits}"]) for x in source]

            def put_together(lanes: Lanes) -> None:
                value = sum(part.astype(dtype) << dtype.type(k * bits) for k, part in enumerate(parts))
                np.copyto(out, value, where=lanes)

            return put_together
        value = self._value(source, dtype)
        return lambda lanes: np.copyto(out, value, where=lanes)

    def _ld(self, instruction: Instruction, modifiers: list[str]) -> Step:
        target, address = instruction.operands
        if modifiers[0] == "param":
            out, value = self._view(target, DTYPES[modifiers[-1]]), self.arguments[address.base]
            signed = (
                value.view(f"i{value.itemsize}") if modifiers[-1][0] == "s" else value
            )  # a wider register extends it
            value = (
                value.view(f"u{value.itemsize}").view(out.dtype)
                if value.itemsize == out.itemsize
                else signed.astype(out.dtype)
            )
            return lambda lanes: np.copyto(out, value, where=lanes)
        dtype = np.dtype(f"u{DTYPES[modifiers[-1]].itemsize}")
        targets = target if isinstance(target, tuple) else (target,)
        outs, count = [self._view(x, dtype) for x in targets], len(targets)
        memory, where = self._memory(modifiers), self._address(address)

        def load(lanes: Lanes) -> None:
            threads = self.tid if lanes is True else np.flatnonzero(lanes)
            if len(threads):
                words = memory.load(where()[threads], dtype.itemsize, count, self._access(instruction, threads))
                for k, out in enumerate(outs):
                    out[threads] = words[:, k]

        return load

    def _st(self, instruction: Instruction, modifiers: list[str]) -> Step:
        address, source = instruction.operands
        dtype = np.dtype(f"u{DTYPES[modifiers[-1]].itemsize}")
        sources = [self._value(x, dtype) for x in (source if isinstance(source, tuple) else (source,))]
        memory, where = self._memory(modifiers), self._address(address)

        def store(lanes: Lanes) -> None:
            threads = self.tid if lanes is True else np.flatnonzero(lanes)
            if len(threads):
                words = [np.broadcast_to(x, (self.threads,))[threads].astype(dtype) for x in sources]
                memory.store(where()[threads], np.stack(words, 1), self._access(instruction, threads))

        return store

    def _memory(self, modifiers: list[str]) -> GlobalMemory | SharedMemory:
        return {"global": self.memory, "shared": self.shared, "shared::cta": self.shared}[modifiers[0]]

    def _address(self, address: Address) -> Callable[[], np.ndarray]:
        base, offset = self._value(address.base, ADDRESS), np.uint64(address.offset & (2**64 - 1))
        return lambda: np.broadcast_to(base.astype(ADDRESS) + offset, (self.threads,))

    def _access(self, instruction: Instruction, threads: np.ndarray) -> Access:
        what = f"{instruction.text} ({instruction.source})"
        return Access(self.cta, self.epoch, threads, self.warp_epochs[threads], what)

    def _shfl(self, instruction: Instruction, modifiers: list[str]) -> Step:
        """Exchange values inside warps."""
        target, source, which, clamp, members = instruction.operands
        mode = modifiers[1]
        if modifiers not in (["sync", "bfly", "b32"], ["sync", "idx", "b32"]) or (clamp, members) != (
            Immediate(31),
            Immediate(-1),
        ):
            raise NotImplementedError(instruction.text)
        out, value = self._view(target, DTYPES["b32"]), self._value(source, DTYPES["b32"])
        which, first = self._value(which, DTYPES["u32"]), self.tid // WARP * WARP

        def exchange(lanes: Lanes) -> None:
            self._whole_warps(lanes, instruction)
            lane = which.astype(np.int64) % WARP
            partner = first + (self.tid % WARP ^ lane if mode == "bfly" else lane)
            np.copyto(out, np.broadcast_to(value, (self.threads,))[partner], where=lanes)

        return exchange

    def _bar(self, instruction: Instruction, modifiers: list[str]) -> Step:
        """Order the memory accesses of a warp."""
        if modifiers != ["warp", "sync"] or instruction.operands != (Immediate(-1),):
            raise NotImplementedError(instruction.text)

        def order(lanes: Lanes) -> None:
            self.warp_epochs[self._whole_warps(lanes, instruction)] += 1

        return order

    def _ldmatrix(self, instruction: Instruction, modifiers: list[str]) -> Step:
        """Load 8 x 8 matrices of 16 bits: lane 8i + j names row j of matrix i, lane l gets elements 2l and 2l + 1."""
        targets, address = instruction.operands
        n, transposed = _matrix_form(instruction, modifiers)
        outs, where = [self._view(x, DTYPES["b32"]) for x in targets], self._address(address)

        def load(lanes: Lanes) -> None:
            threads = self._whole_warps(lanes, instruction)
            named = threads[threads % WARP < 8 * n]
            rows = self.shared.load(where()[named], 4, 4, self._access(instruction, named))
            elements = rows.view(np.uint16).reshape(-1, n, 8, 8)  # of a warp: matrix, row, column
            elements = np.ascontiguousarray(elements.swapaxes(2, 3) if transposed else elements)
            words = elements.reshape(-1, n, 64).view(np.uint32)  # of a warp: matrix, lane
            for k, out in enumerate(outs):
                out[threads] = words[:, k].ravel()

        return load

    def _stmatrix(self, instruction: Instruction, modifiers: list[str]) -> Step:
        """Store 8 x 8 matrices: the inverse of `_ldmatrix`."""
        address, sources = instruction.operands
        n, transposed = _matrix_form(instruction, modifiers)
        values, where = [self._value(x, DTYPES["b32"]) for x in sources], self._address(address)

        def store(lanes: Lanes) -> None:
            threads = self._whole_warps(lanes, instruction)
            named = threads[threads % WARP < 8 * n]
            words = np.stack([x[threads].reshape(-1, WARP) for x in values], 1)  # of a warp: matrix, lane
            elements = words.view(np.uint16).reshape(-1, n, 8, 8)
            elements = np.ascontiguousarray(elements.swapaxes(2, 3) if transposed else elements)
            rows = elements.reshape(-1, 8).view(np.uint32)  # of a lane: the row that it names
            self.shared.store(where()[named], rows, self._access(instruction, named))

        return store

    def _whole_warps(self, lanes: Lanes, instruction: Instruction) -> np.ndarray:
        """Return the threads that take part, after a check that no warp has lost some of them."""
        if lanes is True:
            return self.tid
        together = lanes.reshape(-1, WARP)
        if (together.any(1) != together.all(1)).any():
            raise KernelError(f"lanes are missing from {instruction.text} ({instruction.source})")
        return np.flatnonzero(lanes)


def _matrix_form(instruction: Instruction, modifiers: list[str]) -> tuple[int, bool]:
    """Return how many matrices there are, and whether they are transposed."""
    counts = [x for x in modifiers if x in ("x1", "x2", "x4")]
    others = [x.removesuffix("::cta") for x in modifiers if x != "trans" and x not in counts]
    if others != ["sync", "aligned", "m8n8", "shared", "b16"]:
        raise NotImplementedError(instruction.text)
    return int(counts[0][1]), "trans" in modifiers


def _noise(kind: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    generator = np.random.default_rng([seed, REGISTER_BITS[kind]])
    if kind == "p":
        return generator.integers(0, 2, shape).astype(bool)
    return generator.integers(0, 1 << REGISTER_BITS[kind], shape, np.dtype(f"u{REGISTER_BITS[kind] // 8}"))
