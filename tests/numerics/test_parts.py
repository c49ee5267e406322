"""Parts of formats as data: closed lists, TOML by kind, and recipes made of every kind of part."""

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import Recipe, UsageError
from lowbit.methods.recipe import from_toml
from lowbit.numerics.elements import ELEMENTS, Integer, Minifloat, Real
from lowbit.numerics.formats import BF16, FP32, NAMED, Format, from_table, integer
from lowbit.numerics.parts import NUMBERS, NUMBERS_OR_NONE, by_kind, check_again, check_part, construct, unlisted
from lowbit.numerics.scales import RANGE_RULES, SCALE_FORMATS, Float32, MinMax, Scale
from lowbit.numerics.transforms import NO_TRANSFORM, TRANSFORMS, Clip, NoTransform

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
BLOCKS = [tomllib.loads(text) for text in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)]
RECIPE = next(text for text in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL) if "output =" in text)
# Every format that the page writes in TOML, by name, without the names of others in it.
WRITTEN: dict[str, dict[str, Any]] = {
    name: {key: value for key, value in table.items() if key != "widths"}
    for block in BLOCKS
    for name, table in block["formats"].items()
}
every_written = pytest.mark.parametrize("name", WRITTEN)

LISTED = {
    Format: {"rounding": ("nearest",)},
    Integer: {"bits": range(2, 9), "zero": ("symmetric",)},
    Scale: {"granularity": ("tensor", "row"), "floor": NUMBERS, "running": NUMBERS_OR_NONE},
    MinMax: {},
    Float32: {},
    NoTransform: {},
}


class TestLists:
    """What is not in a list is not listed."""

    @pytest.mark.parametrize(
        "fmt",
        [
            integer(bits=8, zero="symmetric"),
            integer(bits=2, zero="symmetric", granularity="row", floor=1e-8),
            integer(bits=8, zero="symmetric", running=0.9),
        ],
        ids=str,
    )
    def test_what_is_listed_is_listed(self, fmt: Format) -> None:
        """Named classes with named values, and fields at their defaults."""
        assert unlisted(fmt, LISTED) == ""

    @pytest.mark.parametrize(
        ("fmt", "why"),
        [
            (integer(bits=9, zero="symmetric"), "bits=9 is not listed"),
            (integer(bits=8, zero="offset"), "zero='offset' is not listed"),
            (integer(bits=8, zero="symmetric", rounding="stochastic"), "rounding='stochastic' is not listed"),
            (integer(bits=8, zero="symmetric", granularity="block", block=4), "granularity='block' is not listed"),
            (integer(bits=8, zero="symmetric", running=0.9, running_start="zero"), "running_start='zero' is not"),
            (
                integer(bits=8, zero="symmetric", range="sample-mean"),
                "sample-mean is a SampleMean, which is not listed",
            ),
            (integer(bits=8, zero="symmetric", format="e4m3"), "e4m3 scale is a E4M3, which is not listed"),
            (integer(bits=8, zero="symmetric", transform="tanh-max"), "tanh/max is a TanhMax, which is not listed"),
            (BF16, "bf16 is a Minifloat, which is not listed"),
        ],
        ids=str,
    )
    def test_all_else_is_named(self, fmt: Format, why: str) -> None:
        """The sentence names the class, or the field with its value."""
        assert why in unlisted(fmt, LISTED)

    def test_a_subclass_is_not_its_class(self) -> None:
        """A class made of a listed one may compute something else."""
        sub = dataclasses.make_dataclass("Sub", [], bases=(Integer,), frozen=True)

        assert "Sub, which is not listed" in unlisted(sub(bits=8, zero="symmetric"), LISTED)

    @pytest.mark.parametrize("value", [True, "1", float("nan"), float("inf"), 2**200, [1.0]])
    def test_what_is_not_a_finite_number_is_in_no_list_of_numbers(self, value: object) -> None:
        """True, text, nan and inf are none; None is in one list of the two."""
        assert value not in NUMBERS
        assert value not in NUMBERS_OR_NONE
        assert None in NUMBERS_OR_NONE
        assert None not in NUMBERS


