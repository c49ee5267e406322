"""Scales: range rules, the formats of scales against exact arithmetic and ml_dtypes, and what is refused."""

import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.errors import UsageError
from lowbit.numerics.element import Element
from lowbit.numerics.elements import Integer, Minifloat, PowerOfTwo
from lowbit.numerics.formats import Format, integer
from lowbit.numerics.quantizer import encode, quantize
from lowbit.numerics.scales import (
    E4M3,
    RANGE_RULES,
    SCALE_FORMATS,
    Constant,
    Float32,
    IntegerScale,
    MinMax,
    PowerOfTwoScale,
    SampleMean,
    Scale,
    ScaleFormat,
)

E2M1 = Minifloat(exponent=2, mantissa=1, top="finite")
# The elements of OCP's Microscaling formats with the exponent of their largest number.
MX: list[tuple[Minifloat, Any, int]] = [
    (Minifloat(exponent=5, mantissa=2), ml_dtypes.float8_e5m2, 15),
    (Minifloat(exponent=4, mantissa=3, top="nan"), ml_dtypes.float8_e4m3fn, 8),
    (Minifloat(exponent=3, mantissa=2, top="finite"), ml_dtypes.float6_e3m2fn, 4),
    (Minifloat(exponent=2, mantissa=3, top="finite"), ml_dtypes.float6_e2m3fn, 2),
    (E2M1, ml_dtypes.float4_e2m1fn, 2),
]
FORMATS: list[ScaleFormat] = [
    Float32(),
    PowerOfTwoScale(),
    PowerOfTwoScale(direction="floor"),
    E4M3(),
    IntegerScale(bits=2),
    IntegerScale(bits=8),
    IntegerScale(bits=16),
]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: str(f) or f.kind)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def edges(values: Tensor) -> Tensor:
    """Numbers with their two neighbours in float32."""
    return torch.cat([values, torch.nextafter(values, 2 * values), torch.nextafter(values, 0 * values)])


def of_spans(fmt: ScaleFormat, spans: Tensor, levels: float) -> Tensor:
    """The scales of spans, each alone in its tensor."""
    return torch.cat([Scale(format=fmt).step(span[None], levels) for span in spans])


