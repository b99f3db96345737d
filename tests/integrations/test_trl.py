"""SRPOTrainer: TRL's run where it must be, the oracle's advantages elsewhere; resume, ranks, other versions."""

import json
import runpy
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import oracles
import pytest
import torch
from processes import run_python
from tiny_grpo import Rollouts, column, make_trainer, same_run, trained
from trl import GRPOConfig, GRPOTrainer, TrlParser

from srpo import (
    METHODS,
    PRESETS,
    Blank,
    ConfigError,
    ConfigWarning,
    CreditConfig,
    IncompatibleVersionError,
    PatchMask,
    RoleGrammar,
    role_contrast,
    token_weights,
)
from srpo.integrations import trl_config
from srpo.integrations.trl import TESTED, SRPOConfig, SRPOTrainer, check_trl
from srpo.roles import role_ids_from_completions
from srpo.streams import is_not_scored
from srpo.viz import read_records

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:trl"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:score_streams.*no image:UserWarning"),
]
FAMILIES = ("idefics3", "qwen25vl", "qwen3vl", "llava")


class Watched(SRPOTrainer):
    """Remember what the advantage stage took and gave."""

    def _score(self, output, roles, streams):
        self.before = dict(output)
        self.streams = super()._score(output, roles, streams)
        return self.streams

    def _generate_and_score_completions(self, inputs):
        self.after = super()._generate_and_score_completions(inputs)
        return self.after


class TestSameAsTRL:
    @pytest.mark.parametrize("family", ["idefics3", "qwen25vl"])
    def test_grpo_is_the_trainer_of_trl(self, family, tmp_path):
        settings = {
            "gradient_accumulation_steps": 2,
            "num_iterations": 2,
            "per_device_train_batch_size": 4,
            "max_steps": 4,
        }
        plain = trained(GRPOTrainer, tmp_path, family, **settings)
        ours = trained(SRPOTrainer, tmp_path, family, credit="grpo", **settings)
        same_run(plain, ours, ("loss", "grad_norm", "reward", "entropy"))
        assert not [name for name in ours.state.log_history[0] if name.startswith("srpo/")]

    def test_responses_without_tags_are_grpo(self, tmp_path):
        class Untagged(Rollouts):
            def completion(self, key, trainer, question):
                ids, own = super().completion(key, trainer, question)
                tags = trainer.processing_class.tokenizer.convert_tokens_to_ids(list("<>/"))
                kept = [(i, o) for i, o in zip(ids, own, strict=True) if i not in tags]
                return [i for i, _ in kept], [o for _, o in kept]

        plain = trained(GRPOTrainer, tmp_path, rollouts=Untagged())
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", ConfigWarning)
            ours = trained(SRPOTrainer, tmp_path, rollouts=Untagged())
        assert sum("no completion of the first 3 rollouts" in str(x.message) for x in said) == 1
        same_run(plain, ours)
        assert column(ours, "srpo/parse_failures") == [1.0] * 3

    def test_weights_change_the_run(self, tmp_path):
        plain, ours = trained(GRPOTrainer, tmp_path), trained(SRPOTrainer, tmp_path)
        assert column(plain, "reward")[0] == column(ours, "reward")[0]
        assert column(plain, "grad_norm")[0] != column(ours, "grad_norm")[0]


