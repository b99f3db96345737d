"""The settings of the two trajectory ops, and the text that carries them through an op's schema.

A schema takes numbers, strings and tensors alone, one by one. A rule goes through it as one string, so that a new
setting is a field here, a check in `srpo.config`, and a line of maths in each language.
"""

import ast
import functools
from typing import Any, NamedTuple


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
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float
    use_bias_correction_kl: bool
    off_policy_mask_threshold: float | None

    @property
    def kind(self) -> str:
        """Name the loss of a token, whatever it is reduced by."""
        return kind_of(self.loss_type)


def kind_of(loss_type: str) -> str:
    """Name the loss of a token: `"clip"`, `"cispo"`, `"sapo"`, or `"reinforce"`, which is -A logp times a factor."""
    return {"cispo": "cispo", "sapo": "sapo", "vespo": "reinforce"}.get(loss_type, "clip")


def couples_tokens(rule: Any) -> bool:
    """Say whether the loss of a token depends on the log-probs of others of its trajectory.

    `rule` is a `LossRule`, or a config with its fields.
    """
    sequence = rule.importance_sampling_level != "token" or rule.loss_type == "vespo"
    return sequence or rule.off_policy_mask_threshold is not None


@functools.lru_cache(maxsize=64)
def credit_rule(text: str) -> CreditRule:
    """Read a `CreditRule` from its text."""
    return CreditRule(*ast.literal_eval(text))


@functools.lru_cache(maxsize=64)
def loss_rule(text: str) -> LossRule:
    """Read a `LossRule` from its text."""
    return LossRule(*ast.literal_eval(text))
