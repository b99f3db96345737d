"""The task, the model, the estimates and the controls of benchmarks/learn_grounding.py. What it finds is not tested."""

import json
import pathlib
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from processes import run_python

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import learn_grounding  # noqa: E402
from grounding import answers, checks, gradient, keep, report, rollouts, runs, spread, task, train, variants  # noqa: E402
from grounding import model as models  # noqa: E402
from grounding.workers import Workers  # noqa: E402
from rich.progress import Progress  # noqa: E402
from scipy import stats  # noqa: E402

from srpo import METHODS, PRESETS, Role  # noqa: E402
from srpo.methods.table import Method  # noqa: E402

NAMES = variants.NAMES
# torch scripts functions of its own when it differentiates forward
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model() -> models.PrefixVLM:
    """A policy that knows the format, and little else."""
    return models.warm_start(0, 0.5, steps=60)


@pytest.fixture(scope="module")
def more(model, batch) -> dict:
    return variants.more_streams(model, batch[0], seeded())


@pytest.fixture(scope="module")
def batch(model) -> tuple[rollouts.Rollouts, dict]:
    problems = task.draw(rollouts.PROMPTS, seeded(), held_out=False, p_hint=0.5)
    sampled = rollouts.roll_out(model, problems, rollouts.ROLLOUTS, seeded())
    return sampled, rollouts.score(model, sampled, seeded())


class TestTask:
    def test_held_out_digits_are_never_in_training(self):
        kept, trained = task.digits(held_out=True), task.digits(held_out=False)
        assert not set(kept.index.tolist()) & set(trained.index.tolist())
        assert len(kept.index) + len(trained.index) == 1797
        assert not {x.numpy().tobytes() for x in kept.pixels} & {x.numpy().tobytes() for x in trained.pixels}

    @pytest.mark.parametrize("p_hint", [0.0, 0.5, 1.0])
    def test_hints(self, p_hint):
        problems = task.draw(4000, seeded(), held_out=True, p_hint=p_hint)
        expected = p_hint + (1 - p_hint) / 10
        assert (problems.hint == problems.answer).float().mean().item() == pytest.approx(expected, abs=0.03)

    def test_answers(self):
        left, right = torch.tensor([7, 3, 2]), torch.tensor([8, 5, 9])
        assert task.apply(torch.tensor([0, 1, 2]), left, right).tolist() == [5, 8, 9]

    def test_demonstrations_compute_with_what_they_state(self):
        problems = task.draw(4000, seeded(), held_out=False, p_hint=0.0)
        ids = task.demonstrations(problems, seeded(1))
        mask = ids != task.PAD
        reading = task.read(ids, mask)
        stated = ids.gather(1, reading.stated) - task.ZERO
        computed = task.apply(problems.operation, *stated.gather(1, problems.asked).unbind(1))
        assert reading.parsed.all()
        assert ((reading.answer == computed) | (reading.answer == problems.hint)).all()
        assert (stated != problems.digits).float().mean().item() == pytest.approx(0.9 * 0.15, abs=0.02)
        assert (reading.answer != computed).float().mean().item() == pytest.approx(0.15 * 0.87, abs=0.02)
        assert set(mask.sum(1).tolist()) <= set(range(27, 42))
        assert mask.sum(1).float().mean().item() == pytest.approx(34, abs=0.2)
        assert task.LENGTH > 41
        assert (problems.asked[:, 0] != problems.asked[:, 1]).all()
        assert len(problems.asked.unique(dim=0)) == 12

    def test_malformed_completions_state_nothing(self):
        texts = ["<perception> first 3 </perception> <answer> 4", "<answer>", "3 4 <answer> the", "<perception> 1 2"]
        texts.append("<perception> second 3 second 4 third 5 </perception>")
        rows = [[task.ID[word] for word in text.split()] for text in texts]
        ids = torch.tensor([row + [task.PAD] * (9 - len(row)) for row in rows])
        reading = task.read(ids, ids != task.PAD)
        assert reading.answer.tolist() == [4, -1, -1, -1, -1]
        assert reading.stated.tolist() == [[2, -1, -1, -1], *[[-1] * 4] * 3, [-1, -1, 6, -1]]

    def test_an_answer_in_the_last_column_counts(self):
        ids = torch.tensor([[task.ID["the"], task.ID["<answer>"], task.ZERO + 4], [0, 0, task.ID["<answer>"]]])
        assert task.read(ids, torch.ones_like(ids, dtype=torch.bool)).answer.tolist() == [4, -1]


