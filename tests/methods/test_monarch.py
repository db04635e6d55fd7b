"""Monarch linears: sizes, inits, projection, and what the surgery refuses. The contract test has the rest."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain import Monarch, MonarchThenDense, grow, plan, sparsify
from sparsetrain.core.anatomy import LinearSite, describe
from sparsetrain.core.backend import timing_on
from sparsetrain.methods.monarch import replace
from sparsetrain.methods.monarch.module import MonarchLinear
from sparsetrain.methods.monarch.shape import shape_of
from sparsetrain.methods.monarch.surgery import costs
from sparsetrain.ops.monarch_linear.gain import Gain
from sparsetrain.surgery.method import method_of
from tests.families import FAMILIES


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def far(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm())


SIZES = [(16, 16), (12, 40), (40, 12), (13, 30), (30, 13), (13, 13)]
"""in, out: square, tall, wide, padded."""


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_multiplies_by_its_dense_weight(size: tuple[int, int], single: bool, bias: bool) -> None:
    """Oracle 3, with any leading dimensions, and gradients in fp64."""
    inputs, outputs = size
    layer = MonarchLinear(
        inputs, outputs, 2, bias, rank=None if single else 2, single_factor=single, dtype=torch.float64
    )
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    for rows in ((), (3,), (2, 1, 4), (0,)):
        x = draw(*rows, inputs)
        y = layer(x)
        assert y.shape == (*rows, outputs)
        assert torch.allclose(y, F.linear(x, layer.to_dense(), layer.bias), rtol=1e-13, atol=1e-13)
    x, parameters = draw(3, inputs).requires_grad_(), dict(layer.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(layer, given, (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))


@pytest.mark.parametrize(
    ("inputs", "outputs", "rank", "kept"),
    [(768, 768, 48, 0.5), (768, 3072, 48, 0.3125), (3072, 768, 48, 0.3125), (48, 96, 3, 0.375)],
)
def test_four_blocks_keep_the_published_share(inputs: int, outputs: int, rank: int, kept: float) -> None:
    """Oracle 6."""
    shape = shape_of(inputs, outputs, 4)
    assert (shape.rank, shape.kept) == (rank, kept)


def test_other_shares_follow_from_blocks_and_rank() -> None:
    assert shape_of(64, 64, 8).kept == 0.25
    assert shape_of(64, 64, 8, single_factor=True).kept == 1 / 8
    asked = shape_of(384, 1536, 4, keep_ratio=0.5)
    assert asked.rank == 38 and 0.49 < asked.kept <= 0.5
    assert shape_of(64, 64, 4, keep_ratio=1.0).rank == 8  # 2 n ρ / n²


@pytest.mark.parametrize("size", [(64, 64), (64, 160), (160, 64), (62, 126)], ids=str)
@pytest.mark.parametrize("single", [False, True])
def test_matched_init_has_the_variance_of_the_dense_layer(size: tuple[int, int], single: bool) -> None:
    """Oracle 7, for unit inputs; the mean over 32 draws."""
    inputs, outputs = size
    torch.manual_seed(0)
    dense, found, fly = [], [], []
    for _ in range(32):
        linear = nn.Linear(inputs, outputs, bias=False)
        given = {"bias": False, "single_factor": single, "rank": None if single else 4}
        matched = MonarchLinear(inputs, outputs, 4, **given, weight_std=linear.weight.detach().std())
        drawn = MonarchLinear(inputs, outputs, 4, init="fly", **given)
        for layer, kept in ((linear, dense), (matched, found), (drawn, fly)):
            kept.append(layer(torch.randn(128, inputs)).square().mean().item())
    wanted = sum(dense) / 32
    assert wanted == pytest.approx(1 / 3, rel=0.05)
    assert sum(found) / 32 == pytest.approx(wanted, rel=0.05)
    if inputs % 4 == 0:  # of padded inputs, some are zero
        assert sum(fly) / 32 == pytest.approx(1 / 3 if single else 1 / 9, rel=0.05)


@pytest.mark.parametrize("size", [(16, 16), (16, 32), (30, 14)], ids=str)
def test_a_layer_of_a_dense_weight_is_the_nearest_and_of_itself_the_same(size: tuple[int, int]) -> None:
    inputs, outputs = size
    rank = 2
    made = MonarchLinear.from_dense(draw(outputs, inputs), 4, draw(outputs), rank=rank)
    assert made.bias is not None and made.shape.rank == rank
    weight = made.to_dense()
    again = MonarchLinear.from_dense(weight, 4, rank=rank)
    if inputs % 4 == 0 and outputs % 4 == 0:  # padded factors have entries that the weight does not show
        assert far(again.to_dense(), weight) < 1e-14
    full = min(made.right.shape[2], made.shape.padded[1] // 4)
    assert far(MonarchLinear.from_dense(draw(outputs, inputs), 4, rank=full).to_dense(), draw(outputs, inputs)) < 1e-14


def test_saving_says_what_is_stored() -> None:
    layer = MonarchLinear(768, 3072, 4, dtype=torch.bfloat16)
    found = layer.saving()
    assert found["params"] == sum(p.numel() for p in layer.parameters()) == found["macs"] + 3072
    assert found["macs"] == 0.3125 * found["dense_macs"] and found["bytes"] == 2 * found["params"]
    assert "768 -> 3072, Monarch, 4 blocks, rank 48, 31% of the weights" in repr(layer)
    assert "block-diagonal, 4 blocks, one factor" in repr(MonarchLinear(16, 16, 4, single_factor=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_blocks": 0}, "num_blocks=0. It must lie between 1 and 12"),
        ({"num_blocks": 13}, "between 1 and 12"),
        ({"num_blocks": 5}, "does not divide its blocks of 3.*Take num_blocks among"),
        ({"num_blocks": 2, "rank": 7}, "rank=7 of blocks of 6"),
        ({"num_blocks": 2, "rank": 0}, "rank=0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MonarchLinear(12, 24, **change)


def test_weights_that_cannot_be_projected_are_refused() -> None:
    with pytest.raises(ValueError, match=r"from_dense: a weight \(3, 4, 5\)"):
        MonarchLinear.from_dense(draw(3, 4, 5))
    with pytest.raises(ValueError, match=r"a bias \(3,\)"):
        MonarchLinear.from_dense(draw(16, 16), 4, draw(3))
    with pytest.raises(ValueError, match="not finite"):
        MonarchLinear.from_dense(draw(16, 16).fill_(torch.inf), 4)
    with pytest.raises(ValueError, match="init='kaiming' is unknown"):
        MonarchLinear(16, 16, init="kaiming")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init": "projct"}, "Did you mean 'project'"),
        ({"roles": ()}, "roles is empty"),
        ({"roles": ("qkv",)}, "roles='qkv' is unknown"),
        ({"num_blocks": 0}, "num_blocks=0; it must be at least 1"),
        ({"keep_ratio": 0.0}, "keep_ratio=0.0 is out of range"),
        ({"keep_ratio": 0.5, "single_factor": True}, "Leave one out"),
    ],
)
def test_bad_configs_say_what_to_do(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Monarch(**values)
    with pytest.raises(ValueError, match=r"dense_share=1.0 is out of range.*no method"):
        MonarchThenDense(dense_share=1.0)


CONFIG = Monarch(num_blocks=2, force=True)


@torch.no_grad()
def test_fused_and_transposed_linears_are_projected_part_by_part() -> None:
    case = FAMILIES["gpt2"]
    model = case.model()
    handle = sparsify(model, CONFIG)
    dense = case.model().transformer.h[0]
    site = handle.sites("monarch")["transformer.h.0.attn.c_attn"]
    parts = dense.attn.c_attn.weight.t().split(32)
    assert len(site.parts) == 3
    for part, weight in zip(site.parts, parts, strict=True):
        assert far(part.to_dense(), MonarchLinear.from_dense(weight, 2).to_dense()) < 1e-6
    weight = site.dense_weights()["weight"]
    assert weight.shape == dense.attn.c_attn.weight.shape and weight.is_contiguous()
    x = draw(2, 5, 32, dtype=torch.float32)
    expected = x @ weight + dense.attn.c_attn.bias
    assert far(site(x), expected) < 1e-6
    errors = site.stats()
    whole = sum((e**2) * float(w.square().sum()) for e, w in zip(errors.values(), parts, strict=True)) ** 0.5
    assert whole == pytest.approx(float((weight - dense.attn.c_attn.weight).norm()), rel=1e-5)
    assert set(handle.sites("monarch")["transformer.h.0.mlp.c_fc"].stats()) == {"relative_error"}
    with pytest.raises(ValueError, match=r"c_attn is one linear for q, k, v, and roles=.* leaves out v"):
        plan(case.model(), Monarch(num_blocks=2, roles=("q", "k")))


def test_roles_say_which_linears_are_taken() -> None:
    model = FAMILIES["llama"].model()
    sites = {edit.site for edit in plan(model, Monarch(num_blocks=2, roles=("up", "down"), layers=(1,))).edits}
    assert sites == {"model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"}


def test_one_factor_is_called_by_its_own_name() -> None:
    case = FAMILIES["llama"]
    config = Monarch(num_blocks=4, single_factor=True, force=True, roles=("up",))
    planned = plan(case.model(), config)
    assert all("block-diagonal" in row["note"] and "Monarch" not in row["note"] for row in planned.rows())
    model = case.model()
    handle = sparsify(model, config)
    site = handle.sites("monarch")["model.layers.0.mlp.up_proj"]
    blocks = case.model().model.layers[0].mlp.up_proj.weight.view(4, 12, 4, 8)
    expected = torch.block_diag(*(blocks[i, :, i] for i in range(4)))
    assert torch.equal(site.dense_weights()["weight"], expected)


@pytest.mark.parametrize("init", ["matched", "fly"])
def test_factors_that_are_drawn_follow_the_weight_that_is_there(init: str) -> None:
    case = FAMILIES["llama"]
    model = case.model()
    std = model.model.layers[0].mlp.up_proj.weight.std()
    site = sparsify(model, Monarch(num_blocks=2, init=init, force=True)).sites("monarch")["model.layers.0.mlp.up_proj"]
    found = site.dense_weights()["weight"].std() / std
    assert 0.8 < found < 1.25 if init == "matched" else found < 0.9
    assert not site.stats() and "lost" not in site.tensors()


def test_what_is_slower_here_is_refused_with_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def gain(right: tuple[int, ...], left: Any, tokens: int, dtype: Any, device: Any) -> Gain:
        outputs = left[0] * left[1]
        return Gain(
            in_features=right[0] * right[2], out_features=outputs, num_blocks=2, tokens=tokens, dtype="float32",
            device="cpu", dense_ms=1.0, monarch_ms=2.0, ratio=1.2 if outputs == 48 else 0.5,
        )  # fmt: skip

    monkeypatch.setattr(replace, "gain_here", gain)
    monkeypatch.setattr(replace, "break_even", lambda *_: 768)
    case = FAMILIES["llama"]
    model, batch = case.model(), case.batch()
    with torch.no_grad():
        expected = model(**batch).logits
        with pytest.raises(ValueError, match=r"q_proj would be slower here.*0\.50x.*from width 768.*force=true"):
            sparsify(model, Monarch(num_blocks=2))
        assert torch.equal(model(**batch).logits, expected), "nothing has changed"
    sparsify(model, Monarch(num_blocks=2, roles=("up", "gate")))  # these pay
    with torch.device("meta"):
        empty = copy.deepcopy(case.model()).to("meta")
    with timing_on("cpu"), pytest.raises(ValueError, match=r"q_proj would be slower here.*0\.50x"):
        sparsify(empty, Monarch(num_blocks=2))
    sparsify(empty, Monarch(num_blocks=2))  # planned for another machine, nothing can be timed


def test_what_hangs_on_a_linear_is_not_left_behind() -> None:
    case = FAMILIES["llama"]
    model = case.model()
    hook = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj: it carries hooks"):
        sparsify(model, CONFIG)
    hook.remove()
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj: it shares its weight.*tied"):
        sparsify(model, CONFIG)
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear), "all edits or none"
    model = case.model()
    sparsify(model, CONFIG)
    with pytest.raises(ValueError, match="is a MonarchSite; convert the model before"):
        sparsify(model, Monarch(num_blocks=2, force=True, init="fly"))


def test_an_adapter_around_or_above_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    case = FAMILIES["llama"]
    inside = get_peft_model(case.model(), LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"up_proj: it is a lora.Linear; convert"):
        sparsify(inside, CONFIG)
    model = case.model()
    handle = sparsify(model, Monarch(num_blocks=2, force=True, roles=("up",)))
    with pytest.raises(ValueError, match="not supported"):
        get_peft_model(model, LoraConfig(target_modules=["up_proj"]))
    get_peft_model(model, LoraConfig(target_modules=["down_proj"]))
    reason = handle.sites("monarch")["model.layers.0.mlp.up_proj"].refuses(None)
    assert reason is not None and "lora_r=0" in reason


def test_multiplied_out_it_is_a_plain_model_with_the_same_outputs() -> None:
    case = FAMILIES["gpt2"]
    model, batch = case.model(), case.batch()
    handle = sparsify(model, CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(**batch).logits.square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        made: Any = method_of(Monarch).exports["multiplied"](handle)
        assert not handle.active and type(made.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
        torch.testing.assert_close(made(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_planned_parameters_are_those_of_the_shapes() -> None:
    site = LinearSite(name="x", layer=0, role="up", in_features=768, out_features=3072)
    dense, ours = costs(Monarch(), site)
    assert ours.num_params == 0.3125 * dense.num_params and ours.flops == 0.3125 * dense.flops
    assert (dense.saved_elements, ours.saved_elements) == (768, 1536)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_the_switch_to_dense_keeps_the_loss_and_the_state_of_what_stays(family: str) -> None:
    """Oracle 5: losses before and after differ by less than 1e-5. The two models stand apart."""
    case, config = FAMILIES[family], MonarchThenDense(num_blocks=2, force=True)
    model = grow(case.model(), config, stage=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = case.batch()
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(**batch).logits.square().mean().backward()
        optimizer.step()
    before = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    structured = model.eval()(**batch).logits.square().mean().item()
    dense = grow(model, config, optimizer, stage=1)
    assert abs(dense.eval()(**batch).logits.square().mean().item() - structured) < 1e-5
    weights = {f"{site.name}.weight" for site in describe(case.model()).linears}
    for name, parameter in dense.named_parameters():
        state = optimizer.state.get(parameter, {})
        if name in weights:
            assert not state, f"{name} starts anew"
        else:
            assert torch.equal(state["exp_avg"], before[name]["exp_avg"]) and int(state["step"]) == 2
    assert {name for name, _ in dense.named_parameters()} == {name for name, _ in case.model().named_parameters()}
    assert [type(m) for m in dense.modules()] == [type(m) for m in case.model().modules()]


def test_stages_say_where_the_switch_is() -> None:
    first, last = method_of(MonarchThenDense).growth.stages(MonarchThenDense())  # type: ignore[union-attr]
    assert (first.name, first.share, last.share) == ("monarch", 0.9, 0.1) and not last.restart_lr
    with pytest.raises(ValueError, match="matches no linear"):
        grow(FAMILIES["llama"].model(), MonarchThenDense(targets=("nowhere",)), stage=0)


def test_a_state_of_another_config_is_refused(tmp_path: Path) -> None:
    case = FAMILIES["llama"]
    state = sparsify(case.model(), CONFIG).state()
    with pytest.raises(ValueError, match="the state holds factors of"):
        sparsify(case.model(), Monarch(num_blocks=4, force=True), state=state)
