"""Texts in pieces for a tokenizer, and a stream of tokens cut into rows of equal length."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsetrain.data.collate import IGNORED_LABEL

_PIECE_CHARS = 1 << 16


@dataclass(frozen=True)
class Tokens:
    """A stream of token ids, and whether a document starts at each."""

    ids_n: np.ndarray
    starts_n: np.ndarray


def take_pieces(pieces: Iterator[tuple[str, bool, bool]], chars: int) -> list[tuple[str, bool, bool]]:
    """The next pieces (text, first of its document, last), of about `chars` characters."""
    batch = []
    while chars > 0 and (piece := next(pieces, None)) is not None:
        batch.append(piece)
        chars -= len(piece[0])
    return batch


def take_chars(texts: Iterator[str], chars: int) -> list[str]:
    """The next texts, of about `chars` characters."""
    batch = []
    while chars > 0 and (text := next(texts, None)) is not None:
        batch.append(text)
        chars -= len(text)
    return batch


def piece_end(text: str, begin: int) -> int:
    """Where the piece that begins at `begin` ends: at a line break where there is one."""
    if len(text) - begin <= _PIECE_CHARS:
        return len(text)
    return text.rfind("\n", begin, begin + _PIECE_CHARS) + 1 or begin + _PIECE_CHARS


def sections(lines: Iterable[str]) -> Iterator[str]:
    """A text of any length in parts of about 65,536 characters that end at a line break, each to be a document."""
    part, chars = list[str](), 0
    for line in lines:
        part.append(line)
        chars += len(line)
        if chars >= _PIECE_CHARS:
            yield "".join(part)
            part, chars = [], 0
    if part:
        yield "".join(part)


def cut_at_line(text: str, ratio: float) -> tuple[str, str]:
    """Two parts at the line break nearest before `ratio` of the text; at a character where none is near, as one far
    off would double the second part."""
    middle = int(ratio * len(text))
    cut = text.rfind("\n", max(0, 2 * middle - len(text)), middle) + 1 or middle
    return text[:cut], text[cut:]


def packed_rows(
    tokens: Tokens, seq_len: int, pack: str, side: str, name: str, counts: dict[str, int]
) -> dict[str, Any]:
    """Columns of rows of `seq_len` tokens, and labels; what was used and left over goes into `counts`.

    Args:
        pack: "documents": also `position_ids`, which begin anew with each document.
        side, name: "train" or "eval", and the source, for errors.

    Raises:
        ValueError: too few tokens for one row.
    """
    num_rows, left_over = divmod(len(tokens.ids_n), seq_len)
    if num_rows == 0:
        more = "" if side == "train" else " or hold out more (eval_ratio, eval_source)"
        copies = f" ({counts['duplicates_of_eval']:,} copies of held-out texts aside)" if side == "train" else ""
        raise ValueError(
            f"{name} is too little for one {side} row: seq_len={seq_len} tokens are asked, {left_over} were found"
            f"{copies if counts.get('duplicates_of_eval') else ''}. Lower seq_len, give more text{more}."
        )
    kept = num_rows * seq_len
    ids_rt = tokens.ids_n[:kept].reshape(num_rows, seq_len)
    starts_rt = tokens.starts_n[:kept].reshape(num_rows, seq_len)
    labels_rt = ids_rt.copy()
    labels_rt[:, 0] = IGNORED_LABEL
    rows = {"input_ids": ids_rt, "labels": labels_rt}
    if pack == "documents":
        labels_rt[starts_rt] = IGNORED_LABEL
        columns_t = np.arange(seq_len, dtype=np.int32)
        rows["position_ids"] = columns_t - np.maximum.accumulate(np.where(starts_rt, columns_t, 0), axis=1)
    counts[f"{side}_documents"] = int(tokens.starts_n.sum())
    counts[f"{side}_rows"] = num_rows
    counts[f"{side}_tokens"] = kept
    counts[f"{side}_tokens_left_over"] = left_over
    return rows


def pack_whole(ids: list[list[int]], labels: list[list[int]], seq_len: int) -> dict[str, list[list[int]]]:
    """Rows put together, whole, into as few of at most `seq_len` tokens as best-fit decreasing finds.

    Args:
        ids, labels: of each row, at most `seq_len` of them; the first label of a row is to be ignored.

    Returns: `input_ids`, `labels`, and `position_ids`, which begin anew with each row.

    Cost: O(n log n) for n rows.
    """
    rooms: list[tuple[int, int]] = []  # (tokens that are free, place), in that order
    bins: list[list[int]] = []
    for i in sorted(range(len(ids)), key=lambda i: -len(ids[i])):
        at = bisect_left(rooms, (len(ids[i]), 0))  # the fullest that it fits into
        free, place = rooms.pop(at) if at < len(rooms) else (seq_len, len(bins))
        if place == len(bins):
            bins.append([])
        bins[place].append(i)
        insort(rooms, (free - len(ids[i]), place))
    return {
        "input_ids": [[token for i in members for token in ids[i]] for members in bins],
        "labels": [[label for i in members for label in labels[i]] for members in bins],
        "position_ids": [[place for i in members for place in range(len(ids[i]))] for members in bins],
    }


def describe(name: str, unit: str, seq_len: int, counts: dict[str, int]) -> str:
    """One line for a report, from what was counted; unit: of the documents."""
    line = (
        f"{name}: {counts['train_rows']:,} rows of {seq_len:,} tokens "
        f"from {counts['train_documents']:,} of {counts['documents']:,} {unit}"
    )
    if "eval_rows" in counts:
        line += f"; held out: {counts['eval_rows']:,} rows from {counts['eval_documents']:,} {unit}"
    if counts.get("documents_cut"):
        line += ", the end of one that is trained on up to there"
    return line
