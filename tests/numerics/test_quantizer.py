import math
from fractions import Fraction

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat.formats import format_info_bfloat16, format_info_ocp_int8
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit.numerics.element import Element, Steps, Zero
from lowbit.numerics.elements import FixedPoint, Integer, Minifloat, PowerOfTwo
from lowbit.numerics.formats import BF16, FP32, Format, Rounding, integer, largest_code
from lowbit.numerics.quantizer import Codes, encode, quantize
from lowbit.numerics.rounding import CounterNoise, step_key
from lowbit.numerics.scales import E4M3, Granularity, IntegerScale, PowerOfTwoScale, Scale, ScaleFormat
from lowbit.numerics.transforms import Hadamard

ZEROS: list[Zero] = ["symmetric", "integer", "offset"]
BITS = range(2, 9)
STEP = 0.125


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _noise(x: Tensor, seed: int = 0) -> Tensor:
    return torch.rand(x.shape, generator=torch.Generator().manual_seed(seed + 1000))


def _rounded(x: Tensor, fmt: Format, **kwargs: object) -> Tensor:
    """Values of a format, with noise where it needs some."""
    noise = _noise(x) if fmt.stochastic else None
    return quantize(x, fmt, noise=noise, **kwargs).values


def _all_codes(bits: int, zero: Zero, point: int) -> tuple[Tensor, Tensor]:
    """Every code of a format and, by its definition with step 1/8, the value that it stands for.

    `point` is the integer zero point; with a float offset the values start at -point / 4.
    """
    fmt = integer(bits=bits, zero=zero)
    low, high = fmt.code_range
    q = torch.arange(low, high + 1).float()
    if zero == "symmetric":
        return q, q * STEP
    return q, (q - point) * STEP if zero == "integer" else q * STEP - point / 4


GRIDS = [
    (bits, zero, point)
    for zero in ZEROS
    for bits in BITS
    for point in ([0] if zero == "symmetric" else [0, 1, 2 ** (bits - 1), 2**bits - 1])
]


class TestGrid:
    """Every code of every grid of 8 bits or fewer."""

    @pytest.mark.parametrize(("bits", "zero", "point"), GRIDS)
    def test_every_code_stands_for_its_value(self, bits: int, zero: Zero, point: int) -> None:
        """Values by the definition encode to their codes, and these decode to the values, without any error."""
        q, x = _all_codes(bits, zero, point)

        codes = encode(x, integer(bits=bits, zero=zero))

        assert torch.equal(codes.q, q)
        assert torch.equal(codes.dequantize(), x)
        assert codes.steps.scale.item() == STEP

    @pytest.mark.parametrize(("bits", "zero", "point"), GRIDS)
    def test_noise_does_not_move_a_value_on_the_grid(self, bits: int, zero: Zero, point: int) -> None:
        """Stochastic rounding keeps every code, whatever the noise."""
        q, x = _all_codes(bits, zero, point)
        fmt = integer(bits=bits, zero=zero, rounding="stochastic")

        for u in (0.0, 0.5, 1 - 2**-24):
            assert torch.equal(encode(x, fmt, noise=torch.full_like(x, u)).q, q)

    @pytest.mark.parametrize(("bits", "zero", "point"), GRIDS)
    def test_the_midpoint_of_two_codes_goes_to_the_even_one(self, bits: int, zero: Zero, point: int) -> None:
        """Halves go to the even multiple of the step: of x itself where zero is on the grid, else of x - lo."""
        q, x = _all_codes(bits, zero, point)
        middle = (x[:-1] + x[1:]) / 2
        origin = x[0].item() if zero == "offset" else 0.0

        values = _rounded(torch.cat([middle, x[:1], x[-1:]]), integer(bits=bits, zero=zero))[:-2]

        assert torch.equal(values, origin + 2 * STEP * ((middle - origin) / STEP / 2).round())
        assert q.numel() < 3 or not torch.equal(values, middle)

    @pytest.mark.parametrize(
        ("bits", "zero", "dtype"),
        [
            (2, "symmetric", ml_dtypes.int2),
            (4, "symmetric", ml_dtypes.int4),
            (8, "symmetric", np.int8),
            (2, "integer", ml_dtypes.uint2),
            (4, "offset", ml_dtypes.uint4),
            (8, "integer", np.uint8),
        ],
    )
    def test_codes_fit_integer_types(self, bits: int, zero: Zero, dtype: type) -> None:
        """Codes survive the integer type of that width; a symmetric one leaves out only its smallest value."""
        fmt = integer(bits=bits, zero=zero)
        info = ml_dtypes.iinfo(dtype)

        q = encode(_randn(4096), fmt).q.numpy()

        assert (q.astype(dtype).astype(np.float32) == q).all()
        assert fmt.code_range == (info.min + (zero == "symmetric"), info.max)
        assert q.max() == info.max

    def test_eight_symmetric_bits_are_the_mx_integers(self) -> None:
        """With scale 1/64 the values are those that gfloat decodes from 8 bits in OCP's MX, -2 left out."""
        patterns = [gfloat.decode_float(format_info_ocp_int8, i).fval for i in range(256)]
        expected = torch.tensor(sorted(set(patterns) - {-2.0}))

        values = encode(expected, integer(bits=8, zero="symmetric")).dequantize()

        assert torch.equal(values, expected)
        assert torch.equal(encode(expected, integer(bits=8, zero="symmetric")).q / 64, expected)

    @pytest.mark.parametrize("zero", ZEROS)
    @pytest.mark.parametrize("bits", [9, 12, 16])
    def test_wide_grids_hold_their_own_values(self, bits: int, zero: Zero) -> None:
        """Up to 16 bits a tensor on the grid stays, to float32 rounding of the largest value."""
        x = _rounded(_randn(5000), integer(bits=bits, zero=zero))

        again = _rounded(x, integer(bits=bits, zero=zero))

        torch.testing.assert_close(again, x, rtol=0, atol=4e-7 * x.abs().max().item())
        assert x.unique().numel() > 200

    @pytest.mark.parametrize("zero", ["offset"])
    def test_one_bit_is_lo_or_hi(self, zero: Zero) -> None:
        """With one bit and an offset every value becomes one of the extremes."""
        x = torch.tensor([-1.0, -0.2, 0.4, 0.6, 2.0])

        assert _rounded(x, integer(bits=1, zero=zero)).tolist() == [-1, -1, -1, 2, 2]


