"""What each part of the fast way gives: autocast, memory format and conversion, on a network written without any.

    python benchmarks/fast_way.py

ResNet-18 of `demo_net.py` in contiguous memory, pictures of 1×28×28, batch 64; a training step of SGD in paired rounds.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from demo_net import ResNet18
from torch import Tensor

import lowbit
from lowbit import machine
from lowbit.tables import text_table

# The recipe, whether the forward runs in bf16 autocast, and whether model and pictures are channels last.
WAYS: dict[str, tuple[str | None, bool, bool]] = {
    "as written": (None, False, False),
    "channels_last": (None, False, True),
    "bf16 autocast": (None, True, False),
    "bf16 autocast, channels_last": (None, True, True),
    "int8": ("int8", False, False),
    "int8 in bf16 autocast": ("int8", True, False),
    "int8 in bf16 autocast, channels_last": ("int8", True, True),
}
BATCH = 64


def stepper(recipe: str | None, autocast: bool, last: bool) -> Callable[[], Tensor]:
    """A function that runs one training step on fixed random pictures."""
    torch.manual_seed(0)
    kept = torch.channels_last if last else torch.contiguous_format
    model = ResNet18(classes=10, shape=(1, 28, 28)).to(memory_format=kept)
    if recipe is not None:
        lowbit.convert_(model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(BATCH, 1, 28, 28).to(memory_format=kept), torch.randint(10, (BATCH,))

    def step() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def main() -> None:
    """Print the machine and one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    print(machine.here())
    seconds = machine.paired({name: stepper(*way) for name, way in WAYS.items()}, asked.rounds)
    plain = seconds["as written"]
    rows = [
        [name, f"{1e3 * statistics.median(taken):.0f}", f"{machine.ratio(plain, taken):.2f}"]
        for name, taken in seconds.items()
    ]
    print(text_table(["step", "median ms", "speed"], rows))


if __name__ == "__main__":
    main()
