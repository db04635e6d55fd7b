"""What `dtype: auto` takes, that a run keeps it, and what is computed in which format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from sparsetrain.core.formats import VARIABLE, Formats, fastest, recall_formats
from sparsetrain.hf.model.io import load
from sparsetrain.hf.study.preview import preview
from sparsetrain.hf.train import dtype as module
from sparsetrain.hf.train.dtype import with_dtype
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.measure import rates
from sparsetrain.recipes.finetune import Recipe
from tests.hf import runs

FAST = Formats(device="cpu", gemm_flops={"fp32": 1e11, "bf16": 4.5e11}, threads=2)
SLOW = Formats(device="cpu", gemm_flops={"fp32": 1e11, "bf16": 2.5e10}, threads=2)


def on_machine(monkeypatch: pytest.MonkeyPatch, found: Formats) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(module, "formats_of", lambda *_: found)


def test_bf16_is_taken_where_it_is_faster_by_a_third() -> None:
    assert [fastest({"fp32": 1.0, "bf16": rate}) for rate in (0.25, 1.29, 1.3, 4.5)] == ["fp32", "fp32", "bf16", "bf16"]
    assert fastest({"fp32": 1.0}) == "fp32" and fastest({"bf16": 1.0}) == "bf16"


def test_formats_are_timed_once_a_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[torch.dtype] = []

    def gemm(_device: Any, kind: torch.dtype, **_: Any) -> float:
        timed.append(kind)
        return 4e11 if kind == torch.bfloat16 else 1e11

    monkeypatch.setattr(rates, "gemm_flops", gemm)
    first = rates.formats_of("cpu", tmp_path)
    count = len(timed)
    assert first.gemm_flops == {"fp32": 1e11, "bf16": 4e11} and set(timed) == {torch.float32, torch.bfloat16}
    assert rates.formats_of("cpu", tmp_path) == first and len(timed) == count
    (kept,) = tmp_path.iterdir()
    kept.write_text(kept.read_text().replace("400000000000.0", "500000000000.0"))
    assert recall_formats(tmp_path, "cpu") is None
    assert rates.formats_of("cpu", tmp_path) == first and len(timed) == 2 * count


def test_this_machine_multiplies_both(tmp_path: Path) -> None:
    found = rates.formats_of("cpu", tmp_path)
    assert found.device == "cpu" and found.gemm_flops.keys() == {"fp32", "bf16"}
    assert min(found.gemm_flops.values()) > 0 and torch.get_num_threads() == found.threads


def test_auto_says_what_it_takes_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = runs.recipe(tmp_path)
    told: list[Any] = []
    on_machine(monkeypatch, FAST)
    assert with_dtype(recipe, told.append).dtype == "bf16"
    assert told[-1]["text"] == "bf16: 4.5x faster matrix products on this CPU; --dtype fp32 for full precision."
    assert with_dtype(recipe.model_copy(update={"dtype": "fp32"})).dtype == "fp32"
    monkeypatch.setattr(module, "formats_of", lambda *_: SLOW)
    assert with_dtype(recipe, told.append).dtype == "fp32" and told[-1]["text"].startswith("fp32: bf16 is 4x slower")


def test_the_environment_says_what_auto_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = runs.recipe(tmp_path)
    on_machine(monkeypatch, SLOW)
    monkeypatch.setenv(VARIABLE, "bf16")
    assert with_dtype(recipe).dtype == "bf16"
    monkeypatch.setenv(VARIABLE, "fp8")
    with pytest.raises(ValueError, match=r"SPARSETRAIN_DTYPE=fp8 is no format. Set it to fp32 or bf16"):
        with_dtype(recipe)


class Watch(TrainerCallback):
    """Formats of what is trained and kept, as they are when a step has been taken."""

    def __init__(self) -> None:
        self.base: set[torch.dtype] = set()
        self.trained: set[torch.dtype] = set()
        self.state: set[torch.dtype] = set()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = dict(kwargs["model"].named_parameters())
        self.base |= {p.dtype for name, p in parameters.items() if ".base_layer." in name}
        self.trained |= {p.dtype for p in parameters.values() if p.requires_grad}
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        self.state |= {v.dtype for held in optimizer.state.values() for v in held.values()}


# two runs and an evaluation
@pytest.mark.parametrize("methods", [[], [runs.CLUSTERED, runs.PQ]], ids=["dense", "sparse"])
def test_a_run_keeps_its_format_and_trains_in_fp32(
    methods: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception): ...

    class StopAt(Watch):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == 3:
                raise Stop

    recipe, watch = runs.recipe(tmp_path, methods=methods, save_every=2), StopAt()
    on_machine(monkeypatch, FAST)
    with pytest.raises(Stop):
        finetune(recipe, callbacks=[watch])
    assert watch.base == {torch.bfloat16} and watch.trained == watch.state == {torch.float32}
    monkeypatch.setattr(module, "formats_of", lambda *_: SLOW)  # it goes on elsewhere
    result = finetune(recipe.model_copy(update={"resume": True}))
    assert result.resumed_from == 2 and result.recipe.dtype == "bf16"
    assert Recipe.from_yaml(tmp_path / "out" / "recipe.yaml").dtype == "bf16"
    assert load(tmp_path / "out", dtype=torch.bfloat16).model is not None


def test_a_run_of_before_auto_was_measured_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = runs.recipe(tmp_path)
    (tmp_path / "out").mkdir()
    values = recipe.training_values()
    about = {"kind": "run", "format": 1, "fingerprint": recipe.fingerprint(), "training_values": values}
    (tmp_path / "out" / "run.json").write_text(json.dumps(about))
    on_machine(monkeypatch, FAST)
    again = preview(recipe.model_copy(update={"resume": True}))
    assert again.recipe.dtype == "auto" and again.recipe.fingerprint() == recipe.fingerprint()
