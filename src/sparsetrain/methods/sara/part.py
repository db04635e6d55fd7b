"""The trained entries of one tensor: values that an optimizer moves, and that are written into the weight after it.

Under `fully_shard` W and the values are shards between two steps, and whole in a forward. They are gathered to be read
and written, so all ranks do that together and in one order; and as a shard cannot change its size, what an adjustment
freezes stays among the values, without gradient and written back to what it was.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sparsetrain.core.shards import fill, is_shard, whole
from sparsetrain.ops.partial_weight import (
    blocks_of,
    entries_of,
    partial_weight,
    places_of_blocks,
    put_blocks,
    put_entries,
)

_FOLLOWED: weakref.WeakSet[Part] = weakref.WeakSet()
_numbers = itertools.count()


class Part(nn.Module):
    """p of one tensor W. W holds it too, rounded to its dtype, and everything else that reads weights reads W.

    values: fp32 or wider: [n] entries, or [k, high, wide] blocks. places, left: int32, sorted: what trains, and what an
    adjustment has frozen. base: SHA-256 of W before training, [32] bytes. None of them is in the state dict.

    Attributes:
        owner: (the module that holds W,): in a tuple it is no child.
        shape: of a block; None for single entries.
        held: of values that are shards: which have been frozen, bool [k]; None: none.
        number: its place among all of a process.
        written: the version of `values` that was written last.
        moments: what becomes of the optimizer's state at its next step: None, `fresh`, or which entries go on.
    """

    values: nn.Parameter
    places: Tensor
    left: Tensor
    base: Tensor

    def __init__(self, owner: nn.Module, name: str, shape: tuple[int, int] | None, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.owner, self.name, self.shape = (owner,), name, shape
        self.moments: str | Tensor | None = None
        self.held: Tensor | None = None
        self.number = next(_numbers)
        device = self.weight.device
        for key in ("places", "left", "base"):
            self.register_buffer(key, tensors[key].to("cpu" if device.type == "meta" else device), persistent=False)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        values = tensors["values"].to(device, wide, copy=True) if "values" in tensors else self.read().to(wide)
        self.values = nn.Parameter(values)
        self.written = self.values._version
        if "values" in tensors and not self.hollow:
            self.write()
            self._put(self.left, tensors["left_values"].to(device))
        _follow(self)

    @property
    def weight(self) -> Tensor:
        """W, without gradient."""
        return getattr(self.owner[0], self.name).detach()

    @property
    def count(self) -> int:
        """Entries that train, or blocks."""
        return len(self.places) if self.held is None else int((~self.held).sum())

    @property
    def size(self) -> int:
        """Entries of a block; 1 for single ones."""
        return 1 if self.shape is None else self.shape[0] * self.shape[1]

    @property
    def hollow(self) -> bool:
        """W has no values."""
        return self.weight.is_meta or isinstance(self.weight, FakeTensor)

    def used(self) -> Tensor:
        """W for a forward, with its gradient going to `values`."""
        return partial_weight(self.weight, self.trained(), self.places)

    def trained(self) -> Tensor:
        """p in a forward, with gradient where it trains."""
        if self.held is None:
            return self.values
        held = self.held if self.shape is None else self.held[:, None, None]
        return torch.where(held, self.values.detach(), self.values)

    def read(self) -> Tensor:
        """What W holds at `places`, in the shape of `values`."""
        return self._read(self.places)

    def _read(self, places: Tensor) -> Tensor:
        return read_at(whole(self.weight), places, self.shape)

    def _put(self, places: Tensor, values: Tensor) -> None:
        weight = self.weight
        full = whole(weight)
        (put_entries if self.shape is None else put_blocks)(full, places, values)
        if full is not weight:
            fill(weight, full)

    @torch.no_grad()
    def write(self) -> None:
        """p into W, after an optimizer's step."""
        if self.held is not None:  # an optimizer has moved these by their momentum
            own = whole(self.values.detach()).clone()
            own[self.held] = self._read(self.places[self.held]).to(own.dtype)
            fill(self.values, own)
        self._put(self.places, whole(self.values.detach()))
        self.written = self.values._version

    def sync(self) -> None:
        """Make p and W one: by p where an optimizer has moved it, else by W where something else has (loaded weights,
        a merged adapter)."""
        if self.hollow:
            return
        if self.values._version != self.written:
            self.write()
            return
        found, own = self.read(), whole(self.values.detach())
        other = found != own.to(found.dtype)
        if other.any():
            with torch.no_grad():
                fill(self.values, torch.where(other, found.to(own.dtype), own))
            self.written = self.values._version

    def tensors(self) -> dict[str, Tensor]:
        """What rebuilds it beside the weights of the base model."""
        self.sync()
        trains = slice(None) if self.held is None else ~self.held
        values, left = whole(self.values.detach())[trains], self._all_left()
        own = {"places": self.places[trains], "values": values, "left": left, "base": self.base}
        return own | {"left_values": self._read(left)}

    def _all_left(self) -> Tensor:
        return self.left if self.held is None else torch.cat([self.left, self.places[self.held]]).sort().values

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> None:
        """Become what `tensors` says, of whatever size."""
        for key in ("places", "left", "base"):
            setattr(self, key, tensors[key].to(self.weight.device))
        self._resize(tensors["values"].to(self.values.device, self.values.dtype, copy=True))
        self.write()
        self._put(self.left, tensors["left_values"].to(self.weight.device))

    @torch.no_grad()
    def keep_below(self, theta: float, *, keep_state: bool) -> None:
        """Freeze, as they are, the entries or blocks that are not below θ any more."""
        stays = self.below(theta)
        if is_shard(self.values):
            self.held, self.moments = ~stays, None if keep_state else "fresh"
            return
        kept = stays.nonzero().squeeze(1)
        self.moments = kept if keep_state else "fresh"
        self.left = torch.cat([self.left, self.places[~stays]]).sort().values
        self.places = self.places[kept]
        grad = self.values.grad
        self._resize(self.values.detach()[kept])
        self.values.grad = None if grad is None else grad[kept]

    def below(self, theta: float) -> Tensor:
        """Which of the entries, or blocks, are below θ; bool [k]."""
        own = whole(self.values.detach())
        if self.shape is None:
            return own.abs() < theta
        return torch.linalg.vector_norm(own.flatten(1), dim=1) / self.size**0.5 < theta

    def _resize(self, values: Tensor) -> None:
        self.values.grad = None
        # autograd remembers the size while an old graph lives; it forgets it where the dtype changes
        self.values.data = torch.empty(0, dtype=torch.uint8 if values.is_meta else torch.float16, device=values.device)
        self.values.data = values
        self.written = self.values._version

    def changed(self) -> tuple[Tensor, Tensor]:
        """(places in the flat weight, int32 and sorted, and what W holds there) of all that training may have moved."""
        self.sync()
        places = torch.cat([self.places, self.left])  # what is held is among the first
        if self.shape is not None:
            places = places_of_blocks(places, self.shape, tuple(self.weight.shape))  # type: ignore[arg-type]
        places = places.sort().values
        return places, entries_of(whole(self.weight), places)

    def as_matrix(self) -> Tensor:
        """P ⊙ M, with gradient to `values`."""
        flat = self.values.new_zeros(self.weight.numel())
        return flat.index_put((self.places.long(),), self.trained()).view(self.weight.shape)

    def renew(self, optimizer: Optimizer) -> None:
        """Before a step: the moments of what an adjustment has left."""
        moments, self.moments = self.moments, None
        state = optimizer.state.get(self.values)
        if moments is None or not state:
            return
        if isinstance(moments, str):
            del optimizer.state[self.values]
            return
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim == self.values.ndim:
                state[key] = value[moments.to(value.device)]

    # ---- nn.Module's own ----

    def _apply(self, fn: Any, recurse: bool = True) -> Part:
        kept = self.values.data
        super()._apply(fn, recurse)
        if self.values.dtype != kept.dtype and kept.device.type != "meta":  # half precision would round what trains
            self.values.data = kept.to(self.values.device)
        self.written = self.values._version
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the weight holds the values."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """The weight was loaded before, by its module."""
        self.sync()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _follow(self)


def read_at(weight: Tensor, places: Tensor, shape: tuple[int, int] | None) -> Tensor:
    """What a weight holds at these entries, [n], or blocks of a shape, [k, high, wide]."""
    if shape is None:
        return entries_of(weight, places)
    grid = blocks_of(weight, shape)
    return grid[places // grid.shape[1], places % grid.shape[1]]


def _follow(part: Part) -> None:
    _FOLLOWED.add(part)
    _begin_following()


def _moved_by(optimizer: Optimizer) -> Iterator[Part]:
    if _FOLLOWED:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        found = [part for part in list(_FOLLOWED) if id(part.values) in own]
        yield from sorted(found, key=lambda part: part.number)  # ranks gather in one order


@cache
def _begin_following() -> None:
    """Register with torch, once a process, so that any loop writes p into W: a fused step counts no version."""

    def before(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        for part in _moved_by(optimizer):
            part.renew(optimizer)

    def after(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        for part in _moved_by(optimizer):
            part.write()

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)
