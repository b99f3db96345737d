"""The demo's model, task, streams and command line."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_python
from rich.console import Console

import srpo
from srpo import Role
from srpo.__main__ import DEMO_PACKAGES, MODELS, environment, main
from srpo.demo import loop as demo
from srpo.demo.task import (
    FAMILIES,
    MERGE,
    PATCH,
    PROMPT,
    RESPONSE,
    SPECIAL,
    Completions,
    Example,
    TinyVLM,
    build_tiny_vlm,
    completion_logits,
    draw_examples,
    model_inputs,
    sample,
    warm_start,
    with_completions,
)
from srpo.viz import CreditPage

CELL = PATCH * MERGE


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=MODELS)
def vlm(request: pytest.FixtureRequest) -> TinyVLM:
    torch.manual_seed(0)
    return build_tiny_vlm(request.param)


@pytest.fixture(scope="module")
def trained() -> TinyVLM:
    """A model after the demo's own warm start."""
    torch.manual_seed(0)
    model = build_tiny_vlm("idefics3")
    for _ in warm_start(model, seeded(), demo.WARM_START_STEPS):
        pass
    return model


@pytest.fixture(scope="module")
def step(trained: TinyVLM) -> demo.Step:
    torch.manual_seed(1)
    frozen = torch.optim.SGD(trained.model.parameters(), lr=0.0)
    return demo.srpo_step(trained, frozen, seeded(1))


def special_ids(vlm: TinyVLM) -> list[int]:
    return [index for index in vlm.tokenizer.convert_tokens_to_ids(SPECIAL) if index != vlm.tokenizer.eos_token_id]


def teacher_forced(vlm: TinyVLM, examples: list[Example]) -> tuple[dict[str, torch.Tensor], Completions]:
    """Return inputs and completions made of the templated responses, the last one cut short."""
    ids = torch.tensor(vlm.tokenizer([example.response for example in examples])["input_ids"])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[-1, -3:] = False
    inputs = with_completions(vlm, model_inputs(vlm, examples), ids, mask)
    return inputs, Completions(ids, mask, [example.response for example in examples])


# ---- model and task ----


def test_the_command_line_offers_every_family():
    assert tuple(FAMILIES) == MODELS


def test_the_tokenizer_spells_prompt_and_every_response():
    tokenizer = build_tiny_vlm("idefics3").tokenizer
    for total in range(19):
        text = PROMPT + RESPONSE.format(left=total // 2, right=total - total // 2, total=total)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.pad_token_id not in ids


def test_pictures_show_the_digits_that_are_asked_for():
    from sklearn.datasets import load_digits

    digits = load_digits()
    for example in draw_examples(20, seeded(), held_out=False):
        pixels = np.asarray(example.image.convert("L"))[::4, ::2]
        for half, digit in ((pixels[:, :8], example.left), (pixels[:, 8:], example.right)):
            matches = ((digits.images * (255 / 16)).astype(np.uint8) == half).all(axis=(1, 2))
            assert digit in digits.target[matches]


def test_rollouts_use_pictures_that_the_warm_start_never_saw():
    def halves(held_out: bool) -> set[bytes]:
        pixels = [np.asarray(e.image) for e in draw_examples(400, seeded(), held_out=held_out)]
        return {half.tobytes() for picture in pixels for half in (picture[:, :16], picture[:, 16:])}

    assert not halves(True) & halves(False)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (RESPONSE.format(left=3, right=4, total=7), True),
        ("<answer> 7 </answer>", True),
        ("<answer> 17 </answer>", False),
        ("<answer> 3 </answer> 7", False),
        ("7", False),
        ("", False),
    ],
)
def test_reward(text: str, right: bool):
    assert Example(Image.new("RGB", (32, 32)), 3, 4).is_answered_by(text) is right


