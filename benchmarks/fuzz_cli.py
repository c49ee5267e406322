"""Thousands of command lines, good and bad, and run folders whose files were damaged: none may end in a traceback.

Options come from the real parsers, values from a table of good and bad ones; everything follows from the seed. A
command must end with 0, 1 or 2 and say what is wrong in a few lines. Training is left out: settings are read, data
loaded, models built and converted, and no step runs. Example:

    python benchmarks/fuzz_cli.py --lines 2000 --seed 0
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

from lowbit.cli import main as cli
from lowbit.cli.parser import parser_of
from lowbit.errors import RunError

ALLOWED = {0, 1, 2}
MOST_LINES = 4  # on stderr
SECONDS = 60  # for one command line
MEMORY = 24 * 2**30  # address space of the whole script, so that a request for more fails instead of a machine

# What any option may be given, and what some are given when they are to work.
BAD = [
    *("", " ", "x", "-1", "0", "1", "2", "3", "8", "33", "1.5", "-0.0", "nan", "inf", "-inf", "1e400", "1e-400"),
    *("true", "null", "None", "[]", "[1,2]", "[[1,2],[3,4]]", "{}", "{a: 1}", "{", "'", '"', "\\", "%s", "{0}", "!!x"),
    *("999999999999", "18446744073709551616", "9" * 5000, "1_000", "0x10", "é", "\u202e", "a" * 300, "../..", "/", "."),
    *("/dev/null", "no/such", "&a [*a]", "*a", "<<: x", "--", "-h", "1,2,3", "3,32,32", "3-8x2", "RTH:3-8x2", "4,6@1"),
]
GOOD: dict[str, list[str]] = {
    "model": ["mlp", "resnet20"],
    "data": ["digits"],
    "recipe": ["sbm8", "fp32", "int8", "cpt", "pfq", "dfq", "fractrain", "w4a4g6"],
    "optimizer": ["sgd", "adamw"],
    "schedule": ["one-cycle", "constant", "3-8x2", "RTH:3-8x2", "4,6@1", "8"],
    "engine": ["auto", "int8", "reference"],
    "amp": ["auto", "none", "bf16"],
    "shape": ["3,32,32", "64", "triangular-vertical"],
    "input": ["3,32,32", "16"],
    "profile": ["cosine", "rex"],
    "final": ["high"],
    "mixing": ["input", "output"],
    "measure": ["accuracy", "loss"],
    "hardware": ["bitfusion", "examples/own_accelerator.py:Systolic"],
    "set": ["rows=16", "rows=32", "weight_bytes=131072", "snap_bits=true", "mac_nj=1", "buffer_nj=1", "dram_nj=1"],
    "format": ["text", "json", "csv"],
    "bits": ["[3,4]", "2,3"],
    "grad_bits": ["[6,8]"],
    "targets": ["[1.9,3.0]", "[3.0]"],
    "choices": ["[[3,6],[8,8]]"],
    "blocks": [r"hidden\.\d", "groups"],
    "low": ["2", "range-test"],
    "eval_bits": ["highest", "current", "8"],
    "works": ["mlp"],
    "variants": ["fp32"],
}
# What makes a command work, and short; given in two of three lines.
BASE = {
    "train": "--model mlp --data digits --max-steps 1 --threads 1 --subset 64 --batch-size 32",
    "range-test": "--model mlp --data digits --steps-per-bit 2 --high 3 --threads 1 --subset 64 --batch-size 32",
    "inspect": "--model mlp",
    "cost": "--model mlp --steps 4 --recipe sbm8",
    "bench": "",
    "resume": "",
    "recipes": "",
}
COMMANDS = tuple(BASE)


def options(command: str) -> list[str]:
    """The options of a command, as its parser knows them."""
    parser = parser_of(command)
    return sorted(
        option[2:] for action in parser._actions for option in action.option_strings[-1:] if option.startswith("--")
    )


def line(rng: random.Random, known: dict[str, list[str]], folder: Path) -> list[str]:
    """One command line."""
    command = rng.choice(COMMANDS) if rng.random() < 0.98 else rng.choice(BAD)
    argv = [command]
    if rng.random() < 0.67:
        argv += BASE.get(command, "").split()
    if command in ("resume", "recipes", "cost") and rng.random() < 0.7:
        argv.append(rng.choice([*BAD, str(folder), "sbm8", "w4a4g6"]))
    for _ in range(rng.randrange(4)):
        name = rng.choice(known[command]) if known.get(command) and rng.random() < 0.95 else rng.choice(BAD)
        given = rng.choice(GOOD[name] if name in GOOD and rng.random() < 0.5 else BAD)
        flag = "--" + (name.replace("_", "-") if rng.random() < 0.5 else name)
        argv += [f"{flag}={given}"] if rng.random() < 0.5 else [flag, given] if rng.random() < 0.9 else [flag]
    if command == "bench":
        argv += ["--rounds", "0"]
    if command == "train":
        argv += ["--out", str(folder / f"run-{rng.randrange(10**9)}")]
    return argv


# ---- damaged folders ----


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places in nested lists and dicts."""
    yield path
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from leaves(each, (*path, key))


