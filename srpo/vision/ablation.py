"""The contexts of the ablated stream: perception tokens hidden, cut out, or replaced by those of another rollout."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from srpo.roles import Role
from srpo.vision.inputs import ModelInputs


def hide(inputs: ModelInputs, seen: Tensor, *, cut: bool) -> tuple[ModelInputs, Tensor]:
    """Hide the completion tokens `seen` `[B, T]`; return the inputs and the column that predicts each token.

    All tokens keep the positions of the full sequence, also when hidden ones are `cut` out. A token whose predecessor
    is hidden would be scored by the state of that hidden token, which still holds its own embedding: it is scored by
    the last visible column before it instead.
    """
    (B, S), T = inputs.input_ids.shape, seen.shape[1]
    columns = torch.arange(S, device=seen.device).expand(B, S)
    gone = functional.pad(seen, (S - T, 0))
    source = torch.where(gone, 0, columns).cummax(dim=1).values[:, S - T - 1 : S - 1]
    masked = replace(inputs, attention_mask=inputs.attention_mask * ~gone)
    if not cut:
        return masked, source
    order = (~gone).long().argsort(dim=1, stable=True)  # hidden tokens first, as padding, the others in order
    spare = int(gone.sum(dim=1).min())  # columns that are padding in every row
    return masked.columns(order).columns(slice(spare, None)), _inverse(order).gather(1, source) - spare


def swap(inputs: ModelInputs, seen: Tensor, other_ids: Tensor, other_mask: Tensor) -> tuple[ModelInputs, Tensor]:
    """Put the tokens `other_ids` `[B, M]` in the place of the completion tokens `seen` `[B, T]`.

    Return the inputs, which have the positions that the model gives them, and the column that predicts each of the
    remaining tokens.
    """
    (B, S), T, M = inputs.input_ids.shape, seen.shape[1], other_ids.shape[1]
    gone = functional.pad(seen, (S - T, 0))
    other_mask = (other_mask != 0) & gone.any(dim=1, keepdim=True)
    columns = torch.arange(S, device=seen.device).expand(B, S)
    first = torch.where(gone, columns, S).amin(dim=1, keepdim=True)
    # Own tokens stay in order, the others come where the first hidden one was; what is hidden goes to the end.
    last = 2 * S
    keys = torch.cat([torch.where(gone, last, 2 * columns), torch.where(other_mask, 2 * first - 1, last)], dim=1)
    order = keys.argsort(dim=1, stable=True)
    # What the first hidden token had, the others have: no picture, and the same pictures in sight.
    at_first = first.clamp(max=S - 1).expand(B, M)
    like_first = inputs.columns(at_first).multimodal
    aligned = {
        name: torch.cat([x, like_first[name]], dim=1) if inputs.is_aligned(name, x) else x
        for name, x in inputs.multimodal.items()
    }
    mask = inputs.attention_mask
    widened = replace(
        inputs,
        input_ids=torch.cat([inputs.input_ids, other_ids.to(inputs.input_ids)], dim=1),
        attention_mask=torch.cat([mask * ~gone, other_mask.to(mask)], dim=1),
        position_ids=None,
        multimodal=aligned,
    )
    length = int((keys < last).sum(dim=1).max())
    source = (_inverse(order)[:, S - T : S] - 1).clamp(max=length - 1)
    return widened.columns(order).columns(slice(0, length)), source


def perception_tokens(
    completion_ids: Tensor, role_ids: Tensor, completion_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Take the perception tokens of each completion, to score another rollout with them.

    Args:
        completion_ids: `[B, T]`.
        role_ids: `[B, T]` integers, 1 perception.
        completion_mask: `[B, T]` 0/1; None means all valid.

    Returns: ids `[B, M]` and mask `[B, M]`, in order and padded on the right. Permute the rows, for example within the
        rollouts of one prompt, and pass them to `score_streams` as `other_perception_ids` and `other_perception_mask`.
    """
    seen = role_ids == Role.PERCEPTION
    if completion_mask is not None:
        seen = seen & (completion_mask != 0)
    order = (~seen).long().argsort(dim=1, stable=True)[:, : int(seen.sum(dim=1).max()) if seen.numel() else 0]
    return completion_ids.gather(1, order), seen.gather(1, order)


def _inverse(order: Tensor) -> Tensor:
    columns = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, columns)
