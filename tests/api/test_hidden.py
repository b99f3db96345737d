"""The entries that take hidden states: values and gradients against the float64 oracle, skipped rows, autograd, errors.

Every call of `check_against_oracle` fills the rows that need no logits with NaN, so it also checks what is skipped.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Batch, credit_configs, loss_configs, make_batch, make_credit
from tolerances import assert_close_to_truth
from torch import Tensor
from torch.nn.functional import linear, pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import srpo
from srpo import ConfigError, CreditConfig, DeviceError, DtypeError, LossConfig, ShapeError, SRPOError

many_examples = settings(max_examples=5 * settings().max_examples)

NAN = float("nan")
LOSS_TYPES = ["dapo", "grpo", "bnpo", "dr_grpo", "cispo"]
# Where the weights come from. "live base" has no old log-probs: weights depend on the current ones.
MODES = ["no roles", "scored before", "live base", "live", "live with old", "one live", "one pass", "given weights"]
WIDE = make_credit(weight_min=0.5, weight_max=2.0)
ONE_PASS = make_credit(weight_min=0.5, weight_max=2.0, reasoning_signal="image_independence")


@dataclass(frozen=True)
class Case:
    """A batch whose log-probs are those of `hidden` and a head; every hidden state is finite."""

    batch: Batch
    hidden: Tensor  # [B, T, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None
    streams: dict[str, Tensor]  # hidden states of the contrast streams


def make_case(
    seed: int,
    rows: int = 4,
    tokens: int = 5,
    *,
    V: int = 33,
    H: int = 6,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    drift: float = 1.0,
    **styles: str,
) -> Case:
    """Draw one case; `drift` scales how far the old policy is from the current one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    hidden, weight = normal(rows, tokens, H), normal(V, H, scale=2.0 / H**0.5)
    shift = normal(V) if bias else None
    streams = {f"{name}_hidden": hidden + normal(rows, tokens, H, scale=0.5) for name in ("corrupted", "ablated")}
    batch = make_batch(seed, rows, tokens, dtype=dtype, **styles)
    ids = torch.randint(0, V, (rows, tokens), generator=generator)
    logits = linear(hidden.double(), weight.double(), None if shift is None else shift.double())
    logps = oracles.log_probs(logits, ids, batch.completion_mask)
    drawn = batch.map(lambda x: x.double() if x.is_floating_point() else x)
    old = logps - drift * (drawn.logps - drawn.old_logps)
    moved = {
        "old_logps": old,
        "ref_logps": logps + drawn.ref_logps - drawn.logps,
        "corrupted_logps": old + drawn.corrupted_logps - drawn.old_logps,
        "ablated_logps": old + drawn.ablated_logps - drawn.old_logps,
    }
    moved = {name: x.to(batch.logps.dtype) for name, x in moved.items()}
    return Case(
        batch.replace(completion_ids=torch.where(batch.valid, ids, -100), **moved), hidden, weight, shift, streams
    )


def inputs_of(case: Case, mode: str, **extra: Any) -> dict[str, Any]:
    """Return the arguments of a call beside hidden states, head and ids."""
    batch = case.batch
    inputs: dict[str, Any] = {"advantages": batch.advantages, "completion_mask": batch.completion_mask}
    if mode not in ("live base", "live"):
        inputs["old_logps"] = batch.old_logps
    if mode == "given weights":
        noise = torch.rand(batch.role_ids.shape, generator=torch.Generator().manual_seed(1))
        inputs["weights"] = torch.where(batch.valid, 2.0 * noise, NAN)
    elif mode != "no roles":
        inputs |= {"role_ids": batch.role_ids, "credit": ONE_PASS if mode == "one pass" else WIDE}
    if mode in ("scored before", "live base"):
        inputs |= {"corrupted_logps": batch.corrupted_logps, "ablated_logps": batch.ablated_logps}
    elif mode in ("live", "live with old"):
        inputs |= case.streams
    elif mode == "one live":
        inputs |= {"corrupted_hidden": case.streams["corrupted_hidden"], "ablated_logps": batch.ablated_logps}
    elif mode == "one pass":
        inputs["corrupted_hidden"] = case.streams["corrupted_hidden"]
    return inputs | {name: x for name, x in extra.items() if x is not None}


@dataclass(frozen=True)
class Needs:
    """Which rows a call needs logits of, from the rules that the docstring states."""

    scored: Tensor
    reads: dict[str, Tensor]  # rows of the live contrast streams
    roles: Tensor  # without those of trajectories whose log-probs nobody needs


def needs_of(case: Case, inputs: dict[str, Any]) -> Needs:
    valid, loss = case.batch.valid, inputs.get("loss", LossConfig())
    credit = inputs.get("credit", CreditConfig())
    advantages = inputs["advantages"]
    learns = valid & ((advantages[:, None] if advantages.dim() == 1 else advantages) != 0)
    learning = learns.any(1, keepdim=True) & valid
    roles = inputs.get("role_ids", torch.zeros_like(case.batch.role_ids))
    weighs = "role_ids" in inputs and "weights" not in inputs and credit.strength > 0
    live_base = weighs and "old_logps" not in inputs
    reached = valid if loss.beta else learning
    alone = not live_base and loss.importance_sampling_level == "token" and loss.beta == 0
    live = weighs and any(f"{s}_hidden" in inputs for s in credit.streams)
    if live or live_base:
        roles = torch.where(reached, roles, 0)
    one_pass = credit.reasoning_signal == "image_independence"
    reads = {
        "corrupted_hidden": valid & weighs & ((roles == 1) | ((roles == 2) & one_pass)),
        "ablated_hidden": valid & weighs & (roles == 2) & (not one_pass),
    }
    return Needs(learns if alone else reached, reads, roles)


