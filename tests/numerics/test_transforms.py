"""Transforms: values, derivatives against autograd in float64, and gradients of layers whose operands have them."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import recipe_of
from lowbit import UsageError, functional
from lowbit.numerics.elements import Minifloat, Real
from lowbit.numerics.formats import FP32, Format, integer
from lowbit.numerics.quantizer import quantize
from lowbit.numerics.scales import Scale
from lowbit.numerics.transforms import (
    NO_TRANSFORM,
    TRANSFORMS,
    Centred,
    Clip,
    Hadamard,
    Normalized,
    NoTransform,
    Place,
    RandomHadamard,
    TanhMax,
    Transform,
)
from lowbit.products.setting import Setting

ALL: list[Transform] = [
    NO_TRANSFORM,
    TanhMax(),
    Clip(low=-0.5, high=0.8),
    Hadamard(size=4),
    Centred(),
    Normalized(size=0.5),
]
every_transform = pytest.mark.parametrize("transform", ALL, ids=lambda t: t.kind)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def place(x: Tensor, axis: int = -1) -> Place:
    """All of a tensor, along an axis."""
    return Place(dims=tuple(range(x.dim())), axis=axis % max(x.dim(), 1))


def there_and_back(transform: Transform, x: Tensor, at: Place) -> Tensor:
    """The value where nothing rounds, which autograd can differentiate."""
    return transform.back(transform.forward(x, at), x, at)


def sylvester(n: int) -> Tensor:
    """The Hadamard matrix of size n by its recursion."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


class TestAll:
    """What every transform does."""

    @every_transform
    @pytest.mark.parametrize("shape", [(6, 5), (2, 3, 7), (9,)])
    def test_its_gradient_is_that_of_autograd(self, transform: Transform, shape: tuple[int, ...]) -> None:
        """In float64, the term of the largest element included, to 1e-12."""
        x, g = randn(*shape).requires_grad_(), randn(*shape, seed=1)
        at = place(x)

        found = transform.gradient(g, x.detach(), at)

        (wanted,) = torch.autograd.grad(there_and_back(transform, x, at), x, g)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
        assert transform.has_gradient == (not torch.allclose(wanted, g))

    @every_transform
    @pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 8)])
    def test_an_empty_tensor_stays(self, transform: Transform, shape: tuple[int, ...]) -> None:
        """Forward, back and gradient."""
        x = torch.empty(shape)
        for axis in range(len(shape)):
            at = place(x, axis)

            assert there_and_back(transform, x, at).shape == shape
            assert transform.gradient(x, x, at).shape == shape

    @every_transform
    def test_zeros_give_zeros(self, transform: Transform) -> None:
        """Their gradient is that of the value."""
        x, g = torch.zeros(4, 8, dtype=torch.float64), randn(4, 8)

        assert torch.equal(there_and_back(transform, x, place(x)), x)
        assert torch.equal(transform.gradient(g, x, place(x)), g)

    @every_transform
    @pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
    def test_an_inf_or_nan_surfaces(self, transform: Transform, bad: float) -> None:
        """No transform makes a number of it: the value is nan."""
        x = randn(3, 8).float()
        x[1, 2] = bad
        fmt = integer(bits=8, zero="offset", transform=transform)

        assert quantize(x, fmt).values[1, 2].isnan()

    @every_transform
    def test_the_tensor_is_not_changed(self, transform: Transform) -> None:
        """Results have memory of their own."""
        x = randn(4, 8)
        copy, g = x.clone(), randn(4, 8, seed=2)
        other = g.clone()

        there_and_back(transform, x, place(x)).mul_(1)
        transform.gradient(g, x, place(x))

        assert torch.equal(x, copy)
        assert torch.equal(g, other)

    def test_kinds_are_different(self) -> None:
        """A kind in TOML stands for one class, and there is a case here for each."""
        assert len({cls.kind for cls in TRANSFORMS}) == len(TRANSFORMS)
        assert {type(t) for t in ALL} == set(TRANSFORMS) - {RandomHadamard}, "which is `Hadamard` once it is drawn"

    @pytest.mark.parametrize(
        ("transform", "text"),
        [
            (NoTransform(), ""),
            (TanhMax(), "tanh/max"),
            (Clip(low=0, high=1), "clipped to [0, 1]"),
            (Clip(low=-0.25, high=2.5), "clipped to [-0.25, 2.5]"),
            (Hadamard(size=16), "Hadamard 16"),
            (Centred(), "centred"),
        ],
    )
    def test_a_transform_says_what_it_is(self, transform: Transform, text: str) -> None:
        """None goes without saying."""
        assert str(transform) == text


