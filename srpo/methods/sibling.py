"""SRPO with blame by siblings: rollouts of the same prompt that earned more know what a failing one misread.

Evidence says how much a token rests on the picture, and not whether it was read right: a confident misperception rests
on it too. A better rollout of the same prompt says which tokens of a failing one are in doubt.
"""

import difflib

import torch
from torch import Tensor

from srpo import checks
from srpo.config import PRESETS, CreditConfig
from srpo.credit import role_contrast, token_weights
from srpo.roles import Role


@torch.no_grad()
def sibling_weights(
    logps: Tensor,
    corrupted_logps: Tensor,
    corrupted_kl: Tensor,
    ablated_logps: Tensor,
    role_ids: Tensor,
    completion_ids: Tensor,
    advantages: Tensor,
    group_ids: Tensor,
    completion_mask: Tensor | None = None,
    *,
    credit: CreditConfig = PRESETS["srpo_wide"],
) -> Tensor:
    """Weight failing rollouts by blame, which a better rollout of the same prompt puts on their tokens.

    c = corrupted_kl on perception tokens that the better rollout contradicts, -corrupted_kl on others
    c = ablated_logps - logps on reasoning tokens: what rests on the own perception is spared

    Other rollouts are weighted by evidence, `role_contrast`. Contrasts become weights as in `token_weights`.

    Args:
        logps, corrupted_logps, ablated_logps: `[B, T]` nats, as `role_contrast` takes them.
        corrupted_kl: `[B, T]` nats at least 0, read on perception tokens: `score_streams(...,
            credit="srpo_sibling")` returns it beside the log-probs.
        role_ids: `[B, T]` integers, 0 other, 1 perception, 2 reasoning.
        completion_ids: `[B, T]` integers.
        advantages: `[B]`; a rollout fails where it is negative.
        group_ids: `[B]` integers, the prompt of each row; groups have to be whole.
        completion_mask: `[B, T]` 0/1; None means all valid.
        credit: bounds and normalisation of the weights, and the contrast of rollouts that do not fail.

    Returns: `[B, T]` as `token_weights`. A failing rollout without a better one that has a perception keeps weight 1.

    Gradient: none.

    Memory: a few `[B, T]` tensors, and what `contradicted_by_sibling` takes, with its wait for a GPU.

    Raises: ShapeError, DtypeError, DeviceError, RoleParseError, ConfigError, NonFiniteError.

    Source: an idea of this library on the weights of Jiang & Zou, arXiv 2605.07274; measured in
        benchmarks/grounding.

    Example:
        >>> import torch
        >>> from srpo.methods import sibling_weights
        >>> roles, ids = torch.tensor([[1, 1, 2], [1, 1, 2]]), torch.tensor([[5, 3, 9], [5, 4, 9]])
        >>> logps, kl = torch.full((2, 3), -1.0), torch.full((2, 3), 1.0)
        >>> of_group = {"advantages": torch.tensor([-1.0, 1.0]), "group_ids": torch.tensor([0, 0])}
        >>> sibling_weights(logps, logps - 1, kl, logps - 1, roles, ids, **of_group)[0]  # the 3 is to blame
        tensor([0.5089, 1.9823, 0.5089])
    """
    call = checks.Call("sibling_weights", logps, "logps")
    layout = checks.layout_of(call, "logps", logps, None)
    mask = checks.mask_of(call, completion_mask, layout)
    roles = checks.roles_of(call, role_ids, mask, layout)
    sibling, marked = _compared(call, layout.shape, completion_ids, roles, advantages, group_ids, mask)
    perception = mask & (roles == Role.PERCEPTION)
    call.tensor("corrupted_kl", corrupted_kl, [layout.shape], "[B, T]", "float")
    checks.scored(call, "corrupted_kl", corrupted_kl, perception, "sibling_weights reads")
    call.divergences("corrupted_kl", corrupted_kl, perception)
    evidence = role_contrast(
        logps, corrupted_logps=corrupted_logps, ablated_logps=ablated_logps, role_ids=roles, completion_mask=mask,
        credit=credit,
    )  # fmt: skip
    kl = corrupted_kl.to(evidence.dtype).clamp(max=credit.contrast_clamp)
    blame = torch.where(perception, torch.where(marked, kl, -kl), -evidence)
    blame = torch.where((sibling >= 0)[:, None], blame, 0.0)  # nobody to compare with: equal contrasts, weight 1
    contrast = torch.where((advantages < 0)[:, None], blame, evidence)
    return token_weights(contrast, roles, mask, advantages=advantages, credit=credit)


