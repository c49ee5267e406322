"""``lowbit cost``: what a run cost, or what a planned one would."""

import math
from pathlib import Path
from typing import Any, Literal

from lowbit.cli.shapes import MOST_NUMBERS, task_of
from lowbit.errors import UsageError

DESCRIPTION = "Show what a run cost, from its folder, or what a planned run would cost."
HELP = "show what a run costs, before or after it"


def add_arguments(parser: Any) -> None:
    """What the command takes."""
    parser.add_argument("run", type=Path, nargs="?", help="run folder or ledger; without it, plan a run of --model")
    parser.add_argument("--model", type=str, help="plan: name of the model, or FILE.py:CLASS")
    parser.add_argument("--recipe", type=str, help="plan: name of the recipe (sbm8)")
    parser.add_argument("--schedule", type=str, help="plan: forward bits, e.g. 8, 3-8x32, RTH:3-8x8 or 4,6@80ep,8@0.9")
    parser.add_argument("--backward", type=str, help="plan: gradient bits, written likewise")
    parser.add_argument("--input", type=str, help="plan: C,H,W of an image or T of a text (3,32,32)")
    parser.add_argument("--classes", type=int, help="plan: outputs of the model (10; 256 for text)")
    parser.add_argument("--batch_size", type=int, help="plan: samples per step (128)")
    parser.add_argument("--steps", type=int, help="plan: steps of the run (1)")
    parser.add_argument("--steps_per_epoch", type=int, help="plan: for times in epochs")
    parser.add_argument(
        "--hardware", type=str, help="also estimate cycles and energy on it: bitfusion, or FILE.py:CLASS, which is run"
    )
    parser.add_argument(
        "--set", type=str, action="append", help="a setting of --hardware, NAME=VALUE, e.g. rows=32; may be repeated"
    )
    parser.add_argument(
        "--drop_damaged", action="store_true", help="leave out damaged lines of the ledger, and count them"
    )
    parser.add_argument(
        "--at", type=str, help="cost it as if every converted layer had had these widths, wXaYgZ, e.g. w4a4g8"
    )
    parser.add_argument(
        "--format",
        type=Literal["text", "json", "csv", "zigzag", "scale-sim"],
        default="text",
        help="text, json or csv; zigzag or scale-sim: the last step as a workload of that simulator (text)",
    )


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
        ledger, measured = _plan(**planned), dict[str, str]()
    else:
        ledger, measured = _ran(run, drop_damaged=drop_damaged)
    if at is not None:
        # What was measured was measured at other widths.
        ledger, measured = ledger.at(at), {}
    if workload := {"zigzag": zigzag, "scale-sim": scale_sim}.get(format):
        if hardware is not None:
            raise UsageError(f"--hardware is of a cost, and --format {format} writes what runs: leave one out.")
        print(workload(ledger).rstrip("\n"))
        return
    cost = Cost(ledger, estimated_on, measured)
    # Tables are as wide as they are: folded by the terminal's width they could not be read or piped.
    print({"text": cost.__str__, "json": cost.to_json, "csv": cost.to_csv}[format]().rstrip("\n"))


def _plan(
    *,
    model: str | None,
    recipe: str | None,
    schedule: str | None,
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
    forward, back = [
        None if text is None else parse_schedule(text, total_steps=steps, steps_per_epoch=steps_per_epoch)
        for text in (schedule, backward)
    ]
    if forward is None and (method.schedule is not None or method.gates is not None):
        forward, own = _own_schedule(method, network, steps, steps_per_epoch)
        back = own if back is None else back
    lowbit.convert_(network, method, engine="reference")
    return plan(
        network, batch, steps=steps, forward=forward, backward=back, name=model, steps_per_epoch=steps_per_epoch
    )


def _own_schedule(recipe: Any, network: Any, steps: int, steps_per_epoch: int | None) -> tuple[Any, Any]:
    """The bits that a recipe plans by itself: forward, backward or None; what only a run decides is refused."""
    from lowbit.nn.kinds import is_depthwise
    from lowbit.schedules import Schedule

    forward, backward = (
        None if template is None else template.build(total_steps=steps, steps_per_epoch=steps_per_epoch)
        for template in ((recipe.schedule.forward, recipe.schedule.backward) if recipe.schedule else (None, None))
    )
    if not isinstance(forward, Schedule):
        raise UsageError(
            f"the bits of {recipe.name} follow what the run sees, which a plan cannot know: give --schedule, or the "
            "folder of a run."
        )
    if recipe.depthwise is not None and any(map(is_depthwise, network.modules())):
        raise UsageError(
            f"{recipe.name} keeps depthwise convolutions at bits of their own, and a plan gives every layer the same: "
            "give --schedule to plan that, or the folder of a run."
        )
    return forward, backward


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
