"""BitFusion: cycles, traffic and energy of one layer at any width, by an exact search over tilings and loop orders.

Notation: a layer has batch B, output O x O, kernel K x K, stride S, input channels I, output channels F; `input`
has a bits, `weight` has w bits. The array has N rows and M columns of Fusion Units. Small letters are sizes of a
tile, n is a count: ``n_i = ceil(I / i)`` tiles cover I. The kernel is never tiled; rows and columns of the
output are tiled alike.

A loop over tiles has five levels, written from outer to inner: ``b`` batch, ``w`` output column, ``h`` output
row, ``i`` input channels, ``o`` output channels.

All formulas and constants are those of the authors' simulator (hsharma35/bitfusion at 04ec1c8; Sharma et al., Bit
Fusion, ISCA 2018, arXiv:1712.01507), its peculiarities included. Ours: widths above `pmax`, `snap_bits`, the
mapping of training and the roofline.

What is not counted: pooling, normalisation, activation functions, leakage, energy while the array waits, and the
arithmetic that quantises. Not modelled: groups, dilation, kernels and images that are not square.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from lowbit.checks import check_type, checked, is_finite, is_whole
from lowbit.errors import UsageError, shown, unknown

OUTPUT_BITS = 32  # a partial sum, in the output buffer and in DRAM, whatever the widths of the operands
MAX_BITS = 16  # the widest operand that Fusion Units can be combined for

# The arguments of `BitFusion.estimate` in the order K, O, S, I, F, B, a, w.
_LAYER_ARGUMENTS = (
    "kernel",
    "output_size",
    "stride",
    "in_channels",
    "out_channels",
    "batch",
    "input_bits",
    "weight_bits",
)

LOOPS = "bwhio"
NAMES = {"b": "batch", "w": "output_column", "h": "output_row", "i": "in_channels", "o": "out_channels"}
# The loops that each stream of data depends on; the others may reuse a tile that is already in the buffer.
WEIGHT_LOOPS, INPUT_LOOPS, OUTPUT_LOOPS = "io", "bwhi", "bwho"

# Loop orders as the simulator visits them: it iterates over a Python 2 set, and of equally good orders the first
# one wins. 60 of the 120: exchanging w and h changes no count, so the later order of such a pair never wins.
ORDERS = """
    oibhw bowih hbwoi biowh obwih oihbw hwoib ohbwi ohibw whibo ihobw boiwh hwiob oiwhb bihow
    obiwh owbih iowbh wihbo wohbi hbiwo ihwbo wbohi bwohi whbio ibohw wiboh hibwo bwhoi bwhio
    bwoih wboih iobhw hiobw hiowb ihbow obhwi biwho iowhb hoiwb bohwi ihowb hbiow ibwoh whobi
    owhib iwhob hiwob wobih owhbi ibwho hbwio hwboi hoibw ihbwo ohiwb hobwi wohib bhiwo bhiow
