"""The benchmark of SaRA on a diffusion model: its index, its data and its cells."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from bench.methods.sara_diffusion import BENCHMARKS, SIZES, indices, vlhi, write_classes
from bench.runner import asked_of, cells_of
from sparsetrain.hf.data import load_images


def test_the_index_is_that_of_the_page() -> None:
    """(max F - F) / (max F - min F) + (C - min C) / (max C - min C), C = -FID on the old images."""
    found = vlhi(
        {
            "a": {"fid_new": 10.0, "fid_old": 8.0},
            "b": {"fid_new": 20.0, "fid_old": 2.0},
            "c": {"fid_new": 12.5, "fid_old": 5.0},
        }
    )
    assert found == pytest.approx({"a": 1.0, "b": 1.0, "c": 0.75 + 0.5})
    assert vlhi({"a": {"fid_new": 1.0, "fid_old": 1.0}}) == {"a": 0.0}


def test_every_size_has_every_arm_and_three_seeds() -> None:
    keys = [cell.key for cell in cells_of(BENCHMARKS[0], asked_of(BENCHMARKS[0]))]
    assert len(keys) == len(set(keys)) and len(SIZES) == 3
    for seed in range(3):
        assert {f"pretrained {seed}", f"full all {seed}"} <= set(keys)
        assert {f"{arm} {size} {seed}" for arm in ("sara", "lora") for size in SIZES} <= set(keys)


def test_a_seed_that_lacks_an_arm_has_no_index() -> None:
    known = {f"{arm} small 0": {"fid_new": float(i), "fid_old": 1.0} for i, arm in enumerate(("sara", "lora"))}
    known["sara lr=1e-3 small 0"] = {"fid_new": 9.0, "fid_old": 9.0}
    assert indices(known) == {}
    known["full all 0"] = {"fid_new": 4.0, "fid_old": 1.0}
    assert indices(known) == {"small": {"sara": [1.0], "lora": [0.75], "full": [0.0]}}


def test_some_classes_alone(tmp_path: Path) -> None:
    for prefix, count in (("train", 20), ("t10k", 10)):
        labels = (np.arange(count) % 5).astype(np.uint8)
        for name, array in (("images-idx3", np.arange(count * 16, dtype=np.uint8).reshape(count, 4, 4)),
                            ("labels-idx1", labels)):  # fmt: skip
            header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
            (tmp_path / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    bundle = load_images(str(write_classes(tmp_path, tmp_path / "some", [1, 3])))
    assert bundle.eval is not None and bundle.num_labels == 4
    assert sorted(bundle.train["labels"]) == [1] * 4 + [3] * 4 and sorted(bundle.eval["labels"]) == [1, 1, 3, 3]
    assert {row["labels"] for row in bundle.train if row["pixel_values"][0][0] == 16} == {1}
