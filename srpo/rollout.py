"""What every integration does with a rollout: roles, scoring by a callback, weights, token advantages, metrics.

    credited = credit_rollout(completion_ids, advantages, tokenizer, score, completion_mask=mask, settings=settings)

A trainer brings two things: `score`, which knows how its framework runs a model, and where the advantages go. A
trainer that scores at one place and weighs at another calls `role_ids_from_completions` and `weigh_rollout` itself.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from srpo import checks
from srpo.config import CreditConfig
from srpo.credit import Credit, run_credit, token_advantages
from srpo.errors import ConfigError, describe
from srpo.methods import Method
from srpo.metrics import MetricSums, credit_sums, loss_sums
from srpo.roles import (
    Role,
    RoleParse,
    Tokenizer,
    role_ids_from_completions,
    warn_of_roles_that_never_parse,
)
from srpo.settings import CreditSettings
from srpo.streams import STREAMS, Streams, is_not_scored
from srpo_kernels.layout import Layout


class ScoredStreams(Protocol):
    """Describe what a scorer returns: log-probs `[B, T]` of each context, such as `StreamLogps`."""

    @property
    def logps(self) -> Tensor: ...
    @property
    def corrupted_logps(self) -> Tensor | None: ...
    @property
    def ablated_logps(self) -> Tensor | None: ...
    @property
    def entropy(self) -> Tensor | None: ...


RoleFunction = Callable[[Tensor, Tensor], Tensor]
Scorer = Callable[[Tensor, CreditConfig | Method], ScoredStreams]


class WeighedRollout(NamedTuple):
    """What token credit makes of a rollout.

    Args:
        advantages: `[B, T]` in the dtype of those given, 0 on masked tokens.
        weights: `[B, T]` fp32, what they were multiplied with.
        metrics: floats by name, over the tokens of all ranks; means over nothing are left out.
    """

    advantages: Tensor
    weights: Tensor
    metrics: dict[str, float]


class CreditedRollout(NamedTuple):
    """A `WeighedRollout`, the roles it rests on, and the streams; None where the credit reads none."""

    advantages: Tensor
    weights: Tensor
    metrics: dict[str, float]
    roles: RoleParse | None
    streams: ScoredStreams | None


def credit_rollout(
    completion_ids: Tensor,
    advantages: Tensor,
    tokenizer: Tokenizer,
    score: Scorer,
    *,
    completion_mask: Tensor | None = None,
    settings: CreditSettings = CreditSettings(),  # noqa: B008 - frozen
    step: int = 0,
    gather: Callable[[Tensor], Tensor] | None = None,
    role_func: RoleFunction | None = None,
) -> CreditedRollout:
    """Parse the roles of a rollout, let its streams be scored, and multiply token weights into its advantages.

    A_it = A_i * w_it

    Args:
        completion_ids: `[B, T]` integers.
        advantages: `[B]` or `[B, T]`.
        tokenizer: of the policy, as `role_ids_from_completions` wants it.
        score: called once with role ids `[B, T]` and the credit of this step, unless that reads nothing; returns
            log-probs of the rows that `credit.rows` names, as `score_streams(..., role_ids=role_ids, credit=credit)`.
        completion_mask: `[B, T]` 0/1, without tokens that no policy sampled (tool output); None means all valid.
        settings: of the credit stage.
        step: optimisation steps done, from which the strength of the weights may depend.
        gather: gathers a vector `[K]` of every rank as `[ranks, K]`, for metrics of all ranks in one collective; every
            rank must call. None: this rank alone.
        role_func: called with `completion_ids` and the mask as bool, returns role ids `[B, T]` in the place of those
            that `settings.role_grammar` finds.

    Returns: CreditedRollout. A credit that reads no stream leaves the advantages as they are, and calls nothing.

    Warns: ConfigWarning, once, where the grammar finds both roles in no completion of the first three rollouts.

    Gradient: none.

    Raises: ShapeError, DtypeError, DeviceError, RoleParseError, ConfigError, NonFiniteError; what `score` raises.

    Example:
        >>> ids = torch.tensor([[ord(c) for c in "<see>cat</see><think>1</think>"]])
        >>> class Characters:
        ...     def __len__(self):
        ...         return 128
        ...
        ...     def decode(self, ids, **_):
        ...         return "".join(map(chr, ids))
        >>> def score(role_ids, credit):  # score_streams(..., role_ids=role_ids, credit=credit) in your trainer
        ...     logps = -torch.rand(role_ids.shape)
        ...     return srpo.StreamLogps(logps, logps - 1.0, logps - 0.5, logps)
        >>> credited = credit_rollout(ids, torch.tensor([1.0]), Characters(), score)
        >>> credited.advantages.shape, credited.metrics["srpo/parse_failures"]
        (torch.Size([1, 30]), 0.0)
    """
    credit = settings.credit_at(step)
    if not credit.streams:
        call = checks.Call("credit_rollout", completion_ids, "completion_ids")
        layout = checks.layout_of(call, "completion_ids", completion_ids, None)
        mask = checks.mask_of(call, completion_mask, layout)
        per_token = torch.where(mask, checks.advantages_of(call, advantages, mask, layout), 0.0)
        return CreditedRollout(per_token, mask.float(), {}, None, None)
    grammar = settings.role_grammar
    if role_func is None:
        parse = role_ids_from_completions(completion_ids, tokenizer, completion_mask=completion_mask, grammar=grammar)
    else:
        call = checks.Call("credit_rollout", completion_ids, "completion_ids")
        mask = checks.mask_of(call, completion_mask, checks.layout_of(call, "completion_ids", completion_ids, None))
        if not callable(role_func):
            call.fail(ConfigError, "role_func", describe(role_func), "a function of ids and mask", "pass a function")
        role_ids = role_func(completion_ids, mask)
        call.tensor("what role_func returns", role_ids, [tuple(completion_ids.shape)], "[B, T]", "int")
        parse = RoleParse.of(role_ids)
    streams = score(parse.role_ids, credit)
    weighed = weigh_rollout(
        streams, parse.role_ids, advantages, completion_mask=completion_mask, credit=credit, unclosed=parse.unclosed,
        stray=parse.stray, gather=gather,
    )  # fmt: skip
    failures = weighed.metrics.get("srpo/parse_failures")
    if role_func is None and failures is not None:
        warn_of_roles_that_never_parse(failures, completion_ids, completion_mask, tokenizer, grammar)
    return CreditedRollout(*weighed, parse, streams)


def weigh_rollout(
    streams: ScoredStreams,
    role_ids: Tensor,
    advantages: Tensor,
    *,
    completion_mask: Tensor | None = None,
    credit: CreditConfig | Method = CreditConfig(),  # noqa: B008 - frozen
    unclosed: Tensor | None = None,
    stray: Tensor | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
    function: str = "weigh_rollout",
    names: Mapping[str, str] | None = None,
) -> WeighedRollout:
    """Multiply token weights into the advantages of a rollout whose streams are scored.

    Args:
        streams: log-probs `[B, T]`.
        role_ids: `[B, T]` integers, those that the streams were scored with.
        advantages: `[B]` or `[B, T]`.
        completion_mask: `[B, T]` 0/1; None means all valid.
        credit: settings, or a method of `srpo.METHODS`, with which the streams were scored.
        unclosed, stray: `[B]` bool, as `RoleParse` has them, for metrics.
        gather: as in `credit_rollout`.
        function: whose name an error carries.
        names: what that function calls its arguments, by their names here.

    Returns: WeighedRollout. Beside the metrics of `MetricSums`: `srpo/weight_min` and `srpo/weight_max` over tokens
        with a role; `srpo/parse_failures`, the share of completions that lack perception or reasoning, of those with
        a valid token; `srpo/unclosed`, the share with a tag that was never closed, as in truncated completions;
        `srpo/stray`, the share with a closing tag that nothing had opened; `srpo/contrast_rows`, the tokens that the
        contrast streams were scored on.

    Gradient: none.

    Raises: ShapeError, DtypeError, DeviceError, RoleParseError, ConfigError, NonFiniteError.
    """
    call = checks.Call(function, streams.logps, "logps", names=names)
    layout = checks.layout_of(call, "logps", streams.logps, None)
    mask = checks.mask_of(call, completion_mask, layout)
    roles = checks.roles_of(call, role_ids, mask, layout)
    per_token = checks.advantages_of(call, advantages, mask, layout)
    weighed = _weigh(call, layout, credit, roles, mask, per_token, streams)
    own = _own_metrics(weighed, credit, roles, mask, per_token, (unclosed, stray), layout)
    metrics = _named(own[None] if gather is None else gather(own[None]))
    return WeighedRollout(token_advantages(per_token, weighed.weights).to(advantages.dtype), weighed.weights, metrics)


def _weigh(
    call: checks.Call,
    layout: Layout,
    credit: CreditConfig | Method,
    role_ids: Tensor,
    mask: Tensor,
    advantages: Tensor,
    streams: ScoredStreams,
) -> Credit:
    """Return the weights, and what the metrics need.

    A method has weights alone: its contrast is that of the image, it clips nothing and has no baseline.
    """
    logps, kl = Streams(streams.corrupted_logps, streams.ablated_logps), divergences_of(streams)
    if isinstance(credit, CreditConfig):
        given = checks.contrast_streams(call, credit, layout, role_ids, mask, logps, kl)
        read = Streams(*(x if name in credit.streams else None for name, x in zip(STREAMS, given, strict=True)))
        backend = checks.backend_of(call, "auto", streams.logps.dtype)
        return run_credit(call, layout, mask, role_ids, advantages, credit, backend, base=streams.logps, streams=read)
    weights = credit(
        logps=streams.logps, completion_mask=mask, role_ids=role_ids, advantages=advantages, entropy=streams.entropy,
        corrupted_logps=logps.corrupted, ablated_logps=logps.ablated, corrupted_kl=kl.corrupted,
    )  # fmt: skip
    contrast, lost = contrast_of_picture(streams, credit), mask.new_zeros((), dtype=torch.long)
    if logps.corrupted is not None:
        lost = (credit.rows("corrupted", role_ids, mask) & is_not_scored(logps.corrupted)).sum()
    contrast = torch.zeros_like(weights) if contrast is None else contrast
    no_baseline = weights.new_full((len(mask),), torch.nan)
    return Credit(contrast, weights, torch.zeros_like(mask, dtype=torch.uint8), no_baseline, lost, lost * 0)


def divergences_of(streams: ScoredStreams) -> Streams:
    """Return the divergences among scored streams; a scorer of log-probs alone has none."""
    return Streams(getattr(streams, "corrupted_kl", None), getattr(streams, "ablated_kl", None))


def contrast_of_picture(streams: ScoredStreams, method: Method) -> Tensor | None:
    """Return what a method's weights are made of, nats: its divergence, or the difference; None without a picture."""
    if streams.corrupted_logps is None:
        return None
    kl = divergences_of(streams).corrupted
    return kl if method.reads_kl and kl is not None else streams.logps - streams.corrupted_logps


