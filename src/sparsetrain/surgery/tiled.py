"""FFNs in pieces of tokens: exact, and the widest activations of a block are then those of one piece.

FFN(x)_t depends on x_t alone, so FFN(x) = [FFN(x_1); …; FFN(x_p)] for pieces of tokens, forward and in every gradient
(up to the order in which a weight's gradient is summed). Each piece is computed again in the backward, so of an FFN
only its input is kept. The idea is that of ALST's tiled MLP (arXiv 2506.13996, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsetrain.core.anatomy import Block, known_parts, submodule
from sparsetrain.surgery.method import Edit
from sparsetrain.surgery.reclass import dense_forward, reclass


class Tiled:
    """Mixed into an FFN's module."""

    pieces: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., t, d] -> [..., t, d], a piece of t after another while training."""
        run = partial(dense_forward, Tiled, self)
        if not self.training or x.ndim < 2:  # type: ignore[attr-defined]
            return run(x, *args, **kwargs)
        if torch.is_grad_enabled():
            run = partial(checkpoint, run, use_reentrant=False)
        pieces = x.chunk(self.pieces, dim=-2)
        # contiguous, as the whole is: GPT-2's linears take views of it
        return torch.cat([run(piece.contiguous(), *args, **kwargs) for piece in pieces], dim=-2)


def refused(block: Block, edits: Iterable[Edit]) -> str | None:
    """Why the FFN of a block cannot run in pieces; None if it can."""
    site = block.ffn
    if site is None:
        return f"{block.name} has no FFN that is known"
    if site.refused is not None:
        return site.refused
    if site.name == block.name:  # BERT's and OPT's linears stand in the block, beside what treats tokens together
        return f"{block.name} runs its FFN itself, among other things"
    for edit in edits:
        for name in {edit.site, *edit.claims}:
            inner, outer = f"{site.name}.", f"{name}." if name else ""
            if inner.startswith(outer) or outer.startswith(inner):
                return f"{edit.method} edits {name or 'the model'}, and may treat tokens together there"
    return None


def check_tiled(model: nn.Module, pieces: int, edits: Iterable[Edit] = ()) -> None:
    """Raise ValueError if an FFN of a model cannot run in pieces."""
    edits = tuple(edits)
    for block in known_parts(model).blocks if pieces > 1 else ():
        if reason := refused(block, edits):
            raise ValueError(f"tiled_mlp={pieces} cannot be: {reason}. Give tiled_mlp=1.")


def use_tiled_mlp(model: nn.Module, pieces: int, edits: Iterable[Edit] = ()) -> None:
    """Let every FFN of a model train in `pieces` pieces of tokens; nothing for one piece.

    Args:
        model: not yet inside an adapter.
        edits: what was changed in it.

    Raises:
        ValueError: an FFN cannot run in pieces: a mixture of experts, one without a module of its own, or one that a
            method edits.
    """
    check_tiled(model, pieces, edits)
    for block in known_parts(model).blocks if pieces > 1 else ():
        assert block.ffn is not None
        module: Any = submodule(model, block.ffn.name)
        reclass(module, Tiled)
        module.pieces = pieces
