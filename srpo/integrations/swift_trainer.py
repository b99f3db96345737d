"""The trainer that `srpo.integrations.swift` puts in the place of ms-swift's: GRPO with advantages per token."""

import ast
import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any, NoReturn

import torch
from torch import Tensor

from srpo.config import CreditConfig
from srpo.errors import ConfigError, IncompatibleVersionError, refuse
from srpo.integrations.checkpoint import ReadsBack
from srpo.integrations.padded import cut_out
from srpo.loss import SelectedLogps, selected_logps
from srpo.methods import Method
from srpo.roles import Role
from srpo.rollout import credit_rollout
from srpo.settings import CreditSettings, check_log_probs_alone
from srpo.streams import no_evidence
from srpo.vision.access import evaluating, rope_positions, takes_positions
from srpo.vision.inputs import ModelInputs
from srpo.vision.pictures import corrupt_images
from srpo.vision.scoring import StreamLogps

__all__ = ["TESTED", "SRPOTrainer", "check_swift", "register", "settings_of"]

TESTED = ("4.6.0",)
_VARIABLE = "SRPO"
_NAME = "srpo.integrations.swift"
_NO_TEACHER = "none: its term is added to the advantages, and would be weighed with them"
_OF_THE_CALL = ("use_cache", "logits_to_keep", "labels")  # ms-swift leaves them among the inputs

try:
    from swift.rlhf_trainers import GRPOTrainer, utils  # pyright: ignore[reportMissingImports]
    from swift.template.vision_utils import load_image  # pyright: ignore[reportMissingImports]
    from swift.trainers import disable_gradient_checkpointing  # pyright: ignore[reportMissingImports]
    from swift.trainers.trainer_factory import TrainerFactory  # pyright: ignore[reportMissingImports]
except ImportError as error:
    expected = f"ms-swift, of the tested versions {', '.join(TESTED)}"
    fix = f"pip install 'ms-swift=={TESTED[-1]}'"
    raise IncompatibleVersionError(f"{_NAME}: swift got {error}, expected {expected}; {fix}.") from error

# What the trainer calls or overrides, with the parameters that it relies on.
_METHODS = {
    "_postprocess_batch": ["self", "samples", "batch_encoded_inputs"],
    "split_by_mini_batches": ["self", "samples"],
    "_template_context": ["self", "template"],
}
_FUNCTIONS = {"encode_sample": ["sample", "template"], "collate_to_grpo_micro_batch": ["samples", "template", "device"]}


def register() -> None:
    """Put `SRPOTrainer` in the place of ms-swift's GRPO trainer.

    Raises: IncompatibleVersionError.
    """
    check_swift()
    TrainerFactory.TRAINER_MAPPING["grpo"] = f"{__name__}.SRPOTrainer"


def check_swift(trainer: type = GRPOTrainer) -> None:
    """Compare a trainer class, and the functions beside it, with what `SRPOTrainer` builds on.

    Raises: IncompatibleVersionError, which names the tested versions.
    """
    places = [(trainer, name, wanted) for name, wanted in _METHODS.items()]
    for place, name, wanted in [*places, *((utils, name, wanted) for name, wanted in _FUNCTIONS.items())]:
        function = getattr(place, name, None)
        found = [] if function is None else list(inspect.signature(inspect.unwrap(function)).parameters)
        if found[: len(wanted)] != wanted:
            _refuse_version(f"{place.__name__}.{name}", f"parameters {found}", f"{wanted}")


def settings_of(text: str | None) -> CreditSettings:
    """Read the settings from JSON, or from what ms-swift's `--model_kwargs` makes of a mapping in the environment.

    Raises: ConfigError.
    """
    try:
        section = None if not text else json.loads(text)
    except ValueError:
        try:
            section = ast.literal_eval(text or "")
        except (ValueError, SyntaxError) as error:
            fix = """pass --model_kwargs '{"srpo": {"credit": "srpo"}}'"""
            raise ConfigError(f"SRPOTrainer(): {_VARIABLE} got {text!r}, expected JSON; {fix}.") from error
    if section is not None and not isinstance(section, Mapping):
        refuse(ConfigError, "SRPOTrainer", _VARIABLE, repr(text), "a mapping", 'pass \'{"credit": "srpo"}\'')
    return CreditSettings.of(section)


