"""Recipes: three products times two operands, each with a number format, as frozen data.

A published method is a TOML file in `recipes/`; nothing in the code asks for a method's name.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lowbit.errors import RunError, UsageError, shown, unknown
from lowbit.inputs.checks import check_fields, check_type, checked
from lowbit.methods.dynamic import Gating, Scheduling
from lowbit.methods.names import ON_THE_FLY, folder, is_family, is_file_name, recipes, stored, widths_in
from lowbit.methods.normalization import RangeNorm
from lowbit.methods.operands import SLOTS, GradInput, GradWeight, Output, check_operand, range_of
from lowbit.methods.toml import frozen, parsed, read_file
from lowbit.numerics.formats import FP32, Format

__all__ = [
    "SLOTS",
    "Gating",
    "GradInput",
    "GradWeight",
    "Output",
    "RangeNorm",
    "Recipe",
    "Scheduling",
    "from_toml",
    "is_family",
    "is_file_name",
    "read_file",
    "recipes",
]

Policy = Literal["convert", "leave"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One method of low-precision training.

    Args:
        name: the name by which it is asked for.
        summary: one line for a table.
        source: the paper and, if it differs, the code.
        output: formats of ``output = input x weight``.
        grad_input: formats of ``grad_input = grad_output x weight``.
        grad_weight: formats of ``grad_weight = grad_output x input``. If its `grad_output` differs from that of
            `grad_input`, the gradient is bifurcated.
        bias: format of the bias that is added to the output.
        normalization: what replaces batch normalisation; None keeps it.
        first: whether the first layer with products, in registration order, is converted or left.
        last: the same for the last one.
        schedule: how bits change over the run; None: they do not change.
        gates: what chooses bits for each block and sample; None: bits are not chosen.
        depthwise: bits (forward, backward) of convolutions with one input channel per group, which follow neither
            schedule nor gates; None: they follow like any layer.
    """

    # Equal recipes share a name, and a recipe is looked up at every product: its hash is that of the name.
    name: str
    summary: str = field(hash=False)
    source: str = field(hash=False)
    output: Output = field(hash=False)
    grad_input: GradInput = field(hash=False)
    grad_weight: GradWeight = field(hash=False)
    bias: Format = field(default=FP32, hash=False)
    normalization: RangeNorm | None = field(default=None, hash=False)
    first: Policy = field(default="convert", hash=False)
    last: Policy = field(default="convert", hash=False)
    schedule: Scheduling | None = field(default=None, hash=False)
    gates: Gating | None = field(default=None, hash=False)
    depthwise: tuple[int, int] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.schedule is not None and self.gates is not None:
            raise UsageError("a recipe has a schedule or gates, not both: each sets the bits of its layers")
        if self.depthwise is not None:
            if not self.is_dynamic:
                raise UsageError("depthwise bits go with a schedule or gates; without them give the layers a rule")
            if min(self.depthwise) < 1:
                raise UsageError(f"depthwise={self.depthwise!r}: give a pair of bits (forward, backward), e.g. [8, 16]")
        _check_bias(self.bias)
        if self.gates is not None:
            for form in self.output.input.forms:
                if form.transform.has_gradient:
                    raise UsageError(
                        f"output.input has transform={form.transform.kind!r}, which gates cannot differentiate"
                    )
        for product, operand, fmt in self.operands():
            for form in fmt.forms:
                check_operand(f"{product}.{operand}", operand, form)
        kept, used = self.output.input, self.grad_weight.input
        if used.running is not None and range_of(kept) != range_of(used):
            raise UsageError(
                "grad_weight.input keeps another running range than output.input: a layer has one running input range"
            )

    def replace(self, **changes: Any) -> "Recipe":
        """The same recipe with some fields changed, e.g. ``recipe.replace(name="mine", last="leave")``.

        Raises:
            UsageError: a field that no recipe has, a value of another type, or values that do not fit together.
        """
        known = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise unknown("field of a recipe", name, known)
        return dataclasses.replace(self, **changes)

    @property
    def is_dynamic(self) -> bool:
        """Whether its bits change in a run, so that training needs a `lowbit.PrecisionController`."""
        return self.schedule is not None or self.gates is not None

    def settings(self) -> dict[str, Any]:
        """What `tuned` can change, with the present values: the settings of the schedule or of the gates."""
        if self.schedule is not None:
            return self.schedule.forward.values
        if self.gates is not None:
            return {f.name: getattr(self.gates, f.name) for f in dataclasses.fields(self.gates)}
        return {}

    def tuned(self, **settings: Any) -> "Recipe":
        """The same recipe with other settings of its schedule or gates, e.g. ``Recipe.from_name("cpt").tuned(low=4)``.

        Raises:
            UsageError: the recipe lacks the setting, or the value is impossible.
        """
        known = self.settings()
        for name in settings:
            if name not in known:
                has = f"it has {', '.join(known)}" if known else "its bits are constant"
                raise UsageError(f"recipe {self.name!r} has no setting {name!r}: {has}")
        settings = {name: frozen(value) for name, value in settings.items()}
        if self.schedule is not None:
            forward = self.schedule.forward.replace(**settings)
            return self.replace(schedule=dataclasses.replace(self.schedule, forward=forward))
        if self.gates is not None:
            return self.replace(gates=dataclasses.replace(self.gates, **settings))
        return self

    def operands(self) -> list[tuple[str, str, Format]]:
        """The table as rows (product, operand, format), in the order of `SLOTS`."""
        return [(product, operand, getattr(getattr(self, product), operand)) for product, operand in SLOTS]

    @checked
    def with_bits(self, *, weight: int, input: int, grad_output: int) -> "Recipe":  # noqa: A002 - the operand's name
        """The same recipe with these widths in every product; every operand must be an integer format."""
        bits = {"weight": weight, "input": input, "grad_output": grad_output}

        def changed(product: Any) -> Any:
            operands = {f.name: getattr(product, f.name) for f in dataclasses.fields(product)}
            floats = [operand for operand, fmt in operands.items() if not fmt.has_width]
            if floats:
                raise UsageError(
                    f"recipe {self.name!r} has no bits to set in {', '.join(floats)}: it is a float format"
                )
            return dataclasses.replace(
                product,
                **{operand: fmt.with_bits(bits[operand]) for operand, fmt in operands.items()},
            )

        return self.replace(
            output=changed(self.output),
            grad_input=changed(self.grad_input),
            grad_weight=changed(self.grad_weight),
        )

    @staticmethod
    def from_name(name: str) -> "Recipe":
        """The recipe of that name, with other widths after a colon, e.g. ``int8:w4a4g6``.

        ``RECIPE:wXaYgZ`` has X-bit weights, Y-bit inputs and Z-bit gradients in every product; ``wXaYgZ`` alone means
        `sbm8-cpt` with these widths.

        Raises:
            UsageError: an unknown recipe, bits out of range, or a recipe that lacks bits to set.
        """
        check_type("name", name, str)
        if widths := widths_in(name):
            base, weight, input_, grad_output = widths
            try:
                recipe = Recipe.from_name(base)
                if recipe.is_dynamic:
                    raise UsageError(
                        f"the bits of {base} change during training: set them by its settings, see `tuned`"
                    )
                recipe = recipe.with_bits(weight=weight, input=input_, grad_output=grad_output)
            except UsageError as error:
                raise UsageError(f"recipe {shown(name)}: {error}") from error
            return recipe.replace(
                name=name,
                summary=f"{weight}-bit weights, {input_}-bit inputs, {grad_output}-bit gradients, as {base}",
            )
        if name == ON_THE_FLY:
            raise UsageError(f"{name} stands for a family of recipes: put widths in, e.g. w4a4g6")
        if name not in stored():
            raise unknown("recipe", name, recipes())
        return _load(name)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Recipe":
        """The recipe in a TOML file, see `from_toml`; its name is that of the file without ``.toml``.

        Raises:
            UsageError: the file cannot be read, is not a recipe, or has the name of a recipe of lowbit.
        """
        file = Path(path)
        if file.suffix != ".toml":
            raise UsageError(f"recipe file {shown(str(path))}: give a file whose name ends in .toml")
        if file.stem in stored() or is_family(file.stem):
            raise UsageError(f"recipe file {shown(str(path))}: {file.stem!r} is a recipe of lowbit; rename the file")
        try:
            return from_toml(file.stem, read_file(file))
        except RunError as error:
            raise UsageError(f"recipe file {error}") from error

    @staticmethod
    def find(text: str) -> "Recipe":
        """The recipe of a name, or of a TOML file if the text ends in ``.toml``; it raises as both do."""
        return Recipe.load(text) if is_file_name(text) else Recipe.from_name(text)


