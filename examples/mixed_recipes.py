"""Rules: different recipes for different layers, and state that resumes exactly.

Run: python examples/mixed_recipes.py
"""

import io
import re

import torch
import torch.nn.functional as F
from torch import nn

import lowbit


def build() -> nn.Module:
    """A small network, converted with rules; the first rule that matches a layer decides."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    report = lowbit.convert_(
        model,
        "w4a4g6",  # 4 bits forward, 6 bits backward
        rules=[("0", "sbm8"), (re.compile(r"[4-9]"), None)],
        seed=7,
    )
    print(report)
    return model


def step(model: nn.Module) -> torch.Tensor:
    """The gradient of one training step, stochastic rounding included."""
    x = torch.linspace(-1, 1, 16 * 32).reshape(16, 32)
    model.zero_grad()
    F.cross_entropy(model(x), torch.arange(16) % 4).backward()
    gradient = next(model.parameters()).grad
    assert gradient is not None
    return gradient.clone()


model = build()
step(model)
file = io.BytesIO()
torch.save({"model": model.state_dict(), "lowbit": lowbit.state_dict(model)}, file)
expected = step(model)

file.seek(0)
saved = torch.load(file, weights_only=True)
again = build()
again.load_state_dict(saved["model"])
lowbit.load_state_dict(again, saved["lowbit"])
print("the resumed step is bit-identical:", torch.equal(step(again), expected))
