"""A batch whose log-probs are those of hidden states and a head, and its comparison with the float64 oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import oracles
import torch
from hypothesis import settings
from strategies import Batch, make_batch, make_credit
from tolerances import assert_close_to_truth
from torch import Tensor
from torch.nn.functional import linear, pad

import srpo
from srpo import CreditConfig, LossConfig

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
        roles = oracles.without_evidence(base, *streams, needs.roles, mask, inputs["credit"])
        weights = oracles.weights(contrast, roles, mask, inputs["credit"], inputs["advantages"])
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


def loss_of(case, leaves, inputs, device, backend, **options):
    ids = case.batch.completion_ids.to(device)
    call = srpo.role_weighted_grpo_loss_from_hidden
    return call(completion_ids=ids, backend=backend, **leaves, **on(device, inputs), **options).loss