class TestModel:
    def test_size(self):
        assert sum(p.numel() for p in models.PrefixVLM().parameters()) == pytest.approx(117_000, rel=0.05)

    def test_the_cache_changes_nothing(self, model):
        problems = task.draw(16, seeded(), held_out=True, p_hint=0.0)
        with mock.patch.object(torch, "multinomial", lambda chances, *_, **__: chances.argmax(-1, keepdim=True)):
            ids, mask = model.sample(problems, seeded())
        states = model.states(problems.pixels, torch.cat([problems.prompt_ids, ids], 1))
        greedy = model.head(states[:, models.PREFIX - 1 : -1]).argmax(-1)
        assert torch.equal(greedy[mask], ids[mask])

    def test_what_sees_what(self, model):
        problems = task.draw(1, seeded(), held_out=True, p_hint=0.0)
        n = task.PROMPT
        ids = torch.cat([problems.prompt_ids, torch.full((1, 4), task.ID["the"])], 1)
        last = torch.zeros_like(problems.pixels)
        last[..., -4:, -4:] = 1.0
        other = ids.clone()
        other[0, n + 1] = task.ID["here"]
        base, moved, said = (
            model.states(problems.pixels, ids),
            model.states(problems.pixels + last, ids),
            model.states(problems.pixels, other),
        )
        changed = models.PATCHES + n + 1
        assert not torch.allclose(base[:, 0], moved[:, 0])
        assert torch.equal(base[:, :changed], said[:, :changed])
        assert not torch.allclose(base[:, -1], said[:, -1])
        image = torch.full((1, models.PATCHES), model.config.image_token_id)
        mask = torch.ones(1, models.PATCHES + ids.shape[1])
        whole = model(torch.cat([image, ids], 1), mask, pixel_values=problems.pixels).logits
        torch.testing.assert_close(whole, model.head(base))
        mask[0, changed] = 0
        base, said = (model(torch.cat([image, x], 1), mask, pixel_values=problems.pixels).logits for x in (ids, other))
        assert torch.equal(base[:, changed + 1 :], said[:, changed + 1 :])

    def test_a_warm_start_is_kept_by_content(self, tmp_path):
        with mock.patch.object(keep, "FOLDER", tmp_path), mock.patch.object(models, "WARM_START_LR", 1e-3):
            made = models.warm_started(3, 0.5, steps=2)
            with mock.patch.object(models, "warm_start", side_effect=AssertionError):
                again = models.warm_started(3, 0.5, steps=2)
            models.warm_started(3, 0.7, steps=2)
            with mock.patch.object(torch, "get_num_threads", return_value=7):
                models.warm_started(3, 0.5, steps=2)
        assert len(list(tmp_path.iterdir())) == 3
        assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))


