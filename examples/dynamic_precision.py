"""Precision as a schedule in your own loop: a range test, CPT's cycles, and FracTrain's gates.

Run: python examples/dynamic_precision.py
"""

import re

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import lowbit

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
STEPS, BATCH = 60, 64


def network() -> nn.Sequential:
    """A stem, two blocks of the same kind, and a head."""
    blocks = [nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(2)]
    stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(stem, nn.Sequential(*blocks), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Random digits of the first 1,437."""
    index = torch.randint(1437, (BATCH,))
    return images[index], labels[index]


def accuracy(model: nn.Module) -> float:
    """The accuracy on the remaining digits, at the highest bits."""
    model.eval()
    right = (model(images[1437:]).argmax(1) == labels[1437:]).float().mean().item()
    model.train()
    return right


# Which precision makes progress? The test trains a separate model.
model = network()
lowbit.convert_(model, "sbm8-cpt")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def training_accuracy() -> float:
    """One training step at the width that the test has set."""
    x, y = batch()
    logits = model(x)
    optimizer.zero_grad()
    F.cross_entropy(logits, y).backward()
    optimizer.step()
    return (logits.argmax(1) == y).float().mean().item()


found = lowbit.range_test(model, training_accuracy, low=2, high=8, steps_per_bit=20)
print(found)

# CPT from there: bits of inputs and weights swing, gradients stay at 8.
model = network()
lowbit.convert_(model, "sbm8-cpt")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
cycles = lowbit.schedules.Cyclic(low=found.bits, high=8, cycles=3, total_steps=STEPS)
bits = lowbit.PrecisionController(model, forward=cycles, backward=8)
print(bits)
for _ in range(STEPS):
    x, y = batch()
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    bits.step(loss)
print(f"cpt: accuracy {accuracy(model):.3f}, {lowbit.schedules.saving(cycles):.0f} % of bit operations saved\n")

# FracTrain: gates choose bits for each block and sample; their parameters train with the model's.
model = network()
lowbit.convert_(model, "fractrain")
bits = lowbit.PrecisionController.from_recipe(
    model, total_steps=STEPS, steps_per_epoch=6, blocks=[re.compile(r"1\.\d")]
)
assert bits.gates is not None
optimizer = torch.optim.SGD([*model.parameters(), *bits.gates.parameters()], lr=0.1, momentum=0.9)
for step in range(STEPS):
    x, y = batch()
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    (loss + bits.gates.penalty()).backward()
    optimizer.step()
    bits.step(loss)
    if step % 20 == 19:
        print(f"step {step + 1}: cost {bits.gates.cost:.2f} % of full precision, target {bits.gates.target} %")
print(f"fractrain: accuracy {accuracy(model):.3f}; samples by choice {bits.gates.choices} in each block:")
print(bits.gates.histogram())
