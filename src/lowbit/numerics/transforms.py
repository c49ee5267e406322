"""Transforms: what is done to values before they are put on a grid, and what that does to their gradient.

Notation: x value, y its transform, H a Hadamard matrix of size n, g a gradient. The value of an operand is
``back(quantised(forward(x)))``. The gradient of x is `gradient` of that of the value; rounding itself passes gradients
straight through.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lowbit.errors import UsageError, shown
from lowbit.inputs.checks import check_fields
from lowbit.kernels import cpu
from lowbit.numerics.parts import check_interval
from lowbit.numerics.rounding import uniform_noise
from lowbit.numerics.scales import PowerOfTwoScale


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a transform works.

    Args:
        dims: the dims that share one scale; if blocks do, the dims that are cut into blocks.
        axis: the axis that the product sums over; the last one without a product.
    """

    dims: tuple[int, ...]
    axis: int


class Transform(Protocol):
    """What is done before the grid."""

    kind: ClassVar[str]
    # Whether the gradient depends on x; otherwise gradients pass as they are.
    has_gradient: ClassVar[bool]
    # Whether it works along the axis that the product sums over.
    along_axis: ClassVar[bool]

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """The transform of x."""

    def back(self, y: Tensor, x: Tensor, place: Place) -> Tensor:
        """The value that a quantised y stands for; y was made of `x`."""

    def gradient(self, g: Tensor, x: Tensor, place: Place) -> Tensor:
        """The gradient of x, given the gradient of the value."""

    def __str__(self) -> str:
        """Its name in reports; empty if it goes without saying."""


@dataclass(frozen=True, kw_only=True)
class NoTransform:
    """Values as they are."""

    kind: ClassVar[str] = "none"
    has_gradient: ClassVar[bool] = False
    along_axis: ClassVar[bool] = False

    def forward(self, x: Tensor, place: Place) -> Tensor:  # noqa: ARG002 - as it is
        """As it is."""
        return x

    def back(self, y: Tensor, x: Tensor, place: Place) -> Tensor:  # noqa: ARG002 - as it is
        """See the class."""
        return y

    def gradient(self, g: Tensor, x: Tensor, place: Place) -> Tensor:  # noqa: ARG002 - as it is
        """As it is."""
        return g

    def __str__(self) -> str:
        return ""


NO_TRANSFORM = NoTransform()


@dataclass(frozen=True, kw_only=True)
class TanhMax:
    """``y = tanh(x) / M`` with ``M = max |tanh(x)|`` of the tensor; the value stays y, in [-1, 1].

    ``dx_i = (g_i / M) (1 - t_i**2)`` with ``t = tanh(x)``, and the element m where |t| is largest further gets
    ``-sign(t_m) (1 - t_m**2) (sum_j g_j t_j) / M**2``. A tensor of zeros stays as it is, with the gradient g.

    Source: Zhou et al. 2016, DoReFa-Net, arXiv:1606.06160, as in its authors' code.
    """

    kind: ClassVar[str] = "tanh-max"
    has_gradient: ClassVar[bool] = True
    along_axis: ClassVar[bool] = False

    def forward(self, x: Tensor, place: Place) -> Tensor:  # noqa: ARG002 - of the whole tensor
        """See the class."""
        t = x.tanh().masked_fill(x.isinf(), torch.nan)  # the tanh of an inf would be the number 1
        return t / self._largest(t)

    def back(self, y: Tensor, x: Tensor, place: Place) -> Tensor:  # noqa: ARG002 - stays in [-1, 1]
        """See the class."""
        return y

    def gradient(self, g: Tensor, x: Tensor, place: Place) -> Tensor:  # noqa: ARG002 - of the whole tensor
        """See the class."""
        if not x.numel():
            return g
        t = x.tanh()
        most, slope = self._largest(t), 1 - t * t
        m = t.abs().argmax().reshape(1)  # as a tensor, since a planned run does not have values
        through_most = t.flatten()[m].sign() * slope.flatten()[m] * (g * t).sum() / (most * most)
        return (g / most * slope).flatten().index_add(0, m, -through_most).view(x.shape)

    @staticmethod
    def _largest(t: Tensor) -> Tensor:
        most = t.abs().amax() if t.numel() else t.new_ones(())
        return torch.where(most == 0, torch.ones_like(most), most)

    def __str__(self) -> str:
        return "tanh/max"


