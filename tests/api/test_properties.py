"""P1 to P20 of the method, section 8, on both backends, over random ragged batches.

`tests/api/test_loss_oracle.py` compares values; here the laws are checked that no implementation may break.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import Batch, batches, credit_configs, loss_configs, make_batch, make_credit
from torch import Tensor

import srpo
from srpo import PRESETS, CreditConfig, LossConfig

# Enough rows and tokens for both roles to meet; small enough for the interpreter.
dense_batches = batches(min_rows=1, min_tokens=2, contrast_styles=("plain", "special"))
plain_batches = batches(min_rows=1, min_tokens=2, contrast_styles=("plain",))


def weights_of(batch: Batch, credit: CreditConfig, backend: str, contrast: Tensor | None = None) -> Tensor:
    if contrast is None:
        contrast = contrast_of(batch, credit, backend)
    return srpo.token_weights(
        contrast,
        batch.role_ids,
        batch.completion_mask,
        advantages=batch.advantages,
        credit=credit,
        backend=backend,
    )


def contrast_of(batch: Batch, credit: CreditConfig, backend: str) -> Tensor:
    return srpo.role_contrast(
        batch.old_logps,
        **batch.contrast_streams(),
        completion_mask=batch.completion_mask,
        credit=credit,
        backend=backend,
    )


def loss_of(batch: Batch, backend: str, loss: LossConfig = LossConfig(), *, off_policy: bool = True, **options):  # noqa: B008
    """Loss and gradient at the log-prob level; the batch's own tensors unless `options` replace them."""
    logps = batch.logps.clone().requires_grad_()
    arguments = {
        "advantages": batch.advantages,
        "completion_mask": batch.completion_mask,
        "old_logps": batch.old_logps if off_policy else None,
        "ref_logps": batch.ref_logps if loss.beta else None,
        "importance_sampling_ratio": batch.importance_sampling_ratio,
        **options,
    }
    advantages = arguments.pop("advantages")
    out = srpo.role_weighted_grpo_loss_from_logps(logps, advantages, loss=loss, backend=backend, **arguments)
    out.loss.backward()
    assert logps.grad is not None
    return out, logps.grad


def assert_close(got: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5 * scale, atol=3e-6 * scale)


def assert_bitwise(got: Tensor, expected: Tensor) -> None:
    assert torch.equal(got, expected), f"differs by {(got - expected).abs().max()}"


def assert_metrics_have_values(metrics) -> None:
    """The host trainer's names are always finite; a `srpo/` mean over nothing is NaN, never infinite."""
    assert all(value.isfinite() for name, value in metrics.items() if not name.startswith("srpo/"))
    assert not any(value.isinf() for value in metrics.values())


@given(batch=dense_batches, loss=loss_configs(), seed=st.integers(0, 2**31))
def test_p1_weighting_the_advantage_is_weighting_the_clipped_term(backend, device, batch, loss, seed):
    weights = 0.2 + 2.0 * torch.rand(batch.role_ids.shape, generator=torch.Generator().manual_seed(seed))
    batch, weights = batch.to(device), weights.to(device)
    weighted, weighted_gradient = loss_of(batch, backend, loss, weights=weights)
    product, product_gradient = loss_of(batch, backend, loss, advantages=batch.advantages[:, None] * weights)
    assert_close(weighted.loss, product.loss)
    assert_close(weighted_gradient, product_gradient)


@given(batch=dense_batches, credit=credit_configs())
def test_p2_weights_keep_the_sign_of_the_advantage(backend, device, batch, credit):
    batch = batch.to(device)
    weights = weights_of(batch, credit, backend)
    token_advantages = srpo.token_advantages(batch.advantages, weights)
    expected = torch.where(batch.valid, batch.advantages.sign()[:, None], 0.0)
    assert torch.equal(token_advantages.sign(), expected)


