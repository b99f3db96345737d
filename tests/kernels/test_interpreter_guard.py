"""Each guarded trap, with a tiny kernel that falls into it: without its fix in `interpreter_guard` the test fails."""

from __future__ import annotations

import os
import resource
import warnings

import pytest
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from interpreter_guard import count_bytes
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the guard exists for the interpreter only"
)


@triton.jit
def _copy_kernel(source_ptr, target_ptr, length, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    values = tl.load(source_ptr + columns, mask=columns < length, other=0)
    tl.store(target_ptr + columns, values, mask=columns < length)


def copy_into(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    target = torch.empty(source.shape, dtype=dtype)
    _copy_kernel[(1,)](source, target, source.numel(), BLOCK=16)
    return target


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.float64, torch.float16, torch.int32])
def test_stores_round_to_the_nearest_even_bf16(source_dtype):
    # 1 + 2^-8 and 1 + 3 * 2^-8 are ties, 1 + 1.5 * 2^-8 lies above one: truncation gets two of the three wrong.
    values = [1.00390625, 1.01171875, 1.005859375, -1.01171875, 0.0, -3.0, 257.0, 259.0]
    source = torch.tensor(values, dtype=torch.float64).to(source_dtype)
    assert torch.equal(copy_into(source, torch.bfloat16), source.to(torch.bfloat16))


def test_bf16_keeps_infinities_nan_and_overflow():
    source = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.4e38, 1e-40, -0.0])
    got, expected = copy_into(source, torch.bfloat16), source.to(torch.bfloat16)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_bf16_widens_exactly(dtype):
    source = torch.tensor([1.0, -2.5, 3.140625, 1e-3, 0.0]).to(torch.bfloat16)
    assert torch.equal(copy_into(source, dtype), source.to(dtype))


@triton.jit
def _dot_kernel(left_ptr, right_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    product = tl.dot(tl.load(left_ptr + offsets), tl.load(right_ptr + offsets))
    tl.store(out_ptr + offsets, product)


def test_dot_multiplies_bf16_values():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(16, 16, generator=generator).to(torch.bfloat16) for _ in range(2))
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](left, right, out, BLOCK=16)
    torch.testing.assert_close(out, left.float() @ right.float(), rtol=1e-5, atol=1e-5)