class TestPowersOfTwo:
    """Scales that are powers of two."""

    @pytest.mark.parametrize("levels", [1.0, 6.0, 7.5, 28.0, 127.0, 255.0, 448.0, 57344.0])
    def test_up_is_the_smallest_that_clips_nothing(self, levels: float) -> None:
        """In rational numbers, at the ends of binades, beside them and between."""
        powers = 2.0 ** torch.arange(-100, 100, dtype=torch.float64).float()
        spans = torch.cat([edges(powers), edges(powers * levels), randn(500).abs() * 10])
        spans = spans[(spans > 2.0**-99) & spans.isfinite()]

        scales = PowerOfTwoScale().rounded(spans / levels, spans, levels)

        for scale, span in zip(scales.tolist(), spans.tolist(), strict=True):
            assert math.frexp(scale)[0] == 0.5
            assert Fraction(scale) * Fraction(levels) >= Fraction(span) > Fraction(scale) / 2 * Fraction(levels)

    @pytest.mark.parametrize(("element", "highest"), [(e, high) for e, _, high in MX], ids=[str(e) for e, *_ in MX])
    def test_floor_is_the_exponent_of_ocp(self, element: Minifloat, highest: int) -> None:
        """``2**(floor(log2 max|x|) - emax)``, exact also at ``nextafter(2**k, 0)``, where float32 logarithms err."""
        spans = edges(2.0 ** torch.arange(-90, 100, dtype=torch.float64).float())
        wide = [math.frexp(v)[1] - 1 - highest for v in spans.tolist()]

        scales = PowerOfTwoScale(direction="floor").rounded(spans / element.largest, spans, element.largest)

        assert scales.tolist() == [2.0**e for e in wide]
        assert len(set(wide)) == 191

    def test_the_integers_of_ocp_have_the_exponent_of_their_range(self) -> None:
        """Its 8-bit integers are k/64: steps of ``2**(floor(log2 max|x|) - 6)``."""
        spans = torch.tensor([1.0, 1.99, 2.0, 127.0, 128.0])

        assert of_spans(PowerOfTwoScale(direction="floor"), spans, 127.0).tolist() == [2.0**-6, 2.0**-6, 2.0**-5, 1, 2]

    @pytest.mark.parametrize(("element", "dtype", "highest"), MX, ids=[str(e) for e, *_ in MX])
    def test_blocks_are_those_of_the_microscaling_formats(self, element: Minifloat, dtype: Any, highest: int) -> None:
        """Each block of 32: the exponent by extraction, elements by ml_dtypes, larger ones the largest."""
        x = randn(6, 64) * torch.logspace(-4, 4, 6)[:, None]
        scale = Scale(granularity="block", block=32, format=PowerOfTwoScale(direction="floor"))

        values = quantize(x, Format(element=element, scale=scale), axis=1).values

        rows = x.reshape(-1, 32)
        most = rows.abs().amax(1, keepdim=True)
        unit = torch.tensor([[2.0 ** (math.frexp(m)[1] - 1 - highest)] for m in most.flatten().tolist()])
        clamped = (rows / unit).clamp(-element.largest, element.largest)
        wanted = torch.from_numpy(clamped.numpy().astype(dtype).astype(np.float32)) * unit
        assert torch.equal(values, wanted.reshape(x.shape))
        assert bool((rows / unit).abs().max() > element.largest)

    @pytest.mark.parametrize(
        ("span", "scale"),
        [(2.0**-118, 2.0**-126), (2.0**-119, 2.0**-127), (2.0**-125, 2.0**-127), (2.0**135, 2.0**127)],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_floor_has_the_range_of_e8m0(self, span: float, scale: float, dtype: torch.dtype) -> None:
        """For numbers up to 448 = 1.75 2**8: 2**-127 is the smallest scale of OCP, 2**127 the largest."""
        spans = torch.tensor([span], dtype=torch.float64).to(dtype)
        expected = scale if spans.isfinite() else math.inf

        found = PowerOfTwoScale(direction="floor").rounded(spans / 448, spans, 448.0)

        assert found.tolist() == [expected]

    def test_beyond_e8m0_a_floor_is_nan(self) -> None:
        """float64 has values whose exponent E8M0 lacks; its code for them is nan."""
        spans = torch.tensor([2.0**136], dtype=torch.float64)

        assert PowerOfTwoScale(direction="floor").rounded(spans / 448, spans, 448.0).isnan().all()
        assert PowerOfTwoScale().rounded(spans / 448, spans, 448.0).isfinite().all()

    def test_up_clips_nothing_where_floor_does(self) -> None:
        """A block whose largest value is just below a power of two: the loss of a quarter is OCP's, not of ``"up"``."""
        x = torch.tensor([7.99, 1.0])

        up, floor = (
            quantize(x, Format(element=E2M1, scale=Scale(format=PowerOfTwoScale(direction=d)))).values[0].item()
            for d in ("up", "floor")
        )
        assert (up, floor) == (8, 6)

    def test_a_scale_in_float64_stays_exact_down_to_the_smallest(self) -> None:
        """No exponent of a float64 gives anything but a power of two."""
        spans = torch.tensor([5e-324, 1e-310, 3e-308, 1e-300], dtype=torch.float64)

        scales = PowerOfTwoScale().rounded(spans, spans, 1.0)

        assert all(math.frexp(s)[0] == 0.5 for s in scales.tolist())
        assert (scales >= spans).all()


class TestE4M3:
    """Scales of 8-bit floats under one scale of the tensor."""

    def test_blocks_are_those_of_nvfp4(self) -> None:
        """``s_g = amax / (448 * 6)``, ``s_b = E4M3(blockmax / 6 / s_g)``, ``x^ = E2M1(x / (s_b s_g)) s_b s_g``."""
        x = randn(8, 64) * torch.logspace(-1, 1, 8)[:, None]
        fmt = Format(element=E2M1, scale=Scale(granularity="block", block=16, format=E4M3()))

        values = quantize(x, fmt, axis=1).values

        rows = x.double().reshape(-1, 16)
        whole = rows.abs().max() / (448 * 6)
        wanted = rows.abs().amax(1, keepdim=True) / 6 / whole
        block = torch.from_numpy(wanted.float().numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float64))
        codes = (rows / (block * whole)).clamp(-6, 6).float()
        expected = torch.from_numpy(codes.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float64)) * block * whole
        torch.testing.assert_close(values.double(), expected.reshape(x.shape), rtol=1e-6, atol=0)
        assert block.unique().numel() > 10

    def test_square_blocks_agree_with_those_of_the_transpose(self) -> None:
        """Why NVFP4's weights have squares: W and W^T have the same numbers."""
        w = randn(32, 48)
        fmt = Format(element=E2M1, scale=Scale(granularity="square", block=16, format=E4M3()))

        values = quantize(w, fmt).values

        assert torch.equal(values, quantize(w.t(), fmt).values.t())
        assert not torch.equal(values, w)

    def test_a_block_far_below_the_largest_keeps_the_smallest_scale(self) -> None:
        """Its scale does not become 0, nor the 1 that a zero scale becomes."""
        x = torch.tensor([448.0 * 6, 6e-6])
        fmt = Format(element=E2M1, scale=Scale(granularity="block", block=1, format=E4M3()))

        scale = quantize(x, fmt, axis=0).grid.steps.scale.flatten()  # type: ignore[union-attr]  # it has a grid

        assert scale.tolist() == pytest.approx([448, 2**-9], rel=1e-6)

    @pytest.mark.parametrize("value", [math.inf, math.nan])
    def test_a_value_that_is_not_finite_spoils_the_tensor(self, value: float) -> None:
        """All blocks with values share its scale."""
        x = torch.ones(64)
        x[40] = value
        fmt = Format(element=E2M1, scale=Scale(granularity="block", block=16, format=E4M3()))

        assert quantize(x, fmt, axis=0).values.isnan().all()


