from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from sparsetrain.cli import doctor as module
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
    fp32, bf16 = (
        float(v.replace(",", "")) for v in re.findall(r"(?:fp32|bf16) ([\d,]+)", checks["formats on cpu"]["found"])
    )
    assert fp32 > 0 and bf16 > 0
    assert "smollm2-135m" in str(checks)


def test_a_missing_and_an_old_package_end_with_1_and_say_what_to_install(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"peft": None, "transformers": "5.16.2"}
    version = module._version
    monkeypatch.setattr(module, "_version", lambda name: found[name] if name in found else version(name))
    monkeypatch.setattr(module, "_formats", lambda device: module.Check("formats", "ok", ""))
    result = call("doctor")
    assert result.code == 1
    assert 'pip install "peft>=0.19"' in result.out
    assert "5.16.2, needs 5.17 or newer" in result.out
    assert call("doctor", "--json").json["ok"] is False


@pytest.mark.parametrize(
    ("version", "numbers"), [("2.13.0+cpu", (2, 13, 0)), ("3.0rc1", (3, 0)), ("5.17.0.dev0", (5, 17, 0)), ("x", ())]
)
def test_versions_are_compared_as_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert module._numbers(version) == numbers
    assert module._numbers("5.9") < module._numbers("5.17")


def test_a_format_that_is_slow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(module, "gemm_gflops", lambda device, dtype: 50.0 if dtype == torch.float32 else 5.0)
    check = module._formats("cpu")
    assert check.state == "note" and "--dtype fp32 is faster" in check.advice
