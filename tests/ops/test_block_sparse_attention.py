"""Block-sparse attention: the reference against plain softmax and SDPA, the `torch` backend against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sparsetrain.ops.block_sparse_attention.torch as torch_backend
from sparsetrain.core.errors import Unsupported
from sparsetrain.ops.block_sparse_attention import block_sparse_attention
from sparsetrain.ops.block_sparse_attention.cases import REAL, TINY, TOLERANCE, Case

CASES = pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)


def call(
    case: Case, q: Tensor, k: Tensor, v: Tensor, lists: Tensor, backend: str, softmax: str = "masked"
) -> tuple[Tensor, Tensor]:
    return block_sparse_attention(
        q,
        k,
        v,
        lists,
        block_q=case.block_q,
        block_k=case.block_k,
        causal=case.causal,
        window=case.window,
        segments_bs=case.segments(),
        softmax=softmax,
        return_lse=True,
        backend=backend,
    )


def everything(case: Case) -> Tensor:
    num_key_blocks = -(-case.num_keys // case.block_k)
    return torch.arange(num_key_blocks).expand(1, 1, -(-case.queries // case.block_q), -1)


def visible(case: Case) -> Tensor:
    """[b, 1, t, s] by the definition, one pair at a time."""
    segments = case.segments()
    pairs = torch.zeros(case.batch, 1, case.queries, case.num_keys, dtype=torch.bool)
    for b in range(case.batch):
        for row in range(case.queries):
            for j in range(case.num_keys):
                i = row + case.num_keys - case.queries
                seen = not case.causal or j <= i
                seen &= case.window is None or abs(i - j) < case.window
                seen &= segments is None or int(segments[b, i]) == int(segments[b, j]) > 0
                pairs[b, 0, row, j] = seen
    return pairs


def listed(case: Case, lists: Tensor) -> Tensor:
    """[b, h, t, s]: the pair's key block is in the list of its query block, one list at a time."""
    pairs = torch.zeros(case.batch, case.heads, case.queries, case.num_keys, dtype=torch.bool)
    for b in range(case.batch):
        for h in range(case.heads):
            for row in range(case.queries):
                for block in lists[b, h * lists.shape[1] // case.heads, row // case.block_q].tolist():
                    if block >= 0:
                        pairs[b, h, row, block * case.block_k : (block + 1) * case.block_k] = True
    return pairs


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~pairs, -1e300)
    return (scores.softmax(-1) * pairs) @ v


def with_gradients(
    run: Callable[..., tuple[Tensor, ...] | Tensor], tensors: tuple[Tensor, ...], seed: int = 1
) -> list[Tensor]:
    """Outputs, then the gradients under fixed random weights (none on entries that are -inf)."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    result = run(*leaves)
    outputs = result if isinstance(result, tuple) else (result,)
    draw = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x.dtype) for x in outputs]
    weights = [w.masked_fill(x.isneginf(), 0) for w, x in zip(weights, outputs)]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, leaves, weights))


def assert_near(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        assert torch.equal(x.isneginf(), y.isneginf())
        x, y = (z.double().masked_fill(z.isneginf(), 0) for z in (x, y))
        assert (x - y).abs().max() <= tolerance * y.abs().max().clamp(min=1)


@CASES
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_dense_softmax_under_the_mask(case: Case, backend: str) -> None:
    tensors, lists = case.tensors(torch.float64), case.lists()
    pairs = visible(case) & listed(case, lists)
    found = with_gradients(lambda *x: call(case, *x, lists, backend)[0], tensors)
    assert_near(found, with_gradients(lambda *x: softmax_attention(*x, pairs), tensors), 1e-12)


@CASES
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_full_lists_equal_sdpa(case: Case, backend: str) -> None:
    tensors, pairs = case.tensors(torch.float64), visible(case)
    rows = pairs.any(-1, keepdim=True)
    mask = pairs | ~rows  # SDPA has no empty rows; ours give zero there

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True) * rows

    found = with_gradients(lambda *x: call(case, *x, everything(case), backend)[0], tensors)
    assert_near(found, with_gradients(sdpa, tensors), 1e-12)


@CASES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cpu_equals_reference(case: Case, dtype: torch.dtype) -> None:
    tensors, lists = case.tensors(dtype), case.lists()
    wanted = with_gradients(lambda *x: call(case, *x, lists, "reference"), tuple(x.double() for x in tensors))
    found = with_gradients(lambda *x: call(case, *x, lists, "torch"), tensors)
    assert all(x.dtype == dtype for x in (found[0], *found[2:]))
    assert_near(found, wanted, TOLERANCE[dtype])


GRADCHECK = (
    Case(name="odd", queries=11, head_dim=3, block_q=4, block_k=2, kept_keys=4),
    Case(name="gqa", heads=4, queries=7, head_dim=2, block_q=4, block_k=4, kept_keys=4),
    Case(name="packed", queries=22, head_dim=2, block_q=8, block_k=4, kept_keys=12, packed=True),
    Case(name="window", queries=11, head_dim=2, block_q=4, block_k=4, kept_keys=8, causal=False, window=3),
)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("case", GRADCHECK, ids=lambda case: case.name)
def test_gradcheck_in_both_outputs(case: Case, backend: str) -> None:
    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = call(case, *x, case.lists(), backend)
        return out, lse.masked_fill(lse.isneginf(), 0)

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in case.tensors(torch.float64)])


def test_lse_alone_has_a_gradient() -> None:
    case = TINY[0]
    tensors, lists = case.tensors(torch.float64), case.lists()
    q, k, v = tensors
    wanted = with_gradients(lambda *x: call(case, *x, v, lists, "reference")[1], (q, k))
    found = with_gradients(lambda *x: call(case, *x, lists, "torch")[1], tensors)
    assert_near(found[:-1], wanted, 1e-12)
    assert found[-1].abs().max() == 0  # values do not move it


def phantom(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor]:
    """The dense definition: every pruned visible key adds exp(0) to the denominator."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    weights = (q @ k.mT / q.shape[-1] ** 0.5).exp() * kept
    total = weights.sum(-1) + pruned
    safe = torch.where(total > 0, total, 1)
    return weights / safe[..., None] @ v, safe.log().masked_fill(total == 0, -torch.inf)


