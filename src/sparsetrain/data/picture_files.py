"""Which pictures a folder means, and the class of each: its subfolder's name, or what `metadata.csv` says of it.

Folders are laid out as for `datasets`' imagefolder, whose splits they name. Its reader is not used: it leaves out
pictures without a row of the metadata and reads `007` as 7 (docs/decisions/0011-data-files.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsetrain.core.quote import quoted
from sparsetrain.data.files import shown, walk_files
from sparsetrain.data.labelled import in_order
from sparsetrain.data.remarks import Remarks
from sparsetrain.data.rows import Row, read_rows

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv")
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
"""Split -> the folders that hold it; of several, the first one behind `train` is held out."""
_CLASS = ("label", "text")
"""Columns of the metadata that say a class, the first one that is there."""

Labelled = tuple[str, Path]
"""A picture's class, "" for none, and its file."""


@dataclass(frozen=True, kw_only=True)
class PictureFiles:
    """Files to train on, those of a split that is held out (None: a share is), and the classes of the first, in the
    order of their numbers: of names as imagefolder has it, of whole numbers in metadata by value."""

    train: list[Labelled]
    held_out: list[Labelled] | None
    by_folder: bool

    @property
    def names(self) -> tuple[str, ...]:
        found = {name for name, _ in self.train}
        return tuple(sorted(found)) if self.by_folder else in_order(found)


def has_pictures(folder: Path) -> bool:
    """Does a folder, or one below it, hold a picture file?"""
    return any(map(_is_picture, walk_files(folder)))


def find_pictures(
    folder: Path, *, split: str = "train", held_out: str | None = None, captions: bool = False, remarks: Remarks
) -> PictureFiles:
    """The pictures of a folder, each with its class, in the order of their names.

    Args:
        split, held_out: which parts of a folder with `train/` and others; held_out=None: `test`, else `validation`.
        captions: a column `text` need not name classes; if it does not, all pictures are of one kind.
        remarks: told what was seen and not used.

    Raises:
        ValueError: a picture without a class beside others that have one, metadata that does not fit the pictures, or
            no such split.
    """
    places = _splits(folder)
    files, by_folder = _classed(folder, places, captions, remarks)
    if not places:
        if asked := held_out or (split if split != "train" else None):
            raise ValueError(f"{shown(folder)} has no split {asked!r}: no folder train/ beside others. Leave it out.")
        return PictureFiles(train=files[""], held_out=None, by_folder=by_folder)
    held_out = held_out or next((name for name in SPLITS if name in places and name != split), None)
    for name in filter(None, (split, held_out)):
        if name not in places:
            raise ValueError(f"{shown(folder)} has no split {name!r}. Found: {', '.join(places)}. Name one of these.")
    for name in places.keys() - {split, held_out}:
        remarks.add("pictures of another split not read", places[name])
    kept = None if held_out is None else files[held_out]
    return PictureFiles(train=files[split], held_out=kept, by_folder=by_folder)


def _splits(folder: Path) -> dict[str, Path]:
    """Split -> its folder, where all subfolders are such and one is `train`; else they are classes, or there are none.

    Raises:
        ValueError: two folders are of one split.
    """
    names = {name: split for split, spelled in SPLITS.items() for name in spelled}
    found = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    places = {names[path.name.lower()]: path for path in found if path.name.lower() in names}
    if "train" not in places or any(path.name.lower() not in names for path in found):
        return {}
    if len(places) < len(found):
        listed = ", ".join(path.name for path in found)
        raise ValueError(f"{shown(folder)} has two folders for one split: {quoted(listed)}. Put them into one.")
    return places


def _classed(
    folder: Path, places: dict[str, Path], captions: bool, remarks: Remarks
) -> tuple[dict[str, list[Labelled]], bool]:
    """The classed files of each split (under "" without splits), and whether folders are the classes."""
    places = places or {"": folder}
    if metadata := _metadata(folder):
        labels = _by_metadata(metadata, captions, remarks)
        parts = {name: [file for file in labels if file[1].is_relative_to(place)] for name, place in places.items()}
        lone = next((path for _, path in labels if not any(map(path.is_relative_to, places.values()))), None)
        if lone is not None:
            raise ValueError(f"{shown(lone)} lies beside the splits {', '.join(places)}. Put it into one of them.")
        return parts, False
    own = {name: _metadata(place) for name, place in places.items()}
    if any(own.values()) and not all(own.values()):
        without = next(places[name] for name, found in own.items() if found is None)
        raise ValueError(f"{shown(without)} has no {METADATA[1]}, and another split has one. Give each split its own.")
    if all(own.values()):
        return {name: _by_metadata(found, captions, remarks) for name, found in own.items() if found}, False
    return {name: _by_folder(place, remarks) for name, place in places.items()}, True


