"""Attention alone, forward and backward, in 8 bits and as torch computes it: times in paired rounds.

    python benchmarks/attention.py [--rounds 15]

Every round times each way once, in turn, in one process. A row gives the medians of a forward and of a forward with its
backward, and the speed beside torch's own attention in bf16 and in float32, the median of ratios over rounds.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import Recipe, machine
from lowbit.attention.function import refusal
from lowbit.functional import attention
from lowbit.products.setting import Setting
from lowbit.tables import text_table

RECIPE = Recipe.from_name("int8-attention")
BATCH, HEADS, SIZE = 8, 8, 64
Way = Callable[..., Tensor]


def quantised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The kernel."""
    return attention(q, k, v, causal=True, setting=Setting(recipe=RECIPE, engine="int8"))


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


WAYS: dict[str, tuple[Way, torch.dtype]] = {
    "int8, bf16 in and out": (quantised, torch.bfloat16),
    "int8, fp32 in and out": (quantised, torch.float32),
    "torch bf16": (plain, torch.bfloat16),
    "torch fp32": (plain, torch.float32),
}


def works(length: int, *, backward: bool) -> dict[str, Callable[[], Tensor]]:
    """A call of each way, with or without its backward."""
    torch.manual_seed(0)
    made: dict[str, Callable[[], Tensor]] = {}
    for name, (way, dtype) in WAYS.items():
        q, k, v, g = (torch.randn(BATCH, length, HEADS, SIZE, dtype=dtype).transpose(1, 2) for _ in range(4))
        inputs = tuple(x.requires_grad_(backward) for x in (q, k, v))

        def work(way: Way = way, inputs: tuple[Tensor, ...] = inputs, g: Tensor = g) -> Tensor:
            y = way(*inputs)
            return torch.autograd.grad(y, inputs, g)[0] if backward else y

        made[name] = work
    return made


def main() -> None:
    """Print the machine, and a table for each length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    if why := refusal(RECIPE):
        raise SystemExit(f"no kernel of attention here: {why}")
    print(machine.here())
    for length in (256, 1024):
        rows = []
        forward, both = (machine.paired(works(length, backward=b), asked.rounds) for b in (False, True))
        for name, taken in both.items():
            ratios = [f"{machine.ratio(both[other], taken):.2f}" for other in ("torch bf16", "torch fp32")]
            medians = [f"{1e3 * statistics.median(seconds):.2f}" for seconds in (forward[name], taken)]
            rows.append([name, *medians, *ratios])
        print(f"\nT = {length}, batch {BATCH}, {HEADS} heads of {SIZE}, causal, {asked.rounds} rounds")
        print(text_table(["attention", "forward ms", "with backward ms", "x torch bf16", "x torch fp32"], rows))


if __name__ == "__main__":
    main()
