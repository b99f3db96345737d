"""Kernels with one fault each, made from the text of the real ones: the checks must tell them apart."""

from __future__ import annotations

import importlib
import pathlib
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import srpo_kernels

KERNEL_FILES = ("row_statistics", "row_pairs", "token_credit", "policy_loss", "row_training")


@dataclass(frozen=True)
class Mutant:
    """Replacements in one file of `srpo_kernels`, the cases that reach the fault, and the rules that it breaks."""

    file: str
    replacements: tuple[tuple[str, str], ...]
    breaks: tuple[str, ...]
    cases: tuple[str, ...] = ("plain",)


STATISTICS, GRADIENT, CREDIT, LOSS, SPLIT, MERGE, TRAINING, SCALE = (
    "_row_statistics_fwd_kernel",
    "_logits_gradient_bwd_kernel",
    "_token_credit_fwd_kernel",
    "_policy_loss_fwd_kernel",
    "_row_chunks_fwd_kernel",
    "_merge_chunks_fwd_kernel",
    "_row_training_fwd_kernel",
    "_scale_gradient_bwd_kernel",
)
PAIRS, PAIR_SPLIT, PAIR_MERGE = (
    "_row_pairs_fwd_kernel", "_row_pair_chunks_fwd_kernel", "_merge_pair_chunks_fwd_kernel",
)  # fmt: skip

_SWEEP = 'has half."""\n    return _block(vocabulary, 4096)'

COMPILED = {
    "rows in int32": Mutant(
        "row_statistics",
        ((".to(tl.int64)", ""), (": tl.int64", "")),
        (
            *(f"{STATISTICS}: int32 address: {name}_ptr" for name in ("logits", "corrupted", "ablated")),
            *(f"{GRADIENT}: int32 address: {name}_ptr" for name in ("logits", "out")),
            *(f"{SPLIT}: int32 address: {name}_ptr" for name in ("logits", "partials")),
            f"{MERGE}: int32 address: partials_ptr",
        ),
        ("live", "few rows"),
    ),
    "tokens in int32": Mutant(
        "device",
        (("trajectory.to(tl.int64) * T", "trajectory * T"),),
        (f"{CREDIT}: int32 address: contrast_ptr", f"{LOSS}: int32 address: coefficient_ptr"),
        ("precomputed",),
    ),
    "logits stay bf16": Mutant(
        "row_statistics", (("values = x.to(tl.float32)", "values = x"),), ("does not compile",)
    ),
    "gradient in bf16": Mutant(
        "row_statistics", (("log_p = (x - ", "log_p = (x.to(tl.bfloat16) - 1 - "),), (f"{GRADIENT}: not fp32",)
    ),
    "gradient in fp64": Mutant(
        "row_statistics", (("log_p = (x - ", "log_p = (x.to(tl.float64) - "),), (f"{GRADIENT}: fp64",)
    ),
    "large blocks": Mutant(
        "launch",
        ((_SWEEP, _SWEEP.replace("_block(vocabulary, 4096)", "(8192, 4)")),),
        (f"{STATISTICS}: occupancy",),
    ),
    "forward block spills": Mutant(
        "launch",
        ((_SWEEP, _SWEEP.replace("_block(vocabulary, 4096)", "(32768, 4)")),),
        (f"{STATISTICS}: spills", f"{STATISTICS}: stack", f"{SPLIT}: spills"),
        ("plain", "few rows"),
    ),
    "gradient block spills": Mutant(
        "launch",
        (("gradient.\"\"\"\n    return _block(vocabulary, 4096)", "gradient.\"\"\"\n    return (32768, 2)"),),
        (f"{GRADIENT}: spills", f"{GRADIENT}: stack"),
    ),
    "token block spills": Mutant(
        "launch", (("TOKENS_PER_BLOCK = 256", "TOKENS_PER_BLOCK = 16384"),),
        (f"{CREDIT}: spills", f"{LOSS}: spills"), ("precomputed",),
    ),
    "misaligned load": Mutant(
        "row_statistics",
        (("tl.load(pointers,", "tl.load(pointers + 1,"),),
        (f"{STATISTICS}: narrow loads", f"{GRADIENT}: narrow loads", f"{SPLIT}: narrow loads"),
        ("plain", "few rows"),
    ),
    "misaligned store": Mutant(
        "row_statistics", (("tl.store(out, gradient", "tl.store(out + 1, gradient"),), (f"{GRADIENT}: narrow stores",)
    ),
    "alignment of the output unknown": Mutant(
        "row_statistics", (('"grad_entropy_ptr"],', '"out_ptr"],'),), (f"{GRADIENT}: narrow stores",)
    ),
    "training rows in int32": Mutant(
        "row_training",
        (
            (": tl.int64", ""),
            ("row_pointer(logits_ptr, b, t, stride_b, stride_t)", "logits_ptr + b * stride_b + t * stride_t"),
            ("row_pointer(gradient_ptr, b, t, stride_b, stride_t)", "gradient_ptr + b * stride_b + t * stride_t"),
            ("row_pointer(out_ptr, b, t, stride_b, stride_t)", "out_ptr + b * stride_b + t * stride_t"),
            ("row_pointer(out_ptr, b, t, out_stride_b, out_stride_t)", "out_ptr + b * out_stride_b + t * out_stride_t"),
        ),
        (
            *(f"{TRAINING}: int32 address: {name}_ptr" for name in ("logits", "out")),
            *(f"{SCALE}: int32 address: {name}_ptr" for name in ("gradient", "out")),
        ),
        ("one kernel",),
    ),
    "training swept in bf16": Mutant(
        "row_training", (("values = x.to(tl.float32)", "values = x"),), ("does not compile",), ("one kernel",)
    ),
    "training block spills": Mutant(
        "launch", (("CHUNKS_ABREAST = 4", "CHUNKS_ABREAST = 8"),), (f"{TRAINING}: stack", f"{TRAINING}: spills"),
        ("one kernel",),
    ),
    "written back at any column": Mutant(
        "row_training", (("tl.multiple_of(last - read, BLOCK_V)", "last - read"),),
        (f"{TRAINING}: narrow loads", f"{TRAINING}: narrow stores"), ("one kernel",),
    ),
    "scaled at any column": Mutant(
        "row_training", (("tl.store(out_row_ptr + cols, x", "tl.store(out_row_ptr + cols + 1, x"),),
        (f"{SCALE}: narrow stores",), ("one kernel",),
    ),
    "pairs in int32": Mutant(
        "row_pairs",
        (
            (": tl.int64", ""),
            (".to(tl.int64)", ""),
            (
                "row_pointer(logits_ptr, row // T, row % T, stride_b, stride_t)",
                "logits_ptr + row // T * stride_b + row % T * stride_t",
            ),
            (
                "row_pointer(against_ptr, row // T, row % T, against_stride_b, against_stride_t)",
                "against_ptr + row // T * against_stride_b + row % T * against_stride_t",
            ),
        ),
        (
            *(f"{kernel}: int32 address: {x}_ptr" for kernel in (PAIRS, PAIR_SPLIT) for x in ("logits", "against")),
            *(f"{kernel}: int32 address: partials_ptr" for kernel in (PAIR_SPLIT, PAIR_MERGE)),
        ),
        ("kl", "kl, few rows"),
    ),
    "pairs stay bf16": Mutant(
        "row_pairs", (("x, y = x.to(tl.float32), y.to(tl.float32)", "x, y = x, y"),), ("does not compile",), ("kl",)
    ),
    "misaligned contrast": Mutant(
        "row_pairs", (("load_block(against_ptr, start + BLOCK_V", "load_block(against_ptr + 1, start + BLOCK_V"),),
        (f"{PAIRS}: narrow loads", f"{PAIR_SPLIT}: narrow loads"), ("kl", "kl, few rows"),
    ),
}  # fmt: skip

