"""The public calls whose kernels are compiled. A kernel that no case launches fails `test_every_kernel_has_a_case`.

To register a kernel, add a case that reaches it through a public function.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from srpo import (
    CreditConfig,
    LossConfig,
    role_weighted_grpo_loss,
    role_weighted_grpo_loss_from_hidden,
    selected_logps,
    selected_logps_from_hidden,
    vocabulary_kl_from_hidden,
)
from srpo_kernels import launch

QWEN_VOCABULARIES = (151936, 152064)  # their rows start on 16-element boundaries
ODD_VOCABULARY = 151665  # Qwen's own tokens: contiguous rows start anywhere, rows cut from 151936 on boundaries
INTERNVL_VOCABULARY = 92553
KL = CreditConfig(contrast_kind="kl")
KL_ONE_PASS = CreditConfig(contrast_kind="kl", reasoning_signal="image_independence")


@dataclass(frozen=True)
class Case:
    """A public call, and whether its rows are aligned and what they are streamed as: 128-bit accesses are due."""

    run: Callable[[], None]
    streams: str | None = None  # "bf16", "f16" or "f32"
    bytes_moved: tuple[int, int] = (2, 4)  # of an element of logits: forward, backward


@dataclass(frozen=True)
class Shape:
    """The sizes of one call; `offset` moves ids, roles and masks off every alignment."""

    B: int = 2
    T: int = 5
    V: int = QWEN_VOCABULARIES[0]
    dtype: torch.dtype = torch.bfloat16
    extra_row: bool = True
    offset: int = 0
    packed: bool = False
    cut_from: int = 0  # columns of the rows in memory, when there are more than V
    settings: dict = field(default_factory=dict)  # of LossConfig

    def tokens(self, dtype: torch.dtype, value: float = 0) -> Tensor:
        """Return a vector of tokens that starts `offset` elements into its memory."""
        n = self.B * self.T
        flat = torch.full((n + self.offset,), value, dtype=dtype)[self.offset :]
        return flat if self.packed else flat.view(self.B, self.T)

    def logits(self) -> Tensor:
        """Return logits that nothing has touched: no kernel runs."""
        rows = (self.B * self.T,) if self.packed else (self.B, self.T + self.extra_row)
        return torch.empty(*rows, max(self.V, self.cut_from), dtype=self.dtype)[..., : self.V]

    def packing(self) -> dict[str, Tensor]:
        """Return `cu_seqlens` when packed."""
        return {"cu_seqlens": torch.arange(self.B + 1) * self.T} if self.packed else {}


def loss(shape: Shape, mode: str = "precomputed", backward: bool = True, **options) -> None:
    """Run the loss from logits; `mode` says where contrasts come from: precomputed, live, weights or none."""
    logits = shape.logits().requires_grad_()
    zeros = shape.tokens(torch.float32)
    contrasts = {
        "precomputed": {"corrupted_logps": zeros, "ablated_logps": zeros},
        "live": {"corrupted_logits": logits.detach(), "ablated_logits": logits.detach()},
        "weights": {"weights": shape.tokens(torch.float32, 1)},
        "none": {},
    }[mode]
    if mode in ("precomputed", "live"):
        contrasts["role_ids"] = shape.tokens(torch.int64, 1)
    for name in options.pop("vectors", ()):
        options[name] = zeros
    if options.get("inplace_backward"):
        logits = logits.view_as(logits)
    config = LossConfig(**options.pop("loss", {}), **shape.settings)
    out = role_weighted_grpo_loss(
        logits, shape.tokens(torch.int64), torch.ones(shape.B, shape.T) if not shape.packed else zeros,
        completion_mask=shape.tokens(torch.int64, 1), loss=config, validate_values=False, backend="triton",
        **shape.packing(), **contrasts, **options,
    )  # fmt: skip
    if backward:
        out.loss.backward()


def log_probs(shape: Shape, entropy: bool = False) -> None:
    """Run `selected_logps`, and its backward when the entropy is asked for."""
    logits = shape.logits().requires_grad_(entropy)
    scored = selected_logps(
        logits, shape.tokens(torch.int64), mask=shape.tokens(torch.int64, 1), return_entropy=entropy,
        temperature=shape.settings.get("temperature", 1.0), validate_values=False, backend="triton",
    )  # fmt: skip
    if entropy:
        (scored.logps + scored.entropy).sum().backward()


def head(shape: Shape) -> tuple[Tensor, Tensor]:
    """Return hidden states, narrow because their products are computed, and a head."""
    rows = (shape.B * shape.T,) if shape.packed else (shape.B, shape.T + shape.extra_row)
    leaves = torch.zeros(*rows, 4, dtype=shape.dtype), torch.zeros(shape.V, 4, dtype=shape.dtype)
    return tuple(x.requires_grad_() for x in leaves)


def hidden_log_probs(shape: Shape, entropy: bool = False) -> None:
    """Run `selected_logps_from_hidden` and its backward: fp32 logits in, the gradient out in the head's dtype."""
    scored = selected_logps_from_hidden(
        *head(shape), shape.tokens(torch.int64), mask=shape.tokens(torch.int64, 1), return_entropy=True,
        temperature=shape.settings.get("temperature", 1.0), validate_values=False, backend="triton",
    )  # fmt: skip
    (scored.logps.sum() + (scored.entropy.sum() if entropy else 0)).backward()


