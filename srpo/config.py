"""Hyper-parameters: `CreditConfig` (the credit stage), `LossConfig` (the loss stage) and the named `PRESETS`.

Both are frozen and checked when constructed. Tensors never live here.
"""

import warnings
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from srpo.errors import ConfigError, ConfigWarning, Table, check_fields, checked_fields, refuse, require
from srpo.streams import STREAMS
from srpo_kernels.rules import CreditRule, LossRule, kind_of

# Beyond these bounds sign-dependent weights drift: srpo/README.md, "Choosing bounds".
_TIGHT_BOUNDS = (0.8, 1.2)


class _Ruled:
    """What the two configs share: the text that carries their settings through the schema of an op.

    It is written once, when the settings are checked: under torch.compile floats may be symbols later. It lies in a
    slot, so that `vars` of a config holds its settings and nothing else.
    """

    __slots__ = ("_rule",)
    _rule: str

    @property
    def rule(self) -> str:
        """Return what the ops take."""
        return self._rule

    def _write_rule(self, kind: type[CreditRule] | type[LossRule]) -> None:
        values = (getattr(self, name) for name in kind._fields)
        text = repr(tuple(float(x) if isinstance(x, float) else x for x in values))  # numpy's floats print otherwise
        object.__setattr__(self, "_rule", text)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), tuple(vars(self).values())


@checked_fields
@dataclass(frozen=True)
class CreditConfig(_Ruled):
    """Hold the settings that turn log-probs of three streams into token weights.

    contrast   c = f(base - corrupted) on perception, f(base - ablated) on reasoning tokens, differences clamped
    weight     w = clip(exp((c - baseline) / tau), weight_min, weight_max), normalised over the credit set
    mix        w <- 1 + strength * (w - 1)

    Args:
        contrast_kind: `"logratio"` (signed difference d), `"abs"` (|d|), `"k3"` (exp(-d) + d - 1, at most 10), all of
            the token that was sampled; or `"kl"`, the divergence KL(clean || stream) over the whole vocabulary, at
            least 0 (a reasoning token of `"image_independence"` gets minus that). It needs both distributions: live
            logits or hidden states of the streams, or `corrupted_kl` and `ablated_kl` of `score_streams`.
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
        contrast_clamp: differences are clamped to +- this many nats, and so is a divergence that is infinite because a
            stream bans a token (`srpo/infinite_divergences` counts those).
        strict_finite: raise `NonFiniteError` when a contrast has no value, instead of counting it as 0. Needs a sync.

    Raises:
        ConfigError: a value is outside its range.

    Source: Jiang & Zou, arXiv 2605.07274; bounds after RLSD, arXiv 2604.03128.
    """

    contrast_kind: Literal["logratio", "abs", "k3", "kl"] = "logratio"
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
        check_fields(self)
        require(self, "tau", self.tau >= 1e-6, "a number of at least 1e-6")
        if self.normalize == "solve":
            bracketed = self.weight_min <= 1.0 <= self.weight_max
            name = "weight_min" if self.weight_min > 1.0 else "weight_max"
            require(self, name, bracketed, "weight_min <= 1 <= weight_max, or no shift has mean 1", "try [0.8, 1.2]")
        ordered = 0.0 < self.weight_min <= self.weight_max
        require(self, "weight_min", ordered, "0 < weight_min <= weight_max", "try weight_min=0.8, weight_max=1.2")
        require(self, "strength", 0.0 <= self.strength <= 1.0, "0 <= strength <= 1")
        require(self, "contrast_clamp", self.contrast_clamp > 0.0, "a positive number of nats")
        self._write_rule(CreditRule)
        wide = self.weight_min < _TIGHT_BOUNDS[0] or self.weight_max > _TIGHT_BOUNDS[1]
        if self.direction == "advantage" and wide:
            warnings.warn(
                f"CreditConfig: direction='advantage' with bounds [{self.weight_min}, {self.weight_max}] gives tokens "
                "that do not influence the reward a drift; stay within [0.8, 1.2].",
                ConfigWarning,
                stacklevel=3,
            )

    @property
    def streams(self) -> tuple[str, ...]:
        """Name the contrast streams that these settings read: `"corrupted"`, `"ablated"`, or none."""
        if self.strength == 0.0:
            return ()
        return ("corrupted",) if self.reasoning_signal == "image_independence" else ("corrupted", "ablated")

    @property
    def reads_kl(self) -> bool:
        """Say whether a stream is read as divergences over the vocabulary, not as log-probs of the sampled tokens."""
        return self.contrast_kind == "kl"

    def rows(self, stream: str, role_ids: Tensor, mask: Tensor) -> Tensor:
        """Say which tokens of a contrast stream these settings read: what is scored, and what must have a value.

        Args:
            stream: `"corrupted"` or `"ablated"`.
            role_ids: `[B, T]` integers, 0 other, 1 perception, 2 reasoning; or `[N]`.
            mask: 0/1, in the shape of `role_ids`.

        Returns: bool, in that shape; all False for a stream that is not read.

        Raises: ConfigError for another stream.
        """
        check_stream("CreditConfig.rows", stream)
        if stream not in self.streams:
            return torch.zeros_like(mask, dtype=torch.bool)
        reads = role_ids == (1 if stream == "corrupted" else 2)
        if stream == "corrupted" and self.reasoning_signal == "image_independence":
            reads = reads | (role_ids == 2)
        return reads & mask.bool()


