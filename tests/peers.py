"""TRL's released trainer loss on tensors, without a trainer; a batch that it and others can read; the three entries."""

from __future__ import annotations

import functools
import types
from collections import defaultdict

import oracles
import torch
from strategies import Batch, make_batch
from torch import Tensor

import srpo
from srpo import LossConfig

MAX_COMPLETION_LENGTH = 9
TEMPERATURE = 0.9
NUM_ITEMS_IN_BATCH = 13.0
ENTRIES = ("logits", "logps", "hidden")


class TrainerStub:
    """What `GRPOTrainer._compute_loss` reads of its trainer: one process, one micro-batch, logits for a model."""

    aux_loss_enabled = False
    use_adaptive_entropy = False
    vllm_importance_sampling_correction = True
    current_gradient_accumulation_steps = 1

    def __init__(self, trl, logits: Tensor, config: LossConfig, use_vllm: bool):
        self.utils, self.logits, self.temperature = trl.utils, logits, config.temperature
        self.loss_type, self.beta = config.loss_type, config.beta
        level = config.importance_sampling_level
        self.importance_sampling_level = "sequence" if level == "sequence_token" else level
        self.top_entropy_quantile, self.entropy_coef = config.top_entropy_quantile, config.entropy_coef
        self.off_policy_mask_threshold = config.off_policy_mask_threshold
        self._entropy_bonus_enabled = config.entropy_coef != 0.0
        self.get_off_policy_mask, self.get_gamma_weights = (
            trl.trainer.get_off_policy_mask,
            trl.trainer.get_gamma_weights,
        )
        self.get_high_entropy_mask = functools.partial(trl.trainer.get_high_entropy_mask, self)
        self.epsilon_low, self.epsilon_high = config.epsilon_low, config.epsilon_high
        self.max_completion_length = config.max_completion_length
        self.use_vllm = use_vllm
        self.args = types.SimpleNamespace(**vars(config), steps_per_generation=1)
        self.model = types.SimpleNamespace(training=True)
        self.accelerator = types.SimpleNamespace(
            num_processes=1, gather=lambda tensor: tensor, reduce=lambda tensor, reduction: tensor,
            pad_across_processes=lambda tensor, **_: tensor, sync_gradients=False,
        )  # fmt: skip
        self._metrics = {"train": defaultdict(list)}

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, **_options):
        logits = self.logits[:, :-1] / self.temperature
        logps = self.utils.selective_log_softmax(logits, input_ids[:, -logits_to_keep:])
        return logps, self.utils.entropy_from_logits(logits), None


def trl_loss(trl, leaf: Tensor, batch: Batch, config: LossConfig, advantages: Tensor, ratio: Tensor | None):
    """TRL's loss, its gradient in the logits and its metrics."""
    prompt = torch.zeros(batch.role_ids.shape[0], 1, dtype=torch.long, device=leaf.device)
    stub = TrainerStub(trl, leaf, config, use_vllm=ratio is not None)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": prompt + 1,
        "completion_ids": batch.completion_ids,
        "completion_mask": batch.completion_mask,
        "advantages": advantages,
        "old_per_token_logps": batch.old_logps,
        "ref_per_token_logps": batch.ref_logps,
        "importance_sampling_ratio": ratio,
        "num_items_in_batch": torch.tensor(NUM_ITEMS_IN_BATCH, device=leaf.device),
    }
    loss = trl.trainer._compute_loss(stub, stub.model, inputs)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient, {name: values[0] for name, values in stub._metrics["train"].items()}


def peer_batch(seed: int, device, vocabulary: int = 33) -> tuple[Batch, Tensor, Tensor]:
    """A batch that TRL and Liger can read: finite everywhere, legal ids, logits [B, T+1, V]; and random weights."""
    batch = make_batch(seed, 3, 4, vocabulary=vocabulary, mask_style="ragged", role_style="mixed")
    batch = batch.map(lambda x: x.nan_to_num(0.5) if x.is_floating_point() else x)
    ids = batch.completion_ids.clamp(0, vocabulary - 1)
    drift = batch.old_logps - batch.logps
    sampled = oracles.log_probs(batch.logits.double(), ids, batch.completion_mask, TEMPERATURE).float()
    batch = batch.replace(completion_ids=ids, old_logps=sampled + drift, ref_logps=sampled + 2 * drift).to(device)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.cat([batch.logits, torch.randn(3, 1, vocabulary, generator=generator).to(device)], dim=1)
    weights = (0.5 + torch.rand(3, 4, generator=generator)).to(device)
    return batch, logits, weights


def loss_of(entry: str, leaf, batch, loss: LossConfig, backend: str, **options):
    """The loss through one entry; from hidden states the head is the identity, in chunks of a trajectory or less."""
    common = {
        "completion_mask": batch.completion_mask, "old_logps": batch.old_logps, "loss": loss, "backend": backend,
        "ref_logps": batch.ref_logps if loss.beta else None, "num_items_in_batch": NUM_ITEMS_IN_BATCH, **options,
    }  # fmt: skip
    if entry == "logits":
        return srpo.role_weighted_grpo_loss(leaf, batch.completion_ids, batch.advantages, **common)
    if entry == "logps":
        logps = srpo.selected_logps(
            leaf, batch.completion_ids, temperature=loss.temperature, mask=batch.completion_mask, backend=backend
        )
        return srpo.role_weighted_grpo_loss_from_logps(logps, batch.advantages, **common)
    V = leaf.shape[-1]
    return srpo.role_weighted_grpo_loss_from_hidden(
        leaf,
        torch.eye(V, device=leaf.device),
        batch.completion_ids,
        batch.advantages,
        workspace_bytes=3 * 4 * V,
        **common,
    )


def run(entry, logits, batch, loss, backend, **options):
    leaf = logits.clone().requires_grad_()
    out = loss_of(entry, leaf, batch, loss, backend, **options)
    out.loss.backward()
    return out, leaf.grad
