"""Codes against a scalar loop, the loss against its equation, and fitted codebooks against clusters that are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sparsetrain.ops.product_quantization.torch as torch_backend
from sparsetrain.core.errors import Unsupported
from sparsetrain.ops.product_quantization import (
    block_histograms,
    codebook_loss,
    decode,
    encode,
    fit_codebook,
    reference,
)
from sparsetrain.ops.product_quantization.cases import TINY, Case

CASES = pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])
DISTANCES = pytest.mark.parametrize("distance", ["l1", "l2"])


def scalar_codes(x: Tensor, codebook: Tensor, distance: str) -> Tensor:
    """The definition, one vector at a time; the first of equal distances wins."""
    b, h, t, _ = x.shape
    g, m, _, w = codebook.shape
    codes = torch.zeros(b, h, t, m, dtype=torch.uint8)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in codes.shape)).view(-1, 4).tolist():
        row, head, token, subspace = index
        difference = x[row, head, token, subspace * w : (subspace + 1) * w] - codebook[head * g // h, subspace]
        found = (difference.abs() if distance == "l1" else difference.square()).sum(-1).tolist()
        codes[row, head, token, subspace] = found.index(min(found))
    return codes


@CASES
@BACKENDS
@DISTANCES
def test_codes_equal_a_scalar_loop(case: Case, backend: str, distance: str) -> None:
    x, codebook = case.tensors(torch.float64)
    assert torch.equal(encode(x, codebook, distance, backend=backend), scalar_codes(x, codebook, distance))


@CASES
def test_backends_agree_bit_for_bit_on_l1(case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, codebook = case.tensors(torch.float32)
        x = x.to(dtype)
        assert torch.equal(encode(x, codebook, "l1", backend="torch"), encode(x, codebook, "l1", backend="reference"))


@CASES
def test_l2_differs_only_where_two_codewords_are_equally_near(case: Case) -> None:
    x, codebook = case.tensors(torch.float32)
    found, wanted = (encode(x, codebook, "l2", backend=name).long() for name in ("torch", "reference"))
    exact = reference.distances(x.double(), codebook.double(), "l2")
    gap = exact.gather(-1, found[..., None]) - exact.gather(-1, wanted[..., None])
    assert gap.abs().max() < 1e-5


@BACKENDS
@DISTANCES
def test_equal_distances_take_the_lowest_index(backend: str, distance: str) -> None:
    x, codebook = TINY[0].tensors(torch.float32)
    doubled = torch.cat([codebook, codebook, codebook], dim=2)
    assert torch.equal(encode(x, doubled, distance, backend=backend), encode(x, codebook, distance, backend=backend))
    same = codebook[:, :, :1].expand(-1, -1, 7, -1)
    assert encode(x, same, distance, backend=backend).max() == 0


@DISTANCES
def test_long_and_strided_inputs(distance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "TILE_ELEMENTS", 512)  # many tiles, the last one partial
    x, codebook = Case(name="long", heads=4, codebooks=2, tokens=77).tensors(torch.float64)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    wanted = encode(x, codebook, distance, backend="reference")
    assert torch.equal(encode(strided, codebook, distance, backend="torch"), wanted)


def test_a_nan_gives_a_code_that_exists() -> None:
    x, codebook = TINY[0].tensors(torch.float32)
    x[0, 0, 3] = torch.nan
    for distance in ("l1", "l2"):
        assert encode(x, codebook, distance, backend="torch").max() < codebook.shape[2]


def test_decode_gives_the_nearest_codeword_and_its_gradient() -> None:
    x, codebook = Case(name="gqa", heads=4, codebooks=2, tokens=9).tensors(torch.float64)
    exactly = decode(encode(x, codebook, "l2"), codebook)
    assert torch.equal(encode(exactly, codebook, "l2"), encode(x, codebook, "l2"))
    loose = codebook.clone().requires_grad_()
    decode(encode(x, codebook), loose).sum().backward()
    assert loose.grad is not None and loose.grad.sum() == x.numel()


@CASES
@pytest.mark.parametrize("block_tokens", [4, 64])
def test_histograms_count_the_codes_of_each_block(case: Case, block_tokens: int) -> None:
    x, codebook = case.tensors(torch.float32)
    draw = torch.Generator().manual_seed(1)
    for valid in (None, torch.rand(case.batch, case.tokens, generator=draw) > 0.3):
        codes = F.one_hot(encode(x, codebook).long(), case.codewords).float()
        codes = codes if valid is None else codes * valid[:, None, :, None, None]
        wanted = torch.stack([part.sum(2) for part in codes.split(block_tokens, 2)], 3)
        for backend in ("reference", "torch"):
            assert torch.equal(block_histograms(x, codebook, block_tokens, "l1", valid, backend=backend), wanted)
    with pytest.raises(ValueError, match="block_tokens=0"):
        block_histograms(x, codebook, 0)


@BACKENDS
def test_codes_have_no_gradient_and_named_backends_do_not_fall_back(backend: str) -> None:
    x, codebook = TINY[0].tensors(torch.float32)
    assert not encode(x.requires_grad_(), codebook.requires_grad_(), backend=backend).requires_grad
    with pytest.raises(Unsupported, match="triton"):
        encode(x.double(), codebook, backend="triton")


def test_the_hand_example_of_the_loss() -> None:
    codebook = torch.tensor([[[[0.0, 0.0], [1.0, 1.0]]]], dtype=torch.float64)
    x = torch.full((1, 1, 1, 2), 0.25, dtype=torch.float64)
    assert codebook_loss(x, codebook, "l1").item() == pytest.approx(0.125, abs=1e-15)


@CASES
@DISTANCES
def test_loss_in_pieces_equals_the_whole(case: Case, distance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsetrain.ops.product_quantization.loss.PIECE_ELEMENTS", 200)
    x, codebook = (tensor.requires_grad_() for tensor in case.tensors(torch.float64))
    valid = torch.rand(x.shape[0], x.shape[2], generator=torch.Generator().manual_seed(1)) < 0.7
    for mask in (None, valid, torch.zeros_like(valid)):
        whole = reference.codebook_loss(x, codebook, distance, mask)
        pieces = codebook_loss(x, codebook, distance, mask)
        torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-14)
        found = torch.autograd.grad(3 * pieces, (x, codebook))
        for ours, wanted in zip(found, torch.autograd.grad(3 * whole, (x, codebook)), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-13)


@DISTANCES
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradcheck(distance: str, wanted: tuple[bool, bool]) -> None:
    x, codebook = Case(name="small", heads=2, codebooks=1, tokens=3, codewords=4).tensors(torch.float64)
    x, codebook = x.requires_grad_(wanted[0]), codebook.requires_grad_(wanted[1])
    valid = torch.tensor([[True, False, True]])
    assert torch.autograd.gradcheck(lambda a, c: codebook_loss(a, c, distance, valid), (x, codebook))


@DISTANCES
def test_a_vector_on_a_codeword_has_a_finite_gradient(distance: str) -> None:
    _, codebook = TINY[0].tensors(torch.float32)
    x = codebook[:, :, 0].flatten(1)[None, :, None].clone().requires_grad_()
    codebook_loss(x, codebook.requires_grad_(), distance).backward()
    assert x.grad is not None and codebook.grad is not None
    assert x.grad.isfinite().all() and codebook.grad.isfinite().all()


def test_masked_tokens_do_not_reach_the_loss() -> None:
    x, codebook = TINY[0].tensors(torch.float32)
    valid = torch.arange(x.shape[2])[None] < 20
    poisoned = x.clone()
    poisoned[:, :, 20:] = torch.nan
    loss = codebook_loss(poisoned, codebook.requires_grad_(), "l1", valid)
    wanted = codebook_loss(x[:, :, :20], codebook, "l1")
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(each, codebook)[0] for each in (loss, wanted)))
    without = codebook_loss(x.detach(), codebook.detach(), "l1", valid)
    assert not without.requires_grad and torch.equal(without, loss.detach())


@pytest.mark.parametrize("reentrant", [False, True])
def test_loss_under_checkpointing(reentrant: bool) -> None:
    x, codebook = (tensor.requires_grad_() for tensor in TINY[0].tensors(torch.float64))
    wanted = torch.autograd.grad(codebook_loss(x, codebook, "l1"), codebook)[0]
    loss = checkpoint(lambda x: codebook_loss(x * 1.0, codebook, "l1"), x, use_reentrant=reentrant)
    codebook.grad = None
    loss.backward()
    torch.testing.assert_close(codebook.grad, wanted)


@DISTANCES
def test_fit_finds_the_clusters(distance: str) -> None:
    draw = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(2, 4, 8, generator=draw)
    owner = torch.randint(4, (2, 300), generator=draw)
    noise = 0.1 * torch.randn(2, 300, 8, generator=draw)
    sample = (centres.gather(1, owner[..., None].expand(-1, -1, 8)) + noise).transpose(0, 1).reshape(300, 16)
    found = fit_codebook(sample, 4, distance)
    assert found.shape == (2, 4, 8)
    assert torch.cdist(centres, found).amin(2).max() < 0.1


@DISTANCES
def test_fitted_codewords_are_the_centres_of_their_vectors(distance: str) -> None:
    sample = torch.randn(3, 200, 16, generator=torch.Generator().manual_seed(0))
    found = fit_codebook(sample, 5, distance, iterations=60)
    codes = encode(sample[None], found, distance)[0].long()  # [g, n, m]
    for g, m, e in torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(5)).tolist():
        members = sample[g, codes[g, :, m] == e, m * 8 : (m + 1) * 8]
        centre = members.median(0).values if distance == "l1" else members.mean(0)
        torch.testing.assert_close(found[g, m, e], centre, rtol=1e-4, atol=1e-5)


@DISTANCES
def test_fit_is_deterministic_and_takes_few_tokens(distance: str) -> None:
    sample = torch.randn(50, 8)
    assert torch.equal(fit_codebook(sample, distance=distance), fit_codebook(sample, distance=distance))
    seeded = [fit_codebook(sample, distance=distance, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])
    one = fit_codebook(sample[:1], 4, distance)
    assert torch.equal(one, sample[:1].expand(4, -1)[None])


def test_mistakes_say_what_was_asked_and_found() -> None:
    x, codebook = torch.zeros(1, 4, 3, 16), torch.zeros(2, 2, 16, 8)
    for call, message in (
        (lambda: encode(torch.zeros(1, 4, 3, 20), codebook), "head width 20"),
        (lambda: encode(torch.zeros(1, 3, 3, 16), codebook), "2 codebooks do not divide 3 heads"),
        (lambda: encode(x, codebook, "cosine"), "distance='cosine'"),
        (lambda: encode(x.int(), codebook), "need floats"),
        (lambda: encode(x, codebook.repeat(1, 1, 20, 1)), "320 codewords"),
        (lambda: codebook_loss(x, codebook, "l1", torch.ones(1, 3)), "need bool"),
        (lambda: fit_codebook(torch.zeros(9, 20)), "head width 20"),
        (lambda: fit_codebook(torch.zeros(0, 16)), "n >= 1"),
        (lambda: fit_codebook(torch.zeros(9, 16), 300), "num_codewords=300"),
        (lambda: fit_codebook(torch.zeros(9, 16), distance="cosine"), "distance='cosine'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