def hidden_loss(shape: Shape, **options) -> None:
    """Run the loss from hidden states in chunks of `rows`; without `old_logps` a chunk holds whole trajectories."""
    zeros = shape.tokens(torch.float32)
    role_weighted_grpo_loss_from_hidden(
        *head(shape), shape.tokens(torch.int64), zeros + 1, role_ids=shape.tokens(torch.int64, 1),
        completion_mask=shape.tokens(torch.int64, 1), corrupted_logps=zeros, ablated_logps=zeros,
        old_logps=zeros if options.pop("old", False) else None, loss=LossConfig(**shape.settings),
        workspace_bytes=6 * options.pop("rows", 4) * shape.V, validate_values=False, backend="triton",
        **shape.packing(),
    ).loss.backward()  # fmt: skip


def hidden_kl(shape: Shape) -> None:
    """Run `vocabulary_kl_from_hidden`."""
    states, weight = head(shape)
    vocabulary_kl_from_hidden(
        states, states.detach(), weight, shape.tokens(torch.int64), mask=shape.tokens(torch.int64, 1),
        validate_values=False, backend="triton",
    )  # fmt: skip


@contextmanager
def few_rows() -> Iterator[None]:
    """Make every call split its rows over several programs, as a GPU with idle multiprocessors does."""
    own = importlib.import_module("srpo_kernels.row_statistics").launch  # also when it is a mutant's
    stock, own.split_rows = own.split_rows, lambda n_rows, device: True
    try:
        yield
    finally:
        own.split_rows = stock


def split(call: Callable[..., None], *arguments, **options) -> None:
    """Run a call under `few_rows`."""
    with few_rows():
        call(*arguments, **options)


@contextmanager
def one_kernel(chunks_abreast: int | None = None) -> Iterator[None]:
    """Turn on the kernel of forward and backward, which is off until a GPU has shown that it is faster."""
    stock = launch.TRAINS_ROWS, launch.CHUNKS_ABREAST
    launch.TRAINS_ROWS, launch.CHUNKS_ABREAST = True, chunks_abreast or launch.CHUNKS_ABREAST
    try:
        yield
    finally:
        launch.TRAINS_ROWS, launch.CHUNKS_ABREAST = stock


def together(call: Callable[..., None], *arguments, **options) -> None:
    """Run a call under `one_kernel`."""
    with one_kernel():
        call(*arguments, **options)


