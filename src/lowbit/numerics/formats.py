"""Number formats as frozen values: an element, a scale and a transform, each a separate part.

A format says which grid a tensor is put on and what shares a scale. It does not say how it is executed.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

from torch import Tensor

from lowbit.errors import UsageError, shown, unknown
from lowbit.inputs.checks import check_fields, is_whole
from lowbit.numerics.element import Element, Steps, Zero
from lowbit.numerics.elements import ELEMENTS, Integer, Minifloat, Real
from lowbit.numerics.fallback import Fallback
from lowbit.numerics.parts import by_kind, check_again, check_part, construct
from lowbit.numerics.scales import (
    FLOAT32,
    MINMAX,
    RANGE_RULES,
    SCALE_FORMATS,
    Constant,
    Delayed,
    Granularity,
    RangeRule,
    RunningStart,
    SampleMean,
    Scale,
    ScaleFormat,
)
from lowbit.numerics.transforms import NO_TRANSFORM, TRANSFORMS, Clip, NoTransform, RandomHadamard, Transform
from lowbit.numerics.unbiased import UnbiasedE4M3

Rounding = Literal["nearest", "stochastic"]


@dataclass(frozen=True, kw_only=True)
class Format:
    """What an operand is rounded to: ``value = T^-1(S element(T(x) / S))``.

    Args:
        element: what one code is.
        scale: what shares a scale, and how it is made; None if the element does not take one.
        transform: what is done before the grid.
        rounding: ``"nearest"``, halves to even, or ``"stochastic"``, which has the mean of its input inside the grid.
        widths: pairs (bits, format) of the widths at which another format takes the place of this one, e.g. signs at 1
            bit; in order.

    Raises:
        UsageError: a value or combination outside the above.
    """

    element: Element
    scale: Scale | None = None
    transform: Transform = NO_TRANSFORM
    rounding: Rounding = "nearest"
    widths: tuple[tuple[int, "Format"], ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        check_part("element", self.element, "codes")
        check_part("transform", self.transform, "back")
        if self.widths:
            self._check_widths()
        if (self.scale is None) != (self.element.scaled == "never") and self.element.scaled != "either":
            raise UsageError(
                f"{self.element} {'needs a scale' if self.scale is None else 'has no scale'}: "
                f"{'give one' if self.scale is None else 'leave it out'}"
            )
        if self.rounds_codes_by_noise and isinstance(self.element, Real):
            raise UsageError("values that stay as they are do not round: leave the rounding out")
        if self.running is not None and not isinstance(self.transform, NoTransform):
            raise UsageError(
                f"running={self.running} with transform={self.transform.kind!r}: a running range is measured before a "
                "transform and would be used after it. Leave one of them out"
            )
        if self.delay is not None and (self.running is not None or not isinstance(self.transform, NoTransform)):
            raise UsageError(
                "range='delayed' with a running range or a transform: a layer remembers largest magnitudes as they are "
                "before a transform, and evaluation uses what training left. Leave the other one out"
            )
        block = None if self.scale is None else self.scale.block
        if self._unbiased is not None and (
            self.granularity != "block" or block is None or self._unbiased.group % block
        ):
            raise UsageError(
                f"a scale of format {self._unbiased.kind!r} in groups of {self._unbiased.group} with granularity="
                f"{self.granularity!r}: groups are of whole blocks. Give granularity 'block', and a block that divides "
                "the group"
            )
        if self._unbiased is not None and (self.zero != "symmetric" or self.has_two_codes):
            raise UsageError(
                f"a scale of format {self._unbiased.kind!r} with {self.element}: it goes with elements of one code, "
                "whose zero is 'symmetric'"
            )
        if self.has_two_codes and self.granularity not in ("block", "square"):
            raise UsageError(
                f"{self.element} with granularity={self.granularity!r}: two codes go with blocks. Give granularity "
                "'block' or 'square'"
            )
        per_sample = self.scale is not None and (self.granularity == "sample" or self.scale.range.per_tensor)
        if per_sample and self.transform.along_axis:
            raise UsageError(
                f"transform={self.transform.kind!r} with ranges of samples: it works along the axis that a product "
                "sums over, where samples may be mixed. Give another granularity, and the range 'minmax'"
            )

    def _check_widths(self) -> None:
        given = [bits for bits, _ in self.widths]
        if not self.has_width or self.running is not None or self.delay is not None:
            raise UsageError(
                f"widths={given} of {self.element}: other widths have other formats only where bits can be set, and "
                "where no range is kept from step to step"
            )
        if given != sorted({*given}) or self.bits in given:
            raise UsageError(f"widths={given} of {self.bits} bits: give each other width once, the smallest first")
        for bits, other in self.widths:
            if other.bits != bits or other.has_width or other.running is not None or other.delay is not None:
                raise UsageError(
                    f"widths: {other} at {bits} bits: give a format that has these bits alone and keeps no range"
                )

    @cached_property
    def _hash(self) -> int:
        return hash((self.element, self.scale, self.transform, self.rounding, self.widths))

    def __hash__(self) -> int:
        """The hash of the parts, computed once: a format is looked up at every product."""
        return self._hash

    @property
    def bits(self) -> int:
        """Width of one code in bits."""
        return self.element.bits

    @property
    def code_range(self) -> tuple[float, float]:
        """The smallest and the largest code."""
        return self.element.code_range

    @property
    def zero(self) -> Zero:
        """Where real zero lies; ``"symmetric"`` if it is the code 0."""
        return self.element.zero

    @property
    def has_width(self) -> bool:
        """Whether a schedule or a gate can set its bits; a float format always has its own."""
        return self.element.has_width

    @property
    def stochastic(self) -> bool:
        """Whether it needs noise: to round codes or scales, or for the signs of its transform."""
        return self.rounds_codes_by_noise or self._unbiased is not None or isinstance(self.transform, RandomHadamard)

    @property
    def rounds_codes_by_noise(self) -> bool:
        """Whether codes round stochastically."""
        return self.rounding == "stochastic"

    @property
    def _unbiased(self) -> UnbiasedE4M3 | None:
        found = None if self.scale is None else self.scale.format
        return found if isinstance(found, UnbiasedE4M3) else None

    def drawn(self, noise: Tensor | None) -> "Format":
        """The same format, once what is random in its transform is drawn."""
        if noise is None or not isinstance(self.transform, RandomHadamard):
            return self
        return dataclasses.replace(self, transform=self.transform.drawn(noise))

    def settled(self, y: Tensor, q: Tensor, steps: Steps, noise: Tensor | None, dims: tuple[int, ...]) -> Steps:
        """Where codes `q` of `y` lie in the end, if their scales are made once the codes are known."""
        if self._unbiased is None or noise is None:
            return steps
        scale = self._unbiased.settled(y, q, steps.scale, float(steps.high), noise, dims[0] - 1)
        return dataclasses.replace(steps, scale=scale)

    @property
    def is_blocked(self) -> bool:
        """Whether scales lie along what a product sums over, or a transform does."""
        return self.granularity in ("block", "square") or self.transform.along_axis

    @property
    def granularity(self) -> Granularity:
        """What shares a scale; the tensor, if the format lacks scales."""
        return "tensor" if self.scale is None else self.scale.granularity

    @property
    def running(self) -> float | None:
        """Weight of the old value in its running range; None if it does not keep one."""
        return None if self.scale is None else self.scale.running

    @property
    def delay(self) -> Delayed | None:
        """The rule of its range, where a layer remembers what that is made from; else None."""
        return self.scale.range if self.scale is not None and isinstance(self.scale.range, Delayed) else None

    @property
    def has_two_codes(self) -> bool:
        """Whether some of what has a scale of its own has two codes for each number."""
        return isinstance(self.element, Fallback)

    def falls_back(self, most: Tensor) -> Tensor:
        """Which of these largest magnitudes, each of what has a scale of its own, have two codes: bool."""
        assert isinstance(self.element, Fallback)
        return self.element.falls_back(most)

    @property
    def clips_in_its_grid(self) -> bool:
        """Whether its transform clips just what its grid clips, so that codes are the same without it."""
        if not isinstance(self.transform, Clip) or self.scale is None or not isinstance(self.scale.range, Constant):
            return False
        ends, given = self.scale.range, self.transform
        return self.zero == "offset" and (ends.low, ends.high) == (given.low, given.high)

    @property
    def forms(self) -> tuple["Format", ...]:
        """Itself, and the formats of other widths."""
        return self, *(other for _, other in self.widths)

    def at(self, bits: int) -> "Format":
        """What an operand of so many bits is rounded to: the format of that width where it has one, else itself."""
        return dict(self.widths).get(bits, self)

    def with_bits(self, bits: int) -> "Format":
        """The same format with codes of another width.

        Raises:
            UsageError: codes cannot have this width, e.g. because the format has only its own.
        """
        if self.has_width:
            if not is_whole(bits) or (bits != self.bits and self.at(bits) is self):
                return self.replace(bits=bits)
            return self.at(bits)
        if bits != self.bits or not is_whole(bits):
            raise UsageError(f"bits={shown(bits)} of {self}: it has {self.bits}")
        return self

    def applied(self, size: int) -> "Format":
        """The same format as it works on samples of that many values."""
        if self.scale is None:
            return self
        rule = self.scale.range.applied(size)
        return self if rule is self.scale.range else self.replace(range=rule)

    def replace(self, **changes: Any) -> "Format":
        """The same format with other parts, or with other fields of its parts, e.g. ``fmt.replace(bits=4)``.

        Args:
            changes: its own fields by their names (element, scale, transform, rounding, widths), or fields of its
                element or scale. `element`, `transform`, `range` and `format` may be kinds; `fewest` belongs to the
                range ``"sample-mean"``.

        Raises:
            UsageError: a field that none of its parts has, or values that do not fit together.
        """
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        parts.update({name: changes.pop(name) for name in list(changes) if name in parts})
        for name, kinds in _DEFINED.items():
            if isinstance(parts[name], str):
                parts[name] = by_kind(name, kinds, parts[name], "a format")
        allowed = set(parts)
        for name in ("element", "scale"):
            own = {f.name for f in dataclasses.fields(parts[name])} if dataclasses.is_dataclass(parts[name]) else set()
            own |= {"fewest"} if name == "scale" and own else set()
            allowed |= own
            if new := {key: changes.pop(key) for key in list(changes) if key in own}:
                if name == "scale":
                    new = _scale_fields(new, parts[name].range)
                parts[name] = dataclasses.replace(parts[name], **new)
        if changes:
            raise unknown(f"field to replace of a format ({self}):", next(iter(changes)), allowed)
        return Format(**parts)

    def __str__(self) -> str:
        others = " and ".join(str(bits) for bits, _ in self.widths)
        parts = [
            self.element,
            self.scale or "",
            self.transform,
            "stochastic" if self.rounds_codes_by_noise else "",
            f"another at {others}" if others else "",
        ]
        return ", ".join(filter(None, map(str, parts)))


@lru_cache(maxsize=4096)
def largest_code(fmt: Format, bits: int) -> float:
    """The largest code of a format at another width."""
    return float(fmt.with_bits(bits).element.code_range[1])


FP32 = Format(element=Real())
BF16 = Format(element=Minifloat(exponent=8, mantissa=7, overflow="infinite"))
NAMED = {"fp32": FP32, "bf16": BF16}


def integer(
    *,
    bits: int,
    zero: Zero,
    granularity: Granularity = "tensor",
    block: int | None = None,
    range: RangeRule | str = MINMAX,  # noqa: A002 - the part's name
    fewest: int | None = None,
    running: float | None = None,
    running_start: RunningStart = "first",
    format: ScaleFormat | str = FLOAT32,  # noqa: A002 - the part's name
    floor: float = 0.0,
    transform: Transform | str = NO_TRANSFORM,
    rounding: Rounding = "nearest",
) -> Format:
    """A format of integer codes from the fields of its parts, see `Integer` and `Scale`.

    `range`, `format` and `transform` may be kinds whose fields have defaults; `fewest` belongs to the range
    ``"sample-mean"``.
    """
    fields: dict[str, Any] = {
        "granularity": granularity,
        "block": block,
        "range": range,
        "running": running,
        "running_start": running_start,
        "format": format,
        "floor": floor,
    }
    if fewest is not None:
        fields["fewest"] = fewest
    return Format(
        element=Integer(bits=bits, zero=zero),
        scale=Scale(**_scale_fields(fields, MINMAX)),
        transform=by_kind("transform", TRANSFORMS, transform, "a format"),
        rounding=rounding,
    )


def _scale_fields(fields: Mapping[str, Any], now: RangeRule, where: str = "a format") -> dict[str, Any]:
    """Fields of a scale whose range and format may be kinds; `fewest` may stand beside them."""
    fields = dict(fields)
    rule = by_kind("range", RANGE_RULES, fields.pop("range", now), where)
    if "fewest" in fields:
        fewest = fields.pop("fewest")
        if not isinstance(rule, SampleMean):
            raise UsageError(
                f"fewest={fewest} with range={rule.kind!r}: the fewest values of a sample, 1 or more, go with range "
                "'sample-mean', and only with it"
            )
        rule = SampleMean(fewest=fewest)
    if "format" in fields:
        fields["format"] = by_kind("format of a scale", SCALE_FORMATS, fields["format"], where)
    return {**fields, "range": rule}


def from_table(where: str, fields: Mapping[str, Any]) -> Format:
    """The format that a table of TOML describes.

    It has `element`, `scale`, `transform` and `rounding`, each part a kind or a table with `kind` and its fields; or it
    has the fields of `integer`.

    Raises:
        UsageError: a kind or field that does not exist, or values that do not fit together.
    """
    if "element" not in fields:
        fields = dict(fields)
        parts = {"range": RANGE_RULES, "format": SCALE_FORMATS, "transform": TRANSFORMS}
        parsed = {key: by_kind(key, kinds, fields.pop(key), where) for key, kinds in parts.items() if key in fields}
        allowed = set(integer.__kwdefaults__ or ()) | {"bits", "zero"}
        for key in fields:
            if key not in allowed:
                raise unknown(f"field of {where}", key, allowed | {"element", "scale"})
        if missing := {"bits", "zero"} - set(fields):
            raise UsageError(f"{where} lacks {', '.join(sorted(missing))}")
        try:
            return integer(**fields, **parsed)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error
    parts_of: dict[str, Any] = dict(fields)
    parts_of["element"] = by_kind("element", ELEMENTS, fields["element"], where)
    if "scale" in fields:
        given = fields["scale"]
        if not isinstance(given, Mapping):
            raise UsageError(f"{where}: scale={shown(given)}: give a table of its fields")
        parts_of["scale"] = construct(Scale, f"{where}: scale", _scale_fields(given, MINMAX, where))
    if "transform" in fields:
        parts_of["transform"] = by_kind("transform", TRANSFORMS, fields["transform"], where)
    made: Format = construct(Format, where, parts_of)
    return made


# The parts that the reference engine takes: each of these classes defines what it computes.
_DEFINED: dict[str, tuple[type[Any], ...]] = {"element": ELEMENTS, "transform": TRANSFORMS}
_DEFINED_IN_SCALES: dict[str, tuple[type[Any], ...]] = {"range": RANGE_RULES, "format": SCALE_FORMATS}


@lru_cache(maxsize=4096)
def check_defined(fmt: Format) -> None:
    """Raise a UsageError for a format whose values are not defined."""
    parts = [(name, getattr(fmt, name, None), known) for name, known in _DEFINED.items()]
    scale = getattr(fmt, "scale", None)
    if scale is not None:
        parts += [(name, getattr(scale, name, None), known) for name, known in _DEFINED_IN_SCALES.items()]
    own = [("format", fmt, (Format,)), ("scale", scale, (Scale, type(None)))]
    for name, part, known in [*own, *parts]:
        if type(part) not in known:
            raise UsageError(
                f"a format that the reference engine does not define: its {name} is a {type(part).__name__}. Use the "
                "parts of lowbit.numerics as they are, or define the new one beside them and list it there"
            )
    check_again(fmt)


def check_bits(bits: int, zero: Zero) -> None:
    """Raise a UsageError unless integer codes of this width exist: 2 to 16 bits, with a float offset 1 to 32."""
    Integer(bits=bits, zero=zero)
