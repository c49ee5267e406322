"""How one tensor of an optimiser is kept between steps: as codes, or as values that lie on a format's grid."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lowbit.errors import UsageError, shown, unknown
from lowbit.inputs.checks import check_keys
from lowbit.numerics.codebooks import BOOKS, blocks_of, decode, encode
from lowbit.numerics.formats import BF16, FP32, Format, integer
from lowbit.numerics.quantizer import quantize
from lowbit.numerics.rounding import noise_key, step_key, tensor_id, uniform_noise

StateFormat = Literal["fp32", "int8", "dynamic8"] | Format
WeightFormat = Literal["fp32", "bf16", "int8"] | Format
Rounding = Literal["nearest", "stochastic"]

_WEIGHTS: dict[str, Format] = {
    "fp32": FP32,
    "bf16": BF16.replace(rounding="stochastic"),
    "int8": integer(bits=8, zero="symmetric", granularity="output-channel", rounding="stochastic"),
}


def weight_format(weights: WeightFormat) -> Format:
    """The format that a name of stored weights stands for: both round stochastically.

    Raises:
        UsageError: an unknown name.
    """
    if not isinstance(weights, str):
        return weights
    if weights not in _WEIGHTS:
        raise unknown("format of weights", weights, _WEIGHTS)
    return _WEIGHTS[weights]


def check_state_format(states: object) -> None:
    """Raise a UsageError unless it is a name of a code book, ``"fp32"`` or a format."""
    names = get_args(get_args(StateFormat)[0])
    if not isinstance(states, Format) and states not in names:
        raise unknown("format of optimizer states", states, names)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The counter-based noise of one step of an optimiser.

    All processes of a distributed run draw the same, whatever their rank: their copies of a weight must stay equal.

    Args:
        seed: of all noise.
        step: how many steps the optimiser did, this one included.
    """

    seed: int
    step: int

    def field(self, parameter: int, name: str, x: Tensor) -> Tensor:
        """The noise for one tensor of a parameter, given the parameter's number."""
        return uniform_noise(self._key(parameter, name), x.shape, x.device)

    def words(self, parameter: int, name: str) -> tuple[int, int]:
        """The words of that field."""
        first, second = self._key(parameter, name).tolist()
        return first, second

    def _key(self, parameter: int, name: str) -> Tensor:
        key = step_key(self.seed, torch.tensor(self.step, dtype=torch.int64, device="cpu"))
        return noise_key(key, tensor_id(f"parameter {parameter}", "update", name))


def on_grid(x: Tensor, fmt: Format, draws: Draws, parameter: int, name: str) -> Tensor:
    """`x` rounded to a format, in its dtype; a scale for each output channel is one for each index of the first dim.

    Vectors have no output channels: in such a format they stay as they are.
    """
    if not rounds(fmt, x):
        return x
    dims = tuple(range(1, x.dim())) if fmt.granularity == "output-channel" else None
    axis = -1 if fmt.granularity == "block" or fmt.transform.along_axis else None
    wide = x.detach() if x.dtype in (torch.float32, torch.float64) else x.detach().float()
    noise = draws.words(parameter, name) if fmt.stochastic else None
    return quantize(wide, fmt, dims=dims, axis=axis, noise=noise).values.to(x.dtype)


def rounds(fmt: Format, x: Tensor) -> bool:
    """Whether a format changes a tensor of that many dims at all."""
    return fmt != FP32 and not (fmt.granularity == "output-channel" and x.dim() < 2)


@dataclass(frozen=True, kw_only=True)
class Coding:
    """How states become codes.

    Args:
        block: values that share a scale.
        smallest: tensors of fewer values stay as they are.
        rounding: to the nearest code, or by noise.
    """

    block: int
    smallest: int
    rounding: Rounding

    def takes(self, value: object) -> bool:
        """Whether a state is a floating-point tensor of enough values; counters and small tensors are not."""
        return isinstance(value, Tensor) and value.is_floating_point() and value.numel() >= self.smallest

    def pack(self, x: Tensor, book: str, draws: Draws, parameter: int, name: str) -> dict[str, Any]:
        """A state as codes, scales and the name of its dtype."""
        noise = draws.words(parameter, name) if self.rounding == "stochastic" else None
        codes, scales = encode(x, BOOKS[book], block=self.block, noise=noise)
        return {"codes": codes, "scales": scales, "dtype": str(x.dtype).removeprefix("torch.")}

    def unpack(self, packed: dict[str, Any], book: str, like: Tensor) -> Tensor:
        """The state again, in its dtype and, where the shapes agree, in the layout of the parameter `like`."""
        values = decode(packed["codes"], packed["scales"], BOOKS[book], block=self.block)
        values = values.to(getattr(torch, packed["dtype"]))
        if values.shape == like.shape and like.stride() != values.stride():
            values = torch.empty_like(like, dtype=values.dtype).copy_(values)
        return values

    def check(self, what: str, packed: object) -> None:
        """Raise a UsageError unless a value is what `pack` makes."""
        check_keys(what, packed, ("codes", "scales", "dtype"))
        assert isinstance(packed, dict)
        codes, scales, dtype = packed["codes"], packed["scales"], packed["dtype"]
        right = isinstance(codes, Tensor) and codes.dtype == torch.uint8
        right = right and isinstance(scales, Tensor) and scales.dtype == torch.float32
        if not right or scales.numel() != blocks_of(codes.numel(), self.block):
            raise UsageError(f"{what}: expected uint8 codes, and a float32 scale for each {self.block} of them")
        if dtype not in ("float32", "float64", "bfloat16", "float16"):
            raise UsageError(f"{what}: dtype={shown(dtype)}: give a floating-point type of torch")