def _exact_code(x: Fraction, lo: Fraction, hi: Fraction, fmt: Format, u: Fraction | None) -> int:
    """One code by the definition, in rational numbers."""

    def rounded(t: Fraction) -> int:
        # `round` of a Fraction is half-to-even.
        return round(t) if u is None else math.floor(t) + (u < t - math.floor(t))

    low, high = fmt.code_range
    if fmt.zero == "symmetric":
        scale = max(-lo, hi) / high
        return min(max(rounded(x / scale), low), high)
    if fmt.zero == "integer":
        lo, hi = min(lo, Fraction(0)), max(hi, Fraction(0))
        scale = (hi - lo) / high
        point = min(max(round(-lo / scale), 0), high)
        return min(max(rounded(x / scale) + point, low), high)
    scale = (hi - lo) / high
    return rounded(min(max((x - lo) / scale, Fraction(0)), Fraction(high)))


class TestDefinition:
    """Codes of arbitrary tensors against the definition in rational numbers."""

    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    @pytest.mark.parametrize("zero", ZEROS)
    @given(
        bits=st.integers(2, 8),
        exponent=st.integers(-40, 20),
        bottom=st.integers(-300, 300),
        seed=st.integers(0, 1000),
    )
    @settings(deadline=None, max_examples=40)
    def test_codes_are_the_definition(
        self, zero: Zero, rounding: Rounding, bits: int, exponent: int, bottom: int, seed: int
    ) -> None:
        """Where the scale is a power of two nothing rounds but the codes, and all agree, ties and extremes included."""
        fmt = integer(bits=bits, zero=zero, rounding=rounding)
        high = fmt.code_range[1]
        generator = torch.Generator().manual_seed(seed)
        # Values in sixteenths of a step: the extremes pin the scale to exactly one step.
        lo, hi = (-high, high) if zero == "symmetric" else (bottom, bottom + high)
        if zero == "integer":
            lo, hi = (lo, hi) if lo <= 0 <= hi else (-high, 0)
        sixteenths = torch.randint(16 * lo, 16 * hi + 1, (40,), generator=generator)
        sixteenths = torch.cat([sixteenths, torch.tensor([16 * lo, 16 * hi])])
        x = sixteenths.float() * 2.0 ** (exponent - 4)
        u = torch.randint(0, 2**24, (42,), generator=generator).float() / 2**24

        q = encode(x, fmt, noise=u if fmt.stochastic else None).q

        exact = [Fraction(v) for v in x.tolist()]
        draws = [Fraction(v) if fmt.stochastic else None for v in u.tolist()]
        expected = [_exact_code(v, min(exact), max(exact), fmt, d) for v, d in zip(exact, draws, strict=True)]
        assert q.tolist() == expected

    @pytest.mark.parametrize("zero", ZEROS)
    @pytest.mark.parametrize("bits", BITS)
    def test_random_tensors_follow_the_definition(self, bits: int, zero: Zero) -> None:
        """Of 500 normal values none has another code than in rational numbers: none is within 1e-5 of a tie."""
        x = _randn(500, seed=bits)
        fmt = integer(bits=bits, zero=zero)
        exact = [Fraction(v) for v in x.tolist()]

        q = encode(x, fmt).q

        assert q.tolist() == [_exact_code(v, min(exact), max(exact), fmt, None) for v in exact]


class TestError:
    """How far values may move."""

    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    @pytest.mark.parametrize("zero", ZEROS)
    @given(bits=st.integers(2, 16), shift=st.floats(-8, 8), power=st.integers(-30, 30), seed=st.integers(0, 10**6))
    @settings(deadline=None, max_examples=30)
    def test_the_error_is_bounded_by_the_step(
        self, zero: Zero, rounding: Rounding, bits: int, shift: float, power: int, seed: int
    ) -> None:
        """|x - x_hat| <= S/2 with nearest and < S with stochastic rounding, and the grid has no more than its codes."""
        x = (_randn(300, seed=seed) + shift) * 2.0**power
        fmt = integer(bits=bits, zero=zero, rounding=rounding)

        codes = encode(x, fmt, noise=_noise(x, seed) if fmt.stochastic else None)
        error = (codes.dequantize().double() - x.double()).abs().max().item()

        # A few float32 roundings of the largest value that takes part.
        slack = 4e-7 * (x.abs().max() + codes.steps.scale * 2**bits).item()
        assert 0 < error <= codes.steps.scale.item() * (1 if fmt.stochastic else 0.5) + slack
        assert codes.q.unique().numel() <= fmt.code_range[1] - fmt.code_range[0] + 1
        assert codes.q.min() >= codes.steps.low
        assert codes.q.max() <= codes.steps.high

    @pytest.mark.parametrize("zero", ZEROS)
    def test_the_error_of_nearest_is_that_of_rounding(self, zero: Zero) -> None:
        """Of n = 100,000 normal values the mean square error is S**2/12 within 3 % (standard error 0.3 %)."""
        x = _randn(100_000)
        codes = encode(x, integer(bits=8, zero=zero))

        error = (codes.dequantize() - x).double().square().mean().item()

        assert abs(error / (codes.steps.scale.item() ** 2 / 12) - 1) < 0.03

    @pytest.mark.parametrize("zero", ZEROS)
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_stochastic_rounding_is_unbiased(self, bits: int, zero: Zero) -> None:
        """Each of 8 means of n = 100,000 draws is within 5 standard errors of x (false alarm < 1e-5)."""
        n = 100_000
        x = torch.tensor([-1.0, -0.77, -0.3, -0.01, 0.02, 0.4, 0.5, 1.0])
        # An odd zero point of the integer grid would lie between codes at the ends: ±1 is asked for inside them.
        observed = (torch.tensor([[-1.0]]), torch.tensor([[1.0 + (2 / (2**bits - 2) if zero == "integer" else 0)]]))
        fmt = integer(bits=bits, zero=zero, rounding="stochastic")
        noise = CounterNoise(key=step_key(0, torch.tensor(1)), layer="l").draw("output", "input", x.expand(n, 8))

        codes = encode(x.expand(n, 8), fmt, noise=noise, observed=observed)

        values, scale = codes.dequantize().double(), codes.steps.scale.item()
        assert ((values.mean(0) - x).abs() < 5 * scale * 0.5 / math.sqrt(n) + 1e-6).all()
        assert (values.std(0) > 0.05 * scale).sum() >= 4

    @pytest.mark.parametrize("zero", ZEROS)
    def test_nearest_keeps_the_order(self, zero: Zero) -> None:
        """Larger values never get smaller codes."""
        q = encode(_randn(5000).sort().values, integer(bits=6, zero=zero)).q

        assert (q.diff() >= 0).all()
        assert q.unique().numel() > 40

    def test_symmetric_codes_change_sign_with_the_tensor(self) -> None:
        """-x has the codes of x with the other sign."""
        x, fmt = _randn(1000), integer(bits=5, zero="symmetric")

        assert torch.equal(encode(-x, fmt).q, -encode(x, fmt).q)
        assert encode(x, fmt).q.abs().max() == 15


