"""The names of recipes."""

import pytest

from lowbit.errors import UsageError
from lowbit.methods.recipe import Recipe


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
        with pytest.raises(UsageError, match=f"unknown recipe '{name}'. Did you mean '{nearest}'.* sbm8, .*sbm8-cpt"):
            Recipe.from_name(name)

    @pytest.mark.parametrize("name", ["", "w4a4", "w4a4g", "w-4a4g4", "w4.0a4g4", "../sbm8", "sbm8.toml", "xw4a4g4"])
    def test_what_is_no_name_is_refused(self, name: str) -> None:
        """Paths, file names and half patterns are unknown names."""
        with pytest.raises(UsageError, match="unknown recipe"):
            Recipe.from_name(name)


def test_the_family_of_recipes_asks_for_widths() -> None:
    """The name wXaYgZ itself is refused with an example of what to write."""
    with pytest.raises(UsageError, match="w4a4g6"):
        Recipe.from_name("wXaYgZ")


def test_width_errors_name_the_recipe() -> None:
    """Bits out of range are reported with the name that asked for them."""
    with pytest.raises(UsageError, match="w4a0g99"):
        Recipe.from_name("w4a0g99")
