"""Hostile input: one typed error that names the function and the argument; nothing modified, nothing computed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from refusals import ComputationSpy, assert_refused
from strategies import make_batch
from torch import Tensor

import srpo
from srpo import (
    METHODS,
    PRESETS,
    ConfigError,
    ConfigWarning,
    CreditConfig,
    DeviceError,
    DtypeError,
    LossConfig,
    NonFiniteError,
    RoleGrammar,
    RoleParse,
    ShapeError,
    SRPOError,
    StreamLogps,
    role_weighted_grpo_loss,
    role_weighted_grpo_loss_from_hidden,
    selected_logps,
    token_weights,
)
from srpo.integrations.verl import token_credit_advantages

B, T, V = 2, 3, 7
NAN, INF = float("nan"), float("inf")


def valid_arguments(entry: str, device, backend: str = "torch") -> dict:
    """A legal call with every optional tensor given."""
    batch = make_batch(300, B, T, vocabulary=V, mask_style="full", role_style="mixed").to(device)
    arguments = {
        "advantages": batch.advantages,
        "role_ids": torch.tensor([[1, 2, 1], [2, 1, 0]], dtype=torch.int8, device=device),
        "completion_mask": batch.completion_mask,
        "corrupted_logps": batch.corrupted_logps,
        "ablated_logps": batch.ablated_logps,
        "old_logps": batch.old_logps,
        "ref_logps": batch.ref_logps,
        "importance_sampling_ratio": batch.importance_sampling_ratio,
        "loss": LossConfig(beta=0.1),
        "backend": backend,
    }
    if entry == "logits":
        leaf = batch.logits.clone().requires_grad_()
        return {"logits": leaf, "completion_ids": batch.completion_ids, **arguments}
    return {"logps": batch.logps.clone().requires_grad_(), **arguments}


FUNCTIONS = {"logits": srpo.role_weighted_grpo_loss, "logps": srpo.role_weighted_grpo_loss_from_logps}


@pytest.fixture(params=["logits", "logps"])
def entry(request):
    return request.param


def refuse(entry, device, backend, error, argument, **changes):
    arguments = {**valid_arguments(entry, device, backend), **changes}
    return assert_refused(FUNCTIONS[entry], arguments, error, argument)


def test_the_unchanged_call_is_legal(entry, backend, device):
    with ComputationSpy() as spy:
        out = FUNCTIONS[entry](**valid_arguments(entry, device, backend))
    assert out.loss.isfinite()
    assert (out.weights != 1).any()
    assert spy.computed  # so an empty record elsewhere means that nothing ran


TOKEN_ARGUMENTS = [
    "role_ids",
    "completion_mask",
    "corrupted_logps",
    "ablated_logps",
    "old_logps",
    "ref_logps",
    "importance_sampling_ratio",
]


@pytest.mark.parametrize("argument", TOKEN_ARGUMENTS)
@pytest.mark.parametrize("fault", ["longer", "fewer rows", "extra rank", "flat", "scalar"])
def test_wrong_shapes(entry, backend, device, argument, fault):
    value = valid_arguments(entry, device)[argument]
    broken = {
        "longer": torch.cat([value, value[:, :1]], dim=1),
        "fewer rows": value[:1],
        "extra rank": value[..., None],
        "flat": value.flatten(),
        "scalar": value[0, 0],
    }[fault]
    refuse(entry, device, backend, ShapeError, argument, **{argument: broken})


@pytest.mark.parametrize("shape", [(), (B + 1,), (B, T + 1), (B, T, 1), (B, 1)])
def test_wrong_shapes_of_advantages(entry, backend, device, shape):
    refuse(entry, device, backend, ShapeError, "advantages", advantages=torch.zeros(shape, device=device))


@pytest.mark.parametrize("shape", [(B, T), (B, T + 2, V), (B + 1, T, V), (B, T - 1, V), (1, B, T, V), (B * T, V), ()])
def test_wrong_shapes_of_logits(backend, device, shape):
    logits = torch.zeros(shape, device=device, requires_grad=True)
    refuse("logits", device, backend, ShapeError, "logits|completion_ids", logits=logits)


@pytest.mark.parametrize("shape", [(B,), (B, T, 1), (), (B * T,)])
def test_wrong_rank_of_logps_and_ids(backend, device, shape):
    refuse("logps", device, backend, ShapeError, "logps", logps=torch.zeros(shape, device=device))
    ids = torch.zeros(shape, dtype=torch.long, device=device)
    refuse("logits", device, backend, ShapeError, "completion_ids", completion_ids=ids)


@pytest.mark.parametrize("argument", ["corrupted_logits", "ablated_logits"])
@pytest.mark.parametrize("shape", [(B, T), (B, T, V + 1), (B, T + 2, V), (B + 1, T, V)])
def test_wrong_shapes_of_live_contrasts(backend, device, argument, shape):
    changes = {argument.replace("logits", "logps"): None, argument: torch.zeros(shape, device=device)}
    refuse("logits", device, backend, ShapeError, argument, **changes)


@pytest.mark.parametrize("shape", [(B,), (B, T + 1), (B, T, 1)])
def test_wrong_shapes_of_weights(entry, backend, device, shape):
    changes = {"corrupted_logps": None, "ablated_logps": None, "weights": torch.ones(shape, device=device)}
    refuse(entry, device, backend, ShapeError, "weights", **changes)


FLOAT_ARGUMENTS = [
    "advantages",
    "corrupted_logps",
    "ablated_logps",
    "old_logps",
    "ref_logps",
    "importance_sampling_ratio",
]


@pytest.mark.parametrize("argument", FLOAT_ARGUMENTS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_wrong_dtypes_of_floats(entry, backend, device, argument, dtype):
    value = valid_arguments(entry, device)[argument].nan_to_num().to(dtype)
    refuse(entry, device, backend, DtypeError, argument, **{argument: value})


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool])
def test_wrong_dtypes_of_logits_and_logps(backend, device, dtype):
    refuse("logits", device, backend, DtypeError, "logits", logits=torch.zeros(B, T, V, device=device).to(dtype))
    refuse("logps", device, backend, DtypeError, "logps", logps=torch.zeros(B, T, device=device).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_wrong_dtypes_of_integers(entry, backend, device, dtype):
    value = torch.zeros(B, T, device=device).to(dtype)
    refuse(entry, device, backend, DtypeError, "role_ids", role_ids=value)
    if entry == "logits":
        refuse(entry, device, backend, DtypeError, "completion_ids", completion_ids=value)


@pytest.mark.parametrize("value", [None, [1.0, -0.5], 1.0, "advantages"], ids=repr)
def test_advantages_that_are_no_tensor(entry, backend, device, value):
    refuse(entry, device, backend, DtypeError, "advantages", advantages=value)


@pytest.mark.parametrize("argument", ["advantages", *TOKEN_ARGUMENTS])
def test_tensors_on_another_device(entry, backend, device, argument):
    value = valid_arguments(entry, device)[argument].to("meta")
    refuse(entry, device, backend, DeviceError, argument, **{argument: value})


def test_ids_on_another_device(backend, device):
    ids = torch.zeros(B, T, dtype=torch.long, device="meta")
    refuse("logits", device, backend, DeviceError, "completion_ids", completion_ids=ids)


@pytest.mark.parametrize("bad", [-1, V, -100, 2**40])
def test_ids_outside_the_vocabulary(backend, device, bad):
    ids = torch.full((B, T), 1, device=device)
    ids[1, 2] = bad
    changes = {"completion_ids": ids, "validate_values": True}
    refuse("logits", device, backend, ValueError, "completion_ids", **changes)
    with pytest.raises(ValueError, match="completion_ids"):
        srpo.selected_logps(torch.zeros(B, T, V, device=device), ids, backend=backend, validate_values=True)


@pytest.mark.parametrize("bad", [-100, V, 2**40])
def test_ids_outside_the_vocabulary_are_fine_where_masked(backend, device, bad):
    arguments = valid_arguments("logits", device, backend)
    arguments["completion_ids"] = arguments["completion_ids"].clone()
    arguments["completion_ids"][1, 2] = bad
    arguments["completion_mask"] = torch.tensor([[1, 1, 1], [1, 1, 0]], device=device)
    out = srpo.role_weighted_grpo_loss(**arguments, validate_values=True)
    assert out.loss.isfinite()


@pytest.mark.parametrize("bad", [-1, 3, 100])
def test_role_ids_outside_their_range(entry, backend, device, bad):
    roles = torch.tensor([[0, 1, 2], [0, bad, 2]], dtype=torch.int8, device=device)
    refuse(entry, device, backend, ValueError, "role_ids", role_ids=roles, validate_values=True)


@pytest.mark.parametrize(
    "mask",
    [torch.tensor([[1, 1, 2], [1, 1, 1]]), torch.tensor([[1, 1, -1], [1, 1, 1]]), torch.full((B, T), 0.5)],
    ids=["2", "-1", "0.5"],
)
def test_masks_that_are_not_zero_or_one(entry, backend, device, mask):
    refuse(entry, device, backend, ValueError, "completion_mask", completion_mask=mask.to(device), validate_values=True)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("per_token", [False, True])
def test_advantages_that_are_not_finite(entry, backend, device, bad, per_token):
    advantages = torch.full((B, T) if per_token else (B,), 0.5, device=device)
    advantages[-1] = bad
    refuse(entry, device, backend, NonFiniteError, "advantages", advantages=advantages, validate_values=True)


def test_values_are_checked_on_a_cpu_unless_switched_off(entry, backend):
    device = torch.device("cpu")
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels do not read CPU tensors here")
    advantages = torch.tensor([NAN, 1.0])
    refuse(entry, device, backend, NonFiniteError, "advantages", advantages=advantages)
    arguments = {**valid_arguments(entry, device, backend), "advantages": advantages}
    assert FUNCTIONS[entry](**arguments, validate_values=False).loss.isnan()


def test_contrasts_given_twice(backend, device):
    corrupted = torch.zeros(B, T, V, device=device)
    message = refuse("logits", device, backend, ConfigError, "corrupted_logits", corrupted_logits=corrupted)
    assert "corrupted_logps" in message
    refuse("logits", device, backend, ConfigError, "ablated_logits", ablated_logits=corrupted)


@pytest.mark.parametrize("missing", ["corrupted_logps", "ablated_logps"])
def test_contrasts_not_given(entry, backend, device, missing):
    refuse(entry, device, backend, ConfigError, missing, **{missing: None})
    refuse(entry, device, backend, ConfigError, "corrupted_logps", corrupted_logps=None, ablated_logps=None)


def test_image_independence_needs_the_corrupted_stream_only(entry, backend, device):
    credit = CreditConfig(reasoning_signal="image_independence")
    arguments = {**valid_arguments(entry, device, backend), "credit": credit, "ablated_logps": None}
    assert FUNCTIONS[entry](**arguments).loss.isfinite()
    refuse(entry, device, backend, ConfigError, "corrupted_logps", credit=credit, corrupted_logps=None)


def test_kl_needs_reference_log_probs(entry, backend, device):
    refuse(entry, device, backend, ConfigError, "ref_logps", ref_logps=None)


@pytest.mark.parametrize("stream", ["corrupted_logps", "ablated_logps"])
def test_strict_contrasts_must_have_a_value(entry, backend, device, stream):
    """`strict_finite=True` raises where the default counts the contrast as 0."""
    arguments = valid_arguments(entry, device, backend)
    arguments["role_ids"] = torch.tensor([[1, 2, 0], [2, 1, 0]], dtype=torch.int8, device=device)
    arguments[stream] = torch.full_like(arguments[stream], NAN)
    assert FUNCTIONS[entry](**arguments).loss.isfinite()
    arguments["credit"] = CreditConfig(strict_finite=True)
    with pytest.raises(NonFiniteError, match="_logps"):
        FUNCTIONS[entry](**arguments)


@pytest.mark.parametrize("normaliser", [torch.ones(2), torch.ones(1, 2)])
def test_normalisers_that_are_not_scalars(entry, backend, device, normaliser):
    refuse(entry, device, backend, ShapeError, "num_items_in_batch", num_items_in_batch=normaliser.to(device))


@pytest.mark.parametrize("normaliser", ["many", -1], ids=repr)
def test_normalisers_that_are_no_counts(entry, backend, device, normaliser):
    refuse(entry, device, backend, SRPOError, "num_items_in_batch", num_items_in_batch=normaliser)


@pytest.mark.parametrize("backend_name", ["cuda", "", None])
def test_unknown_backends(entry, device, backend_name):
    refuse(entry, device, backend_name, ConfigError, "backend")


@pytest.mark.parametrize("argument", ["credit", "loss"])
@pytest.mark.parametrize("value", [None, "srpo", {"tau": 1.0}], ids=repr)
def test_settings_of_the_wrong_type(entry, backend, device, argument, value):
    refuse(entry, device, backend, SRPOError, argument, **{argument: value})


def packed_arguments(entry, device, backend):
    arguments = valid_arguments(entry, device, backend)
    return {
        name: value.detach().flatten(0, 1) if isinstance(value, Tensor) and value.dim() > 1 else value
        for name, value in arguments.items()
    } | {"cu_seqlens": torch.tensor([0, 3, 6], dtype=torch.int32, device=device)}


@pytest.mark.parametrize(
    ("cu_seqlens", "error"),
    [
        (torch.tensor([[0, 3, 6]]), ShapeError),
        (torch.tensor(6), ShapeError),
        (torch.tensor([], dtype=torch.int32), ShapeError),
        (torch.tensor([0.0, 3.0, 6.0]), DtypeError),
        ([0, 3, 6], SRPOError),
        (torch.tensor([0, 3, 5]), ValueError),
        (torch.tensor([1, 3, 6]), ValueError),
        (torch.tensor([0, 5, 4, 6]), ValueError),
        (torch.tensor([0, 3, 7]), ValueError),
    ],
    ids=str,
)
def test_bad_offsets_of_packed_sequences(entry, backend, device, cu_seqlens, error):
    arguments = packed_arguments(entry, device, backend)
    assert FUNCTIONS[entry](**arguments).loss.isfinite()
    arguments["cu_seqlens"] = cu_seqlens.to(device) if isinstance(cu_seqlens, Tensor) else cu_seqlens
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.numel() == 4:
        arguments["advantages"] = torch.zeros(3, device=device)
    assert_refused(FUNCTIONS[entry], {**arguments, "validate_values": True}, error, "cu_seqlens")


def test_packed_tensors_without_offsets(entry, backend, device):
    arguments = packed_arguments(entry, device, backend) | {"cu_seqlens": None}
    message = assert_refused(FUNCTIONS[entry], arguments, ShapeError, "logps|completion_ids")
    assert "cu_seqlens" in message


@pytest.mark.parametrize("shape", [(3,), (5,), (2, 3)])
def test_wrong_advantages_of_packed_sequences(entry, backend, device, shape):
    arguments = packed_arguments(entry, device, backend) | {"advantages": torch.zeros(shape, device=device)}
    assert_refused(FUNCTIONS[entry], arguments, ShapeError, "advantages")


# --- the credit stage and the log-prob primitive on their own


def test_bad_input_of_role_contrast(backend, device):
    batch = make_batch(301, B, T, mask_style="full", role_style="mixed").to(device)
    legal = {
        "logps": batch.logps,
        **batch.contrast_streams(),
        "completion_mask": batch.completion_mask,
        "credit": CreditConfig(),
        "backend": backend,
    }
    for changes, error, argument in [
        ({"logps": batch.logps[0]}, ShapeError, "logps"),
        ({"corrupted_logps": batch.logps[:, :2]}, ShapeError, "corrupted_logps"),
        ({"ablated_logps": None}, ConfigError, "ablated_logps"),
        ({"role_ids": batch.logps}, DtypeError, "role_ids"),
        ({"role_ids": batch.role_ids + 5, "validate_values": True}, ValueError, "role_ids"),
        ({"completion_mask": batch.completion_mask.to("meta")}, DeviceError, "completion_mask"),
        ({"backend": "fast"}, ConfigError, "backend"),
    ]:
        assert_refused(srpo.role_contrast, {**legal, **changes}, error, argument)


def test_bad_input_of_token_weights(backend, device):
    batch = make_batch(302, B, T, mask_style="full", role_style="mixed").to(device)
    legal = {
        "contrast": batch.logps,
        "role_ids": batch.role_ids,
        "completion_mask": batch.completion_mask,
        "credit": CreditConfig(),
        "backend": backend,
    }
    signed = CreditConfig(direction="advantage")
    for changes, error, argument in [
        ({"contrast": batch.logps[0]}, ShapeError, "contrast"),
        ({"contrast": batch.role_ids}, DtypeError, "contrast"),
        ({"role_ids": batch.role_ids[:1]}, ShapeError, "role_ids"),
        ({"advantages": torch.zeros(3, device=device)}, ShapeError, "advantages"),
        ({"credit": signed}, ConfigError, "advantages"),
        (
            {"credit": signed, "advantages": torch.tensor([NAN, 1.0], device=device), "validate_values": True},
            NonFiniteError,
            "advantages",
        ),
    ]:
        assert_refused(srpo.token_weights, {**legal, **changes}, error, argument)


def test_bad_input_of_token_advantages():
    with pytest.raises(ShapeError, match="advantages"):
        srpo.token_advantages(torch.zeros(3), torch.ones(2, 4))
    with pytest.raises(ShapeError, match="advantages"):
        srpo.token_advantages(torch.zeros(2, 3), torch.ones(2, 4))


def test_bad_input_of_selected_logps(backend, device):
    batch = make_batch(303, B, T, vocabulary=V, mask_style="full").to(device)
    legal = {"logits": batch.logits, "completion_ids": batch.completion_ids, "backend": backend}
    for changes, error, argument in [
        ({"logits": batch.logits[0]}, ShapeError, "logits"),
        ({"logits": batch.logits.long()}, DtypeError, "logits"),
        ({"completion_ids": batch.logits[..., 0]}, DtypeError, "completion_ids"),
        ({"mask": batch.completion_mask[:, :2]}, ShapeError, "mask"),
        ({"temperature": 0.0}, ConfigError, "temperature"),
        ({"temperature": -1.0}, ConfigError, "temperature"),
        ({"temperature": NAN}, ConfigError, "temperature"),
    ]:
        assert_refused(srpo.selected_logps, {**legal, **changes}, error, argument)


# --- settings are checked when constructed


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("contrast_kind", "js"),
        ("reasoning_signal", "none"),
        ("baseline", "median"),
        ("direction", "sign"),
        ("normalize", "sum"),
        ("missing_role", "skip"),
        ("tau", 0.0),
        ("tau", -1.0),
        ("tau", NAN),
        ("weight_min", 0.0),
        ("weight_min", -0.5),
        ("weight_min", 1.5),
        ("weight_max", 0.5),
        ("weight_max", INF),
        ("strength", -0.1),
        ("strength", 1.1),
        ("contrast_clamp", 0.0),
        ("contrast_clamp", -20.0),
    ],
)
def test_credit_settings(name, value):
    with pytest.raises(ConfigError, match="weight_m" if name.startswith("weight") else name):
        CreditConfig(**{name: value})


@pytest.mark.parametrize("bounds", [(1.1, 1.5), (0.5, 0.9)])
def test_solve_needs_bounds_around_one(bounds):
    with pytest.raises(ConfigError, match="weight_m"):
        CreditConfig(weight_min=bounds[0], weight_max=bounds[1], normalize="solve")
    CreditConfig(weight_min=bounds[0], weight_max=bounds[1], normalize="mean")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss_type", "ppo"),
        ("epsilon_low", -0.1),
        ("epsilon_high", -0.1),
        ("epsilon_low", NAN),
        ("delta", 0.0),
        ("delta", -1.0),
        ("beta", -0.1),
        ("beta", NAN),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("max_completion_length", 0),
        ("max_completion_length", -3),
        ("importance_sampling_level", "trajectory"),
    ],
)
def test_loss_settings(name, value):
    with pytest.raises(ConfigError, match=name):
        LossConfig(**{name: value})


def test_the_pure_sequence_ratio_is_refused_with_its_reason():
    with pytest.raises(ConfigError, match=r"importance_sampling_level.*sequence_token"):
        LossConfig(importance_sampling_level="sequence")


def test_dr_grpo_needs_its_constant_length():
    with pytest.raises(ConfigError, match="max_completion_length"):
        LossConfig(loss_type="dr_grpo")


def test_settings_are_frozen():
    for config, name in ((CreditConfig(), "tau"), (LossConfig(), "beta")):
        with pytest.raises(AttributeError):
            setattr(config, name, 2.0)


def test_only_wide_signed_bounds_warn(recwarn):
    CreditConfig(direction="advantage")
    CreditConfig(weight_min=0.5, weight_max=2.0)
    assert not recwarn
    with pytest.warns(ConfigWarning):
        CreditConfig(direction="advantage", weight_max=1.3)


def test_each_error_is_also_a_builtin():
    for error, builtin in [
        (ShapeError, ValueError),
        (DtypeError, TypeError),
        (ConfigError, ValueError),
        (NonFiniteError, ValueError),
        (srpo.KernelUnavailableError, RuntimeError),
        (srpo.RoleParseError, ValueError),
    ]:
        assert issubclass(error, builtin)
        assert issubclass(error, SRPOError)
    assert issubclass(DeviceError, (ValueError, RuntimeError))


# --- machines


def test_kernels_without_interpreter_or_gpu_are_unavailable():
    code = """
