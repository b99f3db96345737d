"""Contrast scoring against forwards of the model itself: on corrupted pictures, and on rows with the span cut out.

The ablation oracle runs each row alone and unpadded: perception tokens are deleted by indexing, and the positions of
the others are those that the model's own rotary embedding received on the whole batch.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import rollouts
import tiny_vlms
import torch
import transformers
from rollouts import (
    ROLES,
    SEED,
    TEXT,
    Rollout,
    T,
    assert_close,
    build_text,
    corrupted_inputs,
    deleted_logps,
    largest,
    make_rollout,
    own_logits,
    own_logps,
    own_positions,
    processed,
    recorded_positions,
    same_bits,
    text_rollout,
)
from tiny_vlms import FAMILIES
from torch import Tensor, nn

from srpo import ConfigError, DtypeError, RoleParseError, ShapeError, SRPOError
from srpo.streams import is_no_evidence, is_not_scored
from srpo.vision import scoring
from srpo.vision.corruption import Blank, Blur, GaussianNoise, PatchMask, PixelLayout, ShuffleImages
from srpo.vision.scoring import score_streams
from srpo_kernels import linear_head


@pytest.fixture(scope="module", params=FAMILIES)
def rollout(request):
    return make_rollout(request.param, tiny_vlms.build(request.param))


@pytest.fixture(scope="module")
def qwen():
    return make_rollout("qwen25vl", tiny_vlms.build("qwen25vl"))


# Values


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_clean_scores_are_the_models_own(rollout, temperature):
    out = rollout.score(temperature=temperature)
    logits = own_logits(rollout.model, rollout.ids, rollout.mask, **rollout.inputs) / temperature
    own = own_logps(rollout.model, rollout.ids, rollout.mask, temperature, **rollout.inputs)
    assert_close(out.logps, own, rollout.valid)
    assert_close(out.entropy, torch.distributions.Categorical(logits=logits).entropy(), rollout.valid)
    for x in out:
        assert (x.dtype, x.shape, x.requires_grad) == (torch.float32, (3, T), False)
    for x in (out.logps, out.entropy):
        assert torch.equal(x[~rollout.valid], torch.zeros_like(x[~rollout.valid]))
    for x in (out.corrupted_logps, out.ablated_logps):
        assert is_not_scored(x[~rollout.valid]).all()


@pytest.mark.parametrize("corruption", [PatchMask(), GaussianNoise(), Blur(), Blank(), ShuffleImages()], ids=repr)
def test_perception_is_scored_on_the_corrupted_pixels(rollout, corruption):
    out = rollout.score(corruption=corruption, streams=("clean", "corrupted"))
    inputs = corrupted_inputs(rollout, corruption)
    bad = own_logps(rollout.model, rollout.ids, rollout.mask, **inputs)
    assert_close(out.corrupted_logps, bad, rollout.visual)
    assert largest(out.corrupted_logps, out.logps, rollout.visual) > 1e-3
    assert is_no_evidence(out.corrupted_logps[rollout.seen & ~rollout.visual]).all()
    assert is_not_scored(out.corrupted_logps[~rollout.seen]).all()


def test_corrupted_pixels_equal_processing_corrupted_pictures(rollout):
    cell = PixelLayout.of_model(rollout.model).merged_patch
    flat = [image for row in rollout.pictures for image in row]
    dark = iter(PatchMask().on_images(flat, generator=SEED, cell=cell))
    pictures = [[next(dark) for _ in row] for row in rollout.pictures]
    inputs = processed(rollout.family, rollout.processor, rollout.texts, pictures)
    inputs = rollout.inputs | {"pixel_values": inputs["pixel_values"]}
    bad = own_logps(rollout.model, rollout.ids, rollout.mask, 0.7, **inputs)
    assert_close(rollout.score(temperature=0.7).corrupted_logps, bad, rollout.visual)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hiding_perception_equals_deleting_it(rollout, attention):
    rollout.model.set_attn_implementation(attention)
    try:
        expected = deleted_logps(rollout, 0.7)
        scores = [rollout.score(ablation=ablation, temperature=0.7) for ablation in ("mask", "delete", None)]
    finally:
        rollout.model.set_attn_implementation("sdpa")
    for out in scores:
        assert_close(out.ablated_logps, expected, rollout.reasoned)
        assert largest(out.ablated_logps, out.logps, rollout.reasoned) > 1e-2
        assert is_not_scored(out.ablated_logps[~(rollout.valid & (rollout.roles == 2))]).all()


def test_a_mask_alone_would_not_delete_the_perception(rollout):
    """The oracle tells wrong positions, and the state of a hidden predecessor, from a deletion."""
    hidden = rollout.mask.clone()
    hidden[:, -T:] *= rollout.roles != 1
    masked = own_logps(rollout.model, rollout.ids, hidden, **rollout.inputs)
    after_hidden = rollout.reasoned & nn.functional.pad(rollout.seen, (1, -1))
    assert largest(masked, deleted_logps(rollout), after_hidden) > 1e-2


def test_deletion_in_rows_that_differ_in_what_they_lose(rollout):
    roles = torch.tensor([[0] * 3 + [2] * 6, [1] * 5 + [2] * 4, [2, 2, 1, 2, 2, 1, 2, 2, 2]])
    other = replace(rollout, roles=roles)
    expected = deleted_logps(other)
    for ablation in ("mask", "delete"):
        out = other.score(ablation=ablation)
        assert_close(out.ablated_logps, expected, other.reasoned)
        assert is_no_evidence(out.ablated_logps[0, 3:]).all()  # no perception that could be hidden


@pytest.mark.parametrize("corruption", [PatchMask(), ShuffleImages()], ids=repr)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_small_batches_equal_the_whole(rollout, corruption, batch_size):
    whole = rollout.score(corruption=corruption)
    for ablation in ("mask", "delete"):
        parts = rollout.score(corruption=corruption, batch_size=batch_size, ablation=ablation)
        for got, expected in zip(parts, whole, strict=True):
            assert_close(got, expected, rollout.valid)


def test_only_the_asked_streams_are_scored(rollout):
    whole = rollout.score()
    for streams in [("clean",), ("clean", "corrupted"), ("clean", "ablated"), ("ablated", "clean")]:
        out = rollout.score(streams=streams)
        for name in ("corrupted", "ablated"):
            scores = getattr(out, f"{name}_logps")
            assert (scores is not None) == (name in streams)
            if scores is not None:
                assert_close(scores, getattr(whole, f"{name}_logps"), rollout.valid)
        assert_close(out.logps, whole.logps, rollout.valid)


def test_a_wrapped_model_is_scored_through_its_wrapper(rollout):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.calls = rollout.model, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    wrapper = Wrapper().eval()
    for got, expected in zip(replace(rollout, model=wrapper).score(), rollout.score(), strict=True):
        assert_close(got, expected, rollout.valid)
    assert wrapper.calls == 3


def test_positions_of_the_caller_are_used(rollout):
    whole, positions = rollout.score(), own_positions(rollout)
    for batch_size in (None, 1):
        out = rollout.score(position_ids=positions, batch_size=batch_size)
        assert_close(out.ablated_logps, whole.ablated_logps, rollout.valid)
    moved = rollout.score(position_ids=positions * 2)
    assert largest(moved.logps, whole.logps, rollout.valid) > 1e-2


@pytest.mark.parametrize("images", [(1, 1, 1), (0, 2, 2), (3,), (2,)])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_numbers_of_images(family, images):
    rollout = make_rollout(family, tiny_vlms.build(family), images)
    bad = own_logps(rollout.model, rollout.ids, rollout.mask, **corrupted_inputs(rollout, PatchMask()))
    for batch_size in (None, 1):
        out = rollout.score(batch_size=batch_size)
        assert_close(out.logps, own_logps(rollout.model, rollout.ids, rollout.mask, **rollout.inputs), rollout.valid)
        assert_close(out.corrupted_logps, bad, rollout.visual)
        assert_close(out.ablated_logps, deleted_logps(rollout), rollout.reasoned)


def test_the_number_of_images_may_be_given(rollout):
    for got, expected in zip(rollout.score(num_images=[2, 0, 1], batch_size=1), rollout.score(), strict=True):
        assert_close(got, expected, rollout.valid)


def test_counts_that_are_as_many_as_the_sequences_do_not_move_padded_rows():
    """Three pictures in three sequences, of which one has none: the processor gives each sequence an entry."""
    rollout = make_rollout("idefics3", tiny_vlms.build("idefics3"), images=(0, 1, 2))
    for got, expected in zip(rollout.score(num_images=[0, 1, 2], batch_size=1), rollout.score(), strict=True):
        assert_close(got, expected, rollout.valid)


def test_a_sequence_without_tokens_stays_finite(rollout):
    mask = rollout.mask.clone()
    mask[1] = 0
    for ablation in ("mask", "delete"):
        for batch_size in (None, 1):
            out = replace(rollout, mask=mask).score(ablation=ablation, batch_size=batch_size)
            assert all(x.isfinite().all() and not x[1].any() for x in (out.logps, out.entropy))
            assert all(is_not_scored(x[1]).all() for x in (out.corrupted_logps, out.ablated_logps))


def test_masks_and_roles_of_other_types(rollout):
    whole = rollout.score()
    for mask_type, role_type in [(torch.bool, torch.int8), (torch.float32, torch.uint8), (torch.int32, torch.int32)]:
        other = replace(rollout, mask=rollout.mask.to(mask_type), roles=rollout.roles.to(role_type))
        for got, expected in zip(other.score(), whole, strict=True):
            assert same_bits(got, expected)


# Work that is not done


@contextlib.contextmanager
def counted_calls(module: nn.Module):
    calls: list[nn.Module] = []
    with module.register_forward_pre_hook(lambda module, _: calls.append(module)):
        yield calls


@pytest.fixture
def head_rows(monkeypatch):
    """How many rows each call of the chunked head multiplies."""
    rows: list[int] = []
    score = linear_head.score

    def counting(head, hidden, ids, row_mask, return_entropy):
        rows.append(int(row_mask.sum()))
        return score(head, hidden, ids, row_mask, return_entropy)

    monkeypatch.setattr(linear_head, "score", counting)
    return rows


def test_the_corrupted_forward_stops_before_the_last_perception_token(rollout):
    S = rollout.ids.shape[1]
    first, _, third = lasts = [S - T + int(row.nonzero().max()) for row in rollout.seen]
    for batch_size, expected in [(None, [S, max(lasts)]), (1, [S, first, S, S, third])]:  # no image in the second row
        with recorded_positions(rollout.model) as found:
            rollout.score(streams=("clean", "corrupted"), batch_size=batch_size)
        assert [positions.shape[-1] for positions in found] == expected


def test_deleting_shortens_the_forward_and_masking_does_not(rollout):
    S, gone = rollout.ids.shape[1], int(rollout.seen.sum(dim=1).min())
    for ablation, columns in [(None, S - gone), ("mask", S), ("delete", S - gone)]:
        with recorded_positions(rollout.model) as found:
            rollout.score(streams=("clean", "ablated"), ablation=ablation)
        assert [positions.shape[-1] for positions in found] == [S, columns]


def test_only_rows_of_the_role_reach_the_head(rollout, head_rows, monkeypatch):
    called: list[int] = []
    forward = nn.Linear.forward

    def counting(module: nn.Linear, x: Tensor) -> Tensor:  # a hook would make it another head
        if module is rollout.model.lm_head:
            called.append(x.shape[:-1].numel())
        return forward(module, x)

    monkeypatch.setattr(nn.Linear, "forward", counting)
    rollout.score()
    with_image = rollout.seen.clone()
    with_image[1] = False  # the second row has no image
    assert head_rows == [int(x.sum()) for x in (rollout.valid, with_image, rollout.reasoned)]
    assert sum(called) <= 3 * len(rollout.ids)  # a row of each sequence, to see what the model does with logits


def vision_tower(model: Any) -> nn.Module:
    return next(m for name, m in model.model.named_children() if name in ("visual", "vision_model", "vision_tower"))


@pytest.mark.parametrize("streams", [("clean",), ("clean", "ablated"), ("clean", "corrupted", "ablated")])
def test_clean_and_ablated_share_the_vision_tower(rollout, streams):
    shares = "mm_encoder_outputs" in inspect.signature(rollout.model.model.forward).parameters
    with counted_calls(vision_tower(rollout.model)) as calls:
        rollout.score(streams=streams)
    assert len(calls) == len(streams) - (shares and "ablated" in streams)


def test_streams_without_a_token_of_their_role_cost_nothing(rollout):
    for roles in (torch.zeros(3, T).long(), torch.full((3, T), 2)):
        with counted_calls(rollout.model) as calls:
            out = replace(rollout, roles=roles).score()
        assert len(calls) == 1
        assert out.corrupted_logps.isnan().all()
        assert out.ablated_logps.isnan().all()


# No image


@pytest.mark.parametrize("family", FAMILIES)
def test_without_images_there_is_no_evidence_and_one_warning_says_so(family):
    rollout = make_rollout(family, tiny_vlms.build(family), (0, 0, 0))
    scoring._warn_without_image.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch_size in (None, 1, None):
            out = rollout.score(batch_size=batch_size)
            assert is_no_evidence(out.corrupted_logps[rollout.seen]).all()
    (warning,) = caught
    assert "no image" in str(warning.message)
    assert warning.filename == rollouts.__file__  # who called
    assert_close(out.logps, own_logps(rollout.model, rollout.ids, rollout.mask), rollout.valid)
    assert_close(out.ablated_logps, deleted_logps(rollout), rollout.reasoned)


def test_no_warning_when_the_image_stream_is_not_asked_for():
    rollout = make_rollout("llava", tiny_vlms.build("llava"), (0, 0, 0))
    scoring._warn_without_image.cache_clear()
    assert rollout.score(streams=("clean", "ablated")).corrupted_logps is None


# The caller's state


def test_modes_generators_gradients_and_inputs_stay_as_they_were(rollout):
    model = copy.deepcopy(rollout.model).train()
    own_logits(model, rollout.ids, rollout.mask, **rollout.inputs)  # towers may keep hooks from their first forward on
    model.lm_head.eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.rope_deltas = deltas = torch.tensor([7])
    tensors = [rollout.ids, rollout.mask, rollout.roles, *rollout.inputs.values(), *model.parameters()]
    versions, weights = [x._version for x in tensors], [x.clone() for x in tensors]
    modes = [module.training for module in model.modules()]
    needs = [x.requires_grad for x in model.parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with torch.enable_grad():
        out = replace(rollout, model=model).score()
        assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == generators[1:]
    assert [module.training for module in model.modules()] == modes
    assert [x.requires_grad for x in model.parameters()] == needs
    assert all(x.grad is None for x in model.parameters())
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert model.model.rope_deltas is deltas
    assert [x._version for x in tensors] == versions
    assert all(torch.equal(x, before) for x, before in zip(tensors, weights, strict=True))
    assert not any(x.requires_grad for x in out)


def test_an_error_inside_the_model_restores_modes_and_hooks(rollout):
    model = copy.deepcopy(rollout.model).train()

    def fail(*_):
        raise MemoryError("out of memory")

    model.lm_head.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        replace(rollout, model=model).score()
    assert all(module.training for module in model.modules())
    assert not model.lm_head._forward_pre_hooks


def test_dropout_is_off(rollout):
    model = copy.deepcopy(rollout.model).train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    arguments = model, rollout.ids, rollout.mask
    assert (
        largest(own_logps(*arguments, **rollout.inputs), own_logps(*arguments, **rollout.inputs), rollout.valid) > 1e-2
    )
    for got, expected in zip(replace(rollout, model=model).score(), rollout.score(), strict=True):
        assert same_bits(got, expected)


# Precision


def test_bf16_weights(rollout):
    half = replace(
        rollout,
        model=copy.deepcopy(rollout.model).bfloat16(),
        inputs={k: x.bfloat16() if x.is_floating_point() else x for k, x in rollout.inputs.items()},
    )
    for candidate, context in [(half, contextlib.nullcontext()), (rollout, torch.autocast("cpu", torch.bfloat16))]:
        with context:
            out = candidate.score()
            own = own_logps(candidate.model, candidate.ids, candidate.mask, **candidate.inputs)
            dark = corrupted_inputs(candidate, PatchMask())
            bad = own_logps(candidate.model, candidate.ids, candidate.mask, **dark)
            alone = deleted_logps(candidate)
        assert_close(out.logps, own, candidate.valid, rtol=0, atol=1e-2)
        assert_close(out.corrupted_logps, bad, candidate.visual, rtol=0, atol=0.05)
        assert_close(out.ablated_logps, alone, candidate.reasoned, rtol=0, atol=0.05)


# Seeds


def test_seeds_decide_the_corruption(rollout):
    def corrupted(**arguments):
        return rollout.score(streams=("corrupted",), **arguments).corrupted_logps

    generator = torch.Generator().manual_seed(SEED)
    assert same_bits(corrupted(generator=generator), corrupted(generator=SEED))
    n_pictures = sum(map(len, rollout.pictures))
    drawn = torch.Generator().manual_seed(SEED)
    torch.randint(2**63 - 1, (n_pictures,), generator=drawn)
    assert torch.equal(generator.get_state(), drawn.get_state())
    assert not same_bits(corrupted(generator=generator), corrupted(generator=SEED))
    assert not same_bits(corrupted(generator=SEED + 1), corrupted(generator=SEED))


def test_without_a_seed_picture_and_prompt_decide(rollout):
    first = rollout.score(generator=None)
    assert same_bits(rollout.score(generator=None).corrupted_logps, first.corrupted_logps)
    assert_close(rollout.score(generator=None, batch_size=1).corrupted_logps, first.corrupted_logps, rollout.valid)
    dark = seen_by_the_corrupted_stream(rollout)
    ids = rollout.ids.clone()
    ids[0, -1] += 2  # another rollout of the prompt
    assert torch.equal(seen_by_the_corrupted_stream(replace(rollout, ids=ids)), dark)
    ids[0, -T - 1] = 30  # another prompt, of which the picture is the same
    assert not torch.equal(seen_by_the_corrupted_stream(replace(rollout, ids=ids)), dark)


def seen_by_the_corrupted_stream(rollout: Rollout) -> Tensor:
    """The pixels of the second forward."""
    found: list[Tensor] = []

    def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(kwargs["pixel_values"])

    with rollout.model.register_forward_pre_hook(record, with_kwargs=True):
        rollout.score(generator=None, streams=("clean", "corrupted"))
    return found[1]


def only(rollout: Rollout, i: int, columns: int) -> Rollout:
    """One row of a rollout with one image a row, and so many columns of padding on the left."""
    inputs = {name: x[i : i + 1] for name, x in rollout.inputs.items()}
    if "image_grid_thw" in rollout.inputs:
        sizes = rollout.inputs["image_grid_thw"].prod(dim=1).tolist()
        inputs["pixel_values"] = rollout.inputs["pixel_values"].split(sizes)[i]
    shape = rollout.ids[:1].shape
    inputs = {k: nn.functional.pad(x, (columns, 0)) if x.shape == shape else x for k, x in inputs.items()}
    ids, mask = (nn.functional.pad(x[i : i + 1], (columns, 0)) for x in (rollout.ids, rollout.mask))
    return replace(rollout, ids=ids, mask=mask, roles=rollout.roles[i : i + 1], inputs=inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_seed_a_sequence_is_corrupted_alike_in_any_batch(family):
    rollout = make_rollout(family, tiny_vlms.build(family), images=(1, 1, 1))
    whole = rollout.score(generator=None)
    assert largest(whole.corrupted_logps, whole.logps, rollout.seen) > 1e-3
    for i, columns in ((0, 0), (1, 3), (2, 0)):
        alone = only(rollout, i, columns)
        assert_close(alone.score(generator=None).corrupted_logps, whole.corrupted_logps[i : i + 1], alone.valid)
    black = alone.score(corruption=Blank()).corrupted_logps  # what a picture without another becomes
    assert_close(alone.score(generator=None, corruption=ShuffleImages()).corrupted_logps, black, alone.valid)


# Text models, states, heads


def small_qwen3_next() -> Any:
    return build_text(
        "Qwen3Next",
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        mlp_only_layers=[0, 1],
    )


def small_gemma3() -> Any:
    window = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**TEXT, head_dim=16, **window)).eval()


MASKABLE = {
    "qwen2": lambda: build_text("Qwen2"),
    "opt": lambda: spread(build_text("OPT", ffn_dim=128, word_embed_proj_dim=64)),
    "gemma2": lambda: build_text("Gemma2", head_dim=16, final_logit_softcapping=5.0),
    "granite": lambda: build_text("Granite", logits_scaling=4.0),
}
UNREACHABLE = {
    "mamba": lambda: spread(build_text("Mamba", state_size=8)),
    "qwen3_next": small_qwen3_next,
    "lfm2": lambda: build_text("Lfm2", layer_types=["conv", "full_attention"], block_multiple_of=16),
    "gemma3 with a short window": small_gemma3,
}


def spread(model: Any) -> Any:
    """Give a model whose config does not set the scale of its weights some that make tokens matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in model.parameters():
            if x.dim() >= 2:
                x.normal_(0, 0.15, generator=generator)
    return model


