"""Show what scoring three streams costs: plain forwards of the model against `score_streams`.

    python benchmarks/bench_scoring.py [--repeats 5] [--batch 8] [--completion 96]

The model is a Qwen2.5-VL of six layers with random weights; a quarter of a completion is perception, most of the rest
reasoning. Columns, head rows and images are counted by hooks while a case runs.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import transformers
from measure import measure
from tabulate import tabulate

from srpo import PatchMask, PixelLayout, score_streams

IMAGE, VISION_START, VISION_END, VIDEO = 5, 6, 7, 8  # ids
SIDE, PATCH, MERGE = 16, 4, 2  # patches per side of a picture, pixels per patch, patches per side of an image token
VOCABULARY, HIDDEN = 8000, 256


def build() -> transformers.Qwen2_5_VLForConditionalGeneration:
    """Build the model from a config."""
    vision = {
        "depth": 6, "hidden_size": 192, "intermediate_size": 512, "num_heads": 4, "out_hidden_size": HIDDEN,
        "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2, "window_size": 32,
        "fullatt_block_indexes": [2, 5],
    }  # fmt: skip
    text = {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 768, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e4},
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=VISION_START, vision_end_token_id=VISION_END, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def make_inputs(B: int, T: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the inputs of the model, one picture a sequence, and the roles of the completions."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(10, VOCABULARY, (B, 12), generator=generator)
    image = torch.tensor([[VISION_START, *[IMAGE] * (SIDE // MERGE) ** 2, VISION_END]]).expand(B, -1)
    ids = torch.cat([image, prompt, torch.randint(10, VOCABULARY, (B, T), generator=generator)], dim=1)
    roles = torch.zeros(B, T, dtype=torch.long)
    roles[:, 1 : T // 4], roles[:, T // 4 + 1 : T - 8] = 1, 2
    pixels = torch.randn(B * SIDE**2, 3 * 2 * PATCH**2, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, SIDE, SIDE]] * B),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }, roles


@torch.no_grad()
def plain(model, inputs: dict[str, torch.Tensor], roles: torch.Tensor, **options) -> None:
    """Run the three contexts through the model as it is."""
    T = roles.shape[1]
    corrupted = PatchMask().on_inputs(inputs, PixelLayout.of_model(model), generator=0)
    hidden = torch.cat([inputs["attention_mask"][:, :-T], (roles != 1).long()], dim=1)
    for context in (inputs, corrupted, inputs | {"attention_mask": hidden}):
        logits = model(**context, use_cache=False, **options).logits[:, -T - 1 : -1]
        logits.float().log_softmax(-1).gather(-1, inputs["input_ids"][:, -T:, None])


def ours(model, inputs: dict[str, torch.Tensor], roles: torch.Tensor) -> None:
    """Run `score_streams`."""
    rest = dict(inputs)
    ids, mask = rest.pop("input_ids"), rest.pop("attention_mask")
    score_streams(model, ids, mask, roles.shape[1], role_ids=roles, generator=0, **rest)


def counted(model, case: Callable[[], None]) -> tuple[int, int, int]:
    """Run a case; return columns through the decoder, rows through the head, and pictures through the tower."""
    from srpo_kernels import linear_head

    columns = rows = pictures = 0

    def decoder(_module, arguments, keywords):
        nonlocal columns
        columns += keywords["inputs_embeds"].shape[0] * keywords["inputs_embeds"].shape[1]

    def head(_module, _arguments, logits):
        nonlocal rows
        rows += logits.shape[0] * logits.shape[1]

    def tower(_module, arguments, keywords):
        nonlocal pictures
        pictures += len(keywords.get("grid_thw", arguments[1] if len(arguments) > 1 else ()))

    inner = linear_head.score

    def counting_score(*arguments):
        nonlocal rows
        rows += int(arguments[3].sum())
        return inner(*arguments)

    hooks = [
        model.model.language_model.register_forward_pre_hook(decoder, with_kwargs=True),
        model.lm_head.register_forward_hook(head),
        model.model.visual.register_forward_pre_hook(tower, with_kwargs=True),
    ]
    linear_head.score = counting_score
    try:
        case()
    finally:
        linear_head.score = inner
        for hook in hooks:
            hook.remove()
    return columns, rows, pictures


def main() -> None:
    """Time and count the cases, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--completion", type=int, default=96)
    options = parser.parse_args()
    model = build()
    inputs, roles = make_inputs(options.batch, options.completion)
    cases = {
        "three forwards": partial(plain, model, inputs, roles),
        "three forwards, logits_to_keep": partial(plain, model, inputs, roles, logits_to_keep=options.completion + 1),
        "score_streams": partial(ours, model, inputs, roles),
    }
    counts = {name: counted(model, case) for name, case in cases.items()}
    results = measure(cases, torch.device("cpu"), options.repeats)
    first = next(iter(results.values())).median
    table = [[name, r.median, first / r.median, *counts[name], r.peak] for name, r in results.items()]
    headers = ["case", "ms", "x first", "decoder columns", "head rows", "pictures", "peak MiB"]
    print(f"B={options.batch} T={options.completion} prompt={inputs['input_ids'].shape[1] - options.completion}, CPU")
    print(tabulate(table, headers, floatfmt=("", ".0f", ".2f", ".0f", ".0f", ".0f", ".0f")))


if __name__ == "__main__":
    main()