import torch, srpo
try:
    srpo.role_weighted_grpo_loss_from_logps(torch.zeros(1, 1), torch.zeros(1), backend="triton")
except srpo.KernelUnavailableError as error:
    assert isinstance(error, RuntimeError) and "backend" in str(error) and "TRITON_INTERPRET" in str(error), error
    print("refused")
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "refused", result.stderr


@pytest.fixture
def one_process_mesh():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("argument", ["logits", "advantages", "old_logps"])
def test_distributed_tensors_are_refused_with_the_call_that_gathers_them(one_process_mesh, argument):
    from torch.distributed.tensor import Replicate, distribute_tensor

    arguments = valid_arguments("logits", torch.device("cpu"))
    arguments[argument] = distribute_tensor(arguments[argument].detach(), one_process_mesh, [Replicate()])
    with pytest.raises(SRPOError, match=rf"{argument}.*full_tensor"):
        srpo.role_weighted_grpo_loss(**arguments)


@pytest.mark.parametrize("argument", ["old_logps", "ref_logps", "corrupted_logps", "ablated_logps"])
@pytest.mark.parametrize("make", [torch.exp, torch.neg], ids=["probabilities", "losses"])
def test_what_is_no_log_prob(backend, device, argument, make):
    batch = make_batch(7, 3, 9, mask_style="full").to(device)
    roles = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 0]] * 3, device=device)
    given = {name: -getattr(batch, name).abs() - 0.01 for name in
             ("old_logps", "ref_logps", "corrupted_logps", "ablated_logps")}  # fmt: skip
    common = {"role_ids": roles, "loss": LossConfig(beta=0.1), "backend": backend, "validate_values": True}
    call = srpo.role_weighted_grpo_loss_from_logps
    assert call(batch.logps, batch.advantages, **given, **common).loss.isfinite()
    with pytest.raises(NonFiniteError, match=f"{argument} got values up to .* at most 0"):
        call(batch.logps, batch.advantages, **given | {argument: make(given[argument])}, **common)


