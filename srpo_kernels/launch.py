"""Where kernels can run, and how they are launched: block sizes, warps, splits.

The block size of a row depends on the vocabulary and the dtype alone, never on the number of rows, so the bits of a
log-prob do not depend on what else is in the batch.
"""

import contextlib
import functools

import torch

BLOCKS_PER_CHUNK = 4  # of a row: lanes are reduced once a chunk, and few rows are split into chunks
FUSION = {"enable_fp_fusion": True}  # a * b + c in one instruction, whatever this Triton does by default
TRAINS_ROWS = False  # `row_training.py` where it can: to be turned on when a GPU has shown that it is faster
CHUNKS_ABREAST = 4  # of its rows: one row a multiprocessor, that the second sweep may find it in the L2 cache
TOKENS_PER_BLOCK = 256  # one token a thread: with two, or 16 warps, ptxas keeps to 40 registers and spills
TOKEN_WARPS = 8


def unavailable_reason(device_type: str) -> str | None:
    """Say why the Triton kernels cannot run on tensors of a device type, or return None when they can."""
    try:
        import triton
        from triton.runtime import driver
    except ImportError:
        return "Triton is not installed"
    from srpo_kernels import device as blocks

    if not isinstance(blocks.k3, triton.JITFunction):
        return None  # Triton's interpreter runs on any tensor
    try:
        active = getattr(driver.active.get_active_torch_device(), "type", None)
    except RuntimeError:
        return "Triton found no GPU driver, and its interpreter is off"
    return None if active == device_type else f"Triton runs on {active!r} tensors here, not on {device_type!r}"


def device_guard(device: torch.device) -> contextlib.AbstractContextManager:
    """Make `device` current: Triton launches on the current GPU, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def row_block(vocabulary: int) -> tuple[int, int]:
    """Return (BLOCK_V, num_warps) of the forward sweep over a row of 16-bit logits; of fp32 ones a block has half."""
    return _block(vocabulary, 4096)


def gradient_block(vocabulary: int) -> tuple[int, int]:
    """Return (BLOCK_V, num_warps) of the elementwise gradient."""
    return _block(vocabulary, 4096)


def _block(vocabulary: int, largest: int) -> tuple[int, int]:
    block = min(largest, max(128, 1 << (max(1, vocabulary) - 1).bit_length()))
    return block, max(1, block // 1024)


def split_rows(n_rows: int, device: torch.device) -> bool:
    """Say whether rows are too few to fill the device, so that a row is worth several programs."""
    return device.type == "cuda" and n_rows < 4 * _multiprocessors(device.index or 0)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
