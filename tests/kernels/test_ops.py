"""The registered ops: schemas, fake kernels, autograd, compile; and the twins against the kernels."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from op_checks import opcheck
from strategies import make_batch
from tolerances import assert_close_to_truth

from srpo import CreditConfig, LossConfig, role_weighted_grpo_loss, role_weighted_grpo_loss_from_logps, selected_logps
from srpo_kernels import ops, reference
from srpo_kernels.device import clipped_surrogate
from srpo_kernels.layout import Layout

CREDIT, LOSS = CreditConfig().rule, LossConfig(beta=0.04)


def logits_and_ids(V=130, **options):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, V, generator=generator, **options)
    return logits, torch.randint(0, V, (2, 3), generator=generator)


def row_mask(streams):
    mask = torch.ones(streams, 2, 3, dtype=torch.bool)
    mask[:, 1, 2] = False
    return mask


@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck_row_statistics(backend, entropy):
    logits, ids = logits_and_ids()
    arguments = (
        logits.requires_grad_(),
        logits.detach() + 1,
        None,
        ids,
        row_mask(2),
        0.9,
        entropy,
        False,
        False,
        backend,
    )
    opcheck(torch.ops.srpo.row_statistics.default, arguments)


@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck_logits_gradient(backend, entropy):
    logits, ids = logits_and_ids()
    _, row_max, log_sum, h, _ = ops.row_statistics(logits, ids, row_mask(1), return_entropy=True, backend=backend)
    grad = torch.ones(2, 3)
    arguments = (ids, row_max[0], log_sum[0], h if entropy else None, grad, grad if entropy else None, 0.9, backend)
    opcheck(torch.ops.srpo.logits_gradient.default, (logits, *arguments))
    opcheck(torch.ops.srpo.logits_gradient_.default, (logits.clone(), *arguments))


def flat(batch):
    return {name: getattr(batch, name).flatten() for name in ("logps", "old_logps", "ref_logps", "corrupted_logps",
            "ablated_logps", "role_ids", "completion_mask", "importance_sampling_ratio")}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_token_credit(backend, packed):
    batch = make_batch(rows=2, tokens=5, seed=1, mask_style="full")
    batch = batch.replace(role_ids=torch.tensor([[1, 1, 2, 2, 0], [1, 2, 2, 0, 1]]))  # a NaN baseline equals nothing
    x, mask = flat(batch), batch.valid
    cu = torch.tensor([0, 5, 10]) if packed else None
    shaped = {k: v if packed else v.reshape(2, 5) for k, v in x.items()}
    arguments = (None, shaped["old_logps"], shaped["corrupted_logps"], shaped["ablated_logps"], shaped["role_ids"],
                 mask.flatten() if packed else mask, None, cu, 2, CREDIT, backend)  # fmt: skip
    opcheck(torch.ops.srpo.token_credit.default, arguments)
    _, *streams, roles, valid, _, cu, rows, rule, backend = arguments
    opcheck(torch.ops.srpo.role_contrast.default, (*streams, roles, valid, cu, rows, rule, backend))


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_policy_loss(backend, packed):
    batch = make_batch(rows=2, tokens=5, seed=1)
    x = {k: v if packed else v.reshape(2, 5) for k, v in flat(batch).items()}
    mask = x["completion_mask"].bool()
    clean = {k: torch.where(mask, v, 0.0) for k, v in x.items() if v.is_floating_point()}
    cu = torch.tensor([0, 5, 10]) if packed else None
    advantages, weights, scale = mask * 1.0, mask * 1.1, torch.tensor([0.5, 0.25])
    vectors = (clean["logps"].requires_grad_(), clean["old_logps"], clean["ref_logps"], None, advantages, weights)
    arguments = (*vectors, mask, scale, cu, LOSS.rule, backend)
    opcheck(torch.ops.srpo.policy_loss.default, arguments)


def loss_inputs(device):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 5, 130, generator=generator).to(device).requires_grad_()
    ids = torch.randint(0, 130, (2, 4), generator=generator).to(device)
    roles = torch.tensor([[1, 1, 2, 2], [1, 2, 2, 0]], device=device)
    streams = [-torch.rand(2, 4, generator=generator).to(device) * 3 for _ in range(3)]
    return logits, ids, torch.tensor([1.0, -0.5], device=device), roles, streams


def whole_loss(logits, ids, advantages, roles, streams, backend):
    corrupted, ablated, old = streams
    return role_weighted_grpo_loss(
        logits, ids, advantages, role_ids=roles, corrupted_logps=corrupted, ablated_logps=ablated, old_logps=old,
        ref_logps=old, loss=LossConfig(beta=0.04), backend=backend,
    )  # fmt: skip


def test_the_whole_loss_compiles_without_a_graph_break(backend, device):
    logits, *rest = loss_inputs(device)
    expected = whole_loss(logits, *rest, backend)
    expected.loss.backward()
    expected_grad, logits.grad = logits.grad, None
    compiled = torch.compile(whole_loss, backend="aot_eager", fullgraph=True)
    got = compiled(logits, *rest, backend)
    got.loss.backward()
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(logits.grad, expected_grad)
    assert got.metrics.floats() == pytest.approx(expected.metrics.floats(), nan_ok=True)


def test_selected_logps_compiles_without_a_graph_break(backend, device):
    logits, ids, *_ = loss_inputs(device)
    compiled = torch.compile(selected_logps, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(logits, ids, backend=backend), selected_logps(logits, ids, backend=backend))


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo", "cispo"])
@pytest.mark.parametrize("level", ["token", "sequence_token"])
def test_loss_passes_gradcheck(loss_type, level):
    generator = torch.Generator().manual_seed(2)
    # cispo and sequence_token detach a factor on purpose: they are checked on-policy, where it is constant
    detaches = loss_type == "cispo" or level == "sequence_token"
    old = -torch.rand(2, 5, generator=generator, dtype=torch.float64)
    logps = (old + 0.4 * torch.randn(2, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    config = LossConfig(
        loss_type=loss_type, beta=0.1, delta=1.6, importance_sampling_level=level, max_completion_length=7
    )

    def run(x):
        return role_weighted_grpo_loss_from_logps(
            x, torch.tensor([1.0, -0.5], dtype=torch.float64), old_logps=None if detaches else old, ref_logps=old,
            completion_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 1, 1]]), loss=config, backend="torch",
        ).loss  # fmt: skip

    if (
        detaches
    ):  # on-policy the ratio is exactly 1 whatever x is, so finite differences see only what is differentiated
        (gradient,) = torch.autograd.grad(run(logps), logps)
        assert gradient.isfinite().all()
        assert (gradient[0, 3:] == 0).all()
    else:
        assert torch.autograd.gradcheck(run, logps)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
@pytest.mark.parametrize("level", ["token", "sequence_token"])
@pytest.mark.parametrize("delta", [None, 1.1, 3.0])
def test_coefficients_of_the_kernel_are_those_of_the_twin(loss_type, level, delta):
    old = torch.zeros(2, 8)
    ratios = torch.tensor([[1.0, 0.7, 1.25, 1.15, 3.1, 5.0, 0.5, 1.3]]).expand(2, 8)
    logps = ratios.log().requires_grad_()
    rule = replace(LOSS, loss_type=loss_type, delta=delta, importance_sampling_level=level).rule
    advantages = torch.tensor([1.0, -0.5])[:, None].expand(2, 8)
    weights, mask = torch.full((2, 8), 1.1), torch.ones(2, 8, dtype=torch.bool)
    gradients = []
    for backend in ("torch", "triton"):
        loss, sums = ops.policy_loss(
            logps, old, old - 0.1, None, advantages, weights, mask, torch.tensor([0.3, 0.7]), Layout((2, 8)),
            rule, backend,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss.sum() * 0.37, logps)
        gradients.append(gradient)
    assert_close_to_truth("gradient", gradients[1], gradients[0], precision=torch.float32)
    assert sums.shape == (2, 3)


@triton.jit
def _surrogate_kernel(ratio_ptr, advantage_ptr, value_ptr, slope_ptr, lowest, highest, delta, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    value, slope = clipped_surrogate(tl.load(ratio_ptr + lanes), tl.load(advantage_ptr + lanes), lowest, highest, delta)
    tl.store(value_ptr + lanes, value)
    tl.store(slope_ptr + lanes, slope)


@pytest.mark.parametrize("delta", [float("inf"), 1.0, 1.25, 0.75])
def test_trap_11_ties_follow_torch(delta, device):
    """At ratio 1, 1 +- eps and delta, min and clamp split the gradient as torch's do, not in halves of it."""
    grid = torch.tensor([0.5, 0.75, 1.0, 1.125, 1.25, 1.5, 2.0, 1.0])  # exact in fp32, as are the bounds
    ratio, advantage = (
        x.flatten().to(device) for x in torch.meshgrid(grid, torch.tensor([1.0, -1.0, 0.0, 2.0]), indexing="ij")
    )
    ratio.requires_grad_()
    free = ratio.clamp(max=delta) * advantage
    expected = torch.min(free, ratio.clamp(0.75, 1.25) * advantage)
    (expected_slope,) = torch.autograd.grad(expected.sum(), ratio)
    value, slope = torch.empty_like(advantage), torch.empty_like(advantage)
    _surrogate_kernel[(1,)](ratio.detach(), advantage, value, slope, 0.75, 1.25, delta, BLOCK=32)
    twin = reference.clipped_surrogate(ratio.detach(), advantage, 0.75, 1.25, delta)
    for got in ((value, slope), twin):
        assert torch.equal(got[0], expected.detach())
        assert torch.equal(got[1], expected_slope)


def test_both_languages_use_the_same_constants():
    from srpo_kernels import device as blocks
    from srpo_kernels import token_credit

    for name in ("RATIO_LOG_MAX", "K3_SERIES_BELOW", "K3_MAX"):
        assert getattr(blocks, name).value == getattr(reference, name)
    for name in ("SOLVE_STEPS", "AT_LOWER_BOUND", "AT_UPPER_BOUND", "NO_VALUE"):
        assert getattr(token_credit, name).value == getattr(reference, name)
