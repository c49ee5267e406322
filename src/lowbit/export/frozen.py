"""A converted model in evaluation as plain layers between quantizers: what other runtimes can execute.

The formats come from what the model shows its observers in one evaluation, not from its recipe: so they have the bits
of the moment, and the ranges that the layers keep.

Notation: x ~ (q - z) S, with codes q of 8 bits or fewer in an 8-bit type, zero point z, scale S.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.conversion.convert import restore_
from lowbit.errors import UsageError
from lowbit.nn.layers import QuantLayer, converted_layers
from lowbit.numerics.elements import Integer
from lowbit.numerics.formats import FP32
from lowbit.numerics.quantizer import quantize
from lowbit.numerics.scales import MinMax
from lowbit.numerics.transforms import NoTransform
from lowbit.products.watch import OperandRun, ProductRun, observed_by


@dataclass(frozen=True, kw_only=True)
class Codes:
    """Numbers of a tensor as codes.

    Args:
        q: int8 or uint8.
        scale: float32, one, or one for each place along `axis`.
        zero: the code of real zero.
        axis: along which scales lie; None: one scale.
    """

    q: Tensor
    scale: Tensor
    zero: int
    axis: int | None


@dataclass(frozen=True, kw_only=True)
class InputRule:
    """How a layer's input becomes codes in evaluation.

    Args:
        scale: S where the layer keeps its range; None: of the largest magnitude of what shares a scale.
        zero: z.
        low: the smallest code.
        high: the largest code.
        rows: whether each row of the last axis has its own scale.
    """

    scale: Tensor | None
    zero: int
    low: int
    high: int
    rows: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The type of the codes."""
        return torch.int8 if self.low < 0 else torch.uint8

    def scale_of(self, x: Tensor) -> Tensor:
        """S: a scalar, or one for each row of a matrix."""
        if self.scale is not None:
            return self.scale
        most = (x if self.rows else x.flatten()).abs().amax(-1)
        scale = most / self.high
        return torch.where(scale == 0, torch.ones_like(scale), scale)

    def codes(self, x: Tensor) -> Tensor:
        """Codes of a tensor, or of a matrix where rows have scales; the definition that other runtimes must equal."""
        scale = self.scale_of(x)
        q = torch.round(x / (scale.unsqueeze(-1) if self.rows else scale)) + self.zero
        return q.clamp(self.low, self.high).to(self.dtype)


@dataclass(frozen=True, kw_only=True)
class FrozenLayer:
    """A converted layer as evaluation runs it.

    Args:
        name: in the model.
        rule: of its input.
        weight: its weight as codes; None for a normalisation.
    """

    name: str
    rule: InputRule
    weight: Codes | None


def freeze(model: nn.Module, batch: Tensor) -> list[FrozenLayer]:
    """The converted layers of a model in the order in which an evaluation of `batch` runs them.

    Raises:
        UsageError: a layer has formats that are not 8-bit integers with one zero point, has several products, or runs
            twice.
    """
    layers = converted_layers(model)
    names = {id(site): name for name, layer in layers.items() for site in layer.sites()}
    runs: list[ProductRun] = []
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), observed_by(lambda run: runs.append(run)):  # noqa: PLW0108 - the name of its argument
            model(batch)
    finally:
        for module in training:
            module.training = True
    seen = [run for run in runs if id(run.source) in names and run.product == "output"]
    found = [_frozen(names[id(run.source)], layers[names[id(run.source)]], run) for run in seen]
    if twice := {layer.name for layer in found if sum(other.name == layer.name for other in found) > 1}:
        raise UsageError(f"{', '.join(sorted(twice))} runs several times in a forward, which cannot be exported")
    if missing := layers.keys() - {layer.name for layer in found}:
        raise UsageError(f"{', '.join(sorted(missing))} did not run on this batch, so its formats are not known")
    return found


def _frozen(name: str, layer: QuantLayer, run: ProductRun) -> FrozenLayer:
    if len(layer.sites()) > 1:
        raise UsageError(f"{name} ({layer.plain.__name__}) has several products in one layer, which cannot be exported")
    weight = run.operands.get("weight")
    axis = 1 if getattr(layer, "transposed", False) else 0
    return FrozenLayer(
        name=name,
        rule=_rule(name, run.operands["input"]),
        weight=None if weight is None else _codes(name, weight, axis),
    )


def _check(name: str, what: str, operand: OperandRun) -> Any:
    """The steps of an operand that is an 8-bit integer without an offset."""
    fmt, steps = operand.format, None if operand.grid is None else operand.grid.steps
    taken = isinstance(fmt.element, Integer) and fmt.element.zero in ("symmetric", "integer")
    if steps is None or not taken or not isinstance(fmt.transform, NoTransform) or operand.bits > 8:
        raise UsageError(
            f"{name}: its {what} is {fmt} at {operand.bits} bits, and QuantizeLinear has only integers of 8 bits or "
            "fewer with an integer zero point: export it --to plain"
        )
    return steps


