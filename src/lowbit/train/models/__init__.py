"""The networks that the command line trains, each in plain torch modules so that conversion applies.

One family a file; `table.py` knows them all by name.
"""

from lowbit.train.models.mlp import MLP
from lowbit.train.models.mobilenet import InvertedResidual, MobileNetV2
from lowbit.train.models.recurrent import LSTM
from lowbit.train.models.resnet import BasicBlock, Bottleneck, ResNet
from lowbit.train.models.table import blocks, build, names
from lowbit.train.models.transformer import GPT, Attention, TransformerBlock

__all__ = [
    "GPT",
    "LSTM",
    "MLP",
    "Attention",
    "BasicBlock",
    "Bottleneck",
    "InvertedResidual",
    "MobileNetV2",
    "ResNet",
    "TransformerBlock",
    "blocks",
    "build",
    "names",
]
