"""A repair of verl 0.9: positions of rows that are all of one length.

Positions of Qwen-VL have rows for time, height and width, so those of a trajectory are `[4, L]`. verl's transfer queue
nests them with `as_nested_tensor`. Where trajectories differ in length that nests along L. Where all are equally long
it nests along the 4, and verl's `maybe_fix_3d_position_ids`, which every worker calls, declares L to be the ragged
dimension whatever is there: rows of the nested tensor are then strips of other trajectories. Nothing raises; log-probs
are up to 15 nats off.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAME = "maybe_fix_3d_position_ids"
_MOST_ROWS = 4  # text, time, height, width


def along_tokens(positions: Any) -> Tensor:
    """Return positions that are nested along their rows, nested along their tokens; others as they are.

    Args:
        positions: nested (jagged), of `[rows, L]`, whatever dimension is declared ragged.
    """
    values, offsets = positions.values(), positions.offsets()
    end = int(offsets[-1])
    if values.dim() != 2 or end != values.shape[0]:
        return positions
    if end == values.shape[1] and end <= _MOST_ROWS:  # as many tokens in all as there are rows
        return positions
    n = len(offsets) - 1
    rows, length = values.shape[0] // n, values.shape[1]
    flat = values.view(n, rows, length).transpose(0, 1).reshape(rows, n * length)
    return torch.nested.nested_tensor_from_jagged(
        flat, torch.arange(n + 1, device=offsets.device) * length, jagged_dim=2
    )


def repaired(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return verl's function, with positions put in order before it."""

    @functools.wraps(original)
    def maybe_fix_3d_position_ids(data: Any) -> None:
        positions = data["position_ids"] if "position_ids" in data.keys() else None  # noqa: SIM118 - a TensorDict
        if positions is not None and positions.is_nested and positions.dim() == 3:
            data["position_ids"] = along_tokens(positions)
        original(data)

    return maybe_fix_3d_position_ids


def is_sound(function: Callable[[Any], None]) -> bool:
    """Say whether a function leaves positions of rows of one length as they are."""
    rows = [torch.arange(12).view(4, 3), torch.arange(12, 24).view(4, 3)]
    data = {"position_ids": torch.nested.as_nested_tensor(rows, layout=torch.jagged)}
    try:
        function(data)
        found = data["position_ids"].unbind()
    except RuntimeError:
        return False
    return all(torch.equal(a, b) for a, b in zip(found, rows, strict=True))


def repair(module: Any) -> bool:
    """Replace the function of `verl.utils.tensordict_utils` where it is not sound; say whether it was.

    Call this before others import the function by name.
    """
    original = getattr(module, NAME, None)
    if original is None or is_sound(original):
        return False
    fixed = repaired(original)
    if not is_sound(fixed):
        text = "srpo: verl's %s confuses rows of one length, and the repair for it does not fit this verl"
        logging.getLogger(__name__).error(text, NAME)
        return False
    setattr(module, NAME, fixed)
    logging.getLogger(__name__).info("srpo: verl's %s is repaired for rows of one length", NAME)
    return True