def oracle_of(case: Case, inputs: dict[str, Any], needs: Needs, dtype: torch.dtype) -> dict[str, Any]:
    """Run the oracle on the logits of the head: in float64 the truth, in a tested dtype the eager result."""
    loss, mask = inputs.get("loss", LossConfig()), case.batch.completion_mask
    leaves = {"hidden": case.hidden, "lm_head_weight": case.weight, "bias": case.bias}
    leaves = {k: x.detach().to(dtype).requires_grad_() for k, x in leaves.items() if x is not None}

    def logits_of(hidden):
        logits = linear(hidden, leaves["lm_head_weight"], leaves.get("bias"))
        return logits.float() if dtype.itemsize < 4 else logits

    def log_probs(logits):
        return oracles.log_probs(logits, case.batch.completion_ids, mask, loss.temperature)

    logits = logits_of(leaves["hidden"])
    logps = log_probs(logits)
    weights = mask.double()
    if "weights" in inputs:
        weights = torch.where(mask.bool(), inputs["weights"].double(), 0.0)
    elif "role_ids" in inputs and inputs["credit"].strength > 0:
        streams = [
            log_probs(logits_of(inputs[f"{s}_hidden"].to(dtype))).detach()
            if f"{s}_hidden" in inputs
            else inputs.get(f"{s}_logps")
            for s in ("corrupted", "ablated")
        ]
        base = inputs.get("old_logps", logps.detach())
        contrast = oracles.contrast(base, *streams, needs.roles, mask, inputs["credit"])
        weights = oracles.weights(contrast, needs.roles, mask, inputs["credit"], inputs["advantages"])
    names = ("old_logps", "ref_logps", "importance_sampling_ratio", "num_items_in_batch")
    result = oracles.loss(
        logps,
        inputs["advantages"],
        mask,
        loss,
        weights=weights,
        **{name: inputs[name] for name in names if name in inputs},
    )
    gradients = torch.autograd.grad(result.loss, list(leaves.values()))
    entropy = oracles.entropies(logits.detach(), mask, loss.temperature)
    return {
        "loss": result.loss,
        "logps": torch.where(needs.scored, logps, 0.0),
        "entropy": torch.where(needs.scored, entropy, 0.0),
        "weights": weights,
        "metrics": result.metrics,
        "gradients": dict(zip(leaves, gradients, strict=True)),
    }


def worst(eager: Tensor, truth: Tensor) -> Tensor:
    """Give every element the largest eager error: a matrix product spreads the errors of its terms."""
    error = (eager.detach().double() - truth.detach()).abs().nan_to_num(0.0)
    return truth.detach() + (error.max() if error.numel() else 0.0)


def poisoned(hidden: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep[..., None], hidden, NAN)


def leaves_of(case: Case, device: torch.device, needs: Needs | None = None) -> dict[str, Tensor]:
    hidden = case.hidden if needs is None else poisoned(case.hidden, needs.scored)
    tensors = {"hidden": hidden, "lm_head_weight": case.weight, "bias": case.bias}
    return {k: x.detach().clone().to(device).requires_grad_() for k, x in tensors.items() if x is not None}


def on(device: torch.device, inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: x.to(device) if isinstance(x, Tensor) else x for k, x in inputs.items()}


def run(case: Case, inputs: dict[str, Any], device: torch.device, backend: str, leaves=None, **options):
    """One call and its backward; returns the output and the gradients by name."""
    leaves = leaves_of(case, device) if leaves is None else leaves
    ids = case.batch.completion_ids.to(device)
    out = srpo.role_weighted_grpo_loss_from_hidden(
        completion_ids=ids, backend=backend, **leaves, **on(device, inputs), **options
    )
    out.loss.backward()
    return out, {k: x.grad for k, x in leaves.items()}


