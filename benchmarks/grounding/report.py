"""Text, charts and the guide's tables of learn_grounding.py, made from its JSON file alone."""

import json
import pathlib
from typing import Any

from report import with_block
from tabulate import tabulate

from grounding import checks, runs

ROOT = pathlib.Path(__file__).parents[2]
GUIDE = ROOT / "benchmarks" / "grounding" / "README.md"
PATH = ROOT / "benchmarks" / "results" / "grounding" / "cpu.json"
BEGIN, END = "<!-- grounding: python benchmarks/learn_grounding.py --readme -->", "<!-- end of grounding -->"
COLOURS = {"grpo": "#7f7f7f", "srpo": "#b5202a", "srpo_signed": "#2a78b5"}
UNCERTAINTY = "95 % intervals of a bootstrap over batches and rollouts at these policies, one method at a time"
OTHER, CONTROL = "#555555", "#d98200"
SPREAD_HEADERS = ("role", "contrast", "mean, nats", "deviation between tokens", "deviation over the draw", "luck")
SPREAD = (
    "How much of a contrast is the luck of the token that was sampled? The log-ratio and k3 of a drawn token both have "
    "the mean of the divergence over the vocabulary; their deviation over the draw is computed exactly. Luck is its "
    "share of the variance of what the weights see."
)
HEADERS = ("method", "hint-free reward, / GRPO", "warm starts", "grounded-correct, / GRPO", "copying (cosine)")


def save(path: pathlib.Path, part: str, found: dict[str, Any]) -> None:
    """Write a part of what was measured; the other stays as it was."""
    known = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_lines({**known, part: found}) + "\n")


def _lines(x: Any, indent: str = "") -> str:
    """Return JSON with a line for each row of a table, and for each setting."""
    rows = isinstance(x, list) and bool(x) and isinstance(x[0], dict)
    if not rows and not (isinstance(x, dict) and any(isinstance(value, dict | list) for value in x.values())):
        return json.dumps(x)
    inner = indent + " "
    if rows:
        parts = [json.dumps(row) for row in x]
    else:
        parts = [f"{json.dumps(name)}: {_lines(value, inner)}" for name, value in x.items()]
    opened, closed = "[]" if rows else "{}"
    return f"{opened}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{closed}"


def about(found: dict[str, Any]) -> str:
    """Name the machine and the versions."""
    where = found["environment"]
    return f"{where['cpu']}, torch {where['torch']}, {where['date']}, commit {where['commit']}"


def rows_of(setting: dict[str, Any]) -> list[list[str]]:
    """Return the table of a setting: estimates with 95 % intervals, and the range over warm starts."""
    return [
        [
            row["method"],
            _interval(row["relative"][0]),
            f"{min(row['by_seed']):.2f} to {max(row['by_seed']):.2f}",
            _interval(row["relative"][1]),
            _interval(row["absolute"][2]),
        ]
        for row in setting["rows"]
    ]


def _interval(x: list[float]) -> str:
    return f"{x[0]:.2f} [{x[1]:.2f}, {x[2]:.2f}]"


def title(name: str, setting: dict[str, Any]) -> str:
    """Name a setting, what it was measured on, and GRPO's own efficiency."""
    own = _interval(setting["rows"][0]["absolute"][0])
    drawn = f"{setting['batches']} batches, objectives from {setting['parts']} x 1024 rollouts"
    policy = f"{setting['updates']} updates after the warm start" if setting["updates"] else "after the warm start"
    return f"{name}: {policy}, hints right {setting['p_hint']:.0%} of the time; {drawn}; cosine of GRPO {own}"


def gradient_text(found: dict[str, Any]) -> str:
    """Format the gradient check for a terminal."""
    parts = [f"{sizes(found)}; {UNCERTAINTY}\n{about(found)}"]
    for name, setting in found["settings"].items():
        parts.append(f"{title(name, setting)}\n{tabulate(rows_of(setting), HEADERS, disable_numparse=True)}")
    parts.append("\n".join(check_lines(found)))
    wrong = checks.broken(found["checks"], next(iter(found["settings"])))
    parts.append(f"BROKEN: {len(wrong)} controls came out wrong; believe nothing above" if wrong else verdict(found))
    return "\n\n".join(parts)


def seeds_of(found: dict[str, Any]) -> str:
    """Return the arguments that choose the seeds."""
    first, n = found["seeds"][0], len(found["seeds"])
    return f"--seed {first} --seeds {n}" if first else f"--seeds {n}"


def sizes(found: dict[str, Any]) -> str:
    """Say how much was measured."""
    n = len(found["seeds"])
    return f"{n} warm start{'s' if n > 1 else ''}, batches of 8 x 8 rollouts"


def check_lines(found: dict[str, Any]) -> list[str]:
    """Return one line for each control."""
    return [f"{c['outcome']:9} {c['setting']}: {c['name']}: {c['found']}" for c in found["checks"]]


def verdict(found: dict[str, Any]) -> str:
    """Say in words which methods beat GRPO's gradient, which lose, and which do not differ."""
    sentences = []
    for name, setting in found["settings"].items():
        better, worse, equal = [], [], []
        for row in setting["rows"]:
            if row["method"] == "grpo" or row["method"].startswith(("oracle", "negated")):
                continue
            _, low, high = row["relative"][0]
            (better if low > 1.0 else worse if high < 1.0 else equal).append(row["method"])
        groups = (("better than GRPO", better), ("worse", worse), ("no difference", equal))
        sentences.append(f"{name}: " + "; ".join(f"{what}: {', '.join(who)}" for what, who in groups if who) + ".")
    return "\n".join(sentences)


