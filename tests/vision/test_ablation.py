"""Reasoning scored after another rollout's perception: the batch against sequences that are put together by hand."""

import pytest
import torch
import transformers
from tiny_vlms import FAMILIES, PROMPTS, build, picture

import srpo
from srpo import PatchMask, Role, perception_tokens, score_streams
from srpo.streams import is_no_evidence, is_not_scored

T = 9
ROLES = torch.tensor([[1, 1, 2, 2, 1, 2, 0, 2, 2], [0, 1, 1, 2, 2, 2, 2, 0, 0], [2, 2, 0, 0, 2, 2, 2, 2, 0]])
VALID = torch.tensor([[1] * 9, [1] * 7 + [0] * 2, [1] * 8 + [0]])
OTHER_MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])


def rollout(family):
    model, processor = build(family)
    pictures = [[picture(n + 1, seed=n)] for n in range(3)]
    flat = pictures if family == "idefics3" else [p for row in pictures for p in row]
    texts = [PROMPTS[family] + "abc"[:n] for n in range(3)]
    inputs = dict(processor(text=texts, images=flat, padding=True, return_tensors="pt"))
    generator = torch.Generator().manual_seed(1)
    completions = torch.randint(20, 40, (3, T), generator=generator)
    others = torch.randint(20, 40, (3, 4), generator=generator)
    ids = torch.cat([inputs.pop("input_ids"), completions], dim=1)
    mask = torch.cat([inputs.pop("attention_mask"), VALID], dim=1)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, T))
    return model, ids, mask, inputs, others


def image_of(inputs, row):
    """The vision inputs of one sequence; every sequence has one image."""
    grid = inputs.get("image_grid_thw")
    if grid is None:
        return {name: x[row : row + 1] for name, x in inputs.items() if name != "mm_token_type_ids"}
    ends = grid.prod(dim=1).cumsum(0).tolist()
    first = ([0, *ends])[row]
    return {"pixel_values": inputs["pixel_values"][first : ends[row]], "image_grid_thw": grid[row : row + 1]}


@torch.no_grad()
def by_hand(model, ids, mask, inputs, others, row):
    """Log-probs of the reasoning tokens of a row after the other perception, by token."""
    prompt = [i for i, m in zip(ids[row, :-T].tolist(), mask[row, :-T].tolist(), strict=True) if m]
    sequence, places, inserted = list(prompt), {}, False
    for t in range(T):
        if not VALID[row, t]:
            continue
        if ROLES[row, t] == Role.PERCEPTION:
            if not inserted:
                sequence += others[row][OTHER_MASK[row].bool()].tolist()
                inserted = True
            continue
        places[t] = len(sequence)
        sequence.append(int(ids[row, t - T]))
    whole = torch.tensor([sequence])
    extra = image_of(inputs, row)
    if "mm_token_type_ids" in inputs:
        extra["mm_token_type_ids"] = (whole == model.config.image_token_id).int()
    logps = model(input_ids=whole, attention_mask=torch.ones_like(whole), **extra).logits.float().log_softmax(-1)[0]
    return {t: logps[p - 1, sequence[p]].item() for t, p in places.items() if ROLES[row, t] == Role.REASONING}


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_perception_equals_a_sequence_made_by_hand(family, batch_size):
    model, ids, mask, inputs, others = rollout(family)
    streams = score_streams(
        model, ids, mask, T, role_ids=ROLES, streams=("clean", "ablated"), batch_size=batch_size,
        other_perception_ids=others, other_perception_mask=OTHER_MASK, **inputs,
    )  # fmt: skip
    for row in (0, 1):
        for t, expected in by_hand(model, ids, mask, inputs, others, row).items():
            assert streams.ablated_logps[row, t].item() == pytest.approx(expected, abs=1e-5)
    reasons = (VALID == 1) & (ROLES == Role.REASONING)
    assert is_no_evidence(streams.ablated_logps[2][reasons[2]]).all()  # no perception to replace
    assert is_not_scored(streams.ablated_logps[~reasons]).all()
    assert streams.corrupted_logps is None


def test_the_own_perception_as_the_other_one_gives_contrast_0():
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).eval()
    ids = torch.randint(3, 64, (2, 6 + T))
    mask = torch.ones_like(ids)
    roles = ROLES[:2].clone()
    roles[0, 4] = 2  # one span a row: the others are put together at the first
    valid = torch.cat([mask[:, :-T], VALID[:2]], dim=1)
    own, own_mask = perception_tokens(ids[:, -T:], roles, VALID[:2])
    arguments = {"role_ids": roles, "streams": ("clean", "ablated")}
    same = score_streams(model, ids, valid, T, other_perception_ids=own, other_perception_mask=own_mask, **arguments)
    reasons = (VALID[:2] == 1) & (roles == Role.REASONING)
    torch.testing.assert_close(same.ablated_logps[reasons], same.logps[reasons])
    mixed = score_streams(
        model, ids, valid, T, other_perception_ids=own.flip(0), other_perception_mask=own_mask.flip(0), **arguments
    )
    assert (mixed.ablated_logps - mixed.logps)[reasons].abs().max() > 1e-3


def test_perception_tokens_are_taken_in_order_and_padded():
    ids, roles = torch.arange(18).view(2, 9), ROLES[:2]
    tokens, mask = perception_tokens(ids, roles, VALID[:2])
    assert tokens[mask].tolist() == [0, 1, 4, 10, 11]
    assert mask.tolist() == [[True, True, True], [True, True, False]]
    empty, nothing = perception_tokens(ids, torch.zeros_like(roles))
    assert empty.shape == nothing.shape == (2, 0)


@pytest.mark.parametrize(
    ("changes", "error", "name"),
    [
        ({"other_perception_ids": torch.zeros(2, 4, dtype=torch.long)}, srpo.ShapeError, "other_perception_ids"),
        ({"other_perception_ids": torch.zeros(3, 4)}, srpo.DtypeError, "other_perception_ids"),
        ({"other_perception_mask": torch.ones(3, 3)}, srpo.ShapeError, "other_perception_mask"),
    ],
)
def test_bad_input_is_named(changes, error, name):
    model, ids, mask, inputs, others = rollout("llava")
    given = {"other_perception_ids": others, "other_perception_mask": OTHER_MASK} | changes
    with pytest.raises(error, match=name):
        score_streams(model, ids, mask, T, role_ids=ROLES, corruption=PatchMask(), **given, **inputs)


def test_an_image_token_in_the_other_text_is_refused():
    model, ids, mask, inputs, others = rollout("llava")
    others = torch.where(OTHER_MASK.bool(), model.config.image_token_id, others)
    with pytest.raises(srpo.ConfigError, match="other_perception_ids"):
        score_streams(model, ids, mask, T, role_ids=ROLES, other_perception_ids=others, **inputs)
