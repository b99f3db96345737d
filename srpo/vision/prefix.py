"""Prompts that several sequences share are computed once: one prefill a context, and continuations from its cache.

    prompts with their pictures   -> cache, last state       once for all rollouts of a prompt
    clean      every completion token after the prompt
    ablated    the same cache; perception tokens never enter it, the positions of the others stay
    corrupted  a cache of its own; completions end with the last token that is read

GRPO samples many rollouts of one prompt, and a prompt of a vision-language model is mostly picture.
"""

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from srpo.vision.access import cache_name, counted_positions, head_states, rope_positions, takes_positions
from srpo.vision.cuts import is_pixels, kind_of
from srpo.vision.inputs import ModelInputs

# Largest mean difference of log-probs between a continuation and a plain forward of the same tokens, in nats: what two
# batch sizes differ by, by element size in bytes.
_ROUNDING = {8: 1e-6, 4: 1e-4, 2: 0.05}
_log = logging.getLogger(__name__)


class Groups(NamedTuple):
    """Rows with the same prompt and the same pictures: the first row of each group, and the group `[B]` of each row."""

    firsts: list[int]
    of_row: Tensor

    @property
    def are_shared(self) -> bool:
        """Say whether any prompt occurs twice."""
        return len(self.firsts) < len(self.of_row)

    def at_equal_positions(self, inputs: ModelInputs, P: int) -> "Groups":
        """Take rows out whose prompt is not where it is in the first row of their group."""
        positions, mask = inputs.position_ids, inputs.attention_mask[:, :P] != 0
        assert positions is not None
        firsts = torch.tensor(self.firsts, device=mask.device)[self.of_row]
        moved = (positions[..., :P] != positions[..., firsts, :P]) & mask
        apart = moved.reshape(-1, *mask.shape).any(dim=0).any(dim=-1).nonzero()[:, 0]
        of_row = self.of_row.clone()
        of_row[apart] = len(self.firsts) + torch.arange(len(apart), device=apart.device)
        return Groups([*self.firsts, *apart.tolist()], of_row)


def groups_of(inputs: ModelInputs, P: int, cuts: Any) -> Groups:
    """Find the rows that have their first P columns and all that belongs to them in common, by content."""
    known: dict[bytes, list[tuple[int, ModelInputs]]] = {}
    firsts: list[int] = []
    index = []
    ids, mask = inputs.input_ids[:, :P].cpu(), inputs.attention_mask[:, :P].cpu()
    for i in range(len(ids)):
        row = inputs.rows(slice(i, i + 1), cuts).columns(slice(0, P))
        alike = known.setdefault(ids[i][mask[i] != 0].numpy().tobytes(), [])
        group = next((group for group, other in alike if _same_pictures(row, other)), None)
        if group is None:
            group = len(firsts)
            firsts.append(i)
            alike.append((group, row))
        index.append(group)
    return Groups(firsts, torch.tensor(index, device=inputs.input_ids.device))


def _same_pictures(a: ModelInputs, b: ModelInputs) -> bool:
    if a.multimodal.keys() != b.multimodal.keys():
        return False
    pairs = ((x, b.multimodal[name]) for name, x in a.multimodal.items())
    return all(
        x.shape == y.shape and torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in pairs
    )


def take_rows(inputs: ModelInputs, rows: list[int], cuts: Any) -> ModelInputs:
    """Take sequences in any order, with what belongs to them."""
    if rows == list(range(len(inputs.input_ids))):
        return inputs
    parts = [inputs.rows(slice(i, i + 1), cuts) for i in rows]
    multimodal: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in parts for name in part.multimodal):
        own = [part.multimodal[name] for part in parts if name in part.multimodal]
        shared = own[0] is inputs.multimodal[name]  # belongs to no sequence in particular
        joined = own[0] if shared else torch.cat(own) if isinstance(own[0], Tensor) else [x for y in own for x in y]
        multimodal[name] = joined
    positions = inputs.position_ids
    index = torch.tensor(rows, device=inputs.input_ids.device)
    return replace(
        inputs, input_ids=inputs.input_ids[index], attention_mask=inputs.attention_mask[index],
        position_ids=None if positions is None else positions[..., index, :], multimodal=multimodal,
    )  # fmt: skip


