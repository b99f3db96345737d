"""The model and the task of `python -m srpo demo`: a small vision-language model that adds two digits in a picture.

The architectures are real (Idefics3, Qwen2.5-VL, Qwen3-VL, LLaVA) and built from a config; pictures come from
scikit-learn's digits. Nothing is downloaded. A supervised warm start teaches the response format, so that log-prob
contrasts mean something.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

# From its module: transformers 5.17 hides this class behind torchvision, which it does not use.
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

IMAGE_SIZE, PATCH, MERGE = 32, 8, 2  # pixels, pixels per patch, patches per side of an image token
IMAGE_TOKENS = (IMAGE_SIZE // (PATCH * MERGE)) ** 2
HIDDEN_SIZE = 96
SPECIAL = ["<pad>", "<eos>", "<image>", "<|vision_start|>", "<|vision_end|>", "<|video|>", "<|user|>", "<|assistant|>"]
QUESTION = " what is the sum ?"
PROMPT = f"<|user|><|vision_start|>{'<image>' * IMAGE_TOKENS}<|vision_end|>{QUESTION}<|assistant|>"
RESPONSE = (
    "<perception> the left digit is {left} and the right digit is {right} </perception>"
    " <think> {left} plus {right} makes {total} </think> <answer> {total} </answer><eos>"
)
HELD_OUT = 400  # rollouts use the last pictures of the data set, the warm start the others
WARM_START_LR = 6e-3
MAX_COMPLETION_LENGTH = 30


class TinyVLM(NamedTuple):
    """A small vision-language model, its tokenizer and its image processor."""

    family: str
    model: Any
    tokenizer: Any
    image_processor: Any


class Example(NamedTuple):
    """A picture of two digits, and the digits."""

    image: Image.Image
    left: int
    right: int

    @property
    def response(self) -> str:
        return RESPONSE.format(left=self.left, right=self.right, total=self.left + self.right)

    def is_answered_by(self, text: str) -> bool:
        return answers(text, self.left + self.right)


def answers(text: str, total: int) -> bool:
    """Say whether the last answer of a response is right."""
    found = re.findall(r"<answer>(.*?)</answer>", text)
    return bool(found) and found[-1].strip() == str(total)


class Completions(NamedTuple):
    """Sampled completions: ids and mask `[B, T]`, and their text up to the end-of-sequence token."""

    ids: Tensor
    mask: Tensor
    texts: list[str]


def build_tokenizer() -> Any:
    """Build a word-level tokenizer whose pieces carry their leading space, with the words of the task."""
    split = pre_tokenizers.Split(Regex(r" ?</?\w+>| ?\w+| ?[^\w\s]"), "isolated")
    texts = [PROMPT, *(RESPONSE.format(left=n // 2, right=n - n // 2, total=n) for n in range(19))]
    special = re.compile("|".join(map(re.escape, SPECIAL)))
    words = [piece for text in texts for piece, _ in split.pre_tokenize_str(special.sub("", text))]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=SPECIAL[2:]
    )


def build_tiny_vlm(family: str) -> TinyVLM:
    """Build a model of a family from a config. Seed torch before; weights are random.

    Args:
        family: a key of `FAMILIES`.
    """
    tokenizer = build_tokenizer()
    model, image_processor = FAMILIES[family](tokenizer)
    return TinyVLM(family, model, tokenizer, image_processor)


def _text_settings(tokenizer: Any, **rope: Any) -> dict[str, Any]:
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, **rope},  # short sequences
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 2 * HIDDEN_SIZE,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.06,  # with the usual 0.02 so narrow a model learns slowly
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
    )
    edge = {"longest_edge": IMAGE_SIZE}
    processor = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_resize=False, do_image_splitting=False)
    return transformers.Idefics3ForConditionalGeneration(config), processor


def _qwen2_5_vl(tokenizer: Any) -> tuple[Any, Any]:
    config = transformers.Qwen2_5_VLConfig(
        vision_config=_qwen_vision() | {"window_size": IMAGE_SIZE, "fullatt_block_indexes": [1]},
        text_config=_text_settings(tokenizer, mrope_section=[4, 4, 4]),
        **_qwen_tokens(tokenizer),
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), _qwen_processor()


def _qwen3_vl(tokenizer: Any) -> tuple[Any, Any]:
    text = _text_settings(tokenizer, mrope_section=[4, 4, 4], mrope_interleaved=True)
    patches = (IMAGE_SIZE // PATCH) ** 2
    config = transformers.Qwen3VLConfig(
        vision_config=_qwen_vision() | {"num_position_embeddings": patches, "deepstack_visual_indexes": [0]},
        text_config=text | {"head_dim": HIDDEN_SIZE // text["num_attention_heads"]},
        **_qwen_tokens(tokenizer),
    )
    halves = [0.5] * 3
    return transformers.Qwen3VLForConditionalGeneration(config), _qwen_processor(image_mean=halves, image_std=halves)


def _qwen_vision() -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": HIDDEN_SIZE,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "initializer_range": 0.1,
    }


def _qwen_tokens(tokenizer: Any) -> dict[str, Any]:
    ids = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": ids("<image>"),
        "video_token_id": ids("<|video|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
        "tie_word_embeddings": False,
    }


def _qwen_processor(**normalisation: Any) -> Any:
    area = {"shortest_edge": IMAGE_SIZE**2, "longest_edge": IMAGE_SIZE**2}
    return transformers.Qwen2VLImageProcessorPil(
        patch_size=PATCH, temporal_patch_size=2, merge_size=MERGE, size=area, **normalisation
    )


def _llava(tokenizer: Any) -> tuple[Any, Any]:
    side = PATCH * MERGE  # LLaVA does not merge patches: one of them is one image token
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=IMAGE_SIZE,
        patch_size=side, projection_dim=32, initializer_range=0.1,
    )  # fmt: skip
    image: dict[str, Any] = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>")}
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**_text_settings(tokenizer)),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        **image,
    )
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = transformers.CLIPImageProcessorPil(size=square, crop_size=square, do_resize=False)
    return transformers.LlavaForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "idefics3": _idefics3, "qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl, "llava": _llava,
}  # fmt: skip


def draw_examples(n: int, generator: torch.Generator, *, held_out: bool) -> list[Example]:
    """Draw pictures of two digits side by side."""
    pictures, labels = _digits()
    split = len(labels) - HELD_OUT
    low, high = (split, len(labels)) if held_out else (0, split)
    examples = []
    for left, right in torch.randint(low, high, (n, 2), generator=generator).tolist():
        pixels = np.concatenate([pictures[left], pictures[right]], axis=1)
        examples.append(Example(Image.fromarray(pixels).convert("RGB"), labels[left], labels[right]))
    return examples


@cache
def _digits() -> tuple[np.ndarray, list[int]]:
    """Return scikit-learn's digits as half pictures, uint8 [n, 32, 16], and their labels."""
    digits: Any = load_digits()
    grey = (digits.images * (255 / 16)).astype(np.uint8)
    return grey.repeat(IMAGE_SIZE // 8, axis=1).repeat(IMAGE_SIZE // 16, axis=2), digits.target.tolist()


def model_inputs(vlm: TinyVLM, examples: list[Example]) -> dict[str, Tensor]:
    """Tokenize the prompt and process the pictures of each example; `[B, L]` ids, mask and multimodal inputs."""
    images = [example.image for example in examples]
    nested = [[image] for image in images] if vlm.family == "idefics3" else images
    pixels = vlm.image_processor(nested, return_tensors="pt")
    ids = torch.tensor([vlm.tokenizer(PROMPT)["input_ids"]] * len(examples))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels["pixel_values"]}
    if vlm.family.startswith("qwen"):
        inputs["image_grid_thw"] = pixels["image_grid_thw"]
        inputs["mm_token_type_ids"] = (ids == vlm.tokenizer.convert_tokens_to_ids("<image>")).int()
    return {name: tensor.to(vlm.model.device) for name, tensor in inputs.items()}


