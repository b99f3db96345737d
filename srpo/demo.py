"""SRPO updates of a small vision-language model: what `python -m srpo demo` runs.

A real architecture (Idefics3 or Qwen2.5-VL, a few hundred thousand parameters, built from a config) learns to add two digits
in scikit-learn's pictures. A supervised warm start teaches it the perception / think / answer format, then every step samples
rollouts, scores their three streams and updates the policy with `role_weighted_grpo_loss`. Nothing is downloaded.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from rich.console import Console, Group
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from sklearn.datasets import load_digits
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

import srpo

IMAGE_SIZE, PATCH, MERGE = 32, 8, 2  # pixels, pixels per patch, patches per side of an image token
IMAGE_TOKENS = (IMAGE_SIZE // (PATCH * MERGE)) ** 2
SPECIAL = ["<pad>", "<eos>", "<image>", "<|vision_start|>", "<|vision_end|>", "<|video|>", "<|user|>", "<|assistant|>"]
PROMPT = f"<|user|><|vision_start|>{'<image>' * IMAGE_TOKENS}<|vision_end|> what is the sum ?<|assistant|>"
RESPONSE = (
    "<perception> the left digit is {left} and the right digit is {right} </perception>"
    " <think> {left} plus {right} makes {total} </think> <answer> {total} </answer>"
)
HELD_OUT = 400  # rollouts use the last digits of the data set, the warm start the others
WARM_UP_STEPS, WARM_UP_BATCH, WARM_UP_LR = 120, 32, 3e-3
PROMPTS, ROLLOUTS, POLICY_LR = 8, 8, 2e-4
MASK_PROBABILITY = 0.6
ROLE_STYLE = {srpo.Role.OTHER: "dim", srpo.Role.PERCEPTION: "cyan", srpo.Role.REASONING: "magenta"}


class TinyVLM(NamedTuple):
    """A vision-language model with random weights, its tokenizer and its image processor."""

    family: str
    model: Any
    tokenizer: Any
    image_processor: Any


class Example(NamedTuple):
    """A picture of two digits and the digits themselves."""

    image: Image.Image
    left: int
    right: int

    @property
    def response(self) -> str:
        return RESPONSE.format(left=self.left, right=self.right, total=self.left + self.right)


class Rollouts(NamedTuple):
    """Sampled completions and what the loss needs: model inputs of prompt and completion, ids and mask `[B, T]`."""

    inputs: dict[str, Tensor]
    completion_ids: Tensor
    completion_mask: Tensor
    texts: list[str]


class StepReport(NamedTuple):
    """What one update computed."""

    examples: list[Example]
    rollouts: Rollouts
    roles: srpo.RoleParse
    rewards: Tensor
    contrast: Tensor
    advantages: Tensor
    output: srpo.LossOutput
    gradient_norm: float
    seconds: float


# ---- model ----


def build_tokenizer() -> Any:
    """Build a word-level tokenizer whose pieces carry their leading space, with the words of the task."""
    words = f"{RESPONSE} what sum ?".replace(" ", "\n ").split("\n")
    numbers = [f" {number}" for number in range(19)]
    vocabulary = dict.fromkeys([*SPECIAL, *numbers, *(word for word in words if "{" not in word)])
    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(vocabulary)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?</?\w+>| ?\w+| ?[^\w\s]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=SPECIAL[2:]
    )


def build_tiny_vlm(family: str) -> TinyVLM:
    """Build a model of a family from a config. Seed torch before; weights are random.

    Args:
        family: `"idefics3"` or `"qwen25vl"`.
    """
    tokenizer = build_tokenizer()
    model, image_processor = FAMILIES[family](tokenizer)
    return TinyVLM(family, model, tokenizer, image_processor)


def _text_settings(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,  # 1 / sqrt(hidden_size): the usual 0.02 makes a narrow model learn slowly
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }


def _idefics3(tokenizer: Any) -> tuple[Any, Any]:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
        "initializer_range": 0.1,
    }
    config = transformers.Idefics3Config(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**_text_settings(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=MERGE,
        pad_token_id=tokenizer.pad_token_id,
    )
    edge = {"longest_edge": IMAGE_SIZE}
    processor = transformers.Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    return transformers.Idefics3ForConditionalGeneration(config), processor


def _qwen25vl(tokenizer: Any) -> tuple[Any, Any]:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 96,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": IMAGE_SIZE,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.1,
    }
    rope = {"rope_type": "default", "mrope_section": [4, 4, 4], "rope_theta": 10000.0}
    ids = tokenizer.convert_tokens_to_ids
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config={"rope_parameters": rope, **_text_settings(tokenizer)},
        image_token_id=ids("<image>"),
        video_token_id=ids("<|video|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    area = {"shortest_edge": IMAGE_SIZE**2, "longest_edge": IMAGE_SIZE**2}
    processor = transformers.Qwen2VLImageProcessorPil(
        patch_size=PATCH, temporal_patch_size=2, merge_size=MERGE, size=area
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[Any], tuple[Any, Any]]] = {"idefics3": _idefics3, "qwen25vl": _qwen25vl}


# ---- task ----


def draw_examples(n: int, generator: torch.Generator, *, held_out: bool) -> list[Example]:
    """Draw pictures of two digits side by side."""
    digits = load_digits()
    split = len(digits.target) - HELD_OUT
    low, high = (split, len(digits.target)) if held_out else (0, split)
    pairs = torch.randint(low, high, (n, 2), generator=generator).tolist()
    halves = digits.images.repeat(4, axis=1).repeat(2, axis=2) * (255 / 16)
    return [
        Example(
            Image.fromarray(np.concatenate([halves[left], halves[right]], axis=1).astype(np.uint8)).convert("RGB"),
            int(digits.target[left]),
            int(digits.target[right]),
        )
        for left, right in pairs
    ]
