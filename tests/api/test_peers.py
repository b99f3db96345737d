"""Parity with implementations nobody here wrote: TRL's released trainer loss and Liger's fused kernel.

Role weights enter both without a change to them: TRL accepts per-token advantages, so `A * w` goes in there; Liger's
`vllm_is_ratio` multiplies the policy term, so `w` goes in there.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from peers import MAX_COMPLETION_LENGTH, NUM_ITEMS_IN_BATCH, TEMPERATURE, peer_batch, trl_loss
from strategies import Batch
from torch import Tensor

import srpo
from srpo import LossConfig

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"]


@pytest.fixture(scope="module")
def triton_grpo_loss():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("liger_kernel")
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss
    return triton_grpo_loss


def srpo_loss(logits: Tensor, batch: Batch, config: LossConfig, backend: str, **options):
    leaf = logits.clone().requires_grad_()
    out = srpo.role_weighted_grpo_loss(
        leaf,
        batch.completion_ids,
        batch.advantages,
        completion_mask=batch.completion_mask,
        old_logps=options.pop("old_logps", batch.old_logps),
        ref_logps=batch.ref_logps if config.beta else None,
        num_items_in_batch=NUM_ITEMS_IN_BATCH,
        loss=config,
        backend=backend,
        **options,
    )
    out.loss.backward()
    return out, leaf.grad


def config_for(loss_type: str, *, beta: float, delta: float | None) -> LossConfig:
    return LossConfig(
        loss_type=loss_type,
        beta=beta,
        delta=None if loss_type == "cispo" else delta,
        epsilon_low=0.1,
        epsilon_high=1.1 if loss_type == "cispo" else 0.28,
        temperature=TEMPERATURE,
        max_completion_length=MAX_COMPLETION_LENGTH,
    )


def assert_same(loss: Tensor, gradient: Tensor, peer_loss: Tensor, peer_gradient: Tensor) -> None:
    torch.testing.assert_close(loss, peer_loss, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(gradient, peer_gradient, rtol=2e-5, atol=5e-7)
    assert peer_gradient.any()


@pytest.mark.parametrize("with_ratio", [False, True], ids=["", "is-ratio"])
@pytest.mark.parametrize(("beta", "delta"), [(0.0, None), (0.1, 1.5)], ids=["plain", "kl-delta"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_trl_loss_of_every_type(trl, backend, device, loss_type, beta, delta, with_ratio):
    """Value, gradient and metrics of TRL with the advantages `A * w`, of srpo with `weights=w`."""
    batch, logits, weights = peer_batch(200, device)
    config = config_for(loss_type, beta=beta, delta=delta)
    ratio = batch.importance_sampling_ratio if with_ratio else None
    leaf = logits.clone().requires_grad_()
    peer_loss, peer_gradient, metrics = trl_loss(trl, leaf, batch, config, batch.advantages[:, None] * weights, ratio)
    out, gradient = srpo_loss(logits, batch, config, backend, weights=weights, importance_sampling_ratio=ratio)
    assert_same(out.loss, gradient, peer_loss, peer_gradient)
    shared = {name for name in metrics if not name.endswith(("_min", "_max"))}
    assert {"entropy"} < shared
    assert ("kl" in shared) == (beta != 0)
    assert shared == {name for name in out.metrics if not name.startswith("srpo/")}
    for name in shared:
        assert out.metrics[name].item() == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_trl_delta_below_the_clip_bound(trl, backend, device, loss_type):
    """delta = 1.1 < 1 + epsilon_high: TRL bounds the ratio before it counts clipped tokens."""
    batch, logits, _ = peer_batch(206, device)
    config = config_for(loss_type, beta=0.0, delta=1.1)
    leaf = logits.clone().requires_grad_()
    peer_loss, peer_gradient, metrics = trl_loss(trl, leaf, batch, config, batch.advantages, None)
    out, gradient = srpo_loss(logits, batch, config, backend)
    assert_same(out.loss, gradient, peer_loss, peer_gradient)
    for side in ("low", "high", "region"):
        assert out.metrics[f"clip_ratio/{side}_mean"].item() == pytest.approx(metrics[f"clip_ratio/{side}_mean"])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_trl_plain_grpo_without_any_credit(trl, backend, device, loss_type):
    """`role_ids=None` is TRL's own loss, advantages [B], on and off policy."""
    for on_policy in (False, True):
        batch, logits, _ = peer_batch(201, device)
        config = config_for(loss_type, beta=0.0, delta=None)
        trl_batch = batch.replace(old_logps=None) if on_policy else batch
        leaf = logits.clone().requires_grad_()
        peer_loss, peer_gradient, _ = trl_loss(trl, leaf, trl_batch, config, batch.advantages, None)
        out, gradient = srpo_loss(logits, batch, config, backend, old_logps=trl_batch.old_logps)
        assert_same(out.loss, gradient, peer_loss, peer_gradient)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_trl_and_srpo_weights_of_a_real_credit_stage(trl, backend, device, loss_type):
    """The portable product: `token_advantages` in TRL equals the fused credit stage."""
    batch, logits, _ = peer_batch(202, device)
    config = config_for(loss_type, beta=0.05, delta=None)
    credit = srpo.PRESETS["srpo_wide"]
    streams = batch.contrast_streams()
    mask = batch.completion_mask
    contrast = srpo.role_contrast(batch.old_logps, **streams, completion_mask=mask, credit=credit, backend=backend)
    weights = srpo.token_weights(contrast, batch.role_ids, mask, credit=credit, backend=backend)
    assert (weights[batch.valid] != 1).any()
    leaf = logits.clone().requires_grad_()
    token_advantages = srpo.token_advantages(batch.advantages, weights)
    peer_loss, peer_gradient, _ = trl_loss(trl, leaf, batch, config, token_advantages, None)
    out, gradient = srpo_loss(logits, batch, config, backend, credit=credit, **streams)
    assert_same(out.loss, gradient, peer_loss, peer_gradient)


