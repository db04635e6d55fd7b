"""Flood-fill attention: what it computes, when it switches, and what it refuses."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsetrain
from sparsetrain import FloodFillAttention
from sparsetrain.core.anatomy import AttentionSite
from sparsetrain.methods.flood_fill_attention.module import FloodFillSparseAttention
from sparsetrain.methods.flood_fill_attention.schedule import probe
from sparsetrain.methods.flood_fill_attention.surgery import costs, probe_rows
from sparsetrain.ops.attention_patterns import VARIANTS
from sparsetrain.surgery.attention import AttentionCall
from tests.families import FAMILIES, LAYERS

SMALL: dict[str, Any] = {"block_tokens": 8, "filter_edge": 5}


def convert(family: str, config: FloodFillAttention, seed: int = 5) -> tuple[Any, sparsetrain.Handle]:
    case = FAMILIES[family]
    model = case.model()
    return model, sparsetrain.sparsify(model, config, calibration=[case.batch(2, seed=seed)])


def site_of(handle: sparsetrain.Handle, layer: int = 0) -> FloodFillSparseAttention:
    return list(handle.sites("flood_fill_attention").values())[layer]  # type: ignore[return-value]


def masks(handle: sparsetrain.Handle) -> list[Tensor | None]:
    return [site.mask for site in handle.sites("flood_fill_attention").values()]  # type: ignore[attr-defined]


def pairs_of(mask_pnn: Tensor, heads: int, tokens: int, causal: bool) -> Tensor:
    """[heads, tokens, tokens]: each token pair inherits its block's bit."""
    pairs = mask_pnn.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :tokens, :tokens]
    pairs = pairs.repeat_interleave(heads // len(pairs), 0)
    return pairs.tril() if causal else pairs


def definition(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, visible: Tensor, phantom: bool) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    weights = (q @ k.mT * 0.3).exp() * kept
    total = weights.sum(-1, keepdim=True)
    if phantom:
        total = total + (visible & ~kept).sum(-1, keepdim=True)
    return weights / total @ v


@pytest.mark.parametrize("softmax", ["masked", "phantom_zero"])
@pytest.mark.parametrize("share_heads", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [40, 37, 5])
def test_equals_dense_attention_under_the_pattern(softmax: str, share_heads: bool, causal: bool, tokens: int) -> None:
    config = FloodFillAttention(**SMALL, softmax=softmax, share_heads=share_heads)
    site = AttentionSite(name="a", layer=0, num_heads=4, num_kv_heads=2, head_dim=4, causal=causal)
    draw = torch.Generator().manual_seed(tokens)
    mask = torch.rand(1 if share_heads else 2, 5, 5, generator=draw) < 0.3
    mask = mask.tril() if causal else mask
    module = FloodFillSparseAttention(config, site, {"mask": mask | torch.eye(5, dtype=torch.bool)})
    shapes = [(2, 4, tokens, 4), (2, 2, tokens, 4), (2, 2, tokens, 4)]
    q, k, v = (torch.randn(shape, dtype=torch.float64, generator=draw).requires_grad_() for shape in shapes)

    def run(a: int, z: int, segments: Tensor | None = None) -> Tensor:
        queries, keys, values = q[:, :, a:], k, v
        never: Any = lambda: 1 / 0  # noqa: E731
        return module(AttentionCall(queries, keys[:, :, :z], values[:, :, :z], causal, 0.3, segments, None, never))

    visible = torch.ones(tokens, tokens, dtype=torch.bool)
    visible = visible.tril() if causal else visible
    assert module.mask is not None
    kept = pairs_of(module.mask, 4, tokens, causal)
    wanted = definition(q, k, v, kept, visible, softmax == "phantom_zero")
    found = run(0, tokens)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    grad = torch.randn(found.shape, dtype=torch.float64, generator=draw)
    for x, y in zip(torch.autograd.grad(found, (q, k, v), grad), torch.autograd.grad(wanted, (q, k, v), grad)):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    if causal and tokens > 5:  # decoding: the last queries alone, over all keys
        torch.testing.assert_close(run(tokens - 3, tokens), wanted[:, :, -3:], rtol=0, atol=1e-12)
        left_padded = torch.tensor([[0] * 7 + [1] * (tokens - 7)] * 2)
        whole = run(0, tokens, left_padded)
        assert (whole[:, :, :7] == 0).all()
        torch.testing.assert_close(run(tokens - 3, tokens, left_padded), whole[:, :, -3:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("softmax", ["masked", "phantom_zero"])
def test_generation_with_a_cache_equals_generation_without(softmax: str) -> None:
    model, _ = convert("llama", FloodFillAttention(**SMALL, quantile=0.7, max_dense_steps=0, softmax=softmax))
    ids = FAMILIES["llama"].batch(2, 50)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    assert torch.equal(model.generate(ids, **options, use_cache=True), model.generate(ids, **options, use_cache=False))


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs_at_its_density(family: str, variant: str) -> None:
    config = FloodFillAttention(**SMALL, variant=variant, keep_ratio=0.3, max_dense_steps=0)
    model, handle = convert(family, config)
    for site in handle.report()["stats"].values():
        assert 1 / 13 <= site["density"] <= 0.3
    model(**FAMILIES[family].batch()).logits.square().mean().backward()


def test_patterns_are_those_of_the_models_own_maps() -> None:
    """Against eager attention, whose maps transformers returns."""
    from sparsetrain.ops.attention_patterns import block_pattern
    from sparsetrain.ops.flood_fill import diagonal_convolution, pool_blocks

    case = FAMILIES["bert"]
    batch = case.batch(2, 96, seed=5)
    model = case.model()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**batch, output_attentions=True).attentions
    model, handle = case.model(), None
    config = FloodFillAttention(**SMALL, quantile=0.7, max_dense_steps=0)
    handle = sparsetrain.sparsify(model, config, calibration=[batch])
    for layer in range(LAYERS):
        pooled = pool_blocks(diagonal_convolution(maps[layer].mean((0, 1)), 5), 8)
        site = site_of(handle, layer)
        assert site.filtered_map is not None and site.mask is not None
        torch.testing.assert_close(site.filtered_map[0], pooled, rtol=1e-4, atol=1e-6)
        seen = torch.ones(12, 12, dtype=torch.bool)
        assert torch.equal(site.mask, block_pattern(site.filtered_map, seen, variant="cf", quantile=0.7))


def test_maps_do_not_depend_on_padding() -> None:
    case = FAMILIES["llama"]
    model, ids = case.model(), case.batch(2, 61)["input_ids"]
    name = "model.layers.1.self_attn"
    config = FloodFillAttention(**SMALL)
    alone = probe(model, config, [name], [{"input_ids": ids}])[name]
    pad = torch.zeros(2, 9, dtype=ids.dtype)
    ones = torch.ones_like(ids)
    batch = {"input_ids": torch.cat((ids, pad), 1), "attention_mask": torch.cat((ones, pad), 1)}
    padded = probe(model, config, [name], [batch])[name]
    for x, y in zip(alone.means(), padded.means()):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    assert not hasattr(model.model.layers[1].self_attn, "sparse_attention")
    assert model.config._attn_implementation == "sdpa"


def test_a_probe_leaves_no_trace() -> None:
    model, handle = convert("gpt2", FloodFillAttention(**SMALL, probe_every=1, max_dense_steps=10))
    model.train()
    model.transformer.h[1].eval()
    flags = [module.training for module in model.modules()]
    random = torch.random.get_rng_state()
    handle.step(1, 20)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert site_of(handle).history is not None and len(site_of(handle).history) == 1  # type: ignore[arg-type]


def drive(config: FloodFillAttention, maps: list[float], other: list[float] | None = None) -> list[float]:
    """Changes recorded for a site whose filtered map is a constant, probe by probe."""
    site = AttentionSite(name="a", layer=0, num_heads=1, num_kv_heads=1, head_dim=4, causal=False)
    module = FloodFillSparseAttention(config, site, {})
    changes = []
    for step, value in enumerate(maps):
        module.filtered_map = torch.full((1, 2, 2), value)
        changes.append(module.record(step))
    return changes


def test_the_change_of_distance() -> None:
    nan, inf = torch.nan, torch.inf
    constant = drive(FloodFillAttention(), [1, 1, 1, 1])
    assert str(constant) == str([nan, nan, 0.0, 0.0])
    previous = drive(FloodFillAttention(), [0, 4, 6, 7, 7, 9])
    assert str(previous) == str([nan, nan, 50.0, 50.0, 100.0, inf])
    # official: the second probe leaves the reference at the first one
    official = drive(FloodFillAttention(reference="official"), [0, 4, 6, 7])
    assert str(official[:3]) == str([nan, nan, 50.0])
    assert official[3] == pytest.approx(100 * (6 - 1) / 6)


def test_switches_at_the_third_probe_where_every_layer_has_settled() -> None:
    _, handle = convert("gpt2", FloodFillAttention(**SMALL, probe_every=2, max_dense_steps=100))
    for step in range(6):
        assert handle.step(step, 200) == []
    assert masks(handle) == [None] * LAYERS
    (line,) = handle.step(6, 200)
    assert "3 layers are sparse from step 6 on (the maps have settled)" in line
    assert all(mask is not None for mask in masks(handle))
    assert handle.step(7, 200) == [] and handle.restart_step is None
    assert site_of(handle).history.shape == (3, 3)  # type: ignore[union-attr]


def test_one_restless_layer_holds_all_back(monkeypatch: pytest.MonkeyPatch) -> None:
    _, handle = convert("gpt2", FloodFillAttention(**SMALL, probe_every=1, max_dense_steps=9))
    monkeypatch.setattr(site_of(handle, 1), "record", lambda step: 15.0)  # floor(15) is not below 15
    for step in range(9):
        assert handle.step(step, 20) == []
    with pytest.warns(UserWarning, match="had not settled by step 9"):
        (line,) = handle.step(9, 20)
    assert "dense phase is over" in line


def test_a_fixed_step_without_the_rule() -> None:
    _, handle = convert("gpt2", FloodFillAttention(**SMALL, change_threshold=0, max_dense_steps=2, restart_lr=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert handle.step(1, 20) == [] and len(handle.step(2, 20)) == 1
    assert handle.restart_step == 2


def test_evaluation_does_not_advance_the_schedule() -> None:
    _, handle = convert("gpt2", FloodFillAttention(**SMALL, probe_every=1))
    handle.settle()
    assert masks(handle) == [None] * LAYERS and site_of(handle).history is None


@pytest.mark.parametrize("variant", ["window", "top_q", "cf"])
@pytest.mark.parametrize(("family", "causal"), [("bert", False), ("gpt2", True)])
def test_planned_cost_counts_kept_blocks(variant: str, family: str, causal: bool) -> None:
    config = FloodFillAttention(**SMALL, variant=variant, keep_ratio=0.3, max_dense_steps=0)
    case = FAMILIES[family]
    _, handle = convert(family, config)
    site = AttentionSite(name="a", layer=0, num_heads=4, num_kv_heads=4, head_dim=8, causal=causal)
    planned = costs(config, site, 104)[1].flops
    for stats in handle.report()["stats"].values():
        by_hand = 4 * 4 * 8 * 8**2 * stats["kept_blocks"] / 104
        assert planned == pytest.approx(by_hand) if variant == "window" else planned >= by_hand
    assert case.causal == causal


def test_gqa_patterns_are_one_a_key_value_head() -> None:
    _, handle = convert("llama", FloodFillAttention(**SMALL, quantile=0.8, max_dense_steps=0, share_heads=False))
    assert all(mask is not None and mask.shape == (2, 13, 13) for mask in masks(handle))
    assert any(not torch.equal(mask[0], mask[1]) for mask in masks(handle) if mask is not None)


def test_longer_than_the_pattern() -> None:
    config = FloodFillAttention(**SMALL, quantile=0.8, max_dense_steps=0)
    model, _ = convert("gpt2", config)
    batch = FAMILIES["gpt2"].batch(1, 130)
    with pytest.raises(ValueError, match="17 blocks is longer than the pattern, 13 blocks"):
        model(**batch)
    model, _ = convert("gpt2", FloodFillAttention.from_dict({**config.to_dict(), "extend": "diagonal"}))
    short, long = model(**FAMILIES["gpt2"].batch(1, 104)).logits, model(**batch).logits
    assert long.isfinite().all() and short.shape[1] == 104


def test_a_pattern_of_one_block_is_dense() -> None:
    case = FAMILIES["gpt2"]
    model, batch = case.model(), case.batch(1, 60)
    expected = model(**batch).logits
    handle = sparsetrain.sparsify(model, FloodFillAttention(max_dense_steps=0), calibration=[batch])
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert handle.report()["stats"]["transformer.h.0.attn:flood_fill_attention"]["density"] == 1
    handle.merge()  # it drops nothing, so it may


def test_probe_rows_are_the_longest_ones() -> None:
    ids = torch.arange(12).view(3, 4)
    masks = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1]])
    batches = [{"input_ids": ids, "attention_mask": masks, "labels": ids}, {"input_ids": ids[:, :3], "labels": ids}]
    found = probe_rows(batches, 3)
    assert [row["input_ids"].tolist() for row in found] == [[[4, 5, 6, 7]], [[8, 9, 10, 11]], [[0, 1, 2]]]
    assert all("labels" not in row for row in found)
    assert [row["pixel_values"].item() for row in probe_rows([{"pixel_values": torch.arange(5.0)}], 2)] == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantile": 1.0}, r"quantile=1.0 is out of range. It must lie in \[0, 1\)"),
        ({"quantile": -0.1}, "out of range"),
        ({"keep_ratio": 0.0}, "keep_ratio=0.0 is out of range"),
        ({"quantile": 0.9, "keep_ratio": 0.1}, "Give one"),
        ({"filter_edge": 30}, "odd number"),
        ({"variant": "topq"}, "Did you mean 'top_q'"),
        ({"softmax": "phantom"}, "phantom_zero"),
        ({"block_tokens": 0}, "block_tokens=0; it must be at least 1"),
        ({"probe_every": 10, "max_dense_steps": 29}, "ends at step 29, before the 3 probes"),
        ({"max_dense_ratio": 0.0}, "out of range"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FloodFillAttention(**options)


def test_models_that_cannot_be_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = FAMILIES["gpt2"]
    model, batch = case.model(), case.batch()
    before = model(**batch).logits
    now = FloodFillAttention(max_dense_steps=0)
    for config in (now, FloodFillAttention()):
        with pytest.raises(ValueError, match=r"calibration=\[batches\]"):
            sparsetrain.sparsify(model, config)
    model.transformer.h[0].attn.attn_dropout.p = 0.1
    with pytest.raises(ValueError, match=r"attention dropout is 0\.1"):
        sparsetrain.sparsify(model, now, calibration=[batch])
    model.transformer.h[0].attn.attn_dropout.p = 0.0
    block = model.transformer.h[1]
    monkeypatch.setattr(block, "forward", lambda hidden, *_, **__: hidden)
    with pytest.raises(ValueError, match=r"cannot probe transformer\.h\.1\.attn: .* never called"):
        sparsetrain.sparsify(model, now, calibration=[batch])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="every token of the probe rows is padding"):
        sparsetrain.sparsify(model, now, calibration=[{**batch, "attention_mask": torch.zeros(2, 100)}])
    weight = model.transformer.h[0].attn.c_attn.weight
    kept = weight.detach().clone()
    weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        sparsetrain.sparsify(model, now, calibration=[batch])
    weight.data.copy_(kept)
    assert torch.equal(model(**batch).logits, before)


def test_the_length_of_the_run_must_be_known() -> None:
    _, handle = convert("gpt2", FloodFillAttention(**SMALL))
    with pytest.raises(ValueError, match="was not told its length"):
        handle.step(1)
    with pytest.raises(ValueError, match="ends at step 2, before the 3 probes"):
        handle.step(1, 4)


def test_the_published_choices() -> None:
    assert FloodFillAttention.paper().restart_lr and not FloodFillAttention.paper(variant="f").restart_lr
    config = FloodFillAttention.paper(block_tokens=32, quantile=0.96)
    assert (config.softmax, config.reference, config.last_dense_step(1000)) == ("phantom_zero", "official", None)