def check_against_oracle(
    case: Case,
    inputs: dict[str, Any],
    backend: str,
    device: torch.device,
    workspace_bytes: int | None = None,
    one_more_position: bool = False,
) -> srpo.LossOutput:
    """Run one call with NaN in every row that is not needed, compare everything with the oracle."""
    needs, dtype = needs_of(case, inputs), case.hidden.dtype
    precision = torch.float64 if dtype == torch.float64 and backend == "torch" else torch.float32
    truth = oracle_of(case, inputs, needs, torch.float64)
    eager = oracle_of(case, inputs, needs, dtype if dtype.itemsize < 4 else precision)

    given_inputs = dict(inputs)
    for name, rows in needs.reads.items():
        if name in inputs:
            given_inputs[name] = poisoned(inputs[name], rows)
    leaves = leaves_of(case, device, needs)
    if one_more_position:
        for tensors in (leaves, given_inputs):
            for name in {"hidden", "corrupted_hidden", "ablated_hidden"} & set(tensors):
                tensors[name] = pad(tensors[name].detach(), (0, 0, 0, 1), value=NAN)
        leaves["hidden"].requires_grad_()
    out, gradients = run(case, given_inputs, device, backend, leaves, workspace_bytes=workspace_bytes)
    if one_more_position:
        assert not gradients["hidden"][:, -1].any()
        gradients["hidden"] = gradients["hidden"][:, :-1]

    if dtype.itemsize < 4:  # errors of a sum may cancel in one of the two computations and not in the other
        eager["loss"] = truth["loss"] + (eager["logps"] - truth["logps"]).abs().max()
    for name in ("loss", "logps", "entropy", "weights"):
        allowed = worst(eager[name], truth[name])
        assert_close_to_truth(name, getattr(out, name), truth[name], allowed, precision=precision)
    stored = dtype if dtype.itemsize < 4 else precision
    for name, expected in truth["gradients"].items():
        assert gradients[name].dtype == dtype
        allowed = worst(eager["gradients"][name], expected)
        assert_close_to_truth("gradient", gradients[name], expected, allowed, precision=stored, what=name)
    assert not gradients["hidden"][~needs.scored].any()
    for name, value in truth["metrics"].items():
        expected, allowed = torch.tensor(value, dtype=torch.float64), torch.tensor(eager["metrics"][name])
        assert_close_to_truth("metric", out.metrics[name], expected, allowed, precision=precision, what=name)
    n_scored, n_valid = int(needs.scored.sum()), int(case.batch.valid.sum())
    assert out.metrics["srpo/rows_scored"] == n_scored
    assert out.metrics["srpo/rows_skipped"] == n_valid - n_scored
    mean_entropy = truth["entropy"].sum() / max(n_scored, 1)
    allowed = eager["entropy"].sum() / max(n_scored, 1)
    assert_close_to_truth("metric", out.metrics["entropy"], mean_entropy, allowed, precision=precision, what="entropy")
    return out


def room_for(rows: int, case: Case, backend: str) -> int:
    """Return the bytes that the logits of some fp32 or 16-bit rows take."""
    itemsize = case.hidden.element_size()
    return rows * case.weight.shape[0] * (6 if itemsize == 2 and backend == "triton" else itemsize)


# values and gradients


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


# packed


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


# rows that are skipped


@pytest.mark.parametrize(
    ("settings", "scored"),
    [
        ({}, [[1, 0, 1, 0], [0, 0, 0, 0]]),
        ({"importance_sampling_level": "sequence_token"}, [[1, 1, 1, 0], [0, 0, 0, 0]]),
        ({"beta": 0.1}, [[1, 1, 1, 0], [1, 1, 0, 0]]),
    ],
    ids=str,
)
def test_rows_that_cannot_change_the_loss_are_skipped(backend, device, settings, scored):
    """One masked tail, one token with advantage 0, one trajectory of zeros."""
    case = make_case(420, 2, 4, V=7, mask_style="full")
    scored = torch.tensor(scored, dtype=torch.bool)
    inputs = {
        "advantages": torch.tensor([[1.0, 0.0, -0.5, NAN], [0.0, 0.0, NAN, NAN]]),
        "completion_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
        "old_logps": case.batch.old_logps,
        "ref_logps": case.batch.ref_logps,
        "loss": LossConfig(**settings),
    }
    leaves = leaves_of(case, device)
    leaves["hidden"] = poisoned(leaves["hidden"].detach(), scored.to(device)).requires_grad_()
    out, gradients = run(case, inputs, device, backend, leaves)
    assert out.loss.isfinite()
    for gradient in gradients.values():
        assert gradient.isfinite().all()
        assert gradient.any()
    assert torch.equal(out.logps.cpu() != 0, scored)
    assert torch.equal(out.entropy.cpu() != 0, scored)
    assert not gradients["hidden"].cpu()[~scored].any()
    assert out.metrics["srpo/rows_scored"] == scored.sum()
    assert out.metrics["srpo/rows_skipped"] == 5 - scored.sum()
    assert out.metrics["entropy"] == pytest.approx(out.entropy.cpu()[scored].mean().item(), rel=1e-6)


def nothing_to_learn(name: str) -> tuple[Case, Tensor]:
    """A case without a row that can change the loss, and its advantages."""
    rows, tokens = {"T=0": (2, 0), "B=0": (0, 3), "both 0": (0, 0)}.get(name, (2, 3))
    case = make_case(421, rows, tokens, V=7, mask_style="all_masked" if name == "all masked" else "full")
    return case, torch.zeros(rows) if name == "advantages 0" else torch.ones(rows)


@pytest.mark.parametrize("mode", ["no roles", "scored before", "live base", "live"])
@pytest.mark.parametrize("name", ["T=0", "B=0", "both 0", "all masked", "advantages 0"])
def test_without_active_rows_loss_and_gradients_are_zero_and_attached(backend, device, name, mode):
    case, advantages = nothing_to_learn(name)
    inputs = inputs_of(case, mode, advantages=advantages)
    leaves = leaves_of(case, device)
    leaves["hidden"] = torch.full_like(leaves["hidden"], NAN).requires_grad_()
    out, gradients = run(case, inputs, device, backend, leaves)
    assert out.loss.requires_grad
    assert out.loss == 0
    for name, gradient in gradients.items():
        assert torch.equal(gradient, torch.zeros_like(leaves[name]))
    assert not out.logps.any()
    assert not out.entropy.any()
    assert out.metrics["srpo/rows_scored"] == 0


