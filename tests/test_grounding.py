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
from grounding import checks, gradient, report, rollouts, runs, spread, task, train  # noqa: E402
from grounding import model as models  # noqa: E402
from grounding.workers import Workers  # noqa: E402
from rich.progress import Progress  # noqa: E402

from srpo import METHODS, PRESETS, Role  # noqa: E402
from srpo.methods.table import Method  # noqa: E402

NAMES = [*METHODS, *gradient.CONTROLS]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model() -> models.PrefixVLM:
    """A policy that knows the format, and little else."""
    return models.warm_start(0, 0.5, steps=60)


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
        computed = task.apply(problems.operation, *stated.unbind(1))
        assert reading.parsed.all()
        assert ((reading.answer == computed) | (reading.answer == problems.hint)).all()
        assert (stated[:, 0] != problems.left).float().mean().item() == pytest.approx(0.9 * 0.15, abs=0.02)
        assert (reading.answer != computed).float().mean().item() == pytest.approx(0.15 * 0.87, abs=0.02)
        assert set(mask.sum(1).tolist()) == set(range(15, 24))

    def test_malformed_completions_state_nothing(self):
        texts = ["<perception> 3 </perception> <answer> 4", "<answer>", "3 4 <answer> the", "<perception> 1 2 3"]
        rows = [[task.ID[word] for word in text.split()] for text in texts]
        ids = torch.tensor([row + [task.PAD] * (8 - len(row)) for row in rows])
        reading = task.read(ids, ids != task.PAD)
        assert reading.answer.tolist() == [4, -1, -1, -1]
        assert (reading.stated == -1).all()

    def test_an_answer_in_the_last_column_counts(self):
        ids = torch.tensor([[task.ID["the"], task.ID["<answer>"], task.ZERO + 4], [0, 0, task.ID["<answer>"]]])
        assert task.read(ids, torch.ones_like(ids, dtype=torch.bool)).answer.tolist() == [4, -1]