@CASES
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_phantom_zero_equals_its_dense_definition(case: Case, backend: str) -> None:
    tensors, lists = case.tensors(torch.float64), case.lists()
    seen = visible(case).expand(-1, case.heads, -1, -1)
    kept = seen & listed(case, lists)
    pruned = (seen.sum(-1) - kept.sum(-1)).double()
    found = with_gradients(lambda *x: call(case, *x, lists, backend, softmax="phantom_zero"), tensors)
    assert_near(found, with_gradients(lambda *x: phantom(*x, kept, pruned), tensors), 1e-12)


@CASES
def test_phantom_zero_with_full_lists_equals_the_masked_softmax(case: Case) -> None:
    tensors, lists = case.tensors(torch.float64), everything(case)
    found = with_gradients(lambda *x: call(case, *x, lists, "torch", softmax="phantom_zero"), tensors)
    assert_near(found, with_gradients(lambda *x: call(case, *x, lists, "torch"), tensors), 1e-12)


def test_phantom_zero_counts_segments_that_are_not_contiguous() -> None:
    case = Case(name="mixed", queries=40, block_q=8, block_k=8, kept_keys=16)
    tensors, lists = case.tensors(torch.float64), case.lists()
    segments = torch.randint(0, 3, (1, 40), generator=torch.Generator().manual_seed(2))
    sizes = {"block_q": 8, "block_k": 8, "causal": True, "segments_bs": segments}
    same = (segments[:, :, None] == segments[:, None]) & (segments > 0)[:, :, None]
    seen = (visible(case) & same[:, None]).expand(-1, 2, -1, -1)
    kept = seen & listed(case, lists)
    pruned = (seen.sum(-1) - kept.sum(-1)).double()
    found = with_gradients(lambda *x: block_sparse_attention(*x, lists, softmax="phantom_zero", **sizes), tensors)
    assert_near(found, with_gradients(lambda *x: phantom(*x, kept, pruned)[0], tensors), 1e-12)


