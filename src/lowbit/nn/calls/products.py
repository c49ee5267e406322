"""Products of matrices that functions of torch ask for, and how each is computed if one of its operands is a weight.

A reader takes the arguments of a function and says which two tensors are multiplied, by which operator, and what else
the function does with the result.
"""

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit import functional
from lowbit.products.operators import Linear, Matmul, Op
from lowbit.products.setting import Setting

# Gives the setting of a product, for its input with an axis of samples first.
Settings = Callable[[Tensor], Setting]

# A batch of matrices is multiplied one matrix after the other where each has so many multiplications: only then is the
# product worth a call of an engine of its own. Smaller ones run together, on the reference engine.
WORTH_A_CALL = 2**15


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A product that a function asks for.

    Args:
        operator: its name, e.g. ``"addmm"``.
        left: the first operand.
        right: the second.
        op: what multiplies them, given whether the left one is the weight; None if it cannot be that.
        compute: the function's result, given whether the left one is the weight, and the settings.
    """

    operator: str
    left: Tensor
    right: Tensor
    op: Callable[[bool], Op | None]
    compute: Callable[[bool, Settings], Tensor]


def _matrices(
    operator: str,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    finish: Callable[[Tensor], Tensor] = lambda y: y,
    *,
    shaped: tuple[Tensor, Tensor] | None = None,
) -> Asked:
    """``finish(left right + bias)``; `shaped` are the operands as matrices or batches of them, where they are not."""
    a, b = shaped or (left, right)

    def op(left_is_weight: bool) -> Op:
        x, w = _turned(a, b) if left_is_weight else (a, b)
        return Matmul() if _run_together(x, _without_copies(w)) else Linear()

    def compute(left_is_weight: bool, settings: Settings) -> Tensor:
        if not left_is_weight:
            return finish(_multiplied(a, b, bias, settings))
        y = _multiplied(*_turned(a, b), None, settings).mT
        return finish(y if bias is None else y + bias)

    return Asked(operator=operator, left=left, right=right, op=op, compute=compute)


def _turned(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The operands of ``(a b)^T = b^T a^T``."""
    return b.mT, a.mT


def _without_copies(w: Tensor) -> Tensor:
    """A weight without the axes along which it only repeats itself."""
    while w.dim() > 2 and (w.shape[0] == 1 or w.stride(0) == 0) and w.shape[0]:
        w = w[0]
    return w


def _run_together(x: Tensor, w: Tensor) -> bool:
    """Whether a batch of matrices is one product, see `WORTH_A_CALL`."""
    return w.dim() > 2 and x.shape[-2] * x.shape[-1] * w.shape[-1] < WORTH_A_CALL