class TestZero:
    """Real zero."""

    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    @pytest.mark.parametrize("zero", ["symmetric", "integer"])
    @given(
        lo=st.floats(-1e6, 1e6, width=32),
        width=st.floats(0.0078125, 1e6, width=32),
        bits=st.integers(2, 16),
        seed=st.integers(0, 100),
    )
    @settings(deadline=None, max_examples=40)
    def test_a_true_zero_is_exact_for_every_range(
        self, zero: Zero, rounding: Rounding, lo: float, width: float, bits: int, seed: int
    ) -> None:
        """Zeros stay zero whatever range is used and whatever the noise, where other values do move."""
        x = torch.cat([torch.zeros(50), torch.tensor([lo + width / 3])])
        fmt = integer(bits=bits, zero=zero, rounding=rounding)

        values = quantize(
            x,
            fmt,
            noise=_noise(x, seed) if fmt.stochastic else None,
            observed=(torch.tensor([lo]), torch.tensor([lo + width])),
        ).values

        assert (values[:50] == 0).all()
        assert values.isfinite().all()

    def test_a_float_offset_has_no_true_zero(self) -> None:
        """With an offset zero is in general between two codes."""
        x = torch.tensor([-1.0, 0.0, 1.0])

        assert _rounded(x, integer(bits=2, zero="offset"))[1] != 0

    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    @pytest.mark.parametrize("floor", [0.0, 1e-8])
    @pytest.mark.parametrize("zero", ZEROS)
    def test_zeros_give_zeros(self, zero: Zero, floor: float, rounding: Rounding) -> None:
        """An all-zero tensor returns itself: nothing is divided by zero."""
        fmt = integer(bits=8, zero=zero, floor=floor, rounding=rounding)

        assert torch.equal(_rounded(torch.zeros(3, 4), fmt), torch.zeros(3, 4))

    @pytest.mark.parametrize("zero", ZEROS)
    def test_a_slice_of_zeros_does_not_change_the_others(self, zero: Zero) -> None:
        """Where one row is zero, it stays and the other is quantised as if alone."""
        x = torch.stack([torch.zeros(6), _randn(6)])
        fmt = integer(bits=3, zero=zero)

        values = _rounded(x, fmt, dims=(1,))

        assert torch.equal(values[0], torch.zeros(6))
        assert torch.equal(values[1], _rounded(x[1], fmt))
        assert not torch.equal(values[1], x[1])


class TestConstants:
    """Tensors whose elements are all alike."""

    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    @pytest.mark.parametrize("value", [3.3, -3.3, 1.0, -1e-30, 1e-32, 1e-12, -7e30, 1e38])
    @pytest.mark.parametrize("bits", [2, 5, 8, 16])
    @pytest.mark.parametrize("zero", ZEROS)
    def test_a_constant_returns_itself(self, zero: Zero, bits: int, value: float, rounding: Rounding) -> None:
        """From tiny to huge a constant comes back to one part in 2**22, and with an offset exactly."""
        x = torch.full((5, 3), value)

        values = _rounded(x, integer(bits=bits, zero=zero, rounding=rounding))

        torch.testing.assert_close(values, x, rtol=0 if zero == "offset" else 2**-22, atol=0)

    @pytest.mark.parametrize("value", [1e-45, 1e-42, -3e-39])
    def test_a_denormal_constant_returns_itself_with_an_offset(self, value: float) -> None:
        """Where the constant is the offset, it may be denormal."""
        x = torch.full((4,), value)

        assert torch.equal(_rounded(x, integer(bits=8, zero="offset")), x)

    @pytest.mark.parametrize("zero", ZEROS)
    def test_a_single_number_returns_itself(self, zero: Zero) -> None:
        """A tensor without axes is a constant."""
        values = _rounded(torch.tensor(-0.7), integer(bits=4, zero=zero))

        assert values.shape == ()
        torch.testing.assert_close(values, torch.tensor(-0.7), rtol=2**-22, atol=0)

    @pytest.mark.parametrize("zero", ZEROS)
    def test_elements_without_common_dims_return_themselves(self, zero: Zero) -> None:
        """Each element with a scale of its own is a constant."""
        x = _randn(3, 4)

        torch.testing.assert_close(_rounded(x, integer(bits=3, zero=zero), dims=()), x, rtol=2**-22, atol=0)

    def test_a_constant_under_the_floor_is_lost_where_zero_is_a_code(self) -> None:
        """The authors' floor of 1e-8 rounds a symmetric constant of 1e-12 to zero: why `sbm8` has no floor."""
        x = torch.full((4,), 1e-12)

        assert torch.equal(_rounded(x, integer(bits=8, zero="symmetric", floor=1e-8)), torch.zeros(4))
        assert _rounded(x, integer(bits=8, zero="symmetric"))[0] > 0.99e-12


