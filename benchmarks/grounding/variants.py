"""What is compared: the library's methods, settings of srpo one question at a time, and controls with known outcomes.

`QUESTIONS` names them; `all_weights` computes the weights of each on a batch. Settings are asked of the default, whose
weights follow evidence alone, and of srpo_signed, whose weights follow it with the sign of the advantage.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grounding import task
from grounding.model import PrefixVLM
from grounding.rollouts import CORRUPTION, Rollouts, streams_of
from srpo import (
    METHODS,
    PRESETS,
    Blank,
    ConfigWarning,
    CreditConfig,
    PatchMask,
    Role,
    perception_tokens,
    role_contrast,
    token_weights,
)
from srpo.methods import contradicted_by_sibling
from srpo.methods.sibling import next_in_group

Signals = dict[str, Any]
WIDE = {"weight_min": 0.5, "weight_max": 2.0}
DEAD_ZONE = 0.5  # nats around the baseline in which a weight stays 1
CONTROLS = ("negated contrast", "oracle: fillers", "oracle: wrong digits", "oracle: first error")
DIRECTIONS = {"srpo": "evidence", "srpo_signed": "signed"}
CORRUPTIONS = {"PatchMask(0.3)": PatchMask(0.3), "PatchMask(0.9)": PatchMask(0.9), "Blank()": Blank()}
PER_ROLLOUT = "a corruption per rollout"
BY_DIVERGENCE, SWAPPED = {"perception": "kl"}, {"reasoning": "sibling"}
SIBLING: dict[str, dict[str, Any]] = {
    "sibling": {}, "sibling, full KL": BY_DIVERGENCE, "sibling, swapped perception": SWAPPED,
}  # fmt: skip
SIBLING_WIDE: dict[str, dict[str, Any]] = {f"{name}, [0.5, 2]": x | WIDE for name, x in SIBLING.items()}
# the library has a name for some of them
NAMED = {
    "evidence, [0.5, 2]": "srpo_wide", "evidence, image independence": "srpo_one_pass", "evidence, k3": "srpo_kl",
    "sibling, full KL, [0.5, 2]": "srpo_sibling",
}  # fmt: skip


class Question(NamedTuple):
    """What a user asks, what the answer is today, and the other answers."""

    text: str
    default: str
    options: tuple[str, ...]


def _asked() -> tuple[Question, ...]:
    """List the questions."""
    found = [
        Question("evidence or advantage direction?", "srpo", ("srpo_signed",)),
        Question("another method than GRPO?", "grpo", tuple(name for name in METHODS if not name.startswith("grpo"))),
    ]
    for preset, word in DIRECTIONS.items():
        own = [
            ("which bounds?", ("[0.5, 2]", "dead zone")),
            ("which reasoning signal?", ("image independence",)),
            ("which contrast?", ("abs", "k3", "full KL")),
            ("a corruption per prompt or rollout?", (PER_ROLLOUT,)),
            ("how much corruption?", tuple(CORRUPTIONS)),
        ]
        for text, options in own:
            names = (f"{word}, {option}" for option in options)
            found.append(Question(f"{text} ({word})", preset, tuple(NAMED.get(name, name) for name in names)))
    found += [
        Question("blame by a right sibling?", "srpo", tuple(SIBLING)),
        Question("blame by a right sibling? (signed)", "srpo_signed", tuple(SIBLING)),
        Question(
            "blame by a right sibling? (signed, [0.5, 2])",
            "signed, [0.5, 2]",
            tuple(NAMED.get(name, name) for name in SIBLING_WIDE),
        ),
    ]
    return tuple(found)


QUESTIONS = _asked()
VARIANTS = tuple(dict.fromkeys(name for q in QUESTIONS for name in (q.default, *q.options) if name not in METHODS))
NAMES = (*METHODS, *VARIANTS, *CONTROLS)


def more_streams(model: PrefixVLM, rollouts: Rollouts, generator: torch.Generator) -> Signals:
    """Score what the variants read beside the signals of the library's methods."""
    found: Signals = {}
    for name, corruption in CORRUPTIONS.items():
        found[name] = streams_of(model, rollouts, streams=("corrupted",), corruption=corruption).corrupted_logps
    drawn = streams_of(model, rollouts, streams=("corrupted",), corruption=CORRUPTION, generator=generator)
    found[PER_ROLLOUT] = drawn.corrupted_logps
    by_divergence = {"credit": CreditConfig(contrast_kind="kl"), "streams": ("ablated",)}
    found["ablated_kl"] = streams_of(model, rollouts, **by_divergence).ablated_kl
    sibling = right_sibling(rollouts)
    ids, mask = perception_tokens(rollouts.ids, rollouts.reading.role_ids, rollouts.mask)
    swapped = {"other_perception_ids": ids[sibling], "other_perception_mask": mask[sibling]}
    found["sibling"] = streams_of(model, rollouts, streams=("ablated",), **swapped).ablated_logps
    found["contradicted"] = contradicted_by_sibling(
        rollouts.ids, rollouts.reading.role_ids, rollouts.advantages, rollouts.group_ids, rollouts.mask
    )
    return found


