"""Make Triton's CPU interpreter strict enough to trust.

The stock interpreter (checked on triton 3.6.0, 3.7.1, 3.8.0 and 3.9.0) computes bf16 on raw bit patterns, reads out of
bounds, wraps int32 silently and ignores `tl.device_assert`. `install()` mends what is wrong and turns what is silent
into an error; `count_bytes` measures what a kernel really reads and writes. Every fix is one function and has one test
in `tests/kernels/test_interpreter_guard.py`.

Test-only, and only under TRITON_INTERPRET=1. After the first launch `triton.language` stays in its interpreted form, so
ahead-of-time compilation needs a process of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

Builder = interpreter.InterpreterBuilder
TensorHandle = interpreter.TensorHandle

# Called with (what, addresses of the unmasked lanes, bytes per lane) on every load, store and atomic.
MemoryObserver = Callable[[str, np.ndarray, int], None]
_memory_observers: list[MemoryObserver] = []


@functools.cache
def install() -> None:
    """Apply every fix once; later calls do nothing."""
    convert_bf16_correctly()
    multiply_bf16_matrices_correctly()
    refuse_bf16_arithmetic()
    refuse_integer_overflow()
    enable_device_asserts()
    observe_memory()
    check_bounds()
    poison_masked_lanes()
    silence_floating_point_warnings()
    index_with_tensors()
    patch_language_once()
    remember_numpy_dtypes()
    keep_frames_together()


def float32_to_bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Round to the nearest even bf16; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    quiet_nan = ((bits >> 16) | 0x40).astype(np.uint16)
    return np.where(np.isnan(bits.view(np.float32)), quiet_nan, rounded).reshape(np.shape(values))


def bfloat16_bits_to_float32(bits: np.ndarray) -> np.ndarray:
    """Widen bf16 bit patterns; exact."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(np.shape(bits))


def convert_bf16_correctly() -> None:
    """Round to bf16 as the hardware does (stock: truncates from fp32, casts the bit pattern from anything else)."""
    stock_cast, stock_fp_to_fp = Builder.cast_impl, Builder.create_fp_to_fp

    def cast_impl(self, source, target_type):
        source_type, target = source.dtype.scalar, target_type.scalar
        if target == tl.bfloat16 and source_type != tl.bfloat16:
            return TensorHandle(float32_to_bfloat16_bits(source.data.astype(np.float32)), target)
        if source_type == tl.bfloat16 and target != tl.bfloat16:
            widened = TensorHandle(bfloat16_bits_to_float32(source.data), tl.float32)
            return widened if target == tl.float32 else stock_cast(self, widened, target_type)
        return stock_cast(self, source, target_type)

    def create_fp_to_fp(self, source, target_type, rounding_mode):
        truncates = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
        if tl.bfloat16 in (source.dtype.scalar, target_type.scalar) and not truncates:
            return cast_impl(self, source, target_type)
        return stock_fp_to_fp(self, source, target_type, rounding_mode)

    Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, create_fp_to_fp


def multiply_bf16_matrices_correctly() -> None:
    """Widen the operands of `tl.dot` (stock: multiplies the bit patterns)."""
    stock_dot = Builder.create_dot

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle(bfloat16_bits_to_float32(handle.data), tl.float32)

    def create_dot(self, left, right, accumulator, *options):
        return stock_dot(self, widen(left), widen(right), accumulator, *options)

    Builder.create_dot = create_dot


def refuse_bf16_arithmetic() -> None:
    """Raise on bf16 arithmetic, comparison, `tl.sum` and custom reductions (stock: works on the bit patterns).

    `tl.max`, `tl.clamp` and `tl.cumsum` widen by themselves; triton's own type check refuses `tl.exp` and its like.
    """
    advice = "the interpreter cannot compute on bf16: write .to(tl.float32) right after tl.load"

    def refusing(stock):
        @functools.wraps(stock)
        def method(self, *operands):
            for operand in operands:
                if isinstance(operand, TensorHandle) and operand.dtype.scalar == tl.bfloat16:
                    raise TypeError(advice)
            return stock(self, *operands)

        return method

    for name in ("unary_op", "binary_op", "create_fma"):
        setattr(Builder, name, refusing(getattr(Builder, name)))

    reductions = interpreter.ReduceScanOpInterface
    stock_check = reductions.check_tensor

    def check_tensor(self, inputs):
        stock_check(self, inputs)
        if any(value.dtype.scalar == tl.bfloat16 for value in inputs):
            raise TypeError(advice)

    reductions.check_tensor = check_tensor


