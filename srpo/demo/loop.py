"""What `python -m srpo demo` runs: SRPO updates of a small vision-language model, and a look at who got the credit.

Each step samples rollouts, parses their roles, scores the three streams without a gradient and updates the policy with
`role_weighted_grpo_loss`. Every number that is printed, or on the page that is written, was computed by that run.
"""

import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

import srpo
from srpo import Role
from srpo.demo.task import (
    MERGE,
    PATCH,
    PROMPT,
    QUESTION,
    Completions,
    Example,
    TinyVLM,
    build_tiny_vlm,
    completion_logits,
    draw_examples,
    model_inputs,
    sample,
    warm_start,
    with_completions,
)
from srpo.vision.scoring import StreamDivergences, StreamLogps, score_streams
from srpo.viz import CreditPage, CreditRecord, credit_html, credit_records, credit_table
from srpo.viz.table import STYLES, signed

WARM_START_STEPS = 200  # at most
PROMPTS, ROLLOUTS = 8, 8
LEARNING_RATE = 3e-4
STEPS_LEGEND = (
    "[dim]perception, reasoning: mean contrast of these tokens in nats. weights: smallest and largest. The loss is "
    "near 0 because the advantages of a group sum to 0 and weights average 1; its gradient (grad: norm) is not.[/]"
)
TOKENS_LEGEND = (
    "[dim]contrast: nats that a token loses when parts of the image are masked (perception) or the perception is "
    "hidden (reasoning). GRPO: its advantage, the same for every token. SRPO: that times the weight, which is positive "
    "and averages 1 over perception and reasoning: sizes change, signs and reward do not.[/]"
)


class Step(NamedTuple):
    """What one update computed, per rollout."""

    examples: list[Example]
    corrupted: list[Any]
    completions: Completions
    roles: srpo.RoleParse
    rewards: Tensor
    advantages: Tensor
    streams: StreamLogps | StreamDivergences
    contrast: Tensor
    output: srpo.LossOutput
    gradient_norm: float
    seconds: float


def run(family: str, steps: int, seed: int, page: Path) -> None:
    """Warm a model up, update it `steps` times with SRPO, print what happened, and write the page."""
    start = time.perf_counter()
    console, vlm, generator = warmed_up(family, seed, PROMPTS, ROLLOUTS, "a loop of its own")
    history = _update(console, vlm, generator, steps)
    records = records_of(vlm, history[-1])
    print_report(console, history, records)
    write_page(console, credit_html(records, title="srpo demo: who got the credit in the last step"), page)
    console.print(seconds_and_memory(start))


def warmed_up(
    family: str, seed: int, prompts: int, rollouts: int, trainer: str
) -> tuple[Console, TinyVLM, torch.Generator]:
    """Build a model, say what is trained on what by what, and teach it the response format."""
    transformers.utils.logging.disable_progress_bar()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # the model is tiny: on a busy machine two threads mostly wait for each other
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    console = Console(highlight=False)
    vlm = build_tiny_vlm(family)
    vlm.model.to("cuda" if torch.cuda.is_available() else "cpu")
    _print_header(console, vlm, prompts, rollouts, trainer)
    _warm_start(console, vlm, generator)
    return console, vlm, generator


def srpo_step(vlm: TinyVLM, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> Step:
    """Sample rollouts, assign token credit and update the policy once."""
    start = time.perf_counter()
    examples = [example for example in draw_examples(PROMPTS, generator, held_out=True) for _ in range(ROLLOUTS)]
    prompts = model_inputs(vlm, examples)
    completions = sample(vlm, prompts)
    inputs = with_completions(vlm, prompts, completions.ids, completions.mask)

    answered = [example.is_answered_by(text) for example, text in zip(examples, completions.texts, strict=True)]
    rewards = torch.tensor(answered, dtype=torch.float32, device=completions.ids.device)
    groups = torch.arange(PROMPTS, device=rewards.device).repeat_interleave(ROLLOUTS)
    advantages = srpo.group_advantages(rewards, groups)

    roles = srpo.role_ids_from_completions(completions.ids, vlm.tokenizer, completion_mask=completions.mask)
    pictures = [example.image for example in examples]
    corrupted = srpo.corrupt_images(pictures, srpo.PatchMask(cell=PATCH * MERGE), seed=[PROMPT] * len(pictures))
    dark = [example._replace(image=picture) for example, picture in zip(examples, corrupted, strict=True)]
    multimodal: dict[str, Any] = dict(inputs)
    streams = score_streams(
        vlm.model,
        multimodal.pop("input_ids"),
        multimodal.pop("attention_mask"),
        completions.ids.shape[1],
        role_ids=roles.role_ids,
        corrupted_inputs={"pixel_values": model_inputs(vlm, dark)["pixel_values"]},
        **multimodal,
    )
    output = srpo.role_weighted_grpo_loss(
        completion_logits(vlm, inputs, completions.ids.shape[1]),
        completions.ids,
        advantages,
        role_ids=roles.role_ids,
        completion_mask=completions.mask,
        old_logps=streams.logps,
        corrupted_logps=streams.corrupted_logps,
        ablated_logps=streams.ablated_logps,
    )
    optimizer.zero_grad()
    output.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(vlm.model.parameters(), 1.0)
    optimizer.step()

    contrast = srpo.role_contrast(
        streams.logps,
        corrupted_logps=streams.corrupted_logps,
        ablated_logps=streams.ablated_logps,
        role_ids=roles.role_ids,
        completion_mask=completions.mask,
    )
    seconds = time.perf_counter() - start
    return Step(
        examples, corrupted, completions, roles, rewards, advantages, streams, contrast, output, norm.item(), seconds
    )


def _warm_start(console: Console, vlm: TinyVLM, generator: torch.Generator) -> None:
    losses: list[float] = []
    with progress_bar(console) as progress:
        task = progress.add_task("warm start", total=WARM_START_STEPS)
        for loss in warm_start(vlm, generator, WARM_START_STEPS):
            losses.append(loss)
            progress.update(task, advance=1, description=f"warm start, loss {losses[0]:.2f} to {loss:.3f}")
        progress.update(task, total=len(losses))


def _update(console: Console, vlm: TinyVLM, generator: torch.Generator, steps: int) -> list[Step]:
    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=LEARNING_RATE)
    history: list[Step] = []
    with progress_bar(console) as progress:
        for _ in progress.track(range(steps), description="SRPO updates"):
            history.append(srpo_step(vlm, optimizer, generator))
    return history


