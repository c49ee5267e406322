"""Runs for the tests of figures and pages: real ones of a few steps, and copies of them with other settings."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from lowbit.train import TrainConfig
from lowbit.train.trainer import train

STEPS = 20


def make_run(out: Path, recipe: str, seed: int = 0, **settings: Any) -> Path:
    """A run of 20 steps that takes a fraction of a second."""
    values: dict[str, Any] = {
        "model": "mlp",
        "data": "digits",
        "subset": 640,
        "batch_size": 64,
        "epochs": 2,
        "lr": 0.05,
    }
    train(TrainConfig(**(values | settings), recipe=recipe, seed=seed, threads=1, out=out))
    return out


def copied(run: Path, out: Path, *, accuracy: float | None = None, **settings: Any) -> Path:
    """A copy of a run without its checkpoints, with other settings and another accuracy."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("*.ckpt", "tensorboard"))
    path = out / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | settings, sort_keys=False))
    if accuracy is not None:
        result = json.loads((out / "result.json").read_text())
        (out / "result.json").write_text(json.dumps(result | {"test_accuracy": accuracy}))
    return out


def unfinished(run: Path, out: Path) -> Path:
    """A copy of a run as it was before its end."""
    copied(run, out)
    (out / "result.json").unlink()
    return out


def gated(run: Path, out: Path) -> Path:
    """A copy of a run whose table has what gates log."""
    copied(run, out, recipe="dfq")
    path = out / "csv" / "metrics.csv"
    header, *rows = path.read_text().splitlines()
    more = "cost_percent,target_percent,gates/block/3-6,gates/block/4-8"
    lines = [f"{header},{more}", *(f"{row},{3 + i},3,0.25,0.75" for i, row in enumerate(rows))]
    path.write_text("\n".join(lines) + "\n")
    return out
