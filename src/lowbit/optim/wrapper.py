"""An optimiser of torch whose states are 8-bit codes between steps, and whose weights are rounded when written."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import RunError, UsageError, shown
from lowbit.inputs.checks import check_keys, check_type, check_whole, checked
from lowbit.methods.update import Update
from lowbit.numerics.codebooks import BLOCK
from lowbit.numerics.formats import FP32, Format
from lowbit.optim.rounded import RoundedSGD
from lowbit.optim.stored import (
    Coding,
    Draws,
    Rounding,
    StateFormat,
    WeightFormat,
    check_state_format,
    on_grid,
    rounds,
    weight_format,
)

_MOST_SEED, _MOST_STEPS = 2**64 - 1, 2**63 - 1
_KEY = "lowbit"
# A parameter with its number and its group.
_Member = tuple[int, dict[str, Any], Tensor]


class LowBitOptimizer(torch.optim.Optimizer):
    """Any optimiser of torch with states of 8 bits and rounded weights.

    It is an optimiser itself, for schedulers, `GradScaler` and Lightning. Between steps `state` holds codes; in a step
    one parameter after the other has its states decoded, steps alone in the wrapped optimiser, and is encoded again.
    Parameters whose states stay as they are step together, as ever.

    Rounding is to nearest or by counter-based noise, a function of (seed, step, parameter, state): a run that loads
    `state_dict` goes on bit for bit.

    Args:
        optimizer: the optimiser to wrap; use it no more by itself.
        states: the code book of its states, ``"int8"`` (even steps) or ``"dynamic8"`` (Dettmers' dynamic map), a format
            whose grid they lie on in their own dtype, or ``"fp32"``; or a dict of these by the states' names, in which
            those left out stay as they are.
        weights: what a parameter is rounded to after each step: ``"bf16"``; ``"int8"``: matrices and kernels, with a
            scale for each index of the first dim, made anew at each write; a format; or ``"fp32"``. The two names
            round stochastically. A bfloat16 parameter steps as a float32 copy then. With ``"fp32"`` parameters are
            the wrapped optimiser's own affair.
        update: formats of gradient, learning rate, weights and states as a recipe has them, in place of `weights`;
            where it names a state, that goes before `states`.
        leave: parameters whose gradients, learning rate and weights are not rounded.
        rounding: of states to codes.
        block: values of a state that share a scale.
        smallest: states of fewer values stay as they are.
        seed: of the noise.
        at_once: decode the states of all parameters, and step once, as optimisers need that look at all parameters
            or change their own settings. It needs the memory of all states for a moment.

    Raises:
        UsageError: a setting is not what it says above, or the optimiser cannot be wrapped.

    Source: Dettmers et al. 2022, arXiv:2110.02861; stochastic weights: Gupta et al. 2015, arXiv:1502.02551.
    """

    @checked
    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        states: StateFormat | Mapping[str, StateFormat] = "int8",
        weights: WeightFormat | None = None,
        update: Update | None = None,
        leave: Iterable[Tensor] = (),
        rounding: Rounding = "nearest",
        block: int = BLOCK,
        smallest: int = 4096,
        seed: int = 0,
        at_once: bool = False,
    ) -> None:
        _check_wrapped(optimizer)
        if weights is not None and update is not None:
            raise UsageError("weights and update: the update has the format of weights, so give one of them")
        check_whole("block", block, 2, 2**20)
        check_whole("smallest", smallest, 1)
        for each in states.values() if isinstance(states, Mapping) else (states,):
            check_state_format(each)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups = optimizer.param_groups  # one list, seen by both
        self.inner = optimizer
        self.formats = update or Update(weight=weight_format(weights or "fp32"))
        self.states: Mapping[str, StateFormat] | StateFormat = states
        self.coding = Coding(block=block, smallest=smallest, rounding=rounding)
        self.at_once = at_once
        self.draws = Draws(seed=check_whole("seed", seed, 0, _MOST_SEED), step=0)
        self._left = {id(p) for p in leave}
        for p in _parameters(optimizer.param_groups):
            _check_parameter(p, self.formats.weight)
        begun, optimizer.state = optimizer.state, defaultdict(dict)
        for number, p in enumerate(_parameters(self.param_groups)):
            if begun.get(p):
                self._keep(p, number, begun[p])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer`."""
        if not hasattr(self, "inner"):  # the groups that the wrapped optimiser has already
            super().add_param_group(param_group)
            return
        self.inner.add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            _check_parameter(p, self.formats.weight)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the wrapped optimiser, and the loss of the closure, which is called once.

        Raises:
            RunError: a gradient is sparse, the wrapped optimiser changes its own settings in a step, or a name in
                `states` is none of its states.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.draws = Draws(seed=self.draws.seed, step=self.draws.step + 1)
        together: list[_Member] = []
        alone: list[_Member] = []
        for number, (group, p) in enumerate(_members(self.param_groups)):
            if p.grad is None:
                continue
            if p.grad.layout is not torch.strided:
                raise RunError("LowBitOptimizer: a gradient is sparse; make it dense, e.g. nn.Embedding(sparse=False)")
            (alone if self._takes_memory(p) else together).append((number, group, p))
        batches = [together + alone] if self.at_once else [together, *([each] for each in alone)]
        batches = [batch for batch in batches if batch]
        for batch in batches:
            self._step(batch, only=len(batches) == 1)
        self._check_names()
        return loss

    def _takes_memory(self, p: Tensor) -> bool:
        """Whether a parameter has states to decode or is copied for its step, so that it steps alone."""
        named = self.states.values() if isinstance(self.states, Mapping) else (self.states,)
        coded = p.numel() >= self.coding.smallest and any(isinstance(how, str) and how != "fp32" for how in named)
        return coded or self._is_copied(p)

    def _is_copied(self, p: Tensor) -> bool:
        """Whether the wrapped optimiser cannot step the parameter itself: with its own type, or its own gradient."""
        return self._is_widened(p) or self._update_of(p).gradient_of(p.dim()) != FP32

    def _is_widened(self, p: Tensor) -> bool:
        """Whether a parameter steps as a float32 copy, since what it becomes is rounded to its own type."""
        return p.dtype is torch.bfloat16 and rounds(self._update_of(p).weight, p)

    def _update_of(self, p: Tensor) -> Update:
        return Update(states=self.formats.states) if id(p) in self._left else self.formats

    def _format_of(self, p: Tensor, name: str) -> StateFormat:
        """How a state of a parameter is kept."""
        own = dict(self.formats.states).get(name)
        if own is not None:
            return "fp32" if id(p) in self._left else own
        return self.states.get(name, "fp32") if isinstance(self.states, Mapping) else self.states

    def _step(self, batch: list[_Member], *, only: bool) -> None:
        """Let the wrapped optimiser step some parameters."""
        inner, groups = self.inner, self.inner.param_groups
        views: dict[tuple[int, Format], dict[str, Any]] = {}
        used: dict[int, Tensor] = {}
        inner.state = defaultdict(dict)
        for number, group, p in batch:
            q = used[number] = self._copy_for_step(p, number)
            # Parameters of one group that round the learning rate differently are in groups of their own.
            lr = self._update_of(p).lr if "lr" in group else FP32
            view = views.setdefault((id(group), lr), {**group, "params": []})
            view["params"].append(q)
            if lr != FP32 and len(view["params"]) == 1:
                rate = torch.tensor(float(group["lr"]), dtype=torch.float64, device="cpu")
                rounded = on_grid(rate, lr, self.draws, number, "lr")
                view["lr"] = rounded.to(group["lr"]) if isinstance(group["lr"], Tensor) else rounded.item()
            if kept := self.state.pop(p, None):
                inner.state[q] = {name: self._open(p, name, value) for name, value in kept.items()}
        for view in views.values():
            view.pop("param_names", None)
        before = {key: dict(view) for key, view in views.items()}
        inner.param_groups = list(views.values())
        try:
            inner.step()
        finally:
            inner.param_groups = groups
            for number, _, p in batch:
                q = used[number]
                if inner.state.get(q):
                    self._keep(p, number, inner.state[q])
                self._write(p, q, number)
            inner.state = defaultdict(dict)
        for key, view in views.items():
            changed = {name for name in view if view[name] is not before[key][name] and name != "params"}
            if changed and not only:
                raise RunError(
                    f"LowBitOptimizer: {type(inner).__name__} changes its own {', '.join(sorted(changed))} in a step, "
                    "so its parameters cannot step one by one: give at_once=True"
                )
            group = next(group for _, group, _ in batch if id(group) == key[0])
            group.update({name: view[name] for name in changed})

    def _copy_for_step(self, p: Tensor, number: int) -> Tensor:
        """The parameter itself where the wrapped optimiser may read it and its gradient as they are; else a copy."""
        assert p.grad is not None
        if not self._is_copied(p):
            return p
        q = nn.Parameter(p.detach().float() if self._is_widened(p) else p.detach())
        q.__dict__.update(p.__dict__)
        gradient = self._update_of(p).gradient_of(p.dim())
        q.grad = on_grid(p.grad.to(q.dtype), gradient, self.draws, number, "gradient")
        return q

    def _write(self, p: Tensor, q: Tensor, number: int) -> None:
        """Put what a parameter became where it is kept, in the format of weights."""
        values = on_grid(q.detach(), self._update_of(p).weight, self.draws, number, "weight")
        if values.data_ptr() != p.data_ptr():
            p.copy_(values)

    def _open(self, p: Tensor, name: str, value: Any) -> Any:
        """A state as the wrapped optimiser knows it."""
        if not _is_packed(value):
            return value
        book = self._format_of(p, name)
        assert isinstance(book, str)
        return self.coding.unpack(value, book, p)

    def _keep(self, p: Tensor, number: int, values: Mapping[str, Any]) -> None:
        """Keep the states of a parameter until its next step."""
        self.state[p] = {}
        for name, value in values.items():
            how = self._format_of(p, name)
            if how != "fp32" and isinstance(how, str) and self.coding.takes(value):
                self.state[p][name] = self.coding.pack(value, how, self.draws, number, name)
            elif isinstance(how, Format) and isinstance(value, Tensor) and value.shape == p.shape:
                self.state[p][name] = on_grid(value, how, self.draws, number, name)
            else:
                self.state[p][name] = value

    def _check_names(self) -> None:
        """Raise where a state is named that no parameter has after a step."""
        named = {name for name, _ in self.formats.states}
        named |= set(self.states) if isinstance(self.states, Mapping) else set()
        there = {name for kept in self.state.values() for name in kept}
        if there and (wrong := named - there):
            raise RunError(
                f"LowBitOptimizer: {type(self.inner).__name__} has no state {shown(sorted(wrong)[0])}: its states are "
                f"{', '.join(sorted(there))}"
            )

    def state_dict(self) -> dict[str, Any]:
        """As of any optimiser: codes and scales are plain tensors, and ``torch.load(weights_only=True)`` reads it."""
        return {
            **super().state_dict(),
            _KEY: {"version": 1, "seed": self.draws.seed, "step": self.draws.step, "formats": self._in_words()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state that `state_dict` gave, with its seed; codes, scales and states keep their exact values.

        Raises:
            UsageError: it is the state of another optimiser, or of other formats.
        """
        if not isinstance(state_dict, dict) or _KEY not in state_dict:
            raise UsageError(
                "LowBitOptimizer.load_state_dict: this is not the state of a LowBitOptimizer. Load the state of a "
                "plain optimizer into the plain optimizer, then wrap it"
            )
        own = state_dict[_KEY]
        check_keys("LowBitOptimizer.load_state_dict: lowbit", own, ("version", "seed", "step", "formats"))
        if own["version"] != 1 or own["formats"] != self._in_words():
            raise UsageError(
                f"LowBitOptimizer.load_state_dict: saved with {shown(own['formats'])}, here {self._in_words()}: "
                "wrap the optimizer with the same settings"
            )
        seed = check_whole("LowBitOptimizer.load_state_dict: seed", own["seed"], 0, _MOST_SEED)
        step = check_whole("LowBitOptimizer.load_state_dict: step", own["step"], 0, _MOST_STEPS)
        saved = state_dict["state"]
        check_type("LowBitOptimizer.load_state_dict: state", saved, dict)
        for number, kept in saved.items():
            for name, value in kept.items():
                if isinstance(value, dict):
                    self.coding.check(f"LowBitOptimizer.load_state_dict: {name} of parameter {number}", value)
        # torch would cast states to the parameter's dtype, codes too: it gets the groups, and what hooks have added.
        rest = {name: value for name, value in state_dict.items() if name != _KEY}
        super().load_state_dict({**rest, "state": {}})
        self.inner.param_groups = self.param_groups
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, p in zip(numbers, _parameters(self.param_groups), strict=True):
            if number in saved:
                self.state[p] = {name: _copied(value, p) for name, value in saved[number].items()}
        self.draws = Draws(seed=seed, step=step)

    def _in_words(self) -> str:
        """The settings that a saved state belongs to."""
        states = dict(self.states) if isinstance(self.states, Mapping) else self.states
        c = self.coding
        return f"states={states!r}, {self.formats!r}, {c.rounding}, block={c.block}, smallest={c.smallest}"

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __repr__(self) -> str:
        return f"LowBitOptimizer({self.inner!r})"


def _is_packed(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {"codes", "scales", "dtype"}


def _copied(value: Any, p: Tensor) -> Any:
    """A saved state as a copy, its tensors on the parameter's device; a step counter stays where it was saved."""
    if isinstance(value, dict):
        return {name: _copied(each, p) for name, each in value.items()}
    if isinstance(value, Tensor):
        return value.detach().clone() if value.dim() == 0 else value.detach().to(p.device, copy=True)
    return value


def _members(groups: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Tensor]]:
    return ((group, p) for group in groups for p in group["params"])


def _parameters(groups: list[dict[str, Any]]) -> Iterator[Tensor]:
    return (p for group in groups for p in group["params"])


def _check_wrapped(optimizer: torch.optim.Optimizer) -> None:
    """Raise a UsageError for an optimiser that cannot step parameter by parameter from outside."""
    kind = type(optimizer).__name__
    if isinstance(optimizer, LowBitOptimizer | RoundedSGD):
        raise UsageError(f"LowBitOptimizer: {kind} rounds its states and weights already")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UsageError("LowBitOptimizer: LBFGS keeps one state for all parameters and calls its closure many times")
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise UsageError("LowBitOptimizer: SparseAdam takes sparse gradients: give an optimizer of dense ones")
    for group in optimizer.param_groups:
        for flag in ("capturable", "differentiable"):
            if group.get(flag):
                raise UsageError(
                    f"LowBitOptimizer: {kind} has {flag}=True, and rounding outside its step is neither captured nor "
                    f"differentiated: give {flag}=False"
                )


def _check_parameter(p: Tensor, weight: Format) -> None:
    """Raise a UsageError for a parameter that cannot have such weights."""
    if not p.is_floating_point() or type(p.data) is not Tensor:
        raise UsageError(
            f"LowBitOptimizer: a parameter is {p.dtype} in a {type(p.data).__name__}: give plain floating-point tensors"
        )
    if not rounds(weight, p) or p.dtype in (torch.float32, torch.float64):
        return
    if p.dtype is not torch.bfloat16 or str(weight.element) != "bf16":
        raise UsageError(f"LowBitOptimizer: weights in {weight} of a {p.dtype} parameter: give float32 parameters")
