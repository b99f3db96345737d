"""Text, charts and the guide's tables of learn_grounding.py, made from its JSON file alone."""

import json
import pathlib
from typing import Any

from report import with_block
from tabulate import tabulate

from grounding import answers, checks, runs, variants
from grounding.checks import BASE
from srpo import METHODS

ROOT = pathlib.Path(__file__).parents[2]
GUIDE = ROOT / "benchmarks" / "grounding" / "README.md"
PATH = ROOT / "benchmarks" / "results" / "grounding" / "cpu.json"
BEGIN, END = "<!-- grounding: python benchmarks/learn_grounding.py --readme -->", "<!-- end of grounding -->"
COLOURS = {"grpo": "#7f7f7f", "srpo": "#b5202a", "srpo_signed": "#2a78b5"}
UNCERTAINTY = "95 % intervals (t) over policies, one at a time; of a single policy over its batches"
OTHER, CONTROL = "#555555", "#d98200"
SPREAD_HEADERS = ("role", "contrast", "mean, nats", "deviation between tokens", "deviation over the draw", "luck")
SPREAD = (
    "How much of a contrast is the luck of the token that was sampled? The log-ratio and k3 of a drawn token both have "
    "the mean of the divergence over the vocabulary; their deviation over the draw is computed exactly. Luck is its "
    "share of the variance of what the weights see."
)
ANSWERS = (
    "The half of the policies that is for looking chose the option; what is shown are the other half's ratios of its "
    "efficiency to that of today's setting. Bold: no chance, by a paired t over policies, after Holm over all tests of "
    "this table (5 %)."
)


def save(path: pathlib.Path, part: str, found: dict[str, Any]) -> None:
    """Write a part of what was measured; the other stays as it was."""
    known = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_lines({**known, part: found}) + "\n")


def _lines(x: Any, indent: str = "") -> str:
    """Return JSON with a line for each row of a table, and for each setting."""
    rows = isinstance(x, list) and bool(x) and isinstance(x[0], dict | list)
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


def methods_table(found: dict[str, Any], tablefmt: str = "simple") -> str:
    """Return the efficiency of each method over GRPO's: a row for each, a column for each setting."""
    by_setting = {name: answers.columns(found, name) for name in found["settings"]}
    rows = [
        [method, *(str(answers.ratio(own[method], own[BASE])) for own in by_setting.values())]
        for method in variants.NAMES
    ]
    return tabulate(rows, ["efficiency, / GRPO's", *by_setting], tablefmt=tablefmt, disable_numparse=True)


def answers_table(found: dict[str, Any], tablefmt: str = "simple") -> str:
    """Return the answers to the questions, or say why there are none."""
    answered = answers.answered(found)
    if not answered:
        return "Too few policies to answer questions: two halves of at least 2 are needed."
    rows = [
        [a.question.text, a.question.default, a.option, *(_cell(a, name) for name in found["settings"]), a.advice]
        for a in answered
    ]
    headers = ["question", "today", "the other", *found["settings"], "so"]
    return tabulate(rows, headers, tablefmt=tablefmt, disable_numparse=True)


def _cell(answer: answers.Answer, setting: str) -> str:
    bold = "" if answer.seen[setting] == answers.EQUAL else "**"
    return f"{bold}{answer.ratios[setting]}{bold}"


def settings_text(found: dict[str, Any]) -> str:
    """Say what each setting is, and where GRPO's gradient points there."""
    lines = []
    for name, setting in found["settings"].items():
        own = answers.columns(found, name)[BASE].mean()
        policy = f"{setting['updates']} updates of GRPO after the warm start" if setting["updates"] else "warm starts"
        lines.append(f"{name}: {policy}, hints right {setting['p_hint']:.0%} of the time; cosine of GRPO {own:.2f}")
    return "\n".join(lines)


def gradient_text(found: dict[str, Any]) -> str:
    """Format the gradient check for a terminal."""
    wrong = checks.broken(found["checks"], next(iter(found["settings"])))
    last = f"BROKEN: {len(wrong)} controls came out wrong; believe nothing above" if wrong else "The controls hold."
    parts = (f"{sizes(found)}; {UNCERTAINTY}\n{about(found)}", settings_text(found), methods_table(found))
    return "\n\n".join((*parts, ANSWERS, answers_table(found), "\n".join(check_lines(found)), last))


def seeds_of(found: dict[str, Any]) -> str:
    """Return the arguments that choose the seeds."""
    first, n = found["seeds"][0], len(found["seeds"])
    return f"--seed {first} --seeds {n}" if first else f"--seeds {n}"


def sizes(found: dict[str, Any]) -> str:
    """Say how much was measured."""
    n, setting = len(found["seeds"]), next(iter(found["settings"].values()))
    policies = f"{n} policies" if n > 1 else "1 policy"
    objective = f"objectives from {setting['parts'] * 256} rollouts"
    return f"{policies} a setting, {setting['batches']} batches of 8 x 8 rollouts each, {objective}"


def _listed(seeds: list[int]) -> str:
    return ", ".join(map(str, seeds))


