"""The calls that are compared: inputs with the traps of real ones, a public function, and the truth in float64.

Truths share nothing with the library: `torch.log_softmax` and the project's oracles, token by token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import oracles
import torch
from compiled.cases import split, together
from compiled.emulator.batches import Batch, itself, tokens_first
from torch import Tensor
from torch.nn.functional import one_hot

from srpo import (
    CreditConfig,
    LossConfig,
    role_weighted_grpo_loss,
    role_weighted_grpo_loss_from_hidden,
    role_weighted_grpo_loss_from_logps,
    selected_logps,
    vocabulary_kl,
)
from srpo_kernels import backends, reference, rules

Result = dict[str, tuple[Tensor, Tensor, torch.dtype]]  # quantity: got, truth, the precision whose floor holds
VECTORS = {"old": "old_logps", "ref": "ref_logps", "ratio": "importance_sampling_ratio"}
CHECKED = {"validate_values": False, "backend": "triton"}
CREDIT = CreditConfig()


def log_probs(batch: Batch, temperature: float = 1.0, packed: bool = False) -> Result:
    """Run `selected_logps` forward and backward, entropy included."""
    t, shape = batch.tensors, (batch.B, batch.T)
    flat = tokens_first if packed else itself
    leaf, ids, mask = t["logits"].detach().requires_grad_(), t["ids"].clamp(min=0), t["mask"]
    got = selected_logps(
        flat(leaf), flat(t["ids"]), mask=flat(mask), temperature=temperature, return_entropy=True, **CHECKED
    )  # fmt: skip
    g, h = (torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    h[0, 0] = g[-1, -1] = 0
    (gradient,) = torch.autograd.grad((flat(g) * got.logps).sum() + (flat(h) * got.entropy).sum(), leaf)

    log_p = torch.log_softmax(leaf.detach()[:, : batch.T].double() / temperature, -1)
    p = log_p.exp()
    finite = torch.where(p == 0, 0.0, log_p)
    entropy = torch.where(mask, -(p * finite).sum(-1), 0.0)
    slope = g.double()[..., None] * (one_hot(ids, batch.V) - p)
    slope -= h.double()[..., None] * p * (finite + entropy[..., None])
    true = torch.zeros(leaf.shape, dtype=torch.float64)
    true[:, : batch.T] = torch.where(mask[..., None], slope / temperature, 0.0)
    return {
        "logps": (
            got.logps.view(shape),
            torch.where(mask, log_p.gather(-1, ids[..., None])[..., 0], 0.0),
            torch.float32,
        ),
        "entropy": (got.entropy.view(shape), entropy, torch.float32),
        "gradient": (gradient, true, batch.dtype),
    }


def loss(
    batch: Batch, mode: str = "given", *, entry: str = "logits", packed: bool = False, inplace: bool = False,
    use: tuple[str, ...] = ("old",), credit: CreditConfig = CREDIT, upstream: float = 1.0, **settings,
) -> Result:  # fmt: skip
    """Run the loss forward and backward; `mode` says where contrasts come from: given, live or none."""
    t, config, shape = batch.tensors, LossConfig(**settings), (batch.B, batch.T)
    flat = tokens_first if packed else itself
    given = {VECTORS[k]: t[k] for k in use}
    streams = {
        "given": {"corrupted_logps": t["corrupted"], "ablated_logps": t["ablated"]},
        "live": {"corrupted_logits": t["noisy"], "ablated_logits": t["blind"]},
        "none": {},
    }[mode]
    arguments = {k: flat(x) for k, x in (given | streams).items()} | CHECKED
    arguments |= {"completion_mask": flat(t["mask"]), "loss": config}
    arguments |= {"role_ids": flat(t["roles"]), "credit": credit} if streams else {}
    arguments |= {"cu_seqlens": torch.arange(batch.B + 1) * batch.T} if packed else {}
    advantages = flat(t["advantages"][:, None].expand(shape)) if packed else t["advantages"]
    leaf = t["logits" if entry == "logits" else "logps"].detach().requires_grad_()
    if entry == "logits":
        passed = flat(leaf).clone() if inplace else flat(leaf)
        out = role_weighted_grpo_loss(passed, flat(t["ids"]), advantages, inplace_backward=inplace, **arguments)
    else:
        out = role_weighted_grpo_loss_from_logps(flat(leaf), advantages, **arguments)
    (gradient,) = torch.autograd.grad(out.loss * upstream, leaf)

    exact = leaf.detach().double().requires_grad_()
    score = functools.partial(
        oracles.log_probs, completion_ids=t["ids"].clamp(min=0), mask=t["mask"], temperature=config.temperature
    )
    logps = score(exact) if entry == "logits" else exact
    weights = t["mask"].double()
    if streams:
        against = [x.double() for x in streams.values()]
        contrasts = against if mode == "given" else [score(x) for x in against]
        if credit.reads_kl:
            contrasts = [oracles.kl(exact.detach(), x, config.temperature)[:, : batch.T] for x in against]
        contrast = oracles.contrast(given.get("old_logps", logps.detach()), *contrasts, t["roles"], t["mask"], credit)
        weights = oracles.weights(contrast, t["roles"], t["mask"], credit, t["advantages"])
    truth = oracles.loss(logps, t["advantages"], t["mask"], config, weights=weights, **given)
    (true,) = torch.autograd.grad(truth.loss * upstream, exact)
    metrics = [(out.metrics[name].double(), value) for name, value in truth.metrics.items()]
    result = {
        "loss": (out.loss, truth.loss, torch.float32),
        "logps": (out.logps.view(shape), torch.where(t["mask"], logps, 0.0), torch.float32),
        "weights": (out.weights.view(shape), weights, torch.float32),
        "gradient": (gradient, true, leaf.dtype),
        "metric": (torch.stack([x for x, _ in metrics]), torch.tensor([x for _, x in metrics]).double(), torch.float32),
    }
    if entry == "logits":
        entropy = oracles.entropies(exact.detach(), t["mask"], config.temperature)
        result["entropy"] = (out.entropy.view(shape), entropy, torch.float32)
    return result


def hidden(batch: Batch, **settings) -> Result:
    """Run the loss from hidden states and a head: fp32 logits in a workspace, the gradient in the head's dtype."""
    t, g = batch.tensors, torch.Generator().manual_seed(5)
    states = torch.randn(batch.B, batch.T + 1, 8, generator=g).to(batch.dtype).requires_grad_()
    head = torch.randn(batch.V, 8, generator=g).to(batch.dtype).requires_grad_()
    arguments = {
        "old_logps": t["old"], "corrupted_logps": t["corrupted"], "ablated_logps": t["ablated"], "role_ids": t["roles"],
        "completion_mask": t["mask"], "loss": LossConfig(**settings), "validate_values": False,
    }  # fmt: skip
    out = role_weighted_grpo_loss_from_hidden(
        states, head, t["ids"], t["advantages"], workspace_bytes=4 * 6 * batch.V, backend="triton", **arguments
    )
    exact, exact_head = (x.detach().double().requires_grad_() for x in (states, head))
    truth = role_weighted_grpo_loss(exact @ exact_head.T, t["ids"], t["advantages"], backend="torch", **arguments)
    gradients = torch.autograd.grad(out.loss, states)[0], torch.autograd.grad(truth.loss, exact)[0]
    result = {"loss": (out.loss, truth.loss, torch.float32), "logps": (out.logps, truth.logps, torch.float32)}
    # a product of two bf16 matrices is no matter of these kernels
    return result | ({"gradient": (*gradients, torch.float32)} if batch.dtype == torch.float32 else {})


