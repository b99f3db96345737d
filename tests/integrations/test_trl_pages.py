"""log_credit_steps: pages and rollouts of a run, equal to what the run computed; trackers; nothing where it is off."""

import sys
import types

import pytest
import torch
from credit_cases import rollout
from tiny_grpo import Checked, Rollouts, make_trainer, same_run, trained
from transformers.trainer_callback import TrainerCallback
from trl.data_utils import apply_chat_template, prepare_multimodal_messages

from srpo import ConfigError, ConfigWarning, PatchMask, ShuffleImages, corrupt_images
from srpo.integrations.trl import SRPOConfig, SRPOTrainer
from srpo.integrations.trl_pages import CreditLog, _chosen, _report
from srpo.vision.scoring import score_streams
from srpo.viz import credit_html, read_records
from srpo.viz.record import _addresses
from srpo.viz.run_log import read_run

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:trl"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:score_streams.*no image:UserWarning"),
]


class Watched(Checked):
    """Remember what the run computed at each step."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.kept = getattr(self, "kept", {}) | {
            self.state.global_step: (self.output, output, self.streams, self._rewards)
        }
        return output


def test_what_is_written_is_what_the_run_computed(tmp_path):
    trainer = trained(Watched, tmp_path, max_steps=5, log_credit_steps=2, rollouts=Rollouts(tools=True))
    names = sorted(x.name for x in (tmp_path / "credit").iterdir())
    pages = ["step_0000.html", "step_0002.html", "step_0004.html"]
    assert names == sorted([*pages, "metrics.jsonl", "rollouts.jsonl"])
    records = read_records(tmp_path / "credit/rollouts.jsonl")
    assert [x.step for x in records] == [0] * 8 + [2] * 8 + [4] * 8  # rows of a step of 8
    tokenizer = trainer.processing_class.tokenizer
    for record in records:
        before, after, streams, rewards = trainer.kept[record.step]
        rows = zip(before["completion_ids"], before["completion_mask"], strict=True)
        texts = [tokenizer.decode(ids[mask != 0]) for ids, mask in rows]
        i, n = texts.index(record.text), len(record.tokens)
        assert record.reward == pytest.approx(float(rewards[i].sum()))
        assert record.advantage == pytest.approx(float(before["advantages"][i]))
        products = torch.tensor([a * w for a, w in zip(record.advantages, record.weights, strict=True)])
        torch.testing.assert_close(products, after["advantages"][i, :n], atol=1e-5, rtol=1e-5)
        assert record.logps == pytest.approx(streams.logps[i, :n].tolist(), rel=1e-5)
        assert record.sampled == tuple(before["tool_mask"][i, :n].tolist())
        assert record.prompt.startswith("how many squares?")
        assert record.parsed is True
    for page in pages:
        assert (tmp_path / "credit" / page).read_text(encoding="utf-8").count("<article>") == 8


def test_the_pictures_are_those_that_were_scored(tmp_path):
    trainer = trained(Watched, tmp_path, max_steps=1, log_credit_steps=1)
    records = {x.prompt: x for x in read_records(tmp_path / "credit/rollouts.jsonl")}
    assert len(records) == 2
    for example in trainer.examples:
        messages = prepare_multimodal_messages(example["prompt"], images=example["images"])
        text = apply_chat_template({"prompt": messages}, trainer.processing_class)["prompt"]
        dark = corrupt_images([example["images"]], PatchMask(), seed=[text], processor=trainer.processing_class)
        (record,) = [x for question, x in records.items() if question in text]
        assert [record.images] == _addresses(None, "images", [example["images"]])
        assert [record.corrupted_images] == _addresses(None, "images", dark)
        assert record.images != record.corrupted_images


def test_it_changes_nothing_of_the_run(tmp_path):
    off = trained(SRPOTrainer, tmp_path / "a")
    on = trained(SRPOTrainer, tmp_path / "b", log_credit_steps=1)
    same_run(off, on, ("loss", "grad_norm", "reward", "srpo/baseline"))
    assert not (tmp_path / "a/credit").exists()
    assert off._credit_log is None
    assert not [x for x in off.callback_handler.callbacks if isinstance(x, CreditLog)]


def test_grpo_has_pages_too(tmp_path):
    trained(SRPOTrainer, tmp_path, credit="grpo", max_steps=1, log_credit_steps=1)
    records = read_records(tmp_path / "credit/rollouts.jsonl")
    assert {w for x in records for w in x.weights} == {1.0}
    assert records[0].logps is None


def test_a_method_and_mixed_pictures(tmp_path):
    trained(
        SRPOTrainer, tmp_path, credit="vppo", max_steps=1, log_credit_steps=1, corruption=ShuffleImages(), images=(1, 2)
    )
    records = read_records(tmp_path / "credit/rollouts.jsonl")
    assert {0.0} < {w for x in records for w in x.weights}
    assert {len(x.corrupted_images) for x in records} == {1, 2}


@pytest.mark.parametrize("credit", [{"contrast_kind": "kl"}, {"preset": "vppo", "kl": "full"}])
def test_divergences_are_the_contrast(credit, tmp_path, monkeypatch):
    scored = []

    def score(*arguments, **named):
        scored.append(score_streams(*arguments, **named))
        return scored[-1]

    monkeypatch.setattr("srpo.integrations.trl.score_streams", score)
    trained(SRPOTrainer, tmp_path, credit=credit, max_steps=1, log_credit_steps=1)
    shown = [x for record in read_records(tmp_path / "credit/rollouts.jsonl") for x in record.contrast if x is not None]
    kl = torch.cat([x.flatten() for x in (scored[0].corrupted_kl, scored[0].ablated_kl) if x is not None]).nan_to_num()
    assert max(shown) > 0
    for x in shown:
        assert (kl - x).abs().min() <= 1e-6 * abs(x)


def test_metrics_survive_a_kill(tmp_path):
    trainer = trained(SRPOTrainer, tmp_path, max_steps=4, log_credit_steps=3, stop=2)
    run = read_run(tmp_path)
    assert run.sources == ["credit/metrics.jsonl", "credit/rollouts.jsonl"]
    assert [row["step"] for row in run.rows] == [1, 2]
    for name in ("loss", "reward", "srpo/baseline"):
        want = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in trainer.state.log_history if name in row]
        assert run.series(name) == want, name


def test_a_new_run_in_the_same_folder_keeps_the_old_one_apart(tmp_path):
    for _ in range(3):
        trained(SRPOTrainer, tmp_path, max_steps=1, log_credit_steps=1)
    assert sorted(x.name for x in tmp_path.glob("credit*")) == ["credit", "credit.1", "credit.2"]
    assert len(read_records(tmp_path / "credit/rollouts.jsonl")) == 8


def test_a_resumed_run_goes_on_where_it_was(tmp_path):
    settings = {"max_steps": 4, "log_credit_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trained(SRPOTrainer, tmp_path, stop=2, **settings)
    resumed = make_trainer(SRPOTrainer, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert not (tmp_path / "credit.1").exists()
    assert [row["step"] for row in read_run(tmp_path).rows] == [1, 2, 3, 4]
    assert sorted({x.step for x in read_records(tmp_path / "credit/rollouts.jsonl")}) == [0, 2]


def test_a_disk_that_is_full_ends_no_run(tmp_path):
    (tmp_path / "credit").write_text("a file where the folder should be")
    log = CreditLog(1, str(tmp_path))
    with pytest.warns(ConfigWarning, match="log_credit_steps could not write"):
        log._try(lambda path, text: path.write_text(text), "x", "y")


def test_the_widest_spread_of_rewards_comes_first():
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.5, 0.6])
    assert _chosen(rewards, 2) == [2, 3, 4, 5, 0, 1]
    assert len(_chosen(torch.zeros(64), 8)) == 16
    assert len(_chosen(torch.zeros(64), 32)) == 32


class Tracker(types.ModuleType):
    """A module with the names of W&B and trackio that are called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.run, self.logged = object(), []

    def log(self, values):
        self.logged.append(values)

    def Html(self, page, inject):  # noqa: N802 - their name
        assert inject is False
        return page


