"""`credit_html`: one page of rollouts whose tokens are shaded by their weights; it asks the network for nothing."""

import html
import json
import math
import unicodedata
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from srpo.errors import ConfigError, describe, refuse
from srpo.viz.arguments import listed_records
from srpo.viz.record import PER_TOKEN, CreditRecord, plain

STEPS = 10  # shades on each side of weight 1
_NARROWEST, _WIDEST = 1.25, 2.0  # factor at which the darkest shade is reached, at least and at most
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_KEPT_INVISIBLE = {"\u200c", "\u200d", "\ufe0e", "\ufe0f"}  # joiners and variants that scripts and emoji are made with


class CreditPage(str):
    """A page as text, which notebooks show by themselves."""

    def save(self, path: str | Path) -> Path:
        """Write the page and return its path."""
        Path(path).write_text(self, encoding="utf-8")
        return Path(path)

    def _repr_html_(self) -> str:
        page = html.escape(self, quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:640px;border:0" title="token credit"></iframe>'


def credit_html(
    rollouts: CreditRecord | Sequence[CreditRecord], *, title: str = "Token credit", method: str = "SRPO"
) -> CreditPage:
    """Draw rollouts as one self-contained page: who got how much of the advantage, token by token.

    shade = log(weight), blue above 1 and orange below; GRPO, one switch away, has weight 1 everywhere

    Args:
        rollouts: of one prompt or several; those of a group stand together, the highest reward first.
        title: of the page.
        method: what made the weights, as the switch calls it.

    Returns: CreditPage, a `str` with `save(path)`; notebooks show it by themselves.

    Memory: the page, about 60 bytes a token and the pictures once.

    Raises: DtypeError, ConfigError.

    Example:
        >>> from srpo.viz import CreditRecord
        >>> record = CreditRecord(tokens=("a", " cat"), weights=(0.8, 1.2), roles=(1, 2), advantage=1.0, reward=1.0)
        >>> page = credit_html([record])
        >>> "<span" in page, "http://" in page
        (True, False)
    """
    records = listed_records("credit_html", rollouts)
    for name, value in (("title", title), ("method", method)):
        if not isinstance(value, str):
            refuse(ConfigError, "credit_html", name, describe(value), "a text", f"pass {name}=str(...)")
    body = (
        f"<h1>{escaped(title)}</h1>{_introduction(method)}{controls(records, method)}{rollouts_html(ordered(records))}"
    )
    return whole_page(title, body, rollout_data(ordered(records)))


def whole_page(title: str, body: str, data: str = "[]") -> CreditPage:
    """Return a page around a body; `data` is JSON for the token facts."""
    return CreditPage(
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><link rel="icon" href="data:,">'
        f"<style>{_asset('page.css')}</style></head><body>{body}"
        '<div id="tip" role="status" aria-live="polite" hidden></div>'
        f'<script type="application/json" id="data">{data}</script><script>{_asset("page.js")}</script></body></html>\n'
    )


def rollout_data(records: Sequence[CreditRecord]) -> str:
    """Return what the page says of tokens as JSON: numbers alone, so that no text of a completion is in a script."""
    rows = [
        {name: plain(getattr(x, name), 5) for name in (*PER_TOKEN, "advantage") if getattr(x, name) is not None}
        for x in records
    ]
    return json.dumps(rows, separators=(",", ":"), allow_nan=False)


def ordered(records: Sequence[CreditRecord]) -> list[CreditRecord]:
    """Return records group by group as they come, the highest reward of each first."""
    places: dict[object, int] = {}
    for record in records:
        places.setdefault(_group(record), len(places))
    return sorted(records, key=lambda x: (places[_group(x)], math.inf if x.reward is None else -x.reward))


def controls(records: Sequence[CreditRecord], method: str) -> str:
    """Return the switch between GRPO and a method, and the key of colours and lines."""
    limit = scale_limit(records)
    switch = "".join(
        f'<label><input type="radio" name="method" value="{value}"{checked}>{escaped(name)}</label>'
        for value, name, checked in (("weights", method, " checked"), ("grpo", "GRPO", ""))
    )
    return (
        f'<div class="bar"><fieldset aria-label="credit of">{switch}</fieldset>'
        f'<span class="scale">weight {1 / limit:.2f} <i></i> {limit:.2f}</span>'
        '<span class="key"><i class="p"></i>perception</span><span class="key"><i class="r"></i>reasoning</span>'
        '<span class="soft keys">point at a token, or Tab and arrow keys</span></div>'
    )


def rollouts_html(records: Sequence[CreditRecord], limit: float | None = None, first: int = 0) -> str:
    """Return rollouts as they are ordered, those of a group under their prompt and pictures.

    Args:
        records: the rollouts.
        limit: of the scale; None: that of these rollouts.
        first: place of the first one in the data of the page.
    """
    limit, parts, last = limit or scale_limit(records), [], object()
    for index, record in enumerate(records, start=first):
        if _group(record) != last:
            last = _group(record)
            parts.append(_prompt(record))
        parts.append(_rollout(record, index, limit))
    return "".join(parts)


def scale_limit(records: Sequence[CreditRecord]) -> float:
    """Return the factor above and below 1 at which the darkest shade is reached."""
    logs = [abs(math.log(w)) for x in records for w in x.weights if w is not None and 0 < w < math.inf]
    return min(max(math.exp(max(logs, default=0.0)), _NARROWEST), _WIDEST)


def shade(weight: float | None, limit: float) -> int:
    """Return the shade of a weight, from -STEPS to STEPS."""
    if weight is None or weight <= 0:
        return 0 if weight is None else -STEPS
    return round(STEPS * max(-1.0, min(1.0, math.log(weight) / math.log(limit)))) if weight < math.inf else STEPS


def escaped(text: str) -> str:
    """Return a text for HTML, with what would be invisible, or turn the text around it, made visible."""
    return html.escape(visible(text), quote=True)


def visible(text: str) -> str:
    """Write controls, formats and halves of surrogates as what they are; line ends and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible(c) for c in text)


def _visible(c: str) -> str:
    if c in "\n\t" or c in _KEPT_INVISIBLE or unicodedata.category(c) not in ("Cc", "Cf", "Cs"):
        return c
    code = ord(c)
    return chr(0x2400 + code) if code < 32 else "\u2421" if code == 127 else f"\u27e8U+{code:04X}\u27e9"


@cache
def _asset(name: str) -> str:
    return files("srpo.viz").joinpath("assets", name).read_text(encoding="utf-8")


def _group(record: CreditRecord) -> object:
    """Return what rollouts of a prompt share."""
    return (record.step, record.group, record.prompt if record.group is None else None)


def _introduction(method: str) -> str:
    name = escaped(method)
    return (
        f'<p class="soft intro"><span class="weighted">{name}: each token has a weight that multiplies the advantage '
        "of its rollout; blue tokens count for more, orange ones for less, and the sign stays.</span>"
        '<span class="even">GRPO: every token of a rollout has the same advantage, whatever it did for the answer.'
        "</span></p>"
    )


def _prompt(record: CreditRecord) -> str:
    named = [f"step {record.step}"] if record.step is not None else []
    named += [f"prompt {record.group}"] if record.group is not None else []
    heading = f"<h2>{', '.join(named).capitalize()}</h2>" if named else ""
    texts = f"<pre>{escaped(record.prompt)}</pre>" if record.prompt else ""
    if record.answer:
        texts += f'<p class="soft">answer: <bdi>{escaped(record.answer)}</bdi></p>'
    pictures = "".join(
        f'<figure><img src="{html.escape(address)}" alt="{caption}"{_small(address)}><figcaption>{caption}</figcaption>'
        "</figure>"
        for caption, all_of in (("picture", record.images), ("corrupted", record.corrupted_images))
        for address in all_of
    )
    pictures = f'<div class="pictures">{pictures}</div>' if pictures else ""
    return f'{heading}<div class="prompt"><div>{texts}</div>{pictures}</div>' if texts or pictures else heading


def _small(address: str) -> str:
    """Say that a picture is one of few pixels, which is drawn larger than it is: those are kept as PNG."""
    return ' class="small"' if address.startswith("data:image/png") else ""


def _rollout(record: CreditRecord, index: int, limit: float) -> str:
    facts = [f"{name} <b>{value:.3g}</b>" for name, value in (("reward", record.reward),) if value is not None]
    if isinstance(record.advantage, float | int):
        facts.append(f"advantage <b>{record.advantage:+.3f}</b>")
    facts.append(f"{len(record.tokens)} tokens" if record.tokens else "no token counts: all of it is masked")
    facts += [_mean_weight(record, role, name) for role, name in ((1, "perception"), (2, "reasoning"))]
    if record.parsed is False:
        facts.append('<span class="bad">roles not found: plain GRPO</span>')
    label = f"tokens of rollout {index + 1}; arrow keys move between them"
    header = "".join(f"<span>{fact}</span>" for fact in facts if fact)
    return (
        f'<article><header>{header}</header><div class="tokens" dir="auto" tabindex="0" role="group" '
        f'aria-label="{label}" data-rollout="{index}">{_tokens(record, limit)}</div></article>'
    )


def _mean_weight(record: CreditRecord, role: int, name: str) -> str:
    weights = [w for w, own in zip(record.weights, record.roles or (), strict=False) if own == role and w is not None]
    if not weights:
        return ""
    mean = sum(weights) / len(weights)
    return (
        f'{name} <span class="weighted">\u00d7{mean:.2f}</span><span class="even">\u00d71.00</span> on {len(weights)}'
    )


def _tokens(record: CreditRecord, limit: float) -> str:
    n, parts = len(record.tokens), []
    roles, sampled = record.roles or (0,) * n, record.sampled or (1,) * n
    for text, weight, role, own in zip(record.tokens, record.weights, roles, sampled, strict=True):
        step = shade(weight, limit) if own else 0
        names = [("", "p", "r")[role]] if role else []
        names += [f"{'m' if step > 0 else 'l'}{abs(step)}"] if step else []
        names += [] if own else ["x"]
        names += ["n"] if text and not text.strip("\n") else ["e"] if not text else []
        attribute = f' class="{" ".join(names)}"' if names else ""
        parts.append(f"<span{attribute}>{escaped(text)}</span>")
    return "".join(parts)
