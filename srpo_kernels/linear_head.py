"""Hidden states through the vocabulary head in chunks of rows: logits exist for one chunk at a time.

    logits = x W^T + bias  ->  row statistics  ->  g = dL/dlogp, h = dL/dH  ->  dlogits, in the memory of the logits
    dx = dlogits W,   dW = sum over chunks of dlogits^T x,   dbias = sum of dlogits

    scoring    2NVH   log-probs and entropies
    pairs      4NVH   the divergence of one context from another, and the log-probs of the second
    training   6NVH   g is computed as soon as a chunk is scored, while its logits exist (4NVH with a frozen head)
    gradient   6NVH   any g and h: the logits of a chunk are computed again

Only active rows are multiplied. `hidden` is `[B, L, H]`, L = T or T + 1, the head `[V, H]`, tokens `[B, T]`. Matrix
products run in the dtype of `hidden`; the kernels get fp32 logits from 16-bit products where PyTorch offers that. dW
is accumulated in fp32. With a process group the head is a shard of the vocabulary, in rank order: statistics of a chunk
are merged over ranks, dx is summed over them, dW stays local.

Memory beyond the results: the workspace, dW in fp32, what `row_chunks` takes (4 MiB a thread), and nothing that grows
with the number of rows but vectors.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from srpo_kernels import backends, row_chunks
from srpo_kernels.loss_terms import LossTerms

# Rows of a chunk unless a workspace is given. A trained head reads and writes all of dW once a chunk, so it wants more
# rows; a frozen one only enough for the matrix product to run at full rate.
_ROWS_ON_CPU = 768
_ROWS_TRAINING, _ROWS_FROZEN = 4096, 1024
_LARGEST_DEFAULT = 2 << 30
_STRIP = 8192  # vocabulary entries of dW that are added at once


class Statistics(NamedTuple):
    """What is known of `n` scored rows: vectors `[n]`; `entropy` is empty unless asked for."""

    logps: Tensor
    row_max: Tensor
    log_sum: Tensor
    entropy: Tensor


class Gradients(NamedTuple):
    """Gradients of hidden states, head and bias; empty where not wanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Head:
    """A vocabulary head and how it is run.

    Args:
        weight: `[V, H]`, a shard of the vocabulary when `process_group` is named.
        bias: `[V]` or None.
        workspace_bytes: what the logits of a chunk and their gradient may take; 0 chooses.
        process_group: name of the group that holds the shards, or "".
    """

    weight: Tensor
    bias: Tensor | None
    temperature: float
    workspace_bytes: int
    process_group: str
    backend: str

    def logits_dtype(self) -> torch.dtype:
        """Return fp32 for the kernels where a 16-bit product can give it, else the dtype of the head."""
        wide = not self.weight.is_cuda or _widens(self.weight)
        return torch.float32 if self.backend == "triton" and wide else self.weight.dtype

    def rows_of_chunk(self, trains: bool, largest_shard: int | None = None) -> int:
        """Return how many rows the workspace holds, at least 1, and as many on every rank."""
        logits_dtype, dtype = self.logits_dtype(), self.weight.dtype
        V = self.weight.shape[0] if largest_shard is None else largest_shard
        row = V * (logits_dtype.itemsize + (dtype.itemsize if dtype != logits_dtype else 0))
        if self.workspace_bytes:
            return max(1, self.workspace_bytes // row)
        if self.weight.device.type == "cpu":
            return _ROWS_ON_CPU
        return max(1, min(_ROWS_TRAINING if trains else _ROWS_FROZEN, _LARGEST_DEFAULT // row))


def score(
    head: Head, hidden: Tensor, ids: Tensor, row_mask: Tensor, return_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `logps`, `row_max`, `log_sum` `[B, T]` and `entropy` `[B, T]` or empty; 0 on rows outside the mask."""
    engine = _Engine(head, hidden, ids, (False,) * 3)
    results = engine.results(4 if return_entropy else 3)
    for cells in engine.chunks(row_mask):
        statistics = engine.statistics(engine.logits(cells), cells, return_entropy)
        for result, values in zip(results, statistics, strict=False):
            result[cells] = values
    logps, row_max, log_sum, *entropy = (x.view(ids.shape) for x in results)
    return logps, row_max, log_sum, entropy[0] if return_entropy else logps.new_empty(0)


def pairs(head: Head, hidden: Tensor, against: Tensor, ids: Tensor, row_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return `kl` of the rows of `against` from those of `hidden`, and their `logps` `[B, T]`; 0 outside the mask.

    The workspace holds both products of a chunk.
    """
    engines = [_Engine(head, x, ids, (False,) * 3) for x in (hidden, against)]
    for engine in engines:
        engine.capacity = max(1, engine.capacity // 2)
    kl, logps = engines[0].results(2)
    for cells, _ in zip(*(engine.chunks(row_mask) for engine in engines), strict=True):
        logits = [engine.logits(cells)[None] for engine in engines]
        every = torch.ones(2, 1, len(cells), dtype=torch.bool, device=ids.device)
        of_cells = engines[0].ids[cells][None]
        scored, _, _, _, divergences = backends.row_pairs(logits, of_cells, every, head.temperature, head.backend)
        kl[cells], logps[cells] = divergences[0, 0], scored[1, 0]
    return kl.view(ids.shape), logps.view(ids.shape)


def gradient(
    head: Head,
    hidden: Tensor,
    ids: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    wants: tuple[bool, ...],
) -> Gradients:
    """Return the wanted gradients under upstream gradients `[B, T]`; rows where those are 0 are not multiplied."""
    engine = _Engine(head, hidden, ids, wants)
    needed = grad_logps != 0 if grad_entropy is None else (grad_logps != 0) | (grad_entropy != 0)
    given = (row_max, log_sum, entropy, grad_logps, grad_entropy)
    vectors: list[Any] = [None if x is None else x.reshape(-1) for x in given]
    for cells in engine.chunks(needed):
        of_cells: list[Any] = [None if x is None else x[cells] for x in vectors]
        engine.accumulate(cells, engine.logits(cells), *of_cells)
    return engine.finish()


def train(
    head: Head, hidden: Tensor, ids: Tensor, row_mask: Tensor, terms: LossTerms, wants: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Gradients, Tensor]:
    """Score the rows and, chunk by chunk, turn their logits into gradients under the coefficients of the loss.

    Where coefficients depend on whole trajectories, chunks end where trajectories do; the rows of a trajectory that
    the workspace cannot hold are multiplied twice.

    Returns: `logps` and `entropy` `[B, T]`, 0 on rows outside the mask, the gradients times a power of two, and that.
    """
    engine, unit = _Engine(head, hidden, ids, wants), terms.unit(hidden.dtype)
    logps, entropy = engine.results(2)
    for group in terms.groups(engine.chunks(row_mask), engine.capacity):
        scored, logits = [], logps
        for cells in group.chunks:
            logits = engine.logits(cells)
            scored.append(engine.statistics(logits, cells, True))
            logps[cells], entropy[cells] = scored[-1].logps, scored[-1].entropy
        if any(wants):
            g = terms.coefficients(logps, group) * unit
            h = None if terms.entropy_slopes is None else terms.entropy_slopes.reshape(-1) * unit
            for cells, row in zip(group.chunks, scored, strict=True):
                again = engine.logits(cells) if len(group.chunks) > 1 else logits
                of_entropy = (None, None) if h is None else (row.entropy, h[cells])
                engine.accumulate(cells, again, row.row_max, row.log_sum, of_entropy[0], g[cells], of_entropy[1])
    return logps.view(ids.shape), entropy.view(ids.shape), engine.finish(), unit


class _Engine:
    """The workspace and the gradients of one call. `cells` are flat indices into tokens `[B, T]`."""

    def __init__(self, head: Head, hidden: Tensor, ids: Tensor, wants: tuple[bool, ...]) -> None:
        self.head, self.hidden, self.wants = head, hidden, wants
        self.T, self.ids = ids.shape[1], ids.reshape(-1)
        self.dtype = backends.statistics_dtype(hidden.dtype, head.backend)
        self.group: dist.ProcessGroup | None = None
        largest_shard = None
        if head.process_group:
            resolve: Any = getattr(dist.distributed_c10d, "_resolve_process_group")  # noqa: B009 - not exported
            group: dist.ProcessGroup = resolve(head.process_group)
            shards = _shard_sizes(group, head.weight)
            first, largest_shard = sum(shards[: group.rank()]), max(shards)
            self.group = group
            here = (self.ids >= first) & (self.ids < first + head.weight.shape[0])
            self.ids = torch.where(here, self.ids - first, -1)
        self.capacity = head.rows_of_chunk(wants[1], largest_shard)
        weight, bias = head.weight, head.bias
        self.d_hidden = torch.zeros_like(hidden) if wants[0] else hidden.new_empty(0)
        d_weight = weight.new_empty(weight.shape if wants[1] else 0, dtype=self.dtype)
        self.d_weight = row_chunks.in_huge_pages(d_weight).zero_()
        self.d_bias = weight.new_zeros(bias.shape if wants[2] and bias is not None else 0, dtype=self.dtype)

    def chunks(self, row_mask: Tensor) -> tuple[Tensor, ...]:
        """Return the cells of the active rows in even parts that the workspace holds, and make the workspace.

        Even: a product of few rows costs almost what one of many does.
        """
        cells = row_mask.reshape(-1).nonzero().flatten()  # the one wait for a GPU: products need to know their size
        shape = (min(self.capacity, len(cells)), self.head.weight.shape[0])
        logits = self.hidden.new_empty(shape, dtype=self.head.logits_dtype())
        self.workspace = self.dlogits = row_chunks.in_huge_pages(logits)
        if any(self.wants) and logits.dtype != self.hidden.dtype:
            self.dlogits = torch.empty_like(logits, dtype=self.hidden.dtype)
        n_chunks = -(-len(cells) // self.capacity)
        return cells.split(-(-len(cells) // n_chunks)) if n_chunks else ()

    def results(self, n: int) -> list[Tensor]:
        """Return `n` zero vectors over all tokens."""
        return [torch.zeros(self.ids.shape, dtype=self.dtype, device=self.ids.device) for _ in range(n)]

    def logits(self, cells: Tensor) -> Tensor:
        """Compute the logits of some rows into the workspace, over those that were there."""
        x, weight, bias = self.rows(cells), self.head.weight, self.head.bias
        out = self.workspace[: len(cells)]
        if bias is not None and bias.dtype == out.dtype:
            return torch.addmm(bias, x, weight.t(), out=out)
        if x.dtype == out.dtype:
            torch.mm(x, weight.t(), out=out)
        elif _widens(x):
            torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
        else:
            torch.mm(x.to(out.dtype), weight.t().to(out.dtype), out=out)  # the interpreter, on small tensors
        return out if bias is None else out.add_(bias)

    def rows(self, cells: Tensor) -> Tensor:
        """Return the hidden states `[n, H]` of some rows."""
        return self.hidden[cells // self.T, cells % self.T]

    def statistics(self, logits: Tensor, cells: Tensor, return_entropy: bool) -> Statistics:
        """Reduce logits to row statistics, over all shards of the vocabulary."""
        ids = self.ids[cells]
        everywhere = torch.ones_like(ids, dtype=torch.bool)
        logps, row_max, log_sum, entropy = backends.row_statistics(
            [logits[None]], ids.clamp(min=0)[None], everywhere[None, None], self.head.temperature, return_entropy,
            self.head.backend,
        )  # fmt: skip
        entropy = entropy[0] if return_entropy else entropy
        local = Statistics(logps[0, 0], row_max[0, 0], log_sum[0, 0], entropy)
        return local if self.group is None else merge_shards(local, ids >= 0, self.head.temperature, self.group)

    def accumulate(
        self,
        cells: Tensor,
        logits: Tensor,
        row_max: Tensor,
        log_sum: Tensor,
        entropy: Tensor | None,
        g: Tensor,
        h: Tensor | None,
    ) -> None:
        """Turn logits into their gradient, in place where dtypes agree, and add its products to the gradients."""
        dlogits = self.dlogits[: len(cells)]
        arguments = (self.ids[cells], row_max, log_sum, entropy, g.to(self.dtype), h)
        batched = (None if x is None else x[None] for x in arguments)
        backends.logits_gradient(
            dlogits[None], logits[None], *batched, self.head.temperature,
            whole_rows=self.group is None, backend=self.head.backend,
        )  # fmt: skip
        if self.wants[0]:
            self.d_hidden[cells // self.T, cells % self.T] = dlogits @ self.head.weight
        if self.wants[1]:
            _add_product(self.d_weight, dlogits.t(), self.rows(cells))
        if self.wants[2]:
            self.d_bias += dlogits.sum(0, dtype=self.dtype)

    def finish(self) -> Gradients:
        """Return the gradients in the dtypes of what they are gradients of."""
        if self.wants[0] and self.group is not None:
            dist.all_reduce(self.d_hidden, group=self.group)
        dtype = self.head.weight.dtype
        return Gradients(self.d_hidden, self.d_weight.to(dtype), self.d_bias.to(dtype))


def merge_shards(local: Statistics, owned: Tensor, temperature: float, group: dist.ProcessGroup) -> Statistics:
    """Merge the statistics of rows whose vocabulary is spread over the ranks of a group, in rank order.

    `owned` says on which rows the id belongs to this rank. A row of which no rank owns the id gets a NaN log-prob.
    """
    has_entropy = local.entropy.numel() > 0
    # A shard of banned entries only has NaN statistics; its tokens have probability 0.
    banned = local.row_max == -torch.inf
    target = torch.where(owned, torch.where(banned, -torch.inf, local.logps + local.log_sum), torch.nan)
    weighted = local.log_sum - local.entropy if has_entropy else torch.zeros_like(target)  # sum p z of this shard
    mine = torch.stack([local.row_max, local.log_sum, weighted, target])
    shards = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(shards, mine, group=group)
    maxima, log_sums, weighted, targets = torch.stack(shards, 1)  # [ranks, n] each
    row_max = maxima.amax(0)
    empty = maxima == -torch.inf
    shift = torch.where(empty, 0.0, (maxima - row_max) / temperature)
    shifted = torch.where(empty, -torch.inf, log_sums + shift)
    log_sum = shifted.logsumexp(0)
    owner = ~targets.isnan()
    target = torch.where(owner, targets + shift, 0.0).sum(0).where(owner.any(0), torch.nan)
    entropy = local.entropy
    if has_entropy:
        share = (shifted - log_sum).exp()
        entropy = log_sum - torch.where(share > 0, share * (weighted + shift), 0.0).sum(0)
    return Statistics(target - log_sum, row_max, log_sum, entropy)


def _shard_sizes(group: dist.ProcessGroup, weight: Tensor) -> list[int]:
    """Return the number of vocabulary entries of each rank."""
    mine = torch.tensor([weight.shape[0]], device=weight.device)
    sizes = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(sizes, mine, group=group)
    return torch.cat(sizes).tolist()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add `a @ b` to `total`; a product in fewer bits goes strip by strip, so that it never exists whole."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    for first in range(0, len(total), _STRIP):
        strip = slice(first, first + _STRIP)
        total[strip] += torch.mm(a[strip], b, out_dtype=total.dtype) if _widens(a) else a[strip] @ b


def _widens(x: Tensor) -> bool:
    """Say whether products of `x` can leave the matrix unit in fp32."""
    return x.is_cuda and torch.version.cuda is not None and hasattr(torch.ops.aten.mm, "dtype")
