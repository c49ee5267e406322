"""Linear layers, matrix products and convolutions as autograd, each operand of each product in its own format.

Notation: x input, w weight, g grad_output; a hat marks a value on its format's grid.
``output = x^ w^``, ``grad_input = g^ w^``, ``grad_weight = g^ x^``. g may have one format in `grad_input` and
another in `grad_weight`: gradient bifurcation (Banner et al. 2018). grad_bias is the plain sum of g.

The backward of rounding is the straight-through estimator: clipped values receive their gradient too. What a format
does before its grid has the derivative that its transform says.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.attention.function import attention
from lowbit.engines.base import Engine, Operand, Product
from lowbit.engines.choice import REFERENCE, Route, route
from lowbit.engines.reference import in_full
from lowbit.errors import UsageError
from lowbit.kernels.memory import check_storage, in_memory, is_channels_last
from lowbit.numerics.quantizer import quantize
from lowbit.products import strides, watch
from lowbit.products.operators import Convolution, Linear, Matmul, Op
from lowbit.products.setting import Samples, Setting, Slot, slot

__all__ = ["attention", "conv", "conv_transpose", "linear", "matmul"]

_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What the forward keeps for the backward beside tensors.

    Args:
        op: the operator.
        setting: how the call is computed.
        route: how it is executed, as it follows from the shapes.
        shapes: of input, weight and output.
        dtypes: of input, weight and bias.
        x: the input as `grad_weight` takes it, without its numbers; None where it is not needed.
        w: the weight as `grad_input` takes it, likewise; None too where it is made from the weight.
        exact: input and weight before they were rounded, for observers.
        channels_last: whether the weight lies so.
    """

    op: Op
    setting: Setting
    route: Route
    shapes: tuple[torch.Size, torch.Size, torch.Size]
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None]
    x: Operand | None
    w: Operand | None
    exact: tuple[Tensor, Tensor] | None
    channels_last: bool


def outputs(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    op: Op,
    setting: Setting,
    dtype: torch.dtype,
    expected: tuple[str, ...],
    needs: tuple[bool, bool],
) -> tuple[Tensor, tuple[Tensor | None, ...], _Kept]:
    """The output with its bias, and what the backward needs: tensors, and plain values.

    Codes that a product of the backward shares with the forward are made once, here; a weight that is not shared is
    kept as it is and quantised in the backward.

    Args:
        x: input.
        w: weight.
        bias: one number for each output channel, or None.
        op: the operator.
        setting: how the call is computed.
        dtype: of the output.
        expected: the products of the backward that are due.
        needs: whether input and weight need a gradient.
    """
    recipe, dtypes = setting.recipe, (x.dtype, w.dtype, dtype)
    way = route(op, recipe, setting.engine, setting.bits, x.shape, w.shape, dtypes, x.device.type, setting.layer)
    engine, slots, shapes = way.engines["output"], way.slots, (x.shape, w.shape, way.output)
    if not way.output.numel():  # torch refuses some results without places, by the number of samples and of threads
        op.output(x.detach().to(dtype), w.detach().to(dtype))
    x_slot, w_slot = slots["output", "input"], slots["output", "weight"]
    x_hat = way.makers["output", "input"].encode(x, x_slot, setting)
    w_hat = way.makers["output", "weight"].encode(w, w_slot, setting)
    b_hat = (
        None
        if bias is None
        else bias.detach()
        if way.keeps_bias
        else quantize(in_full(bias.detach()), recipe.bias).values
    )
    product = Product(op=op, name="output", shape=way.output, dtype=dtype)
    added = b_hat if engine.adds_bias else None
    y = _multiplied(way, product, setting, shapes, (x_slot, x, x_hat), (w_slot, w, w_hat), added, expected)
    if b_hat is not None and added is None:
        y = y + _along_channels(b_hat, op, y)
    kept_x: Operand | None = None
    if needs[1]:
        place = "grad_weight", "input"
        kept_x = x_hat if way.shares_input else way.makers[place].encode(x, slots[place], setting)
    kept_w = w_hat if needs[0] and way.shares_weight else None
    kept = _Kept(
        op=op,
        setting=setting,
        route=way,
        shapes=shapes,
        dtypes=(x.dtype, w.dtype, None if bias is None else bias.dtype),
        x=kept_x and replace(kept_x, numbers=_NOTHING),
        w=kept_w and replace(kept_w, numbers=_NOTHING),
        exact=(in_full(x.detach()).clone(), in_full(w.detach()).clone()) if watch.observers else None,
        channels_last=op.geometry is not None and is_channels_last(w),
    )
    saved = (
        kept_x and kept_x.numbers,
        kept_w.numbers if kept_w is not None else w if needs[0] else None,
        x if needs[0] and x_slot.format.transform.has_gradient else None,
        w if needs[1] and w_slot.format.transform.has_gradient else None,
    )
    return y.to(dtype), saved, kept


