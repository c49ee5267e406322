"""What 8-bit optimiser states cost: a step of AdamW as it is and with its states as codes.

    python benchmarks/optimizers.py --threads 1

An MLP of 10.0 M parameters with fixed gradients; `torch.optim.AdamW` alone, and inside `LowBitOptimizer` with each code
book and rounding, in paired rounds, for each of torch's implementations.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowbit import machine
from lowbit.optim import LowBitOptimizer
from lowbit.tables import text_table

IMPLEMENTATIONS: dict[str, dict[str, Any]] = {"foreach": {"foreach": True}, "fused": {"fused": True}}
STATES = ("int8", "dynamic8")
ROUNDINGS = ("nearest", "stochastic")


def network() -> nn.Module:
    """An MLP of 10.0 M parameters, each with a gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 3072), nn.ReLU(), nn.Linear(3072, 2048), nn.ReLU(), nn.Linear(2048, 256))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def steps(options: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """A step of the plain optimiser and of each wrapped one, each with a network of its own."""

    def adamw() -> torch.optim.Optimizer:
        return torch.optim.AdamW(network().parameters(), **options)

    found: dict[str, Callable[[], object]] = {"float32": adamw().step}
    for states in STATES:
        for rounding in ROUNDINGS:
            found[f"{states}, {rounding}"] = LowBitOptimizer(adamw(), states=states, rounding=rounding).step
    return found


def main() -> None:
    """Print the machine and one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(machine.here())
    rows = []
    for name, options in IMPLEMENTATIONS.items():
        seconds = machine.paired(steps(options), asked.rounds)
        for states, taken in seconds.items():
            times = f"{machine.ratio(taken, seconds['float32']):.2f}"
            rows.append([name, states, f"{1e3 * statistics.median(taken):.1f}", times])
    print(text_table(["AdamW", "states", "median ms", "times float32"], rows))


if __name__ == "__main__":
    main()