class TestFloor:
    """The smallest scale."""

    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    @pytest.mark.parametrize("zero", ZEROS)
    @pytest.mark.parametrize("power", [-80, -40, 40])
    def test_without_a_floor_no_size_is_special(self, zero: Zero, rounding: Rounding, power: int) -> None:
        """A tensor times a power of two gives the values times that power, bit for bit, down to 1e-24."""
        x, fmt = _randn(500), integer(bits=8, zero=zero, rounding=rounding)

        values = _rounded(x * 2.0**power, fmt)

        assert torch.equal(values, _rounded(x, fmt) * 2.0**power)
        assert values.unique().numel() > 50

    @pytest.mark.parametrize("zero", ZEROS)
    def test_a_floor_is_the_smallest_scale(self, zero: Zero) -> None:
        """Below it the scale is the floor; above it the floor plays no part."""
        small, large = (integer(bits=8, zero=zero, floor=f) for f in (1e-8, 1e-12))
        x = _randn(100) * 1e-9

        assert encode(x, small).steps.scale.item() == pytest.approx(1e-8, rel=1e-6)
        assert torch.equal(encode(x, large).q, encode(x, integer(bits=8, zero=zero)).q)


class TestShapes:
    """Empty tensors, and what shares a scale."""

    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    @pytest.mark.parametrize("zero", ZEROS)
    @pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
    def test_an_empty_tensor_stays_empty(self, shape: tuple[int, ...], zero: Zero, rounding: Rounding) -> None:
        """No elements give no elements, of the same shape and dtype."""
        x = torch.empty(shape)
        for dims in (None, (0,), (len(shape) - 1,)):
            values = _rounded(x, integer(bits=8, zero=zero, rounding=rounding), dims=dims)

            assert values.shape == shape
            assert values.dtype == torch.float32

    @pytest.mark.parametrize("zero", ZEROS)
    @pytest.mark.parametrize(("dims", "kept"), [((1, 2), 0), ((0, 2), 1), ((0, 1), 2)])
    def test_each_slice_is_quantised_as_if_alone(self, dims: tuple[int, ...], kept: int, zero: Zero) -> None:
        """With dims that share a scale, every index of the kept dim is on its own."""
        x = _randn(4, 5, 6) * torch.logspace(-3, 3, 6)
        fmt = integer(bits=4, zero=zero)

        values = _rounded(x, fmt, dims=dims)

        alone = torch.stack([_rounded(part, fmt) for part in x.unbind(kept)], kept)
        assert torch.equal(values, alone)
        assert not torch.equal(values, _rounded(x, fmt))

    @pytest.mark.parametrize("zero", ZEROS)
    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    def test_layout_does_not_matter(self, zero: Zero, rounding: Rounding) -> None:
        """channels_last, transposed and strided tensors give the values of their contiguous copies."""
        fmt = integer(bits=4, zero=zero, rounding=rounding)
        base = _randn(4, 6, 5, 7)

        for x in (base.to(memory_format=torch.channels_last), base.transpose(1, 3), base[::2, 1::2]):
            assert torch.equal(_rounded(x, fmt, dims=(2, 3)), _rounded(x.contiguous(), fmt, dims=(2, 3)))

    def test_the_tensor_is_not_changed(self) -> None:
        """Quantisation writes to memory of its own."""
        x = _randn(100)
        copy = x.clone()

        for zero in ZEROS:
            _rounded(x, integer(bits=2, zero=zero))
        assert torch.equal(x, copy)

    @pytest.mark.parametrize("range_rule", ["minmax", "sample-mean"])
    def test_sample_means_clip_the_outlier(self, range_rule: str) -> None:
        """With sample-mean one sample's outlier is clipped to the mean of the extremes; with minmax it stays."""
        x = torch.cat([_randn(7, 20).clamp(-1, 1), torch.full((1, 20), 9.0)])
        fmt = integer(bits=8, zero="integer", range=range_rule)

        largest = _rounded(x, fmt).max().item()

        if range_rule == "minmax":
            assert largest > 8.9
        else:
            assert largest < 2.2

    def test_a_vector_has_no_samples(self) -> None:
        """In one axis sample-mean is minmax."""
        x, fmt = _randn(50), integer(bits=4, zero="integer")

        assert torch.equal(_rounded(x, fmt.replace(range="sample-mean")), _rounded(x, fmt))


class TestBlocks:
    """Scales of neighbouring elements along one axis."""

    @pytest.mark.parametrize("zero", ZEROS)
    @pytest.mark.parametrize("axis", [0, 1, 2, -1])
    @pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 100])
    def test_each_block_is_quantised_as_if_alone(self, size: int, axis: int, zero: Zero) -> None:
        """Blocks along the first, a middle or the last axis equal a loop over them; the last may be shorter."""
        x = _randn(5, 7, 6)
        fmt = integer(bits=3, zero=zero, granularity="block", block=size)
        single = integer(bits=3, zero=zero)

        values = _rounded(x, fmt, axis=axis)

        dim = axis % 3
        alone = torch.cat([_rounded(part, single, dims=(dim,)) for part in x.split(size, dim)], dim)
        assert values.shape == x.shape
        assert torch.equal(values, alone)
        if size > 2:
            assert not torch.equal(values, x)

    @pytest.mark.parametrize("axis", [0, 1])
    def test_noise_belongs_to_its_element(self, axis: int) -> None:
        """Stochastic blocks use the noise at each element's own index, also in a short last block."""
        x = _randn(5, 7)
        u = _noise(x)
        fmt = integer(bits=3, zero="symmetric", granularity="block", block=4, rounding="stochastic")
        single = fmt.replace(granularity="tensor", block=None)

        values = quantize(x, fmt, axis=axis, noise=u).values

        parts = zip(x.split(4, axis), u.split(4, axis), strict=True)
        alone = torch.cat([quantize(p, single, dims=(axis,), noise=n).values for p, n in parts], axis)
        assert torch.equal(values, alone)

    @pytest.mark.parametrize(("shape", "axis"), [((0,), 0), ((0, 3), 0), ((0, 3), 1), ((3, 0), 1), ((3, 0), 0)])
    def test_an_empty_tensor_has_no_blocks(self, shape: tuple[int, ...], axis: int) -> None:
        """No elements give no elements."""
        fmt = integer(bits=4, zero="offset", granularity="block", block=2)

        assert quantize(torch.empty(shape), fmt, axis=axis).values.shape == shape

    def test_an_inf_spoils_its_block_only(self) -> None:
        """The block of an inf is nan throughout, its neighbours are untouched."""
        x = torch.ones(9)
        x[4] = math.inf
        fmt = integer(bits=4, zero="symmetric", granularity="block", block=3)

        values = quantize(x, fmt, axis=0).values

        assert values.isnan().tolist() == [False] * 3 + [True] * 3 + [False] * 3

    @pytest.mark.parametrize(("granularity", "block", "axis"), [("block", 4, None), ("tensor", None, 0)])
    def test_an_axis_goes_with_blocks(self, granularity: Granularity, block: int | None, axis: int | None) -> None:
        """A missing axis and a needless one are errors."""
        fmt = integer(bits=4, zero="symmetric", granularity=granularity, block=block)

        with pytest.raises(ValueError, match="axis="):
            quantize(_randn(8), fmt, axis=axis)


