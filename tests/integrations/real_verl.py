"""Run by `test_verl.py` in a process with verl: `run` both stages of the trainer on a tiny model, or be `refuse`d.

The trainer, the config, the transfer queue and the padding of model inputs and outputs are verl's own; in the place of
the worker group stands the tiny model, in this process.
"""

import os
import sys
import types
from typing import Any

os.environ["HYDRA_FULL_ERROR"] = "1"

import tiny_verl
import tiny_vlms
import torch
import verl
from hydra import compose, initialize_config_module
from verl.trainer.ppo.v1 import PPOTrainerSync, get_trainer_cls
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead as Engine

from srpo import PRESETS, role_contrast, score_streams, token_weights

OVERRIDES = [
    "trainer.v1.trainer_mode=srpo_sync",
    "algorithm.adv_estimator=grpo",
    "+algorithm.srpo.credit=srpo",
    "+algorithm.srpo.role_grammar.perception_tags=[look]",
    "+algorithm.srpo.corruption={name: PatchMask, probability: 0.6}",
    "actor_rollout_ref.model.path=none",
    "actor_rollout_ref.rollout.calculate_log_probs=false",
    "actor_rollout_ref.rollout.n=2",
    f"actor_rollout_ref.rollout.temperature={tiny_verl.TEMPERATURE}",
]


class Workers:
    """The worker group of the actor: verl's FSDP engine around the model, without its workers."""

    def __init__(self, model: Any, queue: Any) -> None:
        self.model, self.queue = model, queue

    def compute_log_prob(self, meta: Any) -> Any:
        from tensordict import TensorDict
        from verl.utils import tensordict_utils

        data = self.queue.kv_batch_get(keys=meta.keys, partition_id=meta.partition_id, select_fields=meta.fields)
        settings = {**meta.extra_info, "use_remove_padding": False, "use_fused_kernels": False}
        tensordict_utils.assign_non_tensor(data, **settings)
        engine: Any = types.SimpleNamespace(
            use_ulysses_sp=False, pad_to_length=False, engine_config=types.SimpleNamespace(entropy_checkpointing=False)
        )
        inputs, arguments = Engine.prepare_model_inputs(engine, data)
        with torch.no_grad():
            output = self.model(**inputs)
        columns = Engine.prepare_model_outputs(engine, output, arguments, data, None)
        fields = TensorDict(columns, batch_size=len(meta.keys))
        self.queue.kv_batch_put(keys=meta.keys, partition_id=meta.partition_id, fields=fields)
        return meta


def compare(trainer: Any, queue: Any, model: Any, processor: Any) -> None:
    """Run both stages, and compare with `score_streams` and with the credit stage on its results."""
    from verl.utils import tensordict_utils

    rows = tiny_verl.trajectories(model, processor)
    keys = [f"{row['uid']}_{i % 2}_0" for i, row in enumerate(rows)]
    tags = [{"status": "success"} for _ in keys]
    columns = [{name: x for name, x in row.items() if name != "pictures"} for row in rows]
    fields = tensordict_utils.list_of_dict_to_tensordict(columns)
    queue.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=tags)
    metrics: dict[str, float] = {}
    batch = queue.KVBatchMeta(partition_id="train", keys=keys, tags=tags)
    batch = trainer._compute_old_log_prob(batch, metrics)
    batch = trainer._compute_advantage(batch, metrics)
    names = ["old_log_probs", "corrupted_log_probs", "ablated_log_probs", "role_ids", "advantages", "response_mask"]
    data = queue.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=names)
    old, corrupted, ablated, roles, advantages, mask = (data[name].to_padded_tensor(0) for name in names)
    streams = score_streams(
        model, **tiny_verl.score_streams_arguments(rows, processor.tokenizer), logits_to_keep=roles.shape[1],
        role_ids=roles, temperature=tiny_verl.TEMPERATURE, ablation="delete",
    )  # fmt: skip
    for found, expected, where in (
        (old, streams.logps, mask == 1),
        (corrupted, streams.corrupted_logps, roles == 1),
        (ablated, streams.ablated_logps, roles == 2),
    ):
        torch.testing.assert_close(found[where], expected[where], rtol=0, atol=1e-5)
    contrast = role_contrast(
        old, corrupted_logps=corrupted, ablated_logps=ablated, role_ids=roles, completion_mask=mask
    )
    weights = token_weights(contrast, roles, mask, credit=PRESETS["srpo"])
    grpo = torch.tensor([-1.0, 1.0, -1.0, 1.0])[:, None] * 0.5**0.5  # two rollouts of each prompt, rewards 0 and 1
    torch.testing.assert_close(advantages, grpo * weights, rtol=0, atol=1e-5)
    assert metrics["srpo/weight_max"] > 1.01
    assert queue.kv_list()["srpo"] == {}
    print(f"verl {verl.__version__}: both stages agree", sorted(name for name in metrics if name.startswith("srpo/")))


def compare_positions(queue: Any) -> None:
    """Rows of one length through the transfer queue and the function that verl's workers call on them."""
    from verl.utils import tensordict_utils
    from verl.workers.engine.base import maybe_fix_3d_position_ids

    rows = [torch.randint(99, (4, 7)) for _ in range(3)]
    keys, tags = [f"equal_{i}" for i in range(3)], [{"status": "success"}] * 3
    fields = tensordict_utils.list_of_dict_to_tensordict([{"position_ids": row} for row in rows])
    queue.kv_batch_put(keys=keys, partition_id="equal", fields=fields, tags=tags)
    data = queue.kv_batch_get(keys=keys, partition_id="equal", select_fields=["position_ids"])
    maybe_fix_3d_position_ids(data)
    assert all(torch.equal(a, b) for a, b in zip(data["position_ids"].unbind(), rows, strict=True))
    queue.kv_clear(keys=keys, partition_id="equal")


def run(config: Any) -> None:
    import ray
    import transfer_queue

    trainer: Any = get_trainer_cls("srpo_sync")(config)
    assert isinstance(trainer, PPOTrainerSync)
    assert trainer.trainer_mode == "sync"
    assert type(trainer.replay_buffer) is ReplayBuffer  # an unknown mode would get the asynchronous one
    ray.init(num_cpus=32, num_gpus=0, include_dashboard=False, object_store_memory=200 * 2**20, logging_level="ERROR")
    transfer_queue.init()
    model, processor = tiny_vlms.build(tiny_verl.FAMILY)
    PPOTrainerSync._init_tokenizer = lambda self: None  # would load one from a path
    trainer.tokenizer, trainer.processor = processor.tokenizer, processor
    trainer._init_tokenizer()
    trainer.global_steps, trainer.actor_rollout_wg = 1, Workers(model, transfer_queue)
    try:
        compare(trainer, transfer_queue, model, processor)
        compare_positions(transfer_queue)
        print("positions of rows of one length are right")
    finally:
        transfer_queue.close()
        ray.shutdown()


def refuse(config: Any) -> None:
    from verl.trainer.ppo import core_algos

    for make in (lambda: get_trainer_cls("srpo_sync")(config), core_algos.get_adv_estimator_fn("srpo")):
        try:
            make()
        except ImportError as error:
            print("refused:", type(error).__name__, error)


with initialize_config_module("verl.trainer.config", version_base=None):
    composed = compose("ppo_trainer", overrides=OVERRIDES)
{"run": run, "refuse": refuse}[sys.argv[1]](composed)
