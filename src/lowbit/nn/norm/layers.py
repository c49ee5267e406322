"""Range BN as the twin of batch normalisation, with its state."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowbit import ranks
from lowbit.engines.int8 import missing
from lowbit.methods.normalization import RangeNorm
from lowbit.methods.recipe import Recipe
from lowbit.nn.norm.function import Tape, range_batch_norm
from lowbit.nn.norm.setting import NormSetting
from lowbit.nn.norm.twin import NormTwin
from lowbit.nn.site import Clock, Site, is_recomputing
from lowbit.numerics.formats import Format
from lowbit.numerics.ranges import record_range, shared_extremes


class NormSite(Site):
    """The site of a Range BN."""

    def formats(self, phase: int | None = None) -> list[tuple[str, str, Format]]:  # noqa: ARG002 - alike in all
        """The formats of its operands; it lacks products."""
        norm = self.recipe.normalization
        assert isinstance(norm, RangeNorm)
        return [("output", "input", norm.input), ("grad_input", "grad_output", norm.grad_output)]

    def setting_of_norm(self, x: Tensor, eps: float, *, rectify: bool, compiled: bool = False) -> NormSetting:
        """How a call is computed for input `x`."""
        norm = self.recipe.normalization
        assert isinstance(norm, RangeNorm)
        return NormSetting(
            norm=norm,
            eps=eps,
            noise=self.noise(compiled=compiled),
            bits=self.widths_now(),
            input_range=self.input_range(x),
            layer=self.name,
            engine=self.engine,
            source=self,
            shared=self.shares(x),
            rectify=rectify,
        )

    def shares(self, x: Tensor) -> bool:
        """Whether `x` is this process' part of a batch whose statistics are those of all processes."""
        norm = self.recipe.normalization
        assert isinstance(norm, RangeNorm)
        return norm.synchronized and self.training and ranks.is_one_of_several() and not x.is_meta

    def input_range(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """As of any site; of a shared batch, the extremes are those of all processes."""
        scale = self.input_format.scale
        if scale is None or not self.shares(x) or not x.is_floating_point():
            return super().input_range(x)
        values = x.detach().float() if x.dtype == torch.float16 else x.detach()
        lo, hi = shared_extremes(values, rule=scale.range)
        if scale.running is not None and not is_recomputing():
            record_range(self.running_range, lo, hi, momentum=scale.running, start=scale.running_start)
        return lo, hi

    def forward_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        fixed: tuple[Tensor, Tensor] | None,
        eps: float,
        rectify: bool,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]]]:
        """What an operator of a compiled model calls, see `lowbit.products.compiled`."""
        tape = Tape()
        setting = self.setting_of_norm(x, eps, rectify=rectify, compiled=True)
        y, mean, sigma = range_batch_norm(x, weight, bias, setting=setting, fixed=fixed, tape=tape)

        def backward(g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
            found = zip(tape.backward(g), (x, weight, bias), needs, strict=True)
            dx, d_gamma, d_beta = (
                d.to(t.dtype) if needed and d is not None and t is not None else None for d, t, needed in found
            )
            return dx, d_gamma, d_beta

        return y.clone() if y is x else y, mean.clone(), sigma.clone(), backward


class RangeBatchNormNd(NormTwin):
    """Range BN with the parameters and buffers of batch normalisation.

    `running_mean` and `running_var` hold running averages of mu and sigma squared, so that the plain layer that
    `lowbit.restore_` gives back evaluates in the same way.
    """

    remark: ClassVar[str] = "range normalisation"

    @classmethod
    def is_in(cls, recipe: Recipe) -> bool:
        """Whether the recipe replaces normalisations."""
        return isinstance(recipe.normalization, RangeNorm)

    @classmethod
    def formats(cls, recipe: Recipe) -> dict[str, tuple[Format, ...]]:
        """One operand in the forward, and one in the backward."""
        norm = recipe.normalization
        return {"output": (norm.input,), "grad_input": (norm.grad_output,)} if isinstance(norm, RangeNorm) else {}

    @classmethod
    def engine_refusals_of_formats(cls, layer: Any, recipe: Recipe, engine: str) -> dict[str, str]:  # noqa: ARG003
        """Native passes work on codes of a byte; no other engine normalises."""
        table = cls.formats(recipe)
        if engine != "int8":
            why = "range normalisation runs on the int8 and the reference engine"
        elif isinstance(recipe.normalization, RangeNorm) and recipe.normalization.synchronized:
            why = "range normalisation over several processes runs on the reference engine"
        elif not all(f.zero == "integer" and f.bits <= 8 for formats in table.values() for f in formats):
            why = "range normalisation runs on codes of up to 8 bits with an integer zero point"
        else:
            why = missing("int8")
        return dict.fromkeys(table, why) if why else {}

    def attach(self, *, name: str, recipe: Recipe, clock: Clock, engine: str) -> None:
        """Give the layer its state."""
        norm = recipe.normalization
        if not isinstance(norm, RangeNorm):
            raise TypeError(f"{name}: recipe {recipe.name!r} has no range normalisation")
        bits = [norm.input.bits, norm.grad_output.bits]
        self.site = NormSite(name=name, recipe=recipe, clock=clock, input_format=norm.input, bits=bits, engine=engine)
        self.norm = norm

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the plain layer's argument
        """See `range_batch_norm`; in training the running statistics move towards the batch's."""
        return self.normalize(input)

    def normalize(self, input: Tensor, *, rectify: bool = False) -> Tensor:  # noqa: A002 - the plain layer's argument
        """What `forward` does; with `rectify` the result is that of a ReLU after it: 0 where it would be less."""
        self._check_input_dim(input)
        fixed = None
        if not self.training and self.running_mean is not None and self.running_var is not None:
            fixed = (self.running_mean, self.running_var.sqrt())
        assert isinstance(self.site, NormSite)
        if torch.compiler.is_compiling():
            y, mean, sigma = self._compiled(input, fixed, rectify)
        else:
            setting = self.site.setting_of_norm(input, self.eps, rectify=rectify)
            y, mean, sigma = range_batch_norm(input, self.weight, self.bias, setting=setting, fixed=fixed)
        if self.training and self.track_running_stats and (torch.compiler.is_compiling() or not is_recomputing()):
            momentum = self.momentum if self.norm.momentum is None else self.norm.momentum
            self.track(mean, sigma * sigma, momentum)
        return y

    def _compiled(self, x: Tensor, fixed: tuple[Tensor, Tensor] | None, rectify: bool) -> tuple[Tensor, Tensor, Tensor]:
        """One operator of `lowbit.products.compiled`."""
        recorded = torch.is_grad_enabled()
        needs = [recorded and t is not None and t.requires_grad for t in (x, self.weight, self.bias)]
        mean, deviation = (None, None) if fixed is None else fixed
        y: Tensor
        mu: Tensor
        sigma: Tensor
        y, mu, sigma, _ = torch.ops.lowbit.range_norm(
            x,
            self.weight,
            self.bias,
            self.site.clock.pulse,
            mean,
            deviation,
            self.site.number,
            self.eps,
            rectify,
            needs,
        )
        return y, mu, sigma


class RangeBatchNorm1d(RangeBatchNormNd, nn.BatchNorm1d):
    """Range BN of ``(B, C)`` or ``(B, C, L)`` in place of `torch.nn.BatchNorm1d`."""

    plain = nn.BatchNorm1d


class RangeBatchNorm2d(RangeBatchNormNd, nn.BatchNorm2d):
    """Range BN of ``(B, C, H, W)`` in place of `torch.nn.BatchNorm2d`."""

    plain = nn.BatchNorm2d


class RangeBatchNorm3d(RangeBatchNormNd, nn.BatchNorm3d):
    """Range BN of ``(B, C, D, H, W)`` in place of `torch.nn.BatchNorm3d`."""

    plain = nn.BatchNorm3d
