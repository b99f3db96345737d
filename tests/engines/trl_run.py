"""A run of TRL as a user would start it, on a policy of `policy.py`: one step a line, `step {...}`.

    torchrun --nproc_per_node 2 tests/engines/trl_run.py FAMILY POLICY --output_dir DIR [settings of SRPOConfig]
    accelerate launch --config_file fsdp2.yaml tests/engines/trl_run.py FAMILY POLICY --output_dir DIR ...

`--kill_at N` ends rank 1 as `kill -9` would, when step N begins. Two patches are test tools for machines without an
accelerator, and none of srpo's: accelerate shards nothing there, and torch.load does not know a device `cpu:0`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import torch
from accelerate import state
from accelerate.utils import DistributedType
from datasets import Dataset
from engines import policy
from transformers import TrainerCallback
from trl import TrlParser

from srpo.integrations.trl import SRPOConfig, SRPOTrainer

ROWS = 32
PRINTED = ("loss", "grad_norm", "reward", "srpo/baseline", "srpo/perception/weight_mean", "srpo/parse_failures")


def shard_without_accelerator() -> None:
    """Let accelerate's FSDP plugin count where it finds several processes on CPUs."""
    begin, plugins = state.AcceleratorState.__init__, []

    def initialise(self: Any, *args: Any, fsdp_plugin: Any = None, **named: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **named)
        plugins.extend([fsdp_plugin] * (fsdp_plugin is not None))
        if plugins and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[0]

    state.AcceleratorState.__init__ = initialise


def load_without_accelerator() -> None:
    """Let torch.load read to the device that transformers names."""
    load = torch.load

    def loads(file: Any, map_location: Any = None, **named: Any) -> Any:
        return load(file, map_location="cpu" if str(map_location) == "cpu:0" else map_location, **named)

    torch.load = loads


class Steps(TrainerCallback):
    """Print what is logged, to the last digit, and end rank 1 where it is asked for."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at = kill_at

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.kill_at and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs and state.is_world_process_zero:
            print("step", json.dumps({name: logs.get(name) for name in PRINTED}), flush=True)


def is_right(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    texts = [x[0]["content"] if isinstance(x, list) else x for x in completions]
    return [
        float((re.findall(r"<answer>(.*?)</answer>", text) or [""])[-1] == right)
        for text, right in zip(texts, answer, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family")
    parser.add_argument("policy")
    parser.add_argument("--kill_at", type=int)
    own, sys.argv[1:] = parser.parse_known_args()
    load_without_accelerator()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_without_accelerator()
    _, processor = policy.build(own.family)  # before the settings: under ZeRO-3's they would shard the model
    (args,) = TrlParser((SRPOConfig,)).parse_args_and_config()
    ask = [{"role": "user", "content": policy.QUESTION}]
    drawn = [policy.picture(index) for index in range(ROWS)]
    rows = [{"prompt": ask, "image": image, "answer": str(count + 1)} for image, count in drawn]
    trainer = SRPOTrainer(
        own.policy,
        is_right,
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        callbacks=[Steps(own.kill_at)],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)


if __name__ == "__main__":
    main()
