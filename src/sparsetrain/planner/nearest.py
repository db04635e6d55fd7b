"""What comes closest to a goal that nothing fits."""

from __future__ import annotations

from collections.abc import Sequence

from sparsetrain.planner.search import Answer, Question, Row, peak_bytes_of


def nearest(rows: Sequence[Row], question: Question) -> tuple[str, ...]:
    """A shorter sequence, a smaller batch, more memory."""
    able = [row for row in rows if row.refused is None and row.candidate.pickable and row.peak is not None]
    if not able:
        return ("no way that is chosen by itself runs on this model; the reasons are above.",)
    limit = question.memory_bytes or 0
    lines = []
    longest = max(able, key=lambda row: (row.longest or 0, -_order(row)))
    exact = [row for row in able if row.risk.exact and row.longest]
    if longest.longest:
        lines.append(f"{longest.longest:,} tokens at batch {question.batch}, with {longest.candidate.label}.")
        if exact and not longest.risk.exact:
            safe = max(exact, key=lambda row: row.longest or 0)
            lines.append(f"{safe.longest:,} tokens without loss of quality, with {safe.candidate.label}.")
    else:
        least = min(able, key=lambda row: row.peak.parameters + row.peak.optimizer if row.peak else 0)
        assert least.peak is not None
        lines.append(
            f"no length: the weights alone take {least.peak.parameters / 1e9:.1f} GB of {limit / 1e9:.1f}. "
            "Take a smaller model or more memory."
        )
    larger = max(able, key=lambda row: row.largest or 0)
    if larger.largest:
        lines.append(f"batch {larger.largest} at {question.tokens:,} tokens, with {larger.candidate.label}.")
    lean = min(able, key=peak_bytes_of)
    lines.append(f"{peak_bytes_of(lean) / 1e9:.1f} GB for what was asked, with {lean.candidate.label}.")
    return tuple(lines)


def _order(row: Row) -> float:
    kind, ratio, count = row.risk.order
    return 100 * kind + ratio + count / 1000


def nearest_in_bf16(answered: Answer) -> tuple[str, ...]:
    """The same for a question in fp32 that nothing fits, as it was answered in bf16: half the frozen weights come
    before a smaller model."""
    if answered.picked is None:
        return tuple(f"with --dtype bf16: {line}" for line in answered.nearest)
    row = answered.picked
    return (f"--dtype bf16: {row.candidate.label} fits, in {peak_bytes_of(row) / 1e9:.1f} GB.",)