def _metadata(folder: Path) -> Path | None:
    """The metadata that lies in a folder itself."""
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if (folder / "metadata.parquet").is_file():
        raise ValueError(f"{shown(folder / 'metadata.parquet')} is not read here. Write it as {METADATA[1]}.")
    if len(found) > 1:
        raise ValueError(f"{shown(folder)} has {' and '.join(METADATA)}. Keep the one that holds.")
    return found[0] if found else None


def _by_folder(folder: Path, remarks: Remarks) -> list[Labelled]:
    """Pictures of class folders, or of none, in the order of their names."""
    files = []
    for path in _pictures(folder, None, remarks):
        *above, _ = path.relative_to(folder).parts
        if len(above) > 1:
            raise ValueError(
                f"{shown(path)} lies below the class {quoted(above[0])!r}, in a folder of its own. Move it up, or name "
                f"the class of each picture in {METADATA[1]}."
            )
        files.append((above[0] if above else "", path))
    lone = next((path for name, path in files if not name), None)
    if lone is not None and any(name for name, _ in files):
        raise ValueError(
            f"{shown(folder)} holds {quoted(lone.name)} beside subfolders with pictures, which are classes. Put it "
            "into one of them."
        )
    return files


def _by_metadata(metadata: Path, captions: bool, remarks: Remarks) -> list[Labelled]:
    """Pictures in the order of the rows; all of one kind where no column says a class.

    Raises:
        ValueError: a row without picture or class, a picture without a row or with two, or texts that are captions.
    """
    folder, rows = metadata.parent, list(read_rows(metadata, remarks))
    column = next((name for name in _CLASS if name in rows[0][0]), None)
    found: dict[Path, str] = {}
    for row in rows:
        path = _picture_of(row, folder)
        if path in found:
            raise ValueError(f"{row[1]} names {quoted(str(row[0]['file_name']))} a second time. Keep one row of it.")
        found[path] = "" if column is None else _class_of(row, column)
    if lone := next((path for path in _pictures(folder, metadata, remarks) if path not in found), None):
        raise ValueError(
            f"{shown(lone)} has no row in {shown(metadata)}, which has {len(rows):,}. Add it, or take the picture out."
        )
    if column is None:
        remarks.add(f"{metadata.name} without a column label, so all pictures are of one kind", metadata)
    elif column == "text" and len(set(found.values())) == len(found):
        if not captions:
            raise ValueError(
                f"{shown(metadata)} has another text for each of its {len(found):,} pictures, as captions are, and "
                "what is learned here is a class. Name each picture's in a column label."
            )
        remarks.add(f"{metadata.name} with captions, which no model here reads", metadata)
        found = dict.fromkeys(found, "")
    return [(label, path) for path, label in found.items()]


def _picture_of(row: Row, folder: Path) -> Path:
    """The picture below a folder that a row names."""
    name = row[0].get("file_name")
    if not isinstance(name, str) or not name.strip():
        columns = quoted(", ".join(map(str, row[0])))
        raise ValueError(f"{row[1]} names no picture in 'file_name'. Found: {columns}. Give its path from that folder.")
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{row[1]} names {quoted(name)}, which is not below {shown(folder)}. Put the picture there.")
    if not path.exists() or not _is_picture(path):
        what = f"is no picture ({', '.join(SUFFIXES)})" if path.exists() else "does not exist"
        raise ValueError(f"{row[1]} names {quoted(name)}, which {what}. Correct the row, or take it out.")
    return path


def _class_of(row: Row, column: str) -> str:
    label = row[0].get(column)
    if not isinstance(label, str | int) or not str(label).strip():
        raise ValueError(
            f"{row[1]}: {column!r} is {quoted(label, 60)} ({type(label).__name__}); a class is text or a whole number. "
            "Correct the row."
        )
    return str(label)


def _pictures(folder: Path, metadata: Path | None, remarks: Remarks) -> list[Path]:
    found = []
    for path in walk_files(folder, remarks=remarks):
        if _is_picture(path):
            found.append(path)
        elif path.name in METADATA and path != metadata:
            raise ValueError(
                f"{shown(path)} is read neither with {shown(folder)} nor with a split of its own. Have one in the "
                "folder that is given, or one in each split."
            )
        elif path != metadata:
            remarks.add("files that are no pictures not read", path)
    return found


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES
