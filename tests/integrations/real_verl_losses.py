"""Run by `test_verl_plugin.py` in a process with verl: its policy losses and ours, value and gradient in the logits."""

import dataclasses
import types

import conftest  # noqa: F401 - the interpreter and its guard
import torch
import verl
from peers import ENTRIES, NUM_ITEMS_IN_BATCH, TEMPERATURE, peer_batch, run
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig, PolicyLossConfig

from srpo import LossConfig

LOSS = LossConfig(temperature=TEMPERATURE, epsilon_low=0.2, epsilon_high=0.28, max_completion_length=9)
# name: verl's loss, its aggregation, its settings; ours. The table of srpo/README.md, row by row.
BUILT_IN = {
    "vanilla, token-mean": ("vanilla", "token-mean", {"clip_ratio_c": 3.0}, {"loss_type": "bnpo", "delta": 3.0}),
    "vanilla, over all ranks": (
        "vanilla", "token-mean", {"clip_ratio_c": 3.0, "batch_num_tokens": NUM_ITEMS_IN_BATCH}, {"delta": 3.0},
    ),
    "vanilla, seq-mean-token-mean": (
        "vanilla", "seq-mean-token-mean", {"clip_ratio_c": 1.5}, {"loss_type": "grpo", "delta": 1.5},
    ),
    "vanilla, seq-mean-token-sum": (
        "vanilla", "seq-mean-token-sum", {"clip_ratio_c": 3.0}, {"loss_type": "luspo", "delta": 3.0},
    ),
    "vanilla, seq-mean-token-sum-norm": (
        "vanilla", "seq-mean-token-sum-norm", {"clip_ratio_c": 3.0, "loss_scale_factor": 9},
        {"loss_type": "dr_grpo", "delta": 3.0},
    ),
    "gspo": (
        "gspo", "seq-mean-token-mean", {}, {"loss_type": "grpo", "importance_sampling_level": "sequence_token"},
    ),
    "sapo": (
        "sapo", "seq-mean-token-mean", {"tau_pos": 1.5, "tau_neg": 2.5},
        {"loss_type": "sapo", "sapo_temperature_pos": 1.5, "sapo_temperature_neg": 2.5},
    ),
    "cispo": ("cispo", "token-mean", {"clip_ratio_low": 1.0, "batch_num_tokens": NUM_ITEMS_IN_BATCH},
              {"loss_type": "cispo", "epsilon_high": 1.28}),
}  # fmt: skip


def gpg(batch):
    return lambda logps: -logps * batch.advantages[:, None]