def _tiles(x: Tensor, size: int) -> list[list[Tensor]]:
    """A matrix as rows of square blocks."""
    return [list(rows.split(size, -1)) for rows in x.split(size, -2)]


class TestSquares:
    """Scales of square blocks of matrices."""

    @pytest.mark.parametrize("shape", [(8, 12), (7, 10), (3, 5), (1, 1), (2, 7, 10)], ids=str)
    @pytest.mark.parametrize("size", [1, 3, 4, 100])
    @pytest.mark.parametrize("zero", ZEROS)
    def test_each_square_is_quantised_as_if_alone(self, zero: Zero, size: int, shape: tuple[int, ...]) -> None:
        """Whole and ragged ones equal a loop over them; leading axes have squares of their own."""
        x = _randn(*shape)
        fmt, single = (integer(bits=3, zero=zero, **f) for f in ({"granularity": "square", "block": size}, {}))

        values = _rounded(x, fmt)

        tiles = [[_rounded(t, single, dims=(-1, -2)) for t in row] for row in _tiles(x, size)]
        assert torch.equal(values, torch.cat([torch.cat(row, -1) for row in tiles], -2))
        assert size == 1 or x.numel() == 1 or not torch.equal(values, x)

    def test_noise_belongs_to_its_element(self) -> None:
        """Stochastic squares use the noise at each element's own index, also in ragged ones."""
        x, fmt = _randn(7, 10), integer(bits=3, zero="symmetric", granularity="square", block=4, rounding="stochastic")
        u, single = _noise(x), fmt.replace(granularity="tensor", block=None)

        values = quantize(x, fmt, noise=u).values

        tiles = zip(_tiles(x, 4), _tiles(u, 4), strict=True)
        alone = [[quantize(a, single, noise=b).values for a, b in zip(*rows, strict=True)] for rows in tiles]
        assert torch.equal(values, torch.cat([torch.cat(row, 1) for row in alone]))

    @pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 0, 4)])
    def test_an_empty_matrix_has_no_squares(self, shape: tuple[int, ...]) -> None:
        """No elements give no elements."""
        fmt = integer(bits=4, zero="offset", granularity="square", block=2)

        assert quantize(torch.empty(shape), fmt).values.shape == shape

    def test_an_inf_spoils_its_square_only(self) -> None:
        """Its neighbours are untouched."""
        x = torch.ones(6, 6)
        x[2, 3] = math.inf

        values = quantize(x, integer(bits=4, zero="symmetric", granularity="square", block=3)).values

        assert values.isnan().nonzero().tolist() == [[i, j] for i in range(3) for j in range(3, 6)]

    def test_a_vector_has_no_squares(self) -> None:
        """The error says so, with its shape."""
        with pytest.raises(ValueError, match=r"shape \(8,\) is not a matrix and has no square blocks"):
            quantize(_randn(8), integer(bits=4, zero="symmetric", granularity="square", block=2))

    def test_the_grid_is_the_one_that_the_values_lie_on(self) -> None:
        """Values over their scales are whole, in ragged squares too, and none is clipped."""
        x = _randn(7, 10)

        found = quantize(x, integer(bits=5, zero="symmetric", granularity="square", block=4))

        assert found.grid is not None
        q = found.grid.cut(found.values) / found.grid.steps.scale
        assert (q - q.round()).abs().max() < 1e-5
        assert found.grid.steps.scale.numel() == 2 * 3
        assert found.grid.clipped(x) == 0


