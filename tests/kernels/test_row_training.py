"""Forward and backward in one kernel (`launch.TRAINS_ROWS`): the bits of the two kernels, and who takes it."""

import pytest
import torch
from op_checks import opcheck

from srpo import CreditConfig, LossConfig, role_weighted_grpo_loss
from srpo_kernels import backends, launch, ops

V = 400


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several chunks a row, some of them abreast, and an edge."""
    monkeypatch.setattr(launch, "BLOCKS_PER_CHUNK", 1)
    monkeypatch.setattr(launch, "row_block", lambda vocabulary: (64, 1))
    monkeypatch.setattr(launch, "gradient_block", lambda vocabulary: (64, 1))
    monkeypatch.setattr(launch, "split_rows", lambda n_rows, device: False)
    monkeypatch.setattr(launch, "CHUNKS_ABREAST", 2)


@pytest.fixture
def calls(monkeypatch):
    """Turn the kernel on, and count how often it runs."""
    monkeypatch.setattr(launch, "TRAINS_ROWS", True)
    seen, stock = [], backends.row_training
    monkeypatch.setattr(backends, "row_training", lambda *arguments: seen.append(1) or stock(*arguments))
    return seen


def batch(dtype=torch.bfloat16, vocabulary=V - 3, extra=0):
    generator = torch.Generator().manual_seed(3)
    B, T = 3, 4
    rows = torch.full((B, T + extra, V), torch.nan, dtype=dtype)[..., :vocabulary]
    rows.copy_(3 * torch.randn(B, T + extra, vocabulary, generator=generator))
    ids = torch.randint(0, vocabulary, (B, T), generator=generator)
    rows[0, 0, : vocabulary // 3] = -torch.inf
    rows[0, 0, ids[0, 0]] = 1.0
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 2:], mask[2, 1] = False, False
    logps = rows[:, :T].float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old = logps + 0.2 * torch.randn(B, T, generator=generator)
    return rows, {
        "completion_ids": ids.masked_fill(~mask, -100),
        "advantages": torch.tensor([1.0, -0.5, 0.0]),
        "completion_mask": mask,
        "role_ids": torch.randint(0, 3, (B, T), generator=generator),
        "old_logps": old,
        "ref_logps": logps - 0.3,
        "corrupted_logps": logps - 0.5,
        "ablated_logps": logps - 0.7 * torch.rand(B, T, generator=generator),
        "importance_sampling_ratio": 0.5 + torch.rand(B, T, generator=generator),
    }


def step(logits, arguments, upstream=1.0, **options):
    leaf = logits.detach().requires_grad_()
    out = role_weighted_grpo_loss(leaf, **arguments, backend="triton", **options)
    (out.loss * upstream).backward()
    return out, leaf.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [
    {}, {"loss": LossConfig(beta=0.1, delta=3.0)}, {"loss": LossConfig(loss_type="cispo", epsilon_high=1.5)},
    {"loss": LossConfig(temperature=0.95, loss_type="dr_grpo", max_completion_length=9)},
    {"credit": CreditConfig(reasoning_signal="image_independence")},
])  # fmt: skip
def test_equals_the_two_kernels(calls, monkeypatch, dtype, options):
    logits, arguments = batch(dtype, extra=1)
    out, gradient = step(logits, arguments, **options)
    assert calls
    monkeypatch.setattr(launch, "TRAINS_ROWS", False)
    expected, wanted = step(logits, arguments, **options)
    assert len(calls) == 1
    for name in ("loss", "logps", "weights", "entropy"):
        assert torch.equal(getattr(out, name), getattr(expected, name)), name
    torch.testing.assert_close(out.metrics.floats(), expected.metrics.floats(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(gradient, wanted)
    assert gradient.any()


def test_packed(calls):
    logits, arguments = batch()
    flat = {k: v.flatten() if v.dim() == 2 else v for k, v in arguments.items()}
    out, gradient = step(logits.flatten(0, 1), flat, cu_seqlens=torch.tensor([0, 4, 8, 12]))
    expected, wanted = step(logits, arguments)
    assert len(calls) == 2
    assert torch.equal(gradient.view_as(wanted), wanted)
    assert torch.equal(out.logps.view_as(expected.logps), expected.logps)


def test_the_upstream_gradient_is_applied_and_a_kept_graph_keeps_its_gradient(calls):
    logits, arguments = batch(torch.float32)
    leaf = logits.detach().requires_grad_()
    loss = role_weighted_grpo_loss(leaf, **arguments, backend="triton").loss
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (tripled,) = torch.autograd.grad(3 * loss, leaf, retain_graph=True)
    (last,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(tripled, 3 * first, rtol=1e-6, atol=0)
    assert torch.equal(first, last)
    assert len(calls) == 1


def test_a_second_derivative_is_refused(calls):
    logits, arguments = batch(torch.float32)
    leaf = logits.detach().requires_grad_()
    loss = role_weighted_grpo_loss(leaf, **arguments, backend="triton").loss
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_who_does_not_take_it(calls):
    logits, arguments = batch()
    given = {k: v for k, v in arguments.items() if k not in ("corrupted_logps", "ablated_logps")}
    live = {"corrupted_logits": logits.detach() + 1, "ablated_logits": logits.detach() - 1}
    step(logits, given | live)  # weights depend on the rows that are being scored
    step(logits, {k: v for k, v in arguments.items() if k != "old_logps"})  # so do contrasts with the current policy
    step(logits, arguments, loss=LossConfig(importance_sampling_level="sequence_token"))  # so does a ratio of sequences
    step(logits.half(), arguments)  # the unit of a half gradient is known in backward only
    step(batch()[0].contiguous(), arguments)  # rows that start anywhere
    role_weighted_grpo_loss(logits, **arguments, backend="triton")
    with torch.no_grad():
        step_of_none = role_weighted_grpo_loss(logits.detach().requires_grad_(), **arguments, backend="triton")
    assert not step_of_none.loss.requires_grad
    assert not calls


@pytest.mark.parametrize("given", [False, True])
def test_opcheck(monkeypatch, given):
    """In a graph that is kept: otherwise backward scales the gradient where it lies, and opcheck compares that."""
    monkeypatch.setattr(ops, "saved_tensors_are_needed_again", lambda: True)
    logits, arguments = batch(torch.float32)
    ids, mask = arguments["completion_ids"], arguments["completion_mask"]
    flat = torch.ones(ids.shape)
    optional = [arguments[k] if given else None for k in ("old_logps", "ref_logps", "importance_sampling_ratio")]
    rule = LossConfig(beta=0.1 if given else 0.0).rule
    opcheck(
        torch.ops.srpo.row_training.default,
        (logits.requires_grad_(), ids, mask, *optional, flat, 1.1 * flat, flat, 0.9, rule),
    )
    opcheck(torch.ops.srpo.scaled_gradient.default, (logits.detach(), torch.tensor(2.0)))
    opcheck(torch.ops.srpo.scale_gradient_.default, (logits.detach().clone(), torch.tensor(2.0)))