@given(batch=batches(), credit=credit_configs(normalize="mean"), normalize=st.sampled_from(["mean", "solve"]))
def test_p3_the_mean_weight_over_the_credit_set_is_one(backend, device, batch, credit, normalize):
    credit = rebuilt(credit, normalize=normalize)
    batch = batch.to(device)
    weights = weights_of(batch, credit, backend)
    for row, members in zip(weights, batch.in_credit_set, strict=True):
        if members.any():
            assert row[members].mean().item() == pytest.approx(1.0, abs=2e-6)


@given(batch=batches(min_rows=1), credit=credit_configs(normalize="mean"))
def test_p4_on_policy_the_value_is_grpos_and_the_gradient_is_minus_weighted_advantage(backend, device, batch, credit):
    batch = batch.to(device)
    options = {"off_policy": False, "importance_sampling_ratio": None}
    out, gradient = loss_of(batch, backend, credit=credit, **batch.contrast_streams(), **options)
    plain, plain_gradient = loss_of(batch, backend, **options)
    count = max(int(batch.valid.sum()), 1)
    assert_close(out.loss, plain.loss)
    assert_close(gradient, -batch.advantages[:, None] * out.weights / count)
    assert_close(plain_gradient, torch.where(batch.valid, -batch.advantages[:, None] / count, 0.0))


def uniform_weight_cases():
    """Each way to switch the credit stage off: (name, contrast style of the batch, role style, settings)."""
    return {
        "equal contrasts": ("equal", "spans", {}),
        "equal contrasts, solve": ("equal", "spans", {"normalize": "solve"}),
        "equal contrasts, no baseline": ("equal", "spans", {"baseline": "none", "normalize": "none"}),
        "strength 0": ("plain", "spans", {"strength": 0.0}),
        "huge tau": ("plain", "spans", {"tau": 1e30}),
        "huge tau, solve": ("plain", "spans", {"tau": 1e30, "normalize": "solve"}),
        "bounds at 1": ("plain", "spans", {"weight_min": 1.0, "weight_max": 1.0}),
        "bounds at 1, solve": ("plain", "spans", {"weight_min": 1.0, "weight_max": 1.0, "normalize": "solve"}),
        "missing role": ("plain", "one_role_missing", {}),
        "no roles": ("plain", "none", {}),
    }


@pytest.mark.parametrize("case", uniform_weight_cases())
@given(seed=st.integers(0, 2**31), loss=loss_configs())
def test_p5_uniform_weights_are_grpo_bitwise(backend, device, case, seed, loss):
    contrast_style, role_style, settings = uniform_weight_cases()[case]
    batch = make_batch(seed, 3, 6, contrast_style=contrast_style, role_style=role_style).to(device)
    out, gradient = loss_of(batch, backend, loss, credit=make_credit(**settings), **batch.contrast_streams())
    plain, plain_gradient = loss_of(batch, backend, loss)
    assert_bitwise(out.weights, batch.valid.to(out.weights.dtype))
    assert_bitwise(out.loss, plain.loss)
    assert_bitwise(gradient, plain_gradient)


def test_p5_equal_but_not_zero_contrasts_give_exactly_one(backend, device):
    """All contrasts 0.75: with no baseline the clipped exponential would be 1.2 everywhere."""
    roles = torch.tensor([[1, 2, 0, 2, 1]], dtype=torch.int8, device=device)
    contrast, mask = torch.full((1, 5), 0.75, device=device), torch.ones(1, 5, dtype=torch.long, device=device)
    for normalize in ("mean", "none", "solve"):
        for baseline in ("mean", "role_mean", "none"):
            credit = CreditConfig(normalize=normalize, baseline=baseline)
            weights = srpo.token_weights(contrast, roles, mask, credit=credit, backend=backend)
            assert weights.tolist() == [[1.0] * 5]


