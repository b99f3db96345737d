"""Read what the compiler made of a kernel: resources, instructions, and what one element costs in the hot path.

Figures per element divide what one thread does in the hot path, the few scalars of a row included, by its share of the
kernel's `BLOCK*` constexpr. They exist for NVIDIA only: LLVM writes an `if` for AMD as two jumps in a row, and the path
of most bytes takes both sides.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

import triton.backends.nvidia
from compiled.dry_launch import Launch
from compiled.hot_path import Instruction, Listing, hot_path

NVIDIA_TOOLS = pathlib.Path(triton.backends.nvidia.__file__).parent / "bin"  # they ship inside the triton wheel

SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448, "gfx942": 65536}  # bytes a program may use
SHARED_PER_SM = {80: 167936, 90: 233472, 100: 233472}


@dataclass(frozen=True)
class HotPath:
    """What one thread does for its share of a block of elements."""

    loop: bool
    instructions: int
    loads: dict[int, int]
    stores: dict[int, int]
    exp2: int
    elements: float | None  # per thread; None where the kernel has no BLOCK, or is AMD's
    bytes_per_element: float | None
    exp2_per_element: float | None
    instructions_per_element: float | None


@dataclass(frozen=True)
class MachineCode:
    """Figures of one compiled kernel. Loads and stores map a width in bits to a count; only global memory counts."""

    registers: int
    stack: int
    spills: int
    shared: int
    shared_limit: int
    threads: int
    instructions: int
    loads: dict[int, int]
    stores: dict[int, int]
    fp64: int
    exp2: int
    occupancy: float
    hot_path: HotPath


def read(launch: Launch) -> MachineCode:
    """Read the machine code of a launch."""
    return _read_amd(launch) if "amdgcn" in launch.compiled.asm else _read_nvidia(launch)


def _read_nvidia(launch: Launch) -> MachineCode:
    compiled = launch.compiled
    arch = compiled.metadata.target.arch
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(NVIDIA_TOOLS / "cuobjdump", "--dump-resource-usage", file.name)
        sass = _output(NVIDIA_TOOLS / "nvdisasm", "--print-code", "--no-dataflow", file.name)
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    listing = parse_sass(sass)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    return MachineCode(
        registers=registers,
        stack=stack + local,
        spills=sum(i.opcode.startswith(("STL", "LDL")) for i in listing.instructions),
        shared=shared,
        shared_limit=SHARED_LIMIT[arch],
        threads=32 * warps,
        occupancy=nvidia_occupancy(arch, registers, warps, shared),
        **_figures(launch, listing, 32 * warps),
    )


def _read_amd(launch: Launch) -> MachineCode:
    compiled = launch.compiled
    text = compiled.asm["amdgcn"]
    # Scalar registers spill into lanes of vector registers: no memory, so sgpr_spill_count is left out.
    fields = ("vgpr_count", "agpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    vgprs, agprs, stack, spills = (int(re.search(rf"\.{key}: *(\d+)", text)[1]) for key in fields)
    listing = parse_amdgcn(text)
    scratch = sum(i.opcode.startswith(("scratch_load", "scratch_store")) for i in listing.instructions)
    threads = compiled.metadata.target.warp_size * compiled.metadata.num_warps
    return MachineCode(
        registers=vgprs,
        stack=stack,
        spills=spills + scratch,
        shared=compiled.metadata.shared,
        shared_limit=SHARED_LIMIT[compiled.metadata.target.arch],
        threads=threads,
        occupancy=min(8, 512 // _round_up(max(vgprs, agprs, 1), 8)) / 8,
        **_figures(launch, listing, threads),
    )


def _figures(launch: Launch, listing: Listing, threads: int) -> dict:
    instructions = listing.instructions
    return {
        "instructions": len(instructions),
        "loads": widths(instructions, "load"),
        "stores": widths(instructions, "store"),
        "fp64": sum(is_fp64(i.opcode) for i in instructions),
        "exp2": sum(is_exp2(i.opcode) for i in instructions),
        "hot_path": _figures_per_element(listing, _elements_per_thread(launch, threads)),
    }


def _figures_per_element(listing: Listing, elements: float | None) -> HotPath:
    loop, path = hot_path(listing, bytes_moved)
    exp2 = sum(is_exp2(i.opcode) for i in path)
    return HotPath(
        loop=loop,
        instructions=len(path),
        loads=widths(path, "load"),
        stores=widths(path, "store"),
        exp2=exp2,
        elements=elements,
        bytes_per_element=sum(map(bytes_moved, path)) / elements if elements else None,
        exp2_per_element=exp2 / elements if elements else None,
        instructions_per_element=len(path) / elements if elements else None,
    )


def _elements_per_thread(launch: Launch, threads: int) -> float | None:
    blocks = [value for name, value in launch.flags.items() if name.startswith("BLOCK")]
    return blocks[0] / threads if blocks and "cubin" in launch.compiled.asm else None


def parse_sass(text: str) -> Listing:
    """Return the instructions of nvdisasm's listing and the position of each label."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);", line):
            predicate, opcode, operands = found.groups()
            target = re.search(r"`\((\.L\w+)\)", operands) if opcode.startswith("BRA") else None
            ends = opcode.startswith(("EXIT", "RET")) and not predicate
            # BRA P0, ... tests a predicate operand, and a uniform one is written before the label too
            conditional = bool(predicate) or bool(re.match(r"(\.\w+)* +!?U?P\d", operands))
            instructions.append(Instruction(opcode, target[1] if target else None, conditional, ends))
    return Listing(instructions, labels)


