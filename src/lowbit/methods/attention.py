"""What a recipe says about attention: the formats of its seven products, and the tiles that share scales.

Notation: q, k, v queries, keys and values of one head; S = q k^T the scores, P = softmax(S) the shares, O = P v;
g = grad_output, dP = g v^T, dS = P (dP - rowsum(g O)).
"""

from dataclasses import dataclass

from lowbit.errors import UsageError
from lowbit.inputs.checks import check_fields
from lowbit.numerics.formats import BF16, Format
from lowbit.numerics.transforms import NoTransform

# Two products with three directions each, as a layer has them: S = q k^T and O = P v. Each operand has its role in the
# product, as in `lowbit.methods.operands`, and the name of its format.
OPERANDS: dict[tuple[str, str], tuple[tuple[str, str], tuple[str, str]]] = {
    ("scores", "output"): (("input", "q"), ("weight", "k")),
    ("scores", "grad_input"): (("grad_output", "ds"), ("weight", "k")),
    ("scores", "grad_weight"): (("grad_output", "ds"), ("input", "q")),
    ("values", "output"): (("input", "p"), ("weight", "v")),
    ("values", "grad_input"): (("grad_output", "dp"), ("weight", "dp")),
    ("values", "grad_weight"): (("grad_output", "grad_output"), ("input", "p")),
}


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The formats of attention, see `lowbit.functional.attention`.

    Every matrix of a head is cut into tiles of `tile` positions, and each tile is an operand with scales of its own:
    one for the tile (``"tensor"``), or one for each index that the product keeps (``"kept-channel"``). Bits are
    constant: no schedule or gate changes them.

    Args:
        q: queries, in S and in dK.
        k: keys, in S and in dQ.
        p: shares, in O and in dV; unsigned where ``zero = "integer"``, since no share is less than 0.
        v: values, in O.
        grad_output: in dV.
        ds: gradient of the scores, in dQ and in dK.
        dp: both operands of dP, `grad_output` and `v`.
        smooth_k: whether the mean of a head's keys over all positions is subtracted first. It adds one number to every
            score of a query, which the softmax takes out again, and leaves a narrower range to quantise.
        tile: positions of queries, and of keys, in a tile.

    Source: Zhang et al. 2026, SageBwd, arXiv:2603.02170.
    """

    q: Format
    k: Format
    p: Format
    v: Format
    grad_output: Format
    ds: Format
    dp: Format = BF16
    smooth_k: bool = True
    tile: int = 64

    def __post_init__(self) -> None:
        check_fields(self)
        if self.tile < 1:
            raise UsageError(f"attention.tile={self.tile}: the positions of a tile are 1 or more")
        for name in ("q", "k", "p", "v", "grad_output", "ds", "dp"):
            _check_operand(f"attention.{name}", getattr(self, name))

    def formats(self, part: str, product: str) -> tuple[Format, Format]:
        """The formats of the two operands of a product, in the order of `OPERANDS`."""
        (_, first), (_, second) = OPERANDS[part, product]
        return getattr(self, first), getattr(self, second)

    def bits(self, part: str, product: str) -> tuple[int, int]:
        """Their widths."""
        first, second = self.formats(part, product)
        return first.bits, second.bits


def _check_operand(where: str, fmt: Format) -> None:
    """Raise a UsageError for a format that no operand of attention can have."""
    if fmt.running is not None or fmt.widths:
        raise UsageError(f"{where} is {fmt}: attention keeps no running range, and its bits never change")
    if fmt.granularity not in ("tensor", "kept-channel") or (fmt.scale is not None and fmt.scale.range.per_tensor):
        raise UsageError(
            f"{where} is {fmt}: a tile has one scale (granularity 'tensor') or one for each index that the product "
            "keeps ('kept-channel'), made from its own extremes"
        )
    if not isinstance(fmt.transform, NoTransform):
        raise UsageError(f"{where} has transform={fmt.transform.kind!r}: operands of attention have none")
