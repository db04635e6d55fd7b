"""The notebooks run from their first cell to their last, on tiny models and data put in for their parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf import runs

NOTEBOOKS = Path(__file__).parents[1] / "examples" / "notebooks"
TINY: dict[str, dict[str, Any]] = {
    "1-plan": {"memory": "4GB", "seq_len": 64},
    "2-finetune-own-prompts": {"steps": 2, "seq_len": 64},
    "3-compare-with-dense": {"steps": 2, "seq_len": 64, "num_keys": 32},
    "4-profile-memory": {"seq_len": 64},
    "5-own-training-loop": {"steps": 3, "seq_len": 64},
}
SLOW = {"1-plan", "3-compare-with-dense"}
"""Those that start processes which import everything."""


def cells(name: str) -> list[dict[str, Any]]:
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def ran(name: str, model: Path, folder: Path) -> dict[str, Any]:
    """The names that are left after every code cell, in order; the parameters' cell must name what is put in for it."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(each for each in cells(name) if each["cell_type"] == "code"):
        source = "".join(cell["source"])
        exec(compile(source, f"{name}, cell {number}", "exec"), namespace)
        if "parameters" in cell["metadata"].get("tags", ()):
            tiny = {"model": str(model), **TINY[name]} | (
                {"data": str(folder / "notes")} if "data" in namespace else {}
            )
            assert tiny.keys() <= namespace.keys()
            namespace |= tiny
    return namespace


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    return tmp_path


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in sorted(TINY)]
)
def test_it_runs(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = runs.llama(place / "model")
    runs.text(place / "notes")
    left = ran(name, model, place)
    shown = capsys.readouterr().out
    if name == "1-plan":
        assert left["code"] == 0 and "routed_ffn" in shown
    elif name == "2-finetune-own-prompts":
        assert (place / "runs" / "pairs" / "report.html").is_file() and "perplexity, held out" in shown
    elif name == "3-compare-with-dense":
        assert (place / "runs" / "compared" / "report.html").is_file() and "a step" in shown
    elif name == "4-profile-memory":
        saved = {side: left["values"][side]["saved"]["total"] for side in ("sparse", "dense")}
        assert saved["sparse"] < saved["dense"] and (place / "profile.png").is_file()
    else:
        assert left["losses"][-1] < left["losses"][0] and not left["handle"].active


def test_every_notebook_is_run_and_is_committed_without_outputs() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(TINY)
    for name in TINY:
        code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
        assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
        assert sum("parameters" in cell["metadata"].get("tags", ()) for cell in code) == 1
        assert sum(len(cell["source"]) for cell in code) <= 60, f"{name}: short enough to read in a minute"
