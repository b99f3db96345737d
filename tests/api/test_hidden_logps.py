"""Log-probs from hidden states, for any loss: values, gradients, and the bits they share with the loss."""

from __future__ import annotations

import oracles
import pytest
import torch
from hidden_cases import NAN, inputs_of, leaves_of, make_case, poisoned, room_for, run, worst
from tolerances import assert_close_to_truth
from torch import Tensor
from torch.nn.functional import linear, pad

import srpo
from srpo import LossConfig


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("rows", [None, 1, 3])
def test_selected_logps_and_entropy(backend, device, dtype, bias, rows):
    """Values, and the gradients of a random mixture of log-probs and entropies, masked rows holding NaN."""
    case = make_case(460, 3, 4, V=33, bias=bias, dtype=dtype, mask_style="holes")
    mask, ids = case.batch.valid, case.batch.completion_ids
    upstream = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    upstream[:, 1] = 0.0
    upstream[0, 0, 1] = upstream[1, 2, 2] = 0.0

    def oracle(precision):
        leaves = {k: x.detach().to(precision).requires_grad_() for k, x in leaves_of(case, torch.device("cpu")).items()}
        logits = linear(leaves["hidden"], leaves["lm_head_weight"], leaves.get("bias"))
        logits = logits.float() if precision.itemsize < 4 else logits
        logps = oracles.log_probs(logits, ids, mask, 0.7)
        distribution = torch.log_softmax(logits / 0.7, -1)
        entropy = torch.where(mask, -(distribution.exp() * distribution).sum(-1), 0.0)
        mixture = (logps * upstream[0].to(logps.dtype) + entropy * upstream[1].to(logps.dtype)).sum()
        return logps, entropy, dict(zip(leaves, torch.autograd.grad(mixture, list(leaves.values())), strict=True))

    precision = torch.float64 if dtype == torch.float64 and backend == "torch" else torch.float32
    truth, eager = oracle(torch.float64), oracle(dtype if dtype.itemsize < 4 else precision)
    leaves = leaves_of(case, device)
    leaves["hidden"] = poisoned(leaves["hidden"].detach(), mask.to(device)).requires_grad_()
    arguments = {
        "completion_ids": ids.to(device),
        "temperature": 0.7,
        "mask": mask.to(device),
        "workspace_bytes": None if rows is None else room_for(rows, case, backend),
        "backend": backend,
    }
    out = srpo.selected_logps_from_hidden(**leaves, **arguments, return_entropy=True)
    assert out.logps.dtype == out.entropy.dtype == precision
    on_device = upstream.to(device, precision)
    (out.logps * on_device[0] + out.entropy * on_device[1]).sum().backward()
    assert_close_to_truth("logps", out.logps, truth[0], worst(eager[0], truth[0]), precision=precision)
    assert_close_to_truth("entropy", out.entropy, truth[1], worst(eager[1], truth[1]), precision=precision)
    stored = dtype if dtype.itemsize < 4 else precision
    for name, expected in truth[2].items():
        allowed = worst(eager[2][name], expected)
        assert_close_to_truth("gradient", leaves[name].grad, expected, allowed, precision=stored, what=name)
    assert not leaves["hidden"].grad[1].any()

    alone = srpo.selected_logps_from_hidden(**{k: x.detach() for k, x in leaves.items()}, **arguments)
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, out.logps)


@pytest.mark.parametrize("part", ["logps", "entropy"])
def test_the_gradient_of_one_of_the_two_outputs(backend, device, part):
    case = make_case(461, 2, 3, V=33, mask_style="full")
    gradients = []
    for from_hidden in (True, False):
        leaves = leaves_of(case, device)
        ids = case.batch.completion_ids.to(device)
        if from_hidden:
            out = srpo.selected_logps_from_hidden(
                **leaves, completion_ids=ids, return_entropy=True, backend=backend, workspace_bytes=1
            )
        else:
            logits = linear(leaves["hidden"], leaves["lm_head_weight"], leaves["bias"])
            out = srpo.selected_logps(logits, ids, return_entropy=True, backend=backend)
        getattr(out, part)[:, 1:].square().sum().backward()
        gradients.append([x.grad for x in leaves.values()])
    assert gradients[0][0].any()
    assert not gradients[0][0][:, 0].any()
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=2e-6)


def test_masked_rows_take_no_upstream_gradient(backend, device):
    """A NaN that a later operation sends back to a masked row goes no further."""
    case = make_case(462, 2, 3, V=7, mask_style="full")
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]], device=device)
    leaves = leaves_of(case, device)
    logps = srpo.selected_logps_from_hidden(
        **leaves, completion_ids=case.batch.completion_ids.to(device), mask=mask, backend=backend
    )
    assert not logps[mask == 0].any()
    logps.backward(torch.where(mask == 1, 1.0, NAN))
    for leaf in leaves.values():
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any()
    assert not leaves["hidden"].grad[mask == 0].any()


