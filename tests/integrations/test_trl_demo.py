"""The demo in TRL's trainer: its processor makes what the demo's own loop makes, and runs are logged and printed."""

import io
from typing import Any

import pytest
import torch
from processes import run_python
from rich.console import Console

from srpo.demo import trainer as trl_demo
from srpo.demo.task import FAMILIES, TinyVLM, build_tiny_vlm, draw_examples, model_inputs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module", params=FAMILIES)
def vlm(request: Any) -> TinyVLM:
    torch.manual_seed(0)
    return build_tiny_vlm(request.param)


def test_the_processor_makes_the_inputs_of_the_loop(vlm):
    examples = draw_examples(3, torch.Generator().manual_seed(0), held_out=True)
    processor = trl_demo.DemoProcessor(vlm)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": trl_demo.QUESTION}]}]
    text = processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    got = processor(images=[[x.image] for x in examples], text=[text] * 3, return_tensors="pt")
    want = model_inputs(vlm, examples)
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert torch.equal(got[name], x.cpu()), name


def test_two_steps_of_every_family(vlm, tmp_path):
    trainer = trl_demo.make_trainer(vlm, 2, 0, torch.Generator().manual_seed(0), str(tmp_path))
    trainer.train()
    log = [row for row in trainer.state.log_history if "reward" in row]
    assert len(log) == 2
    assert all("srpo/parse_failures" in row for row in log)
    console = Console(file=io.StringIO(), width=100)
    console.print(trl_demo.table_of(log))
    assert "1-1" in console.file.getvalue()


def test_the_command(tmp_path):
    page = tmp_path / "page.html"
    arguments = ("-m", "srpo", "demo", "--trainer", "trl", "--steps", "3", "--page", str(page))
    run = run_python(*arguments, PYTHONIOENCODING="utf-8", PYTHONWARNINGS="default")
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line.split() for line in run.stdout.splitlines()]
    steps = [line for line in lines if line[:1] in (["1-1"], ["2-2"], ["3-3"])]
    assert len(steps) == 3
    assert all(0 < float(line[1]) <= 1 for line in steps)
    assert all(line[3] == "100%" for line in steps)  # after the warm start every response has both roles
    assert "Token credit at step 2" in page.read_text(encoding="utf-8")
    assert str(page) in run.stdout
