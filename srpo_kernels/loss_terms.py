"""The coefficients of the loss for some rows at a time, while the rest of the batch is not yet scored.

Where the coefficient of a row depends on that row alone, rows may come in any chunks; else whole trajectories come
together. Either way the functions of `backends.py` compute what they compute for a whole batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from srpo_kernels import backends
from srpo_kernels.layout import Layout
from srpo_kernels.policy_factor import policy_factor, times_factor
from srpo_kernels.rules import CreditRule, LossRule, couples_tokens


class Group(NamedTuple):
    """Chunks of rows whose coefficients are computed together, and the trajectories and tokens they come from."""

    chunks: tuple[Tensor, ...]
    trajectories: slice
    tokens: slice


@dataclass(frozen=True)
class LossTerms:
    """What the coefficients of the loss are made of: contiguous vectors `[B, T]`, or `[N]` with `cu_seqlens`.

    Args:
        weights: token weights; None computes them from the log-probs of the streams, with `credit`.
        scale: `[R]` factor of each trajectory's loss.
        kept: bool, tokens whose policy term counts; None: all.
        entropy_slopes: d loss / d entropy; None: the loss has none.
        token_loss: the caller's own loss of all tokens, of which the rows of a group are taken.
        credit, loss: settings of `backends.token_credit` and `backends.policy_loss`.
    """

    old_logps: Tensor | None
    ref_logps: Tensor | None
    importance_sampling_ratio: Tensor | None
    advantages: Tensor
    weights: Tensor | None
    mask: Tensor
    scale: Tensor
    role_ids: Tensor | None
    corrupted: Tensor | None
    ablated: Tensor | None
    cu_seqlens: Tensor | None
    kept: Tensor | None
    entropy_slopes: Tensor | None
    token_loss: Callable[[Tensor], Tensor] | None
    loss: LossRule
    credit: CreditRule
    backend: str

    @property
    def of_rows(self) -> bool:
        """Say whether the coefficient of a row depends on that row alone."""
        return self.weights is not None and not couples_tokens(self.loss) and self.token_loss is None

    def unit(self, dtype: torch.dtype) -> Tensor:
        """Return a power of two, 0-d, that brings the largest coefficient near 1 for gradients in half precision.

        A coefficient is about advantage over number of tokens; times a small probability it would vanish there, long
        before the factor of a loss scale arrives in backward. 1 for other dtypes.
        """
        one = self.scale.new_ones((), dtype=torch.float32)
        if dtype != torch.float16:
            return one
        scale = Layout(tuple(self.mask.shape), self.cu_seqlens).spread(self.scale).reshape(self.mask.shape)
        size = torch.where(self.mask, self.advantages.abs() + self.loss.beta, 0.0) * scale
        if self.entropy_slopes is not None:
            size = torch.maximum(size, self.entropy_slopes.abs())
        largest = size.float().amax() if size.numel() else one * 0.0
        return torch.where(largest > 0, torch.exp2(torch.floor(-torch.log2(largest)).clamp(-14, 40)), one)

    def groups(self, chunks: tuple[Tensor, ...], size: int) -> Iterator[Group]:
        """Yield the chunks one by one, or join their rows into whole trajectories of about `size` rows."""
        if self.of_rows or not chunks:
            yield from (Group((chunk,), slice(0), slice(0)) for chunk in chunks)
            return
        cells = torch.cat(chunks)
        layout = Layout(tuple(self.mask.shape), self.cu_seqlens)
        ends = layout.ends().to(cells.device)
        rows_before = [0, *torch.searchsorted(cells, ends).tolist()]
        tokens_before = [0, *ends.tolist()]
        first = 0
        for last in range(1, len(rows_before)):
            following = rows_before[min(last + 1, len(rows_before) - 1)]
            if last < len(rows_before) - 1 and following - rows_before[first] <= size:
                continue
            rows = cells[rows_before[first] : rows_before[last]]
            if len(rows):
                tokens = slice(tokens_before[first], tokens_before[last])
                yield Group(rows.split(size), slice(first, last), tokens)
            first = last

    def coefficients(self, logps: Tensor, group: Group) -> Tensor:
        """Return `[B * T]` with d loss / d logps on the rows of a group."""
        result = torch.zeros_like(logps)
        if self.of_rows:  # every row is a trajectory of one token
            (cells,) = group.chunks
            scale = Layout(tuple(self.mask.shape), self.cu_seqlens).spread(self.scale).reshape(-1)[cells]
            part = self._part(logps, lambda x: x.reshape(-1)[cells][:, None], Layout((len(cells), 1)))
            result[cells] = backends.policy_loss(*part, scale, None, self.loss, self.backend)[2][:, 0]
            return result
        cu_seqlens = self.cu_seqlens
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens[group.trajectories.start : group.trajectories.stop + 1] - group.tokens.start
        n = group.tokens.stop - group.tokens.start
        shape = (n,) if cu_seqlens is not None else (n // max(1, self.mask.shape[1]), self.mask.shape[1])
        layout = Layout(shape, cu_seqlens)
        part = self._part(logps, lambda x: x.reshape(-1)[group.tokens].view(shape), layout)
        scale = self.scale[group.trajectories]
        own: Tensor | float = 0.0
        if self.token_loss is not None:
            own = self._own_slopes(logps, group, part, layout.spread(scale))
            part = part._replace(advantages=torch.zeros_like(part.advantages))  # what is left is the KL term
        slopes = backends.policy_loss(*part, scale, cu_seqlens, self.loss, self.backend)[2]
        result[group.tokens] = slopes.reshape(-1) + own
        return result

    def _own_slopes(self, logps: Tensor, group: Group, part: "_Part", scale: Tensor) -> Tensor:
        """Differentiate the caller's loss on the tokens of a group; the others have the old log-probs, or 0."""
        assert self.token_loss is not None
        tokens, mask = group.tokens, self.mask.reshape(-1)
        x = torch.zeros_like(logps) if self.old_logps is None else self.old_logps.reshape(-1).to(logps.dtype).clone()
        x[tokens] = logps[tokens]
        x = torch.where(mask, x, 0.0)
        factor = (times_factor(part.weights, part.importance_sampling_ratio, part.mask) * scale).reshape(-1)
        with torch.enable_grad():
            leaf = x.requires_grad_()
            losses = self.token_loss(leaf.view(self.mask.shape)).reshape(-1)[tokens]
            total = (torch.where(part.mask.reshape(-1), losses, 0.0) * factor).sum()
            (slopes,) = torch.autograd.grad(total, leaf)
        return torch.where(part.mask.reshape(-1), slopes[tokens], 0.0)

    def _part(self, logps: Tensor, take: Callable[[Tensor], Tensor], layout: Layout) -> "_Part":
        """Return the tensors of `backends.policy_loss` for some tokens."""

        def taken(x: Tensor | None) -> Tensor | None:
            return None if x is None else take(x)

        logps, mask, advantages = take(logps), take(self.mask), take(self.advantages)
        old, weights = taken(self.old_logps), taken(self.weights)
        if weights is None:
            assert self.role_ids is not None  # terms without weights have roles
            _, weights, _, _ = backends.token_credit(
                None, logps if old is None else old, taken(self.corrupted), taken(self.ablated), take(self.role_ids),
                mask, advantages, layout.cu_seqlens, layout.n_trajectories, self.credit, self.backend,
            )  # fmt: skip
        ref, ratio = taken(self.ref_logps), taken(self.importance_sampling_ratio)
        factor = policy_factor(logps, old, ratio, taken(self.kept), advantages, mask, layout, self.loss)
        return _Part(logps, old, ref, factor, advantages, weights, mask)


class _Part(NamedTuple):
    """The per-token tensors of `backends.policy_loss`, in its order."""

    logps: Tensor
    old_logps: Tensor | None
    ref_logps: Tensor | None
    importance_sampling_ratio: Tensor | None
    advantages: Tensor
    weights: Tensor
    mask: Tensor
