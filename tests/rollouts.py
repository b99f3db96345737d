"""Rollouts of small models, what a model says of them by itself, and comparisons: the harness of the scoring tests."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from tiny_vlms import IMAGE_BLOCKS, picture
from torch import Tensor, nn

from srpo.vision.corruption import PixelLayout
from srpo.vision.scoring import StreamLogps, score_streams

T = 9
LENGTHS = (9, 7, 6)
# Two spans of perception in each row, next to reasoning and apart from it, at token 0, and on padding.
ROLES = [[0, 1, 1, 0, 2, 2, 1, 2, 2], [1, 0, 2, 1, 1, 2, 2, 1, 2], [0, 1, 0, 1, 2, 2, 1, 1, 2]]
SEED = 5
EXACT = {"rtol": 0, "atol": 1e-5}
TEXT = {
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Rollout:
    """Left-padded prompts with ragged completions; text and pictures of each row, to process it alone."""

    model: Any
    ids: Tensor
    mask: Tensor
    roles: Tensor
    inputs: dict[str, Any]
    processor: Any = None
    family: str = ""
    texts: tuple[str, ...] = ()
    pictures: tuple[tuple[Any, ...], ...] = ()

    @property
    def valid(self) -> Tensor:
        return self.mask[:, -T:].bool()

    @property
    def seen(self) -> Tensor:
        return self.valid & (self.roles == 1)

    @property
    def visual(self) -> Tensor:
        """Perception tokens of rows with a picture."""
        if not self.pictures:
            return torch.zeros_like(self.seen)
        return self.seen & torch.tensor([[bool(row)] for row in self.pictures])

    @property
    def reasoned(self) -> Tensor:
        return self.valid & (self.roles == 2) & self.seen.any(dim=1, keepdim=True)

    def score(self, **changes: Any) -> StreamLogps:
        arguments = {"role_ids": self.roles, "generator": SEED, **self.inputs, **changes}
        return score_streams(self.model, self.ids, self.mask, T, **arguments)


def draw_completions(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(20, 50, (rows, T), generator=generator)
    mask = (torch.arange(T) < torch.tensor(LENGTHS)[:rows, None]).long()
    return ids * mask, mask


def processed(family: str, processor: Any, texts: Any, pictures: Any) -> dict[str, Any]:
    flat = [image for row in pictures for image in row]
    images = [list(row) for row in pictures] if family == "idefics3" else flat
    return dict(processor(text=list(texts), images=images if flat else None, padding=True, return_tensors="pt"))


def make_rollout(family: str, vlm: tuple[Any, Any], images: tuple[int, ...] = (2, 0, 1)) -> Rollout:
    """Rows with so many images each; those of Qwen differ in size."""
    model, processor = vlm
    widths = (32, 24, 16) if "qwen" in family else (32,)
    flat = [picture(3 + n % 4, (widths[n % len(widths)], 32), seed=n) for n in range(sum(images))]
    pictures = tuple(tuple(flat[sum(images[:row]) :][:count]) for row, count in enumerate(images))
    blocks = ["".join(IMAGE_BLOCKS[family] + "abc"[j] for j in range(count)) for count in images]
    texts = tuple(f"<|user|>{x}{'how many?'[: 4 + 2 * row]}<|assistant|>" for row, x in enumerate(blocks))
    prompts = processed(family, processor, texts, pictures)
    ids, mask = draw_completions(len(images))
    if "mm_token_type_ids" in prompts:
        prompts["mm_token_type_ids"] = nn.functional.pad(prompts["mm_token_type_ids"], (0, T))
    return Rollout(
        model,
        torch.cat([prompts.pop("input_ids"), ids], dim=1),
        torch.cat([prompts.pop("attention_mask"), mask], dim=1),
        torch.tensor(ROLES)[: len(images)],
        prompts,
        processor,
        family,
        texts,
        pictures,
    )


def repeated(one: Rollout, index: tuple[int, ...]) -> Rollout:
    """Repeat the prompts of a rollout in an order, each time with a completion of its own."""
    texts, pictures = ([x[i] for i in index] if x else [] for x in (one.texts, one.pictures))
    made = replace(one, texts=tuple(texts), pictures=tuple(pictures))
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(20, 50, (len(index), T), generator=generator)
    lengths = torch.randint(4, T + 1, (len(index),), generator=generator)
    mask = (torch.arange(T) < lengths[:, None]).long()
    roles = torch.randint(0, 3, (len(index), T), generator=generator)
    roles[1] = 2  # no perception
    inputs = dict(one.inputs)
    if one.pictures:
        inputs = processed(one.family, one.processor, texts, pictures)
        prompt, prompt_mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = nn.functional.pad(inputs["mm_token_type_ids"], (0, T))
    else:
        prompt, prompt_mask = (x[list(index), :-T] for x in (one.ids, one.mask))
    return replace(
        made, ids=torch.cat([prompt, ids * mask], 1), mask=torch.cat([prompt_mask, mask], 1), roles=roles, inputs=inputs
    )


def text_rollout(model: Any) -> Rollout:
    ids, mask = draw_completions(3)
    prompt = torch.randint(4, 50, (3, 6), generator=torch.Generator().manual_seed(2))
    padding = (torch.arange(6) >= torch.tensor([3, 1, 0])[:, None]).long()
    return Rollout(model, torch.cat([prompt * padding, ids], 1), torch.cat([padding, mask], 1), torch.tensor(ROLES), {})


def build_text(name: str, **settings: Any) -> Any:
    config_class, model_class = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config_class(**TEXT | settings)).eval()


# Oracles


@torch.no_grad()
def own_logits(model: Any, ids: Tensor, mask: Tensor, **inputs: Any) -> Tensor:
    """The model's logits of the completion, fp32."""
    return model(input_ids=ids, attention_mask=mask, **inputs).logits[:, -T - 1 : -1].float()


