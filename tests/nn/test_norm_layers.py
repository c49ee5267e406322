"""Range BN as a layer, and the plain layer it stands for."""

import copy

import pytest
import torch
from torch import nn

import lowbit
from helpers import range_by_loop
from lowbit.methods.recipe import RangeNorm, Recipe
from lowbit.nn import NORM_LAYERS
from lowbit.nn.norm import KAPPA
from lowbit.numerics.formats import FP32

SBM8 = Recipe.from_name("sbm8")
PLAIN = SBM8.replace(name="plain-range", normalization=RangeNorm(input=FP32, grad_output=FP32))
SHAPES = {nn.BatchNorm1d: (6, 3), nn.BatchNorm2d: (4, 3, 5, 5), nn.BatchNorm3d: (4, 3, 3, 2, 2)}


class TestLayer:
    """The layer that a conversion puts in place of batch normalisation."""

    @pytest.mark.parametrize("kind", list(NORM_LAYERS))
    def test_evaluation_equals_batch_norm(self, kind: type[nn.Module]) -> None:
        """Without quantisers, evaluation equals the plain layer's with the same buffers, which restore_ gives back."""
        layer = kind(3)
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        lowbit.convert_(layer, PLAIN)
        for _ in range(3):
            layer(torch.randn(SHAPES[kind]) * 2 + 1)
        x = torch.randn(SHAPES[kind])
        y = layer.eval()(x)

        lowbit.restore_(layer)

        assert type(layer) is kind
        torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(layer.running_var, torch.ones(3))

    @pytest.mark.parametrize("engine", ["reference", "auto"])
    def test_a_trained_layer_keeps_the_scale_of_its_outputs(self, engine: str) -> None:
        """With trained statistics `sbm8` evaluates as before to 2 %; its first step in training is 0 to 10 % wider."""
        generator = torch.Generator().manual_seed(0)
        layer = nn.BatchNorm2d(16, momentum=None)
        batches = 2 * torch.randn(3, 64, 16, 16, 16, generator=generator) + 1
        for x in batches:
            layer(x)
        trained, evaluated = layer(batches[0]).detach(), layer.eval()(batches[0]).detach()
        lowbit.convert_(layer, SBM8, engine=engine)

        ours = layer(batches[0])
        first = layer.train()(batches[0])

        assert 0 < (ours - evaluated).norm() < 0.02 * evaluated.norm()
        assert 1 < first.std() / trained.std() < 1.1

    def test_training_differs_from_batch_norm(self) -> None:
        """In training the range, not the variance, is what the layer divides by."""
        layer = nn.BatchNorm1d(3)
        x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
        plain = layer(x).detach()

        lowbit.convert_(layer, PLAIN)

        assert (layer(x) - plain).abs().max() > 0.1

    def test_quantisers_change_output_and_gradient(self) -> None:
        """With 8-bit input and gradient, both differ from the unquantised layer's by less than 3 % in norm."""
        layer, x = nn.BatchNorm2d(3), torch.randn(8, 3, 6, 6)
        g, results = torch.randn(8, 3, 6, 6), []
        for recipe in (PLAIN, SBM8):
            twin, leaf = copy.deepcopy(layer), x.clone().requires_grad_()
            lowbit.convert_(twin, recipe)
            # One scale for all, from the mean of extremes, clips a few values of normal noise.
            y = twin(leaf.clamp(-1, 1))
            y.backward(g)
            results.append((y.detach(), leaf.grad))

        for plain, quantized in zip(*results, strict=True):
            assert not torch.equal(plain, quantized)
            assert (plain - quantized).norm() < 0.03 * plain.norm()

    def test_three_axes_of_one_dimension(self) -> None:
        """BatchNorm1d of (B, C, L) has the statistics of (B, C, 1, L) in BatchNorm2d."""
        one, two = nn.BatchNorm1d(3), nn.BatchNorm2d(3)
        lowbit.convert_(one, PLAIN)
        lowbit.convert_(two, PLAIN)
        x = torch.randn(4, 3, 7)

        torch.testing.assert_close(one(x), two(x.unsqueeze(2)).squeeze(2))
        torch.testing.assert_close(one.running_var, two.running_var)

    def test_channels_last(self) -> None:
        """The memory layout of the input changes neither output nor gradient."""
        layer = nn.BatchNorm2d(3)
        lowbit.convert_(layer, SBM8)
        twin, results = copy.deepcopy(layer), []
        x, g = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
        for module, layout in ((layer, torch.contiguous_format), (twin, torch.channels_last)):
            leaf = x.clone(memory_format=layout).requires_grad_()
            y = module(leaf)
            y.backward(g.clone(memory_format=layout))
            results.append((y, leaf.grad))

        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    def test_running_statistics_move_towards_mean_and_squared_sigma(self) -> None:
        """After one step with momentum 0.1 the buffers are 0.1 mu and 0.9 + 0.1 sigma squared."""
        layer = nn.BatchNorm1d(3)
        lowbit.convert_(layer, PLAIN)
        x = torch.randn(8, 3)

        layer(x)

        means, sigmas = range_by_loop(x, KAPPA["authors"])
        assert layer.running_mean.tolist() == pytest.approx([0.1 * m for m in means], rel=1e-5, abs=1e-7)
        assert layer.running_var.tolist() == pytest.approx([0.9 + 0.1 * s * s for s in sigmas], rel=1e-5)
        assert layer.num_batches_tracked == 1

    def test_momentum_none_is_the_cumulative_mean(self) -> None:
        """With momentum None the buffers are the plain mean over the batches."""
        layer = nn.BatchNorm1d(3, momentum=None)
        lowbit.convert_(layer, PLAIN)
        batches = torch.randn(4, 8, 3)

        for x in batches:
            layer(x)

        torch.testing.assert_close(layer.running_mean, batches.mean((0, 1)))
        expected = torch.stack([torch.tensor(range_by_loop(x, KAPPA["authors"])[1]).square() for x in batches]).mean(0)
        torch.testing.assert_close(layer.running_var, expected)

    def test_without_affine_parameters(self) -> None:
        """affine=False normalises alone, and the input still gets its gradient."""
        layer, affine = nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3)
        lowbit.convert_(layer, PLAIN)
        lowbit.convert_(affine, PLAIN)
        x = torch.randn(8, 3).requires_grad_()

        y = layer(x)
        y.square().sum().backward()

        torch.testing.assert_close(y, affine(x))
        assert bool(x.grad.any())

    def test_without_running_statistics(self) -> None:
        """track_running_stats=False normalises by the batch in evaluation too."""
        layer = nn.BatchNorm1d(3, track_running_stats=False)
        lowbit.convert_(layer, PLAIN)
        x = torch.randn(8, 3)

        y = layer(x)

        assert torch.equal(layer.eval()(x), y)

    def test_evaluation_leaves_the_buffers(self) -> None:
        """Evaluation changes neither running statistics nor their count, and they ask for no gradient."""
        layer = nn.BatchNorm1d(3)
        lowbit.convert_(layer, SBM8)
        layer(torch.randn(8, 3))
        before = {name: value.clone() for name, value in layer.state_dict().items()}

        layer.eval()(torch.randn(8, 3)).sum().backward()

        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
        assert not layer.running_mean.requires_grad

    def test_one_value_per_channel_is_refused(self) -> None:
        """A batch of one in training raises a ValueError that names the shape; evaluation takes it."""
        layer = nn.BatchNorm1d(3)
        lowbit.convert_(layer, SBM8)

        with pytest.raises(ValueError, match=r"\(1, 3\)"):
            layer(torch.randn(1, 3))
        assert layer.eval()(torch.randn(1, 3)).isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_output_has_the_dtype_of_the_input(self, dtype: torch.dtype) -> None:
        """A half-precision or double input comes back in its dtype."""
        layer = nn.BatchNorm1d(3).to(dtype)
        lowbit.convert_(layer, SBM8)

        y = layer(torch.randn(8, 3).to(dtype))
        y.sum().backward()

        assert y.dtype == layer.weight.grad.dtype == dtype
