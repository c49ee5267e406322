"""Thousands of calls of the library in random order, good and bad, on models that are converted, trained and restored.

Each call works, or raises one of this library's errors and leaves every parameter bit for bit. After it the model still
trains to finite values, and `restore_` gives plain modules with the very parameters. Everything follows from the seed.

Example:
    python benchmarks/fuzz_api.py --calls 2000 --seed 0
"""

import argparse
import copy
import math
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from lowbit import PrecisionController, RunError, UsageError
from lowbit.methods.recipe import Gating
from lowbit.nn.layers import QuantLayer
from lowbit.schedules import Constant, Cyclic, Piecewise, Progressive, RangeTest, RangeTested

BAD: list[Any] = [
    *(None, True, -5, 0, 1000, 1.5, math.nan, math.inf, 2**70, 10**5000, "x", "", b"x", [], {}, [None], (1, 2)),
    *(object(), int, abs, torch.zeros(2), torch.full((), math.nan), nn.ReLU(), re.compile("x")),
]
RECIPES = [*(name for name in lowbit.recipes() if name != "wXaYgZ"), "w4a4g6", "w2a8g8"]


def _image() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5),
    )  # fmt: skip
    return model, torch.randn(6, 3, 8, 8)


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.lstm(self.embed(x))[0])
        return y


