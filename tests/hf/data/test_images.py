"""Images: labels and files, and what they may not be."""

import gzip
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as HFImage
from PIL import Image

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


def pictures(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 6, mode: str = "L") -> Path:
    """Pictures of 8 x 8, each another one, in a folder a class ("" is the folder itself)."""
    random = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = random.integers(0, 256, (8, 8) if mode == "L" else (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_a_folder_of_pictures(tmp_path: Path):
    bundle = load_images(str(pictures(tmp_path / "grey")))
    assert bundle.label_names == ("cat", "dog") and bundle.eval is not None
    assert (len(bundle.train), len(bundle.eval)) == (10, 2) and sorted(bundle.eval["labels"]) == [0, 1]
    read = {np.asarray(row["pixel_values"], dtype=np.uint8).tobytes() for row in [*bundle.train, *bundle.eval]}
    files = {_pixels(path).tobytes() for path in tmp_path.rglob("*.png")}
    assert read == files
    again = load_images(str(tmp_path / "grey"))
    assert again.train["labels"][:] == bundle.train["labels"][:]
    one = load_images(str(pictures(tmp_path / "one", ("",), mode="RGB")))
    assert one.label_names == ("image",)
    assert one.collate_fn([one.train[0]])["pixel_values"].shape == (1, 3, 8, 8)


def test_grey_pictures_beside_coloured_ones(tmp_path: Path):
    pictures(tmp_path, ("a",))
    pictures(tmp_path, ("b",), mode="RGB")
    bundle = load_images(str(tmp_path))
    grey = next(row for row in bundle.train if row["labels"] == 0)
    pixels = bundle.collate_fn([grey])["pixel_values"][0]
    assert pixels.shape == (3, 8, 8) and torch.equal(pixels[0], pixels[2])


def test_pictures_that_cannot_be_used(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images: no picture"):
        load_images(str(tmp_path / "empty"))
    folder = pictures(tmp_path / "sizes")
    Image.fromarray(np.zeros((9, 8), dtype=np.uint8)).save(folder / "dog" / "x.png")
    with pytest.raises(ValueError, match=r"x\.png'? is 9x8 .*is 8x8\. Bring all pictures to one size"):
        load_images(str(folder))
    (folder / "dog" / "x.png").write_bytes((folder / "dog" / "0.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"x\.png'? cannot be read as a picture"):
        load_images(str(folder))
    (folder / "dog" / "x.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"x\.png'? cannot be read as a picture"):
        load_images(str(folder))
    (folder / "dog" / "x.png").unlink()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(folder / "lone.png")
    with pytest.raises(ValueError, match=r"lone\.png beside subfolders"):
        load_images(str(folder))
    with pytest.raises(ValueError, match="holds one picture"):
        load_images(str(pictures(tmp_path / "single", ("",), count=1)))
    twice = pictures(tmp_path / "twice", ("",), count=1)
    (twice / "1.png").write_bytes((twice / "0.png").read_bytes())
    with pytest.raises(ValueError, match="2 images, 1 of them distinct, leave none to hold out"):
        load_images(str(twice))
    with pytest.raises(ValueError, match="is a file"):
        load_images(str(twice / "0.png"))


def test_pictures_are_scaled_and_cut_to_what_a_model_takes(tmp_path: Path):
    wide = np.repeat(np.array([0, 128, 255, 60], dtype=np.uint8), 10)[None].repeat(20, axis=0)
    turned = Image.Exif()
    turned[274] = 6  # to be turned a quarter to the right, as phones write it
    for i in range(4):
        wide[:4] = 10 * i  # equal ones would be one
        upright = i % 2 == 0
        Image.fromarray(wide if upright else np.rot90(wide)).save(
            tmp_path / f"{i}.png", exif=None if upright else turned
        )
    bundle = load_images(str(tmp_path), image=(3, 10, 10))
    assert bundle.eval is not None and "images of 10x10" in bundle.description
    for row in [*bundle.train, *bundle.eval]:
        pixels = np.asarray(row["pixel_values"])
        assert pixels.shape == (10, 10, 3)
        np.testing.assert_allclose(pixels[5:, [2, 7], 0], [[128, 255]] * 5, atol=3)


def with_metadata(folder: Path, lines: list[str], name: str = "metadata.csv") -> Path:
    """Six pictures in a folder, and what the lines say of them."""
    pictures(folder, ("",))
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


ROWS = [f"{i}.png,00{i % 2}" for i in range(6)]


def test_metadata_names_the_class_of_each_picture(tmp_path: Path):
    bundle = load_images(str(with_metadata(tmp_path / "csv", ["file_name,label", *ROWS])))
    assert bundle.label_names == ("000", "001") and bundle.eval is not None
    seen = {
        np.asarray(row["pixel_values"], dtype=np.uint8).tobytes(): row["labels"]
        for row in [*bundle.train, *bundle.eval]
    }
    assert seen == {_pixels(tmp_path / "csv" / f"{i}.png").tobytes(): i % 2 for i in range(6)}
    lines = [f'{{"file_name": "{i}.png", "text": "a {"cat" if i % 2 else "dog"}"}}' for i in range(6)]
    assert load_images(str(with_metadata(tmp_path / "jsonl", lines, "metadata.jsonl"))).label_names == (
        "a cat",
        "a dog",
    )
    numbers = [f'{{"file_name": "{i}.png", "label": {(2, 10)[i % 2]}}}' for i in range(6)]
    assert load_images(str(with_metadata(tmp_path / "ints", numbers, "metadata.jsonl"))).label_names == ("2", "10")


def test_captions_are_no_classes(tmp_path: Path):
    folder = with_metadata(tmp_path, ["file_name,text", *(f"{i}.png,picture number {i}" for i in range(6))])
    with pytest.raises(ValueError, match="another text for each of its 6 pictures, as captions are"):
        load_images(str(folder))
    bundle = load_images(str(folder), captions=True)
    assert bundle.label_names == ("image",) and "captions, which no model here reads" in bundle.description


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file_name,label", *ROWS[1:]], r"0\.png has no row in .*metadata\.csv, which has 5"),
        (["file_name,label", *ROWS, "7.png,a"], r"metadata\.csv:8 names 7\.png, which does not exist"),
        (["file_name,label", *ROWS, "0.png,a"], r"metadata\.csv:8 names 0\.png a second time"),
        (["file_name,label", *ROWS[1:], "0.png,"], r"metadata\.csv:7: 'label' is  \(str\); a class is text"),
        (["file,label", *ROWS], r"metadata\.csv:2 names no picture in 'file_name'\. Found: file, label"),
        (["file_name,label", *ROWS, "../x.png,a"], r"which is not below"),
        (["file_name,label", *ROWS, "metadata.csv,a"], r"names metadata\.csv, which is no picture"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(lines: list[str], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        load_images(str(with_metadata(tmp_path, lines)))


def test_splits_of_a_folder(tmp_path: Path):
    lines = ["file_name,label", *ROWS]
    for part in ("train", "test", "validation"):
        with_metadata(tmp_path / "own" / part, lines)
    bundle = load_images(str(tmp_path / "own"), max_rows=4)
    assert bundle.eval is not None and (len(bundle.train), len(bundle.eval)) == (4, 6)
    assert "1 pictures of another split not read (first:" in bundle.description and "validation" in bundle.description
    assert "/test)" in load_images(str(tmp_path / "own"), eval_split="validation").description
    with pytest.raises(ValueError, match=r"has no split 'dev'\. Found: test, train, validation"):
        load_images(str(tmp_path / "own"), eval_split="dev")
    (tmp_path / "own" / "test" / "metadata.csv").unlink()
    with pytest.raises(ValueError, match=r"test has no metadata\.csv, and another split has one"):
        load_images(str(tmp_path / "own"))
    pictures(tmp_path / "above", ("train", "val"))
    rows = [f"{part}/{row}" for part in ("train", "val") for row in ROWS]
    (tmp_path / "above" / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    bundle = load_images(str(tmp_path / "above"))
    assert bundle.label_names == ("000", "001") and bundle.eval is not None
    assert (len(bundle.train), len(bundle.eval)) == (6, 6)
    pictures(tmp_path / "flat", ("train", "test"), mode="RGB")  # of no class, as for a diffusion model
    bundle = load_images(str(tmp_path / "flat"))
    assert bundle.label_names == ("image",) and (len(bundle.train), len(bundle.eval or ())) == (6, 6)


def test_pictures_out_of_place_are_named(tmp_path: Path):
    pictures(tmp_path / "deep", ("cat/old", "dog"))
    with pytest.raises(ValueError, match=r"cat/old/0\.png lies below the class 'cat'"):
        load_images(str(tmp_path / "deep"))
    pictures(tmp_path / "below")
    (tmp_path / "below" / "cat" / "metadata.csv").write_text("file_name,label\n0.png,a\n")
    with pytest.raises(ValueError, match=r"cat/metadata\.csv is read neither with"):
        load_images(str(tmp_path / "below"))
    (tmp_path / "below" / "cat" / "metadata.csv").rename(tmp_path / "below" / "cat" / "notes.txt")
    assert "1 files that are no pictures not read (first:" in load_images(str(tmp_path / "below")).description


def test_tables_with_splits_and_labels_of_text(tmp_path: Path):
    files = sorted(pictures(tmp_path / "pictures").rglob("*.png"))
    kinds = Features({"image": HFImage(), "label": Value("string")})
    columns = {"image": [str(f) for f in files], "label": [f.parent.name for f in files]}
    table = Dataset.from_dict(columns, features=kinds)
    DatasetDict({"train": table, "test": table.select(range(6))}).save_to_disk(str(tmp_path / "saved"))
    bundle = load_images(str(tmp_path / "saved"), eval_split="test")
    assert bundle.label_names == ("cat", "dog") and (len(bundle.train), len(bundle.eval or ())) == (12, 6)
    table.to_parquet(str(tmp_path / "one.parquet"))
    bundle = load_images(str(tmp_path / "one.parquet"))
    assert bundle.label_names == ("cat", "dog") and (len(bundle.train), len(bundle.eval or ())) == (10, 2)
    with pytest.raises(ValueError, match=r"dataset_revision=main: .*is on this machine"):
        load_images(str(tmp_path / "one.parquet"), revision="main")


def test_a_saved_data_set(tmp_path: Path):
    folder = pictures(tmp_path / "pictures")
    files = sorted(folder.rglob("*.png"))
    kinds = Features({"picture": HFImage(), "kind": ClassLabel(names=["cat", "dog"])})
    columns = {"picture": [str(f) for f in files], "kind": [int(f.parent.name == "dog") for f in files]}
    Dataset.from_dict(columns, features=kinds).save_to_disk(str(tmp_path / "saved"))
    bundle = load_images(str(tmp_path / "saved"))
    assert bundle.label_names == ("cat", "dog") and len(bundle.train) == 10
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(ValueError, match=r"has no column of images\. Its columns: text"):
        load_images(str(tmp_path / "text"))


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="scikit-learn's, which is not installed"):
        load_images("digits")


def test_digits_of_scikit_learn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    place = tmp_path / "datasets" / "data"
    place.mkdir(parents=True)
    table = np.concatenate([np.random.default_rng(0).integers(0, 17, (40, 64)), np.arange(40)[:, None] % 10], axis=1)
    np.savetxt(place / "digits.csv.gz", table, delimiter=",", fmt="%d")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    bundle = load_images("digits")
    assert bundle.num_labels == 10 and len(bundle.train) == 30  # one of four of each
    pixels = bundle.collate_fn(list(bundle.train))["pixel_values"]
    assert pixels.shape[1:] == (1, 8, 8) and (float(pixels.min()), float(pixels.max())) == (-1.0, 1.0)


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)
