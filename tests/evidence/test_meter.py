"""The meter: what it counts, against independent counts, and that it leaves the run alone."""

import copy
import io
import json
import math
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lowbit
from helpers import ORACLES
from lowbit import functional
from lowbit.engines import int8
from lowbit.errors import UsageError
from lowbit.evidence.ledger import Ledger
from lowbit.evidence.records import PLAIN, PRODUCTS, Product
from lowbit.kernels import cpu
from lowbit.products import watch
from lowbit.products.setting import Setting
from lowbit.train import models
from lowbit.train.data import Task


def metered(model: nn.Module, *inputs: Any, steps: int = 1, backward: bool = True) -> Ledger:
    """The ledger of some training steps on the same input."""
    with lowbit.Meter(model) as meter:
        for _ in range(steps):
            output = model(*inputs)
            if backward:
                output.sum().backward()
            meter.step()
    return meter.ledger


def counts(ledger: Ledger) -> dict[tuple[str, str], int]:
    """MACs by layer and product."""
    found: dict[tuple[str, str], int] = {}
    for total in ledger.totals():
        key = (total.product.layer, total.product.product)
        found[key] = found.get(key, 0) + total.macs
    return found


def by_product(ledger: Ledger, layer: str | None = None) -> list[int]:
    """MACs of output, grad_input and grad_weight."""
    found = counts(ledger)
    return [sum(n for (name, p), n in found.items() if p == q and layer in (None, name)) for q in PRODUCTS]


class Opaque:
    """An output of a class that torch knows nothing of."""

    def __init__(self, y: Tensor) -> None:
        self.y = y


def mlp() -> nn.Sequential:
    """Two linear layers, 6 to 5 to 3."""
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def image(size: int, classes: int = 10) -> Task:
    """Images of three channels."""
    return Task(kind="image", shape=(3, size, size), classes=classes)


TEXT = Task(kind="text", shape=(16,), classes=50)


def on_meta(name: str, task: Task, batch: int) -> tuple[nn.Module, Tensor]:
    """A network and a batch with shapes only."""
    with torch.device("meta"):
        model = models.build(name, task)
        shape = (batch, *task.shape)
        return model, torch.zeros(shape, dtype=torch.int64) if task.kind == "text" else torch.zeros(shape)


def flops_of_torch(model: nn.Module, x: Tensor) -> int:
    """Forward and backward MACs as torch's own counter sees them."""
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops() // 2


