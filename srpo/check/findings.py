"""What was found, as text and as JSON."""

import textwrap
from typing import Any, Literal, NamedTuple


class Finding(NamedTuple):
    """Say what one check found.

    Args:
        name: of the check.
        outcome: `"ok"`; `"note"`, worth knowing; `"WRONG"`, a run would go wrong.
        seen: with the numbers.
        fix: what to do; "" where there is nothing to do.
    """

    name: str
    outcome: Literal["ok", "note", "WRONG"]
    seen: str
    fix: str = ""


class Check:
    """Hold the findings of one model, in the order of the checks; one that needs what failed is not made."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.figures: dict[str, float] = {}

    @property
    def is_good(self) -> bool:
        """Say whether nothing is wrong."""
        return all(finding.outcome != "WRONG" for finding in self.findings)

    def ok(self, name: str, seen: str) -> None:
        """Add what is as it must be."""
        self.findings.append(Finding(name, "ok", seen))

    def note(self, name: str, seen: str, fix: str = "") -> None:
        """Add what is worth knowing."""
        self.findings.append(Finding(name, "note", seen, fix))

    def wrong(self, name: str, seen: str, fix: str) -> None:
        """Add what would make a run go wrong."""
        self.findings.append(Finding(name, "WRONG", seen, fix))

    def text(self, width: int = 80) -> str:
        """Return a line or more for each finding, and the verdict."""
        margin = max((len(finding.name) for finding in self.findings), default=0) + 9
        lines = []
        for name, outcome, seen, fix in self.findings:
            head = f"{outcome:<7}{name:<{margin - 7}}"
            lines += _wrapped(head, seen, width, margin)
            lines += _wrapped(" " * margin, f"-> {fix}", width, margin) if fix else []
        wrong = sum(finding.outcome == "WRONG" for finding in self.findings)
        verdict = f"{wrong} wrong: mend before training" if wrong else "ready to train"
        return "\n".join([*lines, "", verdict])

    def to_json(self) -> dict[str, Any]:
        """Return findings, figures and the verdict as plain data."""
        found = [finding._asdict() for finding in self.findings]
        return {"good": self.is_good, "findings": found, "figures": self.figures}


def _wrapped(head: str, text: str, width: int, margin: int) -> list[str]:
    return textwrap.wrap(
        text, max(width, margin + 20), initial_indent=head, subsequent_indent=" " * margin, break_long_words=False
    )
