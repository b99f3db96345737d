"""Sums and counts of one loss call, and the named scalars they turn into.

Sums of several micro-batches or ranks add up: `total = a + b`, or all-reduce `sums`. No scalar is formed, and nothing
waits for the device, until a name is looked up.
"""

import functools
import math
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from srpo.credit import Credit
from srpo.errors import ConfigWarning
from srpo_kernels.layout import Layout
from srpo_kernels.reference import AT_LOWER_BOUND, AT_UPPER_BOUND, NO_VALUE

_ROLES = ("perception", "reasoning")
_SIGNS = ("negative", "zero", "positive")
_CELL_SUMS = ("n", "valued", "contrast", "contrast_squared", "clipped", "weight", "weight_squared")
_CELLS = [f"{role}/{sign}" for role in _ROLES for sign in _SIGNS]
_LOSS_KEYS = ("tokens", "sequences", "clip_low", "clip_high", "kl", "entropy", "zero_advantage", "rows", "far_ratios")
FAR_RATIO = 2.0  # a ratio beyond [1 / FAR_RATIO, FAR_RATIO] is no policy that a few updates away from the old one
_MOST_FAR_RATIOS = 1 / 3
_CELL_KEYS = tuple(f"{cell}/{name}" for cell in _CELLS for name in _CELL_SUMS)
_CREDIT_KEYS = ("baseline", "weighted_sequences", "no_value", "not_scored", "infinite", *_CELL_KEYS)


class MetricSums(Mapping[str, Tensor]):
    """Hold detached sums and counts, and read like a mapping from metric names to 0-d tensors.

    Names are TRL's where TRL has the metric (`entropy`, `kl`, `clip_ratio/low_mean`, `clip_ratio/high_mean`,
    `clip_ratio/region_mean`, `cispo_clip_ratio`); the others start with `srpo/`. A `srpo/` mean over nothing is NaN.

    Args:
        sums: `[K]` float64, detached.
        groups: which metrics the sums can form: of `"clip"`, `"cispo"`, `"ratio"`, `"kl"`, `"entropy"`, `"rows"`,
            `"credit"`.
    """

    def __init__(self, sums: Tensor, groups: frozenset[str]) -> None:
        self.sums = sums
        self.groups = groups

    def __add__(self, other: "MetricSums") -> "MetricSums":
        if self.groups != other.groups:
            return NotImplemented
        return MetricSums(self.sums + other.sums, self.groups)

    def __getitem__(self, name: str) -> Tensor:
        return self._scalars()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scalars())

    def __len__(self) -> int:
        return len(self._scalars())

    def floats(self) -> dict[str, float]:
        """Return every metric as a Python float; the one call here that waits for the device.

        Warns: ConfigWarning, once each, where the credit read cells that nobody had scored, and where more than a third
            of the ratios to the old policy lie beyond [0.5, 2].
        """
        named = self._scalars()
        values = dict(zip(named, torch.stack(list(named.values())).tolist(), strict=True))
        if values.get("srpo/cells_not_scored", 0.0) > 0.0:
            _warn_not_scored()
        if values.get("srpo/far_ratio_fraction", 0.0) > _MOST_FAR_RATIOS:
            _warn_far_ratios()
        return values

    def _scalars(self) -> dict[str, Tensor]:
        s = dict(zip((*_LOSS_KEYS, *_CREDIT_KEYS), self.sums.unbind(), strict=False))
        tokens = s["tokens"].clamp(min=1)
        named = {}
        if "clip" in self.groups:
            named["clip_ratio/low_mean"] = s["clip_low"] / tokens
            named["clip_ratio/high_mean"] = s["clip_high"] / tokens
            named["clip_ratio/region_mean"] = (s["clip_low"] + s["clip_high"]) / tokens
        if "cispo" in self.groups:
            named["cispo_clip_ratio"] = s["clip_high"] / tokens
        if "ratio" in self.groups:
            named["srpo/far_ratio_fraction"] = s["far_ratios"] / tokens
        if "kl" in self.groups:
            named["kl"] = s["kl"] / tokens
        if "entropy" in self.groups:  # over the tokens whose distribution was computed
            named["entropy"] = s["entropy"] / s["rows"].clamp(min=1)
        if "rows" in self.groups:
            named["srpo/rows_scored"] = s["rows"]
            named["srpo/rows_skipped"] = s["tokens"] - s["rows"]
        named["srpo/zero_advantage_fraction"] = s["zero_advantage"] / s["sequences"].clamp(min=1)
        if "credit" in self.groups:
            named.update(_credit_scalars(s))
        return named