""".split()  # noqa: SIM905  # a list would be 60 lines


@dataclass(frozen=True, kw_only=True)
class Energies:
    """What one event costs, in nJ: the 45 nm figures that the simulator gives for the default array.

    Buffers are CACTI figures for the default sizes and banks, so give your own with other sizes.

    Args:
        core: one compute cycle of one Fusion Unit (synthesis with `pmax` 8 and `pmin` 2 at 500 MHz).
        weight_read: reading one bit from the weight buffer; the other five likewise.
        weight_write: writing one bit into it.
        input_read: input buffer.
        input_write: input buffer.
        output_read: output buffer.
        output_write: output buffer.
        dram: one bit to or from DRAM.

    Raises:
        UsageError: a cost is negative or not finite.
    """

    core: float = 0.0004591875
    weight_read: float = 2.1365656250000003e-05
    weight_write: float = 2.8916156249999998e-05
    input_read: float = 5.9474375e-05
    input_write: float = 0.0001137040625
    output_read: float = 3.31553125e-05
    output_write: float = 7.30840625e-05
    dram: float = 0.015

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not is_finite(value) or value < 0:
                raise UsageError(
                    f"energies: {name}={shown(value)}: allowed are finite numbers from 0; give a cost in nJ"
                )


Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class Counters(Generic[Number]):
    """One number for each place where data lies, the three buffers and DRAM: bits moved (int) or nJ (float)."""

    weight: Number
    input: Number
    output: Number
    dram: Number

    def __add__(self, other: "Counters[Number]") -> "Counters[Number]":
        return Counters(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __mul__(self, times: int) -> "Counters[Number]":
        return Counters(**{name: value * times for name, value in vars(self).items()})


@dataclass(frozen=True)
class Loop:
    """One level of the loop over tiles: ``count`` tiles of ``size``, e.g. 3 of 128 input channels."""

    name: str
    count: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one product of a layer, or a sum of products, costs.

    ``a + b``, ``a * times`` and `total` give sums; layers run one after the other.

    Args:
        macs: multiply-accumulates. One multiply-accumulate is one operation here.
        compute_cycles: cycles in which the array works, padding included.
        stall_cycles: cycles in which it waits for DRAM.
        dram_cycles: cycles that DRAM needs for its bits alone.
        seconds: cycles at the array's frequency.
        read: bits read from each buffer and from DRAM.
        written: bits written to each buffer and to DRAM.
        core_nj: energy of the Fusion Units, in nJ.
        memory_nj: energy of each buffer and of DRAM, reads and writes together, in nJ.
        loops: the tiles and the order of the loops over them, from outer to inner; empty for a sum.
    """

    macs: int
    compute_cycles: int
    stall_cycles: int
    dram_cycles: int
    seconds: float
    read: Counters[int]
    written: Counters[int]
    core_nj: float
    memory_nj: Counters[float]
    loops: tuple[Loop, ...] = ()

    @property
    def cycles(self) -> int:
        """Compute and stall cycles."""
        return self.compute_cycles + self.stall_cycles

    @property
    def energy_nj(self) -> float:
        """Energy of the Fusion Units, the buffers and DRAM in nJ."""
        memory = self.memory_nj
        return self.core_nj + memory.weight + memory.input + memory.output + memory.dram

    @property
    def operations_per_dram_bit(self) -> float:
        """Arithmetic intensity: multiply-accumulates for each bit to or from DRAM."""
        return self.macs / (self.read.dram + self.written.dram)

    @property
    def operations_per_cycle(self) -> float:
        """Multiply-accumulates per cycle, stalls included; `BitFusion.peak` is the roof."""
        return self.macs / self.cycles

    @property
    def bound(self) -> Literal["compute", "memory"]:
        """What limits the speed: DRAM where it needs more cycles than the array does, else the array."""
        return "memory" if self.dram_cycles > self.compute_cycles else "compute"

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(**{name: getattr(self, name) + getattr(other, name) for name in self._summed()})

    def __mul__(self, times: int) -> "Estimate":
        _check_count("times", times)
        return Estimate(**{name: getattr(self, name) * times for name in self._summed()})

    def _summed(self) -> list[str]:
        """Fields that a sum adds up: all but the loops, which belong to one product."""
        return [field.name for field in dataclasses.fields(self) if field.name != "loops"]


@dataclass(frozen=True, kw_only=True)
class TrainingEstimate:
    """What the three products of a layer cost in one training step; sums like `Estimate`.

    Args:
        output: input times weight.
        grad_input: grad_output times weight; None for a first layer, whose input needs no gradient.
        grad_weight: grad_output times input.
    """

    output: Estimate
    grad_input: Estimate | None
    grad_weight: Estimate

    @property
    def total(self) -> Estimate:
        """The products together, one after the other."""
        return total(product for product in (self.output, self.grad_input, self.grad_weight) if product is not None)

    def __add__(self, other: "TrainingEstimate") -> "TrainingEstimate":
        both = [product for product in (self.grad_input, other.grad_input) if product is not None]
        return TrainingEstimate(
            output=self.output + other.output,
            grad_input=total(both) if both else None,
            grad_weight=self.grad_weight + other.grad_weight,
        )


Summable = TypeVar("Summable", Estimate, TrainingEstimate)


