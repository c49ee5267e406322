"""Integers: codes of given values, steps of given ranges."""

import math

import pytest
import torch
from torch import Tensor

from lowbit.numerics.element import Steps
from lowbit.numerics.elements import Integer
from lowbit.numerics.scales import Scale

ONE = torch.tensor(1.0)


def scale_of(span: Tensor, levels: float, floor: float) -> Tensor:
    """The scale of a span."""
    return Scale(floor=floor).step(span, levels)


def zero_point(lo: Tensor, levels: Tensor | float) -> Tensor:
    """The zero point where steps are 1."""
    steps = Integer(bits=8, zero="integer").steps(lo, lo + 1, levels, lambda span, _: torch.ones_like(span))
    assert isinstance(steps.zero, Tensor)
    return steps.zero


def symmetric(x: Tensor, scale: Tensor, levels: Tensor | float, noise: Tensor | None) -> Tensor:
    """Codes around zero."""
    return Integer(bits=8, zero="symmetric").codes(x, Steps(scale=scale, low=-levels, high=levels), noise)


def affine(x: Tensor, scale: Tensor, zero: Tensor, levels: Tensor | float, noise: Tensor | None) -> Tensor:
    """Codes with a zero point."""
    return Integer(bits=8, zero="integer").codes(x, Steps(scale=scale, zero=zero, low=0.0, high=levels), noise)


def offset(x: Tensor, scale: Tensor, lo: Tensor, levels: Tensor | float, noise: Tensor | None) -> Tensor:
    """Codes with a float offset."""
    return Integer(bits=8, zero="offset").codes(x, Steps(scale=scale, offset=lo, low=0.0, high=levels), noise)


class TestScale:
    """``S = max(span / levels, floor)``."""

    def test_the_span_is_divided_by_the_levels(self) -> None:
        """A span of 10 in 5 levels has steps of 2."""
        assert scale_of(torch.tensor([10.0, 5.0]), 5.0, 0.0).tolist() == [2, 1]

    @pytest.mark.parametrize("span", [1e-12, 1e-30, 1e-35])
    def test_without_a_floor_small_scales_stay_small(self, span: float) -> None:
        """Only a zero scale is replaced, by 1."""
        scale = scale_of(torch.tensor([span, 0.0]), 255.0, 0.0)

        torch.testing.assert_close(scale[0].item(), span / 255, rtol=1e-6, atol=0)
        assert scale[1] == 1

    def test_a_floor_lifts_small_scales(self) -> None:
        """Scales below the floor become the floor; others stay."""
        scale = scale_of(torch.tensor([0.0, 1e-12, 255.0]), 255.0, 1e-8)

        torch.testing.assert_close(scale, torch.tensor([1e-8, 1e-8, 1.0]), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("floor", [0.0, 1e-8])
    def test_what_is_not_finite_stays(self, floor: float) -> None:
        """Neither inf nor nan is hidden by the floor."""
        scale = scale_of(torch.tensor([math.inf, math.nan]), 255.0, floor)

        assert scale[0].isinf()
        assert scale[1].isnan()


class TestZeroPoint:
    """``z = clamp(round(-lo / S), 0, levels)``."""

    def test_halves_go_to_the_even_code(self) -> None:
        """-lo/S = 0.5, 1.5 and 2.5 give 0, 2 and 2."""
        lo = torch.tensor([-0.5, -1.5, -2.5])

        assert zero_point(lo, 255.0).tolist() == [0, 2, 2]

    def test_it_is_a_code(self) -> None:
        """A range that ends at zero has zero as its first or last code, never beyond."""
        lo = torch.tensor([0.0, -255.0, -255.4, -300.0])

        assert zero_point(lo, 255.0).tolist() == [0, 255, 255, 255]

    def test_a_tensor_of_levels_is_a_number_of_levels(self) -> None:
        """Both give the same."""
        lo = torch.tensor([-3.3, -30.0])

        assert zero_point(lo, torch.tensor(15.0)).tolist() == [3, 15]


class TestCodes:
    """Codes of given values, scale and zero."""

    @pytest.mark.parametrize("levels", [7.0, torch.tensor(7.0)])
    def test_symmetric_codes_round_and_clamp(self, levels: float | torch.Tensor) -> None:
        """Ties go to even, and what lies beyond the grid to its end."""
        x = torch.tensor([-100.0, -3.0, -1.0, 0.0, 1.0, 3.0, 5.0, 14.0, 100.0])

        q = symmetric(x, torch.tensor(2.0), levels, None)

        assert q.tolist() == [-7, -2, 0, 0, 0, 2, 2, 7, 7]

    @pytest.mark.parametrize("levels", [15.0, torch.tensor(15.0)])
    def test_affine_codes_add_the_zero_after_rounding(self, levels: float | torch.Tensor) -> None:
        """0.5 and 1.5 round to 0 and 2 and are then moved by an odd zero; before it they would give 4 and 4."""
        x = torch.tensor([-10.0, 0.0, 0.5, 1.5, 12.0, 13.0])

        q = affine(x, torch.tensor(1.0), torch.tensor(3.0), levels, None)

        assert q.tolist() == [0, 3, 3, 5, 15, 15]

    @pytest.mark.parametrize("levels", [15.0, torch.tensor(15.0)])
    def test_offset_codes_clamp_before_rounding(self, levels: float | torch.Tensor) -> None:
        """Values below lo are code 0 and values above the range the last code, also with noise."""
        x = torch.tensor([-10.0, -2.0, -1.5, -0.5, 13.0, 99.0])

        q = offset(x, torch.tensor(1.0), torch.tensor(-2.0), levels, None)
        noisy = offset(x, torch.tensor(1.0), torch.tensor(-2.0), levels, torch.zeros(6))

        assert q.tolist() == [0, 0, 0, 2, 15, 15]
        assert noisy.tolist() == [0, 0, 1, 2, 15, 15]

    def test_noise_rounds_stochastically(self) -> None:
        """Noise below the fraction rounds up, above it down, in the symmetric and the affine kernel."""
        x, noise = torch.tensor([0.5, 0.5, -0.5, -0.5]), torch.tensor([0.4, 0.6, 0.4, 0.6])
        one, zero = torch.tensor(1.0), torch.tensor(4.0)

        assert symmetric(x, one, 7.0, noise).tolist() == [1, 0, 0, -1]
        assert affine(x, one, zero, 15.0, noise).tolist() == [5, 4, 4, 3]

    def test_the_input_is_not_changed(self) -> None:
        """All three kernels write to memory of their own."""
        x, one = torch.tensor([0.3, 5.7]), torch.tensor(1.0)

        for q in (
            symmetric(x, one, 3.0, None),
            affine(x, one, one, 3.0, None),
            offset(x, one, one, 3.0, None),
        ):
            assert not torch.equal(q, x)
        assert x.tolist() == torch.tensor([0.3, 5.7]).tolist()
