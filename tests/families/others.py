"""Families with one size of pictures, two towers, or pictures that do not sit in the token stream."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from families.harness import ROPE, TOWER, VISION, by_hand, family, ids_of, text_settings, tokenizer
from tokenizers import AddedToken

SQUARE = {"height": 32, "width": 32}
SIGLIP = {"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False}


def clip() -> Any:
    return hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)


def clip_tower() -> Any:
    return hf.CLIPVisionConfig(**TOWER, projection_dim=32)


def repeated(token: str, n: int, before: str = "", after: str = "") -> Any:
    """Write n image tokens in the place of one."""
    return lambda texts, _: [text.replace(token, before + token * n + after) for text in texts]


def llava_processor(marks: Any, images: Any, **settings: Any) -> Any:
    counted = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return hf.LlavaProcessor(images, marks, image_token="<image>", **counted | settings)


@family("<image>")
def llava():
    marks = tokenizer("<image>", image_token="<image>")
    config = hf.LlavaConfig(
        vision_config=clip_tower(), text_config=hf.Qwen2Config(**text_settings(marks, "head_dim")),
        image_seq_length=16, vision_feature_select_strategy="default", vision_feature_layer=-1,
        **ids_of(marks, image_token_id="<image>"),
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config), llava_processor(marks, clip())


@family("<image>")
def vipllava():
    marks = tokenizer("<image>", image_token="<image>")
    config = hf.VipLlavaConfig(
        vision_config=clip_tower(), text_config=hf.LlamaConfig(**text_settings(marks)), image_seq_length=16,
        vision_feature_layers=[-1, -2], **ids_of(marks, image_token_id="<image>"),
    )  # fmt: skip
    return hf.VipLlavaForConditionalGeneration(config), llava_processor(marks, clip())


@family("<image>")
def video_llava():
    marks = tokenizer("<image>", "<video>")
    config = hf.VideoLlavaConfig(
        vision_config=clip_tower(), text_config=hf.LlamaConfig(**text_settings(marks)), image_seq_length=16,
        vision_feature_layer=-1, **ids_of(marks, image_token_index="<image>", video_token_index="<video>"),
    )  # fmt: skip
    images = clip()

    def cut(pictures: list) -> dict[str, Any]:
        return {"pixel_values_images": images(pictures, return_tensors="pt")["pixel_values"]}

    return hf.VideoLlavaForConditionalGeneration(config), by_hand(marks, cut, repeated("<image>", 16))


@family("<image>", sizes=((64, 64),), scale=0.2)
def fast_vlm():
    marks = tokenizer("<image>", image_token="<image>")
    tower = {
        "model_type": "timm_wrapper", "architecture": "fastvit_mci3", "do_pooling": True, "num_classes": 1,
        "global_pool": "avg", "hidden_size": 3072, "model_args": {"inference_mode": True},
    }  # fmt: skip
    config = hf.FastVlmConfig(
        vision_config=tower, text_config=hf.Qwen2Config(**text_settings(marks, "head_dim")), image_seq_length=1,
        **ids_of(marks, image_token_index="<image>"),
    )  # fmt: skip
    images = hf.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    settings = {"patch_size": 64, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
    return hf.FastVlmForConditionalGeneration(config), llava_processor(marks, images, **settings)


@family("<start_of_image>", nested=True)
def gemma3():
    roles = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    marks = tokenizer(*roles.values(), **roles)
    text = hf.Gemma3TextConfig(
        **text_settings(marks), sliding_window=512, layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=16,
    )  # fmt: skip
    ids = {"image_token_id": "<image_soft_token>", "boi_token_index": "<start_of_image>"}
    config = hf.Gemma3Config(
        vision_config=TOWER | {"vision_use_head": False}, text_config=text, mm_tokens_per_image=4,
        **ids_of(marks, eoi_token_index="<end_of_image>", **ids),
    )  # fmt: skip
    processor = hf.Gemma3Processor(hf.Gemma3ImageProcessor(size=SQUARE), marks, image_seq_length=4)
    return hf.Gemma3ForConditionalGeneration(config), processor


@family("<image>", nested=True, images=(2, 1, 1), completion={"token_type_ids": 1})
def paligemma():
    marks = tokenizer("<image>", image_token="<image>")
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER, vision_use_head=False), projection_dim=64,
        text_config=hf.GemmaConfig(**text_settings(marks)), **ids_of(marks, image_token_id="<image>"),
    )  # fmt: skip
    images = hf.SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = 16
    return hf.PaliGemmaForConditionalGeneration(config), hf.PaliGemmaProcessor(images, marks)


@family("<image_placeholder>", sizes=((32, 32), (32, 24)))
def deepseek_vl():
    marks = tokenizer("<image_placeholder>", image_token="<image_placeholder>")
    config = hf.DeepseekVLConfig(
        vision_config=SIGLIP, text_config=hf.LlamaConfig(**text_settings(marks)), tie_word_embeddings=False,
        **ids_of(marks, image_token_id="<image_placeholder>"),
    )  # fmt: skip
    images = hf.DeepseekVLImageProcessor(size=SQUARE, min_size=8)
    return hf.DeepseekVLForConditionalGeneration(config), hf.DeepseekVLProcessor(images, marks, num_image_tokens=16)


@family("<image_placeholder>")
def deepseek_vl_hybrid():
    marks = tokenizer("<image_placeholder>", image_token="<image_placeholder>")
    sam = {
        "model_type": "sam_vision_model", "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 64, "patch_size": 4, "mlp_dim": 32, "window_size": 4,
        "global_attn_indexes": [1], "num_pos_feats": 8,
    }  # fmt: skip
    config = hf.DeepseekVLHybridConfig(
        vision_config=SIGLIP, high_res_vision_config=sam, text_config=hf.LlamaConfig(**text_settings(marks)),
        tie_word_embeddings=False, **ids_of(marks, image_token_id="<image_placeholder>"),
    )  # fmt: skip
    high = {"height": 64, "width": 64}
    images = hf.DeepseekVLHybridImageProcessor(size=SQUARE, high_res_size=high, min_size=8)
    processor = hf.DeepseekVLHybridProcessor(images, marks, num_image_tokens=16)
    return hf.DeepseekVLHybridForConditionalGeneration(config), processor


@family("<image_placeholder>")
def janus():
    roles = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    marks = tokenizer(*roles.values(), **roles)
    tower = {name: x for name, x in TOWER.items() if name != "intermediate_size"}
    codes = {
        "embed_dim": 8, "num_embeddings": 32, "base_channels": 32, "latent_channels": 32, "channel_multiplier": [1, 1],
        "num_patches": 4, "projection_dim": 64, "image_token_embed_dim": 64,
    }  # fmt: skip
    config = hf.JanusConfig(
        vision_config=tower | {"projection_dim": 64, "num_image_tokens": 16, "mlp_ratio": 2.0}, vq_config=codes,
        text_config=hf.LlamaConfig(**text_settings(marks)), tie_word_embeddings=False,
        **ids_of(marks, image_token_id="<image_placeholder>"),
    )  # fmt: skip
    images = hf.JanusImageProcessor(size=SQUARE, min_size=8)
    processor = hf.JanusProcessor(images, marks, use_default_system_prompt=False)
    processor.num_image_tokens = 16
    return hf.JanusForConditionalGeneration(config), processor


@family("<image>")
def chameleon():
    marks = tokenizer("<image>", "<racm3:break>", "<eoss>")
    names = ("".join(chr(ord("A") + int(digit)) for digit in str(i)) for i in range(32))
    vocabulary = {f"IMGIMG{name}Z": 20 + i for i, name in enumerate(names)}
    codes = {
        "embed_dim": 8, "num_embeddings": 32, "latent_channels": 32, "resolution": 32, "base_channels": 32,
        "channel_multiplier": [1, 2], "num_res_blocks": 1,
    }  # fmt: skip
    vocabulary |= {"<image>": marks.convert_tokens_to_ids("<image>")}
    settings = text_settings(marks, "head_dim")
    config = hf.ChameleonConfig(**settings, vocabulary_map=vocabulary, vq_config=codes)
    images = hf.ChameleonImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)
    processor = hf.ChameleonProcessor(images, marks, image_seq_length=256)
    return hf.ChameleonForConditionalGeneration(config), processor


@family("<|img|>")
def aria():
    marks = tokenizer("<|img|>", image_token="<|img|>")
    config = hf.AriaConfig(
        vision_config={"model_type": "idefics3_vision", **TOWER},
        text_config=text_settings(marks, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        projector_patch_to_query_dict={16: 4, 64: 8}, **ids_of(marks, image_token_index="<|img|>"),
    )  # fmt: skip
    images = hf.SiglipImageProcessor(size=SQUARE)

    def cut(pictures: list) -> dict[str, Any]:
        pixels = images(pictures, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "pixel_mask": torch.ones(len(pixels), 32, 32, dtype=torch.bool)}

    return hf.AriaForConditionalGeneration(config), by_hand(marks, cut, repeated("<|img|>", 4))


@family("<imgpad>", sizes=((64, 64),))
def got_ocr2():
    marks = tokenizer("<img>", "</img>", "<imgpad>", "<|im_start|>", "<|im_end|>", image_token="<imgpad>")
    tower = {
        "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
        "patch_size": 4, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 32,
    }  # fmt: skip
    config = hf.GotOcr2Config(
        vision_config=tower, text_config=hf.Qwen2Config(**text_settings(marks, "head_dim")), image_seq_length=16,
        **ids_of(marks, image_token_index="<imgpad>"),
    )  # fmt: skip
    images = hf.GotOcr2ImageProcessor(size={"height": 64, "width": 64})

    def cut(pictures: list) -> dict[str, Any]:
        return {"pixel_values": images(pictures, return_tensors="pt")["pixel_values"]}

    return hf.GotOcr2ForConditionalGeneration(config), by_hand(marks, cut, repeated("<imgpad>", 16))


@family("<image>", images=(2, 1, 1), sizes=((32, 32), (64, 32)))
def phi4_multimodal():
    marks = tokenizer("<image>")
    text = text_settings(marks, "head_dim", rope_parameters=ROPE | {"partial_rotary_factor": 1.0})
    hearing = {
        "hidden_size": 32, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 2, "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32, "input_size": 16, "nemo_conv_channels": 32, "audio_token_id": 1,
    }  # fmt: skip
    tower = TOWER | {"crop_size": 32, "feature_layer": -1, **ids_of(marks, image_token_id="<image>")}
    config = hf.Phi4MultimodalConfig(
        **text, original_max_position_embeddings=1024, vision_config=tower, audio_config=hearing
    )
    images = hf.Phi4MultimodalImageProcessor(size=SQUARE, patch_size=8, dynamic_hd=4)

    def pixels(pictures: list) -> dict[str, Any]:
        made = dict(images(pictures, return_tensors="pt"))
        return {name: x for name, x in made.items() if name != "num_img_tokens"}  # of crops of 448 pixels

    def repeat(texts: list[str], made: dict[str, Any]) -> list[str]:
        """2 x 2 tokens a tile, and 2 x 2 of the thumbnail, one more behind each row, and one between the two."""
        tiles = (made["image_sizes"] // 32).tolist() if made else []
        counts = iter([2 * h * (2 * w + 1) + 7 for h, w in tiles])
        pieces = [text.split("<image>") for text in texts]
        return [first + "".join("<image>" * next(counts) + x for x in rest) for first, *rest in pieces]

    return hf.Phi4MultimodalForCausalLM(config), by_hand(marks, pixels, repeat)


# Pictures beside the tokens


@family("", images=(1, 1, 1), ragged=False)  # padding moves its positions
def git():
    marks = tokenizer()
    config = hf.GitConfig(
        vision_config=TOWER, vocab_size=len(marks), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=256,
        pad_token_id=0,
    )  # fmt: skip
    images = clip()
    process = by_hand(marks, lambda pictures: dict(images(pictures, return_tensors="pt")), lambda texts, _: texts)
    return hf.GitForCausalLM(config), process


@family("", images=(1, 1, 1), first_position=1)
def kosmos2():
    marks = tokenizer("<image>", "</image>", *(f"<patch_index_{i:04d}>" for i in range(4)))
    text = {
        "vocab_size": len(marks), "max_position_embeddings": 256, "embed_dim": 64, "layers": 2, "ffn_dim": 96,
        "attention_heads": 4, "dropout": 0.0, "attention_dropout": 0.0, "pad_token_id": 0,
    }  # fmt: skip
    config = hf.Kosmos2Config(text_config=text, vision_config=TOWER, latent_query_num=4)
    images = clip()

    def repeat(texts: list[str], _: dict[str, Any]) -> list[str]:
        return ["<image>" + "<unk>" * 4 + "</image>" + text for text in texts]

    inner = by_hand(marks, lambda pictures: dict(images(pictures, return_tensors="pt")), repeat)

    def process(**named: Any) -> dict[str, Any]:
        made = inner(**named)
        return made | {"image_embeds_position_mask": (made["input_ids"] == marks.unk_token_id).long()}

    return hf.Kosmos2ForConditionalGeneration(config), process


def blip(kind: str, **processors: Any) -> tuple[Any, Any]:
    marks = tokenizer("<image>", image_token="<image>")
    text = hf.OPTConfig(
        vocab_size=len(marks), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
        word_embed_proj_dim=64, max_position_embeddings=256, pad_token_id=0, bos_token_id=3, eos_token_id=1,
        dropout=0.0,
    )  # fmt: skip
    queries = VISION | {
        "encoder_hidden_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "vocab_size": 150,
    }  # fmt: skip
    config = getattr(hf, f"{kind}Config")(
        vision_config=TOWER, qformer_config=queries, text_config=text, num_query_tokens=4,
        **ids_of(marks, image_token_index="<image>"),
    )  # fmt: skip
    images = hf.BlipImageProcessor(size=SQUARE)
    processor = getattr(hf, f"{kind}Processor")(images, marks, num_query_tokens=4, **processors)
    processor.image_token = AddedToken("<image>", normalized=False, special=True)
    return getattr(hf, f"{kind}ForConditionalGeneration")(config), processor


@family("", images=(1, 1, 1))
def blip2():
    return blip("Blip2")


@family("", images=(1, 1, 1))
def instructblip():
    model, processor = blip("InstructBlip", qformer_tokenizer=tokenizer("<image>"))

    def process(text: list[str], **named: Any) -> dict[str, Any]:
        """The processor pads the questions of the Q-Former on the left, like the prompts; that moves its positions."""
        right = processor.qformer_tokenizer(text, padding=True, padding_side="right", return_tensors="pt")
        questions = {f"qformer_{name}": right[name] for name in ("input_ids", "attention_mask")}
        return dict(processor(text=text, **named)) | questions

    process.raw = processor
    return model, process


@family("<|image|>", nested=True, images=(1, 1, 1), sizes=((64, 32), (32, 32), (64, 64)), ragged=False,
        completion={"cross_attention_mask": None})  # fmt: skip
def mllama():
    """Text before a picture attends to all pictures alike, padding too: one picture each, so that there is none."""
    marks = tokenizer("<|image|>", "<|python_tag|>", image_token="<|image|>")
    ratios = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
    tower = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2,
        "intermediate_size": 64, "vision_output_dim": 64, "image_size": 32, "patch_size": 8, "max_num_tiles": 4,
        "intermediate_layers_indices": [0], "supported_aspect_ratios": ratios,
    }  # fmt: skip
    layers = {"num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": ROPE}
    config = hf.MllamaConfig(
        vision_config=tower, text_config=text_settings(marks, "head_dim", **layers),
        **ids_of(marks, image_token_index="<|image|>"),
    )  # fmt: skip
    processor = hf.MllamaProcessor(hf.MllamaImageProcessor(size=SQUARE, max_image_tiles=4), marks)
    return hf.MllamaForConditionalGeneration(config), processor


@family("<image>", nested=True, images=(2, 1, 1), completion={"image_attention_mask": None})
def idefics1():
    marks = tokenizer("<image>", "<fake_token_around_image>")
    config = hf.IdeficsConfig(
        vocab_size=len(marks), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        cross_layer_interval=1, alpha_initializer="ones", bos_token_id=3, eos_token_id=1, pad_token_id=0,
        max_position_embeddings=256,
        vision_config={name: x for name, x in TOWER.items() if name != "hidden_size"} | {"embed_dim": 32},
    )  # fmt: skip
    images = clip()
    (token,) = ids_of(marks, image="<image>").values()

    def process(text: list[str], images_: list[list], **_: Any) -> dict[str, Any]:
        found = dict(marks(list(text), padding=True, return_tensors="pt"))
        found.pop("token_type_ids", None)
        pixels = torch.zeros(len(text), max(1, *map(len, images_)), 3, 32, 32)
        for i, row in enumerate(images_):
            if row:
                pixels[i, : len(row)] = images(row, return_tensors="pt")["pixel_values"]
        shown = (found["input_ids"] == token).cumsum(dim=1)
        mask = torch.nn.functional.one_hot(shown, pixels.shape[1] + 1)[..., 1:]
        return found | {"pixel_values": pixels, "image_attention_mask": mask}

    model = hf.IdeficsForVisionText2Text(config)
    return model, lambda text, images=None, **named: process(text, images or [[]] * len(text), **named)