def _credit_scalars(s: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {
        "srpo/baseline": s["baseline"] / s["weighted_sequences"],
        "srpo/uniform_fraction": 1.0 - s["weighted_sequences"] / s["sequences"].clamp(min=1),
        "srpo/contrasts_without_value": s["no_value"],
        "srpo/cells_not_scored": s["not_scored"],
        "srpo/infinite_divergences": s["infinite"],
    }
    for role in _ROLES:
        total = {k: sum((s[f"{role}/{sign}/{k}"] for sign in _SIGNS), s["tokens"] * 0) for k in _CELL_SUMS}
        named[f"srpo/{role}/length"] = total["n"] / s["sequences"].clamp(min=1)
        named[f"srpo/{role}/weight_mean"] = total["weight"] / total["n"]
        named[f"srpo/{role}/evidence_fraction"] = total["valued"] / total["n"]
        for sign in ("positive", "negative"):
            cell = {k: s[f"{role}/{sign}/{k}"] for k in _CELL_SUMS}
            mean = cell["contrast"] / cell["valued"]
            named[f"srpo/{role}/{sign}/contrast_mean"] = mean
            named[f"srpo/{role}/{sign}/contrast_std"] = (
                (cell["contrast_squared"] / cell["valued"] - mean * mean).clamp(min=0).sqrt()
            )
            named[f"srpo/{role}/{sign}/weight_mean"] = cell["weight"] / cell["n"]
            named[f"srpo/{role}/{sign}/clip_fraction"] = cell["clipped"] / cell["n"]
    over_cells = {k: sum((s[f"{cell}/{k}"] for cell in _CELLS), s["tokens"] * 0) for k in _CELL_SUMS}
    effective = over_cells["weight"].square() / over_cells["weight_squared"]
    named["srpo/effective_sample_size"] = effective / over_cells["n"]
    return named


def loss_sums(
    mask: Tensor,
    rows: Tensor,
    advantages: Tensor,
    clip_and_kl: Tensor,
    entropy: Tensor | None,
    layout: Layout,
    log_ratio: Tensor | None = None,
) -> Tensor:
    """Return the sums of the loss stage, in the order of `_LOSS_KEYS`.

    Args:
        mask, rows, advantages, entropy: per token; `rows` are the tokens whose log-probs were computed.
        clip_and_kl: `[R, 3]` as `srpo_kernels.ops.policy_loss` returns them.
        log_ratio: per token, of the current to the old policy; None where there is no old one.
    """
    counts = layout.token_counts(mask)
    sequences = (counts > 0).sum()
    informative = (layout.token_counts(mask & (advantages != 0)) > 0).sum()
    entropies = counts.new_zeros(()) if entropy is None else entropy.double().sum()
    low, high, kl = clip_and_kl.double().sum(0).unbind()
    far = counts.new_zeros(()) if log_ratio is None else (mask & (log_ratio.abs() > math.log(FAR_RATIO))).sum()
    totals = (mask.sum(), sequences, low, high, kl, entropies, sequences - informative, rows.sum(), far)
    return torch.stack([x.double() for x in totals]).detach()


def credit_sums(credit: Credit, role_ids: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
    """Return the sums of the credit stage, in the order of `_CREDIT_KEYS`. float64, so squares do not cancel.

    A role without evidence in its trajectory (no picture, no perception) has contrasts that are NaN: they count in the
    length and the weights of the role, not in its contrasts.
    """
    cells = torch.stack(
        [mask & (role_ids == role) & (advantages.sign() == s) for role in (1, 2) for s in (-1, 0, 1)]
    ).flatten(1)
    valued = ~credit.contrast.isnan().flatten()
    c = torch.where(valued, credit.contrast.double().flatten(), 0.0)
    w = credit.weights.double().flatten()
    clipped = ((credit.flags & (AT_LOWER_BOUND | AT_UPPER_BOUND)) != 0).double().flatten()
    features = torch.stack([torch.ones_like(c), valued.double(), c, c * c, clipped, w, w * w], -1)
    has_baseline = ~credit.baseline.isnan()
    head = (
        torch.where(has_baseline, credit.baseline, 0.0).double().sum(),
        has_baseline.sum().double(),
        ((credit.flags & NO_VALUE) != 0).sum().double(),
        credit.not_scored.double(),
        credit.infinite.double(),
    )
    return torch.cat([torch.stack(head), (cells.double() @ features).flatten()]).detach()


@functools.cache
def _warn_not_scored() -> None:
    message = (
        "srpo: the credit read cells of a contrast stream that nobody had scored; they count as no value. Likely "
        "causes: streams scored for another credit (pass the same credit= to score_streams), for other role_ids or "
        "another mask, or rows that were permuted in between. srpo/cells_not_scored counts them (said once)."
    )
    warnings.warn(message, ConfigWarning, stacklevel=3)


@functools.cache
def _warn_far_ratios() -> None:
    message = (
        "srpo: more than a third of the ratios to old_logps lie beyond [0.5, 2]. Likely causes: logits shifted "
        "by one ([B, T, V] of logits_to_keep=T, whose first row predicts the second token: pass logits_to_keep=T + 1), "
        "another temperature than the old log-probs have (LossConfig.temperature), old log-probs of another engine or "
        "precision, or another padding. srpo/far_ratio_fraction is the share (said once)."
    )
    warnings.warn(message, ConfigWarning, stacklevel=3)
