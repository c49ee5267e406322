"""The doorway into native code: no call reads or writes outside the tensors that it was given."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import lowbit
from lowbit.kernels import cpu, memory, operators
from lowbit.kernels.cpu import Codes, Grid, Rows, Statistics, Window

pytestmark = pytest.mark.skipif(not operators.INSTALLED, reason="this install lacks the native kernels")

HUGE = 2**40
Place = tuple[Any, ...]


def floats(*shape: int) -> Tensor:
    """Numbers from 0 up, in steps of 1/8."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).div(8).view(shape)


def codes() -> Codes:
    """Four rows of three channels."""
    return Codes(q=torch.arange(12, dtype=torch.uint8), scale=torch.ones(1), zero=1)


def statistics() -> Statistics:
    """Of such codes, in two chunks."""
    return cpu.code_statistics(codes(), 3, [0, 2, 4], torch.ones(2))


def rows(*, along: bool = True, dtype: torch.dtype = torch.uint8) -> Rows:
    """Five rows of four numbers."""
    return Rows(data=torch.ones(20, dtype=dtype), rows=5, width=4, stride=4, along=along)


def unfolded() -> Rows:
    """Two pictures of 3 x 3 places and two channels under a kernel of 2 x 2: eight rows of eight numbers."""
    window = Window(
        position=(2, 1, 2, 2),
        size=(1, 3, 3),
        kernel=(1, 2, 2),
        stride=(1, 1, 1),
        padding=(0, 0, 0),
        dilation=(1, 1, 1),
        transposed=False,
        channels=2,
    )
    return Rows(data=torch.ones(36, dtype=torch.uint8), rows=8, width=8, stride=2, along=True, window=window)


def kernels() -> Rows:
    """Three rows of eight numbers."""
    return Rows(data=torch.ones(24, dtype=torch.int8), rows=3, width=8, stride=8, along=True)


def product(a: Rows, b: Rows, m: int, n: int, *, units: bool = True) -> dict[str, Any]:
    """The arguments of a product of m rows and n columns."""
    return {
        "a": a,
        "b": b,
        "out": floats(m, n),
        "first": 0,
        "stride": n,
        "taps": 1,
        "scales": (torch.ones(m), torch.ones(n)),
        "bias": torch.ones(n),
        "codes": units,
    }


