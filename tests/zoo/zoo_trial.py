"""One trial of the zoo: a model is converted, trained, verified and restored, which makes a row of a table."""

import ast
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from zoo_models import Entry, loss_of, tensors_of

import lowbit

STEPS = 3
LEARNING_RATE = 1e-3
HAS_NO_PRODUCT = "has no product"


@dataclass(kw_only=True)
class Outcome:
    """What came of one trial.

    Attributes:
        parameters: how many the model has.
        converted: number of converted layers.
        left: number of layers that could have products and stay as they are.
        strict: whether `convert_` took the model without ``strict=False`` and without rules.
        rules: the rules that `verify` asked for.
        fp32: losses of the steps of the plain model.
        losses: those of the converted model.
        share: of all MACs of a step, the share that ran in the recipe's formats.
        verified: whether `verify` passed in the end.
        restored: whether the restored model is the plain model of the same weights, bit for bit.
        remarks: what was left and why, what verify said first.
        failure: the stage that failed and its error; empty where none did.
        seconds: of everything but the plain model's steps.
    """

    entry: Entry
    recipe: str
    channels_last: bool = False
    parameters: int = 0
    converted: int = 0
    left: int = 0
    strict: bool = True
    rules: list[tuple[str, None]] = field(default_factory=list)
    fp32: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    share: float | None = None
    verified: bool = False
    restored: bool = False
    remarks: list[str] = field(default_factory=list)
    failure: str = ""
    seconds: float = 0.0


def trial(entry: Entry, recipe: str, *, channels_last: bool = False) -> Outcome:
    """Convert, train, verify and restore one model; an error ends the trial and is in the outcome."""
    outcome = Outcome(entry=entry, recipe=recipe, channels_last=channels_last)
    plain = _built(entry, channels_last)
    outcome.parameters = sum(p.numel() for p in plain.parameters())
    keys = list(plain.state_dict())
    kinds = _kinds(plain)
    outcome.fp32 = _train(plain, entry, STEPS)
    del plain

    begin = time.perf_counter()
    try:
        _run(outcome, keys, kinds)
    except _StageError as error:
        outcome.failure = str(error)
    outcome.seconds = time.perf_counter() - begin
    return outcome


def _kinds(model: nn.Module) -> dict[str, str]:
    """The name of each module's class; parametrised modules have a class of their own each."""
    return {name: f"{type(module).__module__}.{type(module).__qualname__}" for name, module in model.named_modules()}


class _StageError(Exception):
    """A stage of a trial failed."""