@pytest.mark.parametrize("argument", ["old_logps", "ref_logps"])
def test_log_probs_of_old_and_reference_policies_are_numbers(backend, device, argument):
    logps = torch.full((2, 3), -1.0, device=device)
    given = {"old_logps": logps, "ref_logps": logps, "loss": LossConfig(beta=0.1), "backend": backend}
    bad = logps.clone()
    bad[0, 1] = NAN
    with pytest.raises(NonFiniteError, match=f"{argument} got 1 NaN"):
        srpo.role_weighted_grpo_loss_from_logps(
            logps, torch.ones(2, device=device), **given | {argument: bad}, validate_values=True
        )


# ---- names ----


@pytest.mark.parametrize(("table", "name", "meant"), [(PRESETS, "srop", "srpo"), (METHODS, "vpo", "vppo")])
def test_an_unknown_name_of_a_table(table, name, meant):
    with pytest.raises(ConfigError, match=f"{name}.*expected one of.*write '{meant}'"):
        table[name]
    with pytest.raises(KeyError):  # as before
        table[name]
    assert name not in table
    assert table.get(name) is None


@pytest.mark.parametrize(
    ("settings", "name", "fix"),
    [
        (LossConfig, "epsilon", "write epsilon_low"),
        (LossConfig, "epsilonhigh", "write epsilon_high"),
        (LossConfig, "clip_ratio_c", "write delta"),
        (CreditConfig, "weigth_min", "write weight_min"),
        (CreditConfig, "lambda_", "leave it out"),
        (RoleGrammar, "reasoning_tag", "write reasoning_tags"),
    ],
)
def test_an_unknown_setting(settings, name, fix):
    with pytest.raises(ConfigError, match=rf"{settings.__name__}\(\): {name} got .*; {fix}"):
        settings(**{name: 0.2})


