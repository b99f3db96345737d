"""SRPO in TRL: `SRPOTrainer` is TRL's `GRPOTrainer` with advantages per token.

    trainer = SRPOTrainer(model, reward_funcs, args=SRPOConfig(output_dir=..., credit="srpo"), train_dataset=...)

It overrides the advantage stage: roles come from the completions, streams from `score_streams`, and `advantages`
becomes `[B, T]`. The loss is TRL's own: its loss types, corrections for sampling engines, KL and metrics keep working;
`SRPOConfig(fused_loss=True)` computes the same from hidden states.
"""

import importlib
import inspect
import os
import warnings
from importlib.metadata import version
from typing import Any, ClassVar, NoReturn, cast

import torch
from torch import Tensor

from srpo.config import CreditConfig
from srpo.errors import ConfigError, IncompatibleVersionError, refuse
from srpo.integrations.checkpoint import ReadsBack
from srpo.integrations.trl_config import TESTED, GRPOTrainer, SRPOConfig
from srpo.integrations.trl_fused import check_model, fused_loss
from srpo.integrations.trl_pages import CreditLog
from srpo.integrations.trl_pictures import Shown, corrupted_inputs, dataset_images
from srpo.integrations.trl_vllm import check_prompts, prompts_seen
from srpo.methods import Method
from srpo.rollout import CreditedRollout, RoleFunction, ScoredStreams, credit_rollout
from srpo.vision.access import head_of
from srpo.vision.scoring import score_streams

__all__ = ["TESTED", "SRPOConfig", "SRPOTrainer", "check_trl"]

