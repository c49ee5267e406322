"""Minifloats against ml_dtypes, gfloat and torch."""

import math
from typing import Any

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat import formats as standards
from torch import Tensor

from helpers import rounded
from lowbit.errors import UsageError
from lowbit.numerics.elements import Minifloat
from lowbit.numerics.formats import BF16, Format
from lowbit.numerics.quantizer import quantize
from lowbit.numerics.scales import Scale

ONE = torch.tensor(1.0)
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
