"""Records of credit: made of tensors, kept as JSON lines, refused with a reason."""

import json
import math

import pytest
import torch
from credit_cases import Characters, batch, record
from PIL import Image

import srpo
from srpo import ConfigError, ConfigWarning, DtypeError, ShapeError
from srpo.rollout import credit_rollout
from srpo.vision.scoring import StreamLogps
from srpo.viz import CreditRecord, append_records, credit_html, credit_records, read_records


def test_records_hold_what_the_rollout_computed():
    ids, mask = batch(["<see>cat</see><think>1</think>", "no tags"])
    advantages, rewards = torch.tensor([1.0, -0.5]), torch.tensor([1.0, 0.0])
    generator = torch.Generator().manual_seed(0)

    def score(role_ids, credit):
        draws = [-torch.rand(ids.shape, generator=generator) for _ in range(3)]
        return StreamLogps(*draws, draws[0])

    credited = credit_rollout(ids, advantages, Characters(), score, completion_mask=mask)
    first, second = credit_records(
        ids, Characters(), credited.weights, completion_mask=mask, roles=credited.roles, streams=credited.streams,
        advantages=advantages, rewards=rewards, group_ids=torch.tensor([3, 3]), prompts=["a", "b"], step=7,
    )  # fmt: skip
    assert (first.text, second.text) == ("<see>cat</see><think>1</think>", "no tags")
    assert (first.parsed, second.parsed, first.group, first.step, second.prompt) == (True, False, 3, 7, "b")
    assert (first.reward, second.advantage) == (1.0, -0.5)
    n = len(first.tokens)
    products = [a * w for a, w in zip(first.advantages, first.weights, strict=True)]
    torch.testing.assert_close(torch.tensor(products), credited.advantages[0, :n])
    contrast = srpo.role_contrast(
        credited.streams.logps, corrupted_logps=credited.streams.corrupted_logps,
        ablated_logps=credited.streams.ablated_logps, role_ids=credited.roles.role_ids, completion_mask=mask,
    )  # fmt: skip
    for t, role in enumerate(first.roles):
        assert first.contrast[t] == (pytest.approx(float(contrast[0, t])) if role else None)
    assert set(second.weights) == {1.0}


def test_what_no_policy_sampled_stays_in_the_text_without_credit():
    ids, mask = batch(["abcdef"])
    mask[0, 2:4], mask[0, 5] = 0, 0
    (made,) = credit_records(ids, Characters(), torch.ones(1, 6), completion_mask=mask)
    assert made.text == "abcde"
    assert made.sampled == (1, 1, 0, 0, 1)
    assert made.weights == (1.0, 1.0, 0.0, 0.0, 1.0)


def test_no_valid_token():
    (made,) = credit_records(
        torch.zeros(1, 3).long(), Characters(), torch.ones(1, 3), completion_mask=torch.zeros(1, 3)
    )
    assert made.tokens == ()
    assert CreditRecord.from_json(made.to_json()) == made
    assert "no token counts" in credit_html(made)


def test_bytes_of_a_character_are_shown_with_its_last():
    class Bytes(Characters):
        def decode(self, ids, **_):
            return bytes(ids).decode("utf-8", errors="replace")

    raw = "a😀é".encode() + b"\xff"
    (made,) = credit_records(torch.tensor([list(raw)]), Bytes(), torch.ones(1, len(raw)))
    assert made.tokens == ("a", "", "", "", "😀", "", "é", "\ufffd")
    raw = b"\xff" + "😀".encode() + b"b" + b"\xff" * 20
    (made,) = credit_records(torch.tensor([list(raw)]), Bytes(), torch.ones(1, len(raw)))
    assert made.tokens == ("", "", "", "", "\ufffd😀", "b", *["\ufffd"] * 20)


def test_the_contrast_of_a_method_is_that_of_the_picture():
    ids, _ = batch(["<see>cat</see>"])
    logps = -torch.rand(ids.shape)
    streams = StreamLogps(logps, logps - 1.0, None, logps)
    (made,) = credit_records(
        ids, Characters(), torch.ones(ids.shape), roles=torch.ones_like(ids), streams=streams,
        credit=srpo.METHODS["vppo"],
    )  # fmt: skip
    assert made.contrast == pytest.approx([1.0] * ids.shape[1])


