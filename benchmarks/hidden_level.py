"""The ways to get from hidden states to a weighted GRPO loss and its gradients that the benchmark compares."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from logits_level import Rollout, make_rollout
from measure import Measurement
from torch import Tensor

from srpo import role_weighted_grpo_loss_from_hidden, selected_logps_from_hidden

FLOOR = "the bare matrix products in the same chunks, measured beside: three for training, one for scoring"
ROWS = 768  # of a chunk of the bare products


def eager(hidden: Tensor, weight: Tensor, rollout: Rollout) -> Tensor:
    """Make the logits `[N, V]`, then take `log_softmax` and gather in at least fp32."""
    logits = torch.nn.functional.linear(hidden, weight)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return rollout.clipped_loss(wide.log_softmax(-1).gather(-1, rollout.completion_ids[..., None]).squeeze(-1))


def trl(hidden: Tensor, weight: Tensor, rollout: Rollout) -> Tensor:
    """Take TRL's chunked log-prob head, with the chunk size of its trainer and without the optional outputs."""
    from trl.kernels import ChunkedLogProbFunction

    ids = rollout.completion_ids
    rows, optional_outputs = (hidden.flatten(0, 1), weight, None, ids.flatten()), ()
    logps, *_ = ChunkedLogProbFunction.apply(*rows, 1.0, 32768, None, 1.0, optional_outputs)
    return rollout.clipped_loss(logps.view(ids.shape))


def liger(hidden: Tensor, weight: Tensor, rollout: Rollout) -> Tensor:
    """Take Liger's chunked GRPO. It has no weights per token: they enter as its engine-mismatch ratio."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    mask = torch.ones_like(rollout.completion_ids)
    grpo = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="dapo")
    return grpo(
        hidden, weight, rollout.completion_ids, mask, rollout.advantages,
        old_per_token_logps=rollout.old_logps, vllm_is_ratio=rollout.weights,
    )[0]  # fmt: skip


def srpo(hidden: Tensor, weight: Tensor, rollout: Rollout) -> Tensor:
    """Take this library."""
    return role_weighted_grpo_loss_from_hidden(
        hidden, weight, rollout.completion_ids, rollout.advantages, weights=rollout.weights, old_logps=rollout.old_logps
    ).loss


PROVIDERS: dict[str, Callable[[Tensor, Tensor, Rollout], Tensor]] = {
    "eager": eager, "trl": trl, "liger": liger, "srpo": srpo,
}  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """One batch at the hidden level."""

    hidden: Tensor  # [B, T, H]
    weight: Tensor  # [V, H]
    rollout: Rollout
    trains_head: bool = True

    def double(self) -> "Inputs":
        """Return the batch in float64."""
        wide = {"hidden": self.hidden.double(), "weight": self.weight.double(), "rollout": self.rollout.double()}
        return replace(self, **wide)

    def loss_and_gradients(self, provider: Callable) -> tuple[Tensor, list[Tensor]]:
        """Run one forward and backward."""
        hidden = self.hidden.detach().requires_grad_()
        weight = self.weight.detach().requires_grad_(self.trains_head)
        loss = provider(hidden, weight, self.rollout)
        loss.backward()
        return loss.detach(), [hidden.grad, weight.grad] if self.trains_head else [hidden.grad]


def make_inputs(B: int, T: int, V: int, H: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Draw a batch whose logits have one peak a row, as a trained model gives them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (B, T), generator=generator)
    weight = torch.randn(V, H, generator=generator)
    hidden = torch.randn(B, T, H, generator=generator) * (2 / H**0.5) + weight[ids] * (9 / H)
    logps = selected_logps_from_hidden(hidden, weight, ids)
    rollout = make_rollout(ids, logps, generator).map(lambda x: x.to(device))
    return Inputs(hidden.to(device, dtype), weight.to(device, dtype), rollout)


def extra_cases(inputs: Inputs) -> dict[str, Callable]:
    """Return the floors, and what this library does with less work."""
    half = inputs.rollout.advantages.clone()
    half[::2] = 0.0
    frozen = replace(inputs, trains_head=False)
    half_active = replace(inputs, rollout=replace(inputs.rollout, advantages=half))
    perception = torch.arange(inputs.hidden.shape[1], device=half.device) % 2 == 0
    roles = [perception.expand(inputs.hidden.shape[:2]), ~perception.expand(inputs.hidden.shape[:2])]
    return {
        "bare products": partial(bare_products, inputs),
        "srpo, frozen head": partial(frozen.loss_and_gradients, srpo),
        "srpo, half the rows": partial(half_active.loss_and_gradients, srpo),
        "bare product": partial(bare_product, inputs),
        "srpo, scoring": partial(score, inputs),
        "srpo, two contrasts": lambda: [score(inputs, mask) for mask in roles],
    }


def floor(name: str, _inputs: Inputs, results: dict[str, Measurement], _bandwidth: float) -> float:
    """Return the milliseconds of the matrix products that a case needs."""
    scoring = name in ("bare product", "srpo, scoring", "srpo, two contrasts")
    share = {"srpo, frozen head": 2 / 3, "srpo, half the rows": 1 / 2}.get(name, 1.0)
    return share * results["bare product" if scoring else "bare products"].median


def score(inputs: Inputs, mask: Tensor | None = None) -> None:
    """Score every row, or those of a mask, without gradient."""
    with torch.no_grad():
        selected_logps_from_hidden(inputs.hidden, inputs.weight, inputs.rollout.completion_ids, mask=mask)


def bare_products(inputs: Inputs) -> None:
    """Run the products of a forward and a backward pass, 6NVH, on one workspace."""
    x, weight = inputs.hidden.flatten(0, 1), inputs.weight
    logits, d_hidden, d_weight = x.new_empty(ROWS, len(weight)), torch.empty_like(x), torch.empty_like(weight)
    for first in range(0, len(x), ROWS):
        chunk = x[first : first + ROWS]
        out = logits[: len(chunk)]
        torch.mm(chunk, weight.t(), out=out)
        torch.mm(out, weight, out=d_hidden[first : first + ROWS])
        torch.mm(out.t(), chunk, out=d_weight)


def bare_product(inputs: Inputs) -> None:
    """Run the product of scoring, 2NVH, on one workspace."""
    x, weight = inputs.hidden.flatten(0, 1), inputs.weight
    logits = x.new_empty(ROWS, len(weight))
    for first in range(0, len(x), ROWS):
        chunk = x[first : first + ROWS]
        torch.mm(chunk, weight.t(), out=logits[: len(chunk)])