class TestTransforms:
    """Values that are turned before they are rounded."""

    @pytest.mark.parametrize("axis", [0, 1, 2])
    @pytest.mark.parametrize("block", [None, 3, 4, 16])
    def test_a_ragged_axis_is_filled_turned_rounded_and_turned_back(self, axis: int, block: int | None) -> None:
        """Equal to the same steps by hand, with blocks of scales along the same axis or one scale."""
        x, hadamard = _randn(5, 7, 6), Hadamard(size=4)
        where = {} if block is None else {"granularity": "block", "block": block}
        fmt = integer(bits=4, zero="symmetric", transform=hadamard, **where)
        plain = fmt.replace(transform="none")

        values = quantize(x, fmt, axis=axis).values

        h = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
        rows = torch.nn.functional.pad(x.movedim(axis, -1), (0, -x.shape[axis] % 4))
        turned = (rows.unflatten(-1, (-1, 4)) @ h).flatten(-2)
        rounded = quantize(turned, plain, axis=None if block is None else -1).values
        back = (rounded.unflatten(-1, (-1, 4)) @ h).flatten(-2)[..., : x.shape[axis]].movedim(-1, axis)
        torch.testing.assert_close(values, back, rtol=0, atol=1e-5)
        assert values.shape == x.shape
        assert not torch.equal(values, quantize(x, plain, axis=None if block is None else axis).values)

    def test_noise_rounds_what_was_turned(self) -> None:
        """Unbiased: each mean of n = 20,000 draws is within 6 standard errors of x (false alarm < 1e-6)."""
        n, x = 20_000, _randn(6)
        fmt = integer(bits=3, zero="symmetric", granularity="row", transform=Hadamard(size=4), rounding="stochastic")
        noise = torch.rand(n, 6, generator=torch.Generator().manual_seed(3))

        found = quantize(x.expand(n, 6), fmt, dims=(1,), noise=noise)

        assert found.grid is not None
        step = found.grid.steps.scale.max().item()
        # A turned value has a standard deviation of at most half a step, and so has what is turned back.
        assert ((found.values.double().mean(0) - x).abs() < 6 * 0.5 * step / math.sqrt(n) + 1e-6).all()
        assert (found.values.std(0) > 0.05 * step).all()

    def test_its_grid_counts_what_was_turned(self) -> None:
        """Nothing is clipped in its own range; in half of it, something is."""
        x, fmt = _randn(8, 10), integer(bits=4, zero="symmetric", transform=Hadamard(size=8))

        grid = quantize(x, fmt).grid

        assert grid is not None
        assert grid.clipped(x) == 0
        assert 0 < grid.clipped(2 * x) < 0.5


ELEMENTS: list[tuple[Element, bool]] = [
    (Integer(bits=4, zero="symmetric"), True),
    (Integer(bits=4, zero="integer"), True),
    (Minifloat(exponent=4, mantissa=3, top="nan"), True),
    (Minifloat(exponent=2, mantissa=1, top="finite"), True),
    (Minifloat(exponent=5, mantissa=2), False),
    (FixedPoint(integer=2, fraction=5), False),
    (PowerOfTwo(bits=4), True),
]


class TestAllElements:
    """What does not depend on the element."""

    @pytest.mark.parametrize(("element", "scaled"), ELEMENTS, ids=[f"{e}{' scaled' * s}" for e, s in ELEMENTS])
    def test_layout_does_not_matter(self, element: Element, scaled: bool) -> None:
        """channels_last, transposed and strided tensors give the values of their contiguous copies."""
        fmt = Format(element=element, scale=Scale() if scaled else None, rounding="stochastic")
        base = _randn(4, 6, 5, 7)

        for x in (base.to(memory_format=torch.channels_last), base.transpose(1, 3), base[::2, 1::2]):
            assert torch.equal(_rounded(x, fmt, dims=(2, 3)), _rounded(x.contiguous(), fmt, dims=(2, 3)))

    @pytest.mark.parametrize(("element", "scaled"), ELEMENTS, ids=[f"{e}{' scaled' * s}" for e, s in ELEMENTS])
    @pytest.mark.parametrize(
        "form", [PowerOfTwoScale(), PowerOfTwoScale(direction="floor"), E4M3(), IntegerScale(bits=8)]
    )
    def test_what_was_rounded_stays(self, element: Element, scaled: bool, form: ScaleFormat) -> None:
        """Twice gives what once gave, in the scales of once."""
        x = _randn(6, 32)
        scale = Scale(granularity="block", block=16, format=form) if scaled else None
        fmt = Format(element=element, scale=scale)
        axis = 1 if scaled else None

        once = quantize(x, fmt, axis=axis)

        assert once.grid is not None
        steps, cut = once.grid.steps, once.grid.cut(once.values)
        again = Codes(element.codes(cut, steps, None), steps).dequantize()
        torch.testing.assert_close(again, cut, rtol=2**-22, atol=0)
        assert not torch.equal(once.values, x)


class TestNotFinite:
    """Infinities and nan."""

    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    @pytest.mark.parametrize("floor", [0.0, 1e-8])
    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    @pytest.mark.parametrize("zero", ZEROS)
    def test_it_surfaces_as_nan_throughout_its_slice(
        self, zero: Zero, value: float, floor: float, rounding: Rounding
    ) -> None:
        """A row with one inf or nan is nan throughout, and the other rows are as they were."""
        fmt = integer(bits=8, zero=zero, floor=floor, rounding=rounding)
        x = _randn(3, 8)
        clean = _rounded(x, fmt, dims=(1,))
        x[1, 5] = value

        values = _rounded(x, fmt, dims=(1,))

        assert values[1].isnan().all()
        assert torch.equal(values[::2], clean[::2])

    @pytest.mark.parametrize("zero", ZEROS)
    def test_opposite_infinities_do_not_cancel(self, zero: Zero) -> None:
        """An inf and -inf together are nan too."""
        x = torch.tensor([math.inf, -math.inf, 1.0, 0.0])

        assert _rounded(x, integer(bits=8, zero=zero)).isnan().all()

    @pytest.mark.parametrize("range_rule", ["minmax", "sample-mean"])
    def test_one_sample_spoils_the_tensor_that_shares_its_scale(self, range_rule: str) -> None:
        """Means over samples do not hide an inf."""
        x = _randn(4, 5)
        x[2, 2] = math.inf
        fmt = integer(bits=8, zero="integer", range=range_rule)

        assert _rounded(x, fmt).isnan().all()


class TestDtypes:
    """What can be quantised."""

    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.int32, torch.int8, torch.bool, torch.cfloat]
    )
    def test_other_dtypes_are_refused(self, dtype: torch.dtype) -> None:
        """Only float32 and float64 are; the error names the dtype."""
        with pytest.raises(TypeError, match=str(dtype)):
            quantize(torch.ones(3).to(dtype), integer(bits=8, zero="offset"))

    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    @pytest.mark.parametrize("zero", ZEROS)
    def test_float64_stays_float64(self, zero: Zero, rounding: Rounding) -> None:
        """The grid of a float64 tensor is computed in float64, and its codes are those of the same float32 tensor."""
        x = _randn(200)
        fmt = integer(bits=6, zero=zero, rounding=rounding)

        codes = encode(x.double(), fmt, noise=_noise(x) if fmt.stochastic else None)

        assert codes.dequantize().dtype == codes.steps.scale.dtype == torch.float64
        assert torch.equal(codes.q.float(), encode(x, fmt, noise=_noise(x) if fmt.stochastic else None).q)

    @pytest.mark.parametrize("zero", ZEROS)
    def test_noise_goes_with_stochastic_rounding(self, zero: Zero) -> None:
        """Missing noise and needless noise are errors."""
        x = _randn(4)

        with pytest.raises(ValueError, match="stochastic: noise is missing"):
            encode(x, integer(bits=8, zero=zero, rounding="stochastic"))
        with pytest.raises(ValueError, match="noise is given, but nothing rounds by it"):
            encode(x, integer(bits=8, zero=zero), noise=torch.zeros(4))


