"""The block-scaled recipes: which format each operand has, and blocks that are cut by hand."""

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import Recipe, UsageError, functional
from lowbit.numerics.formats import Format
from lowbit.numerics.quantizer import quantize
from lowbit.numerics.rounding import CounterNoise, step_key, uniform_noise
from lowbit.numerics.scales import Scale
from lowbit.numerics.transforms import Hadamard, Place
from lowbit.numerics.unbiased import UnbiasedE4M3
from lowbit.products.operators import Convolution
from lowbit.products.setting import Setting, shares, slot

NAMES = ["switchback", "fp8-block", "jetfire", "nvfp4", "ufp4", "fallback8", "quartet2"]
SQUARE = ["fp8-block", "jetfire", "nvfp4", "fallback8"]


def randn(*shape: int, seed: int) -> Tensor:
    """Normal values of several magnitudes, so that blocks differ."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-6, 6, shape, generator=generator)


def step(name: str, x: Tensor, w: Tensor, g: Tensor, engine: str = "reference") -> list[Tensor]:
    """Output and gradients of a linear layer."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    noise = CounterNoise(key=step_key(3, torch.tensor(5)), layer="layer")
    y = functional.linear(x, w, setting=Setting(recipe=Recipe.from_name(name), noise=noise, engine=engine))
    y.backward(g)
    assert x.grad is not None
    assert w.grad is not None
    return [y.detach(), x.grad, w.grad]


@pytest.mark.parametrize(
    ("name", "stochastic"),
    [
        ("switchback", set()),
        ("fp8-block", set()),
        ("jetfire", {("grad_input", "grad_output"), ("grad_weight", "grad_output")}),
        ("nvfp4", {("grad_input", "grad_output"), ("grad_weight", "grad_output")}),
        (
            "quartet2",
            {
                ("grad_input", "grad_output"),
                ("grad_input", "weight"),
                ("grad_weight", "grad_output"),
                ("grad_weight", "input"),
            },
        ),
        ("fallback8", {("grad_input", "grad_output"), ("grad_weight", "grad_output")}),
        ("ufp4", {("grad_input", "grad_output"), ("grad_weight", "grad_output")}),
    ],
)
def test_operands_round_stochastically_where_they_do(name: str, stochastic: set[tuple[str, str]]) -> None:
    """Inputs and weights round to nearest in the output of every recipe; quartet2 makes whole products unbiased."""
    recipe = Recipe.from_name(name)

    assert {(p, o) for p, o, fmt in recipe.operands() if fmt.stochastic} == stochastic


