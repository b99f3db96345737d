"""SRPO in SkyRL 0.3: a subclass of its trainer.

A recipe: **not run with SkyRL**, which needs flash attention; tested against stand-ins of `TrainingInputBatch` and of
the forward pass.

    from skyrl.train.entrypoints.main_base import BasePPOExp
    from skyrl.train.trainer import RayPPOTrainer
    from srpo.integrations.skyrl import credited

    class Experiment(BasePPOExp):
        def get_trainer(self, cfg, tracker, tokenizer, *more):
            settings = CreditSettings.of({"credit": "srpo"})
            trainer = credited(RayPPOTrainer, settings, PixelLayout.of_processor(processor))
            return trainer(cfg=cfg, tracker=tracker, tokenizer=tokenizer, ...)

Weights go into `["advantages"]`, `[B, T]`, after SkyRL's own estimator. Step-wise trajectories are refused.
"""

from typing import Any

from torch import Tensor

from srpo.errors import ConfigError, refuse
from srpo.integrations.padded import PaddedBatch, credit_batches
from srpo.settings import CreditSettings
from srpo.vision.corruption import PixelLayout

_VISION = ("pixel_values", "image_grid_thw")


def credited(trainer: type, settings: CreditSettings, layout: PixelLayout | None) -> type:
    """Make a subclass of `RayPPOTrainer` that weighs the advantages of each batch.

    Args:
        trainer: `RayPPOTrainer`, or a subclass.
        settings: of the credit stage.
        layout: of the pictures of the policy; None: it sees none.
    """

    class CreditedTrainer(trainer):
        def compute_advantages_and_returns(self, data: Any) -> Any:
            data = super().compute_advantages_and_returns(data)
            if self.cfg.generator.step_wise_trajectories:
                expected, fix = "False: a step has no perception of its own", "set step_wise_trajectories=False"
                refuse(ConfigError, "CreditedTrainer", "step_wise_trajectories", "True", expected, fix)
            if data.get("action_log_probs") is None:
                expected, fix = "log-probs of the policy", "choose a loss for which SkyRL scores them"
                refuse(ConfigError, "CreditedTrainer", "action_log_probs", "None", expected, fix)
            batch = PaddedBatch(data["sequences"], data["attention_mask"], data["loss_mask"], _rows(data))
            (weighed,) = credit_batches(
                [batch], [data["advantages"]], [data["action_log_probs"]], self.tokenizer,
                lambda batches: [self._score_batch(data, x) for x in batches], layout, settings, self.global_step,
            )  # fmt: skip
            data["advantages"] = weighed.advantages
            self.all_metrics.update(weighed.metrics)
            return data

        def _score_batch(self, data: Any, batch: PaddedBatch) -> Tensor:
            """Let the policy score a batch, as `fwd_logprobs_values_reward` does."""
            given = [name for name in _VISION if data.get(name) is not None]
            changed = data.select(keys=["sequences", "attention_mask", *given], metadata_keys=["response_length"])
            changed["sequences"], changed["attention_mask"] = batch.input_ids, batch.attention_mask
            for name in given:
                changed[name] = type(data[name])([row[name] for row in batch.pictures])
            changed.metadata = {**changed.metadata, "response_length": batch.completion_mask.shape[1]}
            scored = self._execute_forward_pass("policy", changed, key="logprobs", mini_batch_boundaries=None)
            return scored[: len(batch.input_ids)]

    return CreditedTrainer


def _rows(data: Any) -> list[dict[str, Any]]:
    """Return the pictures of each row; SkyRL has them in lists of tensors, one a row."""
    given = {name: data[name] for name in _VISION if data.get(name) is not None}
    return [{name: x[i] for name, x in given.items()} for i in range(len(data["sequences"]))]
