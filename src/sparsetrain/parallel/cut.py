"""Cutting a full weight into the shard of one rank, and putting shards together again.

Legend: n outputs, k inputs. A rank's block is [n / G_out, k / G_in], flattened and cut over z.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsetrain.parallel.shape import GridShape, Place, axes_of_linear


def output_order(sizes: Sequence[int], pieces: int) -> Tensor:
    """Order of the outputs of a fused projection in which each of `pieces` ranks gets its part of every projection.

    Args:
        sizes: outputs of the projections, in the order they lie (q, k, v); each divides by `pieces`.

    Returns:
        [sum(sizes)], indices of full outputs: first all of rank 0, then all of rank 1.
    """
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return torch.cat(
        [
            torch.arange(start + piece * (size // pieces), start + (piece + 1) * (size // pieces))
            for piece in range(pieces)
            for start, size in zip(starts, sizes, strict=True)
        ]
    )


def cut_weight(w_nk: Tensor, shape: GridShape, place: Place, transposed: bool = False) -> Tensor:
    """The flat shard [n * k / (x * y * z)] of the rank at a place."""
    in_axis, out_axis = axes_of_linear(transposed)
    rows = w_nk.chunk(shape.size(out_axis), 0)[getattr(place, out_axis)]
    block = rows.chunk(shape.size(in_axis), 1)[getattr(place, in_axis)]
    return block.reshape(-1).chunk(shape.z)[place.z].clone()


def cut_bias(b_n: Tensor, shape: GridShape, place: Place, transposed: bool = False) -> Tensor:
    """[n / G_out], the same on every rank of the other axes."""
    _, out_axis = axes_of_linear(transposed)
    return b_n.chunk(shape.size(out_axis))[getattr(place, out_axis)].clone()


def join_weight(shards: Sequence[Tensor], shape: GridShape, n: int, k: int, transposed: bool = False) -> Tensor:
    """The full weight [n, k] of the shards of ranks 0, 1, … (those of one copy of the data axis, or more)."""
    in_axis, out_axis = axes_of_linear(transposed)
    blocks = [[[] for _ in range(shape.size(in_axis))] for _ in range(shape.size(out_axis))]
    for rank in range(shape.x * shape.y * shape.z):  # z grows with the rank, so pieces come in order
        place = shape.place(rank)
        blocks[getattr(place, out_axis)][getattr(place, in_axis)].append(shards[rank].reshape(-1))
    local = (n // shape.size(out_axis), k // shape.size(in_axis))
    return torch.cat([torch.cat([torch.cat(pieces).view(local) for pieces in row], 1) for row in blocks], 0)


def join_bias(shards: Sequence[Tensor], shape: GridShape, transposed: bool = False) -> Tensor:
    """The full bias [n] of the shards of ranks 0, 1, …"""
    _, out_axis = axes_of_linear(transposed)
    other = Place(data=0, z=0, x=0, y=0)
    return torch.cat([shards[shape.rank(Place(**{**vars(other), out_axis: i}))] for i in range(shape.size(out_axis))])