class TestTanhMax:
    """DoReFa's transform of weights."""

    def test_the_formula(self) -> None:
        """The largest is 1 or -1, and others are in proportion of their tanh."""
        x = torch.tensor([0.5, -2.0, 0.0])

        y = TanhMax().forward(x, place(x))

        assert y.tolist() == pytest.approx([math.tanh(0.5) / math.tanh(2), -1, 0], rel=1e-6)

    def test_weights_are_those_of_dorefa(self) -> None:
        """``2 round((t / 2M + 1/2) n) / n - 1`` for n = 2**k - 1, as in the authors' code."""
        w = randn(20, 10).float()
        for bits in (2, 3, 8):
            fmt = integer(
                bits=bits, zero="offset", range={"kind": "constant", "low": -1, "high": 1}, transform="tanh-max"
            )  # type: ignore[arg-type]  # as in TOML

            values = quantize(w, fmt).values

            n, t = 2**bits - 1, w.tanh()
            wanted = 2 * ((t / (2 * t.abs().max()) + 0.5) * n).round() / n - 1
            torch.testing.assert_close(values, wanted, rtol=0, atol=1e-6)

    def test_the_term_of_the_largest_element(self) -> None:
        """It is not a constant: without its term the gradient differs there, and nowhere else."""
        x, g = randn(30), randn(30, seed=1)
        t = x.tanh()
        constant = g / t.abs().max() * (1 - t * t)

        found = TanhMax().gradient(g, x, place(x))

        assert (found != constant).nonzero().flatten().tolist() == [int(t.abs().argmax())]


class TestClip:
    """Clipping before the grid."""

    def test_values_and_gradients_at_the_ends(self) -> None:
        """The ends belong to the inside."""
        clip = Clip(low=0, high=1)
        x, g = torch.tensor([-0.1, 0.0, 0.5, 1.0, 1.1]), torch.full((5,), math.inf)

        assert clip.forward(x, place(x)).tolist() == [0, 0, 0.5, 1, 1]
        assert clip.gradient(g, x, place(x)).tolist() == [0, math.inf, math.inf, math.inf, 0]

    @pytest.mark.parametrize(("low", "high"), [(1, 1), (1, 0), (math.nan, 1), (0, math.inf), (-1e300, 0), ("0", 1)])
    def test_other_ends_are_refused(self, low: Any, high: Any) -> None:
        """Two finite numbers of float32 in their order."""
        with pytest.raises(UsageError, match=r"finite ends in float32|low='0': give a number"):
            Clip(low=low, high=high)