class TestAdvantages:
    @pytest.mark.parametrize(
        ("family", "images", "tools"),
        [("idefics3", (1,), False), ("idefics3", (0, 2), True), ("qwen25vl", (1, 2), True), ("qwen3vl", (1,), False),
         ("llava", (2, 1), False)],
    )  # fmt: skip
    def test_they_are_those_of_the_oracle(self, family, images, tools, tmp_path):
        trainer = trained(Watched, tmp_path, family, images=images, rollouts=Rollouts(tools), max_steps=1)
        before, after, streams = trainer.before, trainer.after, trainer.streams
        mask = before["completion_mask"] * before.get("tool_mask", 1)
        tokenizer = trainer.processing_class.tokenizer
        texts = [tokenizer.convert_ids_to_tokens(row.tolist()) for row in before["completion_ids"]]
        roles = torch.tensor([oracle_roles(row, own) for row, own in zip(texts, mask.tolist(), strict=True)])
        if tools:
            assert (before["tool_mask"] == 0).any()
        logps = (streams.logps, streams.corrupted_logps, streams.ablated_logps)
        contrast = oracles.contrast(*logps, roles, mask, CreditConfig())
        with_evidence = oracles.without_evidence(*logps, roles, mask, CreditConfig())
        weights = oracles.weights(contrast, with_evidence, mask, CreditConfig())
        want = before["advantages"][:, None].double() * weights
        torch.testing.assert_close(after["advantages"].double(), want, atol=2e-6, rtol=2e-6)
        assert after["advantages"].dtype == torch.float32
        spread = (weights - mask).abs()[roles > 0]
        assert spread.max() > 0.05

    @pytest.mark.parametrize("credit", [*PRESETS, "vppo", "pgpo", "tor"])
    def test_every_method_on_log_probs(self, credit, tmp_path):
        trainer = trained(Watched, tmp_path, credit=credit, max_steps=1)
        if credit == "grpo":
            assert trainer.after["advantages"].dim() == 1
            return
        streams, before = trainer.streams, trainer.before
        roles = role_ids_from_completions(
            before["completion_ids"], trainer.processing_class.tokenizer, completion_mask=before["completion_mask"]
        ).role_ids
        weights = METHODS[credit](
            logps=streams.logps, completion_mask=before["completion_mask"], role_ids=roles, entropy=streams.entropy,
            corrupted_logps=streams.corrupted_logps, ablated_logps=streams.ablated_logps,
            advantages=before["advantages"],
        )  # fmt: skip
        torch.testing.assert_close(trainer.after["advantages"], before["advantages"][:, None] * weights)
        read = METHODS[credit].rows("corrupted", roles, before["completion_mask"])
        assert torch.equal(~is_not_scored(streams.corrupted_logps), read)
        assert (streams.corrupted_logps != streams.logps)[read].float().mean() > 0.5

    def test_divergences_over_the_vocabulary(self, tmp_path):
        credit = CreditConfig(contrast_kind="kl")
        trainer = trained(Watched, tmp_path, credit={"contrast_kind": "kl"}, max_steps=1)
        streams, before = trainer.streams, trainer.before
        assert (streams.corrupted_kl.nan_to_num(0.0) >= 0).all()
        roles = role_ids_from_completions(
            before["completion_ids"], trainer.processing_class.tokenizer, completion_mask=before["completion_mask"]
        ).role_ids
        contrast = role_contrast(
            streams.logps, corrupted_kl=streams.corrupted_kl, ablated_kl=streams.ablated_kl, role_ids=roles,
            completion_mask=before["completion_mask"], credit=credit,
        )  # fmt: skip
        weights = token_weights(contrast, roles, before["completion_mask"], credit=credit)
        torch.testing.assert_close(trainer.after["advantages"], before["advantages"][:, None] * weights)
        assert column(trainer, "srpo/infinite_divergences") == [0.0]

    def test_strength_falls_with_the_steps(self, tmp_path):
        trainer = trained(Watched, tmp_path, credit_anneal_steps=2, max_steps=3)
        first, second = column(trainer, "srpo/weight_max")
        assert first > second > 1
        assert trainer.after["advantages"].dim() == 1  # no strength left: no streams
        assert len(column(trainer, "srpo/weight_max")) == 2

    @pytest.mark.parametrize(
        "settings",
        [
            *({"loss_type": loss} for loss in ("grpo", "bnpo", "dr_grpo", "cispo", "sapo")),
            {"importance_sampling_level": "sequence", "loss_type": "cispo"},
            {"num_iterations": 2, "steps_per_generation": 2, "per_device_train_batch_size": 4, "epsilon_high": 0.28},
            {"top_entropy_quantile": 0.5, "temperature": 0.7, "mask_truncated_completions": True, "delta": 2.0},
            {"gradient_accumulation_steps": 2, "bf16": True, "stream_batch_size": 3, "ablation": "delete"},
        ],
        ids=lambda settings: "-".join(map(str, settings.values())),
    )
    def test_settings_of_trl_keep_working(self, settings, tmp_path):
        trainer = trained(SRPOTrainer, tmp_path, max_steps=2, **settings)
        assert all(torch.tensor(column(trainer, "grad_norm")).isfinite())
        assert column(trainer, "srpo/contrast_rows")[0] > 0

    def test_an_evaluation(self, tmp_path):
        trainer = make_trainer(SRPOTrainer, tmp_path, max_steps=1, per_device_eval_batch_size=8)
        trainer.eval_dataset = trainer.train_dataset.select(range(4))
        metrics = trainer.evaluate()
        assert metrics["eval_srpo/contrast_rows"] > 0
        assert metrics["eval_loss"] == metrics["eval_loss"]