class TestIntegers:
    """Scales that are whole multiples of one."""

    @pytest.mark.parametrize("bits", [2, 4, 8, 16])
    def test_they_are_multiples_that_clip_nothing(self, bits: int) -> None:
        """Of ``M / (2**bits - 1)``, the smallest that is not below the scale, and the largest is M."""
        spans = randn(300).abs() * torch.logspace(-3, 0, 300)
        unit = spans.double().max() / (2**bits - 1)

        scales = IntegerScale(bits=bits).rounded(spans, spans, 1.0).double()

        counts = scales / unit
        assert (counts - counts.round()).abs().max() < 1e-2 * 2 ** (bits - 8) + 1e-4
        assert (scales >= spans.double() * (1 - 1e-6)).all()
        assert (scales < spans.double() + unit * (1 + 1e-6)).all()
        assert scales.max().item() == pytest.approx(spans.max().item(), rel=1e-6)

    @pytest.mark.parametrize("bits", [1, 17, 8.0])
    def test_other_widths_are_refused(self, bits: Any) -> None:
        """2 to 16 bits."""
        with pytest.raises(UsageError, match=f"bits={bits}"):
            IntegerScale(bits=bits)


class TestAllFormats:
    """What the formats of scales do alike."""

    @every_format
    def test_a_zero_block_stays_and_leaves_the_others(self, fmt: ScaleFormat) -> None:
        """Its scale is 1; the blocks beside it are as without it."""
        x = randn(3, 16)
        x[1] = 0
        scale = Scale(granularity="block", block=16, format=fmt)

        found = quantize(x, Format(element=E2M1, scale=scale), axis=1)

        assert torch.equal(found.values[1], torch.zeros(16))
        assert found.grid is not None
        assert found.grid.steps.scale.flatten()[1] == 1
        alone = quantize(x[::2], Format(element=E2M1, scale=scale), axis=1).values
        assert torch.equal(found.values[::2], alone)
        assert alone.any()

    @every_format
    @pytest.mark.parametrize("element", [E2M1, Integer(bits=8, zero="integer"), PowerOfTwo(bits=3)], ids=str)
    @pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), ()])
    def test_zeros_and_empty_tensors_return_themselves(
        self, fmt: ScaleFormat, element: Element, shape: tuple[int, ...]
    ) -> None:
        """Nothing is divided by zero."""
        x = torch.zeros(shape)

        assert torch.equal(quantize(x, Format(element=element, scale=Scale(format=fmt))).values, x)

    @every_format
    @pytest.mark.parametrize("levels", [6.0, 127.0])
    def test_a_scale_is_near_what_was_asked_for(self, fmt: ScaleFormat, levels: float) -> None:
        """From half of it to twice it, or to a third of the largest, the smallest multiple of two bits."""
        spans = randn(100).abs() + 0.1

        scales, asked = Scale(format=fmt).step(spans, levels), spans / levels

        assert (scales > asked / 2).all()
        assert (scales <= torch.maximum(2 * asked, asked.max() / 3 * (1 + 1e-6))).all()

    @every_format
    def test_a_tensor_of_levels_is_a_number_of_levels(self, fmt: ScaleFormat) -> None:
        """Both give the same."""
        spans = randn(20).abs()

        assert torch.equal(Scale(format=fmt).step(spans, torch.tensor(7.0)), Scale(format=fmt).step(spans, 7.0))

    @every_format
    @pytest.mark.parametrize("size", [2.0**-60, 2.0**50])
    def test_no_size_is_special(self, fmt: ScaleFormat, size: float) -> None:
        """Times a power of two a tensor gives the values times that power, bit for bit."""
        x = randn(4, 16)
        scaled = Format(element=E2M1, scale=Scale(granularity="block", block=8, format=fmt))

        assert torch.equal(quantize(x * size, scaled, axis=1).values, quantize(x, scaled, axis=1).values * size)

    @every_format
    def test_float64_stays_float64(self, fmt: ScaleFormat) -> None:
        """Scales have the dtype of the values."""
        codes = encode(randn(32).double(), Format(element=E2M1, scale=Scale(format=fmt)))

        assert codes.steps is not None
        assert codes.steps.scale.dtype == codes.dequantize().dtype == torch.float64

    @every_format
    def test_what_is_not_finite_is_no_scale(self, fmt: ScaleFormat) -> None:
        """An inf or nan does not become a number."""
        for bad in (math.inf, math.nan):
            assert not of_spans(fmt, torch.tensor([bad]), 7.0).isfinite().any()

    @pytest.mark.parametrize("fmt", FORMATS[1:], ids=str)
    def test_a_floor_belongs_to_float32(self, fmt: ScaleFormat) -> None:
        """Elsewhere it would be a scale that the format lacks."""
        with pytest.raises(UsageError, match=f"floor=1e-08 with format='{fmt.kind}'.*Leave the floor out"):
            Scale(format=fmt, floor=1e-8)

    @pytest.mark.parametrize(
        ("fmt", "text"),
        [
            (Float32(), ""),
            (PowerOfTwoScale(), "power-of-two scale"),
            (PowerOfTwoScale(direction="floor"), "power-of-two scale rounded down"),
            (E4M3(), "e4m3 scale"),
            (IntegerScale(bits=8), "8-bit scale"),
        ],
    )
    def test_a_format_says_what_it_is(self, fmt: ScaleFormat, text: str) -> None:
        """float32 goes without saying."""
        assert str(fmt) == text