def test_position_ids_are_those_the_model_would_choose(vlm: TinyVLM):
    inputs, completions = teacher_forced(vlm, draw_examples(3, seeded(), held_out=False))
    length = completions.ids.shape[1]
    explicit = completion_logits(vlm, inputs, length)[:-1]
    chosen = completion_logits(vlm, {k: v for k, v in inputs.items() if k != "position_ids"}, length)[:-1]
    torch.testing.assert_close(explicit, chosen)


def test_the_picture_reaches_the_logits(vlm: TinyVLM):
    examples = draw_examples(2, seeded(), held_out=False)
    inputs, completions = teacher_forced(vlm, examples)
    swapped = model_inputs(vlm, examples[::-1])["pixel_values"]
    length = completions.ids.shape[1]
    difference = completion_logits(vlm, inputs, length) - completion_logits(
        vlm, inputs | {"pixel_values": swapped}, length
    )
    assert difference.abs().max() > 1e-3


def test_sampling_is_seeded_and_masks_everything_after_the_end(vlm: TinyVLM):
    inputs = model_inputs(vlm, draw_examples(64, seeded(), held_out=True))
    torch.manual_seed(3)
    first = sample(vlm, inputs)
    torch.manual_seed(3)
    assert torch.equal(first.ids, sample(vlm, inputs).ids)
    eos = vlm.tokenizer.eos_token_id
    lengths = set()
    for ids, mask, text in zip(first.ids.tolist(), first.mask.tolist(), first.texts, strict=True):
        length = ids.index(eos) + 1 if eos in ids else len(ids)
        assert mask == [True] * length + [False] * (len(ids) - length)
        assert text == vlm.tokenizer.decode(ids[:length])
        lengths.add(length)
    assert len(lengths) > 3


def test_responses_hold_no_special_token_but_the_end(vlm: TinyVLM):
    torch.manual_seed(0)
    completions = sample(vlm, model_inputs(vlm, draw_examples(64, seeded(), held_out=True)))
    assert completions.ids[completions.mask].unique().tolist()[0] == vlm.tokenizer.eos_token_id
    assert not torch.isin(completions.ids[completions.mask], torch.tensor(special_ids(vlm))).any()


# ---- streams ----


def test_a_fully_masked_picture_is_still_a_picture(vlm: TinyVLM):
    inputs, completions = teacher_forced(vlm, draw_examples(3, seeded(), held_out=False))
    blind = srpo.PatchMask(1.0).on_inputs(inputs, srpo.PixelLayout.of_model(vlm.model), generator=0)
    logits = completion_logits(vlm, blind, completions.ids.shape[1])
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[0, 0], logits[1, 0])


def test_the_layout_read_off_the_model_is_that_of_the_image_processor(vlm: TinyVLM):
    layout, processor = srpo.PixelLayout.of_model(vlm.model), vlm.image_processor
    assert layout.merged_patch == PATCH * MERGE
    torch.testing.assert_close(layout.image_mean, tuple(processor.image_mean))
    torch.testing.assert_close(layout.image_std, tuple(processor.image_std))


def test_streams_are_log_probs_of_their_contexts(vlm: TinyVLM):
    inputs, completions = teacher_forced(vlm, draw_examples(4, seeded(), held_out=False))
    role_ids = srpo.role_ids_from_completions(completions.ids, vlm.tokenizer, completion_mask=completions.mask).role_ids
    length = completions.ids.shape[1]
    streams = demo.score_streams(vlm.model, **inputs, logits_to_keep=length, role_ids=role_ids, generator=7)
    corrupted = srpo.PatchMask().on_inputs(inputs, srpo.PixelLayout.of_model(vlm.model), generator=7)
    everywhere, perception = completions.mask, completions.mask & (role_ids == Role.PERCEPTION)
    for context, scored, where in (
        (inputs, streams.logps, everywhere),
        (corrupted, streams.corrupted_logps, perception),
    ):
        logits = completion_logits(vlm, context, length)[:, :-1]
        expected = logits.log_softmax(-1).gather(-1, completions.ids[..., None])[..., 0]
        torch.testing.assert_close(scored[where], expected[where])
        assert not scored.requires_grad


