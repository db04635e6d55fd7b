"""Readers of the Long Range Arena's own files (arXiv 2011.04006), for those who have fetched them.

Nothing is unpickled. Held-out rows are the release's validation part, or its test part where there is no other.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sparsetrain.core.quote import quoted
from sparsetrain.data.files import check_regular, shown
from sparsetrain.data.reading import read_text
from sparsetrain.data.tasks.listops import TOKENS
from sparsetrain.data.tasks.pixels import load_cifar
from sparsetrain.data.tasks.rows import BYTES, Rows, TaskRows, byte_ids, chosen, task_rows

load_image = load_cifar


def load_listops(*, folder: Path, seq_len: int, max_rows: int | None, max_eval_rows: int | None, seed: int) -> TaskRows:
    """`basic_train.tsv` and `basic_val.tsv`: columns Source and Target; parentheses carry nothing and are left out.

    Raises:
        ValueError: a missing or malformed file.
    """
    sides, num_cut = [], 0
    for part, limit in (("train", max_rows), ("val", max_eval_rows)):
        path = folder / f"basic_{part}.tsv"
        ids, labels = [], []
        for number, row in enumerate(_tsv(path), start=1):
            if number == 1 and row[:2] == ["Source", "Target"]:
                continue
            try:
                ids.append([TOKENS[token] for token in row[0].split() if token not in ("(", ")")])
                labels.append(_label(row[1], 10))
            except (KeyError, ValueError, IndexError) as error:
                raise ValueError(
                    f"{shown(path)} line {number} is no ListOps row ({error!r}). Fetch it again."
                ) from None
        kept = chosen(len(ids), limit, np.random.default_rng(seed))
        num_cut += sum(len(ids[i]) > seq_len for i in kept)
        sides.append(Rows([ids[i][:seq_len] for i in kept], [labels[i] for i in kept]))
    names = [str(i) for i in range(10)]
    return task_rows("lra-listops", *sides, vocab_size=len(TOKENS) + 1, label_names=names, rows_cut=num_cut)


def load_retrieval(
    *, folder: Path, seq_len: int, max_rows: int | None, max_eval_rows: int | None, seed: int
) -> TaskRows:
    """`new_aan_pairs.train.tsv` and `.eval.tsv`: label, two ids, two texts; byte by byte.

    Raises:
        ValueError: a missing or malformed file.
    """
    sides = []
    for part, limit in (("train", max_rows), ("eval", max_eval_rows)):
        path = folder / f"new_aan_pairs.{part}.tsv"
        first, second, labels = [], [], []
        for number, row in enumerate(_tsv(path), start=1):
            try:
                label, _, _, a, b = row
                labels.append(_label(label, 2))
            except ValueError as error:
                raise ValueError(
                    f"{shown(path)} line {number} is not label, id, id, text, text ({error}). Fetch it again."
                ) from None
            first.append(byte_ids(a, seq_len))
            second.append(byte_ids(b, seq_len))
        kept = chosen(len(labels), limit, np.random.default_rng(seed))
        sides.append(Rows([first[i] for i in kept], [labels[i] for i in kept], [second[i] for i in kept]))
    return task_rows("lra-retrieval", *sides, vocab_size=BYTES, label_names=("unrelated", "cited"))


def load_text(*, folder: Path, seq_len: int, max_rows: int | None, max_eval_rows: int | None, seed: int) -> TaskRows:
    """The IMDB reviews' folders `train/pos`, `train/neg`, `test/pos`, `test/neg`, a .txt file a review; byte by byte.

    Raises:
        ValueError: a folder without reviews.
    """
    sides = []
    for part, limit in (("train", max_rows), ("test", max_eval_rows)):
        files = []
        for label, name in enumerate(("neg", "pos")):
            found = sorted((folder / part / name).glob("*.txt"))
            if not found:
                raise ValueError(
                    f"{folder / part / name} holds no .txt files. Give the folder that holds train/ and test/."
                )
            files += [(path, label) for path in found]
        kept = [files[i] for i in chosen(len(files), limit, np.random.default_rng(seed))]
        ids = [byte_ids(read_text(path), seq_len) for path, _ in kept]
        sides.append(Rows(ids, [label for _, label in kept]))
    return task_rows("lra-text", *sides, vocab_size=BYTES, label_names=("negative", "positive"))


def load_pathfinder(
    *, folder: Path, seq_len: int, max_rows: int | None, max_eval_rows: int | None, seed: int
) -> TaskRows:
    """A Pathfinder folder such as `pathfinder32/curv_contour_length_14`: `metadata/*.npy` and the images they name.

    The metadata files hold lines of text despite their name: folder, file, index, label, … Nine tenths are trained on,
    the last tenth is held out.

    Raises:
        ValueError: missing or malformed files, or images that do not have `seq_len` pixels.
    """
    entries = _pathfinder_entries(folder)
    cut = max(1, len(entries) // 10)
    sides = []
    for part, limit in ((entries[:-cut], max_rows), (entries[-cut:], max_eval_rows)):
        kept = [part[i] for i in chosen(len(part), limit, np.random.default_rng(seed))]
        sides.append(Rows([_grey(path, seq_len) for path, _ in kept], [label for _, label in kept]))
    return task_rows("lra-pathfinder", *sides, vocab_size=BYTES, label_names=("apart", "connected"))


def _pathfinder_entries(folder: Path) -> list[tuple[Path, int]]:
    files = sorted((folder / "metadata").glob("*.npy"), key=lambda path: (len(path.stem), path.stem))
    if not files:
        raise ValueError(f"{folder / 'metadata'} holds no .npy files. Give a folder such as curv_contour_length_14.")
    entries = []
    for file in files:
        for number, line in enumerate(read_text(file).splitlines(), start=1):
            words = line.split()
            try:
                entries.append((folder / words[0] / words[1], _label(words[3], 2)))
            except (IndexError, ValueError):
                raise ValueError(
                    f"{shown(file)} line {number}: '{quoted(line, 60)}' is not folder, file, index, label."
                ) from None
    if len(entries) < 2:
        raise ValueError(f"{folder / 'metadata'} names {len(entries)} images. At least 2 are needed.")
    return entries


def _grey(path: Path, seq_len: int) -> list[int]:
    from PIL import Image

    check_regular(path)
    try:
        with Image.open(path) as image:
            size = image.width * image.height
            pixels = np.asarray(image.convert("L") if size == seq_len else [], dtype=np.int64)
    except Exception as error:  # Pillow's own, and Python's from broken headers
        raise ValueError(f"{shown(path)} is no image that can be read: {quoted(str(error))}") from None
    if size != seq_len:
        raise ValueError(f"lra-pathfinder: {shown(path)} has {size} pixels, and seq_len={seq_len}. Make them equal.")
    return (pixels.reshape(-1) + 1).tolist()


def _tsv(path: Path) -> list[list[str]]:
    if not path.exists():
        raise ValueError(f"{shown(path)} does not exist. Give the folder of the task's .tsv files.")
    return [line.split("\t") for line in read_text(path).removesuffix("\n").split("\n")]


def _label(text: str, classes: int) -> int:
    value = float(text)
    if not 0 <= value < classes or value != int(value):
        raise ValueError(f"label {text!r} is not one of 0 to {classes - 1}")
    return int(value)
