"""Divergences out of `score_streams`: against the models' own logits, on both roads, and who reads them."""

import oracles
import pytest
import tiny_vlms
import torch
from rollouts import (
    Rollout,
    T,
    assert_close,
    build_text,
    corrupted_inputs,
    deleted_logits,
    make_rollout,
    own_logits,
    repeated,
    text_rollout,
)

import srpo
from srpo import METHODS, ConfigError, CreditConfig, PatchMask
from srpo.integrations.verl import CreditStages
from srpo.rollout import weigh_rollout
from srpo.settings import CreditSettings
from srpo.streams import is_no_evidence, is_not_scored
from srpo.vision import prefix, scorer

KL = CreditConfig(contrast_kind="kl")
ONE_PASS = CreditConfig(contrast_kind="kl", reasoning_signal="image_independence")
VPPO = METHODS["vppo"].with_kl("full")


@pytest.fixture(autouse=True)
def nothing_is_proven(monkeypatch):
    monkeypatch.setattr(scorer, "PROOFS", prefix.Proofs())


@pytest.fixture(scope="module", params=tiny_vlms.FAMILIES)
def rollout(request) -> Rollout:
    return make_rollout(request.param, tiny_vlms.build(request.param))


@pytest.fixture(scope="module", params=tiny_vlms.FAMILIES)
def group(request) -> Rollout:
    return repeated(make_rollout(request.param, tiny_vlms.build(request.param)), (0, 0, 1, 2, 0, 2, 1, 2))


