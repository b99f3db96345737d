"""Families that cut pictures into tiles, often beside a thumbnail, or keep their sizes inside of padding."""

from __future__ import annotations

import importlib
from typing import Any

import transformers as hf
from families.harness import ROPE, TOWER, VISION, family, ids_of, text_settings, tokenizer, without_video

WIDE = ((96, 32), (32, 32), (64, 32))
SQUARE = {"height": 32, "width": 32}
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
SIGLIP = {"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False}


def tiler(name: str = "GotOcr2", **settings: Any) -> Any:
    return getattr(hf, f"{name}ImageProcessor")(
        size=SQUARE, min_patches=1, max_patches=6, crop_to_patches=True, **settings
    )


def internvl_like(name: str, text: Any, processor: Any, *more: str) -> tuple[Any, Any]:
    roles = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    marks = tokenizer(*roles.values(), "<video>", "<image>", **roles, **dict.fromkeys(more, "<video>"))
    tower = VISION | {"image_size": [32, 32], "patch_size": [8, 8], "layer_scale_init_value": 1.0}
    config = getattr(hf, f"{name}Config")(
        vision_config=tower, text_config=text(marks), downsample_ratio=0.5, image_seq_length=4,
        **ids_of(marks, image_token_id="<IMG_CONTEXT>"),
    )  # fmt: skip
    return getattr(hf, f"{name}ForConditionalGeneration")(config), processor(marks)


@family("<IMG_CONTEXT>", nested=True, images=(2, 1, 1), sizes=WIDE)
def internvl():
    def processor(marks: Any) -> Any:
        return without_video(hf.InternVLProcessor)(tiler(), marks, None, image_seq_length=4)

    return internvl_like(
        "InternVL", lambda marks: hf.Qwen2Config(**text_settings(marks, "head_dim")), processor, "video_token"
    )


@family("<image>", nested=True, images=(2, 1, 1), sizes=WIDE)
def qianfan():
    def processor(marks: Any) -> Any:
        return hf.QianfanOCRProcessor(tiler(), marks, image_seq_length=4)

    return internvl_like("QianfanOCR", lambda marks: hf.Qwen3Config(**text_settings(marks)), processor)


def llava_next_like(name: str, marks: Any, **ids: str) -> tuple[Any, Any]:
    config = getattr(hf, f"{name}Config")(
        vision_config=hf.CLIPVisionConfig(**TOWER, projection_dim=32), image_seq_length=16,
        text_config=hf.Qwen2Config(**text_settings(marks, "head_dim")), image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1, **ids_of(marks, **ids),
    )  # fmt: skip
    images = hf.LlavaNextImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS)
    return getattr(hf, f"{name}ForConditionalGeneration")(config), images


COUNTED = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


@family("<image>", images=(2, 1, 1), sizes=((64, 64), (30, 70), (32, 32)))
def llava_next():
    marks = tokenizer("<image>", image_token="<image>")
    model, images = llava_next_like("LlavaNext", marks, image_token_id="<image>")
    return model, hf.LlavaNextProcessor(images, marks, image_token="<image>", **COUNTED)


@family("<image>", images=(2, 1, 1), sizes=((64, 64), (30, 70), (32, 32)))
def llava_next_video():
    names = {"image_token": "<image>", "video_token": "<video>"}
    marks = tokenizer(*names.values(), **names)
    ids = {f"{name}_index": token for name, token in names.items()}
    model, images = llava_next_like("LlavaNextVideo", marks, **ids)
    processor = without_video(hf.LlavaNextVideoProcessor)
    return model, processor(video_processor=None, image_processor=images, tokenizer=marks, **names, **COUNTED)


@family("<image>", nested=True, images=(1, 1, 1), sizes=((64, 64), (30, 70), (32, 32)))
def llava_onevision():
    names = {"image_token": "<image>", "video_token": "<video>"}
    marks = tokenizer(*names.values(), **names)
    settings = {"vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER, vision_use_head=False), image_grid_pinpoints=PINPOINTS,
        text_config=hf.Qwen2Config(**text_settings(marks, "head_dim")), vision_feature_layer=-1, **settings,
        **ids_of(marks, image_token_id="<image>", video_token_id="<video>"),
    )  # fmt: skip
    images = hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS)
    processor = without_video(hf.LlavaOnevisionProcessor)(images, marks, None, num_image_tokens=16, **settings)
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def idefics_like(kind: str, split: bool) -> tuple[Any, Any]:
    fake, edge = "<fake_token_around_image>", {"longest_edge": 32}
    roles = {
        "image_token": "<image>", "fake_image_token": fake, "global_image_token": "<global-img>",
        "image_boundary_token": fake, "end_of_utterance_token": "<end_of_utterance>", "video_token": "<video>",
    }  # fmt: skip
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    marks = tokenizer(*roles.values(), *tiles, **roles)
    settings = {"vision_config": TOWER, **ids_of(marks, image_token_id="<image>")}
    if kind == "Idefics2":
        resampler = {
            "hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
            "resampler_head_dim": 16, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        }  # fmt: skip
        text = hf.MistralConfig(**text_settings(marks), sliding_window=None)
        config = hf.Idefics2Config(perceiver_config=resampler, text_config=text, **settings)
        images = hf.Idefics2ImageProcessor(size={"shortest_edge": 16, "longest_edge": 32}, do_image_splitting=split)
        return hf.Idefics2ForConditionalGeneration(config), hf.Idefics2Processor(images, marks, image_seq_len=4)
    text = hf.LlamaConfig(**text_settings(marks))
    config = getattr(hf, f"{kind}Config")(text_config=text, scale_factor=2, pad_token_id=0, **settings)
    sizes = {"size": {"longest_edge": 64} if split else edge, "max_image_size": edge}
    images = getattr(hf, f"{kind}ImageProcessor")(do_image_splitting=split, **sizes)
    videos = [hf.SmolVLMVideoProcessor(size=edge, max_image_size=edge)] if kind == "SmolVLM" else []
    processor = getattr(hf, f"{kind}Processor")(images, marks, *videos, image_seq_len=4)
    return getattr(hf, f"{kind}ForConditionalGeneration")(config), processor


