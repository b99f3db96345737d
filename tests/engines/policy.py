"""A small policy that knows the format of its responses, as a directory that engines load, and its rows of data.

    python -m engines.policy qwen25vl DIRECTORY [--steps 250] [--wide_heads]

One of `tiny_vlms`, taught by supervision to look, think and answer on pictures of squares, so that sampled responses
have roles and rewards differ. Run it with the packages of the engine: what it saves is theirs to read.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import random
from pathlib import Path
from typing import Any

import tiny_vlms
import torch
from PIL import Image

SIDE = 56  # pixels: a multiple of the 28 to which ms-swift and verl resize for Qwen-VL
QUESTION = "squares+1?"


def picture(index: int) -> tuple[Image.Image, int]:
    """Draw a picture, and say how many squares it has."""
    rng = random.Random(index)
    count, colour = rng.randint(1, 5), rng.choice(list(tiny_vlms.COLOURS))
    return tiny_vlms.picture(count, SIDE, seed=index, colour=colour), count


def response(count: int, rng: random.Random) -> str:
    """Write one of several responses that are right."""
    look = rng.choice([f"{count} squares", f"i see {count}", f"{count}"])
    think = rng.choice([f"{count}+1", f"{count}+1={count + 1}"])
    return f"<perception>{look}</perception><think>{think}</think><answer>{count + 1}</answer><eos>"


def prompt_of(processor: Any) -> str:
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def build(family: str) -> tuple[Any, Any]:
    """Build the model and its processor, the whole of it where torchvision is at hand."""
    model, processor = tiny_vlms.build(family)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    if family.startswith("qwen") and importlib.util.find_spec("torchvision") is not None:
        from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

        kinds = {"qwen25vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor)}
        whole, video = kinds.get(family, (Qwen3VLProcessor, Qwen3VLVideoProcessor))
        videos = video(patch_size=4, temporal_patch_size=2, merge_size=2)
        images, tokenizer, template = processor.image_processor, processor.tokenizer, processor.chat_template
        processor = whole(images, tokenizer, videos, chat_template=template)
    return model, processor


def with_wide_heads(model: Any) -> Any:
    """Return a model with half as many heads, twice as wide: vLLM on a CPU has none of less than 32."""
    config = model.config
    text = config.text_config
    text.num_attention_heads, text.num_key_value_heads = text.num_attention_heads // 2, text.num_key_value_heads // 2
    text.head_dim = text.hidden_size // text.num_attention_heads
    rope = dict(text.rope_parameters)
    text.rope_parameters = rope | {"mrope_section": [2 * n for n in rope["mrope_section"]]}
    return type(model)(config)


def teach(model: Any, processor: Any, steps: int) -> float:
    """Train on responses; return the last loss."""
    prompt, rng = prompt_of(processor), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        drawn = [picture(rng.randrange(10**6)) for _ in range(16)]
        texts = [prompt + response(count, rng) for _, count in drawn]
        batch = processor(text=texts, images=[[image] for image, _ in drawn], padding=True, return_tensors="pt")
        n = len(processor(text=[prompt], images=[[drawn[0][0]]], return_tensors="pt")["input_ids"][0])
        mask = batch["attention_mask"]
        own = mask.cumsum(dim=1) > n  # prompts are alike but for their pictures, and pictures are of one size
        loss = model(**batch, labels=torch.where(own & (mask != 0), batch["input_ids"], -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def write_rows(folder: Path, n: int) -> None:
    """Write pictures, and lines of `messages`, `images` and `solution` that ms-swift reads."""
    lines = []
    for index in range(n):
        image, count = picture(index)
        image.save(folder / f"{index}.png")
        ask = {"role": "user", "content": f"<image>{QUESTION}"}
        row = {"messages": [ask], "images": [str(folder / f"{index}.png")], "solution": str(count + 1)}
        lines.append(json.dumps(row))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


def write_parquet(folder: Path, n: int) -> None:
    """Write the same rows as verl reads them."""
    from datasets import Dataset

    made = []
    for index in range(n):
        image, count = picture(index)
        file = io.BytesIO()
        image.save(file, "PNG")
        made.append(
            {
                "data_source": "squares",
                "prompt": [{"role": "user", "content": f"<image>{QUESTION}"}],
                "images": [{"bytes": file.getvalue(), "path": None}],
                "ability": "count",
                "reward_model": {"style": "rule", "ground_truth": str(count + 1)},
                "extra_info": {"index": index, "split": "train"},
            }
        )
    Dataset.from_list(made).to_parquet(str(folder / "train.parquet"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=tiny_vlms.FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--wide_heads", action="store_true", help="for vLLM, of Qwen2.5-VL")
    given = parser.parse_args()
    torch.manual_seed(0)
    model, processor = build(given.family)
    if given.wide_heads:
        settings = model.generation_config
        model = with_wide_heads(model)
        model.generation_config = settings
    loss = teach(model.train(), processor, given.steps)
    model.eval().save_pretrained(given.folder)
    processor.save_pretrained(given.folder)
    write_rows(given.folder, 32)
    write_parquet(given.folder, 32)
    print(f"taught {given.family}: loss {loss:.3f}")


if __name__ == "__main__":
    main()
