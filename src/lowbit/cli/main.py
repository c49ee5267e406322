"""The command line: ``lowbit train | resume | range-test | inspect | cost | bench | recipes``."""

import math
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from lowbit.errors import RunError, Stopped, UsageError, shown
from lowbit.inputs import userfile
from lowbit.train.config import RangeTestConfig, Result, TrainConfig

_LONGEST = 2000  # characters of a message
_MOST_NUMBERS = 2**40  # in one batch that is planned, or one sample of a model that is shown
_MOST_PARAMETERS = 2**29  # of a model that is built to be shown, 2 GiB
_MOST_ROUNDS = 10_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Returns:
        0 if it did what was asked, 1 if a correct request failed (`RunError`), 2 if the request was wrong
        (`UsageError`), 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP. Failures are one line on stderr;
        ``LOWBIT_TRACEBACK=1`` shows where.
    """
    try:
        return _command(sys.argv[1:] if argv is None else argv)
    except (UsageError, ArgumentError) as error:
        return _fail(error, str(error), 2)
    except RunError as error:
        return _fail(error, str(error), 1)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "lowbit":
            raise
        return _fail(error, f"{error}: the command line needs `pip install 'lowbit[train]'`.", 1)
    except Stopped as stop:
        print(f"lowbit: {stop}", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt as stop:
        print(f"\nlowbit: {stop or 'interrupted'}", file=sys.stderr)
        return 130
    except Exception as error:
        if (fault := userfile.fault(error)) is None:
            raise
        return _fail(error, fault, 1)


def _fail(error: Exception, message: str, code: int) -> int:
    if os.environ.get("LOWBIT_TRACEBACK") == "1":
        raise error
    print(f"lowbit: error: {_tidy(message)}", file=sys.stderr)
    return code


def _tidy(message: str) -> str:
    """One line, in the words of the command line where jsonargparse speaks of parser keys and types."""
    message = " ".join(message.split())
    message = re.sub(r'^Parser key "(\w+)":', r"--\1:", message)
    message = re.sub(r"Does not validate against any of the Union subtypes.*Given value: .+", _tidy_union, message)
    message = re.sub(r"Expected an? <class '(\w+)'>", r"expected \1", message)
    message = message.replace("Expected a typing.Literal", "expected one of ").replace("Got value: ", "got ")
    required = re.fullmatch(r"the following arguments are required: (.+)", message)
    if required:
        names = [name.rpartition(".")[2] for name in required[1].split(", ")]
        message = f"missing: {', '.join(name if name == 'run' else f'--{name}' for name in names)}"
    return message if len(message) <= _LONGEST else f"{message[:_LONGEST]} ..."


def _tidy_union(match: re.Match[str]) -> str:
    """What a setting of several types allows, and what it got."""
    errors, _, given = match[0].rpartition("Given value: ")
    kinds = re.findall(r"- Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", errors)
    allowed = dict.fromkeys(name or f"one of {choices}" for name, choices in kinds if name != "NoneType")
    return f"expected {' or '.join(allowed)}, got {given}"


def _command(argv: Sequence[str]) -> int:
    try:
        args = _parser().parse_args([_underscored(arg) for arg in argv])
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    # Each command imports what it needs: `lowbit --help` must not wait for Lightning.
    own = args[args.subcommand]
    match args.subcommand:
        case "train":
            own.pop("config")
            _train(TrainConfig(**own))
        case "resume":
            _resume(**own)
        case "range-test":
            _range_test(RangeTestConfig(**own))
        case "inspect":
            _inspect(**own)
        case "cost":
            _cost(**own)
        case "bench":
            _bench(**own)
        case "recipes":
            _recipes(own.name)
    return 0


def _underscored(arg: str) -> str:
    """``--batch-size`` means ``--batch_size``."""
    name, equals, value = arg.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else arg


def _parser() -> Any:
    from jsonargparse import ArgumentParser

    def parser(description: str) -> ArgumentParser:
        return ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False, default_env=False)

    main_parser = ArgumentParser(
        prog="lowbit",
        description="Train neural networks in few bits.",
        version=version("lowbit"),
        exit_on_error=False,
        allow_abbrev=False,
        default_env=False,
    )
    commands = main_parser.add_subcommands(title="commands", metavar="COMMAND")

    train = parser("Train a model in a new run folder.")
    train.add_argument("--config", action="config", help="YAML file of the settings below; later flags win")
    train.add_class_arguments(TrainConfig)
    commands.add_subcommand("train", train, help="train a model in a new run folder")

    resume = parser("Continue a run from its last checkpoint, bit for bit.")
    _add_resume(resume)
    commands.add_subcommand("resume", resume, help="continue a run from its last checkpoint")

    range_test = parser("Find the lowest precision at which a fresh model makes progress, for a cyclic schedule.")
    range_test.add_class_arguments(RangeTestConfig)
    commands.add_subcommand("range-test", range_test, help="find the lowest precision that makes progress")

    inspect = parser("Show which layers a recipe converts, which it skips and why, without training.")
    inspect.add_argument("--model", type=str, help="name of the model, or a class of your own file: FILE.py:CLASS")
    inspect.add_argument("--recipe", type=str, default="sbm8", help="name of the recipe")
    inspect.add_argument("--data", type=str, help="data set whose input and labels the model gets")
    inspect.add_argument("--shape", type=str, help="without --data: C,H,W of an image or T of a text (3,32,32)")
    inspect.add_argument("--classes", type=int, help="without --data: outputs of the model (10; 256 for text)")
    inspect.add_argument("--probe", action="store_true", help="measure errors and sensitivity on batches of --data")
    inspect.add_argument("--run", type=Path, help="probe: the model, weights, recipe and data of this run's checkpoint")
    inspect.add_argument("--batches", type=int, default=2, help="probe: batches to take (2)")
    inspect.add_argument("--batch_size", type=int, help="probe: samples in each (64; with --run its own)")
    inspect.add_argument("--bits", type=str, default="2,3,4,6", help="probe: widths to try in each layer (2,3,4,6)")
    inspect.add_argument("--budget", type=float, help="probe: suggest bits that take this share of the bit operations")
    commands.add_subcommand("inspect", inspect, help="show what a recipe converts, without training")

    cost = parser("Show what a run cost, from its folder, or what a planned run would cost.")
    cost.add_argument("run", type=Path, nargs="?", help="run folder or ledger; without it, plan a run of --model")
    cost.add_argument("--model", type=str, help="plan: name of the model, or FILE.py:CLASS")
    cost.add_argument("--recipe", type=str, help="plan: name of the recipe (sbm8)")
    cost.add_argument("--schedule", type=str, help="plan: forward bits, e.g. 8, 3-8x32, RTH:3-8x8 or 4,6@80ep,8@0.9")
    cost.add_argument("--backward", type=str, help="plan: gradient bits, written likewise")
    cost.add_argument("--input", type=str, help="plan: C,H,W of an image or T of a text (3,32,32)")
    cost.add_argument("--classes", type=int, help="plan: outputs of the model (10; 256 for text)")
    cost.add_argument("--batch_size", type=int, help="plan: samples per step (128)")
    cost.add_argument("--steps", type=int, help="plan: steps of the run (1)")
    cost.add_argument("--steps_per_epoch", type=int, help="plan: for times in epochs")
    cost.add_argument(
        "--hardware", type=str, help="also estimate cycles and energy on it: bitfusion, or FILE.py:CLASS, which is run"
    )
    cost.add_argument(
        "--set", type=str, action="append", help="a setting of --hardware, NAME=VALUE, e.g. rows=32; may be repeated"
    )
    cost.add_argument(
        "--drop_damaged", action="store_true", help="leave out damaged lines of the ledger, and count them"
    )
    cost.add_argument("--format", type=Literal["text", "json", "csv"], default="text", help="text, json or csv (text)")
    commands.add_subcommand("cost", cost, help="show what a run costs, before or after it")

    bench = parser("Time training steps here, or passes by kernel, or measure which engine is faster for which layers.")
    _add_bench(bench)
    commands.add_subcommand("bench", bench, help="time training steps, kernels, or what engines to choose")

    recipes = parser("List the recipes, or show the number formats of one.")
    recipes.add_argument("name", type=str, nargs="?", help="the recipe to show")
    commands.add_subcommand("recipes", recipes, help="list the recipes, or show one")
    return main_parser


def _add_resume(resume: Any) -> None:
    resume.add_argument("run", type=Path, help="run folder")
    resume.add_argument("--lr", type=float, help="from here on: peak learning rate; config.yaml keeps what changed")
    resume.add_argument("--weight_decay", type=float, help="from here on: weight decay")
    resume.add_argument("--epochs", type=int, help="from here on: passes over the training set, those done included")
    resume.add_argument("--threads", type=int, help="from here on: threads of torch")
    resume.add_argument("--checkpoint_every", type=int, help="from here on: steps between two checkpoints")
    resume.add_argument("--checkpoint_minutes", type=float, help="from here on: minutes between two checkpoints")
    resume.add_argument("--keep", type=int, help="from here on: how many checkpoints to keep")
    resume.add_argument("--data_changed", action="store_true", help="go on although the data set has changed")
    resume.add_argument("--drop_damaged", action="store_true", help="go on although lines of the ledger are damaged")


def _add_bench(bench: Any) -> None:
    bench.add_argument("--works", type=str, nargs="+", help="networks: mlp gpt-512 gpt-1024 resnet18 resnet20 (all)")
    variants = "fp32, bf16, torchao, recipes, RECIPE:ENGINE (fp32 bf16 sbm8 int8 torchao)"
    bench.add_argument("--variants", type=str, nargs="+", help=variants)
    bench.add_argument("--compile", action="store_true", help="also fp32 and bf16 through torch.compile")
    bench.add_argument("--kernels", action="store_true", help="time passes over memory in place of steps")
    bench.add_argument("--calibrate", action="store_true", help="measure and keep what engine=auto chooses by")
    bench.add_argument("--device", type=str, help="where steps run: cpu or cuda (cpu)")
    bench.add_argument("--rounds", type=int, help="rounds that count (9; 5 with --calibrate)")
    bench.add_argument("--threads", type=int, help="threads of torch (as many as it takes)")


def _train(config: TrainConfig) -> None:
    from lowbit.train import trainer

    _show(trainer.train(config))


def _resume(run: Path, *, data_changed: bool, drop_damaged: bool, **changes: Any) -> None:
    from lowbit.train import trainer

    given = {name: value for name, value in changes.items() if value is not None}
    _show(trainer.resume(run, given, data_changed=data_changed, drop_damaged=drop_damaged))


def _range_test(config: RangeTestConfig) -> None:
    from lowbit.train.range_test import range_test

    _print(str(range_test(config)))


def _inspect(
    *,
    model: str | None,
    recipe: str,
    data: str | None,
    shape: str | None,
    classes: int | None,
    probe: bool,
    **probing: Any,
) -> None:
    import torch

    import lowbit
    from lowbit.train import models
    from lowbit.train.data import Task, load

    if probe:
        if shape is not None or classes is not None:
            raise UsageError("--probe runs real batches: give --data in place of --shape and --classes.")
        _probe(model=model, recipe=recipe, data=data, **probing)
        return
    if model is None:
        raise UsageError("missing: --model")
    if data is None:
        task = _task(shape or "3,32,32", classes)
    elif shape is None and classes is None:
        task = load(data, batch_size=1, seed=0).task
    else:
        raise UsageError("--shape and --classes come from the data set: give either them or --data.")
    assert isinstance(task, Task)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in models.build(model, task).parameters())
    if parameters > _MOST_PARAMETERS:
        raise UsageError(
            f"{model} would have {parameters:,} parameters for these sizes, and at most {_MOST_PARAMETERS:,} are "
            "built to be shown: give a smaller --shape or fewer --classes."
        )
    print(lowbit.convert_(models.build(model, task), recipe))


def _probe(
    *,
    model: str | None,
    recipe: str,
    data: str | None,
    run: Path | None,
    batches: int,
    batch_size: int | None,
    bits: str,
    budget: float | None,
) -> None:
    """Probe the model of a run's checkpoint, or a fresh one."""
    from itertools import islice

    import torch
    import torch.nn.functional as F

    import lowbit
    from lowbit.train import models
    from lowbit.train.data import load

    if (run is None) == (model is None or data is None) or (run is not None and (model or data)):
        raise UsageError("--probe needs either --run, or --model and --data.")
    if run is not None and batch_size is not None:
        raise UsageError("--batch-size is the run's own: leave it out with --run.")
    for flag, count in (("--batches", batches), ("--batch-size", batch_size)):
        if count is not None and count < 1:
            raise UsageError(f"{flag} must be at least 1, got {count}.")
    widths = [_whole(width) for width in bits.split(",")]
    if 0 in widths:
        raise UsageError(f"--bits must be whole numbers with commas between, e.g. 2,3,4, got {bits!r}.")
    if run is not None:
        from lowbit.train.trainer import trained

        network, loaded = trained(run)
        print(f"checkpoint of {run}")
    else:
        assert model is not None
        assert data is not None
        loaded = load(data, batch_size=batch_size or 64, seed=0)
        torch.manual_seed(0)
        network = models.build(model, loaded.task)
        lowbit.convert_(network, recipe)
        print(f"{model} with fresh weights: give --run to probe a trained one")

    def loss(net: Any, batch: Any) -> Any:
        return F.cross_entropy(net(batch[0]).flatten(0, -2), batch[1].flatten())

    found = lowbit.probe(network, islice(loaded.train, batches), loss, bits=widths)
    print(found)
    if budget is not None:
        print(f"\n{found.suggest(budget)}")


