"""TRL trainers of tiny vision-language models, offline: structured completions of random text, drawn from a seed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}

import tiny_vlms
import torch
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.data_utils import apply_chat_template, prepare_multimodal_messages

from srpo import PatchMask, corrupt_images
from srpo.integrations.trl import SRPOConfig, SRPOTrainer

LETTERS = "0123456789abcdefghijklmnop "


def make_dataset(n: int = 16, images: tuple[int, ...] = (1,)) -> Dataset:
    """Prompts with so many pictures each, in turn."""
    rows = range(n)
    pictures = [[tiny_vlms.picture(9, seed=3 * i + j) for j in range(images[i % len(images)])] for i in rows]
    prompts = [[{"role": "user", "content": f"how many squares? {i}"}] for i in rows]
    return Dataset.from_dict({"prompt": prompts, "images": pictures})


def reward(completions: list, **_: Any) -> list[float]:
    """Count the even letters."""
    texts = [x[0]["content"] if isinstance(x, list) else x for x in completions]
    return [sum(c in "02468ace" for c in text) / 10 for text in texts]


class Rollouts:
    """Draw completions from prompt, place in the group, and step: the same on every rank, and after a resume."""

    def __init__(self, tools: bool = False, truncated: int = 0) -> None:
        self.tools, self.truncated = tools, truncated

    def __call__(self, prompts: list, trainer: GRPOTrainer) -> dict[str, Any]:
        places: dict[str, int] = {}
        ids, masks = [], []
        for prompt in prompts:
            content = prompt[-1]["content"]
            question = content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
            place = places[question] = places.get(question, -1) + 1
            row, mask = self.completion(f"{question} {place} {trainer.state.global_step}", trainer, question)
            ids.append(row)
            masks.append(mask)
        output = {"prompt_ids": [list(x) for x in trainer._tokenize_prompts(prompts)[0]], "completion_ids": ids}
        return output | {"logprobs": None} | ({"env_mask": masks} if self.tools else {})

    def completion(self, key: str, trainer: GRPOTrainer, question: str) -> tuple[list[int], list[int]]:
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "little")
        generator = torch.Generator().manual_seed(seed)
        tokenizer = trainer.processing_class.tokenizer

        def text() -> str:
            n = int(torch.randint(2, 7, (), generator=generator))
            return "".join(LETTERS[i] for i in torch.randint(len(LETTERS), (n,), generator=generator))

        parts = (
            [("<see>" + text() + "</see>", 1), ("tool: 17", 0)] if self.tools else [("<see>" + text() + "</see>", 1)]
        )
        parts += [("<think>" + text() + "</think>", 1)]
        rows = [(tokenizer(part, add_special_tokens=False)["input_ids"], own) for part, own in parts]
        cut = self.truncated and int(question.rpartition(" ")[2]) % self.truncated == 0
        rows += [] if cut else [([tokenizer.eos_token_id], 1)]
        return [i for row, _ in rows for i in row], [own for row, own in rows for _ in row]


class StopAfter(TrainerCallback):
    """Stop a run as if it were killed after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step


def make_trainer(
    cls: type, folder: Path, family: str = "idefics3", *, rollouts: Rollouts | None = None,
    images: tuple[int, ...] = (1,), stop: int | None = None, vlm: tuple[Any, Any] | None = None,
    data: Dataset | None = None, **settings: Any,
) -> GRPOTrainer:  # fmt: skip
    """Build a trainer of 4 prompts and 4 rollouts a step."""
    model, processor = tiny_vlms.build(family) if vlm is None else vlm
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 48,
        "max_steps": 3, "learning_rate": 1e-3, "report_to": "none", "bf16": False, "use_cpu": True,
        "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no", "seed": 7, "disable_tqdm": True,
        "log_level": "error", "beta": 0.0,
    } | settings  # fmt: skip
    data = make_dataset(images=images) if data is None else data
    config = SRPOConfig if issubclass(cls, SRPOTrainer) else GRPOConfig
    trainer = cls(
        model=model.train(), reward_funcs=reward, args=config(**settings), train_dataset=data,
        processing_class=processor, rollout_func=rollouts or Rollouts(), callbacks=[StopAfter(stop)] if stop else None,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def column(trainer: GRPOTrainer, name: str) -> list[float]:
    """The logged values of a metric."""
    return [row[name] for row in trainer.state.log_history if name in row]


def trained(*arguments: Any, **settings: Any) -> Any:
    """Build a trainer, which seeds the generators, and train."""
    trainer = make_trainer(*arguments, **settings)
    trainer.train()
    return trainer


def same_run(a: GRPOTrainer, b: GRPOTrainer, metrics: tuple[str, ...] = ("loss", "grad_norm")) -> None:
    """Compare losses and final weights bit for bit."""
    for name in metrics:
        assert column(a, name), name
        assert column(a, name) == column(b, name), name
    for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(x, y)


PICTURES = (
    "pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes", "image_position_ids",
)  # fmt: skip


class Checked(SRPOTrainer):
    """Remember the examples of a rollout, the streams, and what TRL itself says of both kinds of pictures."""

    def _generate_and_score_completions(self, inputs):
        self.examples = list(inputs)
        return super()._generate_and_score_completions(inputs)

    def _score(self, output, role_ids, credit):
        self.output, self.roles = dict(output), role_ids
        self.streams = super()._score(output, role_ids, credit)
        self.own, self.without_pictures = self.logps(output), self.logps(output | self.by_hand(output))
        return self.streams

    @torch.no_grad()
    def logps(self, output):
        """TRL's own log-probs of what it calls the model with."""
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        names = (*PICTURES, "mm_token_type_ids", "token_type_ids", "num_images", "num_tiles")
        given = {name: output[name] for name in names if name in output}
        return self._get_per_token_logps_and_entropies(
            self.model.eval(), ids, mask, output["completion_ids"].shape[1], **given
        )[0]

    def by_hand(self, output):
        """Corrupt and process the pictures of each rollout, all of them, without looking for equal ones."""
        texts, images, processor = [], [], self.processing_class
        for example in self.examples:
            messages = prepare_multimodal_messages(example["prompt"], images=example["images"])
            texts.append(apply_chat_template({"prompt": messages}, processor)["prompt"])
            images += corrupt_images([example["images"]], PatchMask(), seed=texts[-1:], processor=processor)
        made = processor(images=images, text=texts, padding=True, return_tensors="pt")
        return {name: made[name] for name in PICTURES if name in made}
