"""How long layers take on this machine in full precision and on each engine: measured once, kept, looked up.

A time is that of one layer alone: forward and backward of a step, float32 in and out. A table is a file in the user's
cache folder, one for each machine, number of threads and pair of versions.
"""

import dataclasses
import json
import math
import os
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import functional
from lowbit.errors import RunError, check_choice
from lowbit.inputs import files
from lowbit.machine import here, paired
from lowbit.methods.recipe import Recipe
from lowbit.numerics.formats import FP32
from lowbit.numerics.rounding import CounterNoise, step_key
from lowbit.products.operators import Op
from lowbit.products.setting import Setting
from lowbit.tables import text_table

Kind = Literal["linear", "conv"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides which engine is fastest for a layer, as far as a layer knows it before it sees data.

    Args:
        kind: a matrix product, or a convolution of any number of axes.
        inputs: input channels of one group.
        outputs: output channels of one group.
        taps: positions of the kernel; 1 for a matrix product.
        groups: number of groups.
    """

    kind: Kind
    inputs: int
    outputs: int
    taps: int = 1
    groups: int = 1

    def __post_init__(self) -> None:
        check_choice("kind of layer", self.kind, Kind)
        if min(self.inputs, self.outputs, self.taps, self.groups) < 1:
            raise ValueError(f"{self}: every number must be at least 1")

    @classmethod
    def of(cls, op: Op, weight: torch.Size) -> "Shape":
        """The shape by which the products of an operator with such a weight are looked up."""
        if op.geometry is None:
            outputs, inputs = weight
            return cls(kind="linear", inputs=max(inputs, 1), outputs=max(outputs, 1))
        groups, taps = op.geometry.groups, math.prod(weight[2:])
        one, other = weight[0] // groups, weight[1]
        inputs, outputs = (one, other) if op.geometry.transposed else (other, one)
        return cls(kind="conv", inputs=max(inputs, 1), outputs=max(outputs, 1), taps=taps, groups=groups)

    def __str__(self) -> str:
        taps = f", {self.taps} tap{'s' * (self.taps > 1)}" if self.kind == "conv" else ""
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        return f"{self.kind} {self.inputs} to {self.outputs}{taps}{groups}"

    def distance(self, other: "Shape") -> float:
        """How many doublings of channels, taps and groups lie between two shapes; those of the MACs if all grow."""
        pairs = zip(dataclasses.astuple(self)[1:], dataclasses.astuple(other)[1:], strict=True)
        return sum(abs(math.log2(a / b)) for a, b in pairs)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one forward and backward of a layer.

    Args:
        shape: the layer's.
        recipe: one of `STANDINS`.
        fp32: in full precision, by torch.
        reference: on the reference engine.
        int8: on the int8 engine.
    """

    shape: Shape
    recipe: str
    fp32: float
    reference: float
    int8: float

    def __post_init__(self) -> None:
        if self.recipe not in STANDINS.values():
            raise ValueError(f"a time of recipe {self.recipe!r}: only {', '.join(STANDINS.values())} are timed")
        times = (self.fp32, self.reference, self.int8)
        if not all(0 < ms < math.inf for ms in times):
            raise ValueError(f"times of {self.shape} must be positive, got {times}")

    @property
    def fastest(self) -> str:
        """The faster engine; int8 if they differ by less than a tenth, since it keeps less for the backward."""
        return "reference" if self.int8 > 1.1 * self.reference else "int8"

    def speed(self, engine: str) -> float:
        """How many times as fast as full precision the layer is on an engine."""
        return self.fp32 / float(getattr(self, engine))


# Recipes that stand for all others, by how many of their three products multiply two integer operands.
STANDINS = {0: "bf16", 2: "sbm8", 3: "int8"}

# Engines that are timed: those that ``"auto"`` chooses from.
_TIMED = ("reference", "int8")

# Shapes, and of a convolution the height and width of its input. A linear layer has 1,024 rows; a convolution 16
# images, a square kernel and stride 1.
GRID: tuple[tuple[Shape, int], ...] = (
    *((Shape(kind="linear", inputs=n, outputs=n), 1) for n in (16, 64, 256, 1024)),
    *((Shape(kind="linear", inputs=i, outputs=o), 1) for i, o in ((16, 1024), (1024, 16))),
    *(
        (Shape(kind="conv", inputs=i, outputs=o, taps=9), size)
        for i, o, size in ((3, 16, 32), (3, 64, 32), (16, 16, 32), (32, 32, 16), (64, 64, 16), (256, 256, 8))
    ),
    (Shape(kind="conv", inputs=3, outputs=64, taps=49), 32),
    *((Shape(kind="conv", inputs=i, outputs=o), size) for i, o, size in ((16, 32, 32), (64, 64, 16), (256, 256, 8))),
    *(
        (Shape(kind="conv", inputs=n, outputs=n, taps=9, groups=groups), 16)
        for n, groups in ((1, 16), (1, 64), (8, 8), (32, 4))
    ),
)
ROWS, IMAGES, ROUNDS = 1024, 16, 5


@dataclass(frozen=True)
class Table:
    """The timings of one machine: at least one for each kind of layer and each of `STANDINS`."""

    timings: tuple[Timing, ...]

    def __post_init__(self) -> None:
        there = {(t.shape.kind, t.recipe) for t in self.timings}
        for kind in ("linear", "conv"):
            for recipe in STANDINS.values():
                if (kind, recipe) not in there:
                    raise ValueError(f"no time of a {kind} layer with recipe {recipe}")

    def nearest(self, shape: Shape, recipe: Recipe) -> Timing | None:
        """The timing of the most similar shape in the recipe's stand-in; None if no recipe stands for this one."""
        name = standin(recipe)
        if name is None:
            return None
        alike = (t for t in self.timings if t.recipe == name and t.shape.kind == shape.kind)
        return min(alike, key=lambda t: t.shape.distance(shape))

    def __str__(self) -> str:
        rows = [
            [
                str(t.shape),
                t.recipe,
                *(f"{ms:.2f}" for ms in (t.fp32, t.reference, t.int8)),
                *(f"{t.speed(engine):.2f}" for engine in _TIMED),
            ]
            for t in self.timings
        ]
        speeds = [f"speed of {engine} to fp32" for engine in _TIMED]
        return text_table(["layer", "recipe", "fp32 ms", "reference ms", "int8 ms", *speeds], rows)


def standin(recipe: Recipe) -> str | None:
    """The recipe in the table that multiplies on the same units; None if a product is in full precision."""
    formats = [fmt for _, _, fmt in recipe.operands()]
    if FP32 in formats:
        return None
    pairs = zip(formats[::2], formats[1::2], strict=True)
    count = sum(all(fmt.has_width for fmt in pair) for pair in pairs)
    return STANDINS[min(STANDINS, key=lambda known: abs(known - count))]


# ---- the file ----


def path() -> Path:
    """The file of this machine's table: in ``$XDG_CACHE_HOME/lowbit``, else ``~/.cache/lowbit``."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(root) if Path(root).is_absolute() else Path.home() / ".cache"
    return folder / "lowbit" / f"calibration-{zlib.crc32(repr(here()).encode()):08x}.json"


def load() -> tuple[Table | None, str]:
    """The table of this machine with the threads that torch has now.

    Returns:
        the table, or None if there is none or it cannot be used; and what was found, in words.
    """
    file = path()
    threads = f"{here().threads} thread{'s' * (here().threads != 1)} and with these versions"
    measure_it = "`lowbit bench --calibrate` measures it"
    if not file.exists():
        return None, f"this machine was not measured at {threads}; {measure_it}"
    try:
        content = json.loads(files.read(file, limit=1 << 24, hint="It is not such a table."))
        machine, entries = content["machine"], content["timings"]
        table = Table(tuple(Timing(**{**entry, "shape": Shape(**entry["shape"])}) for entry in entries))
    except (RunError, ValueError, TypeError, KeyError, RecursionError) as error:
        return None, f"{file} is damaged ({type(error).__name__}: {error}) and is not used; {measure_it} again"
    if machine != dataclasses.asdict(here()):
        return None, f"{file} was measured elsewhere ({machine}) and is not used; {measure_it}"
    return table, f"times of this machine in {file}"


def save(table: Table) -> Path:
    """Keep a table as this machine's, in place of an older one, and return the file."""
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": dataclasses.asdict(here()), "timings": [dataclasses.asdict(t) for t in table.timings]}
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as new:
        json.dump(content, new, indent=1)
    os.replace(new.name, file)
    return file


# ---- measuring ----


def measure(grid: Sequence[tuple[Shape, int]] = GRID, rounds: int = ROUNDS) -> Table:
    """Time every shape in full precision and on both engines, for each of the recipes in `STANDINS`.

    This takes 10 to 60 seconds. The smallest time of the rounds counts: other programs only ever add to a time, and
    the median of few rounds is not steady.

    Args:
        grid: shapes, each with the height and width of a convolution's input.
        rounds: rounds that count, at least 1.

    Raises:
        UsageError: fewer than 1 round.
        ValueError: a kind of layer is missing from the grid.
    """
    timings: list[Timing] = []
    for shape, size in grid:
        x, w = _tensors(shape, size)
        variants = {
            (name, engine): _step(shape, x, w, _setting(name, engine))
            for name in STANDINS.values()
            for engine in _TIMED
        }
        steps = {f"{name} {engine}": step for (name, engine), step in variants.items()}
        seconds = paired({"fp32": _step(shape, x, w, None), **steps}, rounds, warm_up=1)
        ms = {name: round(1e3 * min(taken), 4) for name, taken in seconds.items()}
        for name in STANDINS.values():
            engines = {engine: ms[f"{name} {engine}"] for engine in _TIMED}
            timings.append(Timing(shape=shape, recipe=name, fp32=ms["fp32"], **engines))
    return Table(tuple(timings))


def _setting(recipe: str, engine: str) -> Setting:
    return Setting(recipe=Recipe.from_name(recipe), noise=_noise(), engine=engine)


def _noise() -> CounterNoise:
    return CounterNoise(key=step_key(0, torch.tensor(0, dtype=torch.int64, device="cpu")), layer="calibration")


def _numbers(operand: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers in [-0.5, 0.5), always the same."""
    return _noise().draw("output", operand, torch.empty(shape, dtype=torch.float32, device="cpu")) - 0.5


def _tensors(shape: Shape, size: int) -> tuple[Tensor, Tensor]:
    """Input and weight of a layer."""
    if shape.kind == "linear":
        x, w = _numbers("input", (ROWS, shape.inputs)), _numbers("weight", (shape.outputs, shape.inputs))
    else:
        side = math.isqrt(shape.taps)
        x = _numbers("input", (IMAGES, shape.inputs * shape.groups, size, size))
        x = x.contiguous(memory_format=torch.channels_last)
        w = _numbers("weight", (shape.outputs * shape.groups, shape.inputs, side, side))
    return x.requires_grad_(), w.requires_grad_()


def _step(shape: Shape, x: Tensor, w: Tensor, setting: Setting | None) -> Callable[[], None]:
    """Forward and backward of one layer on fixed numbers; without a setting in full precision."""
    side = math.isqrt(shape.taps) // 2
    geometry: dict[str, Any] = {"stride": (1, 1), "padding": (side, side), "dilation": (1, 1), "groups": shape.groups}
    if shape.kind == "linear":
        gradient = _numbers("grad_output", (ROWS, shape.outputs))
    else:
        gradient = _numbers("grad_output", (x.shape[0], w.shape[0], *x.shape[2:]))
        gradient = gradient.contiguous(memory_format=torch.channels_last)

    def forward() -> Tensor:
        if shape.kind == "linear":
            return F.linear(x, w) if setting is None else functional.linear(x, w, setting=setting)
        return F.conv2d(x, w, **geometry) if setting is None else functional.conv(x, w, **geometry, setting=setting)

    def step() -> None:
        torch.autograd.grad(forward(), (x, w), gradient)

    return step