@family("<image>", nested=True, sizes=((32, 32), (24, 32)))
def idefics2():
    return idefics_like("Idefics2", split=False)


@family("<image>", nested=True, images=(2, 1, 1), sizes=((64, 64), (64, 32)))
def idefics2_split():
    return idefics_like("Idefics2", split=True)


@family("<image>", nested=True)
def idefics3():
    return idefics_like("Idefics3", split=False)


@family("<image>", nested=True, images=(2, 1, 1), sizes=((64, 64), (64, 32)))
def idefics3_split():
    return idefics_like("Idefics3", split=True)


@family("<image>", nested=True)
def smolvlm():
    return idefics_like("SmolVLM", split=False)


@family("<image>", nested=True, images=(2, 1, 1), sizes=((64, 64), (64, 32)))
def smolvlm_split():
    return idefics_like("SmolVLM", split=True)


# Pictures of their own sizes

RAGGED = ((64, 32), (32, 32), (32, 48))
PIXTRAL = {"model_type": "pixtral", **VISION, "head_dim": 16, "image_size": 64, "patch_size": 8}


def pixtral_parts(patch: int, merge: int) -> tuple[Any, Any]:
    """Tokens and processor; from its module: the class hides behind torchvision, which it does not use."""
    marks = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    images = hf.PixtralImageProcessor(patch_size=patch, size={"longest_edge": 64})
    module = importlib.import_module("transformers.models.pixtral.processing_pixtral")
    return marks, module.PixtralProcessor(images, marks, patch_size=8, spatial_merge_size=merge)


def mistral3_model(marks: Any) -> Any:
    config = hf.Mistral3Config(
        vision_config=PIXTRAL, text_config=hf.MistralConfig(**text_settings(marks), sliding_window=None),
        spatial_merge_size=2, vision_feature_layer=-1, **ids_of(marks, image_token_id="[IMG]"),
    )  # fmt: skip
    return hf.Mistral3ForConditionalGeneration(config)


@family("[IMG]", images=(2, 1, 1), sizes=RAGGED)
def mistral3():
    marks, processor = pixtral_parts(16, 2)
    return mistral3_model(marks), processor


@family("[IMG]", images=(2, 0, 1))
def mistral3_same_sizes():
    marks, processor = pixtral_parts(16, 2)
    return mistral3_model(marks), processor


@family("[IMG]", images=(2, 1, 1), sizes=RAGGED)
def pixtral():
    marks, processor = pixtral_parts(8, 1)
    config = hf.LlavaConfig(
        vision_config=PIXTRAL, text_config=hf.MistralConfig(**text_settings(marks), sliding_window=None),
        vision_feature_layer=-1, vision_feature_select_strategy="full", **ids_of(marks, image_token_id="[IMG]"),
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config), processor


