"""Other processes: Python on this checkout, and a function in several that form a gloo group on this machine."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import poison
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).parents[1]
HANG = 1800.0  # seconds: no machine is busy enough to need them


def run_python(
    *arguments: object, paths: tuple[Path, ...] = (), **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """Run Python from the root of this checkout and return what it said, whatever it returned.

    `paths`, this checkout and its tests come first where modules are looked for, so that it is this copy that runs.
    A variable that is None is taken out of the environment.
    """
    path = (*paths, ROOT, ROOT / "tests", os.environ.get("PYTHONPATH", ""))
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, filter(None, path))), **environment}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={name: value for name, value in variables.items() if value is not None},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG,
    )


@dataclass(frozen=True)
class GroupRun:
    """What the ranks of a group yielded, by name and rank, and why they stopped early, if they did."""

    world: int
    directory: Path
    error: str

    def __getitem__(self, name: str) -> list[Any]:
        files = [self.directory / f"{name}.{rank}.pt" for rank in range(self.world)]
        missing = [rank for rank, file in enumerate(files) if not file.exists()]
        assert not missing, f"ranks {missing} have no {name}: {self.error or 'no such result'}"
        return [torch.load(file, weights_only=True) for file in files]


def run_in_group(function: Callable[[], Iterator[tuple[str, Any]]], world: int, directory: Path) -> GroupRun:
    """Run a generator of names and results on every rank. A group that hangs is killed; what it has yielded stays.

    The function must be a module-level function of a file that children can execute again. Ranks meet in a file of
    `directory`, so that no port can be taken.
    """
    arguments = (inspect.getfile(function), function.__name__, world, str(directory))
    group = mp.start_processes(_child, arguments, nprocs=world, join=False, start_method="spawn")
    deadline = time.monotonic() + HANG
    error = ""
    try:
        while not error and not group.join(timeout=1.0):
            error = f"more than {HANG} s" if time.monotonic() > deadline else ""
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as failure:
        error = str(failure)
    finally:
        for process in group.processes:
            if process.is_alive():
                process.kill()
                process.join()
    return GroupRun(world, directory, error)


def _child(rank: int, file: str, name: str, world: int, directory: str) -> None:
    torch.set_num_threads(1)
    poison.install()
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter_guard

        interpreter_guard.install()
    spec = importlib.util.spec_from_file_location("in_a_group", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    store = (Path(directory) / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=HANG))
    for result_name, result in getattr(module, name)():
        torch.save(result, Path(directory) / f"{result_name}.{rank}.pt")
    dist.destroy_process_group()
