"""Run a function in several processes that form a gloo group on this machine."""

from __future__ import annotations

import importlib.util
import inspect
import os
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


def run_in_group(
    function: Callable[[], Iterator[tuple[str, Any]]], world: int, directory: Path, seconds: float = 120.0
) -> GroupRun:
    """Run a generator of names and results on every rank. A group that hangs is killed; what it has yielded stays.

    The function must be a module-level function of a file that children can execute again. Ranks meet in a file of
    `directory`, so that no port can be taken.
    """
    arguments = (inspect.getfile(function), function.__name__, world, str(directory))
    group = mp.start_processes(_child, arguments, nprocs=world, join=False, start_method="spawn")
    deadline = time.monotonic() + seconds
    error = ""
    try:
        while not error and not group.join(timeout=1.0):
            error = f"more than {seconds} s" if time.monotonic() > deadline else ""
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
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    for result_name, result in getattr(module, name)():
        torch.save(result, Path(directory) / f"{result_name}.{rank}.pt")
    dist.destroy_process_group()
