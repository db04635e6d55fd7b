"""Files of strangers are refused before they block, fill the memory or the stack."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sparsetrain.core.plain_files import MOST_LEVELS, read_plain_json, read_plain_object, regular_file


def test_plain_values_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, {"b": null}]}')
    (tmp_path / "link.json").symlink_to(tmp_path / "a.json")  # a hub's cache is made of links
    assert (
        read_plain_object(tmp_path / "a.json") == read_plain_object(tmp_path / "link.json") == {"a": [1, {"b": None}]}
    )


def test_only_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "empty").touch()
    for name, words in {
        "pipe": "no regular file",
        "folder": "no regular file",
        "zero": "no regular file",
        "gone": "leads nowhere",
        "loop": "leads nowhere",
        "empty": "is empty",
        "absent": "cannot be read",
        "nul\0": "cannot be read",
    }.items():
        with pytest.raises(ValueError, match=words):
            read_plain_json(tmp_path / name)


def test_size_and_depth_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[1, 2, 3]")
    assert regular_file(path, 9) == path
    with pytest.raises(ValueError, match=r"has 9 bytes; at most 8"):
        read_plain_json(path, 8)
    for levels in (MOST_LEVELS + 1, 500, 200_000):
        path.write_text("[" * levels + "]" * levels)
        with pytest.raises(ValueError, match="nested deeper"):
            read_plain_json(path)
    path.write_text("[" * (MOST_LEVELS - 1) + "]" * (MOST_LEVELS - 1))
    read_plain_json(path)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"nul", b'{"a": "\x1b[31m'])
def test_what_is_no_json_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as JSON") as caught:
        read_plain_json(tmp_path / "a.json")
    assert str(caught.value).isprintable()


def test_an_object_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"holds list, no JSON object"):
        read_plain_object(tmp_path / "a.json")
