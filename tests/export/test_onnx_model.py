"""Converted models as ONNX models, checked in onnxruntime."""

from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import RunError, UsageError
from lowbit.export import frozen, onnx_model, write_onnx

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


def image_network(recipe: str) -> nn.Module:
    """A strided and a grouped convolution with normalisation, and a linear layer, after a training forward."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=4, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5)),
    )
    lowbit.convert_(model, recipe)
    model(torch.randn(8, 3, 6, 6))
    return model


def text_network(recipe: str) -> nn.Module:
    """Linear layers, one of them without a bias, on a batch of sequences."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.GELU(), nn.Linear(16, 7))
    lowbit.convert_(model, recipe)
    model(torch.randn(8, 5, 12))
    return model


@pytest.mark.parametrize("recipe", ["int8", "sbm8"])
@pytest.mark.parametrize(("build", "shape"), [(image_network, (4, 3, 6, 6)), (text_network, (4, 5, 12))])
def test_codes_and_results_in_onnxruntime_are_ours(
    recipe: str, build: object, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Every layer has its quantizer, all its codes are equal, and so are outputs up to float32 rounding."""
    assert callable(build)
    model, x = build(recipe), torch.randn(shape, generator=torch.Generator().manual_seed(1))

    checked = write_onnx(model, x, tmp_path / "m.onnx")

    nodes = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert nodes.count("QuantizeLinear") == checked.layers == len(lowbit.nn.layers.converted_layers(model))
    assert checked.codes >= x.numel()
    assert 0 <= checked.largest < 0.02
    assert str(tmp_path / "m.onnx") in str(checked)


def test_the_number_of_samples_is_free(tmp_path: Path) -> None:
    """The file runs on a batch of another size, with the results of the model."""
    import onnxruntime

    model = text_network("sbm8")
    write_onnx(model, torch.randn(4, 5, 12), tmp_path / "m.onnx")
    x = torch.randn(9, 5, 12, generator=torch.Generator().manual_seed(2))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])

    y = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])

    expected = model.eval()(x).detach()
    plain = lowbit.restore_(model) or model(x).detach()
    assert torch.allclose(y, expected, atol=0.02 * float(expected.abs().max()))
    assert not torch.allclose(y, plain, atol=1e-6)


def test_wrong_codes_are_seen(tmp_path: Path) -> None:
    """A file with one scale of a weight changed, or one input scale, does not pass its check."""
    model, x = text_network("sbm8"), torch.randn(4, 5, 12)
    write_onnx(model, x, tmp_path / "m.onnx")
    layers = frozen.freeze(model, x)
    plain = frozen.between_quantizers(model, layers, onnx_model._quantized, onnx_model._dequantized)

    for name in ("0.scale", "input scale"):
        graph = onnx.load(tmp_path / "m.onnx")
        numbers = {each.name: each for each in graph.graph.initializer}
        scale = name if name in numbers else next(n for n in graph.graph.node if n.op_type == "QuantizeLinear").input[1]
        for each in graph.graph.initializer:
            if each.name == scale:
                each.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(each) * 1.01, each.name))
        onnx.save(graph, tmp_path / "wrong.onnx")
        with pytest.raises(RunError, match="in onnxruntime"):
            onnx_model._check(model, plain, layers, x, tmp_path / "wrong.onnx")


def test_what_onnx_lacks_is_refused(tmp_path: Path) -> None:
    """Float offsets, layers of several products, plain models and single samples are refused with a reason."""
    lstm = nn.LSTM(4, 4)
    lowbit.convert_(lstm, "int8")
    for model, x, said in (
        (text_network("w4a4g8"), torch.randn(4, 5, 12), "--to plain"),
        (lstm, torch.randn(3, 2, 4), "several products"),
        (nn.Linear(4, 4), torch.randn(2, 4), "no converted layer"),
        (text_network("int8"), torch.randn(1, 5, 12), "one sample"),
    ):
        with pytest.raises(UsageError, match=said):
            write_onnx(model, x, tmp_path / "m.onnx")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without onnxruntime the error says what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else object())

    with pytest.raises(RunError, match=r"onnxruntime is not installed: pip install 'lowbit\[export\]'"):
        write_onnx(text_network("int8"), torch.randn(2, 5, 12), tmp_path / "m.onnx")


def test_torch_export_says_restore_first() -> None:
    """A converted model is refused in one sentence, and a restored one is exported."""
    model, x = text_network("int8"), torch.randn(2, 5, 12)

    with pytest.raises(UsageError, match=r"call lowbit.restore_\(model\) first"):
        torch.export.export(model, (x,))
    lowbit.restore_(model)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))
