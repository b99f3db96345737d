"""TRL's loss from hidden states: the logits of a completion never exist, and rows that cannot learn cost no product."""

from typing import Any

import torch
from torch import Tensor

from srpo.config import LossConfig
from srpo.errors import ConfigError, refuse
from srpo.hidden import role_weighted_grpo_loss_from_hidden
from srpo.stage import LossOutput
from srpo.vision.access import head_of, head_states, is_sharded

_PER_WINDOW = ("dapo", "cispo", "vespo")  # TRL divides these by the tokens of an accumulation window
_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
# Settings of `GRPOConfig` that change the loss and are not covered: what they must be, and what to do.
_NOT_COVERED = {
    "use_liger_kernel": (False, "Liger has a loss of its own"),
    "use_adaptive_entropy": (False, "set entropy_coef"),
    "cast_lm_head_to_fp32": (False, "load the model in fp32"),
}


def check_settings(args: Any) -> None:
    """Refuse settings that `fused_loss` does not cover, by name.

    Raises: ConfigError.
    """
    for name, (covered, fix) in _NOT_COVERED.items():
        if getattr(args, name, covered) != covered:
            _refuse(name, repr(getattr(args, name)), repr(covered), f"{fix}, or set fused_loss=False")
    if getattr(args, "off_policy_mask_threshold", None) is not None and args.use_vllm:
        _refuse("off_policy_mask_threshold", "a number with use_vllm", "None", "set fused_loss=False")
    if args.importance_sampling_level == "sequence" and args.use_vllm:
        _refuse("importance_sampling_level", "'sequence' with use_vllm", "'token'", "set fused_loss=False")
    share = getattr(args, "top_entropy_quantile", 1.0)
    if share < 1.0 and args.world_size > 1:
        _refuse("top_entropy_quantile", f"{share} on several ranks", "1.0", "set fused_loss=False")


def check_model(trainer: Any) -> None:
    """Refuse a model whose loss is more than that of its head, or whose head is spread over ranks.

    Raises: ConfigError.
    """
    if getattr(trainer, "aux_loss_enabled", False):
        _refuse("model", "a mixture of experts with a router loss", "no other loss", "set fused_loss=False")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or is_sharded(trainer.model):
        _refuse("model", "parameters in shards", "a whole head on each rank", "train with DDP, or set fused_loss=False")


def fused_loss(trainer: Any, model: Any, inputs: dict[str, Any], names: tuple[str, ...]) -> Tensor:
    """Compute what TRL's `_compute_loss` computes, and log what it logs.

    `entropy` is the mean over the rows that were scored. `names` are those of the inputs of a model.
    """
    mode = "train" if trainer.model.training else "eval"
    ids, mask = inputs["completion_ids"], inputs["completion_mask"]
    mask = mask if inputs.get("tool_mask") is None else mask * inputs["tool_mask"]
    config, normaliser, share = _reduction(trainer, inputs, mode)
    out = role_weighted_grpo_loss_from_hidden(
        _states(trainer, model, inputs, names),
        head_of(model).weight,
        ids,
        inputs["advantages"],
        bias=head_of(model).bias,
        completion_mask=mask,
        old_logps=inputs.get("old_per_token_logps"),
        ref_logps=inputs["ref_per_token_logps"] if config.beta else None,
        importance_sampling_ratio=inputs["importance_sampling_ratio"] if _corrects_engine(trainer) else None,
        num_items_in_batch=normaliser,
        loss=config,
        validate_values=False,
    )
    _log(trainer, mode, out, inputs, mask != 0)
    if getattr(trainer, "_entropy_bonus_enabled", False):
        trainer._metrics[mode]["policy_loss"].append(_policy_loss(trainer, out, config))
        if mode == "train" and trainer.accelerator.sync_gradients:
            trainer._metrics[mode]["entropy_coef"].append(trainer.entropy_coef)
    return out.loss / share


