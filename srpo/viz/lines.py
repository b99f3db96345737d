"""Records as JSON lines, in files that a run may leave cut anywhere."""

import io
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from srpo.errors import ConfigWarning
from srpo.viz.record import CreditRecord


def append_records(path: str | Path, records: Sequence[CreditRecord]) -> None:
    """Append records to a file of JSON lines, which is made where there is none.

    A line that was cut, as by a run that was killed, stays alone: what follows it begins a line of its own.
    """
    append_lines(path, (record.to_json() for record in records))


def append_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Append lines, each whole."""
    with open(path, "ab+") as file:
        if file.seek(0, io.SEEK_END):
            file.seek(-1, io.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write("".join(f"{line}\n" for line in lines).encode())


def read_records(path: str | Path) -> list[CreditRecord]:
    """Read the records of a file of JSON lines.

    Warns: ConfigWarning where lines are cut, as the last one of a run that was killed; they are left out.

    Raises: FileNotFoundError; ShapeError, DtypeError, ConfigError.
    """
    lines = list(whole_lines(path))
    cut = lines.count(None)
    if cut:
        warnings.warn(f"read_records(): {cut} cut lines of {path} are left out", ConfigWarning, stacklevel=2)
    return [CreditRecord.from_json(line) for line in lines if line is not None]


def whole_lines(path: str | Path) -> Iterator[str | None]:
    """Yield the lines of a file that are JSON objects, and None for each that is cut."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.strip():
                try:
                    is_object = isinstance(json.loads(line), dict)
                except json.JSONDecodeError:
                    is_object = False
                yield line if is_object else None