@pytest.mark.parametrize("mode", ["no roles", "live"])
def test_packed_trajectories_without_a_token(backend, device, mode):
    case = make_case(422, 1, 0, V=7)
    inputs = inputs_of(case, mode, advantages=torch.tensor([1.0, 2.0]))
    inputs = {k: x[0] if isinstance(x, Tensor) and x.dim() > 1 else x for k, x in inputs.items()}
    leaves = leaves_of(case, device)
    leaves["hidden"] = leaves["hidden"].detach()[0].requires_grad_()
    out = srpo.role_weighted_grpo_loss_from_hidden(
        completion_ids=case.batch.completion_ids[0].to(device),
        cu_seqlens=torch.zeros(3, dtype=torch.int64, device=device),
        backend=backend,
        **leaves,
        **on(device, inputs),
    )
    out.loss.backward()
    assert out.loss == 0
    assert not any(leaf.grad.any() for leaf in leaves.values())


def test_one_row(backend, device):
    case = make_case(423, 1, 1, V=7, H=5, mask_style="full", role_style="mixed")
    inputs = inputs_of(case, "live base", advantages=torch.tensor([-0.7]))
    check_against_oracle(case, inputs, backend, device, one_more_position=True)


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


def test_skipped_rows_change_neither_loss_nor_weights_of_the_others(backend, device):
    """With advantages of 0, against the entry from logits; weights scored before are known on skipped rows too."""
    case = make_case(425, mask_style="holes", role_style="mixed")
    advantages = torch.tensor([0.7, 0.0, -1.2, 0.0])
    logits = linear(case.hidden, case.weight, case.bias).to(device).requires_grad_()
    for mode in ("scored before", "live base"):
        inputs = inputs_of(case, mode, advantages=advantages)
        scored = needs_of(case, inputs).scored.to(device)
        out, _ = run(case, inputs, device, backend)
        ids = case.batch.completion_ids.to(device)
        expected = srpo.role_weighted_grpo_loss(logits, ids, backend=backend, **on(device, inputs))
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(out.weights[scored], expected.weights[scored], rtol=1e-5, atol=4e-6)
        torch.testing.assert_close(out.logps[scored], expected.logps[scored], rtol=1e-5, atol=4e-6)
        for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "srpo/zero_advantage_fraction"):
            assert out.metrics[name] == expected.metrics[name]
        if mode == "scored before":
            torch.testing.assert_close(out.weights, expected.weights)


# which gradients are computed

PARTS = ("hidden", "lm_head_weight", "bias")


@pytest.mark.parametrize("wanted", [c for n in range(4) for c in itertools.combinations(PARTS, n)], ids=str)
def test_gradients_go_to_what_requires_one(backend, device, wanted):
    case = make_case(430, V=7, mask_style="holes")
    inputs = inputs_of(case, "no roles")
    reference, expected = run(case, inputs, device, backend)
    leaves = {name: x.requires_grad_(name in wanted) for name, x in leaves_of(case, device).items()}
    out = srpo.role_weighted_grpo_loss_from_hidden(
        completion_ids=case.batch.completion_ids.to(device), backend=backend, **leaves, **on(device, inputs)
    )
    assert torch.equal(out.loss.detach(), reference.loss.detach())
    assert out.loss.requires_grad == bool(wanted)
    if wanted:
        out.loss.backward()
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            assert torch.equal(leaf.grad, expected[name])
        else:
            assert leaf.grad is None


def test_evaluation_without_gradient(backend, device):
    case = make_case(431, V=7, mask_style="holes", role_style="mixed")
    inputs = inputs_of(case, "live")
    trained, _ = run(case, inputs, device, backend)
    leaves, ids = leaves_of(case, device), case.batch.completion_ids.to(device)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out = srpo.role_weighted_grpo_loss_from_hidden(
                completion_ids=ids, backend=backend, **leaves, **on(device, inputs)
            )
            logps = srpo.selected_logps_from_hidden(
                leaves["hidden"], leaves["lm_head_weight"], ids, mask=case.batch.completion_mask.to(device),
                backend=backend,
            )  # fmt: skip
        assert not out.loss.requires_grad
        assert not logps.requires_grad
        assert torch.equal(out.loss, trained.loss.detach())


def test_only_the_loss_carries_a_gradient(backend, device):
    case = make_case(432, V=7, mask_style="holes", role_style="mixed")
    streams = {k: x.requires_grad_() for k, x in case.streams.items()}
    old = case.batch.old_logps.clone().requires_grad_()
    inputs = inputs_of(case, "live", old_logps=old)
    out, _ = run(case, inputs, device, backend)
    for value in (out.logps, out.weights, out.entropy, *out.metrics.values()):
        assert not value.requires_grad
    assert old.grad is None
    assert all(x.grad is None for x in streams.values())


# autograd


def loss_of(case, leaves, inputs, device, backend, **options):
    ids = case.batch.completion_ids.to(device)
    call = srpo.role_weighted_grpo_loss_from_hidden
    return call(completion_ids=ids, backend=backend, **leaves, **on(device, inputs), **options).loss


