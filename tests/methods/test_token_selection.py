"""Token selection against its definition, on every family: the oracle cuts gradients by hooks on the plain model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import sparsetrain
from sparsetrain import PQAttention, RoutedFFN
from sparsetrain.core.anatomy import describe
from sparsetrain.measure.memory import saved_activations
from sparsetrain.methods.token_selection import TokenSelection
from sparsetrain.ops.selected_rows import Rows, keep
from tests.families import FAMILIES, Family
from tests.turns import in_turn

NAMES = list(FAMILIES)
every = pytest.mark.parametrize("family", NAMES)
CAUSAL = [name for name, family in FAMILIES.items() if family.causal]
KEYS = ("k_norm", "k_proj", "v_proj", "key", "value", "k_lin", "v_lin")


def tokens_of(family: Family, batch: dict[str, Tensor]) -> int:
    return 101 if family.vision else batch["input_ids"].shape[1]


def some_rows(batch_size: int, tokens: int, k: int = 30, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    return Rows.of([torch.randperm(tokens, generator=generator)[:k] for _ in range(batch_size)], tokens)


@contextmanager
def cut_by_hooks(model: Any, selected_bt: Tensor, train_keys: bool = False) -> Iterator[None]:
    """where(selected, x, x.detach()) at every block's input and output and, unless they train, at every K and V."""

    def cut(module: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (keep(out[0], selected_bt), *out[1:])
        if out.shape[1] != selected_bt.shape[1]:  # Gemma's norm of the keys has [b, g, t, d]
            return keep(out.transpose(1, 2), selected_bt).transpose(1, 2)
        return keep(out, selected_bt)

    def cut_qkv(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        q, k, v = out.chunk(3, -1)
        return torch.cat([q, keep(k, selected_bt), keep(v, selected_bt)], -1)

    def cut_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (keep(args[0], selected_bt), *args[1:]), kwargs

    hooks = []
    for block in describe(model).blocks:
        module = model.get_submodule(block.name)
        hooks += [module.register_forward_hook(cut), module.register_forward_pre_hook(cut_input, with_kwargs=True)]
        for name, child in () if train_keys else model.get_submodule(block.attention.name).named_children():
            if name in KEYS:
                hooks.append(child.register_forward_hook(cut))
            if name == "c_attn":
                hooks.append(child.register_forward_hook(cut_qkv))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def weighted(model: Any, batch: dict[str, Tensor], rows: Rows) -> tuple[Tensor, Tensor]:
    """(outputs, a loss of the selected rows' outputs)."""
    out = model(**batch)
    logits = out.logits
    if logits.ndim == 3:
        chosen = logits[rows.selected_bt]
        return logits, chosen.square().mean() + chosen.sum() * 0.01
    return logits, logits.square().mean() + logits.sum() * 0.01


def gradients(model: Any, batch: dict[str, Tensor], rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits, loss = weighted(model, batch, rows)
    loss.backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def selector_of(model: Any) -> Any:
    return next(m.selected.selector for m in model.modules() if "selected" in getattr(m, "_modules", {}))


def selected_gradients(model: Any, batch: dict[str, Tensor], rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    with selector_of(model).using(rows):
        return gradients(model, batch, rows)


def doubled(case: Family) -> tuple[Any, dict[str, Tensor]]:
    batch = {name: x.double() if x.is_floating_point() else x for name, x in case.batch().items()}
    return case.model().double().train(), batch


def exact(family: str) -> float:
    return 1e-6 if family == "gemma3" else 1e-10  # Gemma's norms compute in fp32


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        scale = max(1.0, grad.abs().max().item())
        assert (found[name] - grad).abs().max() <= tolerance * scale, name


keys = pytest.mark.parametrize("train_keys", [False, True], ids=["", "train_keys"])


@every
@pytest.mark.parametrize("backend", ["auto", "reference"])
@keys
def test_gradients_equal_the_detach_oracle(family: str, backend: str, train_keys: bool) -> None:
    case = FAMILIES[family]
    model, batch = doubled(case)
    rows = some_rows(2, tokens_of(case, batch))
    with cut_by_hooks(model, rows.selected_bt, train_keys):
        logits, expected = gradients(model, batch, rows)
    sparsetrain.sparsify(model, TokenSelection(train_keys=train_keys))
    for _ in range(2):  # watched, and where that found nothing, unwatched
        with sparsetrain.use_backend(backend):
            found_logits, found = selected_gradients(model, batch, rows)
        assert torch.equal(found_logits, logits) or backend == "reference"
        assert_same(found, expected, exact(family))


@every
def test_everything_kept_is_the_dense_model_bit_for_bit(family: str) -> None:
    case = FAMILIES[family]
    model, batch = case.model().train(), case.batch()
    rows = some_rows(2, tokens_of(case, batch), k=tokens_of(case, batch))
    logits, expected = gradients(model, batch, rows)
    sparsetrain.sparsify(model, TokenSelection.dense_limit())
    found_logits, found = gradients(model, batch, rows)
    assert torch.equal(found_logits, logits)
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


@every
def test_evaluation_and_restored_models_are_untouched(family: str) -> None:
    case = FAMILIES[family]
    model, batch = case.model(), case.batch()
    classes = [type(m) for m in model.modules()]
    rows = some_rows(2, tokens_of(case, batch))
    logits, expected = gradients(model, batch, rows)
    handle = sparsetrain.sparsify(model, TokenSelection())
    found_logits, found = gradients(model, batch, rows)
    close = {name: (found[name] - grad).abs().max() for name, grad in expected.items()}
    assert max(close.values()) < 1e-4 and (found_logits - logits).abs().max() < 1e-4
    handle.merge()
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(gradients(model, batch, rows)[0], logits)


@every
@pytest.mark.parametrize("reentrant", [False, True])
@keys
def test_checkpointing_changes_no_gradient(family: str, reentrant: bool, train_keys: bool) -> None:
    case = FAMILIES[family]
    model, batch = doubled(case)
    rows = some_rows(2, tokens_of(case, batch))
    sparsetrain.sparsify(model, TokenSelection(train_keys=train_keys))
    _, expected = selected_gradients(model, batch, rows)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    _, found = selected_gradients(model, batch, rows)
    assert_same(found, expected, exact(family))


def test_nothing_leaks_to_tokens_that_are_not_selected() -> None:
    model = FAMILIES["llama"].model().train()
    ids = torch.arange(3, 53)[None]
    rows = some_rows(1, 50, k=12)
    inputs: list[Tensor] = []

    def watch(module: nn.Module, args: Any) -> None:
        args[0].retain_grad()
        inputs.append(args[0])

    sparsetrain.sparsify(model, TokenSelection())
    hooks = [layer.register_forward_pre_hook(watch) for layer in model.model.layers]
    with selector_of(model).using(rows):
        model(input_ids=ids).logits.square().mean().backward()
    for hook in hooks:
        hook.remove()
    for x in inputs:
        assert x.grad is not None and not x.grad[~rows.selected_bt].any() and x.grad[rows.selected_bt].all(-1).any()
    unselected = ids[~rows.selected_bt]
    assert not model.model.embed_tokens.weight.grad[unselected].any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "distilbert", "mistral"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_batches_equal_their_samples_alone(family: str, side: str) -> None:
    if family in ("bert", "distilbert") and side == "left":
        pytest.skip("the classification token stands first")
    case = FAMILIES[family]
    model, _ = doubled(case)
    sparsetrain.sparsify(model, TokenSelection())
    ids = case.batch(2, 60)["input_ids"]
    lengths, alone = (60, 41), {}
    positions = [some_rows(1, n, k=n // 3, seed=n).index_bk[0] for n in lengths]
    mask = torch.zeros(2, 60, dtype=torch.int64)
    padded = torch.zeros_like(ids)
    placed = []
    for i, n in enumerate(lengths):
        where = slice(60 - n, 60) if side == "left" else slice(0, n)
        mask[i, where], padded[i, where] = 1, ids[i, :n]
        placed.append(positions[i] + where.start)
        one = {"input_ids": ids[i : i + 1, :n], "attention_mask": torch.ones(1, n, dtype=torch.int64)}
        rows = Rows.of([positions[i]], n)
        with selector_of(model).using(rows):
            model.zero_grad()
            logits = model(**one).logits
            (logits[rows.selected_bt] if logits.ndim == 3 else logits).square().sum().backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                alone[name] = alone.get(name, 0) + p.grad
    batch = {"input_ids": padded, "attention_mask": mask}
    if side == "left" and family != "opt":
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    rows = Rows.of(placed, 60)
    model.zero_grad()
    with selector_of(model).using(rows):
        logits = model(**batch).logits
        (logits[rows.selected_bt] if logits.ndim == 3 else logits).square().sum().backward()
    assert_same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, alone, 1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "qwen3"])
def test_packed_rows_equal_separate_ones(family: str) -> None:
    case = FAMILIES[family]
    model, _ = doubled(case)
    sparsetrain.sparsify(model, TokenSelection())
    first, second = (case.batch(1, n, seed=n)["input_ids"] for n in (31, 46))
    chosen = [some_rows(1, n, k=n // 3, seed=n).index_bk[0] for n in (31, 46)]
    separate: dict[str, Tensor] = {}
    for ids, positions in zip((first, second), chosen):
        rows = Rows.of([positions], ids.shape[1])
        with selector_of(model).using(rows):
            model.zero_grad()
            model(input_ids=ids).logits[rows.selected_bt].square().sum().backward()
        for name, p in model.named_parameters():
            separate[name] = separate.get(name, 0) + p.grad
    rows = Rows.of([torch.cat([chosen[0], chosen[1] + 31])], 77)
    positions = torch.cat([torch.arange(31), torch.arange(46)])[None]
    model.zero_grad()
    with selector_of(model).using(rows):
        out = model(input_ids=torch.cat([first, second], 1), position_ids=positions, use_cache=False)
        out.logits[rows.selected_bt].square().sum().backward()
    assert_same({n: p.grad for n, p in model.named_parameters()}, separate, 1e-9)


def test_order_and_unused_slots_change_nothing() -> None:
    model, batch = doubled(FAMILIES["llama"])
    sparsetrain.sparsify(model, TokenSelection())
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    found = [
        selected_gradients(model, batch, Rows.of(lists, 100))[1]
        for lists in ([order[:20], order[30:50]], [order[:20].flip(0), order[30:50].sort().values])
    ]
    assert_same(found[1], found[0], 1e-14)
    rows = Rows.of([order[:20], order[30:50]], 100)
    wide = Rows(torch.cat([rows.index_bk, rows.index_bk[:, -1:].expand(-1, 5)], 1), rows.counts, 100)
    assert_same(selected_gradients(model, batch, wide)[1], found[0], 1e-12)


def test_dropout_of_selected_rows_is_the_one_that_was_drawn() -> None:
    model, batch = doubled(FAMILIES["gpt2"])
    for block in model.transformer.h:
        block.mlp.dropout.p = block.attn.resid_dropout.p = 0.3
    rows = some_rows(2, 100)
    sparsetrain.sparsify(model, TokenSelection())
    torch.manual_seed(5)
    _, found = selected_gradients(model, batch, rows)
    # no path through other rows leads from the last block's output, so differences see the same gradient
    name = "transformer.h.2.mlp.c_proj.weight"
    weight, losses = model.get_parameter(name), []
    direction = torch.randn_like(weight)
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(direction, alpha=sign * 1e-6)
        torch.manual_seed(5)
        with selector_of(model).using(rows):
            losses.append(weighted(model, batch, rows)[1].item())
        with torch.no_grad():
            weight.sub_(direction, alpha=sign * 1e-6)
    torch.testing.assert_close(
        (found[name] * direction).sum().item(), (losses[0] - losses[1]) / 2e-6, rtol=1e-4, atol=1e-7
    )


def test_the_draw_depends_on_seed_step_and_sample_alone() -> None:
    model, batch = FAMILIES["llama"].model().train(), FAMILIES["llama"].batch()
    handle = sparsetrain.sparsify(model, TokenSelection(seed=3))

    def chosen(step: int, inputs: dict[str, Tensor] = batch) -> list[list[int]]:
        handle.step(step)
        model(**inputs)
        return selector_of(model).rows.index_bk.tolist()

    first = chosen(1)
    assert chosen(2) != first and chosen(1) == first
    assert first[0] != first[1] and first[0][0] == first[1][0] == 0
    swapped = {name: x.flip(0) for name, x in batch.items()}
    assert chosen(1, swapped) == first[::-1]
    one = {name: x[1:] for name, x in batch.items()}
    assert chosen(1, one) == first[1:]


def test_autocast_and_a_key_value_cache_are_harmless() -> None:
    case = FAMILIES["llama"]
    model, batch = case.model().train(), case.batch()
    sparsetrain.sparsify(model, TokenSelection())
    rows = some_rows(2, 100)
    _, exact_gradients = selected_gradients(model, batch, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, found = selected_gradients(model, batch | {"use_cache": True}, rows)
    for name, grad in exact_gradients.items():
        assert (found[name] - grad).norm() < 0.2 * grad.norm() + 1e-3, name


def test_inputs_embeds_and_a_changed_batch_select_anew() -> None:
    case = FAMILIES["llama"]
    model = case.model().train()
    sparsetrain.sparsify(model, TokenSelection())
    model(**case.batch())
    before = selector_of(model).rows
    model(inputs_embeds=torch.randn(2, 100, 32)).logits.sum().backward()
    assert selector_of(model).rows.index_bk.tolist() != before.index_bk.tolist()


def test_only_some_layers_can_be_taken() -> None:
    model, batch = doubled(FAMILIES["llama"])
    rows = some_rows(2, 100)
    reference = copy.deepcopy(model)
    blocks = describe(reference).blocks
    handle = sparsetrain.sparsify(model, TokenSelection(layers=(2,)))
    assert len(handle.plan.edits) == 1
    _, found = selected_gradients(model, batch, rows)
    sparsetrain.sparsify(reference, TokenSelection(targets=(blocks[2].name,)))
    with sparsetrain.use_backend("reference"):
        _, expected = selected_gradients(reference, batch, rows)
    assert_same(found, expected)


def test_bad_configs_and_models_are_named() -> None:
    for wrong, message in (
        ({"keep_ratio": 0.0}, "out of range"),
        ({"keep_ratio": 1.1}, "out of range"),
        ({"keep_ratio": 0.3, "num_tokens": 8}, "both given"),
        ({"num_tokens": 0}, "at least 1"),
        ({"policy": "luck"}, "unknown"),
        ({"unbiased": True, "policy": "loss"}, "known probabilities"),
        ({"always_keep": ("middle",)}, "unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenSelection(**wrong)
    model = FAMILIES["gpt2"].model()
    model.transformer.h[0].attn.attn_dropout.p = 0.1
    with pytest.raises(ValueError, match="attention dropout"):
        sparsetrain.sparsify(model, TokenSelection())
    model = FAMILIES["llama"].model().train()
    sparsetrain.sparsify(model, TokenSelection(pool="targets"))
    with pytest.raises(ValueError, match="without labels"):
        model(**FAMILIES["llama"].batch())
    with pytest.raises(sparsetrain.UnknownFamily):
        sparsetrain.sparsify(nn.Linear(2, 2), TokenSelection())


def with_lora(model: Any, dropout: float = 0.0) -> Any:
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=dropout))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "opt", "qwen3", "vit"])
@keys
def test_lora_gradients_equal_the_detach_oracle(family: str, train_keys: bool) -> None:
    case = FAMILIES[family]
    model, batch = doubled(case)
    model = with_lora(model).train()
    rows = some_rows(2, tokens_of(case, batch))
    base = model.get_base_model()
    with cut_by_hooks(base, rows.selected_bt, train_keys):
        logits, expected = gradients(model, batch, rows)
    again, _ = doubled(case)
    sparsetrain.sparsify(again, TokenSelection(train_keys=train_keys))
    again = with_lora(again).train()
    found_logits, found = selected_gradients(again, batch, rows)
    assert torch.equal(found_logits, logits)
    assert_same(found, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_lora_beside_a_bf16_model_is_as_near_as_pefts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and LoRA's sum have fast paths there; logits and gradients stay within twice bf16's own error."""
    monkeypatch.setattr("sparsetrain.ops.selected_rows.all_rows._units", lambda: (True, False))
    case = FAMILIES[family]

    def run(low: bool, selects: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model, batch = doubled(case)
        rows = some_rows(2, tokens_of(case, batch))
        if selects:
            sparsetrain.sparsify(model, TokenSelection())
        model = with_lora(model).train()
        for name, parameter in model.named_parameters():
            if low:
                parameter.data = parameter.data.to(torch.float32 if "lora" in name else torch.bfloat16)
        if selects:
            return selected_gradients(model, batch, rows)
        with cut_by_hooks(model.get_base_model(), rows.selected_bt):
            return gradients(model, batch, rows)

    logits, exact = run(low=False, selects=False)
    pefts_logits, pefts = run(low=True, selects=False)
    found_logits, found = run(low=True, selects=True)
    assert (found_logits.double() - logits).norm() <= 2 * (pefts_logits.double() - logits).norm()
    own, theirs = (sum((each[n].double() - exact[n]).square().sum() for n in exact) for each in (found, pefts))
    assert own <= 4 * theirs


@pytest.mark.parametrize("reentrant", [False, True])
@keys
def test_lora_dropout_survives_checkpointing(reentrant: bool, train_keys: bool) -> None:
    case = FAMILIES["llama"]
    model, batch = doubled(case)
    sparsetrain.sparsify(model, TokenSelection(train_keys=train_keys))
    model = with_lora(model, dropout=0.3).train()
    rows = some_rows(2, 100)
    torch.manual_seed(7)
    _, expected = selected_gradients(model, batch, rows)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(7)
    _, found = selected_gradients(model, batch, rows)
    assert_same(found, expected, 1e-9)


@in_turn(
    "family, checkpointing, methods, train_keys",
    ["llama", "gpt2", "bert", "opt"],
    [None, False, True],
    ["routed_ffn", "pq_attention", "both"],
    [False, True],
    turns=3,
)
def test_sparse_context_and_selected_targets_equal_the_definition(
    family: str, methods: str, checkpointing: bool | None, train_keys: bool
) -> None:
    """Selected tokens attend to all keys, others sparsely; a routed FFN treats both alike; codebooks learn from all."""
    case = FAMILIES[family]
    results = []
    routed = RoutedFFN(num_blocks=4, num_active=2, warmup_ratio=0.0, balance_weight=0.0)
    attention = PQAttention.from_dict({**PQAttention.example().to_dict(), "codebook_every": 1})
    configs = {"routed_ffn": (routed,), "pq_attention": (attention,), "both": (attention, routed)}[methods]
    for backend in ("reference", "auto"):
        model, batch = doubled(case)
        rows = some_rows(2, 100)
        calibration = [{n: x for n, x in case.batch(4, seed=5).items()}]
        selection = TokenSelection(train_keys=train_keys)
        handle = sparsetrain.sparsify(model, selection, *configs, calibration=calibration)
        model.double()
        handle.step(1, 10)
        if checkpointing is not None and backend == "auto":
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            if checkpointing:
                model.enable_input_require_grads()
        stand_in = sparsetrain.use_backend(backend) if backend == "reference" else contextlib.nullcontext()
        with stand_in:
            logits, found = selected_gradients(model, batch, rows)
        results.append((logits[rows.selected_bt] if logits.ndim == 3 else logits, found))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=1e-6)
    assert_same(results[1][1], results[0][1], 1e-6)
    if attention in configs:
        learnt = [grad for name, grad in results[1][1].items() if "codebook" in name]
        assert learnt and all(grad.abs().max() > 0 for grad in learnt)


def llama_block(kv_heads: int, hidden: int = 64, ffn: int = 176) -> Any:
    config = LlamaConfig(
        vocab_size=32, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=kv_heads, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).train()


def saved_by_layers(model: Any, ids: Tensor) -> int:
    saved = saved_activations(model, lambda: model.model(input_ids=ids, use_cache=False).last_hidden_state)
    return sum(saved.by_layer[0].values())


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.2, 0.3, 0.5, 1.0])
def test_saved_bytes_follow_the_formula(kv_heads: int, ratio: float) -> None:
    ids = torch.randint(32, (1, 400))
    dense = saved_by_layers(llama_block(kv_heads), ids)
    model = llama_block(kv_heads)
    sparsetrain.sparsify(model, TokenSelection(keep_ratio=ratio))
    found = saved_by_layers(model, ids)
    key_value = 2 * kv_heads * 8 * 4 * 400
    share = key_value / dense
    expected = ratio + (1 - ratio) * share
    assert abs(found / dense - expected) < 0.05 * expected, (found / dense, expected)
