"""Speed on this machine: training steps of networks in several variants, and passes over memory by kernel.

Everything is timed in paired rounds inside one process, see `lowbit.machine.paired`.
"""

import importlib
import logging
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit.engines.choice import ENGINES
from lowbit.errors import UsageError, shown, unknown
from lowbit.kernels import cpu, native_instruction_sets
from lowbit.machine import here, paired, ratio
from lowbit.methods.recipe import is_family, is_file_name, recipes
from lowbit.nn import PRODUCT_LAYERS
from lowbit.numerics.ranges import new_running_range
from lowbit.products.watch import ProductCall, counted_by
from lowbit.tables import text_table
from lowbit.train.config import MOST_THREADS
from lowbit.train.models import GPT, ResNet

Step = Callable[[], object]


# ---- works: what is trained ----


class Work(NamedTuple):
    """A network, a batch for it and the batch's labels."""

    model: nn.Module
    x: Tensor
    y: Tensor


def _normal(*shape: int) -> Tensor:
    """Normal numbers, where torch makes the networks."""
    return torch.randn(shape, dtype=torch.get_default_dtype(), device=torch.get_default_device())


def _labels(classes: int, *shape: int) -> Tensor:
    """Whole numbers below `classes`, where torch makes the networks."""
    return torch.randint(classes, shape, dtype=torch.int64, device=torch.get_default_device())


def _mlp() -> Work:
    sizes = [1024, 2048, 2048, 2048]
    hidden = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
    return Work(nn.Sequential(*hidden, nn.Linear(2048, 16)), _normal(1024, 1024), _labels(16, 1024))


def _gpt(d: int, batch: int) -> Work:
    model = GPT(vocabulary=1024, d=d, layers=4, heads=8, context=256)
    return Work(model, _labels(1024, batch, 256), _labels(1024, batch * 256))


