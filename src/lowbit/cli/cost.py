"""``lowbit cost``: what a run cost, or what a planned one would."""

import math
import re
from pathlib import Path
from typing import Any

from lowbit.cli.fold import folded
from lowbit.cli.shapes import MOST_NUMBERS, task_of
from lowbit.errors import UsageError

DESCRIPTION = "Show what a run cost, from its folder, or what a planned run would cost."
HELP = "show what a run costs, before or after it"
EXAMPLE = "lowbit cost --model resnet20 --recipe cpt --steps 6400"


def add_arguments(parser: Any) -> None:
    """What the command takes."""
    parser.add_argument("run", type=Path, nargs="?", help="run folder or ledger; without it, plan a run of --model")
    group = parser.add_argument_group("plan a run")
    group.add_argument("--model", metavar="NAME", help="name of the model, or FILE.py:CLASS")
    group.add_argument("--recipe", metavar="NAME", help="name of the recipe (sbm8)")
    group.add_argument("--forward", metavar="BITS", help="of inputs and weights: 8, 3-8x32, RTH:3-8x8, 4,6@80ep,8@0.9")
    group.add_argument("--backward", metavar="BITS", help="of gradients, written likewise")
    group.add_argument("--input", metavar="SIZES", help="C,H,W of an image or T of a text (3,32,32)")
    group.add_argument("--classes", type=int, metavar="N", help="outputs of the model (10; 256 for text)")
    group.add_argument("--batch-size", type=int, metavar="N", help="samples per step (128)")
    group.add_argument("--steps", type=int, metavar="N", help="steps of the run (1)")
    group.add_argument("--steps-per-epoch", type=int, metavar="N", help="for times in epochs")
    group = parser.add_argument_group("on an accelerator")
    group.add_argument(
        "--hardware", metavar="NAME", help="estimate cycles and energy: bitfusion, or FILE.py:CLASS, which is run"
    )
    group.add_argument(
        "--set", action="append", metavar="NAME=VALUE", help="a setting of it, e.g. rows=32; may be repeated"
    )
    group.add_argument(
        "--at", metavar="wXaYgZ", help="cost it as if all converted layers had these widths, e.g. w4a4g6"
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--format",
        choices=("text", "json", "csv", "zigzag", "scale-sim"),
        default="text",
        metavar="NAME",
        help="text, json or csv; zigzag or scale-sim: the last step as a workload of that simulator (text)",
    )
    group.add_argument(
        "--drop-damaged", action="store_true", help="leave out damaged lines of the ledger, and count them"
    )
    parser.rename("--schedule", "--forward", "in lowbit train, --schedule is that of the learning rate")


def run(
    *,
    run: Path | None,
    hardware: str | None,
    set: list[str] | None,  # noqa: A002 - the flag
    drop_damaged: bool,
    at: str | None,
    format: str,  # noqa: A002 - the flag
    **planned: Any,
) -> None:
    """Print the cost of a ledger: of the run in a folder, or of a plan."""
    from lowbit.hardware import accelerator, scale_sim, zigzag
    from lowbit.report.cost import Cost

    given = [f"--{name.replace('_', '-')}" for name, value in planned.items() if value is not None]
    if run is not None and given:
        raise UsageError(f"{', '.join(given)} plan a run, and {run} is one that ran: give either.")
    if set and hardware is None:
        raise UsageError("--set is of a hardware model: give --hardware too, e.g. --hardware bitfusion.")
    if drop_damaged and run is None:
        raise UsageError("--drop-damaged is of a ledger: give a run folder.")
    estimated_on = None if hardware is None else accelerator(hardware, set or ())
    if run is None:
        ledger, gated = _plan(**planned)
        measured: dict[str, str] = {}
    else:
        gated = {}
        ledger, measured = _ran(run, drop_damaged=drop_damaged)
    if at is not None:
        # What was measured was measured at other widths.
        ledger, measured, gated = ledger.at(at), {}, {}
    if workload := {"zigzag": zigzag, "scale-sim": scale_sim}.get(format):
        if hardware is not None:
            raise UsageError(f"--hardware is of a cost, and --format {format} writes what runs: leave one out.")
        print(workload(ledger).rstrip("\n"))
        return
    cost = Cost(ledger, estimated_on, measured, gated)
    print({"text": lambda: folded(str(cost)), "json": cost.to_json, "csv": cost.to_csv}[format]().rstrip("\n"))


