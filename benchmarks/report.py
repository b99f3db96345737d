"""Turn measured results into text, charts, the guide's tables, and the README's claims.

python benchmarks/report.py                  every table of every file in benchmarks/results
python benchmarks/report.py --readme         rewrite the tables of benchmarks/README.md, and the README's claims
"""

import argparse
import json
import pathlib
import re
from typing import Any

from tabulate import tabulate

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GUIDE = ROOT / "benchmarks" / "README.md"
BEGIN, END = "<!-- figures: python benchmarks/report.py --readme -->", "<!-- end of figures -->"
CLAIMS_BEGIN, CLAIMS_END = "<!-- claims: python benchmarks/report.py --readme -->", "<!-- end of claims -->"
CLAIMS = """On {device}, {date}, each a ratio within one run:

- Loss from logits, forward and backward: {speed:.1f} times the speed of plain PyTorch, with {memory:.0%} of its extra
  memory; two contrast streams in the same pass: {contrast_speed:.1f} times.
- From hidden states, {rows} tokens: {gib:.2f} GiB of extra memory where plain PyTorch takes {eager_gib:.1f}. Where all
  logits fit, at {small} tokens: {hidden_speed:.2f} times the speed of plain PyTorch, {liger_speed:.1f} times that of
  Liger.
- All three streams of {group} rollouts of a prompt: {shared:.2f} of the time of one plain forward, where three forwards
  take {three:.1f}.
- The credit stage alone is slower than ten lines of PyTorch that check nothing: {credit:.0f} ms for {cells} tokens."""
HEADERS = ["provider", "ms", "p20", "p80", "x eager", "of floor", "peak MiB", ""]
FORMATS = ("", ".1f", ".1f", ".1f", ".2f", ".2f", ".0f", "")
SHOWN = ("forward + backward", "forward + backward, 2 contrast streams", "scoring", "contrast, weights, advantages")
COLOURS = {"eager": "#7f7f7f", "TRL": "#d98200", "Liger": "#2a78b5", "srpo": "#b5202a"}
UNITS = {"rows": "rows (tokens)", "vocabulary": "vocabulary", "active rows": "share of rollouts with a gradient"}


def path_of(device: str) -> pathlib.Path:
    """Return the file of a device."""
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


def save(
    path: pathlib.Path, where: dict[str, Any], floors: dict[str, float], tables: list, points: list[dict[str, Any]]
) -> None:
    """Write what was measured; a part that was not measured now stays as it was."""
    known = json.loads(path.read_text()) if path.exists() else {}
    run = {"environment": where, "floors": floors}
    if tables:
        known["loss"] = run | {"tables": tables}
    if points:
        known["growth"] = run | {"points": points}
    path.write_text(json.dumps(known, indent=1) + "\n")


def heading(where: dict[str, Any], floors: dict[str, float]) -> str:
    """Name the device, the versions, and the floors."""
    rest = " | ".join(f"{name} {value}" for name, value in where.items() if name not in ("device", "cpu"))
    rates = ", ".join(f"{rate:.2f} TFLOP/s in {name}" for name, rate in floors.items() if name != "copy")
    device = " | ".join(where[name] for name in ("device", "cpu") if name in where)
    return f"{device}\n{rest}\nfloors: copy {floors['copy']:.1f} GB/s; matrix products {rates}"


def title(table: dict[str, Any]) -> str:
    """Name a table."""
    letters = {"logits": "BTV", "hidden": "BTVH", "credit": "BT"}[table["level"]]
    sizes = " ".join(f"{letter}={table['shape'][letter]}" for letter in letters)
    return f"{table['level']}: {table['title']}, {sizes}, {table['dtype']}"


def lines(table: dict[str, Any]) -> list[list[Any]]:
    """Return the rows of a table."""
    keys = ("provider", "ms", "p20", "p80", "x_eager", "of_floor", "peak", "note")
    return [[row[key] for key in keys] for row in table["rows"]]


