"""Prompts that are computed once give the streams of whole sequences."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import tiny_vlms
import torch
import transformers
from rollouts import Rollout, T, build_text, make_rollout, repeated, same_bits, text_rollout
from torch import nn

from srpo import Blank, ShuffleImages, perception_tokens
from srpo.vision import prefix, scorer
from srpo.vision.access import cache_name

NAMES = ("logps", "corrupted_logps", "ablated_logps", "entropy")
CLOSE = {"rtol": 0, "atol": 1e-5, "equal_nan": True}


@pytest.fixture(autouse=True)
def nothing_is_proven(monkeypatch):
    monkeypatch.setattr(scorer, "PROOFS", prefix.Proofs())


@pytest.fixture(scope="module", params=tiny_vlms.FAMILIES)
def group(request) -> Rollout:
    """Prompts with two, no and one picture, three, two and three times; the rollouts of each differ."""
    return repeated(make_rollout(request.param, tiny_vlms.build(request.param)), (0, 0, 1, 2, 0, 2, 1, 2))


def on_whole_sequences(rollout: Rollout, **arguments: Any) -> Any:
    """The streams on the other road."""
    known = scorer.PROOFS
    scorer.PROOFS = prefix.Proofs()
    scorer.PROOFS.keep(rollout.model, False, "a test")
    try:
        return rollout.score(**arguments)
    finally:
        scorer.PROOFS = known


class Columns:
    """Counts the columns that go through the decoder, and the forwards."""

    def __init__(self, model: Any) -> None:
        self.handle = model.register_forward_pre_hook(self.count, with_kwargs=True)
        self.columns, self.forwards = 0, 0

    def count(self, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.columns, self.forwards = self.columns + kwargs["input_ids"].numel(), self.forwards + 1


def agree(got: Any, want: Any, names: tuple[str, ...] = NAMES) -> None:
    for name in names:
        torch.testing.assert_close(getattr(got, name), getattr(want, name), **CLOSE, msg=lambda x, n=name: f"{n}: {x}")


@pytest.mark.parametrize(
    "arguments",
    [{}, {"batch_size": 2}, {"cache_bytes": 1}, {"credit": "vppo"}, {"temperature": 0.7}, {"generator": None},
     {"corruption": ShuffleImages()}],
    ids=repr,
)  # fmt: skip
def test_both_roads_score_alike(group, arguments):
    got = group.score(**arguments)
    assert scorer.PROOFS.known(group.model) is True  # else this compares a road with itself
    want = on_whole_sequences(group, **arguments)
    agree(got, want, tuple(name for name in NAMES if getattr(want, name) is not None))


def test_fewer_columns_go_through_the_decoder(group):
    group.score()  # proves
    counted = Columns(group.model)
    group.score(generator=None, corruption=Blank())
    shared = counted.columns
    on_whole_sequences(group, generator=None, corruption=Blank())
    counted.handle.remove()
    assert shared < 0.5 * (counted.columns - shared)


def test_another_perception(group):
    completions = group.ids[:, -T:]
    own, mask = perception_tokens(completions, group.roles, group.valid)
    arguments = {"other_perception_ids": own.roll(1, 0), "other_perception_mask": mask.roll(1, 0)}
    got = group.score(streams=("clean", "ablated"), **arguments)
    agree(got, on_whole_sequences(group, streams=("clean", "ablated"), **arguments), ("logps", "ablated_logps"))
    assert scorer.PROOFS.known(group.model) is True


def test_equal_rollouts_are_scored_once(group):
    ids, mask, roles = group.ids.clone(), group.mask.clone(), group.roles.clone()
    for x in (ids, mask, roles):
        x[1, -T:] = x[0, -T:]
    twice = replace(group, ids=ids, mask=mask, roles=roles)
    twice.score(generator=None)
    counted = Columns(group.model)
    got = twice.score(generator=None)
    with_twins = counted.columns
    group.score(generator=None)
    counted.handle.remove()
    assert with_twins < counted.columns - with_twins
    for name in NAMES:
        x = getattr(got, name)
        assert same_bits(x[0], x[1])
    agree(got, on_whole_sequences(twice, generator=None))


def test_a_prompt_with_two_pictures_in_turn_is_not_shared():
    family = "qwen25vl"
    one = make_rollout(family, tiny_vlms.build(family), (1,))
    group = repeated(one, (0, 0, 0))
    pixels = group.inputs["pixel_values"].clone()
    n = len(pixels) // 3
    pixels[n : 2 * n] = pixels[n : 2 * n].flip(0)  # the second row sees another picture
    other = replace(group, inputs={**group.inputs, "pixel_values": pixels})
    got = other.score()
    agree(got, on_whole_sequences(other))
    assert (got.logps[1] - group.score().logps[1]).abs().max() > 1e-3


def test_prompts_at_other_positions_are_not_shared(group):
    """HunYuan-VL counts pictures through the whole batch: the second rollout of a prompt is elsewhere."""
    positions = (group.mask.cumsum(dim=1) - 1).clamp(min=0)
    positions[1] *= 2
    ids, mask, roles = group.ids.clone(), group.mask.clone(), group.roles.clone()
    for x in (ids, mask, roles):
        x[1, -T:] = x[0, -T:]  # equal but for where they are
    moved = replace(group, ids=ids, mask=mask, roles=roles)
    given = positions.expand(3, -1, -1) if "qwen" in group.family else positions
    got = moved.score(position_ids=given)
    assert scorer.PROOFS.known(group.model) is True
    agree(got, on_whole_sequences(moved, position_ids=given))
    assert (got.logps[1] - got.logps[0]).abs().max() > 1e-3


def test_nothing_outlives_a_call(group):
    model = copy.deepcopy(group.model)
    own = replace(group, model=model)
    before = own.score()
    with torch.no_grad():
        for x in model.parameters():
            x.mul_(1.1)
    after = own.score()
    assert (after.logps - before.logps).abs().max() > 1e-3
    agree(after, on_whole_sequences(own))


def test_prompts_without_a_partner_cost_what_they_did(group):
    single = make_rollout(group.family, (group.model, group.processor), (1, 2, 1))
    single.score()
    counted = Columns(group.model)
    single.score()
    own = counted.columns
    on_whole_sequences(single)
    counted.handle.remove()
    assert own == counted.columns - own


TEXT = {
    "qwen2": (lambda: build_text("Qwen2"), True),
    "gemma2": (lambda: build_text("Gemma2", head_dim=16, final_logit_softcapping=5.0), False),  # its head is capped
    "a short window": (
        lambda: build_text(
            "Gemma3Text" if hasattr(transformers, "Gemma3TextForCausalLM") else "Mistral", sliding_window=4
        ),
        True,
    ),
    "mamba": (lambda: build_text("Mamba", state_size=8), False),
}


@pytest.mark.parametrize("name", TEXT)
def test_text_models(name):
    build, shares = TEXT[name]
    group = repeated(text_rollout(build()), (0, 1, 0, 0, 2, 1))
    got = group.score(streams=("clean", "ablated"))
    assert bool(scorer.PROOFS.known(group.model)) == shares
    agree(got, on_whole_sequences(group, streams=("clean", "ablated")), ("logps", "ablated_logps", "entropy"))


def test_a_model_that_continues_otherwise_is_found_out(group):
    """A forward that forgets its cache: the first comparison notices, and every number is that of whole sequences."""

    class Forgetful(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **named: Any) -> Any:
            if named.get(cache_name(self.module)) is not None:
                n = named["input_ids"].shape[1]
                named["attention_mask"] = named["attention_mask"].clone()
                named["attention_mask"][:, :-n] = 0
            return self.module(**named)

    own = replace(group, model=Forgetful(group.model))
    got = own.score()
    assert scorer.PROOFS.known(own.model) is False
    agree(got, on_whole_sequences(group))


def test_bf16_differs_by_rounding(group):
    half = replace(
        group, model=copy.deepcopy(group.model).bfloat16(),
        inputs={k: x.bfloat16() if x.is_floating_point() else x for k, x in group.inputs.items()},
    )  # fmt: skip
    truth = on_whole_sequences(group, corruption=Blank())

    def error(streams: Any) -> float:
        return float((streams.logps - truth.logps).abs().mean())

    got = half.score(corruption=Blank())
    assert scorer.PROOFS.known(half.model) is True
    assert error(got) <= 1.3 * error(on_whole_sequences(half, corruption=Blank())) + 1e-3
