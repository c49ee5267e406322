"""AdamW with states in 8 bits: the same loss, a quarter of the memory, and a resume that is exact.

Run: python examples/low_bit_optimizer.py
"""

import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import lowbit
from lowbit.evidence.memory import step_memory

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)


def network(states: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small network and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, lowbit.optim.LowBitOptimizer(adamw, states=states, rounding="stochastic")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> float:
    """Some steps on batches that their numbers fix; the last loss."""
    for step in steps:
        batch = torch.arange(64 * step, 64 * (step + 1)) % len(labels)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


for states in ("fp32", "int8", "dynamic8"):
    model, optimizer = network(states)
    print(f"{states}: loss {train(model, optimizer, range(100)):.3f} after 100 steps")

model, optimizer = network("dynamic8")
train(model, optimizer, range(50))
saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
train(model, optimizer, range(50, 60))

resumed, fresh = network("dynamic8")
resumed.load_state_dict(saved[0])
fresh.load_state_dict(saved[1])
train(resumed, fresh, range(50, 60))
same = all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
print("resumed bit for bit:", same)
print(step_memory(resumed, fresh, lambda: train(resumed, fresh, range(1))))