def far_rows(V: int = 1000, dtype: torch.dtype = torch.float16, inplace: bool = True) -> Result:
    """Score and differentiate three rows: the stride is an int32, the offset of the last row is none."""
    stride, ids = 2**30 + 16, torch.tensor([[3, V - 1, 0]])
    torch.use_deterministic_algorithms(False)  # virtual memory: nothing may fill it
    far = torch.empty(2 * stride + V, dtype=dtype).as_strided((1, 3, V), (0, stride, 1))
    leaf = far.copy_(torch.randn(1, 3, V, generator=torch.Generator().manual_seed(0))).detach().requires_grad_()
    exact = leaf.double().detach().requires_grad_()
    out = role_weighted_grpo_loss(leaf.view_as(leaf), ids, torch.ones(1), inplace_backward=inplace, backend="triton")
    truth = role_weighted_grpo_loss(exact, ids, torch.ones(1), backend="torch")
    gradients = torch.autograd.grad(out.loss, leaf)[0], torch.autograd.grad(truth.loss, exact)[0]
    return {"logps": (out.logps, truth.logps, torch.float32), "gradient": (*gradients, dtype)}


def pairs(batch: Batch, temperature: float = 1.0) -> Result:
    """Run `vocabulary_kl`."""
    t = batch.tensors
    got = vocabulary_kl(t["logits"], t["noisy"], t["ids"], mask=t["mask"], temperature=temperature, **CHECKED)
    exact = oracles.kl(t["logits"].double(), t["noisy"].double(), temperature)[:, : batch.T]
    logps = oracles.log_probs(t["noisy"].double(), t["ids"].clamp(min=0), t["mask"], temperature)
    return {
        "kl": (got.kl, torch.where(t["mask"], exact, 0.0), torch.float32),
        "logps": (got.logps, logps, torch.float32),
    }


