"""Slow, obvious oracles of the neighbouring methods (section 5 of the method), token by token, in plain floats.

Conventions of `oracles.py`: inputs are padded tensors or lists of lists, [B, T] or [B]; what a masked cell holds is
never read; results are float64 tensors, token weights are 0 where masked. A token's position `t` counts the valid
tokens of its response from 0 and `T` is their number, so holes in the mask move nothing.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from oracles import sign_of
from torch import Tensor


def listed(values) -> list:
    """Nested lists of Python numbers."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.double() if values.is_floating_point() else values).tolist()
    return list(values)


def valid_tokens(mask) -> list[list[int]]:
    """The columns of the valid tokens of each row."""
    return [[t for t, valid in enumerate(row) if valid] for row in listed(mask)]


def padded(rows: list[dict[int, float]], mask) -> Tensor:
    """Values by column of each row, 0 elsewhere."""
    out = torch.zeros(torch.as_tensor(mask).shape, dtype=torch.float64)
    for i, row in enumerate(rows):
        for t, value in row.items():
            out[i, t] = value
    return out


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def clip(value: float, low: float, high: float) -> float:
    return min(high, max(low, value))


def part(count: int, share: float) -> Fraction:
    """`share * count` in decimal arithmetic: 0.3 * 50 is 15 exactly, which fp32 rounds up to 15.000001."""
    return Fraction(str(share)) * count


