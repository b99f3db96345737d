"""Token roles of structured completions: `<perception> ... </perception> <think> ... </think> <answer> ... </answer>`.

Tags are found in the text that the tokens spell, never among token ids, and mapped back through character offsets. So
it does not matter how a tokenizer cuts a tag: merged with its neighbours (`.</`, `>\\n\\n`), byte by byte, or as one
special token.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, NoReturn, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch

from srpo.errors import ConfigWarning, DtypeError, RoleParseError, ShapeError, SRPOError, refuse
from srpo.grammar import Mark, Marks, Role, RoleGrammar

__all__ = ["Role", "RoleGrammar", "RoleParse", "Tokenizer", "role_ids_from_completions"]


class Tokenizer(Protocol):
    """Describe the two methods that role parsing needs; every transformers tokenizer has them."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> Any: ...

    def __len__(self) -> int: ...


class RoleParse(NamedTuple):
    """Hold the parsed roles of a batch of completions.

    Args:
        role_ids: [B, T] int8, values of `Role`; tag tokens and masked tokens are 0.
        parsed: [B] bool, True where at least one perception token and one reasoning token exist.
        unclosed: [B] bool, True where an opened tag was never closed (truncated or malformed responses).
        stray: [B] bool, True where a tag was closed that nothing had opened.
    """

    role_ids: torch.Tensor
    parsed: torch.Tensor
    unclosed: torch.Tensor
    stray: torch.Tensor

    @classmethod
    def of(cls, role_ids: torch.Tensor) -> RoleParse:
        """Return the parse of roles `[B, T]` that were found in another way."""
        both = (role_ids == Role.PERCEPTION).any(dim=1) & (role_ids == Role.REASONING).any(dim=1)
        return cls(role_ids, both, torch.zeros_like(both), torch.zeros_like(both))


