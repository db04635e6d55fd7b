"""What is timed for block-sparse attention, and what is made of it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import sparsetrain.ops.block_sparse_attention as op
from sparsetrain.core import fastest
from sparsetrain.core.fastest import Timings
from sparsetrain.ops.block_sparse_attention import block_sparse_attention, dense_is_faster, gain
from sparsetrain.ops.block_sparse_attention.cases import Case


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(fastest, "_known", {})


def qkv(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return Case(name="x", heads=4, kv_heads=2, queries=tokens, block_q=16, block_k=16, kept_keys=16).tensors(
        torch.float32
    )


def test_lengths_and_lists_share_the_next_power_of_two() -> None:
    q, k, _ = qkv(600)
    shapes = [gain.shape_of(q[:, :, :t], k[:, :, :t], 16, 16, slots, True) for t, slots in ((600, 5), (513, 8))]
    assert shapes[0] == shapes[1] and (shapes[0].queries, shapes[0].kept_keys) == (1024, 128)
    assert gain.shape_of(q[:, :, :20], k[:, :, :20], 16, 16, 500, True).kept_keys == 32  # no list names more than all


def test_forward_and_backward_of_a_backend_and_of_dense_attention_are_timed() -> None:
    case = gain.shape_of(*qkv(256)[:2], 16, 16, 2, True)
    found = gain.timings(case, torch.float32, torch.device("cpu"), {"torch": op._timed_by("torch")})
    assert set(found.ms) == {"dense", "torch"} and all(ms > 0 for ms in found.ms.values())
    assert found.key.startswith(
        "1 x 256 tokens, 4 heads (2 of keys) of 8, 32 keys in blocks of 16 x 16, causal, float32"
    )


def test_nothing_is_timed_on_a_cpu() -> None:
    q, k, _ = qkv(64)
    assert dense_is_faster(q, k, block_q=16, block_k=16, num_slots=2, causal=True) is None
    assert not (fastest.cache_folder() / "machine").exists()


def test_auto_takes_the_fastest_and_never_what_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with two backends that a CPU has in place of its own."""
    (q, k, v), ran = qkv(64), []
    case = Case(name="x", heads=4, kv_heads=2, queries=64, block_q=16, block_k=16, kept_keys=32)
    for name in ("flex", "triton"):
        run = lambda *x, name=name: ran.append(name) or op._RUN["reference"](*x)  # noqa: E731
        monkeypatch.setitem(op._RUN, name, run)
    monkeypatch.setattr(op, "_available", lambda *x: {"flex": None, "triton": None, "reference": None})
    known = {"ms": {"dense": 1.0, "triton": 2.0, "flex": 3.0}}
    monkeypatch.setattr(op, "_timings", lambda *x: Timings(op="op", key="a shape", **known))

    def call() -> None:
        block_sparse_attention(q, k, v, case.lists(), block_q=16, block_k=16, causal=True)

    call()
    assert ran == ["triton"]
    assert dense_is_faster(q, k, block_q=16, block_k=16, num_slots=2, causal=True) == (
        "a shape: dense 1 ms, triton 2 ms, flex 3 ms"
    )
    known |= {"ms": {"flex": 1.0, "dense": 3.0}, "failed": {"triton": "out of shared memory"}}
    call()
    assert ran == ["triton", "flex"]
    assert dense_is_faster(q, k, block_q=16, block_k=16, num_slots=2, causal=True) is None
