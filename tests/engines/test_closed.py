"""What executes formats is closed: each value of each field of each part equals the definition or is refused."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from lowbit import Recipe, UsageError, functional
from lowbit.engines import choice, int8
from lowbit.numerics.elements import ELEMENTS, FixedPoint, Flagged, Integer, Minifloat, PowerOfTwo, Sign
from lowbit.numerics.fallback import Fallback
from lowbit.numerics.formats import BF16, FP32, Format, integer
from lowbit.numerics.parts import unlisted
from lowbit.numerics.quantizer import quantize
from lowbit.numerics.ranges import extremes, new_running_range, observed_extremes
from lowbit.numerics.rounding import CounterNoise, RecordedNoise, step_key
from lowbit.numerics.scales import (
    RANGE_RULES,
    SCALE_FORMATS,
    Constant,
    Delayed,
    Float32,
    IntegerScale,
    MinMax,
    PowerOfTwoScale,
    SampleMean,
    Scale,
)
from lowbit.numerics.transforms import TRANSFORMS, Clip, Hadamard, Normalized, RandomHadamard
from lowbit.numerics.unbiased import UnbiasedE4M3
from lowbit.products.setting import Setting

MADE_UP = "made-up"

# Values of the fields whose annotation does not list them, by class and field.
SAMPLES: dict[tuple[str, str], tuple[Any, ...]] = {
    ("Integer", "bits"): (2, 3, 7, 8, 9, 16),
    ("Minifloat", "exponent"): (2, 4, 5, 8),
    ("Minifloat", "mantissa"): (0, 1, 3, 7, 10),
    ("FixedPoint", "integer"): (-1, 1, 2, 8),
    ("FixedPoint", "fraction"): (0, 4, 8, 14),
    ("PowerOfTwo", "bits"): (2, 3, 4, 8),
    ("Flagged", "number"): (2, 8, 16),
    ("Fallback", "bits"): (2, 4, 8, 9),
    ("Fallback", "share"): (0.0, 0.25, 0.5),
    ("Scale", "block"): (None, 1, 5, 8, 64),
    ("Scale", "running"): (None, 0.0, 0.9),
    ("Scale", "floor"): (0.0, 1e-8, 0.5),
    ("SampleMean", "fewest"): (None, 1, 40, 4096),
    ("Constant", "low"): (-1.0, -0.5),
    ("Constant", "high"): (0.5, 2.0),
    ("Delayed", "history"): (1, 4),
    ("Delayed", "margin"): (0, 2),
    ("UnbiasedE4M3", "group"): (0, 8, 24),
    ("UnbiasedE4M3", "stretch"): (0.25, 0.9, 1.0),
    ("RandomHadamard", "size"): (2, 8, 12),
    ("IntegerScale", "bits"): (2, 8),
    ("Clip", "low"): (-0.5, 0.0),
    ("Clip", "high"): (0.25, 1.0),
    ("Hadamard", "size"): (2, 8, 16),
    ("Hadamard", "signs"): (None, 0, 7),
    ("Normalized", "size"): (0.25, 1.0),
    ("Format", "widths"): ((), ((1, Format(element=Sign(), scale=Scale())),), ((32, FP32),)),
}
# Every class of parts, once.
PARTS: dict[str, tuple[Any, ...]] = {
    "element": (
        Integer(bits=8, zero="symmetric"),
        Minifloat(exponent=4, mantissa=3, top="nan"),
        FixedPoint(integer=2, fraction=6),
        PowerOfTwo(bits=4),
        Flagged(number=4),
        Fallback(bits=8, share=0.25),
    ),
    "range": (MinMax(), SampleMean(fewest=4), Constant(low=-1.0, high=1.0), Delayed()),
    "format": (Float32(), PowerOfTwoScale(), UnbiasedE4M3(group=8), IntegerScale(bits=8)),
    "transform": (Clip(low=-1.0, high=1.0), Hadamard(size=8), RandomHadamard(size=8), Normalized(size=0.5)),
}
BASES: tuple[Format, ...] = (
    FP32,
    BF16,
    integer(bits=8, zero="symmetric"),
    integer(bits=8, zero="integer", range="sample-mean", fewest=4, running=0.9),
    integer(bits=8, zero="offset"),
    integer(bits=4, zero="symmetric", granularity="kept-channel", rounding="stochastic"),
    integer(bits=4, zero="integer", granularity="block", block=5, rounding="stochastic"),
    integer(bits=8, zero="symmetric", granularity="block", block=8),
    Format(
        element=Integer(bits=4, zero="symmetric"),
        scale=Scale(granularity="block", block=8, format=PowerOfTwoScale(direction="floor")),
        rounding="stochastic",
    ),
    Format(
        element=Minifloat(exponent=2, mantissa=1, top="finite"),
        scale=Scale(granularity="block", block=4, format=UnbiasedE4M3(group=8)),
        transform=RandomHadamard(size=8),
    ),
    Format(element=Fallback(bits=8, share=0.5), scale=Scale(granularity="block", block=8)),
    Format(element=Fallback(bits=4, share=0.25), scale=Scale(granularity="square", block=4)),
    Format(element=Minifloat(exponent=4, mantissa=3, top="nan"), scale=Scale(granularity="row")),
    Format(element=Minifloat(exponent=8, mantissa=7, overflow="infinite"), scale=Scale()),
    Format(element=Minifloat(exponent=5, mantissa=2), scale=Scale(range=Delayed(history=4))),
    Format(element=Integer(bits=8, zero="symmetric"), scale=Scale(range=Delayed(history=4))),
    Format(element=FixedPoint(integer=2, fraction=6), rounding="stochastic"),
    Format(element=PowerOfTwo(bits=4), scale=Scale()),
    Format(element=FixedPoint(integer=1, fraction=7), scale=Scale(format=PowerOfTwoScale(direction="nearest"))),
    Format(element=Flagged(number=8), scale=Scale(format=PowerOfTwoScale(direction="nearest"))),
)
needs_units = pytest.mark.skipif(
    bool(int8.missing("int8") or int8.missing("bf16")), reason="this machine lacks the units"
)


def values_of(part: Any, field: str) -> tuple[Any, ...]:
    """Every value of a field that the annotation lists, samples of it, or parts; and one that is made up."""
    if field in ("element", "range", "format", "transform"):
        kinds = {"element": ELEMENTS, "range": RANGE_RULES, "format": SCALE_FORMATS, "transform": TRANSFORMS}[field]
        plain = [cls() for cls in kinds if not dataclasses.fields(cls)]  # type: ignore[arg-type]  # dataclasses
        return (*PARTS[field], *plain, MADE_UP)
    hint = get_type_hints(type(part))[field]
    if get_origin(hint) is Literal:
        return (*get_args(hint), MADE_UP)
    return (*SAMPLES.get((type(part).__name__, field), ()), MADE_UP)


def with_value(part: Any, field: str, value: Any) -> Any:
    """A part with one value changed behind its own checks."""
    changed = copy.copy(part)
    changed.__dict__.pop("_hash", None)
    object.__setattr__(changed, field, value)
    return changed


def variants(part: Any) -> Iterator[tuple[str, Any]]:
    """Each value of each field of a part and of the parts in it, with a name."""
    for field in dataclasses.fields(part):
        inner = getattr(part, field.name)
        for value in values_of(part, field.name):
            yield f"{field.name}-{value}", with_value(part, field.name, value)
        if dataclasses.is_dataclass(inner):
            for name, changed in variants(inner):
                yield f"{field.name}.{name}", with_value(part, field.name, changed)


def exists(part: Any) -> bool:
    """Whether the checks of its parts let this format be made."""
    try:
        for field in dataclasses.fields(part):
            inner = getattr(part, field.name)
            if dataclasses.is_dataclass(inner) and not exists(inner):
                return False
        dataclasses.replace(part)
    except (UsageError, AttributeError):
        return False
    return True


CASES = [pytest.param(changed, id=f"{i}-{name}") for i, fmt in enumerate(BASES) for name, changed in variants(fmt)]


def counter() -> CounterNoise:
    """The noise of one use of one layer."""
    return CounterNoise(key=step_key(3, torch.tensor(5)), layer="layer")


def drawn() -> RecordedNoise:
    """The numbers of `counter` as draws, so that no native pass makes them."""
    shapes = {
        ("output", "weight"): (10, 24),
        ("grad_input", "grad_output"): (6, 10),
        ("grad_weight", "grad_output"): (6, 10),
    }
    return RecordedNoise(draws={slot: counter().draw(*slot, torch.empty(shape)) for slot, shape in shapes.items()})


def recipe_of(fmt: Format) -> Recipe:
    """A recipe with this format for the gradient and for the weight in the output, behind the recipe's own checks."""
    recipe = copy.deepcopy(Recipe.from_name("int8"))
    object.__setattr__(recipe.grad_input, "grad_output", fmt)
    object.__setattr__(recipe.output, "weight", fmt)
    object.__setattr__(recipe, "name", f"closed {fmt!r}")
    return recipe


