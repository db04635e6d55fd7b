"""PST: schedule, planted task, fused projections, scopes, export; what every method keeps is in the contract."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import sparsetrain
from sparsetrain import PST
from sparsetrain.core.anatomy import Anatomy, Block, LinearSite, describe, submodule
from sparsetrain.measure.memory import saved_activations
from sparsetrain.methods.pst.export import to_pruned
from sparsetrain.ops.masked_linear import Factors, Rule, masked_linear, masked_weight
from sparsetrain.ops.topk_mask import count_zeros, topk_mask
from sparsetrain.surgery.record import handles_of
from tests.families import FAMILIES, llama_config


class Net(nn.Module):
    """Two linears and their places, so that steps take milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def anatomy(self) -> Anatomy:
        sizes = {"up": (16, 32), "down": (32, 16)}
        linears = tuple(
            LinearSite(name=name, layer=0, role=name, in_features=i, out_features=o) for name, (i, o) in sizes.items()
        )
        return Anatomy(
            family="net",
            model_class="Net",
            blocks=(Block(name="", layer=0, attention=None, ffn=None, linears=linears),),
        )


def net(config: PST, seed: int = 0) -> tuple[Any, sparsetrain.Handle]:
    torch.manual_seed(seed)
    model = Net()
    model.requires_grad_(False)
    return model, sparsetrain.sparsify(model, config)


def train(model: Any, handle: sparsetrain.Handle, steps: int, total: int, first: int = 0, optimizer: Any = None) -> Any:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 16, generator=draw), torch.randn(64, 16, generator=draw)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    model.train()
    for step in range(first, first + steps):
        handle.step(step, total)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return optimizer


def test_the_schedule_is_the_published_one() -> None:
    config = PST(keep_ratio=0.1)
    zeros = [round(1 - config.keep_at(step, 1000), 3) for step in (0, 100, 250, 400, 550, 700, 701, 999, 1000)]
    assert zeros == [0, 0, 0.520, 0.787, 0.886, 0.9, 0.9, 0.9, 0.9]
    assert config.keep_at(100, 1000) == 1 and config.keep_at(700, 1000) == 0.1
    shares = [PST(keep_ratio=0.2, initial_keep_ratio=0.7).keep_at(step, 37) for step in range(38)]
    assert shares == sorted(shares, reverse=True) and (shares[0], shares[-1]) == (0.7, 0.2)


def planted(seed: int, rule: Rule) -> tuple[float, float]:
    """(error, share of useless columns' entries kept) after 600 steps on a target that is half of the weight: the other
    half of the input columns is three times larger."""
    draw = torch.Generator().manual_seed(seed)
    target = torch.randn(32, 32, generator=draw)
    weight = target.clone()
    weight[:, 16:] = 3 * torch.randn(32, 16, generator=draw)
    target[:, 16:] = 0
    u, a = torch.randn(32, 8, generator=draw), torch.randn(32, 8, generator=draw)
    zero = torch.zeros
    factors = Factors(*(f.requires_grad_() for f in (u, zero(8, 32), a, zero(8, 32), zero(32), zero(32))))
    optimizer, config = torch.optim.Adam(list(factors), lr=1e-2, fused=True), PST(keep_ratio=0.5)
    for step in range(600):
        x = torch.randn(64, 32, generator=draw)
        zeros = count_zeros(1024, config.keep_at(step, 600))
        optimizer.zero_grad()
        (masked_linear(x, weight, None, factors, zeros, rule) - x @ target.t()).square().mean().backward()
        optimizer.step()
    found = masked_weight(weight, factors, 512, rule)
    x = torch.randn(1000, 32, generator=draw)
    return float((x @ (found - target).t()).square().mean()), float((found[:, 16:] != 0).float().mean())


