"""Token roles of structured completions: `<perception> ... </perception> <think> ... </think> <answer> ... </answer>`.

Tags are found in the text that the tokens spell, never among token ids, and mapped back through character offsets. So
it does not matter how a tokenizer cuts a tag: merged with its neighbours (`.</`, `>\\n\\n`), byte by byte, or as one
special token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch

from srpo.errors import ConfigError, DtypeError, RoleParseError, ShapeError

_TAG_NAME = re.compile(r"[A-Za-z0-9_.:-]+")


class Role(IntEnum):
    """Name what a completion token does; the values are those of `role_ids`."""

    OTHER = 0
    PERCEPTION = 1
    REASONING = 2


class Tokenizer(Protocol):
    """Describe the two methods that role parsing needs; every transformers tokenizer has them."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> Any: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class RoleGrammar:
    """Say which tags carry which role.

    Args:
        perception_tags: names whose `<name> ... </name>` spans are perception; matched without regard to case.
        reasoning_tags: names whose spans are reasoning.
        answer_tags: names whose spans get `answer_role`; may be empty.
        answer_role: role of answer tokens.
        strict: True makes a response with a tag that is never closed, or closed but never opened, unstructured
            (every role 0) instead of letting the span run to the last valid token.

    Raises:
        ConfigError: a name that is empty, repeated or not made of ASCII letters, digits and `_.:-`; a role without
            names.
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

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for field in ("perception_tags", "reasoning_tags", "answer_tags"):
            names = getattr(self, field)
            if not isinstance(names, tuple) or not (names or field == "answer_tags"):
                _refuse(field, names, "a tuple of tag names", f"write {field}=('name',)")
            for name in names:
                if not isinstance(name, str) or not _TAG_NAME.fullmatch(name):
                    _refuse(field, name, "names of ASCII letters, digits and _.:-", "drop brackets and spaces")
                if name.lower() in seen:
                    _refuse(field, name, "each name once over all roles (case is ignored)", "remove one of the two")
                seen.add(name.lower())
        if not isinstance(self.answer_role, Role):
            _refuse("answer_role", self.answer_role, "a Role", "pass Role.REASONING, Role.PERCEPTION or Role.OTHER")
        if not isinstance(self.strict, bool):
            _refuse("strict", self.strict, "a bool", "pass strict=True or strict=False")


class RoleParse(NamedTuple):
    """Hold the parsed roles of a batch of completions.

    Args:
        role_ids: [B, T] int8, values of `Role`; tag tokens and masked tokens are 0.
        parsed: [B] bool, True where at least one perception token and one reasoning token exist.
        unclosed: [B] bool, True where an opened tag was never closed (truncated or malformed responses).
    """

    role_ids: torch.Tensor
    parsed: torch.Tensor
    unclosed: torch.Tensor


def role_ids_from_completions(
    completion_ids: torch.Tensor,
    tokenizer: Tokenizer,
    *,
    completion_mask: torch.Tensor | None = None,
    grammar: RoleGrammar = RoleGrammar(),
) -> RoleParse:
    """Label every completion token as perception, reasoning or other.

    The innermost open tag decides; spans of one role are united; a closing tag closes the nearest open tag of its own
    name and is ignored when there is none; a tag that is never closed runs to the last valid token. Tag tokens, and
    tokens that share a character with a tag, are OTHER. Masked tokens (padding, tool output) take no part in the text.

    Args:
        completion_ids: [B, T] integer token ids, any device.
        tokenizer: object with `decode` and `len`; its pieces are cached for as long as it lives.
        completion_mask: [B, T] of 0/1, any dtype; None counts every token, padding included.
        grammar: tag names and their roles.

    Returns:
        RoleParse on the device of `completion_ids`.

    Raises:
        ShapeError: `completion_ids` is not [B, T], or the mask has another shape.
        DtypeError: ids that are not integers, or an argument that is not a tensor.
        RoleParseError: mask values other than 0/1, valid ids below 0, an unusable tokenizer.

    Example:
        >>> class Characters:
        ...     def __len__(self):
        ...         return 128
        ...
        ...     def decode(self, ids, **_):
        ...         return "".join(map(chr, ids))
        >>> ids = torch.tensor([[ord(c) for c in "<see>cat</see><think>1</think>"]])
        >>> role_ids_from_completions(ids, Characters()).role_ids.unique(return_counts=True)
        (tensor([0, 1, 2], dtype=torch.int8), tensor([26,  3,  1]))
    """
    ids, valid = _checked_arrays(completion_ids, completion_mask)
    table = _piece_table(tokenizer)
    ids = np.minimum(ids, table.size)
    table.add(ids[valid], tokenizer)
    tags = _TagSet.of(grammar)
    role_ids = np.zeros(ids.shape, dtype=np.int8)
    unclosed = np.zeros(len(ids), dtype=bool)
    for row, row_valid in enumerate(valid):
        row_ids = ids[row, row_valid]
        role_ids[row, row_valid], unclosed[row] = _row_roles(table, row_ids, tags)
    parsed = (role_ids == Role.PERCEPTION).any(axis=1) & (role_ids == Role.REASONING).any(axis=1)
    device = completion_ids.device
    return RoleParse(*(torch.from_numpy(array).to(device) for array in (role_ids, parsed, unclosed)))


class _TagSet(NamedTuple):
    pattern: re.Pattern[str]
    roles: dict[str, Role]
    strict: bool

    @staticmethod
    @lru_cache(maxsize=64)
    def of(grammar: RoleGrammar) -> _TagSet:
        roles = {name.lower(): Role.PERCEPTION for name in grammar.perception_tags}
        roles |= {name.lower(): Role.REASONING for name in grammar.reasoning_tags}
        roles |= {name.lower(): grammar.answer_role for name in grammar.answer_tags}
        names = "|".join(map(re.escape, roles))
        # Possessive `*+` keeps long runs of spaces linear; without ASCII, "<thin\u212a>" (Kelvin sign) would match.
        pattern = re.compile(rf"<\s*+(/?)\s*+({names})\s*+>", re.IGNORECASE | re.ASCII)
        return _TagSet(pattern, roles, grammar.strict)


class _OpenTags:
    """Keep the open tags of one response; opening and closing take constant time however deep they nest."""

    def __init__(self) -> None:
        self._stack: list[tuple[int, Role]] = []
        self._open_by_name: dict[str, list[int]] = {}
        self._closed: set[int] = set()
        self._opened = 0

    def open(self, name: str, role: Role) -> None:
        self._stack.append((self._opened, role))
        self._open_by_name.setdefault(name, []).append(self._opened)
        self._opened += 1

    def close(self, name: str) -> bool:
        """Close the nearest open tag of this name; return False when there is none."""
        same_name = self._open_by_name.get(name)
        if not same_name:
            return False
        self._closed.add(same_name.pop())
        while self._stack and self._stack[-1][0] in self._closed:
            self._stack.pop()
        return True

    def innermost(self) -> Role | None:
        return self._stack[-1][1] if self._stack else None


def _row_roles(table: _PieceTable, ids: np.ndarray, tags: _TagSet) -> tuple[np.ndarray, bool]:
    """Return the roles [n] of one response's valid tokens, and whether a tag was left open."""
    text = "".join(table.pieces[ids])
    open_tags = _OpenTags()
    gap_roles = [Role.OTHER]  # gap g lies between tag g-1 and tag g
    tag_starts: list[int] = []
    tag_ends: list[int] = []
    orphan_close = False
    for match in tags.pattern.finditer(text):
        name = match[2].lower()
        if not match[1]:
            open_tags.open(name, tags.roles[name])
        elif not open_tags.close(name):
            orphan_close = True
        tag_starts.append(match.start())
        tag_ends.append(match.end())
        gap_roles.append(open_tags.innermost() or Role.OTHER)
    unclosed = open_tags.innermost() is not None
    if tags.strict and (unclosed or orphan_close):
        return np.zeros(len(ids), dtype=np.int8), unclosed

    ends = np.cumsum(table.lengths[ids], dtype=np.int64)
    starts = ends - table.lengths[ids]
    gap = np.searchsorted(np.array(tag_ends, dtype=np.int64), starts, side="right")
    next_tag_start = np.array([*tag_starts, len(text) + 1], dtype=np.int64)[gap]
    roles = np.array(gap_roles, dtype=np.int8)[gap]
    roles[(next_tag_start < ends) | (ids == table.size)] = Role.OTHER
    return roles, unclosed