class TestIndependentCounts:
    """Totals against torch's counter and formulas by hand."""

    @pytest.mark.parametrize("recipe", [None, "fp32", "sbm8"])
    @pytest.mark.parametrize(
        ("name", "size"), [("resnet18", 224), ("resnet50", 224), ("resnet20", 32), ("resnet74", 32)]
    )
    def test_residual_networks(self, name: str, size: int, recipe: str | None) -> None:
        """Linear layers and ungrouped convolutions count as torch's counter says, forward and backward."""
        model, x = on_meta(name, image(size), 4)
        expected = flops_of_torch(model, x)
        if recipe is not None:
            lowbit.convert_(model, recipe)

        assert sum(by_product(metered(model, x))) == expected

    def test_a_network_that_really_runs(self) -> None:
        """The same holds where values are computed, not only shapes."""
        torch.manual_seed(0)
        model, x = models.build("resnet18", image(32)), torch.randn(2, 3, 32, 32)
        expected = flops_of_torch(model, x)
        plain = metered(model, x, steps=2)
        lowbit.convert_(model, "sbm8")
        converted = metered(model, x)

        assert sum(by_product(plain)) == 2 * expected
        assert sum(by_product(converted)) == expected

    @pytest.mark.parametrize("recipe", [None, "w8a8g8"])
    def test_mobilenet_v2_by_hand(self, recipe: str | None) -> None:
        """Depthwise convolutions count one channel each: outputs x kernel x channels in the group."""
        model, x = on_meta("mobilenetv2", image(224), 2)
        macs: list[int] = []

        def look(layer: nn.Module, _: Any, y: Tensor) -> None:
            macs.append(y.numel() * math.prod(layer.weight.shape[1:]))

        layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        hooks = [layer.register_forward_hook(look) for layer in layers]
        model(x)
        for hook in hooks:
            hook.remove()
        expected = 3 * sum(macs) - macs[0]
        if recipe is not None:
            lowbit.convert_(model, recipe)

        assert sum(by_product(metered(model, x))) == expected
        assert 299e6 < sum(macs) / 2 < 302e6  # the paper's 300 million

    @pytest.mark.parametrize("recipe", [None, "sbm8"])
    def test_gpt_by_hand(self, recipe: str | None) -> None:
        """Twelve d² a token and block, 2 T d for attention, and the head; three times."""
        d, blocks, batch, length, vocabulary = 128, 4, 2, 16, 50
        torch.manual_seed(0)
        model, x = models.build("gpt", TEXT), torch.randint(50, (batch, length))
        if recipe is not None:
            lowbit.convert_(model, recipe)

        forward = batch * length * (blocks * (12 * d * d + 2 * length * d) + d * vocabulary)
        assert by_product(metered(model, x, steps=2)) == [2 * forward] * 3

    def test_a_plain_lstm_by_hand(self) -> None:
        """4 H (I + H) for each token and layer, three times; the embedding looks up and multiplies nothing."""
        batch, length, embedding, width = 3, 16, 128, 256
        torch.manual_seed(0)
        model, x = models.build("lstm", TEXT), torch.randint(50, (batch, length))

        cells = 4 * width * (embedding + width) + 4 * width * (2 * width)
        forward = batch * length * (cells + width * 50)
        ledger = metered(model, x)
        assert by_product(ledger) == [forward] * 3
        assert "aten.embedding" in ledger.uncounted()

    def test_a_converted_lstm_by_hand(self) -> None:
        """The same, less the gradient of each layer's initial state, which nothing needs."""
        batch, length, embedding, width = 3, 16, 128, 256
        torch.manual_seed(0)
        model, x = models.build("lstm", TEXT), torch.randint(50, (batch, length))
        lowbit.convert_(model, "sbm8")

        cells = 4 * width * (embedding + width) + 4 * width * (2 * width)
        forward = batch * length * (cells + width * 50)
        unneeded = 2 * batch * 4 * width * width
        assert by_product(metered(model, x)) == [forward, forward - unneeded, forward]

    def test_attention_by_hand(self) -> None:
        """Queries x keys and shares x values: B H L S D each, and two gradients of each."""

        class Model(nn.Module):
            def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return F.scaled_dot_product_attention(q, k, v)

        q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))

        one = 2 * 3 * 5 * 7 * 8
        assert by_product(metered(Model(), q, k, v)) == [2 * one] * 3

    @pytest.mark.parametrize("recipe", [None, "sbm8"])
    @pytest.mark.parametrize(
        ("layer", "shape", "forward"),
        [
            (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 8), 2 * 6 * 36 * 2 * 9),
            (nn.Conv2d(4, 4, 3, groups=4, stride=2, padding=1), (2, 4, 8, 8), 2 * 4 * 16 * 9),
            (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 8, 8), 2 * 6 * 64 * 4 * 9),
            (nn.Conv1d(4, 6, 3), (2, 4, 8), 2 * 6 * 6 * 4 * 3),
            (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), 3 * 27 * 2 * 8),
            (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), (2, 4, 8, 8), 2 * 4 * 64 * 3 * 9),
            (nn.Linear(4, 6), (2, 3, 5, 4), 2 * 3 * 5 * 4 * 6),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
    )
    def test_single_layers_by_hand(self, layer: nn.Module, shape: tuple[int, ...], forward: int, recipe: str) -> None:
        """Each kind of layer has its formula, and no grad_input where the input needs none."""
        model = nn.Sequential(copy.deepcopy(layer))
        if recipe is not None:
            lowbit.convert_(model, recipe)

        assert by_product(metered(model, torch.randn(shape, requires_grad=True))) == [forward] * 3
        assert by_product(metered(model, torch.randn(shape))) == [forward, 0, forward]

    @pytest.mark.parametrize(
        ("call", "macs"),
        [
            (lambda x, w: x @ w, 5 * 4 * 7),
            (lambda x, w: torch.einsum("bi,io->bo", x, w), 5 * 4 * 7),
            (lambda x, w: x.unsqueeze(0) @ w, 5 * 4 * 7),
            (lambda x, w: torch.baddbmm(x.new_zeros(1), x[None], w[None]), 5 * 4 * 7),
            (lambda x, w: x @ w[:, 0], 5 * 4),
            (lambda x, w: torch.dot(x[0], w[:, 0]), 4),
            (lambda x, w: torch.addr(x.new_zeros(4, 7), x[0], w[0]), 4 * 7),
        ],
    )
    def test_functional_products_by_hand(self, call: Callable[[Tensor, Tensor], Tensor], macs: int) -> None:
        """Products that no layer computes are counted under the module that calls them, in all three terms."""

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.randn(4, 7))

            def forward(self, x: Tensor) -> Tensor:
                return call(x, self.w)

        ledger = metered(Model(), torch.randn(5, 4, requires_grad=True))

        assert counts(ledger) == {("", product): macs for product in PRODUCTS}
        assert {t.product.engine for t in ledger.totals()} == {PLAIN}