def min_max(values: list[float]) -> list[float]:
    """To [0, 1]; all 0 when the values are equal (as with the released codes' epsilon in the denominator)."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def difference(clean: float, corrupted: float) -> float:
    """`d`, clamped to +-20; no value at all counts as 0 (section 6)."""
    value = clean - corrupted
    return 0.0 if math.isnan(value) else clip(value, -20.0, 20.0)


def k3(d: float) -> float:
    # As the method writes it: with expm1 the golden tie of VPPO (d = -0.1 twice, up to rounding) is no tie.
    return math.exp(-d) + d - 1.0


def rlsd_strength(step: int, initial: float = 0.5, steps: int = 50) -> float:
    """Lambda at a step counted from 0."""
    return initial * max(0.0, 1.0 - step / steps)


def rlsd_weights(
    teacher_logps, student_logps, advantages, mask, *, strength=0.5, weight_min=0.8, weight_max=1.2
) -> Tensor:
    """All valid tokens; `advantages` are [B] or [B, T]. Where A is 0 the weight is 1."""
    teacher, student, advantages = listed(teacher_logps), listed(student_logps), listed(advantages)
    rows = []
    for i, tokens in enumerate(valid_tokens(mask)):
        row = {}
        for t in tokens:
            advantage = advantages[i][t] if isinstance(advantages[i], list) else advantages[i]
            weight = math.exp(sign_of(advantage) * difference(teacher[i][t], student[i][t]))
            row[t] = 1.0 - strength + strength * clip(weight, weight_min, weight_max)
        rows.append(row)
    return padded(rows, mask)


def papo_term(
    logps,
    corrupted_logps,
    mask,
    *,
    gamma=0.01,
    entropy_coef=0.0,
    corrupted_entropy_coef=0.0,
    num_items_in_batch: float | None = None,
) -> float:
    """What PAPO adds to the loss: every mean is over the valid tokens of the batch (0 when there is none).

    The released code averages the k3 term like the policy loss (token level by default), both entropies over tokens.
    """
    logps, corrupted = listed(logps), listed(corrupted_logps)
    terms = []
    for i, tokens in enumerate(valid_tokens(mask)):
        for t in tokens:
            term = -gamma * clip(k3(difference(logps[i][t], corrupted[i][t])), -10.0, 10.0)
            if entropy_coef:
                term += entropy_coef * -logps[i][t]
            if corrupted_entropy_coef:
                term += corrupted_entropy_coef * -corrupted[i][t]
            terms.append(term)
    return math.fsum(terms) / max(float(len(terms) if num_items_in_batch is None else num_items_in_batch), 1.0)


def vppo_scores(clean_logps, corrupted_logps, mask) -> list[list[float]]:
    """`s` of the valid tokens of each row."""
    clean, corrupted = listed(clean_logps), listed(corrupted_logps)
    return [
        [clip(k3(difference(clean[i][t], corrupted[i][t])), 0.0, 10.0) for t in tokens]
        for i, tokens in enumerate(valid_tokens(mask))
    ]


def vppo_token_mask(clean_logps, corrupted_logps, mask, *, keep=0.4) -> Tensor:
    """1 on the ceil(keep * T) largest scores of each response, the earlier token first among equals."""
    rows = []
    for tokens, scores in zip(valid_tokens(mask), vppo_scores(clean_logps, corrupted_logps, mask), strict=True):
        order = sorted(range(len(tokens)), key=lambda k: (-scores[k], k))
        rows.append({tokens[k]: 1.0 for k in order[: math.ceil(part(len(tokens), keep))]})
    return padded(rows, mask)


def vppo_trajectory_factors(clean_logps, corrupted_logps, mask, *, low=0.9) -> Tensor:
    """One factor per row. A row without a valid token has factor 1 and takes part in nothing (released code)."""
    scores = vppo_scores(clean_logps, corrupted_logps, mask)
    means = {i: mean(row) for i, row in enumerate(scores) if row}
    factors = [1.0] * len(scores)
    if len(means) >= 2 and max(means.values()) - min(means.values()) > 1e-6:
        normalised = min_max(list(means.values()))
        high = low + (1.0 - low) / (mean(normalised) + 1e-8)
        for i, n in zip(means, normalised, strict=True):
            factors[i] = low + n * (high - low)
    return torch.tensor(factors, dtype=torch.float64)


def vppo_weights(clean_logps, corrupted_logps, mask, *, keep=0.4, low=0.9) -> Tensor:
    """Trajectory factor times token mask."""
    kept = vppo_token_mask(clean_logps, corrupted_logps, mask, keep=keep)
    factors = vppo_trajectory_factors(clean_logps, corrupted_logps, mask, low=low)
    return kept * factors[:, None]


def visual_similarity(hidden_states, image_mask, completion_mask) -> Tensor:
    """Cosine of each completion token's own last hidden state with the mean one of the image tokens of its row.

    `hidden_states` [B, L, D] and `image_mask` [B, L] cover prompt and completion, the completion being the last T
    columns. 0 for a row without an image token (as in the released code) or for a zero vector.
    """
    hidden, rows = listed(hidden_states), []
    for i, (image, tokens) in enumerate(zip(valid_tokens(image_mask), valid_tokens(completion_mask), strict=True)):
        start = len(hidden[i]) - len(listed(completion_mask)[i])
        row = {}
        for t in tokens:
            row[t] = 0.0
            if image:
                state = hidden[i][start + t]
                prototype = [mean([hidden[i][column][k] for column in image]) for k in range(len(state))]
                lengths = math.hypot(*state) * math.hypot(*prototype)
                if lengths > 0.0:
                    row[t] = math.fsum(a * b for a, b in zip(state, prototype, strict=True)) / lengths
        rows.append(row)
    return padded(rows, completion_mask)


def vgpo_scores(similarity, mask, *, offset_over="batch") -> list[list[float]]:
    """Cosines minus min(0, smallest cosine), of the valid tokens of each row.

    The method does not say over what the smallest is taken. "batch": every valid token, what the released min-max over
    the micro-batch amounts to. "response": the row alone.
    """
    cosines = [[row[t] for t in tokens] for row, tokens in zip(listed(similarity), valid_tokens(mask), strict=True)]
    smallest = min((value for row in cosines for value in row), default=0.0)
    return [[value - min(0.0, smallest if offset_over == "batch" else min(row)) for value in row] for row in cosines]


def vgpo_compensated(scores: list[float], *, strength=0.3, top=0.2) -> list[float]:
    """Visual attention compensation of one response.

    Roundings of the released code: the last half starts at floor(T / 2), so the middle token of an odd T belongs to it;
    the gate opens for the max(1, floor(top * n)) largest of the n tokens of that half, and for those equal to the last.
    """
    start = len(scores) // 2
    tail = sorted(scores[start:], reverse=True)
    if not tail:
        return []
    threshold = tail[max(1, math.floor(part(len(tail), top))) - 1]
    return [
        score * (1.0 + strength * t / (len(scores) - 1)) if t >= max(start, 1) and score >= threshold else score
        for t, score in enumerate(scores)
    ]


def vgpo_focus(similarity, mask, *, offset_over="batch") -> list[list[float]]:
    """`what`: compensated scores, min-max per response."""
    return [min_max(vgpo_compensated(row)) for row in vgpo_scores(similarity, mask, offset_over=offset_over)]


def vgpo_token_factors(similarity, mask, *, offset_over="batch") -> Tensor:
    """`f_it`, 0 where masked."""
    rows = []
    for tokens, focus in zip(valid_tokens(mask), vgpo_focus(similarity, mask, offset_over=offset_over), strict=True):
        rows.append({t: clip(1.0 + w - mean(focus), 0.1, 2.0) for t, w in zip(tokens, focus, strict=True)})
    return padded(rows, mask)


def vgpo_trajectory_factors(similarity, mask, groups, *, offset_over="batch") -> Tensor:
    """`g_i`: rows of one prompt share a group id, wherever they stand. A group of one has factor 1.

    A row without a valid token accumulates 0 and counts in its group, as in the released code.
    """
    totals = [math.fsum(focus) for focus in vgpo_focus(similarity, mask, offset_over=offset_over)]
    members: dict = {}
    for i, group in enumerate(listed(groups)):
        members.setdefault(group, []).append(i)
    factors = [1.0] * len(totals)
    for rows in members.values():
        normalised = min_max([totals[i] for i in rows])
        for i, value in zip(rows, normalised, strict=True):
            factors[i] = clip(1.0 + value - mean(normalised), 0.9, 2.0)
    return torch.tensor(factors, dtype=torch.float64)


def vgpo_weights(similarity, mask, groups, *, offset_over="batch") -> Tensor:
    """`g_i * f_it`."""
    trajectories = vgpo_trajectory_factors(similarity, mask, groups, offset_over=offset_over)
    return trajectories[:, None] * vgpo_token_factors(similarity, mask, offset_over=offset_over)


def pgpo_weights(clean_logps, corrupted_logps, mask, *, threshold=0.4, boost=2.0, k3_max=math.inf) -> Tensor:
    """Weights that sum to T over each response; ones when every raw weight is 0.

    `k3_max`: the method clips k3 for VPPO and PAPO and names no bound here.
    """
    clean, corrupted = listed(clean_logps), listed(corrupted_logps)
    rows = []
    for i, tokens in enumerate(valid_tokens(mask)):
        dependency = [min(k3_max, max(0.0, k3(difference(clean[i][t], corrupted[i][t])))) for t in tokens]
        raw = [
            score / threshold if score < threshold else 1.0 + boost * (score - threshold) / (1.0 - threshold)
            for score in min_max([math.log1p(value) for value in dependency])
        ]
        total = math.fsum(raw)
        rows.append(
            {t: weight * len(tokens) / total if total > 0.0 else 1.0 for t, weight in zip(tokens, raw, strict=True)}
        )
    return padded(rows, mask)


def tor_weights(
    clean_logps, corrupted_logps, entropies, mask, *, share=0.3, reasoning_weight=1.0, perception_weight=0.5
) -> Tensor:
    """Reasoning tokens first, then perception tokens, 0 elsewhere."""
    clean, corrupted, entropies = listed(clean_logps), listed(corrupted_logps), listed(entropies)
    cells = [(i, t) for i, tokens in enumerate(valid_tokens(mask)) for t in tokens]
    reasoning = top_cells({(i, t): entropies[i][t] for i, t in cells}, share)
    perception = top_cells({(i, t): abs(difference(clean[i][t], corrupted[i][t])) for i, t in cells}, share)
    rows: list[dict[int, float]] = [{} for _ in listed(mask)]
    for i, t in cells:
        if (i, t) in reasoning:
            rows[i][t] = reasoning_weight
        elif (i, t) in perception:
            rows[i][t] = perception_weight
    return padded(rows, mask)


def top_cells(values: dict[tuple[int, int], float], share: float) -> set[tuple[int, int]]:
    """The cells at or above the k-th largest value of the batch, k = ceil(share * count): ties are kept."""
    if not values:
        return set()
    threshold = sorted(values.values(), reverse=True)[math.ceil(part(len(values), share)) - 1]
    return {cell for cell, value in values.items() if value >= threshold}