@pytest.mark.parametrize("mode", ["no roles", "live base"])
def test_the_upstream_gradient_scales_and_backward_repeats(backend, device, mode):
    case = make_case(440, V=7, mask_style="holes", role_style="mixed")
    inputs = inputs_of(case, mode)
    found = {}
    for factor in (1.0, 0.37, -2.0):
        leaves = leaves_of(case, device)
        scaled = loss_of(case, leaves, inputs, device, backend) * factor
        first = torch.autograd.grad(scaled, list(leaves.values()), retain_graph=True)
        second = torch.autograd.grad(scaled, list(leaves.values()), retain_graph=True)
        last = torch.autograd.grad(scaled, list(leaves.values()))
        for a, b, c in zip(first, second, last, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
        found[factor] = [x / factor for x in first]
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(scaled, list(leaves.values()))
    assert found[1.0][0].any()
    for factor in (0.37, -2.0):
        torch.testing.assert_close(found[factor], found[1.0], rtol=1e-6, atol=1e-9)


def test_two_backwards_add_up_and_gradients_accumulate(backend, device):
    """A retained graph twice, then another call into the same `.grad`, whose memory nobody else may hold."""
    case = make_case(441, V=7, mask_style="holes")
    inputs = inputs_of(case, "no roles")
    _, once = run(case, inputs, device, backend)
    leaves = leaves_of(case, device)
    loss = loss_of(case, leaves, inputs, device, backend)
    for times in (1, 2):
        loss.backward(retain_graph=True)
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad, times * once[name], rtol=1e-6, atol=1e-9)
    loss.backward()
    (loss_of(case, leaves, inputs, device, backend) * 2).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, 5 * once[name], rtol=1e-6, atol=1e-9)


def test_one_loss_used_twice_and_two_losses_of_one_hidden(backend, device):
    case = make_case(442, V=7, mask_style="holes", role_style="mixed")
    plain, weighted = inputs_of(case, "no roles"), inputs_of(case, "scored before")
    _, of_plain = run(case, plain, device, backend)
    _, of_weighted = run(case, weighted, device, backend)
    leaves = leaves_of(case, device)
    first, second = (loss_of(case, leaves, x, device, backend) for x in (plain, weighted))
    (first + 3 * second + 0.5 * first).backward()
    for name, leaf in leaves.items():
        expected = 1.5 * of_plain[name] + 3 * of_weighted[name]
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-7)


def test_a_tied_head_collects_both_gradients(backend, device):
    """The weight embeds the tokens that the hidden states are made of, and scores them."""
    case = make_case(443, V=7, mask_style="full")
    inputs = inputs_of(case, "no roles", advantages=torch.tensor([0.7, 0.3, -1.2, 0.4]))
    tokens = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(3)).to(device)
    gradients = []
    for from_hidden in (True, False):
        weight = case.weight.clone().to(device).requires_grad_()
        hidden = torch.tanh(torch.nn.functional.embedding(tokens, weight) * 1.5)
        ids = case.batch.completion_ids.to(device)
        arguments = {"backend": backend, **on(device, inputs)}
        if from_hidden:
            out = srpo.role_weighted_grpo_loss_from_hidden(hidden, weight, ids, **arguments)
        else:
            out = srpo.role_weighted_grpo_loss(linear(hidden, weight), ids, **arguments)
        out.loss.backward()
        gradients.append(weight.grad)
    assert gradients[0].any()
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=5e-7)


def layouts_of(hidden: Tensor) -> dict[str, Tensor]:
    """The same values under other strides; views of leaves."""
    B, T, H = hidden.shape
    return {
        "time first": hidden.transpose(0, 1).contiguous().transpose(0, 1),
        "width first": hidden.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "sliced": torch.cat([hidden.new_full((B, T, 3), NAN), hidden], 2)[..., 3:],
        "every other": torch.stack([hidden, hidden.new_full((B, T, H), NAN)], 2).flatten(1, 2)[:, ::2],
    }


@pytest.mark.parametrize("layout", ["time first", "width first", "sliced", "every other"])
def test_strides_change_nothing(backend, device, layout):
    case = make_case(444, V=7, mask_style="holes")
    inputs = inputs_of(case, "no roles")
    expected_out, expected = run(case, inputs, device, backend)
    leaves = leaves_of(case, device)
    leaves["hidden"] = layouts_of(case.hidden.to(device))[layout].detach().requires_grad_()
    leaves["lm_head_weight"] = case.weight.t().contiguous().to(device).t().requires_grad_()
    assert not leaves["hidden"].is_contiguous()
    out, gradients = run(case, inputs, device, backend, leaves)
    torch.testing.assert_close(out.loss, expected_out.loss, rtol=1e-6, atol=1e-7)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-5, atol=5e-7)