def role_ids_from_completions(
    completion_ids: torch.Tensor,
    tokenizer: Tokenizer,
    *,
    completion_mask: torch.Tensor | None = None,
    grammar: RoleGrammar = RoleGrammar(),  # noqa: B008 - frozen
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
    role_ids = np.zeros(ids.shape, dtype=np.int8)
    unclosed, stray = np.zeros((2, len(ids)), dtype=bool)
    for row, row_valid in enumerate(valid):
        row_ids = ids[row, row_valid]
        role_ids[row, row_valid], unclosed[row], stray[row] = _row_roles(table, row_ids, grammar)
    parsed = (role_ids == Role.PERCEPTION).any(axis=1) & (role_ids == Role.REASONING).any(axis=1)
    device = completion_ids.device
    return RoleParse(*(torch.from_numpy(array).to(device) for array in (role_ids, parsed, unclosed, stray)))


def token_texts(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """Return what each token of one completion adds to its text.

    Tokens that hold a part of a character, as bytes of an emoji do, add nothing until the one that completes it.
    """
    table = _piece_table(tokenizer)
    known = np.minimum(np.array(ids, dtype=np.int64), table.size)
    table.add(known, tokenizer)
    texts: list[str] = table.pieces[known].tolist()
    held: list[int] = []
    for place, text in enumerate(texts):
        if _BROKEN not in text:
            held = []
            continue
        held.append(place)
        if len(held) > 1:  # together they may spell what none of them does alone
            whole = _joined(tokenizer, [ids[i] for i in held], table.anchor)
            if not whole.endswith(_BROKEN):
                for i in held:
                    texts[i] = ""
                texts[place], held = whole, []
            elif len(held) == _MOST_HELD:
                held = []
    return texts


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


_FAILED: WeakKeyDictionary[Tokenizer, dict[RoleGrammar, int]] = WeakKeyDictionary()
_FIRST_ROLLOUTS = 3
_BROKEN = "\ufffd"  # what a decoder writes for bytes that spell no character
_MOST_HELD = 8  # tokens; the longest character has four bytes


def warn_of_roles_that_never_parse(
    failures: float,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor | None,
    tokenizer: Tokenizer,
    grammar: RoleGrammar,
) -> None:
    """Warn once where the first rollouts that a grammar sees hold no completion with both roles.

    Args:
        failures: share of the completions of this rollout that lack a role, over all ranks.
        completion_ids, completion_mask: of the rollout, for a sample.
        tokenizer: of the policy; counts are kept for as long as it lives.
        grammar: that was used.
    """
    try:
        counts = _FAILED.setdefault(tokenizer, {})
    except TypeError:  # no weak references, or not hashable
        return
    n = counts.get(grammar, 0)
    if not 0 <= n < _FIRST_ROLLOUTS:
        return
    counts[grammar] = n + 1 if failures == 1.0 else -1
    is_first_rank = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if counts[grammar] < _FIRST_ROLLOUTS or not is_first_rank:
        return
    valid = torch.ones_like(completion_ids, dtype=torch.bool) if completion_mask is None else completion_mask != 0
    row = int(valid.sum(dim=1).argmax())
    text = _decode(tokenizer, completion_ids[row][valid[row]].tolist())
    shown = text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"
    names = ", ".join((*grammar.perception_tags, *grammar.reasoning_tags, *grammar.answer_tags))
    message = (
        f"srpo: no completion of the first {n + 1} rollouts has perception and reasoning, so that training is plain "
        f"GRPO while streams are scored. RoleGrammar(form={grammar.form!r}) looks for {names}; a completion reads "
        f"{shown!r}. Ask for the format in the prompt, give the names to role_grammar (opens_with= where the template "
        "opens a tag), or pass a role_func."
    )
    warnings.warn(message, ConfigWarning, stacklevel=3)


def _row_roles(table: _PieceTable, ids: np.ndarray, grammar: RoleGrammar) -> tuple[np.ndarray, bool, bool]:
    """Return the roles [n] of one response's valid tokens, whether a tag was left open, and closed without opening."""
    text = "".join(table.pieces[ids])
    gap_roles, marks, unclosed, stray = _spans(text, grammar)
    if grammar.strict and (unclosed or stray):
        return np.zeros(len(ids), dtype=np.int8), unclosed, stray

    ends = np.cumsum(table.lengths[ids], dtype=np.int64)
    starts = ends - table.lengths[ids]
    gap = np.searchsorted(np.array([mark.end for mark in marks], dtype=np.int64), starts, side="right")
    next_mark = np.array([*(mark.start for mark in marks), len(text) + 1], dtype=np.int64)[gap]
    roles = np.array(gap_roles, dtype=np.int8)[gap]
    roles[(next_mark < ends) | (ids == table.size)] = Role.OTHER
    return roles, unclosed, stray


def _spans(text: str, grammar: RoleGrammar) -> tuple[list[Role], list[Mark], bool, bool]:
    """Return the role of each gap between marks (gap g lies before mark g), the marks, and what was wrong with them."""
    found = Marks.of(grammar)
    marks, headings, stray = found.find(text), grammar.form == "headings", False
    open_tags = _OpenTags()
    if grammar.opens_with is not None and text:
        name = grammar.opens_with.casefold()
        again = marks and marks[0].name == name and not marks[0].closes and not text[: marks[0].start].strip()
        if not again:
            open_tags.open(name, found.roles[name])
    gap_roles = [open_tags.innermost() or Role.OTHER]
    for mark in marks:
        if headings:
            open_tags = _OpenTags()  # a heading ends the one before it
        if not mark.closes:
            open_tags.open(mark.name, found.roles[mark.name])
        elif not open_tags.close(mark.name):
            stray = True
        gap_roles.append(open_tags.innermost() or Role.OTHER)
    return gap_roles, marks, open_tags.innermost() is not None and not headings, stray


class _PieceTable:
    """Hold the text of every token id met so far, and its length in characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer_len = len(tokenizer)
        vocab = getattr(tokenizer, "get_vocab", dict)()  # its ids may have holes and so exceed len()
        self.size = size = max([self.tokenizer_len, *(index + 1 for index in vocab.values())])
        self.pieces = np.full(size + 1, "", dtype=object)  # the last one stands for all ids beyond
        self.lengths = np.zeros(size + 1, dtype=np.int64)
        self._known = np.arange(size + 1) == size
        self.anchor = _find_anchor(tokenizer)
        head = [_continuation(tokenizer, index, self.anchor) for index in range(min(size, 64))]
        # A tokenizer without a decoder joins tokens with spaces that were never in the text.
        self._spaces_are_separators = all(piece.startswith(" ") for piece in head)

    def add(self, ids: np.ndarray, tokenizer: Tokenizer) -> None:
        """Decode the ids that are not in the table yet."""
        if (ids < 0).any():
            fix = "set completion_mask to 0 where ids are padding"
            _refuse(RoleParseError, "completion_ids", f"the valid id {ids.min()}", "ids of at least 0", fix)
        for index in np.unique(ids[~self._known[ids]]).tolist():
            piece = _continuation(tokenizer, index, self.anchor)
            if self._spaces_are_separators:
                piece = piece.removeprefix(" ")
            self.pieces[index] = piece
            self.lengths[index] = len(piece)
            self._known[index] = True


_TABLES: WeakKeyDictionary[Tokenizer, _PieceTable] = WeakKeyDictionary()


def _piece_table(tokenizer: Tokenizer) -> _PieceTable:
    if not (callable(getattr(tokenizer, "decode", None)) and hasattr(tokenizer, "__len__")):
        expected = "an object with decode() and len()"
        _refuse(RoleParseError, "tokenizer", type(tokenizer).__name__, expected, "pass processor.tokenizer")
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
    return _joined(tokenizer, [index], anchor)


def _joined(tokenizer: Tokenizer, ids: list[int], anchor: tuple[int, str] | None) -> str:
    """Return the text that tokens add together in the middle of a response."""
    if anchor is not None:
        text = _decode(tokenizer, [anchor[0], *ids])
        if text.startswith(anchor[1]) and len(text) > len(anchor[1]):
            return text[len(anchor[1]) :]
    return _decode(tokenizer, ids)


def _checked_arrays(completion_ids: Any, completion_mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return ids [B, T] int64 and the validity mask [B, T] bool."""
    if not isinstance(completion_ids, torch.Tensor):
        _refuse(DtypeError, "completion_ids", type(completion_ids).__name__, "a tensor [B, T]", "pad and stack")
    dtype = completion_ids.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        _refuse(DtypeError, "completion_ids", str(dtype), "integer token ids", "call .long()")
    if completion_ids.ndim != 2:
        shape = list(completion_ids.shape)
        _refuse(ShapeError, "completion_ids", f"shape {shape}", "[B, T]", "add the batch dimension with [None]")
    ids = completion_ids.detach().cpu().numpy().astype(np.int64)
    if completion_mask is None:
        return ids, np.ones(ids.shape, dtype=bool)
    if not isinstance(completion_mask, torch.Tensor):
        _refuse(DtypeError, "completion_mask", type(completion_mask).__name__, "a tensor [B, T]", "stack it")
    if completion_mask.shape != completion_ids.shape:
        got, expected = (f"shape {list(t.shape)}" for t in (completion_mask, completion_ids))
        _refuse(ShapeError, "completion_mask", got, expected, "cut it to the completion columns")
    if bool(((completion_mask != 0) & (completion_mask != 1)).any()):
        _refuse(RoleParseError, "completion_mask", "values other than 0 and 1", "0/1", "pass (mask != 0)")
    return ids, (completion_mask != 0).detach().cpu().numpy()


def _refuse(error: type[SRPOError], argument: str, got: str, expected: str, fix: str) -> NoReturn:
    refuse(error, "role_ids_from_completions", argument, got, expected, fix)
