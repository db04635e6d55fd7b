"""Tasks against independent solvers of them, and the Long Range Arena's readers on tiny copies of its files."""

from __future__ import annotations

from collections import Counter, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsetrain.data.tasks import LRA_TASKS, TASKS, pathfinder
from sparsetrain.data.tasks.listops import TOKENS
from sparsetrain.hf.data.tasks import load_task

NAMES = {i: token for token, i in TOKENS.items()}


def value_of(tokens: list[str]) -> int:
    """With a stack: a closing bracket reduces what lies above the last operator."""
    stack: list[Any] = []
    for token in tokens:
        if token != "]":
            stack.append(token if token.startswith("[") else int(token))
            continue
        numbers = []
        while not isinstance(stack[-1], str):
            numbers.append(stack.pop())
        ordered = sorted(numbers)
        middle = len(ordered) // 2
        median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) // 2
        stack.append({"[MIN": ordered[0], "[MAX": ordered[-1], "[MED": median, "[SM": sum(numbers) % 10}[stack.pop()])
    (found,) = stack
    return found


def test_listops_are_worth_what_they_say() -> None:
    bundle = load_task("listops", seq_len=256, max_rows=300, max_eval_rows=100)
    assert bundle.vocab_size == 16 and bundle.num_labels == 10
    assert bundle.eval is not None and len(bundle.train) == 300 and len(bundle.eval) == 100
    for row in [*bundle.train, *bundle.eval]:
        ids: list[int] = row["input_ids"]  # type: ignore[call-overload]
        assert 64 <= len(ids) <= 256
        assert value_of([NAMES[i] for i in ids]) == row["labels"]  # type: ignore[call-overload]
    rows = [tuple(ids) for side in (bundle.train, bundle.eval) for ids in side["input_ids"]]
    assert len(set(rows)) == 400
    assert len(Counter(bundle.train["labels"])) == 10 and "by class" in bundle.description


