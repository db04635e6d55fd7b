"""TPLinear on gloo ranks: equal to one device, moves what the formulas say, and no switch changes a gradient."""

from __future__ import annotations

import pytest
from torch import distributed

from sparsetrain.parallel.grid import ParallelGrid
from sparsetrain.parallel.shape import GridShape
from tests.parallel.mlp import GRIDS
from tests.parallel.on_mlp import dtensor_messages, every_check
from tests.parallel.ranks import assert_on_ranks

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
PAIRS = [GridShape(data=2), GridShape(z=2), GridShape(x=2), GridShape(y=2)]
FOURS = [GridShape(1, 1, 1, 4), GridShape(1, 1, 2, 2), GridShape(2, 2, 1, 1), GridShape(1, 2, 2, 1)]


def test_two_ranks() -> None:
    """Two processes: some eight seconds, most of them imports."""
    assert_on_ranks(every_check, 2, PAIRS)


@pytest.mark.slow
@pytest.mark.parametrize("shape", FOURS, ids=str)
def test_four_ranks(shape: GridShape) -> None:
    assert_on_ranks(every_check, 4, [shape])


@pytest.mark.slow
def test_dtensor_sends_two_gathers_and_two_scatters() -> None:
    assert_on_ranks(dtensor_messages, 4)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [shape for shape in GRIDS if shape.world == 8], ids=str)
def test_the_grids_of_eight_ranks_of_the_page(shape: GridShape) -> None:
    assert_on_ranks(every_check, 8, [shape])


def test_a_grid_needs_a_process_group() -> None:
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 4"):
        ParallelGrid(data=2, x=2)