class TestKinds:
    """A part from a kind or a table."""

    @pytest.mark.parametrize("kinds", [ELEMENTS, RANGE_RULES, SCALE_FORMATS, TRANSFORMS], ids=lambda k: k[0].__name__)
    def test_a_kind_without_fields_is_a_text_or_a_table(self, kinds: tuple[type[Any], ...]) -> None:
        """Both give the part with its defaults, and a part gives itself."""
        plain = [cls for cls in kinds if all(f.default is not dataclasses.MISSING for f in dataclasses.fields(cls))]
        assert plain

        for cls in plain:
            assert (
                by_kind("part", kinds, cls.kind, "here") == by_kind("part", kinds, {"kind": cls.kind}, "here") == cls()
            )
            assert by_kind("part", kinds, cls(), "here") == cls()

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (
                "clop",
                "here: unknown transform 'clop'. Did you mean 'clip'.*Known: centred, clip, hadamard, none, normal",
            ),
            ("clip", "here: transform 'clip' lacks high, low"),
            ({"low": 0}, "here: transform={'low': 0}: give a kind of transform, or a table with kind and its fields"),
            (3, "here: transform=3: give a kind"),
            ({"kind": ["clip"]}, r"unknown transform \['clip'\]"),
            ({"kind": "clip", "low": 0, "hi": 1}, "unknown field of here: transform 'clip' 'hi'. Did you mean 'high'"),
            ({"kind": "clip", "low": 2, "high": 1}, "here: transform 'clip': low=2, high=1: give two finite ends"),
            ({"kind": "clip", "low": 0, "high": 1e300}, "two finite ends in float32"),
            ({"kind": "clip", "low": "0", "high": 1}, "low='0': give a number"),
            ({"kind": "hadamard", "size": 12}, "size=12: a Hadamard matrix has a size of 2, 4, 8"),
            (MinMax(), "give a kind of transform"),
        ],
        ids=str,
    )
    def test_a_mistake_is_named_with_its_place(self, given: object, message: str) -> None:
        """What was given, what is allowed and where it stands."""
        with pytest.raises(UsageError, match=message):
            by_kind("transform", TRANSFORMS, given, "here")

    def test_a_dataclass_is_made_of_its_fields(self) -> None:
        """Defaults fill what is left out."""
        assert construct(Clip, "here", {"low": 0, "high": 1}) == Clip(low=0, high=1)
        assert construct(Minifloat, "here", {"exponent": 4, "mantissa": 3}).top == "ieee"

    @pytest.mark.parametrize("value", ["clip", None, 3, Clip, {"kind": "clip"}])
    def test_what_is_not_a_part_is_refused(self, value: object) -> None:
        """A part is an object with a kind."""
        with pytest.raises(UsageError, match=r"transform=.*give a part of a format"):
            check_part("transform", value, "back")

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Format(element=NO_TRANSFORM), "element is a NoTransform, which lacks `codes`"),
            (lambda: Format(element=Real(), transform=Real()), "transform is a Real, which lacks `back`"),
            (lambda: Scale(range=Float32()), "range is a Float32, which lacks `extremes`"),
            (lambda: Scale(format=MinMax()), "format is a MinMax, which lacks `rounded`"),
            (lambda: Format(element=Real(), scale=Real()), "scale=a Real: give a Scale or None"),
        ],
    )
    def test_a_part_of_another_sort_is_refused(self, make: Any, message: str) -> None:
        """An element where a transform belongs is named."""
        with pytest.raises(UsageError, match=message):
            make()

    def test_checks_run_again(self) -> None:
        """A value that was changed behind the checks is found, however deep it lies."""
        fmt = integer(bits=8, zero="symmetric")
        object.__setattr__(fmt.scale, "floor", -1.0)

        with pytest.raises(UsageError, match=r"floor=-1\.0"):
            check_again(fmt)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradients of a step."""
    model.zero_grad()
    nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 4).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def network() -> nn.Sequential:
    """Two layers whose axes are not whole blocks."""
    return nn.Sequential(nn.Linear(20, 37), nn.ReLU(), nn.Linear(37, 4))


def recipe_with(name: str) -> Recipe:
    """The recipe of `int8` with a format of the page for all operands, or for those that its name says."""
    fmt = from_table("formats.x", WRITTEN[name])
    base = Recipe.from_name("int8").replace(name=f"of {fmt}")
    for_weights = name.endswith("weights") or fmt.granularity == "output-channel"
    its = ("weight",) if for_weights else ("input",) if name.endswith("inputs") else ("input", "weight", "grad_output")
    operands = {f"{p}.{o}": fmt if o in its else own for p, o, own in base.operands()}
    parts = {
        product: dataclasses.replace(
            getattr(base, product),
            **{o: f for slot, f in operands.items() for p, o in [slot.split(".")] if p == product},
        )
        for product in ("output", "grad_input", "grad_weight")
    }
    return base.replace(**parts)


class TestPage:
    """The page of formats is true."""

    def test_every_kind_is_on_the_page(self) -> None:
        """In the table of parts, or in that of its fields."""
        kinds = [cls.kind for classes in (ELEMENTS, RANGE_RULES, SCALE_FORMATS, TRANSFORMS) for cls in classes]

        assert [kind for kind in kinds if f"`{kind}`" not in PAGE and f'"{kind}"' not in PAGE] == []

    @pytest.mark.parametrize("cls", [Scale, *ELEMENTS, *RANGE_RULES, *SCALE_FORMATS, *TRANSFORMS])
    def test_every_field_is_on_the_page(self, cls: Any) -> None:
        """As code, alone or in an example."""
        assert [f.name for f in dataclasses.fields(cls) if not re.search(rf"`{f.name}`|\b{f.name} = ", PAGE)] == []

    def test_largest_and_smallest_numbers_of_the_page_are_those_of_the_elements(self) -> None:
        """The table of minifloats."""
        rows = re.findall(r"\| (\d) \| (\d+) \| `\"(\w+)\"` \| ([\d.]+) \| 2⁻([⁰¹²³⁴⁵⁶⁷⁸⁹]+) \|", PAGE)
        assert len(rows) == 6

        for exponent, mantissa, top, largest, power in rows:
            element = Minifloat(exponent=int(exponent), mantissa=int(mantissa), top=top)
            assert element.largest == float(largest)
            smallest = 2 ** (element.exponent - 1) - 2 + element.mantissa
            assert int(power.translate(str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789"))) == smallest

    @every_written
    def test_every_format_of_the_page_trains_and_is_proven(self, name: str) -> None:
        """In a network of ragged blocks: finite gradients, and a proof of operands that are off full precision."""
        torch.manual_seed(0)
        model, x = network(), torch.randn(24, 20)
        lowbit.convert_(model, recipe_with(name), engine="reference")

        with lowbit.verify(model) as proof:
            grads = step(model, x)

        assert all(g.isfinite().all() and g.any() for g in grads)
        assert len(proof.rows) == 5
        assert all(row.cosine < 1 for row in proof.rows)

    @every_written
    def test_every_format_of_the_page_can_be_planned(self, name: str) -> None:
        """From shapes without values, the derivative of its transform included."""
        model = network()
        lowbit.convert_(model, recipe_with(name), engine="reference")

        ledger = lowbit.plan(model, torch.empty(24, 20), steps=1)

        rows = {(row.layer, row.product) for row in ledger.products}
        assert rows == {(n, p) for n in "02" for p in ("output", "grad_input", "grad_weight")} - {("0", "grad_input")}

    @every_written
    def test_every_format_of_the_page_resumes(self, name: str) -> None:
        """Two steps are one step, save, load and another, bit for bit."""
        torch.manual_seed(0)
        first, second, x = network(), network(), torch.randn(24, 20)
        recipe = recipe_with(name)
        lowbit.convert_(first, recipe)
        step(first, x)
        lowbit.convert_(second, recipe)
        second.load_state_dict(first.state_dict())
        lowbit.load_state_dict(second, lowbit.state_dict(first))

        went_on, resumed = step(first, x), step(second, x)

        assert all(torch.equal(a, b) for a, b in zip(went_on, resumed, strict=True))

    @every_written
    def test_every_format_of_the_page_says_what_it_is_in_a_line(self, name: str) -> None:
        """Its element first, a comma between parts, nothing said twice; the table and the format are one."""
        fmt = from_table("formats.x", WRITTEN[name])

        parts = str(fmt).split(", ")
        assert parts[0] == str(fmt.element)
        assert len(set(parts)) == len(parts) >= 2
        assert fmt == from_table("formats.x", WRITTEN[name])

    def test_the_recipe_of_the_page_is_one(self, tmp_path: Path) -> None:
        """From its file it converts a model, and the report names the format that the int8 engine does not take."""
        (tmp_path / "mine.toml").write_text(RECIPE)
        model = network()

        report = str(lowbit.convert_(model, str(tmp_path / "mine.toml")))

        assert "2 of 2 layers converted" in report
        assert "e4m3 (max 448) is a Minifloat, which is not listed" in report

    def test_names_of_the_page_exist(self) -> None:
        """fp32 and bf16 are there without a table."""
        assert {"fp32", "bf16"} == set(NAMED)
        assert from_toml("mine", RECIPE.replace('"e5m2", weight', '"bf16", weight')).grad_input.grad_output == BF16


class TestRefused:
    """Formats that a place of a recipe would compute wrongly."""

    def test_a_bias_has_no_derivative_of_a_transform(self) -> None:
        """Its gradient is a plain sum."""
        with pytest.raises(UsageError, match="bias has transform='clip'"):
            Recipe.from_name("int8").replace(bias=FP32.replace(transform=Clip(low=-1.0, high=1.0)))

    @pytest.mark.parametrize("transform", ["centred", "tanh-max"])
    def test_range_norm_has_no_transform(self, transform: str) -> None:
        """Neither of its formats."""
        norm = Recipe.from_name("sbm8").normalization
        assert norm is not None

        for operand in ("input", "grad_output"):
            fmt = getattr(norm, operand).replace(running=None, transform=transform)
            with pytest.raises(UsageError, match=f"normalization.{operand} has transform='{transform}'"):
                dataclasses.replace(norm, **{operand: fmt})

    def test_gates_do_not_know_the_derivative_of_a_transform(self) -> None:
        """The gradient of a choice is that of the rounded input."""
        recipe = Recipe.from_name("dfq")
        fmt = recipe.output.input.replace(running=None, transform=Clip(low=-1.0, high=1.0))
        output = dataclasses.replace(recipe.output, input=fmt)
        grad_weight = dataclasses.replace(recipe.grad_weight, input=fmt)

        with pytest.raises(UsageError, match="which gates cannot differentiate"):
            recipe.replace(output=output, grad_weight=grad_weight)
