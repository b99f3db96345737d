"""The row and the trajectory functions on either backend, below autograd.

`ops.py` registers them, `linear_head.py` calls them on its chunks. Kernels are imported when first launched, so that
nothing here loads Triton.
"""

from typing import Any

import torch
from torch import Tensor

from srpo_kernels import launch, reference, row_chunks
from srpo_kernels.layout import Layout, Padding
from srpo_kernels.rules import CreditRule, LossRule


def row_statistics(
    streams: list[Tensor], ids: Tensor, row_mask: Tensor, temperature: float, return_entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `logps`, `row_max`, `log_sum` `[S, B, T]` of streams `[B, T or T+1, V]`; `entropy` `[B, T]`, or empty."""
    if backend == "triton":
        from srpo_kernels.row_statistics import row_statistics_fwd

        with launch.device_guard(ids.device):
            return row_statistics_fwd(streams, ids, row_mask, temperature, return_entropy)
    results = [
        row_chunks.row_statistics(x, ids, row_mask[s], temperature, return_entropy and s == 0)
        for s, x in enumerate(streams)
    ]
    dtype = results[0][0].dtype
    logps, row_max, log_sum = (torch.stack([r[k].to(dtype) for r in results]) for k in range(3))
    return logps, row_max, log_sum, results[0][3] if return_entropy else results[0][3].new_empty(0)


def row_pairs(
    streams: list[Tensor], ids: Tensor, row_mask: Tensor, temperature: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return `logps` `[S, B, T]`, `row_max` and `log_sum` `[1, B, T]`, `entropy` `[B, T]` and `kl` `[S - 1, B, T]`.

    Row by row the divergence of a stream from the first. A row has one contrast at most: the masks of the streams after
    the first are disjoint, and are in that of the first.
    """
    if backend == "triton":
        from srpo_kernels.row_pairs import row_pairs_fwd

        with launch.device_guard(ids.device):
            return row_pairs_fwd(streams, ids, row_mask, temperature)
    contrasts = row_mask[1:]
    alone = row_mask[0] & ~contrasts.any(0)
    clean = row_chunks.row_statistics(streams[0], ids, alone, temperature, True)
    scored, divergences = [], []
    for mask, against in zip(contrasts, streams[1:], strict=True):
        *of_clean, kl, logps = row_chunks.row_pairs(streams[0], against, ids, mask, temperature)
        clean = [torch.where(mask, x, y) for x, y in zip(of_clean, clean, strict=True)]
        scored.append(logps)
        divergences.append(kl)
    logps, row_max, log_sum, entropy = clean
    return torch.stack([logps, *scored]), row_max[None], log_sum[None], entropy, torch.stack(divergences)


def trains_rows(logits: Tensor, n_rows: int, backend: str) -> bool:
    """Say whether `row_training` takes logits: the gradient is formed before its upstream factor is known.

    In fp16 that would need a unit near the largest coefficient, and another sweep to undo it. Rows that start anywhere
    are loaded column by column, which takes more registers than a program of many warps has.
    """
    aligned = logits.stride(-1) == 1 and logits.stride(-2) % 16 == 0
    if not launch.TRAINS_ROWS or backend != "triton" or logits.dtype == torch.float16 or not aligned:
        return False
    return logits.numel() > 0 and not launch.split_rows(n_rows, logits.device)


def row_training(out: Tensor, logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Write the gradient of logits into `out`; return `logps` and `entropy`. Arguments as `row_training_fwd`."""
    from srpo_kernels.row_training import row_training_fwd

    with launch.device_guard(logits.device):
        return row_training_fwd(out, logits, *arguments)


def scale_gradient(out: Tensor, gradient: Tensor, factor: Tensor) -> None:
    """Write `gradient * factor` into `out`, which may be `gradient`."""
    from srpo_kernels.row_training import scale_gradient_bwd

    with launch.device_guard(gradient.device):
        scale_gradient_bwd(out, gradient, factor)


def statistics_dtype(dtype: torch.dtype, backend: str) -> torch.dtype:
    """Return the dtype of what `row_statistics` and `policy_loss` return for inputs of a dtype."""
    return torch.float32 if backend == "triton" else row_chunks.compute_dtype(dtype)


def logits_gradient(out: Tensor, *arguments: Any, whole_rows: bool = True, backend: str) -> None:
    """Write the gradient of logits into `out`, which may be the logits; arguments as `row_chunks.logits_gradient`."""
    if backend == "triton":
        from srpo_kernels.row_statistics import logits_gradient_bwd

        with launch.device_guard(out.device):
            logits_gradient_bwd(out, *arguments)
    else:
        row_chunks.logits_gradient(out, *arguments, whole_rows=whole_rows)


def token_credit(
    contrast: Tensor | None, base: Tensor | None, corrupted: Tensor | None, ablated: Tensor | None, role_ids: Tensor,
    mask: Tensor, advantages: Tensor | None, cu_seqlens: Tensor | None, n_trajectories: int, rule: CreditRule,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return `contrast`, `weights`, `flags` per token and `baseline` `[R]` of contiguous tensors, per token."""
    tensors = (contrast, base, corrupted, ablated, role_ids, mask, advantages)
    if backend == "triton":
        from srpo_kernels.token_credit import token_credit_fwd

        with launch.device_guard(mask.device):
            return token_credit_fwd(*tensors, cu_seqlens, n_trajectories, rule)
    if cu_seqlens is None:
        return reference.token_credit(*tensors, rule)
    padding = Layout(tuple(mask.shape), cu_seqlens).pad()
    *per_token, baseline = reference.token_credit(*_padded(padding, tensors), rule=rule)
    contrast, weights, flags = (padding.pack(x, mask.shape[0]) for x in per_token)
    return contrast, weights, flags, baseline


def role_contrast(
    base: Tensor, corrupted: Tensor | None, ablated: Tensor | None, role_ids: Tensor, mask: Tensor,
    cu_seqlens: Tensor | None, n_trajectories: int, rule: CreditRule, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the contrast per token, and where it has no value: what `token_credit` computes first."""
    tensors = (None, base, corrupted, ablated, role_ids, mask)
    if backend == "triton":
        contrast, _, flags, _ = token_credit(*tensors, None, cu_seqlens, n_trajectories, rule, backend)
        return contrast, (flags & reference.NO_VALUE) != 0
    if cu_seqlens is None:
        return reference.role_contrast(*tensors, rule)
    padding = Layout(tuple(mask.shape), cu_seqlens).pad()
    contrast, no_value = reference.role_contrast(*_padded(padding, tensors), rule=rule)
    return padding.pack(contrast, mask.shape[0]), padding.pack(no_value, mask.shape[0])


def policy_loss(
    logps: Tensor, old_logps: Tensor | None, ref_logps: Tensor | None, importance_sampling_ratio: Tensor | None,
    advantages: Tensor, weights: Tensor, mask: Tensor, scale: Tensor, cu_seqlens: Tensor | None, rule: LossRule,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the loss `[R]` and metric sums `[R, 3]` of each trajectory, and `coefficient` = d loss / d logps."""
    tensors = (logps, old_logps, ref_logps, importance_sampling_ratio, advantages, weights, mask)
    if backend == "triton":
        from srpo_kernels.policy_loss import policy_loss_fwd

        with launch.device_guard(logps.device):
            return policy_loss_fwd(*tensors, scale, cu_seqlens, rule)
    if cu_seqlens is None:
        return reference.policy_loss(*tensors, scale, rule)
    padding = Layout(tuple(logps.shape), cu_seqlens).pad()
    loss, sums, coefficient = reference.policy_loss(*_padded(padding, tensors), scale=scale, rule=rule)
    return loss, sums, padding.pack(coefficient, logps.shape[0])


def _padded(padding: Padding, tensors: tuple[Any, ...]) -> list[Any]:
    return [padding.pad(x) for x in tensors]
