"""Rollouts with credit that tests draw: a tokenizer of characters, batches of texts, records, hostile ones."""

from __future__ import annotations

import random
from typing import Any

import torch

from srpo.viz import CreditRecord

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5"
    "ErkJggg=="
)
HOSTILE = (
    "</script>", "<script>alert(1)</script>", "<!--", "]]>", "&amp;", '"', "'", "`${x}`", "שלום ", "العربية ", "\u202e",
    "\u2066", "\u2028", "\x00", "\r", "\ud800", "\u200b", "日本", "👩‍👩‍👧", "", "$x_1$ ", "\n", "\n\n", "\t",
)  # fmt: skip


class Characters:
    """A tokenizer of one token a character."""

    def __len__(self) -> int:
        return 0x2000

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


def batch(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of texts, padded on the right."""
    width = max(map(len, texts))
    ids = torch.tensor([[ord(c) for c in text.ljust(width, "\x01")] for text in texts])
    return ids, torch.tensor([[int(i < len(text)) for i in range(width)] for text in texts])


def record(tokens: tuple[str, ...], **named: Any) -> CreditRecord:
    """A record whose weights are all 1, unless said otherwise."""
    return CreditRecord(**({"tokens": tokens, "weights": (1.0,) * len(tokens)} | named))


def rollout(
    n: int, seed: int = 0, words: tuple[str, ...] = (" the", " bar", " is", " 42"), **named: Any
) -> CreditRecord:
    """A record of n random tokens with all numbers."""
    rng = random.Random(seed)
    roles = tuple(1 if t < n // 3 else 2 if t < n - n // 8 else 0 for t in range(n))
    logps = tuple(-rng.random() for _ in range(n))
    numbers = {
        "weights": tuple(rng.uniform(0.8, 1.25) if role else 1.0 for role in roles),
        "roles": roles,
        "logps": logps,
        "corrupted_logps": tuple(x - 1 if role == 1 else None for x, role in zip(logps, roles, strict=True)),
        "ablated_logps": tuple(x - 2 if role == 2 else None for x, role in zip(logps, roles, strict=True)),
        "contrast": tuple(float(role) if role else None for role in roles),
        "advantage": 0.5,
        "reward": 1.0,
        "parsed": True,
    }
    return record(tuple(rng.choice(words) for _ in range(n)), **(numbers | named))
