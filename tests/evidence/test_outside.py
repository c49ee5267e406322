"""Operators that multiply: each is known, and those with a formula count what was counted by hand."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.evidence import formulas, outside
from lowbit.evidence.watch import Operation, watched_by

# Operators that torch registers only when it compiles.
importlib.import_module("torch.ao.quantization.fx._decomposed")


def _operators() -> dict[str, list[str]]:
    """Every operator that torch and what was imported with it have here, with their overloads."""
    found: dict[str, list[str]] = {}
    for name in torch._C._dispatch_get_all_op_names():
        found.setdefault(name.partition(".")[0].rstrip("_"), []).append(name)
    return found


def _places(name: str, overloads: list[str]) -> int:
    """In how many of the tables an operator is; a composite one that is in none counts as one."""
    tables = name in formulas.FORWARD, name in formulas.BACKWARD, name in outside.UNCOUNTED
    listed = sum(tables) + bool(outside.why_no_product(name))
    return listed or all(outside.is_composite(overload) for overload in overloads)


def test_every_operator_that_looks_like_a_product_is_known() -> None:
    """Each is counted, not counted, composite or no product, and in one of these only: a new one has to be decided."""
    found = {
        name: overloads
        for name, overloads in _operators().items()
        if outside.LOOKS_LIKE_A_PRODUCT.search(name.partition("::")[2])
    }

    assert len(found) > 300
    assert [name for name, overloads in found.items() if _places(name, overloads) != 1] == []


def test_the_tables_hold_what_looks_like_a_product() -> None:
    """The pattern that the registry is walked with finds every operator that the tables have."""
    known = [*formulas.FORWARD, *formulas.BACKWARD, *outside.UNCOUNTED]

    assert [n for n in known if not outside.LOOKS_LIKE_A_PRODUCT.search(n.partition("::")[2])] == []
    assert {"aten::mm", "aten::convolution", "aten::_grouped_mm"} <= set(known) & _operators().keys()


@pytest.mark.parametrize("name", ["aten::relu", "aten::embedding", "aten::native_batch_norm", "aten::cummax"])
def test_other_operators_do_not_look_like_one(name: str) -> None:
    """Element-wise operators, lookups and normalisation are not asked about."""
    assert name in _operators()
    assert not outside.LOOKS_LIKE_A_PRODUCT.search(name.partition("::")[2])


def _counted(call: Callable[[], Any]) -> dict[str, int | None]:
    """MACs of every operator that multiplies, as `lowbit.verify` counts them."""
    found: dict[str, int | None] = {}

    def watch(operation: Operation) -> None:
        if operation.multiplies:
            name = outside.name_of(operation.func).removeprefix("aten::")
            before, macs = found.get(name, 0), operation.macs()
            found[name] = None if macs is None or before is None else before + macs

    with watched_by(watch, nn.Identity()):
        call()
    return found


def _r(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _bf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


_OFFSETS = torch.tensor([16, 48], dtype=torch.int32)
BY_HAND: dict[str, tuple[Callable[[], Any], dict[str, int | None]]] = {
    "mm": (lambda: _r(3, 4) @ _r(4, 5), {"mm": 60}),
    "in place": (lambda: _r(3, 5).addmm_(_r(3, 4), _r(4, 5)), {"addmm": 60}),
    "by name": (lambda: torch.ops.aten.mm.default(self=_r(3, 4), mat2=_r(4, 5)), {"mm": 60}),
    "into a tensor": (lambda: torch.mm(_r(3, 4), _r(4, 5), out=_r(3, 5)), {"mm": 60}),
    "bmm": (lambda: _r(2, 3, 4) @ _r(2, 4, 5), {"bmm": 120}),
    "baddbmm": (lambda: torch.baddbmm(_r(2, 3, 5), _r(2, 3, 4), _r(2, 4, 5)), {"baddbmm": 120}),
    "addbmm": (lambda: torch.addbmm(_r(3, 5), _r(2, 3, 4), _r(2, 4, 5)), {"addbmm": 120}),
    "mv": (lambda: _r(3, 4) @ _r(4), {"mv": 12}),
    "addmv": (lambda: torch.addmv(_r(3), _r(3, 4), _r(4)), {"addmv": 12}),
    "dot": (lambda: _r(4) @ _r(4), {"dot": 4}),
    "vdot": (lambda: torch.vdot(_r(4), _r(4)), {"vdot": 4}),
    "addr": (lambda: torch.addr(_r(3, 4), _r(3), _r(4)), {"addr": 12}),
    "einsum": (lambda: torch.einsum("bik,bkj->bij", _r(2, 3, 4), _r(2, 4, 5)), {"bmm": 120}),
    "tensordot": (lambda: torch.tensordot(_r(3, 4), _r(4, 5), 1), {"mm": 60}),
    "multi_dot": (lambda: torch.linalg.multi_dot([_r(3, 4), _r(4, 5), _r(5, 2)]), {"mm": 4 * 5 * 2 + 3 * 4 * 2}),
    "int8": (lambda: torch._int_mm(torch.ones(32, 8, dtype=torch.int8), torch.ones(8, 16, dtype=torch.int8)),
             {"_int_mm": 32 * 8 * 16}),
    # 48 rows of which 16 meet the first matrix and 32 the second.
    "grouped rows": (lambda: torch._grouped_mm(_bf(48, 8), _bf(2, 8, 16), _OFFSETS), {"_grouped_mm": 48 * 8 * 16}),
    # Two products that sum over 16 and over 32.
    "grouped sums": (lambda: torch._grouped_mm(_bf(8, 48), _bf(48, 16), _OFFSETS), {"_grouped_mm": 48 * 8 * 16}),
    "grouped batch": (lambda: torch._grouped_mm(_bf(2, 16, 8), _bf(2, 8, 16)), {"_grouped_mm": 2 * 16 * 8 * 16}),
    "grouped convolution": (
        lambda: F.conv2d(_r(2, 4, 8, 8), _r(6, 2, 3, 3), stride=2, padding=1, groups=2),
        {"convolution": 2 * 16 * 6 * 2 * 9},
    ),
    "transposed convolution": (
        lambda: F.conv_transpose1d(_r(2, 4, 8), _r(4, 3, 3), stride=2, groups=2),
        {"convolution": 2 * 8 * 4 * 3 * 3},
    ),
    "convolution of oneDNN": (
        lambda: torch.ops.aten.mkldnn_convolution(_r(2, 4, 8, 8), _r(6, 4, 3, 3), None, [0, 0], [2, 2], [1, 1], 1),
        {"mkldnn_convolution": 2 * 9 * 6 * 4 * 9},
    ),
    "convolution of time": (lambda: torch.conv_tbc(_r(8, 2, 4), _r(3, 4, 5), _r(5)), {"conv_tbc": 2 * 6 * 5 * 3 * 4}),
    "attention": (
        lambda: F.scaled_dot_product_attention(_r(2, 3, 5, 8), _r(2, 3, 7, 8), _r(2, 3, 7, 8)),
        {"_scaled_dot_product_flash_attention_for_cpu": 2 * 2 * 3 * 5 * 7 * 8},
    ),
    "LSTM": (lambda: nn.LSTM(4, 3, 2)(_r(5, 2, 4)), {"mkldnn_rnn_layer": 5 * 2 * 12 * (4 + 3 + 3 + 3)}),
    "GRU": (lambda: nn.GRU(4, 3)(_r(5, 2, 4)), {"addmm": 5 * 2 * 9 * (4 + 3)}),
    "few distances": (lambda: torch.cdist(_r(3, 4), _r(3, 4)), {"_cdist_forward": None}),
    # The product of (x, |x|^2, 1) and (-2 y, 1, |y|^2).
    "distances": (lambda: torch.cdist(_r(30, 4), _r(40, 4)), {"_euclidean_dist": 30 * 40 * 6}),
    "sparse": (lambda: _r(3, 4).to_sparse() @ _r(4, 5), {"mm": None}),
    "sparse rows": (lambda: torch.ops.aten.addmm(_r(3, 5), _r(3, 4).to_sparse_csr(), _r(4, 5)), {"addmm": None}),
    "bilinear": (lambda: nn.Bilinear(4, 4, 3)(_r(2, 4), _r(2, 4)), {"_trilinear": None}),
    "nothing": (lambda: F.gelu(_r(3, 4)) * _r(4), {}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_counts_equal_those_by_hand(name: str, mode: Callable[[], Any]) -> None:
    """MACs are those of the shapes, also in inference mode, where torch shows an operator in place of its parts."""
    call, expected = BY_HAND[name]

    with mode():
        found = _counted(call)

    assert list(found.values()) == list(expected.values())
    # A linear layer or a sparse product that arrives whole goes by its own name there.
    assert mode is torch.inference_mode or found == expected


@pytest.mark.parametrize(
    ("call", "forwards"),
    [
        (lambda x: F.conv2d(x.view(2, 3, 8, 8), _r(4, 3, 3, 3).requires_grad_()), 2),
        (lambda x: F.conv_transpose2d(x.view(2, 3, 8, 8), _r(3, 4, 3, 3).requires_grad_()), 2),
        (lambda x: F.linear(x.view(6, 64), _r(5, 64).requires_grad_()), 2),
        (lambda x: nn.LSTM(64, 3)(x.view(3, 2, 64))[0], 2),
        # Of its five products two are the forward's.
        (lambda x: F.scaled_dot_product_attention(*[x.view(2, 3, 8, 8)] * 3), 2.5),
    ],
    ids=["convolution", "transposed", "linear", "lstm", "attention"],
)  # fmt: skip
def test_a_backward_counts_twice_its_forward(call: Callable[[Tensor], Tensor], forwards: float) -> None:
    """The two products of the gradients cost what two forwards cost."""
    x = _r(384).requires_grad_()
    y: list[Tensor] = []

    forward = _counted(lambda: y.append(call(x)))
    backward = _counted(lambda: y[0].sum().backward())

    assert sum(v or 0 for v in backward.values()) == forwards * sum(v or 0 for v in forward.values()) > 0
