"""All methods behind one call: `METHODS["vgpo"](**signals)` returns the weights that the loss takes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from srpo import checks
from srpo.config import PRESETS, CreditConfig, check_stream
from srpo.credit import role_contrast, token_weights
from srpo.errors import ConfigError, Table, describe, refuse
from srpo.methods.papo import papo_loss_term
from srpo.methods.pgpo import pgpo_weights
from srpo.methods.rlsd import linear_strength, rlsd_weights
from srpo.methods.sibling import sibling_weights
from srpo.methods.tor import tor_weights
from srpo.methods.vgpo import vgpo_weights
from srpo.methods.vppo import vppo_weights
from srpo.streams import STREAMS

# Every signal a method may read, and where it comes from.
SIGNALS: MappingProxyType[str, str] = MappingProxyType(
    {
        "logps": "score_streams(...).logps, or the trainer's old log-probs",
        "completion_mask": "the mask of valid completion tokens",
        "completion_ids": "the token ids of the completions",
        "role_ids": "role_ids_from_completions(...).role_ids",
        "corrupted_logps": "score_streams(..., credit=...).corrupted_logps",
        "corrupted_kl": "score_streams(..., credit=...).corrupted_kl, of a credit that reads divergences",
        "ablated_logps": "score_streams(..., credit=...).ablated_logps",
        "advantages": "group_advantages(rewards, group_ids)",
        "entropy": "score_streams(...).entropy",
        "teacher_logps": "the log-probs of the same tokens under the teacher",
        "similarity": "visual_similarity(model(..., output_hidden_states=True), image_token_mask, T)",
        "group_ids": "the index of the prompt of each row",
        "step": "trainer.state.global_step",
    }
)


@dataclass(frozen=True)
class Method:
    """One published way to give tokens credit, with its published defaults.

    Args:
        name: the key in `METHODS`.
        needs: the signals it reads, beside `logps` and `completion_mask`.
        passes: forward passes beyond the policy's own.
        changes: what it changes in the loss, in words.
        source: title and arXiv id.
        kl: how it estimates the divergence from the corrupted stream; None: it has none, or one estimate alone.
    """

    name: str
    needs: tuple[str, ...]
    passes: str
    changes: str
    source: str
    _weights: Callable[..., Tensor]
    _term: Callable[..., Tensor] | None = None
    _credit: CreditConfig | None = None
    kl: str | None = None

    @property
    def streams(self) -> tuple[str, ...]:
        """Name the contrast streams that the method reads: `"corrupted"`, `"ablated"`, both or none."""
        return tuple(name for name in STREAMS if f"{name}_logps" in self.needs or f"{name}_kl" in self.needs)

    @property
    def reads_kl(self) -> bool:
        """Say whether the method reads divergences over the vocabulary, as `CreditConfig.reads_kl`."""
        return "corrupted_kl" in self.needs

    def with_kl(self, kl: str) -> "Method":
        """Return the method with another estimate of the divergence from the corrupted stream.

        Args:
            kl: `"k3"` of the sampled token, which the published code computes and which is the default; or `"full"`,
                over the whole vocabulary (`corrupted_kl`), by which the papers define it.

        Raises: ConfigError for another word, or a method without a choice.
        """
        known = (self.kl,) if self.kl is None else ("k3", "full")
        if kl not in known:
            expected = " or ".join(map(repr, known))
            fix = "leave it out" if self.kl is None else "pass kl='full'"
            refuse(ConfigError, f"METHODS[{self.name!r}]", "kl", repr(kl), expected, fix)
        names = {"corrupted_logps": "corrupted_kl"} if kl == "full" else {"corrupted_kl": "corrupted_logps"}
        return replace(self, kl=kl, needs=tuple(names.get(name, name) for name in self.needs))

    def rows(self, stream: str, role_ids: Tensor | None, mask: Tensor) -> Tensor:
        """Say which tokens of a contrast stream the method reads, as `CreditConfig.rows`.

        A method without roles reads all valid tokens; `role_ids` may then be None.
        """
        if self._credit is not None and role_ids is not None:
            return self._credit.rows(stream, role_ids, mask)
        check_stream(f"METHODS[{self.name!r}].rows", stream)
        return (mask != 0) if stream in self.streams else torch.zeros_like(mask, dtype=torch.bool)

    @property
    def adds_a_term(self) -> bool:
        """Say whether `loss_term` is more than 0."""
        return self._term is not None

    def __call__(self, *, kl: str | None = None, **signals: Any) -> Tensor:
        """Return the weights of the tokens.

        Args:
            kl: as in `with_kl`; None leaves the method as it is.
            signals: any of `SIGNALS`; those that this method does not read are ignored.

        Returns: `[B, T]` for `weights=` of the losses.

        Gradient: none.

        Raises: ConfigError for an unknown or a missing signal; what the method's own function raises.
        """
        if kl is not None and kl != self.kl:
            return self.with_kl(kl)(**signals)
        taken = self._taken(f"METHODS[{self.name!r}]", signals)
        return self._weights(**({"corrupted_logps": None} | taken if self.reads_kl else taken))

    def loss_term(self, current_logps: Tensor, /, **signals: Any) -> Tensor:
        """Return what the method adds to the loss: 0 for all but PAPO.

        Args:
            current_logps: `[B, T]` nats of the policy that is trained, with their graph.
            signals: as for the weights.

        Returns: 0-d.

        Gradient: to `current_logps`.

        Raises: as the weights.
        """
        taken = self._taken(f"METHODS[{self.name!r}].loss_term", {**signals, "logps": current_logps})
        return torch.zeros((), device=current_logps.device) if self._term is None else self._term(**taken)

    def _taken(self, function: str, signals: dict[str, Any]) -> dict[str, Any]:
        for name in signals.keys() - SIGNALS.keys():
            expected = "one of " + ", ".join(SIGNALS)
            refuse(ConfigError, function, "signal", repr(name), expected, "see srpo.methods.SIGNALS")
        for name in ("logps", *self.needs):
            if signals.get(name) is None:
                refuse(ConfigError, function, name, "None", f"what {self.name} reads", f"pass {SIGNALS[name]}")
        return {name: signals.get(name) for name in ("logps", "completion_mask", *self.needs)}


_SRPO = "Structured Role-aware Policy Optimization for Multimodal Reasoning, 2605.07274"


def _preset(name: str, needs: tuple[str, ...], passes: str, changes: str) -> Method:
    """Make a method of a preset of the credit stage."""
    credit = PRESETS[name]

    def weights(logps: Tensor, completion_mask: Tensor | None, **signals: Any) -> Tensor:
        roles, advantages = signals.pop("role_ids"), signals.pop("advantages", None)
        streams = {"corrupted_logps": signals["corrupted_logps"], "ablated_logps": signals.get("ablated_logps")}
        contrast = role_contrast(logps, **streams, role_ids=roles, completion_mask=completion_mask, credit=credit)
        return token_weights(contrast, roles, completion_mask, advantages=advantages, credit=credit)

    return Method(name, needs, passes, changes, _SRPO, weights, _credit=credit)


def _ones(logps: Tensor, completion_mask: Tensor | None, **_: Any) -> Tensor:
    """Return 1 on valid tokens."""
    call = checks.Call("METHODS", logps, "logps")
    return checks.mask_of(call, completion_mask, checks.layout_of(call, "logps", logps, None)).float()


def _annealed(step: int, **signals: Any) -> Tensor:
    return rlsd_weights(**signals, strength=linear_strength(step))


_BOTH = ("role_ids", "corrupted_logps", "ablated_logps")
_ALL = (
    Method("grpo", (), "0", "nothing", "DeepSeekMath, 2402.03300", _ones),
    _preset("srpo", _BOTH, "2", "token weights in [0.8, 1.2], mean 1"),
    _preset("srpo_wide", _BOTH, "2", "token weights in [0.5, 2], mean 1"),
    _preset("srpo_one_pass", _BOTH[:2], "1", "as srpo; reasoning by image independence"),
    _preset("srpo_signed", (*_BOTH, "advantages"), "2", "as srpo, exponent signed by the advantage; mean free"),
    _preset("srpo_kl", _BOTH, "2", "as srpo, contrast k3"),
    Method(
        "srpo_sibling", (*_BOTH, "corrupted_kl", "completion_ids", "advantages", "group_ids"),
        "2, divergences; CPU alignment", "as srpo_wide; failing rollouts by what a right sibling contradicts",
        f"an idea of this library, on {_SRPO}", sibling_weights, _credit=PRESETS["srpo_wide"],
    ),
    Method(
        "rlsd", ("teacher_logps", "advantages", "step"), "1 (teacher)", "token weights in [0.8, 1.2], annealed",
        "Self-Distilled RLVR, 2604.03128", _annealed,
    ),
    Method(
        "papo", ("corrupted_logps",), "1", "adds -0.01 k3 to the loss; weights stay 1",
        "Perception-Aware Policy Optimization for Multimodal Reasoning, 2507.06448", _ones, papo_loss_term,
    ),
    Method(
        "vppo", ("corrupted_logps",), "1", "keeps 40 % of the tokens; trajectory factors, mean 1",
        "Spotlight on Token Perception for Multimodal Reinforcement Learning, 2510.09285", vppo_weights,
        kl="k3",
    ),
    Method(
        "vgpo", ("similarity", "group_ids"), "0 (hidden states)", "token factors [0.1, 2], trajectory [0.9, 2]",
        "Visually-Guided Policy Optimization for Multimodal Reasoning, 2604.09349",
        lambda logps, **signals: vgpo_weights(**signals),
    ),
    Method(
        "pgpo", ("corrupted_logps",), "1", "token weights from 0, sum kept",
        "Not All Tokens See Equally: Perception-Grounded Policy Optimization, 2604.01840", pgpo_weights,
        kl="k3",
    ),
    Method(
        "tor", ("corrupted_logps", "entropy"), "1", "1 on top entropy, 0.5 on top dependency, else 0",
        "Bridging Perception and Reasoning: Token Reweighting for RLVR, 2603.25077", tor_weights,
    ),
)  # fmt: skip

METHODS: MappingProxyType[str, Method] = MappingProxyType(Table("METHODS", {method.name: method for method in _ALL}))
"""SRPO, its presets, and its neighbours by name: a comparison changes one word."""


def credit_of(function: str, credit: Any) -> CreditConfig | Method:
    """Return the settings or the method that a name stands for; what is no name is returned as it is.

    Raises: ConfigError, in the name of `function`.
    """
    if isinstance(credit, CreditConfig | Method):
        return credit
    if isinstance(credit, str) and credit in PRESETS:
        return PRESETS[credit]
    if not isinstance(credit, str) or credit not in METHODS:
        expected = "a CreditConfig, or one of " + ", ".join(dict.fromkeys([*PRESETS, *METHODS]))
        refuse(ConfigError, function, "credit", describe(credit), expected, "pass credit='srpo'")
    return METHODS[credit]
