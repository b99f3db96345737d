"""The contrast streams: their names, and their cells without a value, of which there are two kinds.

no evidence     a row without a picture has no perception evidence, one without perception no text to hide
not scored      the scorer was told that nobody would read the cell: a credit that does read it must say so

Both are quiet NaNs, told apart by their low bits wherever the tensor goes in between: indexing, concatenation, `where`,
copies and fp32 to fp64 keep them; arithmetic and 16-bit casts do not (what is left is an ordinary NaN: no value).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

_NOT_SCORED, _NO_EVIDENCE = 0x7FC05350, 0x7FC05351  # as fp32; in fp64 the mantissa is 29 bits longer


class Streams(NamedTuple):
    """Something for each context that is contrasted with the clean one: log-probs, logits, hidden states, or None."""

    corrupted: Any = None
    ablated: Any = None

    def named(self, kind: str) -> dict[str, Any]:
        """Return it by the names of arguments: `corrupted_logps`, `ablated_logps`."""
        return {f"{name}_{kind}": x for name, x in zip(STREAMS, self, strict=True)}


STREAMS: tuple[str, ...] = Streams._fields


def not_scored(like: Tensor) -> Tensor:
    """Return 0-d, in the dtype (fp32 or fp64) and on the device of `like`: the value of a cell that nobody scored."""
    return _marked(_NOT_SCORED, like)


def no_evidence(like: Tensor) -> Tensor:
    """Return 0-d, in the dtype and on the device of `like`: the value of a cell that had nothing to be scored with."""
    return _marked(_NO_EVIDENCE, like)


def is_not_scored(x: Tensor) -> Tensor:
    """Tell the cells that nobody scored, bool in the shape of `x`."""
    return _is_marked(_NOT_SCORED, x)


def is_no_evidence(x: Tensor) -> Tensor:
    """Tell the cells that had nothing to be scored with, bool in the shape of `x`."""
    return _is_marked(_NO_EVIDENCE, x)


def _marked(bits: int, like: Tensor) -> Tensor:
    if like.dtype == torch.float64:
        return torch.full((), _in_fp64(bits), dtype=torch.int64, device=like.device).view(torch.float64)
    return torch.full((), bits, dtype=torch.int32, device=like.device).view(torch.float32)


def _is_marked(bits: int, x: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        return x.detach().view(torch.int32) == bits
    if x.dtype == torch.float64:
        return x.detach().view(torch.int64) == _in_fp64(bits)
    return torch.zeros_like(x, dtype=torch.bool)


def _in_fp64(bits: int) -> int:
    return (0x7FF << 52) | ((bits & 0x7FFFFF) << 29)