def _resnet(depths: tuple[int, ...], width: int, batch: int) -> Work:
    model: Any = ResNet(depths=depths, width=width, classes=10)
    x = _normal(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    return Work(model.to(memory_format=torch.channels_last), x, _labels(10, batch))


# An MLP 1024-2048-2048-2048-16 at batch 1024; GPTs of 4 layers, 8 heads, 256 positions and 1,024 tokens at batch 8 and
# 4; ResNets on 3×32×32 images, memory channels last, at batch 32 and 128.
WORKS: dict[str, Callable[[], Work]] = {
    "mlp": _mlp,
    "gpt-512": partial(_gpt, 512, 8),
    "gpt-1024": partial(_gpt, 1024, 4),
    "resnet18": partial(_resnet, (2, 2, 2, 2), 64, 32),
    "resnet20": partial(_resnet, (3, 3, 3), 16, 128),
}


# ---- variants: how it is trained ----


class Variant(NamedTuple):
    """How a work is trained.

    Args:
        prepare: changes the plain model, and says in words what a reader must know of it; or raises.
        autocast: whether the forward runs inside bfloat16 autocast.
        foreign: whether it needs what may not be here, a compiler or another library: it is then left out and said.
    """

    prepare: Callable[[nn.Module], str]
    autocast: bool = True
    foreign: bool = False


def _as_it_is(_: nn.Module) -> str:
    return ""


def _compiled(model: nn.Module) -> str:
    model.compile()
    return ""


def _torchao(model: nn.Module) -> str:
    """Torchao's int8 training of linear layers, by swapping modules: its other way runs no integer product."""
    logging.getLogger("torchao").setLevel(logging.ERROR)  # of its other kernels, which do not load without a GPU
    training = importlib.import_module("torchao.prototype.quantized_training")
    quantize: Any = importlib.import_module("torchao.quantization").quantize_
    total = _plain_layers(model)
    quantize(model, training.int8_mixed_precision_training(module_swap=True))
    converted = total - _plain_layers(model)
    return "" if converted == total else f"torchao converts {converted} of {total} layers"


def _torchao_compiled(model: nn.Module) -> str:
    note = _torchao(model)
    return _compiled(model) or note


def _plain_layers(model: nn.Module) -> int:
    """Layers with products that are torch's own."""
    return sum(type(m) in PRODUCT_LAYERS for m in model.modules())


def _recipe(name: str, engine: str) -> Variant:
    def prepare(model: nn.Module) -> str:
        report = lowbit.convert_(model, name, engine=engine)
        engines = {row.engines.get("output") for row in report.rows if row.converted}
        return "" if engines == {engine} else f"on {' and '.join(sorted(filter(None, engines)))}"

    return Variant(prepare)


BASES: dict[str, Variant] = {
    "fp32": Variant(_as_it_is, autocast=False),
    "bf16": Variant(_as_it_is),
    "fp32-compiled": Variant(_compiled, autocast=False, foreign=True),
    "bf16-compiled": Variant(_compiled, foreign=True),
    "torchao": Variant(_torchao, foreign=True),
    "torchao-compiled": Variant(_torchao_compiled, foreign=True),
}
DEVICES = ("cpu", "cuda")
VARIANTS = ("fp32", "bf16", "sbm8", "int8", "torchao")
COMPILED = tuple(name for name in BASES if name.endswith("-compiled"))


def variant(name: str) -> Variant:
    """How to train what a name says: one of `BASES`, a recipe (on the int8 engine), or ``RECIPE:ENGINE``.

    A recipe is a name, also of the kind ``int8:w4a4g4``, or a file that ends in ``.toml``.

    Raises:
        UsageError: an unknown name or engine, or a recipe's file or widths that make no recipe.
    """
    if name in BASES:
        return BASES[name]
    recipe, colon, engine = name.rpartition(":")
    if not colon or is_family(name):
        recipe, engine = name, ""
    engines = ("auto", *ENGINES)
    if engine and engine not in engines:
        raise unknown("engine", engine, engines)
    if recipe not in recipes() and not is_family(recipe) and not is_file_name(recipe):
        raise unknown("variant", name, {*BASES, *recipes()})
    lowbit.Recipe.find(recipe)  # raises before anything runs
    return _recipe(recipe, engine or "int8")


def stepper(work: str, name: str, device: str = "cpu") -> tuple[Step, str]:
    """One training step with SGD and momentum 0.9 on a fixed batch of a fresh model, and what a reader must know of it.

    A step on a GPU ends when the GPU has finished it.

    Args:
        work: one of `WORKS`.
        name: see `variant`.
        device: one of `DEVICES`, where the model goes after it was converted on the CPU.
    """
    torch.manual_seed(0)
    model, x, y = WORKS[work]()
    how = variant(name)
    note = how.prepare(model)
    model, x, y = model.to(device), x.to(device), y.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=how.autocast):
            logits = model(x)
        F.cross_entropy(logits.flatten(0, -2).float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step, note


def _on_gpu(step: Step) -> str:
    """Run one step: how many of its products each engine ran, which may not be the one chosen on the CPU."""
    calls: list[ProductCall] = []
    with counted_by(calls.append):
        step()
    engines = Counter(call.engine for call in calls)
    return ", ".join(f"{count} of {len(calls)} products on {engine}" for engine, count in engines.items())


def _ready(work: str, names: Iterable[str], device: str = "cpu") -> tuple[dict[str, Step], list[str]]:
    """A step of each variant that runs here, and a note for each that does not or is not what it seems."""
    steps: dict[str, Step] = {}
    notes = []
    for name in names:
        try:
            step, note = stepper(work, name, device)
            if variant(name).foreign:
                step()  # what is compiled fails in its first step
            elif device == "cuda":
                note = _on_gpu(step)
        except Exception as error:
            if not variant(name).foreign:
                raise
            reason = str(error).strip().partition("\n")[0] or "no reason given"
            notes.append(f"{work}, {name}: left out, {type(error).__name__}: {reason}")
            continue
        steps[name] = step
        if note:
            notes.append(f"{work}, {name}: {note}")
    return steps, notes


# ---- tables ----

HEADER = ("work", "variant", "median ms", "min", "max", "speed to fp32", "to bf16")


def rows(work: str, seconds: Mapping[str, Sequence[float]], digits: int = 1) -> list[list[str]]:
    """Lines of one work in the table of `HEADER`, milliseconds with so many digits after the point.

    A speed is the median over rounds of how many times as fast as the base a variant was in the same round.
    """
    lines = []
    for name, taken in seconds.items():
        ms = [f"{1e3 * s:.{digits}f}" for s in (statistics.median(taken), min(taken), max(taken))]
        speeds = [f"{ratio(seconds[base], taken):.2f}" if base in seconds else "-" for base in ("fp32", "bf16")]
        lines.append([work, name, *ms, *speeds])
    return lines


def steps(works: Sequence[str], variants: Sequence[str], rounds: int, device: str = "cpu") -> Iterator[str]:
    """Time every variant of every work; gives lines of text as they are ready, the table last.

    Args:
        works: names of `WORKS`.
        variants: names for `variant`.
        rounds: rounds that count.
        device: one of `DEVICES`.

    Raises:
        UsageError: an unknown name, no round, no such device here, or a layer that the engine asked for cannot run.
    """
    if device not in DEVICES:
        raise unknown("device", device, DEVICES)
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device='cuda', and torch finds no GPU here. Leave --device out to time the CPU.")
    if rounds < 1:
        raise UsageError(f"rounds must be at least 1, got {rounds}.")
    for work in works:
        if work not in WORKS:
            raise unknown("work", work, WORKS)
    for name in variants:
        variant(name)
    if device == "cuda":
        yield f"{here()}, {torch.cuda.get_device_name()}, {_fp32_on_gpu()}"
    else:
        yield str(here())
        yield from without_gain(works, variants)
    digits = 2 if device == "cuda" else 1
    table: list[list[str]] = []
    notes: list[str] = []
    for work in works:
        ready, said = _ready(work, variants, device)
        seconds = paired(ready, rounds)
        table += rows(work, seconds, digits)
        notes += said
        medians = {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}
        yield f"{work}: {', '.join(f'{name} {ms:.{digits - 1}f} ms' for name, ms in medians.items())}"
    yield f"\nsteps of forward, backward and update, {rounds} rounds; all but fp32 inside bf16 autocast\n"
    yield "\n".join([text_table(HEADER, table), *("note: " + note for note in notes)])


def _fp32_on_gpu() -> str:
    """How torch multiplies float32 there, which its own settings decide."""
    matrices = "float32" if torch.get_float32_matmul_precision() == "highest" else "TF32"
    convolutions = "TF32" if torch.backends.cudnn.allow_tf32 else "float32"
    return f"fp32: matrices in {matrices}, convolutions in {convolutions}"


def without_gain(works: Sequence[str], variants: Sequence[str]) -> Iterator[str]:
    """A line for each work and recipe with layers that no engine makes faster than fp32 here, as was measured."""
    for work in works:
        for recipe in dict.fromkeys(name.partition(":")[0] for name in variants if name not in BASES):
            torch.manual_seed(0)
            report = lowbit.convert_(WORKS[work]().model, recipe)
            if report.without_gain:
                layers = ", ".join(report.without_gain)
                yield f"{work}, {recipe}: measured as no faster than fp32 on any engine: {layers}"


# ---- kernels ----

SIDE = 2048
"""Passes run over SIDE rows of SIDE numbers, 4.2 million."""


def passes(x: Tensor) -> dict[str, Step]:
    """Passes over a matrix by name, `torch.clone` first: torch's, lowbit's, and QPyTorch's where it is installed.

    Args:
        x: float32 ``(rows, columns)``, contiguous.
    """
    found: dict[str, Step] = {
        "torch.clone": x.clone,
        "torch.fake_quantize_per_tensor_affine": lambda: torch.fake_quantize_per_tensor_affine(x, 0.02, 0, -128, 127),
    }
    if native_instruction_sets() is not None:
        found |= _native_passes(x)
    return found | _qtorch_passes(x)


def _native_passes(x: Tensor) -> dict[str, Step]:
    rows_of, width = x.shape
    views = {"tensor": (1, 1, x.numel(), False), "row": (1, rows_of, width, False)}
    counts = {"tensor": 1, "row": rows_of}
    rounding = {"nearest": None, "stochastic": (12345, 67890)}
    signs = {"u8": (False, 0.0, 255.0), "s8": (True, -127.0, 127.0)}
    found: dict[str, Step] = {f"extremes {per}": partial(cpu.extremes, x, views[per]) for per in views}
    for per, view in views.items():
        scale, zero = x.new_full((counts[per],), 0.02), x.new_full((counts[per],), 128.0)
        for sign, (signed, low, high) in signs.items():
            for how, key in rounding.items():
                grid = cpu.Grid(scale=scale, zero=None if signed else zero, low=low, high=high, key=key)
                found[f"encode {sign} {per} {how}"] = partial(cpu.encode, x, view, grid, signed=signed)
    for how, key in rounding.items():
        grid = cpu.Grid(scale=x.new_full((1,), 0.02), zero=None, low=-127.0, high=127.0, key=key)
        found[f"fake_quantize {how}"] = partial(cpu.fake_quantize, x, views["tensor"], grid)
    found["fake_quantize bf16"] = partial(cpu.round_bf16, x)
    found["noise"] = partial(cpu.noise, x.numel(), (12345, 67890))
    found["sums of columns (grad_bias)"] = partial(cpu.sums, x, width)
    running = new_running_range()
    found["observe (extremes, running range)"] = partial(
        cpu.observe, x, rows_of, running, momentum=0.9, first=True, training=True
    )
    for per, samples in (("tensor", 1), ("row", None)):
        for how, key in rounding.items():
            found[f"quantize s8 {per} {how} (extremes, encode)"] = partial(
                cpu.quantize, x, views[per], symmetric=True, floor=0.0, levels=127.0, samples=samples, key=key
            )
    return found | _norm_passes(x)


def _norm_passes(x: Tensor) -> dict[str, Step]:
    """The passes of Range BN, over codes as rows of 64 channels."""
    channels, y = 64, torch.empty_like(x)
    q = torch.randint(0, 256, x.shape, dtype=torch.uint8, device="cpu")
    count, ones = q.numel() // channels, x.new_ones(channels)
    codes, starts = cpu.Codes(q=q, scale=x.new_ones(1), zero=0), [i * count // 16 for i in range(17)]
    stats = cpu.code_statistics(codes, channels, starts, x.new_ones(16))
    return {
        "affine (dequantise, Range BN)": partial(cpu.affine, q, ones, ones, y),
        "statistics of codes (Range BN)": partial(cpu.code_statistics, codes, channels, starts, x.new_ones(16)),
        "sums of codes (Range BN)": partial(cpu.code_sums, q, None, channels),
        "sums of products of codes (Range BN)": partial(cpu.code_sums, q, q, channels),
        "normalise, ReLU (Range BN)": partial(
            cpu.normalize, codes, stats, eps=1e-5, narrowest=True, inside=True, gamma=ones, beta=ones, rectify=True, y=y
        ),
        "gradient of the ReLU (Range BN)": partial(
            cpu.rectify_backward, x, codes, stats, gamma=ones, beta=ones, d=ones, dtype=x.dtype
        ),
        "gradients (Range BN)": partial(
            cpu.normalize_backward, codes, codes, stats, inside=True, gamma=ones, d=ones, dx=y
        ),
    }


def _qtorch_passes(x: Tensor) -> dict[str, Step]:
    try:
        quant = importlib.import_module("qtorch.quant")
    except Exception:  # it builds C++ when it is imported, and raises whatever goes wrong
        return {}
    return {
        f"qtorch.fixed_point_quantize {how}": partial(quant.fixed_point_quantize, x, wl=8, fl=6, rounding=how)
        for how in ("nearest", "stochastic")
    }


def kernels(rounds: int, side: int = SIDE) -> Iterator[str]:
    """Time every pass over a float32 matrix, or codes of it; gives lines of text, the table last.

    Args:
        rounds: rounds that count.
        side: rows of the matrix, and numbers in a row; a multiple of 64.

    Raises:
        UsageError: no round.
    """
    x = torch.randn(side, side, dtype=torch.float32, device="cpu")
    ready = passes(x)
    yield f"{here()}\n\n{x.numel():,} elements, {rounds} rounds\n"
    seconds = paired(ready, rounds, ready=True)
    table = []
    for name, taken in seconds.items():
        ns = [f"{1e9 * s / x.numel():.3f}" for s in (statistics.median(taken), min(taken), max(taken))]
        table.append([name, *ns, f"{ratio(taken, seconds['torch.clone']):.2f}"])
    yield text_table(("pass", "median ns/element", "min", "max", "times clone"), table)
    if native_instruction_sets() is None:
        yield "note: lowbit was installed without its native kernels, so none of its passes is here"
    if not any(name.startswith("qtorch") for name in ready):
        yield "note: qtorch cannot be imported (pip install qtorch, and a C++ compiler), so it is left out"


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many threads of torch in this context; None: as many as there are.

    Raises:
        UsageError: fewer than 1.
    """
    if count is not None and not 1 <= count <= MOST_THREADS:
        raise UsageError(f"--threads must be 1 to {MOST_THREADS}, got {shown(count)}.")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
