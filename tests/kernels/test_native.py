"""The native passes over memory against their torch twins, bit for bit."""

import copy
import hashlib
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lowbit
from helpers import recipe_of, threads
from lowbit.engines import int8
from lowbit.kernels import cpu, native_instruction_sets
from lowbit.kernels.cpu import Codes, Grid
from lowbit.kernels.memory import View
from lowbit.numerics.element import Steps
from lowbit.numerics.elements import Integer
from lowbit.numerics.formats import Format, integer
from lowbit.numerics.quantizer import native_grid
from lowbit.numerics.rounding import uniform_noise
from lowbit.numerics.scales import Scale

pytestmark = pytest.mark.skipif(native_instruction_sets() is None, reason="this install lacks the native kernels")

# Around the widths of vectors, of the lanes of the extremes and of the runs that a pass works on.
LENGTHS = [1, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025]
KEY = (0x9E3779B9, 0xDEADBEEF)
DTYPES = [torch.float32, torch.bfloat16]
ZEROS = ["symmetric", "integer", "offset"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers of a generator of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_memory(x: Tensor, view: View) -> Tensor:
    """A tensor (outer, channels, inner) as memory of that view, flat."""
    return (x.transpose(1, 2) if view[3] else x).contiguous().flatten()


def grid_for(x: Tensor, zero: str, bits: int, per_channel: bool, key: tuple[int, int] | None) -> Grid:
    """A grid over the range of (outer, channels, inner), one for each channel or one for all."""
    dims = (0, 2) if per_channel else (0, 1, 2)
    lo, hi = x.float().amin(dims).reshape(-1), x.float().amax(dims).reshape(-1)
    element = Integer(bits=bits, zero=zero)
    return native_grid(element.steps(lo, hi, float(element.code_range[1]), Scale().step), key)


def rule_of(fmt: Format) -> dict[str, Any]:
    """What the native pass takes of a format."""
    assert fmt.scale is not None
    return {"symmetric": fmt.zero == "symmetric", "floor": fmt.scale.floor}


def twin_codes(x: Tensor, grid: Grid) -> Tensor:
    """Codes of (outer, channels, inner) by the definition."""
    x = x.float()
    noise = None if grid.key is None else uniform_noise(torch.tensor(grid.key), x.shape)
    scale = grid.scale.view(1, -1, 1)
    zero = None if grid.zero is None else grid.zero.view(1, -1, 1)
    name = "symmetric" if zero is None else "offset" if grid.offset else "integer"
    places = {"offset" if grid.offset else "zero": zero}
    steps = Steps(scale=scale, low=grid.low, high=grid.high, **places)
    return Integer(bits=8, zero=name).codes(x, steps, noise)


def twin_values(x: Tensor, grid: Grid) -> Tensor:
    """Values on the grid by the definition, in the dtype of x."""
    q, scale = twin_codes(x, grid), grid.scale.view(1, -1, 1)
    if grid.zero is None:
        return (q * scale).to(x.dtype)
    zero = grid.zero.view(1, -1, 1)
    return (q * scale + zero if grid.offset else (q - zero) * scale).to(x.dtype)


def check(x: Tensor, grid: Grid, view: View) -> None:
    """Codes (of 8 bits or fewer) and values of (outer, channels, inner) equal those of the twin."""
    memory = in_memory(x, view)
    values = cpu.fake_quantize(memory, view, grid)

    expected = in_memory(twin_values(x, grid), view)
    assert values.dtype == x.dtype
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    if grid.high <= 255:
        signed = grid.low < 0
        codes = cpu.encode(memory, view, grid, signed=signed)
        assert codes.dtype == (torch.int8 if signed else torch.uint8)
        assert torch.equal(codes.float(), in_memory(twin_codes(x, grid), view))


class TestExtremes:
    """Smallest and largest value of each channel."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("last", [False, True])
    @pytest.mark.parametrize("length", LENGTHS)
    def test_equal_the_twin(self, length: int, last: bool, dtype: torch.dtype) -> None:
        """One channel, several in one block and several in many blocks, at lengths around those of vectors."""
        for outer, channels in ((1, 1), (1, 3), (5, 3), (3, 1)):
            x = randn(outer, channels, length).to(dtype)
            view = (outer, channels, length, last)

            lo, hi = cpu.extremes(in_memory(x, view), view)

            assert torch.equal(lo, x.float().amin((0, 2)))
            assert torch.equal(hi, x.float().amax((0, 2)))

    @pytest.mark.parametrize("last", [False, True])
    @pytest.mark.parametrize("shape", [(1, 1, 200), (1, 3, 70), (4, 3, 70), (4, 3, 7), (4, 3, 1), (2, 70, 3)])
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_nan_and_inf_at_any_place(self, shape: tuple[int, int, int], last: bool, bad: float) -> None:
        """One such number anywhere shows in its own channel and in no other."""
        view = (*shape, last)
        count = math.prod(shape)
        for at in {0, 1, count // 2, count - 1}:
            x = randn(*shape)
            x.view(-1)[at] = bad

            lo, hi = cpu.extremes(in_memory(x, view), view)

            torch.testing.assert_close(lo, x.amin((0, 2)), rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(hi, x.amax((0, 2)), rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("shape", [(1, 1, 200_000), (700, 3, 90), (700, 90, 3), (70_000, 3, 1)])
    @pytest.mark.parametrize("last", [False, True])
    def test_two_threads_and_large_tensors(self, shape: tuple[int, int, int], last: bool) -> None:
        """What many tasks find is put together: the extremes sit in single places far apart."""
        view = (*shape, last)
        x = randn(*shape)
        x.view(-1)[math.prod(shape) - 1], x.view(-1)[math.prod(shape) // 2] = 99.0, -77.0
        with threads(2):
            lo, hi = cpu.extremes(in_memory(x, view), view)

        assert torch.equal(lo, x.amin((0, 2)))
        assert torch.equal(hi, x.amax((0, 2)))
        assert hi.max() == 99
        assert lo.min() == -77


class TestCodesAndValues:
    """`encode` and `fake_quantize`."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("zero", ZEROS)
    @pytest.mark.parametrize("length", LENGTHS)
    def test_lengths(self, length: int, zero: str, dtype: torch.dtype) -> None:
        """Every length around those of vectors, nearest and stochastic, one scale and one for each channel."""
        for (outer, channels), key, per_channel in itertools.product(((1, 1), (1, 3), (4, 2)), (None, KEY), (0, 1)):
            x = randn(outer, channels, length).to(dtype)
            check(x, grid_for(x, zero, 8, bool(per_channel), key), (outer, channels, length, False))
            check(x, grid_for(x, zero, 8, bool(per_channel), key), (outer, channels, length, True))

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_any_view_format_and_scale(self, data: st.DataObject) -> None:
        """Views, widths of 2 to 16 bits, zero kinds, rounding, dtypes and magnitudes from denormal to huge."""
        outer, channels = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 70))
        inner = data.draw(st.integers(1, 80))
        last, per_channel = data.draw(st.booleans()), data.draw(st.booleans())
        zero, bits = data.draw(st.sampled_from(ZEROS)), data.draw(st.integers(2, 16))
        key = data.draw(st.none() | st.tuples(*[st.integers(0, 2**32 - 1)] * 2))
        dtype = data.draw(st.sampled_from(DTYPES))
        power = data.draw(st.integers(-146, 124))
        shift = data.draw(st.sampled_from([0.0, 0.5, 3.0, -3.0]))
        x = ((randn(outer, channels, inner, seed=data.draw(st.integers(0, 99))) + shift) * 2.0**power).to(dtype)

        check(x, grid_for(x, zero, bits, per_channel, key), (outer, channels, inner, last))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bits", range(2, 9))
    @pytest.mark.parametrize("zero", ZEROS)
    def test_exact_halves_go_to_the_even_code(self, zero: str, bits: int, dtype: torch.dtype) -> None:
        """With a scale of 1 halves are exact: codes are the even neighbours, beyond the grid its ends."""
        top = 2 ** (bits - 1) - 1 if zero == "symmetric" else 2**bits - 1
        x = (torch.arange(-4 * top - 4, 4 * top + 5) / 2).view(1, 1, -1).to(dtype)
        offset = {"symmetric": None, "integer": torch.tensor([3.0]), "offset": torch.tensor([-2.0])}[zero]
        low = -float(top) if zero == "symmetric" else 0.0
        grid = Grid(scale=torch.ones(1), zero=offset, low=low, high=float(top), offset=zero == "offset")
        view = (1, 1, x.numel(), False)

        check(x, grid, view)
        q = cpu.encode(x.flatten(), view, grid, signed=zero == "symmetric").double()
        expected = (x.double().flatten() + (2.0 if zero == "offset" else 0)).clamp(low if zero == "offset" else -1e9)
        expected = expected.round() + (3.0 if zero == "integer" else 0)  # torch.round is to even
        assert torch.equal(q, expected.clamp(low, top))

    @pytest.mark.parametrize("key", [None, KEY])
    @pytest.mark.parametrize("zero", ZEROS)
    @pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-40, -1e30])
    def test_constants(self, value: float, zero: str, key: tuple[int, int] | None) -> None:
        """A constant gives itself to one rounding, zeros give zeros; nothing divides by zero."""
        x = torch.full((3, 2, 70), value)
        for per_channel in (False, True):
            grid, view = grid_for(x, zero, 8, per_channel, key), (3, 2, 70, False)

            check(x, grid, view)
            y = cpu.fake_quantize(x, view, grid)
            # A denormal scale has few digits of its own.
            assert (y - x).abs().max() <= max(abs(value) * 2.0**-22, 1024 * 2.0**-149 if value else 0)

    @pytest.mark.parametrize("last", [False, True])
    @pytest.mark.parametrize("zero", ZEROS)
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_range_that_is_not_finite(self, bad: float, zero: str, last: bool) -> None:
        """Values of a channel with an inf or nan are nan throughout, those of other channels are as ever."""
        x = randn(3, 4, 20)
        x[1, 2, 7] = bad
        view = (3, 4, 20, last)

        y = cpu.fake_quantize(in_memory(x, view), view, grid_for(x, zero, 8, True, None))

        y = y.view(3, 20, 4).transpose(1, 2) if last else y.view(3, 4, 20)
        assert y[:, 2].isnan().all()
        assert y[:, [0, 1, 3]].isfinite().all()

    @pytest.mark.parametrize("zero", ZEROS)
    @pytest.mark.parametrize("key", [None, KEY])
    def test_nan_in_a_finite_range_stays_nan(self, zero: str, key: tuple[int, int] | None) -> None:
        """A nan under a range that was given is nan in its own place and nowhere else."""
        x = randn(1, 1, 100)
        grid = grid_for(x, zero, 8, False, key)
        x[0, 0, 41] = math.nan

        y = cpu.fake_quantize(x, (1, 1, 100, False), grid)

        assert y.isnan().flatten().nonzero().tolist() == [[41]]

    @pytest.mark.parametrize("key", [None, KEY])
    @pytest.mark.parametrize("zero", ZEROS)
    @pytest.mark.parametrize("scale", [2.0**-140, 2.0**-59, 1e-12, 1e-3, 1.0, 2.0**19, 2.0**100])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_numbers_far_beyond_a_given_range(
        self, dtype: torch.dtype, scale: float, zero: str, key: tuple[int, int] | None
    ) -> None:
        """What a running range has never seen is clipped to its ends, also where x / S overflows."""
        far = torch.tensor([3e38, -3e38, 1e30, -1e30, 1e10, -1e10, 1e-45, -1e-45, math.inf, -math.inf, 0.0, -0.0])
        if key is not None:  # the twin's stochastic rounding has no fraction of an infinite quotient
            far = far[(far / scale).isfinite()]
        far = torch.cat([far, torch.tensor([300 * scale, -300 * scale])])
        x = far.repeat(3).view(1, 1, -1).to(dtype)
        offset = {"symmetric": None, "integer": torch.tensor([100.0]), "offset": torch.tensor([-50 * scale])}[zero]
        low, high = (-127.0, 127.0) if zero == "symmetric" else (0.0, 255.0)
        grid = Grid(scale=torch.tensor([scale]), zero=offset, low=low, high=high, offset=zero == "offset", key=key)

        check(x, grid, (1, 1, x.numel(), False))
        q = cpu.encode(x.flatten(), (1, 1, x.numel(), False), grid, signed=low < 0)
        assert (q[x.flatten() > 290 * scale] == high).all()
        assert (q[x.flatten() < -290 * scale] == low).all()

    def test_division_is_correctly_rounded(self) -> None:
        """Quotients within an ulp of a half give the codes of the correctly rounded quotient, 1.3 million times."""
        g = torch.Generator().manual_seed(1)
        for exponent in (-59, -30, -8, 0, 10, 19):
            scale = (1 + torch.rand(400, generator=g)) * 2.0**exponent
            scale[:2] = torch.tensor([1 + 2.0**-23, 2 - 2.0**-23]) * 2.0**exponent
            scale.clamp_(max=2.0**20 * (1 - 2.0**-24))
            half = torch.randint(-32767, 32767, (400, 181), generator=g) + 0.5
            x = scale[:, None] * half
            up, down = torch.nextafter(x, torch.tensor(math.inf)), torch.nextafter(x, torch.tensor(-math.inf))
            x = torch.cat([x, up, down], 1).unsqueeze(0)
            grid = Grid(scale=scale, zero=None, low=-32767.0, high=32767.0)
            view = (1, 400, 543, False)

            check(x, grid, view)
            # By one reciprocal the codes differ: the test sees what it is about.
            assert not torch.equal(twin_codes(x, grid), (x * (1 / scale)[:, None]).round().clamp(-32767, 32767))

    @pytest.mark.parametrize("key", [None, KEY])
    @pytest.mark.parametrize("zero", ["symmetric", "integer"])
    def test_codes_next_to_where_rounding_turns(self, zero: str, key: tuple[int, int] | None) -> None:
        """Quotients within an ulp, and within 1e-5 to 1e-3, of a half or of their noise have the definition's codes."""
        g = torch.Generator().manual_seed(2)
        whole = torch.randint(-120, 120, (64, 1000), generator=g)
        turn = torch.full(whole.shape, 0.5) if key is None else uniform_noise(torch.tensor(key), whole.shape)
        scale = (1 + torch.rand(64, 1, generator=g)) * 2.0 ** torch.randint(-50, 18, (64, 1), generator=g)
        point = None if zero == "symmetric" else torch.full((64,), 128.0)
        low, high = (-127.0, 127.0) if zero == "symmetric" else (0.0, 255.0)
        for away in (0.0, 1e-5, -1e-5, 1e-4, -1e-4, 1e-3):
            exact = scale * (whole + turn + away)
            for x in (exact, exact.nextafter(torch.tensor(math.inf)), exact.nextafter(torch.tensor(-math.inf))):
                check(
                    x.unsqueeze(0),
                    Grid(scale=scale.flatten(), zero=point, low=low, high=high, key=key),
                    (1, 64, 1000, False),
                )

    @pytest.mark.parametrize("per_channel", [False, True])
    @pytest.mark.parametrize("outer", [1, 3])
    @pytest.mark.parametrize("taps", [2, 9, 27, 64])
    @pytest.mark.parametrize("signed", [True, False])
    def test_taps_are_transposed(self, signed: bool, taps: int, outer: int, per_channel: bool) -> None:
        """Each record of (channels, taps) numbers comes out as (taps, channels), noise and scales going with them."""
        for channels, width in ((1, 1), (3, 1), (3, 5), (40, 3)):
            inner = taps * width
            record_is_channel = per_channel and channels > 1 and (outer == 1 or inner >= 64)
            if per_channel and channels > 1 and outer > 1 and inner < 64 and width > 1:
                continue  # such a record mixes channels and their inner numbers: never asked for
            x = randn(outer, channels, inner)
            grid = grid_for(x, "symmetric" if signed else "integer", 8, per_channel, KEY)
            view = (outer, channels, inner, False)

            q = cpu.encode(x, view, grid, signed=signed, taps=taps)

            plain = twin_codes(x, grid).view(-1, width if record_is_channel else channels * width, taps)
            assert torch.equal(q.float(), plain.transpose(1, 2).flatten())

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_one_thread_and_two(self, data: st.DataObject) -> None:
        """Codes do not depend on the number of threads, in tensors of several tasks."""
        outer, channels = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 90))
        inner = data.draw(st.integers(1, 60_000 // (outer * channels) + 1))
        view = (outer, channels, inner, data.draw(st.booleans()))
        x = randn(outer, channels, inner)
        grid = grid_for(x, data.draw(st.sampled_from(["symmetric", "integer"])), 8, data.draw(st.booleans()), KEY)
        memory = in_memory(x, view)
        codes = []
        for count in (1, 2):
            with threads(count):
                codes.append(cpu.encode(memory, view, grid, signed=grid.low < 0))

        assert torch.equal(*codes)
        assert torch.equal(codes[0].float(), in_memory(twin_codes(x, grid), view))

    def test_the_input_is_not_changed(self) -> None:
        """Both kernels write to memory of their own."""
        x = randn(2, 3, 50)
        before, grid = x.clone(), grid_for(x, "integer", 4, True, KEY)

        cpu.encode(x, (2, 3, 50, False), grid, signed=False)
        y = cpu.fake_quantize(x, (2, 3, 50, False), grid)

        assert torch.equal(x, before)
        assert not torch.equal(y, x)


def formats() -> dict[str, Format]:
    """Formats whose codes `quantize` makes, nearest: the views here say what shares a scale."""
    return {
        "symmetric": integer(bits=8, zero="symmetric"),
        "integer": integer(bits=8, zero="integer"),
        "floor": integer(bits=8, zero="integer", floor=0.5),
    }


class TestQuantize:
    """`quantize`: range, grid and codes in one call."""

    def check(
        self,
        x: Tensor,
        view: View,
        fmt: Format,
        *,
        samples: int | None,
        bits: int = 8,
        observed: tuple[Tensor, Tensor] | None = None,
        key: tuple[int, int] | None = None,
    ) -> None:
        """Codes, scales and zero point of (outer, channels, inner) are those of the definition, bit for bit."""
        levels = float(2 ** (bits - (fmt.zero == "symmetric")) - 1)
        memory = in_memory(x, view)

        q, scale, zero = cpu.quantize(
            memory,
            view,
            **rule_of(fmt),
            levels=levels,
            samples=samples,
            observed=observed,
            key=key,
        )

        if observed is not None:
            lo, hi = observed
        elif samples is None:
            lo, hi = x.float().amin((0, 2)), x.float().amax((0, 2))
        else:
            parts = memory.float().view(samples, -1)
            lo, hi = (v.double().mean().float() for v in (parts.amin(1), parts.amax(1)))
        steps = fmt.element.steps(lo.reshape(-1), hi.reshape(-1), levels, fmt.scale.step)
        expected, point, grid = steps.scale, steps.zero, native_grid(steps, key)
        assert q.dtype == (torch.int8 if fmt.zero == "symmetric" else torch.uint8)
        torch.testing.assert_close(scale, expected, rtol=0, atol=0, equal_nan=True)
        assert zero == (0 if point is None or not point.isfinite().all() else int(point))
        assert torch.equal(q.float(), in_memory(twin_codes(x, grid), view).nan_to_num(0.0))

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_equals_the_definition(self, data: st.DataObject) -> None:
        """Any view, width, rule, rounding, dtype and magnitude, one grid or, symmetric, one for each channel."""
        outer, channels = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40))
        inner = data.draw(st.integers(1, 80) | st.sampled_from([1023, 1024, 1025, 2500]))
        fmt = formats()[data.draw(st.sampled_from(["symmetric", "integer", "floor"]))]
        per_channel = fmt.zero == "symmetric" and data.draw(st.booleans())
        samples = None if per_channel else data.draw(st.sampled_from([1, outer]))
        key = data.draw(st.none() | st.just(KEY))
        x = randn(outer, channels, inner, seed=data.draw(st.integers(0, 99)))
        x = (x + data.draw(st.sampled_from([0.0, 3.0, -9.0]))) * 2.0 ** data.draw(st.integers(-146, 120))
        fmt = fmt.replace(rounding="stochastic" if key else "nearest")
        view = (outer, channels, inner, data.draw(st.booleans()))

        x = x.to(data.draw(st.sampled_from(DTYPES)))
        self.check(x, view, fmt, samples=samples, bits=data.draw(st.integers(2, 8)), key=key)

    @pytest.mark.parametrize("zero", ["symmetric", "integer", "floor"])
    def test_an_observed_range(self, zero: str) -> None:
        """It takes the place of the tensor's own, narrower or wider, on either side of zero; for one grid alone."""
        x, view = randn(2, 3, 70), (2, 3, 70, False)
        for lo, hi in ((-1.0, 0.5), (-9.0, 9.0), (0.5, 2.0), (-2.0, -0.5), (0.0, 0.0), (math.nan, 1.0)):
            self.check(x, view, formats()[zero], samples=1, observed=(torch.tensor([lo]), torch.tensor([hi])))
        with pytest.raises(ValueError, match="3 grids"):
            cpu.quantize(
                x,
                view,
                symmetric=zero == "symmetric",
                floor=0.0,
                levels=127,
                samples=None,
                observed=(torch.ones(1), torch.ones(1)),
            )

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_range_that_is_not_finite(self, bad: float) -> None:
        """The scale of its own row, or of the tensor, is not finite, and no other; the zero point is then 0."""
        x = randn(1, 4, 70)
        x[0, 2, 5] = bad

        _, scale, _ = cpu.quantize(x, (1, 4, 70, False), **rule_of(formats()["symmetric"]), levels=127, samples=None)
        _, one, zero = cpu.quantize(x, (1, 4, 70, False), **rule_of(formats()["integer"]), levels=255, samples=1)

        assert scale.isfinite().tolist() == [True, True, False, True]
        assert (one.isfinite().tolist(), zero) == ([False], 0)

    @pytest.mark.parametrize("samples", [1, 300, None])
    @pytest.mark.parametrize("key", [None, KEY])
    def test_one_thread_and_two(self, key: tuple[int, int] | None, samples: int | None) -> None:
        """The same codes and scales, in a tensor of many tasks."""
        x, fmt = randn(300, 1500), formats()["symmetric"]
        seen = []
        for count in (1, 2):
            with threads(count):
                seen.append(
                    cpu.quantize(x, (1, 300, 1500, False), **rule_of(fmt), levels=127, samples=samples, key=key)
                )

        assert torch.equal(seen[0][0], seen[1][0])
        assert torch.equal(seen[0][1], seen[1][1])

    @pytest.mark.parametrize("taps", [9, 70])
    def test_taps_are_transposed(self, taps: int) -> None:
        """Rows longer than a run come out as (taps, channels) each."""
        x, fmt = randn(5, 40 * taps), formats()["symmetric"]
        view = (1, 5, 40 * taps, False)

        plain, scale, _ = cpu.quantize(x, view, **rule_of(fmt), levels=127, samples=None)
        turned, again, _ = cpu.quantize(x, view, **rule_of(fmt), levels=127, samples=None, taps=taps)

        assert torch.equal(turned.view(5, taps, 40), plain.view(5, 40, taps).transpose(1, 2))
        assert torch.equal(scale, again)


