"""Elements and scales: codes of given values, steps of given ranges."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat import formats as standards
from torch import Tensor

from lowbit.errors import UsageError
from lowbit.numerics.elements import (
    ELEMENTS,
    Element,
    FixedPoint,
    Integer,
    Minifloat,
    PowerOfTwo,
    Real,
    Steps,
    exponent_of,
    power_of_two,
)
from lowbit.numerics.formats import BF16, Format
from lowbit.numerics.quantizer import quantize
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


E4M3FN = Minifloat(exponent=4, mantissa=3, top="nan")
E5M2 = Minifloat(exponent=5, mantissa=2)
E3M2 = Minifloat(exponent=3, mantissa=2, top="finite")
E2M3 = Minifloat(exponent=2, mantissa=3, top="finite")
E2M1 = Minifloat(exponent=2, mantissa=1, top="finite")
# Every float of 8 bits or fewer that ml_dtypes has with the bias 2**(e-1) - 1.
TYPES: list[tuple[Minifloat, Any]] = [
    (E4M3FN, ml_dtypes.float8_e4m3fn),
    (E5M2, ml_dtypes.float8_e5m2),
    (Minifloat(exponent=4, mantissa=3), ml_dtypes.float8_e4m3),
    (Minifloat(exponent=3, mantissa=4), ml_dtypes.float8_e3m4),
    (E3M2, ml_dtypes.float6_e3m2fn),
    (E2M3, ml_dtypes.float6_e2m3fn),
    (E2M1, ml_dtypes.float4_e2m1fn),
]
STANDARDS = [
    (E4M3FN, standards.format_info_ocp_e4m3),
    (E5M2, standards.format_info_ocp_e5m2),
    (E3M2, standards.format_info_ocp_e3m2),
    (E2M3, standards.format_info_ocp_e2m3),
    (E2M1, standards.format_info_ocp_e2m1),
]
names = [str(element) for element, _ in TYPES]
every_type = pytest.mark.parametrize(("element", "dtype"), TYPES, ids=names)
every_float = pytest.mark.parametrize("element", [element for element, _ in TYPES], ids=names)


def rounded(x: Tensor, element: Element, noise: Tensor | None = None, scale: Scale | None = None) -> Tensor:
    """Values of an element, on the CPU's plain or native pass as `quantize` chooses."""
    rounding = "nearest" if noise is None else "stochastic"
    return quantize(x, Format(element=element, scale=scale, rounding=rounding), noise=noise).values


def numbers_of(element: Minifloat, dtype: Any) -> Tensor:
    """The finite numbers of a type of ml_dtypes that are 0 or more, in the order of their patterns."""
    count = 2 ** (element.bits - 1)
    x = torch.from_numpy(np.arange(count, dtype=np.uint8).view(dtype).astype(np.float32))
    return x[x.isfinite()]


