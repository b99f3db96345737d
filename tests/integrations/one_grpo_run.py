"""Train three steps, on as many ranks as torchrun started, and save what came out: `FILE FAMILY TRUNCATED [PART]`.

PART is a run that saves: `whole`, `killed` after two steps, or `resumed` from where that was.
"""

import faulthandler
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from processes import HANG
from tiny_grpo import Rollouts, column, make_trainer

from srpo.integrations.trl import SRPOTrainer


class Counting(SRPOTrainer):
    """Remember how many tokens of this rank were valid."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.valid = self.accelerator.gather(output["completion_mask"].sum()[None])
        return output


def main() -> None:
    """Run and save from the first rank."""
    file, family, truncated = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    warnings.simplefilter("ignore")
    faulthandler.dump_traceback_later(HANG, exit=True)  # a rank that waits for ever says where
    torch.set_num_threads(1)
    part = sys.argv[4] if len(sys.argv) > 4 else None
    world = int(os.environ.get("WORLD_SIZE", "1"))
    settings: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "shuffle_dataset": False}
    if part:
        settings = {"save_strategy": "steps", "save_steps": 2, "stop": 2 if part == "killed" else None}
    if world > 1:
        settings["ddp_backend"] = "gloo"
    trainer = make_trainer(
        Counting, file.parent / f"run{world}", family, rollouts=Rollouts(truncated=truncated), max_steps=3,
        per_device_train_batch_size=8 // world, mask_truncated_completions=bool(truncated), log_credit_steps=2,
        **settings,
    )  # fmt: skip
    before = [x.detach().clone() for x in trainer.model.parameters()]
    trainer.train(resume_from_checkpoint=part == "resumed")
    if trainer.accelerator.is_main_process:
        after = [x.detach().clone() for x in trainer.model.parameters()]
        names = ("loss", "grad_norm", "srpo/baseline", "srpo/weight_max", "srpo/weight_min", "srpo/contrast_rows")
        log = {name: column(trainer, name) for name in names}
        torch.save({"before": before, "after": after, "log": log, "valid": trainer.valid.tolist()}, file)
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
