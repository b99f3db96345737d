"""Checkpoints of families whose weights are saved under other names: a resumed run is the one that was not killed."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_vlms
import torch
from processes import run_python
from tiny_grpo import make_trainer, same_run, trained

from srpo import ConfigError
from srpo.integrations.checkpoint import load_weights
from srpo.integrations.trl import SRPOTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:trl"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:score_streams.*no image:UserWarning"),
]
RUN = {"per_device_train_batch_size": 4, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}


def filled(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose every tensor, norms and biases too, is of its own."""
    model, _ = tiny_vlms.build(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in model.parameters():
            x.normal_(generator=generator)
    return model.to(dtype)


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_a_run_that_was_killed_goes_on_alike(family, tmp_path):
    whole = trained(SRPOTrainer, tmp_path / "whole", family, **RUN)
    make_trainer(SRPOTrainer, tmp_path / "parts", family, stop=2, **RUN).train()
    resumed = make_trainer(SRPOTrainer, tmp_path / "parts", family, **RUN)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.log_history[0]["step"] == 1  # the first steps are those of the killed run
    same_run(whole, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen25vl", "llava"])
def test_two_processes_go_on_alike(family, tmp_path):
    script = str(Path(__file__).parent / "one_grpo_run.py")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    results = {}
    for name in ("whole", "killed", "resumed"):
        out = tmp_path / ("whole" if name == "whole" else "parts") / f"{name}.pt"
        out.parent.mkdir(exist_ok=True)
        run = run_python(*launch, out, family, 0, name, OMP_NUM_THREADS="1")
        assert run.returncode == 0, run.stderr[-3000:]
        results[name] = torch.load(out, weights_only=True)
    for x, y, killed in zip(*(results[name]["after"] for name in ("whole", "resumed", "killed")), strict=True):
        assert torch.equal(x, y)
        assert x.shape == killed.shape
    assert results["whole"]["log"] == results["resumed"]["log"]
    moved = zip(results["whole"]["after"], results["killed"]["after"], strict=True)
    assert max((x - y).abs().max().item() for x, y in moved) > 1e-5


def test_the_best_model_is_the_one_of_its_step(tmp_path):
    trainer = trained(SRPOTrainer, tmp_path, "qwen25vl", **RUN | {"max_steps": 2, "save_steps": 1})
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    trainer._load_best_model()
    best = type(trainer.model).from_pretrained(trainer.state.best_model_checkpoint)
    for x, y in zip(trainer.model.parameters(), best.parameters(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("kind", ["whole", "shards", "bf16", "fp32 head"])
def test_every_tensor_is_read_back(kind, tmp_path):
    dtype = torch.float32 if kind in ("whole", "shards") else torch.bfloat16
    model, other = filled("qwen25vl", dtype), tiny_vlms.build("qwen25vl")[0].to(dtype)
    if kind == "fp32 head":
        model.lm_head.float()
        other.lm_head.float()
        model.lm_head.weight.data += 1e-5
    model.save_pretrained(tmp_path, max_shard_size="100KB" if kind == "shards" else "1GB")
    assert (kind == "shards") == (tmp_path / "model.safetensors.index.json").exists()
    before = torch.get_rng_state()
    load_weights(other, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    for (name, x), (own, y) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == own
        assert x.dtype == y.dtype
        assert torch.equal(x, y), name


@pytest.mark.parametrize("kind", ["missing", "another shape"])
def test_a_checkpoint_of_another_model_is_refused(kind, tmp_path):
    make_trainer(SRPOTrainer, tmp_path, "llava", **RUN | {"max_steps": 2}).train()
    checkpoint = tmp_path / "checkpoint-2"
    model, processor = tiny_vlms.build("llava")
    file = checkpoint / "model.safetensors"
    from safetensors.torch import load_file, save_file

    saved = load_file(file)
    name = next(name for name in saved if name.endswith("layers.1.mlp.up_proj.weight"))
    if kind == "missing":
        del saved[name]
    else:
        saved[name] = saved[name][:-1].clone()
    save_file(saved, file, metadata={"format": "pt"})
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "llava"
    before = [x.clone() for x in model.parameters()]
    resumed = make_trainer(SRPOTrainer, tmp_path, vlm=(model, processor), **RUN)
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint .*lacks 1 of 70 tensors.*layers\.1\.mlp\.up_proj"):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(x, y) for x, y in zip(before, model.parameters(), strict=True))


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ValueError, match="valid checkpoint"):
        make_trainer(SRPOTrainer, tmp_path, **RUN).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
