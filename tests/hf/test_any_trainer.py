"""Token selection by calling the model: Trainer, TRL, accelerate and a loop of one's own train on selected tokens."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

import sparsetrain
from sparsetrain import RoutedFFN, TokenSelection
from sparsetrain.hf.train.checks import check_arguments
from sparsetrain.ops.selected_rows import Rows
from tests.families import FAMILIES
from tests.hf.test_trl import tokenizer
from tests.methods.test_token_selection import cut_by_hooks, selector_of

LORA = LoraConfig(r=2, target_modules="all-linear")


def llama(config: TokenSelection | None = None) -> tuple[Any, sparsetrain.Handle]:
    model = FAMILIES["llama"].model().train()
    return model, sparsetrain.sparsify(model, config or TokenSelection())


def labelled(rows: int = 2, tokens: int = 40, prompt: int = 9, seed: int = 1) -> dict[str, Tensor]:
    ids = FAMILIES["llama"].batch(rows, tokens, seed)["input_ids"]
    labels = ids.clone()
    labels[0, :prompt] = -100
    return {"input_ids": ids, "labels": labels}


class Watch:
    """What every training forward of a model was given, and what it selected."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.calls: list[tuple[dict[str, Any], Rows]] = []
        model.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, model: Any, args: Any, kwargs: Any, out: Any) -> None:
        if model.training and torch.is_grad_enabled():
            self.calls.append((dict(kwargs), selector_of(model).rows))

    def sums(self) -> list[tuple[float, int, int]]:
        """(summed loss of selected targets, their number, number of all targets) of each forward, by the definition."""
        self.model.eval()
        found = []
        for given, rows in self.calls:
            inputs = {n: x for n, x in given.items() if n in ("input_ids", "attention_mask", "position_ids")}
            with torch.no_grad():
                logits = self.model(**inputs, use_cache=False).logits
            target = F.pad(given["labels"][:, 1:], (0, 1), value=-100)
            here = rows.selected_bt
            total = F.cross_entropy(logits[here].float(), target[here], reduction="sum")
            found.append((float(total), int((target[here] != -100).sum()), int((target != -100).sum())))
        return found


def expected_losses(watch: Watch, accumulation: int) -> list[float]:
    """The mean over the selected targets of each step, all its micro-batches together."""
    sums = watch.sums()
    steps = [sums[i : i + accumulation] for i in range(0, len(sums), accumulation)]
    return [sum(loss for loss, *_ in s) / sum(chosen for _, chosen, _ in s) for s in steps]


def train(model: Any, handle: sparsetrain.Handle, folder: Path, accumulation: int = 1, **options: Any) -> list[float]:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=accumulation,
        learning_rate=0.0, logging_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        dataloader_pin_memory=False, **options,
    )  # fmt: skip
    data = [{n: x[i] for n, x in labelled(seed=seed).items()} for seed in range(9) for i in range(2)]
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[handle.callback()])  # type: ignore
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("choice", [{}, {"policy": "loss"}, {"pool": "targets"}], ids=str)
def test_a_plain_trainer_trains_on_selected_targets(choice: dict[str, Any], accumulation: int, tmp_path: Path) -> None:
    model, handle = llama(TokenSelection(**choice))
    watch = Watch(model)
    losses = train(model, handle, tmp_path, accumulation)
    assert losses == pytest.approx(expected_losses(watch, accumulation), rel=1e-5)
    drawn = [rows.index_bk.tolist() for _, rows in watch.calls]
    assert len(drawn) == 3 * accumulation and drawn[0] != drawn[-1]