@pytest.mark.parametrize(
    ("oracle", "name", "size", "classes"),
    [
        ("cifar100_resnet_38", "resnet38", 32, 100),
        ("cifar100_resnet_74", "resnet74", 32, 100),
        ("cifar100_resnet_110", "resnet110", 32, 100),
        ("resnet18", "resnet18", 224, 1000),
    ],
)
def test_macs_of_each_layer_of_the_authors_models(oracle: str, name: str, size: int, classes: int) -> None:
    """Every layer of CPT's networks has the MACs that its authors' code gives, in the same order."""
    path = ORACLES / "dynamic" / "cost_macs_gbitops.json"
    if not path.exists():
        pytest.skip(f"the reference vectors {path} are not here")
    expected = [layer["macs"] for layer in json.loads(path.read_text())["mac_counts"][oracle]["layers"]]
    model, x = on_meta(name, image(size, classes), 1)
    lowbit.convert_(model, "w8a8g8")

    ledger = metered(model, x)
    found = [total.macs for total in ledger.totals() if total.product.product == "output"]
    assert sorted(found) == sorted(expected)
    assert (found[0], found[-1]) == (expected[0], expected[-1])


NETWORKS = ["resnet_38", "resnet_74", "resnet_110", "resnet_152", "mobilenet_v2"]


@pytest.mark.parametrize("oracle", [*(f"cifar100_{name}" for name in NETWORKS), "resnet18", "resnet34", "resnet50"])
def test_macs_of_every_layer_of_the_authors_lists(oracle: str) -> None:
    """Each layer of the authors' lists, made as it is listed, has the MACs that they give."""
    path = ORACLES / "dynamic" / "cost_macs_gbitops.json"
    if not path.exists():
        pytest.skip(f"the reference vectors {path} are not here")
    listed = json.loads(path.read_text())["mac_counts"][oracle]["layers"]

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Linear(e["cin"], e["cout"])
                if "Linear" in e["kind"]
                else nn.Conv2d(e["cin"], e["cout"], e["k"], e["s"], e["k"] // 2, groups=e["groups"])
                for e in listed
            )

        def forward(self, x: Tensor) -> Tensor:
            total = x.sum()
            for entry, layer in zip(listed, self.layers, strict=True):
                side = entry["hout"] * entry["s"] if isinstance(layer, nn.Conv2d) else 0
                total = total + layer(x.new_zeros((1, entry["cin"], side, side) if side else (1, entry["cin"]))).sum()
            return total

    with torch.device("meta"):
        model, x = Layers(), torch.zeros(1)
    lowbit.convert_(model, "w8a8g8", rules=[(nn.Linear, "w8a8g8")])

    ledger = metered(model, x)

    assert [t.macs for t in ledger.totals() if t.product.product == "output"] == [e["macs"] for e in listed]


