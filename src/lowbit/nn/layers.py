"""The quantised twins of linear and convolution layers: one call each plus a site for their state.

`lowbit.convert_` turns a plain layer into its twin by changing its class in place, so its name, its parameters, its
hooks and every reference to it stay what they were. `lowbit.restore_` changes it back.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from lowbit import functional
from lowbit.engines.choice import PRODUCTS, refusal_of_tensor, refusals
from lowbit.methods.recipe import Recipe
from lowbit.nn.site import Clock, Site, product_site
from lowbit.numerics.formats import Format
from lowbit.products.operators import Convolution, Linear, Op


class QuantLayer(nn.Module):
    """A layer that computes in the formats of a recipe: the twin of a plain layer.

    It answers for its kind. What must be known before a conversion is asked of the class, about the plain layer. A
    converted layer gives the same answers about itself.

    Attributes:
        plain: the type of layer that it stands for; each class of converted layers names its own.
        owns_modules: whether the modules inside the plain layer are part of it, since it never calls them.
        is_seen_in_calls: whether a subclass of the plain type, whose forward is its own, is converted by the functions
            that it calls.
        remark: what a report says of a converted layer.
        site: the state of its products.
    """

    plain: ClassVar[type[nn.Module]]
    owns_modules: ClassVar[bool] = False
    is_seen_in_calls: ClassVar[bool] = True
    remark: ClassVar[str] = ""
    site: Site

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        raise TypeError(
            f"{type(self).__name__} is made of a plain layer: lowbit.convert_(torch.nn.{self.plain.__name__}(...), "
            "recipe)"
        )

    @classmethod
    def is_in(cls, recipe: Recipe) -> bool:  # noqa: ARG003 - products are in every recipe
        """Whether a recipe is about layers of this kind."""
        return True

    @classmethod
    def refusal(cls, layer: Any, recipe: Recipe) -> str:  # noqa: ARG003 - for twins that a recipe must fit
        """Why a layer of the plain type cannot become this with a recipe; empty if it can."""
        if "forward" in layer.__dict__:
            return "its forward was replaced on the object, which conversion would not reach"
        for name, p in layer.named_parameters(recurse=False):
            if not p.is_floating_point():
                return f"{name} is {p.dtype}, not floating point"
        return ""

    @classmethod
    def operator(cls, layer: Any) -> Op | None:
        """The operator of all products of a layer; None if it lacks products."""
        raise TypeError(f"{cls.__name__} does not say what its products are: {layer}")

    @classmethod
    def weights(cls, layer: Any) -> list[Tensor]:
        """The parameters that a layer multiplies by, those with two axes or more; several products may share one."""
        given = layer.parameters(cls.owns_modules)
        return [p for p in given if not nn.parameter.is_lazy(p) and p.dim() >= 2]

    @classmethod
    def largest_weight(cls, layer: Any) -> Tensor | None:
        """The largest of `weights`, the first if there are several; None without weights."""
        return max(cls.weights(layer), key=Tensor.numel, default=None)

    @classmethod
    def input_channels(cls, layer: Any) -> int:
        """How many channels, or features, the input of a layer has."""
        raise TypeError(
            f"{cls.__name__} does not say how many channels it takes, see QuantLayer.input_channels: {layer}"
        )

    @classmethod
    def formats(cls, recipe: Recipe) -> dict[str, tuple[Format, ...]]:
        """The formats of the operands of each product."""
        table: dict[str, tuple[Format, ...]] = {}
        for product, _, fmt in recipe.operands():
            table[product] = (*table.get(product, ()), fmt)
        return table

    @classmethod
    def engine_refusals(cls, layer: Any, recipe: Recipe, engine: str) -> dict[str, str]:
        """The products of a layer, plain or converted, that an engine of this name cannot run, and why."""
        for name, p in layer.named_parameters():
            if why := refusal_of_tensor(p, engine):
                return dict.fromkeys(PRODUCTS, f"a layer whose {name} is {p.dtype} on {p.device.type}: {why}")
        return cls.engine_refusals_of_formats(layer, recipe, engine)

    @classmethod
    def engine_refusals_of_formats(cls, layer: Any, recipe: Recipe, engine: str) -> dict[str, str]:
        """`engine_refusals`, whatever the layer's parameters are."""
        op = cls.operator(layer)
        assert op is not None
        dim = 2 if op.geometry is None else 2 + len(op.geometry.stride)
        return refusals(op, recipe, dim=dim, engine=engine)

    @property
    def sample_axis(self) -> int:
        """The axis of the input that counts samples."""
        return 0

    @property
    def is_altered(self) -> bool:
        """Whether the class was changed since the conversion, so that `undo` would undo more than the conversion."""
        return "plain" not in vars(type(self))

    def attach(self, *, name: str, recipe: Recipe, clock: Clock, engine: str) -> None:
        """Give the layer its state; `lowbit.convert_` calls this once after changing the class."""
        self.site = product_site(name=name, recipe=recipe, clock=clock, engine=engine)

    def sites(self) -> list[Site]:
        """Every site of the layer."""
        return [self.site]

    def undo(self) -> None:
        """Become the plain layer again; parameters stay the same objects."""
        for site in self.sites():
            site.clock.sites.remove(site)
        del self.site
        layer: Any = self
        layer.__class__ = self.plain


