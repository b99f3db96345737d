"""`credit_figure`: rollouts as a figure for papers, GRPO's flat advantage over the weighted one."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from srpo.errors import ConfigError, describe, is_number, refuse
from srpo.viz.arguments import check_max_tokens, import_drawer, listed_records
from srpo.viz.page import scale_limit, visible
from srpo.viz.record import CreditRecord

_ORANGE, _WHITE, _BLUE = "#d08a4c", "#ffffff", "#6a9fd0"  # as on the page; told apart with every kind of colour vision
_ROLE_LINES = {1: ("#00786a", "-"), 2: ("#7b3fa0", (0, (2.5, 1.5)))}
_FONT, _SIZE = "DejaVu Sans Mono", 8.0
_LINE, _GAP, _LABEL = 0.26, 0.22, 0.62  # inches: a line of tokens, what is between rollouts, what names a row
_ONE_LINE = 4.2  # inches: from here on the key takes one line


def credit_figure(
    rollouts: CreditRecord | Sequence[CreditRecord],
    *,
    width: float = 6.75,
    max_tokens: int = 200,
    method: str = "SRPO",
) -> Any:
    """Draw rollouts for a paper: the tokens under GRPO, all alike, and again shaded by their weights.

        credit_figure(records[:2]).savefig("credit.svg")

    Args:
        rollouts: one or a few, drawn one below the other.
        width: inches; 6.75 is the text width of most two-column papers, 3.25 a column. At least 2.
        max_tokens: tokens of a rollout that are drawn.
        method: what made the weights.

    Returns: `matplotlib.figure.Figure`; its `savefig` writes PNG, SVG or PDF.

    Raises: DtypeError, ConfigError; IncompatibleVersionError without matplotlib.
    """
    records = listed_records("credit_figure", rollouts)
    if not (is_number(width) and width >= 2):
        refuse(ConfigError, "credit_figure", "width", describe(width), "at least 2 inches", "pass width=6.75")
    check_max_tokens("credit_figure", max_tokens, 200)
    Figure = import_drawer("credit_figure", "matplotlib.figure", "3.8").Figure
    measure = _Measure()
    rows = [(record, _lines(record, max_tokens, width - _LABEL - 0.1, measure)) for record in records]
    blocks = [(record, lines, name) for record, lines in rows for name in ("GRPO", method)]
    foot = 0.4 if width >= _ONE_LINE else 0.65
    height = 0.12 + foot + sum(_LINE * len(lines) + _GAP / 2 for _, lines, _ in blocks)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    colors, limit = _colors(), scale_limit(records)
    y = 0.12
    for record, lines, name in blocks:
        _text(axes, 0.05, y + _LINE / 2, name, weight="bold", family="DejaVu Sans")
        for line in lines:
            for x, width_of, text, token in line:
                weight = 1.0 if name == "GRPO" else record.weights[token]
                role = record.roles[token] if record.roles else 0
                _box(axes, (_LABEL + x, y, width_of), colors, _share(weight, limit), role)
                _text(axes, _LABEL + x, y + _LINE / 2 - 0.01, text)
            y += _LINE
        y += _GAP / 2
    _key(figure, axes, height, width, colors, limit)
    return figure


class _Measure:
    """Know how wide a text is, in inches: the figure's font has one width, but not all characters are in it."""

    def __init__(self) -> None:
        from matplotlib.font_manager import FontProperties
        from matplotlib.textpath import TextPath

        self._path, self._font = TextPath, FontProperties(family=_FONT)
        self._one = self.of("x" * 20) / 20

    def of(self, text: str) -> float:
        return float(self._path((0, 0), text, size=_SIZE, prop=self._font).get_extents().x1) / 72

    def __call__(self, text: str) -> float:
        return self._one * sum(1 if ord(c) < 0x1100 else 2 for c in text)


def _lines(
    record: CreditRecord, max_tokens: int, width: float, measure: _Measure
) -> list[list[tuple[float, float, str, int]]]:
    """Break tokens into lines of `(x, width, text, token)`; a token that is wider than a line is broken, too."""
    lines, x = [[]], 0.0
    for token, text, ends in _pieces(record, max_tokens, max(4, int(width / measure("x")))):
        size = measure(text)
        if lines[-1] and x + size > width:
            lines.append([])
            x = 0.0
        lines[-1].append((x, size, text, token))
        x += size
        if ends:
            lines.append([])
            x = 0.0
    return lines if lines[-1] or len(lines) == 1 else lines[:-1]


def _pieces(record: CreditRecord, max_tokens: int, longest: int) -> Iterator[tuple[int, str, bool]]:
    """Yield tokens as `(token, text, whether the line ends)`."""
    for token, text in enumerate(record.tokens[:max_tokens]):
        shown = visible(text).replace("\n", "↵").replace("\t", " ") or "·"
        for start in range(0, len(shown), longest):
            yield token, shown[start : start + longest], "\n" in text and start + longest >= len(shown)
    if len(record.tokens) > max_tokens:
        yield max_tokens - 1, " …", False


def _share(weight: float | None, limit: float) -> float:
    """Return where a weight lies on the scale, 0 to 1."""
    if weight is None:
        return 0.5
    return 0.5 + 0.5 * max(-1.0, min(1.0, math.log(max(weight, 1e-9)) / math.log(limit)))


def _colors() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("credit", [_ORANGE, _WHITE, _BLUE])


def _box(axes: Any, place: tuple[float, float, float], colors: Any, share: float, role: int) -> None:
    from matplotlib.patches import Rectangle

    x, y, width = place
    axes.add_patch(
        Rectangle((x, y + 0.02), width, _LINE - 0.06, facecolor=colors(share), edgecolor="#c9ccd2", linewidth=0.3)
    )
    if role in _ROLE_LINES:
        color, style = _ROLE_LINES[role]
        axes.plot([x + 0.01, x + width - 0.01], [y + _LINE - 0.03] * 2, color=color, linestyle=style, linewidth=1.1)


def _text(axes: Any, x: float, y: float, text: str, **style: Any) -> None:
    style = {"family": _FONT, "fontsize": _SIZE, "va": "center", "ha": "left", "parse_math": False} | style
    axes.text(x, y, text, **style)


def _key(figure: Any, axes: Any, height: float, width: float, colors: Any, limit: float) -> None:
    """Draw the scale of weights and the lines of roles at the bottom."""
    y = height - (0.21 if width >= _ONE_LINE else 0.46)
    scale = figure.add_axes((_LABEL / width, (height - y - 0.05) / height, 1.1 / width, 0.1 / height))
    scale.imshow([[i / 255 for i in range(256)]], aspect="auto", cmap=colors, vmin=0, vmax=1)
    scale.set_yticks([])
    scale.set_xticks([0, 128, 255], [f"{1 / limit:.2f}", "1", f"{limit:.2f}"], fontsize=6)
    scale.tick_params(length=0, pad=1)
    scale.spines[:].set(linewidth=0.3)
    _text(axes, 0.05, y, "weight", family="DejaVu Sans", fontsize=7)
    x, y = (_LABEL + 1.3, y) if width >= _ONE_LINE else (0.05, height - 0.12)
    for role, name in ((1, "perception"), (2, "reasoning")):
        color, style = _ROLE_LINES[role]
        axes.plot([x, x + 0.22], [y + 0.04] * 2, color=color, linestyle=style, linewidth=1.1)
        _text(axes, x + 0.27, y, name, family="DejaVu Sans", fontsize=7)
        x += 0.95
