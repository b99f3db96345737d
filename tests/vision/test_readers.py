"""What will read the streams decides what is scored; a reader that finds a cell nobody scored never passes silently."""

import itertools
import warnings

import method_oracles
import oracles
import pytest
import tiny_vlms
import torch
from rollouts import Rollout, T, corrupted_inputs, deleted_logps, make_rollout, own_logps

from srpo import (
    METHODS,
    PRESETS,
    ConfigError,
    ConfigWarning,
    CreditConfig,
    PatchMask,
    role_contrast,
    role_weighted_grpo_loss_from_logps,
    token_weights,
)
from srpo import metrics as metric_sums
from srpo.streams import is_no_evidence, is_not_scored

ADVANTAGES = torch.tensor([1.0, -0.5, 0.7])
READERS = ("srpo", "srpo_one_pass", "srpo_signed", "srpo_kl", "vppo", "pgpo", "tor", "papo")


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    return make_rollout("qwen25vl", tiny_vlms.build("qwen25vl"), (2, 1, 1))


@pytest.fixture(scope="module")
def truth(rollout) -> dict[str, torch.Tensor]:
    """All three streams on every token, by forwards of the model alone."""
    dark = corrupted_inputs(rollout, PatchMask())
    return {
        "clean": own_logps(rollout.model, rollout.ids, rollout.mask, **rollout.inputs).double(),
        "corrupted": own_logps(rollout.model, rollout.ids, rollout.mask, **dark).double(),
        "ablated": deleted_logps(rollout).double(),
    }


def weights_of(name: str, rollout: Rollout, streams) -> torch.Tensor:
    signals = {
        "logps": streams.logps, "completion_mask": rollout.valid, "role_ids": rollout.roles, "advantages": ADVANTAGES,
        "corrupted_logps": streams.corrupted_logps, "ablated_logps": streams.ablated_logps, "entropy": streams.entropy,
    }  # fmt: skip
    if name == "papo":  # its weights are 1: it reads the stream in its term
        term = METHODS[name].loss_term(streams.logps.clone().requires_grad_(), **signals)
        return term.detach().expand(rollout.roles.shape)
    return METHODS[name](**signals)


@pytest.mark.parametrize("name", READERS)
def test_exactly_the_rows_that_are_read_are_scored(rollout, truth, name):
    streams = rollout.score(credit=name)
    reader = METHODS[name]
    for stream, got in (("corrupted", streams.corrupted_logps), ("ablated", streams.ablated_logps)):
        assert (got is not None) == (stream in reader.streams)
        if got is not None:
            rows = reader.rows(stream, rollout.roles, rollout.valid)
            torch.testing.assert_close(got[rows].double(), truth[stream][rows], rtol=0, atol=1e-5)
            assert is_not_scored(got[~rows]).all()


@pytest.mark.parametrize("preset", ["srpo", "srpo_one_pass", "srpo_kl"])
def test_weights_of_a_preset_against_float64(rollout, truth, preset):
    credit, streams = PRESETS[preset], rollout.score(credit=PRESETS[preset])
    contrast = oracles.contrast(*truth.values(), rollout.roles, rollout.valid, credit)
    expected = oracles.weights(contrast, rollout.roles, rollout.valid, credit, ADVANTAGES)
    out = role_weighted_grpo_loss_from_logps(
        streams.logps, ADVANTAGES, role_ids=rollout.roles, completion_mask=rollout.valid, credit=credit,
        corrupted_logps=streams.corrupted_logps, ablated_logps=streams.ablated_logps,
    )  # fmt: skip
    for got in (weights_of(preset, rollout, streams), out.weights):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)
    reasoning = rollout.valid & (rollout.roles == 2)
    assert (out.weights[reasoning] - 1).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["vppo", "pgpo", "tor"])
def test_weights_of_a_neighbour_against_float64(rollout, truth, name):
    streams = rollout.score(credit=name)
    logits_entropy = {"entropy": streams.entropy.double()} if name == "tor" else {}
    expected = getattr(method_oracles, f"{name}_weights")(
        truth["clean"], truth["corrupted"], *logits_entropy.values(), rollout.valid
    )
    torch.testing.assert_close(weights_of(name, rollout, streams).double(), expected, rtol=0, atol=1e-4)


