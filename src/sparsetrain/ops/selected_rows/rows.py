"""Rows: which tokens of each sample are selected, and the ways between all rows and the selected ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsetrain.core.autograd import as_output
from sparsetrain.ops.selected_rows.runs import LEAST, Run, run_of


@dataclass(frozen=True, eq=False)
class Rows:
    """Selected positions of every sample, ascending.

    Samples may have different counts: the unused slots at the end repeat a position and never carry gradient.

    Attributes:
        index_bk: int64 positions [b, k].
        counts: used slots of each sample; plain numbers, so that no device has to be asked.
        num_tokens: t, tokens of a sample, padding included.
        weight_bk: fp32 importance weight of each slot, or None for 1 everywhere.
        masks: what attention has made of the selection, by who sees whom.
    """

    index_bk: Tensor
    counts: tuple[int, ...]
    num_tokens: int
    weight_bk: Tensor | None = None
    masks: dict[Any, Any] = field(default_factory=dict, repr=False)
    _gathered: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _keys: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, positions: Sequence[Sequence[int] | Tensor], num_tokens: int, device: Any = "cpu") -> Rows:
        """Rows from each sample's positions, in any order.

        Raises:
            ValueError: a position outside 0..t-1 or given twice.
        """
        lists = [torch.as_tensor(p, dtype=torch.int64).cpu().sort().values for p in positions]
        width = max([1, *(len(p) for p in lists)])
        index = torch.zeros(len(lists), width, dtype=torch.int64)
        for row, found in zip(index, lists, strict=True):
            if len(found) and (found[0] < 0 or found[-1] >= num_tokens or (found[1:] == found[:-1]).any()):
                raise ValueError(
                    f"selected positions {found.tolist()} must be distinct and lie in 0..{num_tokens - 1}, "
                    "the tokens of the sample."
                )
            row[: len(found)] = found
            row[len(found) :] = found[-1] if len(found) else 0
        return cls(index.to(device), tuple(len(p) for p in lists), num_tokens)

    @property
    def everything(self) -> bool:
        """Is every token of every sample selected?"""
        return all(count == self.num_tokens for count in self.counts)

    @property
    def shape(self) -> tuple[int, int]:
        return self.index_bk.shape[0], self.index_bk.shape[1]

    @cached_property
    def positions(self) -> list[list[int]]:
        """Used positions of each sample as plain numbers; a device is asked once a step, not once a block."""
        return [found[:count] for found, count in zip(self.index_bk.tolist(), self.counts, strict=True)]

    @cached_property
    def run(self) -> Run | None:
        """The stretches of tokens that hold the rows of all samples, or None. The host knows."""
        return run_of(self.positions)

    @cached_property
    def loose_run(self) -> Run | None:
        """As `run`, with more tokens between the selected ones: for who times it."""
        return self.run or run_of(self.positions, LEAST)

    @cached_property
    def counts_b(self) -> Tensor:
        """`counts` as int32 [b], where the positions are."""
        return torch.tensor(self.counts, dtype=torch.int32).to(self.index_bk.device, non_blocking=True)

    def on_device(self, offset: int) -> tuple[Tensor, Tensor]:
        """(int32 [b, k] the keys at which the rows stand, `offset` of which come before the tokens; `counts_b`)."""
        found = self._keys.get(offset)
        if found is None:
            found = self._keys[offset] = (self.index_bk + offset).to(torch.int32)
        return found, self.counts_b

    @cached_property
    def flat_n(self) -> Tensor:
        """Positions [b·k] in the flattened [b·t]."""
        b = self.index_bk.shape[0]
        first = torch.arange(b, device=self.index_bk.device)[:, None] * self.num_tokens
        return (self.index_bk + first).flatten()

    @cached_property
    def used_bk(self) -> Tensor | None:
        """bool [b, k]: slots that are used; None when all are."""
        k = self.shape[1]
        if all(count == k for count in self.counts):
            return None
        return torch.arange(k, device=self.index_bk.device) < self.counts_b[:, None]

    @cached_property
    def selected_bt(self) -> Tensor:
        """bool [b, t]: is the token selected?"""
        mask = torch.zeros(self.shape[0], self.num_tokens, dtype=torch.bool, device=self.index_bk.device)
        mask.scatter_(1, self.index_bk, True)  # an unused slot repeats a position that is used, or there is none
        return mask if all(self.counts) else mask & (self.counts_b > 0)[:, None]

    def to(self, device: torch.device) -> Rows:
        if self.index_bk.device == device:
            return self
        weight = None if self.weight_bk is None else self.weight_bk.to(device)
        moved = Rows(self.index_bk.to(device), self.counts, self.num_tokens, weight)
        vars(moved)["positions"] = self.positions  # which the device need not be asked for
        return moved

    def gather(self, x: Tensor) -> Tensor:
        """[b, t, ...] or [1, t, ...] -> [b, k, ...]; [b·t, ...] -> [b·k, ...]. No gradient of its own."""
        b, k = self.shape
        if x.ndim >= 2 and x.shape[0] in (1, b) and x.shape[1] == self.num_tokens:
            if x.shape[0] == 1:
                return x[0].index_select(0, self.index_bk.flatten()).view(b, k, *x.shape[2:])
            return x.flatten(0, 1).index_select(0, self.flat_n).view(b, k, *x.shape[2:])
        return x.index_select(0, self.flat_n)

    def gather_constant(self, x: Tensor) -> Tensor:
        """`gather`, done once a forward for a tensor that all blocks are given (rotary angles, positions)."""
        found = self._gathered.get(id(x))
        if found is None or found[0] is not x:
            found = self._gathered[id(x)] = (x, self.gather(x))
        return found[1]


def take_rows(x: Tensor, rows: Rows) -> Tensor:
    """The selected rows [b, k, ...] of x [b, t, ...]; the other rows get gradient zero."""
    return _TakeRows.apply(x, rows)  # type: ignore[return-value]


def replace_rows(x: Tensor, selected: Tensor, rows: Rows) -> Tensor:
    """x [b, t, ...], whose selected rows are `selected` [b, k, ...] already; gradient reaches `selected` alone.

    The values of x are returned as they are. Unused slots get gradient zero.
    """
    return _ReplaceRows.apply(selected, x, rows)  # type: ignore[return-value]


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows, ctx.shape = rows, x.shape
        return rows.gather(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dy,) = grads
        rows, shape = ctx.rows, ctx.shape
        dx = dy.new_zeros(shape)
        flat = dx.view(shape[0] * shape[1], *shape[2:])
        if rows.used_bk is None:
            flat.index_copy_(0, rows.flat_n, dy.flatten(0, 1))
        else:  # an unused slot repeats a position
            flat.index_add_(0, rows.flat_n, _used_only(dy, rows).flatten(0, 1))
        return dx, None


class _ReplaceRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, selected: Tensor, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return as_output(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (dy,) = grads
        return _used_only(ctx.rows.gather(dy), ctx.rows), None, None


def _used_only(x_bk: Tensor, rows: Rows) -> Tensor:
    used = rows.used_bk
    if used is None:
        return x_bk
    return torch.where(used.view(*used.shape, *(1,) * (x_bk.ndim - 2)), x_bk, 0)