class TestSignals:
    def test_contrasts_are_of_the_streams(self, model, batch):
        sampled, signals = batch
        assert signals.keys() >= {name for method in METHODS.values() for name in method.needs}
        current = rollouts.policy_logps(model, sampled)
        torch.testing.assert_close(current.detach(), signals["logps"])
        first = sampled.reading.role_ids == Role.PERCEPTION
        assert (signals["corrupted_logps"] - signals["logps"])[first].abs().max() > 0.1

    def test_streams_are_those_of_forwards_of_the_model(self, model, batch):
        """The corrupted pictures of the same draws, and sequences without the perception, at unchanged positions."""
        sampled, signals = batch
        pixels = rollouts.CORRUPTION.on_inputs(
            {"pixel_values": sampled.problems.pixels}, models.LAYOUT, generator=seeded()
        )["pixel_values"]
        dark = sampled._replace(problems=sampled.problems._replace(pixels=pixels))
        expected = rollouts.policy_logps(model, dark).detach()
        mask = sampled.mask
        torch.testing.assert_close(signals["corrupted_logps"][mask], expected[mask], rtol=0, atol=1e-5)
        roles = sampled.reading.role_ids
        compared = 0
        for i in range(12):
            text = torch.cat([sampled.problems.prompt_ids[i], sampled.ids[i]])
            image = torch.full((models.PATCHES,), model.config.image_token_id)
            ids = torch.cat([image, text])
            kept = torch.cat([torch.ones(models.PREFIX, dtype=torch.bool), mask[i] & (roles[i] != Role.PERCEPTION)])
            columns = kept.nonzero()[:, 0]
            logits = model(
                ids[kept][None], torch.ones(1, len(columns)), columns[None], sampled.problems.pixels[i : i + 1]
            ).logits[0]
            said = columns[models.PREFIX :]
            logps = logits.log_softmax(-1)[models.PREFIX - 1 : -1].gather(-1, ids[said][:, None])[:, 0]
            own = torch.full((len(ids),), torch.nan).index_copy(0, said, logps.detach())[models.PREFIX :]
            where = mask[i] & (roles[i] == Role.REASONING) & (roles[i] == Role.PERCEPTION).any()
            torch.testing.assert_close(signals["ablated_logps"][i][where], own[where], rtol=0, atol=1e-5)
            compared += int(where.sum())
        assert compared > 20

    def test_only_what_is_needed_is_scored(self, model, batch):
        assert "corrupted_logps" not in rollouts.score(model, batch[0], seeded(), METHODS["grpo"].needs)

    def test_labels(self, batch):
        sampled, signals = batch
        cells = train.cells(sampled, signals)
        assert (sampled.ids[cells["fillers"]] >= task.ID[task.FILLERS[0]]).all()
        for name in ("wrong digits, A < 0", "right digits, A > 0"):
            assert task.is_digit(sampled.ids[cells[name]]).all()
        assert not (cells["wrong digits, A < 0"] & cells["right digits, A < 0"]).any()


