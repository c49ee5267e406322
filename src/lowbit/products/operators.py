"""Operators: what a layer multiplies, as three products on plain tensors, and where channels lie.

Notation: x input, w weight, g grad_output. ``output = x w``, ``grad_input = g w``, ``grad_weight = g x``.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.products import strides


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The convolution that a layer computes, with one to three axes; a linear layer does not have one."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool


class Op(Protocol):
    """What is multiplied: the three products of one kind of layer on plain tensors, and where its channels lie."""

    def __hash__(self) -> int:
        """Equal operators have equal hashes."""

    @property
    def kind(self) -> str:
        """The operator's name, e.g. ``"conv2d"``."""

    def output(self, x: Tensor, w: Tensor) -> Tensor:
        """The product of input and weight."""

    def output_shape(self, x: torch.Size, w: torch.Size) -> torch.Size:
        """The shape of the output."""

    def output_strides(self, shape: torch.Size, x: Tensor, w: Tensor) -> strides.Strides:
        """The strides of an output of this shape, those that the plain layer gives it."""

    def grad_input(self, g: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
        """The product of grad_output and weight, in the shape of the input."""

    def grad_weight(self, g: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """The product of grad_output and input, in the shape of the weight."""

    def grad_bias(self, g: Tensor) -> Tensor:
        """The sum of grad_output over all but its channels."""

    def kernel(self, product: str) -> str:
        """The operator that executes a product on the reference engine."""

    def macs(self, x: torch.Size, w: torch.Size, y: torch.Size) -> int:
        """Multiply-accumulates of each of the three products, one fused multiply-add counted as one."""

    def view(self, operand: str, shape: torch.Size) -> tuple[int, ...]:
        """The shape that the axes below count in: it has the same elements in the same order."""

    def squares(self, operand: str, shape: torch.Size) -> tuple[tuple[int, ...], tuple[int, int]]:
        """A view as `view`, whose axes may be joined further, and its two axes that square blocks lie along."""

    def summed(self, product: str, operand: str, dim: int) -> tuple[int, ...]:
        """Of the `dim` axes of the view, those that the product sums over."""

    def output_channels(self, dim: int) -> tuple[int, ...]:
        """The axes of the weight's view that count output channels."""

    def bias_length(self, w: torch.Size) -> int:
        """How many numbers the bias of a weight of this shape has: one for each output channel."""

    @property
    def has_rows(self) -> bool:
        """Whether operands are matrices, whose rows lie along the last axis."""

    @property
    def geometry(self) -> Geometry | None:
        """The convolution as integer kernels take it; None for a matrix product."""


@dataclass(frozen=True)
class Linear:
    """``y (..., N) = x (..., K) w (N, K)^T``."""

    kind: str = field(default="linear", init=False)
    has_rows: bool = field(default=True, init=False)
    geometry: None = field(default=None, init=False)

    def output_shape(self, x: torch.Size, w: torch.Size) -> torch.Size:
        """``(..., N)``."""
        if len(w) != 2 or not x or x[-1] != w[1]:
            raise RuntimeError(f"linear cannot multiply shapes {tuple(x)} of the input and {tuple(w)} of the weight")
        return torch.Size((*x[:-1], w[0]))

    def output_strides(self, shape: torch.Size, x: Tensor, w: Tensor) -> strides.Strides:  # noqa: ARG002 - always so
        """Contiguous."""
        return strides.contiguous(shape)

    def output(self, x: Tensor, w: Tensor) -> Tensor:
        """``x w^T``."""
        return F.linear(x, w)

    def grad_input(self, g: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
        """``g w``."""
        return (g @ w).reshape(shape)

    def grad_weight(self, g: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """``g^T x`` over all rows."""
        return (g.flatten(0, -2).t() @ x.flatten(0, -2)).reshape(shape)

    def grad_bias(self, g: Tensor) -> Tensor:
        """The sum over all rows."""
        return g.flatten(0, -2).sum(0)

    def kernel(self, product: str) -> str:
        """`aten::linear` forward, `aten::mm` backward."""
        return "aten::linear" if product == "output" else "aten::mm"

    def macs(self, x: torch.Size, w: torch.Size, y: torch.Size) -> int:  # noqa: ARG002 - the shape of y follows
        """Rows times K times N."""
        return x.numel() * w[0]

    def view(self, operand: str, shape: torch.Size) -> tuple[int, ...]:
        """Rows (all leading axes) by features; the weight as it is."""
        return tuple(shape) if operand == "weight" else (math.prod(shape[:-1]), shape[-1])

    def squares(self, operand: str, shape: torch.Size) -> tuple[tuple[int, ...], tuple[int, int]]:
        """The last two axes."""
        view = self.view(operand, shape)
        return view, (len(view) - 2, len(view) - 1)

    def summed(self, product: str, operand: str, dim: int) -> tuple[int, ...]:  # noqa: ARG002 - always two axes
        """One of the two axes."""
        return {
            ("output", "input"): (1,),
            ("output", "weight"): (1,),
            ("grad_input", "grad_output"): (1,),
            ("grad_input", "weight"): (0,),
            ("grad_weight", "grad_output"): (0,),
            ("grad_weight", "input"): (0,),
        }[product, operand]

    def output_channels(self, dim: int) -> tuple[int, ...]:  # noqa: ARG002 - always two axes
        """Axis 0 of (N, K)."""
        return (0,)

    def bias_length(self, w: torch.Size) -> int:
        """N."""
        return w[0]


@dataclass(frozen=True)
class Matmul:
    """``y (..., M, N) = x (..., M, K) w (..., K, N)``; leading axes broadcast."""

    kind: str = field(default="matmul", init=False)
    has_rows: bool = field(default=True, init=False)
    geometry: None = field(default=None, init=False)

    def output_shape(self, x: torch.Size, w: torch.Size) -> torch.Size:
        """``(..., M, N)``."""
        return torch.Size((*torch.broadcast_shapes(x[:-2], w[:-2]), x[-2], w[-1]))

    def output_strides(self, shape: torch.Size, x: Tensor, w: Tensor) -> strides.Strides:  # noqa: ARG002 - always so
        """Contiguous."""
        return strides.contiguous(shape)

    def output(self, x: Tensor, w: Tensor) -> Tensor:
        """``x w``."""
        return x @ w

    def grad_input(self, g: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
        """``g w^T``, summed over broadcast axes."""
        return (g @ w.transpose(-1, -2)).sum_to_size(shape)

    def grad_weight(self, g: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """``x^T g``, summed over broadcast axes."""
        return (x.transpose(-1, -2) @ g).sum_to_size(shape)

    def grad_bias(self, g: Tensor) -> Tensor:
        """The sum over all rows; `matmul` takes no bias, so it is never asked for."""
        return g.flatten(0, -2).sum(0)

    def kernel(self, product: str) -> str:  # noqa: ARG002 - all three alike
        """`aten::matmul`."""
        return "aten::matmul"

    def macs(self, x: torch.Size, w: torch.Size, y: torch.Size) -> int:  # noqa: ARG002 - w's K is x's
        """Elements of the result times K."""
        return y.numel() * x[-1]

    def view(self, operand: str, shape: torch.Size) -> tuple[int, ...]:  # noqa: ARG002 - all operands alike
        """The shape as it is."""
        return tuple(shape)

    def squares(self, operand: str, shape: torch.Size) -> tuple[tuple[int, ...], tuple[int, int]]:
        """The last two axes."""
        view = self.view(operand, shape)
        return view, (len(view) - 2, len(view) - 1)

    def summed(self, product: str, operand: str, dim: int) -> tuple[int, ...]:
        """The last axis or the one before it."""
        last = {("output", "input"), ("grad_input", "grad_output"), ("grad_input", "weight")}
        return (dim - 1,) if (product, operand) in last else (dim - 2,)

    def output_channels(self, dim: int) -> tuple[int, ...]:
        """The last axis of (..., K, N), separately for each matrix."""
        return (*range(dim - 2), dim - 1)

    def bias_length(self, w: torch.Size) -> int:
        """N; `matmul` takes no bias."""
        return w[-1]


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """A 1-, 2- or 3-dimensional convolution or transposed convolution of zero-padded input ``(B, C, *size)``.

    Args:
        stride, padding, dilation: one number per spatial axis.
        groups: number of groups.
        transposed: the weight is ``(I, O/groups, *kernel)`` and the output is the larger side.
        output_padding: extra size on one side of a transposed convolution's output.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    has_rows: bool = field(default=False, init=False)

    @property
    def kind(self) -> str:
        """``conv2d``, ``conv_transpose1d``, ..."""
        return f"{'conv_transpose' if self.transposed else 'conv'}{len(self.stride)}d"

    @property
    def geometry(self) -> Geometry:
        """The geometry, without the output padding, which follows from the shape of the result."""
        return Geometry(
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            transposed=self.transposed,
        )

    def _arguments(self) -> tuple[Any, ...]:
        output_padding = self.output_padding or (0,) * len(self.stride)
        return self.stride, self.padding, self.dilation, self.transposed, output_padding, self.groups

    def output_shape(self, x: torch.Size, w: torch.Size) -> torch.Size:
        """``(B, channels, *size)``.

        Raises:
            RuntimeError: axes or channels that do not fit, or a kernel that is empty or larger than the padded input.
        """
        if not (len(x) == len(w) == len(self.stride) + 2 and w[0] % self.groups == 0 and min(w[2:]) > 0):
            raise RuntimeError(
                f"{self.kind} in {self.groups} groups cannot multiply shapes {tuple(x)} of the input and {tuple(w)} of "
                "the weight"
            )
        wanted = w[0] if self.transposed else w[1] * self.groups
        sizes = []
        padding = self.output_padding or (0,) * len(self.stride)
        for i, (size, kernel) in enumerate(zip(x[2:], w[2:], strict=True)):
            reach = self.dilation[i] * (kernel - 1)
            if self.transposed:
                sizes.append((size - 1) * self.stride[i] - 2 * self.padding[i] + reach + padding[i] + 1)
            else:
                sizes.append((size + 2 * self.padding[i] - reach - 1) // self.stride[i] + 1)
        # As in torch, a batch may be empty, but if it is not, its samples may not be; a transposed result may be empty.
        hollow = 0 in x[2:] and 0 not in x[:2]
        if x[1] != wanted or hollow or min(sizes) < (0 if self.transposed else 1):
            raise RuntimeError(
                f"{self.kind} cannot multiply shapes {tuple(x)} of the input and {tuple(w)} of the weight: it takes "
                f"{wanted} channels and sizes that its kernel fits into"
            )
        return torch.Size((x[0], self.bias_length(w), *sizes))

    def output_strides(self, shape: torch.Size, x: Tensor, w: Tensor) -> strides.Strides:
        """Channels last where the input or the weight is."""
        return strides.of_convolution(shape, x, w)

    def output(self, x: Tensor, w: Tensor) -> Tensor:
        """The convolution."""
        y: Tensor = torch.ops.aten.convolution(x, w, None, *self._arguments())
        return y

    def _backward(self, g: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            g, x, w, None, *self._arguments(), mask
        )
        return grads

    def grad_input(self, g: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the input; only its shape is needed, so an untouched tensor stands for it."""
        return self._backward(g, g.new_empty(shape), w, [True, False, False])[0]

    def grad_weight(self, g: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the weight; only its shape is needed, so an untouched tensor stands for it."""
        return self._backward(g, x, g.new_empty(shape), [False, True, False])[1]

    def grad_bias(self, g: Tensor) -> Tensor:
        """The sum over batch and positions."""
        return g.sum((0, *range(2, g.dim())))

    def kernel(self, product: str) -> str:
        """`aten::convolution` forward, `aten::convolution_backward` backward."""
        return "aten::convolution" if product == "output" else "aten::convolution_backward"

    def macs(self, x: torch.Size, w: torch.Size, y: torch.Size) -> int:
        """Positions of the smaller side times one kernel; taps that fall on the padding count too."""
        return (x if self.transposed else y).numel() * math.prod(w[1:])

    def view(self, operand: str, shape: torch.Size) -> tuple[int, ...]:
        """Channels split into (group, channel in group); the weight is (group, its first axis, its second, *kernel)."""
        split = 0 if operand == "weight" else 1
        return (*shape[:split], self.groups, shape[split] // self.groups, *shape[split + 1 :])

    def squares(self, operand: str, shape: torch.Size) -> tuple[tuple[int, ...], tuple[int, int]]:
        """Of a weight, both its channels in a group, at each tap; else channels in a group and places of a sample.

        Places are one axis, row after row.
        """
        view = self.view(operand, shape)
        return (view, (1, 2)) if operand == "weight" else ((*view[:3], math.prod(view[3:])), (2, 3))

    def summed(self, product: str, operand: str, dim: int) -> tuple[int, ...]:
        """The channels of one side within a group, and the window; or batch and positions."""
        positions = range(3, dim)
        if operand != "weight":
            return (0, *positions) if product == "grad_weight" else (2, *positions)
        input_channels = 1 if self.transposed else 2
        return (input_channels if product == "output" else 3 - input_channels, *positions)

    def output_channels(self, dim: int) -> tuple[int, ...]:  # noqa: ARG002 - the same for every dimension
        """Group and output channel in the group."""
        return (0, 2) if self.transposed else (0, 1)

    def bias_length(self, w: torch.Size) -> int:
        """O."""
        return w[1] * self.groups if self.transposed else w[0]