def step(fmt: Format, engine: str, noise: Any) -> list[Tensor]:
    """Output and gradients of a linear layer."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 24, generator=generator).requires_grad_() for n in (6, 10))
    y = functional.linear(x, w, setting=Setting(recipe=recipe_of(fmt), noise=noise, engine=engine))
    y.backward(torch.randn(y.shape, generator=generator))
    assert x.grad is not None
    assert w.grad is not None
    return [y.detach(), x.grad, w.grad]


def test_every_part_has_a_case() -> None:
    """A class or field that is added later needs samples here, or this fails."""
    classes = {type(part) for parts in PARTS.values() for part in parts} | {Scale, Format}
    listed = {cls for kinds in (ELEMENTS, RANGE_RULES, SCALE_FORMATS, TRANSFORMS) for cls in kinds}
    with_fields = {cls for cls in listed if dataclasses.fields(cls)}  # type: ignore[arg-type]  # dataclasses
    sampled = {
        (cls.__name__, f.name)
        for cls in classes
        for f in dataclasses.fields(cls)
        if len(
            values_of(cls, f.name)
            if isinstance(cls, type) and f.name in ("element", "range", "format", "transform")
            else _values_by_class(cls, f.name)
        )
        < 2
    }

    assert with_fields <= classes
    assert sampled <= {("Format", "scale")}


def _values_by_class(cls: type, field: str) -> tuple[Any, ...]:
    hint = get_type_hints(cls)[field]
    return (
        (*get_args(hint), MADE_UP)
        if get_origin(hint) is Literal
        else (*SAMPLES.get((cls.__name__, field), ()), MADE_UP)
    )


@pytest.mark.parametrize("fmt", CASES)
def test_the_native_passes_equal_the_definition_or_leave_it_to_it(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference engine gives bit for bit the same with native passes and without, or refuses both."""
    if not exists(fmt):
        with pytest.raises(UsageError):
            step(fmt, "reference", counter())
        return

    natively = step(fmt, "reference", counter())

    monkeypatch.setattr("lowbit.kernels.cpu.runs", lambda _: False)
    plainly = step(fmt, "reference", drawn())
    for a, b in zip(natively, plainly, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@needs_units
@pytest.mark.parametrize("fmt", CASES)
@pytest.mark.parametrize(
    "engine", [e for e in choice._ENGINES if e.name != "reference"], ids=lambda e: type(e).__name__
)
def test_an_engine_equals_the_reference_or_refuses(engine: Any, fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value of every field gives the reference result to the rounding of its sums, or a UsageError."""
    for other in choice._ENGINES:
        if other.name == engine.name:
            monkeypatch.setattr(type(other), "devices", ("cpu",) if other is engine else ())
    for cache in (choice._whys, choice.route):
        cache.cache_clear()
    try:
        found = step(fmt, engine.name, counter())
    except UsageError:
        return
    finally:
        for cache in (choice._whys, choice.route):
            cache.cache_clear()

    assert exists(fmt)
    wanted = step(fmt, "reference", counter())
    for a, b in zip(found, wanted, strict=True):
        largest = float(b.nan_to_num(0.0, 0.0, 0.0).abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * largest, equal_nan=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithField(Integer):
    """An element with a field that nobody knows."""

    novel: float = 0.0


@pytest.mark.parametrize("novel", [0.0, 1.0])
@pytest.mark.parametrize("engine", ["reference", pytest.param("int8", marks=needs_units)])
def test_a_class_that_is_not_listed_is_refused(engine: str, novel: float) -> None:
    """An element with a field of its own is refused by every engine, whatever the field says."""
    with pytest.raises(UsageError, match="WithField"):
        step(Format(element=WithField(bits=8, zero="symmetric", novel=novel), scale=Scale()), engine, counter())


def test_a_field_added_later_has_its_default_or_is_refused() -> None:
    """A list that does not name a field takes the default of it and nothing else."""
    listed = {WithField: {"bits": (8,), "zero": ("symmetric",)}}

    assert unlisted(WithField(bits=8, zero="symmetric"), listed) == ""
    assert unlisted(WithField(bits=8, zero="symmetric", novel=1.0), listed) == "novel=1.0 is not listed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Widest(MinMax):
    """A range rule that nobody defined."""


def test_a_made_up_rule_is_refused_wherever_ranges_are_measured() -> None:
    """Extremes by a rule that nobody defined raise, for batches and for running ranges."""
    x = torch.arange(6.0).reshape(2, 3)
    fmt = integer(bits=8, zero="integer", running=0.5)
    fmt = with_value(fmt, "scale", with_value(fmt.scale, "range", Widest()))

    with pytest.raises(UsageError, match="Widest"):
        extremes(x, rule=Widest(), dims=(0, 1))
    with pytest.raises(UsageError, match="Widest"):
        observed_extremes(x, fmt, new_running_range(), training=True)


def test_a_float_format_with_another_field_is_refused() -> None:
    """A made-up float format is not taken for bfloat16."""
    with pytest.raises(UsageError, match=MADE_UP):
        quantize(torch.ones(2), with_value(BF16, "element", with_value(BF16.element, "top", MADE_UP)))
