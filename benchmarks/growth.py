"""Cost and memory from hidden states against the number of rows, the vocabulary, and the share of active rows."""

from typing import Any

import torch
from hidden_level import PROVIDERS, make_inputs
from measure import Clock, gemm_rate, peak_memory
from rich.progress import Progress
from shapes import DEFAULTS, MODELS, Shape, gib_free

NAMES = ("eager", "TRL", "Liger", "srpo")
T = 256
ROWS = tuple(512 << k for k in range(8))  # 512 to 65536
SIZES = {"cpu": (512, 2048), "cuda": (4096, 16384)}  # rows while the vocabulary grows, and while rows become active
VOCABULARIES = (8192, 16384, 32768, 65536, 131072)
SHARES = (1.0, 0.5, 0.25, 0.125)
MOST_SECONDS = 30.0  # of one call; what is predicted to take longer is skipped


def run(device: torch.device, dtype: torch.dtype, floors: dict[str, float], progress: Progress) -> list[dict[str, Any]]:
    """Time each point once, after a smaller one; floors are at the highest rate of products seen between the points."""
    H, V = MODELS[DEFAULTS[device.type][0]]
    some, more = SIZES[device.type]
    plan = [("rows", N, Shape(N // T, T, V, H), 1.0) for N in ROWS]
    plan += [("vocabulary", size, Shape(some // T, T, size, H), 1.0) for size in VOCABULARIES]
    plan += [("active rows", share, Shape(more // T, T, V, H), share) for share in SHARES]
    rate, points, latest = floors[str(dtype).removeprefix("torch.")], [], {}
    for axis, x, shape, share in progress.track(plan, description="growth"):
        rate = max(rate, gemm_rate(device, dtype))
        inputs = make_inputs(shape, dtype, device).with_active(share)
        work = 6 * shape.B * shape.T * shape.V * shape.H
        for name in NAMES:
            why = _skipped(name, work, latest.get(name), shape, device)
            if why:
                progress.console.print(f"{name} at {x:g} {axis}: skipped, {why}")
                continue
            call = _Timed(lambda p=PROVIDERS[name]: inputs.loss_and_gradients(p), device)  # noqa: B023
            if name not in latest:
                call()
            peak = peak_memory(call, device)
            latest[name] = (work * (share if name == "srpo" else 1.0), call.milliseconds / 1e3)
            point = {"axis": axis, "x": x, "provider": name, "ms": call.milliseconds, "peak": peak}
            points.append(point | {"work": share * work, "logits": work / 6 / shape.H * 4 / 2**20})
    return [{**point, "floor": point["work"] / rate / 1e9} for point in points]


def _skipped(
    name: str, work: float, latest: tuple[float, float] | None, shape: Shape, device: torch.device
) -> str | None:
    """Return why a point is left out, or None; `latest` is the work and the seconds of the point before."""
    seconds = 0.0 if latest is None else latest[1] * work / latest[0]
    if seconds > MOST_SECONDS:
        return f"would take about {seconds:.0f} s"
    needed = 3 * shape.B * shape.T * shape.V * 4 / 2**30 if name == "eager" else 0.0
    if needed > gib_free(device):
        return f"needs about {needed:.0f} GiB"
    return PROVIDERS[name].missing(device)


class _Timed:
    """A call that remembers how long it took."""

    def __init__(self, function: Any, device: torch.device) -> None:
        self.function, self.clock, self.milliseconds = function, Clock(device), 0.0

    def __call__(self) -> None:
        self.milliseconds = self.clock.milliseconds(self.function)
