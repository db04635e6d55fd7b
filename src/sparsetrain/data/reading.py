"""Content of files, checked as it is read: text whole or line by line, JSON values. What ends in .gz is unpacked."""

import codecs
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from sparsetrain.core.quote import quoted
from sparsetrain.data.files import check_regular, is_packed, shown, unreadable

MOST_BYTES = 4 << 30
"""Of a file that is read whole."""
MOST_JSON_BYTES = 1 << 30
"""Of a file that is one JSON value: Python's objects take some ten times as much."""
MOST_LINE_BYTES = 256 << 20
MOST_LEVELS = 100
"""Of nesting in a JSON value: rows of tool calls have about ten."""

_HEAD_BYTES = 1 << 16
_PART_BYTES = 1 << 24
_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_NOT_TEXT = (
    (b"\x1f\x8b", "compressed by gzip. Unpack it (gunzip) or let its name end in .gz"),
    (b"BZh", "compressed by bzip2. Unpack it (bunzip2)"),
    (b"\xfd7zXZ\0", "compressed by xz. Unpack it (unxz)"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd. Unpack it (unzstd)"),
    (b"PK\3\4", "a zip archive or an office document. Unpack it, or save it as text or CSV"),
    (b"PAR1", "a Parquet table. Save it as JSONL, or let its name end in .parquet"),
    (b"%PDF", "a PDF. Save its text"),
    (b"\x93NUMPY", "a NumPy array, which may hold pickles. Save it as text"),
)


class BadJson(ValueError):
    """What is wrong with a JSON text, to be completed with its place."""


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, unpacked if its name ends in .gz, that is not empty and does not begin as a known binary format.

    Raises:
        ValueError: it is none of that, or the system does not give it.
    """
    check_regular(path)
    try:
        with cast(BinaryIO, gzip.open(path) if is_packed(path) else path.open("rb")) as file:
            head = file.read(_HEAD_BYTES)
            if not head:
                raise ValueError(f"{shown(path)} is empty. Remove it from the source or fill it.")
            for mark, what in _NOT_TEXT:
                if head.startswith(mark):
                    raise ValueError(f"{shown(path)} is {what}, and name what comes out.")
            _refuse_zero(head, path)
            file.seek(0)
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{shown(path)} is to be compressed by gzip, and cannot be unpacked: {error}. Try gunzip, or get it anew."
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The whole file as text, with "\\n" line ends.

    Raises:
        ValueError: the file is empty, too large, binary or in an unknown encoding; the byte is named.
    """
    size, parts = check_regular(path).st_size, list[bytes]()
    if size <= most:
        with opened(path) as file:
            size = 0
            while size <= most and (part := file.read(_PART_BYTES)):  # a small file may unpack to a vast one
                parts.append(part)
                size += len(part)
    if size > most:
        raise ValueError(
            f"{shown(path)} has {size / 1e9:.1f} GB; a file that is read whole has at most {most / 1e9:.1f} GB. Divide "
            "it into several files, or write a row a line, as .jsonl."
        )
    return decode(b"".join(parts), path)


def text_bytes(path: Path) -> int:
    """The size of a file's text, without reading it; of a packed one as its last bytes say it."""
    size = check_regular(path).st_size
    if not is_packed(path) or size < 4:
        return size
    try:
        with path.open("rb") as file:
            file.seek(-4, os.SEEK_END)
            return int.from_bytes(file.read(4), "little")
    except OSError as error:
        raise unreadable(path, error) from None


def decode(content: bytes, path: Path) -> str:
    """Bytes of a file as text: UTF-8, or what a mark at the beginning says; other bytes, and NUL, are an error."""
    _refuse_zero(content, path)
    encoding = _encoding(content)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{shown(path)} is not {encoding.removesuffix('-sig').upper()} text: byte {error.start} "
            f"(0x{content[error.start]:02x}): {error.reason}. Convert it to UTF-8 or leave it out of the source."
        ) from error
    if "\0" in text:
        raise ValueError(f"{shown(path)} is binary: character {text.index(chr(0))} is NUL. Name the text files alone.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, without their ends, read as they are asked for.

    Neither here nor elsewhere by splitlines(): it takes U+0085, U+2028 and the like inside a text for line ends.

    Raises:
        ValueError: as `read_text`; a line of more than `MOST_LINE_BYTES`.
    """
    with opened(path) as file:
        encoding = _encoding(file.read(4))
        file.seek(0)
        if encoding != "utf-8-sig":  # line ends of these cannot be found byte by byte
            yield from enumerate(read_text(path).split("\n"), start=1)
            return
        number = 0
        while line := file.readline(MOST_LINE_BYTES + 1):
            if len(line) > MOST_LINE_BYTES:
                raise ValueError(
                    f"{shown(path)}:{number + 1} is a line of more than {MOST_LINE_BYTES >> 20} MB. Write a row a line."
                )
            for part in _decode_line(line, path, number + 1).removesuffix("\n").split("\n"):
                number += 1
                yield number, part


def _decode_line(line: bytes, path: Path, number: int) -> str:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{shown(path)}:{number} is not UTF-8 text: byte {error.start} of the line (0x{line[error.start]:02x}): "
            f"{error.reason}. Convert it to UTF-8 or leave it out of the source."
        ) from error
    if "\0" in text:
        raise ValueError(f"{shown(path)}:{number} is binary: it has a NUL character. Name the text files alone.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _encoding(content: bytes) -> str:
    return next((encoding for mark, encoding in _MARKS if content.startswith(mark)), "utf-8-sig")


def _refuse_zero(content: bytes, path: Path) -> None:
    zero = content.find(b"\0")
    if zero >= 0 and _encoding(content) == "utf-8-sig":
        raise ValueError(
            f"{shown(path)} is binary: byte {zero} is NUL. Name the text files alone, for instance with a glob like "
            "'*.txt'; UTF-16 needs its mark at the beginning."
        )


def parse_json(text: str) -> Any:
    """A JSON value.

    Raises:
        BadJson: it is none, repeats a key, nests too deep, or holds a number that Python refuses to read.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise BadJson(f"is not JSON: {error.msg} at {place}") from error
    except RecursionError:
        raise BadJson("is nested too deep to be read") from None
    except BadJson:
        raise
    except ValueError:  # an integer of more than 4,300 digits, which takes time in their square
        raise BadJson("holds a whole number of thousands of digits") from None
    if text.count("{") + text.count("[") > MOST_LEVELS and _levels(value) > MOST_LEVELS:
        raise BadJson(f"is nested more than {MOST_LEVELS} levels deep")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise BadJson(f"names the key '{quoted(twice)}' twice in one object")
    return made


def _levels(value: Any) -> int:
    level, depth = [value], 0
    while level and depth <= MOST_LEVELS:
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
        level, depth = [child for children in inner for child in children], depth + 1
    return depth


_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def may_hold_surrogates(text: str) -> bool:
    """Whether a JSON text has an escape that gives half a character, unless its other half follows."""
    return _ESCAPED_SURROGATE.search(text) is not None


def without_surrogates(value: Any) -> tuple[Any, int]:
    """A JSON value with U+FFFD in place of halves of characters, which no tokenizer takes; how many there were."""
    if isinstance(value, str):
        return _LONE_SURROGATE.subn("\ufffd", value)
    if isinstance(value, list):
        done = [without_surrogates(item) for item in value]
        return [item for item, _ in done], sum(count for _, count in done)
    if isinstance(value, dict):
        done = [without_surrogates(part) for pair in value.items() for part in pair]
        items = [part for part, _ in done]
        return dict(zip(items[::2], items[1::2])), sum(count for _, count in done)
    return value, 0