class TestLevels:
    """Widths that are not the format's own."""

    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("bits", range(2, 17))
    @pytest.mark.parametrize("zero", ZEROS)
    def test_levels_equal_the_format_with_those_bits(
        self, zero: Zero, bits: int, dtype: torch.dtype, rounding: Rounding
    ) -> None:
        """A tensor of bits gives bit for bit what the format of those bits gives, and not what its own give."""
        x = _randn(8, 32).to(dtype)
        fmt = integer(bits=7, zero=zero, rounding=rounding)

        values = _rounded(x, fmt, dims=(1,), levels=torch.tensor(largest_code(fmt, bits)))

        assert torch.equal(values, _rounded(x, fmt.replace(bits=bits), dims=(1,)))
        assert torch.equal(values, _rounded(x, fmt, dims=(1,))) == (bits == 7)

    @pytest.mark.parametrize("zero", ZEROS)
    def test_a_number_of_levels_is_as_good_as_a_tensor(self, zero: Zero) -> None:
        """Levels may be a number."""
        x, fmt = _randn(100), integer(bits=8, zero=zero)
        levels = torch.tensor(largest_code(fmt, 3))

        assert torch.equal(_rounded(x, fmt, levels=levels.item()), _rounded(x, fmt, levels=levels))

    @pytest.mark.parametrize("zero", ZEROS)
    @pytest.mark.parametrize("bits", range(2, 17))
    def test_levels_are_the_largest_code(self, bits: int, zero: Zero) -> None:
        """`largest_code` is the upper end of the code range of another width."""
        assert largest_code(integer(bits=5, zero=zero), bits) == Integer(bits=bits, zero=zero).code_range[1]

    def test_blocks_take_levels_too(self) -> None:
        """Blocks of other bits equal the block format with those bits."""
        x, fmt = _randn(3, 10), integer(bits=8, zero="symmetric", granularity="block", block=4)
        levels = torch.tensor(largest_code(fmt, 3))

        values = quantize(x, fmt, axis=1, levels=levels).values

        assert torch.equal(values, quantize(x, fmt.replace(bits=3), axis=1).values)


class TestObserved:
    """Ranges that do not come from the tensor."""

    @pytest.mark.parametrize("zero", ZEROS)
    def test_the_given_range_decides_the_grid(self, zero: Zero) -> None:
        """The scale is the given range's, and values beyond it go to the ends of the grid."""
        x = torch.tensor([-50.0, -0.3, 0.4, 50.0])

        codes = encode(x, integer(bits=8, zero=zero), observed=(torch.tensor([-1.0]), torch.tensor([1.0])))

        assert codes.steps.scale.item() == pytest.approx(1 / 127 if zero == "symmetric" else 2 / 255, rel=1e-6)
        assert [codes.q[0].item(), codes.q[3].item()] == [codes.steps.low, codes.steps.high]
        assert codes.dequantize().abs().max() < 1.01

    def test_observed_ranges_of_slices(self) -> None:
        """A range for each row is taken for that row."""
        x, fmt = _randn(2, 64), integer(bits=8, zero="symmetric")
        lo, hi = torch.tensor([[-1.0], [-4.0]]), torch.tensor([[1.0], [4.0]])

        values = quantize(x, fmt, dims=(1,), observed=(lo, hi)).values

        rows = [quantize(x[i], fmt, observed=(lo[i], hi[i])).values for i in range(2)]
        assert torch.equal(values, torch.stack(rows))
        assert not torch.equal(values[0], quantize(x[0], fmt, observed=(lo[1], hi[1])).values)

    def test_the_share_of_clipped_values_is_counted(self) -> None:
        """Values more than half a step outside the grid count as clipped."""
        x = torch.tensor([-9.0, -1.003, -1.0, 0.0, 1.0, 1.003, 9.0, 9.0])
        fmt = integer(bits=8, zero="symmetric")

        grid = quantize(x, fmt, observed=(torch.tensor([-1.0]), torch.tensor([1.0]))).grid

        assert grid is not None
        assert grid.clipped(x) == 3 / 8

    @pytest.mark.parametrize("zero", ZEROS)
    def test_nothing_is_clipped_in_the_tensors_own_range(self, zero: Zero) -> None:
        """The range of the tensor covers the tensor, to half a step at the end where zero is a code."""
        x = _randn(1000)
        grid = quantize(x, integer(bits=4, zero=zero)).grid

        assert grid is not None
        assert grid.clipped(x) == 0
        assert grid.clipped(2 * x) > 0

    @pytest.mark.parametrize(
        "scale",
        [PowerOfTwoScale(direction="floor"), PowerOfTwoScale(direction="nearest"), E4M3(), IntegerScale(bits=4)],
    )
    @pytest.mark.parametrize(
        "element", [Minifloat(exponent=2, mantissa=1, top="finite"), Integer(bits=4, zero="symmetric")], ids=str
    )
    def test_what_a_rounded_scale_leaves_out_is_not_clipped(self, element: Element, scale: ScaleFormat) -> None:
        """A third of blocks of one value lies beyond the grid of a scale rounded down, as the format says it must."""
        x = _randn(3000) * torch.logspace(-3, 3, 3000)
        scaled = Scale(granularity="block", block=1, format=scale)

        grid = quantize(x, Format(element=element, scale=scaled), axis=0).grid

        assert grid is not None
        assert grid.clipped(x) == 0
        assert grid.clipped(3 * x) > 0.1

    @pytest.mark.parametrize("zero", ZEROS)
    @pytest.mark.parametrize("layout", [(), (1,), (1, 2, 3), "block"], ids=str)
    def test_the_grid_is_the_one_that_the_values_lie_on(self, zero: Zero, layout: tuple[int, ...] | str) -> None:
        """Whichever pass made them, values are ``(q - zero) scale + offset`` of whole codes within the limits."""
        x = _randn(4, 6, 5, 3)
        blocks = layout == "block"
        fmt = integer(bits=5, zero=zero, **({"granularity": "block", "block": 4} if blocks else {}))
        dims = None if isinstance(layout, str) or not layout else layout

        found = quantize(x, fmt, dims=dims, axis=1 if blocks else None)

        grid = found.grid
        assert grid is not None
        steps = grid.steps
        offset, zeros = (0 if t is None else t for t in (steps.offset, steps.zero))
        q = (grid.cut(found.values) - offset) / steps.scale + zeros
        assert (q - q.round()).abs().max() < 1e-3
        assert float(steps.low) <= q.round().min() < q.round().max() <= float(steps.high)
        assert (steps.scale.numel() > 1) == (dims is not None or blocks)

    def test_the_share_under_the_floor_is_counted(self) -> None:
        """Of two rows the one whose range asks for less than the floor counts, and a row of equal values does not."""
        fmt = integer(bits=8, zero="offset", floor=1e-8)
        x = torch.stack([torch.linspace(0, 1, 4), torch.linspace(0, 1e-7, 4), torch.full((4,), 1e-7)])

        grid = quantize(x, fmt, dims=(1,)).grid

        assert grid is not None
        assert grid.floored(x) == pytest.approx(1 / 3)


