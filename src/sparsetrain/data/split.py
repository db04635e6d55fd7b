"""The split into training and held-out rows: seeded, by content, so that no held-out text is trained on."""

import hashlib
from collections.abc import Callable, Hashable, Sequence

from sparsetrain.data.rows import Row


def divide(
    rows: list[Row],
    eval_rows: list[Row] | None,
    eval_ratio: float,
    seed: int,
    key: Callable[[Row], str],
    stratum: Callable[[Row], Hashable] | None = None,
) -> tuple[list[Row], list[Row] | None, int]:
    """Training rows and held-out rows (None if none are wanted) in a seeded order; how many training rows were
    dropped for being in `eval_rows`. Rows with equal `key` never lie on both sides.

    Raises:
        ValueError: a wanted side stays empty.
    """
    keys = [key(row) for row in rows]
    if eval_rows is None:
        strata = None if stratum is None else [stratum(row) for row in rows]
        train_ids, eval_ids = split_rows(keys, eval_ratio, seed, strata)
        eval_rows = [rows[i] for i in eval_ids] if eval_ratio else None
        num_dropped = 0
    else:
        known = {key(row) for row in eval_rows}
        train_ids = [i for i in split_rows(keys, 0, seed)[0] if keys[i] not in known]
        num_dropped = len(rows) - len(train_ids)
    for side, kept in (("train", train_ids), ("eval", eval_rows)):
        if kept is not None and not kept:
            raise ValueError(
                f"No {side} rows: found {len(rows)} rows, {len(set(keys))} of them distinct, {num_dropped} also in the "
                f"evaluation data; eval_ratio={eval_ratio}. Give more data, other evaluation data or another ratio."
            )
    return [rows[i] for i in train_ids], eval_rows, num_dropped


def check_ratio(eval_ratio: float) -> None:
    """Raises ValueError unless the held-out share lies in [0, 1)."""
    if not 0 <= eval_ratio < 1:
        raise ValueError(f"eval_ratio={eval_ratio} is not a share of the data. Use a number in [0, 1).")


def split_rows(
    keys: Sequence[str], eval_ratio: float, seed: int, strata: Sequence[Hashable] | None = None
) -> tuple[list[int], list[int]]:
    """Indices of the training and the held-out rows, in an order that depends on seed and keys alone.

    Distinct keys are ordered by sha256(seed, key); of each stratum the first round(eval_ratio * n), at least one and
    never all, are held out, and with them every row of the same key.
    """
    rank = {key: hashlib.sha256(f"{seed}\n{key}".encode("utf-8", "surrogatepass")).digest() for key in set(keys)}
    members: dict[Hashable, set[str]] = {}
    for i, key in enumerate(keys):
        members.setdefault(None if strata is None else strata[i], set()).add(key)
    held_out: set[str] = set()
    for group in members.values():
        # A lone row stays in training: a class seen only in evaluation could not be learnt.
        num_eval = num_held_out(len(group), eval_ratio) if eval_ratio else 0
        held_out.update(sorted(group, key=rank.__getitem__)[:num_eval])
    order = sorted(range(len(keys)), key=lambda i: (rank[keys[i]], i))
    return [i for i in order if keys[i] not in held_out], [i for i in order if keys[i] in held_out]


def share_of_text(sizes: Sequence[int], ratio: float, grown: float = 1) -> tuple[int, float]:
    """What is held out of documents of these sizes: (the first so many as a whole, what share of the next one's end).

    The first share of the documents where they hold between half and twice that share of the text, as those of about
    equal length do. Otherwise documents until they hold the share of the text, and of one that alone would more than
    double it (a book among notes), or is the last, its end.

    Args:
        sizes: in the seeded order, in any unit.
        ratio: the share of the text.
        grown: times this share, where the share itself was too little for a row.
    """
    wanted, found = grown * ratio * sum(sizes), 0
    count = num_held_out(len(sizes), ratio)
    if grown == 1 and len(sizes) > 1 and wanted / 2 <= sum(sizes[:count]) <= 2 * wanted:
        return count, 0.0
    for i, size in enumerate(sizes):
        if found >= wanted:
            return i, 0.0
        if found + size > 2 * wanted or i == len(sizes) - 1:
            return (i, 0.0) if found >= wanted / 2 else (i, min(1.0, (wanted - found) / max(size, 1)))
        found += size
    return 0, 0.0


def num_held_out(count: int, ratio: float) -> int:
    """How many of `count` things are held out: their share, at least one, never all."""
    return min(max(1, round(ratio * count)), count - 1)