def _cost(
    *,
    run: Path | None,
    hardware: str | None,
    set: list[str] | None,  # noqa: A002 - the flag
    drop_damaged: bool,
    format: str,  # noqa: A002 - the flag
    **planned: Any,
) -> None:
    from lowbit.hardware import accelerator
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
    task = _task(input or "3,32,32", classes, flag="--input")
    for flag, value in (("--batch-size", batch_size), ("--steps", steps), ("--steps-per-epoch", steps_per_epoch)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} must be at least 1, got {value}.")
    steps, batch_size = steps or 1, batch_size or 128
    if batch_size * math.prod(task.shape) > _MOST_NUMBERS:
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
    if forward is None and method.is_dynamic:
        forward, own = _own_schedule(method, network, steps, steps_per_epoch)
        back = own if back is None else back
    lowbit.convert_(network, method, engine="reference")
    return plan(network, batch, steps=steps, forward=forward, backward=back, name=model)


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


def _bench(
    *,
    works: list[str] | None,
    variants: list[str] | None,
    compile: bool,  # noqa: A002 - the flag
    kernels: bool,
    calibrate: bool,
    device: str | None,
    rounds: int | None,
    threads: int | None,
) -> None:
    from lowbit.train import bench

    given = {"--works": works, "--variants": variants, "--compile": compile, "--device": device}
    of_steps = [flag for flag, value in given.items() if value]
    if rounds is not None and rounds > _MOST_ROUNDS:
        raise UsageError(f"--rounds must be at most {_MOST_ROUNDS:,}, got {shown(rounds)}.")
    if kernels and calibrate:
        raise UsageError("--kernels and --calibrate are two commands: give either.")
    if of_steps and (kernels or calibrate):
        other = "--kernels" if kernels else "--calibrate"
        raise UsageError(f"{', '.join(of_steps)} choose what training steps to time, and {other} times none.")
    with bench.threads(threads):
        if calibrate:
            lines = _calibrate(rounds)
        elif kernels:
            lines = bench.kernels(9 if rounds is None else rounds)
        else:
            names = [*(variants or bench.VARIANTS), *(bench.COMPILED if compile else ())]
            names, rounds = list(dict.fromkeys(names)), 9 if rounds is None else rounds
            lines = bench.steps(works or list(bench.WORKS), names, rounds, device or "cpu")
        for line in lines:
            print(line, flush=True)


