"""Hyper-parameters: `CreditConfig` (the credit stage), `LossConfig` (the loss stage) and the named `PRESETS`.

Both are frozen and checked when constructed. Tensors never live here.
"""

import math
import warnings
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from srpo.errors import ConfigError, ConfigWarning
from srpo_kernels.rules import CreditRule, LossRule

# Beyond these bounds sign-dependent weights drift: method notes in the README, "Choosing bounds".
_TIGHT_BOUNDS = (0.8, 1.2)


@dataclass(frozen=True)
class CreditConfig:
    """Hold the settings that turn log-probs of three streams into token weights.

    contrast   c = f(base - corrupted) on perception, f(base - ablated) on reasoning tokens, differences clamped
    weight     w = clip(exp((c - baseline) / tau), weight_min, weight_max), normalised over the credit set
    mix        w <- 1 + strength * (w - 1)

    Args:
        contrast_kind: `"logratio"` (signed difference d), `"abs"` (|d|) or `"k3"` (exp(-d) + d - 1, at most 10).
        reasoning_signal: `"perception_ablation"` needs `ablated_logps`; `"image_independence"` scores reasoning
            tokens by -(base - corrupted) and needs no third pass.
        baseline: `"mean"` over both roles of a trajectory, `"role_mean"` (roles do not compete) or `"none"`.
        tau: temperature of the weights, in nats; at least 1e-6.
        weight_min: lower bound of a weight before normalisation, positive; at most 1 with `"solve"`.
        weight_max: upper bound of a weight before normalisation; at least 1 with `"solve"`.
        direction: `"evidence"`, or `"advantage"` (the exponent is multiplied by the sign of the advantage).
        normalize: `"mean"` divides by the mean, `"solve"` shifts the exponent until the clipped mean is 1, `"none"`.
        strength: 0 gives plain GRPO, 1 the full weights.
        missing_role: `"uniform"` gives weight 1 to a trajectory that lacks a role; `"within"` weights the other role.
        contrast_clamp: differences are clamped to +- this many nats.
        strict_finite: raise `NonFiniteError` when a contrast has no value, instead of counting it as 0. Needs a sync.

    Raises:
        ConfigError: a value is outside its range.

    Source: Jiang & Zou, arXiv 2605.07274; bounds after RLSD, arXiv 2604.03128.
    """

    contrast_kind: Literal["logratio", "abs", "k3"] = "logratio"
    reasoning_signal: Literal["perception_ablation", "image_independence"] = "perception_ablation"
    baseline: Literal["mean", "role_mean", "none"] = "mean"
    tau: float = 1.0
    weight_min: float = 0.8
    weight_max: float = 1.2
    direction: Literal["evidence", "advantage"] = "evidence"
    normalize: Literal["mean", "none", "solve"] = "mean"
    strength: float = 1.0
    missing_role: Literal["uniform", "within"] = "uniform"
    contrast_clamp: float = 20.0
    strict_finite: bool = False

    def __post_init__(self) -> None:
        _check_choice(self, "contrast_kind", ("logratio", "abs", "k3"))
        _check_choice(self, "reasoning_signal", ("perception_ablation", "image_independence"))
        _check_choice(self, "baseline", ("mean", "role_mean", "none"))
        _check_choice(self, "direction", ("evidence", "advantage"))
        _check_choice(self, "normalize", ("mean", "none", "solve"))
        _check_choice(self, "missing_role", ("uniform", "within"))
        for name, fix in (("tau", "1.0"), ("weight_min", "0.8"), ("weight_max", "1.2"), ("strength", "1.0")):
            _check_number(self, name, fix)
        _check_number(self, "contrast_clamp", "20.0")
        if not isinstance(self.strict_finite, bool):
            raise ConfigError(_message(self, "strict_finite", "True or False", "False"))
        _require(self, "tau", self.tau >= 1e-6, "a number of at least 1e-6", "tau=1.0")
        if self.normalize == "solve":
            bracketed = self.weight_min <= 1.0 <= self.weight_max
            name = "weight_min" if self.weight_min > 1.0 else "weight_max"
            _require(self, name, bracketed, "weight_min <= 1 <= weight_max, or no shift has mean 1", "[0.8, 1.2]")
        ordered = 0.0 < self.weight_min <= self.weight_max
        _require(self, "weight_min", ordered, "0 < weight_min <= weight_max", "weight_min=0.8, weight_max=1.2")
        _require(self, "strength", 0.0 <= self.strength <= 1.0, "0 <= strength <= 1", "strength=1.0")
        _require(self, "contrast_clamp", self.contrast_clamp > 0.0, "a positive number of nats", "contrast_clamp=20.0")
        _keep_rule(self, CreditRule)
        wide = self.weight_min < _TIGHT_BOUNDS[0] or self.weight_max > _TIGHT_BOUNDS[1]
        if self.direction == "advantage" and wide:
            warnings.warn(
                f"CreditConfig: direction='advantage' with bounds [{self.weight_min}, {self.weight_max}] gives tokens "
                "that do not influence the reward a drift; stay within [0.8, 1.2].",
                ConfigWarning,
                stacklevel=3,
            )

    @property
    def rule(self) -> str:
        """Return what the ops take."""
        return self.__dict__["_rule"]

    @property
    def streams(self) -> tuple[str, ...]:
        """Name the contrast streams that these settings read: `"corrupted"`, `"ablated"`, or none."""
        if self.strength == 0.0:
            return ()
        return ("corrupted",) if self.reasoning_signal == "image_independence" else ("corrupted", "ablated")