@pytest.mark.slow
def test_planted_columns_are_pruned_where_magnitude_keeps_them() -> None:
    """600 steps, four times: the score has to overcome weights of three times the size."""
    found = [planted(seed, Rule()) for seed in range(3)]
    assert all(error < 5e-4 and kept == 0 for error, kept in found), found
    magnitude = Rule(score_scale=0.0, line_scale=0.0, detach_magnitude=True)
    error, kept = planted(0, magnitude)
    assert error > 20 and kept > 0.6


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_first_mask_is_the_magnitude_mask_of_each_part(name: str) -> None:
    model = FAMILIES[name].model()
    before = {site.name: submodule(model, site.name).weight.detach().clone() for site in describe(model).linears}  # type: ignore[union-attr]
    handle = sparsetrain.sparsify(model, PST(keep_ratio=0.5, initial_keep_ratio=0.7))
    for site in describe(model).linears:
        found = handle.sites("pst")[site.name]
        weight = before[site.name].t() if site.transposed else before[site.name]
        pieces = [part * topk_mask(part.abs(), count_zeros(part.numel(), 0.7)) for part in weight.split(found.sizes)]
        assert torch.equal(found.pruned(), torch.cat(pieces))
        assert len(pieces) == (3 if site.name.endswith("c_attn") else 1)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_until_it_prunes_outputs_are_the_dense_ones(name: str) -> None:
    case = FAMILIES[name]
    model, batch = case.model(), case.batch()
    with torch.no_grad():
        expected = model(**batch).logits
        sparsetrain.sparsify(model, PST(weight_rank=2, score_rank=2))
        found = [model(**batch).logits]
    found.append(model(**batch).logits.detach())  # with gradients nothing is kept from call to call
    for logits in found:
        if name == "gpt2":  # its fused projection runs as three
            torch.testing.assert_close(logits, expected)
        else:
            assert torch.equal(logits, expected)


def test_trained_parameters_are_17_times_the_sides_and_a_seventieth_of_movement_prunings() -> None:
    """Of a BERT-base on the meta device."""
    with torch.device("meta"):
        model = BertModel(BertConfig())
    sites = describe(model).linears
    rows = sparsetrain.plan(model, PST()).rows()
    assert [row["added_params"] for row in rows] == [17 * (site.in_features + site.out_features) for site in sites]
    added = sum(row["added_params"] for row in rows)
    assert added == 2_820_096
    matrices = sum(site.in_features * site.out_features for site in sites)
    movement = sum(p.numel() for p in model.parameters()) + matrices
    assert added <= 0.017 * movement and added / (2 * matrices) == pytest.approx(0.0166, abs=5e-5)


NARROW = {
    "minilm": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 30522},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    | {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
}


@pytest.mark.parametrize(("name", "at_rank_8", "at_rank_6"), [("minilm", 0.0212, 0.0162), ("smollm2", 0.0216, 0.0165)])
def test_narrow_models_train_a_larger_share_and_rank_6_comes_below_the_pages(
    name: str, at_rank_8: float, at_rank_6: float
) -> None:
    """(2 r + 1)(out + in) over out · in falls with the width; the page's 1.7 % is of a width of 768."""
    with torch.device("meta"):
        config = BertConfig(**NARROW[name]) if name == "minilm" else LlamaConfig(**NARROW[name])
        model = BertModel(config) if name == "minilm" else LlamaForCausalLM(config)
    matrices = sum(site.in_features * site.out_features for site in describe(model).linears)
    movement = sum(p.numel() for p in model.parameters()) + matrices
    for rank, share in ((8, at_rank_8), (6, at_rank_6)):
        rows = sparsetrain.plan(model, PST(weight_rank=rank, score_rank=rank)).rows()
        assert sum(row["added_params"] for row in rows) / movement == pytest.approx(share, abs=5e-5)


