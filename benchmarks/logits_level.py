"""The ways to get from logits to a weighted GRPO loss and its gradient that the benchmark compares."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from providers import (
    TRUTH_ROWS,
    Case,
    Provider,
    Rollout,
    Table,
    credit,
    fixed,
    loss_off,
    make_rollout,
    off,
    split,
    surrogate,
)
from shapes import Shape
from torch import Tensor

from srpo import PRESETS, CreditConfig, role_weighted_grpo_loss

Streams = list[Tensor]
Logps = Callable[[Tensor, Tensor], Tensor]


def with_logps(logps: Logps, **options) -> Provider:
    """Make a provider of a function `(logits, ids) -> logps`: contrast streams are scored with it too."""

    def loss(logits: Tensor, rollout: Rollout, streams: Streams) -> Tensor:
        with torch.no_grad():
            scored = [logps(x, rollout.completion_ids) for x in streams]
        return rollout.loss(logps(logits, rollout.completion_ids), scored)

    return Provider(loss, logps, **options)


def eager(logits: Tensor, ids: Tensor) -> Tensor:
    """Take `log_softmax` and gather, in at least fp32."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)


@cache
def _compiled() -> Logps:
    return torch.compile(eager)


def compiled(logits: Tensor, ids: Tensor) -> Tensor:
    """Compile the same."""
    return _compiled()(logits, ids)


def trl(logits: Tensor, ids: Tensor) -> Tensor:
    """Take TRL's `selective_log_softmax`."""
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits, ids).float()


def trl_kernel(logits: Tensor, ids: Tensor) -> Tensor:
    """Take TRL's Triton kernel, which makes the entropy too, as ours does."""
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(logits, ids)[0]


def flash_attn(logits: Tensor, ids: Tensor) -> Tensor:
    """Take flash-attn's cross entropy, as verl and EasyR1 do."""
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return -cross_entropy_loss(logits.flatten(0, 1), ids.flatten())[0].view(ids.shape)


def liger(logits: Tensor, rollout: Rollout, streams: Streams) -> Tensor:
    """Take Liger's Triton loss. It has no weights per token: they enter as its engine-mismatch ratio."""
    from liger_kernel.transformers.grpo_loss import fused_selective_log_softmax, triton_grpo_loss

    ids = rollout.completion_ids
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in streams]  # it wants a position more
    weights = credit(rollout, [fused_selective_log_softmax(x, ids) for x in padded]) if streams else rollout.weights
    losses, _, _ = triton_grpo_loss(
        logits, rollout.old_logps, None, ids, rollout.advantages, torch.ones_like(ids),
        beta=0.0, eps_low=0.2, eps_high=0.2, inplace=False, vllm_is_ratio=weights,
    )  # fmt: skip
    return losses.mean()


def srpo(logits: Tensor, rollout: Rollout, streams: Streams) -> Tensor:
    """Take this library, contrast streams live."""
    given: dict[str, Tensor | CreditConfig] = {"weights": rollout.weights}
    if streams:
        names = ("corrupted_logits", "ablated_logits")
        given = dict(zip(names, streams, strict=False)) | {"role_ids": rollout.role_ids}
        given["credit"] = PRESETS["srpo" if len(streams) == 2 else "srpo_one_pass"]
    return role_weighted_grpo_loss(
        logits, rollout.completion_ids, rollout.advantages, old_logps=rollout.old_logps, **given
    ).loss  # fmt: skip


def one_kernel(logits: Tensor, rollout: Rollout, streams: Streams) -> Tensor:
    """Take this library with forward and backward in one kernel, where weights are known before the logits are read."""
    from srpo_kernels import launch

    stock, launch.TRAINS_ROWS = launch.TRAINS_ROWS, True
    try:
        return srpo(logits, rollout, streams)
    finally:
        launch.TRAINS_ROWS = stock


def off_by_one(logits: Tensor, ids: Tensor) -> Tensor:
    """Score the id after the right one: a mistake that the gate must catch."""
    return eager(logits, ids.roll(1, dims=-1))


PROVIDERS: dict[str, Provider] = {
    "eager": with_logps(eager),
    "torch.compile": with_logps(compiled, compiles=True),
    "TRL": with_logps(trl, package="trl"),
    "TRL kernel": with_logps(trl_kernel, package="trl", gpu=True),
    "Liger": Provider(liger, package="liger_kernel", gpu=True),
    "flash-attn": with_logps(flash_attn, package="flash_attn", gpu=True),
    "srpo": Provider(srpo),
    "srpo, one kernel": Provider(one_kernel, gpu=True),
    "off-by-one": with_logps(off_by_one, on_request=True),
}


class Truth(NamedTuple):
    """Loss and gradient in float64."""

    loss: Tensor
    gradient: Tensor  # [B, T, V]