def total(estimates: Iterable[Summable]) -> Summable:
    """The sum of estimates: layers of a network, products of a layer, or steps of a run.

    Args:
        estimates: at least one, all of one type.

    Raises:
        UsageError: there is none.
    """
    check_type("estimates", estimates, Iterable)
    estimates = list(estimates)
    for estimate in estimates:
        check_type("estimates", estimate, Estimate | TrainingEstimate)
    if not estimates:
        raise UsageError("no estimates were given: a sum needs at least one; estimate a layer first")
    return functools.reduce(lambda a, b: a + b, estimates)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One product as the array runs it; a linear layer has K = O = S = 1.

    Args:
        kernel: K, in pixels.
        output_size: O, in pixels.
        stride: S, in pixels.
        in_channels: I.
        out_channels: F.
        batch: B, in samples.
        input_bits: a, 1 to 16 bits.
        weight_bits: w, 1 to 16 bits.
        first_layer: whether the layer reads the network's input, which comes unfolded: a row of the array then
            gets any of the K*K*I values of a patch, else any of the I channels of a pixel.

    Raises:
        UsageError: a size is not a positive whole number, or a width is not a whole number from 1 to 16.
    """

    kernel: int
    output_size: int
    stride: int
    in_channels: int
    out_channels: int
    batch: int
    input_bits: int
    weight_bits: int
    first_layer: bool = False

    def __post_init__(self) -> None:
        for name in ("kernel", "output_size", "stride", "in_channels", "out_channels", "batch"):
            _check_count(name, getattr(self, name))
        _check_bits("input_bits", self.input_bits)
        _check_bits("weight_bits", self.weight_bits)
        if not isinstance(self.first_layer, bool):
            raise UsageError(f"first_layer={shown(self.first_layer)}: give True or False")

    @property
    def macs(self) -> int:
        """Multiply-accumulates, ``B O O K K I F``."""
        return self.batch * self.output_size**2 * self.kernel**2 * self.in_channels * self.out_channels


@dataclass(frozen=True, kw_only=True)
class BitFusion:
    """A BitFusion accelerator; the defaults are the authors' array of Eyeriss's size (bf_e_conf.ini).

    A Fusion Unit has 2-bit multipliers that it combines: ``P = floor(pmax/max(a,pmin)) floor(pmax/max(w,pmin))``
    products of widths a and w per cycle, so 3 bits run as fast as 4, and 5 to 7 as 8, though they move fewer bits.
    Ours, for widths above `pmax` up to 16: ``1/ceil(a/pmax)`` in place of ``floor(pmax/a)``, several units
    together making one product. Energies of such units are not published: a unit is charged as it is below `pmax`.

    Args:
        rows: N, Fusion Units over which inputs are spread.
        columns: M, Fusion Units over which output channels are spread.
        pmax: widest operand of one Fusion Unit in bits, a power of two up to 16.
        pmin: narrowest operand that is still faster than a wider one, a power of two up to `pmax`.
        weight_bytes: size of the weight buffer; a tile may fill half of each buffer, as the other half is loading.
        input_bytes: size of the input buffer.
        output_bytes: size of the output buffer.
        dram_bits_per_cycle: bits to or from DRAM in one cycle.
        frequency: cycles per second.
        energies: what each event costs.
        snap_bits: whether widths are first rounded up to a width that the array is made for, ``pmin * 2**i``
            (2, 4, 8, 16), in memory too. The array computes as fast as without, and more bits are moved.

    Raises:
        UsageError: a value outside the above.

    Source: Sharma et al., Bit Fusion, ISCA 2018, arXiv:1712.01507; hsharma35/bitfusion at 04ec1c8.
    """

    rows: int = 16
    columns: int = 32
    pmax: int = 8
    pmin: int = 2
    weight_bytes: int = 65536
    input_bytes: int = 32768
    output_bytes: int = 16384
    dram_bits_per_cycle: int = 192
    frequency: float = 500e6
    energies: Energies = dataclasses.field(default_factory=Energies)
    snap_bits: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "weight_bytes", "input_bytes", "output_bytes", "dram_bits_per_cycle"):
            _check_count(name, getattr(self, name))
        for name in ("pmax", "pmin"):
            _check_bits(name, getattr(self, name))
        if self.pmin > self.pmax or self.pmax.bit_count() != 1 or self.pmin.bit_count() != 1:
            raise UsageError(
                f"pmax={self.pmax}, pmin={self.pmin}: both are powers of two up to {MAX_BITS} and pmin is at most "
                "pmax; choose such a pair, e.g. 8 and 2"
            )
        if not is_finite(self.frequency) or self.frequency <= 0:
            raise UsageError(
                f"frequency={shown(self.frequency)}: allowed are finite numbers above 0; give cycles per second, e.g. "
                "500e6"
            )
        if not isinstance(self.energies, Energies):
            raise UsageError(f"energies={shown(self.energies)}: allowed is an Energies; give e.g. Energies(dram=0.006)")
        if not isinstance(self.snap_bits, bool):
            raise UsageError(f"snap_bits={shown(self.snap_bits)}: give True or False")

    def estimate(
        self,
        *,
        kernel: int,
        output_size: int,
        stride: int,
        in_channels: int,
        out_channels: int,
        batch: int,
        input_bits: int,
        weight_bits: int,
        first_layer: bool = False,
    ) -> Estimate:
        """Cycles, traffic and energy of a layer's output: the best of all tilings and loop orders.

        The search tries tiles of every power of two, all loop orders, and takes the fewest cycles, of those the
        least energy, and of those the one that the authors' simulator meets first. Results are cached.
        So more bits can cost less energy, which only breaks ties, and even a few cycles less: whatever stays in a
        buffer is loaded before the first tile, and more of it at fewer bits.

        Args:
            kernel: K, in pixels; 1 for a linear layer.
            output_size: O, in pixels; 1 for a linear layer.
            stride: S, in pixels; 1 for a linear layer.
            in_channels: input channels or features.
            out_channels: output channels or features.
            batch: samples. All results are for the whole batch.
            input_bits: width of `input`, 1 to 16.
            weight_bits: width of `weight`, 1 to 16.
            first_layer: whether the layer reads the network's input, which comes unfolded into patches. The
                authors do not set it for linear layers.

        Returns:
            An estimate that equals the authors' simulator in every count, for widths up to `pmax`.

        Raises:
            UsageError: a size or width outside the above, no tile fits the buffers, or the counts pass 64 bits.
        """
        layer = Layer(
            kernel=kernel,
            output_size=output_size,
            stride=stride,
            in_channels=in_channels,
            out_channels=out_channels,
            batch=batch,
            input_bits=self._snapped("input_bits", input_bits),
            weight_bits=self._snapped("weight_bits", weight_bits),
            first_layer=first_layer,
        )
        return _search(self, layer)

    @checked
    def training(
        self,
        *,
        kernel: int,
        output_size: int,
        stride: int,
        in_channels: int,
        out_channels: int,
        batch: int,
        input_bits: int,
        weight_bits: int,
        grad_bits: int,
        input_size: int,
        bifurcated_bits: int | None = None,
        first_layer: bool = False,
    ) -> TrainingEstimate:
        """Cycles, traffic and energy of the three products of a layer in one training step.

        The authors' model has inference only; this mapping onto its layers is ours:

        - `output`: the layer as it is;
        - `grad_input`: a layer from F to I channels with the same kernel, stride 1 and an output of `input_size`;
          `input` is grad_output. With stride S its zeros between pixels are computed too, S*S times the work;
        - `grad_weight`: a linear layer from B*O*O to F features with batch K*K*I; `weight` is grad_output.

        The update of the weights and the quantising of each operand are not counted.

        Args:
            kernel: as in `estimate`, and so the others that are not here.
            output_size: O, in pixels.
            stride: S, in pixels.
            in_channels: I.
            out_channels: F.
            batch: samples.
            input_bits: width of `input` in `output` and in `grad_weight`.
            weight_bits: width of `weight` in `output` and in `grad_input`.
            grad_bits: width of `grad_output`, 1 to 16.
            input_size: side of the layer's input in pixels, padding left out; 1 for a linear layer.
            bifurcated_bits: width of `grad_output` in `grad_weight`, where it differs (gradient bifurcation);
                None: `grad_bits`.
            first_layer: whether the layer reads the network's input; there is then no `grad_input`.

        Raises:
            UsageError: as `estimate`.
        """
        _check_bits("grad_bits", grad_bits)
        if bifurcated_bits is not None:
            _check_bits("bifurcated_bits", bifurcated_bits)
        grad_weight_bits = grad_bits if bifurcated_bits is None else bifurcated_bits

        def product(name: str, bits: tuple[int, int]) -> Estimate:
            return self.product(
                name,
                kernel=kernel,
                output_size=output_size,
                input_size=input_size,
                stride=stride,
                in_channels=in_channels,
                out_channels=out_channels,
                batch=batch,
                bits=bits,
                first_layer=first_layer,
            )

        return TrainingEstimate(
            output=product("output", (input_bits, weight_bits)),
            grad_input=None if first_layer else product("grad_input", (grad_bits, weight_bits)),
            grad_weight=product("grad_weight", (grad_weight_bits, input_bits)),
        )

    def product(
        self,
        name: str,
        *,
        kernel: int,
        output_size: int,
        input_size: int,
        stride: int,
        in_channels: int,
        out_channels: int,
        batch: int,
        bits: tuple[int, int],
        first_layer: bool = False,
    ) -> Estimate:
        """One of the three products of a layer, mapped as `training` does.

        Args:
            name: ``"output"``, ``"grad_input"`` or ``"grad_weight"``.
            kernel: as in `training`, and so the others that are not here.
            output_size: O, in pixels.
            input_size: side of the layer's input in pixels, padding left out.
            stride: S, in pixels.
            in_channels: I.
            out_channels: F.
            batch: samples.
            bits: widths of its operands: (input, weight), (grad_output, weight) or (grad_output, input).
            first_layer: whether the layer reads the network's input; counts for its output.

        Raises:
            UsageError: no such product, or as `estimate`.
        """
        _check_count("input_size", input_size)
        first, second = bits
        # K, O, S, I, F, B, a and w of the layer that the product is on the array.
        mapped = {
            "output": (kernel, output_size, stride, in_channels, out_channels, batch, first, second),
            "grad_input": (kernel, input_size, 1, out_channels, in_channels, batch, first, second),
            "grad_weight": (1, 1, 1, batch * output_size**2, out_channels, kernel**2 * in_channels, second, first),
        }
        if name not in mapped:
            raise unknown("product", name, mapped)
        layer = dict(zip(_LAYER_ARGUMENTS, mapped[name], strict=True))
        return self.estimate(**layer, first_layer=first_layer and name == "output")

    def peak(self, *, input_bits: int, weight_bits: int) -> float:
        """The roof: multiply-accumulates per cycle with every Fusion Unit busy, ``N M P``.

        Divided by `dram_bits_per_cycle` it is the ridge: the operations per DRAM bit from which on the array,
        and no longer DRAM, limits the speed.

        Args:
            input_bits: width of `input`, 1 to 16.
            weight_bits: width of `weight`, 1 to 16.

        Raises:
            UsageError: a width outside the above.
        """
        widths = self._snapped("input_bits", input_bits), self._snapped("weight_bits", weight_bits)
        return float(self.rows * self.columns * self.products_per_unit(*widths))

    def products_per_unit(self, input_bits: int, weight_bits: int) -> Fraction:
        """Products of one Fusion Unit in one cycle, P; below 1 where several units make one product."""
        return self._share(input_bits) * self._share(weight_bits)

    def _share(self, bits: int) -> Fraction:
        """Operands of this width that one side of a Fusion Unit takes in."""
        if bits > self.pmax:
            return Fraction(1, _ceil(bits, self.pmax))
        return Fraction(self.pmax // max(bits, self.pmin))

    def _snapped(self, name: str, bits: int) -> int:
        """The width that the array works with."""
        _check_bits(name, bits)
        return max(self.pmin, 1 << (bits - 1).bit_length()) if self.snap_bits else bits


Size = TypeVar("Size", int, Tensor)


def _ceil(x: Size, y: int) -> Size:
    """``ceil(x / y)`` of whole numbers."""
    return -(-x // y)


def _check_count(name: str, value: int) -> None:
    if not is_whole(value) or not 1 <= value < 2**63:
        raise UsageError(f"{name}={shown(value)}: allowed are whole numbers from 1; give a positive int")


def _check_bits(name: str, value: int) -> None:
    if not is_whole(value) or not 1 <= value <= MAX_BITS:
        raise UsageError(
            f"{name}={shown(value)}: the array has widths from 1 to {MAX_BITS} bits; give a whole number in that range"
        )


class Tiles(NamedTuple):
    """Sizes of T tiles, int64 ``(T, 1)`` each: samples, output side, input and output channels."""

    b: Tensor
    o: Tensor
    ic: Tensor
    oc: Tensor

    def counts(self, layer: Layer) -> Tensor:
        """How many tiles cover the layer, int64 ``(T, 5)``, a column for each of `LOOPS`."""
        sides = (layer.output_size, self.o), (layer.output_size, self.o)
        pairs = ((layer.batch, self.b), *sides, (layer.in_channels, self.ic), (layer.out_channels, self.oc))
        return torch.cat([(whole + tile - 1) // tile for whole, tile in pairs], dim=1)


class Costs(NamedTuple):
    """Cycles and bits of T tiles under R loop orders, int64, ``(T, 1)`` or ``(T, R)``."""

    compute_cycles: Tensor
    stall_cycles: Tensor
    weight_read: Tensor
    weight_write: Tensor
    input_read: Tensor
    input_write: Tensor
    output_read: Tensor
    output_write: Tensor
    dram_read: Tensor
    dram_write: Tensor

    def energy(self, array: BitFusion) -> Tensor:
        """Energy in nJ, float64 ``(T, R)``, summed in the simulator's order so that equal stays equal."""
        costs = array.energies
        energy = self.compute_cycles.double() * (costs.core * array.rows * array.columns)
        for name in self._fields[2:]:
            each = costs.dram if name.startswith("dram") else getattr(costs, name)
            energy = energy + getattr(self, name).double() * each
        return energy


