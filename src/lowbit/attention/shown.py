"""The products of attention as counters and observers see them: S = q k^T is `scores`, O = p v is `values`.

Each has the three products of a layer. Of `scores` the input is q, the weight k and the grad_output ds; of `values` the
input is p and the weight v. A fused kernel never writes the matrices of L x S, so for an observer the definition runs
once more and gives the operands; what an engine returns (O, dQ, dK, dV) is the engine's own, and S and dP are those of
the definition's operands.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.attention import definition
from lowbit.attention.definition import Call, Run, Trace
from lowbit.engines.reference import in_full
from lowbit.methods.attention import OPERANDS
from lowbit.products import watch
from lowbit.products.operators import Matmul
from lowbit.products.setting import Setting

_OP = Matmul()


def _shapes(part: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[torch.Size, torch.Size, torch.Size]:
    """Input, weight and output of a part, with a matrix for each head of the queries."""
    batch, heads, rows, size = q.shape
    keys, width = k.shape[2], v.shape[3]
    inner = (rows, size, keys) if part == "scores" else (rows, keys, width)
    lead, (m, n, o) = (batch, heads), inner
    return torch.Size((*lead, m, n)), torch.Size((*lead, n, o)), torch.Size((*lead, m, o))


def _count(setting: Setting, call: Call, engine: str, q: Tensor, k: Tensor, v: Tensor, products: list[str]) -> None:
    """Show the shapes of products, each a part and a name, to counters."""
    for product in products:
        part, name = product.split(".")
        x, w, y = _shapes(part, q, k, v)
        watch.count(
            watch.ProductCall(
                source=setting.source,
                layer=setting.layer,
                product=name,
                kind=_OP.kind,
                engine=engine,
                bits=call.formats.bits(part, name),
                op=_OP,
                input=x,
                weight=w,
                output=y,
                part=part,
            )
        )


def forward(
    setting: Setting,
    call: Call,
    engine: str,
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    needs: tuple[bool, ...],
) -> None:
    """Show the two products of the forward."""
    if watch.counters:
        _count(setting, call, engine, q, k, v, ["scores.output", "values.output"])
    if not watch.observers:
        return
    trace, run, wide = _traced(q, k, v, call)
    definition.forward(*wide, call, trace)
    expected = ("grad_input", "grad_weight") if any(needs) else ()
    show = _Show(setting, call, engine, kernel, trace, (q, k, v))
    q_hat, k_hat = (trace.rounded["scores", "output", role] for role in ("input", "weight"))
    show("scores", "output", q_hat @ k_hat.mT, lambda: wide[0] @ run.k.mT, expected)
    everything = slice(0, q.shape[2]), slice(0, k.shape[2])
    s = run.scores(q_hat, k_hat, *everything)
    p = definition.exp_from(s, s.logsumexp(-1, keepdim=True))
    kept = run.kept(*everything, p)
    p = p if kept is None else p * kept / (1 - call.dropout)
    show("values", "output", in_full(out), lambda: p @ wide[2], expected)


def backward(
    setting: Setting,
    call: Call,
    engine: str,
    kernel: str,
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, ...],
) -> None:
    """Show the five products of the backward."""
    if watch.counters:
        again = ["scores.output", "values.grad_input", "values.grad_weight", "scores.grad_input", "scores.grad_weight"]
        _count(setting, call, engine, q, k, v, again)
    if not watch.observers:
        return
    trace, run, wide = _traced(q, k, v, call)
    full_g = in_full(g)
    definition.backward(full_g, *wide, in_full(out), lse, call, trace)
    show = _Show(setting, call, engine, kernel, trace, (q, k, v))
    groups = k.shape[1]
    dq, dk, dv = (in_full(grad) for grad in grads)
    q_hat, k_hat = (trace.rounded["scores", "output", role] for role in ("input", "weight"))
    show("scores", "output", q_hat @ k_hat.mT, lambda: wide[0] @ run.k.mT)
    first, second = (trace.rounded["values", "grad_input", role] for role in ("grad_output", "weight"))
    show("values", "grad_input", first @ second.mT, lambda: full_g @ wide[2].mT)
    p = trace.exact["values", "grad_weight", "input"]
    kept = run.kept(slice(0, q.shape[2]), slice(0, k.shape[2]), p)
    p = p if kept is None else p * kept / (1 - call.dropout)
    show("values", "grad_weight", dv, lambda: definition.per_key_head(p.mT @ full_g, groups))
    ds = trace.exact["scores", "grad_input", "grad_output"]
    show("scores", "grad_input", dq, lambda: ds @ run.k * call.scale)
    show("scores", "grad_weight", dk, lambda: definition.per_key_head(ds.mT @ wide[0] * call.scale, groups))


def _traced(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Trace, Run, tuple[Tensor, Tensor, Tensor]]:
    """An empty trace, a run of the definition, and q, k, v in full with a head for each of the queries'."""
    wide_k, wide_v = (in_full(definition.per_query_head(t, q)) for t in (k, v))
    return Trace(), Run(call, in_full(q), wide_k, wide_v, None), (in_full(q), wide_k, wide_v)


class _Show:
    """Shows products of one call to observers."""

    def __init__(
        self,
        setting: Setting,
        call: Call,
        engine: str,
        kernel: str,
        trace: Trace,
        tensors: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        self._setting, self._call, self._trace = setting, call, trace
        self._ran, self._tensors = (engine, kernel), tensors

    def __call__(
        self, part: str, product: str, result: Tensor, exact: Callable[[], Tensor], expected: tuple[str, ...] = ()
    ) -> None:
        operands = {}
        for role, name in OPERANDS[part, product]:
            fmt = getattr(self._call.formats, name)
            place = part, product, role
            operands[role] = watch.OperandRun(
                format=fmt,
                bits=fmt.bits,
                exact=self._trace.exact[place],
                quantized=self._trace.rounded[place],
                view=tuple(self._trace.exact[place].shape),
                dims=None,  # scales are those of tiles
            )
        watch.notify(
            watch.ProductRun(
                source=self._setting.source,
                layer=self._setting.layer,
                product=product,
                kind=_OP.kind,
                engine=self._ran[0],
                kernel=self._ran[1],
                macs=_OP.macs(*_shapes(part, *self._tensors)),
                operands=operands,
                result=result,
                full_precision=exact,
                expected=expected,
                part=part,
            )
        )
