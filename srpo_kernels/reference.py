"""Plain-PyTorch twin of every kernel: the oracle of the tests and the maths of the "torch" backend.

Rows are `[n, V]`, trajectories are padded `[R, T]`. Every function computes in the dtype of its inputs, so float64 in
is float64 truth out. Nothing here chooses devices, splits into chunks or knows of kernels.
"""

import torch
from torch import Tensor

from srpo_kernels.rules import CreditRule, LossRule

RATIO_LOG_MAX = 60.0  # exp(60) times an advantage still sums in fp32; beyond it a ratio carries no information
K3_SERIES_BELOW = 0.5  # under this |d| the closed form of k3 loses digits to cancellation
K3_MAX = 10.0
SOLVE_STEPS = 40
AT_LOWER_BOUND, AT_UPPER_BOUND, NO_VALUE = 1, 2, 4  # bits of the flags that `token_credit` returns


def row_sums(
    logits: Tensor,
    ids: Tensor,
    temperature: float,
    return_entropy: bool,
    workspace: tuple[Tensor | None, ...] = (None,) * 2,
    out: tuple[Tensor | None, ...] = (None,) * 5,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return what `finish_statistics` needs of rows `[n, V]`: five vectors `[n]`.

    z = (x - max x) / temperature,  p = softmax z:  max x, z[id], sum p, max p, sum p z

    `workspace` lends two `[n, V]` buffers, of which the first may be `logits` itself, and `out` five `[n]` vectors.
    """
    row_max = torch.amax(logits, -1, out=out[0])
    z = torch.sub(logits, row_max[:, None], out=workspace[0])
    if temperature != 1.0:
        z.mul_(1.0 / temperature)
    target = torch.gather(z, -1, ids[:, None], out=None if out[1] is None else out[1][:, None])
    probs = torch.softmax(z, -1, out=workspace[1])
    total, largest = torch.sum(probs, -1, out=out[2]), torch.amax(probs, -1, out=out[3])
    # nansum: 0 * -inf of a banned token counts as 0; a NaN row stays NaN through the other sums
    weighted = torch.nansum(probs.mul_(z), -1, out=out[4]) if return_entropy else None
    return row_max, target.squeeze(-1), total, largest, weighted


def finish_statistics(
    row_max: Tensor, target: Tensor, total: Tensor, largest: Tensor, weighted: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return `logps`, `row_max`, `log_sum` and `entropy` (or None) of rows from their sums.

    log_sum = log sum exp z,  logp = z[id] - log_sum,  H = log_sum - sum p z
    """
    # The largest z is 0, so its probability is 1 / sum exp z. torch.softmax sums a long row carelessly (1e-4 off at
    # V = 151k); the sum of what it returns says by how much.
    log_sum = (total / largest).log()
    return target - log_sum, row_max, log_sum, None if weighted is None else log_sum - weighted / total


def pair_sums(
    logits: Tensor,
    against: Tensor,
    ids: Tensor,
    temperature: float,
    workspace: tuple[Tensor, ...] | None = None,
    out: tuple[Tensor | None, ...] = (None,) * 5,
) -> tuple[tuple, tuple, Tensor]:
    """Return the `row_sums` of two rows `[n, V]` each, and the cross sum `[n]`, -inf where `against` alone bans.

    cross = sum p z',  p of `logits`, z' of `against`: an entry that both ban counts as 0

    `workspace` lends three `[n, V]` buffers, of which the first may be `logits` and the third `against`.
    """
    z, probs, other = workspace or tuple(torch.empty_like(logits) for _ in range(3))
    second = row_sums(against, ids, temperature, False, (other, probs))
    first = row_sums(logits, ids, temperature, True, (z, probs), out)
    cross = torch.nansum(torch.softmax(z, -1, out=probs).mul_(other), -1)
    banned = (other.isneginf() & ~z.isneginf()).any(-1)  # also where p is too small to be told from 0
    return first, second, cross.masked_fill(banned, -torch.inf)


def finish_kl(total: Tensor, weighted: Tensor, cross: Tensor, log_sum: Tensor, against_log_sum: Tensor) -> Tensor:
    """Return KL(p || q) >= 0 of rows from their sums; infinite where q alone bans a token."""
    return ((weighted - cross) / total - log_sum + against_log_sum).clamp(min=0.0)


def logits_gradient(
    logits: Tensor,
    ids: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
    whole_rows: bool = True,
    workspace: tuple[Tensor | None, ...] = (None, None),
) -> Tensor:
    """Return d(grad_logps * logp + grad_entropy * H) / dlogits for rows `[n, V]`.

    dlogits = (grad_logps * (onehot - p) - grad_entropy * p * (log p + H)) / temperature

    Rows that are a shard of the vocabulary are not `whole_rows`: their p does not sum to 1, and id -1 is in another
    shard. `workspace` lends two `[n, V]` buffers; the second receives the result, and either may be `logits`.
    """
    upstream = grad_logps[:, None] / temperature
    if whole_rows and grad_entropy is None:
        z = logits
        if temperature != 1.0:
            z = torch.sub(logits, row_max[:, None], out=workspace[0]).mul_(1.0 / temperature)
        grad = torch.softmax(z, -1, out=workspace[1])
        grad.mul_(-upstream / grad.sum(-1, keepdim=True))
    else:
        log_probs = torch.sub(logits, row_max[:, None], out=workspace[0]).mul_(1.0 / temperature).sub_(log_sum[:, None])
        grad = torch.exp(log_probs, out=workspace[1])
        slope = upstream
        if grad_entropy is not None and entropy is not None:
            slope = log_probs.clamp_(min=-1e6).add_(entropy[:, None]).mul_(grad_entropy[:, None] / temperature)
            slope.add_(upstream)
        grad.mul_(slope).neg_()
    at_target = upstream if whole_rows else torch.where(ids[:, None] >= 0, upstream, 0.0)
    return grad.scatter_add_(-1, ids.clamp(min=0)[:, None], at_target)


def k3(d: Tensor) -> Tensor:
    """Return exp(-d) + d - 1, accurate for small d."""
    near = d.abs() < K3_SERIES_BELOW
    x = torch.where(near, d, torch.zeros_like(d))
    series = torch.full_like(x, 1.0 / 3628800)
    for coefficient in (-1 / 362880, 1 / 40320, -1 / 5040, 1 / 720, -1 / 120, 1 / 24, -1 / 6, 1 / 2):
        series = series * x + coefficient
    far = torch.where(near, torch.ones_like(d), d)
    return torch.where(near, x * x * series, torch.exp(-far) + far - 1.0)


def token_credit(
    contrast: Tensor | None,
    base: Tensor | None,
    corrupted: Tensor | None,
    ablated: Tensor | None,
    role_ids: Tensor,
    mask: Tensor,
    advantages: Tensor | None,
    rule: CreditRule,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `contrast`, `weights`, `flags` (uint8), all `[R, T]`, and `baseline` `[R]` of padded trajectories.

    A given `contrast` is used as it is; without it the contrast comes from the log-probs of the streams, or from their
    divergences with `contrast_kind="kl"`. `baseline` is
    the mean contrast over the credit set, NaN where a trajectory got weight 1 because it lacks a role.
    """
    evidence, c, no_value, perception, reasoning = _evidence(contrast, base, corrupted, ablated, role_ids, mask, rule)
    credited = perception | reasoning
    inside = credited.view(torch.uint8).to(c.dtype)
    n = inside.sum(-1, keepdim=True).clamp(min=1)
    mean = c.sum(-1, keepdim=True) / n
    around = 0.0 if rule.baseline == "none" else mean
    if rule.baseline == "role_mean":
        around = torch.where(perception, _masked_mean(c, perception), _masked_mean(c, reasoning))
    u = (c - around).div_(rule.tau)  # in place from here: on a CPU new memory costs more than the arithmetic
    if rule.direction == "advantage":
        assert advantages is not None
        u = _kept(u.mul_(advantages.sign()), credited)  # masked tokens may have any advantage
    if rule.normalize == "solve":
        u.sub_(_solve_shift(u, credited, rule.weight_min, rule.weight_max))
    w = u.exp_()
    low, high = credited & (w < rule.weight_min), credited & (w > rule.weight_max)
    w.clamp_(rule.weight_min, rule.weight_max)
    if rule.normalize == "mean":
        w.div_((w * inside).sum(-1, keepdim=True) / n)

    lacking = ~_any(credited) if rule.missing_role != "uniform" else ~(_any(perception) & _any(reasoning))
    weighted = _of_rows(credited, ~lacking & _differ(c, inside))
    if rule.strength != 1.0:
        w.sub_(1.0).mul_(rule.strength).add_(1.0)
    w = _kept(w, weighted).add_((mask & ~weighted).view(torch.uint8).to(w.dtype))
    flags = no_value.view(torch.uint8) * NO_VALUE
    for reached, flag in ((low, AT_LOWER_BOUND), (high, AT_UPPER_BOUND)):
        flags.add_((reached & weighted).view(torch.uint8), alpha=flag)
    return evidence, w, flags, mean.masked_fill(lacking, torch.nan).squeeze(-1)


def role_contrast(
    contrast: Tensor | None,
    base: Tensor | None,
    corrupted: Tensor | None,
    ablated: Tensor | None,
    role_ids: Tensor,
    mask: Tensor,
    rule: CreditRule,
) -> tuple[Tensor, Tensor]:
    """Return `contrast` `[R, T]`, and where it has no value.

    A contrast without a value is 0; where all of a role of a trajectory have none, the role is missing there, and
    `contrast` is NaN.
    """
    evidence, _, no_value, *_ = _evidence(contrast, base, corrupted, ablated, role_ids, mask, rule)
    return evidence, no_value


def _evidence(
    contrast: Tensor | None,
    base: Tensor | None,
    corrupted: Tensor | None,
    ablated: Tensor | None,
    role_ids: Tensor,
    mask: Tensor,
    rule: CreditRule,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return contrasts with NaN where a role has none, and with 0; where they have no value, and who is credited.

    Contrasts are 0 outside the credit set, `[R, T]` as all others, which are bool.
    """
    perception, reasoning = mask & _equal(role_ids, 1), mask & _equal(role_ids, 2)
    if contrast is not None:
        raw = contrast
    else:
        one_pass = rule.reasoning_signal == "image_independence"
        assert base is not None
        assert corrupted is not None
        assert one_pass or ablated is not None
        against = corrupted if one_pass or ablated is None else torch.where(perception, corrupted, ablated)
        raw = against if rule.contrast_kind == "kl" else base - against  # of "kl" a stream holds its divergences
        raw = torch.where(reasoning, -raw, raw) if one_pass else raw
    c = _kept(raw, perception | reasoning)
    on_cpu = c.device.type == "cpu"  # elsewhere to look at values would be a sync
    all_known = on_cpu and not bool(c.sum().isnan())
    no_value = torch.zeros_like(mask) if all_known else c.isnan()
    c.nan_to_num_(0.0, rule.contrast_clamp, -rule.contrast_clamp)
    if contrast is None:
        c = _contrast_of(c.clamp_(-rule.contrast_clamp, rule.contrast_clamp), rule.contrast_kind)
    if all_known:
        return c, c, no_value, perception, reasoning
    perception, reasoning = (_of_rows(x, _any(x & ~no_value)) for x in (perception, reasoning))
    return c.masked_fill(no_value & ~(perception | reasoning), torch.nan), c, no_value, perception, reasoning


def _contrast_of(d: Tensor, contrast_kind: str) -> Tensor:
    if contrast_kind == "abs":
        return d.abs()
    return k3(d).clamp(max=K3_MAX) if contrast_kind == "k3" else d


def _kept(x: Tensor, where: Tensor) -> Tensor:
    """Return `x` with 0 outside: as `torch.where`, by its bits, which is three times as fast on a CPU."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = where.view(torch.uint8).to(integers).neg_().bitwise_and_(x.view(integers))
    return bits.view(x.dtype)


def _equal(x: Tensor, value: int) -> Tensor:
    """Return `x == value`; in the dtype of `x`, if that has one byte, a CPU is ten times as fast."""
    if x.element_size() > 1:
        return x == value
    return torch.eq(x, value, out=torch.empty_like(x)).view(torch.bool)


def _of_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Return `x & rows` for bool `[R, T]` and `[R, 1]`; as numbers, which a CPU broadcasts ten times as fast."""
    return (x.view(torch.uint8) * rows.view(torch.uint8)).view(torch.bool)


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    total = torch.where(mask, x, 0.0).sum(-1, keepdim=True)
    return total / mask.sum(-1, keepdim=True).clamp(min=1)


def _differ(c: Tensor, inside: Tensor) -> Tensor:
    """Say of each row whether values that are 0 outside differ inside (1 there, else 0)."""
    if not c.shape[1]:
        return c.new_zeros(c.shape[0], 1, dtype=torch.bool)
    high, low = c.amax(-1, keepdim=True), c.amin(-1, keepdim=True)
    rest = torch.addcmul(c, torch.where(high > -low, high, low), inside, value=-1.0)
    return (rest.amax(-1, keepdim=True) > 0) | (rest.amin(-1, keepdim=True) < 0)


def _any(x: Tensor) -> Tensor:
    if not x.shape[-1]:
        return x.any(-1, keepdim=True)
    return x.view(torch.uint8).amax(-1, keepdim=True) > 0  # on a CPU twenty times as fast as `any`


def _solve_shift(u: Tensor, credited: Tensor, weight_min: float, weight_max: float) -> Tensor:
    """Find the shift per row under which the clipped weights have mean 1.

    Bisection brackets the shift between the smallest and the largest exponent; one exact step on the weights that are
    not clipped then removes what the resolution of the exponent left over.
    """
    if not u.shape[1]:
        return u.new_zeros(u.shape[0], 1)
    lo = u.masked_fill(~credited, torch.inf).amin(-1, keepdim=True)
    hi = u.masked_fill(~credited, -torch.inf).amax(-1, keepdim=True)
    lo, hi = torch.where(lo <= hi, lo, torch.zeros_like(lo)), torch.where(lo <= hi, hi, torch.zeros_like(hi))
    for _ in range(SOLVE_STEPS):
        middle = 0.5 * (lo + hi)
        above = _masked_mean((u - middle).exp().clamp(weight_min, weight_max), credited) > 1.0
        lo, hi = torch.where(above, middle, lo), torch.where(above, hi, middle)
    shift = 0.5 * (lo + hi)
    w = (u - shift).exp()
    inside = credited & (w > weight_min) & (w < weight_max)
    clipped = torch.where(credited & ~inside, w.clamp(weight_min, weight_max), torch.zeros_like(w)).sum(
        -1, keepdim=True
    )
    free = torch.where(inside, w, torch.zeros_like(w)).sum(-1, keepdim=True)
    wanted = credited.sum(-1, keepdim=True) - clipped
    usable = (free > 0) & (wanted > 0)
    return shift - torch.where(usable, torch.log(wanted.where(usable, free) / free), torch.zeros_like(free))


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    importance_sampling_ratio: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    mask: Tensor,
    scale: Tensor,
    rule: LossRule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss `[R]`, metric sums `[R, 3]` and `coefficient` = d loss / d logps `[R, T]` of padded trajectories.

    l = -min(min(rho, delta) * A * w, clip(rho, 1 - epsilon_low, 1 + epsilon_high) * A * w) * is_ratio + beta * k3
    loss_i = scale_i * sum_t l_it;  the sums are tokens clipped below, tokens clipped above, and the KL
    """
    zero = torch.zeros_like(logps)
    logps = torch.where(mask, logps, zero)
    old = logps if old_logps is None else torch.where(mask, old_logps, zero)
    log_ratio, log_slope = _difference(logps, old)
    if rule.importance_sampling_level == "sequence_token":
        log_ratio = _masked_mean(log_ratio, mask).expand_as(log_ratio)
    ratio = log_ratio.clamp(max=RATIO_LOG_MAX).exp()
    ratio_slope = torch.where(log_ratio <= RATIO_LOG_MAX, ratio, zero) * log_slope
    sign = torch.where(mask, advantages, zero)
    advantage = torch.where(mask, advantages * weights, zero)
    low = high = torch.zeros_like(mask)
    if rule.kind in ("cispo", "reinforce"):
        bound = ratio.clamp(max=rule.epsilon_high) if rule.kind == "cispo" else torch.ones_like(ratio)
        # without the where, a banned token (logps = -inf) with advantage 0 would be 0 * inf
        policy, slope = torch.where(advantage == 0, zero, -bound * advantage * logps), -bound * advantage
        if rule.kind == "cispo":
            high = (ratio > rule.epsilon_high) & (sign > 0)
    elif rule.kind == "sapo":
        value, value_slope = soft_gate(ratio, sign, rule.sapo_temperature_pos, rule.sapo_temperature_neg)
        policy, slope = -value * advantage, -value_slope * advantage * ratio_slope
    else:
        delta = torch.inf if rule.delta is None else rule.delta
        value, value_slope = clipped_surrogate(ratio, advantage, 1.0 - rule.epsilon_low, 1.0 + rule.epsilon_high, delta)
        policy, slope = -value, -value_slope * ratio_slope
        free = ratio.clamp(max=delta)
        low, high = (free < 1.0 - rule.epsilon_low) & (sign < 0), (free > 1.0 + rule.epsilon_high) & (sign > 0)
    if importance_sampling_ratio is not None:
        correction = torch.where(importance_sampling_ratio.isnan(), 1.0, importance_sampling_ratio)
        correction = torch.where(mask, correction, zero)
        # a token that a factor of 0 leaves out may have no finite loss
        policy = torch.where(correction == 0, zero, policy * correction)
        slope = torch.where(correction == 0, zero, slope * correction)
    kl = zero
    if rule.beta != 0.0:
        assert ref_logps is not None
        log_ref_ratio, ref_slope = _difference(torch.where(mask, ref_logps, zero), logps)
        kl = k3(-log_ref_ratio.clamp(max=RATIO_LOG_MAX))
        kl_slope = torch.where(log_ref_ratio <= RATIO_LOG_MAX, -torch.expm1(log_ref_ratio) * ref_slope, zero)
        if rule.use_bias_correction_kl:
            kl, kl_slope = kl * ratio, kl_slope * ratio + kl * ratio_slope
        policy, slope = policy + rule.beta * kl, slope + rule.beta * kl_slope
    sums = torch.stack([(low & mask).sum(-1).to(kl.dtype), (high & mask).sum(-1).to(kl.dtype), kl.sum(-1)], -1)
    coefficient = torch.where(mask, slope * scale[:, None], zero)
    return torch.where(mask, policy, zero).sum(-1) * scale, sums, coefficient


def clipped_surrogate(
    ratio: Tensor, advantage: Tensor, lowest: float, highest: float, delta: float
) -> tuple[Tensor, Tensor]:
    """Return min(min(ratio, delta) * A, clip(ratio) * A) and its slope in the ratio.

    Ties follow torch: clamp passes the gradient at its bounds, min splits it evenly between equal arguments.
    """
    zero = torch.zeros_like(ratio)
    free, bound = ratio.clamp(max=delta) * advantage, ratio.clamp(lowest, highest) * advantage
    free_slope = torch.where(ratio <= delta, advantage, zero)
    bound_slope = torch.where((ratio >= lowest) & (ratio <= highest), advantage, zero)
    tie = 0.5 * free_slope + 0.5 * bound_slope
    slope = torch.where(free < bound, free_slope, torch.where(free > bound, bound_slope, tie))
    return torch.min(free, bound), slope


def soft_gate(ratio: Tensor, sign: Tensor, temperature_pos: float, temperature_neg: float) -> tuple[Tensor, Tensor]:
    """Return SAPO's gate 4 / tau * sigmoid(tau * (ratio - 1)) and its slope in the ratio; tau by the sign of A."""
    tau = torch.where(sign > 0, temperature_pos, temperature_neg).to(ratio.dtype)
    gate = torch.sigmoid(tau * (ratio - 1.0))
    return 4.0 / tau * gate, 4.0 * gate * (1.0 - gate)


def _difference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return (a - b, slope): 0 and slope 0 where both are -inf."""
    both_banned = (a == b) & a.isinf()
    zero = torch.zeros_like(a)
    return torch.where(both_banned, zero, a - b), torch.where(both_banned, zero, torch.ones_like(a))
