"""Prompts and well-formed completions of a model that is checked."""

import re
from typing import Any

import torch
from torch import Tensor

from srpo.check.findings import Check
from srpo.roles import RoleGrammar, RoleParse, role_ids_from_completions

QUESTION = "How many shapes are there?"
SEEN = ("two round shapes, one above the other", "three shapes of other colours")
REASONED = ("one and one make two", "one, two, three")
ANSWERED = ("2", "3")
ROLLOUTS = len(SEEN)


def completion_texts(grammar: RoleGrammar) -> list[str]:
    """Return two completions of the grammar, which differ in every part."""
    names = (grammar.perception_tags[0], grammar.reasoning_tags[0], *grammar.answer_tags[:1])
    texts = []
    for parts in zip(SEEN, REASONED, ANSWERED, strict=True):
        spans = [_span(grammar.form, name, part) for name, part in zip(names, parts, strict=False)]
        if grammar.opens_with is not None:  # by the prompt: the completion begins inside
            opened = [name.lower() for name in names].index(grammar.opens_with.lower())
            spans.insert(0, spans.pop(opened)[len(_mark(grammar.form, grammar.opens_with)) :])
        texts.append("\n".join(spans))
    return texts


def _mark(form: str, name: str) -> str:
    return {"tags": f"<{name}>", "brackets": f"[{name}]", "headings": f"{name.capitalize()}:"}[form]


def _span(form: str, name: str, text: str) -> str:
    end = {"tags": f"</{name}>", "brackets": f"[/{name}]", "headings": ""}[form]
    return f"{_mark(form, name)}{text}{end}" if end else f"{_mark(form, name)} {text}"


def prompt_text(check: Check, processor: Any, grammar: RoleGrammar) -> str | None:
    """Return the prompt of one picture and one question; None, and a finding, where there is no template."""
    asked = f"{QUESTION} Answer like this:\n{completion_texts(grammar)[0]}"
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}]
    try:
        text = processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a missing template is a ValueError, a broken one anything of jinja2's
        check.wrong("chat template", f"{type(error).__name__}: {str(error).splitlines()[0]}", "give the processor one")
        return None
    opened = _opened_by(text, grammar)
    if opened is not None and grammar.opens_with is None:
        fix = (
            f"--role-grammar '{{\"opens_with\": \"{opened}\"}}', SRPOConfig(role_grammar={{'opens_with': '{opened}'}})"
        )
        check.wrong("chat template", f"the prompt ends with {_mark(grammar.form, opened)}: it opens the first tag", fix)
        return None
    if opened is None and grammar.opens_with is not None:
        seen = f"opens_with={grammar.opens_with!r}, but the prompt ends with {text[-20:]!r}"
        check.wrong("chat template", seen, "leave opens_with out")
        return None
    check.ok("chat template", f"ends with {text[-24:]!r}")
    return text


def _opened_by(text: str, grammar: RoleGrammar) -> str | None:
    if grammar.form == "headings":
        return None
    found = re.search(r"<([\w.:-]+)>\s*$" if grammar.form == "tags" else r"\[([\w.:-]+)\]\s*$", text)
    known = {*grammar.perception_tags, *grammar.reasoning_tags, *grammar.answer_tags}
    return found[1] if found and found[1].lower() in {name.lower() for name in known} else None


def completions(check: Check, processor: Any, grammar: RoleGrammar) -> tuple[Tensor, Tensor, RoleParse] | None:
    """Return ids, mask and roles of two well-formed completions; None, and a finding, where they do not parse."""
    tokenizer, texts = processor.tokenizer, completion_texts(grammar)
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    T = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([row + [pad] * (T - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows])
    back = [tokenizer.decode(row) for row in rows]
    parse = role_ids_from_completions(ids, tokenizer, completion_mask=mask, grammar=grammar)
    if not parse.parsed.all():
        seen = f"{texts[0]!r} comes back from the tokenizer as {back[0]!r}"
        if back[0] == texts[0]:
            seen = f"{texts[0]!r} has no two roles in this grammar"
        fix = "choose tags that the tokenizer keeps (form='brackets', 'headings'), or add them to its vocabulary"
        check.wrong("tags", seen, fix)
        return None
    counts = [int((parse.role_ids == role).sum()) for role in (1, 2)]
    check.ok("tags", f"{counts[0]} perception and {counts[1]} reasoning tokens found in {len(texts)} completions")
    return ids, mask, parse
