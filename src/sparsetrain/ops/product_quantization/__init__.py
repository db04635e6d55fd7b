"""Product quantisation: short codes for queries and keys, the loss that trains them, and their start by clustering.

Legend: b batch, h heads, g codebooks (one a key/value head, or 1 for all; g divides h), t tokens, d head width,
m sub-spaces, w width of a sub-space (d = m w; 8 in the paper), e codewords a sub-space, n sample tokens.
"""

from __future__ import annotations

from torch import Generator, Tensor, float64, no_grad

from sparsetrain.core.backend import choose, no_triton
from sparsetrain.ops.product_quantization import reference
from sparsetrain.ops.product_quantization.fit import DISTANCES, cluster
from sparsetrain.ops.product_quantization.loss import CodebookLoss, check_valid
from sparsetrain.ops.product_quantization.torch import encode as tiled_encode

MAX_CODEWORDS = 256
"""A code is one byte."""


def encode(x_bhtd: Tensor, codebook_gmew: Tensor, distance: str = "l1", *, backend: str = "auto") -> Tensor:
    """The nearest codeword of every sub-space: code(x)[m] = argmin_e |x_m - C[m, e]| (SPT, arXiv 2312.10365).

    Equals:
        x = x_bhtd.float().unflatten(-1, (m, 1, w)) - codebook.float().repeat_interleave(h // g, 0)[None, :, None]
        codes = (x.abs() if distance == "l1" else x.square()).sum(-1).argmin(-1).to(torch.uint8)

    Distances are fp32 (fp64 for fp64), summed in one order, and equal ones take the lowest codeword index, so all
    backends agree on codes, and a code is that of its vector alone. There is no gradient.

    Args:
        x_bhtd: [b, h, t, d].
        codebook_gmew: [g, m, e, w]; query head i uses codebook i // (h / g).
        distance: l1 (published) or l2.
        backend: auto | reference | torch | triton.

    Returns:
        codes uint8 [b, h, t, m].

    Raises:
        ValueError: shapes, dtypes or the distance do not fit together; the message names them.
        Unsupported: the named backend cannot run this call.

    Cost: 2 d e operations a token and head. The steps of the `torch` backend take about 13 ms of processor time
    together for 4,096 tokens of 8 heads of 64, in tiles of 1 MiB.
    """
    _check(x_bhtd, codebook_gmew, distance)
    name = choose("product_quantization", backend, _available(x_bhtd))
    with no_grad():
        if name == "triton":
            from sparsetrain.ops.product_quantization.triton import encode as kernel

            return kernel(x_bhtd, codebook_gmew, distance)
        return (tiled_encode if name == "torch" else reference.encode)(x_bhtd, codebook_gmew, distance)