def far_pairs(V: int = 1000) -> Result:
    """Contrast two rows that lie far apart: the stride is an int32, the offset of the last row is none."""
    stride = 2**30 + 16
    torch.use_deterministic_algorithms(False)  # virtual memory: nothing may fill it
    far = torch.empty(2 * stride + V, dtype=torch.float16).as_strided((1, 3, V), (0, stride, 1))
    against = far.copy_(torch.randn(1, 3, V, generator=torch.Generator().manual_seed(0)))
    logits = torch.randn(1, 3, V, generator=torch.Generator().manual_seed(1)).half()
    got = vocabulary_kl(logits, against, torch.zeros(1, 3, dtype=torch.long), **CHECKED)
    return {"kl": (got.kl, oracles.kl(logits.double(), against.double()), torch.float32)}


def far_tokens() -> Result:
    """Weigh a packed trajectory whose first token is number 2^31: its vectors are cut from one huge one."""
    torch.use_deterministic_algorithms(False)
    first, T = 2**31 + 5, 7
    credit, config = rules.credit_rule(CREDIT.rule), rules.loss_rule(LossConfig(beta=0.1).rule)
    t = Batch(B=1, T=T, V=2, layout="rows").tensors
    mask = torch.ones(1, T, dtype=torch.bool)
    vectors = [t["old"], t["corrupted"], t["ablated"], t["logps"], t["ref"], t["advantages"].expand(1, T)]
    pool = torch.empty(first + T * len(vectors))
    far = [pool[k * T : k * T + first + T] for k in range(len(vectors))]
    small = [torch.empty(first + T, dtype=torch.int8) for _ in range(2)]
    for x, y in zip([*far, *small], [*vectors, t["roles"], mask], strict=True):
        x[first:] = y[0]
    old, corrupted, ablated, logps, ref, advantages = far
    roles, valid, cu_seqlens, scale = *small, torch.tensor([first, first + T]), torch.ones(1)
    streams = (None, old, corrupted, ablated, roles, valid, advantages)
    _, weights, _, mean = backends.token_credit(*streams, cu_seqlens, 1, credit, "triton")
    losses, _, coefficient = backends.policy_loss(
        logps, old, ref, None, advantages, weights, valid, scale, cu_seqlens, config, "triton"
    )
    old, corrupted, ablated, logps, ref, advantages = (x.double() for x in vectors)
    truth = reference.token_credit(None, old, corrupted, ablated, t["roles"], mask, advantages, credit)
    exact, _, slope = reference.policy_loss(logps, old, ref, None, advantages, truth[1], mask, scale.double(), config)
    return {
        "weights": (weights[first:], truth[1][0], torch.float32),
        "loss": (losses, exact, torch.float32),
        "gradient": (coefficient[first:], slope[0], torch.float32),
        "metric": (mean, truth[3], torch.float32),
    }


def split_rows(call: Callable[..., Result], *arguments, **options) -> Result:
    """Return what a call returns where rows are split over several programs."""
    results: list[Result] = []
    split(lambda: results.append(call(*arguments, **options)))
    return results[0]


def one_kernel(call: Callable[..., Result], *arguments, **options) -> Result:
    """Return what a call returns where forward and backward are one kernel."""
    results: list[Result] = []
    together(lambda: results.append(call(*arguments, **options)))
    return results[0]