def test_what_holds_the_tensor_is_named():
    roles = torch.ones(2, 3, dtype=torch.int8)
    with pytest.raises(DtypeError, match=r"(?s)role_ids got RoleParse.*; pass its \.role_ids"):
        token_weights(torch.zeros(2, 3), RoleParse.of(roles))
    ids, advantages = torch.zeros(2, 3, dtype=torch.long), torch.ones(2)
    with pytest.raises(DtypeError, match=r"lm_head_weight got Linear.*; pass its \.weight"):
        role_weighted_grpo_loss_from_hidden(
            torch.zeros(2, 3, 4), torch.nn.Linear(4, 5), ids, advantages, weights=torch.ones(2, 3)
        )


def test_a_mask_is_called_what_the_function_calls_it():
    logits, ids = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ShapeError, match=r"selected_logps\(\): mask got .*check how mask was"):
        selected_logps(logits, ids, mask=torch.ones(2, 2))
    streams = StreamLogps(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"token_credit_advantages\(\): response_mask got"):
        token_credit_advantages(
            torch.ones(2, 3), torch.ones(2, 2), streams.logps, torch.ones(2, 3, dtype=torch.int8),
            corrupted_log_probs=streams.corrupted_logps, ablated_log_probs=streams.ablated_logps,
        )  # fmt: skip


def test_inference_mode_reaches_the_threads():
    """Chunks of rows run on threads, which start outside of any mode."""
    logits, ids = torch.randn(2, 64, 3000), torch.zeros(2, 64, dtype=torch.long)
    expected = selected_logps(logits, ids)
    with torch.inference_mode():
        assert torch.equal(selected_logps(logits, ids), expected)
        loss = role_weighted_grpo_loss(logits, ids, torch.ones(2), weights=torch.ones(2, 64)).loss
    assert float(loss) == pytest.approx(-1.0)
