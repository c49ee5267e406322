"""Training steps of the same networks in two installs of lowbit, in alternation: whether a change made them slower.

    python benchmarks/builds.py BEFORE/bin/python AFTER/bin/python

Each interpreter trains in a process of its own, on one thread, and the two take turns, the first of each round in turn.
Times are of the process, which a busy machine changes less than those of the wall. Networks whose layers are not
converted stand beside them: what differs there is not lowbit's.
"""

import argparse
import statistics
import subprocess
from typing import IO

# What a process runs: names of the cases, one a line, for times in seconds. It is text because the installs differ.
WORKER = """
import sys, time
import torch, lowbit
from torch import nn
from lowbit.train.models import ResNet
torch.set_num_threads(1)

def network(name, small):
    torch.manual_seed(0)
    if name == "mlp":
        return nn.Sequential(nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 1024)), torch.randn(512, 1024)
    x = torch.randn(4, 1, 8, 8) if small else torch.randn(128, 1, 28, 28)
    model = ResNet(depths=(3, 3, 3), width=16, classes=10, channels=1)
    return model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)

cases = {}
for name, small in (("mlp", False), ("resnet20", False), ("resnet20 tiny", True)):
    for recipe in ("fp32", "int8", "sbm8"):
        model, x = network(name.split()[0], small)
        if recipe != "fp32":
            lowbit.convert_(model, recipe, engine="int8")
        model.train()
        cases[f"{name} {recipe}"] = model, x, torch.optim.SGD(model.parameters(), lr=0.01), recipe != "fp32"

def step(case):
    model, x, optimizer, autocast = case
    start = time.process_time()
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = model(x)
    y.float().square().mean().backward()
    optimizer.step()
    return time.process_time() - start

for case in cases.values():
    step(case), step(case)
print(*cases, sep=",", flush=True)
for line in sys.stdin:
    print(step(cases[line.strip()]), flush=True)
"""


def _line(stream: IO[str] | None) -> str:
    assert stream is not None
    line = stream.readline()
    if not line:
        raise SystemExit("a worker ended before its time: run it alone to see why")
    return line.strip()


def main() -> None:
    """Print a line for each network and recipe."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("before", help="the interpreter of one install")
    parser.add_argument("after", help="that of the other")
    parser.add_argument("--rounds", type=int, default=25)
    asked = parser.parse_args()
    workers = [
        subprocess.Popen([python, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for python in (asked.before, asked.after)
    ]
    names, _ = (_line(worker.stdout).split(",") for worker in workers)
    print(f"{'network':22} {'before ms':>9} {'after ms':>9} {'ratio':>6}  quartiles")
    for name in names:
        times: tuple[list[float], list[float]] = ([], [])
        for round_ in range(asked.rounds):
            for i in (round_ % 2, 1 - round_ % 2):
                stdin = workers[i].stdin
                assert stdin is not None
                stdin.write(name + "\n")
                stdin.flush()
                times[i].append(float(_line(workers[i].stdout)))
        ratios = [after / before for before, after in zip(*times, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        first, second = (1e3 * statistics.median(each) for each in times)
        print(f"{name:22} {first:9.2f} {second:9.2f} {middle:6.3f}  {low:.3f} to {high:.3f}", flush=True)
    for worker in workers:
        worker.terminate()


if __name__ == "__main__":
    main()
