"""The two-layer network of the page (8 -> 12 -> 8, 16 rows) and the grids that it is cut over."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsetrain.parallel.shape import GridShape

BATCH = 16
SIZES = ((8, 12), (12, 8))
GRIDS = [
    GridShape(*sizes) for sizes in ((1, 2, 2, 2), (2, 1, 2, 2), (2, 2, 2, 1), (2, 2, 1, 2), (1, 1, 1, 4), (1, 8, 1, 1))
]


def serial() -> tuple[nn.Sequential, Tensor, Tensor]:
    """(model in fp64, input that takes a gradient, gradient of the output)."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)).double()
    x = torch.randn(BATCH, 8, dtype=torch.float64, requires_grad=True)
    return model, x, torch.randn(BATCH, 8, dtype=torch.float64)
