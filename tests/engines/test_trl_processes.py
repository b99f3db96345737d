"""TRL on two processes, from the command line: a rank is killed, and a run resumes to the last printed digit."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from processes import run_python

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
STEPS, SAVED, KILLED = 6, 2, 4
COMMON = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "machine_rank": 0, "num_processes": 2} | {
    "mixed_precision": "no", "use_cpu": True, "rdzv_backend": "static", "main_training_function": "main",
}  # fmt: skip
FSDP = {
    "fsdp_version": 2, "fsdp_reshard_after_forward": True, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_cpu_ram_efficient_loading": False, "fsdp_offload_params": False,
}  # fmt: skip
LAYERS = {"qwen25vl": "Qwen2_5_VLDecoderLayer,Qwen2_5_VLVisionBlock", "qwen3vl": "Qwen3VLTextDecoderLayer"}
ZERO3 = {
    "zero_stage": 3, "zero3_init_flag": False, "zero3_save_16bit_model": True, "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0, "offload_optimizer_device": "none", "offload_param_device": "none",
}  # fmt: skip
OPTIONS = (
    "--per_device_train_batch_size 8 --num_generations 4 --max_completion_length 64 --learning_rate 1e-3 "
    "--lr_scheduler_type constant --logging_steps 1 --report_to none --use_cpu True --bf16 False "
    "--gradient_checkpointing False --credit srpo --save_strategy steps --disable_tqdm True --seed 1 "
    f"--steps_per_generation 2 --max_steps {STEPS} --save_steps {SAVED}"
)
DEEPSPEED = "deepspeed==0.19.8 hjson==3.1.0 py-cpuinfo==9.0.0 ninja==1.13.2 msgpack==1.2.4 einops==0.8.2"


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory) -> Path:
    """Install DeepSpeed beside the environment."""
    site = tmp_path_factory.mktemp("deepspeed")
    done = run_python("-m", "pip", "install", "-q", "--no-deps", "--target", site, *DEEPSPEED.split())
    if done.returncode:
        pytest.skip(f"deepspeed cannot be installed here: {re.sub(r'[a-z]+://[^ ]+', '<address>', done.stderr)[-300:]}")
    return site


def launcher(engine: str, family: str, folder: Path) -> list[str]:
    """Return the arguments of Python that start two processes."""
    port = str(29500 + os.getpid() % 2000)
    if engine == "ddp":
        return ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    settings = {"distributed_type": "DEEPSPEED", "deepspeed_config": ZERO3}
    if engine == "fsdp2":
        layers = FSDP | {"fsdp_transformer_layer_cls_to_wrap": LAYERS[family]}
        settings = {"distributed_type": "FSDP", "fsdp_config": layers}
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(COMMON | settings))
    config = ("--config_file", str(folder / "accelerate.yaml"), "--main_process_port", port)
    return ["-m", "accelerate.commands.launch", *config]


@pytest.mark.parametrize(
    ("engine", "family"), [("ddp", "idefics3"), ("fsdp2", "qwen25vl"), ("fsdp2", "qwen3vl"), ("zero3", "llava")]
)
def test_a_killed_rank_ends_the_run_and_it_goes_on_alike(engine, family, tmp_path, request):
    paths = (request.getfixturevalue("deepspeed"),) if engine == "zero3" else ()
    policy = tmp_path / "policy"
    policy.mkdir()
    done = run_python("-m", "engines.policy", family, policy, "--steps", "200", OMP_NUM_THREADS="1")
    assert f"taught {family}" in done.stdout, done.stderr[-3000:]

    def run(out: str, *more: str, engine: str = engine) -> tuple[int, list[dict[str, float]], str]:
        command = (*launcher(engine, family, tmp_path), HERE / "trl_run.py", family, policy, *more)
        options = ("--output_dir", tmp_path / out, *OPTIONS.split())
        variables = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
        done = run_python(*command, *options, paths=paths, PYTHONWARNINGS="ignore", **variables)
        steps = [json.loads(line) for line in re.findall(r"step (\{.*?\})", done.stdout)]
        return done.returncode, steps, done.stderr[-4000:]

    rc, whole, error = run("whole")
    assert rc == 0, error
    assert len(whole) == STEPS
    generated = [step for step in whole if step["srpo/parse_failures"] is not None]  # the others reuse rollouts
    assert len(generated) == STEPS // 2
    assert any(0.0 < step["reward"] < 1.0 for step in generated), "nothing to learn from"
    assert min(step["srpo/parse_failures"] for step in generated) < 0.5
    rc, killed, _ = run("parts", "--kill_at", str(KILLED))
    assert rc != 0
    assert killed == whole[:KILLED]
    rc, resumed, error = run("parts", "--resume_from_checkpoint", str(tmp_path / f"parts/checkpoint-{SAVED}"))
    assert rc == 0, error
    assert resumed == whole[SAVED:]
    if family == "qwen25vl":
        rc, unsharded, error = run("ddp", "--save_strategy", "no", engine="ddp")
        assert rc == 0, error
        for step, other in zip(whole, unsharded, strict=True):
            assert {name: x and pytest.approx(x, rel=1e-4) for name, x in step.items()} == other
