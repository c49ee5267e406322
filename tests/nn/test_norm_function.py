"""Range BN as a function: its output and its gradient."""

import math

import pytest
import torch
from torch import Tensor

from lowbit.methods.recipe import RangeNorm
from lowbit.nn.norm import NormSetting, range_batch_norm
from lowbit.numerics.formats import FP32


def _setting(eps: float = 1e-5, **changes: object) -> NormSetting:
    return NormSetting(norm=RangeNorm(input=FP32, grad_output=FP32, **changes), eps=eps)


class TestFunction:
    """The function: output and gradient."""

    def test_two_close_pairs_far_apart_are_not_divided_by_almost_nothing(self) -> None:
        """Four values in one chunk stay below 2, where two chunks of two, as in the authors' code, blow them up."""
        x = torch.tensor([[1.0], [1.001], [-1.0], [-1.001]])

        one, two = (
            range_batch_norm(x, None, None, setting=_setting(fewest_per_chunk=fewest))[0].abs().max()
            for fewest in (16, 2)
        )

        assert 1 < one < 2
        assert two > 100

    @pytest.mark.parametrize("place", ["inside", "outside"])
    @pytest.mark.parametrize("shape", [(5, 3), (3, 2, 5), (2, 3, 3, 3)])
    def test_gradients_are_the_derivatives(self, shape: tuple[int, ...], place: str) -> None:
        """Numerical differentiation confirms the gradients of x, gamma and beta, chunks of unequal length included."""
        x, gamma, beta = (
            torch.randn(*s, dtype=torch.float64).requires_grad_() for s in (shape, shape[1:2], shape[1:2])
        )

        def call(*t: Tensor) -> Tensor:
            return range_batch_norm(*t, setting=_setting(eps=0.5, chunks=2, fewest_per_chunk=2, epsilon=place))[0]

        assert torch.autograd.gradcheck(call, (x, gamma, beta))

    def test_gradients_with_fixed_statistics_are_the_derivatives(self) -> None:
        """So they are where the statistics are fixed, as in evaluation."""
        x, gamma, beta = (torch.randn(*s, dtype=torch.float64).requires_grad_() for s in ((4, 3, 2), (3,), (3,)))
        fixed = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)

        def call(*t: Tensor) -> Tensor:
            return range_batch_norm(*t, setting=_setting(), fixed=fixed)[0]

        assert torch.autograd.gradcheck(call, (x, gamma, beta))

    def test_ties_give_the_gradient_to_the_first(self) -> None:
        """Of several equal largest values of a chunk, only the first receives the range's share."""
        x = torch.tensor([[1.0], [3.0], [3.0], [0.0]], dtype=torch.float64).requires_grad_()

        y, _, _ = range_batch_norm(x, None, None, setting=_setting(chunks=1))
        y[0].backward()

        assert x.grad[1] != x.grad[2]

    @pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (0, 3, 2, 2)])
    def test_fewer_than_two_values_are_refused(self, shape: tuple[int, ...]) -> None:
        """One value per channel, or none, raises a ValueError that names the shape."""
        with pytest.raises(ValueError, match=rf"\({shape[0]}, 3"):
            range_batch_norm(torch.randn(*shape), None, None, setting=_setting())

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_nan_and_inf_surface_as_nan(self, bad: float) -> None:
        """A nan or inf in a channel makes that channel nan, and no other where nothing is quantised."""
        x = torch.randn(4, 2, 3)
        x[0, 0, 0] = bad

        y, _, _ = range_batch_norm(x, None, None, setting=_setting())

        assert y[:, 0].isnan().all()
        assert y[:, 1].isfinite().all()

    def test_a_constant_channel_gives_zeros(self) -> None:
        """A channel without range is normalised to 0 with a finite gradient."""
        x = torch.full((4, 1, 3), 2.0).requires_grad_()

        y, _, _ = range_batch_norm(x, None, None, setting=_setting())
        y.square().sum().backward()

        assert not y.any()
        assert x.grad.isfinite().all()

    def test_a_second_derivative_is_refused(self) -> None:
        """create_graph=True raises and says what to do."""
        x = torch.randn(4, 2).requires_grad_()
        y, _, _ = range_batch_norm(x, None, None, setting=_setting())

        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(y.sum(), x, create_graph=True)
