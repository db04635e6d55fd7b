"""The plugin of axolotl, against axolotl's own classes where it is installed (it pins other versions than ours), else
against a stub of its published interface (0.19): a base class, and dictionaries that answer None for what they lack."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.families import FAMILIES
from tests.field.test_saved import logits, trainer
from tests.hf import runs

TOKENS = {"method": "token_selection", "keep_ratio": 0.4}
pytestmark = pytest.mark.filterwarnings("default")


class Defaults(dict):
    """The stub's config: as axolotl's `DictDefault`."""

    def __missing__(self, name: str) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        return self[name]


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """(our plugin module, the class of axolotl's configs)."""
    monkeypatch.delitem(sys.modules, "sparsetrain.hf.train.axolotl", raising=False)
    try:
        import_module("axolotl.integrations.base")
        from axolotl.utils.dict import DictDefault
    except ImportError:
        places = ["axolotl", "axolotl.integrations", "axolotl.integrations.base"]
        stub = ModuleType(places[-1])
        stub.BasePlugin = type("BasePlugin", (), {})  # type: ignore[attr-defined]
        for place in places:
            monkeypatch.setitem(sys.modules, place, stub)
        return import_module("sparsetrain.hf.train.axolotl"), Defaults
    return import_module("sparsetrain.hf.train.axolotl"), DictDefault


def test_it_converts_before_the_adapter_and_what_is_saved_is_plain(axolotl: Any, tmp_path: Path) -> None:
    module, config = axolotl
    runs.llama(tmp_path / "base")
    text = runs.text(tmp_path / "text")
    block = {"methods": [TOKENS, runs.CLUSTERED], "calibration": str(text)}
    cfg = config({"base_model": str(tmp_path / "base"), "sequence_len": 64, "sparsity": block})
    plugin = module.SparsityPlugin()
    plugin.register(cfg)
    dense = runs_model(tmp_path)
    model = runs_model(tmp_path)
    plugin.post_model_build(cfg, model)
    assert [c.method for c in plugin.handle.configs] == ["token_selection", "routed_ffn"]
    assert not cfg["lora_modules_to_save"]  # deployed dense, what was added stays as it was fitted
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", modules_to_save=None))
    run = trainer(model, tmp_path / "out", [])
    run.train()
    run.save_model(str(tmp_path / "saved"))
    expected = logits(model)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(dense, str(tmp_path / "saved"))), expected)
    assert not torch.allclose(logits(runs_model(tmp_path)), expected, atol=1e-4)


def runs_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "base")


def test_what_is_used_sparse_trains_what_was_added(axolotl: Any) -> None:
    module, config = axolotl
    block = {"methods": [runs.ROUTED], "deploy": "sparse"}
    cfg = config({"sparsity": block, "lora_modules_to_save": ["lm_head"]})
    plugin = module.SparsityPlugin()
    plugin.post_model_build(cfg, FAMILIES["llama"].model())
    assert list(cfg["lora_modules_to_save"]) == ["lm_head", *plugin.handle.modules_to_save]
    assert plugin.handle.modules_to_save


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (None, "no block `sparsity:`"),
        ({"methods": [{"method": "token_sellection"}]}, "token_sellection"),
        ({"methods": [TOKENS], "deploys": "dense"}, "deploys"),
        ({"methods": [TOKENS], "deploy": {"dense_first": 2.0}}, "dense_first=2.0"),
    ],
)
def test_a_wrong_block_is_refused_before_the_model_is_loaded(axolotl: Any, block: Any, said: str) -> None:
    module, config = axolotl
    with pytest.raises(ValueError, match=said):
        module.SparsityPlugin().register(config({"sparsity": block} if block else {}))


def test_axolotl_reads_its_block(axolotl: Any) -> None:
    module, _ = axolotl
    place, _, name = module.SparsityPlugin().get_input_args().rpartition(".")
    arguments = getattr(import_module(place), name)
    assert arguments(sparsity={"methods": [TOKENS]}).sparsity.deploy == "dense"
    assert arguments().sparsity is None
