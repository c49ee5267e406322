"""What is observed is what runs: a step is bit for bit the same with and without anybody looking on."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import PrecisionController, Recipe
from lowbit.engines import int8
from lowbit.engines.choice import refusals
from lowbit.nn.gate import Gates
from lowbit.nn.layers import QuantLayer
from lowbit.products import watch
from lowbit.products.operators import Convolution, Linear

Observer = Callable[[nn.Module], AbstractContextManager[Any]]


class Block(nn.Module):
    """A grouped, strided convolution and a transposed one, with normalisation and without."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.fused = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 8, 8, 8)`` to the same."""
        y: Tensor = self.norm(self.up(self.fused(self.down(x))))
        return y + x


class Everything(nn.Module):
    """A layer of each kind, converted or not: ``(B, 3, 8, 8)`` to ``(B, 5)``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Block(), Block())
        self.rows = nn.LSTM(64, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.plain = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Image, rows of channels, attention over them, and a head."""
        x = self.blocks(self.stem(x)).flatten(2)
        x = self.rows(x)[0]
        x = self.plain(x + self.attention(x, x, x, need_weights=False)[0])
        y: Tensor = self.head(x.mean(1))
        return y


def _converted(recipe: str, engine: str) -> tuple[nn.Module, PrecisionController | None]:
    """The network in a recipe, with a controller where its bits change.

    Where the int8 engine runs only the linear layers of a recipe, the others are left to the reference engine.
    """
    torch.manual_seed(0)
    place = Convolution(stride=(1, 1), padding=(0, 0), dilation=(1, 1))
    if engine == "int8" and refusals(place, Recipe.from_name(recipe), dim=4):
        engine = "auto"
    model = Everything()
    lowbit.convert_(model, recipe, engine=engine, rules=[(re.compile(r"plain\..*"), None)], strict=False)
    known = Recipe.from_name(recipe)
    if not known.is_dynamic:
        return model, None
    blocks = ["blocks.0", "blocks.1"] if known.gates is not None else []
    return model, PrecisionController.from_recipe(model, total_steps=64, blocks=blocks, steps_per_epoch=4)


def _batch(number: int) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(number))


def _step(model: nn.Module, gates: Gates | None, number: int) -> dict[str, Tensor]:
    """Everything that a training step computes or changes."""
    x = _batch(number).requires_grad_()
    model.zero_grad()
    with lowbit.amp.autocast(model):
        y = model(x)
    (y.square().mean() + (0 if gates is None else gates.penalty())).backward()
    assert x.grad is not None
    found = {"output": y.detach(), "grad_input": x.grad}
    found |= {f"grad of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found |= {f"buffer {name}": b.clone() for name, b in model.named_buffers()}
    for name, layer in model.named_modules():
        for site in layer.sites() if isinstance(layer, QuantLayer) else []:
            found[f"uses of {name} {site.name}"] = torch.tensor(site.uses)
            found[f"step of {name} {site.name}"] = site.clock.step
            found[f"range of {name} {site.name}"] = site.running_range.clone()
    return found


@contextmanager
def _probed(model: nn.Module) -> Iterator[None]:
    """A probe before the step; it must leave the model, and everybody's random numbers, as they were."""
    recipes = [m.sites()[0].recipe for m in model.modules() if isinstance(m, QuantLayer)]
    if not any(fmt.has_width for recipe in recipes for _, _, fmt in recipe.operands()):
        pytest.skip("a probe tries bits, and these formats have one width each")
    lowbit.probe(model, [_batch(9)], lambda m, x: m(x).square().mean(), bits=(4,))
    yield


@contextmanager
def _metered(model: nn.Module) -> Iterator[None]:
    with lowbit.Meter(model) as meter:
        yield
        meter.step()


@contextmanager
def _tensor_hooks(_: nn.Module) -> Iterator[None]:
    """Hooks on every tensor that autograd saves."""

    def seen(x: Tensor) -> Tensor:
        return x

    with torch.autograd.graph.saved_tensors_hooks(seen, seen):
        yield


@contextmanager
def _module_hooks(model: nn.Module) -> Iterator[None]:
    """Hooks on every module that look at its result and at the gradient of it."""

    def look(_m: nn.Module, _a: Any, result: Any) -> None:
        for y in result if isinstance(result, tuple) else (result,):
            if isinstance(y, Tensor) and y.requires_grad:
                y.register_hook(lambda _: None)

    handles = [module.register_forward_hook(look) for module in model.modules()]
    yield
    for handle in handles:
        handle.remove()


OBSERVERS: dict[str, Observer] = {
    "verify": lowbit.verify,
    "probe": _probed,
    "Meter": _metered,
    "tripwire": lambda _: lowbit.tripwire(),
    "tensor hooks": _tensor_hooks,
    "module hooks": _module_hooks,
}
NAMES = [name if name != "wXaYgZ" else "w4a6g8" for name in lowbit.recipes()]
ON_UNITS = [name for name in NAMES if not refusals(Linear(), Recipe.from_name(name))]
RUNS = [(name, "reference") for name in NAMES] + [(name, "int8") for name in ON_UNITS]


def _after_a_step(recipe: str, engine: str) -> tuple[nn.Module, Gates | None]:
    """The network after one training step, and its gates."""
    model, controller = _converted(recipe, engine)
    gates = None if controller is None else controller.gates
    first = _step(model, gates, 0)
    if controller is not None:
        controller.step(float(first["output"].square().mean()))
    return model, gates


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def run(request: pytest.FixtureRequest) -> tuple[str, str, dict[str, Tensor]]:
    """Recipe, engine, and what the second step gives when nobody looks on."""
    recipe, engine = request.param
    return recipe, engine, _step(*_after_a_step(recipe, engine), 1)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_step_is_the_same_under_observation(run: tuple[str, str, dict[str, Tensor]], observer: str) -> None:
    """Outputs, gradients, ranges, statistics and noise of a step are bit for bit those of the step nobody saw."""
    recipe, engine, alone = run
    model, gates = _after_a_step(recipe, engine)

    with OBSERVERS[observer](model):
        watched = _step(model, gates, 1)

    assert watched.keys() == alone.keys()
    assert [name for name in alone if not torch.equal(alone[name], watched[name])] == []
    assert not watch.is_observed()


@pytest.mark.skipif(bool(int8.missing("int8") or int8.missing("bf16")), reason="this machine lacks the units")
def test_the_int8_engine_is_among_what_is_observed() -> None:
    """The recipes that run on 8-bit and 16-bit units are tested there."""
    assert {
        "amp-bf16",
        "bf16",
        "cpt-int8",
        "fallback8",
        "int8",
        "jetfire",
        "mxint8",
        "sbm8",
        "sparse",
        "switchback",
        "ufp4",
    } <= set(ON_UNITS)
    assert not {"amp-fp16", "fp32", "cpt", "sbm8-cpt", "mxfp4", "nvfp4"} & set(ON_UNITS)
