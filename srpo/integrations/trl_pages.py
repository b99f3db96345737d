"""Pages of a run: every N steps rollouts with their credit as a page, as JSON lines, and where metrics are reported."""

import importlib
import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers.trainer_callback import TrainerCallback

from srpo.errors import ConfigWarning, IncompatibleVersionError
from srpo.integrations.trl_pictures import Shown, shown_pictures
from srpo.roles import RoleParse
from srpo.rollout import CreditedRollout
from srpo.viz import CreditRecord, append_records, credit_figure, credit_html, credit_records
from srpo.viz.lines import append_lines
from srpo.viz.record import plain
from srpo.viz.run_log import FOLDER, METRICS, ROLLOUTS

_MOST_ROLLOUTS = 16  # on a page, in whole groups: more is not read
_ANSWER_COLUMNS = ("solution", "answer", "ground_truth")


class CreditLog(TrainerCallback):
    """Write what a run did with its credit, from the main process, under `output_dir/credit`.

    step_0000.html ...  rollouts of a step
    rollouts.jsonl      the same rollouts, a line each
    metrics.jsonl       what the trainer logs, so that a run that is killed has it

    Args:
        every: steps from one page to the next.
        output_dir: of the trainer.
    """

    def __init__(self, every: int, output_dir: str) -> None:
        self.every, self.folder, self._next = every, Path(output_dir, FOLDER), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep what an earlier run left, under another name: a run that starts anew is no part of it."""
        if state.is_world_process_zero and state.global_step == 0 and self.folder.exists():
            names = (self.folder.with_name(f"{FOLDER}.{n}") for n in range(1, 10_000))
            self.folder.rename(next(name for name in names if not name.exists()))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Append what is logged."""
        if state.is_world_process_zero and logs:
            row = {name: plain(x) for name, x in logs.items() if isinstance(x, int | float | str)}
            self._try(append_lines, METRICS, [json.dumps(row | {"step": state.global_step})])

    def is_due(self, step: int) -> bool:
        """Say whether the rollouts of this step are written: the first, and the first after each N steps."""
        return step >= self._next

    def write(
        self, trainer: Any, inputs: list[dict[str, Any]], output: Mapping[str, Any], credited: CreditedRollout,
        advantages: Tensor, mask: Tensor, rewards: Tensor, shown: Shown | None,
    ) -> None:  # fmt: skip
        """Write the rollouts of this rank with the widest spread of rewards, in whole groups.

        Args:
            trainer: an SRPOTrainer.
            inputs: examples of the dataset, a row each.
            output: what the trainer made of them.
            credited: what `credit_rollout` returned.
            advantages: `[B]`, before any weight.
            mask: `[B, T]`, of sampled tokens.
            rewards: `[B]`.
            shown: what the rollouts were generated from.
        """
        step = trainer.state.global_step
        self._next = (step // self.every + 1) * self.every
        rows = _chosen(rewards, trainer.num_generations)
        records = _records(trainer, rows, inputs, output, credited, advantages, mask, rewards, shown)
        page = credit_html(records, title=f"Token credit at step {step}", method=_name_of(trainer.args.credit))
        self._try(lambda path, text: text.save(path), f"step_{step:04d}.html", page)
        self._try(append_records, ROLLOUTS, records)
        _report(trainer, page, records, step)

    def _try(self, function: Any, name: str, content: Any) -> None:
        """Write a file, or say why not: no run ends because its disk is full."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            function(self.folder / name, content)
        except OSError as error:
            message = f"SRPOTrainer(): log_credit_steps could not write {self.folder / name}: {error}"
            warnings.warn(message, ConfigWarning, stacklevel=2)


def _name_of(credit: Any) -> str:
    return credit.upper() if isinstance(credit, str) else "SRPO"


def _chosen(rewards: Tensor, size: int) -> list[int]:
    """Return rows of groups, those of the widest spread of rewards first."""
    groups = [list(range(i, min(i + size, len(rewards)))) for i in range(0, len(rewards), size)]
    known = rewards.nan_to_num(0.0).tolist()
    groups.sort(key=lambda rows: min(known[i] for i in rows) - max(known[i] for i in rows))
    n = max(1, _MOST_ROLLOUTS // size)
    return [i for rows in groups[:n] for i in rows]


def _records(
    trainer: Any, rows: list[int], inputs: list[dict[str, Any]], output: Mapping[str, Any],
    credited: CreditedRollout, advantages: Tensor, mask: Tensor, rewards: Tensor, shown: Shown | None,
) -> list[CreditRecord]:  # fmt: skip
    def own(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[rows].detach().cpu()

    roles, streams = credited.roles, cast(Any, credited.streams)  # what `score_streams` returns, a tuple
    pictures, corrupted = shown_pictures(trainer, shown, rows, trainer.credit.corruption)
    answers = [next((str(inputs[i][k]) for k in _ANSWER_COLUMNS if inputs[i].get(k) is not None), "") for i in rows]
    return credit_records(
        output["completion_ids"][rows].cpu(),
        getattr(trainer.processing_class, "tokenizer", trainer.processing_class),
        credited.weights[rows].detach().cpu(),
        completion_mask=own(mask),
        roles=None if roles is None else RoleParse(*(x[rows].cpu() for x in roles)),
        streams=None if streams is None else type(streams)(*map(own, streams)),
        credit=trainer.credit.credit_at(trainer.state.global_step),
        advantages=own(advantages),
        rewards=own(rewards),
        group_ids=torch.tensor([i // trainer.num_generations for i in rows]),
        prompts=[_text_of(inputs[i]["prompt"]) for i in rows],
        answers=answers,
        images=pictures,
        corrupted_images=corrupted if "corrupted" in trainer.credit.streams_at(trainer.state.global_step) else None,
        step=trainer.state.global_step,
    )


def _text_of(prompt: Any) -> str:
    """Return the text of a prompt, which may be a conversation."""
    if isinstance(prompt, str):
        return prompt
    texts = []
    for message in prompt:
        content = message.get("content") or ""
        parts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
        texts.append("".join(parts))
    return "\n\n".join(filter(None, texts))


def _report(trainer: Any, page: str, records: list[CreditRecord], step: int) -> None:
    """Hand the page to W&B and trackio, and a picture of the best and the worst rollout to TensorBoard."""
    named = {"train/global_step": step}
    for name in {"wandb", "trackio"} & set(trainer.args.report_to):
        tracker = importlib.import_module(name)
        if hasattr(tracker, "Html") and (name != "wandb" or tracker.run is not None):
            tracker.log({"srpo/credit": tracker.Html(str(page), inject=False), **named})
    for callback in trainer.callback_handler.callbacks:
        writer = getattr(callback, "tb_writer", None)
        if writer is not None:
            ranked = sorted(records, key=lambda x: -(x.reward or 0.0))
            try:
                writer.add_image("srpo/credit", _pixels([ranked[0], ranked[-1]]), step, dataformats="HWC")
            except IncompatibleVersionError as error:
                warnings.warn(f"SRPOTrainer(): TensorBoard gets no picture of credit: {error}", stacklevel=2)


def _pixels(records: list[CreditRecord]) -> Any:
    """Return a picture of rollouts, uint8 `[H, W, 3]`."""
    import numpy as np
    from PIL import Image

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # an emoji is a box here, and itself on the page
        credit_figure(records).savefig(file, dpi=150)
    return np.asarray(Image.open(file).convert("RGB"))