def _multiplied(x: Tensor, w: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    """``x (..., M, K) w (..., K, N) + bias (N,)`` for a weight on the right."""
    batch = torch.broadcast_shapes(x.shape[:-2], w.shape[:-2])
    w = _without_copies(w)
    setting = settings(x)
    if w.dim() == 2:
        y = functional.linear(x, w.mT, bias, setting=setting)
        return y if y.shape[:-2] == batch else y.expand(*batch, -1, -1)
    if _run_together(x, w):
        y = functional.matmul(x, w, setting=replace(setting, engine="reference"))
    else:
        each = x.expand(*batch, *x.shape[-2:]).flatten(0, -3), w.expand(*batch, *w.shape[-2:]).flatten(0, -3)
        parts = [
            functional.linear(one, matrix.mT, setting=_branch(setting, i))
            for i, (one, matrix) in enumerate(zip(*each, strict=True))
        ]
        y = torch.stack(parts).reshape(*batch, *parts[0].shape)
    return y if bias is None else y + bias


def _branch(setting: Setting, i: int) -> Setting:
    """The setting of the i-th of several products of one call, with noise of its own."""
    return setting if setting.noise is None else replace(setting, noise=setting.noise.branch(str(i)))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Asked:  # noqa: A002 - torch's argument
    """`F.linear`."""
    if weight.dim() == 1:
        return _matrices(
            "linear",
            input,
            weight,
            finish=lambda y: y.squeeze(-1) if bias is None else y.squeeze(-1) + bias,
            shaped=(_as_row(input), weight.unsqueeze(-1)),
        )
    fits = bias is None or bias.dim() == 1

    def finish(y: Tensor) -> Tensor:
        y = y.squeeze(-2) if input.dim() == 1 else y
        return y if fits or bias is None else y + bias

    return _matrices("linear", input, weight, bias if fits else None, finish, shaped=(_as_row(input), weight.mT))


def _as_row(x: Tensor) -> Tensor:
    return x.unsqueeze(0) if x.dim() == 1 else x


def matmul(input: Tensor, other: Tensor) -> Asked:  # noqa: A002 - torch's argument
    """`torch.matmul` and ``@``."""
    flat = input.dim() == 1, other.dim() == 1
    shaped = _as_row(input), other.unsqueeze(-1) if flat[1] else other

    def finish(y: Tensor) -> Tensor:
        y = y.squeeze(-1) if flat[1] else y
        return y.squeeze(-1 if flat[1] else -2) if flat[0] else y

    return _matrices("matmul", input, other, finish=finish, shaped=shaped)


def reversed_matmul(input: Tensor, other: Tensor) -> Asked:  # noqa: A002 - torch's argument
    """``other @ input`` of a class that does not know tensors."""
    return matmul(other, input)


def mm(input: Tensor, mat2: Tensor) -> Asked:  # noqa: A002 - torch's argument
    """`torch.mm`."""
    return _matrices("mm", input, mat2)


def bmm(input: Tensor, mat2: Tensor) -> Asked:  # noqa: A002 - torch's argument
    """`torch.bmm`."""
    return _matrices("bmm", input, mat2)


def mv(input: Tensor, vec: Tensor) -> Asked:  # noqa: A002 - torch's argument
    """`torch.mv`: a matrix times a vector."""
    return replace(matmul(input, vec), operator="mv")


def addmm(
    input: Tensor,  # noqa: A002 - torch's argument
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    operator: str = "addmm",
) -> Asked:
    """`torch.addmm`; a vector is added as the bias of a layer is."""
    if beta == alpha == 1 and input.dim() == 1:
        return _matrices(operator, mat1, mat2, input)
    return _matrices(operator, mat1, mat2, finish=lambda y: alpha * y + (beta * input if beta else 0))


def baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Asked:  # noqa: A002
    """`torch.baddbmm`."""
    return addmm(input, batch1, batch2, beta=beta, alpha=alpha, operator="baddbmm")


def einsum(equation: Any, *operands: Any) -> Asked | None:
    """Two operands that make a product of batches of matrices; anything else stays as it is."""
    given = operands[0] if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    if not isinstance(equation, str) or len(given) != 2 or not all(isinstance(t, Tensor) for t in given):
        return None
    found = _letters(equation, given)
    if found is None:
        return None
    a, b, out = found
    left, right = given
    batch = [c for c in a if c in b and c in out]
    summed = [c for c in a if c in b and c not in out]
    kept_a, kept_b = [c for c in a if c not in b], [c for c in b if c not in a]
    once = all(len({*t}) == len(t) for t in (a, b, out))
    if not once or {*kept_a, *kept_b, *batch} != {*out} or not summed:
        return None
    sizes = dict(zip(a + b, [*left.shape, *right.shape], strict=True))

    def shaped(t: Tensor, letters: str, order: tuple[list[str], list[str]]) -> Tensor:
        t = t.permute([letters.index(c) for c in (*batch, *order[0], *order[1])])
        axes = [math.prod(sizes[c] for c in group) for group in order]
        return t.reshape(*(sizes[c] for c in batch), *axes)

    def finish(y: Tensor) -> Tensor:
        made = [*batch, *kept_a, *kept_b]
        return y.reshape([sizes[c] for c in made]).permute([made.index(c) for c in out])

    operands_as_matrices = shaped(left, a, (kept_a, summed)), shaped(right, b, (summed, kept_b))
    return _matrices("einsum", left, right, finish=finish, shaped=operands_as_matrices)


def _letters(equation: str, operands: Sequence[Tensor]) -> tuple[str, str, str] | None:
    """The letters of two operands and of the result, an ellipsis written out; None if they do not fit."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    if not arrow:
        every = "".join(terms).replace(".", "")
        out = "..." * ("..." in inputs) + "".join(sorted(c for c in {*every} if every.count(c) == 1))
    free = [c for c in string.ascii_letters if c not in equation]
    longest = max(t.dim() - len(term.replace("...", "")) for t, term in zip(operands, terms, strict=True))
    written = []
    for t, term in zip(operands, terms, strict=True):
        axes = t.dim() - len(term.replace("...", "")) if "..." in term else 0
        written.append(term.replace("...", "".join(free[longest - axes : longest])))
    if any(len(term) != t.dim() for t, term in zip(operands, written, strict=True)):
        return None
    return written[0], written[1], out.replace("...", "".join(free[:longest]))


def grouped_mm(
    input: Tensor,  # noqa: A002 - torch's argument
    mat2: Tensor,
    *args: Any,
    mat_a: None = None,
    mat_b: None = None,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Asked | None:
    """The rows between two offsets times the matrix of their group; rows after the last offset are zeros."""
    del mat_a, mat_b
    offs = args[0] if args else offs
    if len(args) > 1 or offs is None or input.dim() != 2 or mat2.dim() != 3 or bias is not None:
        return None

    def compute(_: bool, settings: Settings) -> Tensor:
        setting, ends = settings(input), offs.tolist()
        parts = [
            functional.linear(input[begin:end], mat2[i].mT, setting=_branch(setting, i))
            for i, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
            if end > begin
        ]
        rest = input.new_zeros(len(input) - (ends[-1] if ends else 0), mat2.shape[-1])
        y = torch.cat([*parts, rest.to(parts[0].dtype) if parts else rest])
        return y if out_dtype is None else y.to(out_dtype)

    def op(left_is_weight: bool) -> Op | None:
        return None if left_is_weight else Linear()

    return Asked(operator="grouped_mm", left=input, right=mat2, op=op, compute=compute)


def named_grouped_mm(mat_a: Tensor, mat_b: Tensor, **options: Any) -> Asked | None:
    """`F.grouped_mm`."""
    return grouped_mm(mat_a, mat_b, **options)


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Asked:
    """``y_k = x1^T W_k x2``: x1 times all W_k is a product of matrices; that with x2 stays in full precision."""
    out, first, second = weight.shape
    flat = weight.transpose(0, 1).reshape(first, out * second)

    def finish(y: Tensor) -> Tensor:
        y = (y.unflatten(-1, (out, second)) * _as_row(input2).unsqueeze(-2)).sum(-1)
        y = y if bias is None else y + bias
        return y.squeeze(0) if input1.dim() == 1 else y

    return _matrices("bilinear", input1, weight, finish=finish, shaped=(_as_row(input1), flat))
