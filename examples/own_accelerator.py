"""An accelerator of your own: a systolic array of 8-bit units with one buffer.

Run: python examples/own_accelerator.py
Or:  lowbit cost --model resnet20 --recipe int8 --hardware examples/own_accelerator.py:Systolic --set rows=64
with ``--set mac_nj=X --set buffer_nj=Y --set dram_nj=Z``, the energies of your hardware.
"""

from dataclasses import dataclass
from math import ceil

import torch

import lowbit
from lowbit.evidence.records import Product
from lowbit.hardware import Estimate, Store, as_matrix


@dataclass(frozen=True, kw_only=True)
class Systolic:
    """Holds a tile of rows x columns weights while the left matrix streams through; wide operands take more passes.

    The energies have no default, as they are those of your technology and your sizes: nJ of one multiply-accumulate
    of 8 x 8 bits, and of one bit to or from the buffer and DRAM.
    """

    mac_nj: float
    buffer_nj: float
    dram_nj: float
    rows: int = 128
    columns: int = 128
    dram_bits_per_cycle: int = 256
    frequency: float = 500e6

    def product(self, product: Product, *, first_layer: bool = False) -> Estimate:  # noqa: ARG002 - all run alike
        """Cycles, traffic and energy of one product of a layer."""
        m = as_matrix(product)
        passes = ceil(m.left_bits / 8) * ceil(m.right_bits / 8)
        down, across = ceil(m.summed / self.rows), ceil(m.columns / self.columns)
        compute = m.times * passes * down * across * (self.rows + m.rows)  # load a tile, then stream
        left = m.times * m.rows * m.summed * m.left_bits
        right = m.times * m.summed * m.columns * m.right_bits
        output = m.times * m.rows * m.columns * 32
        dram_cycles = ceil((left + right + output) / self.dram_bits_per_cycle)
        stall = max(0, dram_cycles - compute)
        return Estimate(
            macs=product.macs,
            compute_cycles=compute,
            stall_cycles=stall,
            memory_cycles=dram_cycles,
            seconds=(compute + stall) / self.frequency,
            core_nj=product.macs * passes * self.mac_nj,
            stores=(
                _store("buffer", left * across + right + output * down, left + right + output * down, self.buffer_nj),
                _store("dram", left + right, output, self.dram_nj),
            ),
        )


def _store(name: str, read: int, written: int, nj: float) -> Store:
    return Store(name=name, read=read, written=written, energy_nj=(read + written) * nj)


if __name__ == "__main__":
    model = torch.nn.Sequential(torch.nn.Linear(784, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10))
    lowbit.convert_(model, "int8")
    published = lowbit.hardware.BitFusion().costs  # those of another array, in place of yours
    array = Systolic(mac_nj=published["core"], buffer_nj=published["input_read"], dram_nj=published["dram"])
    print(lowbit.Cost(lowbit.plan(model, torch.zeros(128, 784), steps=100), array))