def check_lines(found: dict[str, Any]) -> list[str]:
    """Return one line for each control."""
    return [f"{c['outcome']:9} {c['setting']}: {c['name']}: {c['found']}" for c in found["checks"]]


def plot(path: pathlib.Path) -> list[pathlib.Path]:
    """Draw the charts of a file."""
    import matplotlib as mpl

    mpl.use("Agg")
    known = json.loads(path.read_text())
    charts = []
    if "gradient" in known:
        charts += [path.with_name(f"{path.stem}-{name}.png") for name in ("efficiency", "answers")]
        _plot_efficiency(charts[0], known["gradient"])
        _plot_answers(charts[1], known["gradient"])
    if "runs" in known:
        charts += runs.plot(path, known["runs"], COLOURS, OTHER)
    return charts


def _plot_efficiency(path: pathlib.Path, found: dict[str, Any]) -> None:
    from matplotlib import pyplot

    names = (*METHODS, *variants.CONTROLS)[::-1]
    figure, axes = pyplot.subplots(1, len(found["settings"]), figsize=(3.0 * len(found["settings"]) + 1, 4.4),
                                   layout="constrained", sharex=True, sharey=True, squeeze=False)  # fmt: skip
    for axis, setting in zip(axes[0], found["settings"], strict=True):
        own = answers.columns(found, setting)
        for y, name in enumerate(names):
            colour = CONTROL if name in variants.CONTROLS else COLOURS.get(name, OTHER)
            _interval(axis, answers.ratio(own[name], own[BASE]), y, colour)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set(title=setting, xlabel="efficiency / GRPO's")
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3, axis="x")
    figure.suptitle("gradient toward the hint-free objective, 95 % intervals; orange: controls", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _plot_answers(path: pathlib.Path, found: dict[str, Any]) -> None:
    """Draw a row for each question, a point for each setting; a filled one is no chance."""
    from matplotlib import pyplot

    answered = answers.answered(found)[::-1]
    height = 0.42 * len(answered) + 1.4
    figure, axis = pyplot.subplots(figsize=(9.5, height), layout="constrained")
    for y, answer in enumerate(answered):
        for k, (setting, ratio) in enumerate(answer.ratios.items()):
            filled = answer.seen[setting] != answers.EQUAL
            _interval(axis, ratio, y + 0.27 - 0.18 * k, f"C{k}", filled=filled, label=None if y else setting)
    labels = [f"{a.question.text}  {a.question.default} → {a.option}" for a in answered]
    axis.set_yticks(range(len(answered)), labels, fontsize=8)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_xlabel("efficiency / that of today's setting; filled: no chance")
    axis.grid(alpha=0.3, axis="x")
    if answered:
        figure.legend(frameon=False, fontsize=8, loc="outside upper right", ncols=len(found["settings"]))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _interval(
    axis: Any, ratio: answers.Ratio, y: float, colour: str, *, filled: bool = True, label: str | None = None
) -> None:
    axis.plot([ratio.low, ratio.high], [y, y], color=colour, linewidth=2)
    face = colour if filled else "white"
    axis.plot([ratio.value], [y], marker="o", markersize=5, color=colour, markerfacecolor=face, label=label)


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
        halves = f"looking: seeds {_listed(found['looking'])}; confirming: {_listed(found['confirming'])}"
        parts.append(f"{command}: {sizes(found)}; {UNCERTAINTY}; {halves}.  \n{about(found)}")
        parts.append(settings_text(found).replace("\n", "  \n"))
        parts.append(f"{ANSWERS}\n\n{answers_table(found, 'github')}")
        parts += [image for stem, image in images.items() if stem.endswith("answers")]
        parts.append(methods_table(found, "github"))
        outcomes = [check["outcome"] for check in found["checks"]]
        counts = ", ".join(f"{outcomes.count(o)} {o}" for o in (checks.OK, checks.UNDECIDED, checks.WRONG))
        parts.append(f"Controls: {counts}.")
        room = [c for c in found["checks"] if c["name"].startswith("there is room")]
        parts.append("Room: " + "; ".join(f"{c['setting']} {c['found']}" for c in room) + ".")
        parts += [image for stem, image in images.items() if stem.endswith("efficiency")]
    if "spread" in known:
        found = known["spread"]
        parts.append(f"`python benchmarks/learn_grounding.py --spread {seeds_of(found)}`:  \n{SPREAD}")
        parts.append(spread_text(found, "github"))
    if "runs" in known:
        found = known["runs"]
        parts.append(f"`python benchmarks/learn_grounding.py --train {seeds_of(found)}`:  \n{about(found)}")
        parts.append(runs.markdown(found))
        parts += [image for stem, image in images.items() if stem.endswith(("curves", "weights"))]
    return "\n\n".join(parts)


def with_section(guide: str, path: pathlib.Path = PATH) -> str:
    """Return the guide with its tables made anew; one without the markers stays as it is."""
    if BEGIN not in guide:
        return guide
    return with_block(guide, BEGIN, END, section(path))
