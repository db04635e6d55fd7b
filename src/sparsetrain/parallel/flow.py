"""Flow: which collectives of a model's linears are on their way, and which three overlap with the arithmetic.

One object a model, never of the module: two models in a process do not mix. arXiv 2305.13525, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn
from torch.autograd import Variable

from sparsetrain.parallel.grid import ParallelGrid, Pending


@dataclass(frozen=True)
class Overlap:
    """What runs beside the arithmetic; none changes a result.

    input_gradient: the sum of the input's gradient, beside the product for the weight's.
    weight_gradient: the reduce-scatter of weight gradients, waited for once after the backward.
    next_weight: the gather of the next linear's weight (in the backward: the one before).
    """

    input_gradient: bool = True
    weight_gradient: bool = True
    next_weight: bool = True


class Sharded(Protocol):
    """A linear whose weight is a flat shard."""

    weight: nn.Parameter
    local: tuple[int, int]


@dataclass(eq=False)
class Flow:
    """The collectives of the linears that share it, in the order of the model.

    Args:
        keep_weights: hold gathered weights from the forward to the backward: one gather less, all weights in memory.
    """

    grid: ParallelGrid
    overlap: Overlap = field(default_factory=Overlap)
    keep_weights: bool = False
    linears: list[Sharded] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._places: dict[int, int] = {}
        self._started: dict[int, tuple[Pending, int, object]] = {}
        self._gradients: list[tuple[nn.Parameter, Pending]] = []

    def enter(self, linear: Sharded) -> None:
        """Take the next linear of the model."""
        self._places[id(linear)] = len(self.linears)
        self.linears.append(linear)

    def weight(self, linear: Sharded, like: Tensor, step: int) -> Tensor:
        """The block [n / G_out, k / G_in] of a linear, in the dtype of its input.

        Args:
            step: 1 in a forward, -1 in a backward: where the next linear is.
        """
        place = self._places[id(linear)]
        begun = self._started.pop(place, None)
        if begun is None or begun[1:] != (linear.weight._version, like.dtype):  # the optimizer has been there
            begun = self._begin(linear, like)
        block = begun[0].wait().view(linear.local)
        other = place + step
        if self.overlap.next_weight and 0 <= other < len(self.linears) and other not in self._started:
            self._started[other] = self._begin(self.linears[other], like)
        return block

    def _begin(self, linear: Sharded, like: Tensor) -> tuple[Pending, int, object]:
        shard = linear.weight.detach().to(like.dtype)
        return self.grid.all_gather(shard, "z"), linear.weight._version, like.dtype

    def gradient(self, weight: nn.Parameter, dw: Tensor) -> None:
        """Scatter a block's gradient [n / G_out, k / G_in] over z; it is added when the backward ends."""
        pending = self.grid.reduce_scatter(dw.reshape(-1), "z")
        if not self.overlap.weight_gradient:
            pending.wait()
        self._gradients.append((weight, pending))
        # at the end of every backward, a checkpoint's inner one too; what finds nothing to do is free
        Variable._execution_engine.queue_callback(self.settle)  # type: ignore[attr-defined]

    def settle(self) -> None:
        """Wait for what is on its way; gradients go where the optimizer looks for them."""
        gradients, self._gradients = self._gradients, []
        for weight, pending in gradients:
            dw = pending.wait().to(weight.dtype)
            weight.grad = dw if weight.grad is None else weight.grad + dw
        self.drop()

    def drop(self) -> None:
        """Let go of weights that were gathered ahead."""
        for pending, *_ in self._started.values():
            pending.wait()
        self._started.clear()
