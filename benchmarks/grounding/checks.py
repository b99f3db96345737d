"""Controls: what must come out whatever the methods do. A run that gets one wrong is broken.

A control is `ok` when its interval lies where it must, `WRONG` when it lies on the other side, `undecided` when it
holds the border. Undecided breaks a run only at the start: a policy that has learned most of the task leaves little to
measure. Controls that negate a contrast are judged right after a warm start alone: whether contrasts still point the
right way after updates is a finding, not a fact to hold a run to. The oracles know the labels, and are judged always.
"""

from typing import Any

import numpy as np

from grounding.gradient import CONTROLS, Efficiency

SIGNED = "srpo_signed"
LEAST_AGREEMENT = 0.1
FAR_WORSE, FAR_BETTER = 0.9, 1.1
OK, WRONG, UNDECIDED = "ok", "WRONG", "undecided"


def check(
    setting: str, methods: list[str], found: Efficiency, agreement: np.ndarray, *, updated: bool = False
) -> list[dict[str, Any]]:
    """Judge the controls of a setting.

    Args:
        methods: names, in the order of `found`.
        agreement: `[methods]`, see `grounding.gradient.agreement`.
        updated: whether the policies have been updated since their warm start.

    Returns: dicts with `setting`, `name`, `outcome` and `found`, a sentence.
    """
    column = dict(zip(methods, found.relative[:, :, 0].T, strict=True))
    negated, fillers, wrong = (column[name] for name in CONTROLS)
    gap = column[SIGNED] - negated
    of_contrasts = [
        ("the negated contrast is worse than GRPO", _judge(1.0 - negated, 0.0), _text(negated)),
        (f"{SIGNED} is better than its negation", _judge(gap, 0.0), f"by {_text(gap)}"),
    ]
    judged = [
        *(() if updated else of_contrasts),
        ("fillers up are far worse than GRPO", _judge(1.0 - fillers, 1.0 - FAR_WORSE), _text(fillers)),
        ("wrong digits blamed are far better than GRPO", _judge(wrong - 1.0, FAR_BETTER - 1.0), _text(wrong)),
    ]
    astray = [f"{m} {r:+.2f}" for m, r in zip(methods, agreement, strict=True) if r < LEAST_AGREEMENT]
    judged.append(("weights follow what they should", WRONG if astray else OK, ", ".join(astray) or "all do"))
    return [{"setting": setting, "name": n, "outcome": o, "found": f} for n, o, f in judged]


def broken(checked: list[dict[str, Any]], first: str) -> list[dict[str, Any]]:
    """Return the controls that make a run worthless."""
    return [c for c in checked if c["outcome"] == WRONG or (c["outcome"] == UNDECIDED and c["setting"] == first)]


def _judge(gain: np.ndarray, least: float) -> str:
    """Judge draws that must be positive, and whose estimate must exceed `least`."""
    low, high = np.percentile(gain[1:], [2.5, 97.5])
    if low > 0.0 and gain[0] > least:
        return OK
    return UNDECIDED if not high <= 0.0 else WRONG


def _text(draws: np.ndarray) -> str:
    low, high = np.percentile(draws[1:], [2.5, 97.5])
    return f"{draws[0]:.2f} [{low:.2f}, {high:.2f}]"
