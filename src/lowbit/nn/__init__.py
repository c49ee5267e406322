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
from lowbit.nn.norm import (
    RangeBatchNorm1d,
    RangeBatchNorm2d,
    RangeBatchNorm3d,
    TermBatchNorm1d,
    TermBatchNorm2d,
    TermBatchNorm3d,
)
from lowbit.nn.recurrent import QuantGRU, QuantGRUCell, QuantLSTM, QuantLSTMCell

# The twins of layers that have products. A layer is added by its file and a row here.
PRODUCT_LAYERS: dict[type[nn.Module], type[QuantLayer]] = {
    twin.plain: twin
    for twin in (
        QuantLinear,
        QuantConv1d,
        QuantConv2d,
        QuantConv3d,
        QuantConvTranspose1d,
        QuantConvTranspose2d,
        QuantConvTranspose3d,
        QuantLSTM,
        QuantGRU,
        QuantLSTMCell,
        QuantGRUCell,
        QuantMultiheadAttention,
    )
}

# The twins of batch normalisations, by the kind of normalisation of a recipe.
NORM_LAYERS: dict[type[nn.Module], tuple[type[QuantLayer], ...]] = {
    nn.BatchNorm1d: (RangeBatchNorm1d, TermBatchNorm1d),
    nn.BatchNorm2d: (RangeBatchNorm2d, TermBatchNorm2d),
    nn.BatchNorm3d: (RangeBatchNorm3d, TermBatchNorm3d),
}

# Layers with products that lack a twin, and why.
REFUSED_LAYERS: dict[type[nn.Module], str] = {
    nn.Bilinear: "its product of three operands has no quantised form here",
    nn.RNN: "only LSTM and GRU have quantised forms",
    nn.RNNCell: "of cells, only those of LSTM and GRU have quantised forms",
}

__all__ = [
    "NORM_LAYERS",
    "PRODUCT_LAYERS",
    "REFUSED_LAYERS",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantGRU",
    "QuantGRUCell",
    "QuantLSTM",
    "QuantLSTMCell",
    "QuantLayer",
    "QuantLinear",
    "QuantMultiheadAttention",
    "RangeBatchNorm1d",
    "RangeBatchNorm2d",
    "RangeBatchNorm3d",
    "TermBatchNorm1d",
    "TermBatchNorm2d",
    "TermBatchNorm3d",
]
