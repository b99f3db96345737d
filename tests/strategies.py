"""Random ragged batches: `make_batch` from a seed, and hypothesis strategies that choose its arguments.

Values come from a seeded torch generator (fast), shapes and styles from hypothesis (shrinkable). Masked cells, which
must never be read, hold NaN, and -100 or far too large token ids.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any

import oracles
import torch
from hypothesis import strategies as st
from torch import Tensor

from srpo import ConfigWarning, CreditConfig, LossConfig

MASK_STYLES = ("full", "ragged", "holes", "empty_rows", "all_masked")
ROLE_STYLES = ("spans", "mixed", "one_role_missing", "none")
CONTRAST_STYLES = ("plain", "special", "equal", "huge")
VOCABULARY_SIZES = (1, 2, 7, 33, 127, 128, 129, 130, 1000)

# Ratios at these values switch branches of the surrogate; random ratios keep a distance that fp32 cannot blur.
BRANCH_POINTS = (0.2, 0.8, 0.9, 1.1, 1.2, 1.28, 1.5, 2.0, 5.0)


@dataclass(frozen=True)
class Batch:
    """One padded batch; `logits` and `completion_ids` are None at the log-prob level. Floats are fp32 unless asked."""

    completion_mask: Tensor  # [B, T] int64
    role_ids: Tensor  # [B, T] int8
    advantages: Tensor  # [B]
    logps: Tensor  # [B, T]
    old_logps: Tensor  # [B, T]
    ref_logps: Tensor  # [B, T]
    corrupted_logps: Tensor  # [B, T]
    ablated_logps: Tensor  # [B, T]
    importance_sampling_ratio: Tensor  # [B, T]
    logits: Tensor | None = None  # [B, T, V]
    completion_ids: Tensor | None = None  # [B, T]

    @property
    def valid(self) -> Tensor:
        return self.completion_mask.bool()

    @property
    def in_credit_set(self) -> Tensor:
        return self.valid & (self.role_ids > 0)

    def map(self, function) -> Batch:
        """Apply a function to every tensor."""
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Batch(**{name: None if value is None else function(value) for name, value in tensors.items()})

    def to(self, device) -> Batch:
        return self.map(lambda tensor: tensor.to(device))

    def rows(self, index) -> Batch:
        return self.map(lambda tensor: tensor[index])

    def tokens(self, index) -> Batch:
        return self.map(lambda tensor: tensor if tensor.dim() == 1 else tensor[:, index])

    def replace(self, **changes: Any) -> Batch:
        return dataclasses.replace(self, **changes)

    def contrast_streams(self) -> dict[str, Tensor]:
        return {
            "corrupted_logps": self.corrupted_logps,
            "ablated_logps": self.ablated_logps,
            "role_ids": self.role_ids,
        }


def make_batch(
    seed: int,
    rows: int,
    tokens: int,
    *,
    vocabulary: int | None = None,
    mask_style: str = "ragged",
    role_style: str = "spans",
    contrast_style: str = "plain",
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Draw one batch. With `vocabulary`, the log-probs are those of the drawn logits (temperature 1)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    mask = draw_mask(generator, rows, tokens, mask_style)
    role_ids = draw_roles(generator, rows, tokens, role_style)
    logits = completion_ids = None
    if vocabulary is None:
        logps = -uniform(0.01, 6.0, rows, tokens)
    else:
        logits = (3.0 * normal(rows, tokens, vocabulary)).to(dtype)
        completion_ids = torch.randint(0, vocabulary, (rows, tokens), generator=generator)
        logps = oracles.log_probs(logits.double(), completion_ids, mask)
        logits[~mask] = torch.nan
        forbidden = torch.tensor([-100, vocabulary + 5])[torch.randint(0, 2, (rows, tokens), generator=generator)]
        completion_ids = torch.where(mask, completion_ids, forbidden)

    drift = uniform(-0.8, 0.8, rows, tokens)
    for point in BRANCH_POINTS:
        drift = torch.where((drift.exp() - point).abs() < 1e-3, 0.05, drift)
    old_logps = logps - drift
    ratio = uniform(0.3, 2.0, rows, tokens)
    ratio[torch.rand(rows, tokens, generator=generator) < 0.1] = torch.nan
    corrupted, ablated = draw_contrast_streams(generator, old_logps, contrast_style)
    advantages = normal(rows)
    advantages[torch.rand(rows, generator=generator) < 0.15] = 0.0

    def poisoned(values):
        return torch.where(mask, values, torch.nan).to(torch.float32 if dtype.itemsize < 4 else dtype)

    return Batch(
        completion_mask=mask.long(),
        role_ids=role_ids,
        advantages=advantages.to(torch.float32),
        logps=poisoned(logps),
        old_logps=poisoned(old_logps),
        ref_logps=poisoned(logps + uniform(-1.0, 1.0, rows, tokens)),
        corrupted_logps=poisoned(corrupted),
        ablated_logps=poisoned(ablated),
        importance_sampling_ratio=poisoned(ratio),
        logits=logits,
        completion_ids=completion_ids,
    )


def draw_mask(generator: torch.Generator, rows: int, tokens: int, style: str) -> Tensor:
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    if style == "all_masked":
        return ~mask
    if style in ("ragged", "empty_rows"):
        lengths = torch.randint(
            0 if style == "empty_rows" else min(1, tokens), tokens + 1, (rows,), generator=generator
        )
        mask = torch.arange(tokens)[None, :] < lengths[:, None]
    if style == "holes":
        mask = torch.rand(rows, tokens, generator=generator) < 0.7
    return mask


def draw_roles(generator: torch.Generator, rows: int, tokens: int, style: str) -> Tensor:
    roles = torch.randint(0, 3, (rows, tokens), generator=generator)
    if style == "spans":  # perception first, then reasoning, a tag token (role 0) here and there
        first_reasoning = torch.randint(0, tokens + 1, (rows, 1), generator=generator)
        roles = torch.where(torch.arange(tokens)[None, :] < first_reasoning, 1, 2)
        roles[torch.rand(rows, tokens, generator=generator) < 0.15] = 0
    elif style == "one_role_missing":
        missing = torch.randint(1, 3, (rows, 1), generator=generator)
        roles = torch.where(roles == missing, 0, roles)
    elif style == "none":
        roles = torch.zeros_like(roles)
    return roles.to(torch.int8)


def draw_contrast_streams(generator: torch.Generator, base: Tensor, style: str) -> tuple[Tensor, Tensor]:
    """Corrupted and ablated log-probs around `base`, with the odd cells that the method's section 6 names."""
    scale = 1e4 if style == "huge" else 1.0
    streams = []
    for _ in range(2):
        stream = base - scale * torch.randn(base.shape, generator=generator, dtype=torch.float64)
        if style == "special":
            draw = torch.rand(base.shape, generator=generator)
            stream = torch.where(draw < 0.2, -torch.inf, stream)
            stream = torch.where(draw > 0.9, torch.nan, stream)
        elif style == "equal":
            stream = base.clone()
        # eight read cells that are all above 0 are refused as probabilities, so there are fewer in a stream
        above = (stream > 0).flatten()
        flipped = (above & (above.cumsum(0) > 7)).view_as(stream)
        streams.append(torch.where(flipped, -stream, stream))
    return streams[0], streams[1]


