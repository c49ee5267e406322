"""The recipe `dorefa` in its widths: forms of formats, policies, clipping by design, and training."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit import PrecisionController, UsageError, VerificationError, functional
from lowbit.engines import int8
from lowbit.methods.recipe import Recipe, from_toml
from lowbit.numerics.elements import Sign
from lowbit.numerics.formats import FP32, Format, integer
from lowbit.numerics.quantizer import quantize
from lowbit.numerics.rounding import CounterNoise, step_key
from lowbit.numerics.scales import MeanMagnitude, Scale
from lowbit.products import watch
from lowbit.products.setting import Setting
from lowbit.products.watch import ProductRun


def network() -> nn.Sequential:
    """Four layers with products, of which the recipe converts the two in the middle."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 32, bias=False),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 3),
    )


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with a bright third of the rows, which is the class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (count,), generator=generator)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    x += F.one_hot(y, 3).repeat_interleave(torch.tensor([3, 3, 2]), 1)[:, None, :, None]
    return x, y


class TestForms:
    """Widths at which another format takes the place of one."""

    def test_the_recipe_has_the_forms_of_the_paper(self) -> None:
        """At 1 bit weights are signs under the mean magnitude; at 32 bits nothing is rounded or clipped."""
        recipe = Recipe.from_name("dorefa")
        sign = Format(element=Sign(), scale=Scale(range=MeanMagnitude()))

        assert [recipe.output.weight.at(bits) for bits in (1, 32)] == [sign, FP32]
        assert recipe.output.weight.at(4) is recipe.output.weight
        assert recipe.output.input.at(32) == recipe.grad_input.grad_output.at(32) == FP32
        assert recipe.output.input.at(1) is recipe.output.input

    @pytest.mark.parametrize(
        ("name", "bits"), [("dorefa:w1a2g6", (1, 2, 6)), ("dorefa:w8a8g8", (8, 8, 8)), ("dorefa:w32a32g32", (32,) * 3)]
    )
    def test_names_have_their_widths(self, name: str, bits: tuple[int, int, int]) -> None:
        """Weights, inputs and gradients of all products, and the first and last layer are left."""
        recipe = Recipe.from_name(name)

        widths = {operand: fmt.bits for _, operand, fmt in recipe.operands()}
        assert (widths["weight"], widths["input"], widths["grad_output"]) == bits
        assert (recipe.first, recipe.last) == ("leave", "leave")

    def test_a_controller_reaches_the_forms_too(self) -> None:
        """A schedule that goes to 1 bit runs signs, and at 32 bits the values as they are."""
        layer = nn.Linear(20, 4, bias=False)
        lowbit.convert_(layer, Recipe.from_name("dorefa").replace(name="all", first="convert", last="convert"))
        seen: dict[int, Tensor] = {}
        x = torch.rand(5, 20)

        for bits in (1, 8, 32):
            controller = PrecisionController(layer, forward=bits, backward=8)

            def note(run: ProductRun, bits: int = bits) -> None:
                seen[bits] = run.operands["weight"].quantized

            with watch.observed_by(note):
                layer(x)
            controller.remove()

        w = layer.weight.detach()
        torch.testing.assert_close(seen[1], w.sign() * w.abs().mean())
        assert torch.equal(seen[32], w)
        assert float(seen[8].abs().max()) == 1

    @pytest.mark.parametrize(
        ("widths", "message"),
        [
            (((16, FP32),), "a format that has these bits alone"),
            (((4, integer(bits=4, zero="offset")),), "a format that has these bits alone"),
            (((32, FP32), (1, Format(element=Sign(), scale=Scale()))), "each other width once, the smallest first"),
        ],
    )
    def test_forms_that_do_not_fit_are_refused(self, widths: tuple[tuple[int, Format], ...], message: str) -> None:
        """A form has the bits that it stands for, and none to set."""
        with pytest.raises(UsageError, match=message):
            integer(bits=8, zero="offset").replace(widths=widths)

    def test_forms_go_with_bits_that_can_be_set_and_no_running_range(self) -> None:
        """A float format has no other widths, and a range that is kept would be of one form alone."""
        for fmt in (FP32, integer(bits=8, zero="offset", running=0.9)):
            with pytest.raises(UsageError, match="widths="):
                fmt.replace(widths=((1, Format(element=Sign(), scale=Scale())),))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('widths = { 1 = "sing" }', "unknown format of formats.x.widths.1 'sing'"),
            ('widths = { one = "fp32" }', "formats.x.widths has 'one': give numbers of bits"),
            ('widths = { 16 = "fp32" }', "formats.x: widths: fp32 at 16 bits"),
        ],
    )
    def test_texts_that_do_not_fit_are_refused(self, text: str, message: str) -> None:
        """The error says where it stands."""
        table = 'output = { input = "x", weight = "x" }\ngrad_input = { grad_output = "x", weight = "x" }\n'
        rest = f'grad_weight = {{ grad_output = "x", input = "x" }}\n[formats.x]\nbits = 8\nzero = "symmetric"\n{text}'

        with pytest.raises(UsageError, match=message):
            from_toml("mine", f'summary = ""\nsource = ""\n{table}{rest}')