class TestCodesOfChannels:
    """Passes over codes of rows by channels, which Range BN is made of."""

    @pytest.mark.parametrize("channels", [1, 3, 64, 65, 300])
    @pytest.mark.parametrize("starts", [[0, 2], [0, 2, 4, 7], [0, 100, 200, 300, 333], [0, 9000, 40_000]])
    def test_statistics(self, starts: list[int], channels: int) -> None:
        """Sums and first rows of the extremes of each chunk are exact, mean and sigma to 1e-6, on 1 thread and 2."""
        slopes = torch.linspace(0.1, 0.2, len(starts) - 1)
        for high in (2, 256):  # few codes: many ties
            q = torch.randint(0, high, (starts[-1], channels), generator=torch.Generator().manual_seed(channels))
            codes = Codes(q=q.to(torch.uint8).flatten(), scale=torch.tensor([0.3]), zero=7)
            seen = []
            for count in (1, 2):
                with threads(count):
                    seen.append(cpu.code_statistics(codes, channels, starts, slopes))

            parts = [q[a:b] for a, b in itertools.pairwise(starts)]
            spread = torch.stack([part.amax(0) - part.amin(0) for part in parts]) * codes.scale.double()
            for found in seen:
                for i, (part, first) in enumerate(zip(parts, starts, strict=False)):
                    assert torch.equal(found.argmax[i].long(), (part == part.amax(0)).int().argmax(0) + first)
                    assert torch.equal(found.argmin[i].long(), (part == part.amin(0)).int().argmax(0) + first)
                assert torch.equal(found.total, q.sum(0))
                mean = (q.double().mean(0) - 7) * codes.scale.double()
                torch.testing.assert_close(found.mean, mean.float(), rtol=1e-6, atol=0)
                torch.testing.assert_close(found.sigma, (spread * slopes[:, None]).sum(0).float(), rtol=1e-6, atol=0)
            assert torch.equal(seen[0].mean, seen[1].mean)
            assert torch.equal(seen[0].sigma, seen[1].sigma)

    @pytest.mark.parametrize("rows", [0, 1, 4095, 4097, 70_000])
    def test_sums_are_exact(self, rows: int) -> None:
        """Sums of the largest codes, and of their products, beyond 32 bits."""
        a = torch.full((rows, 3), 255, dtype=torch.uint8)
        b = a - torch.tensor([0, 1, 255], dtype=torch.uint8)

        total, product = cpu.code_sums(a, b, 3)
        alone, zeros = cpu.code_sums(a, None, 3)

        assert total.tolist() == alone.tolist() == [255 * rows] * 3
        assert product.tolist() == [255 * 255 * rows, 255 * 254 * rows, 0]
        assert zeros.tolist() == [0, 0, 0]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("channels", [1, 3, 1000, 1023, 1024, 1025, 2500])
    @pytest.mark.parametrize("rows", [1, 17, 400])
    def test_affine(self, rows: int, channels: int, dtype: torch.dtype) -> None:
        """``a q + b`` of each channel, bit for bit, rounded once more to bfloat16 where that is wanted."""
        q = torch.randint(0, 256, (rows, channels), generator=torch.Generator().manual_seed(rows)).to(torch.uint8)
        a, b, y = randn(channels), randn(channels, seed=1), torch.empty(rows, channels, dtype=dtype)

        cpu.affine(q, a, b, y)

        assert torch.equal(y, (q.float() * a + b).to(dtype))


