"""Models whose parameters are spread over ranks: every rank runs the same forwards, of use to it or not.

A forward gathers the parameters of each part that it comes through. A rank that skips one, or comes by the vision tower
where another has no picture, leaves the others waiting for ever. So batches are run kind by kind, and whoever has fewer
of a kind runs one again, or one that another rank lends.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from srpo.vision.inputs import ModelInputs


class Batch(NamedTuple):
    """Sequences that are scored together: their inputs, those with corrupted pictures, roles, swapped perceptions."""

    inputs: ModelInputs
    corrupted: ModelInputs | None
    roles: Tensor
    other: tuple[Tensor, Tensor] | None

    @property
    def towers(self) -> tuple[bool, bool]:
        """Say which towers a forward comes through: of images, of videos."""
        return self.inputs.has_pixels("image"), self.inputs.has_pixels("video")

    def to(self, device: Any) -> "Batch":
        """Return the batch on a device."""

        def moved(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        def inputs_of(x: ModelInputs | None) -> ModelInputs | None:
            return None if x is None else ModelInputs(**pytree.tree_map(moved, vars(x)))

        inputs, corrupted = inputs_of(self.inputs), inputs_of(self.corrupted)
        assert inputs is not None
        return Batch(inputs, corrupted, *pytree.tree_map(moved, (self.roles, self.other)))


_R = TypeVar("_R")


def run_in_step(model: Any, batches: list[Batch], run: Callable[[Batch], _R]) -> list[_R]:
    """Run the batches of this rank in order of what they come through, and as many of each kind as any rank has.

    Collective: every rank of the model's group must call, one without batches too.
    """
    if not dist.is_available() or not dist.is_initialized():
        return [run(batch) for batch in batches]
    group = _group_of(model)
    own = Counter(batch.towers for batch in batches)
    counts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(counts, own, group=group)
    results: dict[int, _R] = {}
    for towers in sorted(set().union(*counts)):
        mine = [i for i, batch in enumerate(batches) if batch.towers == towers]
        spare = batches[mine[0]] if mine else None
        if not all(count[towers] for count in counts):
            lender = next(rank for rank, count in enumerate(counts) if count[towers])
            lent = [spare.to("cpu") if spare is not None and dist.get_rank(group) == lender else None]
            source = lender if group is None else dist.get_global_rank(group, lender)
            dist.broadcast_object_list(lent, src=source, group=group)
            spare = spare if lent[0] is None or spare is not None else lent[0].to(next(model.parameters()).device)
        assert spare is not None
        for n in range(max(count[towers] for count in counts)):
            result = run(batches[mine[n]] if n < len(mine) else spare)
            if n < len(mine):
                results[mine[n]] = result
    return [results[i] for i in range(len(batches))]


def _group_of(model: torch.nn.Module) -> Any:
    """Return the ranks that hold the shards; None for all of them, also where there are several axes."""
    parameters: Any = model.parameters()
    mesh = next((x.device_mesh for x in parameters if type(x).__name__ == "DTensor"), None)
    return mesh.get_group() if mesh is not None and mesh.ndim == 1 else None
