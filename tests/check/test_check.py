"""`python -m srpo check` on small models, whole and with something broken on purpose."""

import json
from typing import Any

import pytest
import tiny_vlms
import torch
from PIL import Image
from processes import run_python

from srpo import RoleGrammar
from srpo.__main__ import main
from srpo.check import Check, check_model
from srpo.check.loading import pictures
from srpo.check.prompts import completion_texts
from srpo.roles import role_ids_from_completions

IMAGES = pictures(None, 2)


def outcomes(check: Check) -> dict[str, str]:
    return {finding.name: finding.outcome for finding in check.findings}


def only_wrong(check: Check) -> Any:
    (found,) = (finding for finding in check.findings if finding.outcome == "WRONG")
    assert found.fix
    assert not check.is_good
    return found


class Characters:
    def __len__(self):
        return 128

    def decode(self, ids, **_):
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    "settings",
    [{}, {"form": "brackets"}, {"form": "headings"}, {"opens_with": "think"}, {"opens_with": "perception"},
     {"answer_tags": ()}, {"perception_tags": ("look",), "reasoning_tags": ("why",)}],
    ids=str,
)  # fmt: skip
def test_completions_of_a_grammar_have_both_roles(settings):
    grammar = RoleGrammar(**settings)
    for text in completion_texts(grammar):
        ids = torch.tensor([[ord(c) for c in text]])
        assert role_ids_from_completions(ids, Characters(), grammar=grammar).parsed.all(), text


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_families_are_ready(family):
    model, processor = tiny_vlms.build(family)
    seen = []
    check = check_model(model, processor, IMAGES, progress=seen.append)
    assert check.is_good, check.text()
    for name in ("chat template", "tags", "processor", "log-probs", "road", "picture", "perception", "weights"):
        assert outcomes(check)[name] == "ok"
    assert outcomes(check)["policy"] == "note"  # random weights write no tags
    assert check.figures["clean_difference"] < 1e-4
    assert check.figures["picture_contrast"] > 1e-3
    assert check.figures["scoring_over_forward"] > 0
    assert "scoring" in seen
    assert check.text(60).endswith("ready to train")


def test_memory_of_a_large_step_is_told():
    check = check_model(*tiny_vlms.build("llava"), IMAGES, rollouts=100_000, length=4096)
    (found,) = (finding for finding in check.findings if finding.name == "memory")
    assert check.figures["logits_gib"] > 1
    assert "fused_loss=True" in found.fix


# ---- something is broken ----


def test_a_template_that_opens_a_tag():
    model, processor = tiny_vlms.build("idefics3")
    processor.chat_template += "<think>"
    found = only_wrong(check_model(model, processor, IMAGES))
    assert found.name == "chat template"
    assert '{"opens_with": "think"}' in found.fix
    assert check_model(model, processor, IMAGES, grammar=RoleGrammar(opens_with="think")).is_good


def test_a_grammar_that_believes_in_an_opened_tag():
    found = only_wrong(check_model(*tiny_vlms.build("llava"), IMAGES, grammar=RoleGrammar(opens_with="think")))
    assert found.name == "chat template"
    assert "leave opens_with out" in found.fix


def test_no_template():
    model, processor = tiny_vlms.build("llava")
    processor.chat_template = processor.tokenizer.chat_template = None
    assert only_wrong(check_model(model, processor, IMAGES)).name == "chat template"


def test_tags_that_the_tokenizer_does_not_know():
    found = only_wrong(check_model(*tiny_vlms.build("llava"), IMAGES, grammar=RoleGrammar(form="headings")))
    assert found.name == "tags"  # the tokenizer has no capitals
    assert "<unk>" in found.seen


def test_a_picture_that_does_not_reach_the_model():
    model, processor = tiny_vlms.build("llava")
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.zero_()
    found = only_wrong(check_model(model, processor, IMAGES))
    assert found.name == "picture"
    assert "pixel_values" in found.fix


def test_log_probs_that_are_not_those_of_the_model(monkeypatch):
    model, processor = tiny_vlms.build("llava")
    from srpo.check import run

    scored = run.score_streams
    monkeypatch.setattr(
        run, "score_streams", lambda *a, **k: (s := scored(*a, **k))._replace(logps=s.logps + 0.5)  # a shift, say
    )  # fmt: skip
    found = only_wrong(check_model(model, processor, IMAGES))
    assert found.name == "log-probs"
    assert check_gap(found) == pytest.approx(0.5, rel=0.01)


def check_gap(found) -> float:
    return float(found.seen.split(" are ")[1].split()[0])


def test_perception_that_is_not_hidden(monkeypatch):
    """A scorer that returns the clean stream as the ablated one leaks what it should hide."""
    model, processor = tiny_vlms.build("llava")
    from srpo.check import run

    scored = run.score_streams
    monkeypatch.setattr(
        run, "score_streams", lambda *a, **k: (s := scored(*a, **k))._replace(ablated_logps=s.logps)
    )  # fmt: skip
    assert only_wrong(check_model(model, processor, IMAGES)).name == "perception"


def test_a_processor_that_fails():
    model, processor = tiny_vlms.build("llava")
    processor.image_processor = None
    assert only_wrong(check_model(model, processor, IMAGES)).name == "processor"


# ---- the command ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    model, processor = tiny_vlms.build("llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run(*arguments: object) -> Any:
    return run_python("-m", "srpo", "check", *arguments, COLUMNS="80", TRITON_INTERPRET="0")


def test_the_command(saved, tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    done = run(saved, "--dtype", "float32", "--images", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("ready to train\n")
    assert max(map(len, done.stdout.splitlines())) <= 80
    done = run(saved, "--json", "--role-grammar", '{"form": "headings"}')
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert not found["good"]
    assert [x["name"] for x in found["findings"] if x["outcome"] == "WRONG"] == ["tags"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere/no"], "processor got 'nowhere/no'"),
        (["{saved}", "--images", "{saved}"], "expected a folder with pictures"),
        (["{saved}", "--role-grammar", "think"], "is not JSON"),
        (["{saved}", "--role-grammar", "[1]"], "is not an object"),
        (["{saved}", "--role-grammar", '{"tags": 1}'], "expected a setting"),
        (["{saved}", "--rollouts", "0"], "not an integer of at least 1"),
    ],
)
def test_what_cannot_be_checked(saved, arguments, said, capsys):
    try:
        code = main(["check", *(str(saved) if x == "{saved}" else x for x in arguments)])
    except SystemExit as stopped:  # argparse's
        code = stopped.code
    assert code == 2
    out, err = capsys.readouterr()
    assert said in err
    assert out == ""