def test_p5_one_token_in_the_credit_set_has_weight_exactly_one(backend, device):
    mask = torch.ones(1, 3, dtype=torch.long, device=device)
    contrast = torch.tensor([[0.0, 3.0, 0.0]], device=device)
    roles = torch.tensor([[0, 2, 0]], dtype=torch.int8, device=device)
    for normalize in ("mean", "none", "solve"):
        for missing_role in ("uniform", "within"):
            credit = CreditConfig(normalize=normalize, baseline="none", missing_role=missing_role)
            assert srpo.token_weights(contrast, roles, mask, credit=credit, backend=backend).tolist() == [[1.0] * 3]


@given(batch=plain_batches, credit=credit_configs(), constant=st.sampled_from([-1.5, -0.25, 0.5, 2.0]))
def test_p6_a_constant_on_both_roles_changes_nothing(backend, device, batch, credit, constant):
    assume(credit.baseline != "none" or credit.normalize == "solve")
    batch = batch.to(device)
    contrast = contrast_of(batch, credit, backend)
    assert_close(
        weights_of(batch, credit, backend, contrast + constant), weights_of(batch, credit, backend, contrast), scale=4
    )


@pytest.mark.parametrize("normalize", ["mean", "none", "solve"])
def test_p6_a_constant_on_one_role_moves_weight_unless_each_role_has_its_baseline(backend, device, normalize):
    batch = make_batch(3, 3, 8, mask_style="full", role_style="mixed").to(device)
    contrast = 0.05 * contrast_of(batch, CreditConfig(), backend)  # far from the bounds
    shifted = contrast + 0.05 * (batch.role_ids == srpo.Role.PERCEPTION)
    shared, separate = CreditConfig(normalize=normalize), CreditConfig(normalize=normalize, baseline="role_mean")
    moved = weights_of(batch, shared, backend, shifted) - weights_of(batch, shared, backend, contrast)
    assert moved[batch.in_credit_set].abs().min() > 1e-3
    assert_close(weights_of(batch, separate, backend, shifted), weights_of(batch, separate, backend, contrast))


@given(batch=plain_batches, credit=credit_configs(), factor=st.sampled_from([0.25, 0.5, 3.0, 8.0]))
def test_p7_scaling_contrasts_is_dividing_tau(backend, device, batch, credit, factor):
    batch = batch.to(device)
    contrast = contrast_of(batch, credit, backend)
    scaled = weights_of(batch, credit, backend, contrast * factor)
    assert_close(scaled, weights_of(batch, rebuilt(credit, tau=credit.tau / factor), backend, contrast), scale=8)


@given(batch=batches(), credit=credit_configs())
def test_p8_weights_stay_in_their_bounds(backend, device, batch, credit):
    batch = batch.to(device)
    low, high = credit.weight_min, credit.weight_max
    if credit.normalize == "mean":
        low, high = low / high, high / low
    # No normalisation and bounds beyond 1: the guarded weight 1 lies in between by construction of the strategy.
    weights = weights_of(batch, credit, backend)[batch.in_credit_set]
    assert ((weights >= low - 2e-6) & (weights <= high + 4e-6)).all()
    assert (weights > 0).all()


@given(batch=batches(), credit=credit_configs(direction="evidence"))
def test_p9_a_larger_contrast_never_has_a_smaller_weight(backend, device, batch, credit):
    assume(credit.baseline != "role_mean")
    batch = batch.to(device)
    contrast, weights = contrast_of(batch, credit, backend), weights_of(batch, credit, backend)
    for values, row, members in zip(contrast, weights, batch.in_credit_set, strict=True):
        ordered = row[members][values[members].argsort()]
        assert (ordered.diff() >= -1e-6).all()


@given(batch=plain_batches, bound=st.sampled_from([1.1, 1.25, 2.0, 4.0]))
def test_p10_signed_weights_of_opposite_advantages_multiply_to_one(backend, device, batch, bound):
    batch = batch.to(device)
    credit = make_credit(direction="advantage", normalize="none", weight_min=1 / bound, weight_max=bound)
    product = weights_of(batch, credit, backend) * weights_of(
        batch.replace(advantages=-batch.advantages), credit, backend
    )
    assert_close(product, batch.valid.to(product.dtype))


