"""Blocks that run their selected rows again in the backward: the same gradients, and next to nothing kept."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, TrainingArguments

import sparsetrain
from sparsetrain import PQAttention, TokenSelection, sparsify
from sparsetrain.core.backend import planning_for
from sparsetrain.core.host_memory import OnHost, counting_moves
from sparsetrain.measure.memory import saved_activations
from tests.families import FAMILIES, llama_config
from tests.methods.test_token_selection import (
    assert_same,
    doubled,
    exact,
    gradients,
    selected_gradients,
    selector_of,
    some_rows,
    tokens_of,
)


def both(family: str, lora: bool = False, **again: Any) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """(logits, gradients) of the two passes, and with recompute."""
    found = []
    for config in (TokenSelection(), TokenSelection(recompute=True, **again)):
        case = FAMILIES[family]
        model, batch = doubled(case)
        sparsify(model, config)
        if lora:
            torch.manual_seed(2)
            model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")).double().train()
            for name, factor in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(factor)
        torch.manual_seed(3)  # dropouts
        found.append(selected_gradients(model, batch, some_rows(2, tokens_of(case, batch))))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "opt", "gemma3"])
def test_gradients_equal_those_of_two_passes(family: str) -> None:
    (logits, expected), (found_logits, found) = both(family)
    assert (found_logits - logits).abs().max() <= exact(family)
    assert_same(found, expected, exact(family))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_gradients_equal_those_of_two_passes(family: str) -> None:
    (_, expected), (_, found) = both(family, lora=True)
    assert_same(found, expected)


def test_dropouts_are_those_that_were_drawn() -> None:
    def of(config: TokenSelection) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = FAMILIES["gpt2"].model().double().train()
        model.config.resid_pdrop = 0.3
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout) and module is not model.transformer.drop:
                module.p = 0.3
        for block in model.transformer.h:
            block.attn.attn_dropout.p = 0.0
        sparsify(model, config)
        batch = FAMILIES["gpt2"].batch()
        torch.manual_seed(3)
        return selected_gradients(model, batch, some_rows(2, batch["input_ids"].shape[1]))[1]

    assert_same(of(TokenSelection(recompute=True)), of(TokenSelection()))


def with_lora(tokens: int = 64, layers: int = 2, **config: Any) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    shape = llama_config(num_hidden_layers=layers, max_position_embeddings=tokens)
    model = LlamaForCausalLM(shape)
    model.config.use_cache = False
    sparsify(model, TokenSelection(**config))
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).train()
    ids = torch.randint(3, 61, (1, tokens), generator=torch.Generator().manual_seed(1))
    return model, {"input_ids": ids, "labels": ids}


def test_kept_are_the_input_of_selected_rows_and_all_keys_and_values() -> None:
    tokens, chosen = 64, 8
    model, batch = with_lora(tokens, num_tokens=chosen, recompute=True)
    config = model.config
    saved = saved_activations(model, lambda: model(**batch).loss)
    kv = 2 * tokens * config.num_key_value_heads * config.head_dim * 4
    rows = chosen * config.hidden_size * 4
    for layer in range(2):
        assert sum(saved.by_layer[layer].values()) == pytest.approx(kv + rows, rel=0.01)


class Largest(TorchDispatchMode):
    """The most rows of a tensor as wide as the FFN."""

    def __init__(self, ffn: int) -> None:
        super().__init__()
        self.ffn, self.most = ffn, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.shape[-1:] == (self.ffn,) and out.ndim > 1 and not func.is_view:
            self.most = max(self.most, out[..., 0].numel())
        return out


def test_no_tensor_of_all_rows_is_as_wide_as_the_ffn() -> None:
    model, batch = with_lora(96, num_tokens=4, recompute=True)
    with Largest(model.config.intermediate_size) as largest:
        model(**batch).loss.backward()
    assert largest.most == 12  # an eighth of 96 rows


def test_offloaded_keys_leave_the_device_and_come_back() -> None:
    """Without a GPU: what is counted as on one."""
    moved: list[int] = []
    x = torch.ones(4, 8)
    with planning_for("cuda"), counting_moves(moved.append):
        first = OnHost((x, x), None)
        second = OnHost((x, x), first)
    assert moved == [128] * 4
    for waiting in (second, first):
        with waiting.on_device() as found:
            assert [t.shape for t in found] == [x.shape] * 2
    assert moved == [128] * 4 + [256] * 2


def test_offload_changes_no_gradient_where_there_is_nothing_to_move() -> None:
    (_, expected), (_, found) = both("llama", lora=True, offload=True)
    assert_same(found, expected)


def test_what_waits_on_the_host_is_let_go_after_the_step() -> None:
    model, batch = with_lora(num_tokens=4, recompute=True, offload=True)
    loss = model(**batch).loss
    assert selector_of(model).waiting is None
    loss.backward()
    del loss
    gc.collect()
    assert not [x for x in gc.get_objects() if type(x) is OnHost]


def test_the_last_norm_keeps_selected_rows_alone() -> None:
    """A frozen one; where its weight trains, every row that a loss reads counts."""
    model, batch = with_lora(64, num_tokens=4)
    saved = saved_activations(model, lambda: model(**batch).loss)
    outside = sum(saved.by_component.values()) - sum(sum(layer.values()) for layer in saved.by_layer.values())
    assert outside < 64 * model.config.hidden_size * 4


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ValueError, match="recompute=True"):
        TokenSelection(offload=True)
    with pytest.raises(ValueError, match="train_keys"):
        TokenSelection(recompute=True, train_keys=True)
    model, batch = FAMILIES["llama"].model().train(), FAMILIES["llama"].batch()
    sparsify(model, TokenSelection(recompute=True), PQAttention(keep_ratio=0.5, codebook_init="normal"))
    with pytest.raises(ValueError, match="sparse"):
        gradients(model, batch, some_rows(2, batch["input_ids"].shape[1]))


def test_a_trainer_with_checkpointing_is_refused(tmp_path: Any) -> None:
    model, _ = with_lora(num_tokens=4, recompute=True)
    site = next(m.selected for m in model.modules() if "selected" in getattr(m, "_modules", {}))
    arguments = TrainingArguments(str(tmp_path), gradient_checkpointing=True, report_to="none")
    assert "recompute" in site.refuses(arguments)
    assert site.refuses(TrainingArguments(str(tmp_path), report_to="none")) is None


def test_the_definition_is_the_same() -> None:
    case = FAMILIES["llama"]
    found = []
    for backend in ("reference", "auto"):
        model, batch = doubled(case)
        sparsify(model, TokenSelection(recompute=True))
        with sparsetrain.use_backend(backend):
            found.append(selected_gradients(model, batch, some_rows(2, tokens_of(case, batch)))[1])
    assert_same(found[1], found[0])