def test_phantom_zero_with_zero_queries_is_the_kept_share_of_the_mean_value() -> None:
    case = Case(name="zero", queries=32, block_q=8, block_k=8, kept_keys=16, causal=False)
    (q, k, v), lists = case.tensors(torch.float64), case.lists()
    out, lse = call(case, torch.zeros_like(q), k, v, lists, "torch", softmax="phantom_zero")
    kept = listed(case, lists).double()
    torch.testing.assert_close(out, kept @ v / 32)
    torch.testing.assert_close(lse.exp(), torch.full_like(lse, 32))
    with pytest.raises(ValueError, match="phantom_zero"):
        call(case, q, k, v, lists, "torch", softmax="phantom")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_rows_without_a_visible_key_are_exactly_zero(backend: str) -> None:
    case = Case(name="empty", queries=40, block_q=8, block_k=8, kept_keys=16)
    lists = case.lists()
    lists[:, :, 1] = -1  # an empty list
    lists[:, :, 2] = torch.tensor([4, -1])  # only keys of the future
    lists[:, :, 3] = torch.tensor([-1, 3])  # the diagonal alone: every row sees itself
    out, lse, dq, dk, dv = with_gradients(lambda *x: call(case, *x, lists, backend), case.tensors(torch.float32))
    assert (out[:, :, 8:24] == 0).all() and (dq[:, :, 8:24] == 0).all()
    assert lse[:, :, 8:24].isneginf().all() and lse[:, :, 24:].isfinite().all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))
    nothing = torch.full_like(lists[..., :0], 0)
    found = with_gradients(lambda *x: call(case, *x, nothing, backend), case.tensors(torch.float32))
    assert all((x == 0).all() for x in (found[0], *found[2:])) and found[1].isneginf().all()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_padding_and_packing_change_nothing(backend: str) -> None:
    """Two sequences padded to whole blocks and packed equal the two alone."""
    case = Case(name="alone", queries=24, block_q=8, block_k=8, kept_keys=16)
    first, second = case.tensors(torch.float64, seed=3), case.tensors(torch.float64, seed=4)
    lists = torch.cat((case.lists(3), torch.where(case.lists(4) < 0, -1, case.lists(4) + 3)), dim=2)
    segments = torch.tensor([1] * 24 + [2] * 19 + [0] * 5)[None]
    packed = tuple(torch.cat(pair, dim=2) for pair in zip(first, second))
    packed = tuple(x.index_fill(2, torch.arange(43, 48), 7.0) for x in packed)  # what padding holds is not read
    sizes = {"block_q": 8, "block_k": 8, "causal": True, "backend": backend}
    found = block_sparse_attention(*packed, lists, segments_bs=segments, **sizes)
    wanted = block_sparse_attention(*first, lists[:, :, :3], **sizes)
    assert_near([found[:, :, :24]], [wanted], 1e-12)
    alone = torch.where(lists[:, :, 3:] < 0, -1, lists[:, :, 3:] - 3)
    wanted = block_sparse_attention(*(x[:, :, :19] for x in second), alone, **sizes)
    assert_near([found[:, :, 24:43]], [wanted], 1e-12)
    assert (found[:, :, 43:] == 0).all()


def test_order_and_empty_slots_do_not_matter() -> None:
    case = next(case for case in TINY if case.name == "odd")
    tensors, lists = case.tensors(torch.float32), case.lists()
    shuffled = torch.cat((torch.full_like(lists[..., :1], -1), lists.flip(-1)), dim=-1).int()
    found = with_gradients(lambda *x: call(case, *x, shuffled, "torch"), tensors)
    assert all(
        torch.equal(x, y) for x, y in zip(found, with_gradients(lambda *x: call(case, *x, lists, "torch"), tensors))
    )


def test_one_list_serves_the_batch_and_strides_do_not_matter() -> None:
    case = next(case for case in TINY if case.name == "gqa")
    tensors, lists = case.tensors(torch.float64), case.lists()[:1]
    wanted = with_gradients(lambda *x: call(case, *x, lists, "reference"), tensors)
    strided = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors)
    assert not strided[0].is_contiguous()
    assert_near(with_gradients(lambda *x: call(case, *x, lists, "torch"), strided), wanted, 1e-12)


def test_causality() -> None:
    case = next(case for case in TINY if case.name == "odd")
    (q, k, v), lists = case.tensors(torch.float32), case.lists()
    before = call(case, q, k, v, lists, "torch")[0]
    for x in (q, k, v):
        x[:, :, 40:] = 100.0
    assert torch.equal(call(case, q, k, v, lists, "torch")[0][:, :, :40], before[:, :, :40])


@pytest.mark.parametrize("name", ["odd", "gqa", "packed", "window", "bidirectional_odd", "wide_keys", "own_lists"])
def test_many_small_batches_of_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in TINY if case.name == name)
    tensors, lists = case.tensors(torch.float64), case.lists()
    wanted = with_gradients(lambda *x: call(case, *x, lists, "torch"), tensors)
    monkeypatch.setattr(torch_backend, "BATCH_ELEMENTS", 1)
    assert_near(with_gradients(lambda *x: call(case, *x, lists, "torch"), tensors), wanted, 1e-12)


