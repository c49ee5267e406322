"""Recipes: three products times two operands, each with a number format, as frozen data.

A published method is a TOML file in `recipes/`; nothing in the code asks for a method's name.
"""

import dataclasses
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Literal

from lowbit.errors import UsageError, check_choice, unknown
from lowbit.formats import BF16, FP32, Float, Format, Integer

Policy = Literal["convert", "leave"]
Constant = Literal["paper", "authors"]
EpsilonPlace = Literal["inside", "outside"]

ON_THE_FLY = "wXaYgZ"


@dataclass(frozen=True, kw_only=True)
class Output:
    """The formats of ``output = input x weight``."""

    input: Format
    weight: Format


@dataclass(frozen=True, kw_only=True)
class GradInput:
    """The formats of ``grad_input = grad_output x weight``."""

    grad_output: Format
    weight: Format


@dataclass(frozen=True, kw_only=True)
class GradWeight:
    """The formats of ``grad_weight = grad_output x input``."""

    grad_output: Format
    input: Format


@dataclass(frozen=True, kw_only=True)
class RangeNorm:
    """Range Batch-Norm in place of batch normalisation, see `lowbit.nn.norm.range_batch_norm`.

    Args:
        input: format of the layer's input.
        grad_output: format of the gradient that arrives at its output.
        constant: the factor of ``range / sqrt(2 ln n)``: ``"paper"`` 1, ``"authors"`` 0.5402 as in their code.
        chunks: the range is the mean over at most so many chunks of the batch.
        epsilon: ``"inside"``: divide by ``sqrt(sigma**2 + eps)`` as BatchNorm does; ``"outside"``: by ``sigma + eps``.
        momentum: weight of the new batch in the running statistics; None keeps the layer's own.
    """

    input: Format
    grad_output: Format
    constant: Constant = "paper"
    chunks: int = 16
    epsilon: EpsilonPlace = "inside"
    momentum: float | None = None

    def __post_init__(self) -> None:
        check_choice("Range BN constant", self.constant, Constant)
        check_choice("place of epsilon", self.epsilon, EpsilonPlace)
        if isinstance(self.chunks, bool) or not isinstance(self.chunks, int) or self.chunks < 1:
            raise UsageError(f"chunks={self.chunks!r}: a whole number of at least one chunk")
        for operand in ("input", "grad_output"):
            fmt = getattr(self, operand)
            if isinstance(fmt, Integer) and fmt.granularity != "tensor":
                raise UsageError(
                    f"normalization.{operand} is per {fmt.granularity}: Range BN has formats per tensor only"
                )
        if isinstance(self.grad_output, Integer) and self.grad_output.running is not None:
            raise UsageError("normalization.grad_output: only `input` keeps a running range")
        if self.momentum is not None and not 0 < self.momentum <= 1:
            raise UsageError(f"momentum={self.momentum}: the weight of the new batch is in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One method of low-precision training.

    Args:
        name: the name it is asked for by.
        summary: one line for a table.
        source: paper and, where it differs, code.
        output: formats of ``output = input x weight``.
        grad_input: formats of ``grad_input = grad_output x weight``.
        grad_weight: formats of ``grad_weight = grad_output x input``. Where its `grad_output` differs from
            that of `grad_input`, the gradient is bifurcated.
        bias: format of the bias that is added to the output.
        normalization: what replaces batch normalisation; None keeps it.
        first: whether the first layer with products, in registration order, is converted or left.
        last: the same for the last one.
    """

    name: str
    summary: str
    source: str
    output: Output
    grad_input: GradInput
    grad_weight: GradWeight
    bias: Format = FP32
    normalization: RangeNorm | None = None
    first: Policy = "convert"
    last: Policy = "convert"

    def __post_init__(self) -> None:
        check_choice("policy for the first layer", self.first, Policy)
        check_choice("policy for the last layer", self.last, Policy)
        if self.bias.stochastic:
            raise UsageError("the bias rounds to nearest: no noise is drawn for it")
        if isinstance(self.bias, Integer) and (self.bias.granularity != "tensor" or self.bias.running is not None):
            raise UsageError("the bias shares one scale and keeps no running range")
        for text in (self.name, self.summary, self.source):
            if not isinstance(text, str):
                raise UsageError(f"{text!r}: name, summary and source are texts")
        for product, operand, fmt in self.operands():
            if isinstance(fmt, Integer):
                _check_operand(f"{product}.{operand}", operand, fmt)
        kept, used = self.output.input, self.grad_weight.input
        if isinstance(used, Integer) and used.running is not None and _range_of(kept) != _range_of(used):
            raise UsageError(
                "grad_weight.input keeps another running range than output.input: a layer has one running input range"
            )

    def replace(self, **changes: Any) -> "Recipe":
        """The same recipe with some fields changed, e.g. ``recipe.replace(name="mine", last="leave")``."""
        return dataclasses.replace(self, **changes)

    def operands(self) -> list[tuple[str, str, Format]]:
        """The table as rows (product, operand, format), in the order of `SLOTS`."""
        return [(product, operand, getattr(getattr(self, product), operand)) for product, operand in SLOTS]

    def with_bits(self, *, weight: int, input: int, grad_output: int) -> "Recipe":  # noqa: A002 - the operand's name
        """The same recipe with these widths in every product; every operand must be an integer format."""
        bits = {"weight": weight, "input": input, "grad_output": grad_output}

        def changed(product: Any) -> Any:
            operands = {f.name: getattr(product, f.name) for f in dataclasses.fields(product)}
            floats = [operand for operand, fmt in operands.items() if isinstance(fmt, Float)]
            if floats:
                raise UsageError(
                    f"recipe {self.name!r} has no bits to set in {', '.join(floats)}: it is a float format"
                )
            return dataclasses.replace(
                product,
                **{operand: dataclasses.replace(fmt, bits=bits[operand]) for operand, fmt in operands.items()},
            )

        return self.replace(
            output=changed(self.output),
            grad_input=changed(self.grad_input),
            grad_weight=changed(self.grad_weight),
        )

    @staticmethod
    def from_name(name: str) -> "Recipe":
        """The recipe of that name; ``wXaYgZ`` is `sbm8-cpt` with X-bit weights, Y-bit inputs, Z-bit gradients.

        Raises:
            UsageError: no such recipe, or bits out of range.
        """
        match = re.fullmatch(r"w(0|[1-9][0-9]{0,2})a(0|[1-9][0-9]{0,2})g(0|[1-9][0-9]{0,2})", str(name))
        if match:
            weight, input_, grad_output = (int(digits) for digits in match.groups())
            try:
                recipe = _load("sbm8-cpt").with_bits(weight=weight, input=input_, grad_output=grad_output)
            except UsageError as error:
                raise UsageError(f"recipe {name!r}: {error}") from error
            return recipe.replace(
                name=name,
                summary=f"{weight}-bit weights, {input_}-bit inputs, {grad_output}-bit gradients, as sbm8-cpt",
            )
        if name == ON_THE_FLY:
            raise UsageError(f"{name} stands for a family of recipes: put widths in, e.g. w4a4g6")
        if name not in _stored():
            raise unknown("recipe", name, recipes())
        return _load(name)


def _check_operand(where: str, operand: str, fmt: Integer) -> None:
    if operand != "input" and fmt.running is not None:
        raise UsageError(f"{where}: only `input` keeps a running range")
    if operand != "weight" and fmt.granularity == "output-channel":
        raise UsageError(f"{where}: only a weight has output channels; 'kept-channel' goes for every operand")
    if operand == "weight" and (fmt.granularity == "sample" or fmt.range == "sample-mean"):
        raise UsageError(f"{where}: a weight has no samples")


def _range_of(fmt: Format) -> tuple[object, ...] | None:
    return (fmt.range, fmt.running, fmt.running_start, fmt.granularity) if isinstance(fmt, Integer) else None


SLOTS = tuple(
    (product, f.name)
    for product, table in (("output", Output), ("grad_input", GradInput), ("grad_weight", GradWeight))
    for f in dataclasses.fields(table)
)


def recipes() -> tuple[str, ...]:
    """The names of all recipes; ``wXaYgZ`` stands for any widths, e.g. ``w4a4g6``."""
    return (*_stored(), ON_THE_FLY)


def _folder() -> Traversable:
    """The folder of stored recipes; data only, since a package of that name would hide the function `recipes`."""
    return files("lowbit") / "recipes"


@cache
def _stored() -> tuple[str, ...]:
    return tuple(sorted(f.name.removesuffix(".toml") for f in _folder().iterdir() if f.name.endswith(".toml")))


@cache
def _load(name: str) -> Recipe:
    return from_toml(name, (_folder() / f"{name}.toml").read_text(encoding="utf-8"))


def from_toml(name: str, text: str) -> Recipe:
    """Read a recipe from TOML: `[formats]` names formats, the tables of the products use the names.

    ``"fp32"`` and ``"bf16"`` are names that always exist.

    Raises:
        UsageError: no TOML, or a name or value that does not exist.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"recipe {name}: no TOML: {error}") from error
    formats: dict[str, Format] = {"fp32": FP32, "bf16": BF16}
    own = _table(f"recipe {name}: formats", data.pop("formats", {}))
    if taken := sorted(own.keys() & formats.keys()):
        raise UsageError(f"recipe {name}: the format {taken[0]!r} exists already: choose another name")
    if "name" in data:
        raise UsageError(f"recipe {name}: its name is that of its file; leave `name` out")
    formats.update({key: _construct(Integer, f"formats.{key}", fields) for key, fields in own.items()})
    unused = set(own)

    def resolved(table: type[Any], where: str, fields: dict[str, Any]) -> Any:
        operands = {f.name for f in dataclasses.fields(table) if f.type is Format}
        unused.difference_update(v for k, v in _table(where, fields).items() if k in operands and isinstance(v, str))
        return _construct(
            table,
            where,
            {k: _named(formats, f"{where}.{k}", v) if k in operands else v for k, v in fields.items()},
        )

    for key, table in (
        ("output", Output),
        ("grad_input", GradInput),
        ("grad_weight", GradWeight),
        ("normalization", RangeNorm),
    ):
        if key in data:
            data[key] = resolved(table, key, data[key])
    result: Recipe = resolved(Recipe, f"recipe {name}", {"name": name, **data})
    if unused:
        raise UsageError(f"recipe {name}: no product uses the format {sorted(unused)[0]!r}")
    return result


def _table(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where} is {value!r}: give a table of fields")
    return value


def _named(formats: dict[str, Format], where: str, name: object) -> Format:
    if not isinstance(name, str):
        raise UsageError(
            f"{where} is {name!r}: give the name of a format; a format's fields stand under [formats.NAME]"
        )
    if name not in formats:
        raise unknown(f"format of {where}", name, formats)
    return formats[name]


def _construct(cls: type[Any], where: str, fields: object) -> Any:
    fields = _table(where, fields)
    known = {f.name for f in dataclasses.fields(cls)}
    for key in fields:
        if key not in known:
            raise unknown(f"field of {where}", key, known)
    missing = {
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    } - set(fields)
    if missing:
        raise UsageError(f"{where} lacks {', '.join(sorted(missing))}")
    return cls(**fields)
