"""Recipes as values, and those that come with the package."""

import dataclasses

import pytest

import lowbit
from lowbit.errors import UsageError
from lowbit.methods.recipe import SLOTS, GradInput, GradWeight, Output, RangeNorm, Recipe, recipes
from lowbit.numerics.formats import BF16, FP32, integer
from lowbit.numerics.scales import SampleMean

STORED = [name for name in recipes() if name != "wXaYgZ"]
X = integer(bits=8, zero="symmetric")


def _sbm8() -> Recipe:
    return Recipe.from_name("sbm8")


class TestStored:
    """The recipes that come with the package."""

    @pytest.mark.parametrize("name", STORED)
    def test_it_loads(self, name: str) -> None:
        """Every stored recipe has its own name, a summary and a source."""
        recipe = Recipe.from_name(name)

        assert recipe.name == name
        assert recipe.summary
        assert "arXiv" in recipe.source or "IEEE" in recipe.source

    @pytest.mark.parametrize("name", STORED)
    def test_it_is_a_value(self, name: str) -> None:
        """Loading twice gives equal recipes with equal hashes."""
        assert Recipe.from_name(name) == Recipe.from_name(name)
        assert hash(Recipe.from_name(name)) == hash(Recipe.from_name(name))

    def test_another_format_under_the_same_name_is_another_recipe(self) -> None:
        """What is remembered of one is not found for the other, though their hashes are equal."""
        recipe = Recipe.from_name("sbm8")
        other = recipe.replace(bias=BF16)

        assert hash(other) == hash(recipe)
        assert {recipe: 1, other: 2}[recipe] == 1

    def test_names_are_listed(self) -> None:
        """The list has the promised names, sorted, and the pattern of names that are made as needed at its end."""
        names = lowbit.recipes()

        assert {"bf16", "fp32", "sbm8", "sbm8-cpt", "sbm8-hoffer"} <= set(names)
        assert names[-1] == "wXaYgZ"
        assert list(names[:-1]) == sorted(set(names[:-1]))

    def test_sbm8_is_what_the_design_says(self) -> None:
        """The whole table of `sbm8`, operand by operand."""
        x = integer(bits=8, zero="integer", range="sample-mean", fewest=256, running=0.9)
        w = integer(bits=8, zero="symmetric", granularity="kept-channel")
        g = integer(bits=8, zero="integer", rounding="stochastic")
        recipe = _sbm8()

        assert recipe == Recipe(
            name="sbm8",
            summary=recipe.summary,
            source=recipe.source,
            output=Output(input=x, weight=w),
            grad_input=GradInput(grad_output=g, weight=w),
            grad_weight=GradWeight(grad_output=BF16, input=x),
            bias=FP32,
            normalization=RangeNorm(
                input=x, grad_output=g, constant="authors", chunks=16, fewest_per_chunk=16, epsilon="inside"
            ),
            first="convert",
            last="convert",
        )

    def test_sbm8_has_no_floor(self) -> None:
        """Gradients are often smaller than the authors' floor of 1e-8."""
        floors = {fmt.scale.floor for _, _, fmt in _sbm8().operands() if fmt.has_width}

        assert floors == {0.0}

    def test_the_authors_code_has_no_fewest_values(self) -> None:
        """`sbm8-hoffer` averages over samples of any size and cuts chunks of 2 values, as its authors do."""
        recipe = Recipe.from_name("sbm8-hoffer")

        assert recipe.output.input.has_width
        assert recipe.normalization is not None
        assert recipe.output.input.scale.range == SampleMean()
        assert recipe.normalization.fewest_per_chunk == 2

    @pytest.mark.parametrize("name", ["sbm8-hoffer", "sbm8-cpt"])
    def test_the_authors_variants_have_their_floor_and_offset(self, name: str) -> None:
        """All their integers have a float offset, a floor of 1e-8 and weights per output channel."""
        recipe = Recipe.from_name(name)
        integers = [fmt for _, _, fmt in recipe.operands() if fmt.has_width]

        assert {(fmt.zero, fmt.scale.floor) for fmt in integers} == {("offset", 1e-8)}
        assert recipe.output.weight.has_width
        assert recipe.output.weight.granularity == "output-channel"

    @pytest.mark.parametrize("name", STORED)
    def test_only_gradients_round_stochastically(self, name: str) -> None:
        """Forward operands round to nearest, but for inputs of `fixed16`; `quartet2` draws scales in the backward."""
        drawn = [(product, operand) for product, operand, fmt in Recipe.from_name(name).operands() if fmt.stochastic]

        also = {"fixed16": {"input"}, "quartet2": {"input", "weight"}}.get(name, set())
        assert {operand for _, operand in drawn} <= {"grad_output"} | also
        assert name == "fixed16" or "output" not in {product for product, _ in drawn}

    @pytest.mark.parametrize(("name", "bifurcates"), [("sbm8", True), ("sbm8-hoffer", True), ("sbm8-cpt", False)])
    def test_the_gradient_is_bifurcated(self, name: str, bifurcates: bool) -> None:
        """The gradient has a wider format for the weight's gradient, but not in the CPT authors' variant."""
        recipe = Recipe.from_name(name)

        assert (recipe.grad_input.grad_output != recipe.grad_weight.grad_output) is bifurcates

    @pytest.mark.parametrize("name", ["fp32", "bf16"])
    def test_float_recipes_have_one_format(self, name: str) -> None:
        """All six operands are of the format that names the recipe."""
        assert {fmt for _, _, fmt in Recipe.from_name(name).operands()} == {{"fp32": FP32, "bf16": BF16}[name]}

    def test_the_last_layer_of_the_cpt_variant_is_left(self) -> None:
        """Their classifier is in float, their first layer is not."""
        recipe = Recipe.from_name("sbm8-cpt")

        assert (recipe.first, recipe.last) == ("convert", "leave")