# What a model is called with beside ids and mask, as TRL names it; `num_images` says how many images a row has.
_MODEL_INPUTS = (
    "pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes", "token_type_ids",
    "mm_token_type_ids", "image_position_ids", "num_images",
)  # fmt: skip
_SCORED = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
# What the trainer reads or overrides: method of GRPOTrainer and its parameters.
_METHODS = {
    "_generate": ["self", "prompts"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_compute_loss": ["self", "model", "inputs"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_best_model": ["self"],
    "_load_rng_state": ["self", "checkpoint"],
}


def check_trl(trainer: type = GRPOTrainer) -> None:
    """Compare a trainer class with what `SRPOTrainer` builds on.

    Raises: IncompatibleVersionError, which names the tested versions.
    """
    for name, parameters in _METHODS.items():
        function = getattr(trainer, name, None)
        found = None if function is None else list(inspect.signature(inspect.unwrap(function)).parameters)
        if found != parameters:
            _refuse_version(f"{trainer.__name__}.{name}", f"parameters {found}", f"{parameters}")
    # `advantages.dim()`: before TRL 0.26 the loss broadcast `[B, T]` advantages to a wrong shape without a word.
    if "dim" not in inspect.unwrap(trainer._compute_loss).__code__.co_names:
        _refuse_version(f"{trainer.__name__}._compute_loss", "no look at advantages.dim()", "advantages per token")


def _refuse_version(argument: str, got: str, expected: str) -> NoReturn:
    fix = f"pip install 'trl=={TESTED[-1]}'; tested with {', '.join(TESTED)}"
    raise IncompatibleVersionError(
        f"SRPOTrainer(): {argument} of trl {version('trl')} got {got}, expected {expected}; {fix}."
    )


def _scores_in_fp32() -> bool:
    """Say whether TRL keeps autocast off a head that it cast to fp32: before its fused head, it did not."""
    fused = getattr(importlib.import_module("trl.trainer.utils"), "add_fused_lm_head", None)
    return fused is not None and "cast_lm_head_to_fp32" in inspect.signature(fused).parameters


def _unshard_head(model: Any) -> None:
    """Gather a head that FSDP2 shards by itself, as its own forward would; TRL multiplies by its weight without one.

    TRL 1.16 gathers the shards with `DTensor.full_tensor()`, whose gradient is that of one rank alone, not averaged:
    the head then learns from one part of the batch on each rank, in every step but those that follow a generation.
    """
    unshard = getattr(head_of(model), "unshard", None)
    if unshard is not None:
        unshard()


class SRPOTrainer(ReadsBack, GRPOTrainer):
    """Train with TRL's GRPO and token credit.

    Args: as TRL's `GRPOTrainer`; `args` is an `SRPOConfig`. `role_func` takes `completion_ids` and the mask of what was
        sampled, `[B, T]`, and returns role ids `[B, T]`, in the place of `SRPOConfig.role_grammar`.

    The corrupted stream sees what the processing class makes of the raw pictures, corrupted: alike in all rollouts of
    a prompt. Where a rollout has pixels but no pictures, the pixels are corrupted, for families of
    `PixelLayout.of_model`.

    Metrics, beside TRL's: `srpo/...` of `MetricSums` over the tokens of all ranks, `srpo/weight_min` and `_max`,
    `srpo/parse_failures`, `srpo/unclosed` and `srpo/stray` (shares of the completions), `srpo/contrast_rows` (rows that
    the contrast streams scored).

    Stop and resume: the buffered rollouts are saved with each checkpoint, so that a resumed run continues where it was
    also inside of a generation batch. Corruption seeds come from pictures and prompts, strength from the step: neither
    has state. Weights are read as transformers wrote them, also where a family is saved under other names than its own.

    Raises:
        ConfigError: `args` is not an `SRPOConfig`, or a checkpoint to resume from lacks a tensor.
        IncompatibleVersionError: a TRL that this was not made for.
    """

    _tag_names: ClassVar[list[str]] = [*getattr(GRPOTrainer, "_tag_names", ()), "srpo"]
    args: SRPOConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    model: Any  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: SRPOConfig | None = None, *arguments: Any,
        role_func: RoleFunction | None = None, **named: Any,
    ) -> None:  # fmt: skip
        check_trl()
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
            args = SRPOConfig(f"{name.split('/')[-1]}-SRPO")
        if not isinstance(args, SRPOConfig):
            fix = "pass args=SRPOConfig(...)"
            refuse(ConfigError, "SRPOTrainer", "args", type(args).__name__, "an SRPOConfig", fix)
        super().__init__(model, reward_funcs, args, *arguments, **named)
        self.credit = self.args.credit_settings()
        self.role_func = role_func
        if self.args.fused_loss:
            check_model(self)
        self._shown: Shown | None = None
        self._rewards: Tensor | None = None
        self._credit_log: CreditLog | None = None
        if self.args.log_credit_steps is not None and self.is_world_process_zero():
            self._credit_log = CreditLog(self.args.log_credit_steps, cast(str, self.args.output_dir))
            self.add_callback(self._credit_log)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._rewards = rewards
        return rewards

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if torch.is_grad_enabled():
            _unshard_head(model)
        if not self.args.fused_loss:
            return super()._compute_loss(model, inputs)
        return fused_loss(self, model, inputs, _MODEL_INPUTS)

    def _generate(self, prompts: list[Any]) -> Any:
        with prompts_seen(self) as seen:
            output = super()._generate(prompts)
        check_prompts(seen, output[0])
        images, by_tools = output[-2:]
        self._shown = Shown(prompts, images, bool(self.tools) and any(by_tools))
        return output

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._shown = None
        output = super()._generate_and_score_completions(inputs)
        if self._shown is not None and self._shown.images is None:  # TRL falls back on them, too
            self._shown = self._shown._replace(images=dataset_images(inputs))
        step = self.state.global_step
        is_weighed, is_logged = bool(self.credit.streams_at(step)), self._is_logged(step)
        if not is_weighed and not is_logged:
            return output
        for name in _SCORED:
            if not isinstance(output.get(name), Tensor):
                _refuse_version(f"the output of {GRPOTrainer.__name__}: {name}", repr(output.get(name)), "a tensor")
        mask = output["completion_mask"]  # without tokens that a tool wrote: no policy sampled them
        mask = (mask if output.get("tool_mask") is None else mask * output["tool_mask"]) != 0
        advantages = output["advantages"]
        credited = self._weigh(output, mask, step) if is_weighed else None
        if is_logged:
            credited = credited or CreditedRollout(advantages, mask.float(), {}, None, None)
            self._log_credit(inputs, output, credited, advantages, mask)
        return output

    def _weigh(self, output: dict[str, Any], mask: Tensor, step: int) -> CreditedRollout:
        """Put the advantages of each token into the output, and what was measured into the metrics."""
        tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)
        self._warn_of_padding((output["prompt_ids"] == tokenizer.pad_token_id) & (output["prompt_mask"] != 0))
        if output["advantages"].shape != mask.shape[:1]:
            _refuse_version("advantages", f"shape {list(output['advantages'].shape)}", "[B]")
        credited = credit_rollout(
            output["completion_ids"], output["advantages"], tokenizer,
            lambda role_ids, credit: self._score(output, role_ids, credit),
            completion_mask=mask, settings=self.credit, step=step, gather=self._gathered,
            role_func=self.role_func,
        )  # fmt: skip
        output["advantages"] = credited.advantages
        mode = "train" if self.model.training else "eval"
        for name, value in credited.metrics.items():
            self._metrics[mode][name].append(value)
        return credited

    def _is_logged(self, step: int) -> bool:
        return self._credit_log is not None and self.model.training and self._credit_log.is_due(step)

    def _log_credit(
        self, inputs: list[dict[str, Any]], output: dict[str, Any], credited: CreditedRollout, advantages: Tensor,
        mask: Tensor,
    ) -> None:  # fmt: skip
        """Write a page of this rank, which is the first: its rows are the first of what was gathered."""
        rewards = (cast(Tensor, self._rewards) * self.reward_weights.to(mask.device)).nansum(dim=1)[: len(mask)]
        log = cast(CreditLog, self._credit_log)
        log.write(self, inputs, output, credited, advantages, mask, rewards, self._shown)

    def _warn_of_padding(self, counted: Tensor) -> None:
        """Say that a processor which pads by itself makes TRL take padding for a part of the prompt."""
        if bool(counted[:, :2].all(dim=1).any()):
            name = type(self.processing_class).__name__
            fix = "pass SRPOConfig(chat_template_kwargs={'padding': False})"
            message = f"SRPOTrainer(): {name} pads prompts, and TRL lets the policy read the padding; {fix}"
            warnings.warn(message, stacklevel=2)

    def _gathered(self, vectors: Tensor) -> Tensor:
        """Gather `[1, K]` of every rank."""
        return cast(Tensor, self.accelerator.gather(vectors))

    def _score(self, output: dict[str, Any], role_ids: Tensor, credit: CreditConfig | Method) -> ScoredStreams:
        given = {name: output[name] for name in _MODEL_INPUTS if output.get(name) is not None}
        if output.get("num_tiles") is not None:  # families that cut images into tiles: each has its own pixels
            given["num_images"] = output["num_tiles"]
        ids, shown = output["completion_ids"], self._shown
        if "corrupted" in credit.streams and "pixel_values" in given and shown is not None and shown.images is not None:
            given["corrupted_inputs"] = corrupted_inputs(self, shown, given, self.credit.corruption)
        with self.accelerator.autocast():
            return score_streams(
                self.model,
                torch.cat([output["prompt_ids"], ids], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                ids.shape[1],
                role_ids=role_ids,
                credit=credit,
                corruption=self.credit.corruption,
                temperature=self.temperature,
                batch_size=self.args.stream_batch_size or self.args.per_device_train_batch_size,
                ablation=self.args.ablation,
                cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32 and _scores_in_fp32(),
                padding_counts=True,  # the policy saw it
                **given,
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        torch.save({"step": self._step, "rollouts": self._buffered_inputs}, self._buffer_file(folder))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and os.path.isfile(self._buffer_file(checkpoint)):
            # torch loads nothing to cpu:0, as accelerate calls the device of a rank
            device = "cpu" if self.args.device.type == "cpu" else self.args.device
            buffer = torch.load(self._buffer_file(checkpoint), map_location=device, weights_only=True)
            self._step, self._buffered_inputs = buffer["step"], buffer["rollouts"]

    def _buffer_file(self, folder: str) -> str:
        rank, world = self.args.process_index, self.args.world_size
        return os.path.join(folder, f"srpo_rollouts_{rank}_of_{world}.pt")
