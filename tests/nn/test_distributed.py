"""Noise and dynamic precision under DistributedDataParallel: two gloo processes on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")

# Each rank sees batches of its own. Printed: what it decided, and its parameters at the end.
RANK = """
import json, os, re, sys
import torch, torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import lowbit
from lowbit.methods.recipe import Recipe

rank, meet, name, own_batches = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + meet, rank=rank, world_size=2)
torch.manual_seed(0)
class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()) for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))

model = Network()
recipe = Recipe.from_name(name)
if name == "fractrain":
    recipe = recipe.tuned(threshold=0.5, targets=[1.5, 3.0])
else:
    recipe = recipe.tuned(threshold=0.5)
lowbit.convert_(model, recipe)
blocks = [re.compile(r"blocks[.][0-9]")] if recipe.gates else []
bits = lowbit.PrecisionController.from_recipe(model, total_steps=12, steps_per_epoch=2, blocks=blocks)
model.gates = bits.gates  # part of what is wrapped, so that its gradients are averaged
wrapped = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
start = [p.detach().clone() for p in model.parameters()]
generator = torch.Generator().manual_seed(1 + rank * own_batches)
stages, now, choices = [], [], []
for t in range(12):
    x, y = torch.randn(8, 3, 6, 6, generator=generator), torch.randint(4, (8,), generator=generator)
    task = F.cross_entropy(wrapped(x), y)
    loss = task if bits.gates is None else task + bits.gates.penalty()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    bits.step(task)
    stages.append(bits.stage)
    now.append([bits.forward_bits, bits.backward_bits] if bits.gates is None else bits.gates.target)
    if bits.gates is not None:
        choices.append(bits.gates.histogram().tolist())
# The same batch on both ranks: the gates, which trained on other batches, choose alike.
probe = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(9))
with torch.no_grad():
    model.eval()
    model(probe)
print(json.dumps({
    "stages": stages, "now": now, "choices": choices,
    "probe": None if bits.gates is None else bits.gates.histogram().tolist(),
    "parameters": [p.detach().double().sum().item().hex() for p in model.parameters()],
    "moved": [bool((p != q).any()) for p, q in zip(model.parameters(), start)],
    "gates": [n for n, _ in model.named_parameters() if n.startswith("gates.")],
    "loss": task.item(),
}), flush=True)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # gloo's threads may outlive the group, and the interpreter's end then aborts now and then
"""


# Both ranks see the same data and never update, so all that moves their gradients is the rounding of grad_output.
NOISE = """
import json, os, sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import lowbit

def local(seed):
    model = nn.Linear(24, 32, bias=False)
    nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
    lowbit.convert_(model, "int8", engine="reference", seed=seed)
    return model

def gradients(call, model):
    generator, found = torch.Generator().manual_seed(1), []
    x, g = torch.randn(16, 24, generator=generator), torch.randn(16, 32, generator=generator)
    for _ in range(64):
        model.zero_grad()
        call(x).backward(g)
        found.append(model.weight.grad.clone())
    return torch.stack(found)

rank, meet = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
before = local(0)  # converted before the processes meet
model = local(0)
single = gradients(model, model)
dist.init_process_group("gloo", init_method="file://" + meet, rank=rank, world_size=2)
own = gradients(before, before)
model = local(0)
again = gradients(model, model)
model = local(0)
wrapped = DistributedDataParallel(model)
mean = gradients(wrapped, model)

def variance(g):
    return g.double().var(0).mean().item()

print(json.dumps({
    "single": single[1].tolist(), "own": own[1].tolist(), "again": bool((again == own).all()),
    "equal_steps": [bool((a == b).all()) for a, b in zip(own, single)],
    "mean": mean[1].tolist(), "variance": variance(own), "variance_of_mean": variance(mean),
}), flush=True)
dist.barrier()
dist.destroy_process_group()
os._exit(0)
"""


def ranks(meet: Path, name: str, *, own_batches: bool) -> list[dict[str, Any]]:
    """What the two processes of a training run printed."""
    return said(RANK, meet, name, str(int(own_batches)))


def said(script: str, meet: Path, *arguments: str) -> list[dict[str, Any]]:
    """What two processes printed."""
    command = [sys.executable, "-W", "error", "-c", script]
    runs = [
        subprocess.Popen(
            [*command, str(rank), str(meet), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    printed = [run.communicate(timeout=200) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], printed[0][1] + printed[1][1]
    return [json.loads(out.splitlines()[-1]) for out, _ in printed]


def test_ranks_round_with_noise_of_their_own(tmp_path: Path) -> None:
    """Rank 0 has the noise of one process, rank 1 has other noise in every step, and each repeats its own.

    So the variance of the averaged gradient is half of that of one rank; with equal noise it would be all of it. The
    ratio of 64 steps of 512 rounded gradients has a standard deviation below 0.01: false alarm < 1e-6.
    """
    one, two = said(NOISE, tmp_path / "meet")

    assert all(one["equal_steps"])
    assert not any(two["equal_steps"])
    assert one["single"] == two["single"]
    assert one["again"]
    assert two["again"]
    assert one["mean"] == two["mean"]
    for rank in (one, two):
        assert rank["variance"] > 0
        assert 0.45 < rank["variance_of_mean"] / rank["variance"] < 0.55


def test_the_plateau_of_pfq_is_the_same_on_both_ranks(tmp_path: Path) -> None:
    """With losses of their own, both ranks go from stage to stage at the same steps and end with the same weights."""
    one, two = ranks(tmp_path / "meet", "pfq", own_batches=True)

    assert one["loss"] != two["loss"]
    assert one["stages"] == two["stages"]
    assert one["now"] == two["now"]
    assert one["stages"][0] == 0
    assert one["stages"][-1] > 0
    assert one["parameters"] == two["parameters"]
    assert any(one["moved"])


def test_a_gated_model_trains(tmp_path: Path) -> None:
    """Gates that are part of the wrapped module train with it, stay equal on both ranks, and then choose alike."""
    one, two = ranks(tmp_path / "meet", "fractrain", own_batches=True)

    assert one["loss"] != two["loss"]
    assert one["parameters"] == two["parameters"]
    assert one["gates"]
    assert all(one["moved"][-len(one["gates"]) :])
    assert one["probe"] == two["probe"]
    assert one["now"] == two["now"]
    assert one["stages"][-1] > 0


def test_gates_decide_alike_on_the_same_samples(tmp_path: Path) -> None:
    """Where both ranks see the same samples, every choice of every step is the same."""
    one, two = ranks(tmp_path / "meet", "fractrain", own_batches=False)

    assert one["choices"] == two["choices"]
    assert sum(map(sum, one["choices"][0])) == 3 * 8