def _along_channels(bias: Tensor, op: Op, y: Tensor) -> Tensor:
    """A bias in the shape that broadcasts against the output."""
    return bias if op.has_rows else bias.reshape(-1, *[1] * (y.dim() - 2))


def gradients(
    g: Tensor, saved: Sequence[Tensor | None], kept: _Kept, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """grad_input, grad_weight and grad_bias, each None where it is not needed.

    Args:
        g: grad_output.
        saved: the tensors that `outputs` gave.
        kept: what else it gave.
        needs: which of them are needed.
    """
    way, slots = kept.route, kept.route.slots
    op, setting, shapes = kept.op, kept.setting, kept.shapes
    x_numbers, w, exact_x, exact_w = saved
    grad_input = grad_weight = None
    g_hat: Operand | None = None
    if needs[0] and w is not None:
        g_slot, w_slot = slots["grad_input", "grad_output"], slots["grad_input", "weight"]
        g_hat = way.makers["grad_input", "grad_output"].encode(g, g_slot, setting)
        w_maker = way.makers["grad_input", "weight"]
        w_hat = w_maker.encode(w, w_slot, setting) if kept.w is None else replace(kept.w, numbers=w)
        shown_w = kept.exact[1] if kept.exact is not None else w if kept.w is None else None
        product = Product(op=op, name="grad_input", shape=shapes[0], dtype=kept.dtypes[0])
        grad_input = _multiplied(way, product, setting, shapes, (g_slot, g, g_hat), (w_slot, shown_w, w_hat))
        if exact_x is not None:
            grad_input = _before_transform(grad_input, exact_x, slots["output", "input"])
        grad_input = grad_input.to(kept.dtypes[0])
    if needs[1] and x_numbers is not None and kept.x is not None:
        g_slot, x_slot = slots["grad_weight", "grad_output"], slots["grad_weight", "input"]
        if g_hat is None or not way.shares_grad_output:
            g_hat = way.makers["grad_weight", "grad_output"].encode(g, g_slot, setting)
        shown_x = None if kept.exact is None else kept.exact[0]
        x_hat = replace(kept.x, numbers=x_numbers)
        product = Product(
            op=op, name="grad_weight", shape=shapes[1], dtype=kept.dtypes[1], channels_last=kept.channels_last
        )
        grad_weight = _multiplied(way, product, setting, shapes, (g_slot, g, g_hat), (x_slot, shown_x, x_hat))
        if exact_w is not None:
            grad_weight = _before_transform(grad_weight, exact_w, slots["output", "weight"])
        grad_weight = grad_weight.to(kept.dtypes[1])
    grad_bias = way.engines["grad_weight"].sum_bias(op, g).to(kept.dtypes[2]) if needs[2] else None
    return grad_input, grad_weight, grad_bias


def _before_transform(grad: Tensor, x: Tensor, place: Slot) -> Tensor:
    """The gradient of an operand `x` before its transform."""
    view = place.sharing.view
    found = place.format.transform.gradient(in_full(grad).reshape(view), in_full(x).reshape(view), place.sharing.place)
    return found.reshape(x.shape)


# An operand of a product: where it stands, its values before they were rounded (None: those after), and encoded.
_Given = tuple[Slot, Tensor | None, Operand]


def _multiplied(
    way: Route,
    product: Product,
    setting: Setting,
    shapes: tuple[torch.Size, torch.Size, torch.Size],
    a: _Given,
    b: _Given,
    bias: Tensor | None = None,
    expected: tuple[str, ...] = (),
) -> Tensor:
    """Execute one product on its two operands, and show it, without the bias, to counters and observers.

    Args:
        way: what executes it, and what encoded the operands.
        product: what it is.
        setting: how the call is computed.
        shapes: of input, weight and output.
        a: the first operand.
        b: the second.
        bias: added to the product.
        expected: the products of the backward that are due after this one.
    """
    engine = way.engines[product.name]
    if product.name in way.mixed:
        a, b = _taken(way, engine, a), _taken(way, engine, b)
    watch.thread.depth += 1
    try:
        result = engine.multiply(product, a[2], b[2], bias)
        if watch.counters or watch.observers:
            _show(engine, product, setting, shapes, a, b, result, bias, expected)
    finally:
        watch.thread.depth -= 1
    return result


def _taken(way: Route, engine: Engine, given: _Given) -> _Given:
    """An operand as the engine of a product takes it."""
    place, exact, operand = given
    maker = way.makers[place.product, place.operand]
    return given if maker is engine else (place, exact, REFERENCE.take(maker.values(operand, place)))


def _show(
    engine: Engine,
    product: Product,
    setting: Setting,
    shapes: tuple[torch.Size, torch.Size, torch.Size],
    a: _Given,
    b: _Given,
    result: Tensor,
    bias: Tensor | None,
    expected: tuple[str, ...],
) -> None:
    """Show a product that ran to counters, by its shapes, and to observers, with its operands."""
    op = product.op
    units, kernel = engine.ran(product, a[2], b[2])
    if watch.counters:
        watch.count(
            watch.ProductCall(
                source=setting.source,
                layer=setting.layer,
                product=product.name,
                kind=op.kind,
                engine=units,
                bits=(a[0].bits, b[0].bits),
                op=op,
                input=shapes[0],
                weight=shapes[1],
                output=shapes[2],
            )
        )
    if not watch.observers:
        return
    operands = {}
    for place, exact, encoded in (a, b):
        hat = engine.values(encoded, place)
        operands[place.operand] = watch.OperandRun(
            format=place.format,
            bits=place.bits,
            exact=hat.values if exact is None else in_full(exact.detach()),
            quantized=hat.values,
            view=place.sharing.view,
            dims=None if place.sharing.blocks else place.sharing.dims,
            grid=hat.grid,
        )
    first, second = (run.exact for run in operands.values())
    plain = in_full(result)
    watch.notify(
        watch.ProductRun(
            source=setting.source,
            layer=setting.layer,
            product=product.name,
            kind=op.kind,
            engine=units,
            kernel=kernel,
            macs=op.macs(*shapes),
            operands=operands,
            result=plain if bias is None else plain - _along_channels(bias, op, plain),
            full_precision=lambda: REFERENCE.product(product, first, second),
            expected=expected,
        )
    )


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        op: Op,
        setting: Setting,
        dtype: torch.dtype,
        expected: tuple[str, ...],
    ) -> Tensor:
        y, saved, ctx.kept = outputs(x, w, bias, op, setting, dtype, expected, ctx.needs_input_grad[:2])
        if setting.remake is not None:
            saved = tuple(None if t is w else t for t in saved)
        # Codes are saved as tensors, so that they go as soon as the backward has used them.
        ctx.save_for_backward(*saved)
        wanted = ctx.kept.route.strides or op.output_strides(y.shape, x, w)
        return y if y.stride() == wanted and not y._is_view() else strides.laid_out(y, wanted)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        kept: _Kept = ctx.kept
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{kept.setting.layer or kept.op.kind}: create_graph=True asks for a second derivative, and quantised "
                "products have none: rounding is differentiated once, straight through. Call backward without "
                "create_graph, or restore_ this layer"
            )
        x, w, *exact = ctx.saved_tensors
        if w is None and ctx.needs_input_grad[0] and kept.setting.remake is not None:
            w = kept.setting.remake()
        with torch.autocast(autocast_device(grad_output), enabled=False):
            grads = gradients(in_memory(grad_output), (x, w, *exact), kept, ctx.needs_input_grad[:3])
        return (*grads, None, None, None, None)


