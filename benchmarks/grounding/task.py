"""The task of learn_grounding.py: two handwritten digits, an operation on them, and a hint that one may copy instead.

    picture, "+ hint 7"  ->  <perception> the left one 3 then 4 </perception> <think> so 3 + 4 = 7 </think>
                             <answer> 7 </answer>

Pictures come from scikit-learn's digits. The hint is right more often than by chance in training and never at test, so
a policy may earn reward by copying it, or by reading the picture. Everything is a batch of tensors.
"""

from functools import cache
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from srpo import Role, role_ids_from_completions

TAGS = ("<perception>", "</perception>", "<think>", "</think>", "<answer>", "</answer>")
OPERATIONS = ("+", "-", "max")  # + and - modulo 10
FILLERS = ("the", "left", "one", "then", "here", "so", "now", "looks")
WORDS = ("<pad>", "<eos>", *TAGS, *map(str, range(10)), *OPERATIONS, "=", "hint", *FILLERS)
ID = {word: index for index, word in enumerate(WORDS)}
PAD, EOS, ZERO, PLUS = ID["<pad>"], ID["<eos>"], ID["0"], ID["+"]

SIDE = 8  # pixels of a digit
HELD_OUT = 400  # pictures for tests, the same for every seed; the others are for warm start and rollouts
LENGTH = 24  # completion tokens at most; the longest demonstration has 23
MOST_FILLERS = (3, 3, 2)  # before the left digit, the right digit, and in the reasoning
DIGIT_NOISE, HINT_COPIES = 0.15, 0.15  # of demonstrations


class Digits(NamedTuple):
    """Pictures `[n, 8, 8]` in [0, 1], their labels `[n]`, and which of the data set they are `[n]`."""

    pixels: Tensor
    labels: Tensor
    index: Tensor


class Problems(NamedTuple):
    """A batch of prompts: pictures `[N, 1, 8, 16]` normalised to [-1, 1], and what is asked, each `[N]`."""

    pixels: Tensor
    left: Tensor
    right: Tensor
    operation: Tensor
    hint: Tensor

    @property
    def answer(self) -> Tensor:
        return apply(self.operation, self.left, self.right)

    @property
    def prompt_ids(self) -> Tensor:
        return torch.stack([PLUS + self.operation, torch.full_like(self.hint, ID["hint"]), ZERO + self.hint], 1)

    def rows(self, index: Tensor | slice) -> "Problems":
        return Problems(*(x[index] for x in self))


class Reading(NamedTuple):
    """What completions say: roles `[N, T]`, well-formed `[N]`, the answer `[N]` (-1: none), and labels per token.

    `stated` `[N, 2]` are the columns of the two digits of the perception (-1: not exactly two).
    """

    role_ids: Tensor
    parsed: Tensor
    answer: Tensor
    stated: Tensor


class WordTokenizer:
    """The two methods that role parsing needs."""

    def __len__(self) -> int:
        return len(WORDS)

    def decode(self, ids: list[int], **_: bool) -> str:
        return " ".join(WORDS[i] for i in ids)


TOKENIZER = WordTokenizer()


@cache
def digits(held_out: bool) -> Digits:
    """Return the digits of training, or those that no training ever sees."""
    data = load_digits()
    shuffled = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    index = shuffled[-HELD_OUT:] if held_out else shuffled[:-HELD_OUT]
    pixels, labels = torch.from_numpy(data.images / 16).float(), torch.from_numpy(data.target).long()
    return Digits(pixels[index], labels[index], index)


