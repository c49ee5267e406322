"""The meter: counts every product of a model as it runs, into a ledger.

Products of converted layers report themselves, each with its bits at that moment. Those of plain layers and of
functions such as attention are counted at the width of their dtype (32 bits for float32): the first forward pass of
each distinct signature (shapes and dtypes of the input, mode, which parameters are trained, phases) is watched operator
by operator, and stands for all later ones of that signature. Only a watched pass takes notably longer; every other step
costs microseconds for each converted product.
"""

import sys
import threading
from collections import Counter
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lowbit.errors import UsageError
from lowbit.evidence.forward import Forward, ForwardWatcher, record
from lowbit.evidence.ledger import Ledger
from lowbit.evidence.memory import held_for_backward
from lowbit.evidence.names import layer_names, layers_of
from lowbit.evidence.records import Program
from lowbit.evidence.watch import watched_by
from lowbit.functional import autocast_device
from lowbit.inputs.checks import check_whole, checked
from lowbit.nn.site import Site
from lowbit.products import watch
from lowbit.products.setting import Setting
from lowbit.products.watch import ProductCall


class Meter:
    """Counts what a model runs, step by step, into a ledger.

    Use it as a context manager, or between `attach` and `close`. Call `step` after each update of the weights: what ran
    since the last call is one step, however many forwards it took. What runs in evaluation mode is counted separately,
    and `evaluated` gives it a score. Closing ends a step that is open.

    >>> with lowbit.Meter(model) as meter:
    ...     for x, y in loader:
    ...         loss_fn(model(x), y).backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    ...         meter.step()
    >>> print(lowbit.Cost(meter.ledger))

    Args:
        model: the model whose forward is called, converted or not.
        ledger: where records go; None for a new one in memory.

    Raises:
        UsageError: `model` is not a module.
    """

    @checked
    def __init__(self, model: nn.Module, ledger: Ledger | None = None) -> None:
        self.ledger = Ledger(model=type(model).__name__, layers=layer_names(model)) if ledger is None else ledger
        self._model = model
        self._modules = list(model.modules())
        self._lock = threading.Lock()
        self._local = threading.local()
        self._attached = ExitStack()
        self._is_attached = False
        self._names: dict[tuple[object, str], str] = {}
        self._known: dict[object, int | None] = {}
        self._forwards: dict[object, Forward] = {}
        self._training, self._evaluation = _Pending(), _Pending()
        self._without_grad_input: set[object] = set()
        self._functions: set[object] = set()

    def attach(self) -> Self:
        """Begin to count."""
        if self._is_attached:
            raise UsageError("this meter is attached already: close it first, or make another")
        self._is_attached = True
        self._names = layers_of(self._model)
        self._attached.enter_context(watch.counted_by(self._count))
        before = self._model.register_forward_pre_hook(self._before, with_kwargs=True)
        # Before all other hooks, so that two meters leave their modes in the opposite order of entering them.
        after = self._model.register_forward_hook(self._after, prepend=True, with_kwargs=True, always_call=True)
        self._attached.callback(before.remove)
        self._attached.callback(after.remove)
        return self

    def close(self) -> None:
        """Stop counting; an open step ends, and the ledger's file is closed."""
        self._detach()
        self._end_evaluation()
        if self._training.calls:
            self._end_step(None)
        self.ledger.close()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:  # what raised is not a step
            self._training, self._evaluation = _Pending(), _Pending()
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The same meter: its hooks in a copy of the model belong to the original, and ignore the copy."""
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a model with a meter attached cannot be pickled: save its state_dict(), or close the meter first"
        )

    @checked
    def step(self, *, samples: int | None = None) -> None:
        """End a step: call it after each update of the weights.

        Args:
            samples: how many it took; None: the length of the first axis of the first tensor of each forward.

        Raises:
            UsageError: the meter is not attached, or nothing ran since the last step.
        """
        if not self._is_attached:
            raise UsageError("this meter is not attached: use `with lowbit.Meter(model) as meter`, or call attach()")
        if not self._training.calls:
            raise UsageError(
                "no product of this model ran in training mode since the last step: call step() once after each "
                "update, and give Meter the very module whose forward you call"
            )
        if samples is not None:
            check_whole("samples", samples, 0)
        self._end_step(samples)
        self._end_evaluation()

    def sent(self, sent_bytes: int) -> None:
        """Count bytes that this process sends to others in this step, for its gradients."""
        with self._lock:
            self._training.sent += sent_bytes

    @checked
    def evaluated(self, name: str, score: float, *, higher_is_better: bool = True) -> None:
        """Score what ran in evaluation mode since the last step; the best score marks the best checkpoint.

        Args:
            name: of the score, the same each time, e.g. ``"test_accuracy"``.
            score: its value.
            higher_is_better: its direction.
        """
        pending, self._evaluation = self._evaluation, _Pending()
        self.ledger.add_evaluation(
            pending.program() if pending.calls else None,
            samples=pending.samples,
            name=name,
            score=float(score),
            higher_is_better=higher_is_better,
        )

    def _end_step(self, samples: int | None) -> None:
        pending, self._training = self._training, _Pending()
        self.ledger.add_step(pending.program(), samples=pending.samples if samples is None else samples)

    def _end_evaluation(self) -> None:
        if self._evaluation.calls:
            pending, self._evaluation = self._evaluation, _Pending()
            self.ledger.add_evaluation(pending.program(), samples=pending.samples)

    def _detach(self) -> None:
        self._is_attached = False
        self._attached.close()
        watching = self._local.__dict__.pop("watching", None)
        if watching is not None:  # an interrupt ended a forward, so its hook did not run
            watching.close()

    # Products of converted layers.

    def _count(self, call: ProductCall) -> None:
        """Count one product of a converted layer. This runs for every product, so it does little but look it up."""
        source, product = call.source, call.product
        if source is None and not self._is_of_this_model(call):
            return
        place = (getattr(source, "clock", None), call.layer)
        alone = (*place, call.part)
        with self._lock:
            charged = None
            if product == "grad_input":
                self._without_grad_input.discard(alone)
            else:
                # If the gradient of the input comes, it comes before that of the weight.
                if product == "grad_weight" and alone in self._without_grad_input and isinstance(source, Site):
                    charged = _widths_of_grad_input(source)
                self._without_grad_input.add(alone)
            key = (alone, product, call.kind, call.engine, call.bits, call.input, call.weight, call.output, charged)
            index = self._known[key] if key in self._known else self._learn(key, call, place, charged)
            if index is not None:
                forward = product == "output"
                pending = self._evaluation if forward and not self._model.training else self._training
                pending.calls[index] += 1

    def _is_of_this_model(self, call: ProductCall) -> bool:
        """Whether a product of a function, which has no site, runs in a forward of this model or in its backward."""
        place = call.layer, call.part, call.kind, call.input, call.weight, call.output
        if call.product == "output" and getattr(self._local, "depth", 0) > 0:
            self._functions.add(place)
            return True
        return call.product != "output" and place in self._functions

    def _learn(
        self, key: object, call: ProductCall, place: tuple[object, str], charged: tuple[int, int] | None
    ) -> int | None:
        """The index of a product that is seen for the first time; None for one of another model."""
        name: str | None = call.layer or call.kind
        if place[0] is not None:
            if place not in self._names:
                self._names |= layers_of(self._model)  # it was converted since
            name = self._names.get(place)
        index = None
        if name is not None:
            index = self.ledger.intern(record(".".join(filter(None, (name, call.part))), call, call.bits, charged))
        self._known[key] = index
        return index

    # Products outside them.

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a forward of the model, and watch it if its signature is new."""
        local = self._local
        if module is not self._model:
            return
        local.depth = getattr(local, "depth", 0) + 1
        if local.depth > 1:
            return
        if module.training:
            self._end_evaluation()
        given = tree_leaves((args, kwargs))
        leaves = [leaf for leaf in given if isinstance(leaf, Tensor)]
        local.signature = (
            tuple(map(_signature, given)),
            module.training,
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(autocast_device(leaves[0])) if leaves else None,
            tuple(p.requires_grad for p in module.parameters()),
            tuple(map(type, self._modules)),
            tuple((site.phase, site.skips) for site in self._modules if isinstance(site, Site)),
        )
        with self._lock:
            pending = self._training if module.training else self._evaluation
            pending.samples += leaves[0].shape[0] if leaves and leaves[0].dim() else 1
        local.raised = sys.exc_info()[1]
        if local.signature not in self._forwards:
            local.watch = ForwardWatcher(module)
            local.watching = ExitStack()
            local.held = local.watching.enter_context(held_for_backward([*module.parameters(), *module.buffers()]))
            local.watching.enter_context(watched_by(local.watch, module))

    def _after(self, module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        """End a forward of the model: count it, and prepare to count its backward."""
        local = self._local
        if module is not self._model:
            return
        local.depth -= 1
        if local.depth:
            return
        watching = local.__dict__.pop("watching", None)
        if watching is not None:
            watching.close()
        if sys.exc_info()[1] is not local.raised:
            return
        ends = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        forward = self._forwards.get(local.signature)
        with self._lock:
            if watching is not None:
                forward = Forward(local.watch, local.held.bytes, self.ledger)
                # If no gradient can be seen to arrive, e.g. because the output is of a user's class, each forward is
                # watched.
                if ends or not forward.due:
                    self._forwards[local.signature] = forward
            assert forward is not None
            (self._training if module.training else self._evaluation).take(forward)
        if watching is not None:
            local.watch.see_backward(forward, self._add_gradients)
        elif forward.due:
            self._see_backward(forward, ends)

    def _see_backward(self, forward: Forward, ends: list[Tensor]) -> None:
        """Count the gradients of a forward when the first gradient reaches one of its outputs."""
        came = False

        def arrived(_: Tensor) -> None:
            nonlocal came
            if not came:
                came = True
                self._add_gradients(forward.gradients())

        for end in ends:
            end.register_hook(arrived)

    def _add_gradients(self, calls: Counter[int]) -> None:
        with self._lock:
            self._training.calls.update(calls)


class _Pending:
    """What ran and is not recorded yet."""

    def __init__(self) -> None:
        self.calls: Counter[int] = Counter()
        self.uncounted: Counter[str] = Counter()
        self.samples = 0
        self.held: int | None = None
        self.sent = 0

    def take(self, forward: Forward) -> None:
        """Add one forward of the model."""
        self.calls.update(forward.calls)
        self.uncounted.update(forward.uncounted)
        self.held = max(self.held or 0, forward.held)

    def program(self) -> Program:
        """All of it as a program."""
        return Program(
            calls=tuple(sorted(self.calls.items())),
            uncounted=tuple(sorted(self.uncounted.items())),
            held_bytes=self.held,
            sent_bytes=self.sent,
        )


def _signature(argument: Any) -> object:
    """What decides, of an argument, which operators run: shape and dtype, or a flag, a number, a name."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.dtype, argument.requires_grad
    return argument if isinstance(argument, bool | int | str | None) else type(argument)


def _widths_of_grad_input(site: Site) -> tuple[int, int]:
    """The widths that a layer's `grad_input` has now, whether it runs or not."""
    setting = Setting(recipe=site.present, bits=site.widths_now())
    return (
        setting.width("grad_input", "grad_output"),
        setting.width("grad_input", "weight"),
    )
