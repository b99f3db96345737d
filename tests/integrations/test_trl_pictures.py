"""SRPOTrainer and raw pictures: corrupted once a prompt, processed as TRL does, scored as the model by itself says."""

import pytest
import rollouts
import torch
from tiny_grpo import PICTURES, Checked, Rollouts, make_trainer
from trl import GRPOTrainer

from srpo import corrupt_images, score_streams
from srpo.integrations import trl_pictures
from srpo.integrations.trl import SRPOConfig, SRPOTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:trl"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize(
    ("family", "images", "settings"),
    [
        ("idefics3", (0, 2), {}), ("idefics3", (1,), {"gradient_accumulation_steps": 2}), ("qwen25vl", (2, 0, 1), {}),
        ("qwen3vl", (1, 2), {"stream_batch_size": 3}), ("llava", (2, 1), {"stream_batch_size": 5}),
    ],
)  # fmt: skip
def test_streams_are_those_of_the_model(family, images, settings, tmp_path):
    trainer = make_trainer(Checked, tmp_path, family, images=images, max_steps=1, **settings)
    trainer.train()
    valid = trainer.output["completion_mask"].bool()
    rollouts.assert_close(trainer.streams.logps, trainer.own, valid)
    shown = valid & (trainer.roles == 1) & torch.tensor([[bool(x["images"])] for x in trainer.examples])
    rollouts.assert_close(trainer.streams.corrupted_logps, trainer.without_pictures, shown)
    assert rollouts.largest(trainer.without_pictures, trainer.own, shown) > 0.01


def test_a_prompt_is_corrupted_and_processed_once(tmp_path, monkeypatch):
    corrupted, processed = [], []

    def counted(images, *arguments, **named):
        corrupted.append([len(row) for row in images])
        return corrupt_images(images, *arguments, **named)

    class Counting(Checked):
        def _score(self, output, role_ids, credit):
            processed.clear()
            return SRPOTrainer._score(self, output, role_ids, credit)

    trainer = make_trainer(Counting, tmp_path, "qwen25vl", images=(1, 2), max_steps=1)
    processor = type(trainer.processing_class)
    call = processor.__call__

    def watched(self, images=None, text=None, **named):
        processed.append(len(text))
        return call(self, images=images, text=text, **named)

    monkeypatch.setattr(trl_pictures, "corrupt_images", counted)
    monkeypatch.setattr(processor, "__call__", watched)
    trainer.train()
    assert len(trainer.examples) == 8  # 2 prompts of 4 rollouts
    assert sorted(corrupted[0]) == [1, 2]
    assert (len(corrupted), processed) == (1, [2])


@pytest.mark.parametrize("padded", [True, False])
def test_prompts_that_the_processor_pads(padded, tmp_path, recwarn):
    """Gemma 4's processor pads by itself, and TRL counts the padding: the policy sees it, and so do the streams."""
    settings = {"chat_template_kwargs": {"padding": padded}, "max_steps": 1}
    trainer = make_trainer(Checked, tmp_path, "qwen25vl", images=(1, 2), **settings)
    trainer.train()
    valid = trainer.output["completion_mask"].bool()
    rollouts.assert_close(trainer.streams.logps, trainer.own, valid)
    rollouts.assert_close(trainer.streams.corrupted_logps, trainer.without_pictures, valid & (trainer.roles == 1))
    warned = [str(x.message) for x in recwarn if "pads prompts" in str(x.message)]
    assert len(warned) == padded
    assert bool(trainer.output["prompt_mask"].all()) == padded


def test_pixels_without_pictures_are_corrupted_where_they_lie(tmp_path):
    class Blind(Checked):
        def _score(self, output, role_ids, credit):
            self._shown = None
            streams = super()._score(output, role_ids, credit)
            ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
            mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
            pixels = {name: output[name] for name in PICTURES if name in output}
            self.want = score_streams(
                self.model, ids, mask, output["completion_ids"].shape[1], role_ids=role_ids, **pixels
            )
            return streams

    trainer = make_trainer(Blind, tmp_path, max_steps=1)
    trainer.train()
    seen = trainer.output["completion_mask"].bool() & (trainer.roles == 1)
    rollouts.assert_close(trainer.streams.corrupted_logps, trainer.want.corrupted_logps, seen)
    assert rollouts.largest(trainer.streams.corrupted_logps, trainer.without_pictures, seen) > 0.01


def test_without_settings_it_has_those_of_trl(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"use_cpu": True, "bf16": False, "report_to": "none"}
    monkeypatch.setattr(SRPOConfig, "__init__", _with(SRPOConfig.__init__, settings))
    trainer = make_trainer(GRPOTrainer, tmp_path)
    ours = SRPOTrainer(
        trainer.model, trainer.reward_funcs, train_dataset=trainer.train_dataset,
        processing_class=trainer.processing_class, rollout_func=Rollouts(),
    )  # fmt: skip
    assert isinstance(ours.args, SRPOConfig)
    assert ours.args.credit == "srpo"


def _with(init, settings):
    def initialise(self, *arguments, **named):
        init(self, *arguments, **settings | named)

    return initialise