def test_it_keeps_no_more_than_lora_for_the_backward() -> None:
    config = llama_config(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=4)
    case = dataclasses.replace(FAMILIES["llama"], build=lambda: type(FAMILIES["llama"].model())(config))
    batch = case.batch(2, 100)

    def kept(model: Any) -> dict[str, int]:
        return saved_activations(model.train(), lambda: model(**batch, labels=batch["input_ids"]).loss).by_component

    pruned, frozen = case.model(), case.model()
    handle = sparsetrain.sparsify(pruned, PST())
    handle.step(1, 1)
    pruned.requires_grad_(False)
    for site in handle.sites("pst").values():
        site.requires_grad_(True)
    lora = get_peft_model(frozen, LoraConfig(target_modules="all-linear", r=8, task_type="CAUSAL_LM"))
    ours, theirs = kept(pruned), kept(lora)
    assert sum(ours.values()) <= 1.1 * sum(theirs.values())
    # besides the inputs LoRA keeps its rank-8 products
    assert 0.9 * sum(theirs.values()) <= sum(ours.values())


def test_counts_are_exact_at_every_step_and_evaluation_follows_the_factors() -> None:
    model, handle = net(PST(keep_ratio=0.25, weight_rank=2, score_rank=2))
    sites, optimizer = handle.sites("pst"), None
    for step in range(20):
        optimizer = train(model, handle, 1, 20, step, optimizer)
        for site in sites.values():
            assert int((site.pruned() == 0).sum()) == count_zeros(512, handle.configs[0].keep_at(step, 20))  # type: ignore[attr-defined]
    x = torch.randn(3, 16)
    with torch.no_grad():
        evaluated = model.eval()(x)
        assert [len(site.held_tensors()) for site in sites.values()] == [1, 1], "it is kept in evaluation"
        assert torch.equal(model(x), evaluated)
        assert torch.equal(model.train()(x), evaluated)
        assert not any(site.held_tensors() for site in sites.values()), "and dropped in training"
    assert torch.equal(model.eval()(x), evaluated), "with gradients nothing is read from it"


def test_the_frozen_weights_get_no_gradient_and_the_factors_no_decay() -> None:
    model, handle = net(PST(keep_ratio=0.5))
    train(model, handle, 3, 4)
    assert model.up.weight.grad is None and model.up.bias.grad is None
    site = handle.sites("pst")["up"]
    assert len(site.undecayed()) == 6
    kept = PST(decay_weight_factors=True)
    assert len(net(kept)[1].sites("pst")["up"].undecayed()) == 4


def test_one_mask_over_all_matrices() -> None:
    model, handle = net(PST(keep_ratio=0.25, scope="global", weight_rank=2, score_rank=2))
    with torch.no_grad():
        model.down.weight.mul_(4)
    for site in handle.sites("pst").values():
        site.rebase()
    train(model, handle, 8, 10)
    up, down = handle.sites("pst").values()
    found = [int((site.pruned() == 0).sum()) for site in (up, down)]
    assert sum(found) == count_zeros(1024, 0.25) and found[0] > found[1] + 50
    handle.step(8, 10)  # as they rank now
    scores = torch.cat([score.flatten() for site in (up, down) for score in site.scores()])
    mask = torch.cat([(site.pruned() != 0).flatten() for site in (up, down)])
    assert torch.equal(mask, topk_mask(scores, 768))


def test_two_of_four_at_the_end_and_no_more_on_the_way() -> None:
    model, handle = net(PST(keep_ratio=0.5, pattern="2:4", weight_rank=2, score_rank=2))
    train(model, handle, 5, 10)
    groups = handle.sites("pst")["up"].pruned().unflatten(1, (-1, 4)).ne(0).sum(-1)
    assert (groups >= 2).all() and (groups > 2).any()
    train(model, handle, 5, 10, 5)
    expected = model.eval()(x := torch.randn(2, 16))
    plain = to_pruned(handle)
    for linear in (plain.up, plain.down):
        assert (linear.weight.unflatten(1, (-1, 4)).ne(0).sum(-1) == 2).all()
    assert torch.equal(plain(x), expected)