class TestHadamard:
    """Turning blocks."""

    @pytest.mark.parametrize("size", [2, 4, 8, 32, 1024])
    def test_it_is_the_matrix_of_sylvester(self, size: int) -> None:
        """Symmetric and orthogonal: lengths stay, and twice is the identity."""
        x = randn(3, size)
        hadamard, at = Hadamard(size=size), place(x)

        y = hadamard.forward(x, at)

        torch.testing.assert_close(y, x @ sylvester(size) / size**0.5, rtol=0, atol=1e-12)
        torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=1e-12, atol=0)
        torch.testing.assert_close(hadamard.forward(y, at), x, rtol=0, atol=1e-12)
        assert not torch.allclose(y, x)

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_a_short_last_block_is_filled_with_zeros(self, axis: int) -> None:
        """Along any axis: forward of the filled tensor, back without what was filled in."""
        x = randn(5, 6, 7)
        hadamard, at = Hadamard(size=4), place(x, axis)
        filled = F.pad(x.movedim(axis, -1), (0, -x.shape[axis] % 4))
        turned = (filled.unflatten(-1, (-1, 4)) @ sylvester(4) / 2).flatten(-2).movedim(-1, axis)

        y = hadamard.forward(x, at)

        torch.testing.assert_close(y, turned, rtol=0, atol=1e-12)
        torch.testing.assert_close(hadamard.back(y, x, at), x, rtol=0, atol=1e-12)

    def test_an_outlier_is_spread(self) -> None:
        """One large value among small ones costs the others less than on its own grid."""
        x = randn(64, 32, seed=5).float()
        x[:, 3] *= 50
        plain = Format(
            element=Minifloat(exponent=2, mantissa=1, top="finite"), scale=Scale(granularity="block", block=32)
        )
        turned = plain.replace(transform=Hadamard(size=32))
        others = torch.arange(32) != 3

        error = [(quantize(x, f, axis=1).values - x)[:, others].square().mean().item() for f in (plain, turned)]

        lost = quantize(x, plain, axis=1).values[:, others]
        assert (lost == 0).float().mean() > 0.5
        assert (quantize(x, turned, axis=1).values[:, others] == 0).float().mean() < 0.1
        assert all(e > 0 for e in error)

    @pytest.mark.parametrize("size", [0, 1, 3, 12, 2048, 4.0])
    def test_other_sizes_are_refused(self, size: Any) -> None:
        """Powers of two from 2 to 1024."""
        with pytest.raises(UsageError, match=f"size={size}"):
            Hadamard(size=size)


class TestCentred:
    """Without the mean."""

    def test_the_mean_is_of_what_shares_a_scale(self) -> None:
        """Each row alone, and the value has it again in full: a constant row returns itself in two bits."""
        x = torch.stack([torch.full((6,), 3.3), torch.linspace(5, 6, 6)])
        fmt = integer(bits=2, zero="symmetric", granularity="row", transform="centred")

        values = quantize(x, fmt, dims=(1,)).values

        torch.testing.assert_close(values[0], x[0], rtol=1e-6, atol=0)
        assert values[1].unique().tolist() == pytest.approx([5, 5.5, 6])
        assert not torch.equal(quantize(x, fmt.replace(transform=NO_TRANSFORM), dims=(1,)).values[1], values[1])

    def test_of_blocks_it_is_the_mean_of_the_axis(self) -> None:
        """Not of each block."""
        x = randn(3, 8)
        fmt = integer(bits=4, zero="symmetric", granularity="block", block=4, transform="centred")

        values = quantize(x, fmt, axis=1).values

        mean = x.mean(1, keepdim=True)
        plain = quantize(x - mean, fmt.replace(transform=NO_TRANSFORM), axis=1).values
        torch.testing.assert_close(values, plain + mean, rtol=0, atol=1e-14)


def applied(transform: Transform, x: Tensor, axis: int) -> Tensor:
    """A transform that autograd sees."""
    return there_and_back(transform, x, place(x, axis))


