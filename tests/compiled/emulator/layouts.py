"""The same rows of logits in many memory layouts: no bit of a log-prob or an entropy may tell them apart.

PYTHONPATH=.:tests python -m compiled.emulator.layouts [--quick]    # prints what moved, as JSON
"""

from __future__ import annotations

import itertools
import json
import sys

import torch
from compiled.cases import few_rows
from compiled.emulator.launcher import EMULATED_TARGETS, emulated
from torch import Tensor

from srpo import role_weighted_grpo_loss, selected_logps

DTYPES = (torch.bfloat16, torch.float32)
VOCABULARIES = (1008, 4107)  # rows of whole vectors, and rows with an edge


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Return views with the values of `x` `[B, T + 1, V]`."""
    B, L, V = x.shape
    padded, n = -(-V // 16) * 16 + 16, x.numel()
    views = {
        "rows padded to 16 elements": torch.empty(B, L, padded, dtype=x.dtype)[..., :V],
        "row stride V + 1": torch.empty(B, L, V + 1, dtype=x.dtype)[..., :V],
        "base off by one element": torch.empty(n + 1, dtype=x.dtype)[1:].view(B, L, V),
        "base off by eight elements": torch.empty(n + 8, dtype=x.dtype)[8:].view(B, L, V),
        "every second column": torch.empty(B, L, 2 * V, dtype=x.dtype)[..., ::2],
        "time first": torch.empty(L, B, V, dtype=x.dtype).transpose(0, 1),
        "columns first": torch.empty(B, V, L, dtype=x.dtype).transpose(1, 2),
    }
    return {name: view.copy_(x) for name, view in views.items()} | {"T rows": x[:, :-1].contiguous()}


def moved(V: int, dtype: torch.dtype) -> dict[str, int]:
    """Return for each layout how many of the log-probs and entropies differ from those of contiguous rows."""
    B, T = 3, 8
    g = torch.Generator().manual_seed(0)
    x, ids = 2 * torch.randn(B, T + 1, V, generator=g), torch.randint(0, V, (B, T), generator=g)
    x = x[:, :].scatter(-1, torch.cat([ids, ids[:, :1]], 1)[..., None], 14.0).to(dtype)  # peaked, as a model's rows are
    roles = torch.tensor([1, 2] * (T // 2)).expand(B, T)
    ones = torch.ones(B)

    def score(logits: Tensor, tokens: Tensor = ids) -> tuple[Tensor, Tensor]:
        return tuple(selected_logps(logits, tokens, return_entropy=True, backend="triton"))

    def train(logits: Tensor, contrast: Tensor | None = None) -> tuple[Tensor, Tensor]:
        streams = {} if contrast is None else {"corrupted_logits": contrast, "ablated_logits": x, "role_ids": roles}
        out = role_weighted_grpo_loss(logits, ids, ones, backend="triton", **streams)
        return out.logps, out.entropy

    base = score(x)
    found = {name: score(view) for name, view in layouts(x).items()}
    found["one by one"] = tuple(
        torch.cat(k) for k in zip(*(score(x[b, None], ids[b, None]) for b in range(B)), strict=True)
    )
    packed = selected_logps(x[:, :-1].flatten(0, 1), ids.flatten(), return_entropy=True, backend="triton")
    found["packed"] = tuple(k.view(B, T) for k in packed)
    found["in the loss"] = train(x)
    found |= {f"beside a stream: {name}": train(x, view) for name, view in layouts(x).items()}
    without = selected_logps(x, ids, backend="triton")
    result = {name: sum(map(_differing, base, pair)) for name, pair in found.items()}
    return result | {"without entropy": _differing(base[0], without)}


def moved_by_splitting(dtype: torch.dtype) -> dict[str, int]:
    """Return how many of the log-probs and entropies differ when a row of two chunks is split over two programs."""
    x, ids = torch.randn(1, 2, 20005, generator=torch.Generator().manual_seed(1)).to(dtype), torch.tensor([[3, 20004]])
    whole = selected_logps(x, ids, return_entropy=True, backend="triton")
    with few_rows():
        split = selected_logps(x, ids, return_entropy=True, backend="triton")
    return {"rows split": sum(map(_differing, whole, split))}


def _differing(left: Tensor, right: Tensor) -> int:
    left, right = (y.detach().contiguous().view(torch.int32) for y in (left, right))
    return int((left != right).sum())


def main() -> None:
    """Print, for each target, dtype and vocabulary, the layouts under which bits move."""
    quick = "--quick" in sys.argv
    result = {}
    for target, dtype in itertools.product(EMULATED_TARGETS[quick:], DTYPES[: 2 - quick]):
        for V in VOCABULARIES:
            with emulated(target) as session:
                counts = moved(V, dtype) | moved_by_splitting(dtype)
            moving = [name for name, n in counts.items() if n]
            result[f"{target} {dtype} V={V}"] = {"compared": len(counts), "moved": moving, "races": session.races}
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