class _PieceTable:
    """Hold the text of every token id met so far, and its length in characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer_len = len(tokenizer)
        vocab = getattr(tokenizer, "get_vocab", dict)()  # its ids may have holes and so exceed len()
        self.size = size = max([self.tokenizer_len, *(index + 1 for index in vocab.values())])
        self.pieces = np.full(size + 1, "", dtype=object)  # the last one stands for all ids beyond
        self.lengths = np.zeros(size + 1, dtype=np.int64)
        self._known = np.arange(size + 1) == size
        self._anchor = _find_anchor(tokenizer)
        head = [_continuation(tokenizer, index, self._anchor) for index in range(min(size, 64))]
        # A tokenizer without a decoder joins tokens with spaces that were never in the text.
        self._spaces_are_separators = all(piece.startswith(" ") for piece in head)

    def add(self, ids: np.ndarray, tokenizer: Tokenizer) -> None:
        """Decode the ids that are not in the table yet."""
        if (ids < 0).any():
            raise RoleParseError(
                f"role_ids_from_completions(): completion_ids got the valid id {ids.min()}, expected ids of at "
                f"least 0; set completion_mask to 0 where ids are padding"
            )
        for index in np.unique(ids[~self._known[ids]]).tolist():
            piece = _continuation(tokenizer, index, self._anchor)
            if self._spaces_are_separators:
                piece = piece.removeprefix(" ")
            self.pieces[index] = piece
            self.lengths[index] = len(piece)
            self._known[index] = True


_TABLES: WeakKeyDictionary[Tokenizer, _PieceTable] = WeakKeyDictionary()


def _piece_table(tokenizer: Tokenizer) -> _PieceTable:
    if not (callable(getattr(tokenizer, "decode", None)) and hasattr(tokenizer, "__len__")):
        raise RoleParseError(
            f"role_ids_from_completions(): tokenizer got {type(tokenizer).__name__}, expected an object with decode() "
            f"and len(); pass processor.tokenizer"
        )
    try:
        table = _TABLES.get(tokenizer)
    except TypeError:  # no weak references, or not hashable: correct, but decoded anew on each call
        return _PieceTable(tokenizer)
    if table is None or table.tokenizer_len != len(tokenizer):
        table = _TABLES[tokenizer] = _PieceTable(tokenizer)
    return table


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _find_anchor(tokenizer: Tokenizer) -> tuple[int, str] | None:
    """Find a plain token to decode others behind: many decoders strip the first token's space or keep its `##`."""
    for index in range(min(len(tokenizer), 4096)):
        text = _decode(tokenizer, [index])
        if text.isascii() and text.isalnum():
            return index, text
    return None


