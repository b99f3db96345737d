"""Every argument check. Structure is checked always, values where that costs no device sync.

Nothing is computed or modified before all checks have passed. Each failure is one typed error whose message says what
was called, which argument, what it got, what was expected, and one fix.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from srpo.call import Call, are_log_probs
from srpo.config import CreditConfig, LossConfig
from srpo.errors import (
    ConfigError,
    DeviceError,
    DtypeError,
    KernelUnavailableError,
    RoleParseError,
    ShapeError,
    describe,
    is_int,
    is_number,
)
from srpo.streams import STREAMS, Streams, is_not_scored
from srpo_kernels import launch
from srpo_kernels.layout import Layout


def layout_of(call: Call, name: str, x: Tensor, cu_seqlens: Any) -> Layout:
    """Return the layout of tokens `x`: `[B, T]`, or `[N]` with `cu_seqlens`."""
    if cu_seqlens is None:
        if x.dim() != 2:
            call.fail(ShapeError, name, describe(x), "[B, T]", "pass cu_seqlens for a packed [N] layout")
        return Layout(tuple(x.shape))
    if x.dim() != 1:
        call.fail(ShapeError, name, describe(x), "[N] because cu_seqlens is given", "flatten the batch or drop it")
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        fix = "pass torch.nn.functional.pad(lengths.cumsum(0), (1, 0))"
        call.fail(ShapeError, "cu_seqlens", describe(cu_seqlens), "a tensor [R + 1]", fix)
    call.tensor("cu_seqlens", cu_seqlens, [tuple(cu_seqlens.shape)], "[R + 1]", "int")
    if call.validates:
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != x.numel() or sorted(ends) != ends:
            expected = f"non-decreasing offsets from 0 to N = {x.numel()}"
            call.fail(ShapeError, "cu_seqlens", f"{ends[:8]}", expected, "build it as cumsum of the lengths")
    return Layout(tuple(x.shape), cu_seqlens)


def mask_of(call: Call, completion_mask: Any, layout: Layout) -> Tensor:
    """Return the completion mask as bool, all true when None."""
    if completion_mask is None:
        return torch.ones(layout.shape, dtype=torch.bool, device=call.device)
    call.tensor("completion_mask", completion_mask, [layout.shape], tokens(layout), "mask")
    if completion_mask.dtype == torch.bool:
        return completion_mask
    if call.validates:
        odd = (completion_mask != 0) & (completion_mask != 1)
        if bool(odd.any()):
            got = f"values such as {completion_mask[odd][0].item()}"
            call.fail(RoleParseError, "completion_mask", got, "only 0 and 1", "pass completion_mask.bool()")
    return completion_mask != 0


def roles_of(call: Call, role_ids: Any, mask: Tensor, layout: Layout) -> Tensor:
    """Check role ids and return them."""
    call.tensor("role_ids", role_ids, [layout.shape], tokens(layout), "int")
    fix = "build them with role_ids_from_completions"
    call.within("role_ids", role_ids, 0, 2, mask, "roles (0 other, 1 perception, 2 reasoning)", fix)
    return role_ids


def advantages_of(call: Call, advantages: Any, mask: Tensor, layout: Layout) -> Tensor:
    """Check advantages `[B]` or `[B, T]` and return them per token."""
    shapes = [(layout.n_trajectories,), layout.shape]
    names = "[B] or [B, T]" if layout.cu_seqlens is None else "[R] or [N]"
    call.tensor("advantages", advantages, shapes, names, "float")
    # With one token per packed trajectory [R] and [N] are the same numbers.
    per_token = layout.spread(advantages) if tuple(advantages.shape) == shapes[0] else advantages
    call.finite("advantages", per_token, mask)
    return per_token


def contrast_streams(
    call: Call,
    credit: CreditConfig,
    layout: Layout,
    role_ids: Tensor,
    mask: Tensor,
    logps: Streams,
    divergences: Streams = Streams(),  # noqa: B008 - immutable
    live: Streams = Streams(),  # noqa: B008 - immutable
    live_kind: str = "logits",
    check_live: Callable[[str, Any], Any] | None = None,
) -> Streams:
    """Check that each stream that `credit` reads is given exactly once, and scored where it is read; return those.

    Args:
        logps: log-probs that were scored before.
        divergences: their divergences from the clean stream, which `contrast_kind="kl"` reads in their place.
        live: logits or hidden states, as `live_kind` says, which `check_live` knows how to check.
    """
    kind, read = ("kl", divergences) if credit.reads_kl else ("logps", logps)
    for name, x in divergences.named("kl").items():
        if x is not None and not credit.reads_kl:
            expected, fix = "None", f"set contrast_kind='kl', or drop {name}"
            call.fail(ConfigError, name, f"divergences with contrast_kind={credit.contrast_kind!r}", expected, fix)
    for stream, given, scored_here in zip(STREAMS, read, live, strict=True):
        name, live_name = f"{stream}_{kind}", f"{stream}_{live_kind}"
        if given is not None and scored_here is not None:
            fix = f"drop {live_name} when {name} were scored before"
            call.fail(ConfigError, live_name, f"{live_kind} together with {name}", "one of the two", fix)
        if given is not None:
            call.tensor(name, given, [layout.shape], tokens(layout), "float")
            if call.validates and (credit.reads_kl or not are_log_probs(given)):
                rows = credit.rows(stream, role_ids, mask)
                scored(call, name, given, rows, f"reasoning_signal={credit.reasoning_signal!r} reads")
                check = call.divergences if credit.reads_kl else functools.partial(call.log_probs, of_stream=True)
                check(name, given, rows)
        if scored_here is not None and check_live is not None:
            check_live(live_name, scored_here)
        if stream in credit.streams and given is None and scored_here is None:
            fix = (
                f"score the {stream} stream, set reasoning_signal='image_independence' to need no ablated stream, "
                "or use PRESETS['grpo']"
            )
            if credit.reads_kl:
                fix = f"pass {name} of score_streams with this credit, or {stream}_logits of the loss itself"
            what = "divergences" if credit.reads_kl else "log-probs"
            signal = f"{what}, which reasoning_signal={credit.reasoning_signal!r} reads"
            call.fail(ConfigError, name, "None", signal, fix)
    return read


def scored(call: Call, name: str, x: Tensor, reads: Tensor, who_reads: str) -> None:
    """Check that no cell is read that `score_streams` was told nobody would read."""
    if call.validates:
        lost = int((is_not_scored(x) & reads).sum())
        if lost:
            expected = f"a log-prob in each of the {int(reads.sum())} cells that {who_reads}"
            fix = "pass the same credit=, role_ids and mask to score_streams"
            call.fail(ConfigError, name, f"{lost} cells that were not scored", expected, fix)


def logits_of(call: Call, name: str, logits: Any, layout: Layout, vocabulary: int | None = None) -> int:
    """Check logits `[B, T, V]` or `[B, T + 1, V]`, or packed `[N, V]`; return V."""
    V = _rows_of(call, name, logits, layout, "V", "keep the vocabulary as the last dimension", vocabulary)
    if V == 0:
        call.fail(ShapeError, name, describe(logits), "a vocabulary of at least 1", "pass the head's output")
    return V


def _rows_of(call: Call, name: str, x: Any, layout: Layout, letter: str, fix: str, width: int | None) -> int:
    """Check one row a token, `[B, T, width]` or `[B, T + 1, width]`, or packed `[N, width]`; return the width."""
    padded = layout.cu_seqlens is None
    names = f"[B, T, {letter}] or [B, T + 1, {letter}]" if padded else f"[N, {letter}]"
    if not isinstance(x, Tensor) or x.dim() != len(layout.shape) + 1:
        call.fail(ShapeError, name, describe(x), names, fix)
    width = x.shape[-1] if width is None else width
    shapes = [(*layout.shape, width)]
    if padded:
        shapes.append((layout.shape[0], layout.shape[1] + 1, width))
    call.tensor(name, x, shapes, names, "float")
    return width


def hidden_of(call: Call, name: str, hidden: Any, layout: Layout, like: Tensor | None = None) -> None:
    """Check hidden states `[B, T, H]` or `[B, T + 1, H]`, or packed `[N, H]`, of the width and dtype of `like`."""
    fix = "pass the states that the head would be called on"
    _rows_of(call, name, hidden, layout, "H", fix, None if like is None else like.shape[-1])
    if like is not None:
        _same_dtype(call, name, hidden, like)


def head_of(call: Call, hidden: Tensor, weight: Any, bias: Any) -> int:
    """Check a vocabulary head `[V, H]` with bias `[V]` against checked hidden states; return V."""
    name, H = "lm_head_weight", hidden.shape[-1]
    if hasattr(weight, "ds_status"):
        fix = "call this inside deepspeed.zero.GatheredParameters([lm_head_weight])"
        call.fail(DeviceError, name, "a ZeRO-3 shard", "the whole parameter", fix)
    if isinstance(weight, Tensor) and (weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != H):
        expected = f"[V, H] with V > 0 and H = {H}, the width of hidden"
        call.fail(ShapeError, name, describe(weight), expected, "pass lm_head.weight as it is")
    call.tensor(name, weight, [tuple(getattr(weight, "shape", ()))], "[V, H]", "float")
    if bias is not None:
        call.tensor("bias", bias, [(weight.shape[0],)], "[V]", "float")
    for part, x in ((name, weight), ("bias", bias)):
        if x is not None:
            _same_dtype(call, part, x, hidden)
    return weight.shape[0]


def _same_dtype(call: Call, name: str, x: Tensor, hidden: Tensor) -> None:
    """Check that a matrix product takes `x` with the hidden states: autocast makes dtypes agree."""
    if x.dtype != hidden.dtype and not torch.is_autocast_enabled(call.device.type):
        fix = f"cast one of the two, or run under torch.autocast({call.device.type!r})"
        call.fail(DtypeError, name, describe(x), f"{hidden.dtype}, the dtype of {call.argument}", fix)


def temperature(call: Call, value: Any) -> None:
    """Check a sampling temperature."""
    if not is_number(value) or value <= 0.0:
        fix = "pass the temperature that the rollout was sampled with"
        call.fail(ConfigError, "temperature", repr(value), "a positive number", fix)


def workspace(call: Call, workspace_bytes: Any) -> None:
    """Check a budget in bytes, or None."""
    x = workspace_bytes
    if x is not None and not (is_int(x) and x > 0):
        fix = "pass None, or for example 256 << 20"
        call.fail(ConfigError, "workspace_bytes", describe(x), "a positive number of bytes", fix)


def process_group_name(call: Call, process_group: Any) -> str:
    """Return the name of the group that holds the shards of the vocabulary, "" for None."""
    if process_group is None:
        return ""
    if not torch.distributed.is_available() or not isinstance(process_group, torch.distributed.ProcessGroup):
        fix = "pass torch.distributed.new_group(...) or mesh.get_group()"
        call.fail(ConfigError, "process_group", describe(process_group), "a torch.distributed.ProcessGroup", fix)
    return process_group.group_name


def loss_inputs(
    call: Call, loss: LossConfig, layout: Layout, mask: Tensor, old_logps: Any, ref_logps: Any, is_ratio: Any
) -> Tensor | None:
    """Check the log-prob inputs of the loss stage; return the importance ratio per token."""
    for name, x in (("old_logps", old_logps), ("ref_logps", ref_logps)):
        if x is not None:
            call.tensor(name, x, [layout.shape], tokens(layout), "float")
            call.log_probs(name, x, mask)
    if loss.beta != 0.0 and ref_logps is None:
        call.fail(ConfigError, "ref_logps", "None", f"log-probs because beta={loss.beta}", "score them or set beta=0.0")
    if is_ratio is None:
        return None
    shapes = [layout.shape, (layout.n_trajectories, 1)]
    call.tensor("importance_sampling_ratio", is_ratio, shapes, f"{tokens(layout)} or one per trajectory", "float")
    if tuple(is_ratio.shape) == layout.shape:
        return is_ratio
    of_trajectory = layout.spread(is_ratio[:, 0])
    if loss.loss_type != "vespo":
        return of_trajectory
    return torch.where(layout.first_valid(mask), of_trajectory, 1.0)  # a factor of the trajectory's weight: once


def given_weights(call: Call, weights: Any, mask: Tensor, layout: Layout, others: dict[str, Any]) -> Tensor:
    """Check weights that replace the credit stage."""
    call.tensor("weights", weights, [layout.shape], tokens(layout), "float")
    _alone(call, "weights", others)
    call.finite("weights", weights, mask)
    if call.validates and bool(((weights < 0) & mask).any()):
        fix = "weights change magnitudes, put signs into advantages"
        call.fail(ConfigError, "weights", "negative values", "weights of at least 0", fix)
    return weights.detach()


def given_contrast(
    call: Call, contrast: Any, role_ids: Tensor | None, mask: Tensor, layout: Layout, others: dict[str, Any]
) -> Tensor:
    """Check contrasts that replace the streams."""
    call.tensor("contrast", contrast, [layout.shape], tokens(layout), "float")
    _alone(call, "contrast", others)
    if role_ids is None:
        fix = "pass role_ids from role_ids_from_completions"
        call.fail(ConfigError, "role_ids", "None together with contrast", f"role ids {tokens(layout)}", fix)
    scored(call, "contrast", contrast, mask & ((role_ids == 1) | (role_ids == 2)), "the credit stage reads")
    return contrast.detach()


def _alone(call: Call, name: str, others: dict[str, Any]) -> None:
    for other, x in others.items():
        if x is not None:
            call.fail(ConfigError, other, f"a contrast stream together with {name}", "one of the two", f"drop {other}")


def normaliser(call: Call, num_items_in_batch: Any) -> None:
    """Check `num_items_in_batch`: None, a non-negative number, or a tensor with one element."""
    x = num_items_in_batch
    expected, fix = "None, a number of at least 0, or a 0-d tensor", "pass completion_mask.sum() of the whole batch"
    if isinstance(x, Tensor):
        if x.numel() != 1:
            call.fail(ShapeError, "num_items_in_batch", describe(x), expected, fix)
        if x.device != call.device and x.device.type != "cpu":
            call.fail(DeviceError, "num_items_in_batch", str(x.device), str(call.device), "move it")
    elif x is not None and not (is_number(x) and x >= 0):
        call.fail(ConfigError, "num_items_in_batch", describe(x), expected, fix)


def token_loss_of(call: Call, loss: LossConfig, token_loss: Any) -> None:
    """Check a loss of the caller's own: None, or a function, with a `loss_type` that is a reduction."""
    if token_loss is None:
        return
    if not callable(token_loss):
        fix = "pass lambda logps: -torch.exp(logps - old_logps) * advantages[:, None]"
        call.fail(ConfigError, "token_loss", describe(token_loss), "a function of logps, or None", fix)
    if loss.rule_kind != "clip":
        got, fix = f"a loss of your own with loss_type={loss.loss_type!r}", "use loss_type='dapo' or 'grpo'"
        call.fail(ConfigError, "token_loss", got, "a loss_type that is a reduction alone", fix)