class _Odd(nn.Module):
    """A layer that cannot be converted beside one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(2, 2, 2)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.pair(x, x))
        return y


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 4)), torch.randn(8, 7)),
    "image": _image,
    "recurrent": lambda: (_Recurrent(), torch.randn(4, 5, 4)),
    "encoder": lambda: (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(3, 4, 8)),
    "layer": lambda: (nn.Linear(6, 3), torch.randn(5, 6)),
    "odd": lambda: (_Odd(), torch.randn(3, 2)),
}


class Session:
    """One model, and all that was made for it."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.kind = rng.choice(list(MODELS))
        torch.manual_seed(rng.randrange(2**32))
        self.model, self.x = MODELS[self.kind]()
        self.parameters = list(self.model.parameters())
        self.refused = 0
        self.states: list[dict[str, Any]] = []
        self.controllers: list[PrecisionController] = []
        self.saved: list[dict[str, Any]] = []

    # What is given.

    def some(self, *good: Any) -> Any:
        """A good value in four of five cases."""
        return self.rng.choice(good) if self.rng.random() < 0.8 else self.rng.choice(BAD)

    def spoiled(self, state: Any) -> Any:
        """A copy of a state, often with a value replaced."""
        state = copy.deepcopy(state)
        while self.rng.random() < 0.7 and isinstance(state, dict) and state:
            place = state
            while True:
                key = self.rng.choice(list(place))
                inner = place[key]
                if isinstance(inner, list) and inner and isinstance(inner[0], dict):
                    inner = inner[0]
                if not isinstance(inner, dict) or not inner or self.rng.random() < 0.2:
                    place[key] = self.rng.choice(BAD)
                    break
                place = inner
        return state

    def schedule(self) -> Any:
        """Something with bits."""
        return self.rng.choice(
            [
                lambda: self.some(4, 8, None),
                lambda: Constant(bits=self.some(3, 8)),
                lambda: Cyclic(low=self.some(3), high=8, cycles=self.some(1, 2), total_steps=500),
                lambda: Piecewise(pieces=[(0, self.some(4)), (3, 8)], total_steps=500),
                lambda: Progressive(bits=[3, self.some(4)], grad_bits=[6, 8], threshold=0.1, decay=self.some(0.5)),
                lambda: RangeTest(low=2, high=self.some(4), steps_per_bit=self.some(4)),
                lambda: RangeTested(schedule=Cyclic(low=2, high=self.some(4, 8), cycles=2, total_steps=500)),
            ]
        )()

    # What is called.

    def _convert(self) -> None:
        rules = [(self.some("0", re.compile(r".*\d"), nn.Linear, "head"), self.some("sbm8", None, "w4a4g6"))]
        lowbit.convert_(
            self.some(self.model),
            self.some(*RECIPES),
            rules=self.some((), rules),
            strict=self.some(True, False),
            engine=self.some("auto", "int8", "reference"),
            seed=self.some(0, 7, 2**63),
        )

    def _restore(self) -> None:
        lowbit.restore_(self.some(self.model))

    def _save(self) -> None:
        self.states.append(lowbit.state_dict(self.some(self.model)))

    def _load(self) -> None:
        lowbit.load_state_dict(self.some(self.model), self.spoiled(self.rng.choice(self.states or BAD)))

    def _control(self) -> None:
        extra: dict[str, Any] = {}
        if self.rng.random() < 0.4:
            extra["steps_per_epoch"] = self.some(1, 3)
        if self.rng.random() < 0.2:
            extra["rules"] = self.some([("0", (4, 8))])
        if self.rng.random() < 0.2:
            extra |= {"gates": self.some(Gating(choices=((3, 6), (8, 8)), targets=(3.0,))), "blocks": self.some(["0"])}
        if self.rng.random() < 0.3:
            extra["eval_bits"] = self.some("highest", "current", 6)
        forward, backward = self.schedule(), self.rng.choice([None, None, self.some(8)])
        controller = PrecisionController(self.some(self.model), forward=forward, backward=backward, **extra)
        self.controllers.append(controller)

    def _follow(self) -> None:
        controller = PrecisionController.from_recipe(
            self.some(self.model),
            total_steps=self.some(500),
            steps_per_epoch=self.some(3, None),
            blocks=self.some((), ["0"]),
        )
        self.controllers.append(controller)

    def _step(self) -> None:
        if self.controllers:
            self.controllers[-1].step(self.some(0.5, None, torch.tensor(0.5)))

    def _save_controller(self) -> None:
        if self.controllers:
            self.saved.append(self.controllers[-1].state_dict())

    def _load_controller(self) -> None:
        if self.controllers and self.saved:
            self.controllers[-1].load_state_dict(self.spoiled(self.rng.choice(self.saved)))

    def _remove(self) -> None:
        if self.controllers:
            self.controllers.pop().remove()

    def _prove(self) -> None:
        with lowbit.verify(self.some(self.model)):
            self.forward().backward()

    def _meter(self) -> None:
        with lowbit.Meter(self.some(self.model)) as meter:
            self.forward().backward()
            meter.step(samples=self.some(None, 3))
            meter.evaluated(self.some("score"), self.some(0.5))
        str(lowbit.Cost(meter.ledger, hardware=self.some(None, lowbit.hardware.BitFusion())))

    def _plan(self) -> None:
        lowbit.plan(
            self.some(self.model),
            self.x,
            steps=self.some(1, 3),
            forward=self.schedule(),
            backward=self.some(8),
        )

    def _evaluate(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.model(self.x)

    def _mode(self) -> None:
        self.model.train(self.rng.random() < 0.8)

    def forward(self) -> Tensor:
        """A loss."""
        loss: Tensor = self.model(self.x).square().mean()
        return loss

    CALLS = (
        *("convert", "restore", "save", "load", "control", "follow", "step", "save_controller", "load_controller"),
        *("remove", "prove", "meter", "plan", "evaluate", "mode"),
    )

    # What must hold.

    def call(self, name: str) -> str:
        """Make one call; what is wrong with how it ended, or an empty text."""
        before = [p.detach().clone() for p in self.parameters]
        try:
            getattr(self, f"_{name}")()
        except (UsageError, RunError) as error:
            self.refused += 1
            said = str(error)
            if not said or len(said) > 3000:
                return f"a message of {len(said)} characters"
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, OverflowError) as error:
            return f"{type(error).__name__}: {str(error)[:200]}"
        now = list(self.model.parameters())
        if len(now) != len(self.parameters) or any(a is not b for a, b in zip(now, self.parameters, strict=True)):
            return "the parameters are other objects"
        if not all(map(torch.equal, before, now)):
            return "a parameter changed"
        return ""

    def train(self) -> str:
        """Three steps of the model as it is; what is wrong with them."""
        self.model.train()
        try:
            for _ in range(3):
                loss = self.forward()
                loss.backward()
                with torch.no_grad():
                    for p in self.parameters:
                        if p.grad is not None:
                            p.sub_(1e-3 * p.grad)
                            p.grad = None
        except UsageError as error:
            if "no controller is attached" in str(error) or "total_steps" in str(error):
                return ""  # bits that should change over the run, as the message says
            return f"training: {error}"
        finite = bool(loss.isfinite()) and all(bool(p.isfinite().all()) for p in self.parameters)
        return "" if finite else f"training ends at a loss of {float(loss)}"

    def end(self) -> str:
        """Restore and compare; what is wrong."""
        kept = [p.detach().clone() for p in self.parameters]
        for controller in self.controllers:
            controller.remove()
        if any(isinstance(m, QuantLayer) for m in self.model.modules()):
            lowbit.restore_(self.model)
        if any(isinstance(m, QuantLayer) for m in self.model.modules()):
            return "a layer is still converted"
        now = list(self.model.parameters())
        same = all(a is b for a, b in zip(now, self.parameters, strict=True)) and all(map(torch.equal, kept, now))
        return "" if same else "restored parameters differ"


def fuzz(calls: int, seed: int, *, say: Callable[[str], None] = print) -> tuple[Counter[str], list[str]]:
    """Make so many calls in sessions of 25; how often each was made, and what was wrong."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    wrong: list[str] = []

    def note(fault: str, session: Session, done: list[str]) -> None:
        if fault:
            wrong.append(f"{session.kind}, {' '.join(done[-8:])}: {fault}")
            say(wrong[-1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a range test in a short run, layers left out
        while sum(counts[name] for name in Session.CALLS) < calls:
            session, done = Session(rng), []
            for _ in range(25):
                name = rng.choice(Session.CALLS) if done else "convert"
                done.append(name)
                counts[name] += 1
                note(session.call(name), session, done)
            note(session.train(), session, done)
            note(session.end(), session, done)
            counts["(refused)"] += session.refused
    return counts, wrong


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="calls (2000)")
    parser.add_argument("--seed", type=int, default=0, help="what all of it follows from (0)")
    args = parser.parse_args()
    counts, wrong = fuzz(args.calls, args.seed, say=lambda text: print(text, flush=True))
    for name, number in sorted(counts.items()):
        print(f"{number:6,}  {name}")
    print(f"{len(wrong):6,}  wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