def scenarios(quick: bool) -> dict[str, Callable[[], Result]]:
    """Return every comparison by name."""
    found: dict[str, Callable[[], Result]] = {}
    for dtype, name in {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.items():
        for V in (1, 1000, 1003) if quick else (1, 2, 7, 16, 130, 1000, 1003, 4104, 8192, 32773):
            batch = Batch(T=3 if V > 8000 else 5, V=V, dtype=dtype)
            found[f"log-probs {name} V={V}"] = functools.partial(log_probs, batch, 0.7)
        for layout in (
            ()
            if quick
            else ("rows", "odd strides", "wide rows", "padded rows", "transposed", "every second", "columns")
        ):
            for V in (1000, 4104):
                batch = Batch(B=3, T=4, V=V, dtype=dtype, layout=layout, banned=True, seed=1)
                found[f"log-probs {name} V={V} {layout}"] = functools.partial(log_probs, batch)
    low = Batch(B=1, T=3, V=17003, offset=-400.0)
    kl_one_pass = CreditConfig(contrast_kind="kl", reasoning_signal="image_independence")
    batch, rows, wide = Batch(B=3, T=7), Batch(B=3, T=7, layout="rows"), Batch(B=3, T=4, V=4104, banned=True)
    one_pass = CreditConfig(reasoning_signal="image_independence", tau=0.3)
    everything = functools.partial(loss, use=tuple(VECTORS), beta=0.04, delta=1.5, temperature=1.3)
    calls: dict[str, tuple] = {
        "log-probs packed": (log_probs, rows, 2.0, True),
        "log-probs V=4104": (log_probs, wide),
        "log-probs far below 0": (log_probs, low),
        "log-probs far below 0, split rows": (split_rows, log_probs, low),
        "log-probs split rows": (split_rows, log_probs, Batch(T=2, V=17000, banned=True)),
        "log-probs split rows V=32773": (split_rows, log_probs, Batch(T=2, V=32773, banned=True)),
        "loss live": (loss, batch, "live"),
        "loss live fp32 V=4104": (loss, Batch(V=4104, dtype=torch.float32), "live"),
        "loss live split rows": (split_rows, loss, Batch(V=17000, T=2), "live"),
        "loss packed live": (functools.partial(loss, packed=True), rows, "live"),
        "loss packed": (functools.partial(loss, packed=True), rows),
        "loss in place": (functools.partial(loss, inplace=True), batch),
        "loss in place, an edge": (functools.partial(loss, inplace=True), Batch(B=3, T=4, V=1003)),
        "loss live one pass": (functools.partial(loss, credit=one_pass), batch, "live"),
        "loss live kl": (functools.partial(loss, credit=CreditConfig(contrast_kind="kl")), batch, "live"),
        "loss live kl, an edge": (
            functools.partial(loss, credit=CreditConfig(contrast_kind="kl"), temperature=0.8),
            Batch(B=2, T=5, V=4107, layout="padded rows"), "live",
        ),
        "loss live kl, split rows": (
            functools.partial(split_rows, credit=kl_one_pass), loss,
            Batch(B=1, T=3, V=17003, layout="rows", seed=1), "live",
        ),
        "vocabulary kl": (pairs, Batch(B=2, T=4, V=4107, layout="padded rows", seed=1), 0.8),
        "vocabulary kl, banned, fp32": (pairs, Batch(B=2, T=3, V=1003, dtype=torch.float32, banned=True)),
        "pairs 2^30 elements apart": (far_pairs,),
        "loss plain on-policy": (functools.partial(loss, use=()), Batch(B=3, T=7, V=1003), "none"),
        "loss with everything": (everything, batch),
        "one kernel": (one_kernel, loss, Batch(B=3, T=4, V=1008)),
        "one kernel with everything": (one_kernel, everything, Batch(V=4107, layout="padded rows")),
        "one kernel, four chunks abreast": (
            one_kernel, loss, Batch(B=1, T=3, V=50003, layout="padded rows", seed=1), "none",
        ),
        "one kernel fp32 scaled": (
            functools.partial(one_kernel, upstream=0.37), loss,
            Batch(T=3, V=17003, dtype=torch.float32, layout="padded rows"),
        ),
        "one kernel packed on-policy cispo": (
            functools.partial(one_kernel, packed=True, use=(), upstream=0.25, loss_type="cispo", epsilon_high=1.1),
            loss, Batch(B=3, T=4, V=1008, layout="rows"), "none",
        ),
        "loss from hidden": (hidden, Batch(B=3, T=4, V=4104)),
        "loss from hidden fp32": (hidden, Batch(V=1003, dtype=torch.float32)),
        "rows 2^30 elements apart": (far_rows,),
        "tokens beyond number 2^31": (far_tokens,),
    }  # fmt: skip
    found |= {name: functools.partial(*call) for name, call in calls.items()}
    options = {
        "mean": {}, "solve": {"credit": CreditConfig(normalize="solve", weight_min=0.5, weight_max=2.0)},
        "signed": {"credit": CreditConfig(direction="advantage", normalize="none")},
        "strength 0.3": {"credit": CreditConfig(strength=0.3)}, "one pass": {"credit": one_pass},
        "role mean, k3": {"credit": CreditConfig(baseline="role_mean", contrast_kind="k3")},
        "abs, no baseline": {"credit": CreditConfig(contrast_kind="abs", baseline="none", missing_role="within")},
        "kl, delta, is-ratio": {"use": tuple(VECTORS), "beta": 0.1, "delta": 1.3},
        "cispo": {"loss_type": "cispo", "epsilon_high": 1.1}, "packed": {"packed": True},
        "sequence": {"importance_sampling_level": "sequence_token", "loss_type": "grpo"},
        "sequence kl": {"importance_sampling_level": "sequence_token", "use": ("old", "ref"), "beta": 0.1},
    }  # fmt: skip
    for T in (7,) if quick else (7, 256, 1300):  # a block of tokens is 256
        batch = Batch(B=3, T=T, V=2, layout="rows", seed=T)
        for name, chosen in options.items():
            found[f"from log-probs, {name} T={T}"] = functools.partial(loss, batch, entry="logps", **chosen)
    return found
