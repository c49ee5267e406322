"""What the tests of gates share: a small network with gates."""

import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit import PrecisionController
from lowbit.methods.recipe import Recipe
from lowbit.nn.gate import Gates
from lowbit.products import watch

CHOICES = ((3, 6), (4, 8), (8, 8))
BLOCKS = [re.compile(r"blocks\.\d")]


class Residual(nn.Module):
    """Two convolutions with a shortcut, which may change the shape."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W)."""
        y: Tensor = self.conv2(F.relu(self.norm(self.conv1(x)))) + self.shortcut(x)
        return y


class Network(nn.Module):
    """A stem, blocks and a head."""

    def __init__(self, block: type[nn.Module] = Residual) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.Sequential(block(4, 4), block(4, 6), block(6, 6))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, H, W) to (B, 5)."""
        y: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return y


def gated(
    *, choices: Any = CHOICES, seed: int = 0, total_steps: int = 100, **changes: Any
) -> tuple[nn.Module, PrecisionController, Gates]:
    """The network in dfq with gates."""
    torch.manual_seed(seed)
    model = Network()
    recipe = Recipe.from_name("dfq").tuned(choices=choices, **changes)
    lowbit.convert_(model, recipe, seed=seed)
    controller = PrecisionController.from_recipe(model, total_steps=total_steps, blocks=BLOCKS, steps_per_epoch=2)
    assert controller.gates is not None
    return model, controller, controller.gates


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a run, the same each time."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        yield torch.randn(6, 1, 4, 4, generator=generator), torch.randint(5, (6,), generator=generator)


X = next(batches(1))[0]


def calls_of(run: Any) -> list[watch.ProductCall]:
    """Every product of a converted layer that runs."""
    seen: list[watch.ProductCall] = []
    with watch.counted_by(seen.append):
        run()
    return seen


def force(gates: Gates, choices: list[list[int]]) -> None:
    """Make the gates choose, by block and sample."""
    decided = iter(choices)

    def decide(index: int, _: Tensor) -> Tensor:
        mask = F.one_hot(torch.tensor(next(decided)), len(gates.choices)).float().requires_grad_()
        gates._now.masks[index] = mask
        return mask

    gates._decide = decide


def train(model: nn.Module, controller: PrecisionController, steps: int, *, skip: int, optimizer: Any) -> None:
    """Train from batch `skip` to batch `steps`."""
    assert controller.gates is not None
    for x, y in list(batches(steps))[skip:]:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        (loss + controller.gates.penalty()).backward()
        optimizer.step()
        controller.step(loss)