@given(batch=dense_batches, credit=credit_configs(), loss=loss_configs(), seed=st.integers(0, 2**31))
def test_p11_permuting_tokens_or_rows_permutes_the_outputs(backend, device, batch, credit, loss, seed):
    batch = batch.to(device)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(batch.role_ids.shape[0], generator=generator).to(device)
    tokens = torch.randperm(batch.role_ids.shape[1], generator=generator).to(device)
    shuffled = batch.rows(rows).tokens(tokens)
    out, gradient = loss_of(batch, backend, loss, credit=credit, **batch.contrast_streams())
    out_shuffled, gradient_shuffled = loss_of(shuffled, backend, loss, credit=credit, **shuffled.contrast_streams())
    assert_close(out_shuffled.loss, out.loss)
    assert_close(out_shuffled.weights, out.weights[rows][:, tokens])
    assert_close(gradient_shuffled, gradient[rows][:, tokens])


@given(batch=batches(contrast_styles=("plain", "special")), credit=credit_configs(), loss=loss_configs())
def test_p11_masked_columns_change_nothing(backend, device, batch, credit, loss):
    batch = batch.to(device)

    def widen(tensor):
        if tensor.dim() == 1:
            return tensor
        filler = torch.nan if tensor.is_floating_point() else 0
        return torch.cat([tensor, tensor.new_full((tensor.shape[0], 3), filler)], dim=1)

    wide = batch.map(widen)
    out, gradient = loss_of(batch, backend, loss, credit=credit, **batch.contrast_streams())
    out_wide, gradient_wide = loss_of(wide, backend, loss, credit=credit, **wide.contrast_streams())
    tokens = batch.role_ids.shape[1]
    assert_close(out_wide.loss, out.loss)
    assert_close(out_wide.weights[:, :tokens], out.weights)
    assert_close(gradient_wide[:, :tokens], gradient)
    assert not out_wide.weights[:, tokens:].any()
    assert not gradient_wide[:, tokens:].any()


def pack(batch: Batch) -> tuple[Batch, Tensor, Tensor]:
    """Concatenate the rows up to their last valid token (holes stay): packed batch, cu_seqlens, and the cells kept."""
    columns = torch.arange(1, batch.role_ids.shape[1] + 1, device=batch.role_ids.device)
    lengths = (
        (columns * batch.valid).amax(dim=1) if columns.numel() else batch.advantages.new_zeros(len(batch.advantages))
    )
    kept = columns[None, :] <= lengths[:, None]
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
    packed = {
        field.name: getattr(batch, field.name)
        for field in dataclasses.fields(batch)
        if getattr(batch, field.name) is not None
    }
    return Batch(**{k: v if k == "advantages" else v[kept] for k, v in packed.items()}), cu_seqlens, kept


