"""What the machine code of every kernel must keep, as a list of broken rules."""

from __future__ import annotations

from compiled import ttir
from compiled.dry_launch import Launch
from compiled.machine_code import MachineCode

REGISTERS_PER_SM = 65536
# Of kernels that stream aligned rows. A program of 4 warps has a block of 8 KiB on its way, and an SM needs about 23.
LEAST_OCCUPANCY = 0.3
LEAST_OCCUPANCY_WITH_EDGE = 0.25
LEAST_OCCUPANCY_OF_PAIRS = 0.125  # a program has a block of both rows on its way, and the next ones: 32 KiB an SM
LEAST_OCCUPANCY_OF_16_WARPS = 0.25  # one program an SM: it has 32 KiB on its way, and its row stays in the L2 cache
STREAMING = {
    "_row_statistics_fwd_kernel", "_row_chunks_fwd_kernel", "_logits_gradient_bwd_kernel", "_row_training_fwd_kernel",
    "_scale_gradient_bwd_kernel", "_row_pairs_fwd_kernel", "_row_pair_chunks_fwd_kernel",
}  # fmt: skip

# Arrays of a few numbers a row: the grid, an int32, bounds their size. Everything else is addressed in int64.
ROW_SIZED = {
    "_logits_gradient_bwd_kernel": {
        "ids_ptr", "row_max_ptr", "log_sum_ptr", "entropy_ptr", "grad_logps_ptr", "grad_entropy_ptr",
    },
    "_policy_loss_fwd_kernel": {"sums_ptr"},
    "_row_training_fwd_kernel": {
        "ids_ptr", "row_mask_ptr", "old_logps_ptr", "ref_logps_ptr", "is_ratio_ptr", "advantages_ptr", "weights_ptr",
        "scale_ptr", "logps_ptr", "entropy_ptr",
    },
}  # fmt: skip


def broken_rules(launch: Launch, code: MachineCode, streams: str | None) -> list[str]:
    """Return the rules that a compiled launch breaks; `streams` names the 16-bit type of aligned rows."""
    return [
        *_resource_rules(launch, code),
        *_type_rules(launch, code),
        *(_width_rules(launch, code, streams) if streams else ()),
    ]


def _resource_rules(launch: Launch, code: MachineCode) -> list[str]:
    broken = []
    if code.stack:
        broken.append(f"stack: {code.stack} bytes")
    if code.spills:
        broken.append(f"spills: {code.spills} instructions")
    if code.shared > code.shared_limit:
        broken.append(f"shared memory: {code.shared} of {code.shared_limit} bytes")
    is_nvidia = "cubin" in launch.compiled.asm
    if is_nvidia and code.registers * code.threads > REGISTERS_PER_SM:
        broken.append(f"registers: {code.registers} x {code.threads} threads do not fit")
    if code.threads > 1024:
        broken.append(f"threads: {code.threads}")
    return broken


def _type_rules(launch: Launch, code: MachineCode) -> list[str]:
    text = launch.compiled.asm["ttir"]
    broken = [f"fp64: {code.fp64} instructions"] if code.fp64 else []
    broken += [f"not fp32: {line}" for line in ttir.narrow_arithmetic(text)[:3]]
    narrow = set(ttir.narrow_addresses(text)) - ROW_SIZED.get(launch.kernel, set())
    return broken + [f"int32 address: {name}" for name in sorted(narrow)]


def _width_rules(launch: Launch, code: MachineCode, element: str) -> list[str]:
    """Demand that 128-bit accesses of the hot path alone move the streamed block, and programs enough to hide them."""
    broken, streamed = [], ttir.streamed_bytes(launch.compiled.asm["ttir"], element)
    least = LEAST_OCCUPANCY_WITH_EDGE if launch.flags.get("HAS_EDGE") else LEAST_OCCUPANCY
    if launch.kernel == "_row_training_fwd_kernel":
        least = LEAST_OCCUPANCY_OF_16_WARPS
    if "pair" in launch.kernel:
        least = LEAST_OCCUPANCY_OF_PAIRS
    if launch.kernel in STREAMING and code.occupancy < least:
        broken.append(f"occupancy: {code.occupancy}, {code.registers} registers")
    for what, size in streamed.items():
        counts = code.hot_path.loads if what == "load" else code.hot_path.stores
        wide = sum(count * width // 8 for width, count in counts.items() if width >= 128)
        blocks = 2 if "pair" in launch.kernel and what == "load" else 1  # one of each row
        due = blocks * size // code.threads
        if wide < due:
            broken.append(f"narrow {what}s: 128-bit ones move {wide} of {due} bytes a thread, {counts}")
    return broken
