"""The loss from hidden states against the float64 oracle, padded and packed, and against the loss from logits.

Every call of `check_against_oracle` fills the rows that need no logits with NaN, so it also checks what is skipped.
"""

from __future__ import annotations

import pytest
import torch
from hidden_cases import (
    LOSS_TYPES,
    MODES,
    NAN,
    check_against_oracle,
    inputs_of,
    leaves_of,
    make_case,
    many_examples,
    on,
    room_for,
    run,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import credit_configs, loss_configs
from torch import Tensor
from torch.nn.functional import linear

import srpo
from srpo import CreditConfig, LossConfig


@pytest.mark.parametrize("importance_sampling_level", ["token", "sequence_token"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_with_everything_on(backend, device, loss_type, importance_sampling_level):
    case = make_case(400, mask_style="holes", role_style="mixed")
    loss = LossConfig(
        loss_type=loss_type,
        beta=0.1,
        temperature=0.8,
        delta=None if loss_type == "cispo" else 1.5,
        epsilon_high=1.1 if loss_type == "cispo" else 0.28,
        importance_sampling_level=importance_sampling_level,
        max_completion_length=11,
    )
    ratio, ref = case.batch.importance_sampling_ratio, case.batch.ref_logps
    inputs = inputs_of(case, "live", loss=loss, ref_logps=ref, importance_sampling_ratio=ratio, num_items_in_batch=12.5)
    inputs["old_logps"] = case.batch.old_logps
    check_against_oracle(case, inputs, backend, device, room_for(3, case, backend))


@pytest.mark.parametrize("rows", [None, 1, 3], ids=["default", "one row", "three rows"])
@pytest.mark.parametrize("mode", MODES)
def test_every_credit_mode_in_every_workspace(backend, device, mode, rows):
    """Trajectories of up to seven rows: three rows end a chunk inside them."""
    case = make_case(401, 4, 7, V=7, H=5, mask_style="ragged", role_style="mixed")
    advantages = torch.tensor([0.7, 0.0, -1.2, 0.4])
    inputs = inputs_of(case, mode, advantages=advantages)
    workspace = None if rows is None else room_for(rows, case, backend)
    out = check_against_oracle(case, inputs, backend, device, workspace)
    assert mode == "no roles" or (out.weights[case.batch.valid] != 1).any()


@st.composite
def cases(draw, vocabularies, dtypes=(torch.float32, torch.float64)):
    """A case, its inputs, and the rows of the workspace (None: the default)."""
    case = make_case(
        draw(st.integers(0, 2**32 - 1)),
        rows=draw(st.integers(0, 4)),
        tokens=draw(st.integers(0, 6)),
        V=draw(st.sampled_from(vocabularies)),
        H=draw(st.integers(5, 16)),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        mask_style=draw(st.sampled_from(["full", "ragged", "holes", "empty_rows", "all_masked"])),
        role_style=draw(st.sampled_from(["spans", "mixed", "one_role_missing", "none"])),
        contrast_style=draw(st.sampled_from(["plain", "special", "equal", "huge"])),
    )
    mode = draw(st.sampled_from(MODES))
    loss = draw(loss_configs(temperature=draw(st.sampled_from([0.7, 1.0, 1.3]))))
    inputs = inputs_of(case, mode, loss=loss, ref_logps=case.batch.ref_logps if loss.beta else None)
    if "credit" in inputs:
        signal = "image_independence" if mode == "one pass" else "perception_ablation"
        inputs["credit"] = draw(credit_configs(reasoning_signal=signal))
    if draw(st.booleans()):
        inputs["importance_sampling_ratio"] = case.batch.importance_sampling_ratio
    if draw(st.booleans()):
        per_token = case.batch.advantages[:, None] + torch.zeros(case.batch.role_ids.shape)
        per_token[:, ::3] *= -0.5
        per_token[:, 1::4] = 0.0
        inputs["advantages"] = torch.where(case.batch.valid, per_token, NAN)
    return case, inputs, draw(st.sampled_from([None, 1, 2, 5])), draw(st.booleans())


@many_examples
@given(drawn=cases((1, 7, 33, 127, 130, 1000)))
def test_random_batches_on_the_torch_backend(device, drawn):
    case, inputs, rows, one_more_position = drawn
    workspace = None if rows is None else room_for(rows, case, "torch")
    check_against_oracle(case, inputs, "torch", device, workspace, one_more_position)


@given(drawn=cases((7, 33, 130)))
def test_random_batches_on_the_kernels(device, drawn):
    case, inputs, rows, one_more_position = drawn
    workspace = None if rows is None else room_for(rows, case, "triton")
    check_against_oracle(case, inputs, "triton", device, workspace, one_more_position)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["scored before", "live base", "given weights"])
def test_half_precision(backend, device, mode, dtype):
    """The old policy stays close, so that no rounding of a logit moves a ratio over a branch point."""
    case = make_case(403, V=130, H=16, dtype=dtype, drift=0.1, mask_style="ragged", role_style="mixed")
    check_against_oracle(case, inputs_of(case, mode), backend, device, room_for(3, case, backend))


@pytest.mark.parametrize("direction", ["evidence", "advantage"])
@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_token_level_advantages(backend, device, loss_type, direction):
    case = make_case(404, mask_style="holes", role_style="mixed")
    advantages = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    advantages[:, 2], advantages[1] = 0.0, 0.0
    advantages[~case.batch.valid] = NAN
    loss = LossConfig(loss_type=loss_type, epsilon_high=1.1 if loss_type == "cispo" else 0.2)
    credit = CreditConfig(direction=direction)
    for mode in ("scored before", "live base"):
        inputs = inputs_of(case, mode, advantages=advantages, loss=loss, credit=credit)
        check_against_oracle(case, inputs, backend, device)


@pytest.mark.parametrize("level", ["token", "sequence_token"])
@pytest.mark.parametrize("mode", MODES)
def test_packed_equals_padded(backend, device, mode, level):
    """Three trajectories of 4, 0 and 2 tokens, the second without any."""
    case = make_case(410, 3, 4, V=7, H=5, mask_style="full", role_style="mixed")
    kept = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    advantages = torch.tensor([0.9, 0.5, -0.6])
    loss = LossConfig(beta=0.05, importance_sampling_level=level)
    ratio = case.batch.importance_sampling_ratio
    inputs = inputs_of(
        case, mode, advantages=advantages, loss=loss, ref_logps=case.batch.ref_logps, importance_sampling_ratio=ratio
    )
    inputs["completion_mask"] = kept.long()
    workspace = room_for(3, case, backend)
    padded, padded_grads = run(case, inputs, device, backend, workspace_bytes=workspace)

    flat = {k: x[kept] if isinstance(x, Tensor) and x.dim() > 1 else x for k, x in inputs.items()}
    del flat["completion_mask"]
    leaves = leaves_of(case, device)
    leaves["hidden"] = leaves["hidden"].detach()[kept.to(device)].requires_grad_()
    packed = srpo.role_weighted_grpo_loss_from_hidden(
        completion_ids=case.batch.completion_ids[kept].to(device),
        cu_seqlens=torch.tensor([0, 4, 4, 6], dtype=torch.int32, device=device),
        backend=backend,
        workspace_bytes=workspace,
        **leaves,
        **on(device, flat),
    )
    packed.loss.backward()
    kept = kept.to(device)
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-5, atol=1e-6)
    for name in ("logps", "weights", "entropy"):
        torch.testing.assert_close(getattr(packed, name), getattr(padded, name)[kept], rtol=1e-5, atol=1e-6)
    padded_grads["hidden"] = padded_grads["hidden"][kept]
    for name, leaf in leaves.items():
        assert leaf.grad.any()
        torch.testing.assert_close(leaf.grad, padded_grads[name], rtol=1e-5, atol=1e-6)
    assert packed.metrics.floats() == pytest.approx(padded.metrics.floats(), rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_is_that_of_the_logits(backend, device, mode):
    """Same loss, metrics, weights and log-probs as the other entry, which computes every row."""
    case = make_case(424, mask_style="holes", role_style="mixed")
    inputs = on(device, inputs_of(case, mode, advantages=torch.tensor([0.7, 0.3, -1.2, 0.4])))
    head = [x.to(device) for x in (case.weight, case.bias)]
    live = {k.replace("_hidden", "_logits"): linear(inputs[k], *head) for k in case.streams if k in inputs}
    ids = case.batch.completion_ids.to(device)
    logits = linear(case.hidden.to(device), *head).requires_grad_()
    others = {k: x for k, x in inputs.items() if k not in case.streams}
    expected = srpo.role_weighted_grpo_loss(logits, completion_ids=ids, backend=backend, **others, **live)
    out, _ = run(case, inputs, device, backend)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=2e-6)
    for name in ("logps", "weights", "entropy"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=1e-5, atol=4e-6)
    rows = {"srpo/rows_scored": case.batch.valid.sum().item(), "srpo/rows_skipped": 0}
    assert set(out.metrics) == set(expected.metrics) | set(rows)
    assert out.metrics.floats() == pytest.approx(expected.metrics.floats() | rows, rel=1e-4, abs=2e-5, nan_ok=True)
