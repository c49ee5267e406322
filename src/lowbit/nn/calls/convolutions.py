"""Convolutions that functions of torch ask for; see `lowbit.nn.calls.products`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lowbit import functional
from lowbit.nn.calls.products import Asked, Settings
from lowbit.products.operators import Convolution


def convolution(axes: int) -> Callable[..., Asked]:
    """The reader of `conv1d`, `conv2d` or `conv3d`."""

    def read(
        input: Tensor,  # noqa: A002 - torch's argument
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Asked:
        strides, dilations = _numbers(stride, axes), _numbers(dilation, axes)
        given = padding if isinstance(padding, str) else _numbers(padding, axes)
        op = Convolution(
            stride=strides,
            padding=(0,) * axes if isinstance(given, str) else given,
            dilation=dilations,
            groups=groups,
        )

        def compute(settings: Settings) -> Tensor:
            return functional.conv(
                input,
                weight,
                bias,
                stride=strides,
                padding=given,
                dilation=dilations,
                groups=groups,
                setting=settings(_as_batch(input, axes)),
            )

        return _asked(input, weight, op, compute)

    return read


def transposed_convolution(axes: int) -> Callable[..., Asked]:
    """The reader of `conv_transpose1d`, `conv_transpose2d` or `conv_transpose3d`."""

    def read(
        input: Tensor,  # noqa: A002 - torch's argument
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Asked:
        op = Convolution(
            stride=_numbers(stride, axes),
            padding=_numbers(padding, axes),
            dilation=_numbers(dilation, axes),
            groups=groups,
            transposed=True,
            output_padding=_numbers(output_padding, axes),
        )

        def compute(settings: Settings) -> Tensor:
            return functional.conv_transpose(
                input,
                weight,
                bias,
                stride=op.stride,
                padding=op.padding,
                output_padding=op.output_padding,
                dilation=op.dilation,
                groups=groups,
                setting=settings(_as_batch(input, axes)),
            )

        return _asked(input, weight, op, compute)

    return read


def _asked(x: Tensor, weight: Tensor, op: Convolution, compute: Callable[[Settings], Tensor]) -> Asked:
    """A convolution, whose kernel alone can be the weight."""
    return Asked(
        operator=op.kind,
        left=x,
        right=weight,
        op=lambda left_is_weight: None if left_is_weight else op,
        compute=lambda _, settings: compute(settings),
    )


def _numbers(given: Any, axes: int) -> tuple[int, ...]:
    """One number for each spatial axis."""
    if isinstance(given, int):
        return (given,) * axes
    numbers = tuple(int(n) for n in given)
    return numbers * axes if len(numbers) == 1 else numbers


def _as_batch(x: Tensor, axes: int) -> Tensor:
    """The input with an axis of samples."""
    return x if x.dim() == axes + 2 else x.unsqueeze(0)