def test_one_scoring_serves_blame_by_siblings(rollout, truth):
    streams = rollout.score(credit="srpo_sibling")
    divergences = rollout.score(credit=CreditConfig(contrast_kind="kl"))
    rows = METHODS["srpo_sibling"].rows("corrupted", rollout.roles, rollout.valid)
    torch.testing.assert_close(streams.corrupted_kl[rows], divergences.corrupted_kl[rows])
    for name, got in (("corrupted", streams.corrupted_logps), ("ablated", streams.ablated_logps)):
        read = METHODS["srpo_sibling"].rows(name, rollout.roles, rollout.valid)
        torch.testing.assert_close(got[read].double(), truth[name][read], rtol=0, atol=1e-5)
    signals = {name: getattr(streams, name) for name in ("logps", "corrupted_logps", "ablated_logps", "corrupted_kl")}
    weights = METHODS["srpo_sibling"](
        **signals, role_ids=rollout.roles, completion_mask=rollout.valid, advantages=ADVANTAGES,
        completion_ids=torch.arange(rollout.roles.numel()).view_as(rollout.roles) % 50,
        group_ids=torch.zeros(len(rollout.roles), dtype=torch.long),
    )  # fmt: skip
    assert weights.isfinite().all()
    assert (weights[rollout.valid & (rollout.roles > 0)] != 1).any()


MISMATCHES = [(a, b) for a, b in itertools.product(READERS, repeat=2) if a != b]


@pytest.mark.parametrize(("scored", "read"), MISMATCHES)
def test_a_reader_is_served_by_another_ones_streams_or_refused(rollout, scored, read):
    """Where a method reads no more than what was scored, its weights are its own; else an error names the stream."""
    streams = rollout.score(credit=scored)
    served = all(
        stream in METHODS[scored].streams
        and not (METHODS[read].rows(stream, *roles) & ~METHODS[scored].rows(stream, *roles)).any()
        for stream in METHODS[read].streams
        for roles in [(rollout.roles, rollout.valid)]
    )
    if served:
        own = weights_of(read, rollout, rollout.score(credit=read))
        torch.testing.assert_close(weights_of(read, rollout, streams), own, rtol=0, atol=1e-4)
    else:
        with pytest.raises(ConfigError, match=r"corrupted_logps|ablated_logps"):
            weights_of(read, rollout, streams)


def other_roles(rollout: Rollout) -> torch.Tensor:
    return rollout.roles.roll(1, dims=1)


def other_rows(rollout: Rollout) -> torch.Tensor:
    return rollout.roles.roll(1, dims=0)


@pytest.mark.parametrize("change", [other_roles, other_rows, lambda r: torch.full((3, T), 2), torch.zeros_like])
def test_other_roles_than_the_scorers_are_refused(rollout, change):
    changed = change(rollout if change is not torch.zeros_like else rollout.roles)
    streams = Rollout.score(rollout, role_ids=changed)
    with pytest.raises(ConfigError, match="not scored"):
        weights_of("srpo", rollout, streams)


def test_a_longer_mask_than_the_scorers_is_refused(rollout):
    streams = rollout.score()
    with pytest.raises(ConfigError, match="not scored"):
        role_contrast(
            streams.logps, corrupted_logps=streams.corrupted_logps, ablated_logps=streams.ablated_logps,
            role_ids=torch.where(rollout.valid, rollout.roles, 2),
        )  # fmt: skip


def test_where_values_are_not_checked_a_count_and_one_warning_say_so(rollout):
    streams = rollout.score()
    out = role_weighted_grpo_loss_from_logps(
        streams.logps, ADVANTAGES, role_ids=rollout.roles, completion_mask=rollout.valid,
        corrupted_logps=streams.corrupted_logps, credit=PRESETS["srpo_one_pass"], validate_values=False,
    )  # fmt: skip
    metric_sums._warn_not_scored.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            named = out.metrics.floats()
    assert named["srpo/cells_not_scored"] == int((rollout.valid & (rollout.roles == 2)).sum())
    assert [x.category for x in caught] == [ConfigWarning]
    assert "credit=" in str(caught[0].message)


