"""Families that cut pictures into patches of a grid: Qwen's and its relatives, GLM, Ernie, Gemma 4."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from families.harness import ROPE, TOWER, VISION, by_hand, family, ids_of, text_settings, tokenizer, without_video

SIZES = ((32, 32), (24, 32), (16, 32))
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
MROPE = {**ROPE, "mrope_section": [2, 3, 3]}
QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_TOKENS = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}  # fmt: skip
QWEN_IDS = {f"{name}_id": token for name, token in QWEN_TOKENS.items()}
QWEN_TOWER = {
    "depth": 2, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "hidden_size": 32, "intermediate_size": 64,
}  # fmt: skip
WINDOWS = {"window_size": 16, "fullatt_block_indexes": [1]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def patches(name: str = "Qwen2VL", temporal: int | None = 2, shortest: int = 64, **settings: Any) -> Any:
    """The image processor of Qwen2-VL, or a relative's, which resizes no picture between 8 and 64 pixels."""
    size = {"shortest_edge": shortest, "longest_edge": 128 * shortest if shortest > 64 else 4096}
    frames = {} if temporal is None else {"temporal_patch_size": temporal}
    return getattr(hf, f"{name}ImageProcessor")(patch_size=4, merge_size=2, size=size, **frames, **settings)


def qwen(
    name: str, model: str, processor: str, tower: dict, text: dict, *, without: tuple = (), images: Any = None,
    tokens: dict = QWEN_TOKENS, ids: dict = QWEN_IDS, **config: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """A model whose pictures are patches `[n, C * t * p * p]` with a grid; classes by their names."""
    marks = tokenizer(*dict.fromkeys([*tokens.values(), *ids.values()]), **tokens)
    made = getattr(hf, f"{name}Config")(
        vision_config=tower, text_config=text_settings(marks, *without, **text), **ids_of(marks, **ids), **config
    )
    return getattr(hf, model)(made), without_video(getattr(hf, processor))(images or patches(), marks, None)


@family(QWEN, sizes=SIZES)
def qwen2_vl():
    tower = {name: x for name, x in QWEN_TOWER.items() if name not in ("out_hidden_size", "intermediate_size")}
    tower |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    text = {"rope_parameters": MROPE}
    return qwen("Qwen2VL", "Qwen2VLForConditionalGeneration", "Qwen2VLProcessor", tower, text, without=("head_dim",))


@family(QWEN, sizes=SIZES)
def qwen2_5_vl():
    names = ("Qwen2_5_VL", "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor")
    return qwen(*names, QWEN_TOWER | WINDOWS, {"rope_parameters": MROPE})


def qwen3(name: str, tower: dict, text: dict, **rope: Any) -> tuple[Any, Any]:
    text = {"rope_parameters": {**MROPE, "mrope_interleaved": True, **rope}, **text}
    tower = QWEN_TOWER | {"num_position_embeddings": 64} | tower
    model = f"{name}ForConditionalGeneration"
    return qwen(name, model, "Qwen3VLProcessor", tower, text, images=patches(**HALF), tie_word_embeddings=False)


@family(QWEN, sizes=SIZES)
def qwen3_vl():
    return qwen3("Qwen3VL", {"deepstack_visual_indexes": [0]}, {})


@family(QWEN, sizes=SIZES)
def qwen3_vl_moe():
    text = {**EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return qwen3("Qwen3VLMoe", {"deepstack_visual_indexes": [0]}, text)


@family(QWEN, sizes=SIZES, state=True)
def qwen3_5():
    return qwen3("Qwen3_5", {}, LINEAR, partial_rotary_factor=1.0)


@family(QWEN, sizes=SIZES, state=True)
def qwen3_5_moe():
    return qwen3(
        "Qwen3_5Moe", {}, LINEAR | EXPERTS | {"shared_expert_intermediate_size": 32}, partial_rotary_factor=1.0
    )


@family(QWEN, sizes=SIZES)
def exaone4_5():
    text = {
        "sliding_window": 4096, "sliding_window_pattern": None, "model_type": "exaone4",
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    names = ("Exaone4_5_", "Exaone4_5_ForConditionalGeneration", "Exaone4_5_Processor")
    tower = QWEN_TOWER | WINDOWS | {"num_key_value_heads": 1}
    return qwen(*names, tower, text, without=("head_dim",), images=patches(**HALF))


@family(QWEN, sizes=SIZES)
def hyperclova():
    text = {"model_type": "hyperclovax", "attention_multiplier": 0.25, "logits_scaling": 2.0}
    tower = QWEN_TOWER | WINDOWS | {"model_type": "qwen2_5_vl_vision"}
    model = "HyperCLOVAXVisionV2ForConditionalGeneration"
    return qwen("HyperCLOVAXVisionV2", model, "Qwen2_5_VLProcessor", tower, text, images=patches(**HALF))


@family(QWEN, sizes=SIZES)
def paddleocr():
    names = ("PaddleOCRVL", "PaddleOCRVLForConditionalGeneration", "PaddleOCRVLProcessor")
    tower = VISION | {"image_size": 32, "patch_size": 4, "spatial_merge_size": 2}
    return qwen(*names, tower, {"rope_parameters": MROPE}, images=patches("PaddleOCRVL", 1))


@family("<|image_pad|>", sizes=SIZES)
def video_llama3():
    names = ("VideoLlama3", "VideoLlama3ForConditionalGeneration", "VideoLlama3Processor")
    images = patches("VideoLlama3", None)
    return qwen(*names, VISION | {"patch_size": 4}, {"model_type": "qwen2"}, without=("head_dim",), images=images)


@family("]<]image[>[", sizes=SIZES)
def minimax3():
    tower = VISION | {"image_size": 32, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    text = {
        "num_local_experts": 4, "num_experts_per_tok": 2, "dense_intermediate_size": 64, "rotary_dim": 8,
        "shared_intermediate_size": 32, "mlp_layer_types": ["dense", "sparse"], "index_n_heads": 2,
        "index_head_dim": 16, "index_block_size": 8, "index_topk_blocks": 16, "layer_types": ["full_attention"] * 2,
    }  # fmt: skip
    ids = {"image_token_index": "]<]image[>[", "video_token_index": "]<]video[>["}
    model = "MiniMaxM3VLForConditionalGeneration"
    model = model if hasattr(hf, model) else "MiniMaxM3SparseForConditionalGeneration"
    return qwen(
        "MiniMaxM3VL", model, "MiniMaxM3VLProcessor", tower, text, images=patches("MiniMaxM3VL"), ids=ids,
        tokens={"image_token": "]<]image[>["}, projector_hidden_size=64, merged_hidden_size=256,
    )  # fmt: skip


@family(QWEN, sizes=SIZES, state=True)
def lfm3():
    tower = VISION | {"num_key_value_heads": 1, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    tower |= {"layer_types": ["conv", "full_attention"]}
    text = {"layer_types": ["conv", "sliding_attention"], "sliding_window": 256, "conv_L_cache": 3}
    return qwen(
        "Lfm3Vl", "Lfm3VlForConditionalGeneration", "Lfm3VlProcessor", tower, text, images=patches(**HALF),
        ids={f"{kind}_token_id": f"<|{kind}_pad|>" for kind in ("image", "video")}, projector_hidden_size=64,
    )  # fmt: skip


@family("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>", sizes=SIZES)
def ernie():
    tokens = {
        f"{kind}_{part}token": f"<|{kind.upper()}_{mark}|>"
        for kind in ("image", "video")
        for part, mark in (("start_", "START"), ("end_", "END"), ("", "PLACEHOLDER"))
    }
    tower = {
        name: QWEN_TOWER[name] for name in ("depth", "hidden_size", "num_heads", "patch_size", "intermediate_size")
    }
    text = {
        "rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}, "moe_intermediate_size": [32, 16], "moe_k": 2,
        "moe_num_experts": 4, "moe_num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"],
    }  # fmt: skip
    return qwen(
        "Ernie4_5_VLMoe", "Ernie4_5_VLMoeForConditionalGeneration", "Ernie4_5_VLMoeProcessor",
        tower | {"spatial_merge_size": 2, "temporal_merge_size": 2}, text, without=("head_dim",), tokens=tokens,
        images=patches("Ernie4_5_VLMoe", None), ids={f"{name}_id": token for name, token in tokens.items()},
    )  # fmt: skip


@family("<img_s><img_t><img_e>", sizes=SIZES, batch_positions=True)
def hunyuan():
    tokens = {"image_token": "<img_t>", "image_start_token": "<img_s>", "image_end_token": "<img_e>"}
    tokens |= {"image_newline_token": "<img_n>", "im_newline_token": "<img_n>"}
    ids = {"image_token_id": "<img_t>", "im_start_id": "<img_s>", "im_end_id": "<img_e>", "im_newline_id": "<img_n>"}
    tower = VISION | {
        "num_key_value_heads": 2, "out_hidden_size": 64, "text_hidden_size": 64, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 1, "max_image_size": 64, "min_image_size": 16,
    }  # fmt: skip
    names = ("HunYuanVL", "HunYuanVLForConditionalGeneration", "HunYuanVLProcessor")
    sections = {"mrope_section": [2] * 4, "xdrope_section": [2] * 4}
    text = {"rope_parameters": ROPE | sections}
    return qwen(*names, tower, text, images=patches("HunYuanVL", 1), tokens=tokens, ids=ids)


@family("<|vision_bos|><|IMAGE|><|vision_eos|>", sizes=SIZES)
def qwen2_5_omni():
    names = {"image": "<|IMAGE|>", "video": "<|VIDEO|>", "audio": "<|AUDIO|>"}
    marks = tokenizer("<|vision_bos|>", "<|vision_eos|>", "<|audio_bos|>", "<|audio_eos|>", *names.values())
    ids = {f"{kind}_token_{what}": token for kind, token in names.items() for what in ("id", "index")}
    ids |= {"vision_start_token_id": "<|vision_bos|>", "vision_end_token_id": "<|vision_eos|>"}
    ids |= {"audio_start_token_id": "<|audio_bos|>", "audio_end_token_id": "<|audio_eos|>"}
    config = hf.Qwen2_5OmniThinkerConfig(
        vision_config=QWEN_TOWER | WINDOWS,
        audio_config={
            "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "output_dim": 64,
        },
        text_config=text_settings(marks, "head_dim", rope_parameters=MROPE, init_std=0.02),
        **ids_of(marks, **ids),
    )  # fmt: skip
    images = patches()

    def repeat(texts: list[str], made: dict[str, Any]) -> list[str]:
        counts = iter((made["image_grid_thw"].prod(1) // 4).tolist() if made else ())
        split = [text.split("<|IMAGE|>") for text in texts]
        return ["".join([first, *("<|IMAGE|>" * next(counts) + x for x in rest)]) for first, *rest in split]

    process = by_hand(marks, lambda pictures: dict(images(pictures, return_tensors="pt")), repeat)
    return hf.Qwen2_5OmniThinkerForConditionalGeneration(config), process


# GLM

GLM_MARKS = {
    f"{kind}{part}_token": f"<|{mark}{kind}|>"
    for kind in ("image", "video")
    for part, mark in (("", ""), ("_start", "begin_of_"), ("_end", "end_of_"))
}
GLM = "<|begin_of_image|><|image|><|end_of_image|>"


def glm(name: str, processor: str, text: dict, images: str = "Glm4v", **tower: Any) -> tuple[Any, Any]:
    rope = {**MROPE, "partial_rotary_factor": 1.0}
    return qwen(
        name, f"{name}ForConditionalGeneration", f"{processor}Processor", QWEN_TOWER | {"image_size": 32} | tower,
        {"rope_parameters": rope} | text, images=patches(images, shortest=128),
        tokens={name: GLM_MARKS[name] for name in ("image_token", "video_token")},
        ids={f"{name}_id": token for name, token in GLM_MARKS.items()},
    )  # fmt: skip


@family(GLM, sizes=SIZES)
def glm4v():
    return glm("Glm4v", "Glm4v", {"model_type": "glm4v_text"})


@family(GLM, sizes=SIZES)
def glm4v_moe():
    experts = {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    }  # fmt: skip
    return glm("Glm4vMoe", "Glm4v", {"model_type": "glm4v_moe_text"} | experts)


@family(GLM, sizes=SIZES)
def glm46v():
    return glm("Glm46V", "Glm46V", {"model_type": "glm4v_text"}, "Glm46V", model_type="glm4v_vision")


@family(GLM, sizes=SIZES)
def glm_ocr():
    return glm("GlmOcr", "Glm46V", {"model_type": "glm_ocr_text"}, "Glm46V", model_type="glm_ocr_vision")


# Patches in a padded row for each picture


def _gemma4(attention: str | None) -> tuple[Any, Any]:
    roles = {"image_token": "<img>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    roles |= {"audio_token": "<aud>", "boa_token": "<boa>", "eoa_token": "<eoa>"}
    marks = tokenizer("<|video|>", *roles.values(), **roles)
    text = text_settings(
        marks, layer_types=["sliding_attention", "full_attention"], sliding_window=512, global_head_dim=16,
        vocab_size_per_layer_input=len(marks), hidden_size_per_layer_input=8, num_kv_shared_layers=0,
        use_bidirectional_attention=attention, final_logit_softcapping=30.0,
    )  # fmt: skip
    tower = VISION | {
        "num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2, "patch_size": 8,
        "position_embedding_size": 64, "default_output_length": 16,
    }  # fmt: skip
    ids = {"image_token_id": "<img>", "boi_token_id": "<boi>", "eoi_token_id": "<eoi>", "video_token_id": "<|video|>"}
    config = hf.Gemma4Config(
        text_config=text, vision_config=tower, audio_config=None, tie_word_embeddings=False, **ids_of(marks, **ids)
    )
    images = hf.Gemma4ImageProcessor(patch_size=8, pooling_kernel_size=2, max_soft_tokens=70)
    processor = without_video(hf.Gemma4Processor)(None, images, marks, None, image_seq_length=70)
    return hf.Gemma4ForConditionalGeneration(config), processor


@family("<img>", nested=True, sizes=((64, 32), (32, 32)))
def gemma4():
    return _gemma4(None)


@family("<img>", nested=True, sizes=((64, 32), (32, 32)))
def gemma4_bidirectional():
    return _gemma4("vision")


def _lfm2(split: bool) -> tuple[Any, Any]:
    grid = [f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)]
    roles = {
        "image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>",
        "image_thumbnail": "<|img_thumbnail|>",
    }  # fmt: skip
    marks = tokenizer(*roles.values(), *grid, **roles)
    text = hf.Lfm2Config(**text_settings(
        marks, "head_dim", layer_types=["conv", "full_attention"], block_multiple_of=16, rope_parameters=ROPE,
        block_auto_adjust_ff_dim=False,
    ))  # fmt: skip
    tower = {
        "model_type": "siglip2_vision_model",
        **VISION,
        "num_patches": 64,
        "patch_size": 8,
        "vision_use_head": False,
    }
    config = hf.Lfm2VlConfig(
        vision_config=tower, text_config=text, downsample_factor=2, projector_hidden_size=64,
        tie_word_embeddings=False, **ids_of(marks, image_token_id="<image>"),
    )  # fmt: skip
    images = hf.Lfm2VlImageProcessor(
        encoder_patch_size=8, downsample_factor=2, do_image_splitting=split, tile_size=32, min_tiles=2, max_tiles=4,
        use_thumbnail=True, min_image_tokens=1, max_image_tokens=16, max_num_patches=64, max_pixels_tolerance=2.0,
    )  # fmt: skip
    return hf.Lfm2VlForConditionalGeneration(config), hf.Lfm2VlProcessor(images, marks)


@family("<image>", nested=True, images=(2, 1, 1), sizes=((64, 64), (32, 32), (32, 64)), state=True)
def lfm2_vl():
    return _lfm2(split=False)


@family("<image>", nested=True, images=(2, 1, 1), sizes=((128, 64), (32, 32), (64, 128)), state=True)
def lfm2_vl_split():
    return _lfm2(split=True)


@family("|SPEAKER|")
def fuyu():
    marks = tokenizer("|SPEAKER|", "|NEWLINE|", "<0x04>", "<s>", "<0x00>", "<0x01>", "<0x02>", "<0x03>")
    text = text_settings(
        marks, "head_dim", "num_key_value_heads", rope_parameters={**ROPE, "partial_rotary_factor": 0.5},
        model_type="persimmon", qk_layernorm=True,
    )  # fmt: skip
    config = hf.FuyuConfig(
        text_config=text, image_size=32, patch_size=8, vocab_size=len(marks), hidden_size=64,
        **ids_of(marks, image_token_id="|SPEAKER|"),
    )  # fmt: skip
    rows = hf.CLIPImageProcessor(size=TOWER["image_size"], do_resize=False, do_center_crop=False, image_mean=[0.5] * 3,
                                 image_std=[0.5] * 3)  # fmt: skip

    def cut(pictures: list) -> dict[str, Any]:
        pixels: torch.Tensor = rows(pictures, return_tensors="pt")["pixel_values"]
        tiles = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1)
        return {"image_patches": tiles.reshape(len(pictures), 16, -1)}

    def repeat(texts: list[str], _: dict[str, Any]) -> list[str]:
        return [text.replace("|SPEAKER|", ("|SPEAKER|" * 4 + "|NEWLINE|") * 4) for text in texts]

    return hf.FuyuForCausalLM(config), by_hand(marks, cut, repeat)
