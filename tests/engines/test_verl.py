"""verl itself on CPUs: ray, two FSDP2 workers over gloo, vLLM, weight sync, checkpoints; every step compared offline.

verl must not see TRL 1.0 or later, so it has an environment of its own.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import HANG

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
REWARD = """
import re

def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    found = re.findall(r"<answer>(.*?)</answer>", solution_str)
    return float(bool(found) and found[-1].strip() == ground_truth)
"""
SRPO = (
    "trainer.v1.trainer_mode=srpo_sync", "+algorithm.srpo.credit=srpo",
    "+algorithm.srpo.role_grammar.perception_tags=[perception]",
    "+algorithm.srpo.corruption={name: PatchMask, probability: 0.6}",
)  # fmt: skip


def options(policy: Path, out: Path, reward: Path) -> list[str]:
    """Return verl's overrides: a real run but for its size, and for what needs a GPU."""
    data, rollout = f"{policy}/train.parquet", ROLLOUT
    precision = "{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"
    return [
        "algorithm.adv_estimator=grpo", "trainer.device=cpu", "trainer.n_gpus_per_node=2", "trainer.nnodes=1",
        "ray_kwargs.ray_init.num_cpus=32", "+ray_kwargs.ray_init.num_gpus=2",
        "+ray_kwargs.ray_init.include_dashboard=false", "+ray_kwargs.ray_init.object_store_memory=500000000",
        f"data.train_files={data}", f"data.val_files={data}", "data.train_batch_size=4", "data.max_prompt_length=64",
        "data.max_response_length=64", "data.dataloader_num_workers=0", "data.image_key=images", "data.shuffle=false",
        f"actor_rollout_ref.model.path={policy}", "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "actor_rollout_ref.model.use_remove_padding=false",
        "actor_rollout_ref.model.enable_gradient_checkpointing=false",
        f"{ACTOR}.strategy=fsdp2", f"{ACTOR}.ppo_mini_batch_size=4", f"{ACTOR}.ppo_micro_batch_size_per_gpu=2",
        f"{ACTOR}.optim.lr=1e-4", f"{ACTOR}.use_torch_compile=false", f"{ACTOR}.fsdp_config.use_torch_compile=false",
        f"+{ACTOR}.fsdp_config.mixed_precision={precision}",
        f"{ACTOR}.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
        f"{rollout}.name=vllm", f"{rollout}.n=4", f"{rollout}.load_format=auto", f"{rollout}.temperature=1.0",
        f"{rollout}.dtype=float32", f"{rollout}.tensor_model_parallel_size=1", f"{rollout}.enforce_eager=true",
        f"{rollout}.free_cache_engine=false", f"+{rollout}.enable_sleep_mode=false",
        f"{rollout}.gpu_memory_utilization=0.05", f"{rollout}.max_model_len=160", f"{rollout}.max_num_seqs=16",
        f"{rollout}.log_prob_micro_batch_size_per_gpu=2", f"{rollout}.agent.num_workers=1",
        f"{rollout}.checkpoint_engine.update_weights_bucket_megabytes=64", f"+{rollout}.limit_images=1",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1", "reward.num_workers=1",
        f"reward.custom_reward_function.path={reward}", "trainer.logger=[console]", "trainer.val_before_train=false",
        "trainer.test_freq=-1", "trainer.save_freq=1", f"trainer.default_local_dir={out}/ckpt",
        f"hydra.run.dir={out}/hydra",
    ]  # fmt: skip


def variables(**more: str) -> dict[str, str]:
    """Return the environment of a run."""
    kept = {name: x for name, x in os.environ.items() if name not in ("TRITON_INTERPRET", "VIRTUAL_ENV")}
    return kept | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "engines.verl_platform", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "RAY_DEDUP_LOGS": "0", "HYDRA_FULL_ERROR": "1",
        "RAY_USAGE_STATS_ENABLED": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "RAY_worker_niceness": "0", "VLLM_WORKER_MULTIPROC_METHOD": "spawn", "GLOO_SOCKET_IFNAME": "lo",
    } | more  # fmt: skip


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """Make an environment with verl and vLLM, and return its Python."""
    folder = tmp_path_factory.mktemp("verl") / "environment"
    made = folder / "bin/python"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    how = ("-m", "pip", "install", "-q", "--no-deps", "--no-compile")
    for what in (("-r", str(HERE / "verl_packages.txt")), ("-e", str(ROOT))):
        done = subprocess.run([made, *how, *what], capture_output=True, text=True, check=False)
        if done.returncode:
            said = re.sub(r"[a-z]+://[^ ]+", "<address>", done.stderr)[-300:]
            pytest.skip(f"verl and vLLM for CPUs cannot be installed here: {said}")
    site = next(folder.glob("lib/python3*/site-packages"))
    # without a GPU torchvision's compiled operators do not load, and it declares what they return all the same
    file = site / "torchvision/_meta_registrations.py"
    declared = r'@(torch\.library\.register_fake\("torchvision::q?nms"\))'
    loaded = r"@(\1 if torchvision.extension._has_ops() else (lambda function: function))"
    file.write_text(re.sub(declared, loaded, file.read_text()))
    # verl asks for a distribution of the name vllm; the one for CPUs has another
    metadata = site / "vllm-0.28.0+cpu.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.28.0+cpu\n")
    return made


