"""The numbers behind `LossOutput.metrics`: diagnostics per role and sign of the advantage, and sums that add up."""

import math
import statistics
import warnings

import pytest
import torch
from strategies import make_batch

import srpo
from srpo import CreditConfig, LossConfig, metrics, role_weighted_grpo_loss, role_weighted_grpo_loss_from_logps

SIGNS = {"positive": 1.0, "negative": -1.0}
ROLES = {"perception": 1, "reasoning": 2}


def batch_of(seed=4, rows=6, **options):
    """A batch in which every trajectory has both roles."""
    batch = make_batch(seed, rows, 11, mask_style="holes", **options)
    roles = (torch.arange(11) + torch.arange(rows)[:, None]) % 3
    batch = batch.replace(role_ids=roles, advantages=torch.tensor([1.0, -0.5, 0.0, 2.0, -1.0, 0.3])[:rows])
    assert all(((batch.role_ids == role) & batch.valid).any(1).all() for role in (1, 2))
    return batch


def run(batch, backend, **options):
    return role_weighted_grpo_loss_from_logps(
        batch.logps, batch.advantages, completion_mask=batch.completion_mask, old_logps=batch.old_logps,
        backend=backend, **batch.contrast_streams(), **options,
    )  # fmt: skip


def contrasts_of(batch, credit):
    negative = torch.where(batch.role_ids == 1, batch.corrupted_logps, batch.ablated_logps)
    c = (batch.old_logps.double() - negative.double()).clamp(-credit.contrast_clamp, credit.contrast_clamp)
    return c.nan_to_num(0.0)


def test_diagnostics_per_role_and_sign(backend):
    batch, credit = batch_of(), CreditConfig()
    out = run(batch, backend, credit=credit)
    c, sign = contrasts_of(batch, credit), batch.advantages[:, None].sign().expand(batch.role_ids.shape)
    shared = torch.stack([c[i][batch.in_credit_set[i]].mean() for i in range(6)])
    unclipped = (c - shared[:, None]).exp()
    got = out.metrics.floats()
    for role, role_id in ROLES.items():
        of_role = batch.valid & (batch.role_ids == role_id)
        assert got[f"srpo/{role}/length"] == pytest.approx(of_role.sum().item() / 6)
        assert got[f"srpo/{role}/weight_mean"] == pytest.approx(out.weights[of_role].mean().item(), rel=1e-5)
        for name, value in SIGNS.items():
            cell = of_role & (sign == value)
            expected = {
                "contrast_mean": c[cell].mean().item(),
                "contrast_std": statistics.pstdev(c[cell].tolist()),
                "weight_mean": out.weights[cell].mean().item(),
                "clip_fraction": ((unclipped < 0.8) | (unclipped > 1.2))[cell].double().mean().item(),
            }
            for key, number in expected.items():
                assert got[f"srpo/{role}/{name}/{key}"] == pytest.approx(number, rel=1e-4, abs=1e-6), (role, name, key)
    credited = out.weights[batch.in_credit_set].double()
    assert got["srpo/effective_sample_size"] == pytest.approx(
        (credited.sum() ** 2 / (credited.square().sum() * credited.numel())).item(), rel=1e-5
    )
    assert got["srpo/baseline"] == pytest.approx(shared.mean().item(), rel=1e-4)
    assert got["srpo/zero_advantage_fraction"] == pytest.approx(1 / 6)
    assert got["srpo/uniform_fraction"] == 0.0
    assert got["srpo/contrasts_without_value"] == 0.0


def test_trajectories_without_a_role_and_contrasts_without_a_value_are_counted(backend):
    batch = batch_of()
    roles = batch.role_ids.clone()
    roles[0] = 1
    corrupted = batch.corrupted_logps.clone()
    perceives = batch.valid & (roles == 1)
    row = int((perceives.sum(dim=1) * (roles == 2).any(dim=1)).argmax())  # of several tokens: the role is still there
    corrupted[row, int(perceives[row].nonzero()[0])] = torch.nan
    got = run(batch.replace(role_ids=roles, corrupted_logps=corrupted), backend).metrics.floats()
    assert got["srpo/uniform_fraction"] == pytest.approx(1 / 6)
    assert got["srpo/contrasts_without_value"] == 1.0
    assert got["srpo/perception/evidence_fraction"] == 1.0

    corrupted[row, perceives[row]] = torch.nan  # now the role is missing
    got = run(batch.replace(role_ids=roles, corrupted_logps=corrupted), backend)
    named, n = got.metrics.floats(), int(perceives.sum())
    assert named["srpo/uniform_fraction"] == pytest.approx(2 / 6)
    assert named["srpo/contrasts_without_value"] == int(perceives[row].sum())
    assert named["srpo/perception/evidence_fraction"] == pytest.approx(1 - int(perceives[row].sum()) / n)
    assert (got.weights[row] == batch.valid[row]).all()


def test_sums_of_micro_batches_add_up(backend):
    batch, loss = batch_of(), LossConfig(beta=0.1)
    whole = run(batch, backend, loss=loss, ref_logps=batch.ref_logps).metrics
    parts = []
    for rows in (slice(0, 2), slice(2, 3), slice(3, 6)):
        part = batch.rows(rows)
        parts.append(run(part, backend, loss=loss, ref_logps=part.ref_logps).metrics)
    added = parts[0] + parts[1] + parts[2]
    assert list(added) == list(whole)
    assert added.floats() == pytest.approx(whole.floats(), rel=1e-6, nan_ok=True)
    with pytest.raises(TypeError):
        whole + run(batch, backend).metrics


def test_a_mean_over_nothing_is_nan_and_the_trainers_names_are_finite(backend):
    got = run(batch_of(rows=2).replace(advantages=torch.tensor([1.0, 2.0])), backend).metrics.floats()
    assert math.isnan(got["srpo/perception/negative/contrast_mean"])
    assert math.isfinite(got["srpo/perception/positive/contrast_mean"])
    assert all(math.isfinite(value) for name, value in got.items() if not name.startswith("srpo/"))


def test_entropy_is_the_mean_over_valid_tokens(backend):
    batch = make_batch(2, 3, 5, vocabulary=33)
    out = role_weighted_grpo_loss(
        batch.logits, batch.completion_ids, batch.advantages, completion_mask=batch.completion_mask, backend=backend
    )
    assert out.metrics["entropy"].item() == pytest.approx(out.entropy[batch.valid].mean().item(), rel=1e-5)
    assert not out.metrics.sums.requires_grad


@pytest.mark.parametrize("shift", [0, 1])
def test_logits_that_are_shifted_by_one_are_warned_of(backend, device, shift):
    """[B, T, V] of logits_to_keep=T: nothing in the shapes tells, the ratios of an on-policy call do."""
    generator = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(2, 9, 40, generator=generator)
    ids = torch.randint(40, (2, 8), generator=generator).to(device)
    old = srpo.selected_logps(logits.to(device), ids)
    given = logits[:, shift : 8 + shift].to(device)
    advantages = torch.tensor([1.0, -1.0], device=device)
    out = srpo.role_weighted_grpo_loss(given, ids, advantages, old_logps=old, backend=backend)
    metrics._warn_far_ratios.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        share, _ = (out.metrics.floats()["srpo/far_ratio_fraction"] for _ in range(2))
    assert (share > 1 / 3) == bool(shift)
    assert len(caught) == shift
    if shift:
        assert "shifted by one" in str(caught[0].message)
        assert "temperature" in str(caught[0].message)
    assert (
        "srpo/far_ratio_fraction" not in srpo.role_weighted_grpo_loss(given, ids, advantages, backend=backend).metrics
    )
