"""Time and peak memory of callables, interleaved in one process: A B C A B C."""

import pathlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Measurement:
    """Milliseconds (median, 20th and 80th percentile) and peak MiB above what was allocated before the call."""

    median: float
    p20: float
    p80: float
    peak: float


def measure(functions: dict[str, Callable[[], None]], device: torch.device, repeats: int) -> dict[str, Measurement]:
    """Run every function `repeats` times in turn, after one warm-up round, then once more for its peak memory."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name, function in functions.items():
            _synchronize(device)
            start = time.perf_counter()
            function()
            _synchronize(device)
            if round_:
                times[name].append(1e3 * (time.perf_counter() - start))
    results = {}
    for name, samples in times.items():
        low, *_, high = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else samples * 2
        results[name] = Measurement(statistics.median(samples), low, high, peak_memory(functions[name], device))
    return results


def peak_memory(function: Callable[[], None], device: torch.device) -> float:
    """Return the peak MiB a call adds: the allocator's on a GPU, the process's high-water mark on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 2**10


def copy_bandwidth(device: torch.device, mebibytes: int = 256) -> float:
    """Return the measured GB/s of a copy, bytes read and written counted."""
    source = torch.randn(mebibytes << 18, device=device)
    target = torch.empty_like(source)
    result = measure({"copy": lambda: target.copy_(source)}, device, 5)["copy"]
    return 2 * source.nbytes / result.median / 1e6


def _status(key: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
