"""Which engine executes a product: the one place that chooses."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from lowbit.engines.base import Engine, Pair
from lowbit.engines.int8 import Int8
from lowbit.engines.int_mm import IntMM
from lowbit.engines.reference import Reference
from lowbit.engines.triton import Triton
from lowbit.errors import UsageError
from lowbit.methods.operands import SLOTS
from lowbit.methods.recipe import Recipe
from lowbit.numerics.formats import FP32, Format, check_defined
from lowbit.products.operators import Op
from lowbit.products.setting import Slot, shares, sharing, slot
from lowbit.products.strides import Strides, contiguous

REFERENCE = Reference()

_ENGINES: tuple[Engine, ...] = (REFERENCE, Int8(), IntMM(), Triton())

ENGINES = tuple(dict.fromkeys(engine.name for engine in _ENGINES))
"""The names of engines that a layer can ask for."""

PRODUCTS = tuple(dict.fromkeys(product for product, _ in SLOTS))

Chosen = Mapping[str, Engine]  # by product
_ALL_ON_REFERENCE: Chosen = dict.fromkeys(PRODUCTS, REFERENCE)


def _on(name: str, device: str | None) -> Engine | None:
    """The engine of that name for a type of device, or None; without a device the first of that name."""
    if device is None:
        return next(e for e in _ENGINES if e.name == name)
    fitting = (e for e in _ENGINES if e.name == name and (e.devices is None or device in e.devices))
    return next(fitting, None)


def refusals(
    op: Op,
    recipe: Recipe,
    bits: Sequence[int] | None = None,
    dim: int = 2,
    *,
    device: str | None = None,
    engine: str = "int8",
) -> dict[str, str]:
    """The products of an operator that an engine cannot run, each with the reason.

    Args:
        op: the operator.
        recipe: the formats.
        bits: widths in the order of `SLOTS`; None: the recipe's own.
        dim: axes of its tensors.
        device: the type of device they lie on; None: where layers are converted for that engine, which is the CPU for
            every engine that has one there.
        engine: its name, one of `ENGINES`.
    """
    found = _on(engine, device)
    if found is None:
        return dict.fromkeys(PRODUCTS, f"there is none on {device}")
    return _refusals_of(found, op, recipe, bits, dim)


def in_words(refused: Mapping[str, str]) -> str:
    """Each reason after the products that are refused for it; empty if none are."""
    products: dict[str, list[str]] = {}
    for product, why in refused.items():
        products.setdefault(why, []).append(product)
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in products.items())


def refusal_of_tensor(x: Tensor, engine: str) -> str:
    """Why an engine does not take a layer with such a parameter; empty if it does.

    A layer is converted before it moves to another device, so the first engine of a name counts, that of the CPU.
    """
    found = _on(engine, None)
    assert found is not None
    if x.device.type in (found.devices or (x.device.type,)) and x.dtype in (found.dtypes or (x.dtype,)):
        return ""
    dtypes = [str(dtype).removeprefix("torch.") for dtype in found.dtypes or ("every dtype",)]
    devices = ["the CPU" if device == "cpu" else device for device in found.devices or ("every device",)]
    return f"it takes {' and '.join(dtypes)} on {' and '.join(devices)}"


def _refusals_of(engine: Engine, op: Op, recipe: Recipe, bits: Sequence[int] | None, dim: int) -> dict[str, str]:
    """The reason for each product that an engine cannot run."""
    refused = {}
    for product in PRODUCTS:
        formats, kept = [], []
        for i, (of, operand) in enumerate(SLOTS):
            if of == product:
                fmt: Format = getattr(getattr(recipe, product), operand)
                check_defined(fmt)
                fmt = fmt.with_bits(bits[i]) if bits is not None and fmt.has_width else fmt
                formats.append(fmt)
                kept.append(_is_kept(op, product, operand, fmt, dim))
        pair = Pair(op=op, name=product, formats=(formats[0], formats[1]), kept=(kept[0], kept[1]))
        if why := engine.refusal(pair):
            refused[product] = why
    return refused


def _is_kept(op: Op, product: str, operand: str, fmt: Format, dim: int) -> bool:
    """Whether the product keeps every axis along which scales differ."""
    if fmt.granularity == "tensor":
        return True
    if fmt.granularity == "sample":
        return product != "grad_weight" and operand != "weight"
    if fmt.granularity in ("block", "square"):
        return False
    groups = 1 if op.geometry is None else op.geometry.groups
    shared = sharing(op, product, operand, fmt, torch.Size((groups * 2,) * dim))
    return set(op.summed(product, operand, len(shared.view))) <= set(shared.dims)


# A schedule or a gate may set any widths that fit an engine; an engine that runs a recipe at these widths runs it.
_EIGHT = (8,) * len(SLOTS)


@lru_cache(maxsize=4096)
def _whys(
    name: str, op: Op, recipe: Recipe, widths: tuple[int, ...] | None, dim: int, device: str
) -> Mapping[str, str]:
    """`refusals`, found once."""
    return refusals(op, recipe, widths, dim, device=device, engine=name)


@cache
def _warn_once(recipe: str, device: str, why: str) -> None:
    """Warn once that products of layers that were converted and then moved run on the reference engine there."""
    warnings.warn(
        f"recipe {recipe!r} runs on the reference engine on {device} for these products: {why}. The reference engine "
        "simulates low precision and is slower than fp32. If that is what you want, convert with engine='reference'",
        RuntimeWarning,
        stacklevel=4,
    )


def choose(
    name: str,
    op: Op,
    recipe: Recipe,
    widths: tuple[int, ...] | None,
    dim: int,
    dtypes: tuple[torch.dtype, ...],
    device: str,
    layer: str = "",
) -> Chosen:
    """The engine that executes each product of a call.

    It is the engine that was asked for if the device, the dtypes and the bits of the moment fit it; otherwise it is
    the reference engine.

    Args:
        name: what was asked for, one of `ENGINES`.
        op: the operator.
        recipe: the formats.
        widths: of all operands, in the order of `SLOTS`; None: the recipe's own.
        dim: axes of the weight.
        dtypes: of input, weight and output.
        device: the type of device that they lie on.
        layer: for messages.

    Raises:
        UsageError: the engine that was asked for does not exist, or cannot run any product of this recipe at any bits.
    """
    if name == REFERENCE.name:
        return _ALL_ON_REFERENCE
    if name not in ENGINES:
        raise UsageError(f"engine={name!r}: give one of {', '.join(ENGINES)}")
    engine = _on(name, device)
    if engine is None:
        return _ALL_ON_REFERENCE
    refused = _whys(name, op, recipe, None if widths is None else _EIGHT, dim, device)
    if refused and device != "cpu":  # the engine was chosen where the layer was before it moved
        _warn_once(recipe.name, device, in_words(refused))
    elif len(refused) == len(PRODUCTS):
        raise UsageError(
            f"{layer or op.kind}: the {name} engine cannot run recipe {recipe.name!r}: {in_words(refused)}. Choose "
            "engine='reference'"
        )
    if engine.dtypes is not None and not set(dtypes) <= set(engine.dtypes):
        return _ALL_ON_REFERENCE
    if widths is not None:
        refused = _whys(name, op, recipe, widths, dim, device)
    return {product: REFERENCE if product in refused else engine for product in PRODUCTS}


@dataclass(frozen=True, kw_only=True)
class Route:
    """How the three products of a call are executed: all that follows from its shapes, found once.

    Args:
        engines: what executes each of them.
        makers: what encodes each operand, by product and operand: the engine of the product. If that is the reference
            engine and another product shares the codes, it is the other's engine, and reference takes its values.
        mixed: the products of which an operand is encoded by another engine than multiplies it.
        output: the shape of the output.
        strides: its strides, where they do not depend on those of the operands.
        keeps_bias: whether a bias is added as it is.
        slots: the six operands, by product and operand.
        shares_input: whether the input's codes in `output` are those in `grad_weight`.
        shares_weight: whether the weight's codes in `output` are those in `grad_input`.
        shares_grad_output: whether grad_output's codes in `grad_input` are those in `grad_weight`.
    """

    engines: Chosen
    makers: Mapping[tuple[str, str], Engine]
    mixed: frozenset[str]
    output: torch.Size
    strides: Strides | None
    keeps_bias: bool
    slots: Mapping[tuple[str, str], Slot]
    shares_input: bool
    shares_weight: bool
    shares_grad_output: bool


@lru_cache(maxsize=4096)
def route(
    op: Op,
    recipe: Recipe,
    name: str,
    widths: tuple[int, ...] | None,
    x: torch.Size,
    w: torch.Size,
    dtypes: tuple[torch.dtype, ...],
    device: str,
    layer: str = "",
) -> Route:
    """How a call is executed; arguments and errors are those of `choose`, with the shapes of input and weight.

    Raises:
        RuntimeError: shapes that do not multiply.
    """
    output = op.output_shape(x, w)
    engines = choose(name, op, recipe, widths, len(w), dtypes, device, layer)
    shapes = {"input": x, "weight": w, "grad_output": output}
    slots = {(p, o): slot(op, recipe, p, o, shapes[o], widths) for p, o in SLOTS}
    makers = {(p, o): engines[p] for p, o in SLOTS}
    shared = {}
    for operand, (first, second) in _TWICE.items():
        a, b = (first, operand), (second, operand)
        shared[operand] = shares(slots[a], slots[b])
        if shared[operand] and makers[a] is REFERENCE:
            makers[a] = makers[b]
        elif shared[operand]:
            makers[b] = makers[a]
    return Route(
        engines=engines,
        makers=makers,
        mixed=frozenset(p for p, o in SLOTS if makers[p, o] is not engines[p]),
        output=output,
        strides=contiguous(output) if op.geometry is None else None,
        keeps_bias=recipe.bias == FP32 and dtypes[0] not in (torch.bfloat16, torch.float16),
        slots=slots,
        shares_input=shared["input"],
        shares_weight=shared["weight"],
        shares_grad_output=shared["grad_output"],
    )


# The two products that each operand is part of, in the order in which they run.
_TWICE = {
    "input": ("output", "grad_weight"),
    "weight": ("output", "grad_input"),
    "grad_output": ("grad_input", "grad_weight"),
}
