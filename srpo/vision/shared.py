"""Score the three streams of rollouts that share prompts, on the road of `prefix.py`."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srpo.vision.ablation import swap
from srpo.vision.inputs import ModelInputs
from srpo.vision.prefix import Groups, Prefix, aligned_inputs, groups_of, with_positions
from srpo.vision.rows import Rows


class Contrast(NamedTuple):
    """Log-probs `[B, T]` of the tokens in another context, and its divergences from the clean one; None: not scored."""

    logps: Tensor | None
    kl: Tensor | None


class Scored(NamedTuple):
    """What was scored of the sequences in one context: `[B, m]` each, and the states `[B, m, H]` if they are kept."""

    logps: Tensor
    entropy: Tensor
    kl: Tensor | None
    states: Tensor | None

    def contrast(self, once: Tensor) -> Contrast:
        """Return what a contrast takes, of sequences that are equal to others too."""
        return Contrast(self.logps[once], None if self.kl is None else self.kl[once])


@dataclass(frozen=True)
class Continuation:
    """What follows the prompts in one context, a row for each sequence that has tokens to be scored there.

    Args:
        rows: `[b]` indices of the sequences.
        ids, mask: `[b, n]` the tokens that the model is given after the prompt.
        positions: `[..., b, n]` of these tokens.
        aligned: other inputs with an entry for each of them.
        source: `[b, m]` which state predicts each scored token: 0 is that of the prompt's last column.
        targets, wanted: `[b, m]` the scored tokens, and which of them count.
    """

    rows: Tensor
    ids: Tensor
    mask: Tensor
    positions: Tensor
    aligned: dict[str, Tensor]
    source: Tensor
    targets: Tensor
    wanted: Tensor

    def part(self, chosen: Tensor) -> "Continuation":
        """Take some of the rows, and no more columns than they need."""
        wanted = self.wanted[chosen]
        n = int(torch.where(wanted, self.source[chosen], 0).max()) if wanted.numel() else 0
        return Continuation(
            self.rows[chosen], self.ids[chosen, :n], self.mask[chosen, :n], self.positions[..., chosen, :n],
            {name: x[chosen, :n] for name, x in self.aligned.items()}, self.source[chosen].clamp(max=n),
            self.targets[chosen], wanted,
        )  # fmt: skip


class SharedRoad:
    """The streams of one batch whose prompts are computed once.

    Args:
        model: to score with; its head is plain.
        whole: the inputs of all sequences, with positions.
        T: columns of the completion.
        temperature: of sampling.
        batch_size: sequences per forward.
        cache_bytes: what the repeated prompts may take.
    """

    def __init__(
        self, model: Any, whole: ModelInputs, T: int, temperature: float, batch_size: int, cache_bytes: int
    ) -> None:
        self.model, self.whole, self.temperature = model, whole, temperature
        self.P, self.T = whole.input_ids.shape[1] - T, T
        self.batch_size, self.cache_bytes = batch_size, cache_bytes

    def prefix(self, inputs: ModelInputs, cuts: Any, groups: Groups) -> Prefix | None:
        """Compute the prompts of a context."""
        return Prefix.of(self.model, inputs, self.P, cuts, groups, self.batch_size)

    def score(
        self,
        prefix: Prefix,
        what: Continuation,
        *,
        is_clean: bool = False,
        keeps: bool = False,
        against: Tensor | None = None,
    ) -> Scored:
        """Score a continuation; what nothing was wanted of is 0.

        Args:
            is_clean: score the entropy too.
            keeps: return the states that predict the tokens.
            against: those of the clean context, `[B, T, H]`: divergences from them are scored too.
        """
        shape, device = (len(self.whole.input_ids), what.targets.shape[1]), what.targets.device
        logps = entropy = kl = torch.zeros(shape, device=device)
        kept = None
        every = torch.arange(len(what.rows), device=what.rows.device)
        for chosen in prefix.parts(every, self.batch_size, self.cache_bytes):
            part = what.part(chosen)
            states = prefix.states(part.rows, part.ids, part.mask, part.positions, part.aligned)
            taken = states.gather(1, part.source[..., None].expand(-1, -1, states.shape[-1]))
            rows, asked = Rows(self.model, taken, True), (part.targets, part.wanted, self.temperature)
            if against is not None:
                divergence, found = rows.against(Rows(self.model, against[part.rows], True), *asked)
                kl = kl.to(divergence).index_copy(0, part.rows, divergence)
            elif is_clean:
                found, its_entropy = rows.score(*asked)
                entropy = entropy.to(its_entropy).index_copy(0, part.rows, its_entropy)
            else:
                found = rows.logps(*asked)
            logps = logps.to(found).index_copy(0, part.rows, found)
            if keeps:
                kept = taken.new_zeros(*shape, taken.shape[-1]) if kept is None else kept
                kept = kept.index_copy_(0, part.rows, taken)
        return Scored(logps, entropy, None if against is None else kl, kept)

    def as_it_is(self, inputs: ModelInputs, wanted: Tensor) -> Continuation:
        """Continue with the completion as it was sampled, for the rows that have a token to be scored."""
        rows = wanted.any(dim=1).nonzero()[:, 0]
        after = inputs.columns(slice(self.P, None))
        order = torch.arange(self.T, device=rows.device).expand(len(rows), -1)
        return self._of(after, rows, order, wanted[rows])

    def without(self, seen: Tensor, wanted: Tensor) -> Continuation:
        """Continue with the tokens that are not `seen`, at the positions that they have; wanted ones are scored."""
        rows = (wanted.any(dim=1) & seen.any(dim=1)).nonzero()[:, 0]
        after = self.whole.columns(slice(self.P, None))
        kept = (after.attention_mask != 0) & ~seen
        order = (~kept[rows]).long().argsort(dim=1, stable=True)  # visible tokens first, the others behind them
        mask = kept[rows].gather(1, order)
        return self._of(after, rows, order, wanted[rows].gather(1, order), mask)

    def with_other(self, seen: Tensor, wanted: Tensor, other: tuple[Tensor, Tensor]) -> Continuation | None:
        """Continue with another perception in the place of the own one; None where positions cannot be said."""
        context, source = swap(self.whole, seen, *other)
        context = with_positions(self.model, context)
        if context is None:
            return None
        rows = (wanted.any(dim=1) & seen.any(dim=1)).nonzero()[:, 0]
        after = context.columns(slice(self.P, None))
        assert after.position_ids is not None
        targets = self.whole.input_ids[rows][:, self.P :]
        aligned = {name: x[rows] for name, x in aligned_inputs(after).items()}
        return Continuation(
            rows, after.input_ids[rows], after.attention_mask[rows], after.position_ids[..., rows, :], aligned,
            (source[rows] - (self.P - 1)).clamp(min=0), targets, wanted[rows],
        )  # fmt: skip

    def _of(
        self, after: ModelInputs, rows: Tensor, order: Tensor, wanted: Tensor, mask: Tensor | None = None
    ) -> Continuation:
        """Put the columns of a completion in an order in which each token is predicted by the one before it."""
        assert after.position_ids is not None
        ids = after.input_ids[rows].gather(1, order)
        mask = after.attention_mask[rows].gather(1, order) if mask is None else mask
        positions = after.position_ids[..., rows, :]
        positions = positions.gather(-1, order.expand(*positions.shape[:-2], *order.shape))
        aligned = {}
        for name, x in aligned_inputs(after).items():
            index = order.reshape(*order.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
            aligned[name] = x[rows].gather(1, index)
        source = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        found = Continuation(rows, ids, mask, positions, aligned, source, ids, wanted)
        return _in_place(found, order)


def _in_place(what: Continuation, order: Tensor) -> Continuation:
    """Name the scored tokens by the columns of the completion again."""
    back = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    source, targets, wanted = (x.gather(1, back) for x in (what.source, what.targets, what.wanted))
    return Continuation(what.rows, what.ids, what.mask, what.positions, what.aligned, source, targets, wanted)


def shared_groups(inputs: ModelInputs, T: int, cuts: Any) -> Groups | None:
    """Return the groups of rows that share a prompt; None where there are none, or pictures lie behind the prompt."""
    P = inputs.input_ids.shape[1] - T
    if bool(inputs.picture_tokens()[:, P:].any()):
        return None
    groups = groups_of(inputs, P, cuts)
    return groups if groups.are_shared else None


def first_alike(*columns: Tensor) -> Tensor:
    """Return `[B]`, for each row the first one that is equal to it in all of `columns` `[B, ...]`."""
    rows = torch.cat([x.reshape(len(x), -1).long() for x in columns], dim=1).cpu()
    known: dict[bytes, int] = {}
    found = [known.setdefault(row.numpy().tobytes(), i) for i, row in enumerate(rows)]
    return torch.tensor(found, device=columns[0].device)