@given(batch=batches(min_tokens=1), credit=credit_configs(), loss=loss_configs())
def test_p11_packed_equals_padded(backend, device, batch, credit, loss):
    batch = batch.to(device)
    packed, cu_seqlens, kept = pack(batch)
    out, gradient = loss_of(batch, backend, loss, credit=credit, **batch.contrast_streams())
    out_packed, gradient_packed = loss_of(
        packed, backend, loss, credit=credit, cu_seqlens=cu_seqlens, **packed.contrast_streams()
    )
    assert_close(out_packed.loss, out.loss)
    assert_close(out_packed.weights, out.weights[kept])
    assert_close(out_packed.logps, out.logps[kept])
    assert_close(gradient_packed, gradient[kept])
    contrast = srpo.role_contrast(
        packed.old_logps,
        **packed.contrast_streams(),
        completion_mask=packed.completion_mask,
        credit=credit,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    assert_close(contrast, contrast_of(batch, credit, backend)[kept])
    weights = srpo.token_weights(
        contrast,
        packed.role_ids,
        packed.completion_mask,
        advantages=packed.advantages,
        credit=credit,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    assert_close(weights, out.weights[kept])


@given(
    batch=batches(min_rows=2, min_tokens=1),
    other=batches(min_rows=1, max_rows=1, min_tokens=9, max_tokens=9),
    credit=credit_configs(),
    loss=loss_configs(),
)
def test_p12_rows_are_independent(backend, device, batch, other, credit, loss):
    """Replace everything but the mask of row 0: the weights and gradients of the other rows keep every bit."""
    batch, other = batch.to(device), other.to(device)
    width = batch.role_ids.shape[1]

    def mixed(name):
        value, new = getattr(batch, name), getattr(other, name)
        return torch.cat([new if value.dim() == 1 else new[:, :width], value[1:]])

    names = [field.name for field in dataclasses.fields(batch) if getattr(batch, field.name) is not None]
    changed = Batch(**{name: mixed(name) for name in names}).replace(completion_mask=batch.completion_mask)
    changed = changed.map(lambda tensor: tensor.nan_to_num() if tensor.is_floating_point() else tensor)
    clean = batch.map(lambda tensor: tensor.nan_to_num() if tensor.is_floating_point() else tensor)
    out, gradient = loss_of(clean, backend, loss, credit=credit, **clean.contrast_streams())
    out_changed, gradient_changed = loss_of(changed, backend, loss, credit=credit, **changed.contrast_streams())
    assert_bitwise(out_changed.weights[1:], out.weights[1:])
    assert_bitwise(gradient_changed[1:], gradient[1:])


@given(batch=dense_batches, credit=credit_configs(reasoning_signal="perception_ablation"))
def test_p13_swapping_roles_with_their_contrasts_changes_nothing(backend, device, batch, credit):
    batch = batch.to(device)
    swapped = batch.replace(
        role_ids=torch.where(batch.role_ids > 0, 3 - batch.role_ids, 0).to(torch.int8),
        corrupted_logps=batch.ablated_logps,
        ablated_logps=batch.corrupted_logps,
    )
    assert_close(weights_of(swapped, credit, backend), weights_of(batch, credit, backend))


@given(batch=batches(), credit=credit_configs(normalize="mean", missing_role="uniform"))
def test_p14_what_perception_gains_reasoning_loses(backend, device, batch, credit):
    batch = batch.to(device)
    surplus = torch.where(batch.valid, weights_of(batch, credit, backend) - 1.0, 0.0)
    perception = torch.where(batch.role_ids == srpo.Role.PERCEPTION, surplus, 0.0).sum(1)
    reasoning = torch.where(batch.role_ids == srpo.Role.REASONING, surplus, 0.0).sum(1)
    torch.testing.assert_close(perception, -reasoning, rtol=0, atol=1e-5)


def test_p15_no_gradient_reaches_contrasts_or_weights(backend, device):
    batch = make_batch(5, 2, 5, mask_style="full", role_style="mixed").to(device)
    inputs = {
        name: getattr(batch, name).clone().requires_grad_()
        for name in ("corrupted_logps", "ablated_logps", "old_logps", "ref_logps", "importance_sampling_ratio")
    }
    advantages = batch.advantages.clone().requires_grad_()
    logps = batch.logps.clone().requires_grad_()
    out = srpo.role_weighted_grpo_loss_from_logps(
        logps,
        advantages,
        role_ids=batch.role_ids,
        completion_mask=batch.completion_mask,
        loss=LossConfig(beta=0.1),
        backend=backend,
        **inputs,
    )
    out.loss.backward()
    assert logps.grad is not None
    assert logps.grad.any()
    assert all(tensor.grad is None or not tensor.grad.any() for tensor in (*inputs.values(), advantages))
    assert [
        field
        for field in ("logps", "weights", "entropy")
        if getattr(out, field) is not None and getattr(out, field).requires_grad
    ] == []
    assert not any(value.requires_grad for value in out.metrics.values())


def test_p15_no_gradient_reaches_given_weights(backend, device):
    batch = make_batch(6, 2, 5, mask_style="full").to(device)
    weights = (0.5 + torch.rand(2, 5, device=device)).requires_grad_()
    _, gradient = loss_of(batch, backend, weights=weights)
    assert gradient.any()
    assert weights.grad is None or not weights.grad.any()


def test_p15_no_gradient_reaches_live_contrast_logits(backend, device):
    batch = make_batch(7, 2, 4, vocabulary=7, mask_style="full", role_style="mixed").to(device)
    logits, corrupted, ablated = (
        (batch.logits + shift * torch.randn_like(batch.logits)).requires_grad_() for shift in (0.0, 1.0, 1.0)
    )
    out = srpo.role_weighted_grpo_loss(
        logits,
        batch.completion_ids,
        batch.advantages,
        role_ids=batch.role_ids,
        corrupted_logits=corrupted,
        ablated_logits=ablated,
        backend=backend,
    )
    out.loss.backward()
    assert (out.weights != 1).any()
    assert logits.grad is not None
    assert logits.grad.any()
    assert corrupted.grad is None or not corrupted.grad.any()
    assert ablated.grad is None or not ablated.grad.any()


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("entry", ["logps", "logits"])
def test_p15_gradcheck(loss_type, entry):
    """Finite differences in float64 on the torch backend, old log-probs given so that nothing is detached."""
    batch = make_batch(8, 2, 4, vocabulary=5, mask_style="holes", role_style="mixed", dtype=torch.float64)
    options = {
        **batch.contrast_streams(),
        "completion_mask": batch.completion_mask,
        "old_logps": batch.old_logps,
        "ref_logps": batch.ref_logps,
        "importance_sampling_ratio": batch.importance_sampling_ratio,
        "loss": LossConfig(loss_type=loss_type, beta=0.1, delta=1.5, max_completion_length=7, temperature=1.0),
        "backend": "torch",
    }
    advantages = batch.advantages.double()
    if entry == "logps":
        variable = batch.logps.nan_to_num().requires_grad_()

        def value(logps):
            return srpo.role_weighted_grpo_loss_from_logps(logps, advantages, **options).loss

    else:
        variable = batch.logits.nan_to_num().requires_grad_()

        def value(logits):
            return srpo.role_weighted_grpo_loss(logits, batch.completion_ids, advantages, **options).loss

    assert torch.autograd.gradcheck(value, (variable,))


@given(batch=dense_batches, loss=loss_configs(beta=0.1), credit=credit_configs())
def test_p16_the_kl_term_does_not_depend_on_the_weights(backend, device, batch, loss, credit):
    batch = batch.to(device)
    no_kl = dataclasses.replace(loss, beta=0.0)
    kl_parts = []
    for options in ({}, {"credit": credit, **batch.contrast_streams()}):
        with_kl, gradient_with_kl = loss_of(batch, backend, loss, **options)
        without, gradient_without = loss_of(batch, backend, no_kl, **options)
        kl_parts.append((with_kl.metrics["kl"], with_kl.loss - without.loss, gradient_with_kl - gradient_without))
    (plain_metric, plain_value, plain_gradient), (metric, value, gradient) = kl_parts
    assert_bitwise(metric, plain_metric)
    assert_close(value, plain_value)
    assert_close(gradient, plain_gradient)


def test_p16_entropy_does_not_depend_on_the_weights(backend, device):
    batch = make_batch(9, 2, 4, vocabulary=33, mask_style="full", role_style="mixed").to(device)
    arguments = (batch.logits, batch.completion_ids, batch.advantages)
    common = {"completion_mask": batch.completion_mask, "backend": backend}
    plain = srpo.role_weighted_grpo_loss(*arguments, **common)
    weighted = srpo.role_weighted_grpo_loss(*arguments, **common, **batch.contrast_streams())
    assert (weighted.weights != plain.weights).any()
    assert_bitwise(weighted.entropy, plain.entropy)
    assert_bitwise(weighted.metrics["entropy"], plain.metrics["entropy"])


@given(batch=dense_batches, loss=loss_configs(), credit=credit_configs())
def test_p17_clip_fractions_do_not_depend_on_the_weights(backend, device, batch, loss, credit):
    batch = batch.to(device)
    plain, _ = loss_of(batch, backend, loss)
    weighted, _ = loss_of(batch, backend, loss, credit=credit, **batch.contrast_streams())
    names = [name for name in plain.metrics if "clip_ratio" in name and not name.startswith("srpo/")]
    assert names == (["cispo_clip_ratio"] if loss.loss_type == "cispo" else names)
    assert len(names) >= 1
    for name in names:
        assert_bitwise(weighted.metrics[name], plain.metrics[name])


@pytest.mark.parametrize(("loss_type", "as_tensor"), [("dapo", True), ("cispo", False)])
@given(seed=st.integers(0, 2**31), credit=credit_configs())
def test_p18_four_micro_batches_with_one_normaliser_equal_one_batch(
    backend, device, loss_type, as_tensor, seed, credit
):
    batch = make_batch(seed, 4, 6, mask_style="empty_rows").to(device)
    loss = LossConfig(loss_type=loss_type, epsilon_high=1.1 if loss_type == "cispo" else 0.2)
    total = batch.valid.sum() if as_tensor else int(batch.valid.sum())
    whole, whole_gradient = loss_of(batch, backend, loss, credit=credit, **batch.contrast_streams())
    values, gradients = [], []
    for row in range(4):
        part = batch.rows(slice(row, row + 1))
        out, gradient = loss_of(part, backend, loss, credit=credit, num_items_in_batch=total, **part.contrast_streams())
        values.append(out.loss)
        gradients.append(gradient)
    assert_close(torch.stack(values).sum(), whole.loss)
    assert_close(torch.cat(gradients), whole_gradient)


@given(batch=batches(contrast_styles=("huge", "special")), credit=credit_configs(), loss=loss_configs())
def test_p19_huge_and_missing_contrasts_are_finite(backend, device, batch, credit, loss):
    batch = batch.to(device)
    out, gradient = loss_of(batch, backend, loss, credit=credit, **batch.contrast_streams())
    assert out.loss.isfinite()
    assert out.weights.isfinite().all()
    assert gradient.isfinite().all()
    assert_metrics_have_values(out.metrics)


@pytest.mark.parametrize("gap", [-1e4, -100.0, 100.0, 1e4])
def test_p19_huge_ratios_are_finite_where_the_surrogate_is_bounded(backend, device, gap):
    """min() picks the clipped branch for A > 0, and for A < 0 when delta bounds the ratio; gradients there are 0."""
    logps = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]], device=device, requires_grad=True)
    out = srpo.role_weighted_grpo_loss_from_logps(
        logps,
        torch.tensor([1.0, -1.0], device=device),
        old_logps=logps.detach() - gap,
        loss=LossConfig(delta=3.0),
        backend=backend,
    )
    out.loss.backward()
    expected = (-1.2 + 3.0) / 2 if gap > 0 else (0.0 + 0.8) / 2
    assert out.loss.item() == pytest.approx(expected, abs=1e-6)
    assert logps.grad.abs().max() < 1e-30


