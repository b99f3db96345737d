"""Rewards of a response: its form, and its answer, which math-verify compares."""

import re
from collections.abc import Sequence
from typing import Any

from math_verify import parse, verify

Completion = str | Sequence[dict[str, Any]]
_INSIDE = r"(?:(?!</?(?:perception|think|answer)>).)+"
FORM = re.compile(
    rf"\s*<perception>{_INSIDE}</perception>\s*<think>{_INSIDE}</think>\s*<answer>{_INSIDE}</answer>\s*", re.DOTALL
)


def text_of(completion: Completion) -> str:
    """Return the text of a completion, which TRL hands over as text or as messages."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def format_reward(completions: Sequence[Completion], **_: Any) -> list[float]:
    """Return 1 for perception, thought and answer, each once, in this order, with nothing beside them; else 0."""
    return [float(FORM.fullmatch(text_of(completion)) is not None) for completion in completions]


def answer_reward(completions: Sequence[Completion], answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 where the last `<answer>` is right, as mathematics or word for word; else 0."""
    return [float(is_right(text_of(x), gold)) for x, gold in zip(completions, answer, strict=True)]


def is_right(text: str, gold: str) -> bool:
    """Say whether the last answer of a text is the right one."""
    answers = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if not answers:
        return False
    given, wanted = _bare(answers[-1]), _bare(gold)
    if given.casefold() == wanted.casefold():
        return True
    if len(wanted) == 1 and wanted.isalpha():  # a choice: math-verify would take it for a variable
        return re.sub(r"[().\s]", "", given).casefold() == wanted.casefold()
    return bool(verify(parse(f"${wanted}$"), parse(f"${given}$")))


def _bare(text: str) -> str:
    """Return an answer without the box and the dollars around it."""
    text = text.strip().strip("$").strip()
    boxed = re.fullmatch(r"\\boxed\{(.*)\}", text, re.DOTALL)
    return (boxed[1] if boxed else text).strip().rstrip(".")


# A response of the right form with a wrong answer is worth a little, so that the form is learned first.
REWARDS, REWARD_WEIGHTS = [answer_reward, format_reward], [0.9, 0.1]