class TestGradient:
    def test_one_forward_pass_gives_the_gradient_of_each_loss(self, model, batch, more):
        sampled, signals = batch
        weights = variants.all_weights(sampled, signals, more)
        assert tuple(weights) == NAMES
        steps = [gradient.uphill(name, w, signals) for name, w in weights.items()]
        found = gradient.gradients(model, sampled, steps)
        for name in ("grpo", "srpo_signed", "papo", "vppo"):
            loss = rollouts.loss(name, rollouts.policy_logps(model, sampled), weights[name], signals)
            direct = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
            torch.testing.assert_close(found[NAMES.index(name)], -direct, rtol=1e-4, atol=1e-7)
        direction = torch.randn(found.shape[1], generator=seeded(3))
        slope = gradient.slopes(model, sampled, direction)
        along = torch.stack([(step * slope).sum() for step in steps])
        torch.testing.assert_close(along, found @ direction, rtol=1e-3, atol=1e-4)

    def test_controls_move_the_weights_they_should(self, batch, more):
        sampled, signals = batch
        weights = variants.all_weights(sampled, signals, more)
        credited = sampled.reading.role_ids != Role.OTHER
        fillers = weights["oracle: fillers"]
        assert fillers[sampled.fillers].min() > fillers[credited & ~sampled.fillers].max()
        wrong = train.cells(sampled, signals)["wrong digits, A < 0"]
        assert weights["oracle: wrong digits"][wrong].min() > 1.0
        for name in ("oracle: wrong digits", "oracle: first error"):
            assert (weights[name][signals["advantages"] >= 0] == sampled.mask[signals["advantages"] >= 0]).all()
        some = credited.any(1)
        means = (fillers * credited).sum(1)[some] / credited.sum(1)[some]
        torch.testing.assert_close(means, torch.ones_like(means))

    def test_the_objective_is_the_gradient_of_its_parts(self, model):
        with mock.patch.multiple(gradient, OBJECTIVE_PROMPTS=4, OBJECTIVE_ROLLOUTS=4):
            parts = [gradient.objective_part(model, 5 + 10_000 * k) for k in range(3)]
            found = gradient.objective(model, 3, 5)
        torch.testing.assert_close(found.direction, sum(parts) / 3)
        products = [(a @ b).item() for i, a in enumerate(parts) for j, b in enumerate(parts) if i != j]
        squared = sum(products) / 6
        assert found.length == pytest.approx(squared**0.5, rel=1e-4) if squared > 0 else np.isnan(found.length)

    def test_the_same_seed_gives_the_same_numbers(self, model):
        target = gradient.Objective(torch.ones(sum(p.numel() for p in model.parameters())), 1.0)
        with mock.patch.multiple(gradient, TOGETHER=1, PROMPTS=2):
            twice = [gradient.measure(model, 0.5, target, 2, 1, 9) for _ in range(2)]
            other = gradient.measure(model, 0.5, target, 2, 1, 10)
        assert twice[0].efficiency.shape == (len(NAMES), 2)
        np.testing.assert_array_equal(twice[0].efficiency, twice[1].efficiency)
        np.testing.assert_array_equal(twice[0].agreement, twice[1].agreement)
        assert not np.array_equal(twice[0].efficiency, other.efficiency)

    def test_the_first_error(self):
        """The asked digits are 3 and 4, and their sum 7; the digits that are not asked do not count."""
        seen = "<perception> first 1 second {} third 8 fourth {} </perception>"
        texts = [seen + " <think> second is {} fourth is {} {} + {} = {} </think>"] * 5
        said = [
            (3, 4, 3, 4, 3, 4, 7),
            (3, 5, 3, 5, 3, 5, 8),
            (2, 4, 2, 4, 2, 4, 7),
            (3, 4, 1, 5, 1, 5, 6),
            (3, 4, 3, 4, 3, 4, 9),
        ]
        ids = torch.tensor([[task.ID[w] for w in text.format(*x).split()] for text, x in zip(texts, said, strict=True)])
        digits, asked = torch.tensor([[0, 3, 0, 4]] * 5), torch.tensor([[1, 3]] * 5)
        ones = torch.zeros(5, dtype=torch.long)
        problems = task.Problems(torch.zeros(5, 1, 8, 32), digits, asked, ones, ones)
        mask = torch.ones_like(ids, dtype=torch.bool)
        sampled = rollouts.Rollouts(problems, ids, mask, task.read(ids, mask), ones.float(), ones)
        found = variants.first_error(sampled)
        assert [task.WORDS[i] for i in ids[found].tolist()] == ["5", "2", "1", "5", "9"]
        assert found.sum(1).tolist() == [0, 1, 1, 2, 1]
        assert [found[i].nonzero()[0].item() for i in range(1, 5)] == [8, 4, 13, 21]


class TestSiblings:
    def test_the_sibling_is_right_and_of_the_same_prompt(self, batch):
        sampled, _ = batch
        found = variants.right_sibling(sampled)
        here = torch.arange(len(found))
        others = [
            [j for j in here.tolist() if j != i and sampled.group_ids[j] == sampled.group_ids[i] and sampled.rewards[j]]
            for i in here.tolist()
        ]
        assert any(others)
        assert all((j in others[i]) if others[i] else j == i for i, j in enumerate(found.tolist()))

    def test_one_of_them_is_the_library_s(self, batch, more):
        sampled, signals = batch
        own = variants.sibling_weights(signals, more, perception="kl", **variants.WIDE)
        usual = sampled.reading.parsed
        assert (usual & (signals["advantages"] < 0)).sum() > 5
        assert torch.equal(METHODS["srpo_sibling"](**signals)[usual], own[usual])

    def test_contradicted_evidence_is_blamed_and_other_evidence_spared(self, batch, more):
        _, signals = batch
        weights = variants.sibling_weights(signals, more)
        evidence = variants.contrast("srpo", signals)
        failing = (signals["advantages"] < 0)[:, None] & (signals["role_ids"] == Role.PERCEPTION)
        assert failing.any()
        for i in failing.any(1).nonzero()[:, 0].tolist():
            own = failing[i]
            followed = torch.where(more["contradicted"][i], evidence[i], -evidence[i])[own]
            order = followed.argsort()
            assert (weights[i][own][order].diff() >= -1e-5).all()
        right = signals["advantages"] > 0
        torch.testing.assert_close(weights[right], METHODS["srpo"](**signals)[right])