def text_table(table: dict[str, Any]) -> str:
    """Format a table for a terminal."""
    body = tabulate(lines(table), HEADERS, floatfmt=FORMATS, missingval="")
    skipped = "".join(f"\n{name}: {why}" for name, why in table["skipped"].items())
    return f"{title(table)}\nfloor: {table['floor']}\n{body}{skipped}"


def growth_text(points: list[dict[str, Any]]) -> str:
    """Format the points of growth."""
    rows = [[p["axis"], p["x"], p["provider"], p["ms"], p["floor"] / p["ms"], p["peak"], p["logits"]] for p in points]
    headers = ["axis", "", "provider", "ms", "of floor", "peak MiB", "logits MiB"]
    return tabulate(rows, headers, floatfmt=("", "g", "", ".0f", ".2f", ".0f", ".0f"))


def plot(path: pathlib.Path) -> list[pathlib.Path]:
    """Draw the growth of one file; return the charts."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    run = json.loads(path.read_text()).get("growth")
    if run is None:
        return []
    panels = {"rows": ("ms", "peak"), "sizes": (("vocabulary", "ms"), ("active rows", "ms"))}
    charts = []
    for name, (left, right) in panels.items():
        figure, axes = pyplot.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
        for axis, panel in zip(axes, (left, right), strict=True):
            along, what = panel if isinstance(panel, tuple) else (name, panel)
            _panel(axis, [p for p in run["points"] if p["axis"] == along], along, what)
        axes[0].legend(frameon=False, fontsize=9)
        figure.suptitle(f"hidden states to loss and gradients · {run['environment']['device']}", fontsize=10)
        charts.append(path.with_name(f"{path.stem}-{name}.png"))
        figure.savefig(charts[-1], dpi=130)
        pyplot.close(figure)
    return charts


def _panel(axis: Any, points: list[dict[str, Any]], along: str, what: str) -> None:
    scale = 1e3 if what == "ms" else 2**10
    for name, colour in COLOURS.items():
        own = [(p["x"], p[what] / scale) for p in points if p["provider"] == name]
        if own:
            axis.plot(*zip(*own, strict=True), marker="o", markersize=3.5, color=colour, label=name)
    base, label = ("floor", "bare matrix products") if what == "ms" else ("logits", "one copy of the logits (fp32)")
    below = sorted({(p["x"], p[base] / scale) for p in points})
    axis.plot(*zip(*below, strict=True), color="black", linestyle="--", linewidth=1)
    axis.annotate(label, below[1], xytext=(10, -14), textcoords="offset points", fontsize=8, va="top")
    axis.set(xscale="log", yscale="log", xlabel=UNITS[along], ylabel="seconds" if what == "ms" else "peak memory, GiB")
    ticks = sorted({p["x"] for p in points})
    axis.set_xticks(ticks, [f"{x:g}" if x < 1000 else f"{x / 1024:g}k" for x in ticks], fontsize=8)
    low, high = axis.get_ylim()
    heights = [y for decade in range(-4, 6) for y in (10.0**decade, 2 * 10.0**decade, 5 * 10.0**decade)]
    shown = [y for y in heights if low <= y <= high]
    axis.set_yticks(shown, [f"{y:g}" for y in shown], fontsize=8)
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def readme_figures() -> str:
    """Return the guide's figures: the main tables of each device, and its charts."""
    parts = []
    for path in sorted(RESULTS.glob("*.json")):
        known = json.loads(path.read_text())
        if "loss" in known:
            parts.append(_readme_tables(known["loss"]))
        if "growth" in known:
            where, charts = known["growth"]["environment"], sorted(path.parent.glob(f"{path.stem}-*.png"))
            parts += [f"![{chart.stem}](results/{chart.name})" for chart in charts]
            command = "`python benchmarks/bench_loss.py --growth --json --plot`"
            note = "Where a curve runs below the dashed one, the machine ran faster than when the rate was measured."
            parts.append(f"{command}, {where['date']}, commit {where['commit']}. {note}")
    return "\n\n".join(parts)