def block_histograms(
    x_bhtd: Tensor,
    codebook_gmew: Tensor,
    block_tokens: int,
    distance: str = "l1",
    valid_bt: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """How many valid tokens of each block have each code.

    Equals:
        codes = one_hot(encode(x, codebook), e).float() * valid[:, None, :, None, None]
        counts = codes.view(b, h, n, block_tokens, m, e).sum(3).transpose(2, 3)

    Args:
        x_bhtd, codebook_gmew, distance: as for `encode`.
        block_tokens: tokens of a block; the last one may be short.
        valid_bt: bool [b, t]; tokens that count (all if None).
        backend: auto | reference | torch | triton; `triton` stores no code.

    Returns:
        fp32 [b, h, m, n, e].

    Raises:
        ValueError, Unsupported: as `encode`; or `block_tokens` is below 1.
    """
    _check(x_bhtd, codebook_gmew, distance)
    check_valid(valid_bt, x_bhtd)
    if block_tokens < 1:
        raise ValueError(f"block_tokens={block_tokens}: a block holds at least one token.")
    name = choose("product_quantization", backend, _available(x_bhtd))
    with no_grad():
        if name == "triton":
            from sparsetrain.ops.product_quantization.triton import histograms

            return histograms(x_bhtd, codebook_gmew, block_tokens, distance, valid_bt)
        codes = encode(x_bhtd, codebook_gmew, distance, backend=name)
        return reference.count(codes, codebook_gmew.shape[2], block_tokens, valid_bt)


def _available(x: Tensor) -> dict[str, str | None]:
    tiled = None if x.device.type == "cpu" else f"its tiles are for a CPU, and the tensors are on {x.device}"
    kernel = no_triton(x.device) or ("the kernel adds up in fp32" if x.dtype == float64 else None)
    if x.device.type == "cuda":
        return {"triton": kernel, "torch": tiled, "reference": None}
    return {"torch": tiled, "reference": None, "triton": kernel}


def decode(codes_bhtm: Tensor, codebook_gmew: Tensor) -> Tensor:
    """The quantised vectors: x_m = C[m, code[m]].

    Args:
        codes_bhtm: integers [b, h, t, m] below e.
        codebook_gmew: [g, m, e, w], g divides h.

    Returns:
        [b, h, t, m w] in the codebook's dtype, differentiable in the codebook.
    """
    return reference.decode(codes_bhtm, codebook_gmew)


def codebook_loss(
    x_bhtd: Tensor, codebook_gmew: Tensor, distance: str = "l1", valid_bt: Tensor | None = None
) -> Tensor:
    """The loss that pulls codewords and vectors together (read in the authors' code of arXiv 2312.10365).

    delta_e = max(|x_m - C[m, e]|, 1e-5);  hard = C[m, argmin delta];  w_e = (1 / delta_e) / sum_e' (1 / delta_e')
    soft = sum_e w_e C[m, e];  loss = mean((soft - hard)^2) + mean((x_m - hard)^2), over all elements.

    For l2 the distance is the Euclidean norm. Differentiable once, in x and in the codebook; detach x to leave queries
    and keys alone. Without a valid token the loss is 0.

    Args:
        x_bhtd: [b, h, t, d].
        codebook_gmew: [g, m, e, w], g divides h.
        distance: l1 (published) or l2.
        valid_bt: bool [b, t]; tokens that count (all if None).

    Returns:
        A scalar in fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes, dtypes or the distance do not fit together; the message names them.

    Cost: the gradient is formed in the forward, a few hundred tokens at a time: no tensor of distances is kept.
    """
    _check(x_bhtd, codebook_gmew, distance)
    check_valid(valid_bt, x_bhtd)
    return CodebookLoss.apply(x_bhtd, codebook_gmew, distance, valid_bt)


def fit_codebook(
    x_nd: Tensor,
    num_codewords: int = 16,
    distance: str = "l1",
    iterations: int = 20,
    *,
    generator: Generator | None = None,
    subspace_width: int = 8,
) -> Tensor:
    """Codewords from a sample: k-medians for l1, k-means for l2, started by k-means++ (D-sampling for l1).

    A codeword that no vector chooses stays where it is. The same sample and generator state give the same codewords.

    Args:
        x_nd: sample [n, d], or [g, n, d] for g codebooks; pass the queries and keys that will share it.
        num_codewords: e, at most 256.
        distance: l1 or l2.
        iterations: assignments and updates.
        generator: of the start, on the CPU; seed 0 if None.
        subspace_width: w.

    Returns:
        codebook fp32 [m, e, w], or [g, m, e, w].

    Raises:
        ValueError: d is not a multiple of w, the sample is empty, or a number is out of range.

    Cost: for 4,096 tokens and d = 64 about 0.1 s (l2) or 0.3 s (l1) of processor time a codebook.
    """
    if x_nd.ndim not in (2, 3) or x_nd.shape[-2] == 0 or not x_nd.is_floating_point():
        raise ValueError(f"the sample is {x_nd.dtype} {list(x_nd.shape)}; need floats [n, d] or [g, n, d] with n >= 1.")
    if x_nd.shape[-1] % subspace_width:
        raise ValueError(f"head width {x_nd.shape[-1]} is not a multiple of the sub-space width {subspace_width}.")
    if not 1 <= num_codewords <= MAX_CODEWORDS:
        raise ValueError(f"num_codewords={num_codewords}; a code is one byte, so choose 1 to {MAX_CODEWORDS}.")
    if distance not in DISTANCES:
        raise ValueError(f"distance={distance!r}; choose one of {', '.join(DISTANCES)}.")
    generator = generator or Generator().manual_seed(0)
    x_pnw = x_nd.float().unflatten(-1, (-1, subspace_width)).transpose(-3, -2)
    codebook = cluster(x_pnw.flatten(0, -3), num_codewords, distance, iterations, generator)
    return codebook.view(*x_pnw.shape[:-2], num_codewords, subspace_width)


def _check(x: Tensor, codebook: Tensor, distance: str) -> None:
    if x.ndim != 4 or codebook.ndim != 4 or not (x.is_floating_point() and codebook.is_floating_point()):
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)}, the codebook {codebook.dtype} {list(codebook.shape)}: need floats "
            "[b, h, t, d] and [g, m, e, w]."
        )
    groups, subspaces, codewords, width = codebook.shape
    if x.shape[3] != subspaces * width:
        raise ValueError(
            f"head width {x.shape[3]} is not {subspaces} sub-spaces of width {width}; need a codebook [g, "
            f"{x.shape[3]} / {width}, e, {width}]."
        )
    if x.shape[1] % groups:
        raise ValueError(f"{groups} codebooks do not divide {x.shape[1]} heads; give one, or one a key/value head.")
    if not 1 <= codewords <= MAX_CODEWORDS:
        raise ValueError(f"{codewords} codewords a sub-space; a code is one byte, so give 1 to {MAX_CODEWORDS}.")
    if distance not in DISTANCES:
        raise ValueError(f"distance={distance!r}; choose one of {', '.join(DISTANCES)}.")
