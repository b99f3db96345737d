"""Global and shared memory as a GPU would see them, with the errors that a GPU would not report.

An access must be aligned to its full width and lie in elements of the tensors that the launch was given (gaps of
strided views are out of bounds). Every access is logged; `report` counts traffic and finds races afterwards.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from compiled.emulator.races import Access, Entry, find_races

SECTOR = 32  # bytes: what a GPU fetches at least


class KernelError(Exception):
    """What a real GPU would punish with a trap, or silently with wrong numbers."""


@dataclass
class Traffic:
    """What a launch moved through global memory, and its races."""

    loaded: int = 0  # bytes that threads asked for
    stored: int = 0
    sectors_loaded: int = 0  # of 32 bytes, counted once for every instruction of a warp
    sectors_stored: int = 0
    requests: int = 0  # instructions of a warp
    races: list[str] = field(default_factory=list)


class _View:
    """The elements of one tensor argument."""

    def __init__(self, tensor: torch.Tensor):
        self.start, self.size = tensor.data_ptr(), tensor.element_size()
        dims = ((n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and s > 0)
        self.dims = sorted(dims, key=lambda d: -d[1])
        self.empty = tensor.numel() == 0

    def contains(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Say for each address whether all `width` bytes from it belong to elements."""
        offset = addresses.astype(np.int64) - self.start
        if self.empty:
            return np.zeros(offset.shape, bool)
        parts = np.arange(0, width, self.size) if width > self.size else np.zeros(1, np.int64)
        element, rest = np.divmod(offset[:, None] + parts, self.size)
        inside = (element >= 0) & (rest + min(width, self.size) <= self.size)
        for n, stride in self.dims:
            index = element // stride
            inside &= index < n
            element = element - index * stride
        return (inside & (element == 0)).all(1)


class _Region:
    """One storage, and the views of it that the launch was given."""

    def __init__(self, storage: torch.UntypedStorage):
        self.start, self.end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        self.views: list[_View] = []
        self.origin = self.start - self.start % 16
        size = -(-(self.end - self.origin) // 16) * 16
        self.words = np.frombuffer((ctypes.c_uint8 * size).from_address(self.origin), np.uint8)
        self.log: list[Entry] = []


class GlobalMemory:
    """The tensors of one launch at their real addresses."""

    def __init__(self, tensors: list[torch.Tensor]):
        regions: dict[int, _Region] = {}
        for x in tensors:
            storage = x.untyped_storage()
            if storage.nbytes():
                regions.setdefault(storage.data_ptr(), _Region(storage)).views.append(_View(x))
        self.regions = [regions[start] for start in sorted(regions)]
        self.starts = np.array([r.start for r in self.regions], np.uint64)

    def load(self, addresses: np.ndarray, width: int, count: int, access: Access) -> np.ndarray:
        """Return `count` words of `width` bytes from each address, `[lanes, count]`."""
        values = np.empty((len(addresses), count), f"u{width}")
        for region, lanes in self._locate(addresses, width * count, access):
            words, first = region.words.view(f"u{width}"), (addresses[lanes] - np.uint64(region.origin)) // width
            values[lanes] = words[first.astype(np.int64)[:, None] + np.arange(count)]
            region.log.append(Entry(width * count, access, lanes, addresses[lanes]))
        return values

    def store(self, addresses: np.ndarray, values: np.ndarray, access: Access) -> None:
        """Store `values` `[lanes, count]` from each address on."""
        width, count = values.dtype.itemsize, values.shape[1]
        for region, lanes in self._locate(addresses, width * count, access):
            words, first = region.words.view(f"u{width}"), (addresses[lanes] - np.uint64(region.origin)) // width
            words[first.astype(np.int64)[:, None] + np.arange(count)] = values[lanes]
            region.log.append(Entry(width * count, access, lanes, addresses[lanes], values[lanes]))

    def _locate(self, addresses: np.ndarray, width: int, access: Access) -> Iterator[tuple[_Region, np.ndarray]]:
        """Yield the regions that are accessed and the lanes that do it."""
        _refuse("misaligned", addresses % width != 0, addresses, width, access)
        which = np.searchsorted(self.starts, addresses, "right") - 1
        for k in np.unique(which):
            lanes = np.flatnonzero(which == k)
            inside = np.zeros(len(lanes), bool)
            for view in self.regions[k].views if k >= 0 else ():
                inside |= view.contains(addresses[lanes], width)
                if inside.all():
                    break
            _refuse("out of bounds", ~inside, addresses[lanes], width, access)
            yield self.regions[k], lanes

    def report(self) -> Traffic:
        """Return the traffic and the races of everything since the launch began."""
        traffic = Traffic()
        for entry in (e for region in self.regions for e in region.log):
            warps = entry.threads // 32
            size = entry.width * len(entry.addresses)
            sectors = len(np.unique((entry.addresses // SECTOR).astype(np.int64) * 64 + warps))
            traffic.requests += len(np.unique(warps))
            if entry.stored is not None:
                traffic.stored, traffic.sectors_stored = traffic.stored + size, traffic.sectors_stored + sectors
            else:
                traffic.loaded, traffic.sectors_loaded = traffic.loaded + size, traffic.sectors_loaded + sectors
        for region in self.regions:
            traffic.races += find_races(region.log)
        return traffic


def _refuse(what: str, bad: np.ndarray, addresses: np.ndarray, width: int, access: Access) -> None:
    if bad.any():
        where = f"{width} bytes at {int(addresses[bad][0]):#x}, {int(bad.sum())} threads of block {access.cta}"
        raise KernelError(f"{what}: {where}, {access.what}")


class SharedMemory:
    """The scratch pad of one block of threads; reading what nobody wrote is an error."""

    def __init__(self, size: int):
        self.words = np.zeros(-(-size // 16) * 16, np.uint8)
        self.size = size
        self.written = np.zeros(len(self.words), bool)
        self.log: list[Entry] = []

    def forget(self) -> None:
        """Start another block: nothing is written."""
        self.written[:] = False

    def load(self, addresses: np.ndarray, width: int, count: int, access: Access) -> np.ndarray:
        """Return `count` words of `width` bytes from each address, `[lanes, count]`."""
        span = self._check(addresses, width * count, access)
        if not self.written[span].all():
            raise KernelError(f"uninitialised shared memory: {access.what}")
        self.log.append(Entry(width * count, access, slice(None), addresses))
        return np.ascontiguousarray(self.words[span]).view(f"u{width}")

    def store(self, addresses: np.ndarray, values: np.ndarray, access: Access) -> None:
        """Store `values` `[lanes, count]` from each address on."""
        span = self._check(addresses, values.dtype.itemsize * values.shape[1], access)
        self.words[span] = np.ascontiguousarray(values).view(np.uint8)
        self.written[span] = True
        self.log.append(Entry(values.dtype.itemsize * values.shape[1], access, slice(None), addresses, values))

    def _check(self, addresses: np.ndarray, width: int, access: Access) -> np.ndarray:
        if (addresses % width).any() or (addresses + np.uint64(width) > self.size).any():
            raise KernelError(f"misaligned or out of bounds in shared memory: {access.what}")
        return addresses.astype(np.int64)[:, None] + np.arange(width)
