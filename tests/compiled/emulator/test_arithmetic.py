"""The emulator's instructions against exact arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from compiled.emulator import arithmetic

generator = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def quiet():
    """Overflow and NaN are no accidents here; the machine computes without NumPy's warnings too."""
    with np.errstate(all="ignore"):
        yield


def floats(n: int, low: int = -126, high: int = 60) -> np.ndarray:
    """Return fp32 numbers of all sizes, some of them with few bits so that sums meet ties."""
    mantissa = generator.integers(0, 1 << 23, n) & np.where(generator.random(n) < 0.3, 0x7FF000, 0x7FFFFF)
    exponent = generator.integers(low + 127, high + 127, n)
    bits = (generator.integers(0, 2, n) << 31 | exponent << 23 | mantissa).astype(np.uint32)
    return bits.view(np.float32)


def test_fma_rounds_once():
    a, b = floats(4000, -40, 40), floats(4000, -40, 40)
    c = np.where(generator.random(4000) < 0.5, -(a * b), floats(4000, -70, 70)).astype(np.float32)
    for x, y, z, got in zip(a, b, c, arithmetic.fma(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        neighbours = [got, np.nextafter(got, np.float32(np.inf)), np.nextafter(got, np.float32(-np.inf))]
        errors = [abs(Fraction(float(n)) - exact) for n in neighbours if np.isfinite(n)]
        assert errors[0] == min(errors)
        if errors.count(errors[0]) > 1 and exact != 0:
            assert got.view(np.uint32) % 2 == 0  # ties to even


def test_halves_round_as_torch_does():
    x = np.concatenate([floats(20000, -30, 20), [np.inf, -np.inf, np.nan, 65519.0, 65520.0, 3.4e38]]).astype(np.float32)
    for dtype, convert in (
        (torch.bfloat16, arithmetic.float32_to_bfloat16),
        (torch.float16, arithmetic.float32_to_float16),
    ):
        wanted = torch.from_numpy(x).to(dtype)
        got = torch.from_numpy(convert(x).view(np.int16)).view(dtype)
        assert torch.equal(got[~wanted.isnan()], wanted[~wanted.isnan()])
        assert got[wanted.isnan()].isnan().all()


def test_integer_division_rounds_toward_zero():
    a, b = np.array([7, -7, 7, -7, -(2**31)], np.int32), np.array([2, 2, -2, -2, 3], np.int32)
    assert arithmetic.truncated_quotient(a, b).tolist() == [3, -3, -3, 3, -715827882]


def test_exp2_at_its_edges():
    x = np.array([0.0, -0.0, 1e-40, -np.inf, np.inf, np.nan, -127.5, -150.5, 128.0, 3.0], np.float32)
    kept, flushed = arithmetic.exp2(x, False, 0), arithmetic.exp2(x, True, 0)
    assert kept[:5].tolist() == flushed[:5].tolist() == [1.0, 1.0, 1.0, 0.0, np.inf]
    assert kept[6] == np.float32(2.0**-127.5)
    assert flushed[6] == 0 == flushed[7]
    assert kept[8] == np.inf
    assert np.isnan(kept[5])
    moved = arithmetic.exp2(floats(9999, -20, 5), True, 2)
    again = arithmetic.exp2(floats(9999, -20, 5), True, 0)
    assert moved.shape == again.shape


def test_bytes_are_permuted_and_signs_spread():
    a, b = np.array([0x33221180], np.uint32), np.array([0x77665544], np.uint32)
    for selector, wanted in ((0x3210, 0x33221180), (0x7531, 0x77553311), (0x0008, 0x808080FF), (0x9840, 0x00FF4480)):
        assert arithmetic.permute_bytes(a, b, np.array(selector, np.uint32)).tolist() == [wanted]


def test_fields_of_bits_keep_their_sign():
    a = np.array([0x7FFF00F0, -1, 0x00000080, -256], np.int32)
    for start, n, wanted in (
        (4, 4, [-1, -1, -8, 0]),
        (0, 8, [-16, -1, -128, 0]),
        (3, 0, [0] * 4),
        (30, 4, [1, -1, 0, -1]),
    ):
        assert arithmetic.signed_field(a, np.uint32(start), np.uint32(n)).tolist() == wanted


def test_pairs_of_short_integers_wrap_apart():
    add = arithmetic.operation("add", ["s16x2"], 0).function
    a, b = np.array([0x0001FFFF, 0x7FFF0003], np.uint32), np.array([0x00010001, 0x00010004], np.uint32)
    assert add(a, b).tolist() == [0x00020000, 0x80000007]
    assert add(a, b[:1]).tolist() == [0x00020000, 0x80000004]


def test_halves_of_the_other_kind_are_compared_as_numbers():
    x = torch.tensor([1.0, -torch.inf, torch.nan, -0.0], dtype=torch.bfloat16)
    y = torch.tensor([1.0, -1.0, torch.nan, 0.0], dtype=torch.bfloat16)
    bits = [z.view(torch.int16).numpy().view(np.uint16) for z in (x, y)]
    for name in ("eq", "lt"):
        got = arithmetic.operation("setp", [name, "bf16"], 0).function(*bits)
        assert got.tolist() == getattr(torch, name)(x, y).tolist()