@st.composite
def batches(
    draw, *, max_rows=4, max_tokens=9, min_rows=0, min_tokens=0, vocabularies=None, contrast_styles=CONTRAST_STYLES
):
    """Ragged batches at the log-prob level, or with logits when `vocabularies` lists sizes to choose from."""
    return make_batch(
        seed=draw(st.integers(0, 2**32 - 1)),
        rows=draw(st.integers(min_rows, max_rows)),
        tokens=draw(st.integers(min_tokens, max_tokens)),
        vocabulary=None if vocabularies is None else draw(st.sampled_from(vocabularies)),
        mask_style=draw(st.sampled_from(MASK_STYLES)),
        role_style=draw(st.sampled_from(ROLE_STYLES)),
        contrast_style=draw(st.sampled_from(contrast_styles)),
    )


@st.composite
def credit_configs(draw, **fixed):
    """Every combination of the credit settings; `fixed` pins some."""
    minimum, maximum = draw(st.sampled_from([(0.8, 1.2), (0.5, 2.0), (0.25, 4.0), (1.0, 1.2), (0.9, 1.0)]))
    settings = {
        "contrast_kind": draw(st.sampled_from(["logratio", "abs", "k3"])),
        "reasoning_signal": draw(st.sampled_from(["perception_ablation", "image_independence"])),
        "baseline": draw(st.sampled_from(["mean", "role_mean", "none"])),
        "tau": draw(st.sampled_from([0.5, 1.0, 3.0])),
        "weight_min": minimum,
        "weight_max": maximum,
        "direction": draw(st.sampled_from(["evidence", "advantage"])),
        "normalize": draw(st.sampled_from(["mean", "none", "solve"])),
        "strength": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "missing_role": draw(st.sampled_from(["uniform", "within"])),
    }
    return make_credit(**{**settings, **fixed})


def make_credit(**settings) -> CreditConfig:
    """Build a config without the warning about wide signed bounds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConfigWarning)
        return CreditConfig(**settings)


@st.composite
def loss_configs(draw, **fixed):
    """Every combination of the loss settings; `fixed` pins some."""
    settings = {
        "loss_type": draw(st.sampled_from(["dapo", "grpo", "bnpo", "dr_grpo", "cispo"])),
        "epsilon_low": draw(st.sampled_from([0.1, 0.2])),
        "epsilon_high": draw(st.sampled_from([0.2, 0.28])),
        "delta": draw(st.sampled_from([None, 1.5, 2.0])),
        "beta": draw(st.sampled_from([0.0, 0.04])),
        "importance_sampling_level": draw(st.sampled_from(["token", "sequence_token"])),
        "max_completion_length": 11,
    }
    settings.update(fixed)
    if settings["loss_type"] == "cispo":
        settings.setdefault("delta", None)
        settings["delta"] = None
        settings["epsilon_high"] = draw(st.sampled_from([1.1, 2.0]))
    return LossConfig(**settings)