def truths(rollout: Rollout, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL from the corrupted and from the ablated context, of the models' own logits."""
    clean = own_logits(rollout.model, rollout.ids, rollout.mask, **rollout.inputs).double()
    dark = own_logits(rollout.model, rollout.ids, rollout.mask, **corrupted_inputs(rollout, PatchMask())).double()
    return oracles.kl(clean, dark, temperature), oracles.kl(clean, deleted_logits(rollout).double(), temperature)


@pytest.mark.parametrize("arguments", [{}, {"batch_size": 2}, {"temperature": 0.7}], ids=repr)
def test_the_models_own_logits_say_the_same(rollout, arguments):
    out = rollout.score(credit=KL, **arguments)
    dark, blind = truths(rollout, arguments.get("temperature", 1.0))
    assert_close(out.corrupted_kl, dark, rollout.visual, rtol=1e-3, atol=1e-5)
    assert_close(out.ablated_kl, blind, rollout.reasoned, rtol=1e-3, atol=1e-5)
    assert (out.corrupted_kl[rollout.visual] > 0).any()
    for kl, logps in ((out.corrupted_kl, out.corrupted_logps), (out.ablated_kl, out.ablated_logps)):
        assert torch.equal(is_not_scored(kl), is_not_scored(logps))
        assert torch.equal(is_no_evidence(kl), is_no_evidence(logps))
    sampled = rollout.score(**arguments)
    for name in ("logps", "corrupted_logps", "ablated_logps", "entropy"):
        torch.testing.assert_close(getattr(out, name), getattr(sampled, name), rtol=0, atol=2e-6, equal_nan=True)
    assert sampled.corrupted_kl is None
    assert len(sampled) == 4


@pytest.mark.parametrize("credit", [KL, ONE_PASS, VPPO], ids=["two streams", "one pass", "vppo"])
def test_shared_prompts_say_the_same(group, credit):
    got = group.score(credit=credit, batch_size=3)
    assert scorer.PROOFS.known(group.model) is True
    scorer.PROOFS.keep(group.model, False, "a test")
    want = group.score(credit=credit, batch_size=3)
    for a, b in zip(got, want, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)
    assert want.corrupted_kl is not None


def test_a_model_whose_head_is_not_alone():
    """Its own logits are contrasted: a cap bends them."""
    bent = text_rollout(build_text("Gemma2", head_dim=16, final_logit_softcapping=3.0))
    out = bent.score(credit=KL, streams=("clean", "ablated"))
    clean = own_logits(bent.model, bent.ids, bent.mask).double()
    assert_close(out.ablated_kl, oracles.kl(clean, deleted_logits(bent).double()), bent.reasoned, rtol=1e-3, atol=1e-5)


def test_the_weights_are_those_of_the_divergences(rollout):
    out = rollout.score(credit=KL)
    advantages = torch.tensor([1.0, -1.0, 0.5])
    weighed = weigh_rollout(out, rollout.roles, advantages, completion_mask=rollout.valid, credit=KL)
    given = {"corrupted_kl": out.corrupted_kl, "ablated_kl": out.ablated_kl}
    loss = srpo.role_weighted_grpo_loss_from_logps(
        out.logps, advantages, role_ids=rollout.roles, completion_mask=rollout.valid, credit=KL, **given
    )
    assert torch.equal(weighed.weights, loss.weights)
    contrast = srpo.role_contrast(out.logps, **given, role_ids=rollout.roles, completion_mask=rollout.valid, credit=KL)
    found = rollout.visual | rollout.reasoned
    expected = torch.where(rollout.seen, out.corrupted_kl, out.ablated_kl)
    assert torch.equal(contrast[found], expected[found])
    assert (loss.weights[found] != 1).any()


def test_methods_take_it_by_name(rollout):
    scored = rollout.score(credit=VPPO)
    assert scored.corrupted_kl is not None
    signals = {"logps": scored.logps, "completion_mask": rollout.valid, "corrupted_kl": scored.corrupted_kl}
    everywhere = torch.where(rollout.valid, scored.corrupted_kl.nan_to_num(0.0), 0.0)
    assert torch.equal(VPPO(**signals), METHODS["vppo"](kl="full", **signals))
    kept = METHODS["vppo"](kl="full", **signals) > 0
    for row, valid in enumerate(rollout.valid):
        n = int(valid.sum())
        best = everywhere[row].sort(descending=True, stable=True).values[: -(-4 * n // 10)]
        assert kept[row].sum() == len(best)
        assert everywhere[row][kept[row]].min() >= best.min() - 1e-9
    pgpo = METHODS["pgpo"](kl="full", **signals)
    torch.testing.assert_close(pgpo.sum(1), rollout.valid.sum(1).float())
    sampled = rollout.score(credit="vppo")
    published = {"logps": sampled.logps, "completion_mask": rollout.valid, "corrupted_logps": sampled.corrupted_logps}
    assert torch.equal(METHODS["vppo"](**published), METHODS["vppo"](kl="k3", **published))
    with pytest.raises(ConfigError, match=r"METHODS\['vppo'\]\(\): corrupted_kl got None"):
        METHODS["vppo"](kl="full", **published)
    with pytest.raises(ConfigError, match=r"METHODS\['rlsd'\]\(\): kl got 'full', expected None"):
        METHODS["rlsd"].with_kl("full")
    with pytest.raises(ConfigError, match="expected 'k3' or 'full'"):
        METHODS["vppo"].with_kl("exact")


def test_settings_of_a_trainer():
    assert CreditSettings.of({"credit": {"contrast_kind": "kl"}}).credit == KL
    assert CreditSettings.of({"credit": {"preset": "vppo", "kl": "full"}}).credit == VPPO
    with pytest.raises(ConfigError, match=r"CreditStages\(\): contrast_kind got 'kl'.*workers return.*'k3'"):
        CreditStages(CreditSettings(credit=KL), None, None, None, lambda *_: None)


def test_nothing_to_score():
    empty = text_rollout(build_text("Llama"))
    rows = (empty.ids[:0], empty.mask[:0])
    out = srpo.score_streams(empty.model, *rows, T, role_ids=empty.roles[:0], credit=KL, streams=("clean", "ablated"))
    assert out.ablated_kl is not None
    assert out.ablated_kl.shape == (0, T)