def test_where_values_are_not_checked_the_two_functions_give_nan(rollout):
    streams, credit = rollout.score(), PRESETS["srpo_one_pass"]
    contrast = role_contrast(
        streams.logps, corrupted_logps=streams.corrupted_logps, role_ids=rollout.roles,
        completion_mask=rollout.valid, credit=credit, validate_values=False,
    )  # fmt: skip
    weights = token_weights(contrast, rollout.roles, rollout.valid, credit=credit, validate_values=False)
    assert weights[rollout.valid & (rollout.roles == 2)].isnan().all()
    with pytest.raises(ConfigError, match="contrast"):
        token_weights(contrast, rollout.roles, rollout.valid, credit=credit)


@pytest.mark.parametrize("missing_role", ["uniform", "within"])
def test_a_row_without_a_picture_has_weights_of_exactly_1(missing_role):
    """Beside rows with pictures, through the loss and through the two functions."""
    mixed = make_rollout("idefics3", tiny_vlms.build("idefics3"), (2, 0, 1))
    streams, credit = mixed.score(), CreditConfig(missing_role=missing_role)
    given = {
        "corrupted_logps": streams.corrupted_logps, "ablated_logps": streams.ablated_logps, "role_ids": mixed.roles,
        "completion_mask": mixed.valid, "credit": credit,
    }  # fmt: skip
    out = role_weighted_grpo_loss_from_logps(streams.logps, ADVANTAGES, **given)
    contrast = role_contrast(streams.logps, **given)
    assert is_no_evidence(streams.corrupted_logps[1][mixed.seen[1]]).all()
    for weights in (out.weights, token_weights(contrast, mixed.roles, mixed.valid, credit=credit)):
        if missing_role == "uniform":
            assert torch.equal(weights[1], mixed.valid[1].float())
        else:
            assert torch.equal(weights[1][mixed.seen[1]], torch.ones(int(mixed.seen[1].sum())))
        assert ((weights - 1).abs().amax(dim=1)[[0, 2]] > 1e-3).all()
    named = out.metrics.floats()
    assert named["srpo/perception/evidence_fraction"] == pytest.approx(int(mixed.visual.sum()) / int(mixed.seen.sum()))
    assert named["srpo/cells_not_scored"] == 0.0


def test_an_own_contrast_goes_through_the_credit_stage(rollout):
    streams, generator = rollout.score(), torch.Generator().manual_seed(0)
    contrast = torch.randn(rollout.roles.shape, generator=generator)
    out = role_weighted_grpo_loss_from_logps(
        streams.logps, ADVANTAGES, role_ids=rollout.roles, completion_mask=rollout.valid, contrast=contrast
    )
    expected = oracles.weights(contrast, rollout.roles, rollout.valid, CreditConfig())
    torch.testing.assert_close(out.weights.double(), expected, rtol=0, atol=1e-6)
    assert out.metrics.floats()["srpo/perception/weight_mean"] == pytest.approx(
        float(expected[rollout.seen].mean()), abs=1e-6
    )
    with pytest.raises(ConfigError, match="corrupted_logps"):
        role_weighted_grpo_loss_from_logps(
            streams.logps, ADVANTAGES, role_ids=rollout.roles, contrast=contrast,
            corrupted_logps=streams.corrupted_logps,
        )  # fmt: skip
    with pytest.raises(ConfigError, match="role_ids"):
        role_weighted_grpo_loss_from_logps(streams.logps, ADVANTAGES, contrast=contrast)
    with pytest.raises(ConfigError, match="contrast"):
        role_weighted_grpo_loss_from_logps(
            streams.logps, ADVANTAGES, role_ids=rollout.roles, contrast=contrast, weights=contrast.abs()
        )


def test_a_stream_that_the_credit_does_not_read_is_not_scored_on_request(rollout):
    with pytest.raises(ConfigError, match=r"streams got .* which the credit reads"):
        rollout.score(credit="srpo_one_pass", streams=("clean", "ablated"))


def test_a_method_without_roles_needs_none(rollout):
    streams = rollout.score(credit="vppo", role_ids=None)
    assert torch.equal(is_not_scored(streams.corrupted_logps), ~rollout.valid)
