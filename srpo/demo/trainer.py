"""What `python -m srpo demo --trainer trl` runs: the demo's model and task in TRL's trainer, with `SRPOTrainer`."""

import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from srpo.demo.loop import progress_bar, seconds_and_memory, warmed_up, write_page
from srpo.demo.task import (
    IMAGE_TOKENS,
    MAX_COMPLETION_LENGTH,
    QUESTION,
    SPECIAL,
    TinyVLM,
    answers,
    draw_examples,
)

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
from datasets import Dataset, disable_progress_bars

from srpo.integrations.trl import SRPOConfig, SRPOTrainer
from srpo.viz import CreditPage
from srpo.viz.table import signed

PROMPTS, ROLLOUTS = 8, 8
LEARNING_RATE = 3e-4
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<|user|><|vision_start|><image>"
    "<|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}<|assistant|>"
)


class DemoProcessor(transformers.ProcessorMixin):
    """The demo's tokenizer and image processor as TRL wants them: one picture a prompt."""

    attributes = ("image_processor", "tokenizer")

    def __init__(self, vlm: TinyVLM) -> None:
        self.image_processor, self.tokenizer, self.family = vlm.image_processor, vlm.tokenizer, vlm.family
        self.chat_template, self.image_token = TEMPLATE, "<image>"
        self.image_token_id = vlm.tokenizer.convert_tokens_to_ids("<image>")

    def __call__(self, images: Any = None, text: Any = None, *_: Any, **options: Any) -> transformers.BatchFeature:
        """Tokenize prompts, whose `<image>` stands for a whole picture, and process the pictures."""
        texts = [text] if isinstance(text, str) else list(text)
        spread = [x.replace("<image>", "<image>" * IMAGE_TOKENS) for x in texts]
        tokens = self.tokenizer(spread, padding=True, padding_side="left", return_tensors=options.get("return_tensors"))
        flat = [x[0] if isinstance(x, (list, tuple)) else x for x in images or []]
        pixels = {}
        if flat:
            nested = [[image] for image in flat] if self.family == "idefics3" else flat
            pixels = dict(self.image_processor(nested, return_tensors=options.get("return_tensors")))
            pixels.pop("pixel_attention_mask", None)  # every pixel is valid
        known = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], **pixels}
        if self.family.startswith("qwen"):
            is_image = [[int(i == self.image_token_id) for i in row] for row in known["input_ids"]]
            known["mm_token_type_ids"] = torch.tensor(is_image) if isinstance(known["input_ids"], Tensor) else is_image
        return transformers.BatchFeature(known)


class Bar(transformers.TrainerCallback):
    """Show the steps of a trainer on a progress bar, with its latest reward."""

    def __init__(self, console: Console, steps: int) -> None:
        self.progress, self.steps = progress_bar(console), steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.start()
        self.task = self.progress.add_task("SRPOTrainer", total=self.steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "reward" in logs:
            self.progress.update(self.task, completed=state.global_step, description=f"reward {logs['reward']:.2f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.stop()


def run(family: str, steps: int, seed: int, page: Path) -> None:
    """Warm a model up, train it with `SRPOTrainer`, print what the trainer logged, and write the page of the end."""
    start = time.perf_counter()
    disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)  # between TRL and transformers
    console, vlm, generator = warmed_up(family, seed, PROMPTS, ROLLOUTS, "srpo.integrations.trl.SRPOTrainer")
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(vlm, steps, seed, generator, folder)
        trainer.add_callback(Bar(console, steps))
        trainer.train()
        last = max(Path(folder, "credit").glob("step_*.html"))
        text = last.read_text(encoding="utf-8")
    console.print(table_of([row for row in trainer.state.log_history if "reward" in row]))
    write_page(console, CreditPage(text), page)
    console.print(seconds_and_memory(start))


def make_trainer(
    vlm: TinyVLM, steps: int, seed: int, generator: torch.Generator, folder: str, credit: str = "srpo"
) -> SRPOTrainer:
    """Build the trainer, with held-out pictures as its data set."""
    examples = draw_examples(PROMPTS * steps, generator, held_out=True)
    question = [{"role": "user", "content": QUESTION}]
    columns = {"prompt": [question] * len(examples), "image": [x.image for x in examples]}
    columns |= {"left": [x.left for x in examples], "right": [x.right for x in examples]}
    banned = [index for index in range(len(SPECIAL)) if index != vlm.tokenizer.eos_token_id]
    config = SRPOConfig(
        output_dir=folder, max_steps=steps, seed=seed, credit=credit, learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", per_device_train_batch_size=PROMPTS * ROLLOUTS, num_generations=ROLLOUTS,
        max_completion_length=MAX_COMPLETION_LENGTH, generation_kwargs={"suppress_tokens": banned}, bf16=False,
        use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, log_level="error", log_credit_steps=max(1, steps - 1),
    )  # fmt: skip
    trainer = SRPOTrainer(
        model=vlm.model, reward_funcs=is_right, args=config, train_dataset=Dataset.from_dict(columns),
        processing_class=DemoProcessor(vlm),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def is_right(completions: list[Any], left: list[int], right: list[int], **_: Any) -> list[float]:
    """Reward the right sum with 1."""
    texts = [x[0]["content"] if isinstance(x, list) else x for x in completions]
    return [float(answers(text, a + b)) for text, a, b in zip(texts, left, right, strict=True)]


def table_of(log: list[dict[str, float]]) -> Table:
    """Average what the trainer logged over tenths of the run."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for heading in ("steps", "reward", "grad", "parsed", "weights", "perception", "reasoning", "length"):
        table.add_column(heading, justify="right")
    n = -(-len(log) // 10)
    for first in range(0, len(log), n):
        rows = log[first : first + n]
        contrasts = [
            signed(_mean(rows, *(f"srpo/{role}/{sign}/contrast_mean" for sign in ("positive", "negative"))), 2)
            for role in ("perception", "reasoning")
        ]
        table.add_row(
            f"{first + 1}-{first + len(rows)}", f"{_mean(rows, 'reward'):.2f}", f"{_mean(rows, 'grad_norm'):.3f}",
            f"{1 - _mean(rows, 'srpo/parse_failures'):.0%}",
            f"{_mean(rows, 'srpo/weight_min'):.2f}-{_mean(rows, 'srpo/weight_max'):.2f}", *contrasts,
            f"{_mean(rows, 'completions/mean_length'):.1f}",
        )  # fmt: skip
    table.caption = "perception, reasoning: mean contrast of these tokens in nats"
    return table


def _mean(rows: list[dict[str, float]], *names: str) -> float:
    """Average metrics over the steps that logged them."""
    known = [row[name] for row in rows for name in names if name in row]
    return sum(known) / len(known) if known else float("nan")
