"""Batch normalisation whose terms lie on grids: mean, deviation, normalised values, gamma and beta.

Notation: x input ``(B, C, *size)``, mu and sigma mean and standard deviation of a channel, Q_t the format of a term t.

``y = Q_gamma(gamma) Q_n((x - Q_mu(mu)) / (Q_sigma(sigma) + eps)) + Q_beta(beta)``; gradients pass through each Q, and
the gradient that arrives is put into its own format first.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowbit.functional import autocast_device
from lowbit.methods.normalization import TERMS, TermNorm
from lowbit.methods.recipe import Recipe
from lowbit.nn.norm.definition import per_channel
from lowbit.nn.norm.twin import NormTwin
from lowbit.nn.site import Clock, Site, is_recomputing
from lowbit.numerics.formats import FP32, Format
from lowbit.numerics.quantizer import Quantized, quantize
from lowbit.numerics.rounding import Noise, field_of
from lowbit.products import watch


class _Through(torch.autograd.Function):
    """Values in the place of others, whose gradient they get."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        """The values."""
        return values

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004 - torch's signature
        """The gradient as it is."""
        return g, None


class _Arriving(torch.autograd.Function):
    """The identity, whose gradient is put into a format."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, call: "_Call") -> Tensor:
        """A view."""
        ctx.call = call
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        """The gradient in its format."""
        call: _Call = ctx.call
        hat = call.quantized("grad_output", g)
        call.show("grad_input", {"grad_output": (g, hat)}, ())
        return hat.values, None


class _Call:
    """One call of a layer: its formats, its noise, and who looks on."""

    def __init__(self, norm: TermNorm, site: Site) -> None:
        self.norm, self.site, self.noise = norm, site, site.noise()

    def quantized(self, term: str, x: Tensor) -> Quantized:
        """A term, or the gradient that arrives, in its format."""
        fmt: Format = getattr(self.norm, term)
        noise: Noise | None = self.noise if fmt.stochastic else None
        if x.is_meta or fmt == FP32:  # a planned run has no values
            return Quantized(x.detach())
        drawn = None if noise is None else field_of(noise, "normalization", term, x)
        return quantize(x.detach(), fmt, noise=drawn)

    def show(self, product: str, ran: dict[str, tuple[Tensor, Quantized]], expected: tuple[str, ...]) -> None:
        """Show observers what became of terms."""
        if not watch.observers:
            return
        x, hat = next(iter(ran.values()))
        with watch.inside():
            watch.notify(
                watch.ProductRun(
                    source=self.site,
                    layer=self.site.name,
                    product=product,
                    kind="batch_norm",
                    engine="reference",
                    kernel="batch_norm",
                    macs=0,
                    operands={
                        name: watch.OperandRun(
                            format=getattr(self.norm, name),
                            bits=getattr(self.norm, name).bits,
                            exact=exact.detach(),
                            quantized=found.values,
                            view=tuple(exact.shape),
                            dims=tuple(range(exact.dim())),
                            grid=found.grid,
                        )
                        for name, (exact, found) in ran.items()
                    },
                    result=hat.values,
                    full_precision=x.detach,
                    expected=expected,
                )
            )


