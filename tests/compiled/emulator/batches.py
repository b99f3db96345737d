"""Inputs of the comparisons, with the traps of real ones."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Random inputs: ragged masks with holes, ids of -100 under them, banned tokens, NaN in the gaps between rows."""

    B: int = 2
    T: int = 5
    V: int = 1000
    dtype: torch.dtype = torch.bfloat16
    layout: str = "extra row"
    banned: bool = False
    offset: float = 0.0  # added to all logits: it changes nothing
    seed: int = 0

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, drawn when first asked for."""
        g = torch.Generator().manual_seed(self.seed)
        B, T = self.B, self.T
        lengths = torch.randint(1, T + 1, (B,), generator=g)
        lengths[0] = T
        mask = torch.arange(T) < lengths[:, None]
        mask[:, T // 2] &= torch.rand(B, generator=g) < 0.7
        if B > 2:
            mask[1] = False
        ids = torch.randint(0, self.V, (B, T), generator=g)
        ids[0, 0], ids[-1, 0] = self.V - 1, 0
        logps = -4 * torch.rand(B, T, generator=g)
        near = {name: logps + 0.4 * torch.randn(B, T, generator=g) for name in ("old", "ref", "corrupted", "ablated")}
        roles = torch.randint(0, 3, (B, T), generator=g)
        return near | {
            "mask": mask,
            "ids": torch.where(mask, ids, -100),
            "logps": logps,
            "advantages": torch.randn(B, generator=g),
            "ratio": 1 + 0.2 * torch.randn(B, T, generator=g),
            "roles": torch.where(mask, roles, 0),
            **{name: self._logits(g, ids) for name in ("logits", "noisy", "blind")},
        }

    def _logits(self, g: torch.Generator, ids: Tensor) -> Tensor:
        B, L, V = self.B, self.T + (self.layout == "extra row"), self.V
        values = 3 * torch.randn(B, L, V, generator=g)
        values[:, : self.T].scatter_(-1, ids[..., None], 8.0 * torch.rand(B, self.T, 1, generator=g))
        values += self.offset
        if self.banned:
            values[torch.rand(B, L, V, generator=g) < 0.3] = -torch.inf
            values[0, 0, : min(V // 2, 5000)] = -torch.inf  # whole blocks
            values[0, 0, V - 1] = 3.0
            values[-1, 0, 0] = -torch.inf  # the token itself
        empty = functools.partial(torch.full, fill_value=torch.nan, dtype=self.dtype)
        view = {
            "extra row": lambda: empty((B, L, V)),
            "rows": lambda: empty((B, L, V)),
            "odd strides": lambda: empty((B, L, V + 3))[..., 1 : V + 1],
            "wide rows": lambda: empty((B, L, 2 * (V + 15) // 16 * 16))[..., :V],
            "padded rows": lambda: empty((B, L, (V + 31) // 16 * 16))[..., :V],
            "transposed": lambda: empty((L, B, V)).transpose(0, 1),
            "every second": lambda: empty((B, L, 2 * V))[..., ::2],
            "columns": lambda: empty((B, V, L)).transpose(1, 2),
        }[self.layout]()
        return view.copy_(values)


def tokens_first(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def itself(x: Tensor) -> Tensor:
    return x
