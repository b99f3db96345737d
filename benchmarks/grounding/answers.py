"""What the efficiencies of many policies say: ratios paired over policies, and answers to questions.

Policies are what varies, so they are the unit; a run with one policy falls back on its batches. Half of the policies
are for looking: they choose an option of each question, the one with the largest t in the mean over settings, so that a
setting without room chooses little. The other half tests that option alone, in every setting, with Holm's correction
over all these tests.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from grounding.variants import QUESTIONS, Question

LEVEL = 0.05
LARGEST_T = 1e6  # in place of infinity, so that means over settings have a value
BETTER, WORSE, EQUAL = "better", "worse", "no difference seen"


class Gap(NamedTuple):
    """The mean of paired differences, the half of its 95 % interval, t and p of no difference; NaN for one unit."""

    mean: float
    half: float
    t: float
    p: float


def gap(differences: np.ndarray) -> Gap:
    """Judge differences `[units]` by a t test; none at all is t = 0."""
    n, mean = len(differences), float(differences.mean())
    if n < 2:
        return Gap(mean, *[float("nan")] * 3)
    error = float(differences.std(ddof=1)) / n**0.5
    t = 0.0 if mean == 0.0 else mean / error if error != 0.0 else math.copysign(math.inf, mean)
    return Gap(mean, float(stats.t.ppf(0.975, n - 1)) * error, t, float(2 * stats.t.sf(abs(t), n - 1)))


class Ratio(NamedTuple):
    """The ratio of two means with its 95 % interval, and the p-value of no difference (paired t); NaN for one unit."""

    value: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(x: np.ndarray, y: np.ndarray) -> Ratio:
    """Compare two columns of efficiencies `[units]`, paired; all NaN where the mean of `y` is not positive."""
    n = len(x)
    if not y.mean() > 0:
        return Ratio(*[float("nan")] * 4)
    value = x.mean() / y.mean()
    if n < 2:
        return Ratio(float(value), *[float("nan")] * 3)
    half = gap(x - value * y).half / y.mean()
    return Ratio(float(value), float(value - half), float(value + half), gap(x - y).p)


def holm(ps: list[float]) -> list[float]:
    """Correct p-values for that there are several; one that is NaN says nothing and counts as 1."""
    ps = [1.0 if np.isnan(p) else p for p in ps]
    largest, corrected = 0.0, dict.fromkeys(range(len(ps)), 1.0)
    for rank, i in enumerate(sorted(corrected, key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = largest
    return [corrected[i] for i in range(len(ps))]


class Answer(NamedTuple):
    """The option of a question that the looking half chose, and its ratio to the default in the confirming half.

    `corrected` are the p-values after Holm, `seen` what they say, by setting.
    """

    question: Question
    option: str
    ratios: dict[str, Ratio]
    corrected: dict[str, float]

    @property
    def seen(self) -> dict[str, str]:
        """Say where the option is better and where it is worse."""
        found = {}
        for setting, ratio in self.ratios.items():
            differs = self.corrected[setting] < LEVEL
            found[setting] = EQUAL if not differs else BETTER if ratio.value > 1.0 else WORSE
        return found

    @property
    def advice(self) -> str:
        """Say in a sentence what to do."""
        better, worse = ([s for s, x in self.seen.items() if x == what] for what in (BETTER, WORSE))
        if better and worse:
            return f"It depends: {self.option} is better {_at(better)}, worse {_at(worse)}."
        if better:
            return f"Try {self.option}: better {_at(better)}, worse nowhere."
        if worse:
            return f"Stay with {self.question.default}: {self.option} is worse {_at(worse)}."
        return "No difference seen."


def _at(settings: list[str]) -> str:
    return "at " + ", ".join(settings)


def columns(found: dict[str, Any], setting: str, units: list[int] | None = None) -> dict[str, np.ndarray]:
    """Return the efficiencies `[units]` of each method in a setting, from the rows of the file."""
    by_method: dict[str, list[float]] = {}
    for where, unit, method, efficiency in found["rows"]:
        if where == setting and (units is None or unit in units):
            by_method.setdefault(method, []).append(efficiency)
    return {method: np.array(x) for method, x in by_method.items()}


def answered(found: dict[str, Any]) -> list[Answer]:
    """Answer the questions; none where a half has fewer than two policies."""
    if min(len(found["looking"]), len(found["confirming"])) < 2:
        return []
    looking, confirming = (
        {setting: columns(found, setting, found[half]) for setting in found["settings"]}
        for half in ("looking", "confirming")
    )
    chosen = [max(q.options, key=lambda option, q=q: _evidence(looking, option, q.default)) for q in QUESTIONS]
    ratios = [
        {setting: ratio(own[option], own[q.default]) for setting, own in confirming.items()}
        for q, option in zip(QUESTIONS, chosen, strict=True)
    ]
    corrected = iter(holm([r.p for own in ratios for r in own.values()]))
    return [
        Answer(q, option, own, {setting: next(corrected) for setting in own})
        for q, option, own in zip(QUESTIONS, chosen, ratios, strict=True)
    ]


def _evidence(own: dict[str, dict[str, np.ndarray]], option: str, default: str) -> float:
    """Return the mean t over settings; one that is NaN says nothing and counts as 0."""
    ts = [gap(x[option] - x[default]).t for x in own.values()]
    return float(np.nan_to_num(ts, posinf=LARGEST_T, neginf=-LARGEST_T).mean())