def plot(path: pathlib.Path) -> list[pathlib.Path]:
    """Draw the charts of a file."""
    import matplotlib as mpl

    mpl.use("Agg")
    known = json.loads(path.read_text())
    charts = []
    if "gradient" in known:
        charts.append(path.with_name(f"{path.stem}-efficiency.png"))
        _plot_efficiency(charts[-1], known["gradient"])
    if "runs" in known:
        charts += runs.plot(path, known["runs"], COLOURS, OTHER)
    return charts


def _plot_efficiency(path: pathlib.Path, found: dict[str, Any]) -> None:
    from matplotlib import pyplot

    settings = found["settings"]
    figure, axes = pyplot.subplots(1, len(settings), figsize=(3.6 * len(settings) + 1, 4.4), layout="constrained",
                                   sharey=True, squeeze=False)  # fmt: skip
    for axis, (name, setting) in zip(axes[0], settings.items(), strict=True):
        rows = setting["rows"][::-1]
        for y, row in enumerate(rows):
            value, low, high = row["relative"][0]
            control = row["method"].startswith(("oracle", "negated"))
            colour = CONTROL if control else COLOURS.get(row["method"], OTHER)
            axis.plot([low, high], [y, y], color=colour, linewidth=2)
            axis.plot([value], [y], marker="o", markersize=5, color=colour)
            axis.plot(row["by_seed"], [y] * len(row["by_seed"]), "|", markersize=5, color=colour, alpha=0.5)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(rows)), [row["method"] for row in rows], fontsize=8)
        axis.set(title=name, xlabel="efficiency / GRPO's")
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3, axis="x")
    figure.suptitle("gradient toward the hint-free objective, 95 % intervals; orange: controls", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def runs_text(found: dict[str, Any]) -> str:
    """Format the runs for a terminal."""
    return f"{about(found)}\n\n{runs.text(found)}"


def spread_text(found: dict[str, Any], tablefmt: str = "simple") -> str:
    """Format the spread of contrasts over the token that was drawn, the mean over policies."""
    policies = found["policies"]
    rows = []
    for row in zip(*(policy["rows"] for policy in policies), strict=True):
        mean, between, within, luck = (
            sum(x[name] for x in row) / len(row) for name in ("mean", "between", "within", "luck")
        )
        head = (row[0]["role"], row[0]["kind"])
        rows.append([*head, f"{mean:.2f}", f"{between:.2f}", f"{within:.2f}", f"{luck:.0%}"])
    body = tabulate(rows, SPREAD_HEADERS, tablefmt=tablefmt, disable_numparse=True)
    ratios = [policy["kl_over_log_ratio"] for policy in policies]
    times = f"Scoring for divergences takes {min(ratios):.2f} to {max(ratios):.2f} times as long as for log-ratios."
    policy = f"{len(policies)} warm starts, {policies[0]['rollouts']} rollouts each"
    return f"{about(found)}\n\n{policy}:\n\n{body}\n\n{times}"


def section(path: pathlib.Path = PATH) -> str:
    """Return the guide's tables: what was found, on what, with which uncertainty."""
    if not path.exists():
        return ""
    known, parts = json.loads(path.read_text()), []
    images = {
        chart.stem: f"![{chart.stem}](../results/grounding/{chart.name})"
        for chart in sorted(path.parent.glob(f"{path.stem}-*.png"))
    }
    if "gradient" in known:
        found = known["gradient"]
        command = f"`python benchmarks/learn_grounding.py {seeds_of(found)}`"
        parts.append(f"{command}: {sizes(found)}; {UNCERTAINTY}.  \n{about(found)}")
        for name, setting in found["settings"].items():
            body = tabulate(rows_of(setting), HEADERS, tablefmt="github", disable_numparse=True)
            parts.append(f"{title(name, setting)}\n\n{body}")
        outcomes = [check["outcome"] for check in found["checks"]]
        counts = ", ".join(f"{outcomes.count(o)} {o}" for o in (checks.OK, checks.UNDECIDED, checks.WRONG))
        parts.append(f"Controls: {counts}.")
        parts.append(verdict(found).replace("\n", "  \n"))
        parts += [image for stem, image in images.items() if stem.endswith("efficiency")]
    if "spread" in known:
        found = known["spread"]
        parts.append(f"`python benchmarks/learn_grounding.py --spread {seeds_of(found)}`:  \n{SPREAD}")
        parts.append(spread_text(found, "github"))
    if "runs" in known:
        found = known["runs"]
        parts.append(f"`python benchmarks/learn_grounding.py --train {seeds_of(found)}`:  \n{about(found)}")
        parts.append(runs.markdown(found))
        parts += [image for stem, image in images.items() if not stem.endswith("efficiency")]
    return "\n\n".join(parts)


def with_section(guide: str, path: pathlib.Path = PATH) -> str:
    """Return the guide with its tables made anew; one without the markers stays as it is."""
    if BEGIN not in guide:
        return guide
    return with_block(guide, BEGIN, END, section(path))
