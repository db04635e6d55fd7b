"""The benchmarks' runner: every cell once, what is stored is kept, and every number says where it comes from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench.runner import Asked, Benchmark, Cell, asked_of, benchmarks, run


class Counted:
    """A benchmark of three cells that notes which are measured."""

    def __init__(self, **changes: Any) -> None:
        self.measured: list[str] = []
        self.benchmark = Benchmark(
            name="counted", measures="nothing", cells=self.cells, settings={"rounds": 3}, quick={"rounds": 1}, **changes
        )

    def cells(self, asked: Asked) -> list[Cell]:
        def measure(key: str) -> dict[str, Any]:
            self.measured.append(key)
            return {"case_id": key, "rounds": asked.settings["rounds"]}

        return [Cell(key, lambda key=key: measure(key)) for key in "abc"]

    def run(self, folder: Path | None, *, again: bool = False, **options: Any) -> dict[str, Any]:
        return run(self.benchmark, asked_of(self.benchmark, **options), output=folder, again=again, say=lambda _: None)


@pytest.mark.parametrize("rows", [False, True])
def test_a_stopped_run_goes_on(tmp_path: Path, rows: bool) -> None:
    counted = Counted(key_of=(lambda row: row["case_id"]) if rows else None)
    counted.run(tmp_path, only="b")
    counted.run(tmp_path)
    assert counted.measured == ["b", "a", "c"]
    counted.run(tmp_path)
    assert counted.measured == ["b", "a", "c"]
    counted.run(tmp_path, again=True)
    assert counted.measured == ["b", "a", "c", "a", "b", "c"]
    assert len(json.loads((tmp_path / "counted.json").read_text())["results"]) == 3


def test_every_number_has_its_origin(tmp_path: Path) -> None:
    counted = Counted()
    file = tmp_path / "counted.json"
    counted.run(tmp_path, only="a")
    data = json.loads(file.read_text())
    assert data["dtype"] == "float32" and data["machine"]["versions"]["torch"] and "commit" in data["machine"]
    data["machine"]["cpu"] = "another"
    file.write_text(json.dumps(data))
    counted.run(tmp_path, only="b")
    data = json.loads(file.read_text())
    assert [(entry["machine"]["cpu"], entry["cells"]) for entry in data["earlier"]] == [("another", ["a"])]
    counted.run(tmp_path, only="a", again=True)
    assert "earlier" not in json.loads(file.read_text())


def test_settings_are_not_mixed_in_a_file(tmp_path: Path) -> None:
    counted = Counted()
    counted.run(tmp_path, only="a")
    with pytest.raises(SystemExit, match="Choose another folder"):
        counted.run(tmp_path, changes={"rounds": 5})
    with pytest.raises(SystemExit, match="no setting"):
        counted.run(tmp_path, changes={"laps": 5})


def test_without_a_folder_nothing_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Counted().run(None, quick=True)["results"]["a"]["rounds"] == 1
    assert not list(tmp_path.iterdir())


def test_every_benchmark_is_found_with_its_cells() -> None:
    found = benchmarks()
    assert len(found) >= 18
    for benchmark in found.values():
        for quick in (False, True):
            keys = [cell.key for cell in benchmark.cells(asked_of(benchmark, quick=quick))]
            assert keys and len(keys) == len(set(keys)), benchmark.name


def test_a_cell_is_given_what_the_cells_before_it_found(tmp_path: Path) -> None:
    """Also when those are of an earlier run, or are measured because it needs them."""
    measured: list[str] = []

    def cells(asked: Asked) -> list[Cell]:
        def single(name: str, value: int) -> Cell:
            return Cell(name, lambda: measured.append(name) or {"value": value})

        def both(left: dict[str, int], right: dict[str, int]) -> dict[str, int]:
            measured.append("both")
            return {"value": left["value"] - right["value"]}

        return [single("left", 7), single("other", 0), single("right", 2), Cell("both", both, uses=("left", "right"))]

    benchmark = Benchmark(name="uses", measures="nothing", cells=cells)

    def results(**options: Any) -> dict[str, Any]:
        again = options.pop("again", False)
        asked = asked_of(benchmark, **options)
        return run(benchmark, asked, output=tmp_path, again=again, say=lambda _: None)["results"]

    results(only="left")
    assert results(only="both")["both"] == {"value": 5} and measured == ["left", "right", "both"]
    results(only="bo?h", again=True)  # what it uses is not asked for
    assert measured == ["left", "right", "both", "both"]
    assert "other" in results()


def test_a_cell_whose_files_are_not_here_is_measured_again_first(tmp_path: Path) -> None:
    """As in a fresh checkout, which has the result file and not what lies beside it."""
    measured, place = list[str](), tmp_path / "work"

    def leave(name: str, *before: dict[str, str]) -> dict[str, str]:
        assert all(Path(cell["saved"]).exists() for cell in before)
        measured.append(name)
        place.mkdir(exist_ok=True)
        (place / name).write_text("")
        return {"saved": str(place / name)}

    def cells(asked: Asked) -> list[Cell]:
        return [
            Cell("start", lambda: leave("start"), leaves=("saved",)),
            Cell("arm", lambda start: leave("arm", start), uses=("start",), leaves=("saved", "grid")),
            Cell("sheet", lambda arm: leave("sheet", arm), uses=("arm",)),
        ]

    benchmark = Benchmark(name="files", measures="nothing", cells=cells)

    def measure(only: str, again: bool = False) -> None:
        run(benchmark, asked_of(benchmark, only=only), output=tmp_path, again=again, say=lambda _: None)

    measure("arm")
    shutil.rmtree(place)
    measure("sheet")
    assert measured == ["start", "arm", "start", "arm", "sheet"]
    measure("sheet", again=True)
    assert measured[5:] == ["sheet"]


def test_a_pattern_is_of_the_whole_key_and_a_text_of_a_part() -> None:
    assert Asked(settings={}, only="[a").asks_for("x [a b")  # a text, though it reads like a pattern
    assert Asked(settings={}, only="a*c").asks_for("abc") and not Asked(settings={}, only="a*c").asks_for("abcd")


def test_no_cell_begins_when_the_minutes_are_over(tmp_path: Path) -> None:
    counted, said = Counted(), list[str]()
    asked = asked_of(counted.benchmark)
    run(counted.benchmark, asked, output=tmp_path, minutes=0, say=said.append)
    assert counted.measured == [] and "left for the next run" in said[0] and len(said) == 1
    run(counted.benchmark, asked, output=tmp_path, minutes=1, say=said.append)
    assert counted.measured == ["a", "b", "c"]
