"""The ways to get from hidden states to a weighted GRPO loss and its gradients that the benchmark compares."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import torch
from logits_level import eager as selected
from measure import Measurement
from providers import TRUTH_ROWS, Case, Provider, Rollout, Table, loss_off, make_rollout, off, split, surrogate
from shapes import Shape
from torch import Tensor
from torch.nn import functional

from srpo import role_weighted_grpo_loss_from_hidden, selected_logps_from_hidden

Logps = Callable[[Tensor, Tensor, Tensor], Tensor]


def with_logps(logps: Logps, **options) -> Provider:
    """Make a provider of a function `(hidden, weight, ids) -> logps`."""

    def loss(hidden: Tensor, weight: Tensor, rollout: Rollout) -> Tensor:
        return rollout.loss(logps(hidden, weight, rollout.completion_ids))

    return Provider(loss, logps, **options)


def eager(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Make the logits `[B, T, V]`, then take `log_softmax` and gather in at least fp32."""
    return selected(functional.linear(hidden, weight), ids)


@cache
def _compiled() -> Logps:
    return torch.compile(eager)


def compiled(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Compile the same."""
    return _compiled()(hidden, weight, ids)


def trl(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Take TRL's chunked head, with the chunk size of its trainer and without the optional outputs."""
    from trl.kernels import ChunkedLogProbFunction

    rows = hidden.flatten(0, 1), weight, None, ids.flatten()
    return ChunkedLogProbFunction.apply(*rows, 1.0, 32768, None, 1.0, ())[0].view(ids.shape)


def liger_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Take Liger's scaled cross entropy: its Hopper kernels where they run, else its chunks of 512 rows."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden.flatten(0, 1), weight, ids.flatten()).view(
        ids.shape
    )


def liger(hidden: Tensor, weight: Tensor, rollout: Rollout) -> Tensor:
    """Take Liger's chunked GRPO. It has no weights per token: they enter as its engine-mismatch ratio."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    mask = torch.ones_like(rollout.completion_ids)
    grpo = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="dapo")
    return grpo(
        hidden, weight, rollout.completion_ids, mask, rollout.advantages,
        old_per_token_logps=rollout.old_logps, vllm_is_ratio=rollout.weights,
    )[0]  # fmt: skip


def cut_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Take cut-cross-entropy, unfiltered: its filter drops gradients that a policy loss needs."""
    from cut_cross_entropy import linear_cross_entropy

    impl = {"impl": "cce", "filter_eps": None} if hidden.is_cuda else {"impl": "torch_compile"}
    return -linear_cross_entropy(hidden, weight, ids, reduction="none", **impl)


def torch_cross_entropy(hidden: Tensor, weight: Tensor, rollout: Rollout) -> Tensor:
    """Take PyTorch's own linear cross entropy: a mean over tokens, all of one weight."""
    return functional.linear_cross_entropy(hidden.flatten(0, 1), weight, rollout.completion_ids.flatten())


