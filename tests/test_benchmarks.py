"""The benchmark's gate, meters, files and charts. What it measures is not tested here."""

import json
import pathlib
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from processes import run_python

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_loss  # noqa: E402
import bench_scoring  # noqa: E402
import credit_level  # noqa: E402
import growth  # noqa: E402
import hidden_level  # noqa: E402
import logits_level  # noqa: E402
import measure  # noqa: E402
import report  # noqa: E402
import shapes  # noqa: E402
from providers import Provider  # noqa: E402

from srpo import METHODS  # noqa: E402

CPU = torch.device("cpu")
SMALL = shapes.Shape(2, 8, 301, 48)
DTYPES = [torch.float32, torch.bfloat16]


def scaled(provider: Provider, factor: float) -> Provider:
    """A provider whose loss and gradients are a little too large."""
    return replace(provider, loss=lambda *inputs: factor * provider.loss(*inputs))


def wrong_logits(inputs: logits_level.Inputs, provider: Provider, truth: logits_level.Truth) -> str | None:
    return inputs.wrong(inputs.loss_and_gradient(provider), truth)


def wrong_hidden(inputs: hidden_level.Inputs, provider: Provider, truth: hidden_level.Truth) -> str | None:
    return inputs.wrong(inputs.loss_and_gradients(provider), truth, provider.weighted)


class TestGate:
    @pytest.mark.parametrize("n_streams", [0, 1, 2])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_logits(self, n_streams, dtype):
        inputs = logits_level.make_inputs(SMALL, dtype, CPU, n_streams)
        truth = inputs.truth()
        for name in ("eager", "TRL", "srpo"):
            provider = logits_level.PROVIDERS[name]
            if (name, dtype) != ("TRL", torch.bfloat16):  # its log-probs are bf16 there: the gate may refuse them
                assert wrong_logits(inputs, provider, truth) is None
            assert "gradient" in wrong_logits(inputs, scaled(provider, 1.05), truth)
        assert "gradient" in wrong_logits(inputs, logits_level.PROVIDERS["off-by-one"], truth)

    def test_logits_with_other_weights(self):
        inputs = logits_level.make_inputs(SMALL, torch.float32, CPU, 2)
        truth = inputs.truth()
        swapped = replace(inputs, streams=inputs.streams[::-1])
        assert "gradient" in wrong_logits(swapped, logits_level.PROVIDERS["srpo"], truth)

    def test_truth_does_not_depend_on_its_chunks(self):
        inputs = logits_level.make_inputs(SMALL, torch.float32, CPU, 2)
        with mock.patch.object(logits_level, "TRUTH_ROWS", 5):
            pieces = inputs.truth()
        torch.testing.assert_close(tuple(pieces), tuple(inputs.truth()))
        batch = hidden_level.make_inputs(SMALL, torch.float32, CPU)
        with mock.patch.object(hidden_level, "TRUTH_ROWS", 5):
            parts = batch.truth(plain=True)
        whole = batch.truth(plain=True)
        torch.testing.assert_close(parts.logps, whole.logps)
        for part, full in zip(parts.weighted + parts.plain, whole.weighted + whole.plain, strict=True):
            torch.testing.assert_close(part, full)

    @pytest.mark.parametrize("trains_head", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_hidden(self, dtype, trains_head):
        inputs = replace(hidden_level.make_inputs(SMALL, dtype, CPU), trains_head=trains_head)
        truth = inputs.truth(plain=True)
        for name, provider in hidden_level.PROVIDERS.items():
            if provider.missing(CPU) or provider.compiles or name == "off-by-one":
                continue
            assert wrong_hidden(inputs, provider, truth) is None, name
            assert "gradient" in wrong_hidden(inputs, scaled(provider, 1.05), truth), name
            if provider.logps is not None:
                assert inputs.wrong_logps(inputs.score(provider), truth) is None, name
        wrong = hidden_level.PROVIDERS["off-by-one"]
        assert "gradient" in wrong_hidden(inputs, wrong, truth)
        assert "log-prob" in inputs.wrong_logps(inputs.score(wrong), truth)

    def test_a_wrong_loss_with_right_gradients(self):
        inputs = hidden_level.make_inputs(SMALL, torch.float32, CPU)
        ours = hidden_level.PROVIDERS["srpo"]
        shifted = replace(ours, loss=lambda *given: ours.loss(*given) + 1e-3)
        assert "loss" in wrong_hidden(inputs, shifted, inputs.truth(plain=False))

    def test_credit(self):
        table, methods = credit_level.tables(SMALL, torch.float32, CPU, ["eager", "srpo"], 50.0)
        assert [case.check(case.run()) for case in table.cases.values()] == [None, None]
        assert methods.cases.keys() == METHODS.keys()
        assert all(case.run().shape == (SMALL.B, SMALL.T) for case in methods.cases.values())
        unweighted = Provider(lambda scored: scored.advantages[:, None] * scored.completion_mask)
        with mock.patch.dict(credit_level.PROVIDERS, {"srpo": unweighted}):
            table, _ = credit_level.tables(SMALL, torch.float32, CPU, ["eager", "srpo"], 50.0)
        assert "advantage" in table.cases["srpo"].check(table.cases["srpo"].run())


class TestMeters:
    def test_peak_memory_is_that_of_the_allocation(self):
        def allocate() -> None:
            torch.ones(16 << 20)  # 64 MiB

        assert measure.peak_memory(allocate, CPU) == pytest.approx(64, abs=8)

    def test_memory_that_was_freed_before_is_counted_again(self):
        many = [torch.ones(1 << 14) for _ in range(512)]  # below the size that malloc maps by itself: 32 MiB in all
        del many
        assert measure.peak_memory(lambda: [torch.ones(1 << 14) for _ in range(512)], CPU) == pytest.approx(32, abs=8)

    def test_times_are_interleaved_and_in_milliseconds(self, monkeypatch):
        order, now = [], [0.0]
        monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0]))

        def work(name: str, seconds: list[float]) -> None:
            order.append(name)
            now[0] += seconds[order.count(name) - 1]

        durations = {"a": [0.5, 0.25, 0.75, 0.5, 0.0], "b": [0.125] * 5}  # the last for the memory; exact in binary
        calls = {name: lambda name=name: work(name, durations[name]) for name in durations}
        results = measure.measure(calls, CPU, 4)
        assert order[:8] == ["a", "b"] * 4
        assert (results["a"].p20, results["a"].median, results["a"].p80) == pytest.approx((400, 500, 600))
        assert (results["b"].p20, results["b"].median, results["b"].p80) == (125, 125, 125)

    def test_rounds_end_with_their_time_but_not_before_three(self):
        calls = []
        measure.measure({"a": lambda: calls.append(0)}, CPU, 50, seconds=0.0)
        assert len(calls) == 3 + 1  # the last for the memory


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> pathlib.Path:
    """What one real run writes."""
    path = tmp_path_factory.mktemp("results") / "cpu.json"
    names = ["eager", "TRL", "Liger", "torch cross entropy", "srpo", "off-by-one"]
    arguments = ["--shape", "2", "8", "301", "48", "--repeats", "2", "--provider", *names, "--json", path]
    run = run_python("benchmarks/bench_loss.py", *arguments)
    assert run.returncode == 0, run.stderr
    assert "off-by-one: not timed: gradient is" in run.stdout
    return path


