"""What one event costs on BitFusion, and the sizes of arrays and buffers for which that is published.

An energy belongs to a size. What reading a bit costs depends on the *bank* that holds it: the weight buffer has a bank
in each Fusion Unit, the input buffer one for each row of the array, and the output buffer one for each column. The
authors' tables have some sizes of banks; the energies of others must be given.

Source: hsharma35/bitfusion at 0246bc4. Banks are in ``bitfusion/sram/cacti_sweep.csv`` (CACTI, 45 nm, lines of
4 bytes), Fusion Units in ``results/systolic_array_synth.csv`` (45 nm, 500 MHz), DRAM in
``bitfusion/src/simulator/stats.py``, and the rules for looking them up in ``bitfusion/src/simulator/simulator.py``.
"""

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from typing import final

from lowbit.errors import UsageError, shown
from lowbit.inputs.checks import is_finite

_LINE_BITS = 32  # bits of one access to a bank of the table
# nJ of one access, read and write, by bytes of the bank. Weight and input buffers have a port for each.
_TWO_PORTS = {
    128: (0.0006837010000000001, 0.0009253169999999999),  # 0.000925317 in the file; this is how the simulator reads it
    1024: (0.00113324, 0.00329596),
    2048: (0.00190318, 0.00363853),
    4096: (0.00342953, 0.00431011),
    8192: (0.00639163, 0.00556268),
    16384: (0.009981700000000001, 0.0084209),
}
# The output buffer has a third port, which does both.
_THREE_PORTS = {512: (0.00106097, 0.00233869), 4096: (0.00398324, 0.00505131)}
# Dynamic power in nW by rows and columns of the array. The tables have buffers only for `pmax` 8 and `pmin` 2, so these
# are the only ones here.
_PMAX, _PMIN = 8, 2
_POWER = {
    **{(1, 1): 279960, (2, 1): 503845, (4, 1): 969800, (8, 1): 1888400, (16, 1): 3758300},
    **{(1, 2): 542883, (2, 2): 977400, (4, 2): 1869700, (8, 2): 3711700},
    **{(1, 4): 1046700, (2, 4): 1888200, (4, 4): 3673500},
    **{(1, 8): 2057400, (2, 8): 3757400, (1, 16): 4049800},
}
_FREQUENCY = 500e6  # of that power, in Hz; an array of another frequency has the same energy in each cycle
_DRAM = 0.015  # nJ of one bit, whatever the size; a comment beside it speaks of 0.006

BUFFERS = ("weight", "input", "output")


@final
@dataclass(frozen=True, kw_only=True)
class Energies:
    """What one event costs, in nJ; None stands for the published figure of the array's sizes, if there is one.

    Args:
        core: one compute cycle of one Fusion Unit. Published for `pmax` 8 and `pmin` 2: each array of up to 16 units
            has its figure; all larger ones have that of a unit in the array of 4 x 4.
        weight_read: reading one bit from the weight buffer; the other five likewise. Published for banks of 128,
            1024, 2048, 4096, 8192 and 16384 bytes with `pmax` 8 and `pmin` 2.
        weight_write: writing one bit into it.
        input_read: input buffer, published for the same banks.
        input_write: input buffer.
        output_read: output buffer, published for banks of 512 and 4096 bytes.
        output_write: output buffer.
        dram: one bit to or from DRAM.

    Raises:
        UsageError: a cost is negative or not finite.
    """

    core: float | None = None
    weight_read: float | None = None
    weight_write: float | None = None
    input_read: float | None = None
    input_write: float | None = None
    output_read: float | None = None
    output_write: float | None = None
    dram: float | None = None

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and (not is_finite(value) or value < 0):
                raise UsageError(
                    f"energies: {name}={shown(value)}: allowed are finite numbers from 0; give a cost in nJ"
                )


@final
@dataclass(frozen=True, kw_only=True)
class Bank:
    """One of the equal banks of a buffer.

    Args:
        buffer: one of `BUFFERS`.
        total: bytes of all banks together.
        banks: how many there are.
        line_bits: bits of one access.
    """

    buffer: str
    total: int
    banks: int
    line_bits: int

    @property
    def bytes(self) -> Fraction:
        """Size of one bank."""
        return Fraction(self.total, self.banks)

    def published(self) -> tuple[float, float] | None:
        """Energy of reading and of writing one bit, in nJ; None if the authors' table lacks the bank."""
        access = self._table().get(int(self.bytes)) if self.bytes.denominator == 1 else None
        if access is None or self.line_bits != _LINE_BITS:
            return None
        read, write = access
        return read / _LINE_BITS, write / _LINE_BITS

    def lacking(self) -> str:
        """Why no energy is published, and which sizes have one."""
        name, size = self.buffer, f"{self.buffer}_bytes"
        have = f"{size}={self.total} makes {self.banks} banks of {_plain(self.bytes)} bytes"
        sizes = ", ".join(str(each * self.banks) for each in self._table())
        give = f"give energies.{name}_read and energies.{name}_write"
        if self.line_bits != _LINE_BITS:
            return f"{have} with {self.line_bits} bits a line, where lines of {_LINE_BITS} are published: {give}"
        return f"{have}: {give}, or take {size} from {sizes}"

    def _table(self) -> dict[int, tuple[float, float]]:
        return _THREE_PORTS if self.buffer == "output" else _TWO_PORTS


def core(rows: int, columns: int, *, pmax: int, pmin: int) -> float | None:
    """Energy of one compute cycle of one Fusion Unit, in nJ; None if the authors' table lacks it."""
    if (pmax, pmin) != (_PMAX, _PMIN):
        return None
    shape = (rows, columns) if (rows, columns) in _POWER else (4, 4)
    return _POWER[shape] / (shape[0] * shape[1]) / _FREQUENCY


def resolved(
    given: Energies, banks: tuple[Bank, ...], *, rows: int, columns: int, pmax: int, pmin: int
) -> dict[str, float]:
    """The cost of every event in nJ: what was given, or what is published for these sizes.

    Raises:
        UsageError: an energy is neither given nor published; the message says which, and what to give.
    """
    published: dict[str, float | None] = {"core": core(rows, columns, pmax=pmax, pmin=pmin), "dram": _DRAM}
    for bank in banks:
        read, write = bank.published() or (None, None)
        published |= {f"{bank.buffer}_read": read, f"{bank.buffer}_write": write}
    costs = {
        name: published[name] if value is None else float(value) for name, value in dataclasses.asdict(given).items()
    }
    reasons = [
        bank.lacking() for bank in banks if None in (costs[f"{bank.buffer}_read"], costs[f"{bank.buffer}_write"])
    ]
    if costs["core"] is None:
        reasons.insert(0, f"pmax={pmax}, pmin={pmin}: give energies.core, or pmax={_PMAX} and pmin={_PMIN}")
    if reasons:
        raise UsageError(
            f"not all energies of this array are published, in nJ for each bit or cycle. {'. '.join(reasons)}."
        )
    return {name: value for name, value in costs.items() if value is not None}


def _plain(size: Fraction) -> str:
    return str(size) if size.denominator == 1 else f"{float(size):.6g}"