def _check_bias(bias: Format) -> None:
    """Raise a UsageError for a format that no bias can have."""
    if bias.stochastic:
        raise UsageError("the bias rounds to nearest: no noise is drawn for it")
    if bias.granularity != "tensor" or bias.running is not None:
        raise UsageError("the bias shares one scale and keeps no running range")
    if bias.widths:
        raise UsageError(f"the bias is {bias}: its bits never change, so leave the widths out")
    if bias.transform.has_gradient:
        raise UsageError(
            f"the bias has transform={bias.transform.kind!r}: its gradient is a plain sum, so leave it out"
        )


@cache
def _load(name: str) -> Recipe:
    return from_toml(name, (folder() / f"{name}.toml").read_text(encoding="utf-8"))


def from_toml(name: str, text: str) -> Recipe:
    """Read a recipe from TOML: `[formats]` names formats, and the tables of the products use these names.

    ``"fp32"`` and ``"bf16"`` are names that always exist. ``base = "sbm8-cpt"`` takes every field that the text leaves
    out from that stored recipe. `[schedule]` has a schedule for `forward`, ``{ kind = "cyclic", low = 3, ... }`` or a
    number of bits, and may have one for `backward`; `[gates]` has the fields of `Gating`.

    Raises:
        UsageError: it is not TOML, or has an unknown name or value.
    """
    recipe: Recipe = parsed(Recipe, name, text, base_of=Recipe.from_name)
    return recipe
