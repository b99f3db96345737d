"""The report of a run: what its metrics and its rollouts say, as a page and as a summary."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from srpo.viz.advice import Warned, early, late, warnings_of
from srpo.viz.curves import chart, number
from srpo.viz.page import CreditPage, controls, escaped, ordered, rollout_data, rollouts_html, scale_limit, whole_page
from srpo.viz.record import plain
from srpo.viz.run_log import RunLog, read_run

_MOST_SHOWN = 16  # rollouts of the last step


class Plot(NamedTuple):
    """Describe a chart: its title, metrics by the name of their line, and what it shows."""

    title: str
    metrics: Mapping[str, str]
    explanation: str


def _cells(metric: str) -> dict[str, str]:
    """Return a metric of each role and sign of the advantage, by the name of its line."""
    return {
        f"{role}, A {'>' if sign == 'positive' else '<'} 0": f"srpo/{role}/{sign}/{metric}"
        for role in ("perception", "reasoning")
        for sign in ("positive", "negative")
    }


PLOTS = (
    Plot("Reward", {"mean": "reward", "std": "reward_std"}, "Mean and standard deviation over the rollouts of a step."),
    Plot("Contrast, nats", _cells("contrast_mean"), "What tokens lose without the picture, or without the perception."),
    Plot("Weight", _cells("weight_mean"), "Mean weight: above 1 a role counts for more than under GRPO."),
    Plot("Bounds hit", _cells("clip_fraction"), "Share of the weights at weight_min or weight_max."),
    Plot("Weights", {"largest": "srpo/weight_max", "smallest": "srpo/weight_min"}, "Over tokens with a role."),
    Plot(
        "Effective sample size",
        {"share of tokens": "srpo/effective_sample_size"},
        "1: all tokens count alike; weights of [0.8, 1.2] give about 0.97.",
    ),
    Plot(
        "Format",
        {"role missing": "srpo/parse_failures", "tag left open": "srpo/unclosed", "stray tag": "srpo/stray"},
        "Shares of the completions.",
    ),
    Plot(
        "Without a signal",
        {"advantage 0": "srpo/zero_advantage_fraction", "weights exactly 1": "srpo/uniform_fraction"},
        "Shares of the trajectories.",
    ),
    Plot(
        "Evidence",
        {"perception": "srpo/perception/evidence_fraction", "reasoning": "srpo/reasoning/evidence_fraction"},
        "Share of the tokens of a role whose contrast has a value.",
    ),
    Plot(
        "Tokens of a role",
        {"perception": "srpo/perception/length", "reasoning": "srpo/reasoning/length"},
        "Mean number in a completion.",
    ),
    Plot("Loss", {"loss": "loss"}, "Near 0 on policy: the advantages of a group sum to 0."),
    Plot("Gradient norm", {"norm": "grad_norm"}, "Before clipping."),
    Plot("Entropy", {"nats": "entropy"}, "Of the policy, a token."),
    Plot("KL to the reference", {"kl": "kl"}, "Nats a token."),
    Plot("Completion length", {"tokens": "completions/mean_length"}, "Mean over the rollouts."),
)


class Report(NamedTuple):
    """Hold a report.

    Args:
        summary: plain data, as `--json` prints it.
        page: one self-contained page.
    """

    summary: dict[str, Any]
    page: CreditPage


def run_report(folder: str | Path) -> Report:
    """Read a run and report on it.

    Args:
        folder: `output_dir` of a run of TRL's trainers; richest with `SRPOConfig(log_credit_steps=)`. A run that was
            killed is reported as far as it came.

    Returns: Report.

    Raises: ConfigError, where there is nothing of a run.
    """
    run = read_run(folder)
    warned = warnings_of(run)
    names = dict.fromkeys(name for plot in PLOTS for name in plot.metrics.values())
    metrics = {name: {"first": plain(early(run, name), 5), "last": plain(late(run, name), 5)} for name in names}
    summary = {
        "run": str(run.folder),
        "step": run.step,
        "max_steps": run.max_steps,
        "sources": run.sources,
        "notes": run.notes,
        "rollouts": run.rollouts,
        "metrics": {name: ends for name, ends in metrics.items() if ends["last"] is not None},
        "warnings": [x._asdict() for x in warned],
        "parse_failures": [{"step": x.step, "text": x.text} for x in run.failures],
    }
    return Report(summary, _page(run, warned))


def summary_text(summary: Mapping[str, Any]) -> str:
    """Return a summary in lines of at most 100 characters."""
    planned = "" if summary["max_steps"] is None else f" of {summary['max_steps']}"
    lines = [f"{summary['run']}: step {summary['step']}{planned}, {summary['rollouts']} rollouts kept"]
    lines += [f"read {', '.join(summary['sources'])}", *(f"note: {note}" for note in summary["notes"]), ""]
    if summary["metrics"]:
        lines += [f"{'metric':<46}{'first third':>12}{'last third':>12}"]
        for name, ends in summary["metrics"].items():
            lines.append(f"{name:<46}{_short(ends['first']):>12}{_short(ends['last']):>12}")
        lines.append("")
    for x in summary["warnings"]:
        lines += [f"warning: {x['seen']}", f"  likely: {x['causes']}", f"  try: {x['fix']}"]
    return "\n".join(lines) if summary["warnings"] else "\n".join([*lines, "no warning applies"])


def _short(x: float | None) -> str:
    return "-" if x is None or math.isnan(x) else number(x)


def _page(run: RunLog, warned: Sequence[Warned]) -> CreditPage:
    planned = "" if run.max_steps is None else f" of {run.max_steps}"
    sources = ", ".join(run.sources)
    body = [
        f"<h1>{escaped(run.folder.resolve().name)}</h1>",
        f'<p class="soft">Step {run.step}{planned}; {run.rollouts} rollouts kept; read from {escaped(sources)}.</p>',
        *(f'<p class="soft">{escaped(note)}</p>' for note in run.notes),
        "<h2>Warnings</h2>" if warned else '<p class="fine">No warning applies.</p>',
        *map(_warning, warned),
    ]
    series = [(plot, {line: run.series(name) for line, name in plot.metrics.items()}) for plot in PLOTS]
    charts = "".join(chart(plot.title, lines, plot.explanation) for plot, lines in series)
    if charts:
        body.append(f'<h2>Curves</h2><div class="charts">{charts}</div>')
    shown, failures = ordered(run.last)[:_MOST_SHOWN], run.failures[::-1]
    if shown:
        limit = scale_limit([*shown, *failures])
        body.append(f"<h2>Rollouts of step {shown[0].step or 0}</h2>{controls([*shown, *failures], 'weighted')}")
        body.append(rollouts_html(shown, limit))
        if failures:
            body.append("<h2>Completions without both roles, the latest first</h2>")
            body.append(rollouts_html(failures, limit, len(shown)))
    return whole_page(f"Report of {run.folder.resolve().name}", "".join(body), rollout_data([*shown, *failures]))


def _warning(x: Warned) -> str:
    return (
        f'<section class="warning"><h3>{escaped(x.seen[:1].upper() + x.seen[1:])}.</h3>'
        f"<p><b>Likely:</b> {escaped(x.causes)}.</p><p><b>Try:</b> {escaped(x.fix)}.</p></section>"
    )