@contextmanager
def _stage(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _StageError(f"{name}: {type(error).__name__}: {error}") from error


def _run(outcome: Outcome, keys: list[str], kinds: dict[str, str]) -> None:
    entry = outcome.entry
    with _stage("convert_"):
        model = _built(entry, outcome.channels_last)
        _convert(model, outcome)
    with _stage("training"):
        outcome.losses = _train(model, entry, STEPS)
        _check_losses(outcome)
    with _stage("verify"):
        model = _verify(model, outcome)
    with _stage("evaluation"):
        _evaluate(model, entry)
    with _stage("restore_"):
        _restore(model, outcome, keys, kinds)


def _built(entry: Entry, channels_last: bool) -> nn.Module:
    torch.manual_seed(0)
    model = entry.build().train()
    return model.to(memory_format=torch.channels_last) if channels_last else model


def _convert(model: nn.Module, outcome: Outcome) -> None:
    """Strictly; where a layer is refused by name, without it."""
    try:
        report = lowbit.convert_(model, outcome.recipe, rules=outcome.rules)
    except lowbit.UsageError as error:
        outcome.strict = False
        if str(error) not in outcome.remarks:
            outcome.remarks.append(str(error))
        report = lowbit.convert_(model, outcome.recipe, rules=outcome.rules, strict=False)
    outcome.converted = sum(row.converted for row in report.rows)
    outcome.left = sum(not row.converted and row.reason != HAS_NO_PRODUCT for row in report.rows)


def _train(model: nn.Module, entry: Entry, steps: int) -> list[float]:
    """The losses of some steps of SGD on one batch."""
    args, options = entry.inputs(torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    torch.manual_seed(0)
    losses = []
    for _ in range(steps):
        loss = loss_of(model(*args, **options))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _check_losses(outcome: Outcome) -> None:
    losses = torch.tensor(outcome.losses)
    if not bool(losses.isfinite().all()):
        raise ValueError(f"losses {outcome.losses} where fp32 has {outcome.fp32}")
    if len(set(outcome.losses)) < STEPS:
        raise ValueError(f"losses {outcome.losses} do not change")
    if outcome.losses == outcome.fp32:
        raise ValueError(f"losses {outcome.losses} equal those of full precision")


def _verify(model: nn.Module, outcome: Outcome) -> nn.Module:
    """Verify one more step; where `verify` offers rules as the remedy, begin anew with them, until it has no more."""
    while True:
        try:
            outcome.share = _proven(model, outcome.entry)
        except lowbit.VerificationError as error:
            outcome.remarks.append(str(error))
            offered = [rule for rule in _offered_rules(str(error)) if rule not in outcome.rules]
            if not offered:
                raise
            outcome.rules += offered
            model = _built(outcome.entry, outcome.channels_last)
            _convert(model, outcome)
            outcome.losses = _train(model, outcome.entry, STEPS)
        else:
            outcome.verified = True
            return model


def _proven(model: nn.Module, entry: Entry) -> float:
    """The share of MACs that ran in the recipe's formats in one training step."""
    with lowbit.verify(model) as proof:
        _train(model, entry, 1)
    inside = sum(row.macs for row in proof.rows)
    return inside / max(inside + sum(row.macs or 0 for row in proof.outside), 1)


def _offered_rules(message: str) -> list[tuple[str, None]]:
    """The rules that a message writes out as ``rules=[('name', None), ...]``, each once."""
    found = [rule for text in re.findall(r"rules=(\[\(.*?\)\])", message) for rule in ast.literal_eval(text)]
    return list(dict.fromkeys(found))


def _evaluate(model: nn.Module, entry: Entry) -> list[torch.Tensor]:
    args, options = entry.evaluate(torch.Generator().manual_seed(0))
    training = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(0)
    with torch.no_grad():
        found = tensors_of(model.eval()(*args, **options))
    for name, module in model.named_modules():
        module.training = training.get(name, module.training)
    return found


def _restore(model: nn.Module, outcome: Outcome, keys: list[str], kinds: dict[str, str]) -> None:
    """Compare the restored model with a plain one that has its weights: keys, types and outputs."""
    if list(model.state_dict()) != keys:
        raise ValueError("the keys of the converted model's state_dict are not those of the plain one")
    lowbit.restore_(model)
    after = _kinds(model)
    if list(model.state_dict()) != keys or after != kinds:
        changed = [name for name in after.keys() | kinds.keys() if after.get(name) != kinds.get(name)]
        raise ValueError(f"the restored model differs from the plain one in {changed[:5]}")
    twin = _built(outcome.entry, outcome.channels_last)
    twin.load_state_dict(model.state_dict())
    mine, wanted = _evaluate(model, outcome.entry), _evaluate(twin, outcome.entry)
    if len(mine) != len(wanted) or not all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True)):
        raise ValueError("the restored model does not give what a plain model of its weights gives")
    outcome.restored = True


def table(outcomes: list[Outcome]) -> str:
    """The outcomes in Markdown, a row each."""
    head = [
        "model",
        "library",
        "parameters",
        "recipe",
        "layers converted, left",
        "MACs in the recipe %",
        "loss fp32",
        "loss",
        "verified",
        "restored",
        "seconds",
    ]
    rows = [
        [
            o.entry.name + (", channels last" if o.channels_last else ""),
            o.entry.library,
            f"{o.parameters:,}",
            f"`{o.recipe}`",
            f"{o.converted}, {o.left}" + ("" if o.strict else " (`strict=False`)"),
            "-" if o.share is None else f"{100 * o.share:.1f}",
            _numbers(o.fp32),
            _numbers(o.losses),
            ("yes" if o.verified else "no") + (f", with {len(o.rules)} rules" if o.rules else ""),
            "yes" if o.restored else "no",
            f"{o.seconds:.1f}",
        ]
        for o in outcomes
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def _numbers(values: list[float]) -> str:
    return " ".join(f"{v:.3g}" for v in values) or "-"
