"""Dynamic fixed point: numbers, exact products, flushes and the way back to 16 bits."""

import pytest
import torch

from lowbit.errors import UsageError
from lowbit.numerics.dynamic_fixed_point import Shared, down_convert, encode, multiply, multiply_flushed


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("x", [1.0, 0.5, 2.0, 1023.9999, 2.0**-130])
def test_the_largest_number_has_its_leading_bit(x: float) -> None:
    """The exponent is exact at powers of two, just below one and for denormal values."""
    found = encode(torch.tensor([x, -x / 3], dtype=torch.float64))

    assert 2**14 <= int(found.numbers[0]) < 2**15
    assert found.values()[0] == pytest.approx(x, rel=2.0**-15)


def test_zeros_and_nothing_have_exponent_0() -> None:
    """Neither divides by zero."""
    assert encode(torch.zeros(3)).exponent == 0
    assert not encode(torch.zeros(3)).numbers.any()
    assert encode(torch.zeros(0, 3)).numbers.shape == (0, 3)


@pytest.mark.parametrize("flush", [1, 2, 7, 64])
def test_flushes_lose_no_more_than_float32_sums(flush: int) -> None:
    """Products shifted so that sums fit differ from the exact product by float32 rounding and the shift."""
    a, b = encode(randn(5, 64)), encode(randn(64, 4, seed=1))
    shift = max(0, flush.bit_length() - 1)
    exact = multiply(a, b).values()

    found = multiply_flushed(a, b, flush, shift)

    bound = a.values().abs() @ b.values().abs() * 2.0**-20 + a.values().abs().sum(1, keepdim=True) * 2.0 ** (
        b.exponent + shift
    )
    assert ((found.double() - exact).abs() <= bound).all()
    assert not torch.equal(found.double(), exact)


def test_a_sum_that_does_not_fit_is_refused() -> None:
    """Two products of the largest numbers fill 32 bits; three do not fit."""
    most = Shared(torch.full((1, 3), 2**15 - 1, dtype=torch.int64), 0)
    column = Shared(most.numbers.T, 0)

    assert multiply_flushed(most, column, 2).shape == (1, 1)
    with pytest.raises(UsageError, match="does not fit in 32 bits; flush earlier"):
        multiply_flushed(most, column, 3)
    with pytest.raises(UsageError, match="1 product or more"):
        multiply_flushed(most, column, 0)


def test_small_sums_stay_as_they_are() -> None:
    """Sums that have 16 bits are not shifted; a shift truncates towards minus infinity."""
    assert down_convert(Shared(torch.tensor([5, -7]), 3)).numbers.tolist() == [5, -7]
    assert down_convert(Shared(torch.tensor([2**15 + 1, -3]), 0)).numbers.tolist() == [2**14, -2]
    assert down_convert(Shared(torch.tensor([2**15 + 1, -3]), 0)).exponent == 1