# ---- the update ----


def test_the_warm_start_leaves_mixed_rewards(step: demo.Step):
    assert 0.2 < step.rewards.mean() < 0.95
    assert (step.advantages != 0).float().mean() > 0.3
    assert step.roles.parsed.float().mean() > 0.8


def test_the_warm_start_stops_when_it_is_good_enough(vlm: TinyVLM):
    assert len(list(warm_start(vlm, seeded(), 12, batch_size=2, enough=1e9))) == 10
    assert len(list(warm_start(vlm, seeded(), 12, batch_size=2, enough=0.0))) == 12


def test_a_step_reports_what_the_loss_used(step: demo.Step):
    ids, mask, _ = step.completions
    weights = srpo.token_weights(step.contrast, step.roles.role_ids, mask)
    torch.testing.assert_close(step.output.weights, weights)
    token_advantages = srpo.token_advantages(step.advantages, weights)
    expected = -token_advantages.sum() / mask.sum()  # on-policy the ratio is 1
    torch.testing.assert_close(step.output.loss.detach(), expected, atol=1e-5, rtol=1e-4)
    assert step.gradient_norm > 1e-3
    assert ids.shape == mask.shape == step.contrast.shape


def test_digit_tokens_earn_more_than_filler(trained: TinyVLM, step: demo.Step):
    digits = torch.tensor(trained.tokenizer.convert_tokens_to_ids([f" {n}" for n in range(19)]))
    perceived = (step.roles.role_ids == Role.PERCEPTION) & step.roles.parsed[:, None]
    is_digit = torch.isin(step.completions.ids, digits)
    weights = step.output.weights
    assert weights[perceived & is_digit].mean() > weights[perceived & ~is_digit].mean() + 0.1


def test_a_step_moves_the_policy(vlm: TinyVLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Example, "is_answered_by", lambda self, text: len(text) % 2 == 0)
    monkeypatch.setattr(demo, "PROMPTS", 2)
    before = torch.cat([p.detach().flatten().clone() for p in vlm.model.parameters()])
    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=1e-3)
    report = demo.srpo_step(vlm, optimizer, seeded())
    after = torch.cat([p.detach().flatten() for p in vlm.model.parameters()])
    assert len(report.examples) == 2 * demo.ROLLOUTS
    assert report.gradient_norm > 0
    assert not torch.equal(before, after)


# ---- what is printed ----


@pytest.mark.parametrize("width", [80, 120])
def test_the_report_shows_every_token_and_fits(width: int, trained: TinyVLM, step: demo.Step):
    console = Console(file=io.StringIO(), width=width)
    demo.print_report(console, [step, step], demo.records_of(trained, step))
    text = console.file.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert f"{step.rewards.mean():.2f}" in text

    row = int(torch.where(step.roles.parsed & ~step.roles.unclosed, step.advantages, -torch.inf).argmax())
    table = [line.split() for line in text.partition("token  ")[2].partition("contrast:")[0].splitlines()[2:]]
    ids = step.completions.ids[row][step.completions.mask[row]].tolist()
    roles = step.roles.role_ids[row].tolist()
    assert [line[0] for line in table] == [trained.tokenizer.decode([index]).strip() for index in ids]
    for column, line in enumerate(table):
        weight = f"{step.output.weights[row, column]:.2f}"
        advantage = f"{step.advantages[row] * step.output.weights[row, column]:+.3f}"
        flat = f"{step.advantages[row]:+.3f}"
        if roles[column]:
            assert line[1] == Role(roles[column]).name.lower()
            assert float(line[2]) == pytest.approx(float(step.contrast[row, column]), abs=0.0051)
            assert line[3:6] == [flat, weight, advantage]
        else:
            assert line[1:4] == [flat, weight, advantage]