def patterns(count: int) -> Tensor:
    """Random float32 patterns without nan, and numbers of the sizes that small floats have."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32).view(torch.float32)
    return torch.cat(
        [x[~x.isnan()], torch.randn(count, generator=generator) * 2.0 ** torch.arange(count).remainder(20)]
    )


class TestMinifloats:
    """Floats of few bits against ml_dtypes, gfloat and torch."""

    @every_type
    def test_every_number_of_the_type_stays(self, element: Minifloat, dtype: Any) -> None:
        """All finite numbers are on the grid, both signs, subnormals included, and the largest is the last."""
        x = numbers_of(element, dtype)
        both = torch.cat([x, -x])

        assert torch.equal(rounded(both, element), both)
        assert x[-1] == element.largest == float(ml_dtypes.finfo(dtype).max)
        assert x[1] == float(ml_dtypes.finfo(dtype).smallest_subnormal)

    @every_type
    def test_there_are_no_other_numbers(self, element: Minifloat, dtype: Any) -> None:
        """Of a hundred thousand values of all sizes each becomes a number of the type, and all but a few occur."""
        x = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * element.largest
        x *= 2.0 ** -torch.arange(100_000).remainder(32)
        allowed = numbers_of(element, dtype)

        found = rounded(x, element).abs().unique()

        assert torch.isin(found, allowed).all()
        assert len(found) > 0.9 * len(allowed)

    @every_type
    def test_the_middle_goes_to_the_even_pattern(self, element: Minifloat, dtype: Any) -> None:
        """Halfway between two neighbours lies nothing: the one with an even pattern is taken, the other just beside."""
        x = numbers_of(element, dtype)
        middle = ((x[:-1].double() + x[1:].double()) / 2).float()
        even = torch.where(torch.arange(len(middle)) % 2 == 0, x[:-1], x[1:])

        assert torch.equal(rounded(middle, element), even)
        assert torch.equal(rounded(-middle, element), -even)
        assert torch.equal(rounded(torch.nextafter(middle, x[1:]), element), x[1:])
        assert torch.equal(rounded(torch.nextafter(middle, x[:-1]), element), x[:-1])

    @every_type
    def test_casts_are_those_of_ml_dtypes(self, element: Minifloat, dtype: Any) -> None:
        """Random numbers of all sizes round as in ml_dtypes; what overflows is inf or nan there, else the largest."""
        infinite = Minifloat(exponent=element.exponent, mantissa=element.mantissa, top=element.top, overflow="infinite")
        x = patterns(20_000)
        wanted = torch.from_numpy(x.numpy().astype(dtype).astype(np.float32))
        if element.top == "finite":
            x, wanted = x[x.isfinite()], wanted[x.isfinite()]

        found = rounded(x, element if element.top == "finite" else infinite)

        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
        assert len(found.unique()) > 10

    @every_float
    def test_the_same_casts_saturate(self, element: Minifloat) -> None:
        """What is finite and too large becomes the largest number of its sign; inf and nan become nan."""
        x = torch.tensor(
            [element.largest * 1.5, -3e38, element.largest + element.margin, math.inf, -math.inf, math.nan]
        )

        found = rounded(x, element)

        assert found[:3].tolist() == [element.largest, -element.largest, element.largest]
        assert found[3:].isnan().all()

    @pytest.mark.parametrize(("top", "beyond"), [("ieee", math.inf), ("nan", math.nan), ("finite", math.nan)])
    def test_overflow_begins_half_a_step_beyond_the_largest(self, top: Any, beyond: float) -> None:
        """Just below it rounds to the largest number; half a step beyond does so where that number is even."""
        element = Minifloat(exponent=4, mantissa=3, top=top, overflow="infinite")
        edge = torch.tensor(element.largest + element.margin)

        below, above = rounded(torch.nextafter(edge, ONE), element), rounded(torch.nextafter(edge, edge * 2), element)

        assert below == element.largest
        torch.testing.assert_close(above, torch.tensor(beyond), rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize(("element", "info"), STANDARDS, ids=[str(element) for element, _ in STANDARDS])
    def test_single_numbers_round_like_gfloat(self, element: Minifloat, info: gfloat.FormatInfo) -> None:
        """The numbers of OCP's formats are those of gfloat's definition, saturating."""
        x = torch.randn(300, generator=torch.Generator().manual_seed(1)) * element.largest / 2

        found = rounded(x, element)

        assert found.tolist() == [gfloat.round_float(info, v, sat=True) for v in x.tolist()]
        assert not torch.equal(found, x)

    @pytest.mark.parametrize(
        ("element", "dtype"),
        [
            (BF16.element, torch.bfloat16),
            (Minifloat(exponent=5, mantissa=10, overflow="infinite"), torch.float16),
            (Minifloat(exponent=5, mantissa=2, overflow="infinite"), torch.float8_e5m2),
        ],
        ids=str,
    )
    def test_casts_are_those_of_torch(self, element: Minifloat, dtype: torch.dtype) -> None:
        """bfloat16, float16 and E5M2 round as torch's own casts, subnormals and overflow included."""
        x = patterns(50_000)

        codes = element.codes(x, None, None)

        assert torch.equal(codes, x.to(dtype).float())
        assert not torch.equal(codes, x)

    def test_a_scale_puts_the_largest_number_at_the_largest_value(self) -> None:
        """``S = max|x| / largest`` of each row, and values are S times numbers of the type."""
        x = torch.randn(5, 40, generator=torch.Generator().manual_seed(2)) * torch.logspace(-5, 5, 5)[:, None]
        fmt = Format(element=E2M1, scale=Scale(granularity="row"))

        values = quantize(x, fmt, dims=(1,)).values

        scale = x.abs().amax(1, keepdim=True) / 6
        wanted = torch.from_numpy((x / scale).numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)) * scale
        assert torch.equal(values, wanted)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"exponent": 1}, "2 to 8 bits of exponent"),
            ({"exponent": 9}, "exponent=9"),
            ({"mantissa": 24}, "0 to 23 of mantissa"),
            ({"mantissa": 0, "top": "nan"}, "a number and nan at once"),
            ({"mantissa": 0}, "inf and nan at once"),
            ({"exponent": 8, "top": "nan"}, "float32 lacks its largest numbers"),
            ({"top": "fn"}, "unknown top 'fn'.*Known: finite, ieee, nan"),
            ({"overflow": "wrap"}, "unknown overflow 'wrap'.*Known: infinite, saturate"),
            ({"exponent": 4.0}, "exponent=4.0: give a whole number"),
        ],
    )
    def test_what_is_not_a_float_is_refused(self, fields: dict[str, Any], message: str) -> None:
        """The error says what was given and what is allowed."""
        with pytest.raises(UsageError, match=message):
            Minifloat(**{"exponent": 4, "mantissa": 3, **fields})

    @pytest.mark.parametrize("exponent", range(2, 9))
    def test_every_float_that_exists_fits_float32(self, exponent: int) -> None:
        """The largest and the smallest number of every size are numbers of float32."""
        for mantissa in range(24):
            for top in ("ieee", "nan", "finite"):
                try:
                    element = Minifloat(exponent=exponent, mantissa=mantissa, top=top)
                except UsageError:
                    continue
                x = torch.tensor([element.largest, 2.0 ** (2 - 2 ** (exponent - 1) - mantissa)])

                assert torch.equal(rounded(x, element), x)
                assert x[1] > 0