def test_hadamard_is_in_the_products_that_the_papers_name() -> None:
    """NVFP4 transforms the operands of grad_weight, UFP4 those of all products."""
    turned = {
        name: {p for p, _, fmt in Recipe.from_name(name).operands() if isinstance(fmt.transform, Hadamard)}
        for name in NAMES
    }

    assert turned["nvfp4"] == {"grad_weight"}
    assert turned["ufp4"] == {"output", "grad_input", "grad_weight"}
    assert not any(turned[name] for name in ("switchback", "fp8-block", "jetfire"))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_near_full_precision_but_not_in_it(name: str) -> None:
    """Products of 70 rows, 40 inputs and 50 outputs, whose last blocks are short, keep their direction."""
    x, w, g = randn(70, 40, seed=1), randn(50, 40, seed=2), randn(70, 50, seed=3)

    found = step(name, x, w, g)

    for y, exact in zip(found, (x @ w.t(), g @ w, g.t() @ x), strict=True):
        assert 0.85 < torch.cosine_similarity(y.flatten(), exact.flatten(), dim=0) < 0.9999999


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 3.0, 1e30, 1e-30])
def test_zeros_and_constants_train(name: str, value: float) -> None:
    """No product of a constant tensor is nan or inf, and zeros give zeros."""
    x, g = torch.full((40, 48), value), torch.full((40, 33), min(value, 1.0))

    found = step(name, x, torch.full((33, 48), 0.5), g)

    assert all(bool(y.isfinite().all()) for y in found)
    assert value or not any(bool(y.any()) for y in found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_surfaces(name: str, bad: float) -> None:
    """A row with a nan or an inf gives no finite output."""
    x = randn(40, 48, seed=4)
    x[7, 5] = bad

    y = step(name, x, randn(33, 48, seed=5), randn(40, 33, seed=6))[0]

    assert not y[7].isfinite().any()


def test_a_square_of_jetfire_is_cut_by_hand() -> None:
    """Each 32 x 32 numbers are whole multiples of their largest one over 127, the last squares being short."""
    x = randn(40, 70, seed=7)

    found = quantize(x, Recipe.from_name("jetfire").output.input).values

    for i in (0, 32):
        for j in (0, 32, 64):
            cut = x[i : i + 32, j : j + 32]
            s = cut.abs().max() / 127
            assert torch.equal(found[i : i + 32, j : j + 32], (cut / s).round() * s)


def test_a_tile_of_fp8_is_rounded_by_ml_dtypes() -> None:
    """128 neighbours of a row share ``max|x| / 448``; a weight's 128 x 128 numbers do."""
    x = randn(3, 200, seed=8)
    recipe = Recipe.from_name("fp8-block")

    tiles = quantize(x, recipe.output.input, axis=1).values
    square = quantize(x, recipe.output.weight).values

    for found, axes in ((tiles, 1), (square, (0, 1))):
        for cut, got in zip(x.split(128, 1), found.split(128, 1), strict=True):
            s = cut.abs().amax(axes, keepdim=True) / 448
            codes = (cut / s).numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
            torch.testing.assert_close(got, torch.from_numpy(codes) * s, rtol=1e-6, atol=0)


def test_every_code_of_ufp4_comes_back() -> None:
    """The 15 multiples of a step are values of the grid, and what lies between goes to the nearest, halves to even."""
    fmt = Recipe.from_name("ufp4").output.input
    codes = torch.arange(-7.0, 8.0)
    plain = fmt.replace(transform=lowbit.formats.NoTransform())

    assert torch.equal(quantize(codes, plain, axis=0).values, codes)
    assert quantize(torch.tensor([7.0, 0.5, 1.5, -2.5]), plain, axis=0).values.tolist() == [7.0, 0.0, 2.0, -2.0]


@pytest.mark.parametrize("size", [2, 16, 64])
def test_signs_of_a_hadamard_transform_undo_themselves(size: int) -> None:
    """Transformed back, values are what they were; the transform keeps lengths and differs from the one without."""
    x, place = randn(5, 3 * size - 1, seed=9), Place(dims=(1,), axis=1)
    signed, plain = Hadamard(size=size, signs=1), Hadamard(size=size)

    y = signed.forward(x, place)

    torch.testing.assert_close(signed.back(y, x, place), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.norm(), x.norm())
    assert not torch.equal(y, plain.forward(x, place))
    assert not torch.equal(y, Hadamard(size=size, signs=2).forward(x, place))


@pytest.mark.parametrize("signs", [-1, 2**32])
def test_signs_need_a_seed_of_32_bits(signs: int) -> None:
    """Another number raises, and the message says which are allowed."""
    with pytest.raises(UsageError, match=r"from 0 to 2\*\*32 - 1"):
        Hadamard(size=16, signs=signs)


@pytest.mark.parametrize("transposed", [False, True])
def test_squares_of_a_convolution_are_cut_by_hand(transposed: bool) -> None:
    """32 channels by 32 places of a sample, row after row, share a scale, and 32 x 32 channels of a tap of a weight."""
    groups, recipe = 2, Recipe.from_name("jetfire")
    op = Convolution(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=groups, transposed=transposed)
    x, w = randn(3, groups * 40, 6, 7, seed=10), randn(groups * 40, 35, 3, 2, seed=11)

    places = {operand: slot(op, recipe, "output", operand, t.shape) for operand, t in (("input", x), ("weight", w))}
    found = {
        o: quantize(t, places[o].format, sharing=places[o].sharing).values for o, t in (("input", x), ("weight", w))
    }

    def rounded(cut: Tensor) -> Tensor:
        s = cut.abs().max() / 127
        return (cut / s).round() * s

    for group in range(groups):
        for start, stop in ((0, 32), (32, 40)):
            of = slice(group * 40 + start, group * 40 + stop)
            for sample in range(3):
                given, got = x[sample, of].flatten(1), found["input"][sample, of].flatten(1)
                for a, b in zip(given.split(32, 1), got.split(32, 1), strict=True):
                    assert torch.equal(b, rounded(a))
            for tap in range(6):
                given, got = w[of].flatten(2)[..., tap], found["weight"][of].flatten(2)[..., tap]
                for a, b in zip(given.split(32, 1), got.split(32, 1), strict=True):
                    assert torch.equal(b, rounded(a))


@pytest.mark.parametrize("name", SQUARE)
def test_an_operand_of_a_convolution_is_rounded_once_where_squares_serve_two_products(name: str) -> None:
    """A weight has the same codes in output and grad_input."""
    op, recipe = Convolution(stride=(1, 1), padding=(0, 0), dilation=(1, 1)), Recipe.from_name(name)
    first, second = (slot(op, recipe, p, "weight", torch.Size((64, 48, 3, 3))) for p in ("output", "grad_input"))

    assert shares(first, second)


@pytest.mark.parametrize("name", [*NAMES, "mxfp8", "mxfp4", "mxint8"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_keep_their_direction(name: str, dims: int) -> None:
    """Results and gradients of a strided convolution in groups are near full precision, but not in it."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    torch.manual_seed(0)
    layer = kind(12, 24, 3, stride=2, padding=1, groups=2)
    x = randn(5, 12, *[9] * dims, seed=12).requires_grad_()
    exact = layer(x)
    g = randn(*exact.shape, seed=13)
    wanted = [exact, *torch.autograd.grad(exact, [x, layer.weight], g)]
    model = nn.Sequential(layer, nn.Identity())
    recipe = Recipe.from_name(name)

    lowbit.convert_(model, recipe.replace(last="convert"))
    y = model(x)
    found = [y, *torch.autograd.grad(y, [x, layer.weight], g)]

    for a, b in zip(found, wanted, strict=True):
        assert 0.85 < torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) < 0.9999999


class TestQuartet2:
    """Nearest codes whose scales round stochastically."""

    FORMAT = Recipe.from_name("quartet2").grad_input.grad_output

    def draws(self, fmt: Format, x: Tensor, count: int) -> Tensor:
        """Values under so many noises, float64."""
        return torch.stack([quantize(x, fmt, axis=1, noise=(n + 1, 77 * n + 5)).values.double() for n in range(count)])

    def test_the_mean_over_many_noises_is_the_input(self) -> None:
        """Over 240 noises the mean of 800 values is off by its standard error: 1 of 1, within 0.2, 4 of its own errors.

        Without the correction the values are too small by more than this test can miss.
        """
        x = randn(4, 200, seed=14)

        values = self.draws(self.FORMAT, x, 240)

        off = (values.mean(0) - x) / (values.std(0) / 240**0.5)
        assert 0.8 < off.square().mean().sqrt() < 1.2
        gain = (values.mean(0) * x).sum() / x.double().square().sum()
        assert abs(gain - 1) < 0.005

    def test_the_error_is_well_below_that_of_stochastic_codes(self) -> None:
        """The mean square of normal values over 20 noises, 0.53 times that of NVFP4, whose codes round by noise."""
        x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
        stochastic = Recipe.from_name("nvfp4").grad_input.grad_output

        ours, theirs = ((self.draws(fmt, x, 20) - x).square().mean() for fmt in (self.FORMAT, stochastic))

        assert 0.4 * theirs < ours < 0.6 * theirs

    def test_codes_are_nearest_and_scales_lie_on_e4m3(self) -> None:
        """Before the transform back, a block is an E4M3 scale times E2M1 numbers, those nearest for its first scale."""
        x = randn(3, 256, seed=15)
        noise = uniform_noise(torch.tensor([5, 9]), x.shape)
        grid = quantize(x, self.FORMAT, axis=1, noise=noise).grid
        assert grid is not None
        fmt = grid.format
        y = fmt.transform.forward(x, Place(dims=(1,), axis=1))

        values = quantize(x, fmt, axis=1, noise=noise).values
        back = fmt.transform.forward(values, Place(dims=(1,), axis=1))

        unit = 17 / 16 * 0.93 * y.abs().max() / 6 / 256
        first = (y.unflatten(1, (-1, 16)).abs().amax(2) / 6 / (unit / (17 / 16 * 0.93))).numpy()
        first = torch.from_numpy(first.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)).clamp(min=2.0**-9) * unit
        scaled = (y.unflatten(1, (-1, 16)) / first[..., None]).clamp(-6, 6).numpy()
        codes = torch.from_numpy(scaled.astype(ml_dtypes.float4_e2m1fn).astype(np.float32))
        scale = grid.steps.scale
        on_grid = (scale / unit).numpy()
        torch.testing.assert_close(
            torch.from_numpy(on_grid.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)),
            scale / unit,
            rtol=1e-5,
            atol=0,
        )
        torch.testing.assert_close(
            back.unflatten(1, (-1, 16)), codes * scale, rtol=1e-4, atol=1e-4 * float(y.abs().max())
        )

    @pytest.mark.parametrize(
        ("scale", "why"),
        [({"granularity": "tensor"}, "whole blocks"), ({"granularity": "block", "block": 12}, "divides the group")],
    )
    def test_groups_are_of_whole_blocks(self, scale: dict[str, Any], why: str) -> None:
        """Other scales are refused, and the message says what goes."""
        with pytest.raises(UsageError, match=why):
            Format(element=self.FORMAT.element, scale=Scale(format=UnbiasedE4M3(), **scale))