class TestBits:
    """The widths of the moment."""

    def test_bits_are_those_of_each_step(self) -> None:
        """A change of bits between two steps gives two programs, each with its own widths."""
        model = mlp()
        lowbit.convert_(model, "w8a8g8", rules=[(nn.Linear, "w8a8g8")])
        x = torch.randn(4, 6)
        with lowbit.Meter(model) as meter:
            for bits in (8, 3, 8):
                model[0].site.bits.fill_(bits)
                model(x).sum().backward()
                meter.step()

        ran = [t for t in meter.ledger.totals() if t.product.layer == "0" and t.product.product == "output"]
        assert {t.product.bits: t.calls for t in ran} == {(8, 8): 2, (3, 3): 1}
        assert [s.program for s in meter.ledger.steps] == [0, 1, 0]

    def test_a_bifurcated_gradient_has_two_widths(self) -> None:
        """sbm8 has 8 bits in grad_input and 16 in grad_weight, and its first layer's absent one would have 8."""
        model = mlp()
        lowbit.convert_(model, "sbm8")

        ledger = metered(model, torch.randn(4, 6))
        bits = {(t.product.layer, t.product.product): t.product.bits for t in ledger.totals("as-charged")}
        assert bits["2", "grad_input"] == bits["0", "grad_input"] == (8, 8)
        assert bits["2", "grad_weight"] == (16, 8)
        assert ("0", "grad_input") not in counts(ledger)

    @pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.float64, 64), (torch.bfloat16, 16)])
    def test_plain_layers_have_the_width_of_their_dtype(self, dtype: torch.dtype, bits: int) -> None:
        """A plain layer in float32 is counted at 32 x 32."""
        ledger = metered(mlp().to(dtype), torch.randn(4, 6, dtype=dtype))

        assert {t.product.bits for t in ledger.totals("as-charged")} == {(bits, bits)}

    def test_autocast_narrows_plain_layers(self) -> None:
        """Under bf16 autocast a plain layer multiplies 16 bits, and a forward without it is another signature."""
        model, x = mlp(), torch.randn(4, 6)
        with lowbit.Meter(model) as meter:
            for on in (True, False):
                with torch.autocast("cpu", torch.bfloat16, enabled=on):
                    model(x).float().sum().backward()
                meter.step()

        assert {t.product.bits for t in meter.ledger.totals()} == {(16, 16), (32, 32)}


