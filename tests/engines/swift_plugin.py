"""A plugin of ms-swift for `policy.py`: its templates, a reward, and a look over the trainer's shoulder.

What `SRPOTrainer` makes of each micro-batch is compared with `score_streams` on the same rollouts, in the same process,
with pixels that the processor makes of corrupted pictures; differences are printed as `probe {...}`.
"""

import json
import re
from typing import Any

import torch
from swift.rewards import ORM, orms
from swift.template import TemplateMeta, register_template
from swift.template.templates.llava import LlavaHfTemplate
from swift.template.templates.qwen import Qwen2_5VLTemplate
from swift.template.vision_utils import load_image

from srpo import corrupt_images, role_contrast, role_ids_from_completions, score_streams, token_weights
from srpo.config import CreditConfig
from srpo.integrations.swift import SRPOTrainer

_TURN = {"prefix": [], "prompt": ["<|user|>{{QUERY}}<|assistant|>"], "chat_sep": ["<eos>"], "suffix": ["<eos>"]}


class SmallQwen(Qwen2_5VLTemplate):
    """The template of Qwen2.5-VL, whose picture tokens are those of the tokenizer."""

    image_token_id = property(lambda self: self.tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    video_token_id = property(lambda self: self.tokenizer.convert_tokens_to_ids("<|video_pad|>"))


register_template(TemplateMeta("small_qwen", template_cls=SmallQwen, **_TURN))
register_template(TemplateMeta("small_llava", template_cls=LlavaHfTemplate, **_TURN))


class IsRight(ORM):
    def __call__(self, completions: list[str], solution: list[str], **_: Any) -> list[float]:
        answers = [(re.findall(r"<answer>(.*?)</answer>", text) or [""])[-1] for text in completions]
        return [float(answer == right) for answer, right in zip(answers, solution, strict=True)]


orms["is_right"] = IsRight
_weigh = SRPOTrainer._weigh


def weigh(trainer: Any, samples: list[Any], inputs: dict[str, Any], batch: Any) -> dict[str, float]:
    before, credit = batch.advantages, trainer.credit.credit_at(trainer.state.global_step)
    metrics = _weigh(trainer, samples, inputs, batch)
    if isinstance(credit, CreditConfig):
        print("probe", json.dumps(differences(trainer, samples, inputs, batch, before, credit)), flush=True)
    return metrics


def differences(
    trainer: Any, samples: list[Any], inputs: dict[str, Any], batch: Any, before: torch.Tensor, credit: CreditConfig
) -> dict[str, Any]:
    """Return the largest difference of each stream and of the advantages from those of `score_streams`."""
    ids, attention, mask = inputs["input_ids"], inputs["attention_mask"], batch.completion_mask != 0
    T = mask.shape[1]
    roles = role_ids_from_completions(ids[:, -T:], trainer.template.tokenizer, completion_mask=mask).role_ids
    prompts = [json.dumps(x.messages[:-1], default=str) for x in samples]
    pictures = [[load_image(x["path"] if isinstance(x, dict) else x) for x in sample.images] for sample in samples]
    processor = trainer.template.processor
    dark = corrupt_images(pictures, trainer.credit.corruption, seed=prompts, processor=processor)
    made = processor.image_processor(images=[x for row in dark for x in row], return_tensors="pt")
    names = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
    pixels = {name: inputs[name] for name in names if name in inputs}
    streams = score_streams(
        trainer.model, ids, attention, T, role_ids=roles, credit=credit, ablation="delete",
        corrupted_inputs={"pixel_values": made["pixel_values"]}, **pixels,
    )  # fmt: skip
    weights = token_weights(
        role_contrast(
            streams.logps, corrupted_logps=streams.corrupted_logps, ablated_logps=streams.ablated_logps,
            role_ids=roles, completion_mask=mask, credit=credit,
        ), roles, mask, credit=credit,
    )  # fmt: skip
    wanted = before * weights

    def largest(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b)[mask].abs().max())

    return {
        "old": largest(batch.old_per_token_logps, streams.logps),
        "advantages": largest(batch.advantages, wanted),
        "of": float(wanted[mask].abs().max()),
        "changed": int(((batch.advantages - before)[mask].abs() > 1e-4).sum()),
        "parsed": float(((roles == 1).any(dim=1) & (roles == 2).any(dim=1)).float().mean()),
    }


SRPOTrainer._weigh = weigh
