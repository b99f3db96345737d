"""Four families of vision-language models, built small from configs, with processors. Nothing is loaded.

model, processor = build("qwen25vl")
inputs = processor(text=[PROMPTS["qwen25vl"]], images=[picture(3)], return_tensors="pt")
"""

from __future__ import annotations

import random
import string
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

# From their modules: transformers 5.17 hides these classes behind torchvision, which they do not use.
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SIZE = 32  # pixels; the default size of pictures, which no processor resizes
SPECIAL = [
    *("<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"),
    *("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
]
CHARACTERS = string.digits + string.ascii_lowercase + " ?.:,=+-<>/\n"
COLOURS = {"red": (255, 40, 40), "green": (40, 255, 40), "blue": (40, 40, 255), "white": (255, 255, 255)}

# What a prompt writes for one picture; the processor repeats the image token.
IMAGE_BLOCKS = {
    "idefics3": "<image>",
    "qwen25vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "llava": "<image>",
}
FAMILIES = tuple(IMAGE_BLOCKS)
PROMPTS = {family: f"<|user|>{block}how many squares?<|assistant|>" for family, block in IMAGE_BLOCKS.items()}
MERGED_PATCH = {"idefics3": 16, "qwen25vl": 8, "qwen3vl": 8, "llava": 8}  # pixels per side of one image token


def build(family: str, *, seed: int = 0) -> tuple[Any, Any]:
    """Build a model in eval mode with random weights, and its processor. The global generator stays as it was."""
    tokenizer = build_tokenizer("<image>" if family in ("idefics3", "llava") else "<|image_pad|>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _MODELS[family](tokenizer)
    return model.eval(), _PROCESSORS[family](tokenizer, chat_template(IMAGE_BLOCKS[family]))


def picture(n: int, size: int | tuple[int, int] = SIZE, seed: int = 0, colour: str = "red") -> Image.Image:
    """Draw n squares of one colour on black, in random cells of 8 pixels; `size` is a side or (width, height)."""
    width, height = (size, size) if isinstance(size, int) else size
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    cells = [(x, y) for x in range(0, width - 7, 8) for y in range(0, height - 7, 8)]
    for x, y in random.Random(seed).sample(cells, n):
        draw.rectangle([x + 1, y + 1, x + 6, y + 6], fill=COLOURS[colour])
    return image


def build_tokenizer(image_token: str) -> Any:
    """Build a tokenizer of single characters, names of colours and special tokens, which pads on the left."""
    vocabulary = {piece: index for index, piece in enumerate([*SPECIAL, *CHARACTERS, *COLOURS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*COLOURS, r"[\s\S]"])), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    roles = {
        "image_token": image_token,
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=roles,
        padding_side="left",
    )


def chat_template(image_block: str) -> str:
    """Write a chat template whose pictures are `image_block`."""
    return (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}" + image_block + "{% elif c['type'] == 'text' %}"
        "{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{% if m['role'] == 'assistant' %}<eos>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )


def _text_settings(tokenizer: Any, **rope: Any) -> dict[str, Any]:
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **rope},
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,  # with the usual 0.02 pictures hardly change the logits of so narrow a model
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }


_VISION_SETTINGS = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.1}


def _idefics3(tokenizer: Any) -> Any:
    vision = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8}
    config = transformers.Idefics3Config(
        vision_config=_VISION_SETTINGS | vision,
        text_config=transformers.LlamaConfig(**_text_settings(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def _llava(tokenizer: Any) -> Any:
    vision = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION_SETTINGS, **vision, projection_dim=32),
        text_config=transformers.Qwen2Config(**_text_settings(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _qwen(config_class: Any, model_class: Any, vision: dict[str, Any], rope: dict[str, Any], tokenizer: Any) -> Any:
    shared = {"depth": 2, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4, "spatial_merge_size": 2}
    ids = tokenizer.convert_tokens_to_ids
    config = config_class(
        vision_config={**_VISION_SETTINGS, **shared, "temporal_patch_size": 2, **vision},
        text_config=_text_settings(tokenizer, mrope_section=[2, 3, 3], **rope),
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    return model_class(config)


def _qwen25vl(tokenizer: Any) -> Any:
    classes = transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration
    return _qwen(*classes, {"window_size": 16, "fullatt_block_indexes": [1]}, {}, tokenizer)


def _qwen3vl(tokenizer: Any) -> Any:
    classes = transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration
    vision = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return _qwen(*classes, vision, {"mrope_interleaved": True}, tokenizer)


def _idefics3_processor(tokenizer: Any, template: str) -> Any:
    edge = {"longest_edge": SIZE}
    images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    return transformers.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)


def _llava_processor(tokenizer: Any, template: str) -> Any:
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=template,
    )


def _without_video(processor_class: Any) -> Any:
    """Let a processor live without its video half, which needs torchvision and which the type check insists on."""

    class ImageOnly(processor_class):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return type(argument)

        def save_pretrained(self, save_directory: Any, **_: Any) -> Any:
            return self.tokenizer.save_pretrained(save_directory)

    ImageOnly.__name__ = processor_class.__name__
    return ImageOnly


def _qwen_processor(processor_class: Any, normalisation: dict[str, Any], tokenizer: Any, template: str) -> Any:
    area = {"shortest_edge": 8 * 8, "longest_edge": 64 * 64}  # pictures between are not resized
    images = Qwen2VLImageProcessorPil(patch_size=4, temporal_patch_size=2, merge_size=2, size=area, **normalisation)
    return _without_video(processor_class)(images, tokenizer, None, chat_template=template)


def _qwen25vl_processor(tokenizer: Any, template: str) -> Any:
    return _qwen_processor(transformers.Qwen2_5_VLProcessor, {}, tokenizer, template)


def _qwen3vl_processor(tokenizer: Any, template: str) -> Any:
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # as the published preprocessor_config.json
    return _qwen_processor(transformers.Qwen3VLProcessor, half, tokenizer, template)


_MODELS = {"idefics3": _idefics3, "qwen25vl": _qwen25vl, "qwen3vl": _qwen3vl, "llava": _llava}
_PROCESSORS = {
    "idefics3": _idefics3_processor,
    "qwen25vl": _qwen25vl_processor,
    "qwen3vl": _qwen3vl_processor,
    "llava": _llava_processor,
}