def all_tiles(array: BitFusion, layer: Layer) -> Tiles:
    """Every tile of the search: ``min(2**i, X)`` in each dimension, output channels in multiples of M.

    In the simulator's order, output channels changing fastest. A first layer has any power of two of them.
    """
    columns = 1 if layer.first_layer else array.columns

    def sizes(whole: int, step: int = 1) -> Tensor:
        tries = (_ceil(whole, step) - 1).bit_length() + 1
        return torch.tensor([min(step << i, whole) for i in range(tries)], dtype=torch.int64, device="cpu")

    tiles = torch.cartesian_prod(
        sizes(layer.batch), sizes(layer.output_size), sizes(layer.in_channels), sizes(layer.out_channels, columns)
    )
    return Tiles(*tiles.split(1, dim=1))


class _Padded(NamedTuple):
    """Work of a tile, rounded up to the array: int64 ``(T, 1)`` each."""

    passes: Tensor  # times that the rows are filled for one output
    sums: Tensor  # products that are added for one output, padding included
    oc: Tensor  # output channels, a multiple of M
    weights: Tensor  # weights of one output channel, padding included


def _padded(array: BitFusion, layer: Layer, tiles: Tiles) -> _Padded:
    """Round a tile up to ``N P`` products and M output channels, which the array does at once."""
    at_once = array.rows * array.products_per_unit(layer.input_bits, layer.weight_bits)
    area = layer.kernel**2

    def pad(passes: Tensor) -> Tensor:
        return _ceil(passes * at_once.numerator, at_once.denominator)

    def fills(values: Tensor) -> Tensor:
        return _ceil(values * at_once.denominator, at_once.numerator)

    unfolded, channels = fills(area * tiles.ic), fills(tiles.ic)
    passes = unfolded if layer.first_layer else area * channels
    sums = pad(unfolded) if layer.first_layer else area * pad(channels)
    oc = _ceil(tiles.oc, array.columns) * array.columns
    return _Padded(passes=passes, sums=sums, oc=oc, weights=pad(unfolded))


