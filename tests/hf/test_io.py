"""Saving, loading and exporting: what comes back, in another process, in plain transformers, and from damaged files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sparsetrain
from sparsetrain.core.config import MethodConfig
from sparsetrain.core.errors import CheckpointError
from sparsetrain.hf.model.io import export, load, save
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.runs.manifest import MANIFEST, atomic_folder, disk_errors, verify_manifest, write_manifest
from sparsetrain.runs.sidecar import SIDECAR, STATE, read_sidecar
from tests.hf import runs

BATCH = {"input_ids": torch.arange(4, 4 + 14).repeat(1, 5)}
METHODS: dict[str, list[dict[str, Any]]] = {
    "routed": [runs.ROUTED],
    "clustered": [runs.CLUSTERED],
    "pq": [runs.PQ],
    "both": [runs.CLUSTERED, runs.PQ],
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**BATCH).logits


def trained(
    folder: Path, methods: list[dict[str, Any]], rank: int = 4
) -> tuple[Any, sparsetrain.Handle, dict[str, Any]]:
    """A converted model whose every trainable parameter was moved, as training would."""
    if not (folder / "model").exists():
        runs.llama(folder / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(1)
    calibration = [{"input_ids": torch.randint(4, 19, (4, 64), generator=generator)}]
    configs = [MethodConfig.from_dict(entry) for entry in methods]
    handle = sparsetrain.sparsify(model, *configs, calibration=calibration)
    if rank:
        config = LoraConfig(
            task_type="CAUSAL_LM", r=rank, target_modules="all-linear", modules_to_save=handle.modules_to_save
        )
        model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model, handle, {"base_model": str(folder / "model"), "task": "lm"}


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("rank", [4, 0])
def test_save_and_load_give_the_same_logits(tmp_path: Path, name: str, rank: int) -> None:
    model, handle, about = trained(tmp_path, METHODS[name], rank)
    expected = logits(model)
    save(model, handle, tmp_path / "saved", **about)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)  # saving changed nothing
    loaded = load(tmp_path / "saved")
    torch.testing.assert_close(logits(loaded.model), expected, rtol=1e-5, atol=1e-5)
    assert loaded.handle is not None and loaded.handle.configs == handle.configs
    assert loaded.task == "lm" and not loaded.model.training


_LOGITS = """
import sys, torch
torch.set_num_threads(1)
from sparsetrain.hf.model.io import load
ids = torch.arange(4, 18).repeat(1, 5)
with torch.no_grad():
    torch.save(load(sys.argv[1]).model(input_ids=ids).logits, sys.argv[2])
