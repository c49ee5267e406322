"""Batch normalisation in low precision: Range Batch-Norm, and batch normalisation whose terms have formats.

Range Batch-Norm is batch normalisation whose scale is the range of the batch instead of its variance.

Notation: x input ``(B, C, *size)``, mu mean, N = B * prod(size) values per channel, K chunks of n_k values
(batch-major), R_k their range, kappa a constant, d the divisor.

``sigma = kappa / K * sum_k R_k / sqrt(2 ln n_k)``, ``y = gamma (x - mu) / d + beta``.
"""

from lowbit.nn.norm.function import range_batch_norm
from lowbit.nn.norm.fused import FusedSequential, has_fused_pair
from lowbit.nn.norm.layers import NormSite, RangeBatchNorm1d, RangeBatchNorm2d, RangeBatchNorm3d
from lowbit.nn.norm.setting import NormSetting
from lowbit.nn.norm.statistics import KAPPA, range_statistics
from lowbit.nn.norm.terms import TermBatchNorm1d, TermBatchNorm2d, TermBatchNorm3d

__all__ = [
    "KAPPA",
    "FusedSequential",
    "NormSetting",
    "NormSite",
    "RangeBatchNorm1d",
    "RangeBatchNorm2d",
    "RangeBatchNorm3d",
    "TermBatchNorm1d",
    "TermBatchNorm2d",
    "TermBatchNorm3d",
    "has_fused_pair",
    "range_batch_norm",
    "range_statistics",
]
