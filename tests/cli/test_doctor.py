from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from sparsetrain.cli import doctor as module
from sparsetrain.cli.known import KNOWN, SETTINGS, Known
from tests.cli.conftest import Call


def test_floors_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    declared = {}
    for line in project["dependencies"]:
        name, _, floor = line.partition(">=")
        declared[name] = floor
    assert declared == module.REQUIRED
    assert f"trl>={module.OPTIONAL['trl'][0]}" in project["optional-dependencies"]["trl"]


def test_it_answers_with_every_required_package_and_a_measured_speed(call: Call) -> None:
    result = call("doctor", "--json")
    checks = {check["name"]: check for check in result.json["checks"]}
    assert set(module.REQUIRED) <= set(checks)
    assert result.json["ready"] and result.json["ok"] and result.code == 0
    rates = re.findall(r"(fp32|bf16|fp16) ([\d,.]+)", checks["formats on cpu"]["found"])
    assert {name for name, _ in rates} >= {"fp32", "bf16"}
    assert all(float(rate.replace(",", "")) > 0 for _, rate in rates)
    assert "smollm2-135m" in str(checks)


def test_a_missing_and_an_old_package_end_with_1_and_say_what_to_install(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"peft": None, "transformers": "5.16.2"}
    version = module.installed_version
    monkeypatch.setattr(module, "installed_version", lambda name: found[name] if name in found else version(name))
    monkeypatch.setattr(module, "formats", lambda device: module.Check("formats", "ok", ""))
    result = call("doctor")
    assert result.code == 1
    assert 'pip install "peft>=0.19"' in result.out
    assert "5.16.2, needs 5.17 or newer" in result.out
    assert call("doctor", "--json").json["ok"] is False


@pytest.mark.parametrize(
    ("version", "numbers"), [("2.13.0+cpu", (2, 13, 0)), ("3.0rc1", (3, 0)), ("5.17.0.dev0", (5, 17, 0)), ("x", ())]
)
def test_versions_are_compared_as_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert module.numbers(version) == numbers
    assert module.numbers("5.9") < module.numbers("5.17")


@pytest.mark.parametrize(("bf16", "taken"), [(5e9, "fp32: bf16 is 10x slower"), (9e10, "bf16: 1.8x faster")])
def test_the_format_that_auto_takes_is_named(
    bf16: float, taken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    from sparsetrain.core.formats import recall_formats
    from sparsetrain.measure import rates

    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path))
    speeds = {torch.float32: 5e10, torch.bfloat16: bf16}
    monkeypatch.setattr(rates, "gemm_flops", lambda device, dtype, **_: speeds[dtype])
    check = module.formats("cpu")
    assert taken in check.advice
    assert (kept := recall_formats(tmp_path / "machine", "cpu")) and kept.gemm_flops == {"fp32": 5e10, "bf16": bf16}


def test_a_known_clash_is_noted_in_its_versions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the tests of kernels set it, and it is noted too
    row = Known("peft", "clashes", "downgrade", at_least="99.0", below="99.2")
    monkeypatch.setattr(module, "KNOWN", (row,))
    found = "99.1.3"
    monkeypatch.setattr(module, "installed_version", lambda name: found)
    assert [(check.state, check.advice) for check in module.clashes()] == [("note", "clashes: downgrade")]
    for found in ("98.9", "99.2"):  # noqa: B007  (read by the lambda)
        assert module.clashes() == []


def test_what_installed_packages_ask_for_is_read_off_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = {check.name for check in module.contradictions()}
    asks = ("torch (<2)", 'peft (<0.1) ; extra == "old"', "transformers (>=5)", "numpy", "no requirement at all")
    about = tmp_path / "stuck-1.0.dist-info"
    about.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: stuck", "Version: 1.0", *(f"Requires-Dist: {line}" for line in asks)]
    (about / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (found,) = [check for check in module.contradictions() if check.name not in before]
    assert (found.name, found.state, found.found) == ("stuck", "note", "1.0")
    assert re.match(r"asks for torch<2, and \d\S+ is here: keep it", found.advice)


def test_a_setting_that_slows_everything_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "unset it" in {check.name: check for check in module.clashes()}["TRITON_INTERPRET"].advice


def test_every_known_row_says_what_to_do() -> None:
    assert all(row.effect and row.do for row in (*KNOWN, *SETTINGS))
    assert len({row.package for row in KNOWN}) == len(KNOWN)


def test_what_runs_each_operation_is_said_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = {check.name: check.found for check in module.others("cpu")}
    names = ("block-sparse attention", "routed FFN", "loss head", "Monarch", "2:4 products")
    names += ("2:4 masks", "2:4 gradients")
    assert list(found) == [f"{name} on cpu" for name in names]
    assert found["block-sparse attention on cpu"].startswith("torch (flex: FlexAttention gives no gradient")
    assert found["routed FFN on cpu"] == "torch"
    assert found["Monarch on cpu"].startswith("torch (triton: ")
    assert found["2:4 products on cpu"].startswith("emulate (cusparselt: the weight is on cpu")
    assert found["2:4 masks on cpu"] == found["2:4 gradients on cpu"] == "torch"


def test_a_gpu_with_grouped_products_runs_them_and_another_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from sparsetrain.ops import routed_ffn, who_runs

    place = torch.device("cuda:0")
    for capability, reason in (((9, 0), None), ((8, 0), "compute capability 9 and 10 alone")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, found=capability: found)
        grouped = routed_ffn.on_device(place, torch.bfloat16)
        assert next(iter(grouped)) == "grouped_mm" and (reason or "") in (grouped["grouped_mm"] or "")
        assert (grouped["grouped_mm"] is None) is (reason is None)
        said = who_runs._routed(grouped, gpu=True)
        assert said.startswith("torch (grouped_mm: ") if reason else said == "grouped_mm or torch (timed at each shape)"
