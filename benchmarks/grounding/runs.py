"""What whole runs showed: means over paired seeds, paired tests against GRPO, charts."""

import pathlib
from typing import Any

import numpy as np
from tabulate import tabulate

from grounding.answers import gap
from grounding.train import BINS, MEASURES

BASE = "grpo"
SHOWN = ("accuracy", "seen", "grounded", "shuffled", "blank", "copies", "reward", "entropy", "perception", "formed")
LABELS = {**MEASURES, "reward": "mean reward of training"}
COLLAPSE = 0.1  # of accuracy lost since the warm start


def finals(found: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Return every measure at the end, `[seeds]`, by method."""
    out: dict[str, dict[str, np.ndarray]] = {}
    for method in methods(found):
        own = [run for run in found["runs"] if run["method"] == method]
        out[method] = {name: np.array([run["curve"][-1][name] for run in own]) for name in MEASURES}
        out[method]["reward"] = np.array([np.mean(run["rewards"]) for run in own])
    return out


def methods(found: dict[str, Any]) -> list[str]:
    """Return the methods in their order."""
    return list(dict.fromkeys(run["method"] for run in found["runs"]))


def collapsed(found: dict[str, Any], method: str) -> int:
    """Count the runs that lost accuracy since the warm start, or whose responses came apart."""
    own = [run["curve"] for run in found["runs"] if run["method"] == method]
    return sum(c[-1]["accuracy"] < c[0]["accuracy"] - COLLAPSE or c[-1]["formed"] < 0.9 for c in own)


def table(found: dict[str, Any]) -> list[list[str]]:
    """Return mean and deviation over seeds of every measure, a column for each method, after that of the start."""
    values = finals(found)
    first = [run["curve"][0] for run in found["runs"] if run["method"] == BASE]
    rows = []
    for name in SHOWN:
        before = "" if name == "reward" else f"{np.mean([c[name] for c in first]):.3f}"
        cells = [f"{v[name].mean():.3f} ± {v[name].std(ddof=min(1, len(v[name]) - 1)):.3f}" for v in values.values()]
        rows.append([LABELS[name], before, *cells])
    return rows


def headers(found: dict[str, Any]) -> list[str]:
    """Return the headers of `table`."""
    return ["", "warm start", *methods(found)]


def sentences(found: dict[str, Any]) -> list[str]:
    """Say of each method whether its held-out accuracy differs from GRPO's."""
    values, n, lines = finals(found), len(found["seeds"]), []
    for method in methods(found):
        lost = collapsed(found, method)
        fate = f"{lost} of {n} runs collapsed" if lost else f"none of {n} runs collapsed"
        if method == BASE:
            lines.append(f"{method}: {fate}.")
            continue
        c = gap(values[method]["accuracy"] - values[BASE]["accuracy"])
        if np.isnan(c.p):
            lines.append(f"{method}: accuracy {c.mean:+.3f} against GRPO on one seed, which says nothing; {fate}.")
            continue
        outcome = ("more" if c.mean > 0 else "less") if c.p < 0.05 else "no difference beyond noise"
        size = f"{c.mean:+.3f} ± {c.half:.3f} (95 %, paired t = {c.t:.2f}, p = {c.p:.2f}, {n} seeds)"
        lines.append(f"{method}: held-out accuracy {size} against GRPO: {outcome}; {fate}.")
    return lines


def statistics_table(found: dict[str, Any]) -> list[list[str]]:
    """Return weights and contrasts by kind of token at the end of the runs, means over seeds."""

    def cell(method: str, kind: str, what: str, form: str) -> str:
        own = [run["statistics"].get(kind) for run in found["runs"] if run["method"] == method]
        own = [s for s in own if s is not None]
        if not own:
            return "none"
        return " ± ".join(f"{np.mean([s[k] for s in own]):{f}}" for k, f in ((what, form), (f"{what}_sd", ".2f")))

    kinds = list(found["runs"][0]["histograms"])
    return [
        [kind, cell(BASE, kind, "contrast", "+.2f"), *(cell(m, kind, "weight", ".2f") for m in methods(found))]
        for kind in kinds
    ]


def text(found: dict[str, Any], tablefmt: str = "simple") -> str:
    """Format the runs."""
    n = len(found["seeds"])
    first = f"{found['steps']} updates from {n} warm starts, hints right {found['p_hint']:.0%} of the time"
    measured = tabulate(table(found), headers(found), tablefmt=tablefmt, disable_numparse=True)
    columns = ["tokens", "contrast, nats (of grpo)", *(f"weight, {m}" for m in methods(found))]
    weights = tabulate(statistics_table(found), columns, tablefmt=tablefmt, disable_numparse=True)
    said = ("\n" if tablefmt == "simple" else "  \n").join(sentences(found))
    parts = (f"{first}; mean ± deviation over seeds:", measured, said, "Weights and contrasts at the end:", weights)
    return "\n\n".join(parts)


def markdown(found: dict[str, Any]) -> str:
    """Format the runs for the guide."""
    return text(found, "github")


def plot(path: pathlib.Path, found: dict[str, Any], colours: dict[str, str], other: str) -> list[pathlib.Path]:
    """Draw curves with bands, and histograms of weights."""
    charts = [path.with_name(f"{path.stem}-{name}.png") for name in ("curves", "weights")]
    _plot_curves(charts[0], found, colours, other)
    _plot_weights(charts[1], found, colours, other)
    return charts


def _plot_curves(path: pathlib.Path, found: dict[str, Any], colours: dict[str, str], other: str) -> None:
    from matplotlib import pyplot

    names = ("accuracy", "seen", "grounded", "copies", "entropy", "perception")
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 5.6), layout="constrained", sharex=True)
    for axis, name in zip(axes.flat, names, strict=True):
        for method in methods(found):
            own = [run for run in found["runs"] if run["method"] == method]
            y = np.array([[point[name] for point in run["curve"]] for run in own])
            mean, sd = y.mean(0), y.std(0, ddof=min(1, len(y) - 1))
            colour = colours.get(method, other)
            axis.plot(own[0]["steps"], mean, color=colour, label=method)
            axis.fill_between(own[0]["steps"], mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
        axis.set_title(LABELS[name], fontsize=9)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"held-out digits, mean and deviation over {len(found['seeds'])} seeds, by update", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _plot_weights(path: pathlib.Path, found: dict[str, Any], colours: dict[str, str], other: str) -> None:
    from matplotlib import pyplot

    kinds = ("perception, A > 0", "perception, A < 0", "reasoning, A > 0", "reasoning, A < 0")
    figure, axes = pyplot.subplots(1, 4, figsize=(12, 3), layout="constrained", sharex=True, sharey=True)
    centres = ((BINS[1:] + BINS[:-1]) / 2).numpy()
    for axis, kind in zip(axes, kinds, strict=True):
        for method in methods(found):
            counts = np.sum([run["histograms"][kind] for run in found["runs"] if run["method"] == method], axis=0)
            axis.step(
                centres, counts / max(counts.sum(), 1), where="mid", color=colours.get(method, other), label=method
            )
        axis.set(title=kind, xlabel="token weight")
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="share of tokens")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