def _cases() -> dict[str, Case]:
    bf16, fp16, fp32 = Shape(), Shape(dtype=torch.float16), Shape(dtype=torch.float32)
    packed, other = Shape(packed=True), Shape(V=QWEN_VOCABULARIES[1])
    large = Shape(T=3600)  # 2.2 GB of logits: for AMD, Triton specialises on tensors of at most 2 GiB
    kl = {"vectors": ("old_logps", "ref_logps", "importance_sampling_ratio")}
    return {
        "precomputed": Case(lambda: loss(bf16), "bf16"),
        "precomputed V=152064": Case(lambda: loss(other), "bf16"),
        "live": Case(lambda: loss(bf16, "live"), "bf16"),
        "live V=152064": Case(lambda: loss(other, "live"), "bf16"),
        "weights": Case(lambda: loss(bf16, "weights"), "bf16"),
        "plain": Case(lambda: loss(bf16, "none"), "bf16"),
        "in place": Case(lambda: loss(bf16, inplace_backward=True), "bf16"),
        "packed": Case(lambda: loss(packed), "bf16"),
        "beta, old, is-ratio": Case(lambda: loss(bf16, loss={"beta": 0.04, "delta": 3.0}, **kl), "bf16"),
        "solve": Case(lambda: loss(bf16, credit=CreditConfig(normalize="solve")), "bf16"),
        "signed": Case(lambda: loss(bf16, credit=CreditConfig(direction="advantage", normalize="none")), "bf16"),
        "role mean, k3": Case(
            lambda: loss(bf16, credit=CreditConfig(baseline="role_mean", contrast_kind="k3")), "bf16"
        ),
        "one pass": Case(
            lambda: loss(bf16, "live", credit=CreditConfig(reasoning_signal="image_independence")), "bf16"
        ),
        "cispo": Case(
            lambda: loss(bf16, loss={"loss_type": "cispo", "epsilon_high": 5.0}, vectors=("old_logps",)), "bf16"
        ),
        "sapo": Case(lambda: loss(bf16, loss={"loss_type": "sapo"}, vectors=("old_logps",)), "bf16"),
        "vespo": Case(lambda: loss(bf16, loss={"loss_type": "vespo"}, vectors=("old_logps",)), "bf16"),
        "bias-corrected kl": Case(
            lambda: loss(bf16, loss={"beta": 0.04, "use_bias_correction_kl": True}, **kl), "bf16"
        ),
        "sequence_token": Case(
            lambda: loss(bf16, loss={"importance_sampling_level": "sequence_token"}, vectors=("old_logps",)), "bf16"
        ),
        "selected_logps": Case(lambda: log_probs(bf16), "bf16"),
        "entropy gradient": Case(lambda: log_probs(bf16, entropy=True), "bf16"),
        "over 2 GiB": Case(lambda: loss(large), "bf16"),
        "over 2 GiB, live": Case(lambda: loss(large, "live"), "bf16"),
        "few rows": Case(lambda: split(loss, bf16), "bf16"),
        "few rows, live": Case(lambda: split(loss, bf16, "live"), "bf16"),
        "fp16": Case(lambda: loss(fp16), "f16"),
        "fp32": Case(lambda: loss(fp32)),
        "odd V": Case(lambda: loss(Shape(V=ODD_VOCABULARY))),
        "odd V of aligned rows": Case(lambda: loss(Shape(V=ODD_VOCABULARY, cut_from=QWEN_VOCABULARIES[0])), "bf16"),
        "odd V of aligned rows, live": Case(
            lambda: loss(Shape(V=ODD_VOCABULARY, cut_from=QWEN_VOCABULARIES[0]), "live"), "bf16"
        ),
        "InternVL": Case(lambda: loss(Shape(V=INTERNVL_VOCABULARY))),
        "V=1000": Case(lambda: loss(Shape(V=1000))),
        "hidden, scored": Case(lambda: hidden_log_probs(bf16), "f32", (4, 6)),
        "hidden, gradient": Case(lambda: hidden_log_probs(bf16), "bf16", (4, 6)),
        "hidden, entropy gradient": Case(lambda: hidden_log_probs(bf16, entropy=True), "bf16", (4, 6)),
        "hidden, fp16": Case(lambda: hidden_log_probs(fp16), "f16", (4, 6)),
        "hidden, fp32": Case(lambda: hidden_log_probs(fp32), "f32", (4, 8)),
        "hidden, V=152064": Case(lambda: hidden_log_probs(other), "f32", (4, 6)),
        "hidden, loss": Case(lambda: hidden_loss(bf16, old=True), "bf16", (4, 6)),
        "hidden, whole trajectories": Case(lambda: hidden_loss(bf16), "bf16", (4, 6)),
        "hidden, packed": Case(lambda: hidden_loss(packed), "bf16", (4, 6)),
        "V=7": Case(lambda: loss(Shape(V=7))),
        "kl": Case(lambda: loss(bf16, "live", credit=KL), "bf16"),
        "kl, V=152064": Case(lambda: loss(other, "live", credit=KL), "bf16"),
        "kl, one pass, packed": Case(lambda: loss(packed, "live", credit=KL_ONE_PASS), "bf16"),
        "kl, few rows": Case(lambda: split(loss, bf16, "live", credit=KL), "bf16"),
        "kl, over 2 GiB": Case(lambda: loss(large, "live", credit=KL), "bf16"),
        "kl, fp16": Case(lambda: loss(fp16, "live", credit=KL), "f16"),
        "kl, fp32": Case(lambda: loss(fp32, "live", credit=KL)),
        "kl, odd V": Case(lambda: loss(Shape(V=ODD_VOCABULARY), "live", credit=KL)),
        "kl, odd V of aligned rows": Case(
            lambda: loss(Shape(V=ODD_VOCABULARY, cut_from=QWEN_VOCABULARIES[0]), "live", credit=KL), "bf16"
        ),
        "hidden, kl": Case(lambda: hidden_kl(bf16), "f32", (4, 6)),
        "one kernel": Case(lambda: together(loss, bf16, "weights"), "bf16"),
        "one kernel, precomputed, V=152064": Case(lambda: together(loss, other, vectors=("old_logps",)), "bf16"),
        "one kernel, beta, old, is-ratio": Case(
            lambda: together(loss, bf16, "weights", loss={"beta": 0.04, "delta": 3.0}, **kl), "bf16"
        ),
        "one kernel, cispo": Case(
            lambda: together(
                loss, bf16, "weights", loss={"loss_type": "cispo", "epsilon_high": 5.0}, vectors=("old_logps",)
            ),
            "bf16",
        ),
        "one kernel, packed": Case(lambda: together(loss, packed, "weights"), "bf16"),
        "one kernel, over 2 GiB": Case(lambda: together(loss, large, "weights"), "bf16"),
        "one kernel, fp32": Case(lambda: together(loss, fp32, "weights")),
        "one kernel, odd V of aligned rows": Case(
            lambda: together(loss, Shape(V=ODD_VOCABULARY, cut_from=QWEN_VOCABULARIES[0]), "weights"), "bf16"
        ),
        "one kernel, odd V of wide rows": Case(
            lambda: together(loss, Shape(V=ODD_VOCABULARY, cut_from=200000), "weights"), "bf16"
        ),
        "one kernel, V=1008": Case(lambda: together(loss, Shape(V=1008), "weights")),
    }


