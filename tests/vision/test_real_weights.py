"""The guide's recipe for published weights, where they are on the disk already; nothing is downloaded."""

import importlib.util
import json

import pytest
import tiny_vlms
import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from tiny_vlms import picture

from srpo import score_streams

MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"


def test_streams_of_published_weights():
    if not isinstance(try_to_load_from_cache(MODEL, "config.json"), str):
        pytest.skip(f"the weights of {MODEL} are not on this disk")
    try:
        processor = transformers.AutoProcessor.from_pretrained(MODEL, local_files_only=True)
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            MODEL, dtype=torch.bfloat16, local_files_only=True
        )
    except (ImportError, OSError) as error:
        pytest.skip(f"{MODEL} does not load here: {error}")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    content = [{"type": "image"}, {"type": "text", "text": "How many squares are there?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[picture(3, size=224)], return_tensors="pt").to(model.device)
    completion = processor.tokenizer("<perception> three red squares </perception> <answer> 3 </answer>").input_ids
    ids = torch.tensor([completion], device=model.device)
    roles = torch.ones_like(ids)
    roles[:, -6:] = 2
    full = dict(inputs)
    full["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    full["attention_mask"] = torch.ones_like(full["input_ids"])
    if "mm_token_type_ids" in full:
        full["mm_token_type_ids"] = torch.nn.functional.pad(full["mm_token_type_ids"], (0, ids.shape[1]))
    streams = score_streams(
        model, full.pop("input_ids"), full.pop("attention_mask"), ids.shape[1], role_ids=roles, **full
    )
    contrast = streams.logps - streams.corrupted_logps
    assert streams.logps.isfinite().all()
    assert contrast[roles == 1].abs().max() > 0.01


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is here")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_which_processors_load_without_torchvision(family, tmp_path):
    """As the guide says it: those of families that take videos do not."""
    processor = tiny_vlms.build(family)[1]
    if "qwen" not in family:
        processor.save_pretrained(tmp_path)
        assert transformers.AutoProcessor.from_pretrained(tmp_path).image_processor is not None
        return
    for half in (processor.tokenizer, processor.image_processor):
        half.save_pretrained(tmp_path)
    name = {"qwen25vl": "Qwen2_5_VLProcessor", "qwen3vl": "Qwen3VLProcessor"}[family]
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": name}))
    with pytest.raises(ImportError, match="Torchvision"):
        transformers.AutoProcessor.from_pretrained(tmp_path)
