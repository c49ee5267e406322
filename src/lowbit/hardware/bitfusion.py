"""BitFusion: cycles, traffic and energy of a layer, or of the products of training, at any width.

The formulas and figures are those of the authors' simulator. These are ours: widths above
`pmax`, `snap_bits`, the mapping of training, the roofline, and the refusal of sizes for which no energy is published.

These are not counted: pooling, normalisation, activation functions, leakage, energy while the array waits, and the
arithmetic that quantises. These are not modelled: groups, dilation, and kernels and images that are not square.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import final

from lowbit.evidence.records import Product
from lowbit.hardware import mapping
from lowbit.hardware.array import Array, Layer, check_bits
from lowbit.hardware.estimate import Estimate, TrainingEstimate
from lowbit.hardware.tiling import search
from lowbit.inputs.checks import checked


@final
@dataclass(frozen=True, kw_only=True)
class BitFusion(Array):
    """A BitFusion accelerator; the defaults are the authors' array of Eyeriss's size (bf_e_conf.ini).

    A Fusion Unit has 2-bit multipliers that it combines: ``P = floor(pmax/max(a,pmin)) floor(pmax/max(w,pmin))``
    products of widths a and w per cycle, so 3 bits run as fast as 4, and 5 to 7 as 8, though they move fewer bits.
    Our rule for widths above `pmax` has ``1/ceil(a/pmax)`` in place of ``floor(pmax/a)``: several units together make
    one product, so that 32 x 32 bits take 16 times the cycles of 8 x 8. Energies of such units are not published, so a
    unit is charged as below `pmax`. Fusion Units are published for up to 16 bits; an estimate for more has a note that
    states this rule.

    Args:
        rows: N, Fusion Units over which inputs are spread.
        columns: M, Fusion Units over which output channels are spread.
        pmax: widest operand of one Fusion Unit in bits, a power of two up to 16.
        pmin: narrowest operand that is still faster than a wider one, a power of two up to `pmax`.
        weight_bytes: size of the weight buffer. A tile may fill half of each buffer, while the other half is loading.
        input_bytes: size of the input buffer.
        output_bytes: size of the output buffer.
        dram_bits_per_cycle: bits to or from DRAM in one cycle.
        frequency: cycles per second.
        energies: what each event costs. An energy that is left open is that of the authors' tables for these sizes; if
            they lack it, the array is refused until the energy is given.
        snap_bits: whether widths are first rounded up to a width that the array is made for, ``pmin * 2**i``
            (2, 4, 8, 16, 32, 64), in memory too. The array computes as fast as without, and more bits are moved.

    Raises:
        UsageError: a value outside the above, or an energy that is neither given nor published.

    Source: Sharma et al., Bit Fusion, ISCA 2018, arXiv:1712.01507; hsharma35/bitfusion at 04ec1c8.
    """

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

        The search tries tiles of every power of two and all loop orders. It takes the fewest cycles, of those the least
        energy, and of those the one that the authors' simulator meets first. Results are cached. Energy only breaks
        ties, so more bits can cost less of it. They can even cost a few cycles less: whatever stays in a buffer is
        loaded before the first tile, and at fewer bits more of it stays.

        Args:
            kernel: K, in pixels; 1 for a linear layer.
            output_size: O, in pixels; 1 for a linear layer.
            stride: S, in pixels; 1 for a linear layer.
            in_channels: input channels or features.
            out_channels: output channels or features.
            batch: samples. All results are for the whole batch.
            input_bits: width of `input`, 1 to 64.
            weight_bits: width of `weight`, 1 to 64.
            first_layer: whether the layer reads the network's input, which comes unfolded into patches. The
                authors do not set it for linear layers.

        Returns:
            An estimate that equals the authors' simulator in every count, for widths up to `pmax`.

        Raises:
            UsageError: a size or width outside the above, no tile fits the buffers, or the counts pass 64 bits.
        """
        return self._run(
            Layer(
                kernel=kernel,
                output_size=output_size,
                stride=stride,
                in_channels=in_channels,
                out_channels=out_channels,
                batch=batch,
                input_bits=input_bits,
                weight_bits=weight_bits,
                first_layer=first_layer,
            )
        )

    @checked
    def product(self, product: Product, *, first_layer: bool = False) -> Estimate:
        """What one call of a product costs, mapped as `lowbit.hardware.mapping` says.

        Args:
            product: from a ledger. A float operand is charged as an integer of its width.
            first_layer: whether the layer reads the network's input, which comes unfolded; counts for the output of
                convolutions.

        Raises:
            UsageError: nothing is multiplied; and as for `estimate`.
        """
        layer, times = mapping.layers(product, first_layer=first_layer)
        one = self._run(layer)
        return dataclasses.replace(one * times, loops=one.loops)

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

        The authors' model has inference only, and the mapping onto its layers is ours: see
        `lowbit.hardware.mapping.square`. The update of the weights and the quantising of operands are not counted.

        Args:
            kernel: as in `estimate`, like all others that are not listed here.
            output_size: O, in pixels.
            stride: S, in pixels.
            in_channels: I.
            out_channels: F.
            batch: samples.
            input_bits: width of `input` in `output` and in `grad_weight`.
            weight_bits: width of `weight` in `output` and in `grad_input`.
            grad_bits: width of `grad_output`, 1 to 64.
            input_size: side of the layer's input in pixels, padding left out; 1 for a linear layer.
            bifurcated_bits: width of `grad_output` in `grad_weight`, if it differs (gradient bifurcation);
                None: `grad_bits`.
            first_layer: whether the layer reads the network's input; if so, it lacks a `grad_input`.

        Raises:
            UsageError: as for `estimate`.
        """
        check_bits("grad_bits", grad_bits)
        if bifurcated_bits is not None:
            check_bits("bifurcated_bits", bifurcated_bits)
        layer = partial(
            mapping.square,
            kernel=kernel,
            output_size=output_size,
            input_size=input_size,
            stride=stride,
            in_channels=in_channels,
            out_channels=out_channels,
            batch=batch,
            first_layer=first_layer,
        )
        wide = grad_bits if bifurcated_bits is None else bifurcated_bits
        return TrainingEstimate(
            output=self._run(layer("output", bits=(input_bits, weight_bits))),
            grad_input=None if first_layer else self._run(layer("grad_input", bits=(grad_bits, weight_bits))),
            grad_weight=self._run(layer("grad_weight", bits=(wide, input_bits))),
        )

    def _run(self, layer: Layer) -> Estimate:
        """The estimate of a layer, at the widths that the array works with."""
        snapped = dataclasses.replace(
            layer,
            input_bits=self.snapped("input_bits", layer.input_bits),
            weight_bits=self.snapped("weight_bits", layer.weight_bits),
        )
        return search(self, snapped)
