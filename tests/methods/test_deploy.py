"""Train sparse, deploy dense: every method on every family, with and without LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.pytorch_utils import Conv1D

import sparsetrain
from sparsetrain.surgery.deploy import DeployDense
from tests.methods.test_contract import CASES, KINDS, PAIRS, assert_near, example, gradients, logits, of_its_own, own

LANGUAGE = [
    (method, family)
    for method, family in PAIRS
    if not CASES[family].vision and not CASES[family].diffusion and not KINDS[method].trains_own
]
adapted = pytest.mark.parametrize(("method", "family"), of_its_own(LANGUAGE))


def deployed(model: Any, family: str, method: str, **options: Any) -> sparsetrain.Handle:
    case = CASES[family]
    batches = [case.batch(4, seed=5), case.batch(4, seed=6)]
    return sparsetrain.sparsify(model, example(method), calibration=batches, deploy=DeployDense(**options))


def dense_stays(method: str, family: str) -> None:
    if KINDS[method].stays_sparse:
        with pytest.raises(ValueError, match="to be used sparse"):
            deployed(CASES[family].model(), family, method)
        pytest.skip("its product is sparse, and dense is refused")
    if any(edit.replaces for edit in sparsetrain.plan(CASES[family].model(), example(method)).edits):
        with pytest.raises(ValueError, match="needs the dense weights"):
            deployed(CASES[family].model(), family, method)
        pytest.skip("replaces dense weights, and is refused")


@own
def test_evaluation_is_the_dense_model_and_training_is_not(method: str, family: str) -> None:
    dense_stays(method, family)
    case = CASES[family]
    model, batch = case.model(), case.batch()
    expected, dense = logits(model, batch), gradients(model.train(), batch)
    handle = deployed(model.eval(), family, method, dense_first=0.1, dense_last=0.3)
    claimed = tuple(f"{name}." for edit in handle.plan.edits for name in edit.claims)  # may lie in another order
    dense = {name: grad for name, grad in dense.items() if not name.startswith(claimed)}
    if KINDS[method].trains_own:  # it has a gradient of its own, and changes no other
        assert_near(logits(model.eval(), batch), expected)
        return
    own = {id(p) for _, module in handle.installed for p in module.parameters()}
    assert not any(p.requires_grad for p in model.parameters() if id(p) in own)

    def differs(step: int) -> bool:
        handle.step(step, 10)
        assert_near(logits(model.eval(), batch), expected)
        found = gradients(model.train(), batch)
        largest = max(grad.abs().max() for grad in dense.values())
        return any((found[name] - grad).abs().max() > 1e-4 * largest for name, grad in dense.items())

    assert [differs(step) for step in (0, 1, 6)] == [False, True, True]
    assert [differs(step) for step in (7, 9)] == [False, False]
    assert differs(5)  # a run that goes on earlier
    handle.restore()
    assert torch.equal(logits(model.eval(), batch), expected)


@adapted
def test_the_adapter_is_plain(method: str, family: str, tmp_path: Path) -> None:
    """What PEFT saves of a model that is deployed dense, PEFT loads on the plain model with the same outputs."""
    dense_stays(method, family)
    case = CASES[family]
    model, batch = case.model(), case.batch()
    handle = deployed(model, family, method)
    assert handle.modules_to_save == []
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=transposed))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    before = logits(wrapped.eval(), batch)
    wrapped.save_pretrained(str(tmp_path), save_embedding_layers=False)
    plain = PeftModel.from_pretrained(case.model(), str(tmp_path)).eval()
    assert_near(before, logits(plain, batch))
    handle.restore()  # under the adapter, whose factors move with the units of what they adapt
    assert torch.equal(logits(wrapped, batch), logits(plain, batch))


def test_shares_of_the_steps() -> None:
    routed, tokens = example("routed_ffn"), example("token_selection")
    default = DeployDense()
    assert [default.is_dense(routed, step, 100) for step in (0, 4, 5, 79, 80, 99)] == [
        True,
        True,
        False,
        False,
        True,
        True,
    ]
    assert not any(default.is_dense(tokens, step, 100) for step in range(100))
    assert DeployDense(dense_last=0.2).is_dense(tokens, 80, 100)
    assert not default.is_dense(routed, 0, None)
    with pytest.raises(ValueError, match="no step to train sparse"):
        DeployDense(dense_first=0.5, dense_last=0.5)
    with pytest.raises(ValueError, match="share of the steps"):
        DeployDense(dense_first=-0.1)
    with pytest.raises(ValueError, match="is unknown"):
        sparsetrain.sparsify(CASES["llama"].model(), routed, deploy="dence")  # type: ignore[arg-type]