@pytest.mark.parametrize("vocabulary", [7, 130, 1000])
@pytest.mark.parametrize("tokens", [1, 3])
def test_p19_banned_tokens_are_finite(backend, device, vocabulary, tokens):
    """-inf on everything but the sampled token and a few others, the first block of the vocabulary included."""
    batch = make_batch(10, 2, tokens, vocabulary=vocabulary, mask_style="full", role_style="mixed").to(device)
    logits = batch.logits.clone()
    last = vocabulary - 1
    logits[..., : vocabulary - 2] = -torch.inf
    logits.requires_grad_()
    ids = torch.full_like(batch.completion_ids, last)
    out = srpo.role_weighted_grpo_loss(
        logits, ids, batch.advantages, backend=backend, loss=LossConfig(beta=0.1), ref_logps=batch.ref_logps
    )
    out.loss.backward()
    expected = torch.log_softmax(logits.detach()[..., -2:].double(), -1)[..., -1]
    assert_close(out.logps.double(), expected)
    assert out.loss.isfinite()
    assert out.entropy.isfinite().all()
    assert logits.grad.isfinite().all()
    assert not logits.grad[..., : vocabulary - 2].any()


def test_p19_a_banned_sampled_token_gives_no_nan(backend, device):
    logits = torch.zeros(1, 2, 7, device=device)
    logits[0, 0, 3] = -torch.inf
    logits.requires_grad_()
    ids = torch.tensor([[3, 4]], device=device)
    out = srpo.role_weighted_grpo_loss(logits, ids, torch.tensor([1.0], device=device), backend=backend)
    out.loss.backward()
    assert out.logps[0, 0].item() == -torch.inf
    assert not out.loss.isnan()
    assert not out.entropy.isnan().any()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 3)])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo", "cispo"])
