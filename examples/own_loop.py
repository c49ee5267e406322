"""Your own training loop in 8 bits: one line converts the model, one context proves what ran.

Run: python examples/own_loop.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import lowbit

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)
)
print(lowbit.convert_(model, "sbm8"))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def step(x: torch.Tensor, y: torch.Tensor) -> float:
    """One training step, which returns the loss."""
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


with lowbit.verify(model) as proof:
    step(images[:64], labels[:64])
print(proof)

for epoch in range(3):
    for first in range(0, 1437, 64):
        loss = step(images[first : first + 64], labels[first : first + 64])
    print(f"epoch {epoch + 1}: loss {loss:.3f}")

model.eval()
right = (model(images[1437:]).argmax(1) == labels[1437:]).float().mean()
lowbit.restore_(model)  # a plain model again, the same parameters
plain = (model(images[1437:]).argmax(1) == labels[1437:]).float().mean()
print(f"test accuracy in 8 bits {right:.3f}, of the restored plain model {plain:.3f}")
