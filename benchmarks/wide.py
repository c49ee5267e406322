"""Where 8 bits begin to pay on a device: training steps of MLPs of growing width, the batch as large as the width.

    python benchmarks/wide.py --device cuda

Three layers, width to width to width to 16 classes, so that of W x W x W products there are six in a step, less the
gradient of the input. Printed is the table of `lowbit bench`.
"""

import argparse
from functools import partial

import torch
from torch import nn

from lowbit.train import bench


def wide(width: int) -> bench.Work:
    """An MLP and a batch of its width."""
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 16))
    return bench.Work(model, torch.randn(width, width), torch.randint(16, (width,)))


def main() -> None:
    """Time each width."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=bench.DEVICES)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--variants", nargs="+", default=["fp32", "bf16", "int8", "int8:reference"])
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    bench.WORKS.update({f"mlp-{width}": partial(wide, width) for width in given.widths})
    for line in bench.steps([f"mlp-{width}" for width in given.widths], given.variants, given.rounds, given.device):
        print(line, flush=True)


if __name__ == "__main__":
    main()