@pytest.mark.parametrize("order", ["convert, adapt", "adapt, convert"])
def test_a_peft_model_trains_in_both_orders(order: str, tmp_path: Path) -> None:
    model = FAMILIES["llama"].model().train()
    if order == "adapt, convert":
        model = get_peft_model(model, LORA)
        handle = sparsetrain.sparsify(model, TokenSelection())
    else:
        handle = sparsetrain.sparsify(model, TokenSelection())
        model = get_peft_model(model, LORA)
    watch = Watch(model)
    assert train(model, handle, tmp_path) == pytest.approx(expected_losses(watch, 1), rel=1e-3)
    handle.restore()
    assert not any(hasattr(type(m), "mixin") for m in model.modules())


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize(("accumulation", "bf16"), [(1, False), (2, False), (2, True)])
@pytest.mark.usefixtures("fresh_accelerator")
def test_trl_divides_by_what_it_counted(
    packing: bool, peft: bool, accumulation: int, bf16: bool, tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl")
    model, handle = llama()
    rows = [" ".join(f"w{3 + (i * j) % 57}" for j in range(1, 40 + 7 * i)) for i in range(1, 13)]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            packing=packing,
            max_length=96,
            report_to=[],
            use_cpu=True,
            bf16=bf16,
            logging_steps=1,
            learning_rate=0.0,
            lr_scheduler_type="constant",
            gradient_accumulation_steps=accumulation,
        ),
        train_dataset=Dataset.from_dict({"text": rows}),
        processing_class=tokenizer(),
        peft_config=LORA if peft else None,
        callbacks=[handle.callback()],
    )
    watch = Watch(trainer.model)
    trainer.train()
    assert len(watch.calls) == 2 * accumulation
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [e["loss"] for e in logs] == pytest.approx(expected_losses(watch, accumulation), rel=2e-2 if bf16 else 1e-3)
    assert all(0 <= e["mean_token_accuracy"] <= 1 and e["entropy"] > 0 for e in logs)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_accelerate_loop_and_ones_own(precision: Any) -> None:
    model, handle = llama()
    own = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    assert (prepared.forward.inner is not None) == (precision == "bf16")
    watch = Watch(model)
    losses = []
    for step in range(2):
        handle.step(step, 2)
        loss = prepared(**labelled(seed=step)).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    ids = labelled(seed=0)
    selector_of(own).step = 0
    first = own(**ids).loss
    assert losses[0] == pytest.approx(first.item(), rel=1e-6 if precision == "no" else 2e-2)
    assert watch.calls[0][1].index_bk.tolist() == selector_of(own).rows.index_bk.tolist()
    bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert bare is model and model.forward.inner is None


def test_what_is_assigned_as_forward_runs_inside_and_is_handed_back() -> None:
    model, handle = llama()
    batch = labelled()
    expected = model(**batch).loss
    seen: list[dict[str, Any]] = []

    def around(read: Any, name: str) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            seen.append({"name": name, **kwargs})
            return read(*args, **kwargs)

        return forward

    model.forward = around(model.forward, "first")
    after_first = model.forward
    model.forward = around(model.forward, "second")
    assert torch.equal(model(**batch).loss, expected) and torch.equal(
        model(batch["input_ids"], labels=batch["labels"]).loss, expected
    )
    assert [call["name"] for call in seen] == ["second", "first"] * 2
    assert all((call["labels"] != -100).sum() < (batch["labels"] != -100).sum() for call in seen)
    model.forward = after_first
    seen.clear()
    model(**batch)
    assert [call["name"] for call in seen] == ["first"]
    handle.restore()
    assert type(model) is LlamaForCausalLM and "inner_forward" not in vars(model) and "selector" not in vars(model)
    seen.clear()
    dense = model(**batch).loss
    assert [call["name"] for call in seen] == ["first"] and torch.equal(seen[0]["labels"], batch["labels"])
    del model.forward
    assert torch.equal(model(**batch).loss, dense)


def test_a_forward_that_was_assigned_before_goes_inside() -> None:
    model, batch = FAMILIES["llama"].model().train(), labelled()
    seen: list[int] = []
    dense = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(int((kwargs["labels"] != -100).sum()))
        return dense(*args, **kwargs)

    model.forward = counted
    handle = sparsetrain.sparsify(model, TokenSelection())
    model(**batch).loss.backward()
    assert seen[0] < int((batch["labels"] != -100).sum())
    handle.restore()
    assert vars(model)["forward"] is counted


def test_the_class_keeps_its_name_and_its_signature(tmp_path: Path) -> None:
    dense = FAMILIES["llama"].model()
    names = list(inspect.signature(LlamaForCausalLM.forward).parameters)
    batch = labelled()
    with torch.no_grad():
        generated = dense.generate(batch["input_ids"], max_new_tokens=5, do_sample=False)
        loss = dense(**batch).loss
    model, handle = llama()
    model.eval()
    kind = type(model)
    assert (kind.__name__, kind.__module__) == ("LlamaForCausalLM", LlamaForCausalLM.__module__)
    assert str(kind) == str(LlamaForCausalLM) and kind is not LlamaForCausalLM
    found = list(inspect.signature(kind.forward).parameters)
    assert [n for n in found if n != "token_scores"] == names and found[-1] == "kwargs"
    assert list(inspect.signature(model.forward).parameters) == found[1:]
    with torch.no_grad():
        assert torch.equal(model.generate(batch["input_ids"], max_new_tokens=5, do_sample=False), generated)
        assert torch.equal(model(**batch).loss, loss)
        assert torch.equal(model(**batch, token_scores=torch.ones(2, 40)).loss, loss)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is LlamaForCausalLM and not any(hasattr(type(m), "mixin") for m in plain.modules())
    handle.restore()
    assert type(model) is LlamaForCausalLM and type(model.model) is type(plain.model)