def right_sibling(rollouts: Rollouts) -> Tensor:
    """Return `[N]` the next rollout of the same prompt whose answer is right; the own one where there is none."""
    found = next_in_group(rollouts.rewards > 0, rollouts.group_ids)
    return torch.where(found < 0, torch.arange(len(found)), found)


def all_weights(rollouts: Rollouts, signals: Signals, more: Signals) -> dict[str, Tensor]:
    """Return the weights `[B, T]` of everything in `NAMES`.

    Args:
        signals: of `rollouts.score`.
        more: of `more_streams`.
    """
    weights = {name: method(**signals) for name, method in METHODS.items()}
    for preset, word in DIRECTIONS.items():
        for name, found in _variants(preset, signals, more).items():
            weights[f"{word}, {name}"] = found
    for name, settings in (SIBLING | SIBLING_WIDE).items():
        weights[name] = sibling_weights(signals, more, **settings)
    opposite, signed = -contrast("srpo_signed", signals), PRESETS["srpo_signed"]
    negated = _weigh(opposite, signals, signed)
    blames = (blame(rollouts, at_fault) for at_fault in (wrong_digits(rollouts), first_error(rollouts)))
    controls = (negated, emphasis(rollouts, rollouts.fillers), *blames)
    found = weights | dict(zip(CONTROLS, controls, strict=True))
    return {name: found[name] for name in NAMES}


def _variants(preset: str, signals: Signals, more: Signals) -> dict[str, Tensor]:
    """Change one setting of a preset at a time."""

    def changed(change: Callable[[Tensor], Tensor] | None = None, streams: Signals | None = None, **x: Any) -> Tensor:
        credit = _credit(preset, **x)
        found = _contrast(credit, signals | (streams or {}))
        return _weigh(found if change is None else change(found), signals, credit)

    credited = (signals["role_ids"] != Role.OTHER) & signals["completion_mask"]
    return {
        "[0.5, 2]": changed(**WIDE),
        "dead zone": changed(lambda c: _with_dead_zone(c, credited)),
        "image independence": changed(reasoning_signal="image_independence"),
        "abs": changed(contrast_kind="abs"),
        "k3": changed(contrast_kind="k3"),
        "full KL": changed(contrast_kind="kl", streams={"ablated_kl": more["ablated_kl"]}),
        **{name: changed(streams={"corrupted_logps": more[name]}) for name in (PER_ROLLOUT, *CORRUPTIONS)},
    }


def _credit(preset: str, **changes: Any) -> CreditConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConfigWarning)  # of wide bounds with signs, which are asked about here
        return CreditConfig(**{**vars(PRESETS[preset]), **changes})


def sibling_weights(signals: Signals, more: Signals, **settings: Any) -> Tensor:
    """Blame what a right sibling contradicts; settings are those of `sibling_contrast`, and bounds of weights."""
    bounds = {name: settings.pop(name) for name in WIDE if name in settings}
    return _weigh(sibling_contrast(signals, more, **settings), signals, _credit("srpo", **bounds))


def sibling_contrast(
    signals: Signals, more: Signals, *, perception: str = "logratio", reasoning: str = "signed"
) -> Tensor:
    """Blame what a right sibling contradicts, in failing rollouts; others keep their evidence.

    Args:
        perception: `"logratio"` or `"kl"`, the evidence by which a perception token is to blame where the sibling's
            perception has it not, and spared where it has it.
        reasoning: `"sibling"`, a token is to blame by how much likelier the own perception made it than that of the
            sibling; `"signed"` spares tokens by how much they rest on the own perception.
    """
    found = contrast("srpo", signals)
    evidence = signals["corrupted_kl"].nan_to_num(0.0) if perception == "kl" else found
    seen = torch.where(more["contradicted"], evidence, -evidence)
    derived = (signals["logps"] - more["sibling"]).nan_to_num(0.0) if reasoning == "sibling" else -found
    blamed = torch.where(signals["role_ids"] == Role.REASONING, derived, seen)
    return torch.where(signals["advantages"][:, None] < 0, blamed, found)


def contrast(preset: str, signals: Signals) -> Tensor:
    """Return the contrasts that a preset reads; 0 where a response has nothing to be contrasted with."""
    return _contrast(PRESETS[preset], signals)


def _contrast(credit: CreditConfig, signals: Signals) -> Tensor:
    streams = ("corrupted_kl", "ablated_kl") if credit.reads_kl else ("corrupted_logps", "ablated_logps")
    names = (*streams, "role_ids", "completion_mask")
    return role_contrast(signals["logps"], **{name: signals.get(name) for name in names}, credit=credit).nan_to_num(0.0)


