"""`group_advantages`: (R - mean_g) / (std_g + 1e-4) by group id, unbiased, never NaN."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import srpo
from srpo import ConfigError, ShapeError


def expected_advantages(rewards: list[float], groups: list[int], scale: str) -> list[float]:
    def spread(values):
        if len(values) < 2:
            return 0.0
        mean = math.fsum(values) / len(values)
        return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))

    result = []
    for reward, group in zip(rewards, groups, strict=True):
        members = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        centred = reward - math.fsum(members) / len(members)
        divisor = {"group": spread(members) + 1e-4, "batch": spread(rewards) + 1e-4, "none": 1.0}[scale]
        result.append(centred / divisor)
    return result


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@given(
    pairs=st.lists(
        st.tuples(st.floats(-10, 10, width=32), st.sampled_from([-7, 0, 1, 5, 2**40])), min_size=0, max_size=12
    )
)
def test_matches_the_formula_for_interleaved_groups(device, scale, pairs):
    rewards, groups = [reward for reward, _ in pairs], [group for _, group in pairs]
    got = srpo.group_advantages(
        torch.tensor(rewards, dtype=torch.float64, device=device),
        torch.tensor(groups, dtype=torch.int64, device=device),
        scale=scale,
    )
    expected = torch.tensor(expected_advantages(rewards, groups, scale), dtype=torch.float64)
    # Nearly equal rewards divide rounding errors of the mean by 1e-4.
    torch.testing.assert_close(got.double().cpu(), expected, rtol=1e-9, atol=1e-9)


def test_fp32_and_the_default_scale(device):
    rewards = torch.tensor([1.0, 0.0, 1.0, 3.0], device=device)
    groups = torch.tensor([4, 9, 9, 4], dtype=torch.int32, device=device)
    got = srpo.group_advantages(rewards, groups)
    expected = expected_advantages(rewards.tolist(), groups.tolist(), "group")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu(), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_of_one_gives_zero(device, scale, dtype):
    alone = srpo.group_advantages(
        torch.tensor([3.0], dtype=dtype, device=device), torch.tensor([2], device=device), scale=scale
    )
    assert alone.tolist() == [0.0]
    mixed = srpo.group_advantages(
        torch.tensor([3.0, 1.0, 2.0], dtype=dtype, device=device), torch.tensor([2, 8, 8], device=device), scale=scale
    )
    assert mixed[0].item() == 0.0
    assert mixed.isfinite().all()


def test_equal_rewards_give_exactly_zero(device):
    rewards = torch.full((5,), 2.0, device=device)
    assert not srpo.group_advantages(rewards, torch.zeros(5, dtype=torch.long, device=device)).any()


def test_empty_batch(device):
    got = srpo.group_advantages(torch.zeros(0, device=device), torch.zeros(0, dtype=torch.long, device=device))
    assert got.shape == (0,)


def test_permuting_the_batch_permutes_the_advantages(device):
    rewards = torch.tensor([0.0, 1.0, 0.5, 2.0, 0.25], device=device)
    groups = torch.tensor([0, 1, 0, 1, 0], device=device)
    order = torch.tensor([4, 2, 0, 3, 1], device=device)
    torch.testing.assert_close(
        srpo.group_advantages(rewards[order], groups[order]), srpo.group_advantages(rewards, groups)[order]
    )


def test_inputs_are_left_alone(device):
    rewards, groups = torch.tensor([1.0, 2.0], device=device), torch.tensor([0, 0], device=device)
    srpo.group_advantages(rewards, groups)
    assert (rewards.tolist(), groups.tolist()) == ([1.0, 2.0], [0, 0])


@pytest.mark.parametrize(
    ("rewards", "groups", "argument"),
    [
        (torch.zeros(3), torch.zeros(2, dtype=torch.long), "group_ids"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), "rewards"),
        (torch.zeros(2), torch.zeros(2, 1, dtype=torch.long), "group_ids"),
    ],
)
def test_wrong_shapes_name_the_argument(rewards, groups, argument):
    with pytest.raises(ShapeError, match=argument):
        srpo.group_advantages(rewards, groups)


def test_unknown_scale_names_the_options():
    with pytest.raises(ConfigError, match=r"scale.*group.*batch.*none"):
        srpo.group_advantages(torch.zeros(2), torch.zeros(2, dtype=torch.long), scale="std")


def test_float_group_ids_are_refused():
    with pytest.raises(srpo.DtypeError, match="group_ids"):
        srpo.group_advantages(torch.zeros(2), torch.zeros(2))