def test_a_slice_of_what_a_model_returns(backend, device):
    """Hidden states of prompt and completion; gradients arrive at the whole."""
    case = make_case(445, V=7, mask_style="holes")
    inputs = inputs_of(case, "no roles")
    _, expected = run(case, inputs, device, backend)
    whole = torch.cat([torch.ones(4, 3, 6), case.hidden, torch.ones(4, 1, 6)], 1).to(device).requires_grad_()
    leaves = leaves_of(case, device) | {"hidden": whole[:, 3:]}
    loss_of(case, leaves, inputs, device, backend).backward()
    torch.testing.assert_close(whole.grad[:, 3:-1], expected["hidden"], rtol=1e-6, atol=1e-9)
    assert not whole.grad[:, :3].any()
    assert not whole.grad[:, -1].any()


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_four_micro_batches_equal_one_batch(backend, device, loss_type):
    """With the normaliser of the whole; gradients accumulate, losses and metric sums add up."""
    case = make_case(446, V=7, mask_style="ragged", role_style="mixed")
    loss = LossConfig(loss_type=loss_type, epsilon_high=1.1)
    whole = inputs_of(case, "live base", loss=loss, num_items_in_batch=case.batch.completion_mask.sum())
    out, expected = run(case, whole, device, backend)
    leaves = leaves_of(case, device)
    parts = []
    for i in range(4):
        rows = slice(i, i + 1)
        part = Case(case.batch.rows(rows), case.hidden[rows], case.weight, case.bias, {})
        inputs = inputs_of(part, "live base", loss=loss, num_items_in_batch=whole["num_items_in_batch"])
        ids = part.batch.completion_ids.to(device)
        of_part = leaves | {"hidden": leaves["hidden"][rows]}
        parts.append(
            srpo.role_weighted_grpo_loss_from_hidden(
                completion_ids=ids, backend=backend, **of_part, **on(device, inputs)
            )
        )
        parts[-1].loss.backward()
    torch.testing.assert_close(sum(x.loss for x in parts), out.loss, rtol=1e-5, atol=1e-6)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-5, atol=5e-7)
    sums = parts[0].metrics + parts[1].metrics + parts[2].metrics + parts[3].metrics
    assert sums.floats() == pytest.approx(out.metrics.floats(), rel=1e-5, abs=1e-6, nan_ok=True)


def test_checkpointing_recomputes_the_same(backend, device):
    case = make_case(447, V=7, mask_style="holes", role_style="mixed")
    inputs = inputs_of(case, "live base")
    out, expected = run(case, inputs, device, backend)
    leaves = leaves_of(case, device)

    def block(*tensors):
        hidden = torch.tanh(torch.atanh(tensors[0] / 8)) * 8  # something to recompute
        named = dict(zip(leaves, (hidden, *tensors[1:]), strict=True))
        return loss_of(case, named, inputs, device, backend)

    loss = checkpoint(block, *leaves.values(), use_reentrant=False)
    loss.backward()
    torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=1e-6)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["no roles", "live"])
def test_autocast_does_what_it_does_to_a_linear_head(backend, device, mode):
    """fp32 leaves, products in bf16, fp32 gradients."""
    case = make_case(448, V=33, H=16, drift=0.1, mask_style="holes", role_style="mixed")
    inputs = inputs_of(case, mode)
    needs = needs_of(case, inputs)
    truth = oracle_of(case, inputs, needs, torch.float64)
    eager = oracle_of(case, inputs, needs, torch.bfloat16)
    leaves = leaves_of(case, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = loss_of(case, leaves, inputs, device, backend)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, eager["loss"], rtol=2**-7, atol=2**-9)
    for name, leaf in leaves.items():
        expected = truth["gradients"][name]
        assert leaf.grad.dtype == torch.float32
        allowed = worst(eager["gradients"][name], expected)
        assert_close_to_truth("gradient", leaf.grad, expected, allowed, precision=torch.bfloat16, what=name)
        assert torch.equal(leaf.grad, leaf.grad.bfloat16().float())  # the products are those of bf16


def test_autocast_leaves_float64_alone(device):
    """As it does in front of a linear layer."""
    case = make_case(449, V=7, dtype=torch.float64, mask_style="full")
    inputs = inputs_of(case, "no roles")
    expected, _ = run(case, inputs, device, "torch")
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert linear(case.hidden, case.weight).dtype == torch.float64
        out, _ = run(case, inputs, device, "torch")
    assert torch.equal(out.loss, expected.loss)


# bits