def own_logps(model: Any, ids: Tensor, mask: Tensor, temperature: float = 1.0, **inputs: Any) -> Tensor:
    logits = own_logits(model, ids, mask, **inputs) / temperature
    return logits.log_softmax(dim=-1).gather(-1, ids[:, -T:, None])[..., 0]


@contextlib.contextmanager
def recorded_positions(model: Any):
    """The positions `[..., B, S]` that each forward gives the rotary embedding of the language model."""
    (rotary,) = (m for name, m in model.named_modules() if name.endswith("rotary_emb") and "visual" not in name)
    found: list[Tensor] = []

    def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    with rotary.register_forward_pre_hook(record, with_kwargs=True):
        yield found


def own_positions(rollout: Rollout) -> Tensor | None:
    """The positions that the model gives the whole batch; None for a model without."""
    if rollout.model.config.model_type == "opt":
        return rollout.mask.cumsum(dim=1) - 1
    if not any("rotary_emb" in name for name, _ in rollout.model.named_modules()):
        return None
    with recorded_positions(rollout.model) as found:
        own_logits(rollout.model, rollout.ids, rollout.mask, **rollout.inputs)
    return found[0].expand(*found[0].shape[:-2], *rollout.ids.shape)


def deleted_logits(rollout: Rollout) -> Tensor:
    """Run each row alone and unpadded, without the tokens of perception: `[B, T, V]`, NaN where a token is gone."""
    positions = own_positions(rollout)
    kept = rollout.mask.bool().clone()
    kept[:, -T:] &= ~rollout.seen
    rows = []
    for row, keep in enumerate(kept):
        columns = keep.nonzero()[:, 0]
        inputs = row_inputs(rollout, row, len(columns))
        if positions is not None:
            inputs["position_ids"] = positions[..., row : row + 1, columns]
        ids = rollout.ids[row : row + 1, columns]
        with torch.no_grad():
            logits = rollout.model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits.float()
        in_completion = columns >= rollout.ids.shape[1] - T
        out = logits.new_full((T, logits.shape[-1]), math.nan)
        out[columns[in_completion] - rollout.ids.shape[1] + T] = logits[0, :-1][in_completion[1:]]
        rows.append(out)
    return torch.stack(rows)


def deleted_logps(rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """Score each row alone and unpadded, without the tokens of perception; NaN where a token is gone."""
    logps = (deleted_logits(rollout) / temperature).log_softmax(dim=-1)
    return logps.gather(-1, rollout.ids[:, -T:, None])[..., 0]


def row_inputs(rollout: Rollout, row: int, length: int) -> dict[str, Any]:
    """What the processor makes of the pictures of one row."""
    if not rollout.pictures or not rollout.pictures[row]:
        return {}
    texts, pictures = rollout.texts[row : row + 1], rollout.pictures[row : row + 1]
    inputs = processed(rollout.family, rollout.processor, texts, pictures)
    if "mm_token_type_ids" in inputs:
        gap = length - inputs["mm_token_type_ids"].shape[1]
        inputs["mm_token_type_ids"] = nn.functional.pad(inputs["mm_token_type_ids"], (0, gap))
    return {name: x for name, x in inputs.items() if name not in ("input_ids", "attention_mask")}


def corrupted_inputs(rollout: Rollout, corruption: Any) -> dict[str, Any]:
    return corruption.on_inputs(rollout.inputs, PixelLayout.of_model(rollout.model), generator=SEED)


def assert_close(got: Tensor, expected: Tensor, where: Tensor, **tolerance: float) -> None:
    assert where.any()
    torch.testing.assert_close(got[where].float(), expected[where].float(), equal_nan=True, **tolerance or EXACT)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Compare fp32, NaNs of each kind included."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def largest(a: Tensor, b: Tensor, where: Tensor) -> float:
    return float((a - b).abs()[where].max())
