"""Sums over ranks: nothing without torch.distributed, the default group with it, registered groups before that."""

from pathlib import Path

import pytest
import torch
from torch import distributed

from sparsetrain.core import ranks


def test_one_process_is_one_rank_and_changes_nothing() -> None:
    x = torch.arange(3)
    assert (ranks.rank(), ranks.size(), ranks.group_of()) == (0, 1, None)
    assert ranks.all_reduce_(x) is x and ranks.broadcast_(x) is x and ranks.all_gather(x) == [x]
    assert x.tolist() == [0, 1, 2]


def test_unknown_axes_are_errors() -> None:
    with pytest.raises(ValueError, match="axis 'batch' is unknown"):
        ranks.size("batch")
    with pytest.raises(ValueError, match="axes batch are unknown"):
        ranks.register_groups({"batch": None})  # type: ignore[dict-item]


def check(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x = torch.tensor([rank + 1.0])
    assert (ranks.rank(), ranks.size(), ranks.size("x")) == (rank, 2, 1)
    assert [float(y) for y in ranks.all_gather(x)] == [1, 2]
    assert float(ranks.all_reduce_(x.clone())) == 3 and float(ranks.broadcast_(x.clone(), 1)) == 2
    assert torch.equal(ranks.all_reduce_(x.clone(), "x"), x)
    alone = [distributed.new_group([i]) for i in range(2)][rank]
    assert isinstance(alone, distributed.ProcessGroup) and distributed.group.WORLD is not None
    ranks.register_groups({"data": alone, "x": distributed.group.WORLD})
    assert (ranks.size(), ranks.rank(), ranks.size("x"), ranks.size("y")) == (1, 0, 2, 1)
    assert float(ranks.all_reduce_(x.clone(), "x")) == 3 and float(ranks.all_reduce_(x.clone())) == rank + 1
    assert float(ranks.broadcast_(x.clone())) == rank + 1, "places are counted within the group"
    ranks.register_groups({})
    del alone
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
def test_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(check, (str(tmp_path),), nprocs=2)
