"""The `wageubn` recipe against vectors from its authors' code."""

import pytest
import torch
from torch import Tensor, nn

import lowbit
from helpers import Vectors
from lowbit.methods.recipe import Recipe, TermNorm
from lowbit.numerics.elements import FixedPoint
from lowbit.numerics.formats import Format
from lowbit.numerics.quantizer import quantize
from lowbit.numerics.transforms import Normalized

VECTORS = "static/wageubn.npz"
RECIPE = Recipe.from_name("wageubn")
NORM, UPDATE = RECIPE.normalization, RECIPE.update
assert isinstance(NORM, TermNorm)
assert UPDATE is not None
FORMATS = {
    "fw": ("w", RECIPE.output.weight),
    "fa": ("a", RECIPE.output.input),
    "e1": ("dy", NORM.grad_output),
    "e2": ("dy", RECIPE.grad_input.grad_output),
    "e2_16flag": ("dy", Recipe.from_name("wageubn-e16").grad_input.grad_output),
    "fbn_x": ("a", NORM.normalized),
    "fbn_mean": ("a", NORM.mean),
    "fbn_var": ("a", NORM.deviation),
    "fbn_G": ("a", NORM.weight),
    "fbn_B": ("a", NORM.bias),
    "fgBN": ("gw", UPDATE.gradient_of(1)),
    "flr": ("lr", UPDATE.lr),
    "fBits13": ("gw", dict(UPDATE.states)["momentum_buffer"]),
    "fBits16": ("w", Format(element=FixedPoint(integer=1, fraction=15, ends="open"))),
    "fBits24": ("w", UPDATE.weight),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantizer_equals_the_authors(vectors: Vectors, name: str) -> None:
    """Direct, shift and flag quantisers, bit for bit; none of them leaves all values as they are, but for 16 bits."""
    given, fmt = FORMATS[name]
    x = vectors[given]

    values = quantize(x, fmt).values

    assert torch.equal(values, vectors[name])
    assert not torch.equal(values, x)


@pytest.mark.parametrize("levels", [128, 32, 8, 2])
def test_the_constant_quantizer_equals_the_authors(vectors: Vectors, levels: int) -> None:
    """With the recorded noise; theirs rounds magnitudes, so that of a negative value is mirrored."""
    g, u = vectors["gw"], vectors["fg_u"]
    bits = levels.bit_length()
    element = FixedPoint(integer=bits - 14, fraction=14, ends="symmetric")
    fmt = Format(element=element, transform=Normalized(size=levels / 2**14), rounding="stochastic")

    values = quantize(g, fmt, noise=torch.where(g < 0, 1 - u, u)).values

    assert torch.equal(values, vectors[f"fg_dr{levels}"])
    assert fmt == UPDATE.gradient or levels != 128


@pytest.mark.parametrize("fmt", [NORM.grad_output, RECIPE.grad_input.grad_output, UPDATE.gradient])
def test_errors_of_zero_stay_zero(fmt: Format) -> None:
    """The authors' code takes the logarithm of 0 there and gives nan."""
    x = torch.zeros(3, 4)

    assert torch.equal(quantize(x, fmt, noise=torch.zeros(3, 4) if fmt.stochastic else None).values, x)


def test_batch_normalisation_equals_the_authors(vectors: Vectors) -> None:
    """The output bit for bit, and the gradient of the input to 1e-6 of its largest value."""
    x = vectors["bn_x"].requires_grad_()
    norm = nn.BatchNorm2d(3)
    as_it_arrives = NORM.grad_output.replace(element=RECIPE.bias.element, scale=None)
    lowbit.convert_(norm, RECIPE.replace(name="test", normalization=_with(grad_output=as_it_arrives)), strict=False)

    y: Tensor = norm(x)
    y.backward(vectors["bn_g"])

    assert torch.equal(y.detach(), vectors["bn_y"])
    assert x.grad is not None
    assert (x.grad - vectors["bn_dx"]).abs().max() <= 1e-6 * vectors["bn_dx"].abs().max()


def _with(**changes: Format) -> TermNorm:
    """The normalisation with other formats."""
    import dataclasses

    return dataclasses.replace(NORM, **changes)
