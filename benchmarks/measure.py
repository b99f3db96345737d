"""Time and peak memory of callables, interleaved in one process (A B C A B C), and the floors of the device."""

import ctypes
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Measurement:
    """Milliseconds (median, 20th and 80th percentile) and peak MiB above what was allocated before the call."""

    median: float
    p20: float
    p80: float
    peak: float


class Clock:
    """Time single calls: by events behind a cold L2 cache on a GPU, by a monotonic clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache = torch.empty(256 << 20, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def milliseconds(self, function: Callable[[], object]) -> float:
        """Run a function once."""
        if self.cache is None:
            start = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - start)
        self.cache.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def measure(
    functions: dict[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    seconds: float = 60.0,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Measurement]:
    """Run every function in turn, `repeats` rounds or as many (at least 3) as fit; then once more for its memory.

    The caller has run each once: nothing is warmed up here.
    """
    clock, times = Clock(device), {name: [] for name in functions}
    start = time.monotonic()
    for done in range(repeats):
        if done >= 3 and time.monotonic() - start > seconds:
            break
        for name, function in functions.items():
            times[name].append(clock.milliseconds(function))
            advance()
    return {name: summary(samples, peak_memory(functions[name], device)) for name, samples in times.items()}


def summary(samples: Iterable[float], peak: float) -> Measurement:
    """Return median and percentiles of the times."""
    samples = list(samples)
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else samples * 2
    return Measurement(statistics.median(samples), low, high, peak)


def peak_memory(function: Callable[[], object], device: torch.device) -> float:
    """Return the peak MiB a call adds: the allocator's on a GPU, the process's high-water mark on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # else the call is given pages that others freed and the process still holds
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 2**10


def copy_bandwidth(device: torch.device) -> float:
    """Return the measured GB/s of a copy, bytes read and written counted."""
    source = torch.randn((1024 if device.type == "cuda" else 256) << 18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device) / 1e6


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the measured TFLOP/s of a matrix product."""
    m, k, n = (8192, 4096, 16384) if device.type == "cuda" else (768, 896, 8192)
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    return 2 * m * k * n / _fastest(lambda: torch.mm(a, b, out=out), device) / 1e9


def _fastest(function: Callable[[], object], device: torch.device) -> float:
    function()
    clock = Clock(device)
    return statistics.median(clock.milliseconds(function) for _ in range(7))


def _status(key: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])
