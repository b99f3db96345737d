"""The checks in order: template, tags, processor, scoring, evidence, what the policy writes, cost."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srpo.check.findings import Check
from srpo.check.prompts import QUESTION, ROLLOUTS, completions, prompt_text
from srpo.credit import role_contrast, token_weights
from srpo.errors import SRPOError
from srpo.loss import selected_logps
from srpo.roles import RoleGrammar, RoleParse, role_ids_from_completions
from srpo.vision.access import head_states, own_logits
from srpo.vision.corruption import PatchMask
from srpo.vision.pictures import corrupt_images
from srpo.vision.prefix import PROOFS
from srpo.vision.scoring import StreamDivergences, StreamLogps, score_streams

LEAST_EVIDENCE = 10.0  # times what rounding moves, or the picture is not looked at
GIB = 2**30
TOKEN_TYPES = {"mm_token_type_ids", "token_type_ids"}


class _Probe(NamedTuple):
    """Hold what is scored: two completions of each of two pictures."""

    model: Any
    processor: Any
    texts: list[str]
    pictures: list[Any]
    ids: Tensor
    mask: Tensor
    roles: RoleParse
    prompt: dict[str, Any]
    dark: dict[str, Any]

    def score(self, ids: Tensor) -> StreamLogps | StreamDivergences:
        """Score completions of the probe's shape in three contexts."""
        multimodal = dict(self.prompt)
        prompt_ids, prompt_mask = multimodal.pop("input_ids"), multimodal.pop("attention_mask")
        return score_streams(
            self.model,
            torch.cat([prompt_ids, ids], dim=1),
            torch.cat([prompt_mask, self.mask], dim=1),
            ids.shape[1],
            role_ids=self.roles.role_ids,
            corrupted_inputs=self.dark,
            **multimodal,
        )

    def own_logps(self, ids: Tensor) -> Tensor:
        """Return the log-probs of the model's own forward of whole sequences."""
        with torch.no_grad():
            logits = own_logits(self.model, self.whole(ids), ids.shape[1] + 1)
        return selected_logps(logits, ids, mask=self.mask)

    def whole(self, ids: Tensor) -> dict[str, Any]:
        """Return what the model is called with."""
        return self.prompt | {
            "input_ids": torch.cat([self.prompt["input_ids"], ids], dim=1),
            "attention_mask": torch.cat([self.prompt["attention_mask"], self.mask], dim=1),
        }

    def gap(self, a: Tensor, b: Tensor, where: Tensor) -> float:
        """Return how far log-probs differ: at most in fp32, in the mean in 16 bits, whose single values scatter."""
        gaps = (a - b).abs()[where]
        if not gaps.numel():
            return 0.0
        return (gaps.max() if self.model.dtype.itemsize == 4 else gaps.mean()).item()

    @property
    def rounding(self) -> float:
        """Return the gap that rounding may make."""
        return 1e-4 if self.model.dtype.itemsize == 4 else 0.05


def check_model(
    model: Any,
    processor: Any,
    images: list[Any],
    *,
    grammar: RoleGrammar = RoleGrammar(),  # noqa: B008 - frozen
    rollouts: int = 64,
    length: int = 512,
    progress: Callable[[str], None] = lambda step: None,
) -> Check:
    """Say whether a model, its processor and a response format work with token credit, and what a step may cost.

        print(check_model(model, processor, [picture, other]).text())

    Args:
        model: a vision-language model of transformers, in eval mode, on one device.
        processor: of the model.
        images: two pictures.
        grammar: how roles are written.
        rollouts: of a step whose time and memory are estimated.
        length: tokens of their completions.
        progress: called with the name of each step before it is done.

    Returns: Check. A check that needs what failed is not made.

    Gradient: none.

    Memory: forwards of four sequences of some hundred tokens.
    """
    check = Check()
    progress("template and tags")
    text = prompt_text(check, processor, grammar)
    written = completions(check, processor, grammar)
    if text is None or written is None:
        return check
    progress("processor")
    probe = _probe(check, model, processor, text, images, written)
    if probe is None:
        return check
    progress("scoring")
    try:
        streams = _check_scores(check, probe)
        _check_evidence(check, probe, streams)
        progress("cost")
        _estimate(check, probe, rollouts, length)
    except SRPOError as error:
        said = str(error).removeprefix("score_streams(): ")
        check.wrong("scoring", said, "pass what the error names, or choose another family: see srpo/README.md")
        return check
    progress("what the policy writes")
    _read_policy(check, probe, grammar)
    return check