class TestSigns:
    """1-bit weights."""

    def test_values_are_signs_of_the_mean_magnitude(self) -> None:
        """By hand: the mean of 1, 2, 3 and 0 is 1.5, and 0 counts as positive."""
        fmt = Format(element=Sign(), scale=Scale(range=MeanMagnitude()))

        assert quantize(torch.tensor([1.0, -2.0, 3.0, 0.0]), fmt).values.tolist() == [1.5, -1.5, 1.5, 1.5]
        assert quantize(torch.zeros(3), fmt).values.tolist() == [0, 0, 0]
        assert quantize(torch.zeros(0), fmt).values.tolist() == []

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_an_inf_or_nan_surfaces_as_nan(self, bad: float) -> None:
        """Throughout what shares the scale."""
        fmt = Format(element=Sign(), scale=Scale(range=MeanMagnitude()))

        assert quantize(torch.tensor([1.0, bad, 0.0]), fmt).values.isnan().all()

    def test_signs_by_noise_have_the_mean_of_what_they_stand_for(self) -> None:
        """Of n = 40,000 draws for 0.5 under the scale 1, within 5 standard errors (false alarm < 1e-6)."""
        n = 40_000
        fmt = Format(element=Sign(), scale=Scale(), rounding="stochastic")
        x = torch.tensor([[0.5, 1.0, -1.0]]).repeat(n, 1)
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))

        values = quantize(x, fmt, noise=noise).values

        assert abs(float(values[:, 0].double().mean()) - 0.5) < 5 * (0.75 / n) ** 0.5
        assert values[:, 0].unique().tolist() == [-1, 1]
        assert torch.equal(values[:, 1:], x[:, 1:])
        assert quantize(torch.zeros(3), fmt, noise=torch.full((3,), 0.9)).values.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ["dorefa", "dorefa:w1a2g6", "dorefa:w1a1g2"])
def test_values_that_are_clipped_by_design_pass_verify(name: str) -> None:
    """Inputs beyond 1 are clipped by the transform, before the grid, so none lies outside the grid's range."""
    layer = nn.Linear(64, 8)
    lowbit.convert_(layer, Recipe.from_name(name).replace(name="all", first="convert", last="convert"))
    x = 4 * torch.rand(32, 64)

    with lowbit.verify(layer) as proof:
        layer(x.requires_grad_()).square().mean().backward()

    assert float((x > 1).float().mean()) > 0.5
    assert {row.clipped for row in proof.rows} == {0.0}


def test_values_that_only_the_range_clips_fail_verify() -> None:
    """The same range without the transform is one that does not fit its values."""
    recipe = Recipe.from_name("dorefa")
    text = integer(bits=8, zero="offset", range=recipe.output.input.scale.range)  # type: ignore[union-attr]
    layer = nn.Linear(64, 8)
    lowbit.convert_(
        layer,
        recipe.replace(
            name="bare",
            first="convert",
            last="convert",
            output=type(recipe.output)(input=text, weight=recipe.output.weight),
        ),
    )

    with pytest.raises(VerificationError, match="lie outside the grid"), lowbit.verify(layer):
        layer(4 * torch.rand(32, 64))


@pytest.mark.parametrize("name", ["dorefa", "dorefa:w1a2g6"])
def test_a_network_learns(name: str) -> None:
    """60 steps of Adam on three classes of noise with a bright band: most of 600 fresh samples are told apart."""
    model = network()
    report = lowbit.convert_(model, name, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    for step in range(60):
        x, y = data(64, step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    x, y = data(600, 1000)
    with torch.no_grad():
        right = float((model.eval()(x).argmax(1) == y).float().mean())

    assert [row.recipe for row in report.rows if row.type in ("Conv2d", "Linear")] == [None, name, name, None]
    assert right > 0.9


@pytest.mark.skipif(bool(int8.missing("int8")), reason="this machine lacks the units")
class TestUnits:
    """The products that run on 8-bit units."""

    @pytest.mark.parametrize("name", ["dorefa", "dorefa:w1a2g6", "dorefa:w1a1g8", "dorefa:w3a8g4"])
    def test_output_and_grad_input_run_there(self, name: str) -> None:
        """grad_weight stays on the reference, and gradients are those of the reference, through tanh and clip too."""
        found = {}
        for engine in ("auto", "reference"):
            model = network()
            lowbit.convert_(model, name, engine=engine, seed=3)
            with lowbit.verify(model) as proof:
                x, y = data(16, seed=1)
                F.cross_entropy(model(x), y).backward()
            engines = {(row.product, row.engine) for row in proof.rows}
            found[engine] = [p.grad for p in model.parameters() if p.grad is not None]
            if engine == "auto":
                assert engines == {("output", "int8"), ("grad_input", "int8"), ("grad_weight", "reference")}

        for a, b in zip(*found.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))

    @pytest.mark.parametrize("value", [0.0, 0.25, 1e30, 1e-30, torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("name", ["dorefa", "dorefa:w1a2g6"])
    def test_extreme_values_are_where_the_reference_has_them(self, name: str, value: float) -> None:
        """A number in an input, a weight or a gradient, and whole tensors of it."""
        generator = torch.Generator().manual_seed(0)
        x, w, g = (torch.randn(shape, generator=generator) for shape in ((6, 8), (5, 8), (6, 5)))
        for whole in (False, True):
            for spoiled in range(3):
                operands = [t.clone() for t in (x, w, g)]
                operands[spoiled][slice(None) if whole else (2, 3)] = value
                results = []
                for engine in ("int8", "reference"):
                    a, b = operands[0].clone().requires_grad_(), operands[1].clone().requires_grad_()
                    noise = CounterNoise(key=step_key(3, torch.tensor(5)), layer="layer")
                    setting = Setting(recipe=Recipe.from_name(name), noise=noise, engine=engine)
                    y = functional.linear(a, b, setting=setting)
                    y.backward(operands[2])
                    results.append([y.detach(), a.grad, b.grad])
                for one, two in zip(*results, strict=True):
                    largest = float(two.nan_to_num(0.0, 0.0, 0.0).abs().max())
                    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * largest, equal_nan=True)
