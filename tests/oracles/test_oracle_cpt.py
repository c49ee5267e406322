"""The `sbm8-cpt` recipe against vectors from the CPT authors' quantised convolution."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import lowbit
from helpers import Vectors
from lowbit import functional
from lowbit.methods.recipe import Recipe
from lowbit.numerics.quantizer import quantize
from lowbit.numerics.rounding import RecordedNoise
from lowbit.products.setting import Setting

VECTORS = "dynamic/quant_cpt.npz"
CPT = Recipe.from_name("sbm8-cpt")
CASES = [(3, 6), (4, 8), (8, 8), (6, 6), (2, 16)]


def _nearest(recipe: Recipe) -> Recipe:
    """The recipe with nearest rounding of gradients, as the deterministic vectors have it."""
    gradient = recipe.grad_input.grad_output
    assert gradient.has_width
    gradient = gradient.replace(rounding="nearest")
    return recipe.replace(
        grad_input=dataclasses.replace(recipe.grad_input, grad_output=gradient),
        grad_weight=dataclasses.replace(recipe.grad_weight, grad_output=gradient),
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("tensor", ["w", "x_extreme", "x_mean"])
def test_quantizers_equal_bit_for_bit(vectors: Vectors, bits: int, tensor: str) -> None:
    """Weights per output channel and activations under both range rules equal the authors' bit for bit."""
    recipe = CPT.with_bits(weight=bits, input=bits, grad_output=8)
    if tensor == "w":
        values, expected = quantize(vectors["w"], recipe.output.weight, dims=(1, 2, 3)).values, f"w_q{bits}"
    else:
        rule = "minmax" if tensor == "x_extreme" else "sample-mean"
        fmt = recipe.output.input.replace(range=rule)
        values, expected = quantize(vectors["x"], fmt).values, f"x_q{bits}_{tensor[2:]}"

    assert torch.equal(values, vectors[expected])
    assert not torch.equal(values, vectors[tensor[0]])


def test_a_constant_stays_constant(vectors: Vectors) -> None:
    """A constant tensor comes back as the authors' code gives it."""
    x = torch.full((2, 2, 2, 2), float(vectors["const_q4"].flatten()[0]))
    fmt = CPT.output.input.replace(bits=4)

    assert torch.equal(quantize(x, fmt).values, vectors["const_q4"])


def _convolve(vectors: Vectors, prefix: str, bits: int, grad_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    recipe = CPT.with_bits(weight=bits, input=bits, grad_output=grad_bits)
    noise = None
    if f"{prefix}_noise" in vectors:
        noise = RecordedNoise(draws={("grad_input", "grad_output"): 0.5 - vectors[f"{prefix}_noise"]})
    else:
        recipe = _nearest(recipe)
    x, w = vectors["x"].requires_grad_(), vectors["w"].requires_grad_()
    y = functional.conv(
        x, w, stride=(1, 1), padding=(1, 1), dilation=(1, 1), setting=Setting(recipe=recipe, noise=noise)
    )
    y.backward(vectors[f"{prefix}_gout"])
    assert x.grad is not None
    assert w.grad is not None
    return y.detach(), x.grad, w.grad


@pytest.mark.parametrize(("bits", "grad_bits"), CASES)
@pytest.mark.parametrize("rounding", ["det", "sr"])
def test_convolution_equals_the_authors(vectors: Vectors, bits: int, grad_bits: int, rounding: str) -> None:
    """Output, grad_input and grad_weight equal the authors', stochastic rounding with their noise replayed."""
    prefix = f"conv_b{bits}_g{grad_bits}_{rounding}"

    y, grad_input, grad_weight = _convolve(vectors, prefix, bits, grad_bits)

    torch.testing.assert_close(y, vectors[f"{prefix}_y"], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(grad_input, vectors[f"{prefix}_gx"], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(grad_weight, vectors[f"{prefix}_gw"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bits", "grad_bits"), CASES)
def test_running_range_and_evaluation_equal_the_authors(vectors: Vectors, bits: int, grad_bits: int) -> None:
    """After one training step the running range, and evaluation with it, are the authors'."""
    prefix = f"conv_b{bits}_g{grad_bits}_det"
    layer = nn.Conv2d(3, 6, 3, padding=1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(vectors["w"])
    lowbit.convert_(layer, CPT.with_bits(weight=bits, input=bits, grad_output=grad_bits).replace(last="convert"))

    layer(vectors["x"])
    lo, hi, count = layer.site.running_range
    y = layer.eval()(vectors["x"])

    torch.testing.assert_close(lo, vectors[f"{prefix}_run_zp"].flatten()[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(hi - lo, vectors[f"{prefix}_run_range"].flatten()[0], rtol=1e-6, atol=0)
    assert count == 1
    torch.testing.assert_close(y.detach(), vectors[f"{prefix}_y_eval_after1"], rtol=1e-5, atol=2e-6)