@dataclass(frozen=True, kw_only=True)
class Clip:
    """``y = min(max(x, low), high)``; values outside get no gradient.

    Args:
        low: the smallest value.
        high: the largest, more than low.
    """

    kind: ClassVar[str] = "clip"
    has_gradient: ClassVar[bool] = True
    along_axis: ClassVar[bool] = False

    low: float
    high: float

    def __post_init__(self) -> None:
        check_fields(self)
        check_interval(self.low, self.high)

    def forward(self, x: Tensor, place: Place) -> Tensor:  # noqa: ARG002 - each value alone
        """See the class."""
        return x.clamp(self.low, self.high).masked_fill(x.isinf(), torch.nan)

    def back(self, y: Tensor, x: Tensor, place: Place) -> Tensor:  # noqa: ARG002 - stays clipped
        """See the class."""
        return y

    def gradient(self, g: Tensor, x: Tensor, place: Place) -> Tensor:  # noqa: ARG002 - each value alone
        """The gradient of the value where x is from low to high, and 0 elsewhere."""
        return g.where((x >= self.low) & (x <= self.high), 0)

    def __str__(self) -> str:
        return f"clipped to [{self.low:g}, {self.high:g}]"


@dataclass(frozen=True, kw_only=True)
class Hadamard:
    """``y = H x / sqrt(n)`` in blocks of n along the axis that is summed over; the value is transformed back.

    H is the matrix of Sylvester, symmetric and its own inverse up to the factor. A shorter last block is filled with
    zeros. Outliers are spread over their block, so that the other values keep more of the grid.

    Args:
        size: n, a power of two from 2 to 1024.
        signs: seed of n random signs, by which the values are multiplied first, the same in every block and step; None
            for none. A sign is negative where u < 1/2, u the noise of the key (seed, 0).
    """

    kind: ClassVar[str] = "hadamard"
    has_gradient: ClassVar[bool] = False
    along_axis: ClassVar[bool] = True

    size: int
    signs: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.signs is not None and not 0 <= self.signs < 2**32:
            raise UsageError(f"signs={shown(self.signs)}: a seed of signs is a whole number from 0 to 2**32 - 1")
        if not 2 <= self.size <= 1024 or self.size & (self.size - 1):
            raise UsageError(f"size={self.size}: a Hadamard matrix has a size of 2, 4, 8 ... 1024 here")

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """See the class; the result is longer along the axis if the last block is filled."""
        short = -x.shape[place.axis] % self.size
        if short == 0 and x.dim() == 2 and x.dtype == torch.float32 and x.numel() and cpu.runs(x):
            signs = None if self.signs is None else self._signs()
            return cpu.hadamard(x.contiguous(), along=place.axis % 2 == 1, size=self.size, signs=signs)
        rows = x.movedim(place.axis, -1)
        rows = torch.nn.functional.pad(rows, (0, short)) if short else rows
        return self._turned(self._signed(rows)).movedim(-1, place.axis)

    def back(self, y: Tensor, x: Tensor, place: Place) -> Tensor:
        """The values of y, without the zeros that were filled in."""
        rows = self._signed(self._turned(y.movedim(place.axis, -1)))
        return rows[..., : x.shape[place.axis]].movedim(-1, place.axis)

    def gradient(self, g: Tensor, x: Tensor, place: Place) -> Tensor:  # noqa: ARG002 - there and back
        """As it is."""
        return g

    def _signed(self, rows: Tensor) -> Tensor:
        """Each block of the last axis times the signs, which undo themselves."""
        if self.signs is None:
            return rows
        blocks: Tensor = rows.unflatten(-1, (-1, self.size)) * self._signs().to(rows)
        return blocks.flatten(-2)

    def _signs(self) -> Tensor:
        """1 or -1 for each number of a block, float32."""
        key = torch.tensor([self.signs, 0], dtype=torch.int64, device="cpu")
        return (uniform_noise(key, (self.size,)) < 0.5).float() * -2 + 1

    def _turned(self, rows: Tensor) -> Tensor:
        """Each block of the last axis times the matrix, by butterflies: sums and differences of halves."""
        t = rows.unflatten(-1, (-1, self.size))
        half = 1
        while half < self.size:
            pairs = t.unflatten(-1, (-1, 2, half))
            a, b = pairs[..., 0, :], pairs[..., 1, :]
            t = torch.stack([a + b, a - b], -2).flatten(-3)
            half *= 2
        turned: Tensor = t * self.size**-0.5
        return turned.flatten(-2)

    def __str__(self) -> str:
        return f"Hadamard {self.size}" + ("" if self.signs is None else f" with signs {self.signs}")


