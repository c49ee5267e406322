"""Fixed point, and dynamic fixed point, against vectors made from the formulas of their papers."""

import pytest
import torch

from helpers import Vectors
from lowbit.methods.recipe import Recipe
from lowbit.numerics import dynamic_fixed_point as dfp
from lowbit.numerics.elements import FixedPoint
from lowbit.numerics.formats import Format
from lowbit.numerics.quantizer import quantize

VECTORS = "static/formula_only.npz"


@pytest.mark.parametrize(("integer", "fraction"), [(2, 14), (4, 12), (6, 10), (8, 8), (4, 4)])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_fixed_point_equals_the_formula(vectors: Vectors, integer: int, fraction: int, rounding: str) -> None:
    """<IL, FL> saturates, rounds halves down or by noise, on every value and at both ends."""
    fmt = Format(element=FixedPoint(integer=integer, fraction=fraction, halves="down"), rounding=rounding)
    noise = vectors["fx_u"] if fmt.stochastic else None

    values = quantize(vectors["fx_x"], fmt, noise=noise).values

    assert torch.equal(values, vectors[f"fx_{integer}_{fraction}_{rounding.removesuffix('astic')}"])


def test_halves_go_down(vectors: Vectors) -> None:
    """The vectors hold halves on which the even rule differs, so that the test above can fail."""
    even = quantize(vectors["fx_x"], Format(element=FixedPoint(integer=6, fraction=10))).values

    assert not torch.equal(even, vectors["fx_6_10_nearest"])


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_operands_of_dfp16_have_these_numbers(vectors: Vectors, name: str) -> None:
    """The recipe's format gives the same numbers and exponent as the formula, bit for bit."""
    x = vectors[f"dfp_{name}"]
    numbers, exponent = vectors[f"dfp_i{name}"], int(vectors[f"dfp_E{name}"])

    found = dfp.encode(x)
    values = quantize(x, Recipe.from_name("dfp16").output.input).values

    assert torch.equal(found.numbers, numbers)
    assert found.exponent == exponent
    assert torch.equal(values, numbers.double() * 2.0**exponent)


def test_the_product_and_its_way_back_to_16_bits(vectors: Vectors) -> None:
    """Exact sums and what they stand for, and the shift that makes them 16 bits."""
    a, b = (dfp.encode(vectors[f"dfp_{name}"]) for name in "ab")

    acc = dfp.multiply(a, b)
    down = dfp.down_convert(acc)

    assert torch.equal(acc.numbers, vectors["dfp_acc"])
    assert torch.equal(down.numbers, vectors["dfp_down"])
    assert down.exponent == int(vectors["dfp_Eout"])
    torch.testing.assert_close(acc.values(), vectors["dfp_float"], rtol=1e-12, atol=0)