def _probe(
    check: Check, model: Any, processor: Any, text: str, images: list[Any], written: tuple[Tensor, Tensor, RoleParse]
) -> _Probe | None:
    """Return prompts and completions on the model's device; None, and a finding, where the processor fails."""
    ids, mask, roles = written
    pictures = [[image] for image in images[:2] for _ in range(ROLLOUTS)]
    texts = [text] * len(pictures)
    repeats = len(pictures) // ROLLOUTS
    ids, mask, role_ids = (x.repeat(repeats, 1).to(model.device) for x in (ids, mask, roles.role_ids))
    try:
        prompt = _processed(model, processor, texts, pictures, ids.shape[1])
        dark = _processed(
            model, processor, texts, corrupt_images(pictures, PatchMask(0.6), seed=texts, processor=processor),
            ids.shape[1],
        )  # fmt: skip
    except Exception as error:  # processors raise whatever they like
        said = str(error).strip().splitlines()
        fix = "call the processor on one text and one picture by hand: the template and the processor must agree"
        check.wrong("processor", f"{type(error).__name__}: {said[0] if said else ''}", fix)
        return None
    dark = {name: x for name, x in dark.items() if name in _pixels(prompt)}
    check.ok("processor", f"{prompt['input_ids'].shape[1]} prompt tokens; pictures in {', '.join(dark)}")
    parse = roles._replace(role_ids=role_ids)
    return _Probe(model, processor, texts, pictures, ids, mask, parse, prompt, dark)


