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
from lowbit.methods.attention import Attention
from lowbit.methods.autocast import Autocast, LossScaling
from lowbit.methods.dynamic import Gating, Phase, Scheduling, Skipping
from lowbit.methods.names import ON_THE_FLY, folder, is_family, is_file_name, recipes, stored, widths_in
from lowbit.methods.normalization import Normalization, RangeNorm, TermNorm
from lowbit.methods.operands import SLOTS, GradInput, GradWeight, Output, check_operand, range_of
from lowbit.methods.toml import frozen, parsed, read_file
from lowbit.methods.update import Update
from lowbit.numerics.formats import FP32, Format
from lowbit.schedules import Time

__all__ = [
    "SLOTS",
    "Attention",
    "Autocast",
    "Gating",
    "GradInput",
    "GradWeight",
    "LossScaling",
    "Output",
    "Phase",
    "RangeNorm",
    "Recipe",
    "Scheduling",
    "Skipping",
    "TermNorm",
    "Update",
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
        normalization: what replaces batch normalisation, Range BN or one with formats; None keeps it.
        first: whether the first layer with products, in registration order, is converted or left.
        last: the same for the last one.
        schedule: how bits change over the run; None: they do not change.
        gates: what chooses bits for each block and sample; None: bits are not chosen.
        depthwise: bits (forward, backward) of convolutions with one input channel per group, which follow neither
            schedule nor gates; None: they follow like any layer.
        phases: formats that take the place of these from later steps on, in order of time, see `then`.
        skip: steps and layers without a `grad_weight`; None: every step computes that of every layer.
        update: formats of the optimiser's step, which `lowbit.optim.from_recipe` applies; None: it is the optimiser's.
        autocast: what of torch's mixed precision it trains in, which `lowbit.amp` applies; None: whatever the loop has.
        attention: formats of the products between queries, keys and values; None: they stay as they are.
    """

    # Equal recipes share a name, and a recipe is looked up at every product: its hash is that of the name.
    name: str
    summary: str = field(hash=False)
    source: str = field(hash=False)
    output: Output = field(hash=False)
    grad_input: GradInput = field(hash=False)
    grad_weight: GradWeight = field(hash=False)
    bias: Format = field(default=FP32, hash=False)
    normalization: Normalization | None = field(default=None, hash=False)
    first: Policy = field(default="convert", hash=False)
    last: Policy = field(default="convert", hash=False)
    schedule: Scheduling | None = field(default=None, hash=False)
    gates: Gating | None = field(default=None, hash=False)
    depthwise: tuple[int, int] | None = field(default=None, hash=False)
    phases: tuple[Phase, ...] = field(default=(), hash=False)
    skip: Skipping | None = field(default=None, hash=False)
    update: Update | None = field(default=None, hash=False)
    autocast: Autocast | None = field(default=None, hash=False)
    attention: Attention | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_changes()
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
        for operand in ("input", "weight", "grad_output"):
            rules = {fmt.delay for _, of, fmt in self.operands() if of == operand and fmt.delay is not None}
            if len(rules) > 1:
                raise UsageError(
                    f"{operand} has two delayed ranges: a layer remembers one history of it. Give one rule"
                )
        if self.phases:
            self._check_ranges_of_phases()

    def _check_changes(self) -> None:
        """Raise where what changes in a run does not fit together."""
        if self.schedule is not None and self.gates is not None:
            raise UsageError("a recipe has a schedule or gates, not both: each sets the bits of its layers")
        if self.phases and (self.schedule is not None or self.gates is not None):
            raise UsageError("a recipe has phases, or a schedule or gates, not both: a phase brings its own bits")
        if self.depthwise is not None:
            if self.schedule is None and self.gates is None:
                raise UsageError("depthwise bits go with a schedule or gates; without them give the layers a rule")
            if min(self.depthwise) < 1:
                raise UsageError(f"depthwise={self.depthwise!r}: give a pair of bits (forward, backward), e.g. [8, 16]")

    def _check_ranges_of_phases(self) -> None:
        inputs = [recipe.output.input for recipe in self.in_phases()]
        if len({range_of(fmt) for fmt in inputs if fmt.running is not None}) > 1:
            raise UsageError(
                "phases keep different running ranges of output.input: a layer has one running input range"
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
        """Whether something of it changes in a run, so that training needs a `lowbit.PrecisionController`."""
        return bool(self.schedule or self.gates or self.phases) or self.skips_at_times

    @property
    def skips_at_times(self) -> bool:
        """Whether `grad_weight` is computed in some steps and not in others."""
        return self.skip is not None and self.skip.update_every is not None

    @property
    def changes(self) -> str:
        """What of it changes in a run, in words."""
        bits = self.schedule is not None or self.gates is not None
        return "the bits" if bits else "the formats" if self.phases else "the steps that compute grad_weight"

    def in_phases(self) -> tuple["Recipe", ...]:
        """The recipe in each of its phases, as recipes without phases; the first has its own formats."""
        first = dataclasses.replace(self, phases=())
        later = (
            dataclasses.replace(
                first,
                name=phase.name,
                output=phase.output,
                grad_input=phase.grad_input,
                grad_weight=phase.grad_weight,
                bias=phase.bias,
            )
            for phase in self.phases
        )
        return first, *later

    @checked
    def then(self, recipe: "Recipe | str", *, start: Time, name: str | None = None) -> "Recipe":
        """The same recipe with the formats of another from some step on, e.g. ``mxfp4.then("mxfp8", start="0.9")``.

        Formats of products and bias change, and nothing else: normalisation, first and last layer stay as they are.

        Args:
            recipe: a recipe with constant bits, or its name.
            start: the first step in these formats, see `Phase`.
            name: of the result; None: both names, ``"mxfp4-mxfp8"``.

        Raises:
            UsageError: the other recipe's bits change, or what does not switch is not the same in both.
        """
        other = recipe if isinstance(recipe, Recipe) else Recipe.find(recipe)
        if other.is_dynamic:
            raise UsageError(f"a phase of {other.name!r}, which itself changes in a run: give a recipe that does not")
        if other.normalization not in (None, self.normalization):
            raise UsageError(
                f"a phase of {other.name!r} with a normalisation that {self.name!r} lacks: only formats of products "
                "switch. Give a recipe with the same normalisation or none"
            )
        if other.update not in (None, self.update):
            raise UsageError(f"a phase of {other.name!r}, which has an update: say so in the recipe that has phases")
        if other.autocast not in (None, self.autocast):
            raise UsageError(
                f"a phase of {other.name!r}, which asks for autocast: say so in the recipe that has phases"
            )
        if other.attention not in (None, self.attention):
            raise UsageError(
                f"a phase of {other.name!r}, whose attention is another: only formats of layers switch. Say so in the "
                "recipe that has phases"
            )
        if other.skip not in (None, self.skip):
            raise UsageError(
                f"a phase of {other.name!r}, which skips grad_weight: say so in the recipe that has phases"
            )
        for end in ("first", "last"):
            if getattr(other, end) == "leave" and getattr(self, end) != "leave":
                raise UsageError(
                    f"a phase of {other.name!r}, which leaves the {end} layer, in a recipe that converts it: give "
                    f'{end} = "leave" to the recipe that has phases'
                )
        phase = Phase(
            start=start,
            name=other.name,
            output=other.output,
            grad_input=other.grad_input,
            grad_weight=other.grad_weight,
            bias=other.bias,
        )
        return self.replace(name=name or f"{self.name}-{other.name}", phases=(*self.phases, phase))

    def settings(self) -> dict[str, Any]:
        """What `tuned` can change, with the present values: the settings of schedule, gates, phases and skipping."""
        found: dict[str, Any] = {}
        if self.schedule is not None:
            found |= self.schedule.forward.values
        for part in (self.gates, self.skip):
            if part is not None:
                found |= {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
        if self.phases:
            found["starts"] = tuple(phase.start for phase in self.phases)
        return found

    def tuned(self, **settings: Any) -> "Recipe":
        """The same recipe with other settings, see `settings`, e.g. ``Recipe.from_name("cpt").tuned(low=4)``.

        Raises:
            UsageError: the recipe lacks the setting, or the value is impossible.
        """
        known = self.settings()
        for name in settings:
            if name not in known:
                has = f"it has {', '.join(known)}" if known else "its bits are constant"
                raise UsageError(f"recipe {self.name!r} has no setting {name!r}: {has}")
        settings = {name: frozen(value) for name, value in settings.items()}
        changes: dict[str, Any] = {}
        if "starts" in settings:
            changes["phases"] = self._starting(settings.pop("starts"))
        if self.skip is not None:
            own = {f.name for f in dataclasses.fields(self.skip)} & settings.keys()
            changes["skip"] = dataclasses.replace(self.skip, **{name: settings.pop(name) for name in own})
        if self.schedule is not None:
            forward = self.schedule.forward.replace(**settings)
            changes["schedule"] = dataclasses.replace(self.schedule, forward=forward)
        if self.gates is not None:
            changes["gates"] = dataclasses.replace(self.gates, **settings)
        return self.replace(**changes)

    def _starting(self, starts: object) -> tuple[Phase, ...]:
        """The phases with other starts, one for each."""
        if not isinstance(starts, tuple) or len(starts) != len(self.phases):
            raise UsageError(f"starts={shown(starts)}: give {len(self.phases)}, one for each phase after the first")
        return tuple(dataclasses.replace(phase, start=s) for phase, s in zip(self.phases, starts, strict=True))

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
    if bias.granularity != "tensor" or bias.running is not None or bias.delay is not None:
        raise UsageError("the bias shares one scale and keeps no range")
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
    number of bits, and may have one for `backward`; `[gates]` has the fields of `Gating`. Each `[[phases]]` has a
    `start` and the name of a stored `recipe`, see `Recipe.then`; `[skip]` has the fields of `Skipping`, and
    ``grad_weight = "skip"`` alone means that no step computes one. `[update]` names the formats of the fields of
    `Update`; its `states` is a table by the states' names. `[attention]` names those of `Attention`.

    Raises:
        UsageError: it is not TOML, or has an unknown name or value.
    """
    recipe: Recipe = parsed(Recipe, name, text, base_of=Recipe.from_name)
    return recipe
