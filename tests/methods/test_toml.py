"""Recipes as text."""

import pytest

from lowbit.errors import UsageError
from lowbit.methods.recipe import GradInput, GradWeight, Output, RangeNorm, Recipe, from_toml
from lowbit.numerics.formats import BF16, FP32, integer

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