def test_json_lines_keep_everything(tmp_path):
    picture = Image.new("RGB", (900, 30), "red")
    ids, _ = batch(["inf"])
    (made,) = credit_records(
        ids, Characters(), torch.full((1, 3), 1.25), contrast=torch.tensor([[math.nan, -0.5, math.inf]]),
        advantages=torch.tensor([[0.5, 1.0, -math.inf]]), images=[[picture]], corrupted_images=[picture],
    )  # fmt: skip
    hostile = record(("inf", "</script>", "\ud800\u2028\x00", "العربية"), prompt="-inf", reward=math.inf)
    path = tmp_path / "rollouts.jsonl"
    append_records(path, [made])
    append_records(path, [hostile])
    assert read_records(path) == [made, hostile]
    assert made.contrast == (None, -0.5, math.inf)
    assert made.images == made.corrupted_images
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity are no JSON


def test_a_cut_line_costs_that_line_alone(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    records = [record(("a",)), record(("b",)), record(("c",))]
    append_records(path, records[:2])
    path.write_bytes(path.read_bytes()[:-9])
    append_records(path, records[2:])
    with pytest.warns(ConfigWarning, match="1 cut lines"):
        assert read_records(path) == [records[0], records[2]]


@pytest.mark.parametrize(
    ("change", "error", "argument"),
    [
        ({"tokens": "ab"}, DtypeError, "tokens"),
        ({"weights": (1.0,)}, ShapeError, "weights"),
        ({"weights": None}, DtypeError, "weights"),
        ({"roles": (0, 3)}, ConfigError, "roles"),
        ({"sampled": (0, 2)}, ConfigError, "sampled"),
        ({"logps": ("x", "y")}, DtypeError, "logps"),
        ({"advantage": (1.0,)}, ShapeError, "advantage"),
        ({"reward": "1"}, DtypeError, "reward"),
        ({"prompt": 3}, DtypeError, "prompt"),
        ({"images": ("https://example.org/a.png",)}, ConfigError, "images"),
        ({"images": ('data:image/svg+xml,<svg onload="alert(1)">',)}, ConfigError, "images"),
    ],
)
def test_records_that_are_refused(change, error, argument):
    with pytest.raises(error, match=rf"^CreditRecord\(\): {argument} got "):
        CreditRecord(**({"tokens": ("a", "b"), "weights": (1.0, 1.0)} | change))


@pytest.mark.parametrize(
    ("change", "error", "argument"),
    [
        ({"weights": torch.ones(1, 2)}, ShapeError, "weights"),
        ({"weights": torch.ones(1, 3).long()}, DtypeError, "weights"),
        ({"completion_ids": torch.ones(1, 3)}, DtypeError, "completion_ids"),
        ({"completion_ids": [[1]]}, DtypeError, "completion_ids"),
        ({"completion_mask": torch.ones(1, 2)}, ShapeError, "completion_mask"),
        ({"roles": torch.ones(3).long()}, ShapeError, "roles"),
        ({"advantages": torch.ones(2)}, ShapeError, "advantages"),
        ({"rewards": torch.ones(1, 3)}, ShapeError, "rewards"),
        ({"contrast": torch.ones(1)}, ShapeError, "contrast"),
        ({"group_ids": torch.ones(1)}, DtypeError, "group_ids"),
        ({"prompts": "abc"}, ShapeError, "prompts"),
        ({"prompts": ["a", "b"]}, ShapeError, "prompts"),
        ({"images": ["a.png"]}, ConfigError, "images"),
        ({"images": [3]}, DtypeError, "images"),
    ],
)
def test_batches_that_are_refused(change, error, argument):
    given = {"completion_ids": torch.ones(1, 3).long(), "tokenizer": Characters(), "weights": torch.ones(1, 3)} | change
    with pytest.raises(error, match=rf"(credit_records|CreditRecord)\(\): {argument} got "):
        credit_records(**given)


@pytest.mark.parametrize(
    "line", ["3", "{}", '{"tokens": [], "weights": [], "weihgts": []}', '{"tokens": 3, "weights": 1}']
)
def test_lines_that_are_no_record(line):
    with pytest.raises((ConfigError, DtypeError), match=r"^CreditRecord\(\): \w+ got "):
        CreditRecord.from_json(line)