def test_a_resumed_run_repeats_the_losses_at_every_step() -> None:
    for scope in ("matrix", "global"):
        config = PST(keep_ratio=0.2, scope=scope, weight_rank=2, score_rank=2)
        model, handle = net(config)
        train(model, handle, 10, 10)
        expected = {key: value.clone() for key, value in model.state_dict().items()}
        for stop in (1, 4, 7, 9):
            first, handle = net(config)
            optimizer = train(first, handle, stop, 10)
            state = copy.deepcopy(handle.state())
            torch.manual_seed(0)
            second = Net().requires_grad_(False)
            again = sparsetrain.sparsify(second, config, state=state)
            x = torch.randn(3, 16)
            assert torch.equal(second.eval()(x), first.eval()(x))
            resumed = torch.optim.AdamW([p for p in second.parameters() if p.requires_grad], lr=1e-2)
            resumed.load_state_dict(optimizer.state_dict())
            train(second, again, 10 - stop, 10, stop, resumed)
            assert all(torch.equal(value, expected[key]) for key, value in second.state_dict().items()), stop


def test_the_end_of_the_ramp_is_said_once() -> None:
    _, handle = net(PST(keep_ratio=0.2))
    said = [line for step in range(20) for line in handle.step(step, 20)]
    assert said == ["pst: from step 14 on 80% of the weights are 0, to the end."]


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_export_writes_exact_zeros_into_plain_linears(name: str) -> None:
    case = FAMILIES[name]
    model, batch = case.model(), case.batch()
    sites = describe(model).linears
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    handle = sparsetrain.sparsify(model, PST(keep_ratio=0.2))
    handle.step(0, 1)
    with pytest.raises(ValueError, match=r"keeps 1 of its weights and is to keep 0\.2\. Train to the end"):
        to_pruned(handle)
    handle.step(1, 1)
    with torch.no_grad():
        for site in handle.sites("pst").values():
            for parameter in site.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        expected = model(**batch).logits
        originals = {site.name: submodule(model, site.name).weight for site in sites}
        plain = to_pruned(handle)
        torch.testing.assert_close(plain(**batch).logits, expected)
    assert not handle.active and [type(module) for module in plain.modules()] == kinds
    assert plain.state_dict().keys() == before.keys()
    for site in sites:
        weight, bias = plain.get_parameter(f"{site.name}.weight"), f"{site.name}.bias"
        parts = (weight.t() if site.transposed else weight).split([size for _, size in site.parts] or site.out_features)
        assert [int((part == 0).sum()) for part in parts] == [count_zeros(part.numel(), 0.2) for part in parts]
        assert weight.requires_grad and torch.equal(plain.state_dict()[bias], before[bias])
        assert torch.equal(originals[site.name], before[f"{site.name}.weight"]), "the base is not written to"
    with pytest.raises(ValueError, match="no linear of this handle"):
        to_pruned(handle)


def test_export_may_be_forced_before_the_ramp_ends() -> None:
    model, handle = net(PST(keep_ratio=0.2))
    train(model, handle, 3, 10)
    keep = handle.sites("pst")["up"].keep_ratio
    assert 0.2 < keep < 1
    assert int((to_pruned(handle, force=True).up.weight == 0).sum()) == count_zeros(512, keep)


def test_restore_gives_back_every_tensor_after_training() -> None:
    model, handle = net(PST(keep_ratio=0.2))
    before = Net.state_dict(copy.deepcopy(model))
    weights = {key: value.clone() for key, value in before.items() if "pst" not in key}
    identity = id(model.up.weight)
    train(model, handle, 10, 10)
    handle.restore()
    assert model.state_dict().keys() == weights.keys() and id(model.up.weight) == identity
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_a_copy_of_the_model_is_pruned_alike_and_trains_on_by_itself() -> None:
    model, handle = net(PST(keep_ratio=0.2))
    train(model, handle, 10, 10)
    twin, x = copy.deepcopy(model), torch.randn(2, 16)
    expected = model.eval()(x)
    assert torch.equal(twin.eval()(x), expected)
    train(twin, handles_of(twin)[0], 1, 10, 9)
    assert not torch.equal(twin.eval()(x), expected) and torch.equal(model(x), expected)


