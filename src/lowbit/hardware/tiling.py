"""The best tiling of a product on an array of Fusion Units, by an exact search over tiles and loop orders.

Notation as in `lowbit.hardware.array`. Small letters are sizes of a tile, n is a count: ``n_i = ceil(I / i)`` tiles
cover I. The kernel is never tiled; rows and columns of the output are tiled alike.

A loop over tiles has five levels, written from outer to inner: ``b`` batch, ``w`` output column, ``h`` output
row, ``i`` input channels, ``o`` output channels.

All formulas, peculiarities included, are those of the authors' simulator (hsharma35/bitfusion at 04ec1c8; Sharma et
al., Bit Fusion, ISCA 2018, arXiv:1712.01507).
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.errors import UsageError
from lowbit.hardware.array import OUTPUT_BITS, UNIT_BITS, Array, Layer, ceil_div
from lowbit.hardware.energies import BUFFERS
from lowbit.hardware.estimate import Estimate, Loop, Store

LOOPS = "bwhio"
NAMES = {"b": "batch", "w": "output_column", "h": "output_row", "i": "in_channels", "o": "out_channels"}
# The loops that each stream of data depends on; the others may reuse a tile that is already in the buffer.
WEIGHT_LOOPS, INPUT_LOOPS, OUTPUT_LOOPS = "io", "bwhi", "bwho"

# Loop orders as the simulator visits them: it iterates over a Python 2 set, and of equally good orders the first one
# wins. These are 60 of the 120: exchanging w and h does not change a count, so the later of such a pair never wins.
ORDERS = """
    oibhw bowih hbwoi biowh obwih oihbw hwoib ohbwi ohibw whibo ihobw boiwh hwiob oiwhb bihow
    obiwh owbih iowbh wihbo wohbi hbiwo ihwbo wbohi bwohi whbio ibohw wiboh hibwo bwhoi bwhio
    bwoih wboih iobhw hiobw hiowb ihbow obhwi biwho iowhb hoiwb bohwi ihowb hbiow ibwoh whobi
    owhib iwhob hiwob wobih owhbi ibwho hbwio hwboi hoibw ihbwo ohiwb hobwi wohib bhiwo bhiow
""".split()  # noqa: SIM905  # a list would be 60 lines


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

    def energy(self, array: Array) -> Tensor:
        """Energy in nJ, float64 ``(T, R)``, summed in the simulator's order so that equal stays equal."""
        energy = self.compute_cycles.double() * array.core_nj
        for name in self._fields[2:]:
            each = array.costs["dram" if name.startswith("dram") else name]
            energy = energy + getattr(self, name).double() * each
        return energy


def all_tiles(array: Array, layer: Layer) -> Tiles:
    """Every tile of the search: ``min(2**i, X)`` in each dimension, output channels in multiples of M.

    They are in the simulator's order: output channels change fastest. A first layer has any power of two of them.
    """
    columns = 1 if layer.first_layer else array.columns

    def sizes(whole: int, step: int = 1) -> Tensor:
        tries = (ceil_div(whole, step) - 1).bit_length() + 1
        return torch.tensor([min(step << i, whole) for i in range(tries)], dtype=torch.int64, device="cpu")

    tiles = torch.cartesian_prod(
        sizes(layer.batch), sizes(layer.output_size), sizes(layer.in_channels), sizes(layer.out_channels, columns)
    )
    return Tiles(*tiles.split(1, dim=1))


class _Padded(NamedTuple):
    """Work of a tile, rounded up to the array: int64 ``(T, 1)`` each."""

    passes: Tensor  # how often the rows are filled for one output
    sums: Tensor  # products that are added for one output, padding included
    oc: Tensor  # output channels, a multiple of M
    weights: Tensor  # weights of one output channel, padding included


def _padded(array: Array, layer: Layer, tiles: Tiles) -> _Padded:
    """Round a tile up to the ``N P`` products and M output channels that the array computes at once."""
    at_once = array.rows * array.products_per_unit(layer.input_bits, layer.weight_bits)
    area = layer.kernel**2

    def pad(passes: Tensor) -> Tensor:
        return ceil_div(passes * at_once.numerator, at_once.denominator)

    def fills(values: Tensor) -> Tensor:
        return ceil_div(values * at_once.denominator, at_once.numerator)

    unfolded, channels = fills(area * tiles.ic), fills(tiles.ic)
    passes = unfolded if layer.first_layer else area * channels
    sums = pad(unfolded) if layer.first_layer else area * pad(channels)
    oc = ceil_div(tiles.oc, array.columns) * array.columns
    return _Padded(passes=passes, sums=sums, oc=oc, weights=pad(unfolded))


class _Streams(NamedTuple):
    """Bits of one tile of each stream of data, int64 ``(T, 1)``."""

    weight: Tensor
    input: Tensor
    output: Tensor


def tile_bits(array: Array, layer: Layer, tiles: Tiles) -> _Streams:
    """Bits of a tile in each buffer, padding of weights and outputs included."""
    padded = _padded(array, layer, tiles)
    side = layer.kernel + (tiles.o - 1) * layer.stride
    pixels = (tiles.o * layer.kernel) ** 2 if layer.first_layer else side**2
    return _Streams(
        weight=padded.weights * tiles.oc * layer.weight_bits,
        input=tiles.b * tiles.ic * pixels * layer.input_bits,
        output=tiles.b * tiles.o**2 * padded.oc * OUTPUT_BITS,
    )