def _weigh(found: Tensor, signals: Signals, credit: CreditConfig) -> Tensor:
    roles, mask = signals["role_ids"], signals["completion_mask"]
    return token_weights(found, roles, mask, advantages=signals["advantages"], credit=credit)


def _with_dead_zone(found: Tensor, credited: Tensor) -> Tensor:
    """Move contrasts toward the mean of their trajectory by the width of the dead zone."""
    n = credited.sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(credited, found, 0.0).sum(1, keepdim=True) / n
    return mean + torch.nn.functional.softshrink(found - mean, DEAD_ZONE)


def blame(rollouts: Rollouts, at_fault: Tensor) -> Tensor:
    """Put the blame of failing responses on some tokens `[N, T]`; responses without any keep weight 1."""
    blamed = at_fault.any(1) & (rollouts.advantages < 0)
    return torch.where(blamed[:, None], emphasis(rollouts, at_fault), rollouts.mask.float())


def wrong_digits(rollouts: Rollouts) -> Tensor:
    """Mark `[N, T]` the digits that the perception states wrong."""
    return _marked(rollouts, rollouts.digit_is_wrong)


def first_error(rollouts: Rollouts) -> Tensor:
    """Mark `[N, T]` where a response first goes wrong: asked digits of the perception, their copies, or the result."""
    problems, ids = rollouts.problems, rollouts.ids
    asked = torch.zeros_like(rollouts.digit_is_wrong).scatter(1, problems.asked, True)
    copies, results = (_follows(ids, word) & rollouts.mask for word in ("is", "="))
    place = (copies.long().cumsum(1) - 1).clamp(0, 1)  # the first copy is of the first digit that was asked
    truth = problems.digits.gather(1, problems.asked).gather(1, place)
    first = results & (ids - task.ZERO != problems.answer[:, None])
    for earlier in (copies & (ids - task.ZERO != truth), _marked(rollouts, rollouts.digit_is_wrong & asked)):
        first = torch.where(earlier.any(1, keepdim=True), earlier, first)
    return first


def _marked(rollouts: Rollouts, digits: Tensor) -> Tensor:
    """Mark `[N, T]` the tokens that state some of the digits `[N, 4]`."""
    return torch.zeros_like(rollouts.mask).scatter(1, rollouts.reading.stated.clamp(min=0), digits)


def _follows(ids: Tensor, word: str) -> Tensor:
    """Mark `[N, T]` the tokens right after a word."""
    return torch.nn.functional.pad(ids[:, :-1] == task.ID[word], (1, 0))


def emphasis(rollouts: Rollouts, up: Tensor) -> Tensor:
    """Return weight 2 on some tokens of both roles and 0.5 on the others, with mean 1 in each response."""
    credited = rollouts.reading.role_ids != Role.OTHER
    raw = torch.where(up, 2.0, 0.5)
    mean = torch.where(credited, raw, 0.0).sum(1, keepdim=True) / credited.sum(1, keepdim=True).clamp(min=1)
    return torch.where(credited, raw / mean, 1.0) * rollouts.mask


def agreement(name: str, weights: Tensor, signals: Signals) -> float:
    """Return the correlation, within responses, of the weights of a method with what they should follow.

    It has the sign that the method promises: negated weights give a negative number. NaN where weights follow nothing.
    """
    followed = _followed(name, signals)
    if followed is None:
        return float("nan")
    counts = signals["completion_mask"] & (signals["advantages"] != 0)[:, None]
    if "role_ids" in METHODS[name].needs:
        counts = counts & (signals["role_ids"] != Role.OTHER)
    n = counts.sum(1, keepdim=True).clamp(min=1)
    x, y = (
        torch.where(counts, v - torch.where(counts, v, 0.0).sum(1, keepdim=True) / n, 0.0) for v in (followed, weights)
    )
    return float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt().clamp(min=1e-12))


def _followed(name: str, signals: Signals) -> Tensor | None:
    """Return the signal that the weights of a method grow with."""
    sign = signals["advantages"].sign()[:, None]
    if name in PRESETS:
        if PRESETS[name].strength == 0.0:
            return None
        return contrast(name, signals) * (sign if PRESETS[name].direction == "advantage" else 1.0)
    if name == "srpo_sibling":
        names = ("completion_ids", "role_ids", "advantages", "group_ids", "completion_mask")
        marked = contradicted_by_sibling(**{name: signals[name] for name in names})
        return sibling_contrast(signals, {"contradicted": marked}, **BY_DIVERGENCE)
    if name == "rlsd":
        return sign * (signals["teacher_logps"] - signals["logps"])
    if name in ("vppo", "pgpo"):
        d = signals["logps"] - signals["corrupted_logps"]
        return (-d).exp() + d
    return signals[{"vgpo": "similarity", "tor": "entropy"}[name]] if name in ("vgpo", "tor") else None