class TestFixedPoint:
    """Numbers with so many bits before and after the point."""

    @pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 6), (8, 0), (4, 4), (3, 13)])
    def test_codes_are_the_definition(self, before: int, after: int) -> None:
        """Rounded in rational numbers, halves to even, and clamped to ``-2**(b-1) .. 2**(b-1) - 1``."""
        x = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 2.0**before / 2
        x[:100] = (x[:100] * 2.0**after).floor() / 2.0**after + 2.0 ** (-after - 1)  # halves
        low, high = -(2 ** (before + after - 1)), 2 ** (before + after - 1) - 1

        values = rounded(x, FixedPoint(integer=before, fraction=after))

        codes = [min(max(round(Fraction(v) * 2**after), low), high) for v in x.tolist()]
        assert values.tolist() == [code / 2**after for code in codes]
        assert {low, high} <= set(codes)

    def test_every_code_of_8_bits_stays(self) -> None:
        """The 256 codes are on the grid; below and above lies nothing."""
        x = torch.arange(-128.0, 128.0) / 16

        assert torch.equal(rounded(x, FixedPoint(integer=4, fraction=4)), x)
        assert rounded(torch.tensor([-8.1, 8.0]), FixedPoint(integer=4, fraction=4)).tolist() == [-8, 127 / 16]

    @pytest.mark.parametrize("bits", [24, 25])
    def test_the_widest_saturate_at_a_code(self, bits: int) -> None:
        """float32 holds the largest code of 25 bits; it would round that of 26."""
        values = rounded(torch.tensor([1e30, -1e30]), FixedPoint(integer=bits, fraction=0))

        assert values.tolist() == [2 ** (bits - 1) - 1, -(2 ** (bits - 1))]

    @pytest.mark.parametrize(("before", "after"), [(0, 8), (1, -1), (1, 0), (13, 13), (1.5, 2)])
    def test_other_widths_are_refused(self, before: Any, after: Any) -> None:
        """Before the point stands the sign, and all bits are from 2 to 25."""
        with pytest.raises(UsageError, match=r"2 to 25 in all|integer=1.5: give a whole number"):
            FixedPoint(integer=before, fraction=after)


