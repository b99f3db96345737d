"""Records as JSON lines, in files that a run may leave cut anywhere."""

import io
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

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
    objects = list(whole_lines(path))
    cut = objects.count(None)
    if cut:
        warnings.warn(f"read_records(): {cut} cut lines of {path} are left out", ConfigWarning, stacklevel=2)
    return [CreditRecord.from_fields(x) for x in objects if x is not None]


def whole_lines(path: str | Path) -> Iterator[dict[str, Any] | None]:
    """Yield the objects of a file of JSON lines, and None for each line that is cut."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.strip():
                try:
                    found = json.loads(line)
                except json.JSONDecodeError:
                    found = None
                yield found if isinstance(found, dict) else None
