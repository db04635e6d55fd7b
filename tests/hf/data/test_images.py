"""Images: labels and files, and what they may not be."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsetrain.hf.data import load_images
from tests.hf.data.files import (
    need,
)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def test_images_from_idx_files(tmp_path: Path):
    for prefix, num in (("train", 6), ("t10k", 3)):
        images = np.arange(num * 20).reshape(num, 4, 5)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(num) % 3)
    bundle = load_images(str(tmp_path), max_rows=4)
    assert bundle.label_names == ("0", "1", "2") and bundle.eval is not None
    assert (len(bundle.train), len(bundle.eval)) == (4, 3)
    batch = bundle.collate_fn(list(bundle.eval))
    assert batch["pixel_values"].shape == (3, 1, 4, 5)
    original = torch.arange(60).reshape(3, 1, 4, 5)
    order = [int(label) for label in batch["labels"]]
    torch.testing.assert_close((batch["pixel_values"] + 1) * 127.5, original[order].float(), rtol=0, atol=1e-4)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\1\0\0\0\x05ab"))
    with pytest.raises(ValueError, match=r"promises \(5,\) and holds 2 bytes"):
        load_images(str(tmp_path))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="is not a whole gzip file"):
        load_images(str(tmp_path))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match="does not exist"):
        load_images(str(tmp_path))


@pytest.mark.assets
def test_fashion_mnist():
    need("fashion-mnist")
    bundle = load_images("fashion-mnist", max_rows=100, max_eval_rows=10)
    assert bundle.num_labels == 10
    assert bundle.collate_fn([bundle.train[0]])["pixel_values"].shape == (1, 1, 28, 28)
