"""`credit_table`: rollouts for a terminal of any width, GRPO's advantage of a token beside the weighted one."""

from collections.abc import Sequence
from typing import Any

from srpo.errors import ConfigError, describe, is_int, refuse
from srpo.viz.arguments import check_max_tokens, import_drawer, listed_records
from srpo.viz.page import credit_html, visible
from srpo.viz.record import CreditRecord

STYLES = ("dim", "cyan", "magenta")  # of other, perception and reasoning
_ROLES = ("", "perception", "reasoning")
_NARROW = 64  # below this many columns, role and bar are left out


class CreditTable:
    """Hold rollouts that print as tables, and that notebooks show as a page."""

    def __init__(self, records: Sequence[CreditRecord], width: int | None, max_tokens: int, method: str) -> None:
        self.records, self.width, self.max_tokens, self.method = list(records), width, max_tokens, method

    def __rich_console__(self, console: Any, options: Any) -> Any:
        width = min(options.max_width, self.width or options.max_width)
        for place, record in enumerate(self.records):
            if place:
                yield ""
            if len(self.records) > 1:
                yield _headline(record)
            yield _table(record, width, self.max_tokens, self.method)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=self.width, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip("\n")

    def _repr_html_(self) -> str:
        return credit_html(self.records, method=self.method)._repr_html_()


def credit_table(
    rollouts: CreditRecord | Sequence[CreditRecord],
    *,
    width: int | None = None,
    max_tokens: int = 64,
    method: str = "SRPO",
) -> CreditTable:
    """Make tables for a terminal: token, role, contrast, GRPO's advantage, weight, and the weighted advantage.

    Args:
        rollouts: one or several.
        width: columns, at least 24; None: those of the terminal. Below 64 role and bar are left out.
        max_tokens: tokens of a rollout that are listed; the number of the others is said.
        method: what made the weights.

    Returns: CreditTable: `print` it, or give it to a rich console; notebooks show the page of `credit_html`.

    Raises: DtypeError, ConfigError; IncompatibleVersionError without rich.

    Example:
        >>> from srpo.viz import CreditRecord
        >>> record = CreditRecord(tokens=("a", " cat"), weights=(0.8, 1.2), roles=(0, 1), advantage=0.5)
        >>> print(credit_table(record, width=60))
        token   contrast     GRPO   weight     SRPO
        ───────────────────────────────────────────
        a                  +0.500     0.80   +0.400
        cat                +0.500     1.20   +0.600
    """
    records = listed_records("credit_table", rollouts)
    if width is not None and not (is_int(width) and width >= 24):
        refuse(ConfigError, "credit_table", "width", describe(width), "None or an int of at least 24", "pass width=80")
    check_max_tokens("credit_table", max_tokens, 64)
    import_drawer("credit_table", "rich", "13")
    return CreditTable(records, width, max_tokens, method)


def _headline(record: CreditRecord) -> Any:
    from rich.text import Text

    facts = [] if record.reward is None else [f"reward {record.reward:.3g}"]
    facts += [f"advantage {record.advantage:+.3f}"] if isinstance(record.advantage, float | int) else []
    return Text("  ".join([*facts, f"{len(record.tokens)} tokens"]), "bold")


def _table(record: CreditRecord, width: int, max_tokens: int, method: str) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    wide = width >= _NARROW
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False, width=None)
    table.add_column("token", overflow="fold", max_width=max(6, width - 35 - 26 * wide))
    if wide:
        table.add_column("role", no_wrap=True)
    for heading in ("contrast", "GRPO", "weight", method):
        table.add_column(heading, justify="right", no_wrap=True)
    if wide:
        table.add_column("", no_wrap=True)
    n = len(record.tokens)
    rows = zip(
        record.tokens, record.roles or (0,) * n, record.contrast or (None,) * n, record.advantages, record.weights,
        strict=True,
    )  # fmt: skip
    for _, (text, role, contrast, advantage, weight) in zip(range(max_tokens), rows, strict=False):
        known, factor = role > 0, weight or 0.0
        shown = visible(text).strip().replace("\n", "↵").replace("\t", "⇥") or ("↵" if "\n" in text else "·")
        cells = [Text(shown)]
        cells += [Text(_ROLES[role])] if wide else []
        cells += [Text(signed(contrast, 2) if known else ""), Text(signed(advantage, 3)), Text(f"{factor:.2f}")]
        cells += [Text(signed(None if advantage is None else advantage * factor, 3))]
        cells += [Text("━" * min(12, round(8 * factor)) if known else "")] if wide else []
        table.add_row(*cells, style=STYLES[role])
    if n > max_tokens:
        table.add_row(Text(f"... {n - max_tokens} more"), style="dim")
    return table


def signed(value: float | None, digits: int) -> str:
    """Format a number with its sign, but no "-0.00"; "" for None."""
    return "" if value is None else f"{round(value, digits) + 0.0:+.{digits}f}"
