"""Pathfinder-style images (arXiv 1805.08315) as sequences: are two dots the ends of the same dashed curve?

Two dashed curves and distracting dashes on a grid; each of two dots marks an end. The curves keep their distance, so
the answer is that of a flood fill over the curves drawn without gaps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from sparsetrain.data.tasks.rows import BYTES, Rows, TaskRows, task_rows

DASH, GAP = 3, 1
"""Pixels along a curve that are drawn, and that are left out."""

APART = 2
"""Curves and distractors keep more than this many pixels between them."""

TURN = 0.25
"""Standard deviation of a curve's change of direction, radians a pixel."""


class Drawing(NamedTuple):
    """image: uint8 [side, side]. curves: bool [side, side], without gaps, dots and distractors. dots: (row, column)."""

    image: np.ndarray
    curves: np.ndarray
    dots: tuple[tuple[int, int], tuple[int, int]]
    connected: bool


def load(*, seq_len: int, max_rows: int | None, max_eval_rows: int | None, seed: int) -> TaskRows:
    """Square images of `seq_len` pixels: 1,024 for 32 x 32. Half are connected.

    Raises:
        ValueError: `seq_len` is no square, or too small for two curves.
    """
    side = math.isqrt(seq_len)
    if side * side != seq_len or side < 16:
        raise ValueError(f"pathfinder: seq_len={seq_len} is no square image. Use 1024 (32 x 32), or side² of 16 up.")
    sides = [
        _rows(count, side, np.random.default_rng(entropy))
        for count, entropy in ((max_rows or 10_000, [seed, 1]), (max_eval_rows or 1_000, [2]))
    ]
    return task_rows("pathfinder", *sides, vocab_size=BYTES, label_names=("apart", "connected"))


def _rows(count: int, side: int, generator: np.random.Generator) -> Rows:
    drawings = [draw(side, bool(i % 2), generator) for i in range(count)]
    ids = np.stack([drawing.image.reshape(-1) for drawing in drawings]).astype(np.int64) + 1
    return Rows(ids, [int(drawing.connected) for drawing in drawings])


def draw(side: int, connected: bool, generator: np.random.Generator) -> Drawing:
    """One image; everything is drawn from the generator."""
    while True:
        taken = np.zeros((side, side), dtype=bool)
        paths = [_path(taken, side // 2, generator) for _ in range(2)]
        if all(paths):
            break
    image, curves = np.zeros((side, side), dtype=np.uint8), np.zeros((side, side), dtype=bool)
    for path in paths:
        for i, (row, column) in enumerate(path):
            curves[row, column] = True
            if i % (DASH + GAP) < DASH:
                image[row, column] = generator.integers(160, 256)
    for _ in range(side // 4):
        for row, column in _path(taken, DASH, generator):
            image[row, column] = generator.integers(160, 256)
    ends = [path[0] for path in paths] if not connected else [paths[0][0], paths[0][-1]]
    for row, column in ends:
        image[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = 255
    return Drawing(image, curves, (ends[0], ends[1]), connected)


def _path(taken: np.ndarray, length: int, generator: np.random.Generator, tries: int = 20) -> list[tuple[int, int]]:
    """A smooth walk over free pixels, which it then takes with a margin; [] if none was found."""
    side = len(taken)
    for _ in range(tries):
        row, column = generator.uniform(2, side - 3, 2)
        angle = generator.uniform(0, 2 * math.pi)
        turns = generator.normal(0, TURN, 2 * length)
        path: list[tuple[int, int]] = []
        for turn in turns:
            here = (round(row), round(column))
            if not (1 <= here[0] < side - 1 and 1 <= here[1] < side - 1) or taken[here] or here in path[:-1]:
                break
            if not path or path[-1] != here:
                path.append(here)
            if len(path) == length:
                for r, c in path:
                    taken[max(0, r - APART) : r + APART + 1, max(0, c - APART) : c + APART + 1] = True
                return path
            angle += turn
            row, column = row + math.sin(angle), column + math.cos(angle)
    return []
