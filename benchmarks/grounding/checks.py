"""Controls: what must come out whatever the methods do. A run that gets one wrong is broken.

A control is `ok` when its interval lies where it must, `WRONG` when it lies on the other side, `undecided` when it
holds the border. Undecided breaks a run only at the start: a policy that has learned most of the task leaves little to
measure. Controls that negate a contrast are judged right after a warm start alone: whether contrasts still point the
right way after updates is a finding, not a fact to hold a run to. The oracles know the labels, and are judged always:
where neither gains much, the task has no room to tell methods apart.
"""

from typing import Any

import numpy as np

from grounding.answers import Ratio, ratio
from grounding.variants import CONTROLS

BASE, SIGNED = "grpo", "srpo_signed"
LEAST_AGREEMENT = 0.1
FAR_WORSE = 0.9
ROOM, ROOM_AFTER_UPDATES = 1.6, 1.4
OK, WRONG, UNDECIDED = "ok", "WRONG", "undecided"


def check(
    setting: str, columns: dict[str, np.ndarray], agreement: dict[str, float], *, updated: bool = False
) -> list[dict[str, Any]]:
    """Judge the controls of a setting.

    Args:
        columns: efficiencies `[units]` by method.
        agreement: by method, see `grounding.variants.agreement`.
        updated: whether the policies have been updated since their warm start.

    Returns: dicts with `setting`, `name`, `outcome` and `found`, a sentence.
    """
    negated, fillers, wrong, first = (ratio(columns[name], columns[BASE]) for name in CONTROLS)
    against = ratio(columns[CONTROLS[0]], columns[SIGNED])
    of_contrasts = [
        ("the negated contrast is worse than GRPO", _below(negated, 1.0), negated),
        (f"the negated contrast is worse than {SIGNED}", _below(against, 1.0), against),
    ]
    ceiling = max(wrong, first, key=lambda found: np.nan_to_num(found.value))
    room = ROOM_AFTER_UPDATES if updated else ROOM
    judged = [
        *(() if updated else of_contrasts),
        ("fillers up are far worse than GRPO", _below(fillers, FAR_WORSE), fillers),
        ("wrong digits blamed are better than GRPO", _above(wrong, 1.0), wrong),
        (f"there is room: the better oracle gains {room} or more", _above(ceiling, room), ceiling),
    ]
    astray = [f"{m} {r:+.2f}" for m, r in agreement.items() if r < LEAST_AGREEMENT]
    judged.append(("weights follow what they should", WRONG if astray else OK, ", ".join(astray) or "all do"))
    return [{"setting": setting, "name": n, "outcome": o, "found": str(f)} for n, o, f in judged]


def broken(checked: list[dict[str, Any]], first: str) -> list[dict[str, Any]]:
    """Return the controls that make a run worthless."""
    return [c for c in checked if c["outcome"] == WRONG or (c["outcome"] == UNDECIDED and c["setting"] == first)]


def _below(found: Ratio, bound: float) -> str:
    """Judge a ratio that must be below 1, and whose estimate must be below a bound."""
    if found.high < 1.0 and found.value < bound:
        return OK
    return WRONG if found.low >= 1.0 else UNDECIDED


def _above(found: Ratio, bound: float) -> str:
    """Judge a ratio that must be above 1, and whose estimate must be above a bound."""
    if found.low > 1.0 and found.value >= bound:
        return OK
    return WRONG if found.high <= 1.0 else UNDECIDED
