"""Token selection in real runs: every task, resumption, the report's formula, TRL's packing, masked language models."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn import functional as F
from transformers import BertForMaskedLM, DistilBertForMaskedLM, LlamaConfig, LlamaForCausalLM

import sparsetrain
from sparsetrain import TokenSelection
from sparsetrain.hf.train.finetune import Result, finetune
from sparsetrain.methods.token_selection.ahead import look_ahead
from tests.families import FAMILIES
from tests.hf import runs
from tests.hf.test_checkpoint import StopAt
from tests.hf.test_finetune import labelled
from tests.hf.test_trl import tokenizer
from tests.methods.test_token_selection import selector_of

TOKENS = {"method": "token_selection", "keep_ratio": 0.3}


def losses(result: Result) -> list[float | None]:
    return [row["loss"] for row in result.run["steps"]]


@pytest.mark.parametrize(
    "choice", [{}, {"unbiased": True}, {"policy": "loss"}, {"policy": "gradient_norm"}], ids=lambda choice: str(choice)
)
def test_a_run_learns_and_reports_its_saved_bytes_against_the_formula(choice: dict[str, Any], tmp_path: Path) -> None:
    method = TOKENS | choice
    result = finetune(runs.recipe(tmp_path, methods=[method], steps=30))
    stages = result.run["perplexity"]
    assert stages["after_conversion"] == stages["dense"]  # the forward is exact
    assert stages["after_training"] < 0.97 * stages["dense"]  # type: ignore[operator]
    notes = json.loads((tmp_path / "out" / "report.json").read_text())["notes"]
    assert "token_selection: ran selected attention on torch, selected loss on torch." in notes
    note = next(n for n in notes if "formula" in n)
    found, formula = (float(x) for x in re.findall(r"(?:save|gives) (0\.\d+)", note))
    # beside the formula's share, 19 of 64 tokens save indices and row statistics; of LoRA, they keep less than in PEFT
    assert formula < 0.5 and 0.9 * formula < found < 1.05 * formula, note


def test_selection_is_what_the_blocks_and_the_head_save(tmp_path: Path) -> None:
    dense = finetune(runs.recipe(tmp_path, output=str(tmp_path / "a")), write=False)
    chosen = finetune(runs.recipe(tmp_path, output=str(tmp_path / "b"), methods=[TOKENS]), write=False)
    saved = [sum(r.run["saved_activation_bytes"].values()) for r in (dense, chosen)]
    assert saved[1] < 0.6 * saved[0]
    assert losses(dense) != losses(chosen)


def conversations(path: Path) -> Path:
    rows = [{"prompt": "the sun runs", "completion": "over the moon and the star " * (1 + i % 3)} for i in range(60)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("pool", ["all", "targets"])
def test_conversations_are_learned(pool: str, tmp_path: Path) -> None:
    data = conversations(tmp_path / "talk.jsonl")
    changes: dict[str, Any] = {"data": str(data), "task": "sft", "methods": [TOKENS | {"pool": pool}], "steps": 20}
    stages = finetune(runs.recipe(tmp_path, **changes), write=False).run["perplexity"]
    assert stages["after_training"] < 0.9 * stages["dense"]  # type: ignore[operator]


def test_a_classifier_with_attention_dropout_is_learned(tmp_path: Path) -> None:
    runs.bert(tmp_path / "bert")
    data = labelled(tmp_path / "rows.csv")
    changes = {"model": str(tmp_path / "bert"), "data": str(data), "task": "classify", "methods": [TOKENS], "steps": 8}
    result = finetune(runs.recipe(tmp_path, **changes), write=False)
    assert any("attention_probs_dropout_prob 0.1 -> 0" in note for note in result.notes)
    assert len(result.run["steps"]) == 8 and "after_training" in result.run["accuracy"]


@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant", "reentrant"])
def test_a_resumed_run_selects_the_same_tokens(checkpointing: str, tmp_path: Path) -> None:
    changes = {"methods": [TOKENS], "gradient_checkpointing": checkpointing}
    whole = finetune(runs.recipe(tmp_path, output=str(tmp_path / "a"), **changes), write=False)
    with pytest.raises(KeyboardInterrupt):
        finetune(runs.recipe(tmp_path, **changes), callbacks=[StopAt(5)], write=False)
    again = finetune(runs.recipe(tmp_path, **changes, resume=True), write=False)
    assert again.resumed_from == 4 and losses(again) == losses(whole)


def test_a_dense_beginning_and_finish_train_on_all_tokens_and_resume(tmp_path: Path) -> None:
    phases: dict[str, Any] = {"deploy": "dense", "dense_first": 0.34, "dense_last": 0.34}
    dense = finetune(runs.recipe(tmp_path, output=str(tmp_path / "a"), deploy="dense"), write=False)
    changes = {"methods": [TOKENS], **phases}
    whole = finetune(runs.recipe(tmp_path, output=str(tmp_path / "b"), **changes), write=False)
    assert losses(whole)[:2] == pytest.approx(losses(dense)[:2], rel=1e-5)
    assert losses(whole)[2:] != pytest.approx(losses(dense)[2:], rel=1e-3)
    with pytest.raises(KeyboardInterrupt):
        finetune(runs.recipe(tmp_path, **changes), callbacks=[StopAt(5)], write=False)
    again = finetune(runs.recipe(tmp_path, **changes, resume=True), write=False)
    assert again.resumed_from == 4 and losses(again) == losses(whole)


def test_sparse_context_and_selected_tokens_train_together(tmp_path: Path) -> None:
    methods = [runs.CLUSTERED, runs.PQ, TOKENS]
    result = finetune(runs.recipe(tmp_path, methods=methods, steps=20), write=False)
    stages = result.run["perplexity"]
    assert stages["after_training"] < stages["after_conversion"]  # type: ignore[operator]
    assert {row["method"] for row in result.plan} == {"routed_ffn", "pq_attention", "token_selection"}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("packing", [False, True])
def test_trl_trains_on_the_selected_targets(packing: bool, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    model = FAMILIES["llama"].model()
    sparsetrain.sparsify(model, TokenSelection())
    rows = [" ".join(f"w{3 + (i * j) % 57}" for j in range(1, 40 + 7 * i)) for i in range(1, 9)]
    options: Any = {"max_length": 96, "report_to": [], "use_cpu": True, "logging_steps": 1, "learning_rate": 1e-3}
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, packing=packing, **options
        ),
        train_dataset=Dataset.from_dict({"text": rows}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.model_accepts_loss_kwargs = True
    found = trainer.compute_loss(trainer.model, dict(batch))
    selector = selector_of(model)
    assert selector.rows is not None
    here = selector.rows.selected_bt
    trainer.model.eval()
    logits = trainer.model(**{n: x for n, x in batch.items() if n != "labels"}, use_cache=False).logits
    target = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(found, F.cross_entropy(logits[here], target[here]), rtol=1e-4, atol=1e-5)
    trainer.train()
    records = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(records) == 2 and all(0 < loss < 10 for loss in records)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_masked_language_models_lose_on_the_selected_targets(kind: str) -> None:
    torch.manual_seed(0)
    config = FAMILIES[kind].model().config
    model: Any = {"bert": BertForMaskedLM, "distilbert": DistilBertForMaskedLM}[kind](config)
    batch = FAMILIES["bert"].batch()
    labels = batch["input_ids"].where(torch.rand(2, 100) < 0.3, torch.tensor(-100))
    sparsetrain.sparsify(model.train(), TokenSelection(keep_ratio=0.4))
    loss = model(**batch, labels=labels).loss
    loss.backward()
    selector = selector_of(model)
    assert selector.rows is not None
    here = selector.rows.selected_bt
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    torch.testing.assert_close(loss.detach(), F.cross_entropy(logits[here], labels[here]))
    assert "forward" not in vars(model.get_output_embeddings())


def test_a_pooled_mean_is_exact_and_only_selected_tokens_carry_its_gradient() -> None:
    case = FAMILIES["bert"]
    model, batch = case.model(), case.batch()
    expected = model.bert(**batch).last_hidden_state.mean(1)
    sparsetrain.sparsify(model.train(), TokenSelection())
    hidden = model.bert(**batch).last_hidden_state
    hidden.retain_grad()
    torch.testing.assert_close(hidden.mean(1), expected)
    inputs: list[torch.Tensor] = []
    block = model.bert.encoder.layer[1]
    block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]) or args[0].retain_grad())
    model.bert(**batch).last_hidden_state.mean(1).square().sum().backward()
    selector = selector_of(model)
    assert selector.rows is not None and inputs[0].grad is not None
    assert torch.equal(inputs[0].grad.abs().sum(-1) > 0, selector.rows.selected_bt)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_are_the_losses_and_the_gradient_norms_of_the_head(family: str) -> None:
    case = FAMILIES[family]
    model, batch = case.model().train(), case.batch(1, 20)
    labels = batch["input_ids"].clone()
    labels[:, :5] = -100
    head = model.get_output_embeddings()
    full = batch | {"labels": labels}
    handle = sparsetrain.sparsify(model, TokenSelection())
    scores = {
        policy: look_ahead(model, full, policy=policy, attended=False)["token_scores"]
        for policy in ("loss", "gradient_norm")
    }
    handle.restore()
    assert model.training and "forward" not in vars(head)
    weight = head.weight.detach().clone().requires_grad_()
    noted: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: noted.append(args[0].detach()))
    model(**batch)
    hook.remove()
    for position in (4, 11, 18):
        loss = F.cross_entropy(F.linear(noted[0][0, position], weight), batch["input_ids"][0, position + 1])
        (grad,) = torch.autograd.grad(loss, weight)
        torch.testing.assert_close(scores["loss"][0, position], loss.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores["gradient_norm"][0, position], grad.norm(), rtol=1e-4, atol=1e-5)
    assert not scores["loss"][0, :4].any() and not scores["loss"][0, 19].any()


def test_what_a_policy_cannot_do_is_said() -> None:
    bert = FAMILIES["bert"]
    model = bert.model().train()
    sparsetrain.sparsify(model, TokenSelection(policy="loss"))
    with pytest.raises(ValueError, match="one label a row"):
        model(**bert.batch(), labels=torch.ones(2).long())
    llama = FAMILIES["llama"]
    model, batch = llama.model().train(), llama.batch()
    sparsetrain.sparsify(model, TokenSelection(unbiased=True))
    with pytest.raises(ValueError, match="unbiased"):
        model.model(**batch)
    with pytest.raises(ValueError, match="unbiased"):
        model(**batch)
    assert torch.isfinite(model(**batch, labels=batch["input_ids"]).loss)


def test_four_bit_weights() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from peft import get_peft_model

    torch.manual_seed(0)
    # its kernel for CPUs takes multiples of 32 alone
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=61, pad_token_id=0, **shape))  # type: ignore[arg-type]
    batch = {"input_ids": torch.randint(1, 61, (2, 40))}
    results = []
    for ratio in (1.0, 0.3):
        model = copy.deepcopy(dense)
        for block in model.model.layers:
            for name in ("gate_proj", "up_proj", "down_proj"):
                old = getattr(block.mlp, name)
                new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=torch.float32)
                new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False)
                setattr(block.mlp, name, new.to("cpu"))
        sparsetrain.sparsify(model, TokenSelection(keep_ratio=ratio))
        torch.manual_seed(0)
        lora = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).train()
        loss = lora(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        results.append(lora)
        assert any(p.grad is not None and p.grad.any() for p in lora.parameters())
    with torch.no_grad():
        logits = [lora.eval()(**batch).logits for lora in results]
    torch.testing.assert_close(*logits)
