"""Curves of a run as SVG inside the report: no script, the colours of the page, readable on a telephone."""

import html
import math
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]
_W, _H = 340, 190  # units of the drawing
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 24
_MOST_POINTS = 300


def chart(title: str, series: Mapping[str, Points], explanation: str) -> str:
    """Draw named lines over steps; "" where none has a point.

    Args:
        title: of the chart.
        series: points `(step, value)` by name. The first four have colours and dashes of their own.
        explanation: what is drawn, in a sentence.
    """
    series = {name: thinned(points) for name, points in series.items() if points}
    if not series:
        return ""
    xs, ys = ([point[axis] for points in series.values() for point in points] for axis in (0, 1))
    x_ticks, y_ticks = ticks(min(xs), max(xs), 4, whole=True), ticks(min(ys), max(ys), 4)
    low, high = min(*ys, y_ticks[0]), max(*ys, y_ticks[-1])
    first, last = min(xs), max(xs)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        up = (y - low) / (high - low) if high > low else 0.5
        return _LEFT + across * (_W - _LEFT - _RIGHT), _H - _BOTTOM - up * (_H - _TOP - _BOTTOM)

    parts = []
    for y in y_ticks:
        _, v = at(first, y)
        parts.append(f'<path class="grid" d="M{_LEFT} {v:.1f}H{_W - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{v + 3.5:.1f}" text-anchor="end">{number(y)}</text>')
    for x in x_ticks:
        if first <= x <= last:
            parts.append(f'<text x="{at(x, low)[0]:.1f}" y="{_H - 8}" text-anchor="middle">{number(x)}</text>')
    keys = []
    for place, (name, points) in enumerate(series.items()):
        path = "L".join("{:.1f} {:.1f}".format(*at(*point)) for point in points)
        parts.append(f'<path class="line c{place % 4}" d="M{path}"/>')
        if len(points) == 1:
            parts.append('<circle class="c{}" cx="{:.1f}" cy="{:.1f}" r="3"/>'.format(place % 4, *at(*points[0])))
        keys.append(
            f'<span class="key"><svg width="26" height="8"><path class="line c{place % 4}" d="M1 4H25"/></svg> '
            f"{html.escape(name)} <b>{number(points[-1][1])}</b></span>"
        )
    label = html.escape(f"{title}: " + ", ".join(f"{name} {number(p[-1][1])}" for name, p in series.items()))
    return (
        f'<section class="chart"><h3>{html.escape(title)}</h3><svg class="plot" viewBox="0 0 {_W} {_H}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg><div class="keys-of">{"".join(keys)}</div>'
        f'<p class="soft">{html.escape(explanation)}</p></section>'
    )


def thinned(points: Points) -> list[tuple[float, float]]:
    """Average neighbours until there are few enough points to draw; the last one stays as it is."""
    n = -(-len(points) // _MOST_POINTS)
    if n <= 1:
        return list(points)
    parts = [points[i : i + n] for i in range(0, len(points) - 1, n)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts] + [points[-1]]


def ticks(low: float, high: float, n: int, *, whole: bool = False) -> list[float]:
    """Return about n round numbers that span `[low, high]`."""
    span = high - low or abs(high) or 1.0
    rough = span / n
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * min((k for k in (1, 2, 5, 10) if k * unit >= rough * 0.999), default=10)
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, max(last, first + 1) + 1)]


def number(x: float) -> str:
    """Format a number in few characters."""
    if x == 0:
        return "0"
    if abs(x) >= 10_000 or abs(x) < 0.001:
        return f"{x:.0e}" if abs(x) < 0.001 else f"{x / 1000:.4g}k"
    return f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}"
