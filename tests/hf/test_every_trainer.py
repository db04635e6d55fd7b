"""Trainer × method × feature, cell by cell of the table in the docs.

A yes trains sparse, evaluates dense and saves what plain PEFT loads; a no is refused with the words of the table.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from bench.tables import trainers as table
from tests.families import FAMILIES
from tests.hf import trainers
from tests.hf.trainers import TOKENS, Asked, Trained

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("default")  # the libraries' own
QUICK = {(name, "routed_ffn") for name in (*table.TRAINERS, "load_best", "pissa")}
QUICK |= {("sft_packing", "pq_attention"), ("trainer", "flood_fill_attention")}


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def cells(names: Any) -> list[Any]:
    """Every cell, those beside the first method's and a few others marked slow."""
    found = []
    for name in names:
        for method in table.METHODS:
            quick = (name, method) in table.REFUSED or (name, method) in QUICK
            quick |= method == table.METHODS[0]
            found.append(pytest.param(name, method, marks=() if quick else pytest.mark.slow, id=f"{name}-{method}"))
    return found


@cache
def dense_bytes(name: str) -> int:
    """What a dense training saves for its backward passes."""
    with tempfile.TemporaryDirectory() as folder:
        return trainers.train(name, Asked(Path(folder))).watch.saved_bytes


def test_the_table_is_what_is_tested() -> None:
    assert set(table.TRAINERS) == set(trainers.TRAINERS) and set(table.FEATURES) == set(trainers.FEATURES)
    assert set(table.METHODS) == set(trainers.CONFIGS)
    assert {name for name, _ in table.REFUSED} <= {*table.TRAINERS, *table.FEATURES}


@pytest.mark.parametrize(("name", "method"), cells(table.TRAINERS))
def test_a_trainer(name: str, method: str, tmp_path: Path) -> None:
    check(name, Asked(tmp_path / "run", method), table.REFUSED.get((name, method)))


@pytest.mark.parametrize(("feature", "method"), cells(table.FEATURES))
def test_a_feature(feature: str, method: str, tmp_path: Path) -> None:
    asked = Asked(tmp_path / "run", method, **trainers.FEATURES[feature])
    check("trainer", asked, table.REFUSED.get((feature, method)))


def check(name: str, asked: Asked, refusal: str | None) -> None:
    if refusal is not None:
        with pytest.raises(ValueError, match=re.escape(refusal)):
            trainers.train(name, asked)
        return
    found = trainers.train(name, asked)
    assert found.handle is not None
    trained_sparse(name, asked, found)
    loss = found.evaluate()
    with found.handle.dense():
        assert found.evaluate() == pytest.approx(loss, rel=1e-6)
    folder = asked.folder.parent / "saved"
    found.save(folder)
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(asked.options.get("bf16"))):  # as accelerate runs its own
        expected, dense, plain = (logits(model) for model in (found.model, found.dense(), plainly(found, folder)))
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(dense, expected, rtol=1e-5, atol=1e-6)


def trained_sparse(name: str, asked: Asked, found: Trained) -> None:
    """The method was on in the first training forward: fewer rows trained, or its values are not the dense model's."""
    assert found.handle is not None and found.watch.hidden is not None
    if not any(config.changes_outputs for config in found.handle.configs):
        assert 0 < found.watch.trained_rows < 0.6
        if not asked.options and not asked.lora and "checkpointing" not in name:  # which saves blocks' inputs alone
            assert found.watch.saved_bytes < 0.65 * dense_bytes(name)
        return
    bf16 = bool(asked.options.get("bf16"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        dense = found.dense().base_model(**found.watch.given, use_cache=False).last_hidden_state
    assert (dense - found.watch.hidden).abs().max() > (0.2 if bf16 else 1e-3)


def plainly(found: Trained, folder: Path) -> Any:
    if (folder / "adapter_config.json").is_file():
        return PeftModel.from_pretrained(found.dense(), str(folder))
    kind = AutoModelForSequenceClassification if found.model.config.num_labels == 1 else AutoModelForCausalLM
    return kind.from_pretrained(folder)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**FAMILIES["llama"].batch(2, TOKENS, seed=8)).logits.float()


@pytest.mark.parametrize(
    "method", [table.METHODS[0], *(pytest.param(m, marks=pytest.mark.slow) for m in table.METHODS[1:])]
)
def test_activations_that_trl_offloads(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's own bookkeeping, which ends a run whose saved tensors are read twice or never; its copies go from a CPU to
    a CPU, without streams."""
    from trl.models import activation_offloading as offloading

    kept: list[torch.Size] = []

    class Offload(offloading.OffloadActivations):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"use_streams": False, "use_pin_memory": False})
            pack = self.pack_hook

            def note(tensor: Tensor) -> Any:
                kept.append(tensor.shape)
                return pack(tensor)

            self.pack_hook = note

    monkeypatch.setattr(offloading, "OffloadActivations", Offload)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cpu"))
    monkeypatch.setattr(torch, "get_device_module", lambda *_: torch.cpu)
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    options = {"gradient_checkpointing": True}
    plain = trainers.train("sft", Asked(tmp_path / "plain", method, options=options)).evaluate()
    assert not kept
    AcceleratorState._reset_state(reset_partial_state=True)
    offloaded = Asked(tmp_path / "offloaded", method, options=options | {"activation_offloading": True})
    assert trainers.train("sft", offloaded).evaluate() == plain
    assert kept