def powers(bits: int) -> list[float]:
    """0 and the powers of two of a width, in order."""
    return [0.0, *(2.0**-k for k in range(2 ** (bits - 1) - 2, -1, -1))]


class TestPowersOfTwo:
    """0 and powers of two."""

    @pytest.mark.parametrize("bits", range(2, 9))
    def test_every_power_stays(self, bits: int) -> None:
        """The ``2**(b-1)`` numbers that are 0 or more are on the grid with either sign."""
        x = torch.tensor(powers(bits))
        both = torch.cat([x, -x])

        assert torch.equal(rounded(both, PowerOfTwo(bits=bits), scale=Scale()), both)

    @pytest.mark.parametrize("bits", range(2, 6))
    def test_the_nearest_is_taken(self, bits: int) -> None:
        """Of ten thousand values each has the nearest of all powers; the middle goes up, but for the lowest to 0."""
        grid = torch.tensor(powers(bits), dtype=torch.float64)
        x = torch.cat([torch.rand(10_000, generator=torch.Generator().manual_seed(0)), (grid[:-1] + grid[1:]) / 2])
        x = torch.cat([x, torch.ones(1)]).float()

        values = rounded(x, PowerOfTwo(bits=bits), scale=Scale())

        distance = (x[:, None] - grid).abs()
        tied = distance == distance.amin(1, keepdim=True)
        wanted = torch.where(tied, grid, -1).amax(1)
        wanted[10_000] = 0
        assert torch.equal(values.double(), wanted)

    def test_binades_end_where_they_do(self) -> None:
        """1.5 times a power goes up and the number before it down, of every binade of 8 bits."""
        low = torch.tensor(powers(8)[1:-1])
        one = torch.ones(len(low))

        for x, wanted in (
            (1.5 * low, 2 * low),
            (torch.nextafter(1.5 * low, low), low),
            (torch.nextafter(low, one), low),
        ):
            values = quantize(torch.cat([x, one]), Format(element=PowerOfTwo(bits=8), scale=Scale())).values
            assert torch.equal(values[: len(low)], wanted)

    @pytest.mark.parametrize("bits", [1, 9, 4.0])
    def test_other_widths_are_refused(self, bits: Any) -> None:
        """2 to 8 bits."""
        with pytest.raises(UsageError, match=f"bits={bits}"):
            PowerOfTwo(bits=bits)


ROUNDED: list[tuple[Element, Scale | None]] = [
    (E4M3FN, None),
    (E4M3FN, Scale()),
    (E5M2, None),
    (E2M1, Scale()),
    (E2M3, None),
    (FixedPoint(integer=2, fraction=3), None),
    (PowerOfTwo(bits=3), Scale()),
    (PowerOfTwo(bits=8), Scale()),
    (Integer(bits=4, zero="symmetric"), Scale()),
]
every_element = pytest.mark.parametrize(
    ("element", "scale"), ROUNDED, ids=[f"{e}{'' if s is None else ', scaled'}" for e, s in ROUNDED]
)