def _own_metrics(
    weighed: Credit,
    credit: CreditConfig | Method,
    role_ids: Tensor,
    mask: Tensor,
    advantages: Tensor,
    faults: tuple[Tensor | None, Tensor | None],
    layout: Layout,
) -> Tensor:
    """Return this rank's part of the metrics: sums, then counts, then the smallest and minus the largest weight."""
    no_clips = weighed.weights.new_zeros(1, 3)
    sums = loss_sums(mask, mask, advantages, no_clips, None, layout)
    known = mask.any(dim=1)
    parsed = torch.stack([(mask & (role_ids == role)).any(dim=1) for role in (Role.PERCEPTION, Role.REASONING)]).all(0)
    rows = sum((credit.rows(name, role_ids, mask).sum() for name in credit.streams), mask.sum() * 0)
    unclosed, stray = (torch.zeros_like(known) if x is None else x.to(mask.device) & known for x in faults)
    counts = torch.stack([(known & ~parsed).sum(), unclosed.sum(), stray.sum(), known.sum(), rows])
    weights, credited = weighed.weights.double(), mask & (role_ids != Role.OTHER)
    lowest = torch.where(credited, weights, torch.inf).amin() if mask.numel() else weights.new_full((), torch.inf)
    highest = torch.where(credited, weights, -torch.inf).amax() if mask.numel() else weights.new_full((), -torch.inf)
    parts = (sums, credit_sums(weighed, role_ids, mask, advantages), counts.double(), torch.stack([lowest, -highest]))
    return torch.cat(parts)


def _named(ranks: Tensor) -> dict[str, float]:
    """Turn the parts of all ranks, `[ranks, K]`, into floats by name."""
    total, bounds = ranks[:, :-2].sum(dim=0), ranks[:, -2:].amin(dim=0).tolist()
    named = MetricSums(total[:-5], frozenset({"credit"})).floats()
    failed, unclosed, stray, n, rows = total[-5:].tolist()
    if n:
        named |= {"srpo/parse_failures": failed / n, "srpo/unclosed": unclosed / n, "srpo/stray": stray / n}
    named["srpo/contrast_rows"] = rows
    if bounds[0] <= -bounds[1]:  # else no token had a role
        named |= {"srpo/weight_min": bounds[0], "srpo/weight_max": -bounds[1]}
    return {name: value for name, value in named.items() if not math.isnan(value)}
