"""`sparsetrain patterns`: pictures from the state that is saved with a run."""

from __future__ import annotations

from pathlib import Path

import pytest

import sparsetrain
from sparsetrain import FloodFillAttention
from sparsetrain.measure.report import build_report, write_report
from sparsetrain.runs.sidecar import write_sidecar
from tests.cli.conftest import Call
from tests.families import FAMILIES, LAYERS

PNG = b"\x89PNG\r\n"


def saved(folder: Path, **options: object) -> sparsetrain.Handle:
    model, batch = FAMILIES["gpt2"].model(), FAMILIES["gpt2"].batch()
    values = {"block_tokens": 8, "filter_edge": 5, "keep_ratio": 0.25, "max_dense_steps": 0, **options}
    handle = sparsetrain.sparsify(model, FloodFillAttention.from_dict(values), calibration=[batch])
    folder.mkdir(parents=True)
    write_sidecar(folder, model, handle)
    return handle


def test_draws_every_layer_and_puts_them_into_the_report_once(tmp_path: Path, call: Call) -> None:
    handle = saved(tmp_path / "run" / "model")
    report = tmp_path / "run" / "report.html"
    write_report(build_report(title="t", runs={"sparse": {"steps": []}}), tmp_path / "run")
    for _ in range(2):
        result = call("patterns", tmp_path / "run", "--json")
        assert result.code == 0, result.err
    layers = result.json["layers"]
    assert [layer["site"] for layer in layers] == [f"transformer.h.{i}.attn" for i in range(LAYERS)]
    for layer, stats in zip(layers, handle.report()["stats"].values(), strict=True):
        assert layer["density"] == pytest.approx(stats["density"]) and layer["switched_at_step"] == 0
    files = sorted((tmp_path / "run" / "patterns").iterdir())
    assert [file.name for file in files] == [f"layer-{i:02d}.png" for i in range(LAYERS)]
    assert all(file.read_bytes().startswith(PNG) for file in files)
    page = report.read_text()
    assert page.count('id="patterns"') == 1 and page.count("data:image/png") == LAYERS and 'id="verdict"' in page
    shown = call("patterns", tmp_path / "run", "--output", tmp_path / "elsewhere").out
    assert "transformer.h.1.attn" in shown and (tmp_path / "elsewhere" / "layer-00.png").exists()


def test_heads_of_their_own_are_drawn_one_by_one(tmp_path: Path, call: Call) -> None:
    handle = saved(tmp_path / "run" / "model", share_heads=False, layers=[1])
    result = call("patterns", tmp_path / "run", "--json")
    (layer,) = result.json["layers"]
    (stats,) = handle.report()["stats"].values()
    assert layer["site"] == "transformer.h.1.attn" and layer["density"] == pytest.approx(stats["density"])
    assert [file.name for file in (tmp_path / "run" / "patterns").iterdir()] == ["layer-00.png"]


def test_the_newest_checkpoint_of_a_dense_phase(tmp_path: Path, call: Call) -> None:
    handle = saved(tmp_path / "checkpoint-1", max_dense_steps=9, probe_every=2)
    handle.step(2, 20)
    (tmp_path / "checkpoint-2").mkdir()
    write_sidecar(tmp_path / "checkpoint-2", handle.model, handle)
    result = call("patterns", tmp_path, "--json")
    assert result.code == 0, result.err
    assert [layer["density"] for layer in result.json["layers"]] == [None] * LAYERS
    assert result.json["layers"][0]["probes"] == 1
    refused = call("patterns", tmp_path / "checkpoint-1")
    assert refused.code != 0 and "saved before the first probe" in refused.err


def test_what_has_no_patterns(tmp_path: Path, call: Call) -> None:
    nothing = call("patterns", tmp_path / "nowhere")
    assert nothing.code != 0 and "holds no saved run" in nothing.err
    write_sidecar(tmp_path, FAMILIES["gpt2"].model(), None)
    other = call("patterns", tmp_path)
    assert other.code != 0 and "only flood_fill_attention and semi_structured have pictures" in other.err


def test_a_report_of_another_layout_is_told_apart(tmp_path: Path, call: Call) -> None:
    saved(tmp_path / "run" / "model")
    (tmp_path / "run" / "report.json").write_text('{"schema": 99}')
    refused = call("patterns", tmp_path / "run")
    assert refused.code != 0 and "layout 99" in refused.err
