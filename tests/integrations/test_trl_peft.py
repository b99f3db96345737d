"""Adapters of PEFT: a resumed run is the one that was not killed, and a checkpoint that lacks a tensor is refused.

The environment of the tests has no PEFT: the slow tests install it beside and run this file again.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import tiny_vlms
import torch
from processes import run_python
from safetensors.torch import load_file, save_file
from tiny_grpo import make_trainer, same_run, trained

from srpo import ConfigError
from srpo.integrations.trl import SRPOTrainer

HAS_PEFT = importlib.util.find_spec("peft") is not None
with_peft = pytest.mark.skipif(not HAS_PEFT, reason="PEFT is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
RUN = {"per_device_train_batch_size": 4, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}


def adapted(family: str, **settings: Any) -> tuple[Any, Any]:
    """A model with an adapter of random weights, the same each time."""
    from peft import LoraConfig, get_peft_model

    model, processor = tiny_vlms.build(family)
    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **settings)
    return get_peft_model(model, lora), processor


@with_peft
@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}], ids=["adapter", "head too"])
def test_a_run_that_was_killed_goes_on_alike(settings, family, tmp_path):
    whole = trained(SRPOTrainer, tmp_path / "whole", vlm=adapted(family, **settings), **RUN)
    make_trainer(SRPOTrainer, tmp_path / "parts", vlm=adapted(family, **settings), stop=2, **RUN).train()
    resumed = make_trainer(SRPOTrainer, tmp_path / "parts", vlm=adapted(family, **settings), **RUN)
    resumed.train(resume_from_checkpoint=True)
    same_run(whole, resumed)


@with_peft
def test_an_adapter_that_lacks_a_tensor_is_refused(tmp_path):
    trained(SRPOTrainer, tmp_path, vlm=adapted("qwen25vl"), **RUN | {"max_steps": 2})
    file = tmp_path / "checkpoint-2" / "adapter_model.safetensors"
    saved = load_file(file)
    n = len(saved)
    del saved[next(name for name in saved if "layers.1.mlp.up_proj.lora_B" in name)]
    save_file(saved, file, metadata={"format": "pt"})
    resumed = make_trainer(SRPOTrainer, tmp_path, vlm=adapted("qwen25vl"), **RUN)
    with pytest.raises(ConfigError, match=rf"resume_from_checkpoint .*lacks 1 of {n} tensors.*up_proj\.lora_B"):
        resumed.train(resume_from_checkpoint=True)


@pytest.mark.slow
@pytest.mark.skipif(HAS_PEFT, reason="the tests above run as they are")
def test_with_peft_beside(tmp_path):
    installed = run_python("-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, "peft")
    if installed.returncode:
        pytest.skip(f"peft cannot be installed here: {installed.stderr[-300:]}")
    run = run_python("-m", "pytest", Path(__file__), "-q", "-m", "not slow", paths=(tmp_path,))
    assert run.returncode == 0, run.stdout[-3000:]
    assert "skipped" not in run.stdout