@dataclass(frozen=True)
class Inputs:
    """One batch at the logits level."""

    logits: Tensor  # [B, T, V]
    rollout: Rollout
    streams: Streams  # of the same shape: scored without an image, and without the perception text

    def loss(self, provider: Provider) -> Tensor:
        """Run one forward."""
        with torch.no_grad():
            return provider.loss(self.logits, self.rollout, self.streams)

    def loss_and_gradient(self, provider: Provider) -> tuple[Tensor, Tensor]:
        """Run one forward and backward."""
        leaf = self.logits.detach().requires_grad_()
        loss = provider.loss(leaf, self.rollout, self.streams)
        loss.backward()
        return loss.detach(), leaf.grad

    def truth(self) -> Truth:
        """Compute loss and gradient in float64, some rows at a time."""
        r, N = self.rollout.double(), self.rollout.completion_ids.numel()
        ids = r.completion_ids.flatten()

        def rows(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
            for first in range(0, N, TRUTH_ROWS):
                chosen = slice(first, first + TRUTH_ROWS)
                yield chosen, x.flatten(0, 1)[chosen].double()

        scored = [torch.cat([eager(x, ids[c]) for c, x in rows(s)]).view_as(r.old_logps) for s in self.streams]
        weights = credit(r, scored) if scored else r.weights
        advantages, old = (r.advantages[:, None] * weights).flatten(), r.old_logps.flatten()
        total, gradient = torch.zeros((), dtype=torch.float64, device=ids.device), []
        for chosen, x in rows(self.logits):
            x.requires_grad_()
            part = surrogate(eager(x, ids[chosen]), old[chosen], advantages[chosen]).sum() / N
            gradient.append(torch.autograd.grad(part, x)[0])
            total += part.detach()
        return Truth(total, torch.cat(gradient).view_as(self.logits))

    def wrong_loss(self, loss: Tensor, truth: Truth) -> str | None:
        """Return what is wrong with a loss, or None."""
        return loss_off(loss, truth.loss, self.rollout.advantages, self.logits.dtype)

    def wrong(self, result: tuple[Tensor, Tensor], truth: Truth) -> str | None:
        """Return what is wrong with a loss and gradient, or None."""
        loss, gradient = result
        return off(gradient, truth.gradient, "gradient", self.logits.dtype) or self.wrong_loss(loss, truth)


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, n_streams: int, seed: int = 0) -> Inputs:
    """Draw a batch with one peak a row, as a trained model gives it; streams have lower peaks."""
    B, T, V, _ = vars(shape).values()
    generator = torch.Generator(device).manual_seed(seed)
    cpu = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (B, T), generator=cpu).to(device)

    def draw(peak: float) -> Tensor:
        x = 2 * torch.randn(B, T, V, generator=generator, device=device)
        heights = peak + 2 * torch.rand(ids.shape, generator=generator, device=device)
        return x.scatter_(-1, ids[..., None], heights[..., None])

    logits = draw(9.0)
    logps = torch.cat([eager(row, row_ids) for row, row_ids in zip(logits, ids, strict=True)]).view(B, T)
    rollout = make_rollout(ids.cpu(), logps.cpu(), cpu).map(lambda x: x.to(device))
    return Inputs(logits.to(dtype), rollout, [draw(8.0).to(dtype) for _ in range(n_streams)])


def tables(
    shape: Shape, dtype: torch.dtype, device: torch.device, wanted: list[str] | None, bandwidth: float
) -> Iterator[Table]:
    """Yield the tables of the level: forward alone, then with backward and 0, 1 and 2 contrast streams."""
    providers, skipped = split(PROVIDERS, wanted, device)
    one_read = shape.B * shape.T * shape.V * dtype.itemsize / bandwidth / 1e6
    for n_streams in range(3):
        inputs = make_inputs(shape, dtype, device, n_streams)
        truth, copy = inputs.truth(), Case(partial(_copy, inputs.logits), fixed(2 * one_read))
        if n_streams == 0:
            check = partial(inputs.wrong_loss, truth=truth)
            cases = {name: Case(partial(inputs.loss, p), fixed(one_read), check) for name, p in providers.items()}
            yield Table("forward", "one read of the logits", cases | {"a copy, fresh memory": copy}, skipped)
        floor, check = fixed((4 if n_streams else 3) * one_read), partial(inputs.wrong, truth=truth)
        cases = {name: Case(partial(inputs.loss_and_gradient, p), floor, check) for name, p in providers.items()}
        also = f", {n_streams} contrast stream{'s' * (n_streams > 1)}" if n_streams else ""
        moved = f"two reads and one write of the logits{', and one read of the rows of a role' if n_streams else ''}"
        text = f"{moved}, at the bandwidth of a copy"
        yield Table(f"forward + backward{also}", text, cases | {"a copy, fresh memory": copy}, skipped)


def _copy(x: Tensor) -> None:
    torch.empty_like(x).copy_(x)
