"""The Microscaling recipes against blocks that are cut by hand and rounded by ml_dtypes."""

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.methods.recipe import Recipe
from lowbit.numerics.quantizer import quantize
from lowbit.products import watch
from lowbit.products.watch import ProductRun

# Per recipe: the type of an element, its largest number and the exponent of that.
ELEMENTS: dict[str, tuple[Any, float, int]] = {
    "mxfp8": (ml_dtypes.float8_e4m3fn, 448.0, 8),
    "mxfp6": (ml_dtypes.float6_e2m3fn, 7.5, 2),
    "mxfp4": (ml_dtypes.float4_e2m1fn, 6.0, 2),
    "mxint8": (None, 127 / 64, 0),
}


def block(values: list[float], recipe: str) -> list[float]:
    """One block as the specification reads: a shared exponent, elements that saturate."""
    dtype, largest, highest = ELEMENTS[recipe]
    most = max(map(abs, values))
    unit = 2.0 ** (math.frexp(most)[1] - 1 - highest) if most else 1.0
    elements = np.clip(np.array(values) / unit, -largest, largest).astype(np.float32)
    codes = np.rint(elements * 64) / 64 if dtype is None else elements.astype(dtype).astype(np.float32)
    found: list[float] = (codes * unit).tolist()
    return found


def rows(x: Tensor, recipe: str) -> Tensor:
    """A matrix whose rows are cut into blocks of 32; the last one may be shorter."""
    return torch.tensor([[v for cut in row.split(32) for v in block(cut.tolist(), recipe)] for row in x])


def columns(x: Tensor, recipe: str) -> Tensor:
    """The same of its columns."""
    return rows(x.t(), recipe).t()


def randn(*shape: int, seed: int) -> Tensor:
    """Normal values of several magnitudes, so that blocks differ."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-6, 6, shape, generator=generator)


@pytest.mark.parametrize("recipe", ELEMENTS)
def test_all_operands_have_one_format(recipe: str) -> None:
    """Six operands in one format, nearest, and every layer is converted."""
    found = Recipe.from_name(recipe)

    assert len({fmt for _, _, fmt in found.operands()}) == 1
    assert not found.output.input.stochastic
    assert (found.first, found.last, found.normalization) == ("convert", "convert", None)


@pytest.mark.parametrize("recipe", ELEMENTS)
def test_products_of_a_linear_layer_are_those_of_blocks_along_the_summed_axis(recipe: str) -> None:
    """70 rows, 40 inputs, 50 outputs: each operand is cut along what its product sums over, the last blocks short."""
    layer = nn.Linear(40, 50, bias=False)
    w = randn(50, 40, seed=1)
    with torch.no_grad():
        layer.weight.copy_(w)
    lowbit.convert_(layer, recipe)
    x, g = randn(70, 40, seed=2).requires_grad_(), randn(70, 50, seed=3)

    y = layer(x)
    y.backward(g)

    assert x.grad is not None
    assert layer.weight.grad is not None
    plain = x.detach()
    expected = rows(plain, recipe) @ rows(w, recipe).t()
    torch.testing.assert_close(y.detach(), expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(x.grad, rows(g, recipe) @ columns(w, recipe), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(layer.weight.grad, columns(g, recipe).t() @ columns(plain, recipe), rtol=1e-5, atol=1e-3)
    assert (expected - plain @ w.t()).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("recipe", ELEMENTS)
def test_blocks_of_a_convolution_are_of_channels(recipe: str) -> None:
    """Forward, 32 channels of one pixel of the input, and of one tap of the weight, share an exponent."""
    layer = nn.Conv2d(64, 2, 2, bias=False)
    lowbit.convert_(layer, recipe)
    seen: dict[str, Tensor] = {}

    def note(run: ProductRun) -> None:
        seen.update({name: operand.quantized for name, operand in run.operands.items()})

    x, w = randn(3, 64, 3, 3, seed=4), layer.weight.detach()
    with watch.observed_by(note):
        layer(x)

    for name, values in (("input", x), ("weight", w)):
        pixels = values.movedim(1, -1)
        expected = rows(pixels.reshape(-1, 64), recipe).reshape(pixels.shape).movedim(-1, 1)
        assert torch.equal(seen[name], expected)
        assert not torch.equal(seen[name], values)


def rounded(x: Tensor, recipe: str) -> Tensor:
    """Rows of an input as the recipe rounds it."""
    return quantize(x, Recipe.from_name(recipe).output.input, axis=x.dim() - 1).values


@pytest.mark.parametrize(
    ("recipe", "largest"), [("mxfp8", 1.75), ("mxfp6", 1.875), ("mxfp4", 1.5), ("mxint8", 127 / 64)]
)
def test_the_largest_value_of_a_block_can_saturate(recipe: str, largest: float) -> None:
    """Just below 2 the exponent is that of 1, and what passes the largest element becomes it, in both signs."""
    x = torch.tensor([1.9999, -1.9999, 1.0, 0.0])

    assert rounded(x, recipe).tolist() == [largest, -largest, 1.0, 0.0]


@pytest.mark.parametrize("recipe", ELEMENTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_with_a_nan_is_nan_and_its_neighbours_are_not(recipe: str, bad: float) -> None:
    """A scale of a nan or inf is the nan of E8M0, whose whole block is nan; the next block has its own scale."""
    x = randn(2, 64, seed=5)
    bent = x.clone()
    bent[0, 40] = bad

    values = rounded(bent, recipe)

    assert values[0, 32:].isnan().all()
    kept = torch.ones_like(x, dtype=torch.bool)
    kept[0, 32:] = False
    assert torch.equal(values[kept], rounded(x, recipe)[kept])


@pytest.mark.parametrize("recipe", ELEMENTS)
def test_a_block_of_zeros_is_zeros(recipe: str) -> None:
    """Beside a block that is not."""
    x = torch.cat([torch.zeros(32), torch.ones(32)])

    assert torch.equal(rounded(x, recipe), x)


@pytest.mark.parametrize(
    ("recipe", "element"), [("mxfp8", 2.0**-9), ("mxfp6", 2.0**-3), ("mxfp4", 2.0**-1), ("mxint8", 1.0)]
)
def test_exponents_end_at_that_of_e8m0(recipe: str, element: float) -> None:
    """The smallest scale is 2**-127: what lies under half of its smallest element is 0, not a number of a finer grid.

    A scale of `mxint8` is the step of its codes, 1/64 of what OCP calls the scale, and ends at 2**-127 too.
    """
    smallest = 2.0**-127 * element
    x = torch.tensor([smallest, 0.4 * smallest], dtype=torch.float64)

    assert rounded(x, recipe).tolist() == [smallest, 0.0]


@pytest.mark.parametrize("recipe", ELEMENTS)
def test_a_step_is_proven(recipe: str) -> None:
    """`verify` passes a network with a convolution, near full precision but not in it, on the reference engine."""
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Flatten(), nn.Linear(640, 5))
    lowbit.convert_(model, recipe, engine="reference")

    with lowbit.verify(model) as proof:
        model(randn(4, 3, 6, 6, seed=6)).square().mean().backward()

    assert {row.engine for row in proof.rows} == {"reference"}
    assert all(0.9 < row.cosine < 0.999999 for row in proof.rows)