class Board(TrainerCallback):
    """A callback with a writer, as transformers' own for TensorBoard."""

    def __init__(self) -> None:
        self.tb_writer, self.added = self, []

    def add_image(self, name, pixels, step, dataformats):
        self.added.append((name, pixels, step, dataformats))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_the_page(name, monkeypatch):
    tracker, records = Tracker(name), [rollout(9)]
    monkeypatch.setitem(sys.modules, name, tracker)
    args, handler = types.SimpleNamespace(report_to=[name, "none"]), types.SimpleNamespace(callbacks=[object()])
    trainer = types.SimpleNamespace(args=args, callback_handler=handler)
    _report(trainer, credit_html(records), records, 7)
    assert tracker.logged == [{"srpo/credit": credit_html(records), "train/global_step": 7}]
    args.report_to = []
    _report(trainer, credit_html(records), records, 8)
    tracker.run, args.report_to = None, ["wandb"]  # W&B was asked for and is not running
    if name == "wandb":
        _report(trainer, credit_html(records), records, 9)
    assert len(tracker.logged) == 1


def test_tensorboard_gets_a_picture(tmp_path):
    trainer = make_trainer(SRPOTrainer, tmp_path, max_steps=3, log_credit_steps=2)
    trainer.add_callback(board := Board())
    trainer.train()
    assert [(x[0], x[2], x[3]) for x in board.added] == [("srpo/credit", 0, "HWC"), ("srpo/credit", 2, "HWC")]
    pixels = board.added[0][1]
    assert pixels.dtype == "uint8"
    assert pixels.shape[2] == 3
    assert pixels.std() > 10


def test_without_matplotlib_tensorboard_goes_without(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    args, handler = (
        types.SimpleNamespace(report_to=["tensorboard"]),
        types.SimpleNamespace(callbacks=[board := Board()]),
    )
    trainer = types.SimpleNamespace(args=args, callback_handler=handler)
    with pytest.warns(UserWarning, match="no picture of credit: credit_figure.*pip install"):
        _report(trainer, "", [rollout(9)], 7)
    assert board.added == []


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "all"])
def test_settings_that_are_refused(value, tmp_path):
    with pytest.raises(ConfigError, match=r"^SRPOConfig\(\): log_credit_steps got "):
        SRPOConfig(output_dir=str(tmp_path), log_credit_steps=value, bf16=False, use_cpu=True)
