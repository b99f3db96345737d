"""Every loss of TRL's trainer through the three entries, value and gradient; and losses of one's own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peers import ENTRIES, MAX_COMPLETION_LENGTH, NUM_ITEMS_IN_BATCH, TEMPERATURE, peer_batch, run, trl_loss

import srpo
from srpo import ConfigError, LossConfig

SETTINGS = {
    "sapo": {"loss_type": "sapo"},
    "sapo, sharper": {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 5.0},
    "vespo": {"loss_type": "vespo"},
    "vespo, other shape": {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_neg": 0.5, "beta": 0.1},
    "luspo": {"loss_type": "luspo"},
    "luspo of sequences": {"loss_type": "luspo", "importance_sampling_level": "sequence_token"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence_token"},
    "bias-corrected kl": {"beta": 0.2, "use_bias_correction_kl": True},
    "bias-corrected kl of sapo": {"beta": 0.2, "use_bias_correction_kl": True, "loss_type": "sapo"},
    "off-policy mask": {"off_policy_mask_threshold": 0.02, "loss_type": "grpo"},
    "off-policy mask, kl": {"off_policy_mask_threshold": 0.02, "beta": 0.1, "loss_type": "bnpo"},
    "top entropy": {"top_entropy_quantile": 0.4},
    "top entropy, kl": {"top_entropy_quantile": 0.6, "beta": 0.1, "loss_type": "dr_grpo"},
    "entropy": {"entropy_coef": 0.05},
    "negative entropy": {"entropy_coef": -0.03, "loss_type": "cispo", "epsilon_high": 1.2},
    "entropy of the top": {"entropy_coef": 0.05, "top_entropy_quantile": 0.5, "loss_type": "grpo"},
    "everything": {
        "entropy_coef": 0.05, "top_entropy_quantile": 0.7, "off_policy_mask_threshold": 0.05, "beta": 0.1,
        "use_bias_correction_kl": True, "delta": 1.5,
    },
}  # fmt: skip


def config_of(name: str) -> LossConfig:
    return LossConfig(**{"max_completion_length": MAX_COMPLETION_LENGTH, "temperature": TEMPERATURE, **SETTINGS[name]})


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", SETTINGS)
def test_trl_computes_the_same(trl, device, backend, name, entry, weighted):
    loss = config_of(name)
    if entry == "logps" and (loss.entropy_coef or loss.top_entropy_quantile != 1.0):
        pytest.skip("log-probs have no entropy: refused, below")
    if weighted and loss.importance_sampling_level != "token":
        pytest.skip("TRL's pure ratio of a sequence cancels weights")
    for seed in range(3):
        batch, logits, weights = peer_batch(seed, device)
        plain = "kl" in name or loss.importance_sampling_level != "token"
        ratio = None if plain else 0.5 + torch.rand(weights.shape, generator=torch.Generator().manual_seed(seed))
        ratio = None if ratio is None else ratio.to(device)
        given = weights if weighted else torch.ones_like(weights)
        leaf = logits.clone().requires_grad_()
        advantages = batch.advantages[:, None] * given
        masked = None if ratio is None else torch.where(batch.completion_mask.bool(), ratio, 1.0)
        expected, gradient, metrics = trl_loss(trl, leaf, batch, loss, advantages, masked)
        options = {"weights": given, "importance_sampling_ratio": ratio}
        out, found = run(entry, logits, batch, loss, backend, **options)
        torch.testing.assert_close(out.loss.detach(), expected, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(found, gradient, rtol=2e-4, atol=2e-6)
        for key in {"kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "cispo_clip_ratio"} & metrics.keys():
            if entry != "hidden" and loss.importance_sampling_level == "token":
                assert float(out.metrics[key]) == pytest.approx(metrics[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["sapo", "vespo", "off-policy mask"])
def test_one_engine_ratio_a_trajectory(trl, device, backend, name, entry):
    """TRL's sequence modes give `[B, 1]`: a factor of each token, but of VESPO's weight only once."""
    loss = config_of(name)
    batch, logits, _ = peer_batch(6, device)
    ratio = torch.tensor([[0.6], [1.7], [0.0]], device=device)
    leaf = logits.clone().requires_grad_()
    expected, gradient, _ = trl_loss(trl, leaf, batch, loss, batch.advantages, ratio)
    out, found = run(entry, logits, batch, loss, backend, importance_sampling_ratio=ratio)
    torch.testing.assert_close(out.loss.detach(), expected, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(found, gradient, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["sapo", "vespo", "luspo", "off-policy mask"])
def test_a_weight_multiplies_the_policy_term(device, backend, name, entry):
    """Twice the weights, twice the gradient; signs stay."""
    batch, logits, weights = peer_batch(5, device)
    _, one = run(entry, logits, batch, config_of(name), backend, weights=weights)
    _, two = run(entry, logits, batch, config_of(name), backend, weights=2 * weights)
    torch.testing.assert_close(two, 2 * one, rtol=1e-5, atol=1e-7)
    _, plain = run(entry, logits, batch, config_of(name), backend)
    for t in range(batch.completion_ids.shape[1]):
        of_token = (one[:, t] * plain[:, t]).sum(-1)
        assert (of_token >= 0).all()


@pytest.mark.parametrize("name", SETTINGS)
def test_packed_equals_padded(device, backend, name):
    loss = config_of(name)
    batch, logits, weights = peer_batch(2, device)
    B, T = batch.completion_ids.shape
    ratio = torch.tensor([[0.6], [1.7], [1.2]], device=device)
    options = {"weights": weights, "importance_sampling_ratio": ratio}
    _, padded = run("logits", logits[:, :-1], batch, loss, backend, **options)
    flat = {
        "completion_mask": batch.completion_mask, "old_logps": batch.old_logps, "weights": weights,
        "ref_logps": batch.ref_logps,
    }  # fmt: skip
    leaf = logits[:, :-1].flatten(0, 1).clone().requires_grad_()
    out = srpo.role_weighted_grpo_loss(
        leaf, batch.completion_ids.flatten(), batch.advantages, **{k: x.flatten() for k, x in flat.items()},
        cu_seqlens=torch.arange(B + 1, device=device) * T, num_items_in_batch=NUM_ITEMS_IN_BATCH, loss=loss,
        backend=backend, importance_sampling_ratio=ratio,
    )  # fmt: skip
    out.loss.backward()
    torch.testing.assert_close(leaf.grad.view_as(padded), padded, rtol=1e-5, atol=1e-7)


def sapo_of(batch, loss: LossConfig):
    """SAPO written by a user."""

    def token_loss(logps):
        advantages = batch.advantages[:, None]
        tau = torch.where(advantages > 0, loss.sapo_temperature_pos, loss.sapo_temperature_neg)
        gate = torch.sigmoid(tau * (torch.exp(logps - batch.old_logps) - 1)) * 4 / tau
        return -gate * advantages

    return token_loss


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_loss_of_ones_own_equals_the_built_in(device, backend, entry, beta):
    batch, logits, weights = peer_batch(1, device)
    built_in = dataclasses.replace(config_of("sapo"), beta=beta)
    options = {"weights": weights, "importance_sampling_ratio": 0.5 + torch.rand_like(weights)}
    expected, gradient = run(entry, logits, batch, built_in, backend, **options)
    own = dataclasses.replace(built_in, loss_type="grpo")
    out, found = run(entry, logits, batch, own, backend, token_loss=sapo_of(batch, built_in), **options)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_loss_of_whole_trajectories(device, backend, entry):
    """GMPO: the geometric mean of clipped ratios couples the tokens of a trajectory, not trajectories."""
    batch, logits, _ = peer_batch(4, device)
    mask = batch.completion_mask.bool()

    def token_loss(logps):
        log_ratio = torch.where(mask, (logps - batch.old_logps).clamp(-0.4, 0.4), 0.0)
        mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        return (-mean.exp() * batch.advantages[:, None]).expand_as(logps)

    loss = LossConfig(loss_type="grpo", temperature=TEMPERATURE)
    _, found = run(entry, logits, batch, loss, backend, token_loss=token_loss)
    leaf = logits.double().clone().requires_grad_()
    logps = (leaf[:, :-1] / TEMPERATURE).log_softmax(-1).gather(-1, batch.completion_ids[..., None])[..., 0]
    losses = torch.where(mask, token_loss(logps), 0.0)
    (losses.sum(1) / mask.sum(1).clamp(min=1)).mean().backward()
    torch.testing.assert_close(found, leaf.grad.float(), rtol=1e-4, atol=1e-6)
    assert found.any()


def test_a_loss_that_couples_trajectories_is_refused_from_hidden_states(device, backend):
    batch, logits, _ = peer_batch(1, device)

    def token_loss(logps):
        ratio = torch.exp(logps - batch.old_logps)
        return -(ratio - ratio.mean()) * batch.advantages[:, None]

    loss = LossConfig(temperature=TEMPERATURE)
    with pytest.raises(ConfigError, match=r"token_loss got .*other trajectories.*from_logps"):
        run("hidden", logits, batch, loss, backend, token_loss=token_loss)
    run("logps", logits, batch, loss, backend, token_loss=token_loss)


def test_what_is_refused(device, backend):
    batch, logits, _ = peer_batch(1, device)
    loss = LossConfig(temperature=TEMPERATURE)
    for settings in ({"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}):
        with pytest.raises(ConfigError, match=f"{next(iter(settings))} got .* without logits"):
            run("logps", logits, batch, dataclasses.replace(loss, **settings), backend)
    for bad, match in (
        (3, "token_loss got int 3"), (lambda logps: logps[:, :2], "what token_loss returns got .*shape of logps"),
        (lambda logps: logps.detach(), "without a graph"), (lambda logps: logps * torch.inf, "NaN or infinite"),
    ):  # fmt: skip
        with pytest.raises(srpo.SRPOError, match=match):
            run("logps", logits, batch, loss, backend, token_loss=bad, validate_values=True)
    with pytest.raises(ConfigError, match=r"token_loss got .*loss_type='vespo'"):
        run("logits", logits, batch, config_of("vespo"), backend, token_loss=lambda logps: -logps)
    with pytest.raises(ConfigError, match="importance_sampling_level"):
        LossConfig(loss_type="vespo", importance_sampling_level="sequence_token")
    with pytest.raises(ConfigError, match="top_entropy_quantile"):
        LossConfig(top_entropy_quantile=0.0)


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_masked_may_be_anything(device, backend, entry):
    batch, logits, _ = peer_batch(3, device)
    mask = batch.completion_mask.bool()
    assert not mask.all()
    old = batch.old_logps.masked_fill(~mask, torch.nan)
    with_holes = batch.replace(old_logps=old)
    loss = LossConfig(temperature=TEMPERATURE)

    def token_loss(logps):
        return -torch.exp(logps - old) * batch.advantages[:, None]

    for settings in ({"token_loss": token_loss}, {}):
        _, gradient = run(entry, logits, with_holes, loss, backend, **settings)
        assert gradient.isfinite().all()
        assert not gradient[:, :-1][~mask].any()