@dataclass(frozen=True)
class Prefix:
    """The prompts of a context after their prefill: nothing of it outlives the call that made it.

    Args:
        model: a model whose head is plain.
        inputs: of all sequences, with the positions of every column.
        P: columns of the prompts.
        cache: of the U different prompts.
        last: `[U, 1, H]` states at the last column of the prompts.
        of_row: `[B]` the prompt of each sequence.
    """

    model: Any
    inputs: ModelInputs
    P: int
    cache: Any
    last: Tensor
    of_row: Tensor

    @classmethod
    def of(cls, model: Any, inputs: ModelInputs, P: int, cuts: Any, groups: Groups, batch_size: int) -> "Prefix | None":
        """Run the prompts of the groups through the model; None where head or cache are not of the plain kind."""
        caches, last = [], []
        for first in range(0, len(groups.firsts), batch_size):
            part = take_rows(inputs, groups.firsts[first : first + batch_size], cuts).columns(slice(0, P))
            found = head_states(model, part.kwargs(), 1, use_cache=True)
            if not found.is_bare or not _is_repeatable(found.cache):
                return None
            caches.append(found.cache)
            last.append(found.states)
        return cls(model, inputs, P, _joined(caches), torch.cat(last), groups.of_row)

    def parts(self, rows: Tensor, batch_size: int, cache_bytes: int) -> Iterator[Tensor]:
        """Split row indices into parts whose copies of the cache fit a budget; at least one row each."""
        per_row = _bytes_of(self.cache) // max(len(self.last), 1)
        size = max(1, min(batch_size, cache_bytes // max(per_row, 1)))
        yield from rows.split(size)

    def states(self, rows: Tensor, ids: Tensor, mask: Tensor, positions: Tensor, aligned: dict[str, Tensor]) -> Tensor:
        """Return the states `[b, n + 1, H]` at the last prompt column and at n continuing tokens of some rows.

        Args:
            rows: `[b]` indices.
            ids, mask: `[b, n]`.
            positions: `[..., b, n]`.
            aligned: inputs with an entry per continuing token.
        """
        prompts = self.of_row[rows]
        last = self.last[prompts]
        if not ids.shape[1]:
            return last
        cache = copy.deepcopy(self.cache)
        cache.batch_select_indices(prompts)
        before = self.inputs.attention_mask[rows][:, : self.P]
        named = {"input_ids": ids, "attention_mask": torch.cat([before, mask.to(before)], dim=1)}
        named |= {"position_ids": positions, cache_name(self.model): cache}
        found = head_states(self.model, named | aligned, ids.shape[1], use_cache=True)
        return torch.cat([last, found.states], dim=1)


def with_positions(model: Any, inputs: ModelInputs) -> ModelInputs | None:
    """Return the inputs with the position of every column; None for a model that does not let us say them."""
    if inputs.position_ids is not None:
        return inputs
    if not takes_positions(model):
        return None
    ids, mask = inputs.input_ids, inputs.attention_mask
    positions = rope_positions(model, ids, mask, inputs.multimodal)
    positions = counted_positions(model, ids, mask) if positions is None else positions
    return None if positions is None else replace(inputs, position_ids=positions)


def aligned_inputs(inputs: ModelInputs) -> dict[str, Tensor]:
    """Return what has an entry per token and says nothing of pictures: token types."""
    return {
        name: x for name, x in inputs.multimodal.items()
        if inputs.is_aligned(name, x) and not is_pixels(name) and kind_of(name) is None
    }  # fmt: skip


class Proofs:
    """Which models score a continuation as they score the whole: found out on the first batch of each."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Any, dict[Any, bool]] = WeakKeyDictionary()

    def known(self, model: Any) -> bool | None:
        """Return what was found of a model in its present dtype and attention; None: nothing yet."""
        return self._known.get(model, {}).get(self._state(model))

    def keep(self, model: Any, holds: bool, why: str) -> bool:
        """Remember a finding, and say it once at debug level."""
        self._known.setdefault(model, {})[self._state(model)] = holds
        _log.debug("%s: prompts %s shared (%s)", type(model).__name__, "are" if holds else "are not", why)
        return holds

    @staticmethod
    def _state(model: Any) -> tuple[Any, Any]:
        config = getattr(model, "config", None)
        return next(model.parameters()).dtype, getattr(config, "_attn_implementation", None)


PROOFS = Proofs()


def agree(whole: Tensor, shared: Tensor, where: Tensor, dtype: torch.dtype) -> bool:
    """Say whether log-probs of the two roads differ by no more than rounding does."""
    gap = (whole - shared).abs()[where]
    return bool(gap.mean() <= _ROUNDING.get(dtype.itemsize, 0.05)) if gap.numel() else True


def _is_repeatable(cache: Any) -> bool:
    """Say whether a cache holds keys and values of every layer, and nothing else that would have to be repeated."""
    layers = getattr(cache, "layers", None)
    plain = ("DynamicLayer", "DynamicSlidingWindowLayer")
    return bool(layers) and all(type(x).__name__ in plain and isinstance(x.keys, Tensor) for x in layers)


def _joined(caches: list[Any]) -> Any:
    """Join the caches of several prefills along the batch."""
    first = caches[0]
    for layer, *others in zip(*(cache.layers for cache in caches), strict=True):
        if others:
            layer.keys = torch.cat([x.keys for x in (layer, *others)])
            layer.values = torch.cat([x.values for x in (layer, *others)])
    return first


def _bytes_of(cache: Any) -> int:
    tensors = (x for layer in cache.layers for x in (layer.keys, layer.values) if isinstance(x, Tensor))
    return sum(x.numel() * x.element_size() for x in tensors)
