"""The recipes: rewards on hostile answers, data sets by stand-ins of their files, and a training run on a made set."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tiny_vlms
from datasets import Dataset
from processes import run_python

from srpo import ConfigError, RoleGrammar
from srpo.recipes import data, rewards
from srpo.recipes.prompts import SYSTEM, conversation
from srpo.recipes.train_trl import MODELS, SETTINGS, parse

GOOD = "<perception>AB is 3</perception>\n<think>3 * 2</think>\n<answer>6</answer>"


@pytest.mark.parametrize(
    "text",
    [
        f"{GOOD} and more",
        "<think>3 * 2</think><perception>AB is 3</perception><answer>6</answer>",
        "<perception></perception><think>3 * 2</think><answer>6</answer>",
        "<perception>a</perception><perception>b</perception><think>c</think><answer>6</answer>",
        "<perception>a<think>b</think></perception><think>c</think><answer>6</answer>",
        "<perception>a</perception><think>b</think><answer>6",
        "",
    ],
)
def test_other_forms_earn_nothing(text):
    assert rewards.format_reward([text, GOOD]) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("given", "gold", "right"),
    [
        ("6", "6", True), (" 6. ", "6", True), ("7", "6", False), ("", "6", False), ("-6", "6", False),
        (r"\frac{1}{2}", "0.5", True), (r"$\boxed{12}$", "12", True), ("12", r"$\boxed{12}$", True),
        (r"2\sqrt{2}", r"\sqrt{8}", True), ("B", "B", True), ("(b)", "B", True), ("AB", "B", False),
        ("a cat", "A cat", True), ("x", "y", False), (r"\frac{1}{", "0.5", False), ("6" * 400, "6", False),
    ],
)  # fmt: skip
def test_answers(given, gold, right):
    text = f"<answer>0</answer> no: <answer>{given}</answer>"
    assert rewards.answer_reward([text], [gold]) == [float(right)]
    messages = [{"role": "assistant", "content": text}]
    assert rewards.answer_reward([messages], [gold]) == [float(right)]


def test_no_answer_is_wrong():
    assert rewards.answer_reward(["6", GOOD], ["6", "6"]) == [0.0, 1.0]


def test_the_prompt_asks_for_what_the_grammar_reads():
    grammar = RoleGrammar()
    for name in ("perception", "think", "answer"):
        assert f"<{name}>" in SYSTEM
        assert name in (*grammar.perception_tags, *grammar.reasoning_tags, *grammar.answer_tags)


def picture(path: Path, n: int = 1) -> Path:
    tiny_vlms.picture(n).save(path)
    return path


def test_geometry3k(monkeypatch):
    """Columns as its card says them."""
    drawn = tiny_vlms.picture(2)
    rows = Dataset.from_list([{"images": [drawn], "problem": "<image>Find x.", "answer": " 3 "}], features=None)
    monkeypatch.setattr(data, "load_dataset", lambda name, split: rows)
    (found,) = data.load("geometry3k")
    assert found["prompt"] == conversation("Find x.")
    assert found["answer"] == "3"
    assert [x.size for x in found["images"]] == [drawn.size]


def test_virl39k(tmp_path):
    """The release: a parquet file of relative paths, and an archive of pictures."""
    picture(tmp_path / "a.png", 3)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "images/a.png")
        archive.write(tmp_path / "a.png", "images/b.png")
    rows = [{"question": "<image>\nHow many?", "answer": r"\boxed{3}", "image": ["images/a.png", "images/b.png"]}]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "x.parquet"))
    data.unpack(tmp_path / "images.zip", tmp_path / "unpacked")
    (found,) = data.from_virl39k(tmp_path / "x.parquet", tmp_path / "unpacked")
    assert len(found["images"]) == 2
    assert found["prompt"][1]["content"] == "How many?"
    assert rewards.is_right("<answer>3</answer>", found["answer"])


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "expected lines of JSON"),
        (["{"], "line 1: JSONDecodeError"),
        ([{"question": "a", "answer": "b"}], "KeyError 'images'"),
        ([{"question": "a", "answer": "b", "images": ["no.png"]}], "no file .*no.png"),
    ],
)
def test_wrong_lines_are_named(tmp_path, rows, said):
    with pytest.raises(ConfigError, match=said):
        data.load(str(lines(tmp_path / "x.jsonl", *rows)))


def test_a_set_that_does_not_exist():
    with pytest.raises(ConfigError, match=r"geometry3k, virl39k or a \.jsonl file"):
        data.load("imagenet")


@pytest.mark.parametrize("size", SETTINGS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_settings_and_the_command_line(size, tmp_path):
    common = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False"]
    recipe, config = parse(["--size", size, *common])
    assert size in MODELS
    assert (recipe.data, config.credit, config.fused_loss) == ("geometry3k", "srpo", True)
    updates = config.per_device_train_batch_size * config.gradient_accumulation_steps * 8
    assert updates == 64 * config.num_generations
    assert config.learning_rate == SETTINGS[size]["learning_rate"]
    _, changed = parse(["--size", size, *common, "--learning_rate", "1e-4", "--credit", "grpo"])
    assert (changed.learning_rate, changed.credit) == (1e-4, "grpo")


@pytest.mark.slow
def test_a_training_run(tmp_path):
    model, processor = tiny_vlms.build("llava")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    rows = []
    for n in range(1, 5):
        picture(tmp_path / f"{n}.png", n)
        rows.append({"question": "how many squares?", "images": [f"{n}.png"], "answer": str(n)})
    own = lines(tmp_path / "own.jsonl", *rows)
    options = {
        "model": tmp_path / "model", "data": own, "output_dir": tmp_path / "out", "max_steps": 2, "num_generations": 4,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_completion_length": 8,
        "log_credit_steps": 1, "save_steps": 1, "report_to": "none", "bf16": False,
        "mask_truncated_completions": False,
    }  # fmt: skip
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    run = ("-m", "srpo.recipes.train_trl", "--use_cpu", *flags)
    done = run_python(*run)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out/checkpoint-2").is_dir()
    assert (tmp_path / "out/model.safetensors").is_file()
    report = run_python("-m", "srpo", "report", tmp_path / "out", "--json")
    assert report.returncode == 0, report.stderr
    summary = json.loads(report.stdout)
    assert summary["step"] == 2
    assert summary["rollouts"] == 8
    again = run_python(*run, "--max_steps", "3", "--resume_from_checkpoint", "last")
    assert again.returncode == 0, again.stderr[-3000:]
    assert (tmp_path / "out/checkpoint-3").is_dir()
