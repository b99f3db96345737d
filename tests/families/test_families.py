"""Each family: three streams equal to what its model says by itself, whole and in batches; what is refused."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch
import transformers
from families.harness import FAMILIES, Rollout
from families.streams import EXACT, GIVEN, check_streams
from rollouts import assert_close

from srpo import ConfigError, PatchMask, corrupt_images, role_weighted_grpo_loss_from_logps, score_streams
from srpo.vision import scorer
from srpo.vision.prefix import Proofs

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

# Families whose prompts are not shared: their layers keep a state, something follows the head (a cap, a scale, banned
# tokens), pictures are no part of the token stream or are wanted in each forward, or positions cannot be said.
WHOLE = {
    *("lfm2_vl", "lfm2_vl_split", "lfm3", "qwen3_5", "qwen3_5_moe"),
    *("chameleon", "gemma4", "gemma4_bidirectional", "hyperclova"),
    *("blip2", "idefics1", "instructblip", "kosmos2"),
}
# Models, or processors, that do nothing without a picture.
SEEING = ("paligemma", "git", "kosmos2", "blip2", "instructblip", "mllama")
LATE = [pytest.param(name, (0, 2, 1), marks=pytest.mark.slow) for name in FAMILIES if name not in SEEING]
LATE += [pytest.param("llava_onevision", (0, 2, 1), id="a processor that counts pictures where there are some")]


@pytest.mark.parametrize(("name", "images"), [*((name, None) for name in FAMILIES), *LATE])
def test_streams_are_those_of_the_model(name, images):
    check_streams(name, images)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_of_two_sequences_scores_alike(name, monkeypatch):
    """Computed once where the model can go on from its cache, and in whole sequences: the same streams."""
    rollout = Rollout(FAMILIES[name], group=True)
    given = {"corrupted_inputs": rollout.without_pictures(), **GIVEN.get(name, lambda _: {})(rollout)}
    rollout.score(**given)  # proves
    shared = rollout.score(**given)
    shares = scorer.PROOFS.known(rollout.model)
    assert bool(shares) == (name not in WHOLE)
    monkeypatch.setattr(scorer, "PROOFS", Proofs())
    scorer.PROOFS.keep(rollout.model, False, "a test")
    for got, expected in zip(shared, rollout.score(**given), strict=True):
        assert_close(got, expected, rollout.valid & ~expected.isnan(), rtol=0, atol=1e-5)
        assert torch.equal(got.isnan(), expected.isnan())


GUIDE = pathlib.Path(__file__).parents[2] / "srpo" / "README.md"


def test_the_table_of_the_guide_has_all_families():
    text = GUIDE.read_text()
    assert f"{len(FAMILIES)} families and settings" in (GUIDE.parents[1] / "README.md").read_text()
    assert f"| equal | {len(FAMILIES)} | {', '.join(FAMILIES)} |" in text
    assert f"computed once on {len(FAMILIES) - len(WHOLE)} of the {len(FAMILIES)}" in text


@pytest.mark.parametrize("name", ["internvl", "qwen3_5"])
def test_the_recipe_of_the_guide(name):
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (recipe,) = (block for block in blocks if "def score_rollout" in block)
    names = {"torch": torch, "PatchMask": PatchMask, "score_streams": score_streams}
    exec(recipe, names)
    rollout = Rollout(FAMILIES[name], (2, 0, 1))
    given = (rollout.texts, rollout.images, rollout.completion_ids, rollout.completion_mask, rollout.roles)
    out = names["score_rollout"](rollout.model, rollout.processor, *given)
    assert_close(out.logps, rollout.each_alone(), rollout.valid, **EXACT)
    assert_close(out.corrupted_logps, rollout.whole(**rollout.without_pictures()), rollout.visual, **EXACT)
    assert_close(out.ablated_logps, rollout.deleted(), rollout.reasoned, **EXACT)


# What is refused, and the advice


def test_positions_that_do_not_show():
    rollout = Rollout(FAMILIES["kosmos2"])
    dark = rollout.without_pictures()
    with pytest.raises(ConfigError, match=r"pass position_ids .* or streams=\('clean', 'corrupted'\)"):
        rollout.score(corrupted_inputs=dark)
    out = rollout.score(corrupted_inputs=dark, streams=("clean", "corrupted"))
    assert_close(out.corrupted_logps, rollout.whole(**dark), rollout.visual, **EXACT)


NAME = "qformer_attention_mask"


def test_questions_padded_on_the_left():
    rollout = Rollout(FAMILIES["instructblip"])
    flat = [image for row in rollout.images for image in row]
    mask = rollout.processor.raw(text=rollout.texts, images=flat, padding=True, return_tensors="pt")[NAME]
    with pytest.raises(ConfigError, match=r"qformer_attention_mask got padding on the left.*padding_side='right'"):
        rollout.score(**{NAME: mask})


@pytest.mark.parametrize("name", [name for name, x in FAMILIES.items() if x.state])
def test_states_that_a_mask_does_not_reach(name):
    rollout = Rollout(FAMILIES[name])
    with pytest.raises(ConfigError, match="pass ablation=None"):
        rollout.score(corrupted_inputs=rollout.without_pictures(), ablation="mask")


@pytest.mark.parametrize("name", ["internvl", "qwen3_5", "idefics3_split", "gemma3", "llava_next"])
def test_pixels_whose_place_is_unknown(name):
    """The message says which call to make; the call in it is made."""
    rollout = Rollout(FAMILIES[name])
    with pytest.raises(ConfigError, match="corrupted_inputs=") as caught:
        rollout.score()
    advice = re.search(r"corrupted_inputs=(.*)\)\.$", str(caught.value))[1]
    flat = [image for row in rollout.images for image in row]
    names = {
        "texts": rollout.texts, "images": rollout.images if rollout.family.nested else flat,
        "processor": rollout.processor, "corrupt_images": corrupt_images, "PatchMask": PatchMask,
    }  # fmt: skip
    dark = dict(eval(advice, names))
    out = rollout.score(corrupted_inputs=dark)
    pictures = {key: x for key, x in dark.items() if key in rollout.inputs and "token_type" not in key}
    assert_close(out.corrupted_logps, rollout.whole(**pictures), rollout.visual, **EXACT)


def test_encoder_decoders():
    sizes = {f"{half}_{what}": 2 for half in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = transformers.BartConfig(vocab_size=99, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, **sizes)
    model = transformers.BartForConditionalGeneration(config).eval()
    ids, roles = torch.arange(4, 20).reshape(2, 8), torch.tensor([[1, 1, 2, 2]] * 2)
    answers = ids[:, 4:].contiguous()
    with pytest.raises(ConfigError, match="their own forward and pass the log-probs to role_weighted_grpo_loss"):
        score_streams(model, ids, torch.ones_like(ids), 4, role_ids=roles)
    contexts = [model(input_ids=x, labels=answers).logits for x in (ids[:, :4], ids[:, :2], ids[:, 2:4])]
    logps, *others = (x.log_softmax(dim=-1).gather(-1, answers[..., None])[..., 0] for x in contexts)
    corrupted, ablated = (x.detach() for x in others)
    advantages = torch.tensor([1.0, -1.0])
    out = role_weighted_grpo_loss_from_logps(
        logps, advantages, role_ids=roles, corrupted_logps=corrupted, ablated_logps=ablated
    )
    out.loss.backward()
    assert max(x.grad.abs().max() for x in model.parameters() if x.grad is not None) > 0
