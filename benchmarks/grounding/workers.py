"""Run the parts of a measurement on all cores. What comes out does not depend on how many there are."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from rich.progress import Progress


class Workers:
    """Processes of one thread each, or none for a single worker.

    Args:
        count: processes; each computes whole parts, so that sums are always taken in the same order.
        progress: where bars are drawn.
        threads: of a single worker, where there is one part alone; these do change the order of sums.
    """

    def __init__(self, count: int, progress: Progress, threads: int = 1) -> None:
        self.progress = progress
        self.threads = torch.get_num_threads()
        torch.set_num_threads(threads)
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(count, context, torch.set_num_threads, (1,)) if count > 1 else None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.threads)
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def map(self, name: str, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a function of a module with each of some arguments; return the results in their order."""
        bar = self.progress.add_task(name, total=len(arguments))
        if self.pool is None:
            results = []
            for given in arguments:
                results.append(function(*given))
                self.progress.advance(bar)
        else:
            futures = [self.pool.submit(function, *given) for given in arguments]
            for future in futures:
                future.add_done_callback(lambda _: self.progress.advance(bar))
            results = [future.result() for future in futures]
        self.progress.remove_task(bar)
        return results
