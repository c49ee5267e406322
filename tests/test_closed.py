"""What executes formats is closed: each value of each field equals the definition or is refused, also one made up."""

import copy
import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from lowbit import Recipe, UsageError, integer, products
from lowbit.formats import BF16, FP32, Float, Format, Integer, unlisted
from lowbit.products import Setting
from lowbit.quantizer import quantize
from lowbit.ranges import extremes, new_running_range, observed_extremes
from lowbit.rounding import CounterNoise, RecordedNoise, step_key

MADE_UP = "made-up"
# Values of the fields whose annotation does not list them.
SAMPLES: dict[str, tuple[Any, ...]] = {
    "bits": (2, 3, 7, 8, 9, 16),
    "block": (None, 1, 5, 64),
    "fewest": (None, 1, 40, 4096),
    "running": (None, 0.0, 0.9),
    "floor": (0.0, 1e-8, 0.5),
}
BASES: tuple[Format, ...] = (
    FP32,
    BF16,
    Integer(bits=8, zero="symmetric"),
    Integer(bits=8, zero="integer", range="sample-mean", fewest=4, running=0.9),
    Integer(bits=8, zero="offset"),
    Integer(bits=4, zero="symmetric", granularity="kept-channel", rounding="stochastic"),
    Integer(bits=4, zero="integer", granularity="block", block=5, rounding="stochastic"),
)
needs_units = pytest.mark.skipif(
    bool(integer.missing("int8") or integer.missing("bf16")), reason="this machine lacks the units"
)


def values_of(cls: type, field: str) -> tuple[Any, ...]:
    """Every value of a field that the annotation lists, or samples of it, and one that is made up."""
    hint = get_type_hints(cls)[field]
    listed = get_args(hint) if get_origin(hint) is Literal else SAMPLES[field]
    return (*listed, MADE_UP)


def with_value(fmt: Format, field: str, value: Any) -> Format:
    """The format with one value changed behind its own checks."""
    changed = copy.copy(fmt)
    object.__setattr__(changed, field, value)
    return changed


def exists(fmt: Format) -> bool:
    """Whether its own checks let this format be made."""
    try:
        dataclasses.replace(fmt)
    except UsageError:
        return False
    return True


CASES = [
    pytest.param(changed, id=f"{i}-{f.name}-{value}")
    for i, fmt in enumerate(BASES)
    for f in dataclasses.fields(fmt)
    for value in values_of(type(fmt), f.name)
    if exists(changed := with_value(fmt, f.name, value)) or value == MADE_UP
]


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
    y = products.linear(x, w, setting=Setting(recipe=recipe_of(fmt), noise=noise, engine=engine))
    y.backward(torch.randn(y.shape, generator=generator))
    assert x.grad is not None
    assert w.grad is not None
    return [y.detach(), x.grad, w.grad]


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
    assert all(torch.equal(a, b) for a, b in zip(natively, plainly, strict=True))


@needs_units
@pytest.mark.parametrize("fmt", CASES)
def test_the_int8_engine_equals_the_reference_or_refuses(fmt: Format) -> None:
    """Every value of every field gives the reference result to the rounding of its sums, or a UsageError."""
    try:
        found = step(fmt, "int8", counter())
    except UsageError:
        return

    assert exists(fmt)
    wanted = step(fmt, "reference", counter())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithField(Integer):
    """A format with a field that nobody knows."""

    novel: float = 0.0


@pytest.mark.parametrize("novel", [0.0, 1.0])
@pytest.mark.parametrize("engine", ["reference", pytest.param("int8", marks=needs_units)])
def test_a_class_that_is_not_listed_is_refused(engine: str, novel: float) -> None:
    """A format with a field of its own is refused by every engine, whatever the field says."""
    with pytest.raises(UsageError, match="WithField"):
        step(WithField(bits=8, zero="symmetric", novel=novel), engine, counter())


def test_a_field_added_later_has_its_default_or_is_refused() -> None:
    """A list that does not name a field takes the default of it and nothing else."""
    listed = {WithField: {"bits": (8,), "zero": ("symmetric",)}}

    assert unlisted(WithField(bits=8, zero="symmetric"), listed) == ""
    assert unlisted(WithField(bits=8, zero="symmetric", novel=1.0), listed) == "novel=1.0 is not listed"


def test_a_made_up_rule_is_refused_wherever_ranges_are_measured() -> None:
    """Extremes by a rule that nobody defined raise, for batches and for running ranges."""
    x = torch.arange(6.0).reshape(2, 3)
    fmt = with_value(Integer(bits=8, zero="integer", running=0.5), "range", MADE_UP)

    with pytest.raises(UsageError, match=MADE_UP):
        extremes(x, rule=MADE_UP, dims=(0, 1))  # type: ignore[arg-type]  # what is tested
    with pytest.raises(UsageError, match=MADE_UP):
        observed_extremes(x, fmt, new_running_range(), training=True)  # type: ignore[arg-type]


def test_a_float_format_of_another_name_is_refused() -> None:
    """A made-up float format is not taken for bfloat16."""
    with pytest.raises(UsageError, match=MADE_UP):
        quantize(torch.ones(2), with_value(Float(name="bf16"), "name", MADE_UP))
