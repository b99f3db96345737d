"""Bad input of the entries that take hidden states: one typed error, nothing computed, nothing modified."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hidden_cases import NAN, leaves_of, make_case
from refusals import ComputationSpy, assert_refused

import srpo
from srpo import ConfigError, DeviceError, DtypeError, LossConfig, ShapeError


def legal(device, backend, **changes):
    """A call with every optional tensor given, and `changes`."""
    case = make_case(470, 2, 3, V=7, H=5, mask_style="full")
    arguments = leaves_of(case, device) | {
        "completion_ids": case.batch.completion_ids.to(device),
        "advantages": torch.tensor([0.5, -1.0], device=device),
        "completion_mask": case.batch.completion_mask.to(device),
        "role_ids": torch.tensor([[1, 2, 1], [2, 1, 0]], dtype=torch.int8, device=device),
        "corrupted_hidden": case.streams["corrupted_hidden"].to(device),
        "ablated_hidden": case.streams["ablated_hidden"].to(device),
        "old_logps": case.batch.old_logps.to(device),
        "ref_logps": case.batch.ref_logps.to(device),
        "workspace_bytes": 1 << 20,
        "loss": LossConfig(beta=0.1),
        "validate_values": True,
        "backend": backend,
    }
    return arguments | changes


def of_selected(arguments):
    """What `selected_logps_from_hidden` takes of them."""
    names = ("hidden", "lm_head_weight", "bias", "completion_ids", "workspace_bytes", "process_group",
             "validate_values", "backend")  # fmt: skip
    return {name: arguments[name] for name in names if name in arguments}


def refuse(device, backend, error, argument, both=True, **changes):
    arguments = legal(device, backend, **changes)
    assert_refused(srpo.role_weighted_grpo_loss_from_hidden, arguments, error, argument)
    if both:
        assert_refused(srpo.selected_logps_from_hidden, of_selected(arguments), error, argument)


def test_the_unchanged_call_is_legal(backend, device):
    with ComputationSpy() as spy:
        out = srpo.role_weighted_grpo_loss_from_hidden(**legal(device, backend))
        srpo.selected_logps_from_hidden(**of_selected(legal(device, backend)))
    assert out.loss.isfinite()
    assert {"linear_head_training", "linear_head_logps"} <= set(spy.computed)


@pytest.mark.parametrize("shape", [(), (5,), (6, 5), (2, 5), (2, 5, 5), (2, 2, 5), (3, 3, 5), (1, 2, 3, 5)])
def test_wrong_shapes_of_hidden(backend, device, shape):
    refuse(device, backend, ShapeError, "hidden", hidden=torch.zeros(shape, device=device))


@pytest.mark.parametrize("shape", [(), (7,), (5, 7), (7, 4), (7, 6), (1, 7, 5), (0, 5)])
def test_wrong_shapes_of_the_head(backend, device, shape):
    refuse(device, backend, ShapeError, "lm_head_weight", lm_head_weight=torch.zeros(shape, device=device))


def test_a_hidden_of_another_width_is_an_error_of_the_head(backend, device):
    refuse(device, backend, ShapeError, "lm_head_weight", hidden=torch.zeros(2, 3, 4, device=device))


@pytest.mark.parametrize("shape", [(), (6,), (8,), (7, 1), (1,)])
def test_wrong_shapes_of_the_bias(backend, device, shape):
    refuse(device, backend, ShapeError, "bias", bias=torch.zeros(shape, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("argument", ["lm_head_weight", "bias"])
def test_dtypes_that_do_not_match(backend, device, argument, dtype):
    value = legal(device, backend)[argument].detach().to(dtype)
    refuse(device, backend, DtypeError, argument, **{argument: value})


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_dtypes_that_no_product_has(backend, device, dtype):
    refuse(device, backend, DtypeError, "hidden", hidden=torch.zeros(2, 3, 5, device=device).to(dtype))


@pytest.mark.parametrize("value", [None, [[1.0]], "hidden", 3], ids=repr)
def test_hidden_and_head_that_are_no_tensors(backend, device, value):
    refuse(device, backend, DtypeError, "hidden", hidden=value)
    refuse(device, backend, DtypeError, "lm_head_weight", lm_head_weight=value)


@pytest.mark.parametrize("argument", ["lm_head_weight", "bias"])
def test_a_head_on_another_device(backend, device, argument):
    refuse(device, backend, DeviceError, argument, **{argument: legal(device, backend)[argument].to("meta")})


def test_contrast_states_on_another_device(backend, device):
    value = torch.zeros(2, 3, 5, device="meta")
    refuse(device, backend, DeviceError, "corrupted_hidden", both=False, corrupted_hidden=value)


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "1 GiB"], ids=repr)
def test_workspaces_that_are_no_budget(backend, device, value):
    refuse(device, backend, ConfigError, "workspace_bytes", workspace_bytes=value)


@pytest.mark.parametrize("value", ["x", 0, object], ids=repr)
def test_process_groups_that_are_none(backend, device, value):
    refuse(device, backend, ConfigError, "process_group", process_group=value)


@pytest.mark.parametrize("bad", [-1, 7, -100, 2**40])
def test_ids_outside_the_vocabulary(backend, device, bad):
    ids = legal(device, backend)["completion_ids"].clone()
    ids[1, 2] = bad
    refuse(device, backend, ValueError, "completion_ids", completion_ids=ids)


@pytest.mark.parametrize("stream", ["corrupted", "ablated"])
def test_contrasts_given_twice_or_not_at_all(backend, device, stream):
    given_twice = {f"{stream}_logps": torch.zeros(2, 3, device=device)}
    refuse(device, backend, ConfigError, f"{stream}_hidden", both=False, **given_twice)
    refuse(device, backend, ConfigError, f"{stream}_logps", both=False, **{f"{stream}_hidden": None})


@pytest.mark.parametrize("argument", ["corrupted_hidden", "ablated_hidden"])
def test_contrast_states_unlike_the_hidden_states(backend, device, argument):
    for shape in ((2, 3), (2, 3, 6), (2, 5, 5), (1, 3, 5)):
        refuse(device, backend, ShapeError, argument, both=False, **{argument: torch.zeros(shape, device=device)})
    half = torch.zeros(2, 3, 5, device=device, dtype=torch.bfloat16)
    refuse(device, backend, DtypeError, argument, both=False, **{argument: half})


def test_contrast_states_without_roles_or_with_weights(backend, device):
    refuse(device, backend, ConfigError, "role_ids", both=False, role_ids=None)
    weights = torch.ones(2, 3, device=device)
    refuse(device, backend, ConfigError, "corrupted_hidden", both=False, weights=weights)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_shard_of_zero_3_is_named_as_one(backend, device, autocast):
    """DeepSpeed leaves an empty parameter in place of one that is spread over ranks."""
    weight = torch.nn.Parameter(torch.empty(0, device=device))
    weight.ds_status = "NOT_AVAILABLE"
    context = torch.autocast(device.type, dtype=torch.bfloat16) if autocast else contextlib.nullcontext()
    for function in (srpo.role_weighted_grpo_loss_from_hidden, srpo.selected_logps_from_hidden):
        arguments = legal(device, backend, lm_head_weight=weight)
        if function is srpo.selected_logps_from_hidden:
            arguments = of_selected(arguments)
        with context, pytest.raises(DeviceError, match=r"lm_head_weight.*GatheredParameters"):
            function(**arguments)


@pytest.mark.parametrize("value", [0.0, -1.0, True, "1", NAN], ids=repr)
def test_temperatures_that_are_none(backend, device, value):
    arguments = of_selected(legal(device, backend)) | {"temperature": value}
    assert_refused(srpo.selected_logps_from_hidden, arguments, ConfigError, "temperature")


def test_other_arguments_are_checked_as_everywhere(backend, device):
    arguments = legal(device, backend)
    for error, argument, value in [
        (ShapeError, "advantages", torch.zeros(3, device=device)),
        (ValueError, "advantages", torch.tensor([NAN, 1.0], device=device)),
        (ShapeError, "old_logps", torch.zeros(2, 4, device=device)),
        (ConfigError, "ref_logps", None),
        (ValueError, "role_ids", torch.full((2, 3), 5, device=device)),
        (ConfigError, "num_items_in_batch", -1),
        (ConfigError, "credit", None),
        (ConfigError, "backend", "cuda"),
    ]:
        assert_refused(srpo.role_weighted_grpo_loss_from_hidden, arguments | {argument: value}, error, argument)
