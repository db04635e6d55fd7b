"""The maps between levels, on every family that can be pre-trained: what they keep, and what they must not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

import sparsetrain
from sparsetrain import MultiLevel
from sparsetrain.core.anatomy import describe
from sparsetrain.hf.model.classifier import EncoderClassifier
from sparsetrain.methods.multi_level.module import coalesce, decoalesce, interpolate
from sparsetrain.surgery.grow import fill
from sparsetrain.surgery.method import Weights, method_of
from tests.families import FAMILIES, HIDDEN, VOCAB, llama_config

ENCODERS = ("bert", "roberta-prelayernorm", "distilbert")
KINDS = [*FAMILIES, *(f"{name} mlm" for name in ENCODERS), *(f"{name} pairs" for name in ENCODERS)]
every_kind = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
NEAR = {torch.float32: 2e-5, torch.float64: 1e-13}
"""Of the largest output. Sums run in another order, through three layers."""
NORMS_IN_FP32 = ("llama", "qwen2", "qwen3", "mistral", "gemma3")
"""Whose RMSNorm computes in fp32 whatever the weights are."""


def model_of(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    family, _, task = kind.partition(" ")
    model = FAMILIES[family].model(seed)
    if task:
        config = copy.deepcopy(model.config)
        config.classifier_pairs = True
        torch.manual_seed(seed)
        model = AutoModelForMaskedLM.from_config(config) if task == "mlm" else EncoderClassifier.from_config(config)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.08)
    return model.eval().to(dtype)


def outputs(model: Any, kind: str) -> Tensor:
    family, _, task = kind.partition(" ")
    batch = FAMILIES[family].batch(4, 20)
    if task == "pairs":
        batch |= {f"{name}_b": value for name, value in FAMILIES[family].batch(4, 20, seed=2).items()}
    dtype = next(model.parameters()).dtype
    batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    with torch.no_grad():
        return model(**batch).logits


def smaller(model: nn.Module, config: MultiLevel) -> Any:
    return fill(coalesce(model, config), model).eval()


def larger(model: nn.Module, config: MultiLevel) -> Any:
    return fill(decoalesce(model, config), model).eval()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@every_kind
@both
def test_coalescing_undoes_decoalescing_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    """C ∘ D = identity: 0.0 for groups of two, in width, in depth and in both."""
    model = model_of(kind, dtype)
    # the factor of a scaled embedding is a root, and gains stored as deviations from 1 are rounded there
    exact, eps = describe(model).embedding_scale == 1, torch.finfo(dtype).eps
    for config in (MultiLevel(depth=1), MultiLevel(width=1), MultiLevel(), MultiLevel(width_scheme="adjacent")):
        back = weights(smaller(larger(model, config), config))
        for name, weight in weights(model).items():
            if exact or config.width == 1:
                assert torch.equal(back[name], weight), (config, name)
            else:
                assert torch.allclose(back[name], weight, rtol=4 * eps, atol=4 * eps), (config, name)


@every_kind
@both
def test_three_at_a_time_it_does_within_rounding(kind: str, dtype: torch.dtype) -> None:
    config, eps = MultiLevel(width=3, depth=3), torch.finfo(dtype).eps
    model = model_of(kind, dtype)
    back = weights(smaller(larger(model, config), config))
    for name, weight in weights(model).items():
        assert (back[name] - weight).abs().max() <= 8 * eps * max(1.0, weight.abs().max()), name


@every_kind
@both
@pytest.mark.parametrize("width", [2, 3])
def test_expanding_in_width_keeps_the_function(kind: str, dtype: torch.dtype, width: int) -> None:
    model = model_of(kind, dtype)
    config = MultiLevel(width=width, depth=1)
    wide = larger(model, config)
    assert describe(wide).sizes["embed"] == width * HIDDEN and describe(wide).sizes["layers"] == 3
    expected = outputs(model, kind)
    near = 1e-6 if dtype is torch.float64 and kind in NORMS_IN_FP32 else NEAR[dtype]
    assert (outputs(wide, kind) - expected).abs().max() <= near * expected.abs().max()


@every_kind
def test_expanding_in_depth_does_not(kind: str) -> None:
    """It copies layers: the price that the steps after it pay."""
    model = model_of(kind)
    deep = larger(model, MultiLevel(width=1))
    assert describe(deep).sizes == {**describe(model).sizes, "layers": 6}
    assert not torch.allclose(outputs(deep, kind), outputs(model, kind), rtol=1e-3, atol=1e-3)


def test_the_published_factor_on_embeddings_changes_a_pre_norm_model() -> None:
    """The negative control of the factor's place: 4.8 on the page's model, far beyond rounding here."""
    model, kind = model_of("gpt2", torch.float64), "gpt2"
    official = larger(model, MultiLevel(depth=1, scaling="official"))
    assert (outputs(official, kind) - outputs(model, kind)).abs().max() > 0.1
    small = smaller(official, MultiLevel(depth=1, scaling="official"))
    assert all(torch.equal(w, weights(model)[name]) for name, w in weights(small).items())
    wte = "transformer.wte.weight"
    assert torch.equal(weights(official)[wte][:, :HIDDEN], weights(model)[wte] / 2)
    norm = "transformer.ln_f.weight"
    assert torch.equal(weights(official)[norm][:HIDDEN], weights(model)[norm])


def test_post_norm_takes_the_published_factor_up() -> None:
    """BERT's embeddings are normalised at once, but for ε: 3e-7 in the authors' check."""
    model, kind = model_of("bert", torch.float64), "bert"
    official = larger(model, MultiLevel(depth=1, scaling="official"))
    assert (outputs(official, kind) - outputs(model, kind)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "qwen3", "vit"])
def test_heads_of_an_expanded_model_attend_as_those_they_come_from(kind: str) -> None:
    model = model_of(kind, torch.float64)
    wide = larger(model, MultiLevel(depth=1))
    maps = []
    for each in (model, wide):
        each.set_attn_implementation("eager")
        batch = FAMILIES[kind].batch(2, 12)
        batch = {n: v.double() if v.is_floating_point() else v for n, v in batch.items()}
        with torch.no_grad():
            maps.append(each(**batch, output_attentions=True).attentions)
    for small, large in zip(*maps, strict=True):
        heads = small.shape[1]
        assert large.shape[1] == 2 * heads
        for head in range(2 * heads):
            assert (large[:, head] - small[:, head % heads]).abs().max() < 1e-14


def test_units_that_are_equal_stay_equal_until_they_are_mixed() -> None:
    """Equal gradients for ever: an FFN of rank 12 keeps rank 12 of 24; mixed with another matrix it has all 24."""
    config = GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=12, n_head=2, n_layer=1, n_inner=12)
    torch.manual_seed(0)
    small = GPT2LMHeadModel(config).double()
    for parameter in small.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    wide = larger(small, MultiLevel(depth=1)).train()
    for module in wide.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    name = "transformer.h.0.mlp.c_fc.weight"  # [in, out]
    optimizer = torch.optim.AdamW(wide.parameters(), lr=1e-2)
    ids = torch.randint(VOCAB, (3, 16), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        wide.zero_grad()
        wide(input_ids=ids, labels=ids).loss.backward()
        gradient = dict(wide.named_parameters())[name].grad
        assert (gradient[:, :12] - gradient[:, 12:]).abs().max() <= 1e-17 and gradient.abs().max() > 1e-6
        optimizer.step()
    weight = weights(wide)[name]
    assert torch.linalg.matrix_rank(weight, atol=1e-12) == 12
    torch.manual_seed(1)
    other = {n: torch.randn_like(p) for n, p in wide.named_parameters()}
    mixed = fill(interpolate(decoalesce(small, MultiLevel(depth=1)), other, 0.5), small)
    assert torch.linalg.matrix_rank(weights(mixed)[name], atol=1e-12) == 24


@every_kind
@both
def test_the_ends_of_interpolation(kind: str, dtype: torch.dtype) -> None:
    """0 is the saved model to the bit, 1 the expanded one; every parameter is mixed, norms and biases too."""
    config, model = MultiLevel(), model_of(kind, dtype)
    grown = decoalesce(model, config)
    expanded = weights(fill(grown, model))
    saved = {name: torch.randn_like(weight) for name, weight in expanded.items()}
    assert set(grown.origins) == set(expanded)
    for alpha in (0.0, 0.25, 1.0):
        found = weights(fill(interpolate(decoalesce(model, config), saved, alpha), model))
        for name, weight in found.items():
            if alpha in (0.0, 1.0):
                assert torch.equal(weight, (saved, expanded)[int(alpha)][name])
            else:
                wanted = 0.75 * saved[name] + 0.25 * expanded[name]
                assert torch.allclose(weight, wanted, rtol=1e-5, atol=1e-6)


@every_kind
def test_three_levels_down_and_up(kind: str) -> None:
    """The whole cycle: each model's sizes, whose weights are mixed, and that the last is of the recipe's own config."""
    family, _, task = kind.partition(" ")
    config = MultiLevel(levels=3, depth=1, alpha=0.5, small_share=0.4)
    if family in ("llama", "qwen2", "qwen3", "mistral", "gemma3"):
        config = MultiLevel(levels=3, width=1, depth=1, small_share=0.4)  # two groups of heads are there to halve once
    model, kept = model_of(kind), dict[str, Weights]()
    first, stages = model, method_of(config).growth.stages(config)  # type: ignore[union-attr]
    assert [stage.name for stage in stages] == ["level 1, start", "level 2, start", "level 3", "level 2", "level 1"]
    assert sum(stage.share for stage in stages) == pytest.approx(1)
    sizes = []
    for stage in range(5):
        before = model
        model = sparsetrain.grow(model, config, stage=stage, kept=kept)
        sizes.append(describe(model).sizes["embed"])
        if stage == 4:
            wanted = interpolate(decoalesce(before, config), weights(first), 0.5)
            assert all(torch.equal(w, weights(model)[n]) for n, w in weights(fill(wanted, before)).items())
        for parameter in model.parameters():  # "training"
            parameter.data.add_(torch.randn_like(parameter) * 0.01 * (stage > 0))
    factor = config.width
    assert sizes == [HIDDEN, HIDDEN // factor, HIDDEN // factor**2, HIDDEN // factor, HIDDEN]
    assert model.config.to_dict() == first.config.to_dict() and set(kept) == {"level-1", "level-2"}
    assert task or type(model) is type(FAMILIES[family].model())


def test_grouped_keys_go_with_their_queries() -> None:
    torch.manual_seed(0)
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(llama_config(num_attention_heads=4, num_key_value_heads=2)).double().eval()
    small = smaller(model, MultiLevel(depth=1))
    assert (small.config.num_attention_heads, small.config.num_key_value_heads, small.config.head_dim) == (2, 1, 8)
    q, q2 = (m.model.layers[0].self_attn.q_proj.weight for m in (model, small))
    k, k2 = (m.model.layers[0].self_attn.k_proj.weight for m in (model, small))
    # queries 0, 1 are of key 0 and 2, 3 of key 1: query 0 is merged with query 2, and no other
    inputs = (q[:, :16] + q[:, 16:]).unflatten(0, (4, 8))
    assert torch.allclose(q2.unflatten(0, (2, 8)), (inputs[:2] + inputs[2:]) / 2)
    assert torch.allclose(k2, ((k[:8] + k[8:]) / 2)[:, :16] + ((k[:8] + k[8:]) / 2)[:, 16:])


def test_a_small_model_of_equal_units_computes_what_the_large_one_does() -> None:
    """C keeps what D makes, and a coalesced model has the factor of its tied head in its last norm."""
    model = model_of("gpt2", torch.float64)
    small = smaller(model, MultiLevel(depth=1))
    gain, merged = weights(model)["transformer.ln_f.weight"], weights(small)["transformer.ln_f.weight"]
    assert torch.allclose(merged, gain[:16] + gain[16:])  # the mean, times 2


def test_uneven_groups_are_asked_for() -> None:
    model = model_of("gpt2")
    config = MultiLevel(width_scheme="0+1|2+3", depth_scheme="0+1|2")
    with pytest.raises(ValueError, match=r"depth_scheme='0\+1\|2' has groups of different sizes.*allow_uneven"):
        coalesce(model, config)
    allowed = MultiLevel(width_scheme="0+1|2+3", depth_scheme="0+1|2", allow_uneven=True)
    small = smaller(model, allowed)
    assert describe(small).sizes["layers"] == 2
    h = "transformer.h.{}.mlp.c_fc.bias"
    assert torch.equal(
        weights(small)[h.format(1)],
        smaller(model, MultiLevel(depth=1, width_scheme="adjacent")).get_parameter(h.format(2)),
    )
    assert describe(larger(small, allowed)).sizes == describe(model).sizes


def test_the_model_that_is_mapped_is_left_alone() -> None:
    model = model_of("gpt2")
    before = {name: weight.clone() for name, weight in weights(model).items()}
    config = model.config.to_dict()
    smaller(model, MultiLevel(depth=3))
    larger(model, MultiLevel())
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    assert model.config.to_dict() == config


def test_kept_weights_are_no_view_of_the_model() -> None:
    model, kept = model_of("gpt2"), dict[str, Weights]()
    sparsetrain.grow(model, MultiLevel(depth=3), stage=1, kept=kept)
    start = kept["level-1"]["transformer.wte.weight"].clone()
    model.transformer.wte.weight.data.zero_()
    assert torch.equal(kept["level-1"]["transformer.wte.weight"], start)


def test_levels_of_one_size_are_the_model_itself() -> None:
    config, model = MultiLevel.dense_limit(), model_of("llama")
    for made in (smaller(model, config), larger(model, config)):
        assert all(torch.equal(w, weights(model)[name]) for name, w in weights(made).items())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"levels": 1}, "levels=1; two at least"),
        ({"alpha": 1.5}, r"alpha=1.5 is out of range"),
        ({"width": 0}, "width=0; it must be at least 1"),
        ({"small_share": 0.97}, "leave nothing of the run to the large model"),
        ({"levels": 3, "start_share": 0.0}, "start_share=0 goes with levels=2"),
        ({"levels": 3, "depth_scheme": "0+1|2"}, "says groups of one level"),
        ({"scaling": "official", "width": 3}, "fixed factor 2"),
        ({"scaling": "half"}, "scaling='half' is unknown"),
        ({"layers": (1,)}, "it maps the whole model"),
    ],
)
def test_values_that_make_no_cycle(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MultiLevel(**changes)


def test_models_that_cannot_be_mapped() -> None:
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel, layers \(depth\): 3 cannot be merged 2 to one. Take 1, 3"):
        coalesce(model_of("gpt2"), MultiLevel())
    with pytest.raises(ValueError, match=r"LlamaForCausalLM, key/value heads \(width\): 2 cannot be merged 3"):
        coalesce(model_of("llama"), MultiLevel(width=3, depth=3))
    with pytest.raises(ValueError, match=r"groups '0\+1\|1\+2' hold units"):
        coalesce(model_of("gpt2"), MultiLevel(depth_scheme="0+1|1+2"))
    with pytest.raises(ValueError, match=r"ffn=50 does not divide into 4 units"):
        coalesce(GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=4, n_layer=2, n_inner=50)), MultiLevel())
    sizes: dict[str, Any] = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"do_layer_norm_before": False, "_remove_final_layer_norm": True, "word_embed_proj_dim": 32}
    post = OPTForCausalLM(OPTConfig(**sizes, vocab_size=VOCAB))
    with pytest.raises(ValueError, match="is its embedding, and no norm stands before it"):
        coalesce(post, MultiLevel())
    odd = model_of("gpt2")
    odd.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="the axes of extra are not known"):
        coalesce(odd, MultiLevel(depth=3))


def test_weights_that_do_not_belong_together() -> None:
    model = model_of("gpt2")
    grown = decoalesce(model, MultiLevel())
    saved = weights(fill(decoalesce(model, MultiLevel()), model))
    with pytest.raises(ValueError, match=r"transformer.wte.weight is not there in the saved model and \(61, 64\)"):
        interpolate(grown, {n: w for n, w in saved.items() if "wte" not in n}, 0.5)
    with pytest.raises(ValueError, match=r"ln_f.bias is \(3,\) in the saved model and \(64,\)"):
        interpolate(grown, {**saved, "transformer.ln_f.bias": torch.zeros(3)}, 0.5)
    with pytest.raises(ValueError, match=r"alpha=-0.1 is out of range"):
        interpolate(grown, saved, -0.1)
    with pytest.raises(ValueError, match="`kept` has no weights of it"):
        sparsetrain.grow(smaller(model, MultiLevel(depth=3)), MultiLevel(depth=3), stage=2, kept={})
