"""The ledger of a run of several processes: what all ranks ran in a step is one step, which rank 0 writes."""

import dataclasses
from typing import NamedTuple

import torch

from lowbit import ranks
from lowbit.evidence.history import History
from lowbit.evidence.ledger import Ledger
from lowbit.evidence.records import Product, Program
from lowbit.train.processes import exchanged


class _Told(NamedTuple):
    """A program as another process understands it.

    Args:
        program: whose calls name products by their place in `products`.
        products: what it runs.
        samples: how many it took.
    """

    program: Program
    products: list[Product]
    samples: int


class MergedLedger:
    """Adds up the ledgers of all ranks, step by step; all ranks call its methods at the same moments.

    Args:
        own: what this process' meter fills.
        whole: where the sums go, on rank 0; None on the others. In a run of one process it is `own`.
    """

    def __init__(self, own: Ledger, whole: Ledger | None) -> None:
        self.own = own
        self.whole = whole
        self._known: dict[tuple[int, ...], int] = {}  # the programs of all ranks in a step, and their sum

    def step(self) -> None:
        """Add the step that the meters have just ended."""
        if self.whole is self.own:
            return
        step = self.own.steps[-1]
        numbers = torch.tensor([step.program, step.samples], dtype=torch.int64, device="cpu")
        every = ranks.gathered(numbers)
        key = tuple(every[:, 0].tolist())
        if key not in self._known:
            told = exchanged(self._tell(step.program, step.samples))
            self._known[key] = -1 if self.whole is None else self.whole.intern_program(_sum(self.whole, told))
        if self.whole is not None:
            self.whole.add_step(self._known[key], samples=int(every[:, 1].sum()))

    def evaluated(self) -> None:
        """Add the evaluation that the meters have just ended, whose score is the same on all ranks."""
        if self.whole is self.own:
            return
        found = self.own.evaluations[-1]
        told = exchanged(None if found.program is None else self._tell(found.program, found.samples))
        ran = [each for each in told if each is not None]
        if self.whole is not None:
            self.whole.add_evaluation(
                _sum(self.whole, ran) if ran else None,
                samples=sum(each.samples for each in ran),
                name=found.name,
                score=found.score,
                higher_is_better=found.higher_is_better,
            )

    def _tell(self, number: int, samples: int) -> _Told:
        program = self.own.programs[number]
        calls = tuple((place, n) for place, (_, n) in enumerate(program.calls))
        products = [self.own.products[product] for product, _ in program.calls]
        return _Told(dataclasses.replace(program, calls=calls), products, samples)


def _sum(whole: Ledger, told: list[_Told]) -> Program:
    """One program that runs what all ranks ran, in terms of `whole`."""
    programs: list[tuple[History, Program]] = []
    for each in told:
        ledger = Ledger()
        places = [ledger.intern(product) for product in each.products]
        calls = tuple((places[place], n) for place, n in each.program.calls)
        programs.append((ledger, dataclasses.replace(each.program, calls=calls)))
    return whole.sum_of(programs)