@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize(("beta", "delta"), [(0.0, None), (0.1, 1.5)], ids=["plain", "kl-delta"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_liger_with_the_weights_as_its_importance_ratio(
    triton_grpo_loss, backend, device, loss_type, beta, delta, on_policy
):
    batch, logits, weights = peer_batch(203, device, vocabulary=130)
    config = config_for(loss_type, beta=beta, delta=delta)
    old_logps = None if on_policy else batch.old_logps.contiguous()
    leaf = logits.clone().requires_grad_()
    peer_loss, peer_metrics = triton_grpo_loss(
        leaf,
        old_logps,
        batch.ref_logps if beta else None,
        batch.completion_ids,
        batch.advantages,
        batch.completion_mask,
        temperature=config.temperature,
        beta=beta,
        eps_low=config.epsilon_low,
        eps_high=config.epsilon_high,
        inplace=False,
        loss_type=loss_type,
        max_completion_length=MAX_COMPLETION_LENGTH,
        reduce=True,
        vllm_is_ratio=weights,
        delta=config.delta,
        num_items_in_batch=NUM_ITEMS_IN_BATCH,
    )
    (peer_gradient,) = torch.autograd.grad(peer_loss, leaf)
    out, gradient = srpo_loss(logits, batch, config, backend, weights=weights, old_logps=old_logps)
    assert_same(out.loss, gradient, peer_loss.detach(), peer_gradient)
    clip = "cispo_clip_ratio" if loss_type == "cispo" else "clip_ratio/region_mean"
    assert out.metrics[clip].item() == pytest.approx(peer_metrics[-1].item(), abs=1e-6)
    if beta:
        assert out.metrics["kl"].item() == pytest.approx(peer_metrics[0].item(), rel=1e-5)


def test_liger_selected_logps(triton_grpo_loss, backend, device):
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    batch, logits, _ = peer_batch(204, device, vocabulary=1000)
    expected = fused_selective_log_softmax(logits, batch.completion_ids, 0.7, batch.completion_mask)
    got = srpo.selected_logps(
        logits, batch.completion_ids, temperature=0.7, mask=batch.completion_mask, backend=backend
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=3e-6)


def test_torch_cross_entropy(backend, device):
    """Minus the log-probs are `torch.nn.functional.cross_entropy`, gradients included."""
    batch, logits, weights = peer_batch(205, device)
    gradients = []
    for use_torch in (True, False):
        leaf = logits[:, :-1].clone().requires_grad_()
        if use_torch:
            logps = -torch.nn.functional.cross_entropy(
                leaf.flatten(0, 1), batch.completion_ids.flatten(), reduction="none"
            ).view(3, 4)
        else:
            logps = srpo.selected_logps(leaf, batch.completion_ids, backend=backend)
        (logps * weights).sum().backward()
        gradients.append((logps.detach(), leaf.grad))
    torch.testing.assert_close(gradients[1][0], gradients[0][0], rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(gradients[1][1], gradients[0][1], rtol=1e-5, atol=1e-6)