def oracle_roles(tokens: list[str], own: list[int]) -> list[int]:
    """Roles of single-character tokens between `<see>`, `<think>` and their ends; 0 on tags and on tools' text."""
    text = "".join(token if valid and len(token) == 1 else "\0" for token, valid in zip(tokens, own, strict=True))
    roles = [0] * len(text)
    for tag, role in (("see", 1), ("think", 2)):
        start, end = text.index(f"<{tag}>") + len(tag) + 2, text.index(f"</{tag}>")
        roles[start:end] = [role] * (end - start)
    return [role if valid else 0 for role, valid in zip(roles, own, strict=True)]


class TestLog:
    def test_metrics_and_completions(self, tmp_path):
        trainer = trained(Watched, tmp_path, max_steps=1, log_completions=True)
        row = trainer.state.log_history[0]
        for role in ("perception", "reasoning"):
            for sign in ("positive", "negative"):
                assert f"srpo/{role}/{sign}/contrast_mean" in row
            assert 0.8 < row[f"srpo/{role}/weight_mean"] < 1.2
        assert row["srpo/weight_min"] < 1 < row["srpo/weight_max"]
        assert row["srpo/parse_failures"] == row["srpo/unclosed"] == 0
        assert 0.9 < row["srpo/effective_sample_size"] <= 1
        weights = trainer.after["advantages"] / trainer.before["advantages"][:, None]
        assert weights.max().item() == pytest.approx(row["srpo/weight_max"], rel=1e-5)
        tables = list(tmp_path.rglob("*.parquet"))
        assert tables

    def test_a_batch_without_roles_logs_no_bounds(self, tmp_path):
        trainer = trained(SRPOTrainer, tmp_path, max_steps=1, role_grammar={"perception_tags": ["nothing"]})
        assert column(trainer, "srpo/parse_failures") == [1.0]
        assert all(value == value for row in trainer.state.log_history for value in row.values())


class TestResume:
    @pytest.mark.parametrize(
        "settings",
        [{}, {"num_iterations": 4}, {"gradient_accumulation_steps": 3, "steps_per_generation": 4}],
        ids=["plain", "iterations", "accumulation"],
    )
    def test_a_run_that_was_killed_goes_on_alike(self, settings, tmp_path):
        settings = {
            "per_device_train_batch_size": 4, "max_steps": 5, "save_strategy": "steps", "save_steps": 2,
            "credit_anneal_steps": 20, **settings,
        }  # fmt: skip
        whole = trained(SRPOTrainer, tmp_path / "whole", **settings)
        make_trainer(SRPOTrainer, tmp_path / "parts", stop=3, **settings).train()
        resumed = make_trainer(SRPOTrainer, tmp_path / "parts", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
        same_run(whole, resumed)
        assert column(whole, "srpo/weight_max") == column(resumed, "srpo/weight_max")


class TestConfig:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("credit", "vgpo"), ("credit", "papo"), ("credit", "rlsd"), ("credit", "spro"), ("credit", 3),
            ("credit_anneal_steps", 0), ("credit_anneal_steps", 1.5), ("role_grammar", {"tags": ["see"]}),
            ("role_grammar", "see"), ("role_grammar", {"perception_tags": ["<see>"]}), ("corruption", "Smear"),
            ("corruption", {"name": "PatchMask", "p": 1}), ("corruption", {"probability": 0.5}),
            ("ablation", "cut"), ("importance_sampling_level", "sequence"),
        ],
    )  # fmt: skip
    def test_wrong_settings_are_named(self, name, value, tmp_path):
        with pytest.raises(ConfigError, match=name if "<see>" not in str(value) else "perception_tags"):
            SRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **{name: value})

    def test_a_command_line(self, tmp_path):
        arguments = ["--output_dir", str(tmp_path), "--use_cpu", "True", "--bf16", "False", "--credit", "srpo_kl"]
        arguments += ["--role_grammar", '{"perception_tags": ["look"], "strict": true}', "--corruption", "Blank"]
        (config,) = TrlParser(SRPOConfig).parse_args_and_config(arguments)
        assert config.credit == "srpo_kl"
        settings = config.credit_settings()
        assert settings.credit == PRESETS["srpo_kl"]
        assert settings.role_grammar == RoleGrammar(perception_tags=("look",), strict=True)
        assert settings.corruption == Blank()

    def test_json(self, tmp_path):
        config = SRPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, credit=PRESETS["srpo_kl"], corruption=PatchMask(0.5),
            role_grammar=RoleGrammar(strict=True),
        )  # fmt: skip
        known = json.loads(config.to_json_string())
        assert known["credit"] == asdict(PRESETS["srpo_kl"])
        assert known["corruption"]["probability"] == 0.5
        assert known["role_grammar"]["strict"] is True

    def test_the_config_of_trl_is_refused(self, tmp_path):
        plain = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
        with pytest.raises(ConfigError, match="SRPOConfig"):
            SRPOTrainer("a model", None, plain)