def with_completions(vlm: TinyVLM, inputs: dict[str, Tensor], ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Append completions `[B, T]` to prompt inputs, with the position ids of the full sequence."""
    full = dict(inputs)
    full["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    full["attention_mask"] = torch.cat([inputs["attention_mask"], mask.long()], dim=1)
    if vlm.family.startswith("qwen"):
        types = inputs["mm_token_type_ids"]
        full["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(ids, dtype=types.dtype)], dim=1)
        named = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        full["position_ids"] = vlm.model.model.get_rope_index(**{name: full[name] for name in named})[0]
    else:
        full["position_ids"] = (full["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    return full


def completion_logits(vlm: TinyVLM, inputs: dict[str, Tensor], length: int) -> Tensor:
    """Return the logits `[B, length + 1, V]` of the last positions: position t predicts completion token t."""
    return vlm.model(**inputs, logits_to_keep=length + 1).logits


def warm_start(
    vlm: TinyVLM, generator: torch.Generator, steps: int, *, batch_size: int = 32, enough: float = 0.035
) -> Iterator[float]:
    """Train on templated responses, and yield the loss of each step; stop when ten of them average below `enough`.

    At the default about half of the sampled answers are right, so the rollouts of one prompt differ in reward.
    """
    recent: deque[float] = deque(maxlen=10)
    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=WARM_START_LR, betas=(0.9, 0.97))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 10) * (1 - step / steps))
    for _ in range(steps):
        examples = draw_examples(batch_size, generator, held_out=False)
        ids = torch.tensor(vlm.tokenizer([example.response for example in examples])["input_ids"])
        ids = ids.to(vlm.model.device)
        inputs = with_completions(vlm, model_inputs(vlm, examples), ids, torch.ones_like(ids))
        logits = completion_logits(vlm, inputs, ids.shape[1])[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        yield recent[-1]
        if len(recent) == 10 and sum(recent) / 10 < enough:
            return


@torch.no_grad()
def sample(vlm: TinyVLM, inputs: dict[str, Tensor]) -> Completions:
    """Sample one completion for each prompt at temperature 1, from torch's global generator."""
    eos = vlm.tokenizer.eos_token_id
    config = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_COMPLETION_LENGTH,
        suppress_tokens=[index for index in range(len(SPECIAL)) if index != eos],  # no second <image> in a response
        eos_token_id=eos,
        pad_token_id=vlm.tokenizer.pad_token_id,
    )
    ids = vlm.model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
    ended = (ids == eos).cumsum(dim=1)
    mask = (ended == 0) | ((ended == 1) & (ids == eos))
    texts = [vlm.tokenizer.decode(row[valid]) for row, valid in zip(ids, mask, strict=True)]
    return Completions(ids, mask, texts)