@dataclass(frozen=True)
class LossConfig:
    """Hold the settings of the clipped policy loss. Names and defaults are those of TRL's `GRPOConfig`.

    Args:
        loss_type: reduction (`"dapo"`, `"grpo"`, `"bnpo"`, `"dr_grpo"`) or `"cispo"`.
        epsilon_low: lower clip range of the ratio.
        epsilon_high: upper clip range; for `"cispo"` the upper bound of the ratio itself (5.0 in TRL's notes).
        delta: upper bound of the unclipped ratio (two-sided clipping, verl's dual clip); None switches it off.
        beta: weight of the KL term; needs `ref_logps` when not 0.
        importance_sampling_level: `"token"` or `"sequence_token"` (GSPO-token).
        temperature: sampling temperature; logits are divided by it. Log-probs that are passed in already carry it.
        max_completion_length: the constant length of `"dr_grpo"`, in tokens.

    Raises:
        ConfigError: a value is outside its range, or `importance_sampling_level="sequence"`, under which token
            weights with mean 1 cancel in value and gradient.

    Source: TRL `GRPOTrainer`; DAPO arXiv 2503.14476; Dr. GRPO arXiv 2503.20783; CISPO arXiv 2506.13585;
        GSPO arXiv 2507.18071.
    """

    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo", "cispo"] = "dapo"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    importance_sampling_level: Literal["token", "sequence_token"] = "token"
    temperature: float = 1.0
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        if self.importance_sampling_level == "sequence":
            raise ConfigError(
                "LossConfig(): importance_sampling_level got 'sequence', expected 'token' or 'sequence_token': token "
                "weights with mean 1 cancel under a pure sequence ratio; use 'sequence_token'."
            )
        _check_choice(self, "loss_type", ("dapo", "grpo", "bnpo", "dr_grpo", "cispo"))
        _check_choice(self, "importance_sampling_level", ("token", "sequence_token"))
        for name, fix in (("epsilon_low", "0.2"), ("epsilon_high", "0.2"), ("beta", "0.0"), ("temperature", "1.0")):
            _check_number(self, name, fix)
        if self.delta is not None:
            _check_number(self, "delta", "None")
        if self.max_completion_length is not None:
            _check_number(self, "max_completion_length", "256", integer=True)
        _require(self, "epsilon_low", 0.0 <= self.epsilon_low <= 1.0, "0 <= epsilon_low <= 1", "epsilon_low=0.2")
        _require(self, "epsilon_high", self.epsilon_high >= 0.0, "a number of at least 0", "epsilon_high=0.2")
        _require(self, "delta", self.delta is None or self.delta > 0.0, "None or a positive number", "delta=None")
        _require(self, "beta", self.beta >= 0.0, "a number of at least 0", "beta=0.0")
        _require(self, "temperature", self.temperature > 0.0, "a positive number", "temperature=1.0")
        length = self.max_completion_length
        _require(self, "max_completion_length", length is None or length > 0, "None or at least 1", "the trainer's own")
        if self.loss_type == "dr_grpo" and length is None:
            raise ConfigError(
                "LossConfig(): max_completion_length got None, expected a positive int for loss_type='dr_grpo' (a "
                "constant normaliser must not depend on padding); pass the trainer's max_completion_length."
            )
        _keep_rule(self, LossRule)

    @property
    def rule(self) -> str:
        """Return what the ops take."""
        return self.__dict__["_rule"]


def _keep_rule(config: Any, rule: type) -> None:
    """Write the settings down as text now: under torch.compile they may be symbols later."""
    values = (getattr(config, name) for name in rule._fields)
    text = repr(tuple(float(x) if isinstance(x, float) else x for x in values))  # numpy's floats print otherwise
    object.__setattr__(config, "_rule", text)


def _check_choice(config: Any, name: str, options: tuple[str, ...]) -> None:
    if getattr(config, name) not in options:
        raise ConfigError(_message(config, name, f"one of {', '.join(map(repr, options))}", repr(options[0])))


def _check_number(config: Any, name: str, fix: str, *, integer: bool = False) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        raise ConfigError(_message(config, name, "an int" if integer else "a number", fix))
    if not math.isfinite(value):
        raise ConfigError(_message(config, name, "a finite number", fix))


def _require(config: Any, name: str, holds: bool, expected: str, fix: str) -> None:
    if not holds:
        raise ConfigError(_message(config, name, expected, fix))


def _message(config: Any, name: str, expected: str, fix: str) -> str:
    return f"{type(config).__name__}(): {name} got {getattr(config, name)!r}, expected {expected}; try {fix}."


PRESETS: MappingProxyType[str, CreditConfig] = MappingProxyType(
    {
        "grpo": CreditConfig(strength=0.0),
        "srpo": CreditConfig(),
        "srpo_wide": CreditConfig(weight_min=0.5, weight_max=2.0),
        "srpo_one_pass": CreditConfig(reasoning_signal="image_independence"),
        "srpo_signed": CreditConfig(direction="advantage", normalize="none"),
        "srpo_kl": CreditConfig(contrast_kind="k3"),
    }
)
"""The credit stage by name: `role_weighted_grpo_loss(..., credit=PRESETS["srpo_one_pass"])`."""