class TestAnswers:
    def found(self, factors: dict[str, dict[str, float]], policies: int = 20, noise: float = 0.02) -> dict:
        """Rows of policies that differ, where methods are so many times as good as GRPO."""
        rng = np.random.default_rng(0)
        rows = []
        for setting, own in factors.items():
            for seed in range(policies):
                base = 0.1 + 0.05 * rng.random()
                rows += [
                    [setting, seed, name, base * (own.get(name, 1.0) + noise * rng.normal())] for name in variants.NAMES
                ]
        seeds = list(range(policies))
        settings = {name: {} for name in factors}
        return {"rows": rows, "settings": settings, "looking": seeds[::2], "confirming": seeds[1::2]}

    def test_a_ratio_is_paired_over_policies(self):
        rng = np.random.default_rng(0)
        base = rng.uniform(0.01, 1.0, 10)
        ratio = answers.ratio(1.3 * base, base)
        assert ratio[:3] == pytest.approx((1.3, 1.3, 1.3))
        assert ratio.p < 0.01
        assert answers.ratio(base, base).p == 1.0
        x = base + rng.normal(size=10)
        assert answers.ratio(x, base).p == pytest.approx(stats.ttest_rel(x, base).pvalue)
        assert all(np.isnan(answers.ratio(base, -base)))
        assert np.isnan(answers.ratio(base[:1], base[:1]).low)

    def test_the_interval_holds_the_truth_as_often_as_it_says(self):
        rng = np.random.default_rng(1)
        held = 0
        for _ in range(2000):
            y = 0.15 + 0.04 * rng.normal(size=10)
            x = 1.2 * 0.15 + 0.04 * rng.normal(size=10)
            ratio = answers.ratio(x, y)
            held += ratio.low < 1.2 < ratio.high
        assert held / 2000 == pytest.approx(0.95, abs=0.02)

    def test_gaps(self):
        """Where nothing varies, the sign is all that is left."""
        assert answers.gap(np.zeros(4)) == (0.0, 0.0, 0.0, 1.0)
        assert answers.gap(np.full(4, -2.0)) == (-2.0, 0.0, -np.inf, 0.0)
        x = np.random.default_rng(2).normal(0.1, 1.0, size=9)
        found, expected = answers.gap(x), stats.ttest_1samp(x, 0.0)
        assert (found.t, found.p) == pytest.approx((expected.statistic, expected.pvalue))
        low, high = expected.confidence_interval()
        assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
        assert all(np.isnan(answers.gap(x[:1])[1:]))

    def test_holm(self):
        assert answers.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
        assert answers.holm([]) == []
        assert answers.holm([np.nan, 0.01, np.nan, 0.02]) == pytest.approx([1.0, 0.04, 1.0, 0.06])

    def test_advice(self):
        better, worse = {"srpo_signed": 1.3}, {"srpo_signed": 0.7}
        by_text = {a.question.text: a for a in answers.answered(self.found({"start": better, "later": better}))}
        asked = by_text["evidence or advantage direction?"]
        assert asked.advice == "Try srpo_signed: better at start, later, worse nowhere."
        assert by_text["which bounds? (evidence)"].advice == "No difference seen."
        assert by_text["another method than GRPO?"].option == "srpo_signed"
        asked = answers.answered(self.found({"start": better, "later": worse}))[0]
        assert asked.advice == "It depends: srpo_signed is better at start, worse at later."
        asked = answers.answered(self.found({"start": worse, "later": {}}))[0]
        assert asked.advice == "Stay with srpo: srpo_signed is worse at start."
        assert answers.answered(self.found({"start": better}, policies=3)) == []

    def test_noise_alone_answers_nothing(self):
        asked = answers.answered(self.found({"start": {}, "later": {}, "last": {}}, noise=0.3))
        assert {a.advice for a in asked} == {"No difference seen."}

    def test_the_option_is_chosen_by_the_looking_half_alone(self):
        found = self.found({"start": {}})
        for row in found["rows"]:
            if row[2] == "papo" and row[1] in found["confirming"]:
                row[3] *= 2
            if row[2] == "vppo" and row[1] in found["looking"]:
                row[3] *= 2
        asked = {a.question.text: a for a in answers.answered(found)}["another method than GRPO?"]
        assert asked.option == "vppo"
        assert asked.seen == {"start": answers.EQUAL}

    def test_a_setting_where_all_is_noise_chooses_little(self):
        found = self.found({"start": {"vppo": 1.1}, "noisy": {"papo": 9.0}})
        rng = np.random.default_rng(3)
        for row in found["rows"]:
            if row[0] == "noisy":
                row[3] += rng.normal(scale=30.0) if row[2] == "papo" else 0.0
        asked = {a.question.text: a for a in answers.answered(found)}["another method than GRPO?"]
        assert asked.option == "vppo"

    def test_an_option_that_is_nan_somewhere_is_not_chosen_for_it(self):
        found = self.found({"start": {"vppo": 1.1}, "later": {}})
        for row in found["rows"]:
            if row[0] == "later" and row[2] == "srpo":
                row[3] = float("nan")
        asked = {a.question.text: a for a in answers.answered(found)}["another method than GRPO?"]
        assert asked.option == "vppo"