def srpo_logps(hidden: Tensor, weight: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Take this library's log-probs."""
    return selected_logps_from_hidden(hidden, weight, ids, mask=mask)


def srpo(hidden: Tensor, weight: Tensor, rollout: Rollout) -> Tensor:
    """Take this library."""
    return role_weighted_grpo_loss_from_hidden(
        hidden, weight, rollout.completion_ids, rollout.advantages, weights=rollout.weights, old_logps=rollout.old_logps
    ).loss


def off_by_one(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Score the id after the right one: a mistake that the gate must catch."""
    return eager(hidden, weight, ids.roll(1, dims=-1))


PROVIDERS: dict[str, Provider] = {
    "eager": with_logps(eager),
    "torch.compile": with_logps(compiled, compiles=True),
    "TRL": with_logps(trl, package="trl"),
    "Liger": Provider(liger, package="liger_kernel"),
    "Liger cross entropy": with_logps(liger_cross_entropy, package="liger_kernel"),
    "cut-cross-entropy": with_logps(cut_cross_entropy, package="cut_cross_entropy", compiles=True),
    "srpo": Provider(srpo, srpo_logps),
    "off-by-one": with_logps(off_by_one, on_request=True),
}
if hasattr(functional, "linear_cross_entropy"):
    PROVIDERS["torch cross entropy"] = Provider(torch_cross_entropy, weighted=False)


class Truth(NamedTuple):
    """Log-probs, loss and gradients in float64; the last two for weighted tokens and for a plain mean of `-logps`."""

    logps: Tensor  # [B, T]
    weighted: tuple[Tensor, Tensor, Tensor]  # loss, hidden [B, T, H], head [V, H]
    plain: tuple[Tensor, Tensor, Tensor] | None


@dataclass(frozen=True)
class Inputs:
    """One batch at the hidden level."""

    hidden: Tensor  # [B, T, H]
    weight: Tensor  # [V, H]
    rollout: Rollout
    trains_head: bool = True

    def loss_and_gradients(self, provider: Provider) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run one forward and backward."""
        hidden = self.hidden.detach().requires_grad_()
        weight = self.weight.detach().requires_grad_(self.trains_head)
        loss = provider.loss(hidden, weight, self.rollout)
        loss.backward()
        return loss.detach(), hidden.grad, weight.grad

    def score(self, provider: Provider, mask: Tensor | None = None) -> Tensor:
        """Score every row, or those of a mask, without gradient."""
        with torch.no_grad():
            masked = () if mask is None else (mask,)
            return provider.logps(self.hidden, self.weight, self.rollout.completion_ids, *masked)

    def truth(self, plain: bool) -> Truth:
        """Compute log-probs, loss and gradients in float64, some rows at a time."""
        r = self.rollout.double()
        ids, old, N = r.completion_ids.flatten(), r.old_logps.flatten(), r.old_logps.numel()
        advantages, weight = (r.advantages[:, None] * r.weights).flatten(), self.weight.double().requires_grad_()
        zero = torch.zeros((), dtype=torch.float64, device=ids.device)
        sums = [[zero, [], torch.zeros_like(weight)] for _ in range(1 + plain)]
        logps = []
        for first in range(0, N, TRUTH_ROWS):
            chosen = slice(first, first + TRUTH_ROWS)
            x = self.hidden.flatten(0, 1)[chosen].double().requires_grad_()
            logps.append(eager(x, weight, ids[chosen]))
            parts = [surrogate(logps[-1], old[chosen], advantages[chosen]).sum() / N, -logps[-1].sum() / N]
            for total, part in zip(sums, parts, strict=False):
                d_hidden, d_weight = torch.autograd.grad(part, (x, weight), retain_graph=True)
                total[0] = total[0] + part.detach()
                total[1].append(d_hidden)
                total[2] += d_weight
            logps[-1] = logps[-1].detach()
        done = [(loss, torch.cat(rows).view_as(self.hidden), head) for loss, rows, head in sums]
        return Truth(torch.cat(logps).view_as(r.old_logps), done[0], done[1] if plain else None)

    def wrong(self, result: tuple[Tensor, Tensor, Tensor | None], truth: Truth, weighted: bool = True) -> str | None:
        """Return what is wrong with a loss and gradients, or None."""
        loss, d_hidden, d_weight = result
        true_loss, *gradients = truth.weighted if weighted else truth.plain
        dtype = self.hidden.dtype
        wrong = off(d_hidden, gradients[0], "gradient of hidden", dtype)
        if self.trains_head:
            wrong = wrong or off(d_weight, gradients[1], "gradient of the head", dtype)
        return wrong or loss_off(loss, true_loss, self.rollout.advantages, dtype)

    def wrong_logps(self, logps: Tensor, truth: Truth) -> str | None:
        """Return what is wrong with log-probs, or None."""
        return off(logps, truth.logps, "log-prob", self.hidden.dtype)

    def with_active(self, share: float) -> "Inputs":
        """Return the batch with a share of its rollouts left, spread evenly; the others have an advantage of 0."""
        B = len(self.rollout.advantages)
        kept = torch.arange(B, device=self.hidden.device) % round(1 / share) == 0
        return replace(self, rollout=replace(self.rollout, advantages=self.rollout.advantages * kept))


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Draw a batch whose logits have one peak a row, as a trained model gives them."""
    B, T, V, H = vars(shape).values()
    generator, cpu = torch.Generator(device).manual_seed(seed), torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (B, T), generator=cpu).to(device)
    weight = torch.randn(V, H, generator=generator, device=device)
    hidden = torch.randn(B, T, H, generator=generator, device=device) * (2 / H**0.5) + weight[ids] * (9 / H)
    logps = selected_logps_from_hidden(hidden, weight, ids)
    rollout = make_rollout(ids.cpu(), logps.cpu(), cpu).map(lambda x: x.to(device))
    return Inputs(hidden.to(dtype), weight.to(dtype), rollout)


def tables(
    shape: Shape, dtype: torch.dtype, device: torch.device, wanted: list[str] | None, _bandwidth: float
) -> Iterator[Table]:
    """Yield the tables of the level: scoring, forward + backward, the same with a frozen head."""
    providers, skipped = split(PROVIDERS, wanted, device)
    inputs = make_inputs(shape, dtype, device)
    truth = inputs.truth(plain=any(not provider.weighted for provider in providers.values()))
    rows = min(768 if device.type == "cpu" else 4096, shape.B * shape.T)

    def floor(name: str, share: float = 1.0) -> Callable[[dict[str, Measurement]], float]:
        return lambda results: share * results[name].median

    product = "the bare product"
    scoring = {
        name: Case(partial(inputs.score, p), floor(product), partial(inputs.wrong_logps, truth=truth))
        for name, p in providers.items()
        if p.logps is not None
    }
    if "srpo" in scoring:
        ours = providers["srpo"]
        masks = [inputs.rollout.role_ids == role for role in (1, 2)]
        both = Case(lambda: [inputs.score(ours, mask) for mask in masks], floor(product))
        scoring["srpo, two contrasts"] = replace(both, note="each on the rows of its role")
    scoring[product] = Case(partial(bare_products, inputs, rows, backward=0), floor(product))
    text = "the bare product in chunks, 2NVH, measured beside"
    yield Table("scoring", text, scoring, skipped | dict.fromkeys(_without_logps(providers), "gives a loss only"))

    products = "the bare products"
    training = _training(inputs, providers, truth, floor(products))
    for share in (0.5, 0.1) if "srpo" in providers else ():
        part = inputs.with_active(share)
        real = float((part.rollout.advantages != 0).float().mean())
        run = partial(part.loss_and_gradients, providers["srpo"])
        note = "rollouts with an advantage of 0 are not multiplied"
        training[f"srpo, {real:.0%} of the rows"] = Case(run, floor(products, real), note=note)
    training[products] = Case(partial(bare_products, inputs, rows, backward=2), floor(products))
    yield Table("forward + backward", "the bare products in the same chunks, 6NVH, measured beside", training, skipped)

    frozen = replace(inputs, trains_head=False)
    cases = _training(frozen, providers, truth, floor(products))
    cases[products] = Case(partial(bare_products, inputs, rows, backward=1), floor(products))
    yield Table("forward + backward, frozen head", "the bare products, 4NVH, measured beside", cases, skipped)


def _training(inputs: Inputs, providers: dict[str, Provider], truth: Truth, floor: Callable) -> dict[str, Case]:
    return {
        name: Case(
            partial(inputs.loss_and_gradients, p), floor, partial(inputs.wrong, truth=truth, weighted=p.weighted),
            note="" if p.weighted else "one weight for all tokens",
        )
        for name, p in providers.items()
    }  # fmt: skip


def _without_logps(providers: dict[str, Provider]) -> list[str]:
    return [name for name, provider in providers.items() if provider.logps is None]


def bare_products(inputs: Inputs, rows: int, backward: int) -> None:
    """Run the product of a forward pass, and one or both of a backward pass, on one workspace of `rows`."""
    x, weight = inputs.hidden.flatten(0, 1), inputs.weight
    logits, d_hidden, d_weight = x.new_empty(rows, len(weight)), torch.empty_like(x), torch.empty_like(weight)
    for first in range(0, len(x), rows):
        chunk = x[first : first + rows]
        out = logits[: len(chunk)]
        torch.mm(chunk, weight.t(), out=out)
        if backward > 0:
            torch.mm(out, weight, out=d_hidden[first : first + rows])
        if backward > 1:
            torch.mm(out.t(), chunk, out=d_weight)