class SRPOTrainer(ReadsBack, GRPOTrainer):
    """Train with ms-swift's GRPO and token credit.

    Every context is scored by a forward of the policy, dropout off, log-probs in fp32: as it is; encoded again by
    ms-swift's template with its pictures corrupted, alike in all rollouts of a prompt; with the perception tokens cut
    out, the others at their positions. The weights are multiplied into the advantages per token that ms-swift's losses
    take. Nothing else is touched, and there is no state. Checkpoints are ms-swift's; a run that resumes reads weights
    as transformers wrote them, also where a family is saved under other names than its own.

    Metrics, beside ms-swift's: those of `srpo.rollout.credit_rollout`, over the tokens of all ranks.

    Raises:
        ConfigError: a setting under which token weights do nothing, or batches that are not scored here.
        IncompatibleVersionError: an ms-swift that this was not made for.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        check_swift()
        self.credit = settings_of(os.environ.get(_VARIABLE))
        super().__init__(*arguments, **named)
        if self.credit.credit.streams:
            check_log_probs_alone(self.credit, "SRPOTrainer")
            if self.credit.ablated_positions != "keep":
                got, expected = repr(self.credit.ablated_positions), "'keep': rows are padded, and gaps do no harm"
                refuse(ConfigError, "SRPOTrainer", "ablated_positions", got, expected, "leave it out")
            _check_trainer(self)

    def _postprocess_batch(self, samples: list[Any], batch_encoded_inputs: list[dict[str, Any]]) -> None:
        super()._postprocess_batch(samples, batch_encoded_inputs)
        if not self.credit.streams_at(self.state.global_step):
            return
        if self.dynamic_num_samples:
            expected, fix = "one sample a request", "let the scheduler return one trajectory a request"
            refuse(ConfigError, "SRPOTrainer", "multi_turn_scheduler", "several samples a request", expected, fix)
        mode = "train" if self.model.training else "eval"
        chunks = self.split_by_mini_batches(samples)
        for chunk, encoded in zip(chunks, batch_encoded_inputs, strict=True):
            for name, value in self._weigh(chunk, encoded["model_inputs"], encoded["grpo_batch"]).items():
                self._metrics[mode][name].append(value)

    def _weigh(self, samples: list[Any], inputs: dict[str, Any], batch: Any) -> dict[str, float]:
        """Multiply the weights into the advantages of a micro-batch; return its metrics."""
        if batch.teacher_per_token_logps is not None:
            refuse(ConfigError, "SRPOTrainer", "dataset", "a teacher_prompt", _NO_TEACHER, "drop the column")
        mask = batch.completion_mask
        columns = self._columns(inputs)
        credited = credit_rollout(
            columns.input_ids[:, -mask.shape[1] :], batch.advantages, self.template.tokenizer,
            lambda role_ids, credit: self._score(samples, columns, mask != 0, role_ids.to(mask.device), credit),
            completion_mask=mask, settings=self.credit, step=self.state.global_step, gather=self.accelerator.gather,
        )  # fmt: skip
        batch.advantages = credited.advantages
        return credited.metrics

    def _columns(self, inputs: Mapping[str, Any]) -> ModelInputs:
        """Sort the inputs of the model; those without positions get them, so that a cut moves none."""
        rest = {name: x for name, x in inputs.items() if name not in _OF_THE_CALL}
        ids, positions = rest.pop("input_ids"), rest.pop("position_ids", None)
        mask = rest.pop("attention_mask", None)
        mask = torch.ones_like(ids) if mask is None else mask
        if positions is None:
            positions = rope_positions(self.model, ids, mask, rest)
        if positions is None and takes_positions(self.model):
            positions = ((mask != 0).long().cumsum(dim=1) - 1).clamp(min=0)
        return ModelInputs(ids, mask, positions, rest, None, None)

    @torch.no_grad()
    def _score(
        self, samples: list[Any], columns: ModelInputs, mask: Tensor, role_ids: Tensor, credit: CreditConfig | Method
    ) -> StreamLogps:
        """Score the streams that the credit reads. Every rank runs as many forwards, whatever its rows."""
        T = mask.shape[1]
        settings = self.args.gradient_checkpointing_kwargs
        with disable_gradient_checkpointing(self.model, settings), evaluating(self.model):
            clean = self._next_tokens(columns, T)
            nothing = no_evidence(clean.logps).expand(mask.shape)
            corrupted = ablated = None
            if "corrupted" in credit.streams:
                scored = self._next_tokens(self._corrupted(samples, columns), T).logps
                seen = torch.tensor([bool(sample.images) for sample in samples], device=mask.device)[:, None]
                corrupted = torch.where(seen & mask, scored, nothing)
            if "ablated" in credit.streams:
                perception = (role_ids == Role.PERCEPTION) & mask
                cut = cut_out(columns, perception, mask)
                ablated = cut.restored(self._next_tokens(cut.columns, cut.tokens).logps)
        return StreamLogps(clean.logps, corrupted, ablated, clean.entropy)

    def _next_tokens(self, columns: ModelInputs, T: int) -> SelectedLogps:
        """Return log-probs and entropies `[B, T]` of the last T tokens, scored by the columns before them."""
        inputs = columns.kwargs()
        if "use_cache" in self.model_kwarg_keys:
            inputs["use_cache"] = False
        if "logits_to_keep" in self.model_kwarg_keys:
            inputs["logits_to_keep"] = T + 1
        logits, ids = self.model(**inputs).logits[:, -T - 1 : -1], columns.input_ids[:, -T:]
        return selected_logps(logits, ids, temperature=self.temperature, return_entropy=True)

    def _corrupted(self, samples: list[Any], clean: ModelInputs) -> ModelInputs:
        """Encode the samples again, with corrupted pictures in them."""
        if any(sample.videos or sample.audios for sample in samples):
            expected, fix = "pictures alone", "use a data set of pictures"
            refuse(ConfigError, "SRPOTrainer", "dataset", "videos or audio", expected, fix)
        pictures = [[load_image(_address(x)) for x in sample.images] or None for sample in samples]
        prompts = [json.dumps(sample.messages[:-1], default=str) for sample in samples]
        dark = corrupt_images(pictures, self.credit.corruption, seed=prompts, processor=self.template.processor)
        with self._template_context(self.template):
            copies = [replace(sample, images=own or []) for sample, own in zip(samples, dark, strict=True)]
            for copy in copies:
                copy.encoded = utils.encode_sample(copy, self.template)
                copy.encoded.pop("_extra_kwargs", None)
            made, _ = utils.collate_to_grpo_micro_batch(
                copies, self.template, device=self.accelerator.device, use_logits_to_keep=True
            )
        again = self._columns(made)
        if not torch.equal(again.input_ids, clean.input_ids):
            expected, fix = "the tokens of the clean one", "corrupt pictures without changing their sizes"
            refuse(ConfigError, "SRPOTrainer", "corruption", "other tokens", expected, fix)
        return again


def _address(image: Any) -> Any:
    """Return what ms-swift loads a picture from, of an entry of a sample."""
    return (image.get("bytes") or image.get("path")) if isinstance(image, Mapping) else image


def _check_trainer(trainer: Any) -> None:
    """Refuse settings in which token weights cancel, or batches are laid out in a way that is not scored here.

    Raises: ConfigError.
    """
    args, template = trainer.args, trainer.template
    sequence = args.importance_sampling_level == "sequence" and args.loss_type != "cispo"
    cancel = "{}, because token weights of mean 1 cancel in a mean over the sequence"
    found = {
        "importance_sampling_level": (sequence, cancel.format("'token' or 'sequence_token'"), "use 'token'"),
        "loss_type": (args.loss_type == "real", cancel.format("another loss"), "use 'grpo'"),
        "use_liger_kernel": (trainer.use_liger_loss, cancel.format("False"), "use --use_liger_kernel false"),
        "padding_free": (template.padding_free, "False: rows are scored padded", "use --padding_free false"),
        "sequence_parallel_size": (template.sequence_parallel_size > 1, "1", "use --sequence_parallel_size 1"),
        "teacher_model": (trainer._has_teacher_explicit(), _NO_TEACHER, "leave the teacher out"),
    }
    for name, (is_wrong, expected, fix) in found.items():
        if is_wrong:
            got = repr(getattr(args, name, getattr(template, name, True)))
            refuse(ConfigError, "SRPOTrainer", name, got, expected, fix)


def _refuse_version(argument: str, got: str, expected: str) -> NoReturn:
    fix = f"pip install 'ms-swift=={TESTED[-1]}'; tested with {', '.join(TESTED)}"
    found = version("ms-swift")
    raise IncompatibleVersionError(f"{_NAME}: {argument} of ms-swift {found} got {got}, expected {expected}; {fix}.")