@pytest.mark.parametrize("name", [*MASKABLE, *UNREACHABLE])
def test_text_models(name):
    rollout = text_rollout({**MASKABLE, **UNREACHABLE}[name]())
    expected, own = deleted_logps(rollout), own_logps(rollout.model, rollout.ids, rollout.mask)
    for ablation in (None, "delete", "mask"):
        if ablation == "mask" and name in UNREACHABLE:
            with pytest.raises(ConfigError, match="ablation"):
                rollout.score(ablation=ablation)
            continue
        for batch_size in (None, 1):
            out = rollout.score(ablation=ablation, batch_size=batch_size, streams=("clean", "ablated"))
            assert_close(out.logps, own, rollout.valid)
            assert_close(out.ablated_logps, expected, rollout.reasoned)
            assert largest(out.ablated_logps, out.logps, rollout.reasoned) > 1e-3


class Adapter(nn.Module):
    """A head with a low-rank addition, whose weight does not tell."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.low = base, nn.Linear(base.in_features, 2, bias=False)
        self.high = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.high(self.low(x))


def hooked(base: nn.Linear) -> nn.Linear:
    """A head whose output a hook changes a little."""
    base.register_forward_hook(lambda _, __, out: 1.02 * out)
    return base


HEADS = {
    "adapter": Adapter,
    "bias": lambda base: nn.Linear(64, base.out_features, bias=True),
    "hook": hooked,
    "hook before": lambda base: base.register_forward_pre_hook(lambda _, x: (x[0] * 1.02,)) and base,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_is_more_than_its_weight(qwen, kind, dtype):
    """In 16 bits rounding would hide a small change; the model's own logits are taken, whatever its size."""
    model = copy.deepcopy(qwen.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.lm_head = HEADS[kind](model.lm_head)
    inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in qwen.inputs.items()}
    other = replace(qwen, model=model.to(dtype), inputs=inputs)
    if dtype == torch.bfloat16:
        out = other.score(streams=("clean",))
        own = own_logps(model, other.ids, other.mask, **other.inputs)
        assert_close(out.logps, own, other.valid, rtol=0, atol=2e-3)
        return
    out = other.score()
    own = own_logps(model, other.ids, other.mask, **other.inputs)
    assert largest(own, qwen.score().logps, qwen.valid) > 1e-2
    assert_close(out.logps, own, other.valid)
    dark = corrupted_inputs(other, PatchMask())
    assert_close(out.corrupted_logps, own_logps(model, other.ids, other.mask, **dark), other.visual)
    assert_close(out.ablated_logps, deleted_logps(other), other.reasoned)


