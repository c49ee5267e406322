"""A converted model as an ONNX model with QuantizeLinear and DequantizeLinear nodes, checked in onnxruntime.

ONNX's QuantizeLinear divides by the scale and rounds ties to even, as lowbit does, so its codes can be equal bit for
bit. The check takes the input that onnxruntime itself computed for each layer, makes codes of it by lowbit's
definition, and compares them with onnxruntime's; it compares each product with that of the codes.
"""

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import RunError, UsageError
from lowbit.export.frozen import Between, FrozenLayer, InputRule, between_quantizers, freeze, values_of

OPSET = 21  # the first whose QuantizeLinear says the type of its codes
TOLERANCE = 1e-5  # of a product of absolute operands, as for every engine
WRONG = 0.2  # of the largest output: what lies between the layers was exported wrongly
_PRODUCTS = ("Gemm", "Conv", "BatchNormalization")
_TYPES = {torch.uint8: 2, torch.int8: 3}  # onnx.TensorProto.UINT8 and INT8


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What onnxruntime gave for a written model.

    Args:
        path: the file.
        layers: layers between quantizers.
        codes: codes that were compared, all equal.
        largest: the largest difference of the model's outputs from the converted model's, as a share of their largest
            magnitude; codes of deeper layers may differ by one where float sums in another order meet a tie.
        same: the share of rows of the output whose largest entry is at the same place.
    """

    path: Path
    layers: int
    codes: int
    largest: float
    same: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.layers} layers; {self.codes:,} codes in onnxruntime equal lowbit's; outputs differ by "
            f"at most {self.largest:.2g} of the largest, and {self.same:.2%} have the same largest entry"
        )


def write_onnx(model: nn.Module, batch: Tensor, path: Path | str) -> Checked:
    """Write a converted model, as evaluation runs it, and check the file in onnxruntime on `batch`.

    Layers that are not converted are exported as they are. The first axis of the input is free.

    Args:
        model: converted; it is not changed.
        batch: an input with two samples or more, for tracing and for the check.
        path: of the file, ``*.onnx``.

    Raises:
        UsageError: a layer has formats or a kind that ONNX lacks, or `batch` has one sample.
        RunError: onnx, onnxscript or onnxruntime is not installed, or a number of the check is not equal.
    """
    _require("onnx", "onnxscript", "onnxruntime")
    if batch.shape[0] < 2:
        raise UsageError("the batch has one sample: give two or more, so that the first axis stays free")
    path = Path(path)
    frozen = freeze(model, batch)
    if not frozen:
        raise UsageError("the model has no converted layer: torch.onnx.export writes it as it is")
    plain = between_quantizers(model, frozen, _quantized, _dequantized)
    free = {0: torch.export.Dim("batch", min=1)}
    with _quietly(), torch.no_grad():
        torch.onnx.export(
            plain,
            (batch,),
            path,
            input_names=["input"],
            output_names=["output"],
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=(free,),
            external_data=False,
            optimize=False,  # it would merge the quantizers of layers that share an input; the runtime does so itself
            verbose=False,
        )
    return _check(model, plain, frozen, batch, path)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter says of itself: operators of packages that are not installed, names of its own."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise RunError(f"{', '.join(missing)} is not installed: pip install 'lowbit[export]'")


def _operator(name: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, shape: Any, **attributes: int) -> Tensor:
    from torch.onnx import ops

    y: Tensor = ops.symbolic(name, inputs, dict(attributes), dtype=dtype, shape=shape, version=OPSET)
    return y


def _quantized(rule: InputRule, x: Tensor) -> Tensor:
    """QuantizeLinear and DequantizeLinear around an input; rows with scales become a matrix in between."""
    scale, zero = rule.scale_of(x), torch.tensor(rule.zero, dtype=rule.dtype, device="cpu")
    if rule.scale is not None:
        # The nodes stop at the limits of a byte only, and a symmetric code is never the smallest of them.
        x = x.clamp(float((rule.low - rule.zero) * rule.scale), float((rule.high - rule.zero) * rule.scale))
    if not rule.rows:
        q = _operator("QuantizeLinear", (x, scale, zero), rule.dtype, x.shape)
        return _operator("DequantizeLinear", (q, scale, zero), torch.float32, x.shape)
    matrix, flat = x.reshape(-1, x.shape[-1]), scale.reshape(-1)
    q = _operator("QuantizeLinear", (matrix, flat), rule.dtype, matrix.shape, axis=0, output_dtype=_TYPES[rule.dtype])
    return _operator("DequantizeLinear", (q, flat), torch.float32, matrix.shape, axis=0).reshape(x.shape)


def _dequantized(q: Tensor, scale: Tensor, zero: int, axis: int | None) -> Tensor:
    if axis is None:
        return _operator(
            "DequantizeLinear", (q, scale, torch.tensor(zero, dtype=q.dtype, device="cpu")), torch.float32, q.shape
        )
    if zero:
        raise UsageError("a weight with a zero point and a scale for each channel is not exported")
    return _operator("DequantizeLinear", (q, scale), torch.float32, q.shape, axis=axis)


def _check(model: nn.Module, plain: nn.Module, frozen: list[FrozenLayer], batch: Tensor, path: Path) -> Checked:
    graph = importlib.import_module("onnx").load(path).graph
    nodes = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    if len(nodes) != len(frozen):
        raise RunError(f"{path} has {len(nodes)} QuantizeLinear nodes for {len(frozen)} layers")
    products = [_product_after(graph, node) for node in nodes]
    values = _everything(path, batch, [name for node in nodes for name in (node.input[0], node.output[0])], products)
    compared = 0
    for layer, node, product in zip(frozen, nodes, products, strict=True):
        # What is quantised comes after the clamp and, with rows, as a matrix; neither changes the codes.
        x, codes = values[node.input[0]], values[node.output[0]]
        expected = layer.rule.codes(x)
        if wrong := int((codes != expected).sum()):
            raise RunError(f"{layer.name}: {wrong} of {codes.numel()} codes in onnxruntime differ from lowbit's")
        compared += codes.numel()
        between = plain.get_submodule(layer.name)
        assert isinstance(between, Between)
        if layer.weight is not None:
            _check_product(between, expected, layer.rule.scale_of(x), values[product.output[0]])
    ours, theirs = _evaluated(model, batch), _everything(path, batch, [], [])["output"]
    largest = float((ours - theirs).abs().max() / ours.abs().max())
    same = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    if not largest < WRONG:
        raise RunError(f"{path}: outputs in onnxruntime differ by {largest:.2g} of the largest from the model's")
    return Checked(path=path, layers=len(frozen), codes=compared, largest=largest, same=same)


def _check_product(between: Between, q: Tensor, scale: Tensor, found: Tensor) -> None:
    """Compare a product with that of its codes, within the numerics contract."""
    rule = between.frozen.rule
    x_hat = values_of(q, scale, rule.zero, 0 if rule.rows else None)
    w_hat = between.values(values_of)
    bias = between.bias
    expected = between.product(x_hat, w_hat, bias)
    most = between.product(x_hat.abs(), w_hat.abs(), None if bias is None else bias.abs())
    far = (found.reshape(expected.shape) - expected).abs() > TOLERANCE * most
    if far.any():
        raise RunError(
            f"{between.frozen.name}: {int(far.sum())} of {far.numel()} results in onnxruntime are further than "
            f"{TOLERANCE:g} of the absolute products from those of the codes"
        )


def _product_after(graph: Any, node: Any) -> Any:
    """The node that multiplies, or normalises, what a quantizer gives."""
    while node.op_type not in _PRODUCTS:
        node = next(other for other in graph.node if node.output[0] in other.input[:1])
    return node


def _everything(path: Path, batch: Tensor, names: list[str], products: list[Any]) -> dict[str, Tensor]:
    """The outputs of the model in onnxruntime, and these values inside it."""
    onnx, onnxruntime = map(importlib.import_module, ("onnx", "onnxruntime"))
    model = onnx.load(path)
    known = {value.name for value in (*model.graph.output, *model.graph.input)}
    inside = dict.fromkeys([*names, *(node.output[0] for node in products)])
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inside if name not in known)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    found = session.run(outputs, {"input": batch.numpy()})
    return {"input": batch} | {name: torch.from_numpy(value) for name, value in zip(outputs, found, strict=True)}


def _evaluated(model: nn.Module, batch: Tensor) -> Tensor:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            y: Tensor = model(batch)
    finally:
        for module in training:
            module.training = True
    return y.float()
