"""The report of a run: of whole ones, of killed ones, and of what is none; warnings that apply, and only those."""

import json
import re

import pytest
from credit_cases import HOSTILE, record, rollout

from srpo import ConfigError
from srpo.__main__ import main
from srpo.viz import append_records
from srpo.viz.advice import warnings_of
from srpo.viz.curves import chart, number, thinned, ticks
from srpo.viz.report import run_report, summary_text
from srpo.viz.run_log import read_run

HEALTHY = {
    "loss": 0.01, "grad_norm": 0.5, "reward": 0.5, "reward_std": 0.3, "entropy": 1.0, "frac_reward_zero_std": 0.1,
    "completions/clipped_ratio": 0.0, "srpo/parse_failures": 0.01, "srpo/unclosed": 0.0, "srpo/stray": 0.0,
    "srpo/uniform_fraction": 0.02, "srpo/effective_sample_size": 0.97, "srpo/cells_not_scored": 0.0,
    "srpo/contrasts_without_value": 0.0, "srpo/zero_advantage_fraction": 0.1,
    "srpo/perception/positive/contrast_mean": 0.4, "srpo/perception/negative/contrast_mean": 0.3,
    "srpo/perception/positive/clip_fraction": 0.4, "srpo/reasoning/negative/clip_fraction": 0.4,
}  # fmt: skip


def state(steps: int, planned: int = 12, **changed: float) -> dict:
    rows = [HEALTHY | changed | {"step": step} for step in range(1, steps + 1)]
    return {"global_step": steps, "max_steps": planned, "log_history": rows}


