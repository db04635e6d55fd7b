"""dense_tokens='targets': rows that predict a label compute densely, the others sparsely, with exact gradients."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch._dynamo.utils import counters
from transformers.pytorch_utils import Conv1D

import sparsetrain
from sparsetrain import PQAttention, RoutedFFN, TokenSelection
from sparsetrain.core.anatomy import describe, submodule
from sparsetrain.core.config import MethodConfig
from sparsetrain.ops.routed_ffn import ACTIVATIONS
from sparsetrain.ops.selected_rows import Rows
from sparsetrain.surgery.attention import CHILD
from sparsetrain.surgery.deploy import DeployDense
from sparsetrain.surgery.method import RowFacts, method_of
from tests.families import FAMILIES
from tests.methods.test_contract import with_head
from tests.turns import in_turn

IGNORED = -100
METHODS = {
    "pq_attention": (PQAttention.example(),),
    "by_token": (dataclasses.replace(PQAttention.example(), granularity="token"),),
    "routed_ffn": (dataclasses.replace(RoutedFFN.example(), balance_weight=0.0),),
    "both": (PQAttention.example(), dataclasses.replace(RoutedFFN.example(), balance_weight=0.0)),
}
LANGUAGE = ("llama", "gpt2", "opt", "gemma3", "bert")
each = pytest.mark.parametrize("methods", list(METHODS))


def model_of(family: str) -> Any:
    case = FAMILIES[family]
    return (case.model() if case.causal else with_head("mlm", case)).double()


def batch_of(family: str, form: str = "plain") -> tuple[dict[str, Tensor], Tensor]:
    """(arguments with labels, bool [b, t]: the rows that predict a label); other targets in every row."""
    batch = FAMILIES[family].batch(3, 75 if form == "packed" else 60)
    ids, labels = batch["input_ids"], torch.full_like(batch["input_ids"], IGNORED)
    for row, (start, stop) in enumerate([(-20, None), (7, 13), (50, 52)]):
        labels[row, start:stop] = ids[row, start:stop]
    labels[1, 31] = ids[1, 31]
    if form == "padded":
        batch["attention_mask"][0, :9] = 0
        batch["attention_mask"][2, 55:] = 0
    if form == "packed":
        batch = {"input_ids": ids, "position_ids": torch.cat([torch.arange(23), torch.arange(52)]).expand(3, -1)}
    target = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED) if FAMILIES[family].causal else labels
    return batch | {"labels": labels}, target != IGNORED


def targets(configs: tuple[MethodConfig, ...]) -> list[MethodConfig]:
    return [dataclasses.replace(config, dense_tokens="targets") for config in configs]  # type: ignore[call-arg]


def convert(model: Any, family: str, *configs: MethodConfig, **options: Any) -> sparsetrain.Handle:
    calibration = [FAMILIES[family].batch(4, seed=5), FAMILIES[family].batch(4, seed=6)]
    return sparsetrain.sparsify(model, *configs, calibration=calibration, **options)


def by_hand(model: Any, handle: sparsetrain.Handle, rows_bt: Tensor) -> None:
    """The definition: where(rows, dense, sparse) at every site of a model that was converted without dense tokens."""
    for name, site in handle.sites("pq_attention").items():

        def attend(call: Any, site: Any = site) -> Tensor:
            return torch.where(rows_bt[:, None, :, None], call.dense(), site(call))

        vars(submodule(model, name))[CHILD] = attend
    for site in handle.sites("routed_ffn").values():
        routed: Callable[..., Tensor] = type(site).forward

        def both(owner: Any, x: Tensor, site: Any = site, routed: Any = routed) -> Tensor:
            up, gate, down = (n and owner.get_submodule(n) for n in (site.site.up, site.site.gate, site.site.down))
            act = ACTIVATIONS[site.site.activation][0]
            dense = down(act(gate(x)) * up(x) if gate else act(up(x)))
            return torch.where(rows_bt.view(*x.shape[:-1], 1), dense, routed(site, owner, x))

        site.forward = both


def passed(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """(logits, gradients) of a training forward."""
    model.train()
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_alike(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        scale = max(1.0, float(grad.abs().max()))
        torch.testing.assert_close(found[1][name], grad, rtol=tolerance, atol=tolerance * scale, msg=name)


@in_turn("methods, family, form", list(METHODS), LANGUAGE, ["plain", "padded", "packed"], turns=3)
def test_equals_the_definition_in_outputs_and_gradients(form: str, family: str, methods: str) -> None:
    batch, rows_bt = batch_of(family, form)
    model, reference = model_of(family), model_of(family)
    plain = passed(copy.deepcopy(reference), batch)[0]
    handle = convert(model, family, *targets(METHODS[methods]))
    other = convert(reference, family, *METHODS[methods], state=handle.state())
    sparse = passed(copy.deepcopy(reference), batch)[0]
    by_hand(reference, other, rows_bt)
    found = passed(model, batch)
    assert_alike(found, passed(reference, batch))
    assert all((found[0] - each).abs().max() > 1e-6 for each in (plain, sparse))


@each
def test_all_targets_is_the_dense_model_and_none_the_sparse_one(methods: str) -> None:
    batch, _ = batch_of("llama")
    dense, sparse = model_of("llama"), model_of("llama")
    model = model_of("llama")
    handle = convert(model, "llama", *targets(METHODS[methods]))
    convert(sparse, "llama", *METHODS[methods], state=handle.state())
    every = batch | {"labels": torch.zeros_like(batch["labels"]), "shift_labels": batch["input_ids"]}
    torch.testing.assert_close(passed(model, every)[0], passed(dense, every)[0])
    assert float(handle.installed[0][1].stats()["dense_rows"]) == 1
    none = batch | {"labels": torch.full_like(batch["labels"], IGNORED)}
    torch.testing.assert_close(passed(model, none)[0], passed(sparse, none)[0])


@pytest.mark.parametrize("form", ["plain", "padded"])
def test_the_router_learns_from_context_alone(form: str) -> None:
    """Its balance loss is that of the rows which are routed, also while all blocks warm up."""
    batch, rows_bt = batch_of("llama", form)
    model = model_of("llama")
    config = RoutedFFN(num_active=1, gate="ste", layers=(0,), dense_tokens="targets", balance_weight=1.0)
    handle = convert(model, "llama", dataclasses.replace(config, warmup_ratio=0.5))
    seen: list[Tensor] = []
    owner: Any = model.model.layers[0].mlp
    owner.routed.router.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    for step in (0, 9):
        handle.step(step, 10)
        passed(model, batch)
        assert owner.routed.warming_up == (step == 0)
        x_nd = seen.pop()[(~rows_bt & (batch["attention_mask"] > 0)).flatten()]
        logits = owner.routed.router(x_nd)[0]
        share = torch.sigmoid(logits) / torch.sigmoid(logits).sum(1, keepdim=True)
        load = torch.nn.functional.one_hot(logits.argmax(1), 4).float().mean(0)
        seen.clear()
        expected = 4 * (load * share.mean(0)).sum()
        torch.testing.assert_close(owner.routed.last["balance_loss"], expected.detach(), rtol=1e-5, atol=1e-6)


def test_in_the_warm_up_targets_have_no_gate() -> None:
    batch, rows_bt = batch_of("llama")
    dense, model = model_of("llama"), model_of("llama")
    handle = convert(model, "llama", RoutedFFN(warmup_ratio=0.5, dense_tokens="targets", layers=(2,)))
    handle.step(0, 10)
    found, expected = passed(model, batch)[0], passed(dense, batch)[0]
    torch.testing.assert_close(found[rows_bt], expected[rows_bt])  # of the last block, rows stand alone
    assert (found - expected)[~rows_bt].abs().max() > 1e-4


@each
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_block_sees_the_rows_of_its_own_forward(reentrant: bool, family: str, methods: str) -> None:
    """Two forwards with other targets, and then one backward of both."""
    batch, _ = batch_of(family)
    other = batch | {"labels": batch["labels"].flip(0)}
    model = model_of(family)
    convert(model, family, *targets(METHODS[methods]))

    def gradients(model: Any) -> dict[str, Tensor]:
        model.train()
        (model(**batch).loss + 2 * model(**other).loss).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    recomputed = copy.deepcopy(model)
    recomputed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    expected, found = gradients(model), gradients(recomputed)
    assert found.keys() == expected.keys() and expected
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, msg=name)


@pytest.mark.parametrize("methods", ["routed_ffn", "both"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_under_lora_with_permuted_units(family: str, methods: str) -> None:
    batch, rows_bt = batch_of(family)

    def adapted(configs: Any, state: Any = None) -> tuple[Any, sparsetrain.Handle]:
        model = model_of(family)
        handle = convert(model, family, *configs, state=state, deploy="dense")
        transposed = any(isinstance(module, Conv1D) for module in model.modules())
        lora = LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=transposed)
        wrapped = get_peft_model(model, lora, autocast_adapter_dtype=False).double()
        torch.manual_seed(3)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.2)
        return wrapped, handle

    model, handle = adapted(targets(METHODS[methods]))
    orders = [site.order for site in handle.sites("routed_ffn").values()]
    assert all(not torch.equal(order, order.sort().values) for order in orders)
    reference, other = adapted(METHODS[methods], handle.state())
    by_hand(other.model, other, rows_bt)
    assert_alike(passed(model, batch), passed(reference, batch))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("methods", ["pq_attention", "routed_ffn", "both"])  # by token, the reference takes 9 s
def test_with_token_selection_dense_rows_are_targets_and_selected_ones(methods: str, backend: str, order: int) -> None:
    """Whatever the order of the methods, values are those of a forward whose targets are the union; gradients those of
    the selection's definition."""
    batch, rows_bt = batch_of("llama", "padded")
    selected = torch.zeros(3, 60, dtype=torch.bool)
    selected[0, 20:45:3] = selected[1, [2, 8, 30, 50]] = selected[2, [51, 54]] = True  # targets among them, not all
    model, union = model_of("llama"), model_of("llama")
    configs = [TokenSelection(), *targets(METHODS[methods])][::order]
    handle = convert(model, "llama", *configs)
    convert(union, "llama", *targets(METHODS[methods]), state=handle.state())
    rows = Rows.of([row.nonzero().flatten() for row in selected], 60)
    labels = torch.where(rows_bt | selected, 5, IGNORED)
    expected = passed(union, batch | {"shift_labels": labels})[0]

    def train(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        hidden: list[Tensor] = []
        hook = model.model.norm.register_forward_pre_hook(lambda _m, args: hidden.append(args[0].detach()))
        model.train()
        model.zero_grad()
        with model.selector.using(rows), sparsetrain.use_backend(backend if backend == "reference" else "auto"):
            model(**batch).loss.backward()
        hook.remove()
        valid = batch["attention_mask"] > 0
        values = model.lm_head(model.model.norm(hidden[0])).detach()
        torch.testing.assert_close(values[valid], expected[valid], rtol=1e-7, atol=1e-7)
        return values, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    found = train(model)
    recomputed = copy.deepcopy(model)
    recomputed.gradient_checkpointing_enable()
    assert_alike(train(recomputed), found, 1e-7)
    backend = "torch" if backend == "reference" else "reference"
    other = train(model)
    names = found[1].keys() & other[1].keys()
    assert len(names) > 20
    for name in names:
        torch.testing.assert_close(found[1][name], other[1][name], rtol=1e-6, atol=1e-8, msg=name)


@each
def test_evaluation_knows_no_targets(methods: str) -> None:
    """A model that is deployed sparse is evaluated as it will be used; one that is deployed dense is dense."""
    batch, _ = batch_of("llama")
    dense, sparse = model_of("llama"), model_of("llama")
    model = model_of("llama")
    handle = convert(model, "llama", *targets(METHODS[methods]))
    convert(sparse, "llama", *METHODS[methods], state=handle.state())
    torch.testing.assert_close(model.eval()(**batch).loss, sparse.eval()(**batch).loss)
    handle.restore()
    deployed = convert(model, "llama", *targets(METHODS[methods]), deploy="dense")
    torch.testing.assert_close(model.eval()(**batch).loss, dense.eval()(**batch).loss)
    with deployed.dense():
        torch.testing.assert_close(passed(model, batch)[0], passed(dense, batch)[0])


@pytest.mark.parametrize("dense_tokens", ["none", "targets"])
def test_selected_tokens_dense_and_context_by_blocks_saves_a_plain_adapter(dense_tokens: str, tmp_path: Path) -> None:
    """Token selection beside sparse attention, deployed dense: it trains, and what is saved is anybody's."""
    case, (batch, _) = FAMILIES["llama"], batch_of("llama")
    model = case.model()
    attention = dataclasses.replace(PQAttention.example(), dense_tokens=dense_tokens)
    handle = convert(model, "llama", TokenSelection(pool="targets"), attention, deploy=DeployDense(dense_first=0.2))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(10):
        handle.step(step, 10)
        passed(wrapped, batch)
        losses.append(wrapped.eval()(**batch).loss.item())
        optimizer.step()
    assert losses[-1] < losses[0]
    wrapped.eval().save_pretrained(str(tmp_path), save_embedding_layers=False)
    plain = PeftModel.from_pretrained(case.model(), str(tmp_path)).eval()
    torch.testing.assert_close(wrapped(**batch).loss, plain(**batch).loss)


def test_whoever_assigns_a_forward_runs_inside() -> None:
    """TRL's loss head takes the labels and computes the loss from hidden states; PEFT calls the model's forward."""
    batch, _ = batch_of("llama")
    model = model_of("llama")
    handle = convert(model, "llama", *targets(METHODS["both"]))
    expected = passed(model, batch)[1]
    read = model.forward

    def without_labels(*args: Any, labels: Tensor, **kwargs: Any) -> Any:
        out = read(*args, **kwargs)
        out.loss = model.loss_function(out.logits, labels, vocab_size=out.logits.shape[-1])
        return out

    model.forward = without_labels
    found = passed(model, batch)[1]
    assert all(torch.allclose(found[name], grad) for name, grad in expected.items())
    handle.restore()
    assert model.forward is without_labels


def test_what_has_no_targets_is_refused() -> None:
    batch, _ = batch_of("llama")
    model = model_of("llama")
    handle = convert(model, "llama", *targets(METHODS["both"]))
    model.train()
    with pytest.raises(ValueError, match="was given no labels in training"):
        model(batch["input_ids"])
    with pytest.raises(ValueError, match=r"labels of shape \(3, 59\)"):
        model(batch["input_ids"], labels=batch["labels"][:, 1:], shift_labels=batch["labels"][:, 1:])
    with pytest.raises(RuntimeError, match="outside of its model's forward"):
        model.model(batch["input_ids"])
    with torch.no_grad():
        model(batch["input_ids"])
    handle.restore()
    assert not any(hasattr(type(module), "mixin") for module in model.modules())
    vit = FAMILIES["vit"].model()
    for config in (RoutedFFN(dense_tokens="targets"), PQAttention.example()):
        refuse = method_of(config).refuse
        config = dataclasses.replace(config, dense_tokens="targets")
        assert "no label a token" in str(refuse(config, RowFacts(task="classify", seq_len=128, labelled=True)))
        assert refuse(config, RowFacts(task="sft", seq_len=128)) is None
        plain = dataclasses.replace(config, dense_tokens="none")
        assert refuse(plain, RowFacts(task="classify", seq_len=128, labelled=True)) is None
    backbone: Any = model_of("llama").model
    with pytest.raises(ValueError, match="LlamaModel takes none"):
        convert(backbone, "llama", RoutedFFN(dense_tokens="targets"))
    assert not any(hasattr(type(module), "mixin") for module in backbone.modules())
    handle = sparsetrain.sparsify(vit, RoutedFFN(dense_tokens="targets"))
    with pytest.raises(ValueError, match="given labels of shape"):
        vit.train()(**FAMILIES["vit"].batch(), labels=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="dense_tokens='some' is unknown"):
        RoutedFFN(dense_tokens="some")


@pytest.mark.parametrize("first", [0, 1, 2])
def test_handles_are_restored_in_any_order(first: int) -> None:
    batch, _ = batch_of("llama")
    model = model_of("llama")
    classes, expected = [type(module) for module in model.modules()], passed(model, batch)
    configs = [*targets(METHODS["both"]), TokenSelection()]
    handles = [convert(model, "llama", config) for config in configs]
    order = [first, (first + 1) % 3, (first + 2) % 3]
    for i in order[:2]:
        handles[i].restore()
        passed(model, batch)
    handles[order[2]].restore()
    assert [type(module) for module in model.modules()] == classes
    assert_alike(passed(model, batch), expected, 0.0)


@pytest.mark.slow  # traces three blocks with their graph breaks
def test_compiled_it_computes_the_same() -> None:
    batch, _ = batch_of("llama")
    model = model_of("llama")
    convert(model, "llama", *(dataclasses.replace(each, layers=(1,)) for each in targets(METHODS["both"])))
    expected = passed(model, batch)
    torch._dynamo.reset()
    counters.clear()
    try:
        with warnings.catch_warnings():  # dynamo warns of what it leaves to eager
            warnings.simplefilter("ignore")
            found = passed(torch.compile(model, backend="eager"), batch)
        assert counters["stats"]["unique_graphs"] > 0, "nothing was traced"
    finally:
        torch._dynamo.reset()
    found = found[0], {name.removeprefix("_orig_mod."): grad for name, grad in found[1].items()}
    assert_alike(found, expected)


def test_the_plan_says_what_it_costs_at_most() -> None:
    model = model_of("llama")
    for config in METHODS["both"]:
        (sparse,), (bound,) = (
            sparsetrain.plan(model, dataclasses.replace(config, layers=(0,), dense_tokens=told)).edits  # type: ignore[call-arg]
            for told in ("none", "targets")
        )
        dense, cost = bound.cost(2048)
        assert dense == sparse.cost(2048)[0]
        assert dense.flops < cost.flops < 1.5 * dense.flops
        assert cost.saved_elements >= max(dense.saved_elements, sparse.cost(2048)[1].saved_elements)
        assert cost.num_params == sparse.cost(2048)[1].num_params
        assert "targets dense, at most this" in bound.note
    assert describe(model).blocks  # the plan changed nothing
