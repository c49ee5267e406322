"""Elements of every kind: what they do alike, fixed point and powers of two."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch

from helpers import rounded
from lowbit.errors import UsageError
from lowbit.numerics.element import Element
from lowbit.numerics.elements import ELEMENTS, FixedPoint, Flagged, Integer, Minifloat, PowerOfTwo, Real
from lowbit.numerics.fallback import Fallback
from lowbit.numerics.formats import BF16, Format
from lowbit.numerics.quantizer import quantize
from lowbit.numerics.scales import PowerOfTwoScale, Scale

ONE = torch.tensor(1.0)
E4M3FN = Minifloat(exponent=4, mantissa=3, top="nan")
E5M2 = Minifloat(exponent=5, mantissa=2)
E3M2 = Minifloat(exponent=3, mantissa=2, top="finite")
E2M3 = Minifloat(exponent=2, mantissa=3, top="finite")
E2M1 = Minifloat(exponent=2, mantissa=1, top="finite")


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

    @pytest.mark.parametrize(("before", "after"), [(-7, 8), (1, -1), (1, 0), (13, 13), (1.5, 2)])
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
    (FixedPoint(integer=1, fraction=4, ends="closed"), Scale(format=PowerOfTwoScale(direction="nearest"))),
    (PowerOfTwo(bits=3), Scale()),
    (PowerOfTwo(bits=8), Scale()),
    (Integer(bits=4, zero="symmetric"), Scale()),
]
every_element = pytest.mark.parametrize(
    ("element", "scale"), ROUNDED, ids=[f"{e}{'' if s is None else ', scaled'}" for e, s in ROUNDED]
)


class TestEnds:
    """Where fixed-point numbers end, and where halves go."""

    @pytest.mark.parametrize(
        ("ends", "values"),
        [
            ("twos-complement", [-1.0, 0.875]),
            ("symmetric", [-0.875, 0.875]),
            ("closed", [-1.0, 1.0]),
            ("open", [-3.0, 3.0]),
        ],
    )
    def test_values_beyond_saturate_at_the_end(self, ends: Any, values: list[float]) -> None:
        """Two's complement has one code more on the negative side; an open grid has no end."""
        assert rounded(torch.tensor([-3.0, 3.0]), FixedPoint(integer=1, fraction=3, ends=ends)).tolist() == values

    def test_halves_go_where_they_are_said_to(self) -> None:
        """Halves go to the even code, or down, also of negative values."""
        x = torch.tensor([0.5, 1.5, -0.5, -1.5])

        assert rounded(x, FixedPoint(integer=4, fraction=0)).tolist() == [0, 2, 0, -2]
        assert rounded(x, FixedPoint(integer=4, fraction=0, halves="down")).tolist() == [0, 1, -1, -2]

    def test_a_grid_may_end_below_a_half(self) -> None:
        """8 bits with the last one worth 2**-14 hold up to 127 of them."""
        found = rounded(torch.tensor([1.0, 3 * 2.0**-14]), FixedPoint(integer=-6, fraction=14, ends="symmetric"))

        assert found.tolist() == [127 * 2.0**-14, 3 * 2.0**-14]

    def test_a_scale_is_the_value_of_1(self) -> None:
        """With the nearest power of two, the largest values reach up to 1.41 and are clipped, or 0.71."""
        scale = Scale(format=PowerOfTwoScale(direction="nearest"))
        element = FixedPoint(integer=1, fraction=7, ends="closed")

        assert rounded(torch.tensor([5.6, 1.0]), element, None, scale).tolist() == [4.0, 1.0]
        assert rounded(torch.tensor([5.7, 1.0]), element, None, scale).tolist() == [5.6875, 1.0]