CASES = _cases()

# Twenty calls of one flag set each: none may compile a kernel twice.
SHAPES_OF_A_RUN = [
    Shape(
        B=1 + k % 4, T=(1, 2, 7, 15, 16, 31, 32, 33)[k % 8] + k // 8, V=QWEN_VOCABULARIES[k % 2],
        extra_row=k % 3 != 0, offset=k % 5,
        settings={"temperature": (1.0, 0.7, 2.0)[k % 3], "epsilon_low": 0.1 + 0.01 * k, "epsilon_high": 0.2 + 0.01 * k},
    )
    for k in range(20)
]  # fmt: skip

RUNS: dict[str, Callable[[Shape], None]] = {
    "precomputed": lambda shape: loss(shape, vectors=("old_logps",)),
    "live": lambda shape: loss(shape, "live"),
    "packed": lambda shape: loss(as_packed(shape)),
    "entropy gradient": lambda shape: log_probs(shape, entropy=True),
    "few rows": lambda shape: split(loss, shape, "none"),
    "one kernel": lambda shape: together(loss, shape, "weights", vectors=("old_logps",)),
    "hidden": lambda shape: hidden_loss(shape, rows=64),  # few chunks: their products are computed
    "hidden, log-probs": hidden_log_probs,
}


def as_packed(shape: Shape) -> Shape:
    """Return the same sizes in the packed layout."""
    return Shape(shape.B, shape.T, shape.V, shape.dtype, offset=shape.offset, packed=True, settings=shape.settings)
