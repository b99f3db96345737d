"""Which rows of the hidden states are scored: those that can change the loss, down to none at all."""

from __future__ import annotations

import pytest
import torch
from hidden_cases import NAN, Case, check_against_oracle, inputs_of, leaves_of, make_case, needs_of, on, poisoned, run
from torch import Tensor
from torch.nn.functional import linear

import srpo
from srpo import LossConfig


@pytest.mark.parametrize(
    ("settings", "scored"),
    [
        ({}, [[1, 0, 1, 0], [0, 0, 0, 0]]),
        ({"importance_sampling_level": "sequence_token"}, [[1, 1, 1, 0], [0, 0, 0, 0]]),
        ({"beta": 0.1}, [[1, 1, 1, 0], [1, 1, 0, 0]]),
    ],
    ids=str,
)
def test_rows_that_cannot_change_the_loss_are_skipped(backend, device, settings, scored):
    """One masked tail, one token with advantage 0, one trajectory of zeros."""
    case = make_case(420, 2, 4, V=7, mask_style="full")
    scored = torch.tensor(scored, dtype=torch.bool)
    inputs = {
        "advantages": torch.tensor([[1.0, 0.0, -0.5, NAN], [0.0, 0.0, NAN, NAN]]),
        "completion_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
        "old_logps": case.batch.old_logps,
        "ref_logps": case.batch.ref_logps,
        "loss": LossConfig(**settings),
    }
    leaves = leaves_of(case, device)
    leaves["hidden"] = poisoned(leaves["hidden"].detach(), scored.to(device)).requires_grad_()
    out, gradients = run(case, inputs, device, backend, leaves)
    assert out.loss.isfinite()
    for gradient in gradients.values():
        assert gradient.isfinite().all()
        assert gradient.any()
    assert torch.equal(out.logps.cpu() != 0, scored)
    assert torch.equal(out.entropy.cpu() != 0, scored)
    assert not gradients["hidden"].cpu()[~scored].any()
    assert out.metrics["srpo/rows_scored"] == scored.sum()
    assert out.metrics["srpo/rows_skipped"] == 5 - scored.sum()
    assert out.metrics["entropy"] == pytest.approx(out.entropy.cpu()[scored].mean().item(), rel=1e-6)


def nothing_to_learn(name: str) -> tuple[Case, Tensor]:
    """A case without a row that can change the loss, and its advantages."""
    rows, tokens = {"T=0": (2, 0), "B=0": (0, 3), "both 0": (0, 0)}.get(name, (2, 3))
    case = make_case(421, rows, tokens, V=7, mask_style="all_masked" if name == "all masked" else "full")
    return case, torch.zeros(rows) if name == "advantages 0" else torch.ones(rows)


@pytest.mark.parametrize("mode", ["no roles", "scored before", "live base", "live"])
@pytest.mark.parametrize("name", ["T=0", "B=0", "both 0", "all masked", "advantages 0"])
def test_without_active_rows_loss_and_gradients_are_zero_and_attached(backend, device, name, mode):
    case, advantages = nothing_to_learn(name)
    inputs = inputs_of(case, mode, advantages=advantages)
    leaves = leaves_of(case, device)
    leaves["hidden"] = torch.full_like(leaves["hidden"], NAN).requires_grad_()
    out, gradients = run(case, inputs, device, backend, leaves)
    assert out.loss.requires_grad
    assert out.loss == 0
    for name, gradient in gradients.items():
        assert torch.equal(gradient, torch.zeros_like(leaves[name]))
    assert not out.logps.any()
    assert not out.entropy.any()
    assert out.metrics["srpo/rows_scored"] == 0


@pytest.mark.parametrize("mode", ["no roles", "live"])
def test_packed_trajectories_without_a_token(backend, device, mode):
    case = make_case(422, 1, 0, V=7)
    inputs = inputs_of(case, mode, advantages=torch.tensor([1.0, 2.0]))
    inputs = {k: x[0] if isinstance(x, Tensor) and x.dim() > 1 else x for k, x in inputs.items()}
    leaves = leaves_of(case, device)
    leaves["hidden"] = leaves["hidden"].detach()[0].requires_grad_()
    out = srpo.role_weighted_grpo_loss_from_hidden(
        completion_ids=case.batch.completion_ids[0].to(device),
        cu_seqlens=torch.zeros(3, dtype=torch.int64, device=device),
        backend=backend,
        **leaves,
        **on(device, inputs),
    )
    out.loss.backward()
    assert out.loss == 0
    assert not any(leaf.grad.any() for leaf in leaves.values())


def test_one_row(backend, device):
    case = make_case(423, 1, 1, V=7, H=5, mask_style="full", role_style="mixed")
    inputs = inputs_of(case, "live base", advantages=torch.tensor([-0.7]))
    check_against_oracle(case, inputs, backend, device, one_more_position=True)


def test_skipped_rows_change_neither_loss_nor_weights_of_the_others(backend, device):
    """With advantages of 0, against the entry from logits; weights scored before are known on skipped rows too."""
    case = make_case(425, mask_style="holes", role_style="mixed")
    advantages = torch.tensor([0.7, 0.0, -1.2, 0.0])
    logits = linear(case.hidden, case.weight, case.bias).to(device).requires_grad_()
    for mode in ("scored before", "live base"):
        inputs = inputs_of(case, mode, advantages=advantages)
        scored = needs_of(case, inputs).scored.to(device)
        out, _ = run(case, inputs, device, backend)
        ids = case.batch.completion_ids.to(device)
        expected = srpo.role_weighted_grpo_loss(logits, ids, backend=backend, **on(device, inputs))
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(out.weights[scored], expected.weights[scored], rtol=1e-5, atol=4e-6)
        torch.testing.assert_close(out.logps[scored], expected.logps[scored], rtol=1e-5, atol=4e-6)
        for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "srpo/zero_advantage_fraction"):
            assert out.metrics[name] == expected.metrics[name]
        if mode == "scored before":
            torch.testing.assert_close(out.weights, expected.weights)