class TestFlagged:
    """Two grids and a flag."""

    def test_each_value_is_on_the_finer_grid_that_reaches_it(self) -> None:
        """R = 8 and 4 bits: steps of 1 from 1 on, and of 1/8 below; the largest code is 7."""
        scale = Scale(format=PowerOfTwoScale(direction="nearest"))
        x = torch.tensor([8.0, 7.4, 3.6, 1.0, 0.99, 0.3, -0.07, 0.0])

        found = rounded(x, Flagged(number=4), None, scale)

        assert found.tolist() == [7, 7, 4, 1, 1, 0.25, -0.125, 0]

    @pytest.mark.parametrize("number", [1, 17, 2.5])
    def test_other_widths_are_refused(self, number: Any) -> None:
        """A number has 2 to 16 bits."""
        with pytest.raises(UsageError, match=r"2 to 16 bits|give a whole number"):
            Flagged(number=number)

    def test_the_mean_of_noise_is_the_value(self) -> None:
        """On both grids 20,000 draws have the value as mean, within 5 standard errors (false alarms < 1e-5)."""
        n, x = 20_000, torch.tensor([8.0, 3.3, 0.3])
        noise = torch.rand(n, 3, generator=torch.Generator().manual_seed(7))
        scale = Scale(format=PowerOfTwoScale(direction="nearest"))

        found = rounded(x.expand(n, 3), Flagged(number=4), noise, scale).double().mean(0)

        assert abs(found[1] - 3.3) < 5 * 0.5 / math.sqrt(n)
        assert abs(found[2] - 0.3) < 5 * 0.0625 / math.sqrt(n)
        assert found[0] == 7


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

    @pytest.mark.parametrize("element", [Real()], ids=str)
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
            (FixedPoint(integer=-6, fraction=14, ends="symmetric"), "fixed point -6.14 (symmetric)"),
            (FixedPoint(integer=1, fraction=7, halves="down"), "fixed point 1.7, halves down"),
            (Flagged(number=8), "8-bit with a flag"),
            (PowerOfTwo(bits=4), "4-bit power of two"),
        ],
    )
    def test_an_element_says_what_it_is(self, element: Element, text: str) -> None:
        """Reports tell elements apart by their largest number."""
        assert str(element) == text

    def test_no_two_elements_have_one_kind(self) -> None:
        """A kind in TOML stands for one class."""
        assert len({cls.kind for cls in ELEMENTS}) == len(ELEMENTS)


class TestFallback:
    """Blocks whose values have two codes."""

    @pytest.mark.parametrize("bits", range(2, 9))
    def test_every_pair_of_codes_stays(self, bits: int) -> None:
        """All multiples of the finer step up to ``2n**2`` are on the grid of a block with two codes."""
        n = 2 ** (bits - 1) - 1
        high = torch.arange(-2 * n * n, 2 * n * n + 1).float() / (2 * n)
        low = torch.arange(-n, n + 1).float() / 2
        x = torch.stack([high, high.new_zeros(len(high))])
        x[1, : len(low)] = low
        fmt = Format(element=Fallback(bits=bits, share=0.5), scale=Scale(granularity="block", block=x.shape[1]))

        values = quantize(x, fmt, axis=1).values

        torch.testing.assert_close(values[0], x[0], rtol=1e-6, atol=0)
        assert torch.equal(values[1], x[1])

    def test_the_largest_blocks_have_two_codes(self) -> None:
        """Of eight blocks the two largest, and none of four that are as large as each other."""
        most = torch.tensor([3.0, 8.0, 0.0, 1.0, 9.0, 2.0, 8.0 - 1e-6, 0.5])
        element = Fallback(bits=8, share=0.25)

        assert element.falls_back(most).nonzero().flatten().tolist() == [1, 4]
        assert not element.falls_back(torch.tensor([1.0, 7.0, 7.0, 7.0, 7.0])).any()
        assert not element.falls_back(torch.tensor([5.0, 1.0, 2.0])).any()
        assert not element.falls_back(torch.tensor([torch.nan, 1.0, 2.0, 3.0])).any()

    @pytest.mark.parametrize(("bits", "share"), [(1, 0.5), (9, 0.5), (8, 0.0), (8, 1.0)])
    def test_other_widths_and_shares_are_refused(self, bits: int, share: float) -> None:
        """2 to 8 bits, and a share above 0 and below 1."""
        with pytest.raises(UsageError, match=r"two codes|another one"):
            Fallback(bits=bits, share=share)

    def test_it_needs_blocks(self) -> None:
        """One scale for the tensor is refused, and the message says what goes."""
        with pytest.raises(UsageError, match="Give granularity 'block' or 'square'"):
            Format(element=Fallback(bits=8, share=0.5), scale=Scale())