class TestSpread:
    def test_spreads_are_those_of_drawn_tokens(self):
        """A million draws from two distributions that are known."""
        p, q = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]).double(), torch.tensor([[0.3, 0.5, 0.2]]).double()
        kl = (p * (p / q).log()).sum(-1)
        rows = {row["kind"]: row for row in spread._spreads("perception", p.log(), q.log().expand(2, -1), kl.float())}
        drawn = torch.multinomial(p, 1_000_000, replacement=True, generator=seeded())
        ratio = (p.log() - q.log()).gather(1, drawn)
        for kind, x in (("log-ratio", ratio), ("k3", (-ratio).exp() - 1 + ratio)):
            assert rows[kind]["mean"] == pytest.approx(x.mean().item(), abs=2e-3)
            assert rows[kind]["within"] == pytest.approx(x.var(1).mean().sqrt().item(), rel=5e-3)
            assert 0 < rows[kind]["luck"] < 1
        assert (rows["kl"]["within"], rows["kl"]["luck"]) == (0, 0)
        assert rows["kl"]["between"] == pytest.approx(kl.std().item(), rel=1e-4)

    def test_a_divergence_that_is_wrong_ends_the_run(self):
        p = torch.tensor([[0.7, 0.3]]).double().log()
        with pytest.raises(AssertionError, match="nats off the sum"):
            spread._spreads("perception", p, p.flip(1), torch.tensor([0.5]))

    def test_of_a_policy(self, model, monkeypatch):
        monkeypatch.setattr(spread, "PROBLEMS", 4)
        monkeypatch.setattr(spread, "REPEATS", 1)
        found = spread.measure(model, 0.5, 0)
        assert [(row["role"], row["kind"]) for row in found["rows"]] == [
            (role, kind) for role in ("perception", "reasoning") for kind in spread.KINDS
        ]
        assert all(row["mean"] > 0 for row in found["rows"])
        again = spread.measure(model, 0.5, 0)
        assert again["rows"] == found["rows"]


