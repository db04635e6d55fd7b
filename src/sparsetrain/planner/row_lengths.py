"""How long the rows of a data set are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RowLengths:
    """count: of rows. longest, mean: their tokens, uncut. cut: how many are longer than `seq_len`. sampled: they are
    the first of a stream, and others may be longer."""

    count: int
    longest: int
    mean: float
    seq_len: int
    cut: int
    sampled: bool = False

    @classmethod
    def of(cls, lengths: Sequence[int], seq_len: int, sampled: bool = False) -> RowLengths:
        cut = sum(length > seq_len for length in lengths)
        mean = sum(lengths) / len(lengths)
        return cls(count=len(lengths), longest=max(lengths), mean=mean, seq_len=seq_len, cut=cut, sampled=sampled)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """'The data: 1,200 rows, the longest of 812 tokens, 300 on average; none is cut at seq_len=1,024.'"""
        cut = "none is" if not self.cut else "1 row is" if self.cut == 1 else f"{self.cut:,} rows are"
        which = "The data's first" if self.sampled else "The data:"
        later = " Later ones may be longer, so full rows are planned." if self.sampled else ""
        return (
            f"{which} {self.count:,} rows, the longest of {self.longest:,} tokens, {self.mean:,.0f} on average; "
            f"{cut} cut at seq_len={self.seq_len:,}.{later}"
        )