class TestRanges:
    """How lo and hi are measured."""

    @pytest.mark.parametrize("dims", [(0,), (1,), (0, 1), (0, 2), ()])
    def test_a_constant_range_is_that_of_every_slice(self, dims: tuple[int, ...]) -> None:
        """In the shape that broadcasts, and nan for the slices with a value that is not finite only."""
        x = randn(2, 3, 4)
        x[1, 2, 0] = math.inf
        shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
        bad = x.isinf().amax(dims, keepdim=True) if dims else x.isinf()

        lo, hi = Constant(low=-1, high=2).extremes(x, dims)

        assert lo.shape == hi.shape == torch.Size(shape)
        assert lo.dtype == x.dtype
        assert torch.equal(lo.isnan(), bad)
        assert (lo[~bad] == -1).all()
        assert (hi[~bad] == 2).all()

    def test_values_beyond_a_constant_range_go_to_its_ends(self) -> None:
        """The grid does not follow the values."""
        x = torch.tensor([-9.0, -0.4, 0.0, 0.4, 5.0])

        values = quantize(x, integer(bits=2, zero="offset", range=Constant(low=-1.0, high=1.0))).values

        torch.testing.assert_close(values, torch.tensor([-1, -1 / 3, 1 / 3, 1 / 3, 1]), rtol=1e-6, atol=0)

    def test_a_mean_of_extremes_is_over_samples(self) -> None:
        """Of samples of enough values; of fewer the tensor's extremes count, which for samples of a size is minmax."""
        x = torch.tensor([[0.0, 1.0], [-4.0, 3.0]])

        lo, hi = SampleMean().extremes(x, (0, 1))

        assert (lo.item(), hi.item()) == (-2, 2)
        assert [t.item() for t in SampleMean(fewest=3).extremes(x, (0, 1))] == [-4, 3]
        assert SampleMean(fewest=3).applied(2) == MinMax()
        assert SampleMean(fewest=3).applied(3) == SampleMean(fewest=3)

    @pytest.mark.parametrize(("low", "high"), [(1, 1), (2, 1), (-math.inf, 1), (0, math.nan), (-1e300, 1)])
    def test_a_range_has_two_ends_in_float32(self, low: float, high: float) -> None:
        """In their order."""
        with pytest.raises(UsageError, match=r"give two finite ends in float32, the lower one first"):
            Constant(low=low, high=high)

    def test_kinds_are_different(self) -> None:
        """A kind in TOML stands for one class."""
        for classes in (RANGE_RULES, SCALE_FORMATS):
            assert len({cls.kind for cls in classes}) == len(classes)


