"""What everything that draws checks of its arguments, and of the package that it draws with."""

import importlib
from types import ModuleType
from typing import Any

from srpo.errors import ConfigError, DtypeError, IncompatibleVersionError, describe, house_message, is_int, refuse
from srpo.viz.record import CreditRecord


def check_max_tokens(function: str, max_tokens: Any, usual: int) -> None:
    """Refuse what is no number of tokens to draw.

    Raises: ConfigError.
    """
    if not (is_int(max_tokens) and max_tokens > 0):
        fix = f"pass max_tokens={usual}"
        refuse(ConfigError, function, "max_tokens", describe(max_tokens), "an int of at least 1", fix)


def import_drawer(function: str, module: str, at_least: str) -> ModuleType:
    """Import what draws.

    Raises: IncompatibleVersionError, where the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = module.partition(".")[0]
        expected, fix = f"{name} >= {at_least}", "pip install 'srpo[viz]'"
        raise IncompatibleVersionError(house_message(function, name, "no installation", expected, fix)) from error


def listed_records(function: str, rollouts: Any) -> list[CreditRecord]:
    """Return records as a list; a single one is a list of one.

    Raises: DtypeError, ConfigError for none.
    """
    records = [rollouts] if isinstance(rollouts, CreditRecord) else rollouts
    if not isinstance(records, (list, tuple)) or not all(isinstance(x, CreditRecord) for x in records):
        fix = "make them with srpo.viz.credit_records"
        refuse(DtypeError, function, "rollouts", describe(rollouts), "a list of CreditRecord", fix)
    if not records:
        refuse(ConfigError, function, "rollouts", "none", "at least one CreditRecord", "pass the rollouts of a group")
    return list(records)