def converted_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The converted layers of a model, each once, in order, by their names in the model."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLayer)}


def sites_of(model: nn.Module) -> dict[Site, QuantLayer]:
    """The sites of a model's converted layers, in order, and their layers."""
    return {site: layer for layer in converted_layers(model).values() for site in layer.sites()}


class SeveralProducts(QuantLayer):
    """A layer that multiplies by several weights, each with its own site.

    Attributes:
        site: the sites by the names of `site_names`.
    """

    site: nn.ModuleDict  # type: ignore[assignment]  # the state of several products in place of one

    @classmethod
    def operator(cls, layer: Any) -> Op:  # noqa: ARG003 - the same for each
        """See `product`."""
        return Linear()

    def site_names(self) -> list[str]:
        """The names of what the layer multiplies by, in order."""
        raise TypeError(f"{type(self).__name__} does not say what it multiplies by")

    def attach(self, *, name: str, recipe: Recipe, clock: Clock, engine: str) -> None:
        """Give each product its own site, named after the layer and the product."""
        self.site = nn.ModuleDict(
            {
                part: product_site(name=name, part=part, recipe=recipe, clock=clock, engine=engine, leads=i == 0)
                for i, part in enumerate(self.site_names())
            }
        )

    def sites(self) -> list[Site]:
        """A site for each of `site_names`."""
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

    plain = nn.Linear

    @classmethod
    def operator(cls, layer: Any) -> Op:  # noqa: ARG003 - the same for each
        """``x w^T``."""
        return Linear()

    @classmethod
    def input_channels(cls, layer: Any) -> int:
        """K."""
        return int(layer.in_features)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the plain layer's argument
        """See `lowbit.functional.linear`."""
        return functional.linear(input, self.weight, self.bias, setting=self.site.setting(input))


class _QuantConv(QuantLayer, nn.modules.conv._ConvNd):
    """What the convolutions of 1 to 3 axes share."""

    @classmethod
    def operator(cls, layer: Any) -> Op:
        """The convolution; a padding with a name, or not of zeros, counts as a part of the input."""
        named = isinstance(layer.padding, str) or layer.padding_mode != "zeros"
        return Convolution(
            stride=layer.stride,
            padding=(0,) * len(layer.stride) if named else layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            transposed=layer.transposed,
            output_padding=layer.output_padding if layer.transposed else (),
        )

    @classmethod
    def input_channels(cls, layer: Any) -> int:
        """C of all groups together."""
        return int(layer.in_channels)

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
        """The input with its axis of samples, over which the input range is taken."""
        dim = len(self.kernel_size)
        if x.dim() not in (dim + 1, dim + 2):
            raise ValueError(
                f"{self.site.name}: input of shape {tuple(x.shape)}; expected (C, *size) or (B, C, *size) with "
                f"{dim} spatial axes"
            )
        return x if x.dim() == dim + 2 else x.unsqueeze(0)


class QuantConv1d(_QuantConv, nn.Conv1d):
    """`torch.nn.Conv1d` in the formats of a recipe."""

    plain = nn.Conv1d


class QuantConv2d(_QuantConv, nn.Conv2d):
    """`torch.nn.Conv2d` in the formats of a recipe."""

    plain = nn.Conv2d


class QuantConv3d(_QuantConv, nn.Conv3d):
    """`torch.nn.Conv3d` in the formats of a recipe."""

    plain = nn.Conv3d


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

    plain = nn.ConvTranspose1d


class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` in the formats of a recipe."""

    plain = nn.ConvTranspose2d


class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` in the formats of a recipe."""

    plain = nn.ConvTranspose3d