def test_a_batch_without_any_roles_can_be_printed(vlm: TinyVLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "PROMPTS", 1)
    optimizer = torch.optim.SGD(vlm.model.parameters(), lr=0.0)
    report = demo.srpo_step(vlm, optimizer, seeded())
    nothing = report.roles._replace(
        role_ids=torch.zeros_like(report.roles.role_ids), parsed=torch.zeros_like(report.roles.parsed)
    )
    report = report._replace(roles=nothing)
    demo.print_report(Console(file=io.StringIO(), width=80), [report], demo.records_of(vlm, report))


def test_the_page_shows_the_pictures_that_were_scored(trained: TinyVLM, step: demo.Step):
    records = demo.records_of(trained, step)
    assert len({x.group for x in records}) == demo.PROMPTS
    for picture, dark in zip((x.image for x in step.examples), step.corrupted, strict=True):
        clean, hidden = np.asarray(picture), np.asarray(dark)
        cells = (clean != hidden).reshape(2, CELL, 2, CELL, 3).any(axis=(1, 3, 4))
        assert not hidden.reshape(2, CELL, 2, CELL, 3).transpose(0, 2, 1, 3, 4)[cells].any()  # black, or as it was
    assert records[0].logps == pytest.approx(step.streams.logps[0, : len(records[0].tokens)].tolist())


def test_a_page_that_cannot_be_written_ends_no_run(tmp_path):
    console = Console(file=io.StringIO(), width=80)
    demo.write_page(console, CreditPage("x"), tmp_path / "missing" / "page.html")
    assert "not written" in console.file.getvalue()


# ---- command line ----


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "srpo", *arguments, COLUMNS="80", TRITON_INTERPRET="0", **environment)


def test_the_demo_runs(tmp_path):
    page = tmp_path / "page.html"
    result = run("demo", "--steps", "2", "--page", str(page), PYTHONIOENCODING="utf-8")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for word in ("idefics3", "warm start", "reward", "weights", "<perception>", "reasoning", "GRPO", "peak memory"):
        assert word in result.stdout
    assert max(len(line) for line in result.stdout.splitlines() if str(page) not in line) <= 80
    assert f"page  {page}" in result.stdout
    assert page.read_text(encoding="utf-8").count("<article>") == demo.PROMPTS * demo.ROLLOUTS


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("demo", "--steps", "0"),
        ("demo", "--steps", "-3"),
        ("demo", "--steps", "many"),
        ("demo", "--model", "gpt2"),
        ("demo", "--seed", "-1"),
        ("unknown",),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "python -m srpo" in said
    if "--steps" in arguments or "--seed" in arguments:
        lowest = 1 if "--steps" in arguments else 0
        assert f"'{arguments[-1]}' is not an integer of at least {lowest}" in said


@pytest.mark.parametrize("module", DEMO_PACKAGES)
def test_a_missing_package_is_named_with_the_install_line(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    for name in ("loop", "task"):
        monkeypatch.delitem(sys.modules, f"srpo.demo.{name}")
        monkeypatch.delattr(srpo.demo, name)
    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert DEMO_PACKAGES[module] in error
    assert "pip install -e '.[demo]'" in error


def test_the_demo_in_trl_names_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "srpo.demo.trainer", raising=False)
    assert main(["demo", "--trainer", "trl"]) == 2
    assert "needs trl: pip install -e '.[demo,trl]'" in capsys.readouterr().err


def test_env_names_versions_device_and_backend(monkeypatch: pytest.MonkeyPatch):
    lines = dict(line.split(maxsplit=1) for line in environment().splitlines())
    assert lines["torch"] == torch.__version__
    assert lines["srpo"] == srpo.__version__
    assert lines["device"].startswith("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        assert lines['backend="auto"'] == "torch"
    monkeypatch.setattr("srpo.__main__.REPORTED_PACKAGES", ("no-such-package",))
    assert "no-such-package  not installed" in environment()


def test_env_needs_none_of_the_optional_packages():
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in (*DEMO_PACKAGES, "trl", "liger_kernel"))
    code = f"import sys; {blocked}; from srpo.__main__ import main; sys.exit(main(['env']))"
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert "backend" in result.stdout