def test_outside_of_the_models_forward_blocks_are_dense_and_recomputing_them_is_refused() -> None:
    model, _ = llama()
    model(**labelled())
    layer = model.model.layers[0]
    x = torch.randn(2, 24, 32, requires_grad=True)
    angles = model.model.rotary_emb(x, torch.arange(24)[None])
    out = torch.utils.checkpoint.checkpoint(lambda h: layer(h, position_embeddings=angles), x, use_reentrant=False)
    assert out.shape == x.shape
    with pytest.raises(RuntimeError, match="gradient_checkpointing_enable"):
        out.sum().backward()
    layer(x, position_embeddings=angles).sum().backward()
    assert x.grad is not None and x.grad.abs().sum(-1).all()


def test_embedded_tokens_select_and_lose_as_ids_do() -> None:
    model, _ = llama(TokenSelection(policy="prefix", keep_ratio=0.5))
    batch = labelled()
    embedded = {"inputs_embeds": model.model.embed_tokens(batch["input_ids"]), "labels": batch["labels"]}
    torch.testing.assert_close(model(**embedded).loss, model(**batch).loss)


def test_scores_may_come_with_the_batch() -> None:
    model, _ = llama(TokenSelection(pool="scored", num_tokens=4))
    scores = torch.zeros(2, 40)
    scores[:, [7, 21, 33]] = 1.0
    model(**labelled(), token_scores=scores)
    assert selector_of(model).rows.index_bk.tolist() == [[0, 7, 21, 33]] * 2


@pytest.mark.parametrize("first", ["tokens", "routed"])
def test_padding_is_noted_in_both_orders(first: str) -> None:
    model, batch = FAMILIES["llama"].model().train(), FAMILIES["llama"].batch()
    batch["attention_mask"][0, 80:] = 0
    configs = [TokenSelection(), RoutedFFN(num_blocks=4, num_active=2, warmup_ratio=0.0)]
    handle = sparsetrain.sparsify(model, *(configs if first == "tokens" else configs[::-1]))
    for block in model.model.layers:
        assert "attention_mask" in inspect.signature(block.forward).parameters
        assert block.attention_mask_place == 1
    handle.step(1, 2)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(site.valid_bt is not None for site in handle.sites("routed_ffn").values())
    with torch.no_grad():
        model.eval()(**batch)
    for site in handle.sites("routed_ffn").values():
        assert torch.equal(site.valid_bt, batch["attention_mask"] > 0)


@pytest.mark.filterwarnings("default")
def test_weights_that_a_loss_head_would_ignore_are_refused(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    model, _ = llama(TokenSelection(unbiased=True))
    assert torch.isfinite(model(**labelled()).loss)
    trl.trainer.utils.add_fused_lm_head(model)
    with pytest.raises(ValueError, match="unbiased"):
        model(**labelled(), fused_lm_head=True)
    assert torch.isfinite(model(**labelled()).loss)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("asked", ["DPO", "KTO", "GRPO", "RLOO", "SFT dft"])
def test_a_loss_that_is_no_sum_reads_every_log_probability(asked: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    dense = FAMILIES["llama"].model().train()
    model, handle = llama(TokenSelection(keep_ratio=0.4))
    for one in (dense, model):
        trl.trainer.utils.add_fused_lm_head(one)
    kind, _, loss = asked.partition(" ")
    more = {"loss_type": loss} if loss else {}
    arguments = getattr(trl, f"{kind}Config")(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], **more)
    for _, site in handle.installed:
        site.trained_with(arguments)
    out = model(**labelled(), fused_lm_head=True)
    rows = selector_of(model).rows
    with cut_by_hooks(dense, rows.selected_bt):
        expected = dense(**labelled(), fused_lm_head=True)
    torch.testing.assert_close(out.log_probs, expected.log_probs, rtol=1e-5, atol=1e-6)
    assert (expected.log_probs != 0).sum() == (labelled()["labels"][:, 1:] != -100).sum()
    weigh = torch.randn(out.log_probs.shape, generator=torch.Generator().manual_seed(0))
    (out.log_probs * weigh).sum().backward()
    had = labelled()["labels"][:, 1:] != -100
    left = had & rows.selected_bt[:, :-1]
    share = left.sum(1, keepdim=True) / had.sum(1, keepdim=True)
    (expected.log_probs * weigh * left / share).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_arguments_that_would_lose_wrongly_are_refused(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    _, handle = llama()
    options: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": []}
    check_arguments(handle, trl.SFTConfig(**options))
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        check_arguments(handle, TrainingArguments(**options, label_smoothing_factor=0.1))