# Bad input


@contextlib.contextmanager
def no_forward():
    def refuse(module: nn.Module, _: Any) -> None:
        raise AssertionError(f"forward of {type(module).__name__}")

    with nn.modules.module.register_module_forward_pre_hook(refuse):
        yield


def one_stray_role(rollout: Rollout) -> Tensor:
    roles = rollout.roles.clone()
    roles[0, 0] = 3
    return roles


def right_padded(rollout: Rollout) -> Tensor:
    P = rollout.mask.shape[1] - T
    return torch.cat([rollout.mask[:, :P].flip(1), rollout.mask[:, P:]], dim=1)


def without_a_prompt(rollout: Rollout) -> Tensor:
    mask = rollout.mask.clone()
    mask[1, :-T] = 0
    return mask


# What is wrong: the changed argument, its error, and the argument that the message names where that is another.
BAD_CALLS: dict[str, tuple[str, Any, type[SRPOError], str]] = {
    "no model": ("model", lambda _: None, ConfigError, ""),
    "a backbone": ("model", lambda r: r.model.model, ConfigError, ""),
    "another module": ("model", lambda _: nn.Linear(2, 2), ConfigError, ""),
    "ids of one sequence": ("input_ids", lambda r: r.ids[0], ShapeError, ""),
    "ids of floats": ("input_ids", lambda r: r.ids.float(), DtypeError, ""),
    "ids in a list": ("input_ids", lambda r: r.ids.tolist(), DtypeError, ""),
    "roles of another length": ("role_ids", lambda r: r.roles[:, 1:], ShapeError, ""),
    "roles of other rows": ("role_ids", lambda r: r.roles[:2], ShapeError, ""),
    "roles of floats": ("role_ids", lambda r: r.roles.float(), DtypeError, ""),
    "roles in a list": ("role_ids", lambda _: ROLES, DtypeError, ""),
    "unknown role": ("role_ids", one_stray_role, RoleParseError, ""),
    "no mask": ("attention_mask", lambda _: None, DtypeError, ""),
    "mask of another length": ("attention_mask", lambda r: r.mask[:, 1:], ShapeError, ""),
    "no completion": ("logits_to_keep", lambda _: 0, ConfigError, ""),
    "no prompt": ("logits_to_keep", lambda r: r.ids.shape[1], ConfigError, ""),
    "completion as a flag": ("logits_to_keep", lambda _: True, ConfigError, ""),
    "unknown stream": ("streams", lambda _: ("clean", "dark"), ConfigError, ""),
    "streams in a string": ("streams", lambda _: "clean", ConfigError, ""),
    "unknown credit": ("credit", lambda _: "srqo", ConfigError, ""),
    "no credit": ("credit", lambda _: None, ConfigError, ""),
    "no roles": ("role_ids", lambda _: None, DtypeError, ""),
    "unknown corruption": ("corruption", lambda _: "blank", ConfigError, ""),
    "no corruption": ("corruption", lambda _: None, ConfigError, ""),
    "class of a corruption": ("corruption", lambda _: Blank, ConfigError, ""),
    "unknown ablation": ("ablation", lambda _: "x", ConfigError, ""),
    "a misspelt option": ("temprature", lambda _: 0.5, ConfigError, "write temperature"),
    "another misspelt option": ("batchsize", lambda _: 1, ConfigError, "write batch_size"),
    "a seed": ("seed", lambda _: 3, ConfigError, "write generator"),
    "a misspelt input": ("image_grid_twh", lambda r: r.inputs["image_grid_thw"], ConfigError, "write image_grid_thw"),
    "an input of nobody": ("colour", lambda _: "red", ConfigError, ""),
    "labels": ("labels", lambda r: r.ids, ConfigError, ""),
    "embeddings": ("inputs_embeds", lambda r: r.ids[..., None].float(), ConfigError, ""),
    "tuples": ("return_dict", lambda _: False, ConfigError, ""),
    "prompts padded on the right": ("attention_mask", right_padded, ShapeError, "padding_side='left'"),
    "padding that counts": ("attention_mask", lambda r: torch.ones_like(r.mask), ShapeError, "0 on padding"),
    "no prompt in a row": ("attention_mask", without_a_prompt, ShapeError, "rows [1]"),
    "batches of 0": ("batch_size", lambda _: 0, ConfigError, ""),
    "batches of a half": ("batch_size", lambda _: 0.5, ConfigError, ""),
    "temperature 0": ("temperature", lambda _: 0.0, ConfigError, ""),
    "negative seed": ("generator", lambda _: -1, ConfigError, ""),
    "layout in a string": ("pixel_layout", lambda _: "flattened", ConfigError, "layout"),
    "no pixels": ("pixel_values", lambda _: None, ConfigError, ""),
    "a grid too few": ("image_grid_thw", lambda r: r.inputs["image_grid_thw"][:2], ShapeError, ""),
    "larger grids": ("image_grid_thw", lambda r: r.inputs["image_grid_thw"] + 2, ShapeError, ""),
    "no grid": ("image_grid_thw", lambda _: None, SRPOError, ""),
    "no token types": ("mm_token_type_ids", lambda _: None, ConfigError, ""),
    "token types of the prompt": ("mm_token_type_ids", lambda r: r.inputs["mm_token_type_ids"][:, :-T], ShapeError, ""),
    "too many images": ("num_images", lambda _: [2, 1, 1], ShapeError, ""),
    "short positions": ("position_ids", lambda r: torch.arange(r.ids.shape[1] - 1).expand(3, 3, -1), ShapeError, ""),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_refused_before_any_forward(qwen, case):
    argument, make, error, named = BAD_CALLS[case]
    arguments = {"model": qwen.model, "input_ids": qwen.ids, "attention_mask": qwen.mask, "logits_to_keep": T}
    with no_forward(), pytest.raises(error) as raised:
        score_streams(**arguments | {"role_ids": qwen.roles} | qwen.inputs | {argument: make(qwen)})
    assert (named or argument) in str(raised.value)


def test_padding_that_the_policy_saw(qwen):
    """Trainers pass the mask of what was sampled: TRL counts the padding that some processors add to prompts."""
    ones = torch.ones_like(qwen.mask)
    got = replace(qwen, mask=ones).score(padding_counts=True, streams=("clean",))
    with torch.no_grad():
        logits = qwen.model(input_ids=qwen.ids, attention_mask=ones, **qwen.inputs).logits[:, -T - 1 : -1].float()
    own = logits.log_softmax(dim=-1).gather(-1, qwen.ids[:, -T:, None])[..., 0]
    assert_close(got.logps, own, ones[:, -T:].bool())


@pytest.mark.parametrize("family", ["idefics3", "llava"])
def test_pixels_that_do_not_fit_the_image_tokens(family):
    rollout = make_rollout(family, tiny_vlms.build(family))
    without = {"pixel_values": None, "pixel_attention_mask": None}
    with no_forward(), pytest.raises(ConfigError, match="pixel_values"):
        rollout.score(**without)
    fewer = {"pixel_values": rollout.inputs["pixel_values"][:2]}
    with no_forward(), pytest.raises(ShapeError, match="pixel_values"):
        rollout.score(**fewer)


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_an_image_token_that_was_sampled(family):
    rollout = make_rollout(family, tiny_vlms.build(family))
    ids = rollout.ids.clone()
    ids[1, -T] = rollout.model.config.image_token_id
    with no_forward(), pytest.raises(ConfigError, match=r"input_ids got 1 image tokens in the completion.*suppress"):
        replace(rollout, ids=ids).score()


@pytest.mark.parametrize("family", ["qwen25vl", "qwen3vl"])
def test_a_video_token_that_was_sampled_is_text(family):
    """No video was given: to the model the token is one of the vocabulary."""
    rollout = make_rollout(family, tiny_vlms.build(family))
    ids = rollout.ids.clone()
    ids[0, -T] = rollout.model.config.video_token_id
    odd = replace(rollout, ids=ids)
    for batch_size in (None, 1):
        out = odd.score(batch_size=batch_size)
        assert_close(out.logps, own_logps(odd.model, ids, odd.mask, **odd.inputs), odd.valid)
        assert_close(out.ablated_logps, deleted_logps(odd), odd.reasoned)


def test_masked_cells_may_hold_anything(rollout):
    """Trainers mark padding with -100; a valid cell of that kind is refused."""
    own = replace(rollout, ids=torch.where(rollout.mask != 0, rollout.ids, -100))
    for got, expected in zip(own.score(), rollout.score(), strict=True):
        assert same_bits(got, expected)
    row, column = (x[-1] for x in torch.where(rollout.mask != 0))
    ids = rollout.ids.clone()
    ids[row, column] = -100
    with pytest.raises(RoleParseError, match="input_ids got 1 values such as -100"):
        replace(rollout, ids=ids).score()


def test_positions_of_verl_are_told_apart(rollout):
    """`[B, 3, S]` looks like `[3, B, S]` where B is 3, as here; where it is not, the first axis tells."""
    B, S = rollout.ids.shape
    with pytest.raises(ShapeError, match="position_ids"):
        rollout.score(position_ids=torch.arange(S).expand(B + 2, 3, S))
    positions = own_positions(rollout)
    if positions is None or positions.dim() == 2:
        return
    assert positions.shape[0] == B
    for got, expected in zip(rollout.score(position_ids=positions), rollout.score(), strict=True):
        assert same_bits(got, expected)
    alike = replace(rollout, mask=rollout.mask[:1].expand(B, -1))
    for own, given in ((rollout, positions), (alike, positions[:, :1].expand(3, B, S))):
        with pytest.raises(ShapeError, match=r"position_ids.*transpose"):
            own.score(position_ids=given.transpose(0, 1))


@pytest.mark.parametrize("family", ["qwen25vl", "llava"])
def test_a_hook_that_puts_pictures_among_tokens_loses_nothing(family):
    """ms-swift's: ids become embeddings before the forward, and what it does not know is dropped without a word."""
    rollout = make_rollout(family, tiny_vlms.build(family), images=(1, 1, 1))
    wanted = rollout.score()
    model, known = rollout.model, ("attention_mask", "position_ids", "mm_token_type_ids", "logits_to_keep", "use_cache")

    def embed(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        embeds = model.get_input_embeddings()(kwargs["input_ids"])
        vision = {name: kwargs[name] for name in ("pixel_values", "image_grid_thw") if name in kwargs}
        features = model.model.get_image_features(**vision, return_dict=True).pooler_output
        place = (kwargs["input_ids"] == model.config.image_token_id)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(place, torch.cat(tuple(features)))
        return args, {"inputs_embeds": embeds} | {name: x for name, x in kwargs.items() if name in known}

    with model.register_forward_pre_hook(embed, with_kwargs=True):
        found = rollout.score()
    assert_close(found.logps, wanted.logps, rollout.valid)
    assert_close(found.corrupted_logps, wanted.corrupted_logps, rollout.visual)
    assert_close(found.ablated_logps, wanted.ablated_logps, rollout.reasoned)