def bent(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at one place; `Ellipsis` removes it."""
    if not path:
        return None if new is ... else new
    copied = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and new is ...:
        del copied[path[0]]
    else:
        copied[path[0]] = bent(value[path[0]], path[1:], new)
    return copied


VALUES: list[Any] = [
    *(None, True, -5, 0, 1.5, float("nan"), float("inf"), 2**70, "x", "", [], {}, [None], {"x": 1}, ...),
]


def damage(rng: random.Random, run: Path) -> str:
    """Damage one file of a run folder; says how."""
    path = rng.choice(sorted(p for p in run.iterdir() if p.is_file()))
    content = path.read_bytes()
    kind = rng.choice(["truncated", "empty", "binary", "flipped", "folder", "link", "absent", *["bent"] * 6])
    if kind == "bent" and path.suffix in (".json", ".jsonl", ".yaml"):
        return f"{path.name}: {_bend(rng, path, content.decode())}"
    if kind == "truncated":
        path.write_bytes(content[: rng.randrange(len(content) or 1)])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "link":
        path.unlink()
        path.symlink_to(path)
    elif kind == "absent":
        path.unlink()
    elif kind == "flipped" and content:
        place = rng.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
    else:
        path.write_bytes(rng.randbytes(rng.choice([1, 100, 10_000])))
    return f"{path.name}: {kind}"


def _bend(rng: random.Random, path: Path, text: str) -> str:
    """Put another value at one place of a structured file."""
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    number = rng.randrange(len(lines))
    load: Callable[[str], Any] = yaml.safe_load if path.suffix == ".yaml" else json.loads
    # Without its checksum, so that what is wrong is the value; a ledger that has none in its first line needs none.
    lines = [re.sub(r',"crc":"[0-9a-f]{8}"\}$', "}", each) for each in lines]
    value = load(lines[number])
    place, new = rng.choice(list(leaves(value))), rng.choice(VALUES)
    changed = bent(value, place, new)
    lines[number] = yaml.safe_dump(changed) if path.suffix == ".yaml" else json.dumps(changed)
    path.write_text("\n".join(lines) + "\n")
    return f"line {number + 1}, {'.'.join(map(str, place))} = {new!r}"


def on_folder(rng: random.Random, run: Path) -> list[str]:
    """A command that reads a run folder."""
    return rng.choice(
        [
            ["resume", str(run)],
            ["cost", str(run)],
            ["cost", str(run), "--hardware", "bitfusion", "--format", "json"],
            ["cost", str(run / "ledger.jsonl"), "--format", "csv"],
            ["inspect", "--probe", "--run", str(run), "--batches", "1", "--widths", "4"],
        ]
    )


# ---- running ----


class Hang(BaseException):
    """A command took too long."""


def _hang(*_: object) -> None:
    raise Hang


def run_line(argv: Sequence[str]) -> str:
    """Run one command line in this process; what is wrong with how it ended, or an empty text."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(argv)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:200]}"
    return judged(code, err.getvalue())


def judged(code: int, err: str) -> str:
    """What is wrong with an exit code and what stderr says; empty where nothing is."""
    lines = [text for text in err.splitlines() if text.strip()]
    said = [text for text in lines if text.startswith("lowbit: error: ")]
    if code not in ALLOWED:
        return f"exit code {code}"
    if "Traceback" in err or len(lines) > MOST_LINES:
        return f"{len(lines)} lines on stderr: {lines[0][:200]}"
    if bool(code) != bool(said):
        return f"exit code {code} and {len(said)} errors: {err[:200]}"
    if said and len(said[0]) > 4000:
        return f"a line of {len(said[0])} characters: {said[0][:200]}"
    return ""


def without_training() -> Any:
    """Runs that end before their first step: what comes before it is what is tried here."""
    from lowbit.train import trainer

    return mock.patch.object(trainer, "_run", side_effect=RunError("no training here"))


def fuzz(
    lines: int, folders: int, seed: int, *, say: Callable[[str], None] = print, alarm: bool = True
) -> tuple[Counter[str], list[str]]:
    """Run so many command lines and damaged folders; how they ended, and what was wrong."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    known = {command: options(command) for command in COMMANDS}
    before, threads = Path.cwd(), torch.get_num_threads()
    if alarm:
        signal.signal(signal.SIGALRM, _hang)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        os.chdir(place)
        try:
            good = place / "good"
            run = "train --model mlp --data digits --max-steps 2 --threads 1 --subset 64 --batch-size 32 --out"
            assert not run_line([*run.split(), str(good)]), run_line(["resume", str(good)])
            for number in range(lines + folders):
                if number < lines:
                    argv, how = line(rng, known, good), ""
                    kind = argv[0] if argv[0] in COMMANDS else "unknown command"
                    context: Any = without_training()
                else:
                    bad = place / "bad"
                    shutil.rmtree(bad, ignore_errors=True)
                    shutil.copytree(good, bad)
                    if rng.random() < 0.6:
                        (bad / "result.json").unlink()
                    how = damage(rng, bad)
                    argv, context = on_folder(rng, bad), contextlib.nullcontext()
                    kind = f"{argv[0]} of a damaged folder"
                with context:
                    if alarm:
                        signal.alarm(SECONDS)
                    try:
                        fault = run_line(argv)
                    finally:
                        signal.alarm(0)
                torch.set_num_threads(threads)
                counts[kind] += 1
                if fault:
                    wrong.append(f"{' '.join(argv)[:300]} [{how}]: {fault}")
                    say(wrong[-1])
        finally:
            os.chdir(before)
    return counts, wrong


def processes(lines: int, seed: int) -> list[str]:
    """A few command lines as processes of their own, through the installed entry point's module."""
    rng = random.Random(seed)
    known = {command: options(command) for command in COMMANDS}
    wrong = []
    with tempfile.TemporaryDirectory() as temporary:
        for _ in range(lines):
            argv = line(rng, {**known}, Path(temporary))
            if argv[0] in ("train", "range-test") or any("\0" in arg for arg in argv):
                argv = ["cost", *argv[1:3]]
            done = subprocess.run(
                [sys.executable, "-m", "lowbit", *argv],
                check=False,
                capture_output=True,
                text=True,
                cwd=temporary,
                timeout=SECONDS,
            )
            if fault := judged(done.returncode, done.stderr):
                wrong.append(f"{' '.join(argv)[:300]}: {fault}")
    return wrong


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=2000, help="command lines (2000)")
    parser.add_argument("--folders", type=int, default=500, help="damaged run folders (500)")
    parser.add_argument("--processes", type=int, default=20, help="command lines as processes (20)")
    parser.add_argument("--seed", type=int, default=0, help="what all of it follows from (0)")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    counts, wrong = fuzz(args.lines, args.folders, args.seed, say=lambda text: print(text, flush=True))
    wrong += processes(args.processes, args.seed)
    for kind, number in sorted(counts.items()):
        print(f"{number:6,}  {kind}")
    print(f"{args.processes:6,}  as processes\n{len(wrong):6,}  wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