def batch_norm_in_terms(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, call: _Call, eps: float, fixed: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula at the top of this file, differentiable in x, weight and bias.

    Args:
        x: float32 or float64 ``(B, C, *size)``.
        weight: gamma ``(C,)``, or None for 1.
        bias: beta ``(C,)``, or None for 0.
        call: formats and noise.
        eps: what is added to the deviation.
        fixed: mean and variance to normalise with, as in evaluation; None: those of this batch.

    Returns:
        ``(y, mu, variance)``: the variance is that of the population.
    """
    axes = (0, *range(2, x.dim()))
    if fixed is None:
        mean = x.mean(axes)
        variance = (x - per_channel(mean, x)).square().mean(axes)
    else:
        mean, variance = (t.to(x) for t in fixed)
    ran: dict[str, tuple[Tensor, Quantized]] = {}

    def rounded(term: str, t: Tensor) -> Tensor:
        ran[term] = (t, call.quantized(term, t))
        through: Tensor = _Through.apply(t, ran[term][1].values)
        return through

    center, scale = rounded("mean", mean), rounded("deviation", variance.sqrt()) + eps
    y = rounded("normalized", (x - per_channel(center, x)) / per_channel(scale, x))
    y = y if weight is None else y * per_channel(rounded("weight", weight.to(x)), x)
    y = y if bias is None else y + per_channel(rounded("bias", bias.to(x)), x)
    due = ("grad_input",) if torch.is_grad_enabled() and y.requires_grad and call.norm.grad_output != FP32 else ()
    call.show("output", {name: ran[name] for name in TERMS if name in ran and getattr(call.norm, name) != FP32}, due)
    arriving: Tensor = y if call.norm.grad_output == FP32 else _Arriving.apply(y, call)
    return arriving, mean.detach(), variance.detach()


class TermSite(Site):
    """The site of such a normalisation; every term that has a format has its width in `bits`."""

    def formats(self, phase: int | None = None) -> list[tuple[str, str, Format]]:  # noqa: ARG002 - alike in all
        """The formats of its terms, and of the gradient that arrives."""
        norm = self.recipe.normalization
        assert isinstance(norm, TermNorm)
        return norm.table()


class TermBatchNormNd(NormTwin):
    """Batch normalisation in formats, with the parameters and buffers of the plain layer."""

    remark: ClassVar[str] = "batch normalisation in formats"

    @classmethod
    def is_in(cls, recipe: Recipe) -> bool:
        """Whether the recipe gives the terms of normalisations formats."""
        return isinstance(recipe.normalization, TermNorm)

    @classmethod
    def formats(cls, recipe: Recipe) -> dict[str, tuple[Format, ...]]:
        """Those of the terms in the forward, and of the gradient in the backward."""
        norm = recipe.normalization
        found: dict[str, tuple[Format, ...]] = {}
        for product, _, fmt in norm.table() if isinstance(norm, TermNorm) else ():
            found[product] = (*found.get(product, ()), fmt)
        return found

    @classmethod
    def engine_refusals_of_formats(cls, layer: Any, recipe: Recipe, engine: str) -> dict[str, str]:  # noqa: ARG003
        """Only the reference engine has it."""
        return dict.fromkeys(cls.formats(recipe), f"batch normalisation in formats has no {engine} kernel")

    def attach(self, *, name: str, recipe: Recipe, clock: Clock, engine: str) -> None:
        """Give the layer its state."""
        norm = recipe.normalization
        if not isinstance(norm, TermNorm):
            raise TypeError(f"{name}: recipe {recipe.name!r} has no formats for batch normalisation")
        bits = [fmt.bits for _, _, fmt in norm.table()]
        first = norm.table()[0][2]
        self.site = TermSite(name=name, recipe=recipe, clock=clock, input_format=first, bits=bits, engine=engine)
        self.norm = norm

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the plain layer's argument
        """See `batch_norm_in_terms`; in training the running statistics move towards the batch's."""
        self._check_input_dim(input)
        fixed = None
        if not self.training and self.running_mean is not None and self.running_var is not None:
            fixed = (self.running_mean, self.running_var)
        count = input.numel() // max(input.shape[1], 1)
        if fixed is None and count < 2:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        eps = self.eps if self.norm.epsilon is None else self.norm.epsilon
        with torch.autocast(autocast_device(x), enabled=False):
            call = _Call(self.norm, self.site)
            y, mean, variance = batch_norm_in_terms(x, self.weight, self.bias, call, eps, fixed)
        if self.training and self.track_running_stats and not is_recomputing():
            self.track(mean, variance * (count / (count - 1)), self.momentum)
        return y.to(input.dtype)


class TermBatchNorm1d(TermBatchNormNd, nn.BatchNorm1d):
    """In place of `torch.nn.BatchNorm1d`."""

    plain = nn.BatchNorm1d


class TermBatchNorm2d(TermBatchNormNd, nn.BatchNorm2d):
    """In place of `torch.nn.BatchNorm2d`."""

    plain = nn.BatchNorm2d


class TermBatchNorm3d(TermBatchNormNd, nn.BatchNorm3d):
    """In place of `torch.nn.BatchNorm3d`."""

    plain = nn.BatchNorm3d