class TestAllElements:
    """What every element does alike."""

    @every_element
    def test_stochastic_rounding_is_unbiased(self, element: Element, scale: Scale | None) -> None:
        """Each of 8 means of n = 20,000 draws is within 5 standard errors of x (all false alarms < 1e-4)."""
        n = 20_000
        x = torch.tensor([1.0, -0.77, 0.3, 0.013, -0.0021, 0.4, 0.1, -0.95])
        noise = torch.rand(n, 8, generator=torch.Generator().manual_seed(7))

        values = rounded(x.expand(n, 8), element, noise, scale).double()

        two = [column.unique() for column in values.t()]
        assert all(len(v) <= 2 for v in two)
        spread = torch.stack([v.max() - v.min() for v in two])
        # Of two neighbours a distance d apart the standard deviation is at most d/2.
        assert ((values.mean(0) - x).abs() <= 5 * spread / 2 / math.sqrt(n) + 1e-6).all()
        assert sum(len(v) == 2 for v in two) >= 4

    @every_element
    @pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
    def test_noise_does_not_move_what_is_on_the_grid(self, element: Element, scale: Scale | None, u: float) -> None:
        """Rounded values stay, whatever the noise."""
        x = rounded(torch.linspace(-1, 1, 201) * element.code_range[1], element, None, scale)  # a scale of exactly 1

        assert torch.equal(rounded(x, element, torch.full_like(x, u), scale), x)

    @every_element
    def test_the_order_is_kept(self, element: Element, scale: Scale | None) -> None:
        """Larger values never become smaller ones, and zeros and signs stay."""
        x = torch.arange(-2000, 2001) / 2000

        values = rounded(x, element, None, scale)

        assert (values.diff() >= 0).all()
        assert values[2000] == 0
        assert torch.equal(values.flip(0), -values) or isinstance(element, FixedPoint)

    @every_element
    @pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
    def test_zeros_give_zeros(self, element: Element, scale: Scale | None, shape: tuple[int, ...]) -> None:
        """A tensor of zeros and an empty one return themselves."""
        x = torch.zeros(shape)

        assert torch.equal(rounded(x, element, None, scale), x)
        assert torch.equal(rounded(x, element, torch.full_like(x, 0.9), scale), x)

    @every_element
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_an_inf_or_nan_surfaces_as_nan(self, element: Element, scale: Scale | None, dtype: torch.dtype) -> None:
        """Alone where nothing is shared, else throughout what shares the scale; never as a number."""
        for bad in (math.inf, -math.inf, math.nan):
            x = torch.tensor([0.5, bad, 0.0], dtype=dtype)
            for noise in (None, torch.full((3,), 0.9)):
                values = rounded(x, element, noise, scale)

                assert values[1].isnan()
                assert values.isnan().all() == (scale is not None)

    @every_element
    def test_float64_has_the_values_of_float32(self, element: Element, scale: Scale | None) -> None:
        """A float32 tensor in float64 rounds to the same codes, and the result is float64."""
        x = torch.randn(500, generator=torch.Generator().manual_seed(3)) / 4

        wide, narrow = (rounded(t, element, None, scale) for t in (x.double(), x))

        assert wide.dtype == torch.float64
        torch.testing.assert_close(wide.float(), narrow, rtol=0 if scale is None else 2**-22, atol=0)

    @pytest.mark.parametrize("element", [E4M3FN, E5M2, FixedPoint(integer=2, fraction=3)], ids=str)
    def test_a_float64_beyond_float32_saturates(self, element: Element) -> None:
        """It is finite, and so is what it becomes, with noise too."""
        x = torch.tensor([1e300, -1e300], dtype=torch.float64)

        for noise in (None, torch.full((2,), 0.5)):
            values = rounded(x, element, noise)
            assert values.isfinite().all()
            assert values.abs().max() > 1

    @pytest.mark.parametrize("element", [E4M3FN, E2M1, PowerOfTwo(bits=2), Integer(bits=8, zero="symmetric")], ids=str)
    @pytest.mark.parametrize("value", [3.3, -1e-30, 3e-36, 1e37])
    def test_a_scaled_constant_returns_itself(self, element: Element, value: float) -> None:
        """To one part in 2**22, from tiny to huge."""
        x = torch.full((4,), value)

        torch.testing.assert_close(rounded(x, element, None, Scale()), x, rtol=2**-22, atol=0)

    @pytest.mark.parametrize("element", [E4M3FN, E2M1, Integer(bits=8, zero="symmetric")], ids=str)
    def test_a_denormal_scale_loses_precision_and_no_more(self, element: Element) -> None:
        """A tensor whose scale is denormal rounds to numbers of its own size, or to zeros where the scale is none."""
        x = torch.tensor([1e-42, -5e-43, 0.0])

        values = rounded(x, element, None, Scale())

        assert values.isfinite().all()
        assert (values.abs() <= 2e-42).all()
        assert values[2] == 0

    def test_the_tensor_is_not_changed(self) -> None:
        """Codes are written to memory of their own."""
        x = torch.linspace(-1, 1, 50)
        copy = x.clone()

        for element, scale in ROUNDED:
            rounded(x, element, None, scale)
            rounded(x, element, torch.full_like(x, 0.5), scale)
        assert torch.equal(x, copy)

    @pytest.mark.parametrize("element", [Integer(bits=8, zero="symmetric"), PowerOfTwo(bits=4)], ids=str)
    def test_an_element_that_needs_a_scale_says_so(self, element: Element) -> None:
        """Without one there is no format, and no steps."""
        with pytest.raises(UsageError, match="needs a scale: give one"):
            Format(element=element)
        with pytest.raises(TypeError, match="needs a scale"):
            element.fixed_steps(ONE)

    @pytest.mark.parametrize("element", [Real(), FixedPoint(integer=2, fraction=6)], ids=str)
    def test_an_element_without_a_scale_says_so(self, element: Element) -> None:
        """With one there is no format, and no steps."""
        with pytest.raises(UsageError, match="has no scale: leave it out"):
            Format(element=element, scale=Scale())
        with pytest.raises(TypeError, match="has no scale"):
            element.steps(-ONE, ONE, 1.0, Scale().step)

    @pytest.mark.parametrize(
        ("element", "text"),
        [
            (Real(), "fp32"),
            (Integer(bits=8, zero="offset"), "8-bit offset"),
            (BF16.element, "bf16"),
            (Minifloat(exponent=5, mantissa=10, overflow="infinite"), "fp16"),
            (E4M3FN, "e4m3 (max 448)"),
            (Minifloat(exponent=4, mantissa=3), "e4m3 (max 240)"),
            (Minifloat(exponent=5, mantissa=2, overflow="infinite"), "e5m2 (max 57344, inf beyond)"),
            (Minifloat(exponent=4, mantissa=3, top="nan", overflow="infinite"), "e4m3 (max 448, nan beyond)"),
            (FixedPoint(integer=2, fraction=14), "fixed point 2.14"),
            (PowerOfTwo(bits=4), "4-bit power of two"),
        ],
    )
    def test_an_element_says_what_it_is(self, element: Element, text: str) -> None:
        """Reports tell elements apart by their largest number."""
        assert str(element) == text

    def test_no_two_elements_have_one_kind(self) -> None:
        """A kind in TOML stands for one class."""
        assert len({cls.kind for cls in ELEMENTS}) == len(ELEMENTS)


class TestExponents:
    """Exponents by extraction."""

    @pytest.mark.parametrize(
        "move", [lambda x: x, lambda x: torch.nextafter(x, x * 2), lambda x: torch.nextafter(x, x * 0)]
    )
    def test_they_are_exact_at_the_ends_of_binades(self, move: Callable[[Tensor], Tensor]) -> None:
        """At every power of two of float32 and at the numbers beside it, where float32 logarithms are wrong."""
        x = move(2.0 ** torch.arange(-149, 128, dtype=torch.float64).float())
        x = x[x > 0].double()

        assert exponent_of(x).tolist() == [math.frexp(v)[1] - 1 for v in x.tolist()]

    def test_powers_are_exact_and_stay_normal(self) -> None:
        """From -1022 to 1023 they are the powers; beyond, the nearest of these."""
        exponents = torch.arange(-1022, 1024)

        assert power_of_two(exponents).tolist() == [2.0**e for e in range(-1022, 1024)]
        assert power_of_two(torch.tensor([-2000, 2000])).tolist() == [2.0**-1022, 2.0**1023]
