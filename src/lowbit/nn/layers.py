"""The quantised twins of linear and convolution layers: one call each plus a site for their state.

`lowbit.convert_` turns a plain layer into its twin by changing its class in place, so its name, parameters,
hooks and every reference to it stay what they were; `lowbit.restore_` changes it back.
"""

from typing import Any

from torch import Tensor, nn

from lowbit import functional
from lowbit.nn.site import Clock, Site, product_site
from lowbit.recipe import Recipe


class QuantLayer(nn.Module):
    """A layer that computes in the formats of a recipe.

    Attributes:
        site: the state of its products.
    """

    site: Site

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        plain = next(base.__name__ for base in type(self).__mro__ if base.__module__.startswith("torch.nn"))
        raise TypeError(
            f"{type(self).__name__} is made of a plain layer: lowbit.convert_(torch.nn.{plain}(...), recipe)"
        )

    def attach(self, *, name: str, recipe: Recipe, clock: Clock, engine: str) -> None:
        """Give the layer its state; `lowbit.convert_` calls this once after it changed the class."""
        self.site = product_site(name=name, recipe=recipe, clock=clock, engine=engine)

    def sites(self) -> list[Site]:
        """Every site of the layer."""
        return [self.site]


class SeveralProducts(QuantLayer):
    """A layer that multiplies by several weights, each with a site of its own.

    Attributes:
        site: the sites by the names of `site_names`.
    """

    site: nn.ModuleDict  # type: ignore[assignment]  # the state of several products in place of one

    def site_names(self) -> list[str]:
        """What the layer multiplies by, in order."""
        raise TypeError(f"{type(self).__name__} does not say what it multiplies by")

    def attach(self, *, name: str, recipe: Recipe, clock: Clock, engine: str) -> None:
        """Give each product its own site, named after the layer and the product."""
        self.site = nn.ModuleDict(
            {
                part: product_site(
                    name=f"{name}.{part}" if name else part, recipe=recipe, clock=clock, engine=engine, leads=i == 0
                )
                for i, part in enumerate(self.site_names())
            }
        )

    def sites(self) -> list[Site]:
        """One for each of `site_names`."""
        return [self._site(part) for part in self.site]

    def product(self, part: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`lowbit.functional.linear` at the site of that name."""
        return functional.linear(x, weight, bias, setting=self._site(part).setting(x))

    def _site(self, part: str) -> Site:
        site = self.site[part]
        assert isinstance(site, Site)
        return site


class QuantLinear(QuantLayer, nn.Linear):
    """`torch.nn.Linear` in the formats of a recipe: ``(..., K)`` to ``(..., N)``."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the plain layer's argument
        """See `lowbit.functional.linear`."""
        return functional.linear(input, self.weight, self.bias, setting=self.site.setting(input))


class _QuantConv(QuantLayer, nn.modules.conv._ConvNd):
    """What the convolutions of 1 to 3 axes share."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the plain layer's argument
        """See `lowbit.functional.conv`."""
        batch = self._as_batch(input)
        return functional.conv(
            input,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
            setting=self.site.setting(batch),
        )

    def _as_batch(self, x: Tensor) -> Tensor:
        """The input with its axis of samples, which the input range is taken over."""
        dim = len(self.kernel_size)
        if x.dim() not in (dim + 1, dim + 2):
            raise ValueError(
                f"{self.site.name}: input of shape {tuple(x.shape)}; expected (C, *size) or (B, C, *size) with "
                f"{dim} spatial axes"
            )
        return x if x.dim() == dim + 2 else x.unsqueeze(0)


class QuantConv1d(_QuantConv, nn.Conv1d):
    """`torch.nn.Conv1d` in the formats of a recipe."""


class QuantConv2d(_QuantConv, nn.Conv2d):
    """`torch.nn.Conv2d` in the formats of a recipe."""


class QuantConv3d(_QuantConv, nn.Conv3d):
    """`torch.nn.Conv3d` in the formats of a recipe."""


class _QuantConvTranspose(_QuantConv, nn.modules.conv._ConvTransposeNd):
    """What the transposed convolutions of 1 to 3 axes share."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002 - the plain layer's
        """See `lowbit.functional.conv_transpose`; `output_size` chooses among the sizes that the stride leaves open."""
        batch = self._as_batch(input)
        axes = len(self.kernel_size)
        stride, padding, kernel, dilation = (
            [int(v) for v in values] for values in (self.stride, self.padding, self.kernel_size, self.dilation)
        )
        output_padding = self._output_padding(input, output_size, stride, padding, kernel, axes, dilation)
        return functional.conv_transpose(
            input,
            self.weight,
            self.bias,
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            dilation=dilation,
            groups=self.groups,
            setting=self.site.setting(batch),
        )


class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` in the formats of a recipe."""


class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` in the formats of a recipe."""


class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` in the formats of a recipe."""
