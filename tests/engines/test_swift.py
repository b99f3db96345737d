"""ms-swift itself: three runs from its command line with the plugin, every step compared, and one resumed.

Its packages are installed beside the environment, as they are, because its pins are not those of the tests.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_python

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PLUGINS = (ROOT / "srpo/integrations/swift.py", HERE / "swift_plugin.py")
# What ms-swift 4.6 imports beside what the environment has, and what it wants in other versions.
PACKAGES = (
    "ms_swift==4.6.0 transformers==5.19.0 trl==0.29.1 datasets==4.8.4 fsspec==2026.2.0 huggingface_hub==1.33.0 "
    "torchvision==0.28.0 addict==2.4.0 aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 attrdict==2.0.1 "
    "attrs==26.1.0 av==18.1.0 binpacking==2.0.1 certifi==2026.10.18 cffi==2.1.1 charset-normalizer==3.5.3 "
    "cryptography==50.0.2 dacite==1.9.2 defusedxml==0.7.1 einops==0.8.2 fastapi==0.165.0 frozenlist==1.8.0 "
    "httpcore==1.0.9 httpx==0.28.1 importlib_metadata==10.2.0 jiter==0.19.0 json_repair==0.64.6 lazy-importer==0.1.0 "
    "modelscope==1.40.2 modelscope-hub==0.5.1 msgspec==0.22.0 multidict==7.2.1 nltk==3.10.4 openai==3.57.0 "
    "peft==0.20.0 propcache==0.5.4 pycparser==3.12 qwen-vl-utils==0.0.14 requests==2.34.2 rouge==1.0.1 "
    "sentencepiece==0.2.3 simplejson==4.3.0 six==1.17.0 sniffio==1.3.1 starlette==1.10.0 tiktoken==0.14.0 "
    "transformers-stream-generator==0.0.5 urllib3==2.8.0 uvicorn==0.54.0 yarl==1.25.1 zipp==4.1.2 zstandard==0.25.0"
)
FAMILIES = {"qwen25vl": ("qwen2_5_vl", "small_qwen"), "llava": ("llava1_5_hf", "small_llava")}
OPTIONS = (
    "--rlhf_type grpo --torch_dtype float32 --attn_impl sdpa --tuner_type full --freeze_vit false "
    "--freeze_aligner false --split_dataset_ratio 0 --reward_funcs is_right --use_vllm false --num_generations 4 "
    "--gradient_accumulation_steps 1 --max_completion_length 64 --learning_rate 1e-3 --lr_scheduler_type constant "
    "--temperature 1.0 --max_steps 4 --save_steps 2 --logging_steps 1 --add_version false --report_to none --beta 0 "
    "--bf16 false --fp16 false --gradient_checkpointing false --dataloader_num_workers 0 --dataset_num_proc 1 "
    "--eval_strategy no --load_from_cache_file false --seed 1"
)
SETTINGS = {"srpo": {"credit": "srpo", "corruption": {"name": "PatchMask", "probability": 0.6}}}


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """Install ms-swift beside the environment."""
    if not torch.__version__.startswith("2.13."):
        pytest.skip(f"the torchvision of these packages is for torch 2.13, not {torch.__version__}")
    site = tmp_path_factory.mktemp("packages")
    how = ("-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", site)
    done = run_python(*how, *PACKAGES.split())
    if done.returncode:
        pytest.skip(f"ms-swift cannot be installed here: {re.sub(r'[a-z]+://[^ ]+', '<address>', done.stderr)[-300:]}")
    # without a GPU torchvision's compiled operators do not load, and it declares what they return all the same
    file = site / "torchvision/_meta_registrations.py"
    loaded = "torchvision.extension._has_ops()"
    declared = r'@(torch\.library\.register_fake\("torchvision::q?nms"\))'
    file.write_text(re.sub(declared, rf"@(\1 if {loaded} else (lambda function: function))", file.read_text()))
    return site


@pytest.fixture(scope="module")
def policies(packages, tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp(family)
        done = run_python("-m", "engines.policy", family, folders[family], paths=(packages,), OMP_NUM_THREADS="1")
        assert f"taught {family}" in done.stdout, done.stderr[-3000:]
    return folders


class Swift:
    """Runs of `swift rlhf` on one policy."""

    def __init__(self, packages: Path, policy: Path, family: str) -> None:
        self.packages, self.policy, self.family = packages, policy, family

    def run(self, out: Path, *more: str, ranks: int = 1) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Train; return what was logged of each step, and what the probe printed of each micro-batch."""
        done = self.start(out, *more, ranks=ranks)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        lines = map(json.loads, (out / "logging.jsonl").read_text().splitlines())
        probes = re.findall(r"probe (\{.*?\})", done.stdout)
        return [line for line in lines if "loss" in line and "reward" in line], [json.loads(x) for x in probes]

    def start(self, out: Path, *more: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
        kind, template = FAMILIES[self.family]
        paths = (self.packages, ROOT, ROOT / "tests")
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "USE_HF": "1",
            "CUDA_VISIBLE_DEVICES": "", "MIN_PIXELS": "3136", "MAX_PIXELS": "3136", "PYTHONWARNINGS": "ignore",
            "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        if ranks > 1:
            environment |= {"NPROC_PER_NODE": str(ranks), "MASTER_PORT": str(29500 + os.getpid() % 2000)}
        command = (
            sys.executable, "-m", "swift.cli.main", "rlhf", "--model", self.policy, "--model_type", kind, "--template",
            template, "--dataset", self.policy / "train.jsonl", "--output_dir", out, "--external_plugins", *PLUGINS,
            "--model_kwargs", json.dumps(SETTINGS), "--per_device_train_batch_size", 8 // ranks, *OPTIONS.split(),
            *more,
        )  # fmt: skip
        return subprocess.run(
            list(map(str, command)), env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )


@pytest.fixture(params=FAMILIES)
def swift(request, packages, policies) -> Swift:
    return Swift(packages, policies[request.param], request.param)


def assert_alike(probes: list[dict[str, Any]], n: int) -> None:
    assert len(probes) == n
    for probe in probes:
        assert probe["old"] < 1e-5, probe
        assert probe["advantages"] < 1e-5, probe
    assert sum(probe["changed"] for probe in probes) > 20, probes
    assert max(probe["parsed"] for probe in probes) > 0.5, probes


def test_a_run_and_one_that_resumes(swift, tmp_path):
    """Streams and advantages are those of `score_streams`, and a resumed run prints what the whole one did."""
    logged, probes = swift.run(tmp_path / "whole")
    assert_alike(probes, 4)
    assert all("srpo/perception/weight_mean" in line for line in logged)
    again, _ = swift.run(tmp_path / "again", "--resume_from_checkpoint", str(tmp_path / "whole/checkpoint-2"))
    compared = ("loss", "grad_norm", "reward", "completions/mean_length", "srpo/baseline")
    wanted, found = ([{name: line.get(name) for name in compared} for line in lines] for lines in (logged[2:], again))
    assert found == wanted


def test_two_ranks(packages, policies, tmp_path):
    """With a loss in which token weights do not cancel although its ratio is that of a sequence."""
    two = Swift(packages, policies["llava"], "llava")
    loss = ("--loss_type", "cispo", "--importance_sampling_level", "sequence")
    _, probes = two.run(tmp_path / "two", "--use_cpu", "true", "--ddp_backend", "gloo", *loss, ranks=2)
    assert_alike(probes, 8)


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--importance_sampling_level", "sequence", "importance_sampling_level"),
        ("--loss_type", "real", "loss_type"),
        ("--model_kwargs", '{"srpo": {"credit": "sprout"}}', "credit"),
    ],
)
def test_what_does_nothing_is_refused(option, value, named, packages, policies, tmp_path):
    done = Swift(packages, policies["llava"], "llava").start(tmp_path, option, value)
    assert done.returncode != 0
    assert re.search(rf"ConfigError: \S+ {named}", done.stderr), done.stderr[-2000:]