def _half_buffers(array: Array) -> tuple[int, int, int]:
    """Bits that a tile may have in the weight, input and output buffer: half of each, while the other half loads."""
    return 4 * array.weight_bytes, 4 * array.input_bytes, 4 * array.output_bytes


def fits(array: Array, layer: Layer, tiles: Tiles) -> Tensor:
    """Which tiles fit half of each buffer, bool ``(T,)``."""
    bits = tile_bits(array, layer, tiles)
    each = [tile <= room for tile, room in zip(bits, _half_buffers(array), strict=True)]
    return torch.cat(each, dim=1).all(dim=1)


def _walk(tile: Tensor, room: int, loops: str, counts: Tensor, orders: Tensor) -> tuple[Tensor, Tensor]:
    """Bits of one stream over all loops, and the most that stays in its buffer at once.

    It goes from the innermost loop outwards and adds up what each loop goes through. A loop that the stream does not
    depend on reuses what is in the buffer if everything so far is there.

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
    """Bits that the array reads from each buffer for one tile, with one operand held still.

    Inputs, outputs or weights are held still, whichever moves the fewest bits; inputs win a tie, then outputs.
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


def evaluate(array: Array, layer: Layer, tiles: Tiles, orders: Tensor) -> Costs:
    """Cycles and bits of every tile under every loop order.

    Compute cycles are ``n_tiles b o^2 ceil(oc/M) passes``. Tiles are loaded while others are computed. Stalls are the
    loads that this does not hide, the first load and the last store. Outputs are 32 bits wide and are loaded even when
    first touched, so DRAM reads weights, inputs and outputs, and writes outputs.

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
    stall_cycles = (
        (ceil_div(hidden, width) - compute_cycles).clamp(min=0) + ceil_div(first, width) + ceil_div(last, width)
    )
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
def search(array: Array, layer: Layer) -> Estimate:
    """The fewest cycles, of those the least energy, of those the first order, of those the first tile.

    Raises:
        UsageError: no tile fits the buffers, or the counts pass 64 bits.
    """
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


def _estimate(array: Array, layer: Layer, tile: Tiles, costs: Costs, order: str) -> Estimate:
    """The costs of one tile under one order as plain numbers."""
    n = {name: int(value) for name, value in costs._asdict().items()}
    nj = array.costs
    sizes = dict(zip(LOOPS, map(int, (tile.b, tile.o, tile.o, tile.ic, tile.oc)), strict=True))
    counts = dict(zip(LOOPS, tile.counts(layer)[0].tolist(), strict=True))

    def buffer(name: str) -> Store:
        read, written = n[f"{name}_read"], n[f"{name}_write"]
        energy = read * nj[f"{name}_read"] + written * nj[f"{name}_write"]
        return Store(name=f"{name}_buffer", read=read, written=written, energy_nj=energy)

    dram = n["dram_read"] + n["dram_write"]
    return Estimate(
        macs=layer.macs,
        compute_cycles=n["compute_cycles"],
        stall_cycles=n["stall_cycles"],
        memory_cycles=ceil_div(dram, array.dram_bits_per_cycle),
        seconds=(n["compute_cycles"] + n["stall_cycles"]) / array.frequency,
        core_nj=n["compute_cycles"] * array.core_nj,
        stores=(
            *map(buffer, BUFFERS),
            Store(name="dram", read=n["dram_read"], written=n["dram_write"], energy_nj=dram * nj["dram"]),
        ),
        loops=tuple(Loop(NAMES[loop], counts[loop], sizes[loop]) for loop in order),
        notes=_notes(array, layer),
    )


def _notes(array: Array, layer: Layer) -> tuple[str, ...]:
    """The rule for widths for which Fusion Units are not published."""
    if max(layer.input_bits, layer.weight_bits) <= UNIT_BITS:
        return ()
    part = array.pmax
    return (
        f"widths above {UNIT_BITS} bits: b bits are charged as ceil(b/{part}) parts of {part} bits and each pair of "
        f"parts as one product, floats as integers; words move at b bits, partial sums at {OUTPUT_BITS}",
    )


def _check_range(array: Array, layer: Layer) -> None:
    """Refuse a layer whose counts could pass 64 bits in some tiling of the search.

    Each of five dimensions less than doubles when it is cut into tiles. A product moves at most the bits of the widest
    of operands and output, times the padding of a tile of one value or the overlap of patches. The bits of a single
    tile are also compared over all products.
    """
    at_once = array.rows * array.products_per_unit(layer.input_bits, layer.weight_bits)
    padding = 1 + max(array.columns, at_once.numerator, at_once.denominator, (layer.kernel + layer.stride) ** 2)
    widths = layer.input_bits, layer.weight_bits, OUTPUT_BITS
    allowed = 2**63 // (2**5 * max(widths) * padding)
    places = ceil_div(4 * array.output_bytes, OUTPUT_BITS)
    of_one_tile = places * layer.kernel**2 * (layer.in_channels + at_once.numerator) * sum(widths)
    if layer.macs >= allowed or of_one_tile >= 2**63:
        raise UsageError(
            f"{layer} has {layer.macs} multiply-accumulates: allowed are fewer than {allowed}, so that counts of bits "
            "stay below 2**63; estimate a part of the batch and multiply"
        )


def _nothing_fits(array: Array, layer: Layer, tiles: Tiles) -> UsageError:
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