class TestModel:
    def test_size(self):
        assert sum(p.numel() for p in models.PrefixVLM().parameters()) == pytest.approx(110_000, rel=0.05)

    def test_the_cache_changes_nothing(self, model):
        problems = task.draw(16, seeded(), held_out=True, p_hint=0.0)
        with mock.patch.object(torch, "multinomial", lambda chances, *_, **__: chances.argmax(-1, keepdim=True)):
            ids, mask = model.sample(problems, seeded())
        states = model.states(problems.pixels, torch.cat([problems.prompt_ids, ids], 1))
        greedy = model.head(states[:, models.PREFIX - 1 : -1]).argmax(-1)
        assert torch.equal(greedy[mask], ids[mask])

    def test_what_sees_what(self, model):
        problems = task.draw(1, seeded(), held_out=True, p_hint=0.0)
        ids = torch.cat([problems.prompt_ids, torch.full((1, 4), task.ID["the"])], 1)
        last = torch.zeros_like(problems.pixels)
        last[..., -4:, -4:] = 1.0
        other = ids.clone()
        other[0, 4] = task.ID["here"]
        base, moved, said = (
            model.states(problems.pixels, ids),
            model.states(problems.pixels + last, ids),
            model.states(problems.pixels, other),
        )
        changed = models.PATCHES + 4
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
        with mock.patch.object(models, "CACHE", tmp_path), mock.patch.object(models, "WARM_START_LR", 1e-3):
            made = models.warm_started(3, 0.5, steps=2)
            with mock.patch.object(models, "warm_start", side_effect=AssertionError):
                again = models.warm_started(3, 0.5, steps=2)
            models.warm_started(3, 0.7, steps=2)
        assert len(list(tmp_path.iterdir())) == 2
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
    def test_one_forward_pass_gives_the_gradient_of_each_loss(self, model, batch):
        sampled, signals = batch
        weights = gradient.all_weights(sampled, signals)
        assert list(weights) == NAMES
        found = gradient.method_gradients(model, sampled, signals, weights)
        for name in ("grpo", "srpo_signed", "papo", "vppo"):
            loss = rollouts.loss(name, rollouts.policy_logps(model, sampled), weights[name], signals)
            direct = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
            torch.testing.assert_close(found[NAMES.index(name)], -direct, rtol=1e-4, atol=1e-7)

    def test_controls_move_the_weights_they_should(self, batch):
        sampled, signals = batch
        weights = gradient.all_weights(sampled, signals)
        credited = sampled.reading.role_ids != Role.OTHER
        fillers = weights["oracle: fillers"]
        assert fillers[sampled.fillers].min() > fillers[credited & ~sampled.fillers].max()
        blamed = weights["oracle: wrong digits"]
        wrong = train.cells(sampled, signals)["wrong digits, A < 0"]
        assert blamed[wrong].min() > 1.0
        assert (blamed[signals["advantages"] >= 0] == sampled.mask[signals["advantages"] >= 0]).all()
        means = (fillers * credited).sum(1) / credited.sum(1)
        torch.testing.assert_close(means, torch.ones_like(means))

    def test_efficiencies_of_gradients_that_are_known(self):
        rng = np.random.default_rng(0)
        d = np.array([3.0, 4.0, 0.0, 0.0])
        noise = rng.normal(size=(500, 4))
        g = np.stack([d + noise, 2 * (d + noise), -d + noise, d + 3 * noise])
        parts = d + 0.1 * rng.normal(size=(6, 4))
        products = gradient.Products(
            np.einsum("mbp,kp->mbk", g, parts)[:, :, None],
            np.square(g).sum(-1),
            (parts @ parts.T)[None],
            np.zeros((4, 500)),
        )
        found = gradient.efficiencies(products)
        assert found.absolute[0, :, 0] == pytest.approx([5 / 29**0.5, 5 / 29**0.5, -5 / 29**0.5, 5 / 61**0.5], abs=0.02)
        np.testing.assert_allclose(found.relative[:, 1], 1.0)  # a longer step in the same direction
        value, low, high = gradient.interval(found.relative[:, 3, 0])
        assert low < value < high < 1.0

    def test_the_same_seed_gives_the_same_numbers(self, model):
        with mock.patch.multiple(gradient, OBJECTIVE_PROMPTS=16, OBJECTIVE_ROLLOUTS=4):
            parts = torch.stack([gradient.objective_part(model, k) for k in range(2)])
        twice = [gradient.measure(model, 0.5, parts, 2, 9) for _ in range(2)]
        other = gradient.measure(model, 0.5, parts, 2, 10)
        for a, b, c in zip(*twice, other, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a is not c
        assert not np.array_equal(twice[0].squares, other.squares)


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
        values = {"srpo_signed": 1.1, "negated contrast": 0.7, "oracle: fillers": 0.5, "oracle: wrong digits": 1.4}
        column = np.array([(values | changed).get(name, 1.0) for name in NAMES])
        draws = column[:, None] + 0.01 * np.random.default_rng(0).normal(size=(200, len(NAMES), 1))
        agreed = np.array([agreement if name in PRESETS else np.nan for name in NAMES])
        return [
            c["name"]
            for c in checks.check("start", NAMES, gradient.Efficiency(draws, draws), agreed, updated=updated)
            if c["outcome"] != checks.OK
        ]

    def test_controls(self):
        assert self.judge({}) == []
        assert self.judge({"negated contrast": 1.05}) == ["the negated contrast is worse than GRPO"]
        assert self.judge({"srpo_signed": 0.7}) == ["srpo_signed is better than its negation"]
        assert self.judge({"oracle: fillers": 0.97}) == ["fillers up are far worse than GRPO"]
        assert self.judge({"oracle: wrong digits": 1.05}) == ["wrong digits blamed are far better than GRPO"]
        assert self.judge({}, agreement=-0.5) == ["weights follow what they should"]
        assert self.judge({"negated contrast": 1.2, "srpo_signed": 0.8}, updated=True) == []
        assert self.judge({"oracle: fillers": 0.97}, updated=True) == ["fillers up are far worse than GRPO"]

    @pytest.mark.parametrize("name", [n for n in METHODS if n not in ("grpo", "papo")])
    def test_negated_weights_are_detected(self, name, batch):
        sampled, signals = batch
        weights = METHODS[name](**signals)
        assert gradient.agreement(name, weights, signals) > checks.LEAST_AGREEMENT
        assert gradient.agreement(name, (2.0 - weights) * sampled.mask, signals) < 0.0

    def test_a_method_with_negated_weights_breaks_the_run(self, model, capsys):
        true = METHODS["srpo"]
        swapped = Method("srpo", true.needs, "", "", "", lambda **s: (2.0 - true(**s)) * s["completion_mask"])
        small = {"QUICK": {"start": learn_grounding.Setting(0.5, 0, 4, 2)}, "checkpoint": lambda *_: model}
        replaced = {name: swapped if name == "srpo" else method for name, method in METHODS.items()}
        with (
            mock.patch.multiple(learn_grounding, **small),
            mock.patch.multiple(gradient, METHODS=replaced),
            mock.patch.multiple(gradient, OBJECTIVE_PROMPTS=16, OBJECTIVE_ROLLOUTS=4, RESAMPLES=50),
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
    small = {name: s._replace(batches=4, parts=2) for name, s in learn_grounding.SETTINGS.items()}
    with (
        mock.patch.multiple(learn_grounding, SETTINGS=small, checkpoint=lambda *_: model),
        mock.patch.multiple(gradient, OBJECTIVE_PROMPTS=16, OBJECTIVE_ROLLOUTS=4, RESAMPLES=50),
        mock.patch.multiple(train, TEST_PROBLEMS=32, STATISTICS_PROMPTS=4, EVERY=2),
    ):
        learn_grounding.main(["--workers", "1", "--seeds", "2", "--json", str(path)])
        shape = ["--seeds", "2", "--steps", "3", "--test", "64", "--methods", "grpo", "srpo"]
        assert learn_grounding.main(["--train", "--workers", "1", *shape, "--json", str(path), "--plot"]) == 0
    return path


class TestFiles:
    def test_what_is_written(self, written):
        known = json.loads(written.read_text())
        assert known["gradient"]["settings"].keys() == learn_grounding.SETTINGS.keys()
        for setting in known["gradient"]["settings"].values():
            assert [row["method"] for row in setting["rows"]] == NAMES
            assert all(len(row["by_seed"]) == 2 for row in setting["rows"])
        assert [(r["method"], r["seed"]) for r in known["runs"]["runs"]] == [
            ("grpo", 0), ("srpo", 0), ("grpo", 1), ("srpo", 1)
        ]  # fmt: skip
        for run in known["runs"]["runs"]:
            assert run["steps"] == [0, 2, 3]
            assert run["curve"][0].keys() == train.MEASURES.keys()
        charts = sorted(chart.name for chart in written.parent.glob("*.png"))
        assert charts == ["cpu-curves.png", "cpu-efficiency.png", "cpu-weights.png"]

    def test_the_section_says_what_the_file_holds(self, written, tmp_path):
        text = report.section(written)
        row = json.loads(written.read_text())["gradient"]["settings"]["start"]["rows"][1]
        assert "{:.2f} [{:.2f}, {:.2f}]".format(*row["relative"][0]) in text
        changed = tmp_path / "cpu.json"
        known = json.loads(written.read_text())
        known["gradient"]["settings"]["start"]["rows"][1]["relative"][0] = [7.77, 7.0, 8.0]
        changed.write_text(json.dumps(known))
        assert "7.77 [7.00, 8.00]" in report.section(changed)
        readme = f"before\n{report.BEGIN}\n\nold\n\n{report.END}\nafter"
        made = report.with_section(readme, written)
        assert text in made
        assert "old" not in made
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