class TestVersions:
    def test_this_one_is_compatible(self):
        check_trl()

    def test_other_parameters(self):
        class Other(GRPOTrainer):
            def _generate_and_score_completions(self, inputs, model):
                raise NotImplementedError

        with pytest.raises(IncompatibleVersionError, match=rf"_generate_and_score_completions.*{TESTED[-1]}"):
            check_trl(Other)

    def test_a_missing_method(self):
        with pytest.raises(IncompatibleVersionError, match=f"tested with {', '.join(TESTED)}"):
            check_trl(object)

    def test_a_loss_that_takes_no_advantages_per_token(self):
        class Older(GRPOTrainer):
            def _compute_loss(self, model, inputs):
                return inputs["advantages"].unsqueeze(1)

        with pytest.raises(IncompatibleVersionError, match="advantages per token"):
            check_trl(Older)

    def test_an_output_without_what_is_needed(self, tmp_path, monkeypatch):
        def without(self, inputs):
            return {"prompt_ids": torch.zeros(1, 1)}

        monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", without)
        trainer = make_trainer(SRPOTrainer, tmp_path)
        with pytest.raises(IncompatibleVersionError, match="prompt_mask"):
            trainer._generate_and_score_completions([])

    def test_trl_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "trl.trainer.grpo_config", None)
        with pytest.raises(IncompatibleVersionError, match="tested versions"):
            runpy.run_path(trl_config.__file__)  # a reload would make a second SRPOConfig for the tests that follow


class TestRanks:
    """Two processes, each with half of the batch, against one."""

    @pytest.mark.parametrize(
        ("family", "truncated"), [("idefics3", 2), pytest.param("qwen25vl", 0, marks=pytest.mark.slow)]
    )
    def test_two_processes_are_one(self, family, truncated, tmp_path):
        script = str(Path(__file__).parent / "one_grpo_run.py")
        results = []
        for world in (1, 2):
            out = tmp_path / f"{world}.pt"
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if world == 2 else []
            run = run_python(*launch, script, out, family, truncated, OMP_NUM_THREADS="1")
            assert run.returncode == 0, run.stderr[-3000:]
            results.append(torch.load(out, weights_only=True))
        one, two = results
        for name in ("loss", "grad_norm", "srpo/baseline", "srpo/weight_max", "srpo/weight_min", "srpo/contrast_rows"):
            assert two["log"][name] == pytest.approx(one["log"][name], rel=2e-4, abs=2e-6), name
        for x, y in zip(one["after"], two["after"], strict=True):
            torch.testing.assert_close(y, x, atol=2e-7, rtol=1e-5)
        moved = max((x - start).abs().max().item() for x, start in zip(one["after"], one["before"], strict=True))
        assert moved > 1e-5
        both, first = (read_records(tmp_path / f"run{world}/credit/rollouts.jsonl") for world in (1, 2))
        assert (len(both), len(first)) == (16, 8)  # steps 0 and 2; the first of two ranks writes its own
        own = {(x.step, x.prompt) for x in first}
        for x, same in zip(first, [x for x in both if (x.step, x.prompt) in own], strict=True):
            assert (x.step, x.prompt, x.text, x.reward) == (same.step, same.prompt, same.text, same.reward)
            assert x.advantage == pytest.approx(same.advantage, abs=1e-5)
            assert x.weights == pytest.approx(same.weights, rel=1e-3)
        if truncated:
            assert two["valid"][0] == 0  # a rank whose tokens are all masked