def _processed(model: Any, processor: Any, texts: list[str], pictures: list[Any], T: int) -> dict[str, Any]:
    made = processor(text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt")
    made = dict(made.to(model.device, dtype=model.dtype))
    for name in made.keys() & TOKEN_TYPES:  # one a token: 0 is text
        made[name] = torch.nn.functional.pad(made[name], (0, T))
    return made


def _pixels(prompt: dict[str, Any]) -> list[str]:
    return [name for name, x in prompt.items() if isinstance(x, Tensor) and x.is_floating_point()]


def _check_scores(check: Check, probe: _Probe) -> StreamLogps | StreamDivergences:
    """Compare the clean stream with the model's own forward."""
    valid = probe.mask != 0
    probe.score(probe.ids)  # the first call finds out which road the model takes; the second takes it
    streams, own = probe.score(probe.ids), probe.own_logps(probe.ids)
    check.figures["noise"] = probe.gap(own, probe.own_logps(probe.ids), valid)
    check.figures["clean_difference"] = gap = probe.gap(streams.logps, own, valid)
    if gap > probe.rounding:
        seen = f"clean log-probs are {gap:.2g} nats off the model's own forward"
        fix = "update transformers; report the family: `python -m srpo env` says the versions"
        check.wrong("log-probs", seen, fix)
    else:
        check.ok("log-probs", f"equal to the model's own forward to {gap:.1g} nats")
    with torch.no_grad():
        states = head_states(probe.model, probe.whole(probe.ids), 2)
    head = "from hidden states" if states.is_bare else "from the model's own logits: its head alone does not make them"
    shared = "computed once" if PROOFS.known(probe.model) else "computed with every rollout"
    check.ok("road", f"log-probs {head}; prompts that rollouts share are {shared}")
    return streams


def _check_evidence(check: Check, probe: _Probe, streams: StreamLogps | StreamDivergences) -> None:
    """See that the picture and the perception reach the model, and that hidden perception stays hidden."""
    assert streams.corrupted_logps is not None
    assert streams.ablated_logps is not None
    roles = probe.roles.role_ids
    noise = max(LEAST_EVIDENCE * check.figures["noise"], 1e-6)
    picture = (streams.logps - streams.corrupted_logps).abs()[roles == 1].mean().item()
    check.figures["picture_contrast"] = picture
    if not picture > noise:
        seen = f"a corrupted picture moves the log-probs of perception by {picture:.1g} nats: nothing"
        check.wrong("picture", seen, "see that pixel_values reach the model, and that its vision tower was loaded")
    else:
        check.ok("picture", f"a corrupted one moves the log-probs of perception by {picture:.2g} nats in the mean")
    shown = (streams.logps - streams.ablated_logps).abs()[roles == 2].mean().item()
    check.figures["perception_contrast"] = shown
    others = _other_perception(probe)
    other = probe.score(others)
    assert other.ablated_logps is not None
    own = (probe.ids == others) & (roles == 2)
    leak = probe.gap(streams.ablated_logps, other.ablated_logps, own)
    check.figures["perception_leak"] = leak
    if leak > probe.rounding:
        seen = f"hidden perception still moves the log-probs of reasoning, by {leak:.2g} nats"
        check.wrong("perception", seen, "report the family; srpo_one_pass needs no hidden perception")
    else:
        check.ok("perception", f"hiding it moves the log-probs of reasoning by {shown:.2g} nats in the mean")
    contrast = role_contrast(
        streams.logps, corrupted_logps=streams.corrupted_logps, ablated_logps=streams.ablated_logps,
        role_ids=roles, completion_mask=probe.mask,
    )  # fmt: skip
    weights = token_weights(contrast, roles, probe.mask)[roles != 0]
    check.ok("weights", f"{weights.min():.2f} to {weights.max():.2f} on these completions")


def _other_perception(probe: _Probe) -> Tensor:
    """Return the completions with their perception tokens in reverse: another text of the same length."""
    ids = probe.ids.clone()
    for row, seen in zip(ids, probe.roles.role_ids == 1, strict=True):
        row[seen] = row[seen].flip(0)
    return ids


def _estimate(check: Check, probe: _Probe, rollouts: int, length: int) -> None:
    """Time a plain forward and the three streams of what is scored here; scale them to a step."""
    forward, scoring = (_seconds(probe, call) for call in (probe.own_logps, probe.score))
    here = int(probe.prompt["attention_mask"].sum() + probe.mask.sum())
    there = rollouts * (probe.prompt["input_ids"].shape[1] + length)
    parameters = sum(x.numel() * x.element_size() for x in probe.model.parameters()) / GIB
    vocabulary = probe.model.get_output_embeddings().weight.shape[0]
    logits = rollouts * length * vocabulary * 4 / GIB
    check.figures |= {
        "scoring_over_forward": scoring / forward,
        "scoring_seconds_of_a_step": scoring * there / here,
        "parameters_gib": parameters,
        "logits_gib": logits,
    }
    seen = (
        f"scoring takes {scoring / forward:.2g} times a plain forward here, about {scoring * there / here:.3g} s for "
        f"{rollouts} rollouts of {length} tokens; parameters {parameters:.3g} GiB"
    )
    check.note("cost", seen)
    if logits > 1:
        seen = f"fp32 logits of such a step are {logits:.3g} GiB"
        check.note("memory", seen, "role_weighted_grpo_loss_from_hidden or SRPOConfig(fused_loss=True) never hold them")


def _read_policy(check: Check, probe: _Probe, grammar: RoleGrammar) -> None:
    """Say what share of the policy's own completions has both roles: a fresh model may need to be taught."""
    P = probe.prompt["input_ids"].shape[1]
    inputs = {name: x[:, :P] if name in TOKEN_TYPES else x for name, x in probe.prompt.items()}
    tokenizer = probe.processor.tokenizer
    try:
        made = probe.model.generate(
            **inputs, max_new_tokens=max(64, probe.ids.shape[1]), do_sample=False, pad_token_id=tokenizer.pad_token_id
        )[:, P:]
    except Exception as error:  # generate() has as many errors as models
        check.note("policy", f"generate() raised {type(error).__name__}: {str(error).splitlines()[0]}")
        return
    valid = made != tokenizer.pad_token_id if tokenizer.pad_token_id is not None else torch.ones_like(made)
    parse = role_ids_from_completions(made, tokenizer, completion_mask=valid, grammar=grammar)
    share = parse.parsed.float().mean().item()
    check.figures["parsed_share"] = share
    if share == 1:
        check.ok("policy", "its own completions have both roles")
        return
    text = tokenizer.decode(made[0][valid[0].bool()], skip_special_tokens=True)
    seen = f"{share:.0%} of its own completions have both roles; one begins {text[:48]!r}"
    check.note("policy", seen, f"ask for the format ({QUESTION!r} was asked here), reward it, or fine-tune on it first")


def _seconds(probe: _Probe, call: Callable[[Tensor], Any]) -> float:
    """Return the shorter of two runs: the first may warm up."""
    times = []
    for _ in range(2):
        began = time.perf_counter()
        call(probe.ids)
        if probe.model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)