class TestNoise:
    """The counter-based noise."""

    @pytest.mark.parametrize("count", [0, *LENGTHS, 32_767, 32_769, 100_003])
    def test_equals_the_twin(self, count: int) -> None:
        """Any number of elements and any words, all 32 bits of them."""
        for key in ((0, 0), KEY, (0xFFFFFFFF, 0xFFFFFFFF), (1, 0x80000000)):
            assert torch.equal(cpu.noise(count, key), uniform_noise(torch.tensor(key), (count,)))

    def test_one_thread_and_two(self) -> None:
        """The same field from one thread and from two."""
        fields = []
        for count in (1, 2):
            with threads(count):
                fields.append(cpu.noise(200_001, KEY))

        assert torch.equal(*fields)

    def test_fields_differ(self) -> None:
        """Either word alone changes the field."""
        field = cpu.noise(1000, KEY)

        for other in ((KEY[0] + 1, KEY[1]), (KEY[0], KEY[1] + 1)):
            assert (cpu.noise(1000, other) == field).float().mean() < 0.01


class TestSums:
    """Sums of columns."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("width", [1, 3, 64, 1025])
    @pytest.mark.parametrize("rows", [1, 63, 64, 65, 1000])
    def test_equal_those_in_float64(self, rows: int, width: int, dtype: torch.dtype) -> None:
        """Within 1e-6 of the sum of absolute values, which no sum in bfloat16 reaches."""
        x = (randn(rows, width) + 1).to(dtype)

        y = cpu.sums(x, width)

        assert y.dtype == torch.float32
        assert ((y.double() - x.double().sum(0)).abs() <= 1e-6 * x.double().abs().sum(0)).all()

    @pytest.mark.parametrize("count", [2, 3, 5])
    def test_the_number_of_threads_does_not_show(self, count: int) -> None:
        """Ranges of rows are added in one order, also where large sums cancel."""
        x = randn(20_000, 70) * torch.logspace(-8, 8, 20_000)[:, None]
        x[0], x[10_000] = 3e18, -3e18
        with threads(1):
            alone = cpu.sums(x, 70)
        with threads(count):
            seen = [cpu.sums(x, 70) for _ in range(10)]

        assert all(torch.equal(y, alone) for y in seen)


HERE = os.path.dirname(__file__)
_LIMITED = """
import sys
sys.path[:0] = [{folder!r}, {tests!r}]
import test_native
print(*test_native.{function}())
"""


def limited(limit: str, function: str) -> list[str]:
    """The words that a function of this file returns in a process that may use less of the processor."""
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED.format(folder=HERE, tests=os.path.dirname(HERE), function=function)],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": limit},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def fingerprint() -> tuple[str, str]:
    """The widest instruction set in use, and a hash of codes, values and extremes of many tensors."""
    digest = hashlib.sha256()
    for zero, key, dtype, per_channel, last in itertools.product(ZEROS, (None, KEY), DTYPES, (False, True), (0, 1)):
        for power in (-130, -20, 0, 40):
            x = (randn(3, 5, 71) * 2.0**power).to(dtype)
            view = (3, 5, 71, bool(last))
            memory, grid = in_memory(x, view), grid_for(x, zero, 8, per_channel, key)
            lo, hi = cpu.extremes(memory, view)
            values = cpu.fake_quantize(memory, view, grid).float()
            codes = cpu.encode(memory, view, grid, signed=zero == "symmetric")
            fmt = formats()["symmetric" if per_channel else "integer"]
            samples = None if per_channel else 3
            made, scale, _ = cpu.quantize(memory, view, **rule_of(fmt), levels=127, samples=samples, key=key)
            for t in (lo, hi, values, codes, made, scale):
                digest.update(t.numpy().tobytes())
    return (native_instruction_sets() or ["none"])[-1], digest.hexdigest()


@pytest.mark.parametrize("last", [False, True])
def test_bfloat16_values(last: bool) -> None:
    """One pass rounds as torch does: halves to even, denormals, infinities and nan too, in the memory order given."""
    bits = torch.randint(-(2**31), 2**31, (5, 7, 31, 13), generator=torch.Generator().manual_seed(0))
    x = bits.to(torch.int32).view(torch.float32)
    x[0, 0, 0, :5] = torch.tensor([math.nan, math.inf, -math.inf, 1.00390625, 1.01171875])
    x = x.contiguous(memory_format=torch.channels_last) if last else x

    y = cpu.round_bf16(x)

    assert y.stride() == x.stride()
    assert not torch.equal(y, x)
    torch.testing.assert_close(y, x.to(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("limit", ["SSE41", "AVX2", "AVX512_CORE"])
def test_every_instruction_set_gives_the_same(limit: str) -> None:
    """A process that may use less of the processor makes the same codes, values and extremes."""
    sets, hashed = limited(limit, "fingerprint")

    assert sets in {"SSE41": ("none",), "AVX2": ("none", "avx2"), "AVX512_CORE": ("none", "avx2", "avx512")}[limit]
    assert hashed == fingerprint()[1]


def of_codes(a: Tensor, b: Tensor, *, along: bool, zeros: tuple[int, int]) -> Tensor:
    """The product of two matrices of codes (m, k) and (n, k), or with `along` False of (k, m) and (k, n)."""
    lhs, rhs = (
        cpu.Rows(data=q, rows=q.shape[0], width=q.shape[1], stride=q.shape[1], along=along, zero=zero)
        for q, zero in zip((a, b), zeros, strict=True)
    )
    m, n = (q.shape[0 if along else 1] for q in (a, b))
    out, one = torch.empty(m, n), torch.ones(1)
    cpu.multiply(lhs, rhs, out, first=0, stride=n, taps=1, scales=(one, one), bias=None, codes=True)
    return out


def product_fingerprint() -> tuple[str, str]:
    """The widest instruction set in use, and a hash of products of codes around the sizes of panels and steps."""
    digest, generator = hashlib.sha256(), torch.Generator().manual_seed(0)
    for m, n, k, along in itertools.product((1, 33), (16, 17, 40), (3, 64, 1025), (False, True)):
        shapes = ((m, k), (n, k)) if along else ((k, m), (k, n))
        a, b = (torch.randint(0, 256, shape, generator=generator).to(torch.uint8) for shape in shapes)
        for left, right, zeros in (
            (a, b.view(torch.int8), (0, 0)),
            (a, b, (7, 100)),
            (*(q.view(torch.int8) for q in (a, b)), (0, 0)),
        ):
            digest.update(of_codes(left, right, along=along, zeros=zeros).numpy().tobytes())
    return (native_instruction_sets() or ["none"])[-1], digest.hexdigest()


# With the sizes of their inputs: rows of pictures that are read where they lie or unfolded, with and without gaps.
CONVOLUTIONS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv2d(3, 8, 3, padding=1), (3, 24, 40)),
    (nn.Conv2d(16, 33, 3, padding=1), (16, 12, 20)),
    (nn.Conv2d(8, 16, 5, stride=2, padding=2), (8, 21, 40)),
    (nn.Conv2d(32, 16, 3, groups=2), (32, 9, 9)),
    (nn.Conv2d(5, 7, (3, 2), dilation=2), (5, 8, 8)),
    (nn.Conv2d(16, 24, 1), (16, 7, 11)),
    (nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1), (8, 9, 18)),
    (nn.Conv1d(6, 10, 3), (6, 40)),
]


def layer_fingerprint() -> tuple[str, str]:
    """The widest instruction set in use, and a hash of outputs and gradients of layers of many kinds."""
    digest = hashlib.sha256()
    affine = recipe_of(integer(bits=8, zero="integer"))
    linear = [nn.Linear(70, 45), (33, 70)]
    layers: list[Any] = [(recipe, *linear) for recipe in ("int8", "mxint8", affine)]
    layers += [(recipe, *convolution) for recipe in ("int8", affine) for convolution in CONVOLUTIONS]
    for (recipe, plain, shape), batch in itertools.product(layers, (1, 5)):
        layer = copy.deepcopy(plain).to(memory_format=torch.channels_last)
        for i, p in enumerate(layer.parameters()):
            p.data.copy_(randn(*p.shape, seed=i))
        lowbit.convert_(layer, recipe, engine="int8")
        x = randn(batch, *shape)
        x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        x.requires_grad_()
        y = layer(x)
        y.backward(randn(*y.shape))
        for t in (y, x.grad, *(p.grad for p in layer.parameters())):
            assert t is not None
            digest.update(t.detach().contiguous().numpy().tobytes())
    return (native_instruction_sets() or ["none"])[-1], digest.hexdigest()


def product_without_units() -> list[str]:
    """What a product of codes says."""
    q = torch.ones(2, 3, dtype=torch.uint8)
    try:
        of_codes(q, q, along=True, zeros=(0, 0))
    except RuntimeError as error:
        return [str(error)]
    return []


needs_units = pytest.mark.skipif(bool(int8.missing("int8")), reason="this processor lacks 8-bit units")

# What ONEDNN_MAX_CPU_ISA may be, and the widest instruction sets that are then in use.
LIMITS = {
    "AVX2": {"avx2"},
    "AVX2_VNNI": {"avx2", "avxvnni"},
    "AVX512_CORE": {"avx2", "avx512"},
    "AVX512_CORE_VNNI": {"avx2", "avx512", "avx512vnni"},
    "AVX512_CORE_BF16": {"avx2", "avx512", "avx512vnni", "avx512bf16"},
}


@needs_units
@pytest.mark.parametrize("limit", LIMITS)
def test_every_instruction_set_gives_the_same_products_of_codes(limit: str) -> None:
    """A process that may use fewer units makes the same results; both ways round, with and without zero points."""
    sets, hashed = limited(limit, "product_fingerprint")

    assert sets in LIMITS[limit]
    assert hashed == product_fingerprint()[1]


@needs_units
@pytest.mark.parametrize("limit", ["AVX2", "AVX2_VNNI", "AVX512_CORE_VNNI"])
def test_every_instruction_set_gives_the_same_layers(limit: str) -> None:
    """Outputs and gradients of linear layers, blocks and convolutions through images or not are the same bits."""
    sets, hashed = limited(limit, "layer_fingerprint")

    assert sets in LIMITS[limit]
    assert hashed == layer_fingerprint()[1]


def test_a_product_without_its_units_is_refused() -> None:
    """The error names the instruction sets that have what a product needs; nothing else ends the process."""
    words = limited("SSE41", "product_without_units")

    assert "avx2 or dotprod" in " ".join(words)


# Raises the limit of memory until a product fits; its threads exist before memory is short.
UNDER_LIMITS = """
import resource
import torch
from lowbit.kernels import cpu, native_instruction_sets

