"""The settings of the credit stage as a trainer's own config holds them: names, numbers, mappings."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NoReturn, Self

from srpo.config import PRESETS, CreditConfig
from srpo.errors import ConfigError, is_int, refuse
from srpo.methods import METHODS, Method, linear_strength
from srpo.roles import Role, RoleGrammar
from srpo.vision import corruption as corruptions

_AT_HAND = {
    "role_ids",
    "corrupted_logps",
    "corrupted_kl",
    "ablated_logps",
    "advantages",
    "entropy",
}  # signals of a method
_CORRUPTIONS = tuple(name for name in corruptions.__all__ if name != "PixelLayout")


@dataclass(frozen=True)
class CreditSettings:
    """Hold the settings of the credit stage.

    Args:
        credit: a `CreditConfig`, or a method of `srpo.METHODS` that reads log-probs alone.
        credit_anneal_steps: steps over which the strength of the weights falls linearly to 0; None: constant.
        role_grammar: the tags of the roles.
        corruption: one of `srpo.vision.corruption`.
        ablated_positions: `"keep"` leaves the other tokens at their positions when the perception is cut out;
            `"close"` closes the gap, for attention that takes a gap for the start of another sequence.
    """

    credit: CreditConfig | Method = PRESETS["srpo"]
    credit_anneal_steps: int | None = None
    role_grammar: RoleGrammar = RoleGrammar()  # noqa: RUF009 - frozen
    corruption: Any = corruptions.PatchMask()  # noqa: RUF009 - frozen
    ablated_positions: Literal["keep", "close"] = "keep"

    @classmethod
    def of(cls, section: Mapping[str, Any] | None) -> Self:
        """Read the settings from a section of a config.

        Args:
            section: any of the fields; missing ones, and None, have their defaults. `credit` is a name, or fields of
                `CreditConfig` beside a `preset`, or `kl="full"` beside a `preset` that is a method with a divergence;
                `role_grammar` is fields of `RoleGrammar`; `corruption` is a name, or settings beside a `name`. What the
                fields hold in the end is taken as it is.

        Raises: ConfigError.
        """
        given = {name: x for name, x in _plain(section or {}).items() if x is not None}
        if "hidden_positions" in given:
            message = (
                "srpo: the setting hidden_positions is now ablated_positions; the old name goes with the next release"
            )
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            given["ablated_positions"] = given.pop("hidden_positions")
        if given.pop("seed", None) is not None:
            message = "srpo: the setting seed does nothing any more: a picture and its prompt seed their corruption"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
        _check_names("section", given, [field.name for field in fields(cls)])
        readers = {"credit": _credit_of, "role_grammar": _grammar_of, "corruption": _corruption_of}
        settings = cls(**{name: readers[name](x) if name in readers else x for name, x in given.items()})
        if settings.ablated_positions not in ("keep", "close"):
            _refuse("ablated_positions", settings.ablated_positions, "'keep' or 'close'")
        if settings.credit_anneal_steps is not None:
            _check_int("credit_anneal_steps", settings.credit_anneal_steps, 1)
        return settings

    def credit_at(self, step: int) -> CreditConfig | Method:
        """Return the credit settings, or the method, with the strength that it has after `step` steps."""
        credit, steps = self.credit, self.credit_anneal_steps
        if steps is None or not isinstance(credit, CreditConfig):
            return credit
        return replace(credit, strength=linear_strength(step, initial=credit.strength, steps=steps))

    def streams_at(self, step: int) -> tuple[str, ...]:
        """Name the contrast streams that are read: `"corrupted"`, `"ablated"`, both or none."""
        return self.credit_at(step).streams


def check_log_probs_alone(settings: CreditSettings, function: str) -> None:
    """Refuse what engines that score a row by itself, and return log-probs of its tokens alone, cannot do.

    A divergence needs both rows of the vocabulary at one place, and `ShuffleImages` the pictures of the whole batch.

    Raises: ConfigError, in the name of `function`.
    """
    if settings.credit.reads_kl:
        expected = "a contrast of the sampled tokens, which is all that the workers return"
        refuse(ConfigError, function, "contrast_kind", "'kl'", expected, "use contrast_kind='k3'")
    if not getattr(settings.corruption, "is_per_picture", False):
        got, expected = type(settings.corruption).__name__, "one that treats each picture by itself"
        refuse(ConfigError, function, "corruption", got, expected, "use 'PatchMask'")


def _credit_of(x: Any) -> CreditConfig | Method:
    if isinstance(x, CreditConfig):
        return x
    if isinstance(x, Mapping):
        own = dict(x)
        preset = own.pop("preset", "srpo")
        if set(own) == {"kl"} and getattr(METHODS.get(preset), "kl", None) is not None:
            return METHODS[preset].with_kl(own["kl"])
        _check_names("credit", own, [field.name for field in fields(CreditConfig)])
        if preset not in PRESETS:
            _refuse("credit.preset", preset, "one of " + ", ".join(PRESETS))
        return replace(PRESETS[preset], **own)
    usable = [name for name, m in METHODS.items() if not m.adds_a_term and set(m.needs) <= _AT_HAND]
    if not isinstance(x, str) or x not in {*PRESETS, *usable}:
        _refuse("credit", x, "fields of CreditConfig, or one of " + ", ".join(dict.fromkeys([*PRESETS, *usable])))
    return PRESETS[x] if x in PRESETS else METHODS[x]


def _grammar_of(x: Any) -> RoleGrammar:
    if isinstance(x, RoleGrammar):
        return x
    own = dict(_mapping("role_grammar", x))
    _check_names("role_grammar", own, [field.name for field in fields(RoleGrammar)])
    if "answer_role" in own:
        name = str(own["answer_role"]).upper()
        if name not in Role.__members__:
            _refuse("role_grammar.answer_role", own["answer_role"], "reasoning, perception or other")
        own["answer_role"] = Role[name]
    return RoleGrammar(**own)


def _corruption_of(x: Any) -> Any:
    if not isinstance(x, type) and callable(getattr(x, "on_inputs", None)):
        return x
    own = {"name": x} if isinstance(x, str) else dict(_mapping("corruption", x))
    name = own.pop("name", None)
    if name not in _CORRUPTIONS:
        _refuse("corruption.name", name, "one of " + ", ".join(_CORRUPTIONS))
    kind = getattr(corruptions, name)
    _check_names("corruption", own, [field.name for field in fields(kind)])
    return kind(**own)


def _plain(x: Any) -> Any:
    """Turn the containers of a config library into dicts and tuples."""
    if isinstance(x, Mapping):
        return {str(name): _plain(x[name]) for name in x}
    return tuple(map(_plain, x)) if isinstance(x, Sequence) and not isinstance(x, str) else x


def _mapping(name: str, x: Any) -> Mapping[str, Any]:
    return x if isinstance(x, Mapping) else _refuse(name, x, "a mapping")


def _check_names(section: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            _refuse(section, name, "one of " + ", ".join(known))


def _check_int(name: str, x: Any, lowest: int) -> None:
    if not is_int(x) or x < lowest:
        _refuse(name, x, f"an int of at least {lowest}")


def _refuse(name: str, got: Any, expected: str) -> NoReturn:
    refuse(ConfigError, "CreditSettings.of", name, repr(got), expected, "leave it out for the default")
