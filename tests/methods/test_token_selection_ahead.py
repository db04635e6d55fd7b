"""A look at all rows before any is selected: what it kept changes no number, and what it scored is what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sparsetrain
from sparsetrain import PQAttention
from sparsetrain.methods.token_selection import TokenSelection, ahead
from sparsetrain.methods.token_selection.policies import Batch
from sparsetrain.methods.token_selection.previous import Previous
from tests.families import FAMILIES
from tests.methods.test_token_selection import assert_same, cut_by_hooks, doubled, exact, selector_of, with_lora
from tests.turns import in_turn

LOOKS = [
    TokenSelection(policy="loss"),
    TokenSelection(policy="gradient_norm", pool="targets", keep_ratio=0.6),
    TokenSelection(pool="targets", keep_all_targets=True, context="attended", num_tokens=40),
    TokenSelection(pool="targets", keep_all_targets=True, context="attended", num_tokens=40, train_keys=True),
]
looks = pytest.mark.parametrize("config", LOOKS, ids=["loss", "gradient_norm", "attended", "train_keys"])


def labelled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two rows with 60 and 8 targets, the second of 90 tokens."""
    batch = {name: x.clone() for name, x in batch.items()}
    labels = batch["input_ids"].clone()
    labels[0, :40], labels[1, :82], labels[1, 90:] = -100, -100, -100
    batch["attention_mask"][1, 90:] = 0
    return batch | {"labels": labels}


def step(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], list[list[int]]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, selector_of(model).rows.positions


def all_rows_ran(model: Any, batch: dict[str, Tensor]) -> int:
    """How often the last block's attention ran on all rows in one step."""
    blocks = [m for m in model.modules() if "selected" in getattr(m, "_modules", {})]
    counted: list[int] = []
    hook = (
        blocks[-1]
        .get_submodule(blocks[-1].selected.attention)
        .register_forward_pre_hook(
            lambda module, args, kwargs: counted.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
            with_kwargs=True,
        )
    )
    step(model, batch)
    hook.remove()
    return counted.count(batch["input_ids"].shape[1])


