"""Accesses to memory, logged, and the races among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Access:
    """Who accesses memory: the block, how many barriers it has passed, the threads, those of their warps, what for."""

    cta: int
    epoch: int
    threads: np.ndarray
    warp_epochs: np.ndarray
    what: str


@dataclass(frozen=True)
class Entry:
    """One logged access: `width` bytes from each of `addresses`, one for each of `threads`."""

    width: int
    access: Access
    lanes: np.ndarray | slice
    addresses: np.ndarray
    stored: np.ndarray | None = None  # [lanes, words], or None for a load

    @property
    def threads(self) -> np.ndarray:
        """Return the thread of each address."""
        return self.access.threads[self.lanes]


def find_races(log: list[Entry], across_blocks: bool = True) -> list[str]:
    """Return where two threads meet at a byte that one of them writes, with no barrier between them.

    Threads of different blocks are never ordered; those of a block are by the barriers that both have passed, those of
    a warp by its own as well. Threads that all write one value and do not read it may meet.
    """
    if all(e.stored is None for e in log):
        return []
    unit = min(e.width for e in log)
    units, thread, warp_epoch, cta, epoch, store, value, entry = np.concatenate(
        [_columns(k, e, unit) for k, e in enumerate(log)], 1
    )
    meetings = [
        ((units, cta, epoch, thread // 32, warp_epoch), thread, "threads"),
        ((units, cta, epoch), thread // 32, "warps"),
        ((units,), cta, "blocks"),
    ]
    found = []
    for keys, actor, name in meetings[: 2 + across_blocks]:
        order = np.lexsort(keys[::-1])
        changes = np.any([np.diff(k[order]) != 0 for k in keys], 0)
        starts = np.concatenate([[0], np.flatnonzero(changes) + 1])

        def lowest(x: np.ndarray) -> np.ndarray:
            return np.minimum.reduceat(x[order], starts)  # noqa: B023

        def highest(x: np.ndarray) -> np.ndarray:
            return np.maximum.reduceat(x[order], starts)  # noqa: B023

        agree = (lowest(store) == 1) & (lowest(value) == highest(value))
        bad = (lowest(actor) != highest(actor)) & (highest(store) == 1) & ~agree
        for k in np.flatnonzero(bad)[:1]:
            here = order[starts[k] : starts[k + 1] if k + 1 < len(starts) else None]
            blamed = " | ".join(sorted({log[e].access.what for e in entry[here]})[:3])
            who = sorted(set(actor[here].tolist()))[:4]
            found.append(f"race at {int(bad.sum())} places, e.g. {name} {who}: {blamed}")
    return found


def _columns(number: int, entry: Entry, unit: int) -> np.ndarray:
    """Return one column for each `unit` bytes that an access touches: where, who, when, and what it stores."""
    units = (entry.addresses // unit).astype(np.int64)[:, None] + np.arange(entry.width // unit)
    lanes = (np.repeat(x, units.shape[1]) for x in (entry.threads, entry.access.warp_epochs[entry.lanes]))
    store, values = entry.stored is not None, np.zeros(units.size, np.int64)
    if store:
        parts = np.ascontiguousarray(entry.stored).view(np.uint8).reshape(units.size, unit)
        values = (parts.astype(np.int64) * (257 ** np.arange(unit) % (2**40))).sum(1)
    access = entry.access
    same = [np.full(units.size, x) for x in (access.cta, access.epoch, int(store))]
    return np.stack([units.ravel(), *lanes, *same, values, np.full(units.size, number)])
