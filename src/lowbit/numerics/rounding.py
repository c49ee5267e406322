"""Rounding to whole numbers, and the noise that stochastic rounding compares with.

Notation: t real value measured in steps of the grid, u uniform noise in [0, 1), h a 32-bit hash.

The noise is counter based: u is a pure function of (seed, step, rank, tensor id, element index). It is therefore the
same for every engine, thread count, memory layout and resume, and nothing is drawn from global state.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
# The two-round finaliser "lowbias32" (C. Wellons, hash-prospector): shift 16, multiply, shift 15, multiply, shift 16.
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B
# The golden ratio in 32 bits: it spreads neighbouring indices. Without it, rows of a tensor are not independent.
_SPREAD = 0x9E3779B1


def round_nearest(t: Tensor) -> Tensor:
    """Round to the nearest whole number, halves to the even one: 0.5 -> 0, 1.5 -> 2, -2.5 -> -2."""
    return torch.round(t)


def round_stochastic(t: Tensor, noise: Tensor) -> Tensor:
    """Round up iff ``noise < t - floor(t)``, so that the mean over the noise is `t` and whole numbers never move.

    Args:
        t: float, any shape.
        noise: uniform draws in [0, 1), the shape of `t`. It is compared with the fraction, never added:
            in float32 ``127 + 0.99999997`` is 128.

    Returns:
        Whole numbers of the dtype of `t`, less than 1 away from it; inf and nan give nan.

    Source: Gupta et al. 2015, arXiv:1502.02551, section 3.
    """
    down = t.floor()
    # fraction - noise lies in (-1, 1) and is 0 only if both are equal, so its ceiling is the comparison.
    return down.add_((t - down).sub_(noise).ceil_())


def round_to(t: Tensor, noise: Tensor | None) -> Tensor:
    """Whole numbers, nearest or by noise."""
    return round_nearest(t) if noise is None else round_stochastic(t, noise)


def exponent_of(t: Tensor) -> Tensor:
    """``floor(log2 |t|)`` of float64, exactly, by extraction; -1 of 0."""
    return torch.frexp(t).exponent - 1


def power_of_two(exponent: Tensor) -> Tensor:
    """``2**exponent`` as float64, exactly; the nearest of its normal powers for exponents outside -1022 to 1023."""
    return ((exponent.to(torch.int64).clamp(-1022, 1023) + 1023) << 52).view(torch.float64)


def round_to_float(t: Tensor, mantissa: int, lowest: int, noise: Tensor | None) -> Tensor:
    """`t` rounded to `mantissa` bits after the leading one, with subnormals below ``2**lowest``; float64.

    Args:
        t: float64.
        mantissa: bits after the leading one.
        lowest: the exponent of the smallest normal number.
        noise: draws in [0, 1); None rounds to nearest, halves to even.
    """
    step = power_of_two(exponent_of(t).clamp(min=lowest) - mantissa)
    return round_to(t / step, None if noise is None else noise.to(t)) * step


def unit_of(scale: Tensor, most: float) -> Tensor:
    """The unit of which the largest scale is `most`; 1 if all scales are 0."""
    if not scale.numel():
        return scale.new_ones(())
    unit = scale.amax() / most
    return torch.where(unit == 0, torch.ones_like(unit), unit)


Word = TypeVar("Word", int, Tensor)


def _mix(h: Word) -> Word:
    """Hash a 32-bit value, or an int64 tensor of them: a bijection of [0, 2**32)."""
    h = ((h ^ (h >> 16)) * _MULTIPLIER_1) & _MASK
    h = ((h ^ (h >> 15)) * _MULTIPLIER_2) & _MASK
    return h ^ (h >> 16)


def step_key(seed: int, step: Tensor, *, rank: int = 0) -> Tensor:
    """The hash of seed, step and rank from which all noise of one step starts.

    ``k = mix(mix(mix(mix(seed_lo) ^ seed_hi) ^ step_lo) ^ step_hi)``: steps below 2**32 of one seed never share it.
    Rank 0 has k itself, and any other rank ``mix(mix(k ^ c) ^ rank)``: ranks in one step never share it.

    Args:
        seed: any Python integer; its low 64 bits count.
        step: int64 scalar tensor, 0 or more.
        rank: which process of a distributed run this is, 0 to 2**32 - 1.

    Returns:
        int64 scalar tensor in [0, 2**32) on the device of `step`.
    """
    number = int(step)  # as a Python number: on scalar tensors the same hash takes 100 microseconds
    key = _mix(_mix(_mix(_mix(seed & _MASK) ^ (seed >> 32 & _MASK)) ^ (number & _MASK)) ^ (number >> 32 & _MASK))
    return torch.tensor(_mix(_mix(key ^ 0x1B56C4E9) ^ rank) if rank else key, dtype=torch.int64, device=step.device)


def noise_key(key: Tensor, tensor_id: int) -> Tensor:
    """The two 32-bit words that select one noise field: ``mix(mix(key ^ c0) ^ id)`` and ``mix(mix(id ^ c1) ^ key)``.

    Args:
        key: int64 scalar tensor from `step_key`.
        tensor_id: 32-bit identity of the tensor, see `tensor_id`.

    Returns:
        int64 ``(2,)`` on the device of `key`, values in [0, 2**32).
    """
    return torch.stack(_words(key, torch.tensor(tensor_id, dtype=torch.int64, device=key.device)))


def _words(key: Word, tensor_id: Word) -> tuple[Word, Word]:
    return _mix(_mix(key ^ 0xA511E9B3) ^ tensor_id), _mix(_mix(tensor_id ^ 0x63D83595) ^ key)


def tensor_id(layer: str, product: str, operand: str, use: int = 0) -> int:
    """The 32-bit identity of one operand: a CRC of its names and of how often the layer ran before in this step."""
    return zlib.crc32(f"{layer}/{product}/{operand}/{use}".encode())


def uniform_noise(key: Tensor, shape: torch.Size | tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """Noise in [0, 1) in steps of 2**-24: a hash of the row-major logical element index with `key`.

    ``h = i * golden + key[0]; h ^= h >> 16; h *= m1; h ^= key[1]; h ^= h >> 15; h *= m2; h ^= h >> 16;
    u = (h >> 8) / 2**24``
    in 32-bit wrapping integers. The second word enters in the middle, so two fields are not shifts or
    permutations of each other. The index wraps after 2**32 elements.

    Args:
        key: int64 ``(2,)`` from `noise_key`.
        shape: the shape of the tensor to round.
        device: where the noise is made; None: the device of `key`.

    Returns:
        float32 of `shape`, contiguous.
    """
    device = device or key.device
    count = torch.Size(shape).numel()
    index = torch.arange(count, dtype=torch.int64 if count > 2**31 else torch.int32, device=device).to(torch.int32)
    return _uniform(key.to(device), index).reshape(shape)


def uniform_noise_at(key: Tensor, index: Tensor) -> Tensor:
    """A part of a noise field: the draws of `uniform_noise` for the elements of these row-major numbers.

    Args:
        key: int64 ``(2,)`` from `noise_key`.
        index: int64, any shape, on the device of `key`.

    Returns:
        float32 in the shape of `index`.
    """
    return _uniform(key, _as_int32(index & _MASK))


def _uniform(key: Tensor, h: Tensor) -> Tensor:
    """The noise of the elements of these int32 numbers, whose memory it takes."""
    first, second = (_as_int32(word) for word in key.unbind())
    h.mul_(_SPREAD - 2**32).add_(first)
    scratch = torch.empty_like(h)
    _xor_shifted(h, 16, scratch).mul_(_MULTIPLIER_1).bitwise_xor_(second)
    _xor_shifted(h, 15, scratch).mul_(_MULTIPLIER_2 - 2**32)
    _xor_shifted(h, 16, scratch).bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)
    return h.to(torch.float32).mul_(2.0**-24)


def _xor_shifted(h: Tensor, shift: int, scratch: Tensor) -> Tensor:
    """``h ^= h >> shift`` in place, with the shift of unsigned 32-bit integers."""
    torch.bitwise_right_shift(h, shift, out=scratch)
    return h.bitwise_xor_(scratch.bitwise_and_((1 << 32 - shift) - 1))


def _as_int32(word: Tensor) -> Tensor:
    """The int32 with the same 32 bits as a word in [0, 2**32) held in int64."""
    return (word - ((word >> 31) << 32)).to(torch.int32)


class Noise(Protocol):
    """The source of noise for a product's operands."""

    def draw(self, product: str, operand: str, x: Tensor) -> Tensor:
        """Uniform draws in [0, 1) for rounding `x`, in its shape and on its device."""

    def words(self, product: str, operand: str) -> tuple[int, int] | None:
        """The two words that select the noise field, for kernels that make it themselves; None if it is recorded."""

    def branch(self, name: str) -> "Noise":
        """Other noise, for a part of the same operands that is computed separately."""