@in_turn("config, family, lora", LOOKS, ["llama", "gpt2", "opt", "mistral", "gemma3", "qwen3"], [False, True], turns=2)
def test_what_a_look_kept_gives_the_loss_and_gradients_of_another_forward(
    config: TokenSelection, family: str, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = doubled(FAMILIES[family])
    batch = labelled(batch)
    sparsetrain.sparsify(model, config)
    model = with_lora(model).train() if lora else model
    loss, found, positions = step(model, batch)
    assert all_rows_ran(model, batch) == 1 and not selector_of(model).kept
    monkeypatch.setattr(ahead, "_runs_alike", lambda *_: False)
    again, expected, same = step(model, batch)
    assert all_rows_ran(model, batch) == 2
    assert torch.equal(loss, again) and positions == same
    assert_same(found, expected, 1e-6 if family == "gemma3" else 1e-12)


@looks
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_gradients_after_a_look_equal_the_detach_oracle(config: TokenSelection, family: str) -> None:
    model, batch = doubled(FAMILIES[family])
    given = labelled(batch)
    handle = sparsetrain.sparsify(model, config)
    loss, found, _ = step(model, given)
    rows = selector_of(model).rows
    model.zero_grad()
    handle.restore()
    with cut_by_hooks(model, rows.selected_bt, config.train_keys):
        logits = model(**{name: x for name, x in given.items() if name != "labels"}).logits
    target = F.pad(given["labels"][:, 1:], (0, 1), value=-100).where(rows.selected_bt, -100)
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    assert_same(found, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, exact(family))


@pytest.mark.parametrize("case", ["dropout", "sparse attention", "checkpointing", "cache"])
def test_nothing_is_kept_where_the_training_forward_differs(case: str) -> None:
    model, batch = doubled(FAMILIES["llama"])
    batch = labelled(batch)
    configs = [LOOKS[2], PQAttention.example()] if case == "sparse attention" else [LOOKS[2]]
    plain = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    sparsetrain.sparsify(model, *configs, calibration=[plain])
    model = with_lora(model, dropout=0.2 if case == "dropout" else 0.0).train()
    if case == "checkpointing":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    noted: list[int] = []
    selector = selector_of(model)
    take = selector.take_kept
    selector.take_kept = lambda state: noted.append(len(selector.kept)) or take(state)
    loss, gradients, _ = step(model, batch | ({"use_cache": True} if case == "cache" else {}))
    assert torch.isfinite(loss) and any(x.any() for x in gradients.values())
    assert noted and not any(noted)


def test_what_was_kept_of_a_batch_that_failed_is_forgotten() -> None:
    model, batch = doubled(FAMILIES["llama"])
    batch = labelled(batch)
    sparsetrain.sparsify(model, TokenSelection(policy="loss"))
    selector, scores = selector_of(model), torch.rand(2, 100)
    expected = step(model, batch | {"token_scores": scores})
    choose, selector.choose = selector.choose, None
    with pytest.raises(TypeError):
        step(model, batch | {"input_ids": batch["input_ids"].flip(0)})
    selector.choose = choose
    assert selector.kept
    found = step(model, batch | {"token_scores": scores})
    assert torch.equal(found[0], expected[0]) and found[2] == expected[2]
    assert_same(found[1], expected[1], 1e-14)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_attended_context_is_what_the_targets_attend_to(family: str) -> None:
    model, batch = doubled(FAMILIES[family])
    given = labelled(batch)
    dense = FAMILIES[family].model().double()
    dense.set_attn_implementation("eager")
    plain = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    maps = dense(**plain, output_attentions=True).attentions
    target_bt = F.pad(given["labels"][:, 1:], (0, 1), value=-100) != -100
    mass_bt = sum((p * target_bt[:, None, :, None]).sum((1, 2)) for p in maps).detach()
    sparsetrain.sparsify(model, LOOKS[2])
    found = ahead.look_ahead(model, given, policy=None, attended=True)["token_attention"]
    torch.testing.assert_close(found, mass_bt, rtol=1e-6, atol=1e-6)  # its softmax is in fp32
    _, _, positions = step(model, given)
    for row, chosen in enumerate(positions):
        sure = {0, *target_bt[row].nonzero().flatten().tolist()}
        rest = [p for p in mass_bt[row].argsort(descending=True).tolist() if p not in sure and p < 100 - 10 * row]
        assert set(chosen) == sure | set(rest[: max(0, 40 - len(sure))])


def test_a_look_needs_labels() -> None:
    model = FAMILIES["llama"].model().train()
    sparsetrain.sparsify(model, LOOKS[2])
    with pytest.raises(ValueError, match="context='attended'"):
        model(**FAMILIES["llama"].batch())


@pytest.mark.parametrize("policy", ["loss", "gradient_norm"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_of_the_last_visit_choose_in_the_next(policy: str, family: str) -> None:
    model, batch = doubled(FAMILIES[family])
    given = labelled(batch)
    config = TokenSelection(policy=policy, pool="targets", num_tokens=12, scores="previous")
    handle = sparsetrain.sparsify(model, config)
    selector = selector_of(model)

    def chosen(step_number: int, batch: dict[str, Tensor]) -> list[list[int]]:
        handle.step(step_number)
        _, gradients, positions = step(model, batch)
        assert any(x.any() for x in gradients.values()) and not selector.kept
        return positions

    expected = ahead.look_ahead(model, given, policy=policy, attended=False)["token_scores"]
    selector.kept = {}
    first = chosen(0, given)
    again = chosen(1, {name: x.flip(0) for name, x in given.items()})[::-1]
    for row in range(2):
        targets = F.pad(given["labels"][row, 1:], (0, 1), value=-100) != -100
        ranked = expected[row].masked_fill(~targets, -1).argsort(descending=True).tolist()
        best = ranked[: min(11, int(targets.sum()))]
        assert set(best) <= set(again[row]) and 0 in again[row]
    assert first[0] != again[0] and len(selector.previous) == 2 and selector.previous.num_tokens == 190
    handle.step(1)
    other = model(**given | {"input_ids": given["input_ids"].flip(1)})
    assert torch.isfinite(other.loss) and len(selector.previous) == 4


def test_what_is_remembered_is_bounded_and_forgets_the_oldest() -> None:
    previous = Previous(most_tokens=50)
    batches = [Batch.of({"input_ids": torch.full((1, 20), i)}, causal=True) for i in range(4)]
    for i, one in enumerate(batches):
        previous.note(one, torch.full((1, 20), 1.0 + i))
    previous.note(batches[2], torch.full((1, 20), 9.0))
    assert previous.num_tokens == 40 and len(previous) == 2
    assert [previous.of(one)[0, 0].item() for one in batches] == [0, 0, 9, 4]
    long = Batch.of({"input_ids": torch.full((1, 80), 7)}, causal=True)
    previous.note(long, torch.ones(1, 80))
    assert len(previous) == 1 and previous.of(long).all()


def test_a_run_repeats_its_draws_from_the_last_visit() -> None:
    """Two runs from the start agree: what is remembered is a function of what was trained on."""
    results = []
    for _ in range(2):
        model, batch = doubled(FAMILIES["llama"])
        handle = sparsetrain.sparsify(model, TokenSelection(policy="loss", scores="previous"))
        given = labelled(batch)
        drawn = []
        for number in range(3):
            handle.step(number)
            drawn.append(step(model, given)[2])
        results.append(drawn)
    assert results[0] == results[1] and results[0][0] != results[0][1]


def test_scores_of_the_last_visit_are_refused_where_none_can_be_noted() -> None:
    with pytest.raises(ValueError, match="scores='previous'"):
        TokenSelection(scores="previous")
    with pytest.raises(ValueError, match="unknown"):
        TokenSelection(policy="loss", scores="last")
    model, batch = doubled(FAMILIES["llama"])
    model.config.logit_scale = 0.5
    sparsetrain.sparsify(model, TokenSelection(policy="loss", scores="previous"))
    with pytest.raises(ValueError, match="scores=now"):
        model(**labelled(batch))