def reaches(curves: np.ndarray, start: tuple[int, int], goal: tuple[int, int]) -> bool:
    """Flood fill over eight neighbours."""
    seen, waiting = {start}, deque([start])
    while waiting:
        r, c = waiting.popleft()
        for near in ((r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
            inside = 0 <= near[0] < len(curves) and 0 <= near[1] < len(curves)
            if inside and near not in seen and curves[near]:
                seen.add(near)
                waiting.append(near)
    return goal in seen


def test_pathfinder_dots_are_connected_as_labelled() -> None:
    generator = np.random.default_rng(3)
    for i in range(100):
        drawing = pathfinder.draw(32, bool(i % 2), generator)
        assert drawing.curves[drawing.dots[0]] and drawing.curves[drawing.dots[1]]
        assert reaches(drawing.curves, *drawing.dots) == drawing.connected == bool(i % 2)
        assert drawing.image.shape == (32, 32) and 40 < (drawing.image > 0).sum() < 300
    bundle = load_task("pathfinder", seq_len=1024, max_rows=40, max_eval_rows=10)
    assert Counter(bundle.train["labels"]) == {0: 20, 1: 20}
    assert all(len(ids) == 1024 for ids in bundle.train["input_ids"])


def test_retrieval_pairs_are_excerpts_of_held_apart_files() -> None:
    bundle = load_task("retrieval", seq_len=128, max_rows=60, max_eval_rows=20)
    assert bundle.kind == "pairs" and Counter(bundle.train["labels"]) == {0: 30, 1: 30}
    batch = bundle.collate_fn([bundle.train[i] for i in range(4)])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "input_ids_b", "attention_mask_b"}
    assert batch["input_ids"].shape == batch["attention_mask"].shape and batch["labels"].shape == (4,)
    assert bundle.eval is not None
    known = {bytes(i - 1 for i in ids) for ids in bundle.train["input_ids"]}
    held_out = {bytes(i - 1 for i in ids) for ids in bundle.eval["input_ids"]}
    assert not known & held_out


def test_text_and_pixels_come_from_embedded_data() -> None:
    text = load_task("text", seq_len=200, max_rows=50, max_eval_rows=20)
    assert text.num_labels == 2 and text.vocab_size == 257 and text.counts["rows_cut"] > 50
    assert all(0 < len(ids) <= 200 and min(ids) > 0 for ids in text.train["input_ids"])
    small, whole = (load_task("pixels", seq_len=n, max_rows=20, max_eval_rows=5) for n in (196, 784))
    assert small.num_labels == 10 and small.train["labels"] == whole.train["labels"]
    image, means = np.asarray(whole.train["input_ids"][0]) - 1, np.asarray(small.train["input_ids"][0]) - 1
    assert image.shape == (784,) and image.max() <= 255
    assert means[0] == image.reshape(28, 28)[:2, :2].mean().round()


@pytest.mark.parametrize("name", TASKS)
def test_rows_follow_from_the_seed(name: str) -> None:
    length = {"pixels": 196, "pathfinder": 256}.get(name, 64)
    one, same, other = (load_task(name, seq_len=length, max_rows=12, max_eval_rows=4, seed=s) for s in (0, 0, 1))
    assert one.train.to_dict() == same.train.to_dict() != other.train.to_dict()
    assert max(max(ids) for ids in one.train["input_ids"]) < one.vocab_size


def lra_folder(name: str, folder: Path) -> int:
    """Write a tiny copy of a task's files; returns a seq_len that fits them."""
    if name == "lra-listops":
        line = "Source\tTarget\n( ( ( [MAX 2 ) 9 ) ] )\t9\n( ( ( [SM 7 ) 5 ) ] )\t2\n"
        for part in ("train", "val", "test"):
            (folder / f"basic_{part}.tsv").write_text(line)
        return 32
    if name == "lra-retrieval":
        for part in ("train", "eval", "test"):
            lines = '1.0\ta\tb\tthe "first text\tthe second\n0.0\ta\tc\tthe first\tanother\n'
            (folder / f"new_aan_pairs.{part}.tsv").write_text(lines)
        return 32
    if name == "lra-text":
        for part in ("train", "test"):
            for label in ("pos", "neg"):
                (folder / part / label).mkdir(parents=True)
                (folder / part / label / "0_1.txt").write_text(f"a {label} review")
        return 32
    if name == "lra-image":
        rng = np.random.default_rng(0)
        for file in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
            records = rng.integers(0, 256, (2, 3073), dtype=np.uint8)
            records[:, 0] %= 10
            (folder / file).write_bytes(records.tobytes())
        return 1024
    from PIL import Image

    (folder / "metadata").mkdir()
    (folder / "imgs" / "0").mkdir(parents=True)
    lines = []
    for i in range(10):
        Image.fromarray(np.full((32, 32), 20 * i, dtype=np.uint8)).save(folder / "imgs" / "0" / f"sample_{i}.png")
        lines.append(f"imgs/0 sample_{i}.png {i} {i % 2} 1 2 3")
    (folder / "metadata" / "0.npy").write_text("\n".join(lines))
    return 1024


@pytest.mark.parametrize("name", LRA_TASKS)
def test_the_arenas_files_are_read(name: str, tmp_path: Path) -> None:
    length = lra_folder(name, tmp_path)
    bundle = load_task(name, seq_len=length, folder=tmp_path)
    assert bundle.eval is not None and len(bundle.train) >= 2 and len(bundle.eval) >= 1
    batch = bundle.collate_fn([bundle.train[i] for i in range(2)])
    assert batch["input_ids"].max() < bundle.vocab_size and batch["labels"].max() < bundle.num_labels
    if name == "lra-listops":
        rows = {tuple(row["input_ids"]): row["labels"] for row in bundle.train}  # type: ignore[call-overload]
        assert all(value_of([NAMES[i] for i in ids]) == label for ids, label in rows.items())
    if name == "lra-retrieval":
        assert bytes(i - 1 for i in bundle.train["input_ids_b"][0]).decode() in ("the second", "another")
    if name == "lra-image":
        assert set(map(len, bundle.train["input_ids"])) == {1024} and len(bundle.train) == 10
    if name == "lra-pathfinder":
        assert sorted(ids[0] - 1 for ids in bundle.train["input_ids"]) == [20 * i for i in range(9)]


@pytest.mark.parametrize("name", LRA_TASKS)
def test_missing_and_broken_files_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist|holds no"):
        load_task(name, seq_len=1024, folder=tmp_path)
    lra_folder(name, tmp_path)
    file = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".txt")
    if not file:
        return  # a review may hold any text
    for path in file:
        path.write_bytes(b"\x93NUMPY broken" if path.suffix == ".npy" else b"broken\n")
    with pytest.raises(ValueError, match=r"no ListOps row|not label|no multiple|NumPy array|no image"):
        load_task(name, seq_len=1024, folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("listop", {}, "Did you mean 'listops'|listops"),
        ("pixels", {"seq_len": 100}, "784"),
        ("pathfinder", {"seq_len": 1000}, "no square"),
        ("lra-text", {}, "data_folder"),
        ("listops", {"folder": "x"}, "lra-listops"),
        ("listops", {"max_rows": 0}, "at least 1"),
        ("listops", {"seq_len": 4}, "shortest"),
    ],
)
def test_bad_questions(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(name, **{"seq_len": 64, **options})
