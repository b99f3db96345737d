"""The sizes that the benchmark is run at, and what they need."""

import pathlib
from dataclasses import dataclass

import torch

# Width of the last hidden state and rows of the head, from the config.json of published weights.
MODELS = {
    "small": (896, 32768),  # the default on a CPU
    "smolvlm-256m": (576, 49280),
    "smolvlm": (2048, 49155),  # V is odd
    "llama-3-8b": (4096, 128256),
    "qwen2.5-vl-3b": (2048, 151936),
    "qwen2.5-vl-7b": (3584, 152064),  # the default on a GPU
    "qwen2.5-vl-72b": (8192, 152064),
    "odd": (896, 151665),  # the number of tokens that Qwen2.5's tokenizer has: V is odd
}
DEFAULTS = {"cpu": ("small", {"logits": (2, 256), "hidden": (10, 52)}), "cuda": ("qwen2.5-vl-7b", {})}
ROWS = {"cpu": (1, 128), "cuda": (8, 1024)}
CREDIT_ROWS = (64, 2048)


@dataclass(frozen=True)
class Shape:
    """B rollouts of T tokens, a vocabulary of V, hidden states of H."""

    B: int
    T: int
    V: int
    H: int

    def __str__(self) -> str:
        return f"B={self.B} T={self.T} V={self.V} H={self.H}"


def shape_of(level: str, given: list[str] | None, device: torch.device) -> Shape:
    """Return the shape of a level: four numbers as given, a named model, or the default of the device."""
    if given and len(given) == 4:
        return Shape(*map(int, given))
    default, rows = DEFAULTS[device.type]
    H, V = MODELS[given[0] if given else default]
    B, T = ROWS[device.type] if given else rows.get(level, ROWS[device.type])
    return Shape(*(CREDIT_ROWS if level == "credit" else (B, T)), V, H)


def gib_needed(level: str, shape: Shape, dtype: torch.dtype) -> float:
    """Return about how much memory a level takes: inputs, float64 truth, and plain PyTorch beside them."""
    N, size = shape.B * shape.T, dtype.itemsize
    if level == "credit":
        return N * 256 / 2**30
    logits = N * shape.V * (3 * size + 8 + 3 * 4 if level == "logits" else size + 3 * 4)
    head = 0 if level == "logits" else shape.V * shape.H * (2 * size + 3 * 8 + 2 * 4)
    return (logits + head) / 2**30


def gib_free(device: torch.device) -> float:
    """Return the memory that is free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) / 2**20