def _reduction(trainer: Any, inputs: dict[str, Any], mode: str) -> tuple[LossConfig, Tensor | None, float]:
    """Return the loss, the tokens of its window, and the accumulation steps that TRL divides the sum by."""
    args = trainer.args
    steps = trainer.current_gradient_accumulation_steps if mode == "train" else 1.0
    per_window = trainer.loss_type in _PER_WINDOW
    normaliser = None
    if per_window:
        normaliser = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        if mode == "train":
            normaliser = normaliser * steps / args.steps_per_generation
    level = "sequence_token" if trainer.importance_sampling_level == "sequence" else "token"
    alike = (
        "delta", "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg",
        "vespo_lambda_neg", "use_bias_correction_kl", "off_policy_mask_threshold", "top_entropy_quantile",
    )  # fmt: skip
    config = LossConfig(
        loss_type=trainer.loss_type,
        epsilon_low=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,
        beta=trainer.beta,
        importance_sampling_level=level,
        temperature=trainer.temperature,
        max_completion_length=trainer.max_completion_length,
        entropy_coef=getattr(trainer, "entropy_coef", 0.0) / (steps if per_window else 1.0),
        **{name: getattr(args, name) for name in alike if hasattr(args, name)},
    )
    return config, normaliser, 1.0 if per_window else steps


def _states(trainer: Any, model: Any, inputs: dict[str, Any], names: tuple[str, ...]) -> Tensor:
    """Run the model, and return what predicts the completion, `[B, T + 1, H]`."""
    given = {name: inputs[name] for name in names if inputs.get(name) is not None and name != "num_images"}
    given["input_ids"] = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    given["attention_mask"] = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with trainer.accelerator.autocast():
        found = head_states(model, given, inputs["completion_ids"].shape[1] + 1)
    if not found.is_bare:
        expected = "a plain linear head that alone makes the logits (no cap, scale, adapter or hook)"
        _refuse("model", type(trainer.model).__name__, expected, "set fused_loss=False")
    return found.states


def _corrects_engine(trainer: Any) -> bool:
    return trainer.use_vllm and trainer.vllm_importance_sampling_correction


def _log(trainer: Any, mode: str, out: LossOutput, inputs: dict[str, Any], mask: Tensor) -> None:
    """Append the metrics of TRL's loss, under its names, over all ranks."""
    log, accelerator = trainer._metrics[mode], trainer.accelerator
    found = out.metrics

    def over_ranks(total: Tensor, count: Tensor) -> float:
        sums = accelerator.reduce(torch.stack([total.float(), count.float()]), reduction="sum")
        return (sums[0] / sums[1].clamp(min=1.0)).item()

    tokens = mask.sum()
    if trainer.beta != 0.0:
        log["kl"].append(over_ranks(found["kl"] * tokens, tokens))
    rows = found["srpo/rows_scored"]
    log["entropy"].append(over_ranks(found["entropy"] * rows, rows))
    log["srpo/rows_skipped"].append(over_ranks(found["srpo/rows_skipped"], tokens))
    advantages = inputs["advantages"]
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    old = inputs.get("old_per_token_logps")
    log_ratio = torch.zeros_like(out.logps) if old is None else torch.where(mask, out.logps - old, 0.0)
    counted = mask
    if trainer.importance_sampling_level == "sequence":  # TRL counts sequences, empty ones too
        log_ratio = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        counted = torch.ones_like(mask[:, :1])
    ratio = log_ratio.exp()
    if trainer.loss_type == "cispo":
        clipped = (ratio > trainer.epsilon_high) & (advantages > 0) & counted
        log["cispo_clip_ratio"].append(over_ranks(clipped.sum(), counted.sum()))
    if trainer.loss_type not in _CLIPPED:
        return
    ratio = ratio if trainer.args.delta is None else ratio.clamp(max=trainer.args.delta)
    low = (ratio < 1 - trainer.epsilon_low) & (advantages < 0) & counted
    high = (ratio > 1 + trainer.epsilon_high) & (advantages > 0) & counted
    for name, which in (("low_mean", low), ("high_mean", high), ("region_mean", low | high)):
        log[f"clip_ratio/{name}"].append(over_ranks(which.sum(), counted.sum()))
    shares = [accelerator.gather(which.sum(-1) / counted.sum(-1)) for which in (low, high)]
    log["clip_ratio/low_min"].append(shares[0].nan_to_num(torch.inf).amin().item())
    log["clip_ratio/high_max"].append(shares[1].nan_to_num(-torch.inf).amax().item())


def _policy_loss(trainer: Any, out: LossOutput, config: LossConfig) -> float:
    """Return the loss without the entropy bonus."""
    bonus = config.entropy_coef * out.metrics["entropy"]
    return trainer.accelerator.gather(out.loss.detach() + bonus).nanmean().item()


def _refuse(argument: str, got: str, expected: str, fix: str) -> None:
    refuse(ConfigError, "SRPOConfig(fused_loss=True)", argument, got, expected, fix)
