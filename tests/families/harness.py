"""Families of vision-language models, built small, and what each model says of a rollout by itself.

A family is a function that builds a model and its processor, in one of the tables beside this file:

    @family("<image>", images=(2, 0, 1))
    def llava(): ...

The oracles call nothing of srpo: the model is run on each sequence alone and unpadded, without the tokens of perception
for the ablated context, and on the whole batch with pictures corrupted before the processor for the corrupted one.
"""

from __future__ import annotations

import inspect
import math
import random
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from srpo import PatchMask, StreamLogps, corrupt_images, score_streams

T = 9
LENGTHS = (9, 7, 8)
# Perception beside reasoning and apart from it, at the first token, and on padding.
ROLES = [[0, 1, 1, 1, 0, 2, 2, 2, 0], [1, 1, 2, 2, 2, 1, 2, 2, 0], [1, 0, 1, 1, 2, 2, 2, 2, 2]]
CHARACTERS = string.digits + string.ascii_letters + " ?.:,=+-<>/\n"
SPECIAL = ["<pad>", "<eos>", "<unk>", "<bos>", "<|user|>", "<|assistant|>", "<|system|>"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER = VISION | {"image_size": 32, "patch_size": 8}
TEXT = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Family:
    """How a family is built, and the rollout that it is checked on.

    Args:
        build: returns the model, and its processor or what is called like one.
        block: what a prompt writes for one picture.
        images, sizes: pictures of each sequence, and their (width, height), in turn.
        nested: the processor takes a list of pictures for each text, else one of all.
        completion: what inputs with an entry per token have on the completion; None: what the last token has.
        ragged: prompts differ in length; a model whose own logits depend on padding is checked on equal ones.
        state: a layer keeps a state that no mask reaches.
        batch_positions: positions depend on the other sequences of a batch, so the oracles are given those.
        first_position: of a sequence, where no rotary embedding shows positions.
        scale: standard deviation of the weights.
    """

    build: Callable[[], tuple[Any, Any]]
    block: str
    images: tuple[int, ...] = (2, 0, 1)
    sizes: tuple[tuple[int, int], ...] = ((32, 32),)
    nested: bool = False
    completion: Mapping[str, int | None] = field(default_factory=dict)
    ragged: bool = True
    state: bool = False
    batch_positions: bool = False
    first_position: int = 0
    scale: float = 0.12

    @property
    def name(self) -> str:
        return self.build.__name__


FAMILIES: dict[str, Family] = {}


def family(block: str, **settings: Any) -> Callable[[Callable], Callable]:
    """Enter a family into the table."""

    def enter(build: Callable) -> Callable:
        FAMILIES[build.__name__] = Family(build, block, **settings)
        return build

    return enter


def tokenizer(*special: str, **roles: str) -> Any:
    """Build a tokenizer of single characters and special tokens, which pads on the left."""
    pieces = list(dict.fromkeys([*SPECIAL, *special, *CHARACTERS]))
    made = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens([piece for piece in pieces if piece in SPECIAL or piece in special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", bos_token="<bos>",
        padding_side="left", extra_special_tokens=roles,
    )  # fmt: skip


def text_settings(tokens: Any, *without: str, **changes: Any) -> dict[str, Any]:
    """Settings of a small language model; `without` names those that its config does not have."""
    settings = {
        "vocab_size": len(tokens), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
        "bos_token_id": 3, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False,
    } | changes  # fmt: skip
    return {name: x for name, x in settings.items() if name not in without}


def ids_of(tokens: Any, **names: str) -> dict[str, int]:
    """Token ids by the names of a config."""
    return {name: tokens.convert_tokens_to_ids(token) for name, token in names.items()}


def without_video(processor_class: Any) -> Any:
    """Let a processor live without its video half, which needs torchvision and which the type check insists on."""

    class ImageOnly(processor_class):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return type(argument)

    ImageOnly.__name__ = processor_class.__name__
    return ImageOnly


def by_hand(tokens: Any, images: Callable[[list], dict], repeat: Callable[[str, dict], list[str]]) -> Callable:
    """Make what is called like a processor: `repeat` writes the image tokens of a text into it."""

    def process(text: list[str], images_: list | None, **_: Any) -> dict[str, Any]:
        made = images(images_) if images_ else {}
        prompts = repeat(text, made)
        found = dict(tokens(prompts, padding=True, return_tensors="pt"))
        found.pop("token_type_ids", None)
        return found | made

    return lambda text, images=None, **named: process(text, images, **named)


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Draw rectangles of random colours; no pixel is black."""
    draw_from, (width, height) = random.Random(seed), size
    image = Image.new("RGB", size, tuple(draw_from.randrange(40, 216) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = draw_from.randrange(width), draw_from.randrange(height)
        end = x + draw_from.randrange(3, max(4, width // 3)), y + draw_from.randrange(3, max(4, height // 3))
        draw.rectangle([(x, y), end], fill=tuple(draw_from.randrange(1, 255) for _ in range(3)))
    return image


def built(chosen: Family) -> tuple[Any, Any]:
    """Build a family, or skip where this installation has not got it."""
    try:
        model, processor = chosen.build()
    except ImportError as error:
        pytest.skip(" ".join(str(error).split())[:100])
    except AttributeError as error:
        if "module transformers" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__}: {error}")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.is_floating_point() and x.dim() >= 2 and x.numel():
                x.normal_(0, chosen.scale, generator=generator)
            elif "gate" in name and x.dim() <= 1:
                x.fill_(0.8)  # closed at the start, and no picture gets through
    return model.eval(), processor


class Rollout:
    """Sequences of a family: prompts padded on the left, ragged completions, and the pictures."""

    def __init__(self, chosen: Family, images: tuple[int, ...] | None = None, *, group: bool = False) -> None:
        self.family = chosen
        self.model, self.processor = built(chosen)
        counts = images or chosen.images
        flat = [picture(n, chosen.sizes[n % len(chosen.sizes)]) for n in range(sum(counts))]
        self.images = [flat[sum(counts[:i]) :][:count] for i, count in enumerate(counts)]
        questions = ["how many?"[: 3 + 2 * i * chosen.ragged] for i in range(len(counts))]
        blocks = ["".join(chosen.block + "abc"[j] for j in range(count)) for count in counts]
        self.texts = [f"<|user|>{x}{question}<|assistant|>" for x, question in zip(blocks, questions, strict=True)]
        if group:  # the first two sequences answer the same prompt
            self.texts[1], self.images[1] = self.texts[0], self.images[0]
        generator = torch.Generator().manual_seed(1)
        lengths = torch.tensor(LENGTHS if chosen.ragged else (T,) * 3)[: len(counts), None]
        self.completion_mask = (torch.arange(T) < lengths).long()
        first = self.model.config.get_text_config().vocab_size - len(CHARACTERS)
        drawn = torch.randint(first, first + 60, (len(counts), T), generator=generator)
        self.completion_ids = drawn * self.completion_mask
        self.roles = torch.tensor(ROLES)[: len(counts)]
        prompts = self.processed(self.texts, self.images)
        self.ids = torch.cat([prompts["input_ids"], self.completion_ids], dim=1)
        self.mask = torch.cat([prompts["attention_mask"], self.completion_mask], dim=1)
        self.inputs = self.extended(prompts, T)

    def processed(self, texts: list[str], images: list[list[Any]]) -> dict[str, Any]:
        flat = [image for row in images for image in row]
        given = (images if self.family.nested else flat) if flat else None
        return dict(self.processor(text=list(texts), images=given, padding=True, return_tensors="pt"))

    def extended(self, prompts: dict[str, Any], n: int) -> dict[str, Any]:
        """Give inputs with an entry per token their values on n tokens of a completion."""
        found = {name: x for name, x in prompts.items() if name not in TEXT and name != "labels"}
        for name, x in found.items():
            default = 0 if name.endswith("token_type_ids") or name == "image_embeds_position_mask" else ...
            value = self.family.completion.get(name, default)
            if value is not ...:
                end = x[:, -1:].expand(-1, n, *x.shape[2:]) if value is None else x.new_full((len(x), n), value)
                found[name] = torch.cat([x, end], dim=1)
        return found

    @property
    def valid(self) -> Tensor:
        return self.completion_mask.bool()

    @property
    def seen(self) -> Tensor:
        return self.valid & (self.roles == 1)

    @property
    def visual(self) -> Tensor:
        """Perception of sequences with a picture."""
        return self.seen & torch.tensor([[bool(row)] for row in self.images])

    @property
    def reasoned(self) -> Tensor:
        return self.valid & (self.roles == 2) & self.seen.any(dim=1, keepdim=True)

    def without_pictures(self) -> dict[str, Any]:
        """What the processor makes of corrupted pictures, as the guide does it."""
        dark = corrupt_images(self.images, PatchMask(0.6), seed=self.texts, processor=self.processor)
        return self.extended(self.processed(self.texts, dark), T)

    def score(self, **changes: Any) -> StreamLogps:
        return score_streams(self.model, self.ids, self.mask, T, **{"role_ids": self.roles, **self.inputs, **changes})

    # Oracles

    @torch.no_grad()
    def own_logps(self, ids: Tensor, mask: Tensor, n: int, **inputs: Any) -> Tensor:
        """The model's log-probs of the last n tokens."""
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs).logits.float()
        logits = logits[:, -ids.shape[1] :]  # GIT's picture comes first
        return logits[:, :-1].log_softmax(dim=-1).gather(-1, ids[:, 1:, None])[:, -n:, 0]

    def whole(self, **inputs: Any) -> Tensor:
        return self.own_logps(self.ids, self.mask, T, **self.inputs | inputs)

    def alone(self, i: int) -> tuple[Tensor, dict[str, Any], int]:
        """Ids and inputs of one sequence, unpadded, with its valid completion."""
        n = int(self.completion_mask[i].sum())
        prompt = self.processed(self.texts[i : i + 1], self.images[i : i + 1])
        assert prompt["attention_mask"].all()
        ids = torch.cat([prompt["input_ids"], self.completion_ids[i : i + 1, :n]], dim=1)
        inputs = self.extended(prompt, n)
        if self.family.batch_positions:
            inputs["position_ids"] = self._positions(self.ids, self.mask, self.inputs)[:, i : i + 1, self.mask[i] != 0]
        return ids, inputs, n

    def each_alone(self) -> Tensor:
        out = torch.zeros(self.roles.shape)
        for i in range(len(self.texts)):
            ids, inputs, n = self.alone(i)
            out[i, :n] = self.own_logps(ids, torch.ones_like(ids), n, **inputs)[0]
        return out

    def deleted(self) -> Tensor:
        """Run each sequence alone without its perception; the other tokens keep their positions."""
        out = torch.full(self.roles.shape, math.nan)
        for i in range(len(self.texts)):
            ids, inputs, n = self.alone(i)
            kept = torch.ones(ids.shape[1], dtype=torch.bool)
            kept[-n:] = ~self.seen[i, :n]
            columns = kept.nonzero()[:, 0]
            shorter = {name: x[:, columns] if _per_token(x, ids) else x for name, x in inputs.items()}
            if "position_ids" in inspect.signature(self.model.forward).parameters:
                positions = inputs.get("position_ids", self._positions(ids, torch.ones_like(ids), inputs))
                shorter["position_ids"] = positions[..., columns]
            logps = self.own_logps(ids[:, columns], torch.ones_like(ids[:, columns]), len(columns) - 1, **shorter)
            inside = columns >= ids.shape[1] - n
            out[i, columns[inside] - (ids.shape[1] - n)] = logps[0, inside[1:]]
        return out

    def _positions(self, ids: Tensor, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The positions that the language model gives its rotary embedding; counted where it has none."""
        found: list[Tensor] = []

        def look(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = named.get("position_ids", arguments[1] if len(arguments) > 1 else None)
            if isinstance(x, Tensor) and x.dim() <= 3 and x.shape[-1] == ids.shape[1]:
                found.append(x)

        hooks = [
            module.register_forward_pre_hook(look, with_kwargs=True)
            for name, module in self.model.named_modules()
            if "rotary" in name.lower() and not any(word in name for word in ("vis", "image", "encoder", "tower"))
        ]
        self.own_logps(ids, mask, 1, **inputs)
        for hook in hooks:
            hook.remove()
        return found[0] if found else self.family.first_position + torch.arange(ids.shape[1])[None]


def _per_token(x: Any, ids: Tensor) -> bool:
    return isinstance(x, Tensor) and x.dim() >= 2 and x.shape[:2] == ids.shape
