"""The command line: ``lowbit train | resume | range-test | inspect | recipes``."""

import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lowbit.errors import RunError, UsageError
from lowbit.train.config import RangeTestConfig, Result, TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Returns:
        0 if it did what was asked, 1 if a correct request failed (`RunError`), 2 if the request was wrong
        (`UsageError`), 130 after Ctrl-C. Failures are one line on stderr; ``LOWBIT_TRACEBACK=1`` shows where.
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
    except KeyboardInterrupt as stop:
        print(f"\nlowbit: {stop or 'interrupted'}", file=sys.stderr)
        return 130


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
    return message


def _tidy_union(match: re.Match[str]) -> str:
    """What a setting of several types allows, and what it got."""
    errors, _, given = match[0].rpartition("Given value: ")
    kinds = re.findall(r"- Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", errors)
    allowed = [name or f"one of {choices}" for name, choices in kinds if name != "NoneType"]
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
            _resume(own.run)
        case "range-test":
            _range_test(RangeTestConfig(**own))
        case "inspect":
            _inspect(**own)
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
    resume.add_argument("run", type=Path, help="run folder")
    commands.add_subcommand("resume", resume, help="continue a run from its last checkpoint")

    range_test = parser("Find the lowest precision at which a fresh model makes progress, for a cyclic schedule.")
    range_test.add_class_arguments(RangeTestConfig)
    commands.add_subcommand("range-test", range_test, help="find the lowest precision that makes progress")

    inspect = parser("Show which layers a recipe converts, which it skips and why, without training.")
    inspect.add_argument("--model", type=str, required=True, help="name of the model")
    inspect.add_argument("--recipe", type=str, default="sbm8", help="name of the recipe")
    inspect.add_argument("--data", type=str, help="data set whose input and labels the model gets")
    inspect.add_argument("--shape", type=str, help="without --data: C,H,W of an image or T of a text (3,32,32)")
    inspect.add_argument("--classes", type=int, help="without --data: outputs of the model (10; 256 for text)")
    commands.add_subcommand("inspect", inspect, help="show what a recipe converts, without training")

    recipes = parser("List the recipes, or show the number formats of one.")
    recipes.add_argument("name", type=str, nargs="?", help="the recipe to show")
    commands.add_subcommand("recipes", recipes, help="list the recipes, or show one")
    return main_parser


def _train(config: TrainConfig) -> None:
    from lowbit.train import trainer

    _show(trainer.train(config))


def _resume(run: Path) -> None:
    from lowbit.train import trainer

    _show(trainer.resume(run))


def _range_test(config: RangeTestConfig) -> None:
    from lowbit.train import trainer

    _print(str(trainer.range_test(config)))


def _inspect(*, model: str, recipe: str, data: str | None, shape: str | None, classes: int | None) -> None:
    import lowbit
    from lowbit.train import models
    from lowbit.train.data import Task, load

    if data is None:
        task = _task(shape or "3,32,32", classes)
    elif shape is None and classes is None:
        task = load(data, batch_size=1, seed=0).task
    else:
        raise UsageError("--shape and --classes come from the data set: give either them or --data.")
    assert isinstance(task, Task)
    print(lowbit.convert_(models.build(model, task), recipe))


def _task(shape: str, classes: int | None) -> Any:
    from lowbit.train.data import Task

    sizes = tuple(int(size) if size.isdecimal() else 0 for size in shape.split(","))
    if len(sizes) not in {1, 3} or 0 in sizes:
        raise UsageError(f"--shape must be C,H,W for images or T for text, e.g. 3,32,32, got {shape!r}.")
    if classes is not None and classes < 1:
        raise UsageError(f"--classes must be at least 1, got {classes}.")
    if len(sizes) == 1:
        return Task(kind="text", shape=sizes, classes=classes or 256)
    return Task(kind="image", shape=sizes, classes=classes or 10)


def _recipes(name: str | None) -> None:
    from lowbit.recipe import Recipe, recipes

    if name is None:
        table = _table("recipe", "what it does", "source")
        for known in recipes():
            # The last entry stands for a family of recipes: show one of them.
            recipe = Recipe.from_name("w4a4g6" if known == "wXaYgZ" else known)
            table.add_row(known, recipe.summary, recipe.source)
        _print(table)
        return
    recipe = Recipe.from_name(name)
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


if __name__ == "__main__":
    sys.exit(main())