def field_of(noise: Noise, product: str, operand: str, x: Tensor) -> Tensor | tuple[int, int]:
    """The noise for an operand: on the CPU the words of its noise field, if it has one; otherwise the draws."""
    words = noise.words(product, operand) if x.device.type == "cpu" else None
    return noise.draw(product, operand, x) if words is None else words


@dataclass(frozen=True, kw_only=True)
class CounterNoise:
    """The counter-based noise of one use of one layer in one step.

    Args:
        key: int64 scalar tensor from `step_key`.
        layer: the layer's name, fixed at conversion.
        use: how often the layer ran before in this step.
    """

    key: Tensor
    layer: str
    use: int = 0

    def draw(self, product: str, operand: str, x: Tensor) -> Tensor:
        """The noise field of one operand of one product."""
        key = noise_key(self.key, tensor_id(self.layer, product, operand, self.use))
        return uniform_noise(key, x.shape, x.device)

    def words(self, product: str, operand: str) -> tuple[int, int]:
        """The words of that field."""
        return _words(int(self.key), tensor_id(self.layer, product, operand, self.use))

    def branch(self, name: str) -> "CounterNoise":
        """The noise of a layer with another name."""
        return replace(self, layer=f"{self.layer}#{name}")


@dataclass(frozen=True, kw_only=True)
class RecordedNoise:
    """Noise that was drawn elsewhere, replayed: draws in [0, 1) by (product, operand)."""

    draws: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)

    def draw(self, product: str, operand: str, x: Tensor) -> Tensor:
        """The recorded draws of one operand; a ValueError if none of that shape were recorded."""
        draws = self.draws.get((product, operand))
        if draws is None or draws.shape != x.shape:
            have = {k: tuple(v.shape) for k, v in self.draws.items()}
            raise ValueError(
                f"no recorded noise of shape {tuple(x.shape)} for {operand} in {product}; recorded: {have}"
            )
        return draws.to(x.device)

    def words(self, product: str, operand: str) -> None:  # noqa: ARG002 - recorded noise has none
        """None."""
        return

    def branch(self, name: str) -> "RecordedNoise":  # noqa: ARG002 - records do not distinguish parts
        """The same records: the draws of each part have its shape."""
        return self