@CASES
def test_no_uninitialised_memory_is_read(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fresh memory full of NaN the result is the same."""
    tensors, lists = case.tensors(torch.float32), case.lists()
    wanted = with_gradients(lambda *x: call(case, *x, lists, "torch"), tensors)
    torch.use_deterministic_algorithms(True)  # fills every empty() with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        found = with_gradients(lambda *x: call(case, *x, lists, "torch"), tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted))


def test_same_gradients_every_time() -> None:
    case = Case(name="busy", queries=256, block_q=16, block_k=16, kept_keys=128, head_dim=16)
    tensors, lists = case.tensors(torch.float32), case.lists()
    first = with_gradients(lambda *x: call(case, *x, lists, "torch"), tensors)
    assert all(
        torch.equal(x, y) for x, y in zip(first, with_gradients(lambda *x: call(case, *x, lists, "torch"), tensors))
    )


def test_saves_no_more_than_sdpa_and_the_lists() -> None:
    case = Case(name="saved", heads=6, kv_heads=2, queries=200, block_q=32, block_k=32, kept_keys=64, head_dim=16)
    tensors, lists = [x.requires_grad_() for x in case.tensors(torch.float32)], case.lists()

    def saved(run: Callable[[], Tensor]) -> int:
        storages: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            run()
        return sum(storages.values())

    ours = saved(lambda: call(case, *tensors, lists, "torch")[0])
    q, k, v = tensors
    dense = saved(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    assert ours == sum(x.nbytes for x in (*tensors, q)) + 4 * q[..., 0].numel() + lists.nbytes  # q k v, out, lse, lists
    assert ours <= dense + lists.nbytes


def test_scratch_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the forward or the backward comes near t * s = 1,048,576 numbers."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple) else (result,):
                if isinstance(x, Tensor):
                    self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
            return result

    case = Case(name="long", heads=1, kv_heads=1, list_heads=1, queries=1024, block_q=32, block_k=32, kept_keys=128)
    monkeypatch.setattr(torch_backend, "BATCH_ELEMENTS", 2**14)
    with Largest() as largest:
        with_gradients(lambda *x: call(case, *x, case.lists(), "torch")[0], case.tensors(torch.float32))
    assert 8192 <= largest.numel <= 2**14  # 8192 are the queries themselves


def test_no_second_derivative() -> None:
    case = TINY[0]
    q, k, v = (x.requires_grad_() for x in case.tensors(torch.float64))
    out, _ = call(case, q, k, v, case.lists(), "torch")
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks_bgik": torch.zeros(1, 2, 4, 2, dtype=torch.int64)}, "names block 0 twice"),
        ({"blocks_bgik": torch.full((1, 2, 4, 1), 4)}, "span 4 .. 4"),
        ({"blocks_bgik": torch.full((1, 2, 4, 1), -2)}, "span -2"),
        ({"blocks_bgik": torch.zeros(1, 2, 3, 1, dtype=torch.int64)}, r"\[b, heads, 4, slots\]"),
        ({"blocks_bgik": torch.zeros(1, 3, 4, 1, dtype=torch.int64)}, "the second 1, g=2 or h=2"),
        ({"blocks_bgik": torch.zeros(1, 2, 4, 1)}, "need integers"),
        ({"k_bgsd": torch.zeros(1, 2, 64, 4)}, "twice"),
        ({"q_bhtd": torch.zeros(1, 3, 64, 8)}, "g must divide h"),
        ({"q_bhtd": torch.zeros(1, 2, 64, 8).double()}, "cast them to one floating dtype"),
        ({"q_bhtd": torch.zeros(1, 2, 0, 8)}, "nothing to attend"),
        ({"q_bhtd": torch.zeros(1, 2, 65, 8), "blocks_bgik": torch.zeros(1, 2, 5, 1).int()}, "65 queries and 64 keys"),
        ({"segments_bs": torch.ones(1, 63, dtype=torch.int64)}, "segments"),
        ({"window": 0}, "window=0"),
        ({"block_k": 0}, "at least one token"),
        ({"backend": "fastest"}, "unknown"),
    ],
)
def test_errors(change: dict[str, object], message: str) -> None:
    q, k, v = TINY[0].tensors(torch.float32)
    arguments = {"q_bhtd": q, "k_bgsd": k, "v_bgsd": v, "blocks_bgik": TINY[0].lists()}
    arguments |= {"block_q": 16, "block_k": 16, "causal": True} | change
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**arguments)  # type: ignore[call-overload]


def test_a_named_backend_never_falls_back() -> None:
    case = TINY[0]
    with pytest.raises(Unsupported, match="triton"):
        call(case, *case.tensors(torch.float64), case.lists(), "triton")
    on_meta = [x.to("meta") for x in (*case.tensors(torch.float32), case.lists())]
    with pytest.raises(Unsupported, match="on meta"):
        call(case, *on_meta, "torch")


def test_real_cases_are_lists_of_the_asked_length() -> None:
    for case in REAL:
        kept = (case.lists() >= 0).sum(-1) * case.block_k
        assert kept.max() == case.kept_keys