def test_selected_logps_without_a_row(backend, device):
    for rows, tokens, mask in ((2, 0, None), (0, 3, None), (2, 3, torch.zeros(2, 3, device=device))):
        case = make_case(463, rows, tokens, V=7, mask_style="full")
        leaves = leaves_of(case, device)
        ids = case.batch.completion_ids.to(device)
        out = srpo.selected_logps_from_hidden(
            **leaves, completion_ids=ids, mask=mask, return_entropy=True, backend=backend
        )
        (out.logps + out.entropy).sum().backward()
        assert out.logps.shape == out.entropy.shape == (rows, tokens)
        for leaf in leaves.values():
            assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_selected_logps_of_packed_rows_and_of_one_more_position(backend, device):
    case = make_case(464, 2, 4, V=33, mask_style="full")
    weight, bias, hidden = (x.to(device) for x in (case.weight, case.bias, case.hidden))
    ids = case.batch.completion_ids.to(device)
    expected = srpo.selected_logps_from_hidden(hidden, weight, ids, bias=bias, backend=backend)
    extra = pad(hidden, (0, 0, 0, 1), value=NAN)
    assert torch.equal(srpo.selected_logps_from_hidden(extra, weight, ids, bias=bias, backend=backend), expected)
    packed = srpo.selected_logps_from_hidden(
        hidden.flatten(0, 1), weight, ids.flatten(), bias=bias, return_entropy=True, backend=backend
    )
    assert torch.equal(packed.logps, expected.flatten())
    assert packed.entropy.shape == (8,)


@pytest.mark.parametrize("workspace_bytes", [None, 1, 100])
def test_selected_logps_pass_gradcheck(workspace_bytes):
    case = make_case(465, 2, 3, V=7, H=3, dtype=torch.float64, mask_style="full")
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    leaves = leaves_of(case, torch.device("cpu"))

    def both(hidden, weight, bias):
        return srpo.selected_logps_from_hidden(
            hidden, weight, case.batch.completion_ids, bias=bias, temperature=0.8, mask=mask, return_entropy=True,
            workspace_bytes=workspace_bytes,
        )  # fmt: skip

    assert torch.autograd.gradcheck(lambda *x: tuple(both(*x)), tuple(leaves.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_old_and_current_logps_of_one_model_have_equal_bits(backend, device, dtype):
    """Scoring and training in one workspace: the ratio of the first step is exactly 1."""
    case = make_case(451, V=130, H=16, dtype=dtype, mask_style="holes", role_style="mixed")
    workspace = room_for(4, case, backend)
    leaves, ids = leaves_of(case, device), case.batch.completion_ids.to(device)
    old = srpo.selected_logps_from_hidden(
        **{k: x.detach() for k, x in leaves.items()},
        completion_ids=ids,
        mask=case.batch.completion_mask.to(device),
        temperature=0.9,
        workspace_bytes=workspace,
        backend=backend,
    )
    inputs = inputs_of(case, "no roles", advantages=torch.tensor([0.7, 0.3, -1.2, 0.4]), old_logps=old.cpu())
    out, _ = run(
        case, inputs | {"loss": LossConfig(temperature=0.9)}, device, backend, leaves, workspace_bytes=workspace
    )
    assert old.any()
    assert torch.equal(out.logps, old)
    weighted = -(inputs["advantages"][:, None] * case.batch.valid).sum() / case.batch.valid.sum()
    torch.testing.assert_close(out.loss.cpu(), weighted, rtol=1e-6, atol=1e-7)


def test_peaked_rows_in_bf16(backend, device):
    """Logits up to 40: not above the eager error, and exact to 1e-5 where logits are fp32."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(130, 16, generator=generator).bfloat16()
    ids = torch.randint(0, 130, (3, 6), generator=generator)
    hidden = (2.3 * weight[ids].float() + 0.1 * torch.randn(3, 6, 16, generator=generator)).bfloat16()
    everywhere = torch.ones_like(ids)
    logits = linear(hidden.double(), weight.double())
    assert logits.max() > 30
    truth = oracles.log_probs(logits, ids, everywhere)
    eager = oracles.log_probs(linear(hidden, weight).float(), ids, everywhere)
    got = srpo.selected_logps_from_hidden(hidden.to(device), weight.to(device), ids.to(device), backend=backend)
    error = (got.cpu().double() - truth).abs()
    assert error.max() <= (eager.double() - truth).abs().max() + 2e-6
    if backend == "triton":
        assert error.max() < 1e-5
