"""What is drawn and kept of a rollout: `CreditRecord`, made of tensors and a tokenizer, in and out of JSON lines."""

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor

from srpo import checks
from srpo.config import CreditConfig
from srpo.credit import role_contrast
from srpo.errors import (
    ConfigError,
    DtypeError,
    ShapeError,
    SRPOError,
    describe,
    is_int,
    nearest,
    refuse,
)
from srpo.methods import Method
from srpo.roles import RoleParse, Tokenizer, token_texts
from srpo.rollout import ScoredStreams, contrast_of_picture, divergences_of

Values = tuple[float | None, ...]
PER_TOKEN = ("weights", "roles", "logps", "corrupted_logps", "ablated_logps", "contrast", "sampled")
_NUMBERS = (*PER_TOKEN, "advantage", "reward")
_PICTURES = ("images", "corrupted_images")
_PICTURE_KINDS = ("data:image/png;base64,", "data:image/jpeg;base64,", "data:image/webp;base64,")
_MOST_PIXELS = 448  # on the longer side of a picture that is kept


@dataclass(frozen=True)
class CreditRecord:
    """Hold one rollout with its credit as plain data: text and numbers of T tokens.

    Args:
        tokens: what each token adds to the text; "" where a later token completes a character.
        weights: of each token, at least 0.
        roles: 0 other, 1 perception, 2 reasoning; None: no roles.
        logps, corrupted_logps, ablated_logps: nats in each context; None for a token without a value.
        contrast: nats, what the weights were made of.
        sampled: 0 for tokens that no policy sampled, such as what a tool wrote; None: all were.
        advantage: of the rollout, or one a token: GRPO's.
        reward: of the rollout.
        parsed: whether both roles were found.
        prompt, answer: texts beside the rollout.
        group: number of the prompt that rollouts share.
        step: optimisation steps done when it was sampled.
        images, corrupted_images: PNG, JPEG or WebP pictures as `data:` addresses.

    Raises: ShapeError where numbers are not one a token; DtypeError, ConfigError.
    """

    tokens: tuple[str, ...]
    weights: Values
    roles: tuple[int, ...] | None = None
    logps: Values | None = None
    corrupted_logps: Values | None = None
    ablated_logps: Values | None = None
    contrast: Values | None = None
    sampled: tuple[int, ...] | None = None
    advantage: float | Values | None = None
    reward: float | None = None
    parsed: bool | None = None
    prompt: str | None = None
    answer: str | None = None
    group: int | None = None
    step: int | None = None
    images: tuple[str, ...] = ()
    corrupted_images: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.tokens, str) or not _all(self.tokens, str):
            _refuse(DtypeError, "tokens", describe(self.tokens), "a tuple of texts", "pass token_texts of the ids")
        for name in (*PER_TOKEN, "advantage"):
            value = getattr(self, name)
            if value is None and name != "weights":
                continue
            if name == "advantage" and _is_number(value):
                object.__setattr__(self, name, None if math.isnan(value) else value)
                continue
            if not isinstance(value, (tuple, list)) or not all(x is None or _is_number(x) for x in value):
                _refuse(DtypeError, name, describe(value), "a number or None for each token", "pass x.tolist()")
            if len(value) != len(self.tokens):
                fix = "pass those of the same tokens"
                _refuse(ShapeError, name, f"{len(value)} values", f"{len(self.tokens)}, one a token", fix)
            object.__setattr__(self, name, tuple(None if x is None or math.isnan(x) else x for x in value))
        for name, known, expected in (
            ("roles", {0, 1, 2}, "0 other, 1 perception or 2 reasoning"), ("sampled", {0, 1}, "0 or 1"),
        ):  # fmt: skip
            if not set(getattr(self, name) or ()) <= known:
                _refuse(ConfigError, name, describe(getattr(self, name)), expected, "pass that of credit_records")
        for name, kind in (("prompt", str), ("answer", str), ("group", int), ("step", int), ("parsed", bool)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                _refuse(DtypeError, name, describe(value), f"None or {kind.__name__}", "leave it out")
        if self.reward is not None:
            if not _is_number(self.reward):
                _refuse(DtypeError, "reward", describe(self.reward), "None or a number", "pass float(reward)")
            object.__setattr__(self, "reward", None if math.isnan(self.reward) else self.reward)
        for name in _PICTURES:
            if not all(isinstance(x, str) and x.startswith(_PICTURE_KINDS) for x in getattr(self, name)):
                expected = "pictures as data:image/png;base64,... (an address would make the page ask the network)"
                _refuse(ConfigError, name, describe(getattr(self, name)), expected, "make it with credit_records")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "tokens", tuple(self.tokens))

    @property
    def text(self) -> str:
        """Return the completion."""
        return "".join(self.tokens)

    @property
    def advantages(self) -> Values:
        """Return GRPO's advantage of each token."""
        return self.advantage if isinstance(self.advantage, tuple) else (self.advantage,) * len(self.tokens)

    def to_json(self) -> str:
        """Return one line of JSON."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        kept = {k: plain(v) for k, v in named.items() if v is not None and not (k in _PICTURES and not v)}
        return json.dumps(kept, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "CreditRecord":
        """Read what `to_json` wrote.

        Raises: json.JSONDecodeError; ShapeError, DtypeError, ConfigError.
        """
        return cls.from_fields(json.loads(line))

    @classmethod
    def from_fields(cls, named: Any) -> "CreditRecord":
        """Read the object that a line of `to_json` holds.

        Raises: ShapeError, DtypeError, ConfigError.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(named, dict) or not {"tokens", "weights"} <= named.keys():
            _refuse(ConfigError, "line", describe(named), "an object with tokens and weights", "pass a line of to_json")
        for name in named.keys() - names:
            fix = f"write {nearest(name, names, 'tokens')}"
            _refuse(ConfigError, name, describe(named[name]), "a field: " + ", ".join(names), fix)
        return cls(**{k: _parsed(v) if k in _NUMBERS else v for k, v in named.items()})


