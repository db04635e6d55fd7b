from __future__ import annotations

import platform
from pathlib import Path

import pytest

from sparsetrain.data.docstrings import ASKED, docstring_rows
from sparsetrain.data.embedded import EMBEDDED
from sparsetrain.hf.assets import store

SOURCE = '''import math


class Circle:
    @property
    def area(self):
        """The area of the circle, in the square of the unit that the radius has been given in."""
        r = self.radius
        return math.pi * r * r

    def short(self):
        """Too short."""
        return 1

    def only_said(self):
        """A docstring without a body says nothing that could be described, so this is left out."""


async def fetch(url):
    """
    Fetch what lies at an address.

    It is tried again, up to three times, when the connection breaks.
    """
    return await get(url)
'''


def test_functions_become_prompts_and_docstrings_completions(tmp_path: Path) -> None:
    (tmp_path / "shapes.py").write_text(SOURCE)
    (tmp_path / "again.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text(SOURCE)
    rows = docstring_rows(tmp_path)
    assert [row["completion"].splitlines()[0] for row in rows] == [
        "Fetch what lies at an address.",
        "The area of the circle, in the square of the unit that the radius has been given in.",
    ]
    area = rows[1]["prompt"]
    assert area.startswith(ASKED) and "class Circle:" in area
    assert area.endswith("@property\ndef area(self):\n    r = self.radius\n    return math.pi * r * r")
    assert "The area of the circle" not in area
    assert rows[0]["completion"].endswith("\n\nIt is tried again, up to three times, when the connection breaks.")


def test_the_data_set_is_made_once_and_read_as_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path / "cache"))
    sources = tmp_path / "lib"
    sources.mkdir()
    (sources / "shapes.py").write_text(SOURCE)
    monkeypatch.setattr(store.sysconfig, "get_paths", lambda: {"stdlib": str(sources)})
    folder = Path(store.resolve_data("python-docstrings", progress=lambda _line: None))
    rows = EMBEDDED["python-docstrings"](folder)
    assert [set(row) for row, _ in rows] == [{"prompt", "completion"}] * 2
    (sources / "shapes.py").unlink()
    assert store.resolve_data("python-docstrings") == str(folder)  # as it was made
    assert store.asset_status("python-docstrings", deep=True).state == "ready"


def test_another_python_makes_its_own_rows_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path / "cache"))
    sources = tmp_path / "lib"
    sources.mkdir()
    (sources / "shapes.py").write_text(SOURCE)
    monkeypatch.setattr(store.sysconfig, "get_paths", lambda: {"stdlib": str(sources)})
    said: list[str] = []
    folder = Path(store.resolve_data("python-docstrings", progress=said.append))
    assert any(f"python=={platform.python_version()}; other versions have other rows" in line for line in said)
    manifest = folder / store.MANIFEST
    manifest.write_text(manifest.read_text().replace(platform.python_version(), "3.9.1"))
    status = store.asset_status("python-docstrings")
    assert status.state == "damaged" and "rows are those of python==3.9.1" in status.problem
    (sources / "shapes.py").write_text(SOURCE.replace("up to three times", "up to four times"))
    said.clear()
    rows = EMBEDDED["python-docstrings"](Path(store.resolve_data("python-docstrings", progress=said.append)))
    assert (
        any("up to four times" in row["completion"] for row, _ in rows)
        and "whose library has others; fetching" in said[0]
    )


def test_a_python_without_its_sources_makes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(RuntimeError, match=r"Use a Python installation that keeps its \.py files"):
        store.resolve_data("python-docstrings", progress=lambda _line: None)
    assert store.asset_status("python-docstrings").state == "absent"