@checked_fields
@dataclass(frozen=True)
class LossConfig(_Ruled):
    """Hold the settings of the clipped policy loss. Names and defaults are those of TRL's `GRPOConfig`.

    Args:
        loss_type: reduction of the clipped loss (`"dapo"`, `"grpo"`, `"bnpo"`, `"dr_grpo"`, or `"luspo"`, the sum over
            a sequence and then the mean), or another loss: `"cispo"` and `"vespo"`, reduced as `"dapo"`, and `"sapo"`,
            reduced as `"grpo"`.
        epsilon_low: lower clip range of the ratio.
        epsilon_high: upper clip range; for `"cispo"` the upper bound of the ratio itself (5.0 in TRL's notes).
        delta: upper bound of the unclipped ratio (two-sided clipping, TRL's); None switches it off. From
            `1 + epsilon_high` on it is verl's dual clip, `clip_ratio_c`; below, negative advantages are cut at
            `1 + epsilon_high` here and at `clip_ratio_c` there, and positive ones only here.
        beta: weight of the KL term; needs `ref_logps` when not 0.
        importance_sampling_level: `"token"` or `"sequence_token"` (GSPO-token).
        temperature: sampling temperature; logits are divided by it. Log-probs that are passed in already carry it.
        max_completion_length: the constant length of `"dr_grpo"`, in tokens.
        sapo_temperature_pos, sapo_temperature_neg: sharpness of the gate of `"sapo"` for positive advantages, and for
            others.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: shape and rate of the gamma weight of `"vespo"`,
            for advantages of at least 0, and for negative ones.
        use_bias_correction_kl: multiply the KL term by the ratio to the old policy, with its gradient.
        off_policy_mask_threshold: drop the policy term of sequences with a negative advantage whose mean of
            `old_logps` - log-probs exceeds this many nats; None keeps all.
        top_entropy_quantile: the share of the valid tokens of this call, those of the highest entropy, whose policy
            term counts; below 1 the loss needs logits or hidden states (from those a second product of each row, 8NVH).
        entropy_coef: subtract this many times the mean entropy over the valid tokens of this call (of those that
            `top_entropy_quantile` leaves). TRL divides it by the accumulation steps; here the caller does.

    Raises:
        ConfigError: a value is outside its range, or `importance_sampling_level="sequence"`, under which token
            weights with mean 1 cancel in value and gradient.

    TRL's rules hold where libraries differ: a sequence without tokens counts as a loss of 0 in the means of `"grpo"`
    (verl leaves it out), and log-ratios are capped at 60, where a ratio carries no information any more (verl caps
    them at 20, those of a sequence at 10).

    A token weight multiplies the policy term of its token in every loss, so it changes magnitudes and no sign: in
    `"sapo"` the gate, in `"cispo"` and `"vespo"` the log-prob's coefficient. It touches neither the KL term, nor the
    entropy, nor what a loss takes from a whole sequence: VESPO's weight, the ratio of `"sequence_token"`, the masks.
    TRL's `importance_sampling_level="sequence"` is `"sequence_token"` here: without weights value and gradient agree,
    for `"grpo"` and for `"luspo"`; under a pure sequence ratio weights would cancel.

    Source: TRL `GRPOTrainer`; DAPO arXiv 2503.14476; Dr. GRPO arXiv 2503.20783; CISPO arXiv 2506.13585;
        GSPO arXiv 2507.18071; SAPO arXiv 2511.20347; LUSPO and VESPO as TRL names and computes them; the off-policy
        mask of DeepSeek-V3.2; top-entropy tokens arXiv 2506.01939.
    """

    OTHER_NAMES: ClassVar[dict[str, str]] = {
        "epsilon": "epsilon_low (and epsilon_high, which is TRL's epsilon by default)",
        "clip_ratio_low": "epsilon_low",
        "clip_ratio_high": "epsilon_high",
        "clip_ratio_c": "delta",
        "kl_coef": "beta",
    }

    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "vespo", "luspo"] = "dapo"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    importance_sampling_level: Literal["token", "sequence_token"] = "token"
    temperature: float = 1.0
    max_completion_length: int | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    use_bias_correction_kl: bool = False
    off_policy_mask_threshold: float | None = None
    top_entropy_quantile: float = 1.0
    entropy_coef: float = 0.0

    @property
    def rule_kind(self) -> str:
        """Name the loss of a token, whatever it is reduced by."""
        return kind_of(self.loss_type)

    def __post_init__(self) -> None:
        if self.importance_sampling_level == "sequence":
            expected = "'token' or 'sequence_token': token weights with mean 1 cancel under a pure sequence ratio"
            require(self, "importance_sampling_level", False, expected, "use 'sequence_token'")
        check_fields(self)
        require(self, "epsilon_low", 0.0 <= self.epsilon_low <= 1.0, "0 <= epsilon_low <= 1")
        require(self, "epsilon_high", self.epsilon_high >= 0.0, "a number of at least 0")
        require(self, "delta", self.delta is None or self.delta > 0.0, "None or a positive number")
        require(self, "beta", self.beta >= 0.0, "a number of at least 0")
        require(self, "temperature", self.temperature > 0.0, "a positive number")
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            require(self, name, getattr(self, name) > 0.0, "a positive number")
        for name in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"):
            require(self, name, getattr(self, name) >= 0.0, "a number of at least 0")
        share = "a share of the tokens, above 0 and at most 1"
        require(self, "top_entropy_quantile", 0.0 < self.top_entropy_quantile <= 1.0, share, "try 0.2")
        cancels = self.loss_type == "vespo" and self.importance_sampling_level != "token"
        level = "'token' for loss_type='vespo', whose weight is that of the whole sequence"
        require(self, "importance_sampling_level", not cancels, level, "use 'token'")
        length, fix = self.max_completion_length, "pass the trainer's max_completion_length"
        require(self, "max_completion_length", length is None or length > 0, "None or at least 1", fix)
        constant = "a positive int for loss_type='dr_grpo' (a constant normaliser must not depend on padding)"
        require(self, "max_completion_length", self.loss_type != "dr_grpo" or length is not None, constant, fix)
        self._write_rule(LossRule)


def check_stream(function: str, stream: Any) -> None:
    """Refuse what is not the name of a contrast stream."""
    if stream not in STREAMS:
        fix = f"pass {STREAMS[0]!r}"
        refuse(ConfigError, function, "stream", repr(stream), " or ".join(map(repr, STREAMS)), fix)


PRESETS: MappingProxyType[str, CreditConfig] = MappingProxyType(
    Table(
        "PRESETS",
        {
            "grpo": CreditConfig(strength=0.0),
            "srpo": CreditConfig(),
            "srpo_wide": CreditConfig(weight_min=0.5, weight_max=2.0),
            "srpo_one_pass": CreditConfig(reasoning_signal="image_independence"),
            "srpo_signed": CreditConfig(direction="advantage", normalize="none"),
            "srpo_kl": CreditConfig(contrast_kind="k3"),
        },
    )
)
"""The credit stage by name: `role_weighted_grpo_loss(..., credit=PRESETS["srpo_one_pass"])`."""
