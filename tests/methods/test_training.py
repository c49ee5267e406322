"""Every recipe trains: digits with a small network, bytes with a tiny GPT, on what this machine executes."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lowbit
from lowbit.precision.controller import PrecisionController
from lowbit.train.models.mlp import MLP
from lowbit.train.models.transformer import GPT

RECIPES = [name.replace("wXaYgZ", "w6a6g8") for name in lowbit.recipes()]
STEPS, BATCH = 32, 64
# Four epochs of eight steps for what follows the loss, and cycles that fit into them.
SETTINGS: dict[str, dict[str, Any]] = {"cpt": {"cycles": 2}, "cpt-int8": {"cycles": 2}}
TEXT = "In the beginning was the plain loop, and the loop was with the user, and the loop stayed as it was. " * 40


@dataclass(frozen=True, kw_only=True)
class Work:
    """A model, the pattern of its repeated blocks, its rate, and how much of the first loss may be left.

    Recipes that say how momentum is rounded train with momentum, at a rate of their own.
    """

    model: nn.Module
    blocks: str
    rate: float
    left: float
    momentum_rate: float


def work(name: str) -> Work:
    """The same weights at each call."""
    torch.manual_seed(0)
    if name == "digits":
        return Work(
            model=MLP(inputs=64, classes=10, width=64), blocks=r"hidden\.[12]", rate=1e-2, left=0.8, momentum_rate=0.8
        )
    model = GPT(vocabulary=128, d=16, layers=2, heads=2, context=32)
    return Work(model=model, blocks=r"blocks\.\d+", rate=2e-2, left=0.85, momentum_rate=0.1)


@cache
def samples(name: str) -> tuple[Tensor, Tensor]:
    """Inputs and labels."""
    if name == "digits":
        digits = load_digits()
        return torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    codes = torch.tensor(list(TEXT.encode()))
    windows = codes.unfold(0, 33, 3)
    return windows[:, :-1], windows[:, 1:]


def batches(name: str, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a run from a step on."""
    x, y = samples(name)
    for step in range(start, STEPS):
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[
            : BATCH if name == "digits" else 8
        ]
        yield x[chosen], y[chosen]


class Run:
    """A converted model with what a user's loop has around it."""

    def __init__(self, recipe: str, name: str) -> None:
        given = work(name)
        self.name, self.given, self.model = name, given, given.model
        self.recipe = lowbit.Recipe.find(recipe)
        if recipe in SETTINGS:
            self.recipe = self.recipe.tuned(**SETTINGS[recipe])
        self.report = lowbit.convert_(self.model, self.recipe, seed=1)
        self.bits: PrecisionController | None = None
        if self.recipe.is_dynamic:
            blocks = [re.compile(given.blocks)] if self.recipe.gates is not None else []
            self.bits = PrecisionController.from_recipe(
                self.model, total_steps=STEPS, steps_per_epoch=STEPS // 4, blocks=blocks
            )
        gates = [] if self.bits is None or self.bits.gates is None else list(self.bits.gates.parameters())
        plain: torch.optim.Optimizer = torch.optim.AdamW([*self.model.parameters(), *gates], lr=given.rate)
        if self.recipe.update is not None and self.recipe.update.states:  # those of momentum
            plain = torch.optim.SGD(self.model.parameters(), lr=given.momentum_rate, momentum=0.25)
        self.optimizer = lowbit.optim.from_recipe(self.model, plain) if self.recipe.update else plain
        self.scaler = lowbit.amp.GradScaler.from_recipe(self.model)

    def step(self, x: Tensor, y: Tensor) -> float:
        """One step, and its loss."""
        with lowbit.amp.autocast(self.model):
            loss = F.cross_entropy(self.model(x).flatten(0, -2), y.flatten())
        penalty = 0.0 if self.bits is None or self.bits.gates is None else self.bits.gates.penalty()
        self.scaler.scale(loss + penalty).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.bits is not None:
            self.bits.step(loss.detach())
        return loss.item()

    def train(self, start: int = 0, stop: int = STEPS) -> list[float]:
        """The losses of some steps."""
        return [self.step(*batch) for _, batch in zip(range(start, stop), batches(self.name, start), strict=False)]

    def state(self) -> dict[str, Any]:
        """All that a run is."""
        return {
            "model": self.model.state_dict(),
            "lowbit": lowbit.state_dict(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "bits": None if self.bits is None else self.bits.state_dict(),
            "gates": None if self.bits is None or self.bits.gates is None else self.bits.gates.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.model.load_state_dict(state["model"])
        lowbit.load_state_dict(self.model, state["lowbit"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.bits is not None:
            self.bits.load_state_dict(state["bits"])
            if self.bits.gates is not None:
                self.bits.gates.load_state_dict(state["gates"])


@pytest.mark.parametrize("name", ["digits", "gpt"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_resumes_and_goes_back(recipe: str, name: str) -> None:
    """The loss falls, another model goes on from a saved state bit for bit, and restore_ gives the plain model."""
    run = Run(recipe, name)
    losses = run.train(stop=STEPS // 2)
    saved = _copied(run.state())
    losses += run.train(start=STEPS // 2)
    resumed = Run(recipe, name)
    resumed.load(saved)
    tail = resumed.train(start=STEPS // 2)

    assert sum(losses[-4:]) < run.given.left * sum(losses[:4])
    assert tail == losses[STEPS // 2 :]
    for key, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[key]), key
    x, _ = next(batches(name))
    lowbit.restore_(run.model)
    plain = work(name).model
    plain.load_state_dict(run.model.state_dict())
    assert torch.equal(run.model(x), plain(x))


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["digits", "gpt"])
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "fp32"])
def test_verify_shows_the_bits_that_a_recipe_asks_for(recipe: str, name: str) -> None:
    """Each operand of each product has the width of its format at that moment, and is not in full precision."""
    run = Run(recipe, name)
    x, y = next(batches(name))
    with lowbit.verify(run.model) as proof:
        run.step(x, y)

    asked = {(product, operand): fmt.bits for product, operand, fmt in run.recipe.operands()}
    shown = {(row.product, operand): found.bits for row in proof.rows for operand, found in row.operands.items()}
    assert shown
    assert min(shown.values()) < 32
    if not run.recipe.is_dynamic:
        assert shown == {place: asked[place] for place in shown}
