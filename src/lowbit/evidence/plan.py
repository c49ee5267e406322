"""The ledger of a run before it runs: the shapes of one step without values, and the bits of a schedule.

The model runs on torch's meta device, where tensors have shapes but no values, so a plan of any network at any batch
takes moments and no memory. One step runs for each pair of widths that the schedules take.
"""

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lowbit.errors import RunError, UsageError, shown
from lowbit.evidence.ledger import Ledger
from lowbit.evidence.meter import Meter
from lowbit.evidence.names import layer_names
from lowbit.evidence.records import Program
from lowbit.inputs.checks import check_whole, checked
from lowbit.nn.gate import release
from lowbit.nn.layers import sites_of
from lowbit.precision.controller import PrecisionController
from lowbit.precision.layers import LayerRule, Widths, as_source, bits_at
from lowbit.schedules import SUITE, Constant, Cyclic, Piecewise, Schedule, Source

Bits = Schedule | int | None

_MOST_STEPS = 10**7


@checked
def plan(
    model: nn.Module,
    inputs: Any,
    *,
    steps: int,
    forward: Bits = None,
    backward: Bits = None,
    loss: Callable[[Any], Tensor] | None = None,
    name: str = "",
    steps_per_epoch: int | None = None,
) -> Ledger:
    """The ledger that training would give, without training.

    Args:
        model: converted or plain, on any device, even the meta device; it is not changed.
        inputs: one batch, with which the model is called; a tuple for several arguments, a dict for named ones.
        steps: updates of the weights, up to 10 million: the ledger has a record of each.
        forward: bits of `input` and `weight` at each step; None: the recipes' own.
        backward: bits of `grad_output`; where a recipe has it in two formats (gradient bifurcation) only those of
            `grad_input`. None: the recipes' own.
        loss: from the model's output to a scalar; None: the sum of all tensors in it, so that everything gets a
            gradient.
        name: of the model, for reports.
        steps_per_epoch: for recipes whose phases start in epochs.

    Returns:
        A ledger in memory. Evaluations are not in it.

    Raises:
        UsageError: no step, a schedule of another length, bits that a format lacks, or a schedule for a model in which
            nothing has bits.
        RunError: the model needs values to run, e.g. a size that depends on its input.
    """
    check_whole("steps", steps, 1, _MOST_STEPS)
    sources = [_source(what, bits, steps) for what, bits in (("forward", forward), ("backward", backward))]
    model = copy.deepcopy(model).to("meta").train()
    release(model)
    has_bits = any(site.slots("input", "weight", "grad_output") for site in sites_of(model))
    if any(source is not None for source in sources) and not has_bits:
        raise UsageError(
            "a schedule was given, but nothing in this model has bits to set: convert it to integer formats"
        )
    batch = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, inputs)
    ledger = Ledger(model=name or type(model).__name__, layers=layer_names(model))
    # One controller holds the model at each step, even if its recipe has its own schedule.
    changes = any(site.recipe.phases or site.recipe.skips_at_times for site in sites_of(model))
    everywhere: LayerRule = (lambda _: True, (forward, backward))
    controller = None
    if has_bits or changes:
        controller = PrecisionController(model, rules=[everywhere], total_steps=steps, steps_per_epoch=steps_per_epoch)
    programs: dict[tuple[Widths, object], tuple[int, int]] = {}
    for step in range(steps):
        widths: Widths = (bits_at(sources[0], step), bits_at(sources[1], step))
        key = widths, controller.phases(step) if controller is not None and changes else None
        if key not in programs:
            if controller is not None:
                controller.go_to(step)
            programs[key] = _one_step(model, batch, loss, ledger)
        program, samples = programs[key]
        ledger.add_step(program, samples=samples)
    return ledger


def _source(what: str, bits: Bits, steps: int) -> Source | None:
    schedule = as_source(what, bits)
    if schedule is not None and schedule.total_steps not in (None, steps):
        raise UsageError(f"the {what} schedule has total_steps={schedule.total_steps}, but the run has {steps} steps")
    return schedule


def _one_step(model: nn.Module, batch: Any, loss: Callable[[Any], Tensor] | None, ledger: Ledger) -> tuple[int, int]:
    """The index of the program of one step, which is added to `ledger`, and its number of samples."""
    step = Ledger()
    try:
        with Meter(model, step) as meter:
            if isinstance(batch, Mapping):
                output = model(**batch)
            else:
                output = model(*batch) if isinstance(batch, tuple) else model(batch)
            scalar = _sum(output) if loss is None else loss(output)
            scalar.backward()
            meter.step()
    except (RuntimeError, NotImplementedError) as error:
        if not ("meta" in str(error).lower() or isinstance(error, NotImplementedError)):
            raise
        raise RunError(
            f"{type(model).__name__} needs values to run ({str(error).splitlines()[0]}), and a plan has shapes only: "
            "measure a real step with lowbit.Meter instead"
        ) from error
    (done,) = step.steps
    program = step.programs[done.program]
    calls = tuple(sorted((ledger.intern(step.products[product]), n) for product, n in program.calls))
    whole = Program(calls=calls, uncounted=program.uncounted, held_bytes=program.held_bytes)
    return ledger.intern_program(whole), done.samples


def _sum(output: Any) -> Tensor:
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not tensors:
        raise UsageError("the model's output has no tensor with a gradient: give plan() a loss")
    total = tensors[0].sum()
    for tensor in tensors[1:]:
        total = total + tensor.sum()
    return total


_GRAMMAR = "8 | 3-8 | 3-8x32 | RTH:3-8x8 | 4,6@80ep,8@0.9"


@checked
def parse_schedule(text: str, *, total_steps: int, steps_per_epoch: int | None = None) -> Schedule:
    """A schedule from a short text, as on the command line.

    ``"8"`` is constant. ``"3-8x32"`` is CPT's cosine from 3 to 8 bits in 32 cycles (the default number).
    ``"RTH:3-8x8"`` is one of the ten of Wolfe and Kyrillidis (8 cycles by default). ``"4,6@80ep,8@0.9"`` has 4 bits,
    then 6 from epoch 80 on, and 8 in the last tenth (a start may also be a step).

    Raises:
        UsageError: the text is none of these, or the schedule refuses its values.
    """
    if re.fullmatch(r"\d{1,9}", text):
        return Constant(bits=int(text))
    cyclic = re.fullmatch(r"(?:([A-Z]+):)?(\d{1,9})-(\d{1,9})(?:x(\d{1,9}))?", text)
    if cyclic is not None:
        curve, low, high, cycles = cyclic.groups()
        if curve is not None and curve not in SUITE:
            raise UsageError(f"schedule {text!r}: no curve {curve!r}; there are {', '.join(SUITE)}")
        return Cyclic(
            low=int(low),
            high=int(high),
            cycles=int(cycles or (8 if curve else 32)),
            total_steps=total_steps,
            **SUITE[curve or "CR"],
        )
    pieces = [re.fullmatch(r"(\d{1,9})(?:@([\d.]+(?:ep)?))?", piece) for piece in text.split(",")]
    if all(pieces):
        return Piecewise(
            pieces=[(piece[2] or "0", int(piece[1])) for piece in pieces if piece is not None],
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
        )
    raise UsageError(f"schedule {shown(text)}: write {_GRAMMAR}")