def _rule(name: str, operand: OperandRun) -> InputRule:
    steps, fmt = _check(name, "input", operand), operand.format
    zero = 0 if steps.zero is None else int(steps.zero)
    low, high = int(steps.low), int(steps.high)
    if fmt.running is not None and steps.scale.numel() == 1:
        return InputRule(scale=steps.scale.reshape(()).float().clone(), zero=zero, low=low, high=high)
    scale = fmt.scale
    shares = fmt.granularity in ("tensor", "row")
    if zero or scale is None or not isinstance(scale.range, MinMax) or not shares or scale.floor:
        raise UsageError(
            f"{name}: its input is {fmt}, whose range is taken anew from each batch; such a range is exported only for "
            "symmetric integers with one scale, or one for each row: export it --to plain"
        )
    rows = operand.dims is not None and len(operand.dims) < len(operand.view)
    return InputRule(scale=None, zero=0, low=low, high=high, rows=rows)


def _codes(name: str, operand: OperandRun, axis: int) -> Codes:
    steps = _check(name, "weight", operand)
    zero = 0 if steps.zero is None else int(steps.zero)
    values = operand.quantized.reshape(operand.view)
    q = torch.round(values / steps.scale) + zero
    dtype = torch.int8 if float(steps.low) < 0 else torch.uint8
    scale = steps.scale.flatten().float().clone()
    one = scale.numel() == 1
    if not one and scale.numel() != operand.quantized.shape[axis]:
        raise UsageError(f"{name}: its weight has {scale.numel()} scales, not one for each output channel")
    q = q.to(dtype).reshape(operand.quantized.shape).clone()
    return Codes(q=q, scale=scale.reshape(()) if one else scale, zero=zero, axis=None if one else axis)


Quantizer = Callable[[InputRule, Tensor], Tensor]
Dequantizer = Callable[[Tensor, Tensor, int, int | None], Tensor]


class Between(nn.Module):
    """A plain layer whose input passes a quantizer and whose weight is codes.

    Args:
        layer: the plain layer.
        frozen: its formats.
        bias: of the layer, in its format.
        quantizer: gives the values of the input that the product sees.
        dequantizer: gives the values of codes.
    """

    q: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        layer: nn.Module,
        frozen: FrozenLayer,
        bias: Tensor | None,
        quantizer: Quantizer,
        dequantizer: Dequantizer,
    ) -> None:
        super().__init__()
        self.frozen, self.quantizer, self.dequantizer = frozen, quantizer, dequantizer
        self.layer = layer
        weight = frozen.weight
        if weight is not None:
            self.register_buffer("q", weight.q)
            self.register_buffer("scale", weight.scale)
            for name in ("weight", "bias"):
                layer.register_parameter(name, None)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """The layer on the values of codes."""
        x_hat = self.quantizer(self.frozen.rule, x)
        if self.frozen.weight is None:
            y: Tensor = self.layer(x_hat)
            return y
        return self.product(x_hat, self.values(self.dequantizer), self.bias)

    def values(self, dequantizer: Dequantizer) -> Tensor:
        """The values of its weight's codes."""
        codes = self.frozen.weight
        assert codes is not None
        return dequantizer(self.q, self.scale, codes.zero, codes.axis)

    def product(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own product of any two operands."""
        layer: Any = self.layer
        if w.dim() == 2:
            # A matrix with a bias is a Gemm in ONNX. With a MatMul after DequantizeLinear, results of onnxruntime were
            # off by 0.4 % of the largest, presumably by a kernel of its own (MatMulNBits); with a Gemm they are not.
            added = torch.zeros(w.shape[0], dtype=w.dtype, device=w.device) if bias is None else bias
            return F.linear(x.reshape(-1, x.shape[-1]), w, added).reshape(*x.shape[:-1], w.shape[0])
        y: Tensor = layer._conv_forward(x, w, bias)
        return y


def values_of(q: Tensor, scale: Tensor, zero: int, axis: int | None) -> Tensor:
    """The values of codes, float32."""
    shape = [-1 if d == axis else 1 for d in range(q.dim())]
    return (q.float() - zero) * (scale if axis is None else scale.view(shape))


def between_quantizers(
    model: nn.Module, frozen: list[FrozenLayer], quantizer: Quantizer, dequantizer: Dequantizer
) -> nn.Module:
    """A copy of a converted model whose converted layers are plain ones between these functions, in evaluation.

    Raises:
        UsageError: a layer of a kind that cannot be taken apart.
    """
    biases = {}
    for name, layer in converted_layers(model).items():
        bias = getattr(layer, "bias", None)
        site: Any = layer.site
        fmt = site.present.bias if next(f for f in frozen if f.name == name).weight is not None else FP32
        biases[name] = None if bias is None else quantize(bias.detach().float(), fmt).values.clone()
        if getattr(layer, "transposed", False):
            raise UsageError(f"{name} is a transposed convolution, which is not exported yet: export it --to plain")
    plain = copy.deepcopy(model)
    restore_(plain)
    plain.eval()
    for each in frozen:
        wrapped = Between(plain.get_submodule(each.name), each, biases[each.name], quantizer, dequantizer)
        if not each.name:
            return wrapped.eval()
        parent, _, own = each.name.rpartition(".")
        setattr(plain.get_submodule(parent), own, wrapped)
    return plain.eval()