@pytest.fixture(scope="module")
def policy(python, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    command = [python, "-m", "engines.policy", "qwen25vl", folder, "--wide_heads"]
    done = subprocess.run(command, env=variables(), capture_output=True, text=True, check=False)
    assert "taught qwen25vl" in done.stdout, done.stderr[-3000:]
    return folder


class Verl:
    """Runs of verl on one policy, into one folder."""

    def __init__(self, python: Path, policy: Path, out: Path) -> None:
        self.python, self.policy, self.out, self.log = python, policy, out, out / "log"
        (out / "reward.py").write_text(REWARD)

    def run(self, *overrides: str, kill_after: int | None = None) -> int:
        """Train; end a worker as `kill -9` would once a step is logged. Return what the driver returned."""
        command = [self.python, "-m", "verl.trainer.main_ppo", *options(self.policy, self.out, self.out / "reward.py")]
        environment = variables(SRPO_DUMP=str(self.out))
        with self.log.open("w") as log:
            run = subprocess.Popen([*command, *overrides], env=environment, cwd=self.out, stdout=log, stderr=log)
        deadline = time.monotonic() + HANG
        try:
            while run.poll() is None and time.monotonic() < deadline:
                time.sleep(1.0)
                if kill_after is not None and self.step(kill_after) is not None:
                    workers = subprocess.run(
                        ["pgrep", "-f", "ray::WorkerDict"], capture_output=True, text=True, check=True
                    )
                    os.kill(int(workers.stdout.split()[0]), signal.SIGKILL)
                    kill_after = None
        finally:
            if run.poll() is None:
                run.kill()
        return run.wait()

    def step(self, n: int) -> str | None:
        """Return the line of a step, once it is logged."""
        found = re.search(rf"step:{n} - .*", self.log.read_text(errors="replace"))
        return found and found.group()

    def compared(self, first: int, last: int) -> list[dict[str, Any]]:
        """Compare the steps with `score_streams`, in a process of verl's environment."""
        command = [self.python, HERE / "verl_offline.py", self.policy, self.out, first, last]
        done = subprocess.run(list(map(str, command)), env=variables(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(x) for x in re.findall(r"compared (\{.*?\})", done.stdout)]


def shares(line: str) -> str:
    """Say which part of a step each of verl's stages took; scoring is in `old_log_prob`, weighing in `adv`."""
    seconds = {name: float(x) for name, x in re.findall(r"timing_s/(\w+):([\d.e-]+)", line)}
    stages = ("gen", "old_log_prob", "adv", "update_actor", "update_weights", "save_checkpoint")
    return ", ".join(f"{name} {seconds[name] / seconds['step']:.2f}" for name in stages if name in seconds)


def assert_alike(steps: list[dict[str, Any]]) -> None:
    for step in steps:
        assert step["roles"] == 0, step
        assert max(step[name] for name in ("old", "corrupted", "ablated", "advantages")) < 2e-5, step
    assert sum(step["changed"] for step in steps) > 20, steps
    assert max(step["parsed"] for step in steps) > 0.5, steps


def test_a_run_whose_worker_is_killed_and_that_goes_on(python, policy, tmp_path):
    """Streams and advantages of every step are those of `score_streams`, before the kill and after the resume."""
    verl = Verl(python, policy, tmp_path)
    code = verl.run(*SRPO, "trainer.total_training_steps=9", "trainer.resume_mode=disable", kill_after=2)
    tail = verl.log.read_text(errors="replace")[-3000:]
    assert verl.step(2), tail
    assert code != 0, "a run goes on without one of its workers"
    assert not verl.step(9)
    print("shares of step 2, srpo:", shares(verl.step(2) or ""))
    assert_alike(verl.compared(1, 2))
    saved = max(int(x.name.rpartition("_")[2]) for x in (tmp_path / "ckpt").glob("global_step_*"))
    next_one = saved + 1
    code = verl.run(*SRPO, f"trainer.total_training_steps={next_one}", "trainer.resume_mode=auto")
    tail = verl.log.read_text(errors="replace")[-3000:]
    assert code == 0, tail
    assert verl.step(next_one), tail
    assert not verl.step(saved), tail
    (resumed,) = verl.compared(next_one, next_one)
    assert resumed["roles"] == 0
    assert max(resumed[name] for name in ("old", "corrupted", "ablated", "advantages")) < 2e-5, resumed


def test_without_credit_it_is_plain_grpo(python, policy, tmp_path):
    verl = Verl(python, policy, tmp_path)
    without = ("trainer.v1.trainer_mode=srpo_sync", "+algorithm.srpo.credit=grpo")
    code = verl.run(*without, "trainer.total_training_steps=2", "trainer.resume_mode=disable")
    tail = verl.log.read_text(errors="replace")[-3000:]
    assert code == 0, tail
    line = verl.step(2)
    assert line is not None, tail
    assert "srpo/" not in line
    print("shares of step 2, grpo:", shares(line))
