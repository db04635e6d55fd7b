from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from sparsetrain import PQAttention, RoutedFFN, SemiStructured, TokenSelection, sparsify
from sparsetrain.hf.model.checkpointing import recompute
from sparsetrain.measure.memory import saved_activations
from sparsetrain.surgery.tiled import use_tiled_mlp
from tests.families import EXPERTS, FAMILIES, HIDDEN, LAYERS

ABLE = [name for name in FAMILIES if name not in ("bert", "opt", "roberta-prelayernorm")]


def made(family: str, pieces: int, way: str = "full") -> Any:
    model = FAMILIES[family].model()
    use_tiled_mlp(model, pieces)
    if "lora" in way:
        transposed = any(isinstance(module, Conv1D) for module in model.modules())
        torch.manual_seed(0)
        model = get_peft_model(
            model, LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", init_lora_weights=False,
                              lora_dropout=0.0, fan_in_fan_out=transposed)
        )  # fmt: skip
    if "again" in way:
        recompute(model, reentrant="reentrant" in way)
        model.enable_input_require_grads()
    return model.train()


def step(model: Any, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    out = model.double()(**{name: x.double() if x.is_floating_point() else x for name, x in batch.items()})
    loss = getattr(out, "loss", None)
    loss = out.logits.square().mean() if loss is None else loss
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", ["full", "lora", "lora again", "lora again reentrant"])
@pytest.mark.parametrize("family", ABLE)
def test_loss_and_every_gradient_are_those_of_the_whole(family: str, way: str) -> None:
    if "again" in way and FAMILIES[family].vision:
        pytest.skip("enable_input_require_grads is for token embeddings")
    batch = FAMILIES[family].batch(2, 37)  # no multiple of the pieces
    if FAMILIES[family].causal and not FAMILIES[family].vision:
        batch["labels"] = batch["input_ids"]
    loss, gradients = step(made(family, 1, way), batch)
    found, others = step(made(family, 5, way), batch)
    assert found == pytest.approx(loss, rel=1e-9) and gradients and gradients.keys() == others.keys()
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-8, atol=1e-9 * largest, msg=name)


def test_no_more_than_the_input_of_an_ffn_is_kept() -> None:
    batch = FAMILIES["llama"].batch(1, 200)
    whole, tiled = (
        saved_activations(model, lambda model=model: model(**batch, labels=batch["input_ids"]).loss)
        for model in (made("llama", 1, "lora"), made("llama", 4, "lora"))
    )
    input_bytes = LAYERS * 200 * HIDDEN * 4
    assert tiled.by_component["ffn"] == input_bytes < 0.25 * whole.by_component["ffn"]
    assert tiled.by_component["attention"] == whole.by_component["attention"]


def test_evaluation_is_in_one_piece_and_bit_equal() -> None:
    batch = FAMILIES["llama"].batch()
    with torch.no_grad():
        assert torch.equal(made("llama", 4).eval()(**batch).logits, made("llama", 1).eval()(**batch).logits)


@pytest.mark.parametrize("config", [RoutedFFN(num_blocks=4), TokenSelection(), SemiStructured()])
def test_a_method_on_the_ffn_is_refused(config: Any) -> None:
    model = FAMILIES["llama"].model()
    handle = sparsify(model, config, calibration=[FAMILIES["llama"].batch()])
    with pytest.raises(ValueError, match=f"tiled_mlp=4 cannot be: {config.method} edits"):
        use_tiled_mlp(model, 4, handle.plan.edits)


def test_a_method_on_the_attention_goes_with_it() -> None:
    batch = FAMILIES["llama"].batch(2, 96)
    found = []
    for pieces in (1, 3):
        model = FAMILIES["llama"].model()
        handle = sparsify(model, PQAttention(keep_ratio=0.5, block_q=16, block_k=16), calibration=[batch])
        use_tiled_mlp(model, pieces, handle.plan.edits)
        found.append(step(model.train(), batch | {"labels": batch["input_ids"]}))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)


@pytest.mark.parametrize(
    ("model", "why"), [(FAMILIES["bert"].model, "runs its FFN itself"), (EXPERTS["mixtral"], "mixture")]
)
def test_other_ffns_are_refused(model: Any, why: str) -> None:
    with pytest.raises(ValueError, match=f"{why}.*tiled_mlp=1"):
        use_tiled_mlp(model(), 2)
    use_tiled_mlp(model(), 1)