@family("<|image_pad|>", images=(2, 1, 1), sizes=RAGGED)
def lighton():
    roles = {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"}
    marks = tokenizer(*roles.values(), **roles)
    config = hf.LightOnOcrConfig(
        vision_config=PIXTRAL, text_config=hf.Qwen3Config(**text_settings(marks)), spatial_merge_size=2,
        **ids_of(marks, image_token_id="<|image_pad|>"),
    )  # fmt: skip
    images = hf.PixtralImageProcessor(patch_size=16, size={"longest_edge": 64})
    processor = hf.LightOnOcrProcessor(images, marks, patch_size=8, spatial_merge_size=2)
    return hf.LightOnOcrForConditionalGeneration(config), processor


# Cohere, Llama, and others

COHERE = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL", "TILE", "_")


def cohere_text(marks: Any) -> Any:
    layers = ["sliding_attention", "full_attention"]
    return hf.Cohere2Config(
        **text_settings(marks, "head_dim", sliding_window=512, layer_types=layers, logit_scale=0.25)
    )


@family("<image>", nested=True, images=(2, 1, 1), sizes=WIDE)
def aya_vision():
    marks = tokenizer("<image>", *COHERE)
    config = hf.AyaVisionConfig(
        vision_config=SIGLIP, text_config=cohere_text(marks), downsample_factor=2, vision_feature_layer=-1,
        tie_word_embeddings=False, **ids_of(marks, image_token_index="<|IMG_PATCH|>"),
    )  # fmt: skip
    processor = hf.AyaVisionProcessor(tiler(), marks, patch_size=8, img_size=32, downsample_factor=2)
    return hf.AyaVisionForConditionalGeneration(config), processor


@family("<|IMG_PATCH|>", nested=True, images=(2, 1, 1), sizes=WIDE)
def cohere2_vision():
    names = ("boi_token", "eoi_token", "image_token", "img_line_break_token")
    marks = tokenizer("<image>", *COHERE, **dict(zip(names, COHERE, strict=False)))
    config = hf.Cohere2VisionConfig(
        vision_config=SIGLIP, text_config=cohere_text(marks), downsample_factor=2, alignment_intermediate_size=64,
        tie_word_embeddings=False, **ids_of(marks, image_token_id="<|IMG_PATCH|>"),
    )  # fmt: skip
    processor = hf.Cohere2VisionProcessor(tiler("Cohere2Vision", patch_size=2), marks)
    return hf.Cohere2VisionForConditionalGeneration(config), processor


@family("<|image|>", nested=True, images=(2, 1, 1), sizes=((64, 32), (32, 32), (64, 64)))
def llama4():
    hf.modeling_outputs.MoeCausalLMOutputWithPast.image_outputs = None  # its forward asks for it (5.24)
    names = (
        "<|image|>",
        "<|image_start|>",
        "<|image_end|>",
        "<|patch|>",
        "<|tile_x_separator|>",
        "<|tile_y_separator|>",
    )
    marks = tokenizer(*names)
    tower = VISION | {
        "intermediate_size": 128, "vision_output_dim": 64, "image_size": 32, "patch_size": 8, "rope_parameters": ROPE,
        "projector_input_dim": 64, "projector_output_dim": 64,
    }  # fmt: skip
    text = text_settings(
        marks, intermediate_size_mlp=96, num_local_experts=2, num_experts_per_tok=1, attention_chunk_size=8192,
        no_rope_layers=[1, 0], rope_parameters=ROPE,
    )  # fmt: skip
    ids = {"image_token_index": "<|patch|>", "boi_token_index": "<|image_start|>", "eoi_token_index": "<|image_end|>"}
    config = hf.Llama4Config(vision_config=tower, text_config=text, **ids_of(marks, **ids))
    images = hf.Llama4ImageProcessor(size=SQUARE, max_patches=4, resize_to_max_canvas=False)
    processor = hf.Llama4Processor(images, marks, patch_size=8, pixel_shuffle_ratio=0.5)

    def process(**named: Any) -> dict[str, Any]:
        made = dict(processor(**named))
        return made | ({"pixel_values": made["pixel_values"].float()} if "pixel_values" in made else {})

    return hf.Llama4ForConditionalGeneration(config), process


@family("<image>", nested=True, images=(2, 1, 1), sizes=WIDE)
def ovis2():
    indicators = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    marks = tokenizer("<image>", "<IMG_ATOM>", *indicators, *(f"<img_{x}>" for x in "abcde"))
    config = hf.Ovis2Config(
        vision_config=TOWER | {"vocab_size": 64, "hidden_stride": 2}, vocab_size=len(marks), hidden_size=64,
        text_config=hf.Qwen2Config(**text_settings(marks, "head_dim")), tie_word_embeddings=False,
        visual_indicator_token_ids=marks.convert_tokens_to_ids(list(indicators)),
        **ids_of(marks, image_token_id="<IMG_ATOM>"),
    )  # fmt: skip
    processor = hf.Ovis2Processor(tiler("Ovis2"), marks, image_token="<image>", image_seq_length=4)
    return hf.Ovis2ForConditionalGeneration(config), processor


@family("<|image|>", images=(2, 1, 1), sizes=((64, 32),))
def perception_lm():
    names = {"image_token": "<|image|>", "video_token": "<|video|>"}
    marks = tokenizer(*names.values(), **names)
    arguments = {
        "embed_dim": 32, "img_size": [32, 32], "depth": 2, "num_heads": 2, "patch_size": [8, 8], "global_pool": "",
        "use_post_transformer_norm": False, "init_values": 0.1, "ref_feat_shape": [4, 4],
    }  # fmt: skip
    tower = {"model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336", "model_args": arguments}
    config = hf.PerceptionLMConfig(
        vision_config=tower | {"num_classes": 0, "do_pooling": False}, projector_pooling_ratio=2,
        text_config=hf.LlamaConfig(**text_settings(marks)), vision_use_cls_token=True,
        **ids_of(marks, **{f"{name}_id": token for name, token in names.items()}),
    )  # fmt: skip
    images = hf.PerceptionLMImageProcessor(tile_size=32, max_num_tiles=4, vision_input_type="thumb+tile")
    processor = without_video(hf.PerceptionLMProcessor)(None, images, marks, patch_size=8, pooling_ratio=2)
    return hf.PerceptionLMForConditionalGeneration(config), processor
