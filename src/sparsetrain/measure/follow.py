"""Which component is at work at any moment of whole training steps, and the time each takes: forward and backward.

In the forward, hooks on modules say it (`components.running`). In the backward, every node of autograd's graph says it
when its turn comes: a node carries the number at which it was made, and the numbers that passed while a module ran are
that module's. So no module is wrapped, and the loop that trains may be anyone's: what calls the model begins a forward,
the first node that runs begins the backward, and torch's own hooks tell where an optimizer steps. What gradient
checkpointing computes again is told by the modules' hooks, as in the forward, and counts to the backward. A loss
computed outside the model counts to the forward, its backward too.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sparsetrain.measure.components import Place, Running, running

PHASES = ("forward", "backward", "optimizer")
_HEAD, _OPTIMIZER = Place("head_and_loss"), Place("optimizer")


@dataclass
class Following:
    """`phase` and `place` of what runs now; `spent` holds seconds by (phase, place) when a clock was given.

    on_backward: called once a forward, before the first node of its backward runs.
    on_optimizer: called with each optimizer before it steps; all gradients are there then.
    """

    clock: Callable[[], float] | None = None
    phase: str = "forward"
    spent: dict[tuple[str, Place], float] = field(default_factory=dict)
    on_backward: Callable[[], None] | None = None
    on_optimizer: Callable[[torch.optim.Optimizer], None] | None = None
    _running: Running = field(default_factory=Running)
    _node: Place = _HEAD
    _since: float = 0.0
    # by thread, since each counts its own nodes: where an interval of numbers ends, and whose it is
    _ends: dict[int, list[int]] = field(default_factory=dict)
    _places: dict[int, list[Place]] = field(default_factory=dict)
    _visited: set[tuple[int, int]] = field(default_factory=set)

    @property
    def place(self) -> Place:
        if self.phase == "optimizer":
            return _OPTIMIZER
        if self.phase == "backward" and not self._running._stack:
            return self._node
        return self._running.place

    def settle(self) -> None:
        """Book the time since the last call on the place that is still at work."""
        if self.clock is None:
            return
        now = self.clock()
        key = (self.phase, self.place)
        self.spent[key] = self.spent.get(key, 0.0) + now - self._since
        self._since = now

    def start(self) -> None:
        """Forget the time before now: a step begins."""
        self.phase, self._node = "forward", _HEAD
        if self.clock is not None:
            self._since = self.clock()

    def _model_begins(self, *_: Any) -> None:
        self.settle()
        self.phase, self._node = "forward", _HEAD
        for found in (self._ends, self._places, self._visited):
            found.clear()

    def _changes(self) -> None:
        self.settle()
        thread = threading.get_ident()
        self._ends.setdefault(thread, []).append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
        self._places.setdefault(thread, []).append(self._running.place)

    def _left(self, output: Any) -> None:
        """Hook the nodes that were made since the last module was left; ours is no time of the step's."""
        thread = threading.get_ident()
        ends, places = self._ends[thread], self._places[thread]
        nodes = list(_nodes(output))
        while nodes:
            node = nodes.pop()
            number = node._sequence_nr()
            if (thread, number) in self._visited or number >= ends[-1]:  # a leaf's node carries the largest number
                continue
            self._visited.add((thread, number))
            place = places[bisect_right(ends, number)]
            node.register_prehook(lambda _, place=place: self._turn(place))
            nodes += [following for following, _ in node.next_functions if following is not None]
        if self.clock is not None:
            self._since = self.clock()

    def _turn(self, place: Place) -> None:
        if self.phase == "backward" and place == self._node:
            return
        self.settle()
        self.backward_begins()
        self._node = place

    def backward_begins(self) -> None:
        """A backward runs; told by the first node, or by whoever sees it earlier."""
        if self.phase == "backward":
            return
        if self.on_backward is not None:
            self.on_backward()
        if self.clock is not None:
            self._since = self.clock()
        self.phase, self._node = "backward", _HEAD

    def _optimizer_begins(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.settle()
        self.phase = "optimizer"
        if self.on_optimizer is not None:
            self.on_optimizer(optimizer)
        if self.clock is not None:
            self._since = self.clock()

    def _optimizer_ends(self, *_: Any) -> None:
        self.settle()


def _nodes(value: Any) -> Iterator[Any]:
    """The graph's nodes behind the tensors of nested lists, tuples and mappings."""
    if isinstance(value, torch.Tensor):
        if value.grad_fn is not None:
            yield value.grad_fn
    elif isinstance(value, dict):
        yield from _nodes(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _nodes(item)


@contextmanager
def following(
    model: nn.Module, clock: Callable[[], float] | None = None, at: dict[str, Place] | None = None
) -> Iterator[Following]:
    """Follow the training steps that run inside the `with` block; every hook is removed at its end.

    Args:
        model: converted, PEFT-wrapped or neither.
        clock: seconds; without it no time is booked.
        at: module name -> place, instead of the model's own.

    Raises:
        UnknownFamily: no anatomy adapter knows the model.
    """
    with running(model, at) as now:
        found = Following(clock=clock, _running=now)
        now.on_change, now.on_leave = found._changes, found._left
        hooks: list[Any] = [model.register_forward_pre_hook(found._model_begins, prepend=True)]
        try:
            hooks.append(register_optimizer_step_pre_hook(found._optimizer_begins))
            hooks.append(register_optimizer_step_post_hook(found._optimizer_ends))
            found.start()
            yield found
            found.settle()
        finally:
            for hook in hooks:
                hook.remove()