def _continuation(tokenizer: Tokenizer, index: int, anchor: tuple[int, str] | None) -> str:
    """Return the text that a token adds in the middle of a response."""
    if anchor is not None:
        text = _decode(tokenizer, [anchor[0], index])
        if text.startswith(anchor[1]) and len(text) > len(anchor[1]):
            return text[len(anchor[1]) :]
    return _decode(tokenizer, [index])


def _checked_arrays(completion_ids: Any, completion_mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return ids [B, T] int64 and the validity mask [B, T] bool."""
    if not isinstance(completion_ids, torch.Tensor):
        raise DtypeError(_message("completion_ids", type(completion_ids).__name__, "a tensor [B, T]", "pad and stack"))
    dtype = completion_ids.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise DtypeError(_message("completion_ids", dtype, "integer token ids", "call .long()"))
    if completion_ids.ndim != 2:
        shape = list(completion_ids.shape)
        raise ShapeError(_message("completion_ids", f"shape {shape}", "[B, T]", "add the batch dimension with [None]"))
    ids = completion_ids.detach().cpu().numpy().astype(np.int64)
    if completion_mask is None:
        return ids, np.ones(ids.shape, dtype=bool)
    if not isinstance(completion_mask, torch.Tensor):
        raise DtypeError(_message("completion_mask", type(completion_mask).__name__, "a tensor [B, T]", "stack it"))
    if completion_mask.shape != completion_ids.shape:
        got, expected = (f"shape {list(t.shape)}" for t in (completion_mask, completion_ids))
        raise ShapeError(_message("completion_mask", got, expected, "cut it to the completion columns"))
    if bool(((completion_mask != 0) & (completion_mask != 1)).any()):
        raise RoleParseError(_message("completion_mask", "values other than 0 and 1", "0/1", "pass (mask != 0)"))
    return ids, (completion_mask != 0).detach().cpu().numpy()


def _message(argument: str, got: object, expected: str, fix: str) -> str:
    return f"role_ids_from_completions(): {argument} got {got}, expected {expected}; {fix}"


def _refuse(field: str, got: object, expected: str, fix: str) -> None:
    raise ConfigError(f"RoleGrammar(): {field} got {got!r}, expected {expected}; {fix}")