def credit_records(
    completion_ids: Tensor,
    tokenizer: Tokenizer,
    weights: Tensor,
    *,
    completion_mask: Tensor | None = None,
    roles: RoleParse | Tensor | None = None,
    streams: ScoredStreams | None = None,
    contrast: Tensor | None = None,
    credit: CreditConfig | Method = CreditConfig(),  # noqa: B008 - frozen
    advantages: Tensor | None = None,
    rewards: Tensor | None = None,
    group_ids: Tensor | None = None,
    prompts: Sequence[str] | None = None,
    answers: Sequence[str] | None = None,
    images: Sequence[Any] | None = None,
    corrupted_images: Sequence[Any] | None = None,
    step: int | None = None,
) -> list[CreditRecord]:
    """Make of a rollout's tensors the records that are drawn and kept, one a row.

        credited = credit_rollout(ids, advantages, tokenizer, score, completion_mask=mask)
        records = credit_records(ids, tokenizer, credited.weights, completion_mask=mask, roles=credited.roles,
                                 streams=credited.streams, advantages=advantages, rewards=rewards)

    Args:
        completion_ids: `[B, T]` integers.
        tokenizer: of the policy.
        weights: `[B, T]`, of `token_weights` or `credit_rollout`.
        completion_mask: `[B, T]` 0/1; columns before the first and after the last valid token are left out.
        roles: what `role_ids_from_completions` returns, or role ids `[B, T]`.
        streams: what `score_streams` returns.
        contrast: `[B, T]` nats; None: computed from `streams` as `credit` says.
        credit: with which the streams were scored.
        advantages: `[B]` or `[B, T]`, before any weight.
        rewards: `[B]`.
        group_ids: `[B]` integers, equal for rollouts of a prompt.
        prompts, answers: a text for each row.
        images, corrupted_images: for each row a picture, a list of them, or None; kept with at most 448 pixels a side.
        step: optimisation steps done.

    Returns: a list of B records.

    Memory: the numbers, as Python floats.

    Raises: ShapeError, DtypeError, DeviceError, RoleParseError, ConfigError.

    Example:
        >>> class Characters:
        ...     def __len__(self):
        ...         return 128
        ...
        ...     def decode(self, ids, **_):
        ...         return "".join(map(chr, ids))
        >>> ids = torch.tensor([[ord(c) for c in "<see>7</see><think>2</think>"]])
        >>> (record,) = credit_records(ids, Characters(), torch.ones(1, 28), rewards=torch.tensor([1.0]))
        >>> record.text, record.reward
        ('<see>7</see><think>2</think>', 1.0)
    """
    call = checks.Call("credit_records", completion_ids, "completion_ids")
    layout = checks.layout_of(call, "completion_ids", completion_ids, None)
    shape = tuple(completion_ids.shape)
    call.tensor("completion_ids", completion_ids, [shape], "[B, T]", "int")
    call.tensor("weights", weights, [shape], "[B, T]", "float")
    mask = checks.mask_of(call, completion_mask, layout)
    parsed, role_ids = _roles(call, roles, shape)
    _check_rows(call, shape, advantages=advantages, rewards=rewards, group_ids=group_ids, contrast=contrast)
    texts = {"prompts": prompts, "answers": answers, "images": images, "corrupted_images": corrupted_images}
    for name, x in texts.items():
        if x is not None and (isinstance(x, str) or len(x) != len(mask)):
            got = describe(x) if isinstance(x, str) else f"{len(x)} entries"
            call.fail(ShapeError, name, got, f"{len(mask)}, one a row", "pass a list with an entry for each rollout")
    columns = {"weights": torch.where(mask, weights, 0.0), "contrast": contrast}
    if role_ids is not None:
        columns["roles"] = torch.where(mask, role_ids, 0)
    if streams is not None:
        kept = {name: getattr(streams, name) for name in ("logps", "corrupted_logps", "ablated_logps")}
        columns |= kept
        for name, x in (kept | divergences_of(streams).named("kl")).items():
            if x is not None:
                call.tensor(f"streams.{name}", x, [shape], "[B, T]", "float")
        if contrast is None and role_ids is not None:
            columns["contrast"] = _contrast(streams, role_ids, mask, credit)
    rows = {"advantage": advantages, "reward": rewards, "group": group_ids, "parsed": parsed}
    made = {name: x.detach().cpu().tolist() for name, x in (columns | rows).items() if x is not None}
    pictures = {name: _addresses(call, name, texts[name]) for name in _PICTURES if texts[name] is not None}
    beside = {name: x for name, x in (("prompt", prompts), ("answer", answers)) if x is not None}
    records = []
    for i, (ids, valid) in enumerate(zip(completion_ids.cpu().tolist(), mask.cpu().tolist(), strict=True)):
        known = [t for t, own in enumerate(valid) if own]
        cut = slice(known[0], known[-1] + 1) if known else slice(0)
        named: dict[str, Any] = {name: tuple(x[i][cut]) if isinstance(x[i], list) else x[i] for name, x in made.items()}
        named |= {name: x[i] for name, x in (beside | pictures).items()}
        if not all(valid[cut]):
            named["sampled"] = tuple(map(int, valid[cut]))
        records.append(CreditRecord(tokens=tuple(token_texts(ids[cut], tokenizer)), step=step, **named))
    return records


