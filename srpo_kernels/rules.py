"""The settings of the two trajectory ops, and the text that carries them through an op's schema.

A schema takes numbers, strings and tensors alone, one by one. A rule goes through it as one string, so that a new
setting is a field here, a check in `srpo.config`, and a line of maths in each language.
"""

import ast
import functools
from typing import NamedTuple


class CreditRule(NamedTuple):
    """How contrasts become weights; the fields are those of `srpo.CreditConfig`."""

    contrast_kind: str
    reasoning_signal: str
    baseline: str
    tau: float
    weight_min: float
    weight_max: float
    direction: str
    normalize: str
    strength: float
    missing_role: str
    contrast_clamp: float


class LossRule(NamedTuple):
    """How log-probs and weights become a loss; the fields are those of `srpo.LossConfig`."""

    loss_type: str
    epsilon_low: float
    epsilon_high: float
    delta: float | None
    beta: float
    importance_sampling_level: str


@functools.lru_cache(maxsize=64)
def credit_rule(text: str) -> CreditRule:
    """Read a `CreditRule` from its text."""
    return CreditRule(*ast.literal_eval(text))


@functools.lru_cache(maxsize=64)
def loss_rule(text: str) -> LossRule:
    """Read a `LossRule` from its text."""
    return LossRule(*ast.literal_eval(text))