def _readme_tables(run: dict[str, Any]) -> str:
    where = run["environment"]
    about = heading(where, run["floors"]).replace("\n", "  \n")
    parts = [about, "`python benchmarks/bench_loss.py --json`:"]
    shown = (0, 1, 4, 5, 6, 7)
    for table in run["tables"]:
        if table["title"] in SHOWN:
            picked = [[line[i] for i in shown] for line in lines(table)]
            headers, formats = [HEADERS[i] for i in shown], tuple(FORMATS[i] for i in shown)
            body = tabulate(picked, headers, tablefmt="github", missingval="", floatfmt=formats)
            parts.append(f"{title(table)}; floor: {table['floor']}\n\n{body}")
    return "\n\n".join(parts)


def readme_claims() -> str:
    """Return what the README claims of the first device, from the files alone."""
    (path, *_) = sorted(RESULTS.glob("*.json"))
    known = json.loads(path.read_text())
    logits, contrasts, hidden, credit = (
        _providers(known["loss"]["tables"], level, name)
        for level, name in (
            ("logits", "forward + backward"),
            ("logits", "forward + backward, 2 contrast streams"),
            ("hidden", "forward + backward"),
            ("credit", "contrast, weights, advantages"),
        )
    )
    points = [point for point in known["growth"]["points"] if point["axis"] == "rows"]
    most = max(point["x"] for point in points if point["provider"] == "eager")
    peaks = {point["provider"]: point["peak"] / 2**10 for point in points if point["x"] == most}
    shapes = json.loads((RESULTS / "scoring" / path.name).read_text())["shapes"]
    cases = next(x["cases"] for x in shapes if (x["prompt"], x["completion"], x["group"]) == (1100, 256, 8))
    where, one = known["loss"]["environment"], cases["one forward"]["ms"]
    shape, cells = hidden["shape"], credit["shape"]
    return CLAIMS.format(
        device=where["device"].replace("CPU", "a CPU"),
        date=where["date"],
        speed=logits["srpo"]["x_eager"],
        memory=logits["srpo"]["peak"] / logits["eager"]["peak"],
        contrast_speed=contrasts["srpo"]["x_eager"],
        rows=most,
        gib=peaks["srpo"],
        eager_gib=peaks["eager"],
        hidden_speed=hidden["srpo"]["x_eager"],
        liger_speed=hidden["Liger"]["ms"] / hidden["srpo"]["ms"],
        small=shape["B"] * shape["T"],
        group=8,
        shared=cases["shared prompts"]["ms"] / one,
        three=cases["three forwards"]["ms"] / one,
        credit=credit["srpo"]["ms"],
        cells=cells["B"] * cells["T"],
    )


def _providers(tables: list[dict[str, Any]], level: str, name: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a table by provider, and its shape under "shape"."""
    table = next(table for table in tables if (table["level"], table["title"]) == (level, name))
    return {row["provider"]: row for row in table["rows"]} | {"shape": table["shape"]}


def with_figures(guide: str) -> str:
    """Return the guide with its figures made anew."""
    return with_block(guide, BEGIN, END, readme_figures())


def with_claims(readme: str) -> str:
    """Return the README with its claims made anew."""
    return with_block(readme, CLAIMS_BEGIN, CLAIMS_END, readme_claims())


def with_block(readme: str, begin: str, end: str, text: str) -> str:
    """Return a text with what is between two marks replaced."""
    before, _, rest = readme.partition(begin)
    after = rest.partition(end)[2]
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def main() -> None:
    """Print all tables, or rewrite the guide's and the README's claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="rewrite the guide's tables and the README's claims")
    options = parser.parse_args()
    if options.readme:
        GUIDE.write_text(with_figures(GUIDE.read_text()))
        readme = ROOT / "README.md"
        readme.write_text(with_claims(readme.read_text()))
        return
    for path in sorted(RESULTS.glob("*.json")):
        known = json.loads(path.read_text())
        for name, run in known.items():
            print(f"{path.name}: {name}\n{heading(run['environment'], run['floors'])}\n")
            if name == "loss":
                print("\n\n".join(text_table(table) for table in run["tables"]))
            else:
                print(growth_text(run["points"]))


if __name__ == "__main__":
    main()
