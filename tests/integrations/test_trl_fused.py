"""`SRPOConfig(fused_loss=True)`: TRL's loss and gradients from hidden states, step by step; what it does not cover."""

from functools import partial

import pytest
import tiny_vlms
import torch
from tiny_grpo import column, make_trainer, trained
from trl import GRPOTrainer

from srpo.errors import ConfigError
from srpo.integrations.trl import SRPOConfig, SRPOTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:trl"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:score_streams.*no image:UserWarning"),
]
SETTINGS = {"gradient_accumulation_steps": 2, "num_iterations": 2, "per_device_train_batch_size": 4, "max_steps": 10}
LOSSES = {
    "dapo": {}, "grpo": {"loss_type": "grpo", "beta": 0.05}, "bnpo": {"loss_type": "bnpo", "delta": 1.5},
    "dr_grpo": {"loss_type": "dr_grpo"}, "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"}, "vespo": {"loss_type": "vespo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "bonus": {"entropy_coef": 0.02, "loss_type": "grpo"}, "bonus of dapo": {"entropy_coef": 0.02},
    "masks": {"off_policy_mask_threshold": 0.01, "top_entropy_quantile": 0.6, "beta": 0.05},
    "bias-corrected kl": {"beta": 0.1, "use_bias_correction_kl": True},
}  # fmt: skip
PLAIN = ("dapo", "vespo", "gspo", "masks")  # a reduction over the window, one over sequences, every mask
NAMES = ("kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "clip_ratio/low_min",
         "clip_ratio/high_max", "cispo_clip_ratio", "entropy_coef")  # fmt: skip


@pytest.fixture(autouse=True)
def a_reference(monkeypatch):
    """The tiny models lie on no disk, from which TRL takes its reference."""

    def build(*_arguments, **_named):
        return tiny_vlms.build("idefics3")[0]

    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", build)


@pytest.mark.parametrize("name", [x if x in PLAIN else pytest.param(x, marks=pytest.mark.slow) for x in LOSSES])
def test_ten_steps_are_those_of_trl(name, tmp_path):
    settings = {**SETTINGS, **LOSSES[name]}
    plain = trained(GRPOTrainer, tmp_path, "idefics3", **settings)
    ours = trained(SRPOTrainer, tmp_path, "idefics3", credit="grpo", fused_loss=True, **settings)
    for metric in ("loss", "grad_norm"):
        assert column(ours, metric) == pytest.approx(column(plain, metric), rel=2e-3, abs=2e-5), metric
    assert any(column(plain, "grad_norm"))
    for metric in NAMES:
        if metric in plain.state.log_history[0]:
            assert column(ours, metric) == pytest.approx(column(plain, metric), rel=1e-3, abs=1e-5), metric
    for x, y in zip(plain.model.parameters(), ours.model.parameters(), strict=True):
        gap = (x - y).abs().detach()
        assert gap.mean() < 1e-5
        assert gap.max() < 5e-4  # Adam makes a step of the size of lr out of a gradient that is all rounding


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_token_credit_on_every_family(family, tmp_path):
    settings = {"per_device_train_batch_size": 4, "max_steps": 2}
    plain = trained(SRPOTrainer, tmp_path, family, credit="srpo", **settings)
    ours = trained(SRPOTrainer, tmp_path, family, credit="srpo", fused_loss=True, **settings)
    for metric in ("loss", "grad_norm", "srpo/weight_max"):
        assert column(ours, metric) == pytest.approx(column(plain, metric), rel=2e-3, abs=2e-5), metric


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("name", ["dapo", "cispo", "sapo", "vespo"])
def test_the_ratio_to_the_engine(name, sequences, tmp_path):
    settings = {"per_device_train_batch_size": 4, "max_steps": 1, **LOSSES[name]}
    trainer = make_trainer(SRPOTrainer, tmp_path, "idefics3", credit="grpo", fused_loss=True, **settings)
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    mask = inputs["completion_mask"]
    of_tokens = torch.where(mask.bool(), 0.5 + torch.rand(mask.shape), 1.0)
    inputs["importance_sampling_ratio"] = of_tokens[:, :1] if sequences else of_tokens
    inputs["old_per_token_logps"] = -torch.rand(mask.shape)
    inputs["advantages"] = torch.randn(len(mask))
    expected, found = (
        loss(trainer.model, inputs) for loss in (partial(GRPOTrainer._compute_loss, trainer), trainer._compute_loss)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    parameters = list(trainer.model.parameters())
    for x, y in zip(
        *(torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (expected, found)), strict=True
    ):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(y, x, rtol=2e-3, atol=1e-5)


def test_rows_that_cannot_learn_are_skipped(tmp_path):
    trainer = trained(SRPOTrainer, tmp_path, "idefics3", credit="grpo", fused_loss=True, max_steps=1)
    assert "srpo/rows_skipped" in trainer.state.log_history[0]


@pytest.mark.parametrize(("settings", "argument"), [
    ({"use_adaptive_entropy": True}, "use_adaptive_entropy"), ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32"),
])  # fmt: skip
def test_what_is_not_covered_is_named(settings, argument, tmp_path):
    with pytest.raises(ConfigError, match=rf"fused_loss=True\)\(\): {argument} got .*fused_loss=False"):
        SRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, fused_loss=True, **settings)


def test_a_head_that_is_not_alone_is_refused(tmp_path):
    trainer = make_trainer(SRPOTrainer, tmp_path, "idefics3", credit="grpo", fused_loss=True, max_steps=1)
    trainer.model.lm_head.register_forward_hook(lambda *arguments: 0.5 * arguments[-1])
    with pytest.raises(ConfigError, match=r"model got .*plain linear head"):
        trainer.train()
