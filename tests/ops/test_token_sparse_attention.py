"""Token-sparse attention: the reference against plain softmax and SDPA, the `torch` backend against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sparsetrain.ops.token_sparse_attention.torch as torch_backend
from sparsetrain.core.errors import Unsupported
from sparsetrain.ops.token_sparse_attention import token_sparse_attention
from sparsetrain.ops.token_sparse_attention.cases import TINY, TOLERANCE, Case

CASES = pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, lists: Tensor) -> Tensor:
    """Dense scores with -inf outside the lists, one list at a time; rows without a key give 0."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                for j in lists[b, h, i].tolist():
                    if j >= 0:
                        kept[b, h, i, j] = True
    weights = scores.masked_fill(~kept, -torch.inf).softmax(-1)
    return torch.where(kept, weights, 0) @ v


def with_gradients(run: Callable[..., Tensor], tensors: tuple[Tensor, ...], seed: int = 1) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = run(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def assert_near(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        assert (x.double() - y.double()).abs().max() <= tolerance * y.abs().max().clamp(min=1)


@CASES
@BACKENDS
def test_equals_dense_softmax_over_the_lists(case: Case, backend: str) -> None:
    tensors, lists = case.tensors(torch.float64), case.lists()
    found = with_gradients(lambda *x: token_sparse_attention(*x, lists, backend=backend), tensors)
    assert_near(found, with_gradients(lambda *x: softmax_attention(*x, lists), tensors), 1e-12)


@BACKENDS
@pytest.mark.parametrize("name", ["causal", "gqa", "bidirectional", "cross"])
def test_full_lists_equal_sdpa(name: str, backend: str) -> None:
    case = next(case for case in TINY if case.name == name)
    tensors = case.tensors(torch.float64)
    positions = torch.arange(case.num_keys).expand(case.batch, case.heads, case.queries, -1)
    lists = torch.where(positions <= torch.arange(case.queries)[:, None], positions, -1) if case.causal else positions
    found = with_gradients(lambda *x: token_sparse_attention(*x, lists, backend=backend), tensors)
    wanted = with_gradients(
        lambda *x: F.scaled_dot_product_attention(*x, is_causal=case.causal, enable_gqa=True), tensors
    )
    assert_near(found, wanted, 1e-12)


@CASES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cpu_equals_reference(case: Case, dtype: torch.dtype) -> None:
    tensors, lists = case.tensors(dtype), case.lists()
    exact = tuple(x.double() for x in tensors)
    wanted = with_gradients(lambda *x: token_sparse_attention(*x, lists, scale=0.3, backend="reference"), exact)
    found = with_gradients(lambda *x: token_sparse_attention(*x, lists, scale=0.3, backend="torch"), tensors)
    assert all(x.dtype == dtype for x in found)
    assert_near(found, wanted, TOLERANCE[dtype])


@BACKENDS
def test_gradcheck(backend: str) -> None:
    case = Case(name="small", heads=4, queries=7, head_dim=2, kept_keys=3)
    tensors = [x.requires_grad_() for x in case.tensors(torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: token_sparse_attention(*x, case.lists(), backend=backend), tensors)


@BACKENDS
def test_rows_without_a_key_are_exactly_zero(backend: str) -> None:
    case = TINY[0]
    lists = case.lists()
    lists[:, :, 4:9] = -1
    lists[:, 1, 20] = -1
    found = with_gradients(lambda *x: token_sparse_attention(*x, lists, backend=backend), case.tensors(torch.float32))
    out, dq, dk, dv = found
    for x in (out, dq):
        assert (x[:, :, 4:9] == 0).all() and (x[:, 1, 20] == 0).all() and (x[:, 0, 20] != 0).any()
    assert dk.isfinite().all() and dv.isfinite().all()
    for nothing in (torch.full_like(lists, -1), lists[..., :0]):
        tensors = case.tensors(torch.float32)
        found = with_gradients(lambda *x: token_sparse_attention(*x, nothing, backend=backend), tensors)  # noqa: B023
        assert all((x == 0).all() for x in found)


@BACKENDS
def test_an_unlisted_key_gets_and_gives_nothing(backend: str) -> None:
    case = TINY[0]
    (q, k, v), lists = case.tensors(torch.float32), case.lists()
    lists[lists == 0] = -1
    before = with_gradients(lambda *x: token_sparse_attention(*x, lists, backend=backend), (q, k, v))
    k[:, :, 0], v[:, :, 0] = 50.0, -50.0
    after = with_gradients(lambda *x: token_sparse_attention(*x, lists, backend=backend), (q, k, v))
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert (after[2][:, :, 0] == 0).all() and (after[3][:, :, 0] == 0).all()


def test_order_repeats_and_empty_slots_do_not_matter() -> None:
    case = TINY[0]
    tensors, lists = case.tensors(torch.float32), case.lists()
    other = torch.cat((lists.flip(-1), torch.full_like(lists[..., :2], -1), lists[..., :1]), dim=-1)
    wanted = with_gradients(lambda *x: token_sparse_attention(*x, lists, backend="torch"), tensors)
    for dtype in (torch.int16, torch.int32, torch.int64):
        found = with_gradients(lambda *x: token_sparse_attention(*x, other.to(dtype), backend="torch"), tensors)  # noqa: B023
        assert all(torch.equal(x, y) for x, y in zip(found, wanted))


@CASES
def test_tiles_of_few_rows(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, lists = case.tensors(torch.float64), case.lists()
    wanted = with_gradients(lambda *x: token_sparse_attention(*x, lists, backend="reference"), tensors)
    for rows in (1, 4):
        monkeypatch.setattr(torch_backend, "TILE_ROWS", rows)
        found = with_gradients(lambda *x: token_sparse_attention(*x, lists, backend="torch"), tensors)
        assert_near(found, wanted, 1e-12)
    monkeypatch.setattr(torch_backend, "TILE_ELEMENTS", 1)
    assert_near(with_gradients(lambda *x: token_sparse_attention(*x, lists, backend="torch"), tensors), wanted, 1e-12)


@pytest.mark.parametrize("num_keys", [65_534, 65_535, 65_537])
def test_positions_at_the_limit_of_uint16(num_keys: int) -> None:
    case = Case(name="long", heads=1, kv_heads=1, queries=2, keys=num_keys, head_dim=2, kept_keys=3)
    lists = torch.tensor([[num_keys - 1, 0, -1], [-1, -1, -1]])[None, None]
    tensors = case.tensors(torch.float64)
    wanted = with_gradients(lambda *x: token_sparse_attention(*x, lists, backend="reference"), tensors)
    assert_near(with_gradients(lambda *x: token_sparse_attention(*x, lists, backend="torch"), tensors), wanted, 1e-12)


@CASES
def test_no_uninitialised_memory_is_read(case: Case) -> None:
    """With fresh memory full of NaN the result is the same."""
    tensors, lists = case.tensors(torch.float32), case.lists()
    wanted = with_gradients(lambda *x: token_sparse_attention(*x, lists, backend="torch"), tensors)
    torch.use_deterministic_algorithms(True)  # fills every empty() with NaN
    try:
        assert torch.empty(3).isnan().all()
        found = with_gradients(lambda *x: token_sparse_attention(*x, lists, backend="torch"), tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted))


def test_strides_do_not_matter() -> None:
    case = next(case for case in TINY if case.name == "gqa")
    tensors, lists = case.tensors(torch.float64), case.lists()
    strided = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors)
    turned = lists.mT.contiguous().mT
    assert not strided[0].is_contiguous() and not turned.is_contiguous()
    wanted = with_gradients(lambda *x: token_sparse_attention(*x, lists, backend="reference"), tensors)
    assert_near(with_gradients(lambda *x: token_sparse_attention(*x, turned, backend="torch"), strided), wanted, 1e-12)


def test_saves_two_bytes_a_slot() -> None:
    case = Case(name="saved", heads=6, kv_heads=2, queries=100, kept_keys=12, head_dim=16)
    tensors, lists = [x.requires_grad_() for x in case.tensors(torch.float32)], case.lists()
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = token_sparse_attention(*tensors, lists, backend="torch")
    assert (
        sum(storages.values()) == sum(x.nbytes for x in (*tensors, out)) + 4 * out[..., 0].numel() + 2 * lists.numel()
    )


def test_scratch_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the forward or the backward comes near t * s = 262,144 numbers."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple) else (result,):
                if isinstance(x, Tensor):
                    self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
            return result

    case = Case(name="long", heads=1, kv_heads=1, queries=512, kept_keys=16)
    tensors, lists = case.tensors(torch.float32), case.lists()
    monkeypatch.setattr(torch_backend, "TILE_ELEMENTS", 2**13)
    with Largest() as largest:
        with_gradients(lambda *x: token_sparse_attention(*x, lists, backend="torch"), tensors)
    assert 4096 <= largest.numel <= 2 * 2**13


def test_no_second_derivative() -> None:
    case = TINY[0]
    q, k, v = (x.requires_grad_() for x in case.tensors(torch.float64))
    out = token_sparse_attention(q, k, v, case.lists(), backend="torch")
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys_bhtl": torch.full((1, 2, 33, 1), 33)}, "span 33 .. 33; 33 keys allow -1 .. 32"),
        ({"keys_bhtl": torch.full((1, 2, 33, 1), -2)}, "span -2"),
        ({"keys_bhtl": torch.zeros(1, 2, 32, 1, dtype=torch.int64)}, r"need integers \[1, 2, 33, l\]"),
        ({"keys_bhtl": torch.zeros(1, 2, 33, 1)}, "need integers"),
        ({"k_bgsd": torch.zeros(1, 2, 33, 4)}, "twice"),
        ({"q_bhtd": torch.zeros(1, 3, 33, 8)}, "g must divide h"),
        ({"q_bhtd": torch.zeros(1, 2, 33, 8).double()}, "cast them to one floating dtype"),
        ({"q_bhtd": torch.zeros(1, 2, 0, 8)}, "nothing to attend"),
        ({"backend": "fastest"}, "unknown"),
    ],
)
def test_errors(change: dict[str, object], message: str) -> None:
    q, k, v = TINY[0].tensors(torch.float32)
    arguments = {"q_bhtd": q, "k_bgsd": k, "v_bgsd": v, "keys_bhtl": TINY[0].lists()} | change
    with pytest.raises(ValueError, match=message):
        token_sparse_attention(**arguments)  # type: ignore[arg-type]


def test_a_named_backend_never_falls_back() -> None:
    case = TINY[0]
    with pytest.raises(Unsupported, match="triton"):
        token_sparse_attention(*case.tensors(torch.float32), case.lists(), backend="triton")
    with pytest.raises(Unsupported, match="on meta"):
        on_meta = [x.to("meta") for x in (*case.tensors(torch.float32), case.lists())]
        token_sparse_attention(*on_meta, backend="torch")


def test_a_clamp_beyond_every_score_changes_nothing_and_a_small_one_does() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 140, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    keys = torch.randint(-1, 140, (1, 4, 140, 9), generator=generator)
    keys[:, :, 3] = -1
    q.requires_grad_()
    wide = token_sparse_attention(q, k, v, keys, logit_clamp=100.0)
    plain = token_sparse_attention(q, k, v, keys)
    torch.testing.assert_close(wide, plain, rtol=1e-12, atol=1e-12)  # in the dtype of the model
    (found,) = torch.autograd.grad(wide.sum(), q)
    assert found.isfinite().all() and (found[:, :, 3] == 0).all()
    assert (token_sparse_attention(q, k, v, keys, logit_clamp=0.5) - plain).abs().max() > 1e-2