def write(path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def metrics_lines(steps: int, **changed: float) -> str:
    return "\n".join(json.dumps(row) for row in state(steps, **changed)["log_history"]) + "\n"


class TestReading:
    def test_a_whole_run(self, tmp_path):
        write(tmp_path / "trainer_state.json", state(12))
        write(tmp_path / "checkpoint-6/trainer_state.json", state(6))
        run = read_run(tmp_path)
        assert (run.step, run.max_steps, run.sources, run.notes) == (12, 12, ["trainer_state.json"], [])
        assert run.series("reward") == [(step, 0.5) for step in range(1, 13)]

    def test_the_newest_checkpoint_of_a_killed_run(self, tmp_path):
        for step in (2, 10, 9):
            write(tmp_path / f"checkpoint-{step}/trainer_state.json", state(step))
        run = read_run(tmp_path)
        assert (run.step, run.max_steps, run.sources) == (10, 12, ["checkpoint-10/trainer_state.json"])
        assert [x.name for x in warnings_of(run)] == ["stopped"]

    @pytest.mark.parametrize("cut", ["", "{", '{"global_step": 9', "[]", "{}", "\x00\x00"])
    def test_a_checkpoint_that_was_cut_is_passed_over(self, cut, tmp_path):
        write(tmp_path / "checkpoint-9/trainer_state.json", cut)
        write(tmp_path / "checkpoint-6/trainer_state.json", state(6))
        run = read_run(tmp_path)
        assert run.sources == ["checkpoint-6/trainer_state.json"]
        assert run.notes[0].startswith("checkpoint-9/trainer_state.json cannot be read")

    def test_a_resumed_run_beyond_the_state_of_the_one_before(self, tmp_path):
        write(tmp_path / "trainer_state.json", state(5))
        write(tmp_path / "checkpoint-8/trainer_state.json", state(8))
        assert read_run(tmp_path).step == 8

    def test_only_lines_with_the_last_one_cut(self, tmp_path):
        write(tmp_path / "credit/metrics.jsonl", metrics_lines(4)[:-20])
        run = read_run(tmp_path)
        assert [row["step"] for row in run.rows] == [1, 2, 3]
        assert run.notes == ["credit/metrics.jsonl: 1 cut line left out"]

    def test_what_was_logged_last_holds(self, tmp_path):
        write(tmp_path / "checkpoint-3/trainer_state.json", state(3))
        write(tmp_path / "credit/metrics.jsonl", metrics_lines(4) + metrics_lines(2, reward=0.75))
        run = read_run(tmp_path)
        assert run.series("reward") == [(1, 0.75), (2, 0.75), (3, 0.5), (4, 0.5)]

    def test_rollouts_with_a_cut_and_a_strange_line(self, tmp_path):
        path = tmp_path / "credit/rollouts.jsonl"
        path.parent.mkdir()
        failed = [record(("x",), step=1, parsed=False, prompt=str(i)) for i in range(9)]
        append_records(path, [*failed, rollout(5, step=2), rollout(5, 1, step=2)])
        with path.open("a") as file:
            file.write('{"tokens": ["a"], "weights": [1, 2]}\n{"tokens": ["b"')
        run = read_run(tmp_path)
        assert (run.rollouts, len(run.last), run.last[0].step) == (11, 2, 2)
        assert [x.prompt for x in run.failures] == list("45678")
        assert run.notes[0].startswith(
            "credit/rollouts.jsonl: 2 cut or unusable lines left out: CreditRecord(): weights"
        )

    def test_values_that_are_no_numbers_are_no_points(self, tmp_path):
        rows = [{"step": 1, "loss": 0.5, "reward": None}, {"step": 2, "loss": float("nan"), "note": "x"}]
        write(tmp_path / "trainer_state.json", {"global_step": 2, "max_steps": 2, "log_history": [*rows, 3, {"a": 1}]})
        run = read_run(tmp_path)
        assert run.series("loss") == [(1, 0.5)]
        assert run.series("reward") == []
        assert warnings_of(run)[0].name == "not_finite"

    @pytest.mark.parametrize("make", ["missing", "file", "empty", "unreadable", "empty_log"])
    def test_what_is_no_run(self, make, tmp_path, capsys):
        folder = tmp_path / "run"
        if make == "file":
            folder.write_text("x")
        elif make != "missing":
            folder.mkdir()
        if make == "unreadable":
            write(folder / "trainer_state.json", "{")
        if make == "empty_log":
            write(folder / "trainer_state.json", {"log_history": []})
        with pytest.raises(ConfigError, match=r"^read_run\(\): folder got .*, expected .*; "):
            read_run(folder)
        assert main(["report", str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("python -m srpo report: read_run(): folder got ")
        assert error.count("\n") == 1
        assert not list(tmp_path.rglob("*.html"))

    def test_the_run_inside_is_named(self, tmp_path):
        write(tmp_path / "one/checkpoint-3/trainer_state.json", state(3))
        with pytest.raises(ConfigError, match=re.escape(f"pass {tmp_path / 'one'}.")):
            read_run(tmp_path)


class TestWarnings:
    def of(self, folder, rows: int = 12, **changed: float) -> list[str]:
        write(folder / "trainer_state.json", state(rows, rows, **changed))
        return [x.name for x in warnings_of(read_run(folder))]

    def test_a_healthy_run_has_none(self, tmp_path):
        assert self.of(tmp_path) == []
        assert "no warning applies" in summary_text(run_report(tmp_path).summary)

    @pytest.mark.parametrize(
        ("name", "changed"),
        [
            ("not_finite", {"grad_norm": float("nan")}),
            ("cells_not_scored", {"srpo/cells_not_scored": 3.0}),
            ("contrasts_without_value", {"srpo/contrasts_without_value": 3.0}),
            ("far_ratios", {"srpo/far_ratio_fraction": 0.5}),
            ("parse_failures", {"srpo/parse_failures": 0.5}),
            ("unclosed", {"srpo/unclosed": 0.5}),
            ("unclosed", {"completions/clipped_ratio": 0.5}),
            ("stray", {"srpo/stray": 0.5}),
            ("weak_picture", {f"srpo/perception/{x}/contrast_mean": 0.001 for x in ("positive", "negative")}),
            ("no_evidence", {"srpo/uniform_fraction": 0.5}),
            ("no_signal", {"frac_reward_zero_std": 0.9}),
            ("bounds", {"srpo/perception/positive/clip_fraction": 0.9}),
            ("effective_sample_size", {"srpo/effective_sample_size": 0.3}),
        ],
    )
    def test_each_applies_alone(self, name, changed, tmp_path):
        assert self.of(tmp_path, **changed) == [name]

    def test_plain_grpo(self, tmp_path):
        rows = [{"step": step, "reward": 0.5} for step in range(3)]
        write(tmp_path / "trainer_state.json", {"global_step": 3, "max_steps": 3, "log_history": rows})
        assert [x.name for x in warnings_of(read_run(tmp_path))] == ["no_credit"]

    @pytest.mark.parametrize(
        ("name", "metric", "end"), [("reward_fell", "reward", 0.0), ("entropy_fell", "entropy", 0.01)]
    )
    def test_what_falls(self, name, metric, end, tmp_path):
        history = state(12)
        for row in history["log_history"][6:]:
            row[metric] = end
        write(tmp_path / "trainer_state.json", history)
        assert [x.name for x in warnings_of(read_run(tmp_path))] == [name]


class TestReport:
    @pytest.fixture
    def run(self, tmp_path):
        write(tmp_path / "checkpoint-6/trainer_state.json", state(6, **{"srpo/parse_failures": 0.4}))
        path = tmp_path / "credit/rollouts.jsonl"
        path.parent.mkdir()
        append_records(path, [record(HOSTILE, step=4, parsed=False), rollout(30, step=5), rollout(30, 1, step=5)])
        return tmp_path

    def test_the_page(self, run):
        page = run_report(run).page
        assert page.count("<article>") == 3
        assert page.count('class="plot"') == len(re.findall("<h3>[^<]*</h3><svg", page)) == 9
        assert "40% of the completions lack perception or reasoning" in page
        data = json.loads(re.search('id="data">(.*?)</script>', page, re.DOTALL)[1])
        assert [len(x["weights"]) for x in data] == [30, 30, len(HOSTILE)]
        assert [int(x) for x in re.findall(r'data-rollout="(\d+)"', page)] == [0, 1, 2]

    def test_the_command(self, run, capsys):
        assert main(["report", str(run)]) == 0
        said = capsys.readouterr().out
        assert (run / "srpo_report.html").is_file()
        for part in ("step 6 of 12", "3 rollouts kept", "warning: 40%", "  likely: ", "  try: ", "srpo_report.html"):
            assert part in said

    def test_json(self, run, capsys):
        assert main(["report", str(run), "--json", "--page", str(run / "x.html")]) == 0
        said = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        assert said["page"] == str((run / "x.html").resolve())
        assert said["metrics"]["srpo/parse_failures"] == {"first": 0.4, "last": 0.4}
        assert [x["name"] for x in said["warnings"]] == ["parse_failures", "stopped"]
        assert said["parse_failures"] == [{"step": 4, "text": "".join(HOSTILE)}]

    def test_a_page_that_cannot_be_written(self, run, capsys):
        assert main(["report", str(run), "--page", str(run / "no/such/folder.html")]) == 2
        assert "No such file" in capsys.readouterr().err


class TestCurves:
    @pytest.mark.parametrize(("low", "high"), [(0, 1), (-3e-7, 2e-7), (5, 5), (0, 0), (-1e9, 1e9), (0.97, 0.9700001)])
    def test_ticks_are_round_and_span(self, low, high):
        found = ticks(low, high, 4)
        assert found[0] <= low + 1e-9 * abs(low)
        assert found[-1] >= high - 1e-9 * abs(high)
        assert 2 <= len(found) <= 8

    def test_thinning_keeps_means_and_the_end(self):
        points = [(x, float(x % 2)) for x in range(10_000)]
        found = thinned(points)
        assert len(found) <= 301
        assert found[-1] == points[-1]
        assert all(abs(y - 0.5) < 0.02 for _, y in found[:-1])

    def test_one_point_and_none(self):
        assert "<circle" in chart("t", {"a": [(3, 1.0)]}, "")
        assert chart("t", {"a": []}, "") == ""
        assert "nan" not in chart("t", {"a": [(0, 2.0), (9, 2.0)]}, "")

    def test_numbers_are_short(self):
        assert [number(x) for x in (0, 0.97, -0.00034, 123456, 1234, 0.5)] == [
            "0",
            "0.97",
            "-3e-04",
            "123.5k",
            "1234",
            "0.5",
        ]