# For each function: arguments that it takes, and numbers in them that it must not take, by place.
CALLS: dict[str, list[tuple[Callable[[], dict[str, Any]], dict[Place, list[Any]]]]] = {
    "extremes": [
        (
            lambda: {"x": floats(2, 3, 4), "view": (2, 3, 4, False)},
            {("view", 0): [-2, 3, HUGE], ("view", 1): [0, 4], ("view", 2): [-4, 2**63 - 1]},
        )
    ],
    "observe": [
        (
            lambda: {
                "x": floats(3, 4),
                "samples": 3,
                "running": torch.zeros(3),
                "momentum": 0.5,
                "first": True,
                "training": True,
            },
            {("samples",): [0, -1, 5, HUGE]},
        )
    ],
    "quantize": [
        (
            lambda: {
                "x": floats(2, 3, 4),
                "view": (2, 3, 4, False),
                "symmetric": True,
                "floor": 0.0,
                "levels": 127.0,
                "samples": None,
                "key": (1, 2),
                "taps": 2,
            },
            {
                ("view", 1): [2, -3, 4],
                ("samples",): [5, -1, HUGE],
                ("taps",): [0, -1, 5],
                ("key", 0): [-1, 2**32],
            },
        ),
        (
            lambda: {
                "x": floats(2, 3, 4),
                "view": (2, 12, 1, False),
                "symmetric": False,
                "floor": 0.0,
                "levels": 255.0,
                "samples": 2,
                "observed": (torch.zeros(1), torch.ones(1)),
            },
            {("view", 0): [3], ("taps",): [0, 7]},
        ),
    ],
    "sums": [(lambda: {"x": floats(5, 3), "width": 3}, {("width",): [0, 4]})],
    "row_sums": [(lambda: {"q": codes().q, "width": 3}, {("width",): [5, 0, -3, HUGE]})],
    "add_offsets": [
        (
            lambda: {"y": floats(4, 6), "u": torch.ones(4, 2), "o": torch.ones(6), "t": floats(2, 6)},
            {("u",): [torch.ones(5), torch.ones(4, 4)], ("t",): [floats(3, 6)], ("o",): [torch.ones(5)]},
        )
    ],
    "code_statistics": [
        (
            lambda: {"codes": codes(), "channels": 3, "starts": [0, 2, 4], "slopes": torch.ones(2)},
            {
                ("channels",): [0, -3, 2, 5],
                ("starts",): [[0, 2, 5], [0, 2, 3], [1, 2, 4], [-1, 2, 4], [0, 4], [0, 0, 4], [0, 4, 2], []],
                ("codes", "zero"): [-1, 256],
            },
        )
    ],
    "normalize": [
        (
            lambda: {
                "codes": codes(),
                "stats": statistics(),
                "eps": 0.1,
                "narrowest": True,
                "inside": True,
                "gamma": torch.ones(3),
                "beta": torch.ones(3),
                "rectify": True,
                "y": floats(4, 3),
            },
            {("codes", "zero"): [-1, 256]},
        )
    ],
    "rectify_backward": [
        (
            lambda: {
                "g": floats(4, 3),
                "codes": codes(),
                "stats": statistics(),
                "gamma": torch.ones(3),
                "beta": torch.ones(3),
                "d": torch.ones(3),
                "dtype": torch.float32,
            },
            {("dtype",): [torch.uint8, torch.int64]},
        )
    ],
    "normalize_backward": [
        (
            lambda: {
                "g": codes(),
                "codes": codes(),
                "stats": statistics(),
                "inside": True,
                "gamma": torch.ones(3),
                "d": torch.ones(3),
                "dx": floats(4, 3),
            },
            {
                ("stats", "argmax"): [torch.full((2, 3), v, dtype=torch.int32) for v in (-1, 4, 2**31 - 1)],
                ("stats", "argmin"): [torch.full((2, 3), v, dtype=torch.int32) for v in (-1, 4, 2**31 - 1)],
                ("stats", "total"): [None],
            },
        )
    ],
    "code_sums": [(lambda: {"a": codes().q, "b": codes().q, "channels": 3}, {("channels",): [5, 0]})],
    "affine": [(lambda: {"q": codes().q, "a": torch.ones(3), "b": torch.ones(3), "y": floats(4, 3)}, {})],
    "encode": [
        (
            lambda: {
                "x": floats(2, 3, 4),
                "view": (2, 3, 4, False),
                "grid": Grid(scale=torch.ones(3), zero=torch.ones(3), low=0.0, high=255.0, key=(1, 2)),
                "signed": False,
                "taps": 2,
            },
            {("view", 0): [1, -2], ("view", 3): [True], ("taps",): [0, 5], ("grid", "key"): [(-1, 0), (0, 2**32)]},
        )
    ],
    "encode_blocks": [
        (
            lambda: {
                "x": floats(6, 4),
                "block": (4, 3),
                "levels": 127.0,
                "floor": 0.0,
                "floor_power": True,
                "key": (1, 2),
            },
            {
                ("block", 0): [0, -1, -HUGE],
                ("block", 1): [0, -1],
                ("levels",): [0.0, 128.0],
                ("key", 0): [-1, 2**32],
            },
        )
    ],
    "hadamard": [
        (
            lambda: {"x": floats(4, 6), "along": False, "size": 4, "signs": torch.ones(4)},
            {("size",): [0, 1, 2, 3, 8, -4], ("along",): [True]},
        )
    ],
    "fake_quantize": [
        (
            lambda: {
                "x": floats(2, 3, 4),
                "view": (2, 3, 4, True),
                "grid": Grid(scale=torch.ones(3), zero=torch.ones(3), low=0.0, high=255.0),
            },
            {("view", 2): [3, 5, -4]},
        )
    ],
    "round_bf16": [(lambda: {"x": floats(7)}, {})],
    "noise": [(lambda: {"count": 9, "key": (1, 2)}, {("count",): [-1], ("key", 1): [-1, 2**32]})],
    "multiply_blocks": [
        (
            lambda: {
                "a": rows(dtype=torch.int8),
                "b": rows(along=False, dtype=torch.int8),
                "out": floats(5, 4),
                "block": 4,
                "scales": (torch.ones(1, 5), torch.ones(1, 4)),
                "bias": torch.ones(4),
            }
            | {"b": Rows(data=torch.ones(16, dtype=torch.int8), rows=4, width=4, stride=4, along=False)},
            {
                ("a", "first"): [-1, 1, HUGE],
                ("a", "rows"): [4, 6, -5],
                ("a", "width"): [3, 5, -4],
                ("a", "fold"): [5, -1],
                ("a", "zero"): [1, 256],
                ("b", "rows"): [3, 5],
                ("block",): [0, 3, -4, 2**15 + 4],
            },
        )
    ],
    "encode_book": [
        (
            lambda: {
                "x": floats(7, 3),
                "block": 8,
                "values": floats(2, 256),
                "limits": torch.full((2, 256), torch.inf),
                "starts": torch.zeros(2, 65536, dtype=torch.int32),
                "key": (1, 2),
            },
            {("block",): [-1], ("key", 1): [-1, 2**32]},
        )
    ],
    "decode_book": [
        (
            lambda: {
                "codes": torch.zeros(3, dtype=torch.uint8),
                "scales": torch.ones(3),
                "block": 1,
                "values": floats(2, 256),
            },
            {("block",): [0, -1, 2, HUGE]},
        )
    ],
    "multiply": [
        (
            lambda: product(rows(), rows(dtype=torch.int8), 5, 5),
            {
                ("a", "first"): [-1, 1, HUGE],
                ("a", "rows"): [6, -5, 2**62],
                ("a", "width"): [3, 5, -4],
                ("a", "stride"): [5, -4, 2**62],
                ("a", "fold"): [2, -1],
                ("a", "zero"): [256, -256],
                ("b", "rows"): [4, 6],
                ("b", "first"): [1],
                ("first",): [-1, 1, HUGE],
                ("stride",): [4, 6, -5, 2**62],
                ("taps",): [0, 2, -1],
            },
        ),
        (
            lambda: product(rows(along=False), rows(along=False, dtype=torch.bfloat16), 4, 4, units=False),
            {("a", "rows"): [4, 6], ("b", "width"): [3, 5], ("b", "stride"): [5]},
        ),
        (
            lambda: product(unfolded(), kernels(), 8, 3),
            {
                ("a", "rows"): [7, 9],
                ("a", "width"): [7, 9],
                ("a", "stride"): [3],
                ("a", "first"): [1, -1],
                ("a", "window", "position"): [(3, 1, 2, 2), (-2, 1, -2, 2), (2, 1, 2, 3)],
                ("a", "window", "size"): [(1, 4, 3), (1, -3, 3), (HUGE, HUGE, 3)],
                ("a", "window", "kernel"): [(1, 2, 3), (0, 2, 2), (-1, -2, 2)],
                ("a", "window", "stride"): [(1, 0, 1), (1, HUGE, 1)],
                ("a", "window", "padding"): [(0, HUGE, 0), (0, 0, -HUGE)],
                ("a", "window", "dilation"): [(1, 0, 1), (1, 1, -1), (HUGE, 1, 1)],
                ("a", "window", "channels"): [0, 1, 3, -2],
            },
        ),
    ],
}  # fmt: skip
CASES = [(name, i) for name, calls in CALLS.items() for i in range(len(calls))]
# Tensors that may be longer; and numbers that the function makes float itself.
ANY_LENGTH = {("round_bf16", "x"), ("encode_book", "x")}
PARTS = {
    ("multiply_blocks", "a"),
    ("multiply_blocks", "b"),
    ("multiply", "a"),
    ("multiply", "b"),
    ("multiply", "out"),
    *ANY_LENGTH,
}
CONVERTED = {("quantize", "observed")}


def leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    """Every tensor in arguments and where it is."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*place, key))
    elif isinstance(value, tuple):
        for i, inner in enumerate(value):
            yield from leaves(inner, (*place, i))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), (*place, field.name))


def put(value: Any, place: Place, new: Any) -> Any:
    """The same arguments with something else at a place."""
    if not place:
        return new
    key, *rest = place
    if isinstance(value, dict):
        return value | {key: put(value.get(key), tuple(rest), new)}
    if isinstance(value, tuple):
        return (*value[:key], put(value[key], tuple(rest), new), *value[key + 1 :])
    return dataclasses.replace(value, **{key: put(getattr(value, key), tuple(rest), new)})


def others(name: str, place: Place, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors that may not stand in the place of `x`."""
    flat = x.flatten()
    if (name, place[0]) not in ANY_LENGTH:
        yield "shorter", flat[:-1]
    if (name, place[0]) not in PARTS:
        yield "longer", torch.cat([flat, flat[:1]])
    yield "on meta", x.to("meta")
    yield "negative", torch._neg_view(x)
    if x.numel() > 1:
        yield "with gaps", flat.repeat_interleave(2)[::2]
        yield "expanded", flat[:1].expand(flat.numel())
    if (name, place[0]) in CONVERTED:
        return
    known = {torch.float32, torch.bfloat16} if x.is_floating_point() else {torch.uint8, torch.int8}
    for dtype in (*memory.TYPES, torch.float64, torch.float16, torch.int16, torch.bool, torch.complex64):
        if dtype != x.dtype and not (dtype in known and x.dtype in known) and name != "multiply":
            yield str(dtype), x.to(dtype)
    if name == "multiply":
        for dtype in (torch.float64, torch.float16, torch.int32, torch.int64, torch.bool):
            yield str(dtype), x.to(dtype)