def progress_bar(console: Console) -> Progress:
    """Return a bar with a description, a count and the time."""
    description = TextColumn("{task.description:<32}")
    return Progress(description, BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), console=console)


# ---- what is printed ----


def _print_header(console: Console, vlm: TinyVLM, prompts: int, rollouts: int, trainer: str) -> None:
    parameters = sum(parameter.numel() for parameter in vlm.model.parameters())
    rows = {
        "model": f"{vlm.model.config.model_type}, {parameters:,} parameters, built from a config, no download",
        "task": "two scikit-learn digits in a picture: what is the sum ?",
        "rollouts": f"{prompts} pictures x {rollouts} samples a step, reward 1 for the right answer",
        "trainer": trainer,
        "device": f"{vlm.model.device.type}, torch {torch.__version__}",
    }
    console.rule("[bold]srpo demo[/]: role-aware token credit", align="left")
    for name, value in rows.items():
        console.print(f"[bold]{name:<10}[/]{value}")
    console.print()


def print_report(console: Console, history: list[Step], records: list[CreditRecord]) -> None:
    """Print a line for each step, and the tokens of one rollout of the last step."""
    row = _row_to_show(history[-1])
    console.print(_steps_table(history), STEPS_LEGEND, "", _rollout_card(history[-1], row), "", sep="\n")
    console.print(credit_table(records[row]), TOKENS_LEGEND, "", sep="\n")


def records_of(vlm: TinyVLM, step: Step) -> list[CreditRecord]:
    """Return the rollouts of a step with their credit, as they are drawn."""
    n = len(step.examples)
    return credit_records(
        step.completions.ids,
        vlm.tokenizer,
        step.output.weights,
        completion_mask=step.completions.mask,
        roles=step.roles,
        streams=step.streams,
        advantages=step.advantages,
        rewards=step.rewards,
        group_ids=torch.arange(n, device=step.rewards.device) // ROLLOUTS,
        prompts=[QUESTION.strip()] * n,
        answers=[str(example.left + example.right) for example in step.examples],
        images=[example.image for example in step.examples],
        corrupted_images=step.corrupted,
    )


def write_page(console: Console, page: CreditPage, path: Path) -> None:
    """Write a page, or say why it could not be written."""
    try:
        place = page.save(path).resolve()
    except OSError as error:
        console.print(f"[bold]page[/]  not written: {error}; pass --page PATH", soft_wrap=True)
        return
    console.print(f"[bold]page[/]  {place}", soft_wrap=True)


def _steps_table(history: list[Step]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for heading in ("step", "reward", "parsed", "loss", "grad", "weights"):
        table.add_column(heading, justify="right")
    for role in (Role.PERCEPTION, Role.REASONING):
        table.add_column(role.name.lower(), justify="right", style=STYLES[role])
    table.add_column("time", justify="right")
    for number, step in enumerate(history, start=1):
        role_ids, weights = step.roles.role_ids, step.output.weights
        credited = weights[(role_ids != Role.OTHER) & step.roles.parsed[:, None]]
        table.add_row(
            str(number),
            f"{step.rewards.mean():.2f}",
            f"{step.roles.parsed.float().mean():.0%}",
            f"{step.output.loss:+.4f}",
            f"{step.gradient_norm:.3f}",
            f"{credited.min():.2f}-{credited.max():.2f}" if credited.numel() else "none",
            *(signed(float(step.contrast[role_ids == role].mean()), 2) for role in (Role.PERCEPTION, Role.REASONING)),
            f"{step.seconds:.1f} s",
        )
    return table


def _row_to_show(step: Step) -> int:
    """Choose the well-formed rollout with the largest advantage."""
    well_formed = step.roles.parsed & ~step.roles.unclosed
    return int(torch.where(well_formed, step.advantages, -torch.inf).argmax())


def _rollout_card(step: Step, row: int) -> Table:
    example = step.examples[row]
    facts = Text.assemble(
        ("One rollout of the last step\n\n", "bold"),
        f"what is the sum ?  {example.left} + {example.right}\n\n",
        f"reward     {step.rewards[row]:.0f}\n",
        f"advantage  {step.advantages[row]:+.3f}\n",
        ("           GRPO gives it to every token", "dim"),
    )
    card = Table.grid(padding=(0, 4, 0, 0))
    card.add_row(_picture(example), facts)
    return card


def _picture(example: Example) -> Text:
    """Draw the picture with one pair of characters for each pixel of the original digits."""
    pixels = np.asarray(example.image.convert("L").resize((16, 8)))
    shades = " ░▒▓█"
    lines = ["".join(2 * shades[int(value) * len(shades) // 256] for value in row) for row in pixels]
    return Text("\n".join(lines))


def seconds_and_memory(start: float) -> str:
    """Say how long the run took, and the largest resident memory of this process so far, libraries included."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts KiB on Linux, bytes on macOS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    return f"[bold]{time.perf_counter() - start:.1f} s[/] after imports, peak memory [bold]{peak:,.0f} MiB[/]"