class TestThroughLayers:
    """Gradients of inputs and weights through `lowbit.functional`."""

    @every_transform
    @pytest.mark.parametrize("leading", [(7,), (2, 3)])
    def test_a_linear_layer_has_the_gradients_of_autograd(self, transform: Transform, leading: tuple[int, ...]) -> None:
        """Where nothing rounds: those of the plain layer of transformed operands, in float64."""
        fmt = Format(element=Real(), transform=transform)
        recipe = recipe_of(FP32, output__input=fmt, output__weight=fmt, grad_input__weight=fmt, grad_weight__input=fmt)
        x, w = randn(*leading, 10).requires_grad_(), randn(5, 10, seed=1).requires_grad_()
        g = randn(*leading, 5, seed=2)

        y = functional.linear(x, w, setting=Setting(recipe=recipe))
        found = torch.autograd.grad(y, (x, w), g)

        wanted = F.linear(applied(transform, x, -1), applied(transform, w, -1))
        torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)
        for a, b in zip(found, torch.autograd.grad(wanted, (x, w), g), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

    @every_transform
    def test_a_convolution_has_the_gradients_of_autograd(self, transform: Transform) -> None:
        """In groups, with channels along the axis of blocks."""
        fmt = Format(element=Real(), transform=transform)
        recipe = recipe_of(FP32, output__input=fmt, output__weight=fmt, grad_input__weight=fmt, grad_weight__input=fmt)
        x, w = randn(2, 6, 5).requires_grad_(), randn(4, 3, 3, seed=1).requires_grad_()

        y = functional.conv(x, w, stride=(1,), padding=(1,), dilation=(1,), groups=2, setting=Setting(recipe=recipe))
        found = torch.autograd.grad(y.square().sum(), (x, w))

        wanted = F.conv1d(applied(transform, x, 1), applied(transform, w, 1), padding=1, groups=2)
        torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)
        for a, b in zip(found, torch.autograd.grad(wanted.square().sum(), (x, w)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)

    @every_transform
    def test_rounding_is_passed_straight_through(self, transform: Transform) -> None:
        """With 3 bits: the transform's derivative of the gradient that the rounded operands give."""
        fmt = integer(bits=3, zero="symmetric", transform=transform)
        recipe = recipe_of(FP32, output__input=fmt, output__weight=fmt, grad_input__weight=fmt, grad_weight__input=fmt)
        x, w, g = randn(7, 10).requires_grad_(), randn(5, 10, seed=1).requires_grad_(), randn(7, 5, seed=2)

        y = functional.linear(x, w, setting=Setting(recipe=recipe))
        grad_x, grad_w = torch.autograd.grad(y, (x, w), g)

        # The backward sums over the first axis of x and w, and a transform that has an axis lies along that one.
        along = 0 if transform.along_axis else None
        x_hat, w_hat = (quantize(t.detach(), fmt).values for t in (x, w))
        x_back, w_back = (quantize(t.detach(), fmt, axis=along).values for t in (x, w))
        torch.testing.assert_close(y, x_hat @ w_hat.t(), rtol=0, atol=1e-12)
        wanted_x, wanted_w = transform.gradient(g @ w_back, x.detach(), place(x)), g.t() @ x_back
        torch.testing.assert_close(grad_x, wanted_x, rtol=0, atol=1e-12)
        torch.testing.assert_close(grad_w, transform.gradient(wanted_w, w.detach(), place(w)), rtol=0, atol=1e-12)
        assert not torch.equal(x_hat, x)

    @pytest.mark.parametrize("transform", [TanhMax(), Clip(low=-1, high=1), Centred()], ids=lambda t: t.kind)
    def test_samples_stay_samples(self, transform: Transform) -> None:
        """An input of sequences with a transform has the mean of its samples' extremes, not of its rows'."""
        fmt = integer(bits=3, zero="integer", range="sample-mean", transform=transform)
        recipe = recipe_of(FP32, output__input=fmt)
        x = randn(2, 8, 6)

        y = functional.linear(x, torch.eye(6, dtype=torch.float64), setting=Setting(recipe=recipe))

        torch.testing.assert_close(y, quantize(x, fmt).values, rtol=0, atol=1e-14)
        assert not torch.equal(y, quantize(x.flatten(0, 1), fmt).values.view_as(x))


@pytest.mark.parametrize("signs", [None, 5])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [2, 32, 1024])
def test_the_native_pass_gives_the_bits_of_torch(
    size: int, axis: int, signs: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Hadamard transform of whole blocks along either axis of a matrix, with signs and without."""
    shape = (2 * size, 70) if axis == 0 else (19, 2 * size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    transform, place = Hadamard(size=size, signs=signs), Place(dims=(axis,), axis=axis)

    natively = transform.forward(x, place)

    monkeypatch.setattr("lowbit.kernels.cpu.runs", lambda _: False)
    assert torch.equal(natively, transform.forward(x, place))
    assert not torch.equal(natively, x)
