"""Trainer × method × feature, cell by cell of the table in the docs.

A yes trains sparse, evaluates dense and saves what plain PEFT loads, or, of a method of weights, evaluates as it was
trained and saves what `load` reads; a no is refused with the words of the table.
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
from sparsetrain.hf.model.io import load
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


def cells_of_weights(names: Any) -> list[Any]:
    """Every cell, those beside one method in turn and the refused ones quick."""
    found = []
    for row, name in enumerate(name for name in names if name not in table.WITH_LORA):
        for place, method in enumerate(table.WEIGHTS):
            quick = (name, method) in table.REFUSED or place == row % len(table.WEIGHTS)
            found.append(pytest.param(name, method, marks=() if quick else pytest.mark.slow, id=f"{name}-{method}"))
    return found


@cache
def dense_bytes(name: str) -> int:
    """What a dense training saves for its backward passes."""
    with tempfile.TemporaryDirectory() as folder:
        return trainers.train(name, Asked(Path(folder))).watch.saved_bytes


def test_the_table_is_what_is_tested() -> None:
    assert set(table.TRAINERS) == set(trainers.TRAINERS) and set(table.FEATURES) == set(trainers.FEATURES)
    assert set(table.METHODS) == set(trainers.CONFIGS) and set(table.WEIGHTS) == set(trainers.WEIGHTS)
    assert {name for name, _ in table.REFUSED} <= {*table.TRAINERS, *table.FEATURES}


@pytest.mark.parametrize(("name", "method"), cells(table.TRAINERS))
def test_a_trainer(name: str, method: str, tmp_path: Path) -> None:
    check(name, Asked(tmp_path / "run", method), table.REFUSED.get((name, method)))


@pytest.mark.parametrize(("feature", "method"), cells(table.FEATURES))
def test_a_feature(feature: str, method: str, tmp_path: Path) -> None:
    asked = Asked(tmp_path / "run", method, **trainers.FEATURES[feature])
    check("trainer", asked, table.REFUSED.get((feature, method)))


@pytest.mark.parametrize(("name", "method"), cells_of_weights(table.TRAINERS))
def test_a_trainer_of_weights(name: str, method: str, tmp_path: Path) -> None:
    check_weights(name, Asked(tmp_path / "run", method, deploy="sparse"), table.REFUSED.get((name, method)))


@pytest.mark.parametrize(("feature", "method"), cells_of_weights(table.FEATURES))
def test_a_feature_with_weights(feature: str, method: str, tmp_path: Path) -> None:
    asked = Asked(tmp_path / "run", method, deploy="sparse", **trainers.FEATURES[feature])
    check_weights("trainer", asked, table.REFUSED.get((feature, method)))


def refused(name: str, asked: Asked, refusal: str | None) -> bool:
    if refusal is not None:
        with pytest.raises(ValueError, match=re.escape(refusal)):
            trainers.train(name, asked)
    return refusal is not None


def check_weights(name: str, asked: Asked, refusal: str | None) -> None:
    if refused(name, asked, refusal):
        return
    found = trainers.train(name, asked)
    assert found.handle is not None
    folder = asked.folder.parent / "saved"
    found.save(folder)
    start = found.dense()
    trainers.converted(asked, start)
    with autocast(asked):
        trained, untrained, read = (logits(model) for model in (found.model, start, load(folder).model))
    torch.testing.assert_close(read, trained, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(trained, untrained, rtol=1e-3, atol=1e-3)
    if any(config.changes_outputs for config in found.handle.configs):
        trained_sparse(name, asked, found)
    else:
        before = dict(found.dense().named_parameters())
        moved = {site: found.model.get_parameter(f"{site}.weight") for site in found.handle.sites(asked.method or "")}
        changed = sum(int((weight != before[f"{site}.weight"]).sum()) for site, weight in moved.items())
        assert 0 < changed <= 0.1001 * sum(weight.numel() for weight in moved.values())
        assert all(torch.equal(p, before[n]) for n, p in found.model.named_parameters()
                   if n in before and n.removesuffix(".weight") not in moved)  # fmt: skip


def autocast(asked: Asked) -> Any:
    """As accelerate runs its own."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(asked.options.get("bf16")))


def check(name: str, asked: Asked, refusal: str | None) -> None:
    if refused(name, asked, refusal):
        return
    found = trainers.train(name, asked)
    assert found.handle is not None
    trained_sparse(name, asked, found)
    loss = found.evaluate()
    with found.handle.dense():
        assert found.evaluate() == pytest.approx(loss, rel=1e-6)
    folder = asked.folder.parent / "saved"
    found.save(folder)
    with autocast(asked):
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
