"""A byte-level GPT on English text, equal steps and seeds: the validation loss in 8 bits beside that in full precision.

    apt-get install bible-kjv dict-gcide
    python benchmarks/text.py --steps 1000 --seeds 0 1 2 --threads 1

The text is the King James Bible, then 8 MB of the GNU Collaborative Dictionary; the last twentieth of each is the
validation text. A run that has ended is read from its file, so the command can be given again.
"""

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import lowbit
from lowbit import machine
from lowbit.tables import text_table
from lowbit.train.models import GPT

DICTIONARY = Path("/usr/share/dictd/gcide.dict.dz")
BATCH, CONTEXT, VALIDATION_BATCHES, RATE, WARMUP = 8, 128, 128, 1e-3, 50


def texts() -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes to validate on, uint8."""
    if not DICTIONARY.exists():
        raise SystemExit(f"{DICTIONARY} is not there: apt-get install dict-gcide")
    try:
        bible = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise SystemExit("the program `bible` is not there: apt-get install bible-kjv") from None
    with gzip.open(DICTIONARY) as file:
        dictionary = file.read(8_000_000)
    parts = [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (bible, dictionary)]
    cuts = [len(part) - len(part) // 20 for part in parts]
    train = torch.cat([part[:cut] for part, cut in zip(parts, cuts, strict=True)])
    return train, torch.cat([part[cut:] for part, cut in zip(parts, cuts, strict=True)])


def batch(text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows of the text and the bytes that follow: (B, T) int64 each."""
    starts = torch.randint(len(text) - CONTEXT - 1, (BATCH, 1), generator=generator, dtype=torch.int64)
    window = text[starts + torch.arange(CONTEXT + 1, dtype=torch.int64)].long()
    return window[:, :-1], window[:, 1:]


def loss_of(model: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean cross entropy of a byte, in nats."""
    return F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())


def run(recipe: str, seed: int, args: argparse.Namespace, train: Tensor, validation: Tensor) -> dict[str, float]:
    """Train once; the validation loss and the median time of a step."""
    torch.manual_seed(seed)
    model = GPT(vocabulary=256, d=args.d, layers=args.layers, heads=args.d // 64, context=CONTEXT)
    lowbit.convert_(model, recipe, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=args.steps, pct_start=WARMUP / args.steps, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    seconds, losses = [], []
    for step in range(args.steps):
        x, y = batch(train, generator)
        start = time.perf_counter()
        loss = loss_of(model, x, y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
        if step % 100 == 99:
            print(
                f"{recipe} seed {seed} step {step + 1}: {statistics.mean(losses[-100:]):.4f}",
                file=sys.stderr,
                flush=True,
            )
    model.eval()
    generator.manual_seed(12345)
    with torch.no_grad():
        measured = [loss_of(model, *batch(validation, generator)).item() for _ in range(VALIDATION_BATCHES)]
    return {"loss": statistics.mean(measured), "seconds": statistics.median(seconds)}


def main() -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipes", nargs="+", default=["fp32", "int8", "int8-attention"])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--d", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/text"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    found: dict[str, list[dict[str, float]]] = {recipe: [] for recipe in args.recipes}
    train, validation = texts()
    for seed in args.seeds:
        for recipe in args.recipes:
            file = args.out / f"{args.d}-{args.layers}-{args.steps}-{recipe}-{seed}.json"
            if not file.exists():
                file.write_text(json.dumps(run(recipe, seed, args, train, validation)))
            found[recipe].append(json.loads(file.read_text()))
    rows = []
    for recipe, runs in found.items():
        losses = [run["loss"] for run in runs]
        against = [100 * (a["loss"] / b["loss"] - 1) for a, b in zip(runs, found[args.recipes[0]], strict=True)]
        each = " ".join(f"{loss:.4f}" for loss in losses)
        rows.append([recipe, f"{statistics.mean(losses):.4f}", each, f"{statistics.mean(against):+.2f}"])
    print(f"{args.steps} steps of {BATCH} x {CONTEXT} bytes, d = {args.d}, {args.layers} layers, seeds {args.seeds}")
    print(machine.here())
    print(text_table(["recipe", "validation loss", "each seed", f"% beside {args.recipes[0]}"], rows))


if __name__ == "__main__":
    main()