def autocast_device(x: Tensor) -> str:
    """The device whose autocast counts for `x`; the meta device, where runs are planned, has none of its own."""
    return "cpu" if x.is_meta else x.device.type


class Deferred(Protocol):
    """What asks for a product while a model is compiled: a site, which makes its setting when the product runs."""

    name: str
    number: int
    gated: bool
    skips: bool
    clock: Any


def without_autograd(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    op: Op,
    setting: Setting,
    dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]]]:
    """The output, and what gives the gradients of input, weight and bias, without autograd.

    Args:
        x: input.
        w: weight.
        bias: one number for each output channel, or None.
        op: the operator.
        setting: how the call is computed.
        dtype: of the output.
        needs: which of the three gradients are needed.
    """
    x, w, bias = _in_memory(x, w, bias, setting.layer or op.kind)
    with torch.autocast(autocast_device(x), enabled=False):
        y, saved, kept = outputs(x, w, bias, op, setting, dtype, (), needs[:2])

    def backward(g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        with torch.autocast(autocast_device(g), enabled=False):
            return gradients(in_memory(g), saved, kept, needs)

    return strides.laid_out(y, op.output_strides(y.shape, x, w)), backward


def _compiled(x: Tensor, w: Tensor, bias: Tensor | None, op: Op, site: Deferred, dtype: torch.dtype) -> Tensor:
    """One operator of `lowbit.products.compiled` in the place of a product."""
    if site.gated:
        torch._dynamo.graph_break(f"{site.name}: a gate chooses the bits of each sample")
    recorded = torch.is_grad_enabled()
    needs = [recorded and t is not None and t.requires_grad for t in (x, w, bias)]
    numbers: tuple[Any, ...] = False, [], [], [], [], 1
    if isinstance(op, Convolution):
        lists = (list(each) for each in (op.stride, op.padding, op.dilation, op.output_padding))
        numbers = op.transposed, *lists, op.groups
    y: Tensor
    y, _ = torch.ops.lowbit.products(x, w, bias, site.clock.pulse, site.number, *numbers, dtype, needs)
    return y


def _apply(x: Tensor, w: Tensor, bias: Tensor | None, op: Op, setting: Setting | Deferred) -> Tensor:
    """Check dtypes and compute outside autocast; the result has autocast's dtype where that is on, else that of `x`."""
    device = "cpu" if x.is_meta else x.device.type
    autocast = torch.is_autocast_enabled(device)
    if setting.skips:  # autograd then neither asks for its gradient nor gives zeros, which an optimizer would use
        w = w.detach()
    layer = (setting.layer if isinstance(setting, Setting) else setting.name) or op.kind
    for name, tensor in (("input", x), ("weight", w), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{layer}: {name} is {tensor.dtype}: give a floating-point tensor")
        if tensor is not None and tensor.dtype != x.dtype and not autocast:
            raise TypeError(
                f"{layer}: input is {x.dtype} and {name} is {tensor.dtype}: give one dtype, or use autocast"
            )
    if bias is not None and (op.geometry is not None or bias.shape != w.shape[:1]):
        bias = _fitting(bias, w, op, layer)
    dtype = torch.get_autocast_dtype(device) if autocast and x.dtype != torch.float64 else x.dtype
    if not isinstance(setting, Setting):
        return _compiled(x, w, bias, op, setting, dtype)
    x, w, bias = _in_memory(x, w, bias, layer)
    if setting.samples is not None:
        return _by_choice(x, w, bias, op, setting, setting.samples)
    recorded = torch.is_grad_enabled()
    expected = ("grad_input",) * (recorded and x.requires_grad) + ("grad_weight",) * (recorded and w.requires_grad)
    # Modes that watch functions of torch must not see those that a product is made of.
    with torch._C.DisableTorchFunction(), torch.autocast(device, enabled=False):
        result: Tensor = _Products.apply(x, w, bias, op, setting, dtype, expected)
    return result


def _in_memory(x: Tensor, w: Tensor, bias: Tensor | None, layer: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """`in_memory` of the three tensors of a layer.

    Raises:
        ValueError: the storage of one was resized below what its shape needs.
    """
    for name, t in (("input", x), ("weight", w), ("bias", bias)):
        if t is not None and t.untyped_storage().nbytes() < (t.storage_offset() + t.numel()) * t.element_size():
            check_storage(t, f"{layer}: {name}")  # an expanded tensor has less storage too
    if x.is_neg() or w.is_neg() or x._is_zerotensor() or w._is_zerotensor():
        x, w = in_memory(x), in_memory(w)
    if bias is not None and (bias.is_neg() or bias._is_zerotensor()):
        bias = in_memory(bias)
    return x, w, bias


def _fitting(bias: Tensor, w: Tensor, op: Op, name: str) -> Tensor:
    """A bias of one number for each output channel: torch's linear layer repeats one alone, its convolution does not.

    Raises:
        RuntimeError: it has another shape.
    """
    wanted = op.bias_length(w.shape)
    if op.has_rows and bias.dim() <= 1 and bias.numel() == 1:
        bias = bias.expand(wanted)
    if bias.shape != (wanted,):
        raise RuntimeError(
            f"{name}: a bias of shape {tuple(bias.shape)} beside a weight of shape {tuple(w.shape)}: give ({wanted},)"
        )
    return bias


def _by_choice(x: Tensor, w: Tensor, bias: Tensor | None, op: Op, setting: Setting, samples: Samples) -> Tensor:
    """Run the samples of each choice together at its bits; what no sample chose is not executed.

    Since a product works on each sample alone, this equals one product of the mixed input
    ``sum_k mask_k Q_k(x)``, whose gradient for ``mask_k`` is ``<grad_input, Q_k(x)>``.

    Source: Fu et al. 2020, FracTrain, arXiv:2012.13113, section 3.2, mixed as in the authors' ImageNet code.
    """
    if len(samples.choice) != len(x):
        raise ValueError(
            f"{setting.layer or op.kind}: input of shape {tuple(x.shape)} where bits were chosen for "
            f"{len(samples.choice)} samples: inside a gated block the first axis counts samples"
        )
    if samples.mask is not None and samples.mask.requires_grad:
        x = _TellMask.apply(x, samples.mask, op, setting, samples)
    chosen: list[int] = samples.choice.unique().tolist()
    indices = [(samples.choice == k).nonzero().squeeze(1) for k in chosen]
    outputs = []
    for k, index in zip(chosen, indices, strict=True):
        noise = None if setting.noise is None else setting.noise.branch(str(k))
        own = replace(setting, samples=None, bits=samples.bits[k], noise=noise)
        outputs.append(_apply(x if len(chosen) == 1 else x[index], w, bias, op, own))
    if len(outputs) == 1:
        return outputs[0]
    y = torch.cat(outputs)[torch.cat(indices).argsort()]
    return strides.laid_out(y, op.output_strides(y.shape, x, w))


class _TellMask(torch.autograd.Function):
    """The input as it is; the mask receives the gradient that it would have as a factor of each choice's codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, op: Op, setting: Setting, samples: Samples) -> Tensor:
        ctx.save_for_backward(x, mask)
        ctx.arguments = op, setting, samples.bits
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, mask = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            grad_mask = mask_gradient(in_full(g), in_full(x), *ctx.arguments)
        return g, grad_mask.to(mask.dtype), None, None, None


def mask_gradient(g: Tensor, x: Tensor, op: Op, setting: Setting, bits: Sequence[tuple[int, ...] | None]) -> Tensor:
    """``<g, Q_k(x)>`` of each sample and choice, ``(B, K)``; choices with equal bits of `input` are quantised once."""
    columns: dict[int | None, Tensor] = {None: g.new_zeros(len(g))}
    own = [None if b is None else replace(setting, bits=b, samples=None) for b in bits]
    widths = [None if s is None else s.width("output", "input") for s in own]
    for width, each in zip(widths, own, strict=True):
        if each is not None and width not in columns:
            place = slot(op, setting.recipe, "output", "input", x.shape, each.bits)
            x_hat = REFERENCE.encode(x, place, each).numbers
            columns[width] = (g.flatten(1) * x_hat.flatten(1)).sum(1)
    return torch.stack([columns[width] for width in widths], 1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, setting: Setting | Deferred) -> Tensor:
    """``output (..., N) = input (..., K) weight (N, K)^T + bias (N,)``, forward and backward in the recipe's formats.

    Args:
        x: float ``(..., K)``; leading axes are rows, the first one counts samples.
        weight: ``(N, K)``.
        bias: ``(N,)``.
        setting: recipe, noise, range.

    Returns:
        ``(..., N)``, in the dtype of `x`, or autocast's.

    Raises:
        TypeError: dtypes are not floating point or differ outside autocast.
        RuntimeError: in backward, with ``create_graph=True``.
    """
    if x.dim() == 1:
        return linear(x.unsqueeze(0), weight, bias, setting=setting).squeeze(0)
    return _apply(x, weight, bias, Linear(), setting)


def matmul(x: Tensor, weight: Tensor, *, setting: Setting) -> Tensor:
    """``output (..., M, N) = input (..., M, K) weight (..., K, N)`` with broadcasting, in the recipe's formats.

    Each matrix of a batch has its own scales per row or channel, also in an operand that is broadcast. Either
    operand may need a gradient. Dtypes and errors as for `linear`; operands need two axes or more.
    """
    if x.dim() < 2 or weight.dim() < 2:
        raise UsageError(f"matmul of shapes {tuple(x.shape)} and {tuple(weight.shape)}: both need two axes or more")
    return _apply(x, weight, None, Matmul(), setting)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int = 1,
    padding_mode: str = "zeros",
    setting: Setting | Deferred,
) -> Tensor:
    """A convolution of ``x (B, C, *size)`` with ``weight (O, C/groups, *kernel)``, 1 to 3 spatial axes.

    Args:
        x: float ``(B, C, *size)`` or unbatched ``(C, *size)``.
        weight: ``(O, C/groups, *kernel)``.
        bias: ``(O,)``.
        stride: one number per spatial axis.
        dilation: one number per spatial axis.
        padding: one number per spatial axis, or ``"same"`` or ``"valid"``.
        groups: number of groups.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``. Real zeros are added
            after quantisation, also where zero is not on the grid, as in the authors' codes.
        setting: recipe, noise, range.

    Returns:
        ``(B, O, *out)`` or unbatched; dtype and errors as for `linear`.
    """
    axes = weight.dim() - 2
    if x.dim() == axes + 1:
        one = conv(
            x.unsqueeze(0),
            weight,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            padding_mode=padding_mode,
            setting=setting,
        )
        return one.squeeze(0)
    before, after = _padding(padding, weight.shape[2:], dilation)
    if padding_mode != "zeros":
        pairs = [side for b, a in zip(reversed(before), reversed(after), strict=True) for side in (b, a)]
        x, before, after = F.pad(x, pairs, mode=padding_mode), (0,) * axes, (0,) * axes
    op = Convolution(stride=tuple(stride), padding=after, dilation=tuple(dilation), groups=groups)
    y = _apply(x, weight, bias, op, setting)
    for axis, (b, a) in enumerate(zip(before, after, strict=True), start=2):
        if b != a:  # an odd "same" padding, stride 1: one zero too many before, so one output too many
            y = y.narrow(axis, 1, y.shape[axis] - 1)
    return y if before == after else strides.laid_out(y, op.output_strides(y.shape, x, weight))


def _padding(
    padding: Sequence[int] | str, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Zeros before and after, for each spatial axis; "same" puts an odd one after, as torch does."""
    if padding == "valid":
        padding = (0,) * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
    return tuple(int(p) for p in padding), tuple(int(p) for p in padding)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    setting: Setting | Deferred,
) -> Tensor:
    """A transposed convolution of ``x (B, I, *size)`` with ``weight (I, O/groups, *kernel)``, 1 to 3 spatial axes.

    Arguments, result and errors as for `conv`; `output_padding` is the extra size of one side.
    """
    op = Convolution(
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=groups,
        transposed=True,
        output_padding=tuple(output_padding),
    )
    if x.dim() == weight.dim() - 1:
        return _apply(x.unsqueeze(0), weight, bias, op, setting).squeeze(0)
    return _apply(x, weight, bias, op, setting)
