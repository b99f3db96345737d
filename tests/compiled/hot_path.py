"""Find the part of a kernel that runs once per block of elements.

It is the innermost loop over global memory, or the whole kernel where no loop touches memory. Where branches exclude
each other it follows the one that moves more bytes; what a branch may skip without moving fewer is skipped, as is the
code for the one block in many that holds the target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One machine instruction; `target` is the label that a branch goes to, `ends` that the program never goes on."""

    opcode: str
    target: str | None = None
    conditional: bool = False
    ends: bool = False


@dataclass(frozen=True)
class Listing:
    """The instructions of a kernel in order, and the position of each label."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def successors(self, i: int) -> list[int]:
        """Return where the program may go after instruction `i`."""
        instruction = self.instructions[i]
        jump = self.labels.get(instruction.target) if instruction.target else None
        following = [] if jump is None else [jump]
        if not instruction.ends and (jump is None or instruction.conditional):
            following.append(i + 1)
        return [s for s in following if s < len(self.instructions)]


def hot_path(listing: Listing, bytes_moved: Callable[[Instruction], int]) -> tuple[bool, list[Instruction]]:
    """Return whether there is a loop over memory, and the instructions of one trip through it."""
    weights = [bytes_moved(i) for i in listing.instructions]
    finished, back_edges = _depth_first(listing)
    loops = [(head, _natural_loop(listing, finished, head, tail)) for tail, head in back_edges]
    loops = [(head, body) for head, body in loops if any(weights[i] for i in body)]
    innermost = [(head, body) for head, body in loops if not any(other < body for _, other in loops)]
    regions = innermost or [(0, set(finished))]
    paths = [_heaviest_path(listing, weights, finished, set(back_edges), *region) for region in regions]
    heaviest = max(paths, key=lambda path: sum(weights[i] for i in path))
    return bool(innermost), [listing.instructions[i] for i in heaviest]


def _depth_first(listing: Listing) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the reachable instructions, each after its successors, and the edges that close loops."""
    finished, back_edges = [], []
    state = {0: "open"}
    stack = [(0, iter(listing.successors(0)))]
    while stack:
        i, following = stack[-1]
        for successor in following:
            if successor not in state:
                state[successor] = "open"
                stack.append((successor, iter(listing.successors(successor))))
                break
            if state[successor] == "open":
                back_edges.append((i, successor))
        else:
            state[i] = "done"
            finished.append(i)
            stack.pop()
    return finished, back_edges


def _natural_loop(listing: Listing, reachable: list[int], head: int, tail: int) -> set[int]:
    """Return the instructions that reach `tail` without passing `head`, and `head`."""
    predecessors: dict[int, list[int]] = {}
    for i in reachable:
        for successor in listing.successors(i):
            predecessors.setdefault(successor, []).append(i)
    body, waiting = {head}, [tail]
    while waiting:
        i = waiting.pop()
        if i not in body:
            body.add(i)
            waiting += predecessors.get(i, [])
    return body


def _heaviest_path(
    listing: Listing, weights: list[int], finished: list[int], back_edges: set, head: int, body: set[int]
) -> list[int]:
    """Return the path from `head` inside `body` that moves most bytes; of equal ones the shortest."""
    best: dict[int, tuple[int, int]] = {}
    chosen: dict[int, int | None] = {}
    for i in finished:
        if i in body:
            options = [s for s in listing.successors(i) if s in best and (i, s) not in back_edges]
            chosen[i] = max(options, key=best.__getitem__, default=None)
            moved, length = best[chosen[i]] if options else (0, 0)
            best[i] = moved + weights[i], length - 1
    path, i = [], head
    while i is not None:
        path.append(i)
        i = chosen[i]
    return path