@dataclass(frozen=True, kw_only=True)
class RandomHadamard:
    """A Hadamard transform whose random signs are drawn anew for each operand of each step, from the noise of rounding.

    Args:
        size: as for `Hadamard`.
    """

    kind: ClassVar[str] = "random-hadamard"
    has_gradient: ClassVar[bool] = False
    along_axis: ClassVar[bool] = True

    size: int

    def __post_init__(self) -> None:
        check_fields(self)
        Hadamard(size=self.size)

    def drawn(self, noise: Tensor) -> Hadamard:
        """The transform with signs that the last draw says."""
        return Hadamard(size=self.size, signs=int(2**24 * noise.flatten()[-1]) if noise.numel() else 0)

    def forward(self, x: Tensor, place: Place) -> Tensor:  # noqa: ARG002 - none can be transformed
        """It raises, as there are no signs."""
        raise TypeError(f"{self}: its signs are not drawn")

    def back(self, y: Tensor, x: Tensor, place: Place) -> Tensor:  # noqa: ARG002 - none can be transformed
        """It raises, as there are no signs."""
        raise TypeError(f"{self}: its signs are not drawn")

    def gradient(self, g: Tensor, x: Tensor, place: Place) -> Tensor:  # noqa: ARG002 - there and back
        """As it is."""
        return g

    def __str__(self) -> str:
        return f"Hadamard {self.size} with new signs"


@dataclass(frozen=True, kw_only=True)
class Centred:
    """``y = x - mean(x)``, the mean of what shares a scale; the value has the mean added again, in full precision.

    If blocks share scales, the mean is that of the whole axes that are cut into blocks.
    """

    kind: ClassVar[str] = "centred"
    has_gradient: ClassVar[bool] = False
    along_axis: ClassVar[bool] = False

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """See the class."""
        return x - self._mean(x, place)

    def back(self, y: Tensor, x: Tensor, place: Place) -> Tensor:
        """The values with the mean added again."""
        return y + self._mean(x, place)

    def gradient(self, g: Tensor, x: Tensor, place: Place) -> Tensor:  # noqa: ARG002 - there and back
        """As it is."""
        return g

    @staticmethod
    def _mean(x: Tensor, place: Place) -> Tensor:
        return x.mean(place.dims, keepdim=True) if place.dims and x.numel() else x * 0

    def __str__(self) -> str:
        return "centred"


@dataclass(frozen=True, kw_only=True)
class Normalized:
    """``y = size x / R`` with R the power of two nearest to ``max|x|`` of the tensor; the value stays y.

    What is left of x is its shape, and its magnitude is dropped. A tensor of zeros stays as it is. The gradient is that
    for a constant R, ``g size / R``.

    Args:
        size: the value that R gets, positive.

    Source: Yang et al. 2020, WAGEUBN, arXiv:1909.02384, the constant quantisation of its weights' gradients.
    """

    kind: ClassVar[str] = "normalized"
    has_gradient: ClassVar[bool] = True
    along_axis: ClassVar[bool] = False

    size: float

    def __post_init__(self) -> None:
        check_fields(self)
        check_interval(0.0, self.size)

    def forward(self, x: Tensor, place: Place) -> Tensor:  # noqa: ARG002 - of the whole tensor
        """See the class."""
        return x / self._unit(x) * self.size

    def back(self, y: Tensor, x: Tensor, place: Place) -> Tensor:  # noqa: ARG002 - stays y
        """See the class."""
        return y

    def gradient(self, g: Tensor, x: Tensor, place: Place) -> Tensor:  # noqa: ARG002 - of the whole tensor
        """See the class."""
        return g / self._unit(x) * self.size

    def _unit(self, x: Tensor) -> Tensor:
        """R; the size for zeros."""
        most = x.detach().abs().amax() if x.numel() else x.new_ones(())
        unit = PowerOfTwoScale(direction="nearest").rounded(most, most, 1.0)
        return torch.where(unit == 0, torch.full_like(unit, self.size), unit)

    def __str__(self) -> str:
        return f"normalized to {self.size:g}"


TRANSFORMS: tuple[type[Transform], ...] = (
    NoTransform,
    TanhMax,
    Clip,
    Hadamard,
    RandomHadamard,
    Centred,
    Normalized,
)
