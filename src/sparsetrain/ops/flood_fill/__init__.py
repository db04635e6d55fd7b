"""From an attention map to block marks: sums along diagonals, means over blocks, and walks that follow what is large.

Legend: t tokens, n = t / block blocks a side; leading axes (`...`) are independent maps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def diagonal_convolution(map_tt: Tensor, edge: int) -> Tensor:
    """Sum of each cell's `edge` neighbours along its diagonal, outside counted as zero (SPION, arXiv 2309.12578).

    out[i, j] = sum over |u| <= (edge - 1) / 2 of map[i + u, j + u]

    Equals: F.conv2d(map[None, None], torch.eye(edge)[None, None], padding="same")[0, 0]

    Args:
        map_tt: [..., t, t].
        edge: odd; 1 changes nothing.

    Raises:
        ValueError: an even edge, or one below 1.
    """
    check_edge(edge)
    reach = edge // 2
    return diagonal_sums(F.pad(map_tt, (reach, reach, reach, reach)), edge)


def diagonal_sums(x: Tensor, length: int) -> Tensor:
    """out[a, b] = sum over u < length of x[..., a + u, b + u]; each axis loses length - 1 cells.

    Sums of 2, 4, 8, … cells are formed by doubling: 8 additions a cell where 31 shifted copies would take 30.
    """
    rows, columns = x.shape[-2] - length + 1, x.shape[-1] - length + 1
    total, done, power, width = None, 0, x, 1
    while True:
        if length & width:
            part = power[..., done : done + rows, done : done + columns]
            total = part if total is None else total + part
            done += width
        if done == length:
            assert total is not None
            return total
        power = power[..., :-width, :-width] + power[..., width:, width:]
        width *= 2


def pool_blocks(map_tt: Tensor, block: int) -> Tensor:
    """Mean over blocks of `block` x `block` cells: [..., t, t] -> [..., t / block, t / block].

    Raises:
        ValueError: t is not a multiple of the block.
    """
    rows, columns = map_tt.shape[-2:]
    if block < 1 or rows % block or columns % block:
        raise ValueError(
            f"a map of {rows} x {columns} tokens cannot be cut into blocks of {block}. Pad the tokens to a multiple of "
            "the block, or choose a block that divides them."
        )
    return map_tt.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).mean((-3, -1))


def flood_fill(grid_nn: Tensor, threshold: float | Tensor, *, causal: bool = False) -> Tensor:
    """Cells that a walk reaches and that lie above the threshold (SPION, arXiv 2309.12578, algorithm 4).

    One walk starts at every cell of the top row and of the left column (causal: of the left column). From (r, c) it
    moves to the largest of (r+1, c), (r, c+1) and (r+1, c+1), zero outside the grid: down if that is the largest of
    all, right if it is at least down and above the diagonal, else diagonally. It ends outside the grid. A walk marks
    the cells it enters, not the one it starts from, and goes on through cells below the threshold.

    Equals, for one grid: `reference.flood_fill`, a loop over the seeds.

    Args:
        grid_nn: [..., n, n], at least 0.
        threshold: a number, or [...] one a grid.
        causal: the grid is lower triangular.

    Returns:
        bool [..., n, n], without the diagonal added.

    Cost: at most 2 n moves of 2 n walkers at once; they do not depend on the threshold.
    """
    limit = torch.as_tensor(threshold, dtype=grid_nn.dtype, device=grid_nn.device)
    return walked_cells(grid_nn, causal=causal) & (grid_nn > limit[..., None, None])


def walked_cells(grid_nn: Tensor, *, causal: bool = False) -> Tensor:
    """The cells that any walk of `flood_fill` enters, whatever the threshold: bool [..., n, n]."""
    n = grid_nn.shape[-1]
    grids = grid_nn.reshape(-1, n, n)
    zero = torch.zeros(1, dtype=torch.int64, device=grids.device)
    down = torch.arange(n, device=grids.device)
    row, column = (
        (down, zero.expand(n)) if causal else (torch.cat((zero.expand(n), down)), torch.cat((down, zero.expand(n))))
    )
    # a border of zeros below and to the right: what lies outside is 0, and a walk that has left stays on it
    side = n + 2
    padded = F.pad(grids, (0, 2, 0, 2)).flatten(1)
    place = (row * side + column).expand(len(grids), -1)
    entered = torch.zeros(len(grids), side * side, dtype=torch.bool, device=grids.device)
    for _ in range(2 * n):
        below, right, diagonal = (padded.gather(1, place + step) for step in (side, 1, side + 1))
        goes_down = (below > right) & (below > diagonal)
        goes_right = ~goes_down & (right >= below) & (right > diagonal)
        step = torch.where(goes_down, side, torch.where(goes_right, 1, side + 1))
        moved = place + step
        inside = (place // side < n) & (place % side < n)
        place = torch.where(inside, moved, place)
        entered.scatter_(1, place, True)
        if not inside.any():
            break
    return entered.view(-1, side, side)[:, :n, :n].reshape(grid_nn.shape)


def check_edge(edge: int) -> None:
    """Raise ValueError unless a filter of this edge has a middle."""
    if edge < 1 or edge % 2 == 0:
        raise ValueError(f"filter_edge={edge}: the filter needs a middle cell. Give an odd number, such as 31.")
