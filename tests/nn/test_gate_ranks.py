"""The cost term of gates in a distributed run: that of the samples of all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from gated_network import gated
from helpers import in_processes
from lowbit import ranks
from lowbit.nn.norm import RangeBatchNorm2d

X = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.2, 3, 16).view(-1, 1, 1, 1)


def term(x: Tensor) -> tuple[float, float, Tensor]:
    """The cost, the sign of the term's value, and its gradient for the gates, averaged over ranks."""
    model, _, gates = gated()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d | RangeBatchNorm2d):
            module.eval()  # so that a sample's gate does not depend on the others
    model(x)
    penalty = gates.penalty()
    penalty.backward()
    flat = torch.cat([p.grad.flatten() for p in gates.parameters() if p.grad is not None])
    assert gates.cost is not None
    return gates.cost, float(penalty.detach().sign()), ranks.gathered(flat).mean(0)


def of_a_rank() -> tuple[float, float, Tensor]:
    """What one of two processes finds on its half."""
    dist.init_process_group("gloo")
    found = term(X.chunk(2)[dist.get_rank()])
    dist.destroy_process_group()
    return found


def test_two_processes_charge_what_one_does() -> None:
    """Both ranks have one cost and direction, and the averaged gradient is that of one process, to a tenth.

    Ranges are those of each half, so the gates see slightly different features; without the factor of 2 the gradient
    would be half as long.
    """
    cost, sign, gradient = term(X)
    one, two = in_processes(of_a_rank, 2)

    assert one[0] == two[0]
    assert abs(one[0] - cost) < 0.05 * cost
    assert one[1] == two[1] == sign != 0
    assert gradient.norm() > 0
    assert (one[2] - gradient).norm() < 0.1 * gradient.norm()
