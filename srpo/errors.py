"""The typed errors and warnings of `srpo`.

Each error is also the built-in exception it resembles, so `except ValueError` keeps working. A message says what was
called, which argument, what it got, what it expected, and one fix: `refuse` is the one place that writes it.
"""

import difflib
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, Literal, NoReturn, TypeGuard, TypeVar, get_args, get_origin

from torch import Tensor


class SRPOError(Exception):
    """Base of every error that `srpo` raises on purpose."""


class ShapeError(SRPOError, ValueError):
    """A tensor has the wrong rank or size."""


class DtypeError(SRPOError, TypeError):
    """An argument has the wrong dtype or type."""


class DeviceError(SRPOError, ValueError):
    """Tensors live on different devices, or are sharded over several."""


class ConfigError(SRPOError, ValueError):
    """A setting, or a combination of arguments, has no meaning."""


class UnknownNameError(ConfigError, KeyError):
    """A table of names, such as `PRESETS`, does not hold this one."""

    __str__ = Exception.__str__  # a KeyError shows its message in quotes


class KernelUnavailableError(SRPOError, RuntimeError):
    """The Triton kernels cannot run here."""


class RoleParseError(SRPOError, ValueError):
    """Role ids, masks or completion ids hold values that have no meaning."""


class NonFiniteError(SRPOError, ValueError):
    """A value that must be finite is not."""


class IncompatibleVersionError(SRPOError, ImportError):
    """Another library lacks what an integration builds on."""


class ConfigWarning(UserWarning):
    """A setting that is legal and known to go wrong."""


def refuse(error: type[SRPOError], function: str, argument: str, got: str, expected: str, fix: str) -> NoReturn:
    """Raise `error` with the house message."""
    raise error(house_message(function, argument, got, expected, fix))


def house_message(function: str, argument: str, got: str, expected: str, fix: str) -> str:
    """Say what was called, which argument, what it got, what fits, and one fix."""
    return f"{function}(): {argument} got {got}, expected {expected}; {fix}."


def nearest(name: object, known: Iterable[str], default: str) -> str:
    """Return the known name that was probably meant: a close one, else `default`."""
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)), default)


class Table(dict[str, Any]):
    """Settings by name; an unknown name is a typed error with the nearest one. `title` is what the table is called."""

    def __init__(self, title: str, entries: dict[str, Any]) -> None:
        super().__init__(entries)
        self._title = title

    def __missing__(self, name: object) -> NoReturn:
        expected = "one of " + ", ".join(map(repr, self))
        close = nearest(name, self, next(iter(self)))
        raise UnknownNameError(f"{self._title}[...]: the name got {name!r}, expected {expected}; write {close!r}.")


def describe(x: Any) -> str:
    """Return dtype and shape of a tensor, or type and value of anything else."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    return f"{type(x).__name__} {x!r}"[:80]


def is_int(x: Any) -> TypeGuard[int]:
    """Say whether `x` is a Python int; a bool is none."""
    return isinstance(x, int) and not isinstance(x, bool)


def is_number(x: Any) -> TypeGuard[float]:
    """Say whether `x` is a finite Python number; a bool is none."""
    return (is_int(x) or isinstance(x, float)) and math.isfinite(x)


_T = TypeVar("_T")
_KINDS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda x: isinstance(x, bool), "True or False"),
    int: (is_int, "an int"),
    float: (is_number, "a finite number"),
    int | None: (lambda x: x is None or is_int(x), "None or an int"),
    float | None: (lambda x: x is None or is_number(x), "None or a finite number"),
}


def checked_fields(cls: type[_T]) -> type[_T]:
    """Decorate a settings dataclass: read off its annotations what `check_fields` asks of each field.

    Once for the class: torch.compile can follow the checks of an instance, not the annotations. A name that is no field
    is refused with the nearest one; `cls.OTHER_NAMES` knows what other libraries call a field.
    """
    rules = []
    for field in fields(cls):  # pyright: ignore[reportArgumentType]
        if get_origin(field.type) is Literal:
            options = get_args(field.type)
            rules.append((field.name, options, None, "one of " + ", ".join(map(repr, options))))
        elif field.type in _KINDS:
            rules.append((field.name, None, *_KINDS[field.type]))
    cls._field_rules = tuple(rules)  # pyright: ignore[reportAttributeAccessIssue]
    names = [field.name for field in fields(cls)]  # pyright: ignore[reportArgumentType]
    inner = cls.__init__

    @functools.wraps(inner)
    def init(self: Any, *arguments: Any, **settings: Any) -> None:
        for name, value in settings.items():
            if name not in names:
                meant = getattr(cls, "OTHER_NAMES", {}).get(name) or nearest(name, names, "")
                fix = f"write {meant}" if meant else "leave it out"
                refuse(ConfigError, cls.__name__, name, describe(value), "a setting: " + ", ".join(names), fix)
        inner(self, *arguments, **settings)

    cls.__init__ = init
    return cls


def check_fields(settings: Any) -> None:
    """Check each field of a settings dataclass against its annotation: choices, numbers, flags, None where allowed.

    Raises: ConfigError, which proposes the default.
    """
    for name, options, fits, expected in settings._field_rules:
        value = getattr(settings, name)
        holds = isinstance(value, str) and value in options if fits is None else fits(value)
        require(settings, name, holds, expected)


def require(settings: Any, name: str, holds: bool, expected: str, fix: str = "") -> None:
    """Refuse the value of a field of a settings dataclass unless a condition holds.

    Raises: ConfigError, which proposes `fix`, or the default.
    """
    if not holds:
        default = next(field.default for field in fields(settings) if field.name == name)
        fix = fix or f"try {name}={default!r}"
        refuse(ConfigError, type(settings).__name__, name, repr(getattr(settings, name))[:80], expected, fix)