"""


@pytest.mark.slow
def test_a_trained_run_gives_the_same_logits_in_a_fresh_process(tmp_path: Path) -> None:
    finetune(runs.recipe(tmp_path, methods=[runs.CLUSTERED]))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _LOGITS, str(tmp_path / "out"), str(tmp_path / "logits.pt")]
    subprocess.run(command, env=environment, check=True)
    again = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(again, logits(load(tmp_path / "out" / "adapter").model), rtol=1e-5, atol=1e-5)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (again - logits(dense)).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "rank"), [*((name, 4) for name in METHODS), ("both", 0)])
def test_an_export_loads_in_plain_transformers_with_every_key(tmp_path: Path, name: str, rank: int) -> None:
    model, handle, about = trained(tmp_path, METHODS[name], rank)
    expected = logits(model)
    save(model, handle, tmp_path / "saved", **about)
    export(tmp_path / "saved", tmp_path / "exported")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(plain).__name__ == "LlamaForCausalLM" and plain.config.sparsetrain["configs"]
    torch.testing.assert_close(logits(load(tmp_path / "exported").model), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(plain), expected, atol=1e-3)  # plain transformers runs it dense
    assert "base_model" not in read_sidecar(tmp_path / "exported")
    for folder in ("saved", "exported"):  # a server of another user reads the weights as it reads the rest
        assert len({path.stat().st_mode for path in (tmp_path / folder).iterdir() if path.is_file()}) == 1


def test_exported_weights_are_the_merged_ones_in_the_dense_order(tmp_path: Path) -> None:
    model, handle, about = trained(tmp_path, [runs.CLUSTERED])
    save(model, handle, tmp_path / "saved", **about)
    export(tmp_path / "saved", tmp_path / "exported")
    adapter = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(tmp_path / "exported" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    scale = 8 / 4  # PEFT's lora_alpha of 8 over the rank
    torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + scale * b @ a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "reason"), [("routed", "routing drops 2 of 4 blocks"), ("pq", "keys are selected")])
def test_dense_export_is_refused_where_it_would_change_outputs(tmp_path: Path, name: str, reason: str) -> None:
    model, handle, about = trained(tmp_path, METHODS[name])
    save(model, handle, tmp_path / "saved", **about)
    with pytest.raises(ValueError, match=reason):
        export(tmp_path / "saved", tmp_path / "exported", format="dense")
    assert not (tmp_path / "exported").exists()


def test_dense_export_of_a_model_that_keeps_everything(tmp_path: Path) -> None:
    model, handle, about = trained(tmp_path, [{"method": "routed_ffn", "num_blocks": 4, "num_active": 4}])
    expected = logits(model)
    save(model, handle, tmp_path / "saved", **about)
    export(tmp_path / "saved", tmp_path / "exported", format="dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "exported" / SIDECAR).exists()


def test_lora_that_bypasses_the_gate_is_not_merged(tmp_path: Path) -> None:
    model, handle, about = trained(tmp_path, [runs.ROUTED | {"gate": "spt"}])
    save(model, handle, tmp_path / "saved", **about)
    with pytest.raises(ValueError, match=r"mlp.*cannot be merged.*gate='spt'"):
        export(tmp_path / "saved", tmp_path / "exported")
    loaded = load(tmp_path / "saved")
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-5, atol=1e-5)


def test_export_takes_known_formats_and_empty_folders_only(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(ValueError, match="'onnx' is unknown"):
        export(tmp_path / "saved", tmp_path / "new", format="onnx")
    with pytest.raises(ValueError, match="not an empty folder"):
        export(tmp_path / "saved", tmp_path / "full")


def test_an_adapter_without_its_sidecar_is_refused_not_run_dense(tmp_path: Path) -> None:
    model, handle, about = trained(tmp_path, [runs.ROUTED])
    save(model, handle, tmp_path / "saved", **about)
    for name in (SIDECAR, STATE, MANIFEST):
        (tmp_path / "saved" / name).unlink()
    with pytest.raises(CheckpointError, match=r"router.*no sparsity_config\.json"):
        load(tmp_path / "saved")


def test_plain_models_and_adapters_load_too(tmp_path: Path) -> None:
    runs.llama(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.handle is None and loaded.task == "lm" and loaded.tokenizer is not None
    adapter = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False),
    )
    adapter.save_pretrained(str(tmp_path / "adapter"))
    again = load(tmp_path / "adapter", trainable=True)
    assert isinstance(again.model, PeftModel) and any(p.requires_grad for p in again.model.parameters())
    torch.testing.assert_close(logits(again.model), logits(adapter))


def test_what_is_no_model_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not an embedded asset, not a local folder"):
        load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no model that can be read"):
        load(tmp_path / "empty")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", STATE, SIDECAR])
@pytest.mark.parametrize("damage", ["truncated", "removed"])
def test_damaged_files_are_named(tmp_path: Path, name: str, damage: str) -> None:
    model, handle, about = trained(tmp_path, [runs.ROUTED])
    path = save(model, handle, tmp_path / "saved", **about) / name
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(tmp_path / "saved")
    (tmp_path / "saved" / MANIFEST).unlink()  # a copy without the manifest is still not taken for whole
    with pytest.raises(ValueError):
        load(tmp_path / "saved")


def test_a_sidecar_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    model, handle, about = trained(tmp_path, [runs.ROUTED])
    path = save(model, handle, tmp_path / "saved", **about) / SIDECAR
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    (tmp_path / "saved" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="format 99"):
        load(tmp_path / "saved")


def test_a_class_that_is_no_model_is_refused(tmp_path: Path) -> None:
    model, handle, about = trained(tmp_path, [runs.ROUTED])
    path = save(model, handle, tmp_path / "saved", **about) / SIDECAR
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_class": "Trainer"}))
    (tmp_path / "saved" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="'Trainer' is not a model"):
        load(tmp_path / "saved")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), atomic_folder(tmp_path / "new") as scratch:
        (scratch / "half").write_text("x")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    for content in ("one", "two"):
        with atomic_folder(tmp_path / "new") as scratch:
            (scratch / "file").write_text(content)
            write_manifest(scratch)
    assert (tmp_path / "new" / "file").read_text() == "two" and len(list(tmp_path.iterdir())) == 1


def test_a_failed_save_keeps_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, handle, about = trained(tmp_path, [runs.ROUTED])
    save(model, handle, tmp_path / "saved", **about)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(OSError, match=r"No space left on device: .*saved"):
        save(model, handle, tmp_path / "saved", **about)
    assert verify_manifest(tmp_path / "saved")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "saved"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing file data/3"),
    ],
)
def test_every_full_disk_is_one_kind_of_error(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(OSError, match="saved"), disk_errors(tmp_path / "saved"):
        raise error


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), disk_errors(tmp_path):
        raise RuntimeError("shapes do not match")