class TestFloats:
    """Formats without a scale."""

    def test_every_bf16_pattern_stays(self) -> None:
        """All finite and infinite bf16 numbers are on the grid."""
        x = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()

        values = quantize(x, BF16).values

        assert torch.equal(values[~x.isnan()], x[~x.isnan()])
        assert torch.equal(values.isnan(), x.isnan())

    def test_bf16_rounds_like_ml_dtypes(self) -> None:
        """A million random float32 patterns round as in ml_dtypes, denormals and overflow included."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(-(2**31), 2**31, (10**6,), generator=generator).to(torch.int32).view(torch.float32)
        x = x[~x.isnan()]

        values = quantize(x, BF16).values

        with np.errstate(over="ignore"):
            expected = torch.from_numpy(x.numpy().astype(ml_dtypes.bfloat16).astype(np.float32))
        assert torch.equal(values, expected)
        assert (values != x).float().mean() > 0.99

    @given(st.floats(-1e6, 1e6, width=32))
    @settings(deadline=None, max_examples=100)
    def test_bf16_rounds_like_gfloat(self, value: float) -> None:
        """Single numbers round as gfloat's definition says."""
        assert quantize(torch.tensor(value), BF16).values.item() == gfloat.round_float(format_info_bfloat16, value)

    def test_bf16_halves_go_to_the_even_number(self) -> None:
        """1 + 2**-8 and 1 + 3 * 2**-8 lie halfway and go to 1 and 1 + 2**-6."""
        x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])

        assert quantize(x, BF16).values.tolist() == [1, 1 + 2**-6]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_fp32_leaves_values_as_they_are(self, dtype: torch.dtype) -> None:
        """float64 is not narrowed."""
        x = torch.full((3,), 1 / 3, dtype=dtype)

        assert torch.equal(quantize(x, FP32).values, x)
        assert quantize(x, FP32).values.dtype == dtype

    @pytest.mark.parametrize("fmt", [BF16, FP32])
    def test_they_have_no_grid(self, fmt: Format) -> None:
        """A float format has no scale, so nothing is clipped."""
        assert quantize(_randn(3), fmt).grid is None


def test_codes_of_all_kinds_decode_alike() -> None:
    """``x = (q - zero) scale + offset`` with what is None left out."""
    q, two, one = torch.tensor([0.0, 3.0]), torch.tensor(2.0), torch.tensor(1.0)

    assert Codes(q, Steps(scale=two, low=0, high=3)).dequantize().tolist() == [0, 6]
    assert Codes(q, Steps(scale=two, zero=one, low=0, high=3)).dequantize().tolist() == [-2, 4]
    assert Codes(q, Steps(scale=two, offset=one, low=0, high=3)).dequantize().tolist() == [1, 7]
    assert q.tolist() == [0, 3]


class TestRefused:
    """What quantize does not take."""

    def test_a_float_format_takes_no_noise(self) -> None:
        """Noise for bf16 would be ignored, so it is refused."""
        with pytest.raises(ValueError, match="noise is given"):
            quantize(_randn(4), BF16, noise=torch.rand(4))

    def test_a_float_format_refuses_whole_numbers(self) -> None:
        """Integers are no real tensor, for a float format either."""
        with pytest.raises(TypeError, match="int64"):
            quantize(torch.arange(4), BF16)

    def test_noise_of_another_shape_is_refused(self) -> None:
        """One draw for many elements would round them all alike."""
        fmt = integer(bits=8, zero="symmetric", rounding="stochastic")

        with pytest.raises(ValueError, match="shape"):
            quantize(_randn(4, 4), fmt, noise=torch.rand(1))

    def test_a_tensor_that_needs_a_gradient_is_refused(self) -> None:
        """Its gradient would be that of the scale, not the straight-through one."""
        with pytest.raises(ValueError, match="no gradient"):
            quantize(_randn(4).requires_grad_(), integer(bits=8, zero="symmetric"))

    @pytest.mark.parametrize("axis", [2, -3])
    def test_a_block_axis_that_does_not_exist_is_refused(self, axis: int) -> None:
        """An axis beyond the tensor does not wrap around."""
        with pytest.raises(ValueError, match="axis="):
            quantize(_randn(4, 4), integer(bits=8, zero="symmetric", granularity="block", block=2), axis=axis)
