"""Both entries of the loss against the float64 oracle: values, gradients, weights, log-probs, entropy and metrics."""

from __future__ import annotations

import dataclasses
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Batch, batches, credit_configs, loss_configs, make_batch
from tolerances import assert_close_to_truth
from torch import Tensor

import srpo
from srpo import ConfigError, CreditConfig, LossConfig

# These few tests carry most of the comparison, and their examples are cheap.
many_examples = settings(max_examples=4 * settings().max_examples)

LOSS_TYPES = ["dapo", "grpo", "bnpo", "dr_grpo", "cispo"]


def loss_config(loss_type: str, **settings) -> LossConfig:
    defaults = {"max_completion_length": 11, "epsilon_high": 1.1 if loss_type == "cispo" else 0.28}
    return LossConfig(**{"loss_type": loss_type, **defaults, **settings})


def truth_and_eager(
    logits_or_logps: Tensor,
    batch: Batch,
    credit: CreditConfig | None,
    loss: LossConfig,
    inputs: dict[str, Any],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Run the oracle in `dtype` on the CPU: the truth in float64, the eager result in float32."""
    mask = batch.completion_mask
    variable = logits_or_logps.detach().cpu().to(dtype).requires_grad_()

    def log_probs(logits):
        return oracles.log_probs(logits, batch.completion_ids, mask, loss.temperature)

    logps = log_probs(variable) if variable.dim() == 3 else variable
    old_logps = inputs.get("old_logps")
    weights = inputs.get("weights")
    if weights is None and credit is not None:
        streams = [
            log_probs(inputs[f"{name}_logits"].to(dtype)) if f"{name}_logits" in inputs else inputs.get(f"{name}_logps")
            for name in ("corrupted", "ablated")
        ]
        base = logps.detach() if old_logps is None else old_logps
        contrast = oracles.contrast(base, *streams, batch.role_ids, mask, credit)
        roles = oracles.without_evidence(base, *streams, batch.role_ids, mask, credit)
        weights = oracles.weights(contrast, roles, mask, credit, inputs["advantages"])
    weights = mask.double() if weights is None else torch.where(mask.bool(), weights.double(), 0.0)
    result = oracles.loss(
        logps,
        inputs["advantages"],
        mask,
        loss,
        weights=weights,
        old_logps=old_logps,
        ref_logps=inputs.get("ref_logps"),
        importance_sampling_ratio=inputs.get("importance_sampling_ratio"),
        num_items_in_batch=inputs.get("num_items_in_batch"),
    )
    (gradient,) = torch.autograd.grad(result.loss, variable)
    return {
        "loss": result.loss,
        "logps": torch.where(mask.bool(), logps, 0.0),
        "weights": weights,
        "gradient": gradient,
        "entropy": oracles.entropies(variable.detach(), mask, loss.temperature) if variable.dim() == 3 else None,
        "metrics": result.metrics,
    }


def check_against_oracle(
    batch: Batch,
    backend: str,
    device: torch.device,
    *,
    credit: CreditConfig | None = None,
    loss: LossConfig = LossConfig(),  # noqa: B008
    entry: str = "logps",
    on_policy: bool = False,
    **inputs: Any,
) -> srpo.LossOutput:
    """Run one call and its oracle, compare everything. `credit=None` leaves the credit stage out."""
    inputs = {"advantages": batch.advantages, **inputs}
    if not on_policy:
        inputs["old_logps"] = batch.old_logps
    if loss.beta:
        inputs["ref_logps"] = batch.ref_logps
    live = any(name.endswith("_logits") for name in inputs)
    if credit is not None and "weights" not in inputs and not live:
        inputs |= {"corrupted_logps": batch.corrupted_logps, "ablated_logps": batch.ablated_logps}
    source = batch.logits if entry == "logits" else batch.logps
    assert source is not None
    precision = torch.float64 if source.dtype == torch.float64 and backend == "torch" else torch.float32
    truth = truth_and_eager(source, batch, credit, loss, inputs, torch.float64)
    eager = truth_and_eager(source, batch, credit, loss, inputs, precision)

    variable = source.detach().to(device).requires_grad_()
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    arguments |= {"completion_mask": batch.completion_mask.to(device), "loss": loss, "backend": backend}
    if credit is not None:
        arguments |= {"role_ids": batch.role_ids.to(device), "credit": credit}
    advantages = arguments.pop("advantages")
    if entry == "logits":
        out = srpo.role_weighted_grpo_loss(variable, batch.completion_ids.to(device), advantages, **arguments)
    else:
        out = srpo.role_weighted_grpo_loss_from_logps(variable, advantages, **arguments)
    out.loss.backward()
    gradient = variable.grad
    assert gradient is not None
    assert gradient.dtype == source.dtype

    for name in ("loss", "logps", "weights"):
        got = getattr(out, name)
        assert_close_to_truth(name, got, truth[name], eager[name], precision=precision)
    if entry == "logits":
        assert_close_to_truth("entropy", out.entropy, truth["entropy"], eager["entropy"], precision=precision)
    else:
        assert out.entropy is None
    stored = source.dtype if source.dtype.itemsize < 4 else precision
    rounded_eager = eager["gradient"].to(stored)
    assert_close_to_truth("gradient", gradient, truth["gradient"], rounded_eager, precision=stored)
    for name, value in truth["metrics"].items():
        expected = torch.tensor(value, dtype=torch.float64)
        assert_close_to_truth("metric", out.metrics[name], expected, precision=precision, what=name)
    return out


@pytest.mark.parametrize("importance_sampling_level", ["token", "sequence_token"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("entry", ["logps", "logits"])
def test_every_loss_type_with_everything_on(backend, device, entry, loss_type, importance_sampling_level):
    batch = make_batch(100, 3, 5, vocabulary=33, mask_style="holes", role_style="mixed")
    delta = None if loss_type == "cispo" else 1.5
    loss = loss_config(loss_type, beta=0.1, delta=delta, importance_sampling_level=importance_sampling_level)
    ratio = batch.importance_sampling_ratio
    check_against_oracle(
        batch, backend, device, credit=CreditConfig(), loss=loss, entry=entry, importance_sampling_ratio=ratio
    )


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("entry", ["logps", "logits"])
def test_plain_grpo_on_policy(backend, device, entry, loss_type):
    batch = make_batch(101, 3, 5, vocabulary=7, mask_style="ragged")
    check_against_oracle(batch, backend, device, loss=loss_config(loss_type), entry=entry, on_policy=True)


@many_examples
@given(
    batch=batches(),
    credit=st.none() | credit_configs(),
    loss=loss_configs(),
    on_policy=st.booleans(),
    with_ratio=st.booleans(),
)
def test_random_batches_from_logps(backend, device, batch, credit, loss, on_policy, with_ratio):
    extra = {"importance_sampling_ratio": batch.importance_sampling_ratio} if with_ratio else {}
    check_against_oracle(batch, backend, device, credit=credit, loss=loss, on_policy=on_policy, **extra)


@many_examples
@given(
    batch=batches(max_rows=3, max_tokens=4, vocabularies=(1, 2, 7, 33, 130)),
    credit=st.none() | credit_configs(),
    loss=loss_configs(),
    on_policy=st.booleans(),
    temperature=st.sampled_from([0.7, 1.0, 1.3]),
)
def test_random_batches_from_logits(backend, device, batch, credit, loss, on_policy, temperature):
    loss = dataclasses.replace(loss, temperature=temperature)
    check_against_oracle(batch, backend, device, credit=credit, loss=loss, entry="logits", on_policy=on_policy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("entry", ["logps", "logits"])
def test_outputs_are_fp32_whatever_the_input(backend, device, entry, dtype):
    """fp64 in gives fp64 out on the torch backend; the kernels compute in fp32."""
    batch = make_batch(131, 2, 3, vocabulary=7, mask_style="full", role_style="mixed").to(device)
    batch = batch.map(lambda x: x.to(dtype) if x.is_floating_point() else x)
    arguments = {**batch.contrast_streams(), "completion_mask": batch.completion_mask, "backend": backend}
    if entry == "logits":
        out = srpo.role_weighted_grpo_loss(batch.logits, batch.completion_ids, batch.advantages, **arguments)
    else:
        out = srpo.role_weighted_grpo_loss_from_logps(batch.logps, batch.advantages, **arguments)
    expected = torch.float64 if dtype == torch.float64 and backend == "torch" else torch.float32
    outputs = {"loss": out.loss, "logps": out.logps, "weights": out.weights}
    if entry == "logits":
        outputs["entropy"] = out.entropy
    assert {name: value.dtype for name, value in outputs.items()} == dict.fromkeys(outputs, expected)


def test_strength_zero_gives_unit_weights_and_leaves_the_contrast_alone(backend, device):
    batch = make_batch(132, 2, 5, mask_style="full", role_style="mixed").to(device)
    arguments = {**batch.contrast_streams(), "completion_mask": batch.completion_mask, "backend": backend}
    contrast = srpo.role_contrast(batch.old_logps, **arguments, credit=CreditConfig())
    off = CreditConfig(strength=0.0)
    assert torch.equal(srpo.role_contrast(batch.old_logps, **arguments, credit=off), contrast)
    weights = srpo.token_weights(contrast, batch.role_ids, batch.completion_mask, credit=off, backend=backend)
    assert torch.equal(weights, torch.ones_like(contrast))


@many_examples
@given(batch=batches(), credit=credit_configs(strength=0.7), special=st.booleans())
def test_random_contrasts_and_weights(backend, device, batch, credit, special):
    """The two functions of the credit stage on their own, base log-probs of -inf included."""
    base = batch.old_logps.clone()
    if special and base.numel():
        base.view(-1)[:: max(1, base.numel() // 3)] = -torch.inf
    truth = oracles.contrast(
        base, batch.corrupted_logps, batch.ablated_logps, batch.role_ids, batch.completion_mask, credit
    )
    on_device = batch.to(device)
    got = srpo.role_contrast(
        base.to(device),
        **on_device.contrast_streams(),
        completion_mask=on_device.completion_mask,
        credit=credit,
        backend=backend,
    )
    assert_close_to_truth("contrast", got, truth, precision=torch.float32)
    weights = srpo.token_weights(
        truth.float().to(device),
        on_device.role_ids,
        on_device.completion_mask,
        advantages=on_device.advantages,
        credit=credit,
        backend=backend,
    )
    expected = oracles.weights(truth.float(), batch.role_ids, batch.completion_mask, credit, batch.advantages)
    assert_close_to_truth("weights", weights, expected, precision=torch.float32)
    assert torch.equal(srpo.token_advantages(on_device.advantages, weights), on_device.advantages[:, None] * weights)


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 33, 127, 128, 129, 1000, 4095, 4096, 4097, 8193, 16385])
def test_vocabulary_sizes_around_block_edges(backend, device, vocabulary):
    batch = make_batch(102, 1, 2, vocabulary=vocabulary, mask_style="full", role_style="mixed")
    check_against_oracle(batch, backend, device, entry="logits", loss=LossConfig(temperature=0.9, beta=0.05))


@pytest.mark.parametrize("vocabulary", [151665, 151936, 152064])
def test_vocabulary_sizes_of_real_models(backend, device, vocabulary):
    batch = make_batch(103, 1, 1, vocabulary=vocabulary, mask_style="full", role_style="none", dtype=torch.bfloat16)
    check_against_oracle(batch, backend, device, entry="logits")


def test_many_rows_of_a_wide_vocabulary(backend, device):
    """More rows than one chunk of the CPU path holds, masked ones in between."""
    batch = make_batch(125, 1, 20, vocabulary=60_001, mask_style="holes", role_style="mixed")
    check_against_oracle(
        batch, backend, device, entry="logits", credit=CreditConfig(), loss=LossConfig(temperature=0.9)
    )


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(request, dtype):
    """The CPU path hands chunks of rows to threads; order and results do not depend on how many there are."""
    batch = make_batch(133, 2, 20, vocabulary=60_001, mask_style="holes", role_style="mixed", dtype=dtype)

    def run():
        leaf = batch.logits.clone().requires_grad_()
        out = srpo.role_weighted_grpo_loss(
            leaf,
            batch.completion_ids,
            batch.advantages,
            completion_mask=batch.completion_mask,
            old_logps=batch.old_logps,
            backend="torch",
            **batch.contrast_streams(),
        )
        out.loss.backward()
        return out.loss.detach(), out.logps, out.entropy, leaf.grad

    one = run()
    request.getfixturevalue("two_threads")
    two = run()
    assert torch.get_num_threads() == 2
    for got, expected in zip(two, one, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("importance_sampling_level", ["token", "sequence_token"])
@pytest.mark.parametrize("normalize", ["mean", "solve"])
@pytest.mark.parametrize("tokens", [1023, 1024, 1025, 2500])
def test_long_trajectories(backend, device, tokens, normalize, importance_sampling_level):
    """Around and far beyond the block of tokens that one program of the trajectory kernels holds."""
    batch = make_batch(126, 1, tokens, mask_style="holes", role_style="spans")
    batch = batch.replace(advantages=torch.tensor([-0.7]))
    check_against_oracle(
        batch,
        backend,
        device,
        credit=CreditConfig(normalize=normalize, weight_min=0.5, weight_max=2.0),
        loss=LossConfig(importance_sampling_level=importance_sampling_level, beta=0.05),
    )


def test_the_sampled_token_may_sit_anywhere(backend, device):
    """First, last and block-boundary ids, each the clear maximum once and the clear minimum once."""
    ids = torch.tensor([[0, 4095, 4096, 4999], [0, 4095, 4096, 4999]])
    batch = make_batch(104, 2, 4, vocabulary=5000, mask_style="full", role_style="none")
    logits = batch.logits.clone()
    logits[0].scatter_(1, ids[0][:, None], 30.0)
    logits[1].scatter_(1, ids[1][:, None], -30.0)
    old_logps = oracles.log_probs(logits.double(), ids, batch.completion_mask).float() - 0.1
    batch = batch.replace(logits=logits, completion_ids=ids, old_logps=old_logps)
    out = check_against_oracle(batch, backend, device, entry="logits")
    assert (out.logps <= 0).all()


def test_large_logits_keep_their_precision(backend, device):
    batch = make_batch(105, 2, 3, vocabulary=130, mask_style="full")
    logits = 60.0 * batch.logits + 1000.0
    batch = batch.replace(logits=logits)
    out = check_against_oracle(batch, backend, device, entry="logits", on_policy=True)
    assert (out.logps <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("entry", ["logps", "logits"])
def test_dtypes(backend, device, entry, dtype):
    """All floats in the tested dtype at the log-prob level; half-precision logits with fp32 log-probs."""
    batch = make_batch(106, 3, 4, vocabulary=33, mask_style="holes", role_style="mixed", dtype=dtype)
    if entry == "logps":
        batch = batch.map(lambda x: x.to(dtype) if x.is_floating_point() else x)
    check_against_oracle(
        batch,
        backend,
        device,
        credit=CreditConfig(weight_min=0.5, weight_max=2.0),
        loss=LossConfig(beta=0.1, temperature=0.8 if entry == "logits" else 1.0),
        entry=entry,
        importance_sampling_ratio=batch.importance_sampling_ratio,
    )


@pytest.mark.parametrize("direction", ["evidence", "advantage"])
@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_token_level_advantages(backend, device, loss_type, direction):
    batch = make_batch(107, 3, 6, mask_style="holes", role_style="mixed")
    advantages = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    advantages[:, 2] = 0.0
    advantages[~batch.valid] = torch.nan
    check_against_oracle(
        batch,
        backend,
        device,
        credit=CreditConfig(direction=direction),
        loss=loss_config(loss_type),
        advantages=advantages,
    )


@pytest.mark.parametrize("entry", ["logps", "logits"])
def test_one_importance_ratio_per_sequence(backend, device, entry):
    batch = make_batch(108, 3, 4, vocabulary=7, mask_style="holes")
    ratio = torch.tensor([[0.5], [torch.nan], [1.7]])
    check_against_oracle(
        batch, backend, device, entry=entry, loss=LossConfig(beta=0.1), importance_sampling_ratio=ratio
    )


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("normaliser", [37, 12.5, torch.tensor(20), torch.tensor(8.25)], ids=repr)
def test_num_items_in_batch_acts_for_dapo_and_cispo_only(backend, device, loss_type, normaliser):
    batch = make_batch(109, 3, 4)
    out = check_against_oracle(batch, backend, device, loss=loss_config(loss_type), num_items_in_batch=normaliser)
    without = check_against_oracle(batch, backend, device, loss=loss_config(loss_type))
    assert (out.loss != without.loss) == (loss_type in ("dapo", "cispo"))


@pytest.mark.parametrize("entry", ["logps", "logits"])
def test_given_weights_replace_the_credit_stage(backend, device, entry):
    batch = make_batch(110, 3, 5, vocabulary=7, mask_style="holes")
    weights = torch.where(batch.valid, 2.0 * torch.rand(3, 5, generator=torch.Generator().manual_seed(1)), torch.nan)
    weights[0, 0] = 0.0
    check_against_oracle(batch, backend, device, entry=entry, loss=LossConfig(beta=0.1), weights=weights)


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("extra_row", [False, True], ids=["T", "T+1"])
@pytest.mark.parametrize("signal", ["perception_ablation", "image_independence"])
def test_live_contrasts(backend, device, signal, extra_row, on_policy):
    """Logits of the contrast streams; rows that the method does not need hold NaN."""
    batch = make_batch(111, 3, 5, vocabulary=33, mask_style="holes", role_style="mixed")
    generator = torch.Generator().manual_seed(2)
    needed = {"corrupted": batch.role_ids == 1, "ablated": batch.role_ids == 2}
    if signal == "image_independence":
        needed = {"corrupted": batch.role_ids > 0}
    streams = {}
    for name, rows in needed.items():
        stream = batch.logits + torch.randn(3, 5, 33, generator=generator)
        stream = torch.where((rows & batch.valid)[..., None], stream, torch.nan)
        if extra_row:
            stream = torch.cat([stream, torch.full((3, 1, 33), torch.nan)], dim=1)
        streams[f"{name}_logits"] = stream
    credit = CreditConfig(reasoning_signal=signal, weight_min=0.5, weight_max=2.0)
    out = check_against_oracle(
        batch,
        backend,
        device,
        credit=credit,
        entry="logits",
        on_policy=on_policy,
        loss=LossConfig(temperature=0.8),
        **streams,
    )
    assert (out.weights[batch.valid.to(device)] != 1).any()


def test_live_contrasts_in_other_dtypes_and_layouts(backend, device):
    """The three streams need not look alike in memory."""
    batch = make_batch(127, 2, 4, vocabulary=33, mask_style="holes", role_style="mixed")
    generator = torch.Generator().manual_seed(4)
    corrupted, ablated = (batch.logits.nan_to_num() + torch.randn(2, 4, 33, generator=generator) for _ in range(2))
    check_against_oracle(
        batch,
        backend,
        device,
        credit=CreditConfig(weight_min=0.5, weight_max=2.0),
        entry="logits",
        corrupted_logits=corrupted.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        ablated_logits=ablated.to(torch.bfloat16).transpose(0, 1).contiguous().transpose(0, 1),
    )


def views_of_logits(logits: Tensor, layout: str) -> tuple[Tensor, Any]:
    """A leaf that holds the logits in another memory layout, and the function that views it as [B, T(+1), V]."""
    B, T, V = logits.shape
    nan_row = logits.new_full((B, 1, V), torch.nan)
    if layout == "T+1":
        return torch.cat([logits, nan_row], dim=1), lambda leaf: leaf
    if layout == "slice of T+1":
        return torch.cat([logits, nan_row], dim=1), lambda leaf: leaf[:, :-1]
    if layout == "time first":
        return logits.transpose(0, 1).contiguous(), lambda leaf: leaf.transpose(0, 1)
    if layout == "vocabulary first":
        return logits.permute(2, 0, 1).contiguous(), lambda leaf: leaf.permute(1, 2, 0)
    if layout == "every second logit":
        return torch.stack([logits, torch.full_like(logits, torch.nan)], dim=-1), lambda leaf: leaf[..., 0]
    if layout == "inside a longer sequence":
        return torch.cat([nan_row, nan_row, logits, nan_row], dim=1), lambda leaf: leaf[:, 2:-1]
    if layout == "padded vocabulary":
        return torch.cat([logits, logits.new_full((B, T, 3), torch.nan)], dim=2), lambda leaf: leaf[..., :V]
    return logits.clone(), lambda leaf: leaf


@pytest.mark.parametrize(
    "layout",
    [
        "contiguous",
        "T+1",
        "slice of T+1",
        "time first",
        "vocabulary first",
        "every second logit",
        "inside a longer sequence",
        "padded vocabulary",
    ],
)
def test_memory_layouts_of_logits(backend, device, layout):
    """Values and gradients equal those of contiguous logits; NaN around the view is never read, its gradient is 0."""
    batch = make_batch(112, 3, 4, vocabulary=33, mask_style="holes", role_style="mixed").to(device)
    options = {
        **batch.contrast_streams(),
        "completion_mask": batch.completion_mask,
        "old_logps": batch.old_logps,
        "backend": backend,
    }

    def run(name):
        leaf, view = views_of_logits(batch.logits, name)
        leaf.requires_grad_()
        out = srpo.role_weighted_grpo_loss(view(leaf), batch.completion_ids, batch.advantages, **options)
        out.loss.backward()
        return out, leaf.grad, view(leaf.grad)

    expected, _, expected_gradient = run("contiguous")
    out, whole_gradient, gradient = run(layout)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out.logps, expected.logps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient[:, :4], expected_gradient, rtol=1e-5, atol=1e-7)
    assert expected_gradient.any()
    assert whole_gradient.isfinite().all()
    assert whole_gradient.count_nonzero() == expected_gradient.count_nonzero()


def test_memory_layouts_and_dtypes_of_the_other_inputs(backend, device):
    """Transposed and narrow integer inputs, unaligned slices of ids, boolean and float masks."""
    batch = make_batch(113, 3, 4, vocabulary=7, mask_style="holes", role_style="mixed").to(device)

    def run(ids, mask, roles, floats):
        logits = batch.logits.clone().requires_grad_()
        out = srpo.role_weighted_grpo_loss(
            logits,
            ids,
            batch.advantages,
            role_ids=roles,
            completion_mask=mask,
            corrupted_logps=floats(batch.corrupted_logps),
            ablated_logps=floats(batch.ablated_logps),
            old_logps=floats(batch.old_logps),
            ref_logps=floats(batch.ref_logps),
            importance_sampling_ratio=floats(batch.importance_sampling_ratio),
            loss=LossConfig(beta=0.1),
            backend=backend,
        )
        out.loss.backward()
        return out.loss.detach(), out.weights, logits.grad

    def transposed(x):
        return x.t().contiguous().t()

    def inner_slice(x):
        return torch.cat([x[:, :1], x, x[:, :1]], dim=1)[:, 1:-1]

    ids, mask, roles = batch.completion_ids, batch.completion_mask, batch.role_ids
    expected = run(ids, mask, roles, lambda x: x)
    variants = [
        (transposed(ids), transposed(mask), transposed(roles), transposed),
        (inner_slice(ids), inner_slice(mask), inner_slice(roles), inner_slice),
        (ids.int(), mask.bool(), roles.long(), lambda x: x),
        (ids, mask.float(), roles.int(), lambda x: x.double()),
        (ids, mask.to(torch.uint8), roles.to(torch.uint8), lambda x: x),
    ]
    for variant in variants:
        for got, wanted in zip(run(*variant), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize("advantage_level", ["sequence", "token"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_logits_equal_padded_logits(backend, device, loss_type, advantage_level, index_dtype):
    """Three trajectories of 4, 0 and 2 tokens in [N, V] logits that are a strided view."""
    lengths = [4, 0, 2]
    batch = make_batch(114, 3, 4, vocabulary=7, mask_style="full", role_style="mixed").to(device)
    kept = torch.arange(4, device=device)[None, :] < torch.tensor(lengths, device=device)[:, None]
    batch = batch.replace(completion_mask=kept.long())
    loss = loss_config(loss_type, beta=0.1)
    live = {"corrupted_logits": batch.logits + 1.0 * torch.randn_like(batch.logits), "ablated_logits": -batch.logits}
    token_ratio = batch.importance_sampling_ratio.nan_to_num(1.0)
    advantages = batch.advantages if advantage_level == "sequence" else batch.advantages[:, None] * token_ratio
    fields = ("old_logps", "ref_logps", "role_ids")

    padded_leaf = batch.logits.clone().requires_grad_()
    padded = srpo.role_weighted_grpo_loss(
        padded_leaf,
        batch.completion_ids,
        advantages,
        completion_mask=batch.completion_mask,
        importance_sampling_ratio=token_ratio,
        loss=loss,
        backend=backend,
        **{name: getattr(batch, name) for name in fields},
        **live,
    )
    padded.loss.backward()

    packed_leaf = torch.stack(
        [batch.logits[kept], torch.full((6, 7), torch.nan, device=device)], dim=1
    ).requires_grad_()
    packed = srpo.role_weighted_grpo_loss(
        packed_leaf[:, 0],
        batch.completion_ids[kept],
        advantages if advantage_level == "sequence" else advantages[kept],
        importance_sampling_ratio=token_ratio[kept],
        cu_seqlens=torch.tensor([0, 4, 4, 6], dtype=index_dtype, device=device),
        loss=loss,
        backend=backend,
        **{name: getattr(batch, name)[kept] for name in fields},
        **{name: value[kept] for name, value in live.items()},
    )
    packed.loss.backward()
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-5, atol=1e-6)
    for name in ("logps", "weights", "entropy"):
        torch.testing.assert_close(getattr(packed, name), getattr(padded, name)[kept], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed_leaf.grad[:, 0], padded_leaf.grad[kept], rtol=1e-5, atol=1e-7)
    assert not packed_leaf.grad[:, 1].any()
    for name, value in padded.metrics.items():
        torch.testing.assert_close(packed.metrics[name], value, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_packed_accepts_a_mask_and_one_ratio_per_trajectory(backend, device):
    batch = make_batch(115, 2, 4, mask_style="full", role_style="mixed").to(device)
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1]], device=device)
    ratio = torch.tensor([[0.5], [1.5]], device=device)
    gradients = []
    for packed in (False, True):
        leaf = batch.logps.clone().requires_grad_()

        def laid_out(x, packed=packed):
            return x.reshape(-1) if packed else x

        out = srpo.role_weighted_grpo_loss_from_logps(
            laid_out(leaf),
            batch.advantages,
            completion_mask=laid_out(mask),
            importance_sampling_ratio=ratio,
            cu_seqlens=torch.tensor([0, 4, 8], dtype=torch.int32, device=device) if packed else None,
            backend=backend,
            **{name: laid_out(value) for name, value in batch.contrast_streams().items()},
        )
        out.loss.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-8)
    assert not gradients[0][mask == 0].any()


def test_the_output_of_a_call(backend, device):
    batch = make_batch(116, 2, 3, vocabulary=7, mask_style="holes").to(device)
    logits = batch.logits.clone().requires_grad_()
    out = srpo.role_weighted_grpo_loss(
        logits,
        batch.completion_ids,
        batch.advantages,
        completion_mask=batch.completion_mask,
        ref_logps=batch.ref_logps,
        loss=LossConfig(beta=0.1),
        backend=backend,
        **batch.contrast_streams(),
    )
    assert out._fields == ("loss", "logps", "weights", "entropy", "metrics")
    assert out.loss.shape == ()
    for value in (out.logps, out.weights, out.entropy):
        assert (value.shape, value.dtype, value.requires_grad) == ((2, 3), torch.float32, False)
        assert not value[~batch.valid].any()
    assert {"kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"} <= set(
        out.metrics
    )
    assert all(name.startswith("srpo/") or "/" not in name or name.startswith("clip_ratio/") for name in out.metrics)
    assert all(
        isinstance(value, Tensor) and value.shape == () and not value.requires_grad for value in out.metrics.values()
    )


def test_role_ids_none_is_exact_grpo(backend, device):
    batch = make_batch(117, 3, 4).to(device)
    out = srpo.role_weighted_grpo_loss_from_logps(
        batch.logps, batch.advantages, completion_mask=batch.completion_mask, backend=backend
    )
    assert torch.equal(out.weights, batch.valid.float())


@pytest.mark.parametrize("entry", ["logps", "logits"])
def test_the_upstream_gradient_scales_and_backward_repeats(backend, device, entry):
    """Trap 12 of the kernels: loss * 0.37, and a second backward through a retained graph."""
    batch = make_batch(118, 2, 4, vocabulary=7).to(device)
    gradients = []
    for factor in (1.0, 0.37, -2.0):
        leaf = (batch.logits if entry == "logits" else batch.logps).clone().requires_grad_()
        common = {"completion_mask": batch.completion_mask, "old_logps": batch.old_logps, "backend": backend}
        if entry == "logits":
            out = srpo.role_weighted_grpo_loss(leaf, batch.completion_ids, batch.advantages, **common)
        else:
            out = srpo.role_weighted_grpo_loss_from_logps(leaf, batch.advantages, **common)
        scaled = out.loss * factor
        (first,) = torch.autograd.grad(scaled, leaf, retain_graph=True)
        (second,) = torch.autograd.grad(scaled, leaf)
        assert torch.equal(first, second)
        gradients.append(first / factor)
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_backward_writes_the_gradient_into_the_logits(backend, device, dtype):
    batch = make_batch(119, 2, 4, vocabulary=33, mask_style="holes", dtype=dtype).to(device)

    def run(inplace):
        leaf = batch.logits.clone().requires_grad_()
        logits = leaf * 1.0
        out = srpo.role_weighted_grpo_loss(
            logits,
            batch.completion_ids,
            batch.advantages,
            completion_mask=batch.completion_mask,
            old_logps=batch.old_logps,
            inplace_backward=inplace,
            backend=backend,
        )
        version = logits._version
        out.loss.backward(retain_graph=True)
        return out, leaf.grad, logits, version

    _, expected, untouched, _ = run(inplace=False)
    assert torch.equal(untouched[batch.valid], batch.logits[batch.valid])
    out, gradient, logits, version = run(inplace=True)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(logits.detach(), expected)
    assert logits._version > version
    with pytest.raises(RuntimeError):
        out.loss.backward()


def test_inplace_backward_is_an_error_when_the_logits_are_used_elsewhere(backend, device):
    batch = make_batch(120, 2, 3, vocabulary=7, mask_style="full").to(device)
    leaf = batch.logits.clone().requires_grad_()
    logits = leaf * 1.0
    out = srpo.role_weighted_grpo_loss(
        logits, batch.completion_ids, batch.advantages, inplace_backward=True, backend=backend
    )
    elsewhere = logits.square().sum()  # saved the logits
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        elsewhere.backward()


def test_inplace_backward_refuses_leaf_logits(backend, device):
    batch = make_batch(121, 2, 3, vocabulary=7, mask_style="full").to(device)
    leaf = batch.logits.clone().requires_grad_()
    with pytest.raises(ConfigError, match="inplace_backward"):
        srpo.role_weighted_grpo_loss(
            leaf, batch.completion_ids, batch.advantages, inplace_backward=True, backend=backend
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_selected_logps_and_entropy(backend, device, dtype, temperature):
    """Values, and the gradient of a random mixture of log-probs and entropies."""
    batch = make_batch(122, 2, 4, vocabulary=33, mask_style="holes", dtype=dtype)
    mask, ids = batch.completion_mask, batch.completion_ids
    upstream = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def oracle(precision):
        leaf = batch.logits.to(precision).requires_grad_()
        logps = oracles.log_probs(leaf, ids, mask, temperature)
        distribution = torch.log_softmax(torch.where(mask.bool()[..., None], leaf, 0.0) / temperature, -1)
        entropy = torch.where(mask.bool(), -(distribution.exp() * distribution).sum(-1), 0.0)
        mixture = (logps * upstream[0].to(precision) + entropy * upstream[1].to(precision)).sum()
        return logps, entropy, torch.autograd.grad(mixture, leaf)[0]

    precision = torch.float64 if dtype == torch.float64 and backend == "torch" else torch.float32
    truth, eager = oracle(torch.float64), oracle(precision)
    leaf = batch.logits.to(device).requires_grad_()
    out = srpo.selected_logps(
        leaf, ids.to(device), temperature=temperature, mask=mask.to(device), return_entropy=True, backend=backend
    )
    assert out.logps.dtype == out.entropy.dtype == precision
    on_device = upstream.to(device, precision)
    (out.logps * on_device[0] + out.entropy * on_device[1]).sum().backward()
    assert_close_to_truth("logps", out.logps, truth[0], eager[0], precision=precision)
    assert_close_to_truth("entropy", out.entropy, truth[1], eager[1], precision=precision)
    stored = dtype if dtype.itemsize < 4 else precision
    assert_close_to_truth("gradient", leaf.grad, truth[2], eager[2].to(stored), precision=stored)

    alone = srpo.selected_logps(
        leaf.detach(), ids.to(device), temperature=temperature, mask=mask.to(device), backend=backend
    )
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, out.logps)


def test_selected_logps_of_packed_rows_and_of_one_more_position(backend, device):
    batch = make_batch(128, 2, 4, vocabulary=33, mask_style="full").to(device)
    expected = srpo.selected_logps(batch.logits, batch.completion_ids, backend=backend)
    extra = torch.cat([batch.logits, torch.full((2, 1, 33), torch.nan, device=device)], dim=1)
    assert torch.equal(srpo.selected_logps(extra, batch.completion_ids, backend=backend), expected)
    packed = srpo.selected_logps(batch.logits.flatten(0, 1), batch.completion_ids.flatten(), backend=backend)
    assert torch.equal(packed, expected.flatten())


def test_given_contrasts_without_a_value_count_as_zero(backend, device):
    """NaN is 0; an infinite contrast takes the bound, and the weights stay finite."""
    roles = torch.tensor([[1, 1, 2, 2, 0]], dtype=torch.int8, device=device)
    mask = torch.ones(1, 5, dtype=torch.long, device=device)
    credit = CreditConfig(baseline="none", normalize="none")
    contrast = torch.tensor([[torch.nan, 0.1, torch.inf, -torch.inf, torch.nan]], device=device)
    weights = srpo.token_weights(contrast, roles, mask, credit=credit, backend=backend)
    expected = torch.tensor([[1.0, torch.e**0.1, 1.2, 0.8, 1.0]])
    torch.testing.assert_close(weights.cpu(), expected)


@pytest.mark.parametrize("entry", ["logps", "logits"])
def test_evaluation_without_gradient(backend, device, entry):
    """Under no_grad, and with inputs that need no gradient, the value is the same and nothing is attached."""
    batch = make_batch(129, 2, 4, vocabulary=7).to(device)
    common = {"completion_mask": batch.completion_mask, "backend": backend, **batch.contrast_streams()}

    def run(requires_grad):
        if entry == "logits":
            leaf = batch.logits.clone().requires_grad_(requires_grad)
            return srpo.role_weighted_grpo_loss(leaf, batch.completion_ids, batch.advantages, **common).loss
        leaf = batch.logps.clone().requires_grad_(requires_grad)
        return srpo.role_weighted_grpo_loss_from_logps(leaf, batch.advantages, **common).loss

    trained = run(requires_grad=True)
    with torch.no_grad():
        evaluated = run(requires_grad=True)
    for value in (evaluated, run(requires_grad=False)):
        assert not value.requires_grad
        assert torch.equal(value, trained.detach())


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_call_never_waits_for_the_device(device, layout):
    batch = make_batch(130, 2, 4, vocabulary=33, mask_style="full", role_style="mixed").to(device)
    arguments = {
        "advantages": batch.advantages,
        "completion_mask": batch.completion_mask,
        "old_logps": batch.old_logps,
        **batch.contrast_streams(),
    }
    logits, ids = batch.logits, batch.completion_ids
    if layout == "packed":
        arguments = {k: v if v.dim() == 1 else v.flatten() for k, v in arguments.items()}
        arguments["cu_seqlens"] = torch.tensor([0, 4, 8], dtype=torch.int32, device=device)
        logits, ids = logits.flatten(0, 1), ids.flatten()
    logits.requires_grad_()
    advantages = arguments.pop("advantages")
    srpo.role_weighted_grpo_loss(logits, ids, advantages, **arguments).loss.backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        srpo.role_weighted_grpo_loss(logits, ids, advantages, **arguments).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_old_and_current_logps_of_one_model_have_equal_bits(backend, device):
    """The on-policy ratio is exactly 1: `selected_logps` without gradient and the loss's own log-probs agree."""
    batch = make_batch(123, 3, 5, vocabulary=130, mask_style="holes").to(device)
    with torch.no_grad():
        old = srpo.selected_logps(
            batch.logits, batch.completion_ids, mask=batch.completion_mask, temperature=0.9, backend=backend
        )
    alone = srpo.selected_logps(
        batch.logits[:1], batch.completion_ids[:1], mask=batch.completion_mask[:1], temperature=0.9, backend=backend
    )
    out = srpo.role_weighted_grpo_loss(
        batch.logits,
        batch.completion_ids,
        batch.advantages,
        completion_mask=batch.completion_mask,
        loss=LossConfig(temperature=0.9),
        backend=backend,
    )
    assert torch.equal(out.logps, old)
    assert torch.equal(alone, old[:1])


def test_both_backends_agree_when_nobody_chooses(device):
    """`backend="auto"` is one of the two."""
    batch = make_batch(124, 2, 3, vocabulary=7).to(device)
    values = [
        srpo.role_weighted_grpo_loss(
            batch.logits, batch.completion_ids, batch.advantages, completion_mask=batch.completion_mask, backend=name
        ).loss.item()
        for name in ("auto", "torch", "triton")
    ]
    assert values[0] in values[1:]
