"""MVUE: a random 2:4 matrix whose expectation is the given one, with little variance (FST, arXiv 2404.01847, 4.2)."""

from __future__ import annotations

from torch import Generator, Tensor, cat, device, empty_like, rand

from sparsetrain.core.backend import choose, no_triton
from sparsetrain.ops.mvue24.reference import exact_dtype, inclusion, magnitudes, offset_of, reference_mvue
from sparsetrain.ops.mvue24.torch import sliced_mvue


def mvue24(x: Tensor, dim: int = 0, *, generator: Generator | None = None, backend: str = "auto") -> Tensor:
    """Keep two of every four entries along `dim`, drawn at random and scaled so that E[y] = x.

    With a = |x| + 1.19e-7 max|x|, Σ their sum over the group and t = a / Σ, entry i is kept with probability
    p_i = t_i + a_i Σ_{j≠i} t_j / (Σ − a_j), and y_i = x_i / p_i. Relative error E‖y − x‖² / ‖x‖² is .503 on Gaussian
    entries (a uniform pair: 1.0); groups with at most two non-zeros come back unchanged up to the offset. The draw is
    in fp32 or better, whatever the dtype.

    The paper draws i by t, then j ≠ i by a_j / (Σ − a_i), which has these p. We draw both by one number: the p, which
    sum to 2, are laid end to end from a random start, and an entry is kept if its interval holds an integer. E[y] and
    the variance of every entry are the same. The starts are sums of one number a row of groups and one a column, which
    are pairwise independent, so two groups are as uncorrelated as with a number each.

    Args:
        x: any shape. A last group of fewer than four along `dim` is returned as it is.
        generator: of x's device; for x [t, c] and dim 0, t / 4 + c uniform numbers are taken from it.
        backend: auto, torch (any device), triton (a GPU's, in one pass over any strides) or reference.

    Raises:
        ValueError: fewer than four entries along `dim`, so nothing could be sparse.
    """
    size = x.shape[dim]
    if size < 4:
        raise ValueError(
            f"mvue24: dimension {dim} of {tuple(x.shape)} has {size} entries, and a group needs four. "
            "Give at least four tokens, or keep the weight gradient dense (wgrad='dense')."
        )
    name, x = choose("mvue24", backend, on_device(x.device)), x.detach()
    num_groups, num_columns = size // 4, x.numel() // max(1, size)
    whole = x.narrow(dim, 0, num_groups * 4)
    row, column = (
        rand(count, generator=generator, dtype=exact_dtype(x), device=x.device) for count in (num_groups, num_columns)
    )
    offset = offset_of(whole)
    if name == "triton":
        from sparsetrain.ops.mvue24.triton import drawn_along

        return drawn_along(x, dim, row, column, offset)
    whole = whole.movedim(dim, 0)
    rows = whole.reshape(num_groups, 4, -1)
    if name == "torch":
        out = empty_like(rows)
        sliced_mvue(rows, row, column, offset, out)
    else:
        starts = (row[:, None] + column).view(-1, 1)
        drawn = reference_mvue(rows.transpose(1, 2).reshape(-1, 4), starts, offset)
        out = drawn.view(num_groups, -1, 4).transpose(1, 2)
    found = out.reshape(whole.shape).movedim(0, dim)
    return found if size % 4 == 0 else cat([found, x.narrow(dim, size // 4 * 4, size % 4)], dim)


def on_device(place: device) -> dict[str, str | None]:
    """Backends there, best first, and why the kernel cannot run."""
    kernel = no_triton(place)
    if place.type == "cuda":
        return {"triton": kernel, "torch": None, "reference": None}
    return {"torch": None, "reference": None, "triton": kernel}


def inclusion_probabilities(x: Tensor) -> Tensor:
    """p of the last dimension's groups of four; a group's four sum to 2.

    Args:
        x: [..., 4n].
    """
    return inclusion(magnitudes(x, offset_of(x)).unflatten(-1, (-1, 4))).flatten(-2)