@triton.jit
def _bf16_kernel(source_ptr, out_ptr, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    values = tl.load(source_ptr + columns)
    if OPERATION == "add":
        result = values + values
    elif OPERATION == "negate":
        result = -values
    elif OPERATION == "compare":
        result = tl.where(values > tl.load(source_ptr), values, values)
    elif OPERATION == "equal":
        result = tl.where(values == values, values, values)
    elif OPERATION == "sum":
        result = values.to(tl.float32) + tl.sum(values, axis=0)
    else:
        result = tl.fma(values, values, values)
    tl.store(out_ptr + columns, result)


@pytest.mark.parametrize("operation", ["add", "negate", "compare", "equal", "sum", "fma"])
def test_bf16_arithmetic_raises(operation):
    source, out = torch.ones(16, dtype=torch.bfloat16), torch.empty(16, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="cannot compute on bf16"):
        _bf16_kernel[(1,)](source, out, OPERATION=operation, BLOCK=16)


@triton.jit
def _bf16_maximum_kernel(source_ptr, out_ptr, BLOCK: tl.constexpr):
    values = tl.load(source_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr, tl.max(values, axis=0))


def test_bf16_operations_that_widen_by_themselves_are_right():
    out = torch.zeros(1)
    _bf16_maximum_kernel[(1,)](torch.tensor([-3.0, -1.5, -2.0, -8.0], dtype=torch.bfloat16), out, BLOCK=4)
    assert out.item() == -1.5


@triton.jit
def _offset_kernel(source_ptr, out_ptr, factor, OPERATION: tl.constexpr):
    row = tl.program_id(0) + 60000
    if OPERATION == "mul":
        offset = row * factor
    elif OPERATION == "add":
        offset = row + (factor + 2147400000)
    elif OPERATION == "sub":
        offset = -factor - 2147483000 - row
    else:
        offset = row.to(tl.int64) * factor
    tl.store(out_ptr, offset.to(tl.int64))


@pytest.mark.parametrize("operation", ["mul", "add", "sub"])
def test_int32_overflow_raises(operation):
    out = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(InterpreterError, match=f"{operation} overflows int32"):
        _offset_kernel[(1,)](out, out, 60000, OPERATION=operation)


def test_int64_offsets_pass():
    out = torch.zeros(1, dtype=torch.int64)
    _offset_kernel[(1,)](out, out, 60000, OPERATION="wide")
    assert out.item() == 60000 * 60000


@triton.jit
def _assert_kernel(out_ptr, limit):
    tl.device_assert(tl.load(out_ptr) < limit, "value reached the limit")


def test_device_assert_raises():
    value = torch.tensor([3.0])
    _assert_kernel[(1,)](value, 4)
    with pytest.raises(InterpreterError, match="value reached the limit"):
        _assert_kernel[(1,)](value, 3)


@triton.jit
def _access_kernel(source_ptr, out_ptr, start, ACCESS: tl.constexpr, BLOCK: tl.constexpr):
    columns = start + tl.arange(0, BLOCK)
    if ACCESS == "load":
        tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(source_ptr + columns))
    elif ACCESS == "store":
        tl.store(source_ptr + columns, tl.load(out_ptr + tl.arange(0, BLOCK)))
    elif ACCESS == "atomic":
        tl.atomic_add(source_ptr + columns, tl.load(out_ptr + tl.arange(0, BLOCK)))
    else:
        inside = (columns >= 0) & (columns < BLOCK)
        tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(source_ptr + columns, mask=inside, other=0.0))


@pytest.mark.parametrize("access", ["load", "store", "atomic"])
@pytest.mark.parametrize("start", [-1, 1])
def test_out_of_bounds_lanes_raise(access, start):
    # The tensor is a view into a larger storage: reading the neighbours would not crash, only be wrong.
    neighbours = torch.zeros(48)
    source, out = neighbours[16:32], torch.zeros(16)
    with pytest.raises(InterpreterError, match="1 of 16 unmasked lanes lie outside"):
        _access_kernel[(1,)](source, out, start, ACCESS=access, BLOCK=16)
    assert not neighbours.any()


def test_masked_lanes_may_point_anywhere():
    source, out = torch.arange(16.0), torch.zeros(16)
    _access_kernel[(1,)](source, out, 4, ACCESS="masked", BLOCK=16)
    assert torch.equal(out[:12], source[4:])
    assert not out[12:].any()


def test_strided_views_are_in_bounds_between_their_elements():
    source, out = torch.arange(64.0)[::4], torch.zeros(16)
    _access_kernel[(1,)](source, out, 1, ACCESS="load", BLOCK=16)
    assert torch.equal(out, torch.arange(1.0, 17.0))