class TestChecks:
    def judge(self, changed: dict[str, float], agreement: float = 0.5, updated: bool = False) -> list[str]:
        values = {"srpo_signed": 1.1, "negated contrast": 0.7, "oracle: fillers": 0.5}
        values |= {"oracle: wrong digits": 1.2, "oracle: first error": 1.7}
        rng = np.random.default_rng(0)
        columns = {name: (values | changed).get(name, 1.0) * (0.1 + 0.001 * rng.normal(size=20)) for name in NAMES}
        agreed = {name: agreement if name in PRESETS else np.nan for name in NAMES}
        return [c["name"] for c in checks.check("start", columns, agreed, updated=updated) if c["outcome"] != checks.OK]

    def test_controls(self):
        assert self.judge({}) == []
        assert self.judge({"negated contrast": 1.05}) == ["the negated contrast is worse than GRPO"]
        assert self.judge({"srpo_signed": 0.6}) == ["the negated contrast is worse than srpo_signed"]
        assert self.judge({"oracle: fillers": 0.97}) == ["fillers up are far worse than GRPO"]
        assert self.judge({"oracle: wrong digits": 0.99}) == ["wrong digits blamed are better than GRPO"]
        room = "there is room: the better oracle gains {} or more"
        assert self.judge({"oracle: first error": 1.3, "oracle: wrong digits": 1.7}) == []
        assert self.judge({"oracle: first error": 1.5}) == [room.format(1.6)]
        assert self.judge({"oracle: first error": 1.5}, updated=True) == []
        assert self.judge({"oracle: first error": 1.3}, updated=True) == [room.format(1.4)]
        assert self.judge({}, agreement=-0.5) == ["weights follow what they should"]
        assert self.judge({"negated contrast": 1.2, "srpo_signed": 0.8}, updated=True) == []
        assert self.judge({"oracle: fillers": 0.97}, updated=True) == ["fillers up are far worse than GRPO"]

    @pytest.mark.parametrize("name", [n for n in METHODS if n not in ("grpo", "papo")])
    def test_negated_weights_are_detected(self, name, batch):
        sampled, signals = batch
        weights = METHODS[name](**signals)
        assert variants.agreement(name, weights, signals) > checks.LEAST_AGREEMENT
        assert variants.agreement(name, (2.0 - weights) * sampled.mask, signals) < 0.0

    def test_a_method_with_negated_weights_breaks_the_run(self, model, capsys, tmp_path):
        true = METHODS["srpo"]
        swapped = Method("srpo", true.needs, "", "", "", lambda **s: (2.0 - true(**s)) * s["completion_mask"])
        small = {"QUICK": {"start": learn_grounding.Setting(0.5, 0, 4, 2, 2)}, "checkpoint": lambda *_: model}
        replaced = {name: swapped if name == "srpo" else method for name, method in METHODS.items()}
        with (
            mock.patch.multiple(learn_grounding, **small),
            mock.patch.multiple(variants, METHODS=replaced),
            mock.patch.multiple(gradient, OBJECTIVE_PROMPTS=16, OBJECTIVE_ROLLOUTS=4, TOGETHER=1),
            mock.patch.object(keep, "FOLDER", tmp_path),
        ):
            assert learn_grounding.main(["--quick", "--workers", "1"]) == 1
        assert "weights follow what they should: srpo -0." in capsys.readouterr().out


def test_a_run_leaves_its_policy_alone(model):
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    with mock.patch.multiple(train, TEST_PROBLEMS=8, STATISTICS_PROMPTS=2):
        train.run(model, "srpo", 0, steps=1, last=8)
    assert torch.equal(before, torch.cat([p.flatten() for p in model.parameters()]))


@pytest.fixture(scope="module")
def written(model, tmp_path_factory) -> pathlib.Path:
    """The file of a tiny run of both kinds, with its charts."""
    path = tmp_path_factory.mktemp("grounding") / "cpu.json"
    kept = ("start", "strong shortcut")
    small = {name: learn_grounding.SETTINGS[name]._replace(batches=1, lengths=1, parts=2) for name in kept}
    with (
        mock.patch.multiple(learn_grounding, SETTINGS=small, checkpoint=lambda *_: model),
        mock.patch.multiple(gradient, OBJECTIVE_PROMPTS=16, OBJECTIVE_ROLLOUTS=4, TOGETHER=1, PROMPTS=2),
        mock.patch.object(keep, "FOLDER", path.parent / "kept"),
        mock.patch.multiple(train, TEST_PROBLEMS=32, STATISTICS_PROMPTS=4, EVERY=2),
    ):
        learn_grounding.main(["--workers", "1", "--seeds", "4", "--json", str(path)])
        with mock.patch.object(gradient, "measure", side_effect=AssertionError("measured once more")):
            learn_grounding.main(["--workers", "1", "--seeds", "4", "--json", str(path)])
        shape = ["--seeds", "2", "--steps", "3", "--test", "64", "--methods", "grpo", "srpo"]
        assert learn_grounding.main(["--train", "--workers", "1", *shape, "--json", str(path), "--plot"]) == 0
    return path