def refuse_integer_overflow() -> None:
    """Raise when signed integer add, subtract or multiply leaves its type, as `row * vocabulary_size` does in int32."""
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options,
        sanitize_overflow=False,  # triton's own check costs six interpreted operations per addition
    )

    def checking(stock, operation, name):
        @functools.wraps(stock)
        def method(self, left, right):
            result = stock(self, left, right)
            kind = result.data.dtype
            if kind.kind == "i" and kind.itemsize < 8:
                exact = operation(left.data.astype(np.int64), right.data.astype(np.int64))
                if not np.array_equal(exact, result.data):
                    raise OverflowError(f"{name} overflows {kind}: convert one operand to tl.int64 first")
            return result

        return method

    for name, operation in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
        setattr(Builder, f"create_{name}", checking(getattr(Builder, f"create_{name}"), operation, name))


def enable_device_asserts() -> None:
    """Let a failing `tl.device_assert` raise (stock: ignored without debug)."""
    interpreter.interpreter_builder.options = dataclasses.replace(interpreter.interpreter_builder.options, debug=True)


def observe_memory() -> None:
    """Report the unmasked lanes of every load, store and atomic to `_memory_observers`."""

    def report(what, pointers, mask):
        addresses = pointers.data
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape)]
        if addresses.size:
            width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            for observer in _memory_observers:
                observer(what, addresses.reshape(-1), width)

    stock_load, stock_store = Builder.create_masked_load, Builder.create_masked_store
    stock_rmw, stock_cas = Builder.create_atomic_rmw, Builder.create_atomic_cas

    def create_masked_load(self, pointers, mask, *rest, **options):
        report("load", pointers, mask)
        return stock_load(self, pointers, mask, *rest, **options)

    def create_masked_store(self, pointers, value, mask, *rest, **options):
        report("store", pointers, mask)
        return stock_store(self, pointers, value, mask, *rest, **options)

    def create_atomic_rmw(self, operation, pointers, value, mask, *rest):
        report("atomic", pointers, mask)
        return stock_rmw(self, operation, pointers, value, mask, *rest)

    def create_atomic_cas(self, pointers, *rest):
        report("atomic", pointers, None)
        return stock_cas(self, pointers, *rest)

    Builder.create_masked_load, Builder.create_masked_store = create_masked_load, create_masked_store
    Builder.create_atomic_rmw, Builder.create_atomic_cas = create_atomic_rmw, create_atomic_cas


def tensor_extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First address of a tensor and the address after its last element, gaps of strided views included."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def tensors_among(arguments) -> Iterator[torch.Tensor]:
    """Yield the tensors among launch arguments: plain, wrapped, in tuples or in descriptors."""
    for argument in arguments:
        if hasattr(argument, "data_ptr"):
            yield interpreter._unwrap_tensor(argument)
        elif isinstance(argument, (tuple, list)):
            yield from tensors_among(argument)
        elif hasattr(argument, "base"):
            yield from tensors_among([argument.base])


def check_bounds() -> None:
    """Raise IndexError when an unmasked lane lies outside every tensor of the launch (stock: garbage or a crash)."""
    extents: list[tuple[int, int]] = []
    stock_init = interpreter.GridExecutor._init_args_hst

    def _init_args_hst(self, arguments, keywords):
        host_arguments, host_keywords = stock_init(self, arguments, keywords)
        extents[:] = {tensor_extent(t) for t in tensors_among([*host_arguments, *host_keywords.values()])}
        return host_arguments, host_keywords

    def check(what, addresses, width):
        inside = np.zeros(addresses.shape, dtype=bool)
        for start, end in extents:
            inside |= (addresses >= start) & (addresses + np.uint64(width) <= end)
        if not inside.all():
            outside = int((~inside).sum())
            raise IndexError(f"{what}: {outside} of {addresses.size} unmasked lanes lie outside every tensor argument")

    interpreter.GridExecutor._init_args_hst = _init_args_hst
    _memory_observers.append(check)


