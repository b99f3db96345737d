"""What a training run left behind, also one that was killed: metrics step by step, and rollouts with their credit."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srpo.errors import ConfigError, SRPOError, is_number, refuse
from srpo.viz.lines import whole_lines
from srpo.viz.record import CreditRecord

FOLDER, METRICS, ROLLOUTS = "credit", "metrics.jsonl", "rollouts.jsonl"  # under the output directory of a run
_STATE = "trainer_state.json"
_EXAMPLES = 5  # failures that are kept


@dataclass(frozen=True)
class RunLog:
    """Hold what was read of a run.

    Args:
        folder: of the run.
        rows: metrics by name for each step that logged some, in the order of steps, with `"step"`.
        step, max_steps: the last step that is known of, and how many were planned; None where nothing says.
        rollouts: how many are kept.
        last: the rollouts of the last step that has some.
        failures: rollouts without both roles, the latest.
        sources: files that were read.
        notes: what could not be read.
    """

    folder: Path
    rows: list[dict[str, float]]
    step: int
    max_steps: int | None
    rollouts: int
    last: list[CreditRecord]
    failures: list[CreditRecord]
    sources: list[str]
    notes: list[str]

    def series(self, name: str) -> list[tuple[float, float]]:
        """Return the steps and values of a metric where it was logged as a finite number."""
        return [(row["step"], row[name]) for row in self.rows if name in row and math.isfinite(row[name])]


def read_run(folder: str | Path) -> RunLog:
    """Read a run of TRL's trainers: its `trainer_state.json` or that of the newest checkpoint, and `credit/*.jsonl`.

    Args:
        folder: `output_dir` of the run.

    Returns: RunLog. Where files disagree about a step, what was logged last holds.

    Raises: ConfigError, where there is nothing of a run.
    """
    folder, sources, notes = Path(folder), [], []
    if not folder.is_dir():
        got = "a file" if folder.exists() else "no such directory"
        refuse(ConfigError, "read_run", "folder", f"{str(folder)!r}, {got}", "output_dir of a run", "check the path")
    state = _newest_state(folder, sources, notes)
    rows: dict[int, dict[str, float]] = {}
    for row in state.get("log_history", []):
        _merge(rows, row)
    metrics = folder / FOLDER / METRICS
    if metrics.is_file():
        sources.append(f"{FOLDER}/{METRICS}")
        for row in _objects(metrics, notes):
            _merge(rows, row)
    n, last, failures = _rollouts(folder / FOLDER / ROLLOUTS, sources, notes)
    if not rows and not n:
        _refuse_empty(folder, notes)
    steps = [int(state.get("global_step") or 0), *rows, *(x.step or 0 for x in last)]
    planned = state.get("max_steps")
    planned = planned if isinstance(planned, int) and planned > 0 else None
    ordered = [rows[step] for step in sorted(rows)]
    return RunLog(folder, ordered, max(steps), planned, n, last, failures, sources, notes)


def _newest_state(folder: Path, sources: list[str], notes: list[str]) -> dict[str, Any]:
    """Return the trainer's state that knows most steps; a file that was cut is passed over."""
    found: dict[str, dict[str, Any]] = {}
    checkpoints = sorted(folder.glob(f"checkpoint-*/{_STATE}"), key=_number_of, reverse=True)
    for path in (folder / _STATE, *checkpoints):
        name = path.relative_to(folder).as_posix()
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
                raise ValueError("no log_history")
        except FileNotFoundError:
            continue
        except (ValueError, OSError) as error:
            notes.append(f"{name} cannot be read ({error})")
            continue
        found[name] = state
        if path.parent != folder:
            break
    if not found:
        return {}
    name = max(found, key=lambda name: found[name].get("global_step") or 0)
    sources.append(name)
    return found[name]


def _number_of(path: Path) -> int:
    number = path.parent.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _merge(rows: dict[int, dict[str, float]], row: Any) -> None:
    """Add the numbers of a row to those of its step."""
    step = row.get("step") if isinstance(row, dict) else None
    if isinstance(step, int | float):
        numbers = {k: float(v) for k, v in row.items() if is_number(v) or (isinstance(v, float) and math.isnan(v))}
        lost = {k: math.nan for k, v in row.items() if v in ("inf", "-inf", "nan") or v is None}
        rows.setdefault(int(step), {}).update(numbers | lost)


def _objects(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    cut = 0
    for found in whole_lines(path):
        cut += found is None
        if found is not None:
            yield found
    if cut:
        notes.append(f"{FOLDER}/{path.name}: {cut} cut line{'s' * (cut > 1)} left out")


def _rollouts(path: Path, sources: list[str], notes: list[str]) -> tuple[int, list[CreditRecord], list[CreditRecord]]:
    """Return how many rollouts are kept, those of the last step, and the latest failures; a line at a time."""
    n, cut, last, failures = 0, 0, [], []
    if not path.is_file():
        return n, last, failures
    sources.append(f"{FOLDER}/{path.name}")
    refused = ""
    for found in whole_lines(path):
        try:
            record = None if found is None else CreditRecord.from_fields(found)
        except SRPOError as error:
            record, refused = None, f": {error}"
        if record is None:
            cut += 1
            continue
        n += 1
        last = [record] if last and record.step != last[-1].step else [*last, record]
        if record.parsed is False:
            failures = [*failures, record][-_EXAMPLES:]
    if cut:
        notes.append(f"{FOLDER}/{path.name}: {cut} cut or unusable line{'s' * (cut > 1)} left out{refused}")
    return n, last, failures


def _refuse_empty(folder: Path, notes: list[str]) -> None:
    inside = [
        x.name for x in sorted(folder.iterdir())
        if x.is_dir() and ((x / _STATE).is_file() or (x / FOLDER).is_dir() or any(x.glob(f"checkpoint-*/{_STATE}")))
    ]  # fmt: skip
    fix = f"pass {folder / inside[0]}" if inside else "train with SRPOConfig(log_credit_steps=50)"
    expected = f"a run with {_STATE}, checkpoint-*/{_STATE} or {FOLDER}/*.jsonl in it"
    got = f"{str(folder)!r}, without any" + (f" ({'; '.join(notes)})" if notes else "")
    refuse(ConfigError, "read_run", "folder", got, expected, fix)