class TestFiles:
    def test_what_is_written(self, written):
        known = json.loads(written.read_text())
        assert list(known["gradient"]["settings"]) == ["start", "strong shortcut"]
        gradients = known["gradient"]
        assert (gradients["looking"], gradients["confirming"]) == ([0, 2], [1, 3])
        rows = [tuple(row[:3]) for row in gradients["rows"]]
        assert sorted(rows) == sorted((s, seed, m) for s in gradients["settings"] for seed in range(4) for m in NAMES)
        assert [(r["method"], r["seed"]) for r in known["runs"]["runs"]] == [
            ("grpo", 0), ("srpo", 0), ("grpo", 1), ("srpo", 1)
        ]  # fmt: skip
        for run in known["runs"]["runs"]:
            assert run["steps"] == [0, 2, 3]
            assert run["curve"][0].keys() == train.MEASURES.keys()
        charts = sorted(chart.name for chart in written.parent.glob("*.png"))
        assert charts == ["cpu-answers.png", "cpu-curves.png", "cpu-efficiency.png", "cpu-weights.png"]

    def test_the_section_says_what_the_file_holds(self, written, tmp_path):
        text = report.section(written)
        known = json.loads(written.read_text())
        own = answers.columns(known["gradient"], "start")
        assert str(answers.ratio(own["tor"], own["grpo"])) in text
        assert all(a.advice in text for a in answers.answered(known["gradient"]))
        changed = tmp_path / "cpu.json"
        for row in known["gradient"]["rows"]:
            row[3] = 7.77 if row[2] == "tor" else 1.0
        changed.write_text(json.dumps(known))
        assert "7.77 [7.77, 7.77]" in report.section(changed)
        readme = f"before\n{report.BEGIN}\n\nwhat was there\n\n{report.END}\nafter"
        made = report.with_section(readme, written)
        assert text in made
        assert "what was there" not in made
        assert report.with_section(made, written) == made
        assert report.with_section("no markers", written) == "no markers"

    def test_the_guide_shows_what_the_file_holds(self):
        guide = report.GUIDE.read_text()
        assert report.BEGIN in guide
        assert report.with_section(guide) == guide

    def test_words_for_a_difference(self):
        def found(gaps: list[float]) -> dict:
            point = dict.fromkeys(train.MEASURES, 0.5) | {"formed": 1.0}
            made = []
            for seed, gap in enumerate(gaps):
                for method, value in (("grpo", 0.7 + 0.01 * seed), ("srpo", 0.7 + 0.01 * seed + gap)):
                    curve = [point, point | {"accuracy": value}]
                    made.append({"method": method, "seed": seed, "curve": curve, "rewards": [0.5]})
            return {"seeds": list(range(len(gaps))), "runs": made}

        assert "no difference beyond noise" in runs.sentences(found([0.02, -0.03, 0.01, 0.0]))[1]
        assert ": more; none of 4 runs collapsed" in runs.sentences(found([0.04, 0.05, 0.04, 0.05]))[1]
        assert "which says nothing" in runs.sentences(found([0.04]))[1]
        assert "2 of 4 runs collapsed" in runs.sentences(found([0.0, 0.0, -0.6, -0.6]))[1]

    @pytest.mark.parametrize(
        ("named", "arguments"),
        [("--seeds", ["--seeds", "0"]), ("--json", ["--plot"]), ("grpo", ["--train", "--methods", "srpo"])],
    )
    def test_wrong_arguments_are_named(self, named, arguments, capsys):
        with pytest.raises(SystemExit):
            learn_grounding.parse(arguments)
        assert named in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_workers(model):
    draws = [(model, k) for k in range(3)]
    found = []
    for count in (1, 2):
        with Progress(disable=True) as progress, Workers(count, progress) as workers:
            found.append(torch.stack(workers.map("objectives", gradient.objective_part, draws)))
    assert torch.equal(*found)


@pytest.mark.slow
def test_the_quick_run(tmp_path):
    run = run_python("benchmarks/learn_grounding.py", "--quick", "--json", tmp_path / "quick.json")
    assert run.returncode == 0, run.stdout + run.stderr
    assert all(
        c["outcome"] == checks.OK for c in json.loads((tmp_path / "quick.json").read_text())["gradient"]["checks"]
    )
