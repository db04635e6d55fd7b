"""Token selection with every kind of adapter, converted before or after it was put on: exact, or refused at once."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

import sparsetrain
from sparsetrain import TokenSelection
from tests.families import FAMILIES
from tests.methods.test_token_selection import assert_same, cut_by_hooks, gradients, selected_gradients, some_rows

LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
KINDS: dict[str, Any] = {
    "lora_and_head": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj", "lm_head"], **LM),
    "saved_head": lambda: peft.LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"], **LM),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], use_dora=True, **LM),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **LM
    ),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj", "gate_proj"], **LM),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"], **LM),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"], **LM),
    "layer_norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], **LM),
}


def adapted(kind: str, model: Any) -> Any:
    torch.manual_seed(0)
    model = peft.get_peft_model(model, KINDS[kind]()).double().train()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "norm" not in name and "head.modules" not in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT on its own layer norms
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["adapt, convert", "convert, adapt"])
@pytest.mark.parametrize(("rows", "tokens"), [(2, 40), (1, 32)])  # 2·16 and 1·32 rows are as many as the model is wide
def test_gradients_equal_the_detach_oracle(kind: str, order: str, rows: int, tokens: int) -> None:
    batch = FAMILIES["llama"].batch(rows, tokens)
    chosen = some_rows(rows, tokens, k=16)
    plain = adapted(kind, FAMILIES["llama"].model())
    with cut_by_hooks(plain.get_base_model(), chosen.selected_bt):
        logits, expected = gradients(plain, batch, chosen)
    base = FAMILIES["llama"].model()
    if order == "adapt, convert":
        model = adapted(kind, base)
        sparsetrain.sparsify(model, TokenSelection())
    else:
        sparsetrain.sparsify(base, TokenSelection())
        model = adapted(kind, base)
    found_logits, found = selected_gradients(model, batch, chosen)
    here = chosen.selected_bt
    torch.testing.assert_close(found_logits[here], logits[here], rtol=1e-9, atol=1e-9)
    assert_same(found, expected, 1e-9)


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PromptEncoderConfig])
def test_soft_prompts_are_trained_and_prefixes_refused(kind: Any) -> None:
    batch = FAMILIES["llama"].batch(2, 40)
    batch["labels"] = batch["input_ids"]
    model: nn.Module = peft.get_peft_model(FAMILIES["llama"].model(), kind(num_virtual_tokens=5, **LM)).train()
    dense = model(**batch).loss
    handle = sparsetrain.sparsify(model, TokenSelection(keep_ratio=1.0))
    torch.testing.assert_close(model(**batch).loss, dense)
    handle.restore()
    sparsetrain.sparsify(model, TokenSelection(keep_ratio=0.5))
    model(**batch).loss.backward()
    assert any(p.grad.any() for p in model.parameters() if p.requires_grad and p.grad is not None)
    prefixed = peft.get_peft_model(FAMILIES["llama"].model(), peft.PrefixTuningConfig(num_virtual_tokens=5, **LM))
    sparsetrain.sparsify(prefixed, TokenSelection())
    with pytest.raises(ValueError, match=r"token_selection.*prefix tuning"):
        prefixed.train()(**batch)
