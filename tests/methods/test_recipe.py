import dataclasses

import pytest

import lowbit
from lowbit.errors import UsageError
from lowbit.methods.recipe import SLOTS, GradInput, GradWeight, Output, RangeNorm, Recipe, from_toml, recipes
from lowbit.numerics.formats import BF16, FP32, integer
from lowbit.numerics.scales import SampleMean

STORED = [name for name in recipes() if name != "wXaYgZ"]

MINIMAL = """
summary = "a"
source = "b"
output = { input = "x", weight = "x" }
grad_input = { grad_output = "x", weight = "x" }
grad_weight = { grad_output = "bf16", input = "x" }

[formats.x]
bits = 8
zero = "symmetric"
"""
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
        """Forward operands of these recipes round to nearest."""
        rounded = {operand for _, operand, fmt in Recipe.from_name(name).operands() if fmt.stochastic}

        assert rounded <= {"grad_output"}

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


class TestNames:
    """Asking for recipes by name."""

    @pytest.mark.parametrize(("weight", "input_", "grad"), [(4, 4, 6), (3, 8, 8), (8, 2, 16)])
    def test_bits_in_a_name_are_the_bits_of_the_recipe(self, weight: int, input_: int, grad: int) -> None:
        """A name wXaYgZ gives X-bit weights, Y-bit inputs, Z-bit gradients in all products of sbm8-cpt."""
        name = f"w{weight}a{input_}g{grad}"
        bits = {"weight": weight, "input": input_, "grad_output": grad}

        recipe = Recipe.from_name(name)

        assert recipe.name == name
        assert {(operand, fmt.bits) for _, operand, fmt in recipe.operands()} == set(bits.items())
        assert recipe.with_bits(weight=8, input=8, grad_output=8).output == Recipe.from_name("sbm8-cpt").output
        assert recipe.last == "leave"

    def test_eight_bits_are_sbm8_cpt(self) -> None:
        """w8a8g8 differs from sbm8-cpt in its name and summary only."""
        plain = Recipe.from_name("sbm8-cpt")

        assert Recipe.from_name("w8a8g8").replace(name=plain.name, summary=plain.summary) == plain

    @pytest.mark.parametrize("name", ["w0a4g4", "w4a0g4", "w4a4g0", "w33a8g8", "w8a8g99"])
    def test_bits_out_of_range_are_refused(self, name: str) -> None:
        """The error says which bits are allowed."""
        with pytest.raises(UsageError, match="whole numbers from 1 to 32"):
            Recipe.from_name(name)

    @pytest.mark.parametrize(
        ("name", "nearest"),
        [("sbm-8", "sbm8"), ("sbm8-cpd", "sbm8-cpt"), ("bfp16", "bf16"), ("sbm8_hoffer", "sbm8-hoffer")],
    )
    def test_a_misspelt_name_is_answered_with_the_nearest(self, name: str, nearest: str) -> None:
        """The error names the nearest recipe and lists all."""
        with pytest.raises(UsageError, match=f"unknown recipe '{name}'. Did you mean '{nearest}'.* sbm8, sbm8-cpt"):
            Recipe.from_name(name)

    @pytest.mark.parametrize("name", ["", "w4a4", "w4a4g", "w-4a4g4", "w4.0a4g4", "../sbm8", "sbm8.toml", "xw4a4g4"])
    def test_what_is_no_name_is_refused(self, name: str) -> None:
        """Paths, file names and half patterns are unknown names."""
        with pytest.raises(UsageError, match="unknown recipe"):
            Recipe.from_name(name)


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
            ({"bias": integer(bits=8, zero="offset", running=0.5)}, "no running range"),
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

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"constant": "author"}, "Did you mean 'authors'"),
            ({"epsilon": "in"}, "unknown epsilon 'in'"),
            ({"chunks": 0}, "at least one chunk"),
            ({"fewest_per_chunk": 1}, "at least two values"),
            ({"momentum": 0.0}, r"in \(0, 1\]"),
            ({"momentum": 1.5}, r"in \(0, 1\]"),
        ],
    )
    def test_a_normalisation_without_meaning_is_refused(self, changes: dict[str, object], message: str) -> None:
        """Range BN settings check themselves."""
        with pytest.raises(UsageError, match=message):
            RangeNorm(**{"input": X, "grad_output": X, **changes})


