"""Several gloo ranks train as one process does: every method, under DDP and with `fully_shard`, in fp64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed

from sparsetrain.surgery.support import why_not
from tests.field.ranks_matrix import HALF, METHODS, Found, by_hand, by_trainer, passes, work
from tests.parallel.ranks import start

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
SHARDED = [method for method in METHODS if why_not(method, "fsdp2") is None]
FEW = {"ddp": ["sara", "token_selection"], "fsdp2": ["routed_ffn", "token_selection"]}
"""What is hardest: parameters that change their size in mid-run; a mean over a step that crosses ranks."""
MOVES = ["monarch", "routed_ffn", "pst", "pq_attention", "token_selection"]
"""Methods that keep nothing besides weights and optimizer after they are fitted: a checkpoint of torch.distributed,
which ranks wrote in shards, is read by one process, whole, that goes on."""

SCALED_IN_FP32 = {"token_selection": 1e-7}
"""Its head computes in fp32 whatever the model, as transformers' loss does, and what scales it is the step's so far."""


def assert_same(found: Found, expected: Found, method: str) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        near = 1e-6  # of weights: Adam makes whole steps of gradients that are rounding alone
        if "loss" in name:
            near = 1e-5 if tensor.dtype == torch.float32 else SCALED_IN_FP32.get(method, 1e-10)
        torch.testing.assert_close(
            found[name], tensor, rtol=near, atol=near, msg=lambda m, n=name: f"{method} {n}: {m}"
        )


def check(methods: list[str], kind: str, ranks: int, folder: Path) -> None:
    start(work, (ranks, str(folder), methods, kind), ranks)
    micro = passes(ranks)
    for method in methods:
        alone = by_trainer(method, 1, micro, str(folder)) if kind == "ddp" else by_hand(method, 1, micro, shard=False)
        for rank in range(ranks):
            assert_same(torch.load(folder / f"{method}.{rank}"), alone, method)
        if kind == "fsdp2" and method in MOVES:
            with pytest.warns(UserWarning, match="single process"):
                rest = by_hand(method, 1, micro, False, folder / method, begin=HALF)
            assert_same(rest, alone | {"losses": alone["losses"][HALF:]}, method)


@pytest.mark.parametrize("kind", FEW)
def test_two_ranks(kind: str, tmp_path: Path) -> None:
    """Some twenty seconds: two processes import torch and transformers, and each takes twenty steps."""
    check(FEW[kind], kind, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(
    ("kind", "method"), [("ddp", method) for method in METHODS] + [("fsdp2", method) for method in SHARDED]
)
def test_every_method(kind: str, method: str, ranks: int, tmp_path: Path) -> None:
    check([method], kind, ranks, tmp_path)
