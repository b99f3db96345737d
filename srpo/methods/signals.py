"""What the neighbouring methods share: checks of `[B, T]` inputs, differences, and statistics over valid tokens."""

from typing import Any

import torch
from torch import Tensor

from srpo import checks
from srpo.credit import compute_dtype
from srpo.errors import ConfigError, is_number
from srpo_kernels.reference import k3

MOST_NATS = 20.0  # differences of log-probs are clamped to +- this


def opened(
    function: str, name: str, x: Any, completion_mask: Any, others: dict[str, Any]
) -> tuple[checks.Call, Tensor, list[Tensor]]:
    """Check per-token inputs `[B, T]`; return the call, the mask, and the inputs in fp32 (fp64) with 0 where masked."""
    call = checks.Call(function, x, name)
    layout = checks.layout_of(call, name, x, None)
    mask = checks.mask_of(call, completion_mask, layout)
    for other, value in {name: x, **others}.items():
        call.tensor(other, value, [layout.shape], "[B, T]", "float")
        checks.scored(call, other, value, mask, f"{function} reads")
    dtype = compute_dtype(x)
    return call, mask, [torch.where(mask, value, 0.0).to(dtype) for value in (x, *others.values())]


def divergence(
    function: str,
    logps: Any,
    corrupted_logps: Any,
    corrupted_kl: Any,
    completion_mask: Any,
    largest: float,
) -> tuple[checks.Call, Tensor, Tensor]:
    """Check what says how much tokens depend on the image; return the call, the mask and the divergence `[B, T]`.

    That is k3(logps - corrupted_logps), at most `largest`, or the given one over the vocabulary, at most `MOST_NATS`.
    """
    name = "corrupted_logps" if corrupted_kl is None else "corrupted_kl"
    other = corrupted_logps if corrupted_kl is None else corrupted_kl
    call, mask, (clean, other) = opened(function, "logps", logps, completion_mask, {name: other})
    if corrupted_kl is None:
        return call, mask, k3(difference(clean, other)).clamp(0.0, largest)
    if corrupted_logps is not None:
        call.fail(ConfigError, name, "divergences together with corrupted_logps", "one of the two", f"drop {name}")
    call.divergences(name, other, mask)
    return call, mask, other.nan_to_num(0.0, MOST_NATS).clamp(0.0, MOST_NATS)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Return a - b, clamped; 0 where it has no value."""
    d = a - b
    return torch.where(d.isnan(), torch.zeros_like(d), d).clamp(-MOST_NATS, MOST_NATS)


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean `[B, 1]` over the tokens of a mask, 0 where there are none."""
    return torch.where(mask, x, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def min_max(x: Tensor, mask: Tensor) -> Tensor:
    """Scale to [0, 1] over the entries of a mask in the last dimension; 0 where they are equal, and outside."""
    if not x.shape[-1]:
        return x
    low = x.masked_fill(~mask, torch.inf).amin(-1, keepdim=True)
    width = x.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True) - low
    return torch.where(mask & (width > 0), (x - low) / width, 0.0)


def share_of(n: Tensor, share: float, *, up: bool) -> Tensor:
    """Return `share * n` rounded up or down, as if it were computed in decimals: 0.3 * 10 is 3."""
    exact = n.double() * share
    return ((exact - 1e-9).ceil() if up else (exact + 1e-9).floor()).long()


def at_least_kth(x: Tensor, mask: Tensor, k: Tensor) -> Tensor:
    """Mark the entries of a mask that reach its k-th largest value of each row: ties are kept."""
    if not x.shape[-1]:
        return mask
    ordered = x.masked_fill(~mask, -torch.inf).sort(-1, descending=True).values
    threshold = ordered.gather(-1, (k.unsqueeze(-1) - 1).clamp(0, x.shape[-1] - 1))
    return mask & (x >= threshold)


def number(call: checks.Call, name: str, x: Any, lowest: float, highest: float, default: float) -> None:
    """Check a hyper-parameter."""
    if not is_number(x) or not lowest <= x <= highest:
        expected = f"a number in [{lowest}, {highest}]" if highest < torch.inf else f"a number of at least {lowest}"
        call.fail(ConfigError, name, repr(x), expected, f"try {name}={default}")