class TestScale:
    """The table of a scale."""

    @pytest.mark.parametrize("floor", [1e-50, 2.0**-127, -1.0, 1e39, math.inf, math.nan])
    def test_a_floor_is_a_number_of_float32(self, floor: float) -> None:
        """A smaller one would be 0 there, by which zeros would be divided."""
        with pytest.raises(UsageError, match=r"floor="):
            Scale(floor=floor)

    def test_the_smallest_floor_divides_zeros(self) -> None:
        """Zeros give zeros."""
        assert quantize(torch.zeros(3), integer(bits=8, zero="symmetric", floor=2.0**-126)).values.tolist() == [0] * 3

    @pytest.mark.parametrize(
        ("scale", "text"),
        [
            (Scale(), "tensor"),
            (Scale(granularity="kept-channel"), "kept-channel"),
            (Scale(granularity="block", block=16, format=E4M3()), "block 16, e4m3 scale"),
            (Scale(granularity="square", block=32), "blocks of 32 x 32"),
            (Scale(range=Constant(low=-1, high=1.5)), "tensor, range -1 to 1.5"),
            (
                Scale(range=SampleMean(fewest=8), format=PowerOfTwoScale()),
                "tensor, sample-mean from 8 values, power-of-two scale",
            ),
        ],
    )
    def test_a_scale_says_what_it_is(self, scale: Scale, text: str) -> None:
        """What goes without saying is left out."""
        assert str(scale) == text