def contradicted_by_sibling(
    completion_ids: Tensor,
    role_ids: Tensor,
    advantages: Tensor,
    group_ids: Tensor,
    completion_mask: Tensor | None = None,
) -> Tensor:
    """Mark the perception tokens of failing rollouts that the perception of a better one of the same prompt has not.

    A rollout with a negative advantage is compared with the next rollout of its group, in the order of rows and
    around, that has a positive one and a perception. The two perceptions are aligned as `difflib.SequenceMatcher` does;
    tokens outside of the blocks that match are marked. Nothing is marked in other rollouts.

    Args:
        completion_ids: `[B, T]` integers.
        role_ids: `[B, T]` integers, 1 perception.
        advantages: `[B]`.
        group_ids: `[B]` integers, the prompt of each row; groups have to be whole.
        completion_mask: `[B, T]` 0/1; None means all valid.

    Returns: `[B, T]` bool, on the device of `completion_ids`.

    Gradient: none.

    Memory: a `[B, B]` mask. Perceptions are aligned on the CPU, a rollout at a time: a GPU waits for it.

    Raises: ShapeError, DtypeError, DeviceError, RoleParseError, NonFiniteError.

    Example:
        >>> import torch
        >>> from srpo.methods import contradicted_by_sibling
        >>> ids, roles = torch.tensor([[5, 3, 7, 9], [5, 4, 7, 9]]), torch.tensor([[1, 1, 1, 2], [1, 1, 1, 2]])
        >>> contradicted_by_sibling(ids, roles, torch.tensor([-1.0, 1.0]), torch.tensor([0, 0]))
        tensor([[False,  True, False, False],
                [False, False, False, False]])
    """
    call = checks.Call("contradicted_by_sibling", completion_ids, "completion_ids")
    layout = checks.layout_of(call, "completion_ids", completion_ids, None)
    mask = checks.mask_of(call, completion_mask, layout)
    roles = checks.roles_of(call, role_ids, mask, layout)
    return _compared(call, layout.shape, completion_ids, roles, advantages, group_ids, mask)[1]


def _compared(
    call: checks.Call,
    shape: tuple[int, ...],
    completion_ids: Tensor,
    roles: Tensor,
    advantages: Tensor,
    group_ids: Tensor,
    mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """Check the rest, and return the row `[B]` that each is compared with, -1 for none, and the marks `[B, T]`."""
    rows = shape[:1]
    call.tensor("completion_ids", completion_ids, [shape], "[B, T]", "int")
    call.tensor("advantages", advantages, [rows], "[B]", "float")
    call.finite("advantages", advantages, torch.ones_like(advantages, dtype=torch.bool))
    call.tensor("group_ids", group_ids, [rows], "[B]", "int")
    seen = ((roles == Role.PERCEPTION) & mask).cpu()
    ids, A = completion_ids.cpu(), advantages.cpu()
    sibling = next_in_group((A > 0) & seen.any(1), group_ids.cpu())
    marked = torch.zeros_like(seen)
    for i in ((A < 0) & (sibling >= 0)).nonzero()[:, 0].tolist():
        columns = seen[i].nonzero()[:, 0]
        own, other = ids[i, columns].tolist(), ids[sibling[i], seen[sibling[i]]].tolist()
        marked[i, columns] = True
        for first, _, length in difflib.SequenceMatcher(None, own, other, autojunk=False).get_matching_blocks():
            marked[i, columns[first : first + length]] = False
    return sibling.to(mask.device), marked.to(mask.device)


def next_in_group(usable: Tensor, group_ids: Tensor) -> Tensor:
    """Return `[B]` the next other row of the same group that is usable, in order and around; -1 where there is none."""
    B = len(usable)
    rows = torch.arange(B)
    same = (group_ids[:, None] == group_ids) & usable & (rows != rows[:, None])
    distance = torch.where(same, (rows - rows[:, None]) % max(B, 1), B)
    return torch.where(same.any(1), distance.argmin(1), -1) if B else rows
