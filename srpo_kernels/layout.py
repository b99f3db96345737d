"""Trajectories as padded `[B, T]` tensors or packed into one `[N]` axis with `cu_seqlens`."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Say how tokens are grouped into trajectories.

    Args:
        shape: `(B, T)`, or `(N,)` when packed.
        cu_seqlens: `[R + 1]` first token of each trajectory and the total, or None when padded.
    """

    shape: tuple[int, ...]
    cu_seqlens: Tensor | None = None

    @property
    def n_trajectories(self) -> int:
        """Return the number of trajectories, empty ones included."""
        return self.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    @property
    def offsets(self) -> Tensor:
        """Return the `cu_seqlens` of a packed layout."""
        assert self.cu_seqlens is not None
        return self.cu_seqlens

    def ends(self) -> Tensor:
        """Return one past the last token of each trajectory, `[R]`, counting tokens from the first trajectory."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens[1:].long()
        return torch.arange(1, self.shape[0] + 1) * self.shape[1]

    def trajectory_of_token(self) -> Tensor:
        """Return the index of the trajectory of each packed token, `[N]`, without a device sync."""
        tokens = torch.arange(self.shape[0], device=self.offsets.device)
        return torch.bucketize(tokens, self.ends(), right=True)

    def spread(self, per_trajectory: Tensor) -> Tensor:
        """Return the value `[R]` of each token's trajectory, in the shape of the tokens."""
        if self.cu_seqlens is None:
            return per_trajectory[:, None].expand(self.shape)
        if not per_trajectory.numel():
            return per_trajectory.new_zeros(self.shape)
        return per_trajectory[self.trajectory_of_token().clamp(max=self.n_trajectories - 1)]

    def token_counts(self, mask: Tensor) -> Tensor:
        """Return the number of valid tokens of each trajectory, `[R]` fp32."""
        if self.cu_seqlens is None:
            return mask.sum(-1, dtype=torch.float32)
        running = torch.nn.functional.pad(mask.cumsum(0), (1, 0))  # exact in int64
        return running[self.cu_seqlens.long()].diff().float()

    def first_valid(self, mask: Tensor) -> Tensor:
        """Say which token is the first valid one of its trajectory, bool in the shape of the tokens."""
        running = mask.cumsum(-1)
        if self.cu_seqlens is not None:
            before = torch.nn.functional.pad(running, (1, 0))[self.cu_seqlens[:-1].long()]
            running = running - self.spread(before)
        return (mask != 0) & (running == 1)

    def sums(self, x: Tensor) -> Tensor:
        """Return the sum `[R]` over the tokens of each trajectory, in one order whatever else is in the batch.

        Packed tokens are padded for it: one sync on a GPU.
        """
        if self.cu_seqlens is None:
            return x.sum(-1)
        padded = self.pad().pad(x)
        assert padded is not None
        return padded.sum(-1)

    def pad(self) -> "Padding":
        """Return the map from packed tokens to padded ones. Needs the longest length: one sync on a GPU."""
        lengths = self.offsets.long().diff()
        longest = int(lengths.max()) if lengths.numel() else 0
        steps = torch.arange(longest, device=lengths.device)
        inside = steps < lengths[:, None]
        return Padding(torch.where(inside, self.offsets[:-1, None].long() + steps, 0), inside)


@dataclass(frozen=True)
class Padding:
    """Move vectors between the packed `[N]` and the padded `[R, T]` form."""

    index: Tensor
    inside: Tensor

    def pad(self, packed: Tensor | None) -> Tensor | None:
        """Return `packed` as `[R, T]` with zeros outside the trajectories."""
        return None if packed is None else torch.where(self.inside, packed[self.index], packed.new_zeros(()))

    def pack(self, padded: Tensor, n_tokens: int) -> Tensor:
        """Return `[R, T]` as `[N]`."""
        return padded.new_zeros(n_tokens).index_put((self.index[self.inside],), padded[self.inside])
