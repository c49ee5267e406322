"""The network of the gates."""

import pytest
import torch

from lowbit.nn.gate import pooled


@pytest.mark.parametrize(
    ("channels_last", "shape", "dims"), [(False, (2, 3, 4, 5), (2, 3)), (True, (2, 4, 3), (1,)), (True, (2, 3), ())]
)
def test_pooling(channels_last: bool, shape: tuple[int, ...], dims: tuple[int, ...]) -> None:
    """The mean over all axes but samples and channels."""
    x = torch.randn(shape)

    expected = x.mean(dims) if dims else x
    torch.testing.assert_close(pooled(x, channels_last=channels_last), expected)
