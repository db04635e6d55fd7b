"""What the forward and the backward of a routed FFN by tiles share: its matrices, gates, masks and pre-activations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsetrain.ops.routed_ffn.activations import ACTIVATIONS
from sparsetrain.ops.routed_ffn.products import Matrices, Products
from sparsetrain.ops.routed_ffn.tiles import Layout, Tile


class Form(NamedTuple):
    """What is not a tensor."""

    activation: str
    gates_base: bool
    num_shared: int
    num_blocks: int
    width: int
    num_inputs: int
    layout: Layout


class Operands:
    """The operands of every tile.

    Args:
        gate_tk: c of each token's choices; with them pair_q, which of these stands at each place.
        keep_tf: LoRA's dropout in the down-projection, by token and hidden unit.
        token_q: the token at each place.
    """

    def __init__(
        self,
        form: Form,
        matrices: Matrices,
        gate_tk: Tensor | None,
        keep_tf: Tensor | None,
        pair_q: Tensor | None,
        token_q: Any,
    ) -> None:
        apart = form.gates_base or keep_tf is not None
        self.form, self.keep_tf, self.token_q = form, keep_tf, token_q
        self.products = Products(matrices, form.num_shared, form.width, form.layout, apart)
        self.act, self.act_backward = ACTIVATIONS[form.activation]
        self.c_q = gate_tk.reshape(-1)[pair_q] if gate_tk is not None and pair_q is not None else None

    def gates(self, tile: Tile) -> Any:
        """c of the tile's rows [B, 1, m]; None for always-on units."""
        return self.c_q[tile.span].view(len(tile.blocks), 1, -1) if self.c_q is not None and tile.blocks else None

    def scales_base(self, tile: Tile) -> bool:
        """Whether c scales the base's pre-activations of the tile; else h."""
        return self.form.gates_base and self.c_q is not None and bool(tile.blocks)

    def saved(self, saved: Tensor, tile: Tile) -> Tensor:
        """The tile's pre-activations [B, u, m] in the saved buffer."""
        units = self.form.num_inputs * (self.form.width if tile.blocks else self.form.num_shared)
        b = max(1, len(tile.blocks))
        return saved[tile.saved : tile.saved + b * units * tile.rows].view(b, units, tile.rows)

    def hidden(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """(act(gate), act(gate) * up), or twice act(up) if the FFN is not gated."""
        if self.form.num_inputs == 1:
            h = self.act(pre)
            return h, h
        gate, up = pre.chunk(2, 1)
        a = self.act(gate)
        return a, a * up

    def dropped(self, h: Tensor, tile: Tile) -> Tensor:
        """h as the down-projection's LoRA sees it."""
        if self.keep_tf is None:
            return h
        if not tile.blocks:
            return h * self.keep_tf[None, tile.span, : self.form.num_shared].mT
        blocks = self.keep_tf[:, self.form.num_shared :].unflatten(1, (-1, self.form.width))
        rows = self.token_q[tile.span].view(len(tile.blocks), -1)
        return h * torch.stack([blocks[row, block] for row, block in zip(rows, tile.blocks)]).mT
