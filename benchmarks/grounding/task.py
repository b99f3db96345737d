"""The task of learn_grounding.py: four handwritten digits, two of which are asked about, and a hint that one may copy.

    picture, "+ second fourth hint 7"
    ->  <perception> here first 1 now looks second 3 third 8 so fourth 4 </perception>
        <think> then second is 3 one fourth is 4 the 3 + 4 = 7 </think> <answer> 7 </answer>

Pictures come from scikit-learn's digits. The hint is right more often than by chance in training and never at test, so
a policy may earn reward by copying it, or by reading the picture. Fillers are drawn from synonyms: most of the entropy
of a response lies in words that do not matter, and two of its four digits do not either. Everything is a batch of
tensors.
"""

from functools import cache
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from srpo import Role, role_ids_from_completions

TAGS = ("<perception>", "</perception>", "<think>", "</think>", "<answer>", "</answer>")
OPERATIONS = ("+", "-", "max")  # + and - modulo 10
PLACES = ("first", "second", "third", "fourth")
FILLERS = ("the", "a", "one", "then", "here", "so", "now", "looks")
WORDS = ("<pad>", "<eos>", *TAGS, *map(str, range(10)), *OPERATIONS, *PLACES, "is", "=", "hint", *FILLERS)
ID = {word: index for index, word in enumerate(WORDS)}
PAD, EOS, ZERO, PLUS, PLACE = ID["<pad>"], ID["<eos>"], ID["0"], ID["+"], ID["first"]

SIDE = 8  # pixels of a digit
DIGITS = len(PLACES)  # of a picture
HELD_OUT = 400  # pictures for tests, the same for every seed; the others are for warm start and rollouts
MOST_FILLERS = 2  # before each digit of the perception, and before each step of the reasoning
LENGTH = 42  # completion tokens at most; the longest demonstration has 41
DIGIT_NOISE, HINT_COPIES = 0.15, 0.15  # of demonstrations


class Digits(NamedTuple):
    """Pictures `[n, 8, 8]` in [0, 1], their labels `[n]`, and which of the data set they are `[n]`."""

    pixels: Tensor
    labels: Tensor
    index: Tensor


class Problems(NamedTuple):
    """A batch of prompts: pictures `[N, 1, 8, 32]` normalised to [-1, 1], and what is asked.

    `digits` `[N, 4]` are the labels, `asked` `[N, 2]` the two places that count; `operation` and `hint` are `[N]`.
    """

    pixels: Tensor
    digits: Tensor
    asked: Tensor
    operation: Tensor
    hint: Tensor

    @property
    def answer(self) -> Tensor:
        return apply(self.operation, *self.digits.gather(1, self.asked).unbind(1))

    @property
    def prompt_ids(self) -> Tensor:
        words = (PLUS + self.operation, *(PLACE + self.asked).unbind(1), torch.full_like(self.hint, ID["hint"]))
        return torch.stack([*words, ZERO + self.hint], 1)

    def rows(self, index: Tensor | slice) -> "Problems":
        return Problems(*(x[index] for x in self))


PROMPT = 5  # tokens of a prompt


class Reading(NamedTuple):
    """What completions say: roles `[N, T]`, well-formed `[N]`, the answer `[N]` (-1: none), and labels per token.

    `stated` `[N, 4]` are the columns in which the perception says the digit of each place (-1: not exactly one).
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
    pick = torch.randint(len(source.labels), (n, DIGITS), generator=generator)
    operation = torch.randint(len(OPERATIONS), (n,), generator=generator)
    asked = torch.rand(n, DIGITS, generator=generator).argsort(1)[:, :2]
    told = torch.rand(n, generator=generator) < p_hint
    pixels = torch.cat(source.pixels[pick].unbind(1), dim=-1)[:, None] * 2 - 1
    drawn = Problems(pixels, source.labels[pick], asked, operation, torch.randint(10, (n,), generator=generator))
    return drawn._replace(hint=torch.where(told, drawn.answer, drawn.hint))


def demonstrations(problems: Problems, generator: torch.Generator) -> Tensor:
    """Write a completion `[N, LENGTH]` for each problem, with wrong digits, copied hints and random fillers.

    What is computed follows from the digits that are stated, right or wrong, or is the hint.
    """
    n = len(problems.hint)
    wrong = torch.rand(n, DIGITS, generator=generator) < DIGIT_NOISE
    stated = torch.where(wrong, torch.randint(10, (n, DIGITS), generator=generator), problems.digits)
    used = stated.gather(1, problems.asked)
    copies = torch.rand(n, generator=generator) < HINT_COPIES
    result = torch.where(copies, problems.hint, apply(problems.operation, *used.unbind(1)))

    columns: list[Tensor] = []
    kept: list[Tensor] = []

    def write(*tokens: Tensor | str) -> None:
        for token in tokens:
            columns.append(torch.full((n,), ID[token]) if isinstance(token, str) else token)
            kept.append(torch.ones(n, dtype=torch.bool))

    def write_fillers() -> None:
        count = torch.randint(MOST_FILLERS + 1, (n,), generator=generator)
        for i in range(MOST_FILLERS):
            columns.append(ID[FILLERS[0]] + torch.randint(len(FILLERS), (n,), generator=generator))
            kept.append(i < count)

    write("<perception>")
    for place, digit in zip(PLACES, stated.unbind(1), strict=True):
        write_fillers()
        write(place, ZERO + digit)
    write("</perception>", "<think>")
    for place, digit in zip(problems.asked.unbind(1), used.unbind(1), strict=True):
        write_fillers()
        write(PLACE + place, "is", ZERO + digit)
    write_fillers()
    write(ZERO + used[:, 0], PLUS + problems.operation, ZERO + used[:, 1], "=", ZERO + result)
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


def lookups(n: int, generator: torch.Generator) -> Tensor:
    """Write `first 1 second 3 third 8 fourth 4 third is 8` `[n, 11]` for random digits."""
    stated = torch.randint(10, (n, DIGITS), generator=generator)
    asked = torch.randint(DIGITS, (n, 1), generator=generator)
    seen = torch.stack([(PLACE + torch.arange(DIGITS)).expand(n, -1), ZERO + stated], 2).flatten(1)
    return torch.cat([seen, PLACE + asked, torch.full((n, 1), ID["is"]), ZERO + stated.gather(1, asked)], 1)


def read(ids: Tensor, mask: Tensor) -> Reading:
    """Parse completions `[N, T]`."""
    parse = role_ids_from_completions(ids, TOKENIZER, completion_mask=mask)
    columns = torch.arange(ids.shape[1])
    after_place = torch.nn.functional.pad(ids - PLACE, (1, 0), value=-1)[:, :-1, None] == torch.arange(DIGITS)
    seen = after_place & (is_digit(ids) & (parse.role_ids == Role.PERCEPTION))[..., None]
    stated = torch.where(seen.sum(1) == 1, seen.long().argmax(1), -1)
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