def _roles(call: checks.Call, roles: Any, shape: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Return which rows are parsed, and the role ids."""
    if roles is None:
        return None, None
    role_ids = roles.role_ids if isinstance(roles, RoleParse) else roles
    call.tensor("roles", role_ids, [shape], "[B, T]", "int")
    parse = roles if isinstance(roles, RoleParse) else RoleParse.of(role_ids)
    return parse.parsed, role_ids


def _check_rows(call: checks.Call, shape: tuple[int, ...], **tensors: Tensor | None) -> None:
    row = [shape[:1]]
    shapes = {"advantages": [*row, shape], "contrast": [shape]}
    for name, x in tensors.items():
        if x is not None:
            fitting = shapes.get(name, row)
            text = " or ".join("[B]" if len(own) == 1 else "[B, T]" for own in fitting)
            call.tensor(name, x, fitting, text, "int" if name == "group_ids" else "float")


def _contrast(
    streams: ScoredStreams, role_ids: Tensor, mask: Tensor, credit: CreditConfig | Method
) -> Tensor | None:  # fmt: skip
    """Return what the weights were made of, NaN where a token has no contrast."""
    if isinstance(credit, CreditConfig):
        if not credit.streams:
            return None
        read = (streams.corrupted_logps, streams.ablated_logps, *divergences_of(streams))
        corrupted_logps, ablated_logps, corrupted_kl, ablated_kl = (x if x is None else x.float() for x in read)
        contrast = role_contrast(
            streams.logps.float(), corrupted_logps=corrupted_logps, ablated_logps=ablated_logps,
            corrupted_kl=corrupted_kl, ablated_kl=ablated_kl, role_ids=role_ids, completion_mask=mask, credit=credit,
        )  # fmt: skip
        return torch.where(mask & (role_ids != 0), contrast, torch.nan)
    contrast = contrast_of_picture(streams, credit)
    return None if contrast is None else torch.where(mask, contrast.float(), torch.nan)


def _listed(row: Any) -> list[Any]:
    if row is None:
        return []
    return [picture for x in row for picture in _listed(x)] if isinstance(row, (list, tuple)) else [row]


def _addresses(call: checks.Call, name: str, rows: Any) -> list[tuple[str, ...]]:
    """Return the pictures of each row as `data:` addresses; one that rollouts share is written once."""
    made: dict[int, str] = {}
    for picture in (x for row in rows for x in _listed(row)):
        if id(picture) not in made:
            made[id(picture)] = picture if isinstance(picture, str) else _address(call, name, picture)
    return [tuple(made[id(picture)] for picture in _listed(row)) for row in rows]


def _address(call: checks.Call, name: str, picture: Any) -> str:
    if not callable(getattr(picture, "thumbnail", None)):
        call.fail(DtypeError, name, describe(picture), "PIL pictures", "open files with PIL.Image.open")
    small = picture.convert("RGB")
    small.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    kind, options = ("png", {"optimize": True}) if max(small.size) <= 128 else ("jpeg", {"quality": 88})
    file = io.BytesIO()
    small.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def plain(x: Any, digits: int = 8) -> Any:
    """Return what JSON can hold: numbers of so many digits, infinities as text, None for what is no number."""
    if isinstance(x, (tuple, list)):
        return [plain(y, digits) for y in x]
    if isinstance(x, float):
        return float(f"{x:.{digits}g}") if math.isfinite(x) else None if math.isnan(x) else str(x)
    return x


def _parsed(x: Any) -> Any:
    if isinstance(x, list):
        return tuple(map(_parsed, x))
    return float(x) if x in ("inf", "-inf") else x


def _all(x: Any, kind: type) -> bool:
    return isinstance(x, (tuple, list)) and all(isinstance(y, kind) for y in x)


def _is_number(x: Any) -> TypeGuard[float]:
    return is_int(x) or isinstance(x, float)


def _refuse(error: type[SRPOError], argument: str, got: str, expected: str, fix: str) -> NoReturn:
    refuse(error, "CreditRecord", argument, got, expected, fix)