@pytest.mark.parametrize("entry", ["logps", "logits"])
def test_p19_empty_and_all_masked_batches_give_an_attached_zero(backend, device, shape, loss_type, entry):
    batch = make_batch(11, *shape, vocabulary=7, mask_style="all_masked").to(device)
    loss = LossConfig(loss_type=loss_type, max_completion_length=5, beta=0.1)
    options = {
        **batch.contrast_streams(),
        "completion_mask": batch.completion_mask,
        "old_logps": batch.old_logps,
        "ref_logps": batch.ref_logps,
        "loss": loss,
        "backend": backend,
    }
    if entry == "logps":
        variable = batch.logps.clone().requires_grad_()
        out = srpo.role_weighted_grpo_loss_from_logps(variable, batch.advantages, **options)
    else:
        variable = batch.logits.clone().requires_grad_()
        out = srpo.role_weighted_grpo_loss(variable, batch.completion_ids, batch.advantages, **options)
    assert out.loss.requires_grad
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert variable.grad is not None
    assert not variable.grad.any()  # NaN counts as any
    assert out.weights.shape == shape
    assert not out.weights.any()
    assert_metrics_have_values(out.metrics)


def test_p19_zero_advantages_give_an_attached_zero(backend, device):
    batch = make_batch(12, 2, 4).to(device)
    out, gradient = loss_of(
        batch.replace(advantages=torch.zeros(2, device=device)), backend, **batch.contrast_streams()
    )
    assert out.loss.item() == 0.0
    assert not gradient.any()


