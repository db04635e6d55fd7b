"""Frozen weights in 4 or 8 bits: held so, trained beside, and refused where that cannot be."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from sparsetrain.cli import run
from sparsetrain.hf.model import four_bit
from sparsetrain.hf.model.io import load
from sparsetrain.hf.train.finetune import finetune
from tests.hf import runs


def recipe(folder: Path, **changes: Any) -> Any:
    runs.llama(folder / "model", hidden_size=64, intermediate_size=128)
    usual = {"deploy": "dense", "dtype": "fp32", "save_every": 0, "steps": 4, "load_in_4bit": True}
    return runs.recipe(folder, **usual | changes)


EIGHT = {"load_in_4bit": False, "load_in_8bit": True}


class Seen(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        names = kwargs["model"].named_parameters()
        self.kinds = {name.rpartition(".")[0]: type(parameter).__name__ for name, parameter in names}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_variant": "dora"},
        {"methods": [{"method": "token_selection"}]},
        EIGHT,
        EIGHT | {"methods": [{"method": "token_selection"}]},
    ],
    ids=str,
)
def test_linears_are_held_in_few_bits_and_lora_is_trained(tmp_path: Path, changes: dict[str, Any]) -> None:
    pytest.importorskip("bitsandbytes", reason="its 4-bit linears are what is tried")
    asked, seen = recipe(tmp_path, **changes), Seen()
    result = finetune(asked, callbacks=[seen], write=False)
    losses = [point["loss"] for point in result.run["evals"]]
    assert losses[-1] < losses[0]
    packed = [
        name for name, kind in seen.kinds.items() if kind == ("Int8Params" if asked.load_in_8bit else "Params4bit")
    ]
    assert len(packed) == 7 * runs.LAYERS and not any("lm_head" in name for name in packed)
    whole = sum(parameter.numel() for parameter in load(tmp_path / "model").model.parameters())
    assert result.parameters == whole + result.trainable_parameters
    logits = load(tmp_path / "out").model(torch.tensor([[4, 5, 6]])).logits  # on the weights as they are
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_run_is_measured_on_the_weights_it_was_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    pytest.importorskip("bitsandbytes", reason="its linears are what is tried")
    out, key, flag = str(tmp_path / "out"), f"load_in_{bits}bit", f"load-in-{bits}bit"
    asked = recipe(tmp_path, **(EIGHT if bits == 8 else {}))
    trained = finetune(asked, write=False).run["evals"][-1]["loss"]

    def measured(*more: str) -> dict[str, Any]:
        assert run(["eval", out, "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    held, files = measured(), measured(f"--no-{flag}")
    assert held[key] and held["loss"] == pytest.approx(trained, rel=1e-5)
    assert key not in files and abs(files["loss"] - trained) > 1e-5
    assert run(["export", out, "--output", str(tmp_path / "merged")]) == 0
    assert f"in {bits} bits and is merged into those of the model's files" in capsys.readouterr().out
    assert run(["eval", str(tmp_path / "model"), "--data", str(tmp_path / "text"), f"--{flag}"]) == 2
    assert f"is no adapter that was trained on weights in {bits} bits" in capsys.readouterr().err
    monkeypatch.setattr(four_bit, "find_spec", lambda _name: None)
    assert run(["eval", out]) == 2 and f"Or give --no-{flag}" in capsys.readouterr().err


def test_nothing_is_fetched_as_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = ModuleType("kernels")
    monkeypatch.setitem(sys.modules, "kernels", installed)
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    monkeypatch.setattr(four_bit, "find_spec", lambda name: name)
    asked = []

    def imported(name: str) -> None:
        with pytest.raises(ImportError):
            importlib.import_module("kernels")
        asked.append(name)

    monkeypatch.setattr(four_bit, "import_module", imported)
    four_bit.import_bitsandbytes()
    assert asked == ["bitsandbytes"] and sys.modules["kernels"] is installed


def test_it_is_refused_where_it_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="lora_r=0 trains nothing else"):
        recipe(tmp_path, lora_r=0)
    with pytest.raises(ValueError, match="held in one of them"):
        recipe(tmp_path, load_in_8bit=True)
    with pytest.raises(ValueError, match="weights in 8 bits are not trained"):
        recipe(tmp_path, **EIGHT, lora_r=0)
    monkeypatch.setattr(four_bit, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        finetune(recipe(tmp_path))
    monkeypatch.setattr(four_bit, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match=r"four_bit.*quantised"):
        finetune(recipe(tmp_path, methods=[runs.ROUTED]))
    with pytest.raises(ValueError, match=r"eight_bit.*quantised"):
        finetune(recipe(tmp_path, **EIGHT, methods=[runs.ROUTED]))
    with pytest.raises(ValueError, match="no 4-bit weights on mps"):
        four_bit.check_bits(4, torch.device("mps"))
    assert not (tmp_path / "out").exists()
