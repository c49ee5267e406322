from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit import functional
from lowbit.nn import NORM_LAYERS, PRODUCT_LAYERS, QuantLayer, QuantLinear, kinds
from lowbit.products.operators import Linear, Op

TWINS = [*PRODUCT_LAYERS.items(), *((plain, twin) for plain, twins in NORM_LAYERS.items() for twin in twins)]
CHANNELS = 6


def _layer(kind: type[nn.Module]) -> nn.Module:
    """A plain layer of 6 input channels."""
    if issubclass(kind, nn.modules.batchnorm._BatchNorm):
        return kind(CHANNELS)
    if issubclass(kind, nn.modules.conv._ConvNd):
        return kind(CHANNELS, 4, 3)
    return kind(CHANNELS, 2)


@pytest.mark.parametrize(("plain", "twin"), TWINS, ids=str)
def test_a_twin_says_its_own_plain_type(plain: type[nn.Module], twin: type[QuantLayer]) -> None:
    """Each class of the tables names the type that it is a subclass of, so that `restore_` knows what to go back to."""
    assert vars(twin)["plain"] is plain
    assert issubclass(twin, plain)


@pytest.mark.parametrize(("plain", "twin"), TWINS, ids=str)
def test_a_twin_knows_the_channels_of_a_plain_layer(plain: type[nn.Module], twin: type[QuantLayer]) -> None:
    """The class answers for a layer that is not converted yet."""
    assert twin.input_channels(_layer(plain)) == CHANNELS


@pytest.mark.parametrize(("plain", "twin"), TWINS, ids=str)
def test_a_layer_multiplies_if_it_has_an_operator(plain: type[nn.Module], twin: type[QuantLayer]) -> None:
    """Layers with products have an operator and weights, normalisations have neither."""
    layer = _layer(plain)

    assert kinds.has_product_twin(layer) == (plain in PRODUCT_LAYERS)
    assert (twin.operator(layer) is not None) == (plain in PRODUCT_LAYERS)
    assert bool(twin.weights(layer)) == (plain in PRODUCT_LAYERS)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolution_says_the_operator_that_runs(kind: type[nn.Module]) -> None:
    """The answer before conversion is the operator of the call."""
    layer = kind(4, 6, 3, stride=2, padding=1, dilation=2, groups=2)
    expected = PRODUCT_LAYERS[kind].operator(layer)
    ran: list[Op] = []

    lowbit.convert_(layer, "sbm8", engine="reference")
    with lowbit.products.watch.counted_by(lambda call: ran.append(call.op)):
        layer(torch.ones(1, 4, 9, 9))

    assert ran == [expected]


def test_the_nearest_type_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subclass of a plain layer that has a twin of its own is asked for by that twin."""

    class Narrow(nn.Linear):
        """A subclass of a user."""

    class QuantNarrow(QuantLinear, Narrow):
        """Its twin."""

        plain = Narrow

    assert kinds.twin_of(Narrow(2, 2)) is QuantLinear
    monkeypatch.setitem(kinds._TWINS, Narrow, (QuantNarrow,))
    assert kinds.twin_of(Narrow(2, 2)) is QuantNarrow


class Scaled(nn.Module):
    """A layer of a user: the product of a weight and twice the input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.weight = nn.Parameter(torch.linspace(-1, 1, inputs * outputs).view(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """``2 x w^T``."""
        return F.linear(2 * x, self.weight)


class QuantScaled(QuantLayer, Scaled):
    """`Scaled` in the formats of a recipe."""

    plain = Scaled

    @classmethod
    def operator(cls, layer: Any) -> Op:  # noqa: ARG003
        """``x w^T``."""
        return Linear()

    @classmethod
    def input_channels(cls, layer: Any) -> int:
        """K."""
        return int(layer.inputs)

    def forward(self, x: Tensor) -> Tensor:
        """``2 x w^T``."""
        doubled = 2 * x
        return functional.linear(doubled, self.weight, setting=self.site.setting(doubled))


class TestNewLayer:
    """A layer is one class and one row of the table."""

    @pytest.fixture(autouse=True)
    def row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The row."""
        monkeypatch.setitem(kinds._TWINS, Scaled, (QuantScaled,))

    def test_it_is_converted_and_restored(self) -> None:
        """`convert_` finds it, the proof sees its products, and `restore_` gives the plain layer back."""
        model = nn.Sequential(Scaled(8, 4), nn.ReLU(), nn.Linear(4, 2))
        report = lowbit.convert_(model, "sbm8")
        with lowbit.verify(model) as proof:
            model(torch.ones(3, 8)).sum().backward()
        lowbit.restore_(model)

        assert [(row.type, row.converted) for row in report.rows] == [("Scaled", True), ("Linear", True)]
        assert report.share == 1
        assert {row.layer for row in proof.rows} == {"0", "2"}
        assert type(model[0]) is Scaled

    def test_its_bits_are_controlled(self) -> None:
        """A controller writes its bits, a rule finds it by its type, and the meter counts it under its name."""
        model = nn.Sequential(Scaled(8, 4))
        lowbit.convert_(model, "sbm8")
        lowbit.PrecisionController(model, forward=8, backward=8, rules=[(Scaled, (4, 6))])
        with lowbit.Meter(model) as meter:
            model(torch.ones(3, 8)).sum().backward()
            meter.step()

        assert meter.ledger.layers == ("0",)
        assert {total.product.bits for total in meter.ledger.totals()} == {(4, 4), (16, 4)}

    def test_its_blocks_are_gated(self) -> None:
        """Gates read its input channels, which are the last axis as its operator has rows."""
        model = nn.Sequential(Scaled(8, 8))
        lowbit.convert_(model, "sbm8")
        (site,) = model[0].sites()
        block = lowbit.precision.blocks.gated_block("0", model[0], set())

        assert (block.inputs, block.channels_last, block.gated) == (8, True, [site])