def parse_amdgcn(text: str) -> Listing:
    """Return the instructions of LLVM's AMD assembly and the position of each label."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+((?:s|v|ds|global|buffer|flat|scratch)_\w+)(.*)", line):
            opcode, operands = found.groups()
            target = re.search(r"\.LBB\w+", operands) if "branch" in opcode else None
            conditional = opcode.startswith("s_cbranch")
            instructions.append(
                Instruction(opcode, target[0] if target else None, conditional, opcode.startswith("s_endpgm"))
            )
    return Listing(instructions, labels)


def widths(instructions: list[Instruction], what: str) -> dict[int, int]:
    """Count global loads or stores by their width in bits."""
    counts = Counter(width for i in instructions if (width := access_width(i.opcode, what)))
    return dict(sorted(counts.items(), reverse=True))


def access_width(opcode: str, what: str) -> int | None:
    """Return the bits a thread moves with a global `"load"` or `"store"`, or None for any other instruction."""
    nvidia = {"load": ("LDG.", "LDGSTS.", "LD.E"), "store": ("STG.", "ST.E")}[what]
    if opcode.startswith(nvidia):
        number = re.search(r"\.(?:[US])?(8|16|64|128|256)\b", opcode)
        return int(number[1]) if number else 32
    amd = re.match(rf"(?:global|buffer|flat)_{what}_(?:lds_)?[us]?(byte|short|dword)(?:x(\d))?", opcode)
    return {"byte": 8, "short": 16, "dword": 32}[amd[1]] * int(amd[2] or 1) if amd else None


def bytes_moved(instruction: Instruction) -> int:
    """Return the bytes that a thread loads and stores with an instruction."""
    return sum(access_width(instruction.opcode, what) or 0 for what in ("load", "store")) // 8


def is_exp2(opcode: str) -> bool:
    """Say whether an instruction is the hardware's exponential."""
    return opcode.startswith(("MUFU.EX2", "v_exp_f32"))


def is_fp64(opcode: str) -> bool:
    """Say whether an instruction computes in, or converts from or to, double precision."""
    return bool(re.match(r"D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|v_\w+_f64", opcode) or re.search(r"\.(F64|\w+64H)\b", opcode))


def nvidia_occupancy(arch: int, registers: int, warps: int, shared: int) -> float:
    """Estimate the share of the 64 warp slots of an SM that are filled; registers come in units of 256 a warp."""
    by_registers = 65536 // (_round_up(registers * 32, 256) * warps)
    by_shared = SHARED_PER_SM[arch] // (shared + 1024)  # the driver keeps 1 KiB a program
    return min(64 // warps, 32, by_registers, by_shared) * warps / 64


def _round_up(x: int, unit: int) -> int:
    return -(-x // unit) * unit


def _output(*command: object) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout
