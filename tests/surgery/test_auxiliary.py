"""Auxiliary losses arrive once and at the right scale, also under a gradient scaler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import TrainerState, TrainingArguments

import sparsetrain
from sparsetrain import PQAttention, RoutedFFN, TokenSelection
from sparsetrain.surgery import auxiliary
from sparsetrain.surgery.chunked_loss import use_chunked_loss
from tests.families import FAMILIES

SCALE = 2.0**16


def gradients(model: Any, scaler: Any, micro_batches: int = 1) -> dict[str, torch.Tensor]:
    """Unscaled gradients of what the methods added, after the backwards of the (scaled) losses of a step."""
    batch = FAMILIES["llama"].batch()
    model.zero_grad()
    for _ in range(micro_batches):
        loss = model(**batch, labels=batch["input_ids"]).loss / micro_batches
        scaler.scale(loss).backward()
    scale = scaler.get_scale()
    own = [name for name, _ in model.named_parameters() if "router" in name or "codebook" in name]
    return {name: model.get_parameter(name).grad / scale for name in own}


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("config", [PQAttention.example(), RoutedFFN.example()], ids=lambda config: config.method)
def test_scaler_and_accumulation_change_no_auxiliary_gradient(config: Any, micro_batches: int, tmp_path: Any) -> None:
    case = FAMILIES["llama"]
    model = case.model()
    handle = sparsetrain.sparsify(model, config, calibration=[case.batch(4)])
    model.train()
    handle.step(0, 10)
    expected = gradients(model, torch.amp.GradScaler("cpu", enabled=False))
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    # as the Trainer calls it: the callback reads the scale off the optimizer that accelerate has wrapped
    optimizer = Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.scaler = scaler
    scaler.scale(torch.ones(()))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], gradient_accumulation_steps=micro_batches
    )
    state = TrainerState(global_step=0, max_steps=10)
    handle.callback(at_end=False).on_step_begin(arguments, state, None, optimizer=optimizer)
    found = gradients(model, scaler, micro_batches)
    assert expected and any(grad.abs().max() > 0 for grad in expected.values())
    for name, grad in expected.items():
        rounding = 1e-6 * grad.abs().max().item()  # sums in another order: of its largest entries
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=rounding)


ADDED = {"pq_attention": PQAttention.example(), "routed_ffn": RoutedFFN.example()}


def converted(*configs: Any, seed: int = 0) -> tuple[Any, sparsetrain.Handle]:
    case = FAMILIES["llama"]
    model = case.model().train()
    return model, sparsetrain.sparsify(model, *configs, calibration=[case.batch(4)], seed=seed)


def adapted(model: Any, handle: sparsetrain.Handle) -> Any:
    torch.manual_seed(0)
    adapter = LoraConfig(r=2, target_modules="all-linear", modules_to_save=handle.modules_to_save)
    return get_peft_model(model, adapter)


def chunked(model: Any, handle: sparsetrain.Handle) -> Any:
    assert use_chunked_loss(model)
    return model


def checkpointed(model: Any, handle: sparsetrain.Handle, reentrant: bool) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


def under_accelerate(model: Any, handle: sparsetrain.Handle) -> Any:
    return Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


FORMS: dict[str, Any] = {
    "bare": lambda model, handle: model,
    "adapter": adapted,
    "chunked loss": chunked,
    "checkpointing": lambda model, handle: checkpointed(model, handle, False),
    "reentrant checkpointing": lambda model, handle: checkpointed(model, handle, True),
    "autocast around forward": under_accelerate,
}


def added_gradients(model: Any) -> dict[str, torch.Tensor]:
    own = {n: p.grad for n, p in model.named_parameters() if ("router" in n or "codebook" in n) and p.grad is not None}
    assert any(gradient.abs().max() > 0 for gradient in own.values())
    return {name: gradient.clone() for name, gradient in own.items()}


def after(model: Any, backward: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    backward()
    return added_gradients(model)


def assert_scaled(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], scale: float, rtol: float = 1e-4
) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = (found[name] / scale - gradient).norm()
        assert difference <= rtol * gradient.norm() + 1e-8, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ADDED)
def test_in_a_loop_of_ones_own_it_is_scaled_as_the_loss_is(method: str, form: str) -> None:
    plain, _ = converted(ADDED[method])
    model, handle = converted(ADDED[method])
    model, plain = FORMS[form](model, handle), FORMS[form](plain, handle)
    batch = FAMILIES["llama"].batch()
    batch["labels"] = batch["input_ids"]
    expected = after(plain, lambda: plain(**batch).loss.backward())
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)

    def step() -> None:
        for _ in range(3):
            scaler.scale(model(**batch).loss / 3).backward()

    assert_scaled(after(model, step), expected, SCALE, rtol=2e-2 if "autocast" in form else 1e-4)


def test_the_optimizer_steps_as_without_a_scaler() -> None:
    found = []
    for scale in (None, SCALE):
        model, handle = converted(*ADDED.values())
        handle.step(0, 10)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        batch = FAMILIES["llama"].batch()
        scaler.scale(model(**batch, labels=batch["input_ids"]).loss).backward()
        scaler.step(optimizer)
        found.append({n: p.detach() for n, p in model.named_parameters() if "router" in n or "codebook" in n})
    before = {n: p.detach() for n, p in converted(*ADDED.values())[0].named_parameters()}
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-7)
    assert any((value - before[name]).abs().max() > 1e-4 for name, value in found[0].items())


def test_every_forward_has_a_factor_of_its_own() -> None:
    model, _ = converted(*ADDED.values())
    one, other = ({**b, "labels": b["input_ids"]} for b in (FAMILIES["llama"].batch(2, 40, seed) for seed in (1, 2)))
    first = after(model, lambda: (3.0 * model(**one).loss).backward())
    second = after(model, lambda: (5.0 * model(**other).loss).backward())
    both = after(model, lambda: (3.0 * model(**one).loss + 5.0 * model(**other).loss).backward())
    assert_scaled(both, {name: first[name] + second[name] for name in first}, 1.0)

    def twice() -> None:
        loss = model(**one).loss
        loss.backward(torch.tensor(3.0), retain_graph=True)
        loss.backward(torch.tensor(6.0))

    assert_scaled(after(model, twice), first, 3.0)


def test_a_loss_that_is_divided_by_the_step_s_targets_brings_its_share() -> None:
    model, _ = converted(*ADDED.values())
    batch = FAMILIES["llama"].batch(2, 40)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :10] = -100
    mean = after(model, lambda: model(**batch).loss.backward())
    scale = 2.0**10  # as in a step of four such batches
    part = after(model, lambda: (scale * model(**batch, num_items_in_batch=torch.tensor(4 * 60)).loss).backward())
    auxiliary = {name for name in mean if name.endswith(("router.bias", "codebook.weight"))}
    # the task's own gradient through a router is of 59 targets a row there, and of 60 here
    for name in auxiliary:
        torch.testing.assert_close(4 * part[name] / scale, mean[name], rtol=5e-2, atol=1e-4, msg=name)


def test_a_loss_of_logits_is_scaled_as_was_said() -> None:
    model, handle = converted(*ADDED.values())
    batch = FAMILIES["llama"].batch()
    expected = after(model, lambda: model(**batch, labels=batch["input_ids"]).loss.backward())

    def outside() -> None:
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        (SCALE * F.cross_entropy(logits, batch["input_ids"][:, 1:].flatten())).backward()

    handle.step(0, None, loss_scale=SCALE)
    assert_scaled(after(model, outside), expected, SCALE)
    handle.step(0, None)
    unsaid = after(model, outside)
    codebook = next(name for name in expected if "codebook" in name)
    torch.testing.assert_close(unsaid[codebook], expected[codebook])  # 1 where nobody says


def test_beside_token_selection_and_two_conversions() -> None:
    model, first = converted(TokenSelection(keep_ratio=0.5))
    dense = type(FAMILIES["llama"].model())
    batch = FAMILIES["llama"].batch()
    batch["labels"] = batch["input_ids"]
    others = []
    for config in ADDED.values():
        others.append(sparsetrain.sparsify(model, config, calibration=[FAMILIES["llama"].batch(4)]))
        expected = after(model, lambda: model(**batch).loss.backward())
        assert_scaled(after(model, lambda: (SCALE * model(**batch).loss).backward()), expected, SCALE)
    others.pop().restore()
    left = after(model, lambda: model(**batch).loss.backward())
    assert_scaled(after(model, lambda: (SCALE * model(**batch).loss).backward()), left, SCALE)
    others.pop().restore()
    assert "loss_scales" not in vars(model)
    first.restore()
    assert type(model) is dense


def test_a_loss_in_chunks_that_came_later_stays_after_restoring() -> None:
    model, handle = converted(*ADDED.values())
    assert use_chunked_loss(model)
    handle.restore()
    batch = FAMILIES["llama"].batch()
    out = model(**batch, labels=batch["input_ids"])
    assert out.logits is None and "loss_scales" not in vars(model)
    expected = FAMILIES["llama"].model()(**batch, labels=batch["input_ids"]).loss
    torch.testing.assert_close(out.loss, expected)


def test_the_op_that_reads_a_factor_late_keeps_to_what_it_declares() -> None:
    torch.library.opcheck(auxiliary._read_late, (torch.ones(()), torch.randn(3, 2)))
