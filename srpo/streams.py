"""The contrast streams: their names, and their cells without a value, of which there are two kinds.

nothing to score    a row without a picture has no perception evidence, one without perception no text to hide: NaN
not scored          the scorer was told that nobody would read the cell: a NaN of its own, so that a credit that does
                    read it can say so, wherever the tensor went in between

The second is a quiet NaN whose low bits spell `SP`; indexing, concatenation, `where`, copies and fp32 to fp64 keep
them, arithmetic and 16-bit casts do not (what is left is an ordinary NaN: no value).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

_FP32 = 0x7FC05350
_FP64 = 0x7FF80A6A00000000  # the same NaN, converted


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
    wide = like.dtype == torch.float64
    bits, dtype = (_FP64, torch.int64) if wide else (_FP32, torch.int32)
    return torch.full((), bits, dtype=dtype, device=like.device).view(torch.float64 if wide else torch.float32)


def is_not_scored(x: Tensor) -> Tensor:
    """Tell the cells that nobody scored, bool in the shape of `x`."""
    if x.dtype == torch.float32:
        return x.detach().view(torch.int32) == _FP32
    if x.dtype == torch.float64:
        return x.detach().view(torch.int64) == _FP64
    return torch.zeros_like(x, dtype=torch.bool)