# Faults of numbers and bounds, which machine code does not show: the interpreter's guard must.
INTERPRETED = {
    "row mask one too far": Mutant(
        "row_statistics", (("cols < end,", "cols <= end,"), ("mask=cols < V", "mask=cols <= V")), ("IndexError",)
    ),
    "credit mask one too far": Mutant("token_credit", (("tokens < end", "tokens <= end"),), ("IndexError",)),
    "loss mask one too far": Mutant("policy_loss", (("tokens < end", "tokens <= end"),), ("IndexError",)),
    "logits stay bf16": replace(COMPILED["logits stay bf16"], breaks=("cannot compute on bf16",)),
    "rows in int32": replace(COMPILED["rows in int32"], breaks=("OverflowError",)),
}

# Cells that nobody writes, which fresh memory hides behind its zeros: poisoned memory must show them.
UNWRITTEN = {
    "largest logit of a row": Mutant("row_statistics", (("tl.store(row_max_ptr + cell, row_max)", "pass"),), ()),
    "loss of a trajectory": Mutant("policy_loss", (("tl.store(loss_ptr + trajectory, loss * scale)", "pass"),), ()),
    "gradient of skipped rows": Mutant(
        "row_statistics", (("tl.zeros([BLOCK_V], tl.float32), mask=cols < ", "0.0, mask=cols < 0 * "),), ()
    ),
}


@contextmanager
def installed(mutant: Mutant, folder: str | pathlib.Path) -> Iterator[None]:
    """Let `srpo_kernels` use the mutated copy of its kernels, which is written below `folder`."""
    package = _write(mutant, pathlib.Path(folder))
    sys.path.insert(0, str(folder))
    names = {f"srpo_kernels.{name}": f"{package}.{name}" for name in KERNEL_FILES}
    stock = {name: sys.modules.get(name) for name in names}
    try:
        importlib.invalidate_caches()
        sys.modules |= {name: importlib.import_module(copy) for name, copy in names.items()}
        yield
    finally:
        sys.path.remove(str(folder))
        for name, module in stock.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        for name in [name for name in sys.modules if name.startswith(package)]:
            del sys.modules[name]


def _write(mutant: Mutant, folder: pathlib.Path) -> str:
    package = f"srpo_mutant_{uuid.uuid4().hex}"
    (folder / package).mkdir()
    for path in pathlib.Path(srpo_kernels.__file__).parent.glob("*.py"):
        text = path.read_text()
        if path.stem == mutant.file:
            for old, new in mutant.replacements:
                if old not in text:
                    raise ValueError(f"{old!r} is no longer in {path.name}: the mutant is stale")
                text = text.replace(old, new)
        (folder / package / path.name).write_text(text.replace("srpo_kernels", package))
    return package