torch.set_num_threads(2)
m, n, k = 40, 300_000, 8
a, b = torch.ones(k, m, dtype=torch.uint8), torch.ones(k, n, dtype=torch.int8)
left = cpu.Rows(data=a, rows=k, width=m, stride=m, along=False)
right = cpu.Rows(data=b, rows=k, width=n, stride=n, along=False)
small = cpu.Rows(data=b, rows=k, width=2000, stride=n, along=False)
one, out = torch.ones(1), torch.zeros(m, n)
cpu.multiply(left, small, out, first=0, stride=n, taps=1, scales=(one, one), bias=None, codes=True)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
short = 0
for extra in range(0, 400 << 20, 5 << 20):
    out.zero_()
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, resource.RLIM_INFINITY))
    try:
        cpu.multiply(left, right, out, first=0, stride=n, taps=1, scales=(one, one), bias=None, codes=True)
    except MemoryError:
        short += 1
        continue
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert bool((out == k).all())
    print("short", short)
    break
"""


@needs_units
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say how much memory is used")
def test_a_lack_of_memory_in_any_thread_is_an_error_and_not_the_end_of_the_process() -> None:
    """Under rising limits each product raises MemoryError or is right; several limits are too low."""
    run = subprocess.run([sys.executable, "-c", UNDER_LIMITS], capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) >= 3