@pytest.mark.parametrize("mode", ["scored before", "live base"])
def test_two_calls_give_the_same_bits(backend, device, mode):
    case = make_case(450, V=130, mask_style="holes", role_style="mixed")
    inputs = inputs_of(case, mode)
    results = [run(case, inputs, device, backend, workspace_bytes=room_for(4, case, backend)) for _ in range(2)]
    (one, one_gradients), (two, two_gradients) = results
    for name in ("loss", "logps", "weights", "entropy"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    for name in one_gradients:
        assert torch.equal(one_gradients[name], two_gradients[name])
    torch.testing.assert_close(one.metrics.sums, two.metrics.sums, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_old_and_current_logps_of_one_model_have_equal_bits(backend, device, dtype):
    """Scoring and training in one workspace: the ratio of the first step is exactly 1."""
    case = make_case(451, V=130, H=16, dtype=dtype, mask_style="holes", role_style="mixed")
    workspace = room_for(4, case, backend)
    leaves, ids = leaves_of(case, device), case.batch.completion_ids.to(device)
    old = srpo.selected_logps_from_hidden(
        **{k: x.detach() for k, x in leaves.items()},
        completion_ids=ids,
        mask=case.batch.completion_mask.to(device),
        temperature=0.9,
        workspace_bytes=workspace,
        backend=backend,
    )
    inputs = inputs_of(case, "no roles", advantages=torch.tensor([0.7, 0.3, -1.2, 0.4]), old_logps=old.cpu())
    out, _ = run(
        case, inputs | {"loss": LossConfig(temperature=0.9)}, device, backend, leaves, workspace_bytes=workspace
    )
    assert old.any()
    assert torch.equal(out.logps, old)
    weighted = -(inputs["advantages"][:, None] * case.batch.valid).sum() / case.batch.valid.sum()
    torch.testing.assert_close(out.loss.cpu(), weighted, rtol=1e-6, atol=1e-7)


def test_peaked_rows_in_bf16(backend, device):
    """Logits up to 40: not above the eager error, and exact to 1e-5 where logits are fp32."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(130, 16, generator=generator).bfloat16()
    ids = torch.randint(0, 130, (3, 6), generator=generator)
    hidden = (2.3 * weight[ids].float() + 0.1 * torch.randn(3, 6, 16, generator=generator)).bfloat16()
    everywhere = torch.ones_like(ids)
    logits = linear(hidden.double(), weight.double())
    assert logits.max() > 30
    truth = oracles.log_probs(logits, ids, everywhere)
    eager = oracles.log_probs(linear(hidden, weight).float(), ids, everywhere)
    got = srpo.selected_logps_from_hidden(hidden.to(device), weight.to(device), ids.to(device), backend=backend)
    error = (got.cpu().double() - truth).abs()
    assert error.max() <= (eager.double() - truth).abs().max() + 2e-6
    if backend == "triton":
        assert error.max() < 1e-5


# log-probs for any loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("rows", [None, 1, 3])
def test_selected_logps_and_entropy(backend, device, dtype, bias, rows):
    """Values, and the gradients of a random mixture of log-probs and entropies, masked rows holding NaN."""
    case = make_case(460, 3, 4, V=33, bias=bias, dtype=dtype, mask_style="holes")
    mask, ids = case.batch.valid, case.batch.completion_ids
    upstream = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    upstream[:, 1] = 0.0
    upstream[0, 0, 1] = upstream[1, 2, 2] = 0.0

    def oracle(precision):
        leaves = {k: x.detach().to(precision).requires_grad_() for k, x in leaves_of(case, torch.device("cpu")).items()}
        logits = linear(leaves["hidden"], leaves["lm_head_weight"], leaves.get("bias"))
        logits = logits.float() if precision.itemsize < 4 else logits
        logps = oracles.log_probs(logits, ids, mask, 0.7)
        distribution = torch.log_softmax(logits / 0.7, -1)
        entropy = torch.where(mask, -(distribution.exp() * distribution).sum(-1), 0.0)
        mixture = (logps * upstream[0].to(logps.dtype) + entropy * upstream[1].to(logps.dtype)).sum()
        return logps, entropy, dict(zip(leaves, torch.autograd.grad(mixture, list(leaves.values())), strict=True))

    precision = torch.float64 if dtype == torch.float64 and backend == "torch" else torch.float32
    truth, eager = oracle(torch.float64), oracle(dtype if dtype.itemsize < 4 else precision)
    leaves = leaves_of(case, device)
    leaves["hidden"] = poisoned(leaves["hidden"].detach(), mask.to(device)).requires_grad_()
    arguments = {
        "completion_ids": ids.to(device),
        "temperature": 0.7,
        "mask": mask.to(device),
        "workspace_bytes": None if rows is None else room_for(rows, case, backend),
        "backend": backend,
    }
    out = srpo.selected_logps_from_hidden(**leaves, **arguments, return_entropy=True)
    assert out.logps.dtype == out.entropy.dtype == precision
    on_device = upstream.to(device, precision)
    (out.logps * on_device[0] + out.entropy * on_device[1]).sum().backward()
    assert_close_to_truth("logps", out.logps, truth[0], worst(eager[0], truth[0]), precision=precision)
    assert_close_to_truth("entropy", out.entropy, truth[1], worst(eager[1], truth[1]), precision=precision)
    stored = dtype if dtype.itemsize < 4 else precision
    for name, expected in truth[2].items():
        allowed = worst(eager[2][name], expected)
        assert_close_to_truth("gradient", leaves[name].grad, expected, allowed, precision=stored, what=name)
    assert not leaves["hidden"].grad[1].any()

    alone = srpo.selected_logps_from_hidden(**{k: x.detach() for k, x in leaves.items()}, **arguments)
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, out.logps)


@pytest.mark.parametrize("part", ["logps", "entropy"])
def test_the_gradient_of_one_of_the_two_outputs(backend, device, part):
    case = make_case(461, 2, 3, V=33, mask_style="full")
    gradients = []
    for from_hidden in (True, False):
        leaves = leaves_of(case, device)
        ids = case.batch.completion_ids.to(device)
        if from_hidden:
            out = srpo.selected_logps_from_hidden(
                **leaves, completion_ids=ids, return_entropy=True, backend=backend, workspace_bytes=1
            )
        else:
            logits = linear(leaves["hidden"], leaves["lm_head_weight"], leaves["bias"])
            out = srpo.selected_logps(logits, ids, return_entropy=True, backend=backend)
        getattr(out, part)[:, 1:].square().sum().backward()
        gradients.append([x.grad for x in leaves.values()])
    assert gradients[0][0].any()
    assert not gradients[0][0][:, 0].any()
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=2e-6)


def test_masked_rows_take_no_upstream_gradient(backend, device):
    """A NaN that a later operation sends back to a masked row goes no further."""
    case = make_case(462, 2, 3, V=7, mask_style="full")
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]], device=device)
    leaves = leaves_of(case, device)
    logps = srpo.selected_logps_from_hidden(
        **leaves, completion_ids=case.batch.completion_ids.to(device), mask=mask, backend=backend
    )
    assert not logps[mask == 0].any()
    logps.backward(torch.where(mask == 1, 1.0, NAN))
    for leaf in leaves.values():
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any()
    assert not leaves["hidden"].grad[mask == 0].any()


def test_selected_logps_without_a_row(backend, device):
    for rows, tokens, mask in ((2, 0, None), (0, 3, None), (2, 3, torch.zeros(2, 3, device=device))):
        case = make_case(463, rows, tokens, V=7, mask_style="full")
        leaves = leaves_of(case, device)
        ids = case.batch.completion_ids.to(device)
        out = srpo.selected_logps_from_hidden(
            **leaves, completion_ids=ids, mask=mask, return_entropy=True, backend=backend
        )
        (out.logps + out.entropy).sum().backward()
        assert out.logps.shape == out.entropy.shape == (rows, tokens)
        for leaf in leaves.values():
            assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_selected_logps_of_packed_rows_and_of_one_more_position(backend, device):
    case = make_case(464, 2, 4, V=33, mask_style="full")
    weight, bias, hidden = (x.to(device) for x in (case.weight, case.bias, case.hidden))
    ids = case.batch.completion_ids.to(device)
    expected = srpo.selected_logps_from_hidden(hidden, weight, ids, bias=bias, backend=backend)
    extra = pad(hidden, (0, 0, 0, 1), value=NAN)
    assert torch.equal(srpo.selected_logps_from_hidden(extra, weight, ids, bias=bias, backend=backend), expected)
    packed = srpo.selected_logps_from_hidden(
        hidden.flatten(0, 1), weight, ids.flatten(), bias=bias, return_entropy=True, backend=backend
    )
    assert torch.equal(packed.logps, expected.flatten())
    assert packed.entropy.shape == (8,)


@pytest.mark.parametrize("workspace_bytes", [None, 1, 100])
def test_selected_logps_pass_gradcheck(workspace_bytes):
    case = make_case(465, 2, 3, V=7, H=3, dtype=torch.float64, mask_style="full")
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    leaves = leaves_of(case, torch.device("cpu"))

    def both(hidden, weight, bias):
        return srpo.selected_logps_from_hidden(
            hidden, weight, case.batch.completion_ids, bias=bias, temperature=0.8, mask=mask, return_entropy=True,
            workspace_bytes=workspace_bytes,
        )  # fmt: skip

    assert torch.autograd.gradcheck(lambda *x: tuple(both(*x)), tuple(leaves.values()))


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])  # cispo differentiates no factor it clamps
def test_the_loss_passes_gradcheck(loss_type):
    case = make_case(466, 3, 3, V=7, H=3, dtype=torch.float64, mask_style="holes", role_style="mixed")
    loss = LossConfig(loss_type=loss_type, beta=0.1, max_completion_length=7)
    inputs = inputs_of(case, "scored before", loss=loss, ref_logps=case.batch.ref_logps)
    leaves = leaves_of(case, torch.device("cpu"))

    def value(*tensors):
        return loss_of(case, dict(zip(leaves, tensors, strict=True)), inputs, torch.device("cpu"), "torch")

    assert torch.autograd.gradcheck(value, tuple(leaves.values()))


# errors


class ComputationSpy(TorchDispatchMode):
    """Record what computes something of the loss; checks of shapes and value ranges are none of it."""

    FORBIDDEN = ("mm", "addmm", "bmm", "exp", "log", "logsumexp", "_log_softmax", "_softmax", "gather", "_to_copy")

    def __init__(self):
        super().__init__()
        self.computed: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function.name().split("::")
        floats = any(isinstance(x, Tensor) and x.is_floating_point() for x in args)
        if namespace != "aten" or (name.split(".")[0] in self.FORBIDDEN and floats):
            self.computed.append(name)
        return function(*args, **(kwargs or {}))


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


def assert_refused(function, arguments, error, argument):
    """Call and expect `error` about `argument`; nothing is computed, inputs keep values and versions."""
    tensors = {k: x for k, x in arguments.items() if isinstance(x, Tensor) and x.device.type != "meta"}
    before = {k: (x.detach().clone(), x._version) for k, x in tensors.items()}
    with ComputationSpy() as spy, pytest.raises(error) as raised:
        function(**arguments)
    assert isinstance(raised.value, SRPOError)
    assert f"{function.__name__}(): {argument} got" in str(raised.value)
    assert spy.computed == []
    for name, (value, version) in before.items():
        torch.testing.assert_close(tensors[name].detach(), value, rtol=0, atol=0, equal_nan=True)
        assert tensors[name]._version == version
        assert tensors[name].grad is None


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
