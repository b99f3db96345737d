"""SRPO in OpenRLHF 0.11: a subclass of its experience maker.

A recipe: **not run with OpenRLHF**, which needs CUDA; tested against stand-ins of `Experience` and of the workers.

    from openrlhf.trainer import ppo_trainer
    from srpo.integrations.openrlhf import credited

    ppo_trainer.RemoteExperienceMaker = credited(
        ppo_trainer.RemoteExperienceMaker,
        CreditSettings.of({"credit": "srpo"}),
        tokenizer,
        PixelLayout.of_processor(processor),
    )

Write these lines into a script of your own that then calls what `openrlhf.cli.train_ppo_ray` does. Weights go into
`Experience.advantages`, `[B, A]`, after OpenRLHF's own estimator, so losses of whole sequences average them away.
"""

from typing import Any

from srpo.integrations.padded import PaddedBatch, credit_batches
from srpo.settings import CreditSettings
from srpo.vision.corruption import PixelLayout


def credited(maker: type, settings: CreditSettings, tokenizer: Any, layout: PixelLayout | None) -> type:
    """Make a subclass of `RemoteExperienceMaker` that weighs the advantages of each experience.

    Args:
        maker: `RemoteExperienceMaker`, or a subclass.
        settings: of the credit stage; `credit_anneal_steps` counts rollouts here.
        tokenizer: of the policy.
        layout: of its pictures; None: it sees none.
    """

    class CreditedExperienceMaker(maker):
        credit_step = 0

        def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
            experiences = super().compute_advantages_and_returns(experiences)
            batches = [PaddedBatch(x.sequences, x.attention_mask, x.action_mask, _pictures(x)) for x in experiences]
            weighed = credit_batches(
                batches, [x.advantages for x in experiences], [x.action_log_probs for x in experiences], tokenizer,
                self._score_batches, layout, settings, self.credit_step,
            )  # fmt: skip
            self.credit_step += 1
            for experience, result in zip(experiences, weighed, strict=True):
                experience.advantages = result.advantages
                B = len(experience.sequences)
                experience.info |= {name: [value] * B for name, value in result.metrics.items()}
            return experiences

        def _score_batches(self, batches: list[PaddedBatch]) -> list[Any]:
            """Let the actors score batches, as `make_experience` does."""
            args = self.strategy.args
            columns: dict[str, list[Any]] = {
                "sequences": [x.input_ids for x in batches],
                "action_mask": [x.completion_mask.bool() for x in batches],
                "attention_mask": [x.attention_mask for x in batches],
            }
            if any(row for x in batches for row in x.pictures):
                columns["mm_train_inputs_list"] = [list(x.pictures) for x in batches]
            waits = args.train.colocate_all or args.train.colocate_actor_ref
            refs = self._dispatch_forward(self.actor_model_group, waits, **columns)
            return self._flatten_results(refs, args.ds.ring_attn_size * args.ds.tensor_parallel_size)

    return CreditedExperienceMaker


def _pictures(experience: Any) -> list[dict[str, Any]]:
    given = list(experience.mm_train_inputs or ())
    return [x or {} for x in given] if given else [{}] * len(experience.sequences)