class _Streams(NamedTuple):
    """Bits of one tile of each stream of data, int64 ``(T, 1)``."""

    weight: Tensor
    input: Tensor
    output: Tensor


def tile_bits(array: BitFusion, layer: Layer, tiles: Tiles) -> _Streams:
    """Bits of a tile in each buffer, padding of weights and outputs included."""
    padded = _padded(array, layer, tiles)
    side = layer.kernel + (tiles.o - 1) * layer.stride
    pixels = (tiles.o * layer.kernel) ** 2 if layer.first_layer else side**2
    return _Streams(
        weight=padded.weights * tiles.oc * layer.weight_bits,
        input=tiles.b * tiles.ic * pixels * layer.input_bits,
        output=tiles.b * tiles.o**2 * padded.oc * OUTPUT_BITS,
    )


def _half_buffers(array: BitFusion) -> tuple[int, int, int]:
    """Bits that a tile may have in the weight, input and output buffer: half of each, the other half is loading."""
    return 4 * array.weight_bytes, 4 * array.input_bytes, 4 * array.output_bytes


def fits(array: BitFusion, layer: Layer, tiles: Tiles) -> Tensor:
    """Which tiles fit half of each buffer, bool ``(T,)``."""
    bits = tile_bits(array, layer, tiles)
    each = [tile <= room for tile, room in zip(bits, _half_buffers(array), strict=True)]
    return torch.cat(each, dim=1).all(dim=1)


