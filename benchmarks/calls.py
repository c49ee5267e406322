"""How far it is from a layer to the kernel: the files and calls of this project in one forward of a linear layer.

    python benchmarks/calls.py

Counts Python calls of functions of lowbit between the entry of `QuantLinear.forward` and its return, on the int8 engine
and on the reference engine, in the second forward (the first one fills caches), with what they are on request.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import lowbit

PACKAGE = str(Path(lowbit.__file__).parent)


def calls_of_forward(recipe: str, engine: str, *, backward: bool = False) -> Counter[tuple[str, str]]:
    """How often each function of lowbit, as (file, name), is called in one training forward, or in its backward."""
    torch.manual_seed(0)
    model = nn.Linear(64, 32)
    lowbit.convert_(model, recipe, engine=engine)
    x = torch.randn(16, 64, requires_grad=True)
    model(x).sum().backward()
    seen: Counter[tuple[str, str]] = Counter()

    def note(frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(PACKAGE):
            seen[str(Path(file).relative_to(PACKAGE)), frame.f_code.co_qualname] += 1

    if backward:
        y = model(x).sum()
        torch.autograd.set_multithreading_enabled(False)
        sys.setprofile(note)
        y.backward()
        sys.setprofile(None)
        return seen
    model.site.clock.next_step()
    forward = type(model).forward
    sys.setprofile(note)
    forward(model, x)
    sys.setprofile(None)
    return seen


def main() -> None:
    """Print a table, and with `--calls` every call."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--calls", action="store_true", help="list the functions")
    asked = parser.parse_args()
    print(f"{'recipe':8} {'engine':10} {'pass':9} files calls")
    for recipe, engine in (("int8", "int8"), ("sbm8", "int8"), ("sbm8", "reference")):
        for backward in (False, True):
            seen = calls_of_forward(recipe, engine, backward=backward)
            files = {file for file, _ in seen}
            print(f"{recipe:8} {engine:10} {'backward' if backward else 'forward':9} {len(files):5} {seen.total():5}")
            if asked.calls:
                for (file, name), count in sorted(seen.items()):
                    print(f"    {count:2} {file}: {name}")


if __name__ == "__main__":
    main()
