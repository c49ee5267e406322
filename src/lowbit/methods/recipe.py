"""Recipes: three products times two operands, each with a number format, as frozen data.

A published method is a TOML file in `recipes/`; nothing in the code asks for a method's name.
"""

import dataclasses
import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from lowbit.errors import RunError, UsageError, shown, unknown
from lowbit.inputs import files
from lowbit.inputs.checks import check_fields, check_type, check_whole, checked, is_whole
from lowbit.numerics.formats import FP32, NAMED, Format, from_table
from lowbit.numerics.parts import construct
from lowbit.numerics.transforms import NoTransform
from lowbit.schedules import PlateauRule, Template

Policy = Literal["convert", "leave"]
Constant = Literal["paper", "authors"]
EpsilonPlace = Literal["inside", "outside"]
Narrowest = Literal["zero", "step"]
Mixing = Literal["input", "output"]
Weighting = Literal["macs", "equal"]

ON_THE_FLY = "wXaYgZ"
_WIDTHS = re.compile(r"(?:(.+):)?w(0|[1-9][0-9]{0,2})a(0|[1-9][0-9]{0,2})g(0|[1-9][0-9]{0,2})")
_MOST_UNITS = 2**16  # of a layer of a gate


@dataclass(frozen=True, kw_only=True)
class Output:
    """The formats of ``output = input x weight``."""

    input: Format
    weight: Format

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class GradInput:
    """The formats of ``grad_input = grad_output x weight``."""

    grad_output: Format
    weight: Format

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class GradWeight:
    """The formats of ``grad_weight = grad_output x input``."""

    grad_output: Format
    input: Format

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class RangeNorm:
    """Range Batch-Norm in place of batch normalisation, see `lowbit.nn.norm.range_batch_norm`.

    Args:
        input: format of the layer's input.
        grad_output: format of the gradient that arrives at its output.
        constant: the factor of ``range / sqrt(2 ln n)``: ``"paper"`` 1, ``"authors"`` 0.5402 as in their code.
        chunks: the range is the mean over at most so many chunks of the batch.
        fewest_per_chunk: values of a channel in each chunk, 2 or more; a channel of fewer is one chunk. The mean over
            chunks of 2 to 8 values can be almost 0 where the values are not.
        narrowest: the range of a chunk in a channel whose codes are all equal: ``"zero"``, so that epsilon alone is the
            divisor, or one ``"step"`` of the input's grid, which is what codes tell apart.
        epsilon: ``"inside"``: divide by ``sqrt(sigma**2 + eps)`` as BatchNorm does; ``"outside"``: by ``sigma + eps``.
        momentum: weight of the new batch in the running statistics; None keeps the layer's own.
    """

    input: Format
    grad_output: Format
    constant: Constant = "authors"
    chunks: int = 16
    fewest_per_chunk: int = 16
    narrowest: Narrowest = "step"
    epsilon: EpsilonPlace = "inside"
    momentum: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.chunks < 1:
            raise UsageError(f"chunks={self.chunks!r}: a whole number of at least one chunk")
        if self.fewest_per_chunk < 2:
            raise UsageError(f"fewest_per_chunk={self.fewest_per_chunk!r}: a whole number of at least two values")
        for operand in ("input", "grad_output"):
            fmt = getattr(self, operand)
            if fmt.granularity != "tensor":
                raise UsageError(
                    f"normalization.{operand} is per {fmt.granularity}: Range BN has formats per tensor only"
                )
            if not isinstance(fmt.transform, NoTransform):
                raise UsageError(
                    f"normalization.{operand} has transform={fmt.transform.kind!r}: Range BN has formats without one"
                )
        if self.grad_output.running is not None:
            raise UsageError("normalization.grad_output: only `input` keeps a running range")
        if self.momentum is not None and not 0 < self.momentum <= 1:
            raise UsageError(f"momentum={self.momentum}: the weight of the new batch is in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class Scheduling:
    """Bits that change over the run; a `lowbit.PrecisionController` applies them.

    Args:
        forward: bits of `input` and `weight`.
        backward: bits of `grad_output`; None: what a plateau rule in `forward` says, else the formats' own.
    """

    forward: Template
    backward: Template | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Gating:
    """Bits that a gate chooses for each block and sample; a `lowbit.PrecisionController` applies them.

    Costs are in percent of full precision: ``100 (w a + w g + a g) / (3 * 32**2)`` for w, a, g bits of `weight`,
    `input` and `grad_output`, averaged over the MACs of the gated blocks.

    Args:
        choices: pairs (bits of `input`, bits of `grad_output`) to choose from, e.g. ``[[3, 6], [8, 8]]``; bits of
            `input` 0 skip the block, and then those of `grad_output` are 0 too.
        targets: the cost to train towards, in percent; several: one for each stage of PFQ's plateau rule.
        strength: beta, weight of the cost in the loss.
        band: the cost term counts in full only where the cost is farther than this from its target.
        inside: weight of the cost term inside the band.
        mixing: ``"input"``: a layer runs each sample at its choice and batch normalisation sees them all together;
            ``"output"``: a block runs all samples at every choice in training, and its outputs are mixed.
        weighting: what a block counts in the cost: ``"macs"``: its share of the MACs of all blocks; ``"equal"``: the
            same as any other, as in the authors' code for ResNets.
        hidden: outputs of the first projection of the gate; None leaves it and its ReLU out.
        features: outputs of the last projection, the inputs of the LSTM.
        state: hidden units of the LSTM.
        threshold: epsilon of the plateau rule; needed iff there are several targets.
        decay: alpha of the plateau rule; needed iff there are several targets.

    Raises:
        UsageError: a value outside the above.
    """

    choices: tuple[tuple[int, int], ...]
    targets: tuple[float, ...]
    strength: float = 1e-3
    band: float = 0.0
    inside: float = 0.1
    mixing: Mixing = "input"
    weighting: Weighting = "macs"
    hidden: int | None = 32
    features: int = 16
    state: int = 16
    threshold: float | None = None
    decay: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        pairs = self.choices
        if len(pairs) < 2 or any(bits < 0 for pair in pairs for bits in pair):
            raise UsageError(
                f"choices={self.choices}: give two or more pairs (bits of input, bits of grad_output), e.g. [4, 8]"
            )
        if any((a == 0) != (g == 0) for a, g in pairs) or sum(a == 0 for a, _ in pairs) > 1:
            raise UsageError(f"choices={self.choices}: the pair that skips a block is [0, 0], once")
        if len(set(pairs)) < len(pairs):
            raise UsageError(f"choices={self.choices}: give each pair once")
        if not self.targets or not all(0 < t <= 100 for t in self.targets):
            raise UsageError(
                f"targets={self.targets}: give costs in percent of full precision, above 0 and at most 100"
            )
        for name in ("strength", "band", "inside"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{name}={getattr(self, name)!r}: give a finite number, 0 or more")
        for name in ("hidden", "features", "state"):
            value = getattr(self, name)
            if value is not None:
                check_whole(name, value, 1, _MOST_UNITS)
        needed = len(self.targets) > 1
        if (self.threshold is not None) != needed or (self.decay is not None) != needed:
            raise UsageError(
                f"targets={self.targets}, threshold={self.threshold}, decay={self.decay}: threshold and decay belong "
                "to the plateau rule between several targets; give both with several, neither with one"
            )
        self.rule()

    def rule(self) -> PlateauRule | None:
        """A new plateau rule that goes from target to target; None where there is one."""
        if self.threshold is None or self.decay is None:
            return None
        return PlateauRule(stages=len(self.targets), threshold=self.threshold, decay=self.decay)


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
        schedule: how bits change over the run; None: they do not.
        gates: what chooses bits for each block and sample; None: nothing does.
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
        if self.bias.stochastic:
            raise UsageError("the bias rounds to nearest: no noise is drawn for it")
        if self.bias.granularity != "tensor" or self.bias.running is not None:
            raise UsageError("the bias shares one scale and keeps no running range")
        if self.bias.transform.has_gradient:
            raise UsageError(
                f"the bias has transform={self.bias.transform.kind!r}: its gradient is a plain sum, so leave it out"
            )
        if self.gates is not None and self.output.input.transform.has_gradient:
            raise UsageError(
                f"output.input has transform={self.output.input.transform.kind!r}, which gates cannot differentiate"
            )
        for product, operand, fmt in self.operands():
            _check_operand(f"{product}.{operand}", operand, fmt)
        kept, used = self.output.input, self.grad_weight.input
        if used.running is not None and _range_of(kept) != _range_of(used):
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
            UsageError: the recipe has no such setting, or the value is impossible.
        """
        known = self.settings()
        for name in settings:
            if name not in known:
                has = f"it has {', '.join(known)}" if known else "its bits are constant"
                raise UsageError(f"recipe {self.name!r} has no setting {name!r}: {has}")
        settings = {name: _frozen(value) for name, value in settings.items()}
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

        ``RECIPE:wXaYgZ`` has X-bit weights, Y-bit inputs and Z-bit gradients in every product; ``wXaYgZ`` alone is of
        `sbm8-cpt`.

        Raises:
            UsageError: no such recipe, bits out of range, or a recipe that has no bits to set.
        """
        check_type("name", name, str)
        if match := _WIDTHS.fullmatch(name):
            base, *digits = match.groups(default="sbm8-cpt")
            weight, input_, grad_output = map(int, digits)
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
        if name not in _stored():
            raise unknown("recipe", name, recipes())
        return _load(name)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Recipe":
        """The recipe in a TOML file, see `from_toml`; its name is the file's without ``.toml``.

        Raises:
            UsageError: the file cannot be read, is not a recipe, or has the name of a recipe of lowbit.
        """
        file = Path(path)
        if file.suffix != ".toml":
            raise UsageError(f"recipe file {shown(str(path))}: give a file whose name ends in .toml")
        if file.stem in _stored() or is_family(file.stem):
            raise UsageError(f"recipe file {shown(str(path))}: {file.stem!r} is a recipe of lowbit; rename the file")
        try:
            return from_toml(file.stem, read_file(file))
        except RunError as error:
            raise UsageError(f"recipe file {error}") from error

    @staticmethod
    def find(text: str) -> "Recipe":
        """The recipe of a name, or of a TOML file where the text ends in ``.toml``; errors as of both."""
        return Recipe.load(text) if is_file_name(text) else Recipe.from_name(text)


def is_file_name(text: str) -> bool:
    """Whether a text that stands for a recipe is the path of a file: it ends in ``.toml``."""
    return text.endswith(".toml")


def is_family(name: str) -> bool:
    """Whether a name ends in the widths of its operands, ``wXaYgZ``."""
    return _WIDTHS.fullmatch(name) is not None


def read_file(path: Path) -> str:
    """The text of a recipe's file.

    Raises:
        RunError: it cannot be read, is longer than 1 MiB, or is not UTF-8.
    """
    try:
        return files.read(path, limit=1 << 20, hint="It is not a recipe.").decode()
    except UnicodeDecodeError as error:
        raise RunError(f"{path} cannot be read: it is not UTF-8.") from error


def _check_operand(where: str, operand: str, fmt: Format) -> None:
    if operand != "input" and fmt.running is not None:
        raise UsageError(f"{where}: only `input` keeps a running range")
    if operand != "weight" and fmt.granularity == "output-channel":
        raise UsageError(f"{where}: only a weight has output channels; 'kept-channel' goes for every operand")
    per_sample = fmt.granularity == "sample" or (fmt.scale is not None and fmt.scale.range.kind == "sample-mean")
    if operand == "weight" and per_sample:
        raise UsageError(f"{where}: a weight has no samples")


def _range_of(fmt: Format) -> tuple[object, ...] | None:
    s = fmt.scale
    return None if s is None else (s.range, s.running, s.running_start, s.granularity)


SLOTS = tuple(
    (product, f.name)
    for product, table in (("output", Output), ("grad_input", GradInput), ("grad_weight", GradWeight))
    for f in dataclasses.fields(table)
)


def recipes() -> tuple[str, ...]:
    """The names of all recipes; ``wXaYgZ`` stands for any widths, e.g. ``w4a4g6``."""
    return (*_stored(), ON_THE_FLY)


def _folder() -> Traversable:
    """The folder of stored recipes; data only."""
    return resources.files("lowbit") / "methods" / "recipes"


@cache
def _stored() -> tuple[str, ...]:
    return tuple(sorted(f.name.removesuffix(".toml") for f in _folder().iterdir() if f.name.endswith(".toml")))


@cache
def _load(name: str) -> Recipe:
    return from_toml(name, (_folder() / f"{name}.toml").read_text(encoding="utf-8"))


def from_toml(name: str, text: str) -> Recipe:
    """Read a recipe from TOML: `[formats]` names formats, the tables of the products use the names.

    ``"fp32"`` and ``"bf16"`` are names that always exist. ``base = "sbm8-cpt"`` takes every field that the text leaves
    out from that stored recipe. `[schedule]` has a schedule for `forward`, ``{ kind = "cyclic", low = 3, ... }`` or a
    number of bits, and may have one for `backward`; `[gates]` has the fields of `Gating`.

    Raises:
        UsageError: no TOML, or a name or value that does not exist.
    """
    recipe: Recipe = parsed(Recipe, name, text, base_of=Recipe.from_name)
    return recipe


def parsed(cls: type[Any], name: str, text: str, *, base_of: Callable[[str], Any]) -> Any:
    """The recipe in a text, see `from_toml`.

    Args:
        cls: the class of recipes.
        name: the recipe's.
        text: TOML.
        base_of: the recipe of a name, for the text's `base`.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"recipe {name}: no TOML: {error}") from error
    formats: dict[str, Format] = dict(NAMED)
    own = _table(f"recipe {name}: formats", data.pop("formats", {}))
    if taken := sorted(own.keys() & formats.keys()):
        raise UsageError(f"recipe {name}: the format {taken[0]!r} exists already: choose another name")
    if "name" in data:
        raise UsageError(f"recipe {name}: its name is that of its file; leave `name` out")
    formats.update({key: from_table(f"formats.{key}", _table(f"formats.{key}", fields)) for key, fields in own.items()})
    unused = set(own)

    def resolved(table: type[Any], where: str, fields: dict[str, Any]) -> Any:
        operands = {f.name for f in dataclasses.fields(table) if f.type is Format}
        unused.difference_update(v for k, v in _table(where, fields).items() if k in operands and isinstance(v, str))
        return _construct(
            table,
            where,
            {k: _named(formats, f"{where}.{k}", v) if k in operands else v for k, v in fields.items()},
        )

    if "schedule" in data:
        data["schedule"] = _scheduling(name, data["schedule"])
    if "gates" in data:
        gates = _table(f"recipe {name}: gates", data["gates"])
        data["gates"] = _construct(Gating, "gates", {key: _frozen(value) for key, value in gates.items()})
    if "depthwise" in data:
        data["depthwise"] = _frozen(data["depthwise"])
    inherited: dict[str, Any] = {}
    if "base" in data:
        base = base_of(data.pop("base"))
        inherited = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    for key, table in (
        ("output", Output),
        ("grad_input", GradInput),
        ("grad_weight", GradWeight),
        ("normalization", RangeNorm),
    ):
        if key in data:
            data[key] = resolved(table, key, data[key])
    result = resolved(cls, f"recipe {name}", {**inherited, **data, "name": name})
    if unused:
        raise UsageError(f"recipe {name}: no product uses the format {sorted(unused)[0]!r}")
    return result


def _frozen(value: Any) -> Any:
    """Lists as tuples, to any depth."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _scheduling(name: str, fields: object) -> Scheduling:
    where = f"recipe {name}: schedule"
    schedules = {key: _template(f"{where}.{key}", value) for key, value in _table(where, fields).items()}
    result: Scheduling = _construct(Scheduling, where, schedules)
    return result


def _template(where: str, value: object) -> Template:
    if is_whole(value):
        return Template(kind="constant", settings=(("bits", value),))
    settings = dict(_table(where, value))
    if "kind" not in settings:
        raise UsageError(f"{where} lacks kind: give a number of bits, or a table with kind and its settings")
    return Template(kind=settings.pop("kind"), settings=tuple((key, _frozen(value)) for key, value in settings.items()))


def _table(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where} is {shown(value)}: give a table of fields")
    return value


def _named(formats: dict[str, Format], where: str, name: object) -> Format:
    if isinstance(name, Format):  # of the recipe that this one is based on
        return name
    if not isinstance(name, str):
        raise UsageError(
            f"{where} is {shown(name)}: give the name of a format; a format's fields stand under [formats.NAME]"
        )
    if name not in formats:
        raise unknown(f"format of {where}", name, formats)
    return formats[name]


def _construct(cls: type[Any], where: str, fields: object) -> Any:
    return construct(cls, where, _table(where, fields))