def _calibrate(rounds: int | None) -> Iterator[str]:
    from lowbit.conversion import calibration
    from lowbit.engines.int8 import missing
    from lowbit.machine import here

    if why := missing("int8") or missing("bf16"):
        raise RunError(f"there is no choice of engines on this machine: {why}.")
    yield f"{here()}\nmeasuring, 10 to 60 seconds ..."
    table = calibration.measure(rounds=calibration.ROUNDS if rounds is None else rounds)
    yield f"\n{table}\n\nkept in {calibration.save(table)}: engine='auto' goes by it from now on"


def _whole(text: str) -> int:
    """A whole number of at most nine digits; 0 where a text is not one."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0


def _task(shape: str, classes: int | None, flag: str = "--shape") -> Any:
    from lowbit.train.data import Task

    sizes = tuple(map(_whole, shape.split(",")))
    if len(sizes) not in {1, 3} or 0 in sizes:
        raise UsageError(f"{flag} must be C,H,W for images or T for text, e.g. 3,32,32, got {shape!r}.")
    if classes is not None and classes < 1:
        raise UsageError(f"--classes must be at least 1, got {classes}.")
    if math.prod(sizes) * (classes or 1) > _MOST_NUMBERS:
        raise UsageError(f"{flag} and --classes are too large: {shape} and {classes or 'none'}.")
    if len(sizes) == 1:
        return Task(kind="text", shape=sizes, classes=classes or 256)
    return Task(kind="image", shape=sizes, classes=classes or 10)


def _recipes(name: str | None) -> None:
    from lowbit.methods.recipe import Recipe, recipes

    if name is None:
        table = _table("recipe", "what it does", "source")
        for known in recipes():
            # The last entry stands for a family of recipes: show one of them.
            recipe = Recipe.from_name("w4a4g6" if known == "wXaYgZ" else known)
            table.add_row(known, recipe.summary, recipe.source)
        _print(table)
        return
    recipe = Recipe.find(name)
    _print(f"{recipe.name}: {recipe.summary}\nsource: {recipe.source}\n")
    operands = ("input", "weight", "grad_output")
    table = _table("product", *operands)
    for product in ("output", "grad_input", "grad_weight"):
        formats = [getattr(getattr(recipe, product), operand, None) for operand in operands]
        table.add_row(product, *("" if format_ is None else str(format_) for format_ in formats))
    _print(table)
    if recipe.schedule is not None:
        backward = "as forward says" if recipe.schedule.backward is None else recipe.schedule.backward
        _print(f"over the run: forward bits {recipe.schedule.forward}; backward bits {backward}")
    if recipe.gates is not None:
        choices = ", ".join(f"{a}/{g}" for a, g in recipe.gates.choices)
        targets = ", then ".join(f"{target:g} %" for target in recipe.gates.targets)
        _print(f"gates choose input/gradient bits by block and sample: {choices}; cost {targets} of full precision")
    if recipe.depthwise is not None:
        _print("depthwise convolutions: forward {} bits, backward {} bits".format(*recipe.depthwise))
    norm = recipe.normalization
    _print(f"bias: {recipe.bias}; first layer: {recipe.first}; last layer: {recipe.last}")
    if norm is None:
        _print("batch normalisation: kept, in full precision")
    else:
        _print(
            f"batch normalisation: Range BN, input {norm.input}; grad_output {norm.grad_output}; "
            f"constant of the {norm.constant}, epsilon {norm.epsilon}, at most {norm.chunks} chunks"
        )


def _show(result: Result) -> None:
    table = _table("result", "")
    if result.test_accuracy is not None:
        table.add_row("test accuracy", f"{result.test_accuracy:.2%}")
    if result.test_bits_per_byte is not None:
        table.add_row("test bits per byte", f"{result.test_bits_per_byte:.4f}")
    table.add_row("test loss", f"{result.test_loss:.4f}")
    seconds = result.seconds_per_step
    table.add_row("seconds per step", "too few to say" if seconds is None else f"{seconds:.4g} (median)")
    table.add_row("steps", f"{result.steps:,}")
    table.add_row("recipe", f"{result.recipe}: {result.converted} of {result.layers} layers converted")
    if result.macs:
        table.add_row(
            "bit operations", f"{result.bit_operations:.4g} ({result.bit_operations / result.macs:.4g} a MAC)"
        )
    if result.low is not None:
        table.add_row("range test", f"{result.low} bits, {result.out / 'range-test.txt'}")
    table.add_row("what ran", f"{result.out / 'conversion.txt'}, {result.out / 'proof.txt'}")
    table.add_row("checkpoint", str(result.out / "last.ckpt"))
    table.add_row("logs", f"{result.out / 'csv' / 'metrics.csv'}, {result.out / 'tensorboard'}")
    _print(table)


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    return Table(*columns, box=box.SIMPLE_HEAD, header_style="bold")


def _print(what: Any) -> None:
    """Text or a table, in the width of the terminal."""
    from rich.console import Console

    Console(highlight=False, markup=False).print(what)
