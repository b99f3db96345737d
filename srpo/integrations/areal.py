"""SRPO in AReaL 1.0: a subclass of its PPO actor.

A recipe: **not run with AReaL**, which needs CUDA; tested against a stand-in of the actor, on the dicts that it takes.

    from areal.trainer.ppo import actor
    from srpo.integrations.areal import credited

    actor.PPOActor = credited(
        actor.PPOActor, CreditSettings.of({"credit": "srpo"}), tokenizer, PixelLayout.of_processor(processor)
    )

Write these lines before AReaL makes its actors. Weights go into `["advantages"]`, `[B, S]`, after AReaL's own. Set
`recompute_logprob`, so that `prox_logp` is the policy's; GSPO (`importance_sampling_level="sequence"`) averages token
weights away and is refused.
"""

from typing import Any

import torch
from torch import Tensor

from srpo.errors import ConfigError, refuse
from srpo.integrations.padded import PaddedBatch, credit_batches
from srpo.settings import CreditSettings
from srpo.vision.corruption import PixelLayout

_PICTURES = "multi_modal_input"


def credited(actor: type, settings: CreditSettings, tokenizer: Any, layout: PixelLayout | None) -> type:
    """Make a subclass of `PPOActor` that weighs the advantages of each batch.

    Args:
        actor: `PPOActor`, or a subclass.
        settings: of the credit stage; `credit_anneal_steps` counts batches here.
        tokenizer: of the policy.
        layout: of its pictures; None: it sees none.
    """

    class CreditedActor(actor):
        credit_step = 0

        def _compute_advantages(self, data: dict[str, Any]) -> dict[str, Any]:
            if getattr(self.config, "importance_sampling_level", "token") == "sequence":
                expected, fix = "'token': a mean over the sequence averages weights away", "use 'token'"
                refuse(ConfigError, "CreditedActor", "importance_sampling_level", "'sequence'", expected, fix)
            mask = data["loss_mask"][:, 1:]  # AReaL shifts it to where a token is predicted, in place of this one
            data = super()._compute_advantages(data)
            if data.get("prox_logp") is None:
                expected, fix = "log-probs of the policy", "set recompute_logprob=True"
                refuse(ConfigError, "CreditedActor", "prox_logp", "None", expected, fix)
            rows = list(data.get(_PICTURES) or [{}] * len(mask))
            batch = PaddedBatch(data["input_ids"], data["attention_mask"], mask, rows)
            (weighed,) = credit_batches(
                [batch], [data["advantages"][:, :-1]], [data["prox_logp"][:, :-1]], tokenizer,
                lambda batches: [self._score_batch(data, x) for x in batches], layout, settings, self.credit_step,
            )  # fmt: skip
            self.credit_step += 1
            data["advantages"] = torch.cat([weighed.advantages, data["advantages"][:, -1:]], dim=1)
            return data

        def _score_batch(self, data: dict[str, Any], batch: PaddedBatch) -> Tensor:
            """Let the policy score a batch; its engines pack rows whose padding is on the right."""
            order = (batch.attention_mask == 0).long().argsort(dim=1, stable=True)
            back = order.argsort(dim=1)
            ids, valid = batch.input_ids.gather(1, order), batch.attention_mask.gather(1, order)
            given = {"input_ids": ids, "attention_mask": valid, "loss_mask": valid}
            given |= {_PICTURES: list(batch.pictures)} if _PICTURES in data else {}
            after = self._compute_logp(given)  # of the token behind each column
            of_token = torch.nn.functional.pad(after[:, :-1], (1, 0)).gather(1, back)
            return of_token[:, -batch.completion_mask.shape[1] :]

    return CreditedActor