def apply(operation: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Compute the answers of operations 0 (+), 1 (-), 2 (max)."""
    results = torch.stack([(left + right) % 10, (left - right) % 10, torch.maximum(left, right)])
    return results.gather(0, operation[None]).squeeze(0)


def draw(n: int, generator: torch.Generator, *, held_out: bool, p_hint: float) -> Problems:
    """Draw problems whose hint is right with probability `p_hint` and uniform otherwise."""
    source = digits(held_out)
    pick = torch.randint(len(source.labels), (2, n), generator=generator)
    left, right = source.labels[pick]
    operation = torch.randint(len(OPERATIONS), (n,), generator=generator)
    told = torch.rand(n, generator=generator) < p_hint
    hint = torch.where(told, apply(operation, left, right), torch.randint(10, (n,), generator=generator))
    pixels = torch.cat(source.pixels[pick].unbind(), dim=-1)[:, None] * 2 - 1
    return Problems(pixels, left, right, operation, hint)


def demonstrations(problems: Problems, generator: torch.Generator) -> Tensor:
    """Write a completion `[N, LENGTH]` for each problem, with wrong digits, copied hints and random fillers.

    What is computed follows from the digits that are stated, right or wrong, or is the hint.
    """
    n = len(problems.left)
    wrong = torch.rand(2, n, generator=generator) < DIGIT_NOISE
    random = torch.randint(10, (2, n), generator=generator)
    left, right = torch.where(wrong, random, torch.stack([problems.left, problems.right]))
    copies = torch.rand(n, generator=generator) < HINT_COPIES
    result = torch.where(copies, problems.hint, apply(problems.operation, left, right))

    columns: list[Tensor] = []
    kept: list[Tensor] = []

    def write(*tokens: Tensor | str) -> None:
        for token in tokens:
            columns.append(torch.full((n,), ID[token]) if isinstance(token, str) else token)
            kept.append(torch.ones(n, dtype=torch.bool))

    def write_fillers(most: int) -> None:
        count = torch.randint(most + 1, (n,), generator=generator)
        for i in range(most):
            columns.append(ID[FILLERS[0]] + torch.randint(len(FILLERS), (n,), generator=generator))
            kept.append(i < count)

    write("<perception>")
    write_fillers(MOST_FILLERS[0])
    write(ZERO + left)
    write_fillers(MOST_FILLERS[1])
    write(ZERO + right, "</perception>", "<think>")
    write_fillers(MOST_FILLERS[2])
    write(ZERO + left, PLUS + problems.operation, ZERO + right, "=", ZERO + result)
    write("</think>", "<answer>", ZERO + result, "</answer>", "<eos>")
    written, keep = torch.stack(columns, 1), torch.stack(kept, 1)
    order = (~keep).long().argsort(dim=1, stable=True)
    ids = written.masked_fill(~keep, PAD).gather(1, order)
    return torch.nn.functional.pad(ids, (0, LENGTH - ids.shape[1]), value=PAD)


def sums(n: int, generator: torch.Generator) -> Tensor:
    """Write `<think> left operation right = result` `[n, 6]` for random digits."""
    left, right = torch.randint(10, (2, n), generator=generator)
    operation = torch.randint(len(OPERATIONS), (n,), generator=generator)
    think, equals = (torch.full((n,), ID[word]) for word in ("<think>", "="))
    result = ZERO + apply(operation, left, right)
    return torch.stack([think, ZERO + left, PLUS + operation, ZERO + right, equals, result], 1)


def read(ids: Tensor, mask: Tensor) -> Reading:
    """Parse completions `[N, T]`."""
    parse = role_ids_from_completions(ids, TOKENIZER, completion_mask=mask)
    columns = torch.arange(ids.shape[1])
    seen = is_digit(ids) & (parse.role_ids == Role.PERCEPTION)
    stated = torch.stack([(seen & (seen.cumsum(1) == k)).long().argmax(1) for k in (1, 2)], 1)
    stated = torch.where((seen.sum(1) == 2)[:, None], stated, -1)
    opened = ((ids == ID["<answer>"]) & mask).long()
    after = (opened.argmax(1) + 1).clamp(max=ids.shape[1] - 1)[:, None]
    token = ids.gather(1, after).squeeze(1)
    answered = opened.any(1) & is_digit(token) & mask.gather(1, after).squeeze(1) & (columns[-1] >= after.squeeze(1))
    return Reading(parse.role_ids, parse.parsed, torch.where(answered, token - ZERO, -1), stated)


def is_digit(ids: Tensor) -> Tensor:
    """Mark digits."""
    return (ids >= ZERO) & (ids < ZERO + 10)


def is_filler(ids: Tensor) -> Tensor:
    """Mark words that say nothing."""
    return (ids >= ID[FILLERS[0]]) & (ids <= ID[FILLERS[-1]])