def _walk(tile: Tensor, room: int, loops: str, counts: Tensor, orders: Tensor) -> tuple[Tensor, Tensor]:
    """Bits of one stream over all loops, and the most that stays in its buffer at once.

    From the innermost loop outwards: what a loop goes through is added up; a loop that the stream does not depend
    on reuses what is in the buffer as long as everything so far is there.

    Args:
        tile: bits of one tile, int64 ``(T, 1)``, at most `room`.
        room: bits that the buffer holds.
        loops: the loops that the stream depends on.
        counts: tiles of each loop, ``(T, 5)``.
        orders: index of the loop at each level, outer to inner, ``(R, 5)``.

    Returns:
        Both int64 ``(T, R)``.
    """
    depends = torch.tensor([loop in loops for loop in LOOPS], dtype=torch.bool, device="cpu")
    bits = resident = tile
    for loop in orders.flip(1).unbind(1):
        grows = depends[loop] | (bits > room)
        bits = torch.where(grows, bits * counts[:, loop], bits)
        resident = torch.where(bits <= room, bits, resident)
    return bits, resident


def _buffer_reads(layer: Layer, tiles: Tiles, padded: _Padded) -> _Streams:
    """Bits that the array reads from each buffer for one tile, with the operand held still that is best held still.

    Held still are inputs, outputs or weights, whichever moves the fewest bits; inputs win a tie, then outputs.
    """
    a, w = layer.input_bits, layer.weight_bits
    places = tiles.b * tiles.o**2
    by_input = padded.sums * places * (a + padded.oc * (w + OUTPUT_BITS))
    by_output = padded.oc * places * (OUTPUT_BITS + padded.sums * (a + w))
    by_weight = padded.sums * padded.oc * (w + places * (a + OUTPUT_BITS))
    input_still = (by_input <= by_output) & (by_input <= by_weight)
    weight_still = ~input_still & (by_weight < by_output)
    output_still = ~input_still & ~weight_still

    weights = layer.kernel**2 * tiles.ic * tiles.oc
    products = weights * places
    return _Streams(
        weight=torch.where(weight_still, weights, products) * w,
        input=torch.where(input_still, products // tiles.oc, products) * a,
        output=torch.where(output_still, places * tiles.oc, products) * OUTPUT_BITS,
    )


def evaluate(array: BitFusion, layer: Layer, tiles: Tiles, orders: Tensor) -> Costs:
    """Cycles and bits of every tile under every loop order.

    Compute cycles are ``n_tiles b o^2 ceil(oc/M) passes``. Tiles are loaded while others are computed: what is not
    hidden, and the first load and the last store, are stalls. Outputs are 32 bits wide and are loaded even on
    first touch, so DRAM reads weights, inputs and outputs and writes outputs.

    Args:
        array: the accelerator.
        layer: the layer.
        tiles: T tiles that fit the buffers.
        orders: index into `LOOPS` at each level, outer to inner, int64 ``(R, 5)``.
    """
    counts, padded = tiles.counts(layer), _padded(array, layer, tiles)
    n_tiles = counts.prod(dim=1, keepdim=True)
    tile, (weight_room, input_room, output_room) = tile_bits(array, layer, tiles), _half_buffers(array)
    weight, first_weight = _walk(tile.weight, weight_room, WEIGHT_LOOPS, counts, orders)
    inputs, first_input = _walk(tile.input, input_room, INPUT_LOOPS, counts, orders)
    output, last = _walk(tile.output, output_room, OUTPUT_LOOPS, counts, orders)
    reads = _buffer_reads(layer, tiles, padded)

    width = array.dram_bits_per_cycle
    first = first_weight + first_input + last
    hidden = weight + inputs + 2 * output - first - last
    compute_cycles = n_tiles * tiles.b * tiles.o**2 * (padded.oc // array.columns) * padded.passes
    stall_cycles = (_ceil(hidden, width) - compute_cycles).clamp(min=0) + _ceil(first, width) + _ceil(last, width)
    return Costs(
        compute_cycles=compute_cycles,
        stall_cycles=stall_cycles,
        weight_read=n_tiles * reads.weight,
        weight_write=weight,
        input_read=n_tiles * reads.input,
        input_write=inputs,
        output_read=n_tiles * reads.output + output,
        output_write=n_tiles * reads.output + output,
        dram_read=weight + inputs + output,
        dram_write=output,
    )


def order_indices(orders: Iterable[str]) -> Tensor:
    """Loop orders such as ``"oibhw"`` as indices into `LOOPS`, int64 ``(R, 5)``."""
    levels = [[LOOPS.index(loop) for loop in order] for order in orders]
    return torch.tensor(levels, dtype=torch.int64, device="cpu")


@functools.cache
def _search(array: BitFusion, layer: Layer) -> Estimate:
    """The fewest cycles, of those the least energy, of those the first order, of those the first tile."""
    _check_range(array, layer)
    tiles = all_tiles(array, layer)
    kept = fits(array, layer, tiles)
    if not kept.any():
        raise _nothing_fits(array, layer, tiles)
    tiles = Tiles(*(sizes[kept] for sizes in tiles))
    costs = evaluate(array, layer, tiles, order_indices(ORDERS))

    cycles = costs.compute_cycles + costs.stall_cycles
    energy = costs.energy(array).masked_fill(cycles != cycles.min(), math.inf)
    best = (energy == energy.min()).T.nonzero()[0]
    order, tile = int(best[0]), int(best[1])
    chosen = Costs(*(cost.expand_as(cycles)[tile : tile + 1, order : order + 1] for cost in costs))
    return _estimate(array, layer, Tiles(*(sizes[tile : tile + 1] for sizes in tiles)), chosen, ORDERS[order])


def _estimate(array: BitFusion, layer: Layer, tile: Tiles, costs: Costs, order: str) -> Estimate:
    """The costs of one tile under one order as plain numbers."""
    n = {name: int(value) for name, value in costs._asdict().items()}
    each = array.energies
    sizes = dict(zip(LOOPS, map(int, (tile.b, tile.o, tile.o, tile.ic, tile.oc)), strict=True))
    counts = dict(zip(LOOPS, tile.counts(layer)[0].tolist(), strict=True))
    return Estimate(
        macs=layer.macs,
        compute_cycles=n["compute_cycles"],
        stall_cycles=n["stall_cycles"],
        dram_cycles=_ceil(n["dram_read"] + n["dram_write"], array.dram_bits_per_cycle),
        seconds=(n["compute_cycles"] + n["stall_cycles"]) / array.frequency,
        read=Counters(**{name: n[f"{name}_read"] for name in ("weight", "input", "output", "dram")}),
        written=Counters(**{name: n[f"{name}_write"] for name in ("weight", "input", "output", "dram")}),
        core_nj=n["compute_cycles"] * (each.core * array.rows * array.columns),
        memory_nj=Counters(
            weight=n["weight_read"] * each.weight_read + n["weight_write"] * each.weight_write,
            input=n["input_read"] * each.input_read + n["input_write"] * each.input_write,
            output=n["output_read"] * each.output_read + n["output_write"] * each.output_write,
            dram=(n["dram_read"] + n["dram_write"]) * each.dram,
        ),
        loops=tuple(Loop(NAMES[loop], counts[loop], sizes[loop]) for loop in order),
    )


def _check_range(array: BitFusion, layer: Layer) -> None:
    """Refuse a layer whose counts could pass 64 bits in some tiling of the search.

    Each of five dimensions less than doubles when it is cut into tiles; a product moves at most 32 bits, times the
    padding of a tile of one value or the overlap of patches. Of one tile, bits are also compared over all products.
    """
    at_once = array.rows * array.products_per_unit(layer.input_bits, layer.weight_bits)
    padding = 1 + max(array.columns, at_once.numerator, at_once.denominator, (layer.kernel + layer.stride) ** 2)
    allowed = 2**63 // (2**5 * OUTPUT_BITS * padding)
    of_one_tile = 8 * array.output_bytes * layer.kernel**2 * (layer.in_channels + at_once.numerator)
    if layer.macs >= allowed or of_one_tile >= 2**63:
        raise UsageError(
            f"{layer} has {layer.macs} multiply-accumulates: allowed are fewer than {allowed}, so that counts of bits "
            "stay below 2**63; estimate a part of the batch and multiply"
        )


def _nothing_fits(array: BitFusion, layer: Layer, tiles: Tiles) -> UsageError:
    """The error that says how far the smallest tile is from fitting."""
    smallest = tile_bits(array, layer, Tiles(*(sizes[:1] for sizes in tiles)))
    needs = ", ".join(
        f"{name} {int(bits)} of {room}"
        for name, bits, room in zip(smallest._fields, smallest, _half_buffers(array), strict=True)
    )
    return UsageError(
        f"no tile of {layer} fits half of each buffer: the smallest needs (bits, of those allowed) {needs}; give a "
        "larger weight_bytes, input_bytes or output_bytes, or fewer bits"
    )
