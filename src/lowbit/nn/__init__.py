"""Quantised layers, each a subclass of the plain layer that it stands for."""

from torch import nn

from lowbit.nn.attention import QuantMultiheadAttention
from lowbit.nn.layers import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantLayer,
    QuantLinear,
)
from lowbit.nn.norm import RangeBatchNorm1d, RangeBatchNorm2d, RangeBatchNorm3d
from lowbit.nn.recurrent import QuantGRU, QuantLSTM

# The twin of each plain layer type that has products.
PRODUCT_LAYERS: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
    nn.LSTM: QuantLSTM,
    nn.GRU: QuantGRU,
    nn.MultiheadAttention: QuantMultiheadAttention,
}

# The twin of each batch normalisation, for recipes that replace it.
NORM_LAYERS: dict[type[nn.Module], type[QuantLayer]] = {
    nn.BatchNorm1d: RangeBatchNorm1d,
    nn.BatchNorm2d: RangeBatchNorm2d,
    nn.BatchNorm3d: RangeBatchNorm3d,
}

__all__ = [
    "NORM_LAYERS",
    "PRODUCT_LAYERS",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantGRU",
    "QuantLSTM",
    "QuantLayer",
    "QuantLinear",
    "QuantMultiheadAttention",
    "RangeBatchNorm1d",
    "RangeBatchNorm2d",
    "RangeBatchNorm3d",
]
