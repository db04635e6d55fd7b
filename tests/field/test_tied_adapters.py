"""An adapter on one of two tied weights: `export` refuses to merge it, with a sparse method or without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

import sparsetrain
from sparsetrain import RoutedFFN, SemiStructured
from sparsetrain.hf.model.io import Loaded, export, save
from sparsetrain.hf.model.merge import check_merge
from tests.families import FAMILIES, llama_config


def tied(targets: list[str], tie: bool = True) -> Any:
    return get_peft_model(
        LlamaForCausalLM(llama_config(tie_word_embeddings=tie)), LoraConfig(r=2, target_modules=targets)
    )


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(("target", "other"), [("lm_head", "embed_tokens"), ("embed_tokens", "lm_head")])
def test_export_refuses_an_adapter_on_a_tied_weight(target: str, other: str, tmp_path: Path) -> None:
    model = tied([target, "q_proj"])
    with pytest.raises(
        ValueError, match=rf"lora\.\w+ on (model\.)?{target} cannot be merged: .*{other}\.weight \(tied\)"
    ):
        export(Loaded(model=model, tokenizer=None, handle=None, about={}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    check_merge(tied(["q_proj"]), None)
    check_merge(tied([target], tie=False), None)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_saved_adapter_on_a_tied_head_beside_routing_is_refused_as_well(tmp_path: Path) -> None:
    base = LlamaForCausalLM(llama_config(tie_word_embeddings=True))
    base.save_pretrained(tmp_path / "base")
    handle = sparsetrain.sparsify(base, RoutedFFN.example(), calibration=[FAMILIES["llama"].batch(4)])
    model = get_peft_model(base, LoraConfig(target_modules=["lm_head"], modules_to_save=handle.modules_to_save))
    save(model, handle, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"on lm_head cannot be merged"):
        export(tmp_path / "adapter", tmp_path / "out")


def test_an_adapter_of_any_kind_on_a_2_4_linear_is_refused() -> None:
    from peft import LoHaConfig

    model = FAMILIES["llama"].model()
    handle = sparsetrain.sparsify(model, SemiStructured(decay=0.0))
    with pytest.raises(ValueError, match=r"loha\.Linear on model\.layers\.0\.mlp\.down_proj cannot be merged"):
        check_merge(get_peft_model(model, LoHaConfig(target_modules=["down_proj"])), handle)