class TestWithBits:
    """Changing widths."""

    def test_only_the_widths_change(self) -> None:
        """Everything else of every operand stays."""
        plain = Recipe.from_name("sbm8-cpt")
        changed = plain.with_bits(weight=3, input=4, grad_output=5)

        for (_, operand, before), (_, _, after) in zip(plain.operands(), changed.operands(), strict=True):
            assert before.has_width
            assert after == before.replace(bits={"weight": 3, "input": 4, "grad_output": 5}[operand])

    @pytest.mark.parametrize(
        ("name", "operand"), [("fp32", "input, weight"), ("bf16", "input"), ("sbm8", "grad_output")]
    )
    def test_float_operands_have_no_bits(self, name: str, operand: str) -> None:
        """A recipe with a float operand is refused; the error names the recipe and the operand."""
        with pytest.raises(UsageError, match=f"'{name}' has no bits to set in {operand}"):
            Recipe.from_name(name).with_bits(weight=8, input=8, grad_output=8)

    def test_the_recipe_itself_is_not_changed(self) -> None:
        """with_bits and replace make new recipes; the one that others share stays."""
        plain = Recipe.from_name("sbm8-cpt")

        assert plain.with_bits(weight=2, input=2, grad_output=2) != plain
        assert plain.replace(last="convert") != plain
        assert Recipe.from_name("sbm8-cpt") == plain
        assert {fmt.bits for _, _, fmt in plain.operands()} == {8}


class TestValue:
    """Recipes as frozen data that check themselves."""

    @pytest.mark.parametrize("part", ["", "output", "grad_input", "grad_weight", "normalization"])
    def test_nothing_can_be_assigned(self, part: str) -> None:
        """A recipe and its tables are frozen."""
        value = getattr(_sbm8(), part) if part else _sbm8()
        field = dataclasses.fields(value)[0].name

        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, None)

    def test_the_table_has_six_rows(self) -> None:
        """Three products with two operands each, in the order of SLOTS."""
        rows = [(product, operand) for product, operand, _ in _sbm8().operands()]

        assert rows == list(SLOTS)
        assert rows == [
            ("output", "input"),
            ("output", "weight"),
            ("grad_input", "grad_output"),
            ("grad_input", "weight"),
            ("grad_weight", "grad_output"),
            ("grad_weight", "input"),
        ]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"first": "skip"}, "unknown first 'skip'"),
            ({"last": "leav"}, "Did you mean 'leave'"),
            ({"bias": integer(bits=8, zero="offset", rounding="stochastic")}, "bias rounds to nearest"),
            ({"bias": integer(bits=8, zero="offset", running=0.5)}, "keeps no range"),
            ({"bias": integer(bits=8, zero="offset", granularity="row")}, "bias shares one scale"),
            (
                {"output": Output(input=X, weight=integer(bits=8, zero="offset", running=0.5))},
                "output.weight: only `input` keeps a running range",
            ),
            (
                {"grad_weight": GradWeight(input=X, grad_output=integer(bits=8, zero="offset", running=0.5))},
                "grad_weight.grad_output: only `input` keeps",
            ),
        ],
    )
    def test_what_does_not_fit_together_is_refused(self, changes: dict[str, object], message: str) -> None:
        """A recipe without meaning is an error that says why."""
        with pytest.raises(UsageError, match=message):
            _sbm8().replace(**changes)


def test_depthwise_bits_need_something_to_be_exempt_from() -> None:
    """A static recipe has no use for bits of depthwise layers."""
    with pytest.raises(UsageError, match="depthwise bits go with a schedule or gates"):
        Recipe.from_name("sbm8").replace(depthwise=(8, 16))


def test_tuned_changes_settings_and_only_them() -> None:
    """Tuned gives the same recipe with other settings; the stored one stays."""
    cpt = Recipe.from_name("cpt")
    tuned = cpt.tuned(low=4, shape="triangular-vertical")

    assert (cpt.settings()["low"], tuned.settings()["low"], tuned.settings()["high"]) == (3, 4, 8)
    assert (cpt.settings()["shape"], tuned.settings()["shape"]) == ("repeated", "triangular-vertical")
    assert tuned.output == cpt.output


@pytest.mark.parametrize("name", ["cpt", "pfq", "dfq", "fractrain"])
def test_dynamic_recipes_are_based_on_the_authors_formats(name: str) -> None:
    """The formats of the dynamic recipes are those of sbm8-cpt but for the width of weights behind gates."""
    recipe, base = Recipe.from_name(name), Recipe.from_name("sbm8-cpt")
    same = [
        fmt.replace(bits=8) == known if fmt.has_width else fmt == known
        for (_, _, fmt), (_, _, known) in zip(recipe.operands(), base.operands(), strict=True)
    ]

    assert all(same)
    assert recipe.is_dynamic
    assert not base.is_dynamic
    assert recipe.depthwise == (8, 16)
