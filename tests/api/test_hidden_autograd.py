"""The loss from hidden states inside autograd: who gets a gradient, repeated backwards, strides, autocast, bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from hidden_cases import (
    NAN,
    Case,
    inputs_of,
    leaves_of,
    loss_of,
    make_case,
    needs_of,
    on,
    oracle_of,
    room_for,
    run,
    worst,
)
from tolerances import assert_close_to_truth
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import srpo
from srpo import LossConfig

PARTS = ("hidden", "lm_head_weight", "bias")


@pytest.mark.parametrize("wanted", [c for n in range(4) for c in itertools.combinations(PARTS, n)], ids=str)
def test_gradients_go_to_what_requires_one(backend, device, wanted):
    case = make_case(430, V=7, mask_style="holes")
    inputs = inputs_of(case, "no roles")
    reference, expected = run(case, inputs, device, backend)
    leaves = {name: x.requires_grad_(name in wanted) for name, x in leaves_of(case, device).items()}
    out = srpo.role_weighted_grpo_loss_from_hidden(
        completion_ids=case.batch.completion_ids.to(device), backend=backend, **leaves, **on(device, inputs)
    )
    assert torch.equal(out.loss.detach(), reference.loss.detach())
    assert out.loss.requires_grad == bool(wanted)
    if wanted:
        out.loss.backward()
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            assert torch.equal(leaf.grad, expected[name])
        else:
            assert leaf.grad is None


def test_evaluation_without_gradient(backend, device):
    case = make_case(431, V=7, mask_style="holes", role_style="mixed")
    inputs = inputs_of(case, "live")
    trained, _ = run(case, inputs, device, backend)
    leaves, ids = leaves_of(case, device), case.batch.completion_ids.to(device)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out = srpo.role_weighted_grpo_loss_from_hidden(
                completion_ids=ids, backend=backend, **leaves, **on(device, inputs)
            )
            logps = srpo.selected_logps_from_hidden(
                leaves["hidden"], leaves["lm_head_weight"], ids, mask=case.batch.completion_mask.to(device),
                backend=backend,
            )  # fmt: skip
        assert not out.loss.requires_grad
        assert not logps.requires_grad
        assert torch.equal(out.loss, trained.loss.detach())


def test_only_the_loss_carries_a_gradient(backend, device):
    case = make_case(432, V=7, mask_style="holes", role_style="mixed")
    streams = {k: x.requires_grad_() for k, x in case.streams.items()}
    old = case.batch.old_logps.clone().requires_grad_()
    inputs = inputs_of(case, "live", old_logps=old)
    out, _ = run(case, inputs, device, backend)
    for value in (out.logps, out.weights, out.entropy, *out.metrics.values()):
        assert not value.requires_grad
    assert old.grad is None
    assert all(x.grad is None for x in streams.values())


@pytest.mark.parametrize("mode", ["no roles", "live base"])
def test_the_upstream_gradient_scales_and_backward_repeats(backend, device, mode):
    case = make_case(440, V=7, mask_style="holes", role_style="mixed")
    inputs = inputs_of(case, mode)
    found = {}
    for factor in (1.0, 0.37, -2.0):
        leaves = leaves_of(case, device)
        scaled = loss_of(case, leaves, inputs, device, backend) * factor
        first = torch.autograd.grad(scaled, list(leaves.values()), retain_graph=True)
        second = torch.autograd.grad(scaled, list(leaves.values()), retain_graph=True)
        last = torch.autograd.grad(scaled, list(leaves.values()))
        for a, b, c in zip(first, second, last, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
        found[factor] = [x / factor for x in first]
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(scaled, list(leaves.values()))
    assert found[1.0][0].any()
    for factor in (0.37, -2.0):
        torch.testing.assert_close(found[factor], found[1.0], rtol=1e-6, atol=1e-9)


def test_two_backwards_add_up_and_gradients_accumulate(backend, device):
    """A retained graph twice, then another call into the same `.grad`, whose memory nobody else may hold."""
    case = make_case(441, V=7, mask_style="holes")
    inputs = inputs_of(case, "no roles")
    _, once = run(case, inputs, device, backend)
    leaves = leaves_of(case, device)
    loss = loss_of(case, leaves, inputs, device, backend)
    for times in (1, 2):
        loss.backward(retain_graph=True)
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad, times * once[name], rtol=1e-6, atol=1e-9)
    loss.backward()
    (loss_of(case, leaves, inputs, device, backend) * 2).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, 5 * once[name], rtol=1e-6, atol=1e-9)


def test_one_loss_used_twice_and_two_losses_of_one_hidden(backend, device):
    case = make_case(442, V=7, mask_style="holes", role_style="mixed")
    plain, weighted = inputs_of(case, "no roles"), inputs_of(case, "scored before")
    _, of_plain = run(case, plain, device, backend)
    _, of_weighted = run(case, weighted, device, backend)
    leaves = leaves_of(case, device)
    first, second = (loss_of(case, leaves, x, device, backend) for x in (plain, weighted))
    (first + 3 * second + 0.5 * first).backward()
    for name, leaf in leaves.items():
        expected = 1.5 * of_plain[name] + 3 * of_weighted[name]
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-7)


def test_a_tied_head_collects_both_gradients(backend, device):
    """The weight embeds the tokens that the hidden states are made of, and scores them."""
    case = make_case(443, V=7, mask_style="full")
    inputs = inputs_of(case, "no roles", advantages=torch.tensor([0.7, 0.3, -1.2, 0.4]))
    tokens = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(3)).to(device)
    gradients = []
    for from_hidden in (True, False):
        weight = case.weight.clone().to(device).requires_grad_()
        hidden = torch.tanh(torch.nn.functional.embedding(tokens, weight) * 1.5)
        ids = case.batch.completion_ids.to(device)
        arguments = {"backend": backend, **on(device, inputs)}
        if from_hidden:
            out = srpo.role_weighted_grpo_loss_from_hidden(hidden, weight, ids, **arguments)
        else:
            out = srpo.role_weighted_grpo_loss(linear(hidden, weight), ids, **arguments)
        out.loss.backward()
        gradients.append(weight.grad)
    assert gradients[0].any()
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=5e-7)


def layouts_of(hidden: Tensor) -> dict[str, Tensor]:
    """The same values under other strides; views of leaves."""
    B, T, H = hidden.shape
    return {
        "time first": hidden.transpose(0, 1).contiguous().transpose(0, 1),
        "width first": hidden.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "sliced": torch.cat([hidden.new_full((B, T, 3), NAN), hidden], 2)[..., 3:],
        "every other": torch.stack([hidden, hidden.new_full((B, T, H), NAN)], 2).flatten(1, 2)[:, ::2],
    }


@pytest.mark.parametrize("layout", ["time first", "width first", "sliced", "every other"])
def test_strides_change_nothing(backend, device, layout):
    case = make_case(444, V=7, mask_style="holes")
    inputs = inputs_of(case, "no roles")
    expected_out, expected = run(case, inputs, device, backend)
    leaves = leaves_of(case, device)
    leaves["hidden"] = layouts_of(case.hidden.to(device))[layout].detach().requires_grad_()
    leaves["lm_head_weight"] = case.weight.t().contiguous().to(device).t().requires_grad_()
    assert not leaves["hidden"].is_contiguous()
    out, gradients = run(case, inputs, device, backend, leaves)
    torch.testing.assert_close(out.loss, expected_out.loss, rtol=1e-6, atol=1e-7)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-5, atol=5e-7)


def test_a_slice_of_what_a_model_returns(backend, device):
    """Hidden states of prompt and completion; gradients arrive at the whole."""
    case = make_case(445, V=7, mask_style="holes")
    inputs = inputs_of(case, "no roles")
    _, expected = run(case, inputs, device, backend)
    whole = torch.cat([torch.ones(4, 3, 6), case.hidden, torch.ones(4, 1, 6)], 1).to(device).requires_grad_()
    leaves = leaves_of(case, device) | {"hidden": whole[:, 3:]}
    loss_of(case, leaves, inputs, device, backend).backward()
    torch.testing.assert_close(whole.grad[:, 3:-1], expected["hidden"], rtol=1e-6, atol=1e-9)
    assert not whole.grad[:, :3].any()
    assert not whole.grad[:, -1].any()


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_four_micro_batches_equal_one_batch(backend, device, loss_type):
    """With the normaliser of the whole; gradients accumulate, losses and metric sums add up."""
    case = make_case(446, V=7, mask_style="ragged", role_style="mixed")
    loss = LossConfig(loss_type=loss_type, epsilon_high=1.1)
    whole = inputs_of(case, "live base", loss=loss, num_items_in_batch=case.batch.completion_mask.sum())
    out, expected = run(case, whole, device, backend)
    leaves = leaves_of(case, device)
    parts = []
    for i in range(4):
        rows = slice(i, i + 1)
        part = Case(case.batch.rows(rows), case.hidden[rows], case.weight, case.bias, {})
        inputs = inputs_of(part, "live base", loss=loss, num_items_in_batch=whole["num_items_in_batch"])
        ids = part.batch.completion_ids.to(device)
        of_part = leaves | {"hidden": leaves["hidden"][rows]}
        parts.append(
            srpo.role_weighted_grpo_loss_from_hidden(
                completion_ids=ids, backend=backend, **of_part, **on(device, inputs)
            )
        )
        parts[-1].loss.backward()
    torch.testing.assert_close(sum(x.loss for x in parts), out.loss, rtol=1e-5, atol=1e-6)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-5, atol=5e-7)
    sums = parts[0].metrics + parts[1].metrics + parts[2].metrics + parts[3].metrics
    assert sums.floats() == pytest.approx(out.metrics.floats(), rel=1e-5, abs=1e-6, nan_ok=True)


def test_checkpointing_recomputes_the_same(backend, device):
    case = make_case(447, V=7, mask_style="holes", role_style="mixed")
    inputs = inputs_of(case, "live base")
    out, expected = run(case, inputs, device, backend)
    leaves = leaves_of(case, device)

    def block(*tensors):
        hidden = torch.tanh(torch.atanh(tensors[0] / 8)) * 8  # something to recompute
        named = dict(zip(leaves, (hidden, *tensors[1:]), strict=True))
        return loss_of(case, named, inputs, device, backend)

    loss = checkpoint(block, *leaves.values(), use_reentrant=False)
    loss.backward()
    torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=1e-6)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["no roles", "live"])
def test_autocast_does_what_it_does_to_a_linear_head(backend, device, mode):
    """fp32 leaves, products in bf16, fp32 gradients."""
    case = make_case(448, V=33, H=16, drift=0.1, mask_style="holes", role_style="mixed")
    inputs = inputs_of(case, mode)
    needs = needs_of(case, inputs)
    truth = oracle_of(case, inputs, needs, torch.float64)
    eager = oracle_of(case, inputs, needs, torch.bfloat16)
    leaves = leaves_of(case, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = loss_of(case, leaves, inputs, device, backend)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, eager["loss"], rtol=2**-7, atol=2**-9)
    for name, leaf in leaves.items():
        expected = truth["gradients"][name]
        assert leaf.grad.dtype == torch.float32
        allowed = worst(eager["gradients"][name], expected)
        assert_close_to_truth("gradient", leaf.grad, expected, allowed, precision=torch.bfloat16, what=name)
        assert torch.equal(leaf.grad, leaf.grad.bfloat16().float())  # the products are those of bf16


def test_autocast_leaves_float64_alone(device):
    """As it does in front of a linear layer."""
    case = make_case(449, V=7, dtype=torch.float64, mask_style="full")
    inputs = inputs_of(case, "no roles")
    expected, _ = run(case, inputs, device, "torch")
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert linear(case.hidden, case.weight).dtype == torch.float64
        out, _ = run(case, inputs, device, "torch")
    assert torch.equal(out.loss, expected.loss)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])  # cispo differentiates no factor it clamps
def test_the_loss_passes_gradcheck(loss_type):
    case = make_case(466, 3, 3, V=7, H=3, dtype=torch.float64, mask_style="holes", role_style="mixed")
    loss = LossConfig(loss_type=loss_type, beta=0.1, max_completion_length=7)
    inputs = inputs_of(case, "scored before", loss=loss, ref_logps=case.batch.ref_logps)
    leaves = leaves_of(case, torch.device("cpu"))

    def value(*tensors):
        return loss_of(case, dict(zip(leaves, tensors, strict=True)), inputs, torch.device("cpu"), "torch")

    assert torch.autograd.gradcheck(value, tuple(leaves.values()))


@pytest.mark.parametrize("mode", ["scored before", "live base"])
def test_two_calls_give_the_same_bits(backend, device, mode):
    case = make_case(450, V=130, mask_style="holes", role_style="mixed")
    inputs = inputs_of(case, mode)
    results = [run(case, inputs, device, backend, workspace_bytes=room_for(4, case, backend)) for _ in range(2)]
    (one, one_gradients), (two, two_gradients) = results
    for name in ("loss", "logps", "weights", "entropy"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    for name in one_gradients:
        assert torch.equal(one_gradients[name], two_gradients[name])
    torch.testing.assert_close(one.metrics.sums, two.metrics.sums, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("per_token", [False, True])
def test_half_precision_under_a_loss_scale_keeps_small_gradients(backend, device, per_token):
    """A coefficient of 2^-20 times a probability is nothing in half precision, before the loss scale arrives."""
    generator = torch.Generator().manual_seed(0)
    N, V, H, scale = 96, 400, 16, 2.0**20
    hidden, head = torch.randn(1, N, H, generator=generator), 0.3 * torch.randn(V, H, generator=generator)
    ids = torch.randint(V, (1, N), generator=generator)
    advantages = torch.randn(1, N, generator=generator) if per_token else torch.ones(1)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.half().to(dtype).to(device).requires_grad_() for x in (hidden, head)]
        out = srpo.role_weighted_grpo_loss_from_hidden(
            *leaves, ids.to(device), advantages.to(device), num_items_in_batch=scale,
            backend="torch" if dtype == torch.float64 else backend,
        )  # fmt: skip
        (out.loss * scale).backward()
        return [x.grad.double().cpu() for x in leaves]

    for half, truth in zip(gradients(torch.float16), gradients(torch.float64), strict=True):
        assert (half - truth).norm() <= 2e-3 * truth.norm()


def test_second_derivatives_are_refused(backend, device):
    hidden = torch.randn(1, 4, 8, device=device, requires_grad=True)
    head, ids = torch.randn(16, 8, device=device), torch.zeros(1, 4, dtype=torch.long, device=device)
    loss = srpo.role_weighted_grpo_loss_from_hidden(
        hidden, head, ids, torch.ones(1, device=device), backend=backend
    ).loss
    with pytest.raises(RuntimeError, match="create_graph got True"):
        torch.autograd.grad(loss, hidden, create_graph=True)
