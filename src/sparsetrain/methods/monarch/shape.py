"""How large the factors of a linear are: blocks, rank, padding, and what that saves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MonarchShape:
    """The factors of one linear.

    rank: ρ of each pair of blocks; 0: one block-diagonal factor.
    """

    in_features: int
    out_features: int
    num_blocks: int
    rank: int

    @property
    def padded(self) -> tuple[int, int]:
        """(inputs, outputs) up to whole blocks."""
        n = self.num_blocks
        return -(-self.in_features // n) * n, -(-self.out_features // n) * n

    @property
    def right(self) -> tuple[int, int, int]:
        """R [k, q, p]."""
        inputs, outputs = self.padded
        n = self.num_blocks
        return n, self.rank * n or outputs // n, inputs // n

    @property
    def left(self) -> tuple[int, int, int] | None:
        """L [m, s, r], if there is a second factor."""
        n = self.num_blocks
        return (n, self.padded[1] // n, n * self.rank) if self.rank else None

    @property
    def num_params(self) -> int:
        """Numbers in the factors, the bias not counted."""
        k, q, p = self.right
        m, s, r = self.left or (0, 0, 0)
        return k * q * p + m * s * r

    @property
    def middle(self) -> int:
        """Numbers between the factors, a row."""
        return self.right[0] * self.right[1] if self.left else 0

    @property
    def kept(self) -> float:
        """Numbers in the factors, as a share of the dense weight's."""
        return self.num_params / (self.in_features * self.out_features)

    def __str__(self) -> str:
        what = f"Monarch, {self.num_blocks} blocks, rank {self.rank}"
        if not self.rank:
            what = f"block-diagonal, {self.num_blocks} blocks, one factor"
        return f"{what}, {self.kept:.0%} of the weights"


def shape_of(
    in_features: int,
    out_features: int,
    num_blocks: int,
    *,
    rank: int | None = None,
    keep_ratio: float | None = None,
    single_factor: bool = False,
    name: str = "monarch",
) -> MonarchShape:
    """The shape that was asked for; without rank and keep_ratio the published one, min(in, out) / num_blocks².

    Args:
        name: whose it is, for errors.

    Raises:
        ValueError: it cannot be; the message says which can.
    """
    size = f"{name} ({in_features} -> {out_features})"
    if not 1 <= num_blocks <= min(in_features, out_features):
        raise ValueError(
            f"{size}: num_blocks={num_blocks}. It must lie between 1 and {min(in_features, out_features)}, the smaller "
            "of its sizes."
        )
    if single_factor:
        return MonarchShape(in_features=in_features, out_features=out_features, num_blocks=num_blocks, rank=0)
    block = min(-(-in_features // num_blocks), -(-out_features // num_blocks))
    if rank is None and keep_ratio is not None:
        one = MonarchShape(in_features=in_features, out_features=out_features, num_blocks=num_blocks, rank=1)
        rank = min(block, int(keep_ratio / one.kept + 1e-9))
        if rank < 1:
            raise ValueError(
                f"{size}: keep_ratio={keep_ratio} is less than rank 1 keeps at num_blocks={num_blocks}, "
                f"{one.kept:.3f} of the weights. Raise it, or take other num_blocks."
            )
    if rank is None and block % num_blocks:
        able = [n for n in range(2, 65) if -(-min(in_features, out_features) // n) % n == 0][:8]
        raise ValueError(
            f"{size}: num_blocks={num_blocks} does not divide its blocks of {block}, so the rank of a pair of blocks "
            f"would not be whole. Take num_blocks among {able}, or give keep_ratio, or leave the linear out with roles "
            "or targets."
        )
    rank = block // num_blocks if rank is None else rank
    if not 1 <= rank <= block:
        raise ValueError(f"{size}: rank={rank} of blocks of {block}. It must lie between 1 and {block}.")
    return MonarchShape(in_features=in_features, out_features=out_features, num_blocks=num_blocks, rank=rank)