def geo_mean(batch):
    mask, sign = batch.completion_mask.bool(), batch.advantages[:, None].sign()

    def token_loss(logps):
        drift = logps - batch.old_logps
        clipped = drift.clamp(-LOSS.epsilon_low, LOSS.epsilon_high)
        drift = sign * torch.minimum(sign * drift, sign * clipped)
        mean = torch.where(mask, drift, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        return (-mean.exp() * batch.advantages[:, None]).expand_as(logps)

    return token_loss


def dro(batch):
    return lambda logps: -(logps * batch.advantages[:, None] - 0.5 * 0.3 * (logps - batch.old_logps).square())


def cispo(batch):
    def token_loss(logps):
        ratio = (logps - batch.old_logps).exp().clamp(1 - LOSS.epsilon_low, 1 + LOSS.epsilon_high).detach()
        return -ratio * batch.advantages[:, None] * logps

    return token_loss


def kl_cov(batch):
    """Of the whole batch: log-probs only."""
    mask = batch.completion_mask.bool()

    def token_loss(logps):
        advantages = batch.advantages[:, None].expand_as(logps)
        drift = logps - batch.old_logps
        covariance = (advantages - advantages[mask].mean()) * (logps - logps[mask].mean()).detach()
        chosen = torch.where(mask, covariance, -torch.inf).flatten().topk(max(1, int(0.4 * int(mask.sum())))).indices
        penalty = torch.zeros_like(logps).flatten().index_fill(0, chosen, 1.0).view_as(logps)
        return -advantages * drift.exp() + penalty * drift.abs()

    return token_loss


OWN = {
    "gpg": ("gpg", "token-mean", {}, gpg, "bnpo"),
    "geo_mean": ("geo_mean", "token-mean", {}, geo_mean, "grpo"),
    "dro": ("dro", "token-mean", {"dro_beta": 0.3}, dro, "bnpo"),
    "cispo, both bounds": ("cispo", "token-mean", {}, cispo, "bnpo"),
    "kl_cov": ("kl_cov", "token-mean", {"kl_cov_ratio": 0.4, "ppo_kl_coef": 1.0}, kl_cov, "bnpo"),
}


def verl_loss(name, aggregation, settings, leaf, batch, weights):
    """verl's own loss on the log-probs of `leaf`, with weighted advantages, and its gradient."""
    batch_info = {key: settings[key] for key in ("batch_num_tokens", "loss_scale_factor") if key in settings}
    policy = {key: settings[key] for key in ("dro_beta", "kl_cov_ratio", "ppo_kl_coef") if key in settings}
    own = {key: x for key, x in settings.items() if key not in {*batch_info, *policy}}
    bounds = {"clip_ratio_low": LOSS.epsilon_low, "clip_ratio_high": LOSS.epsilon_high, **own}
    config = ActorConfig(
        strategy="fsdp", rollout_n=2, ppo_mini_batch_size=4, ppo_micro_batch_size_per_gpu=2,
        policy_loss=PolicyLossConfig(loss_mode=name, **policy), **bounds,
    )  # fmt: skip
    config.global_batch_info.update(batch_info)
    logps = (leaf[:, :-1] / TEMPERATURE).log_softmax(-1).gather(-1, batch.completion_ids[..., None])[..., 0]
    mask = batch.completion_mask.to(logps.dtype)
    advantages = batch.advantages[:, None] * weights
    loss, _ = get_policy_loss_fn(name)(batch.old_logps, logps, advantages, mask, aggregation, config)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def compare(name, row, make, loss, entries, weighted) -> None:
    for seed in range(3):
        batch, logits, weights = peer_batch(seed, "cpu")
        # TRL counts a sequence without tokens as a loss of 0, verl leaves it out: none here.
        batch = batch.replace(completion_mask=batch.completion_mask.index_fill(1, torch.tensor([0]), 1))
        weights = weights if weighted else torch.ones_like(weights)
        expected, gradient = verl_loss(*row[:3], logits.clone().requires_grad_(), batch, weights)
        assert gradient.any(), name
        for entry in entries:
            for backend in ("torch", "triton"):
                own = {"token_loss": make(batch)} if make else {}
                out, found = run(entry, logits, batch, loss, backend, weights=weights, **own)
                label = f"{name} {entry} {backend} {weighted}"
                told = types.SimpleNamespace(rtol=2e-4, atol=2e-6, msg=lambda text, label=label: f"{label}: {text}")
                torch.testing.assert_close(out.loss.detach(), expected, **vars(told))
                torch.testing.assert_close(found, gradient, **vars(told))


for title, (*theirs, settings) in BUILT_IN.items():
    for with_weights in (False, True):
        compare(title, theirs, None, dataclasses.replace(LOSS, **settings), ENTRIES, with_weights)
for title, (*theirs, factory, reduction) in OWN.items():
    entries = ("logits", "logps") if title == "kl_cov" else ENTRIES
    # A weight multiplies the whole of one's own loss; these also have a penalty, a statistic or a mean of advantages.
    for with_weights in (False,) if title in ("kl_cov", "geo_mean", "dro") else (False, True):
        compare(title, theirs, factory, dataclasses.replace(LOSS, loss_type=reduction), entries, with_weights)
print(f"verl {verl.__version__}: {len(BUILT_IN) + len(OWN)} losses agree")
