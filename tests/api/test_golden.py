"""The golden vectors of the method, section 7, through the public functions."""

from __future__ import annotations

import pytest
import torch
from strategies import make_credit
from tolerances import assert_close_to_truth

import srpo
from srpo import CreditConfig, LossConfig

NAN = float("nan")

# The last two cells of row 2 are masked: NaN there must never be read.
OLD = [[-0.5, -1, -0.2, -0.7, -1.2, -0.1], [-0.9, -0.4, -0.3, -1.5, NAN, NAN]]
CORRUPTED = [[-1.7, -1.1, -0.9, -0.8, -1, -0.1], [-0.8, -2.4, -0.4, -1.4, NAN, NAN]]
ABLATED = [[-0.5, -1, -0.2, -1.3, -1.1, -0.4], [-0.9, -0.4, -0.9, -1.2, NAN, NAN]]
ROLES = [[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 0, 0]]
MASK = [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
ADVANTAGES = [1.0, -0.5]

CONTRAST = [[1.2, 0.1, 0.7, 0.6, -0.1, 0.3], [-0.1, 2, 0.6, -0.3, 0, 0]]
IMAGE_INDEPENDENCE_CONTRAST = [[1.2, 0.1, 0.7, -0.1, 0.2, 0], [-0.1, 2, -0.1, 0.1, 0, 0]]
K3 = [[0.501194, 0.004837, 0.196585, 0.004837, 0.021403, 0], [0.005171, 1.135335, 0.004837, 0.005171, 0, 0]]

DEFAULT_WEIGHTS = [
    [1.202181, 0.801454, 1.202181, 1.144708, 0.801454, 0.848021],
    [0.830895, 1.246342, 1.091869, 0.830895, 0, 0],
]
WEIGHTS = {
    "srpo": (CreditConfig(), DEFAULT_WEIGHTS),
    "srpo_wide": (
        CreditConfig(weight_min=0.5, weight_max=2.0),
        [[1.842647, 0.638515, 1.16345, 1.052733, 0.522772, 0.779884], [0.512649, 1.964001, 1.032349, 0.491, 0, 0]],
    ),
    "solve": (
        CreditConfig(weight_min=0.5, weight_max=2.0, normalize="solve"),
        [[1.894349, 0.630574, 1.148981, 1.039641, 0.51627, 0.770185], [0.5, 2, 1, 0.5, 0, 0]],
    ),
    "none": (
        CreditConfig(normalize="none"),
        [[1.2, 0.8, 1.2, 1.142631, 0.8, 0.846482], [0.8, 1.2, 1.051271, 0.8, 0, 0]],
    ),
    "advantage": (
        CreditConfig(direction="advantage"),
        [DEFAULT_WEIGHTS[0], [1.156284, 0.770856, 0.916576, 1.156284, 0, 0]],
    ),
    "image_independence": (
        CreditConfig(reasoning_signal="image_independence"),
        [[1.271926, 0.84795, 1.271926, 0.84795, 0.912297, 0.84795], [0.888889, 1.333333, 0.888889, 0.888889, 0, 0]],
    ),
}
# The method prints six decimals.
PRINTED = 6e-7


@pytest.fixture(params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def dtype(request):
    return request.param


def assert_printed(got, expected):
    torch.testing.assert_close(
        got.double().cpu(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=PRINTED + 5e-7, equal_nan=False
    )


@pytest.fixture
def golden(device, dtype):
    """The golden inputs under the names of the public functions."""

    def floats(values):
        return torch.tensor(values, dtype=dtype, device=device)

    return {
        "old_logps": floats(OLD),
        "advantages": floats(ADVANTAGES),
        "completion_mask": torch.tensor(MASK, device=device),
        "streams": {
            "corrupted_logps": floats(CORRUPTED),
            "ablated_logps": floats(ABLATED),
            "role_ids": torch.tensor(ROLES, dtype=torch.int8, device=device),
        },
    }


def contrast_of(golden, credit, backend):
    return srpo.role_contrast(
        golden["old_logps"],
        **golden["streams"],
        completion_mask=golden["completion_mask"],
        credit=credit,
        backend=backend,
    )


@pytest.mark.parametrize(
    ("signal", "expected"),
    [("perception_ablation", CONTRAST), ("image_independence", IMAGE_INDEPENDENCE_CONTRAST)],
)
def test_contrast(golden, backend, signal, expected):
    assert_printed(contrast_of(golden, CreditConfig(reasoning_signal=signal), backend), expected)


def test_image_independence_needs_no_ablated_stream(golden, backend):
    golden["streams"]["ablated_logps"] = None
    credit = CreditConfig(reasoning_signal="image_independence")
    assert_printed(contrast_of(golden, credit, backend), IMAGE_INDEPENDENCE_CONTRAST)


def test_k3_contrast(golden, backend):
    golden["streams"]["role_ids"] = torch.ones_like(golden["streams"]["role_ids"])
    assert_printed(contrast_of(golden, CreditConfig(contrast_kind="k3"), backend), K3)


def test_absolute_contrast(golden, backend):
    expected = [[abs(value) for value in row] for row in CONTRAST]
    assert_printed(contrast_of(golden, CreditConfig(contrast_kind="abs"), backend), expected)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(golden, backend, name):
    credit, expected = WEIGHTS[name]
    got = srpo.token_weights(
        contrast_of(golden, credit, backend),
        golden["streams"]["role_ids"],
        golden["completion_mask"],
        advantages=golden["advantages"],
        credit=credit,
        backend=backend,
    )
    assert_printed(got, expected)


def test_the_presets_are_the_printed_rows(golden, backend):
    for name in ("srpo", "srpo_wide"):
        weights = srpo.token_weights(
            contrast_of(golden, srpo.PRESETS[name], backend),
            golden["streams"]["role_ids"],
            golden["completion_mask"],
            credit=srpo.PRESETS[name],
            backend=backend,
        )
        assert_printed(weights, WEIGHTS[name][1])


def test_the_rlsd_row_follows_from_the_same_equations(device, dtype, backend):
    """All tokens in one role, no baseline, signed, half strength: RLSD's printed token advantages."""
    student = torch.tensor(OLD, dtype=dtype, device=device).nan_to_num()
    teacher = torch.tensor(
        [[-0.3, -1.1, -0.2, -0.4, -1.6, -0.1], [-1.2, -0.4, -0.2, -1.6, 0, 0]], dtype=dtype, device=device
    )
    advantages = torch.tensor(ADVANTAGES, dtype=dtype, device=device)
    credit = CreditConfig(baseline="none", direction="advantage", normalize="none", strength=0.5, missing_role="within")
    weights = srpo.token_weights(
        teacher - student,
        torch.full_like(student, 2, dtype=torch.int8),
        torch.tensor(MASK, device=device),
        advantages=advantages,
        credit=credit,
        backend=backend,
    )
    expected = [[1.1, 0.952419, 1, 1.1, 0.9, 1], [-0.55, -0.5, -0.476209, -0.526293, 0, 0]]
    assert_printed(srpo.token_advantages(advantages, weights), expected)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("from_logits", [False, True], ids=["logps", "logits"])
def test_on_policy_loss_and_gradient(golden, device, dtype, backend, name, from_logits):
    """rho = 1: the loss is -sum(A w) / N and its gradient in the log-probs -A w / N, over N = 10 valid tokens."""
    credit, printed = WEIGHTS[name]
    weights = torch.tensor(printed, dtype=torch.float64)
    coefficients = -torch.tensor(ADVANTAGES, dtype=torch.float64)[:, None] * weights / 10.0
    common = {
        **golden["streams"],
        "completion_mask": golden["completion_mask"],
        "credit": credit,
        "loss": LossConfig(),
        "backend": backend,
    }
    if from_logits:
        # Five tokens: the sampled one has the golden probability, the other four share the rest.
        probability = golden["old_logps"].double().exp()[..., None]
        sampled = torch.arange(5, device=device) == 2
        logits = torch.where(sampled, probability, (1 - probability) / 4).log().to(dtype).requires_grad_()
        ids = torch.full((2, 6), 2, device=device)
        out = srpo.role_weighted_grpo_loss(logits, ids, golden["advantages"], **common)
        onehot_minus_softmax = sampled.double().cpu() - logits.detach().double().cpu().softmax(-1).nan_to_num()
        expected_gradient = coefficients[..., None] * onehot_minus_softmax
        variable = logits
    else:
        variable = golden["old_logps"].clone().requires_grad_()
        out = srpo.role_weighted_grpo_loss_from_logps(variable, golden["advantages"], **common)
        expected_gradient = coefficients
    out.loss.backward()
    assert_printed(out.weights, printed)
    assert_printed(out.loss, coefficients.sum().item())
    torch.testing.assert_close(variable.grad.double().cpu(), expected_gradient, rtol=0, atol=3e-7)
    assert_close_to_truth(
        "logps", out.logps, torch.tensor(OLD, dtype=torch.float64).nan_to_num(), precision=torch.float32
    )


def test_mean_one_weights_leave_the_on_policy_value_at_grpo(golden, backend):
    """-(6 * 1 - 4 * 0.5) / 10 whatever the weights."""
    for name in ("srpo", "srpo_wide", "solve", "advantage", "image_independence"):
        out = srpo.role_weighted_grpo_loss_from_logps(
            golden["old_logps"],
            golden["advantages"],
            **golden["streams"],
            completion_mask=golden["completion_mask"],
            credit=WEIGHTS[name][0],
            backend=backend,
        )
        assert out.loss.item() == pytest.approx(-0.4, abs=1e-6)


def test_wide_signed_bounds_warn():
    with pytest.warns(srpo.ConfigWarning, match="advantage"):
        CreditConfig(direction="advantage", weight_min=0.5, weight_max=2.0)
    make_credit(direction="advantage", weight_min=0.8, weight_max=1.2)


def test_presets():
    assert set(srpo.PRESETS) >= {"grpo", "srpo", "srpo_wide", "srpo_one_pass", "srpo_signed", "srpo_kl"}
    assert srpo.PRESETS["srpo"] == CreditConfig()
    assert srpo.PRESETS["srpo_wide"] == CreditConfig(weight_min=0.5, weight_max=2.0)
    assert srpo.PRESETS["srpo_one_pass"] == CreditConfig(reasoning_signal="image_independence")
    assert srpo.PRESETS["srpo_signed"] == CreditConfig(direction="advantage", normalize="none")
    assert srpo.PRESETS["srpo_kl"].contrast_kind == "k3"


def test_the_oracle_meets_the_printed_numbers():
    """The oracle of the other tests is held to the same numbers."""
    import oracles

    old, corrupted, ablated = (torch.tensor(values, dtype=torch.float64) for values in (OLD, CORRUPTED, ABLATED))
    roles, mask, advantages = torch.tensor(ROLES), torch.tensor(MASK), torch.tensor(ADVANTAGES)
    for credit, expected in WEIGHTS.values():
        contrast = oracles.contrast(old, corrupted, ablated, roles, mask, credit)
        assert_printed(oracles.weights(contrast, roles, mask, credit, advantages), expected)