def poison_masked_lanes() -> None:
    """Fill the masked lanes of a float load that has no `other` with NaN: on a GPU they are undefined (stock: 0).

    Blocks only: triton drops a scalar `other` that is 0 before the interpreter sees it.
    """
    stock_load = Builder.create_masked_load

    def create_masked_load(self, pointers, mask, other, *rest, **options):
        element = pointers.get_element_ty()
        if other is None and pointers.data.size > 1 and element.is_floating():
            nan = 0x7FC0 if element == tl.bfloat16 else np.nan
            other = TensorHandle(np.full(pointers.data.shape, nan, dtype=interpreter._get_np_dtype(element)), element)
        return stock_load(self, pointers, mask, other, *rest, **options)

    Builder.create_masked_load = create_masked_load


def silence_floating_point_warnings() -> None:
    """Compute inf and NaN without numpy's warnings, as a GPU does."""
    stock_call = interpreter.GridExecutor.__call__

    def call(self, *arguments, **keywords):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return stock_call(self, *arguments, **keywords)

    interpreter.GridExecutor.__call__ = call


def index_with_tensors() -> None:
    """Let one-element tensors bound a `range` (numpy >= 2.4 refuses what triton <= 3.6 asks of it)."""
    stock_patch = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor, scope):
        stock_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    interpreter._patch_lang_tensor = _patch_lang_tensor


def patch_language_once() -> None:
    """Patch `triton.language` at the first launch only (stock: at every launch and every device-function call)."""
    stock_patch = interpreter._patch_lang
    language = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    no_scope = types.SimpleNamespace(restore=lambda: None)
    patched = False

    def _patch_lang(_function):
        nonlocal patched
        if not patched:
            stock_patch(language)
            patched = True
        return no_scope

    interpreter._patch_lang = _patch_lang


def remember_numpy_dtypes() -> None:
    """Look a type's numpy dtype up by name (stock: builds a dictionary of all of them for every value)."""
    stock_lookup = interpreter._get_np_dtype
    known: dict[str, np.dtype] = {}

    def _get_np_dtype(tt_dtype):
        name = tt_dtype.scalar.name
        if name not in known:
            known[name] = stock_lookup(tt_dtype.scalar)
        return known[name]

    interpreter._get_np_dtype = _get_np_dtype


def keep_frames_together() -> None:
    """Run a launch in a stretch of the frame stack that has room for all its calls.

    CPython keeps frames in chunks of 16 KiB and unmaps a chunk when its first frame returns: a launch whose inner loop
    calls across the end of one pays two system calls and a page fault a call, and takes twice the time.
    """
    stock_call = interpreter.GridExecutor.__call__

    def call(self, *arguments, **keywords):
        return stock_call(self, *arguments, **keywords)

    # A frame this large (in pointers) gets a chunk of a power of two, and what is left of that is the room.
    call.__code__ = call.__code__.replace(co_stacksize=40_000)
    interpreter.GridExecutor.__call__ = call


@dataclasses.dataclass
class MemoryTraffic:
    """What interpreted kernels did to one tensor's storage; masked lanes count nothing, atomics count as both."""

    loaded_bytes: int = 0
    stored_bytes: int = 0
    loads_per_element: torch.Tensor | None = None  # int64, the tensor's shape: how often each element was read


@contextmanager
def count_bytes(tensor: torch.Tensor) -> Iterator[MemoryTraffic]:
    """Count the bytes that unmasked lanes load from and store to the storage of a CPU `tensor` inside the block."""
    storage = tensor.untyped_storage()
    start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    loads_per_slot = np.zeros(storage.nbytes() // tensor.element_size(), dtype=np.int64)
    traffic = MemoryTraffic()

    def count(what, addresses, width):
        inside = addresses[(addresses >= start) & (addresses < end)]
        if what != "store":
            traffic.loaded_bytes += width * inside.size
            np.add.at(loads_per_slot, (inside - np.uint64(start)).astype(np.int64) // tensor.element_size(), 1)
        if what != "load":
            traffic.stored_bytes += width * inside.size

    _memory_observers.append(count)
    try:
        yield traffic
    finally:
        _memory_observers.remove(count)
        slots = torch.from_numpy(loads_per_slot)
        traffic.loads_per_element = slots.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).clone()
