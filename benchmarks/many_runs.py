"""Time `lowbit compare` and `lowbit report` on many runs: real ones of four recipes, and copies with other seeds.

``python benchmarks/many_runs.py`` makes 200 run folders in a temporary folder, beside four that are no good: foreign,
empty, half-written and damaged. It runs both commands as a user would and fails above the limits below.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from lowbit import machine
from lowbit.train import TrainConfig
from lowbit.train.trainer import train

RECIPES = ("fp32", "int8", "sbm8", "cpt")
COMPARE, REPORT, PAGE = 5.0, 15.0, 6e6
"""Seconds, seconds and bytes at most."""


def copied(run: Path, out: Path, seed: int) -> None:
    """A copy of a run with another seed and another accuracy."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("*.ckpt", "tensorboard"))
    settings = yaml.safe_load((out / "config.yaml").read_text())
    (out / "config.yaml").write_text(yaml.safe_dump(settings | {"seed": seed}, sort_keys=False))
    result = json.loads((out / "result.json").read_text())
    accuracy = result["test_accuracy"] + (seed % 7 - 3) / 1000
    (out / "result.json").write_text(json.dumps(result | {"seed": seed, "test_accuracy": accuracy}))


def make(folder: Path, count: int, steps: int) -> None:
    """Fill a folder with so many runs, and four folders that are none."""
    for recipe in RECIPES:
        settings = {"model": "resnet20", "data": "digits", "batch_size": 16, "max_steps": steps, "epochs": 10}
        train(TrainConfig(**settings, recipe=recipe, threads=1, out=folder / f"{recipe}-0"))  # type: ignore[arg-type]
    for number in range(len(RECIPES), count):
        recipe, seed = RECIPES[number % len(RECIPES)], number // len(RECIPES)
        copied(folder / f"{recipe}-0", folder / f"{recipe}-{seed}", seed)
    (folder / "foreign").mkdir()
    (folder / "foreign" / "notes.txt").write_text("not a run")
    (folder / "empty").mkdir()
    shutil.copytree(folder / "int8-0", folder / "half", ignore=shutil.ignore_patterns("ledger.jsonl", "*.ckpt"))
    shutil.copytree(folder / "int8-0", folder / "damaged", ignore=shutil.ignore_patterns("*.ckpt"))
    (folder / "damaged" / "config.yaml").write_bytes(b"\0\xff{{")


def timed(*arguments: str) -> tuple[float, float, subprocess.CompletedProcess[str]]:
    """Seconds of a command of lowbit as a process, those that it computed, and what it said."""
    began, computed = time.perf_counter(), os.times()
    done = subprocess.run([sys.executable, "-m", "lowbit", *arguments], capture_output=True, text=True, check=True)
    seconds, after = time.perf_counter() - began, os.times()
    own = after.children_user + after.children_system - computed.children_user - computed.children_system
    return seconds, own, done


def main() -> int:
    """Make the runs, time both commands, and say whether the limits hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200, help="how many (200)")
    parser.add_argument("--steps", type=int, default=100, help="of each run (100)")
    args = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as made:
        folder, page = Path(made) / "runs", Path(made) / "report.html"
        folder.mkdir()
        make(folder, args.runs, args.steps)
        compare, compare_own, said = timed("compare", str(folder))
        report, report_own, _ = timed("report", str(folder), "-o", str(page))
        size = page.stat().st_size
        named = [name for name in ("foreign", "empty", "half", "damaged") if f"{folder / name}:" in said.stderr]
    print(machine.here())
    print(f"{args.runs} runs of ResNet-20, {args.steps} steps each, on digits; left out by name: {', '.join(named)}")
    print(f"compare {compare:.1f} s ({compare_own:.1f} of a core), report {report:.1f} s ({report_own:.1f} of a core)")
    print(f"page {size / 1e6:.1f} MB; load average before and now {before:.1f}, {os.getloadavg()[0]:.1f}")
    return 0 if compare < COMPARE and report < REPORT and size < PAGE and len(named) == 4 else 1


if __name__ == "__main__":
    sys.exit(main())
