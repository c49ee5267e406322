"""A run of the command line that takes a second."""

from pathlib import Path

from lowbit.cli import main as cli


def train(out: Path, *flags: str) -> int:
    """Train a small model for ten steps."""
    run = ["--model", "mlp", "--data", "digits", "--batch-size", "64", "--max-steps", "10", "--threads", "1"]
    return cli.main(["train", *run, "--out", str(out), *flags])