def _plan(
    *,
    model: str | None,
    recipe: str | None,
    forward: str | None,
    backward: str | None,
    input: str | None,  # noqa: A002 - the flag
    classes: int | None,
    batch_size: int | None,
    steps: int | None,
    steps_per_epoch: int | None,
) -> Any:
    import torch

    import lowbit
    from lowbit.evidence.plan import parse_schedule, plan
    from lowbit.train import models

    if model is None:
        raise UsageError("cost needs a run folder, or --model to plan a run of.")
    task = task_of(input or "3,32,32", classes, flag="--input")
    for flag, value in (("--batch-size", batch_size), ("--steps", steps), ("--steps-per-epoch", steps_per_epoch)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} must be at least 1, got {value}.")
    steps, batch_size = steps or 1, batch_size or 128
    if batch_size * math.prod(task.shape) > MOST_NUMBERS:
        raise UsageError(
            f"--batch-size {batch_size} of --input {input or '3,32,32'}: at most 2**40 numbers are planned."
        )
    with torch.device("meta"):
        network = models.build(model, task)
        shape = (batch_size, *task.shape)
        batch = torch.zeros(shape, dtype=torch.int64 if task.kind == "text" else torch.float32, device="meta")
    method = lowbit.Recipe.find(recipe or "sbm8")
    ahead, back = [
        None if text is None else parse_schedule(text, total_steps=steps, steps_per_epoch=steps_per_epoch)
        for text in (forward, backward)
    ]
    if ahead is None and (method.schedule is not None or method.gates is not None):
        _refuse_depthwise(method, network)
    notes: list[str] = []
    if ahead is None and method.schedule is not None:
        ahead, own, notes = _own_schedule(method, steps, steps_per_epoch)
        back = own if back is None else back
    blocks = models.blocks(model)
    gates = method.gates if forward is None else None
    if gates is not None and blocks is None:
        raise UsageError(f"which blocks of {model} have gates is not known to a plan: give --forward, or a run.")
    # As in a run: what has a gate is converted, whatever the recipe says of the first layer.
    rules = [] if gates is None or blocks is None else [(_within(blocks), method)]
    lowbit.convert_(network, method, rules=rules, engine="reference")
    ledger = plan(
        network, batch, steps=steps, forward=ahead, backward=back, name=model, steps_per_epoch=steps_per_epoch
    )
    for note in notes:
        ledger.add_note(note)
    return ledger, {} if gates is None or blocks is None else _at_target(gates, ledger, blocks)


def _refuse_depthwise(recipe: Any, network: Any) -> None:
    from lowbit.nn.kinds import is_depthwise

    if recipe.depthwise is not None and any(map(is_depthwise, network.modules())):
        raise UsageError(
            f"{recipe.name} keeps depthwise convolutions at bits of their own, and a plan gives every layer the same: "
            "give --forward to plan that, or the folder of a run."
        )


def _own_schedule(recipe: Any, steps: int, steps_per_epoch: int | None) -> tuple[Any, Any, list[str]]:
    """The bits that a recipe plans by itself: forward, backward or None, and what is assumed of what a run decides."""
    from lowbit.schedules import Progressive, Schedule

    forward, backward = (
        None if template is None else template.build(total_steps=steps, steps_per_epoch=steps_per_epoch)
        for template in ((recipe.schedule.forward, recipe.schedule.backward))
    )
    if isinstance(forward, Progressive):
        return *_equal_stages(forward, steps), [
            f"assumed: the {len(forward.bits)} stages of {recipe.name} are equally long; a run decides by its loss."
        ]
    if not isinstance(forward, Schedule):
        raise UsageError(
            f"the bits of {recipe.name} follow what the run sees, which a plan cannot know: give --forward, or the "
            "folder of a run."
        )
    return forward, backward, []


def _equal_stages(rule: Any, steps: int) -> tuple[Any, Any]:
    """Progressive bits and gradient bits, each stage as long as the others."""
    from lowbit.schedules import Piecewise

    if steps < len(rule.bits):
        raise UsageError(f"--steps {steps} are too few for {len(rule.bits)} stages: give --steps of a whole run.")
    starts = [i * steps // len(rule.bits) for i in range(len(rule.bits))]
    forward, backward = (
        Piecewise(pieces=tuple(zip(starts, widths, strict=True)), total_steps=steps)
        for widths in (rule.bits, rule.grad_bits)
    )
    return forward, backward


def _at_target(gates: Any, ledger: Any, blocks: str) -> dict[str, float]:
    """Bit operations per MAC of each layer in a gated block, where the gates meet their targets, each equally long."""
    target = sum(gates.targets) / len(gates.targets)
    layers = {ran.product.layer for ran in ledger.totals()}
    gated = [layer for layer in layers if _within(blocks).fullmatch(layer)]
    ledger.add_note(
        f"assumed in the last line: gates choose bits that cost {target:g} % of full precision in their blocks, as "
        "they are trained to. The tables are at the recipe's own bits."
    )
    return dict.fromkeys(gated, target / 100 * 32 * 32)


def _within(blocks: str) -> re.Pattern[str]:
    """The names of the layers in blocks whose names match a pattern."""
    return re.compile(rf"(?:{blocks})(\..*)?")


def _ran(run: Path, *, drop_damaged: bool) -> tuple[Any, dict[str, str]]:
    """The ledger of a run folder, or a ledger file, and what was measured beside it."""
    from lowbit.evidence.ledger import Ledger
    from lowbit.train.measured import read

    if run.is_dir():
        if not (run / "ledger.jsonl").is_file():
            raise UsageError(
                f"{run} has no ledger.jsonl: give the folder of a run of `lowbit train`, or a ledger file."
            )
        return Ledger.load(run / "ledger.jsonl", drop_damaged=drop_damaged), read(run)
    return Ledger.load(run, drop_damaged=drop_damaged), {}