def token_losses(call: Call, losses: Any, logps: Tensor, mask: Tensor) -> Tensor:
    """Check what a `token_loss` returned for `logps`."""
    name = "what token_loss returns"
    shape = tuple(logps.shape)
    call.tensor(name, losses, [shape], "the shape of logps", "float")
    if logps.requires_grad and not losses.requires_grad:
        fix = "compute it from the logps that it is called with"
        call.fail(ConfigError, name, "a tensor without a graph", "losses that depend on logps", fix)
    call.finite(name, losses.detach(), mask)
    return losses


def credit_config(call: Call, credit: Any) -> None:
    """Check the type of `credit`."""
    if not isinstance(credit, CreditConfig):
        call.fail(ConfigError, "credit", describe(credit), "a CreditConfig", "pass PRESETS['srpo']")


def configs(call: Call, credit: Any, loss: Any) -> None:
    """Check the types of the two configuration objects."""
    credit_config(call, credit)
    if not isinstance(loss, LossConfig):
        call.fail(ConfigError, "loss", describe(loss), "a LossConfig", "pass LossConfig(loss_type=...)")


def backend_of(call: Call, backend: str, dtype: torch.dtype) -> str:
    """Choose `"triton"` or `"torch"`.

    `"auto"` takes the kernels on a GPU where Triton runs, and PyTorch for CPU tensors and for float64.
    """
    if backend not in ("auto", "triton", "torch"):
        call.fail(ConfigError, "backend", repr(backend), "'auto', 'triton' or 'torch'", "pass backend='auto'")
    if backend == "torch" or (backend == "auto" and (call.device.type == "cpu" or dtype == torch.float64)):
        return "torch"
    # Dynamo cannot trace the search for a driver; a graph that is compiled for a GPU has Triton.
    reason = None if torch.compiler.is_compiling() else launch.unavailable_reason(call.device.type)
    if reason is not None and backend == "triton":
        fix = "pass backend='auto', or set TRITON_INTERPRET=1 before importing srpo to run the kernels on a CPU"
        call.fail(KernelUnavailableError, "backend", "'triton'", f"a device with Triton ({reason})", fix)
    return "triton" if reason is None else "torch"


def selection(
    call: Call,
    completion_ids: Any,
    completion_mask: Any,
    cu_seqlens: Any,
    check_source: Callable[[Layout], int | None],
) -> tuple[Layout, Tensor, Tensor]:
    """Return layout, mask and ids; `check_source` checks what log-probs come from, and returns its vocabulary."""
    if not isinstance(completion_ids, Tensor):
        call.tensor("completion_ids", completion_ids, [], "[B, T]", "int")
    layout = layout_of(call, "completion_ids", completion_ids, cu_seqlens)
    call.tensor("completion_ids", completion_ids, [layout.shape], tokens(layout), "int")
    vocabulary = check_source(layout)
    mask = mask_of(call, completion_mask, layout)
    fix = "mask tokens that are not to be scored"
    highest = torch.iinfo(torch.int32).max if vocabulary is None else vocabulary - 1
    call.within("completion_ids", completion_ids, 0, highest, mask, "token ids", fix)
    return layout, mask.contiguous(), completion_ids.long().contiguous()


def tokens(layout: Layout) -> str:
    """Name the shape of a per-token tensor."""
    return "[B, T]" if layout.cu_seqlens is None else "[N]"
