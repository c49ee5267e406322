"""How a network is trained to be timed: plain, under autocast, compiled, by torchao, or by a recipe."""

import importlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import nn

import lowbit
from lowbit.conversion.report import Row
from lowbit.engines.choice import ENGINES, PRODUCTS
from lowbit.errors import UsageError, unknown
from lowbit.methods.recipe import is_family, is_file_name, recipes
from lowbit.nn import PRODUCT_LAYERS


class Variant(NamedTuple):
    """How a work is trained.

    Args:
        prepare: changes the plain model, and says in words what a reader must know of it; or raises.
        autocast: whether the forward runs inside bfloat16 autocast.
        foreign: whether it needs what may not be here, a compiler or another library: it is then left out and said.
        otherwise: the name to ask for where the engine that nobody named cannot run it: it is then left out and said.
    """

    prepare: Callable[[nn.Module], str]
    autocast: bool = True
    foreign: bool = False
    otherwise: str = ""


def _as_it_is(_: nn.Module) -> str:
    return ""


def _compiled(model: nn.Module) -> str:
    model.compile()
    return ""


def _torchao(model: nn.Module) -> str:
    """Torchao's int8 training of linear layers, by swapping modules: its other way runs no integer product."""
    logging.getLogger("torchao").setLevel(logging.ERROR)  # of its other kernels, which do not load without a GPU
    training = importlib.import_module("torchao.prototype.quantized_training")
    quantize: Any = importlib.import_module("torchao.quantization").quantize_
    total = _plain_layers(model)
    quantize(model, training.int8_mixed_precision_training(module_swap=True))
    converted = total - _plain_layers(model)
    return "" if converted == total else f"torchao converts {converted} of {total} layers"


def _torchao_compiled(model: nn.Module) -> str:
    note = _torchao(model)
    return _compiled(model) or note


def _plain_layers(model: nn.Module) -> int:
    """Layers with products that are torch's own."""
    return sum(type(m) in PRODUCT_LAYERS for m in model.modules())


def _recipe(name: str, engine: str) -> Variant:
    def prepare(model: nn.Module) -> str:
        report = lowbit.convert_(model, name, engine=engine)
        return _ran_on(report.rows) if engine == "auto" else ""

    return Variant(prepare)


def _ran_on(rows: Iterable[Row]) -> str:
    """What products run on, of the layers that multiply."""
    chosen = {product: Counter[str]() for product in PRODUCTS}
    for row in rows:
        for product, engine in row.engines.items() if "grad_weight" in row.engines else ():
            chosen[product][engine] += 1
    engines = {engine for counts in chosen.values() for engine in counts}
    if len(engines) == 1:
        return f"on {engines.pop()}"
    shown = (f"{product} on {' and '.join(sorted(counts))}" for product, counts in chosen.items() if counts)
    return ", ".join(shown)


BASES: dict[str, Variant] = {
    "fp32": Variant(_as_it_is, autocast=False),
    "bf16": Variant(_as_it_is),
    "fp32-compiled": Variant(_compiled, autocast=False, foreign=True),
    "bf16-compiled": Variant(_compiled, foreign=True),
    "torchao": Variant(_torchao, foreign=True),
    "torchao-compiled": Variant(_torchao_compiled, foreign=True),
}

VARIANTS = ("fp32", "bf16", "sbm8", "int8", "torchao")
COMPILED = tuple(name for name in BASES if name.endswith("-compiled"))


def variant(name: str) -> Variant:
    """How to train what a name says: one of `BASES`, a recipe (on the int8 engine), or ``RECIPE:ENGINE``.

    A recipe is a name, also of the kind ``int8:w4a4g4``, or a file that ends in ``.toml``.

    Raises:
        UsageError: an unknown name or engine, a recipe's file or widths that make no recipe, or a recipe that trains
            in another autocast.
    """
    if name in BASES:
        return BASES[name]
    recipe, colon, engine = name.rpartition(":")
    if not colon or is_family(name):
        recipe, engine = name, ""
    engines = ("auto", *ENGINES)
    if engine and engine not in engines:
        raise unknown("engine", engine, engines)
    if recipe not in recipes() and not is_family(recipe) and not is_file_name(recipe):
        raise unknown("variant", name, {*BASES, *recipes()})
    asked = lowbit.Recipe.find(recipe).autocast  # raises before anything runs
    if asked is not None and asked.dtype != "bf16":
        raise UsageError(f"variant {name!r}: steps are timed in bf16 autocast, and {recipe} asks for {asked}")
    made = _recipe(recipe, engine or "int8")
    return made if engine else made._replace(otherwise=f"{recipe}:auto")