def test_a_weight_that_was_changed_is_noticed() -> None:
    """As an adapter that is merged into it changes it."""
    model, handle = net(PST(keep_ratio=0.2))
    train(model, handle, 10, 10)
    model.up.weight.data[3] += 0.1
    with torch.no_grad(), pytest.raises(ValueError, match="was changed after the conversion"):
        model.eval()(torch.randn(2, 16))
    with pytest.raises(ValueError, match="was changed after the conversion"):
        model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="was changed after the conversion"):
        to_pruned(handle)
    assert handle.active


def test_factors_are_refused_on_another_base() -> None:
    model, handle = net(PST(keep_ratio=0.2))
    train(model, handle, 2, 10)
    with pytest.raises(ValueError, match="trained on other weights"):
        sparsetrain.sparsify(Net().requires_grad_(False), PST(keep_ratio=0.2), state=handle.state())
    torch.manual_seed(0)
    half = Net().to(torch.bfloat16).requires_grad_(False)
    again = sparsetrain.sparsify(half, PST(keep_ratio=0.2), state=handle.state())  # the same base, in another format
    assert again.sites("pst")["up"].up.u.dtype == torch.float32, "factors and scores are kept in fp32"
    with pytest.raises(ValueError, match="should be"):
        torch.manual_seed(0)
        sparsetrain.sparsify(Net(), PST(keep_ratio=0.2, score_rank=4), state=handle.state())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "all zeros": ({"keep_ratio": 0.0}, r"keep_ratio=0\.0 is out of range\. It must lie in \(0, 1\]"),
    "negative zeros": ({"keep_ratio": 1.2}, r"keep_ratio=1\.2 is out of range"),
    "growing": ({"keep_ratio": 0.5, "initial_keep_ratio": 0.3}, r"initial_keep_ratio=0\.3 is below keep_ratio=0\.5"),
    "no rank": ({"weight_rank": 0}, "weight_rank=0; it must be at least 1"),
    "no score rank": ({"score_rank": 0}, "score_rank=0; it must be at least 1"),
    "no ramp": ({"first_ratio": 0.4, "last_ratio": 0.6}, "leave no step between them"),
    "negative phase": ({"first_ratio": -0.1}, "first_ratio"),
    "scope": ({"scope": "layer"}, "scope='layer' is unknown"),
    "pattern": ({"pattern": "1:4"}, "pattern='1:4' is unknown"),
    "2:4 share": ({"pattern": "2:4", "keep_ratio": 0.1}, r"keeps half of the weights, and keep_ratio=0\.1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_errors(name: str) -> None:
    values, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        PST(**values)


def test_what_does_not_fit_the_model_is_an_error_that_changes_nothing() -> None:
    model = Net()
    with pytest.raises(ValueError, match="score_rank=17 is more than up has: its smaller side is 16"):
        sparsetrain.sparsify(model, PST(score_rank=17))
    sparsetrain.sparsify(model, PST(keep_ratio=0.5))
    with pytest.raises(ValueError, match="converted already"):
        sparsetrain.sparsify(model, PST(keep_ratio=0.5))
    with pytest.raises(ValueError, match="pst trains a model to be used sparse"):
        sparsetrain.sparsify(Net(), PST(), deploy="dense")
    quantised: Any = Net()
    quantised.up.weight = nn.Parameter(torch.ones(32, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"up holds weights of torch\.int8"):
        sparsetrain.sparsify(quantised, PST())
    assert type(quantised.down) is nn.Linear and quantised.down.weight.requires_grad
