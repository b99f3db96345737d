"""The one table of tolerances and the one comparison.

Rule: |got - truth| <= |eager - truth| + floor, element by element, with floor = absolute + relative * |truth|. `truth`
is float64, `eager` the plain computation in the tested precision. bf16 and fp16 floors are half a unit in the last
place of the stored result: everything before the final rounding is fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOORS: dict[str, dict[torch.dtype, tuple[float, float]]] = {
    # quantity: {precision: (absolute, relative)}
    "logps": {torch.float64: (1e-12, 1e-12), torch.float32: (2e-6, 2e-6)},
    "entropy": {torch.float64: (1e-12, 1e-12), torch.float32: (4e-6, 4e-6)},
    "kl": {torch.float64: (1e-12, 1e-12), torch.float32: (4e-6, 4e-6)},
    "contrast": {torch.float64: (1e-12, 1e-12), torch.float32: (1e-6, 2e-6)},
    "weights": {torch.float64: (1e-11, 1e-11), torch.float32: (1e-5, 1e-5)},
    "loss": {torch.float64: (1e-10, 1e-10), torch.float32: (3e-6, 1e-5)},
    "metric": {torch.float64: (1e-10, 1e-10), torch.float32: (3e-6, 1e-5)},
    "gradient": {
        torch.float64: (1e-10, 1e-10),
        torch.float32: (5e-7, 1e-5),
        torch.bfloat16: (5e-7, 2.0**-8),
        torch.float16: (5e-7, 2.0**-11),
    },
}


def assert_close_to_truth(
    quantity: str, got: Tensor, truth: Tensor, eager: Tensor | None = None, *, precision: torch.dtype, what: str = ""
) -> None:
    """Compare `got` with a float64 `truth` and report the worst element. Non-finite truths must be met exactly."""
    absolute, relative = FLOORS[quantity][precision]
    label = f"{quantity} {what}".strip()
    assert got.shape == truth.shape, f"{label}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    got, truth = got.detach().double().cpu(), truth.detach().double().cpu()
    eager_error = torch.zeros_like(truth) if eager is None else (eager.detach().double().cpu() - truth).abs()
    allowed = eager_error.nan_to_num(0.0, 0.0, 0.0) + absolute + relative * truth.abs()
    met = (got == truth) | (got.isnan() & truth.isnan()) | ((got - truth).abs() <= allowed)
    if met.all():
        return
    excess = torch.where(met, 0.0, ((got - truth).abs() / allowed).nan_to_num(torch.inf, torch.inf, torch.inf))
    index = tuple(int(k) for k in torch.unravel_index(excess.argmax(), excess.shape)) if excess.dim() else ()
    raise AssertionError(
        f"{label}: {int((~met).sum())} of {met.numel()} elements differ; worst at {index}: "
        f"got {got[index].item():.9g}, truth {truth[index].item():.9g}, "
        + ("" if eager is None else f"eager {eager.detach().double().cpu()[index].item():.9g}, ")
        + f"allowed error {allowed[index].item():.3g}"
    )