class TestToml:
    """Recipes as text."""

    def test_names_of_formats_become_formats(self) -> None:
        """What a table calls x is the format of that name; bf16 and fp32 need no definition."""
        recipe = from_toml("mine", MINIMAL)

        assert recipe == Recipe(
            name="mine",
            summary="a",
            source="b",
            output=Output(input=X, weight=X),
            grad_input=GradInput(grad_output=X, weight=X),
            grad_weight=GradWeight(grad_output=BF16, input=X),
        )

    def test_normalisation_and_bias_may_be_given(self) -> None:
        """Both name formats too."""
        text = 'bias = "x"\nnormalization = { input = "x", grad_output = "fp32", chunks = 4 }\n' + MINIMAL

        recipe = from_toml("mine", text)

        assert recipe.bias == X
        assert recipe.normalization == RangeNorm(input=X, grad_output=FP32, chunks=4)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("summary", "sumary", "unknown field of recipe mine 'sumary'. Did you mean 'summary'"),
            ("bits = 8", "bit = 8", "unknown field of formats.x 'bit'. Did you mean 'bits'"),
            ("{ input", "{ inputs", "unknown field of output 'inputs'. Did you mean 'input'"),
            ('"bf16"', '"bfloat16"', "unknown format of grad_weight.grad_output 'bfloat16'. Did you mean 'bf16'"),
            (
                "grad_weight =",
                "grad_weights =",
                "unknown field of recipe mine 'grad_weights'. Did you mean 'grad_weight'",
            ),
            ('"symmetric"', '"symetric"', "unknown zero 'symetric'. Did you mean 'symmetric'"),
            ("bits = 8", "bits = 80", "bits=80 .*from 2 to 16"),
            ("bits = 8", 'bits = "8"', "whole numbers"),
            ('source = "b"', "", "recipe mine lacks source"),
            (', weight = "x" }\ngrad_input', " }\ngrad_input", "output lacks weight"),
            ('zero = "symmetric"', "", "formats.x lacks zero"),
        ],
    )
    def test_a_mistake_is_named(self, old: str, new: str, message: str) -> None:
        """Unknown fields, formats and values and missing fields raise, naming the place and the nearest name."""
        assert old in MINIMAL

        with pytest.raises(UsageError, match=message):
            from_toml("mine", MINIMAL.replace(old, new, 1))

    def test_what_is_no_toml_is_refused(self) -> None:
        """The error is that of the TOML reader, with its line."""
        with pytest.raises(UsageError, match="line 1"):
            from_toml("mine", "= 3")

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ('input = "x"', 'input = { bits = 8, zero = "symmetric" }'),
            ("summary", 'name = "other"\nsummary'),
            ("[formats.x]", "[formats.bf16]"),
        ],
    )
    def test_likely_mistakes_are_usage_errors(self, old: str, new: str) -> None:
        """An inline format, a name beside the file's and a format called bf16 are refused in words."""
        assert old in MINIMAL
        with pytest.raises(UsageError):
            from_toml("mine", MINIMAL.replace(old, new, 1))


def test_the_family_of_recipes_asks_for_widths() -> None:
    """The name wXaYgZ itself is refused with an example of what to write."""
    with pytest.raises(UsageError, match="w4a4g6"):
        Recipe.from_name("wXaYgZ")


def test_width_errors_name_the_recipe() -> None:
    """Bits out of range are reported with the name that asked for them."""
    with pytest.raises(UsageError, match="w4a0g99"):
        Recipe.from_name("w4a0g99")


@pytest.mark.parametrize("granularity", ["sample", "row", "kept-channel"])
def test_range_norm_takes_formats_per_tensor_only(granularity: str) -> None:
    """A granularity that Range BN would ignore is refused."""
    fmt = integer(bits=8, zero="integer", granularity=granularity)

    with pytest.raises(UsageError, match="per tensor"):
        RangeNorm(input=fmt, grad_output=fmt)


SCHEDULED = """
summary = "s"
source = "s"
base = "sbm8-cpt"
[schedule]
forward = { kind = "cyclic", low = 4, high = 6, cycles = 2 }
backward = 7
"""


def test_a_recipe_takes_the_fields_of_its_base() -> None:
    """What the text leaves out is the base's; what it has is its own."""
    mine, base = from_toml("mine", SCHEDULED), Recipe.from_name("sbm8-cpt")

    assert (mine.output, mine.grad_weight, mine.last) == (base.output, base.grad_weight, "leave")
    assert (mine.name, mine.summary) == ("mine", "s")
    assert mine.schedule is not None
    assert mine.schedule.forward.build(total_steps=8).max_bits == 6


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cyclic", "cylic", "Did you mean 'cyclic'"),
        ("low = 4", "lo = 4", "unknown setting of a cyclic schedule 'lo'"),
        ("low = 4, ", "", "a cyclic schedule lacks low"),
        ("low = 4", "low = 7", "low=7, high=6"),
        ("low = 4", 'low = "test"', "low='test'"),
        ('kind = "cyclic", ', "", "schedule.forward lacks kind"),
        ("backward = 7", "backwards = 7", "Did you mean 'backward'"),
        ("backward = 7", "backward = 99", "bits=99"),
        ('base = "sbm8-cpt"', 'base = "sbm8-cpd"', "Did you mean 'sbm8-cpt'"),
        ("[schedule]", "[gates]\nchoices = [[3, 6], [8, 8]]\ntargets = [3.0]\n[schedule]", "not both"),
        ("[schedule]", "depthwise = [8]\n[schedule]", "depthwise=.8,.: give a tuple"),
    ],
)
def test_a_wrong_schedule_is_refused_at_once(old: str, new: str, message: str) -> None:
    """A recipe whose schedule no run could have does not load, and the error says where."""
    assert old in SCHEDULED

    with pytest.raises(UsageError, match=message):
        from_toml("mine", SCHEDULED.replace(old, new))


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