@given(seed=st.integers(0, 2**31), normalize=st.sampled_from(["mean", "solve"]), separated=st.booleans())
def test_p20_weight_moves_to_the_role_with_the_larger_contrasts(backend, device, seed, normalize, separated):
    """Perception above reasoning token by token with any spread, or on average within the linear range."""
    batch = make_batch(seed, 3, 8, mask_style="holes", role_style="mixed").to(device)
    perception, reasoning = batch.role_ids == 1, batch.role_ids == 2
    noise = torch.rand(batch.role_ids.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    contrast = noise + 1.01 * perception if separated else 0.01 * noise + 0.01 * perception
    weights = weights_of(batch, CreditConfig(normalize=normalize), backend, contrast)
    for row in range(3):
        mine, theirs = perception[row] & batch.valid[row], reasoning[row] & batch.valid[row]
        if mine.any() and theirs.any() and contrast[row][mine].mean() > contrast[row][theirs].mean() + 1e-3:
            assert (weights[row][mine] - 1).sum() > 0
            assert (weights[row][theirs] - 1).sum() < 0


def test_presets_reach_the_same_weights_through_the_loss_and_through_the_functions(backend, device):
    batch = make_batch(13, 3, 7, role_style="mixed").to(device)
    for credit in PRESETS.values():
        out, _ = loss_of(batch, backend, credit=credit, **batch.contrast_streams())
        assert_bitwise(out.weights, weights_of(batch, credit, backend))


def rebuilt(credit: CreditConfig, **changes) -> CreditConfig:
    return make_credit(**{**dataclasses.asdict(credit), **changes})