@triton.jit
def _no_other_kernel(source_ptr, out_ptr, length, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(out_ptr + columns, tl.load(source_ptr + columns, mask=columns < length).to(tl.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_lanes_without_other_are_poisoned(dtype):
    out = torch.zeros(16)
    _no_other_kernel[(1,)](torch.ones(16, dtype=dtype), out, 5, BLOCK=16)
    assert torch.equal(out[:5], torch.ones(5))
    assert out[5:].isnan().all()


@triton.jit
def _scalar_other_kernel(source_ptr, out_ptr, length):
    tl.store(out_ptr, tl.load(source_ptr, mask=length > 0, other=0.0))


def test_a_masked_scalar_takes_its_other():
    out = torch.ones(1)
    _scalar_other_kernel[(1,)](torch.ones(1), out, 0)
    assert out.item() == 0.0


@triton.jit
def _nonfinite_kernel(source_ptr, out_ptr, BLOCK: tl.constexpr):
    values = tl.load(source_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr, tl.max(values, axis=0) - tl.max(values, axis=0))
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.exp(values) + (values - values))


def test_nonfinite_arithmetic_is_silent():
    source, out = torch.full((4,), float("nan")), torch.zeros(4)
    source_overflow = torch.full((4,), 1e4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _nonfinite_kernel[(1,)](source, out, BLOCK=4)
        _nonfinite_kernel[(1,)](source_overflow, out, BLOCK=4)
    assert out.isinf().all()  # exp overflows; NaN of the first launch is overwritten


@triton.jit
def _runtime_range_kernel(lengths_ptr, out_ptr):
    total = 0
    for step in range(0, tl.load(lengths_ptr)):
        total += step
    tl.store(out_ptr, total)


def test_loaded_values_bound_a_range():
    out = torch.zeros(1, dtype=torch.int32)
    _runtime_range_kernel[(1,)](torch.tensor([5], dtype=torch.int32), out)
    assert out.item() == 10


@triton.jit
def _twice(values):
    return values + values


@triton.jit
def _device_function_kernel(source_ptr, out_ptr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(out_ptr + columns, _twice(tl.load(source_ptr + columns)))


def test_the_language_is_patched_once(monkeypatch):
    source, out = torch.arange(4.0), torch.zeros(4)
    _device_function_kernel[(1,)](source, out, BLOCK=4)
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *_: pytest.fail("triton.language was patched again"))
    _device_function_kernel[(2,)](source, out, BLOCK=4)
    assert torch.equal(out, 2 * source)


def test_remembered_dtypes_tell_pointers_blocks_and_scalars_apart():
    pointer = tl.pointer_type(tl.float32)
    expected = [(tl.float32, "float32"), (pointer, "uint64"), (tl.int1, "bool"), (tl.bfloat16, "uint16")]
    for element, name in expected:
        for _ in range(2):
            assert interpreter._get_np_dtype(element).name == name
            assert interpreter._get_np_dtype(tl.block_type(element, [4])).name == name


def test_frames_of_a_launch_stay_together():
    """At no depth of the stack does a loop of calls pay a page fault a call."""
    lengths, out = torch.tensor([50], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)

    def faults_at(depth: int) -> int:
        if depth:
            return faults_at(depth - 1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        _runtime_range_kernel[(1,)](lengths, out)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults_at(0)
    assert max(min(faults_at(depth) for _ in range(3)) for depth in range(200)) < 50


def test_results_reach_views_of_shared_storage():
    storage = torch.zeros(8)
    _copy_kernel[(1,)](torch.arange(4.0), storage[4:], 4, BLOCK=16)
    assert torch.equal(storage, torch.tensor([0.0, 0, 0, 0, 0, 1, 2, 3]))


def test_count_bytes_counts_unmasked_lanes_of_one_storage():
    source, out = torch.arange(10.0, dtype=torch.float64), torch.zeros(10, dtype=torch.float32)
    with count_bytes(source) as read, count_bytes(out) as written:
        _copy_kernel[(1,)](source, out, 7, BLOCK=16)
    assert (read.loaded_bytes, read.stored_bytes) == (7 * 8, 0)
    assert (written.loaded_bytes, written.stored_bytes) == (0, 7 * 4)
    assert read.loads_per_element is not None
    assert read.loads_per_element.tolist() == [1] * 7 + [0] * 3


def test_count_bytes_tells_elements_of_a_view_apart_and_stops_after_the_block():
    storage = torch.arange(32.0).reshape(2, 16)
    view = storage.t()
    out = torch.zeros(16)
    with count_bytes(view) as traffic:
        _copy_kernel[(1,)](storage[1], out, 16, BLOCK=16)
        _copy_kernel[(1,)](storage[1], out, 2, BLOCK=16)
    _copy_kernel[(1,)](storage[0], out, 16, BLOCK=16)
    assert traffic.loaded_bytes == 18 * 4
    assert traffic.loads_per_element is not None
    assert traffic.loads_per_element[:, 0].sum() == 0
    assert traffic.loads_per_element[:, 1].tolist() == [2, 2] + [1] * 14