def refused(name: str, arguments: dict[str, Any]) -> bool:
    """Whether the call raises, and changes nothing that it was given."""
    tensors = [tensor for _, tensor in leaves(arguments) if not tensor.is_meta]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        getattr(cpu, name)(**arguments)
    return all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_every_function_is_called_here() -> None:
    """A function that calls native code is in the table above."""
    found = {
        name.removeprefix("_")
        for name, function in inspect.getmembers(cpu, inspect.isfunction)
        if function.__module__ == cpu.__name__ and "operators." in inspect.getsource(function)
    }

    assert found - {"runs"} == set(CALLS)


def test_one_file_calls_native_code_and_one_folder_knows_addresses() -> None:
    """No other file names the native module, and few functions ask a tensor where it lies."""
    source = Path(cpu.__file__).parents[1]
    naming = {path.name for path in source.rglob("*.py") if re.search(r"(?<!\w)_cpu\b", path.read_text())}
    asking = [
        function.name
        for path in source.joinpath("kernels").glob("*.py")
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and node.attr.endswith(("data_ptr", "untyped_storage"))
    ]

    assert naming == {"operators.py"}
    assert set(asking) == {"__call__", "memory_of", "check_storage"}


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_arguments_are_taken_as_they_are(name: str, case: int) -> None:
    """Without this the refusals below would prove nothing."""
    getattr(cpu, name)(**CALLS[name][case][0]())


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_operators_pass_the_checks_of_torch(name: str, case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake kernel, autograd registration and ahead-of-time dispatch of every operator that a call reaches."""
    reached: list[tuple[operators.Native, tuple[Any, ...]]] = []
    run = operators.Native.__call__

    def noting(native: operators.Native, *arguments: Any) -> Any:
        # As the dispatcher takes them: lists of numbers.
        given = [[int(n) for n in a] if isinstance(a, (tuple, list)) else a for a in arguments]
        reached.append((native, tuple(a.clone() if isinstance(a, Tensor) else a for a in given)))
        return run(native, *arguments)

    arguments = CALLS[name][case][0]()
    monkeypatch.setattr(operators.Native, "__call__", noting)
    getattr(cpu, name)(**arguments)
    monkeypatch.undo()

    assert len(reached) == 1
    for native, given in reached:
        torch.library.opcheck(native.operator, given)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_call_that_is_watched_does_the_same(name: str, case: int) -> None:
    """Through torch's dispatcher every tensor has the bits that it has without."""
    make = CALLS[name][case][0]
    plain, watched = make(), make()
    found = [getattr(cpu, name)(**plain)]
    with FlopCounterMode(display=False):
        found.append(getattr(cpu, name)(**watched))

    for a, b in zip(
        leaves({"given": plain, "found": found[0]}), leaves({"given": watched, "found": found[1]}), strict=True
    ):
        assert torch.equal(a[1], b[1]), a[0]


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_other_tensors_are_refused(name: str, case: int, watched: bool) -> None:
    """Each tensor in turn: of another length, type or device, with gaps, with the negative bit."""
    make = CALLS[name][case][0]
    tried = 0
    for place, tensor in leaves(make()):
        for what, other in others(name, place, tensor):
            with FlopCounterMode(display=False) if watched else nullcontext():
                assert refused(name, put(make(), place, other)), f"{name} changed something: {place} {what}"
            tried += 1

    assert tried > 0 or name == "noise"


@pytest.mark.parametrize(("name", "case"), CASES)
def test_other_numbers_are_refused(name: str, case: int) -> None:
    """Sizes, strides, positions and views that reach outside, that are negative or that overflow."""
    make, numbers = CALLS[name][case]

    for place, values in numbers.items():
        for value in values:
            assert refused(name, put(make(), place, value)), f"{name} changed something: {place} {value}"


@pytest.mark.parametrize(
    ("name", "written", "read"),
    [
        ("normalize", ("y",), ("gamma",)),
        ("normalize_backward", ("dx",), ("d",)),
        ("affine", ("y",), ("a",)),
        ("multiply", ("out",), ("bias",)),
        ("observe", ("running",), ("x",)),
    ],
)
def test_memory_that_is_read_is_not_written(name: str, written: Place, read: Place) -> None:
    """A result that lies over an argument, in whole or in its last number, is refused."""
    make = CALLS[name][0][0]
    sizes = {place: tensor.shape for place, tensor in leaves(make())}
    for shift in (0, sizes[read].numel() - 1):
        memory = torch.ones(100)
        arguments = put(make(), read, memory[: sizes[read].numel()].view(sizes[read]))
        target = memory[shift : shift + sizes[written].numel()].view(sizes[written])

        with pytest.raises(ValueError, match="overlaps"):
            getattr(cpu, name)(**put(arguments, written, target))
        assert torch.equal(memory, torch.ones(100))


def test_a_refusal_says_what_was_given_and_what_is_needed() -> None:
    """Function, argument, and both sides of the difference."""
    call = CALLS["normalize"][0][0]()

    with pytest.raises(ValueError, match="normalize: gamma has 2 numbers: give 3"):
        cpu.normalize(**(call | {"gamma": torch.ones(2)}))
    with pytest.raises(TypeError, match="normalize: beta is int32: give float32"):
        cpu.normalize(**(call | {"beta": torch.ones(3, dtype=torch.int32)}))
    with pytest.raises(TypeError, match=r"normalize: y is torch.float64 of shape \(4, 3\).*give a dense tensor"):
        cpu.normalize(**(call | {"y": torch.ones(4, 3, dtype=torch.float64)}))


@pytest.mark.parametrize("codes", [True, False])
def test_a_sum_of_no_numbers_is_refused(codes: bool) -> None:
    """A product over 0 numbers ended the process with a division by 0."""
    one, side = torch.ones(1), cpu.Rows(data=torch.zeros(0, dtype=torch.int8), rows=2, width=0, stride=0, along=True)
    out = torch.full((4,), 7.0)

    with pytest.raises(ValueError, match="multiply: the two sides sum over no numbers"):
        cpu.multiply(side, side, out, first=0, stride=2, taps=1, scales=(one, one), bias=None, codes=codes)
    assert torch.equal(out, torch.full((4,), 7.0))


@pytest.mark.parametrize("left", [0, 4, 11 * 4])
def test_storage_that_was_resized_is_not_read_past_its_end(left: int) -> None:
    """Memory that was freed in whole or in part, as sharding does, is refused; given back, it is read."""
    x = floats(3, 4)
    x.untyped_storage().resize_(left)

    with pytest.raises(ValueError, match=f"extremes: x of shape .* needs 48 bytes, .* resized to {left}"):
        cpu.extremes(x, (1, 3, 4, False))
    x.untyped_storage().resize_(48)
    x.copy_(floats(3, 4))

    assert cpu.extremes(x, (1, 3, 4, False))[1].tolist() == [3 / 8, 7 / 8, 11 / 8]


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_without_its_memory_is_refused_on_each_engine(engine: str, name: str) -> None:
    """The error names the layer and the parameter; torch would read what lies at address 0."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    lowbit.convert_(model, lowbit.Recipe.from_name("int8").replace(first="convert", last="convert"), engine=engine)
    storage = getattr(model[0], name).untyped_storage()
    size = storage.size()
    storage.resize_(0)

    with pytest.raises(ValueError, match=f"0: {name} of shape .* storage was resized to 0"):
        model(torch.ones(2, 8))
    storage.resize_(size)

    assert model(torch.ones(2, 8)).shape == (2, 8)