class TestFiles:
    def test_tables(self, results):
        run = json.loads(results.read_text())["loss"]
        assert {"device", "date", "commit", "torch"} <= run["environment"].keys()
        titles = [(table["level"], table["title"]) for table in run["tables"]]
        assert [level for level, _ in titles] == ["logits"] * 4 + ["hidden"] * 3 + ["credit"] * 2
        for table in run["tables"]:
            timed = {row["provider"]: row for row in table["rows"]}
            if table["level"] != "credit":
                assert table["skipped"]["off-by-one"].startswith("not timed")
            if table["title"] == "every method":
                continue
            assert timed["eager"]["x_eager"] == 1.0
            assert timed["srpo"]["of_floor"] > 0.0
            assert timed["srpo"]["p20"] <= timed["srpo"]["ms"] <= timed["srpo"]["p80"]
        assert "needs a GPU" in run["tables"][0]["skipped"]["Liger"]

    def test_text(self, results):
        run = json.loads(results.read_text())["loss"]
        text = report.text_table(run["tables"][5])
        assert "hidden: forward + backward, B=2 T=8 V=301 H=48, float32" in text
        assert "torch cross entropy" in text
        assert "one weight for all tokens" in text
        assert "srpo, 50% of the rows" in text

    def test_growth_and_its_charts(self, results, tmp_path):
        path = tmp_path / "cpu.json"
        path.write_bytes(results.read_bytes())
        small = {
            "ROWS": (256, 512),
            "SIZES": {"cpu": (256, 1024)},
            "VOCABULARIES": (64, 128),
            "MODELS": {"small": (16, 64)},
        }
        with mock.patch.multiple(growth, **small), mock.patch.dict(shapes.MODELS, small["MODELS"]):
            points = growth.run(CPU, torch.float32, {"float32": 0.1}, bench_loss.Progress(disable=True))
        assert {point["axis"] for point in points} == {"rows", "vocabulary", "active rows"}
        assert {point["provider"] for point in points} == {"eager", "TRL", "Liger", "srpo"}
        report.save(path, {"device": "CPU"}, {"copy": 1.0}, [], points)
        known = json.loads(path.read_text())
        assert known["loss"] == json.loads(results.read_text())["loss"]  # what was not measured again stays
        charts = report.plot(path)
        assert [chart.name for chart in charts] == ["cpu-rows.png", "cpu-sizes.png"]
        assert all(chart.stat().st_size > 20_000 for chart in charts)
        assert "active rows" in report.growth_text(points)

    def test_the_pages_show_what_the_files_hold(self):
        guide, readme = report.GUIDE.read_text(), (ROOT / "README.md").read_text()
        assert report.BEGIN in guide
        assert report.with_figures(guide) == guide
        assert bench_scoring.BEGIN in guide
        block = bench_scoring.readme_table()
        assert report.with_block(guide, bench_scoring.BEGIN, bench_scoring.END, block) == guide
        assert report.CLAIMS_BEGIN in readme
        assert report.with_claims(readme) == readme

    @pytest.mark.parametrize(
        "arguments", [["--shape", "2", "8"], ["--shape", "gpt-2"], ["--repeats", "0"], ["--plot"], ["--provider", "x"]]
    )
    def test_wrong_arguments_are_named(self, arguments, capsys):
        with pytest.raises(SystemExit):
            bench_loss.parse(arguments)
        assert arguments[0] in capsys.readouterr().err

    def test_what_does_not_fit_is_skipped(self, capsys):
        with mock.patch.object(bench_loss, "gib_free", return_value=0.0):
            bench_loss.main(["--level", "hidden", "--shape", "2", "8", "301", "48"])
        assert "skipped, needs about" in capsys.readouterr().out
