"""What integrations share whose engines score padded batches: contexts go in, log-probs of the last tokens come out."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srpo.roles import Role, RoleGrammar, role_ids_from_completions, warn_of_roles_that_never_parse
from srpo.rollout import WeighedRollout, weigh_rollout
from srpo.settings import CreditSettings, check_log_probs_alone
from srpo.streams import no_evidence
from srpo.vision.ablation import hide
from srpo.vision.contexts import corrupted_rows
from srpo.vision.corruption import PixelLayout
from srpo.vision.inputs import ModelInputs
from srpo.vision.scoring import StreamLogps


class PaddedBatch(NamedTuple):
    """A batch as engines hand it to their workers.

    Args:
        input_ids, attention_mask: `[B, S]`.
        completion_mask: `[B, T]` 0/1, of the last T columns: the tokens that were sampled.
        pictures: for each row what its pictures add to the inputs of the model (`pixel_values`, `image_grid_thw`);
            empty for a row without pictures.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    pictures: Sequence[dict[str, Tensor]]


Forward = Callable[[list[PaddedBatch]], list[Tensor]]


class Cut(NamedTuple):
    """Completions without their perception.

    Args:
        columns: inputs of the model without it; positions, where there are any, have stayed with their tokens.
        tokens: T', the last tokens of `columns` whose log-probs are wanted.
        seen: `[B, T]` bool, the tokens of the whole completion that are left and had something cut out.
        place: `[B, T]`, where each of them is among the T'.
    """

    columns: ModelInputs
    tokens: int
    seen: Tensor
    place: Tensor

    def restored(self, logps: Tensor) -> Tensor:
        """Put log-probs `[B, T']` back to the tokens of the whole completion; the others have no evidence."""
        return torch.where(self.seen, logps.gather(1, self.place), no_evidence(logps))


def cut_out(columns: ModelInputs, perception: Tensor, mask: Tensor) -> Cut:
    """Cut tokens out of the completions of a batch.

    Args:
        columns: inputs of the model, `[B, S]`.
        perception: `[B, T]` bool, of the last T columns.
        mask: `[B, T]` bool, tokens that were sampled.
    """
    seen = mask & ~perception & perception.any(dim=1, keepdim=True)
    cut, source = hide(columns, perception, cut=True)
    last = cut.input_ids.shape[1] - 1
    source = torch.where(seen, source, last - 1)  # of others it may be the last column, which predicts nothing
    first = int(source.min())
    return Cut(cut, last - first, seen, source - first)


def parsed_roles(ids: Tensor, mask: Tensor, tokenizer: Any, grammar: RoleGrammar) -> Tensor:
    """Parse the roles of a rollout; say so where they never parse."""
    parse = role_ids_from_completions(ids, tokenizer, completion_mask=mask, grammar=grammar)
    known = (mask != 0).any(dim=1).to(parse.parsed.device)
    if known.any():
        failures = float((known & ~parse.parsed).sum() / known.sum())
        warn_of_roles_that_never_parse(failures, ids, mask, tokenizer, grammar)
    return parse.role_ids


def credit_batches(
    batches: list[PaddedBatch],
    advantages: list[Tensor],
    old_logps: list[Tensor],
    tokenizer: Any,
    forward: Forward,
    layout: PixelLayout | None,
    settings: CreditSettings,
    step: int = 0,
) -> list[WeighedRollout]:
    """Credit the batches of a step: parse roles, let the engine score two more contexts, weigh advantages.

    Args:
        batches: of all rows of this process.
        advantages: `[B]` or `[B, T]` of each batch.
        old_logps: `[B, T]` nats of each, scored by the policy, not by the sampler.
        tokenizer: of the policy.
        forward: scores a list of batches with the policy: log-probs `[B, T]` of the last T tokens of each, T being that
            of its `completion_mask`. Called once with corrupted pictures, and once without the perception, if at all.
        layout: of the pictures; None: the policy sees none.
        settings: of the credit stage.
        step: optimisation steps done.

    Returns: one WeighedRollout for each batch.

    Raises: ConfigError; what `weigh_rollout` and `role_ids_from_completions` raise.
    """
    check_log_probs_alone(settings, "credit_batches")
    streams, credit = settings.streams_at(step), settings.credit_at(step)
    masks = [batch.completion_mask != 0 for batch in batches]
    ids = [batch.input_ids[:, -mask.shape[1] :] for batch, mask in zip(batches, masks, strict=True)]
    roles = [
        parsed_roles(own, mask, tokenizer, settings.role_grammar).to(mask.device)
        for own, mask in zip(ids, masks, strict=True)
    ]
    old_logps = [x.float() for x in old_logps]
    nothing = [no_evidence(x).expand_as(x) for x in old_logps]
    corrupted = ablated = [None] * len(batches)
    if "corrupted" in streams:
        corrupted = nothing
        if layout is not None and any(row for batch in batches for row in batch.pictures):
            scored = forward([_with_corrupted(batch, layout, settings.corruption) for batch in batches])
            corrupted = [
                torch.where(mask & _has_picture(batch, mask), x.float(), none)
                for batch, mask, x, none in zip(batches, masks, scored, nothing, strict=True)
            ]
    if "ablated" in streams:
        perception = [(role == Role.PERCEPTION) & mask for role, mask in zip(roles, masks, strict=True)]
        cuts = [_without(*given) for given in zip(batches, perception, masks, strict=True)]
        scored = forward([batch for _, batch in cuts])
        ablated = [cut.restored(x.float()) for (cut, _), x in zip(cuts, scored, strict=True)]
    return [
        weigh_rollout(StreamLogps(old, bad, cut, old), role, given, completion_mask=mask, credit=credit)
        for old, bad, cut, role, given, mask in zip(
            old_logps, corrupted, ablated, roles, advantages, masks, strict=True
        )
    ]


def _without(batch: PaddedBatch, perception: Tensor, mask: Tensor) -> tuple[Cut, PaddedBatch]:
    """Cut the perception out of a batch."""
    columns = ModelInputs(batch.input_ids, batch.attention_mask, None, {}, None, None)
    cut = cut_out(columns, perception, mask)
    ids, valid = cut.columns.input_ids, cut.columns.attention_mask
    return cut, PaddedBatch(ids, valid, valid[:, -cut.tokens :], batch.pictures)


def _with_corrupted(batch: PaddedBatch, layout: PixelLayout, corruption: Any) -> PaddedBatch:
    """Return the batch with its pictures corrupted, alike in all rollouts of a prompt."""
    start = batch.input_ids.shape[1] - batch.completion_mask.shape[1]
    prompts = [
        row[:end][valid[:end] != 0]
        for row, valid, end in zip(batch.input_ids, batch.attention_mask, _prompt_ends(batch, start), strict=True)
    ]
    dark = corrupted_rows(list(batch.pictures), prompts, corruption, layout, "credit_batches")
    return batch._replace(pictures=dark)


def _prompt_ends(batch: PaddedBatch, start: int) -> list[int]:
    """Return for each row the column of its first sampled token."""
    return [start + int(mask.argmax()) for mask in (batch.completion_mask != 0).int()]


def _has_picture(batch: PaddedBatch, like: Tensor) -> Tensor:
    return torch.tensor([bool(row) for row in batch.pictures], device=like.device)[:, None]