class TestWhatRan:
    """Only what ran is counted, and all of it."""

    @pytest.mark.parametrize("recipe", [None, "sbm8"])
    def test_later_steps_count_as_the_first(self, recipe: str | None) -> None:
        """The watched step and those that follow it give one program."""
        model = mlp()
        if recipe is not None:
            lowbit.convert_(model, recipe)

        ledger = metered(model, torch.randn(4, 6), steps=5)
        assert [s.program for s in ledger.steps] == [0] * 5
        assert [s.samples for s in ledger.steps] == [4] * 5
        assert by_product(ledger) == [5 * 180, 5 * 60, 5 * 180]

    @pytest.mark.parametrize("recipe", [None, "sbm8"])
    def test_another_shape_is_counted_anew(self, recipe: str | None) -> None:
        """A short last batch has its own counts, and the old shape keeps its."""
        model = mlp()
        if recipe is not None:
            lowbit.convert_(model, recipe)
        with lowbit.Meter(model) as meter:
            for batch in (4, 4, 3, 4):
                model(torch.randn(batch, 6)).sum().backward()
                meter.step()

        assert [s.program for s in meter.ledger.steps] == [0, 0, 1, 0]
        assert by_product(meter.ledger)[0] == 15 * 45

    @pytest.mark.parametrize("recipe", [None, "sbm8"])
    def test_a_branch_without_gradient_has_none(self, recipe: str | None) -> None:
        """A layer whose output the loss does not use counts its output only, in every step."""

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                self.unused(x)
                return self.used(x)

        model = Model()
        if recipe is not None:
            lowbit.convert_(model, recipe)

        found = counts(metered(model, torch.randn(2, 4), steps=3))
        assert found == {("used", "output"): 96, ("used", "grad_weight"): 96, ("unused", "output"): 96}

    @pytest.mark.parametrize("recipe", [None, "sbm8"])
    def test_a_frozen_weight_has_no_gradient(self, recipe: str | None) -> None:
        """A layer that is not trained has no grad_weight, and is not charged a grad_input."""
        model = mlp()
        model[0].requires_grad_(False)
        if recipe is not None:
            lowbit.convert_(model, recipe)

        ledger = metered(model, torch.randn(4, 6))
        assert by_product(ledger) == [180, 0, 60]
        assert not [t for t in ledger.totals("as-charged") if t.product.layer == "0" and t.product.product != "output"]

    @pytest.mark.parametrize("recipe", [None, "sbm8"])
    def test_a_layer_used_twice_counts_twice(self, recipe: str | None) -> None:
        """A shared layer has one name and the calls of both uses; its second use has a grad_input."""
        layer = nn.Linear(4, 4)
        model = nn.Sequential(layer, layer)
        if recipe is not None:
            lowbit.convert_(model, recipe)

        ledger = metered(model, torch.randn(2, 4))
        assert by_product(ledger, "0") == [64, 32, 64]
        charged = [t for t in ledger.totals("as-charged") if t.product.product == "grad_input"]
        assert sum(t.macs for t in charged) == 64

    def test_a_forward_without_backward_has_no_gradients(self) -> None:
        """A training forward alone counts outputs only, also after a step that had gradients."""
        model, x = mlp(), torch.randn(4, 6)
        with lowbit.Meter(model) as meter:
            model(x).sum().backward()
            meter.step()
            model(x)
            meter.step()

        assert by_product(meter.ledger) == [360, 60, 180]

    def test_accumulated_batches_are_one_step(self) -> None:
        """Two forwards and backwards before step() are one step of twice the samples."""
        model = mlp()
        with lowbit.Meter(model) as meter:
            for _ in range(2):
                model(torch.randn(4, 6)).sum().backward()
            meter.step()

        assert [s.samples for s in meter.ledger.steps] == [8]
        assert by_product(meter.ledger) == [360, 120, 360]

    def test_arguments_that_are_no_tensors_decide_too(self) -> None:
        """A size given as a number is part of the signature."""

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, rows: int) -> Tensor:
                y: Tensor = self.layer(torch.ones(rows, 4))
                return y

        model = Model()
        with lowbit.Meter(model) as meter:
            for rows in (3, 5):
                model(rows).sum().backward()
                meter.step()

        assert by_product(meter.ledger) == [8 * 16, 0, 8 * 16]

    def test_samples_can_be_told(self) -> None:
        """The caller's number of samples wins."""
        model = mlp()
        with lowbit.Meter(model) as meter:
            model(torch.randn(4, 6)).sum().backward()
            meter.step(samples=9)

        assert meter.ledger.samples == 9

    @pytest.mark.parametrize("recipe", [None, "sbm8"])
    def test_evaluation_is_apart(self, recipe: str | None) -> None:
        """What runs in evaluation mode is an evaluation with its score and in no step."""
        model = mlp()
        if recipe is not None:
            lowbit.convert_(model, recipe)
        with lowbit.Meter(model) as meter:
            model(torch.randn(4, 6)).sum().backward()
            meter.step()
            model.eval()
            with torch.no_grad():
                model(torch.randn(7, 6))
            meter.evaluated("accuracy", 0.5)
            model.train()
            model(torch.randn(4, 6)).sum().backward()

        (evaluation,) = meter.ledger.evaluations
        assert (evaluation.step, evaluation.samples, evaluation.score) == (1, 7, 0.5)
        assert sum(t.macs for t in meter.ledger.totals(evaluations=True)) == 7 * 45
        assert by_product(meter.ledger)[0] == 2 * 180

    def test_an_open_step_ends_with_the_meter(self) -> None:
        """One step needs no step()."""
        model = mlp()
        with lowbit.Meter(model) as meter:
            model(torch.randn(4, 6)).sum().backward()

        assert len(meter.ledger.steps) == 1

    def test_what_was_not_counted_is_listed(self) -> None:
        """Operators without products are listed by name with their calls, also those that multiply inside."""
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.ReLU())

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.bilinear = model, nn.Bilinear(4, 4, 2)

            def forward(self, x: Tensor) -> Tensor:
                y = self.body(x)
                return self.bilinear(y, y)

        uncounted = metered(Model(), torch.randn(5, 4), steps=2).uncounted()
        assert uncounted["aten.relu"] == 4
        assert uncounted["aten.native_batch_norm"] == 2
        assert any("(multiplies)" in op for op in uncounted)

    def test_a_layer_that_never_ran_is_named(self) -> None:
        """The ledger knows the layers of the model, and which of them no step used."""
        model = mlp()
        model.add_module("idle", nn.Identity())
        model.idle.never = nn.Linear(2, 2)

        assert metered(model, torch.randn(4, 6)).never_ran() == ["idle.never"]

    def test_layers_converted_later_are_found(self) -> None:
        """A conversion between two steps counts each layer once, under the same name."""
        model, x = mlp(), torch.randn(4, 6)
        with lowbit.Meter(model) as meter:
            model(x).sum().backward()
            meter.step()
            lowbit.convert_(model, "sbm8", engine="reference")
            model(x).sum().backward()
            meter.step()

        assert by_product(meter.ledger) == [360, 120, 360]
        assert {t.product.engine for t in meter.ledger.totals()} == {PLAIN, "reference"}

    def test_another_model_is_not_counted(self) -> None:
        """Products of a model that is not metered, a copy too, are not in the ledger."""
        model, x = mlp(), torch.randn(4, 6)
        lowbit.convert_(model, "sbm8")
        with lowbit.Meter(model) as meter:
            other = copy.deepcopy(model)
            model(x).sum().backward()
            other(x).sum().backward()

        assert by_product(meter.ledger) == [180, 60, 180]

    @pytest.mark.parametrize("output", [lambda y: {"y": y}, lambda y: (None, [y]), Opaque])
    def test_outputs_of_any_kind(self, output: Callable[[Tensor], Any]) -> None:
        """The backward is seen whatever the model's output is wrapped in, in every step."""

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Any:
                self.kept = self.layer(x)
                return output(self.kept)

        model = Model()
        with lowbit.Meter(model) as meter:
            for _ in range(3):
                model(torch.randn(2, 4))
                model.kept.sum().backward()
                meter.step()

        assert by_product(meter.ledger) == [96, 0, 96]

    def test_recomputed_layers_count_what_ran(self) -> None:
        """Gradient checkpointing runs the outputs of converted layers twice."""
        model = nn.Sequential(mlp(), nn.Linear(3, 3))
        lowbit.convert_(model, "sbm8")
        inner = model[0]
        forward = inner.forward
        inner.forward = lambda x: checkpoint(forward, x, use_reentrant=False)

        assert by_product(metered(model, torch.randn(4, 6, requires_grad=True)))[0] == 2 * 180 + 36


