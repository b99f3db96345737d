"""Which marks in a completion carry which role: tags, tags in brackets, or headings."""

import re
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Literal, NamedTuple

from srpo.errors import check_fields, checked_fields, require

_NAME = re.compile(r"[\w.:-]+")


class Role(IntEnum):
    """Name what a completion token does; the values are those of `role_ids`."""

    OTHER = 0
    PERCEPTION = 1
    REASONING = 2


@checked_fields
@dataclass(frozen=True)
class RoleGrammar:
    """Say which marks carry which role.

    Args:
        perception_tags: names whose `<name> ... </name>` spans are perception; matched without regard to case.
        reasoning_tags: names whose spans are reasoning.
        answer_tags: names whose spans get `answer_role`; may be empty.
        answer_role: role of answer tokens.
        strict: True makes a response with a tag that is never closed, or closed but never opened, unstructured
            (every role 0) instead of letting the span run to the last valid token.
        form: `"tags"`, `<name> ... </name>`, attributes allowed; `"brackets"`, `[name] ... [/name]`; `"headings"`, a
            line that begins with `Name:`, `**Name:**` or `# Name`, whose span runs to the next heading or the end.
        opens_with: a name that the chat template has opened before the completion begins (`"think"`); a completion
            that begins with the same mark opens it once.

    Raises:
        ConfigError: a name that is empty, repeated or not made of letters, digits and `_.:-`; a role without names.
    """

    perception_tags: tuple[str, ...] = (
        "perception",
        "description",
        "info",
        "caption",
        "observe",
        "observation",
        "visual",
        "look",
        "see",
    )
    reasoning_tags: tuple[str, ...] = ("think", "reasoning", "reason", "analysis")
    answer_tags: tuple[str, ...] = ("answer", "conclusion")
    answer_role: Role = Role.REASONING
    strict: bool = False
    form: Literal["tags", "brackets", "headings"] = "tags"
    opens_with: str | None = None

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for field in ("perception_tags", "reasoning_tags", "answer_tags"):
            names = getattr(self, field)
            holds = isinstance(names, tuple) and bool(names or field == "answer_tags")
            require(self, field, holds, "a tuple of tag names", f"write {field}=('name',)")
            for name in names:
                holds = isinstance(name, str) and _NAME.fullmatch(name) is not None
                require(self, field, holds, "names of letters, digits and _.:-", "drop brackets and spaces")
                once = name.casefold() not in seen
                require(self, field, once, "each name once over all roles (case is ignored)", f"keep one {name!r}")
                seen.add(name.casefold())
        fix = "pass Role.REASONING, Role.PERCEPTION or Role.OTHER"
        require(self, "answer_role", isinstance(self.answer_role, Role), "a Role", fix)
        check_fields(self)
        known = isinstance(self.opens_with, str | None) and (self.opens_with or "").casefold() in {"", *seen}
        require(self, "opens_with", known and self.opens_with != "", "None, or one of the names", "write 'think'")


class Mark(NamedTuple):
    """One tag or heading in a text: where it lies, what it is called, and whether it closes."""

    start: int
    end: int
    name: str
    closes: bool


class Marks(NamedTuple):
    """Find the marks of a grammar in texts."""

    pattern: re.Pattern[str]
    names: tuple[str, ...]
    roles: dict[str, Role]

    @staticmethod
    @lru_cache(maxsize=64)
    def of(grammar: RoleGrammar) -> "Marks":
        """Compile a grammar."""
        roles = {name.casefold(): Role.PERCEPTION for name in grammar.perception_tags}
        roles |= {name.casefold(): Role.REASONING for name in grammar.reasoning_tags}
        roles |= {name.casefold(): grammar.answer_role for name in grammar.answer_tags}
        return Marks(re.compile(_PATTERNS[grammar.form](_either(roles)), _FLAGS), tuple(roles), roles)

    def find(self, text: str) -> list[Mark]:
        """Return the marks of a text in order."""
        found = self.pattern.finditer(text)
        # group 1 says whether a tag closes, the group of each name comes after
        return [Mark(*x.span(), self.names[(x.lastindex or 2) - 2], x[1] == "/") for x in found]


_FLAGS = re.IGNORECASE | re.ASCII | re.MULTILINE


def _either(names: dict[str, Role]) -> str:
    """Match any name, each in a group of its own. An ASCII name takes ASCII alone: no Kelvin sign in `think`."""
    return "|".join(f"({re.escape(x)})" if x.isascii() else f"((?u:{re.escape(x)}))" for x in names)


def _tag(left: str, right: str, either: str) -> str:
    # Possessive `*+` keeps long runs of spaces linear.
    value = rf"""(?:"[^"{left}{right}]*+"|'[^'{left}{right}]*+'|[^\s"'{left}{right}]++)"""
    attributes = rf"(?:\s++[\w:.-]++\s*+=\s*+{value})*+"
    return rf"{left}\s*+(/?)\s*+(?:{either}){attributes}\s*+{right}"


def _heading(either: str) -> str:
    """Match `Name:` at the beginning of a line, also bold or after `#`; behind `#` the colon may be missing."""
    return rf"^[ \t]*+(\#{{1,6}}[ \t]++)?[*_]{{0,3}}(?:{either})[*_]{{0,3}}[ \t]*+(?::[*_]{{0,3}}|(?(1)$|(?!)))"


_PATTERNS = {
    "tags": lambda either: _tag("<", ">", either),
    "brackets": lambda either: _tag(r"\[", r"\]", either),
    "headings": _heading,
}