class TestHeld:
    """Bytes held for the backward."""

    def test_a_linear_layer_holds_its_input(self) -> None:
        """A plain linear layer and a ReLU keep the batch and one activation; weights are not counted."""
        ledger = metered(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), torch.randn(4, 6))

        assert ledger.held_bytes == 4 * (4 * 6 + 4 * 5)

    def test_without_gradients_nothing_is_held(self) -> None:
        """A forward without gradients leaves nothing."""
        model = mlp()
        with lowbit.Meter(model) as meter, torch.no_grad():
            model(torch.randn(4, 6))

        assert meter.ledger.held_bytes == 0

    def test_checkpointing_holds_less(self) -> None:
        """What is computed again is not held."""
        deep = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)))

        class Checkpointed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.deep = deep

            def forward(self, x: Tensor) -> Tensor:
                return checkpoint(self.deep, x, use_reentrant=False)

        x = torch.randn(4, 8)
        whole, less = metered(deep, x).held_bytes, metered(Checkpointed(), x).held_bytes
        assert whole is not None
        assert less is not None
        assert less < whole / 3


class TestTheRunIsLeftAlone:
    """A meter changes nothing and leaves nothing behind."""

    @pytest.mark.parametrize("recipe", [None, "sbm8"])
    def test_gradients_are_the_same_with_and_without(self, recipe: str | None) -> None:
        """Watching and counting change no bit of any gradient."""
        x = torch.randn(4, 3, 8, 8)

        def gradients(with_meter: bool) -> list[Tensor]:
            torch.manual_seed(1)
            model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten())
            model.append(nn.Linear(144, 3))
            if recipe is not None:
                lowbit.convert_(model, recipe)
            meter = lowbit.Meter(model)
            if with_meter:
                meter.attach()
            for _ in range(2):
                model(x).square().sum().backward()
            if with_meter:
                meter.close()
            return [p.grad.clone() for p in model.parameters() if p.grad is not None]

        assert all(map(torch.equal, gradients(True), gradients(False)))

    def test_nothing_stays_after_an_exception_in_forward(self) -> None:
        """A forward that raises leaves no mode and no hook, is no step, and the next one is counted."""
        model = mlp()
        with lowbit.Meter(model) as meter:
            with pytest.raises(RuntimeError, match="shapes"):
                model(torch.randn(4, 7))
            assert _get_current_dispatch_mode() is None
            model(torch.randn(4, 6)).sum().backward()
            meter.step()

        assert by_product(meter.ledger) == [180, 60, 180]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not watch.counters

    def test_what_raised_is_no_step(self) -> None:
        """An exception out of the context drops the step that it interrupted."""
        model = mlp()
        meter = lowbit.Meter(model)

        def interrupted() -> None:
            with meter:
                model(torch.randn(4, 6)).sum().backward()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            interrupted()
        assert meter.ledger.steps == []

    def test_an_interrupt_leaves_no_mode(self) -> None:
        """Ctrl-C inside a watched forward, which runs no hook, leaves no mode behind."""

        class Interrupting(nn.Module):
            def forward(self, _: Tensor) -> Tensor:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), lowbit.Meter(nn.Sequential(nn.Linear(2, 2), Interrupting())) as meter:
            meter._model(torch.randn(1, 2))

        assert _get_current_dispatch_mode() is None

    def test_two_meters_count_alike(self) -> None:
        """Meters in each other's context do not disturb each other."""
        model, x = mlp(), torch.randn(4, 6)
        with lowbit.Meter(model) as one, lowbit.Meter(model) as two:
            for _ in range(2):
                model(x).sum().backward()
                one.step()
                two.step()

        assert counts(one.ledger) == counts(two.ledger)
        assert by_product(one.ledger) == [360, 120, 360]

    def test_verify_and_meter_work_together(self) -> None:
        """A proof of a metered step sees what it saw without, and the meter too."""
        model = mlp()
        lowbit.convert_(model, "sbm8", rules=[("2", None)])
        with lowbit.Meter(model) as meter, lowbit.verify(model) as proof:
            model(torch.randn(4, 6)).sum().backward()

        assert by_product(meter.ledger) == [180, 60, 180]
        assert sum(row.macs for row in proof.rows) + sum(row.macs or 0 for row in proof.outside) == 420

    def test_a_metered_model_says_why_it_is_not_pickled(self) -> None:
        """Pickling a model with its hooks is refused in words; its state_dict is saved as ever."""
        model = mlp()
        with lowbit.Meter(model) as meter, pytest.raises(TypeError, match="close the meter first"):
            torch.save(model, io.BytesIO())
        torch.save(model.state_dict(), io.BytesIO())

        assert meter.ledger.steps == []

    def test_threads_lose_no_count(self) -> None:
        """Forwards of one converted model in several threads all count."""
        model, x = mlp(), torch.randn(4, 6)
        lowbit.convert_(model, "fp32")
        with lowbit.Meter(model) as meter:

            def run() -> None:
                for _ in range(20):
                    model(x).sum().backward()

            threads = [threading.Thread(target=run) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            meter.step()

        assert by_product(meter.ledger) == [80 * 180, 80 * 60, 80 * 180]

    def test_replicas_count_under_their_layers_names(self) -> None:
        """A shallow copy of a layer, as data parallelism makes, counts as the layer."""
        model, x = mlp(), torch.randn(4, 6)
        lowbit.convert_(model, "fp32")
        replica = copy.copy(model[0])
        replica.__dict__ = dict(model[0].__dict__) | {"_modules": {"site": copy.copy(model[0].site)}}
        with lowbit.Meter(model) as meter:
            model(x).sum().backward()
            replica(x).sum().backward()

        assert counts(meter.ledger)["0", "output"] == 2 * 120


class TestErrors:
    """What is refused."""

    def test_no_module(self) -> None:
        """A function cannot be metered."""
        with pytest.raises(UsageError, match="function"):
            lowbit.Meter(lambda x: x)

    def test_a_step_in_which_nothing_ran(self) -> None:
        """step() without a forward of the model says what to check."""
        with lowbit.Meter(mlp()) as meter, pytest.raises(UsageError, match="no product of this model ran"):
            meter.step()

    def test_a_meter_that_is_not_attached(self) -> None:
        """step() outside the context, and a second attach, are refused."""
        meter = lowbit.Meter(mlp())
        with pytest.raises(UsageError, match="not attached"):
            meter.step()
        with meter, pytest.raises(UsageError, match="attached already"):
            meter.attach()


def test_a_product_is_a_plain_record() -> None:
    """Everything in a record is a number, a text or a tuple of them, so that it can be written."""
    (total, *_) = metered(mlp(), torch.randn(4, 6)).totals()

    assert isinstance(total.product, Product)
    assert all(type(n) is int for n in (*total.product.input, total.product.macs))


def test_a_function_counts_in_the_model_that_calls_it() -> None:
    """A product of `lowbit.products` counts with its gradients where the model's forward ran it, and only there."""
    setting = Setting(recipe=lowbit.Recipe.from_name("bf16"), layer="free")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight, setting=setting)

    model, apart = Model(), torch.randn(6, 4)
    with lowbit.Meter(model) as meter:
        functional.linear(apart, apart, setting=setting)
        model(torch.randn(5, 4)).sum().backward()
        meter.step()

    assert counts(meter.ledger) == {("free", "output"): 60, ("free", "grad_weight"): 60}


@pytest.mark.skipif(bool(int8.missing("int8")), reason="this machine lacks 8-bit units")
def test_watching_leaves_a_fused_pass_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watched forward runs a Range BN and its ReLU in one pass, like every other, and lists nothing of it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    lowbit.convert_(model, "sbm8", engine="int8")
    rectified: list[bool] = []
    original = cpu.normalize
    monkeypatch.setattr(cpu, "normalize", lambda *a, **k: (rectified.append(k["rectify"]), original(*a, **k))[1])

    ledger = metered(model, torch.randn(2, 3, 6, 6), steps=2)

    assert rectified == [True, True]
    assert ledger.uncounted() == {}


def test_watching_leaves_torchs_fast_path() -> None:
    """A plain encoder layer in evaluation takes its fast path in the watched forward too."""
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    lowbit.convert_(model, "sbm8-hoffer", rules=[(re.compile("1.*"), None)], strict=False)

    with lowbit.Meter(model) as meter, torch.no_grad():
        model(torch.randn(2, 5, 8))
        meter.evaluated("score", 0.0)

    (program,) = meter.ledger.programs
    assert "aten._transformer_encoder_layer_fwd (multiplies)" in dict(program.uncounted)
