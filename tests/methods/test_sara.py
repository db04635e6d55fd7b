"""SaRA: what its page says must hold, on tensors and tiny models."""

from __future__ import annotations

import copy
import gc
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import sparsetrain
from sparsetrain import SaRA, sparsify
from sparsetrain.core.errors import CheckpointError
from sparsetrain.methods.sara.config import learning_rate
from sparsetrain.methods.sara.delta import apply_delta, save_delta
from sparsetrain.methods.sara.module import nuclear_norm
from sparsetrain.surgery.method import method_of
from tests.families import FAMILIES, llama_config

LLAMA = FAMILIES["llama"]
WIDE = {"hidden_size": 80, "intermediate_size": 96, "num_hidden_layers": 2}
OPTIMIZERS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def wide() -> Any:
    """A tiny Llama whose matrices are wide enough for a rank term, and hold tiles."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(**{**WIDE, "vocab_size": 61})).eval()


def tiled() -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_key_value_heads": 4, "num_hidden_layers": 2}
    return LlamaForCausalLM(llama_config(**sizes)).eval()


def sites(handle: sparsetrain.Handle) -> dict[str, Any]:
    return handle.sites("sara")


def parts(handle: sparsetrain.Handle) -> dict[str, Any]:
    return {f"{s}.{name}": part for s, site in sites(handle).items() for name, part in site.own_parts.items()}


def optimizer_of(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    given = {"lr": 1e-2, "weight_decay": 0.0, "fused": True} | options
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **given)


def loss_of(model: Any, seed: int = 1) -> Tensor:
    batch = LLAMA.batch(2, 20, seed)
    return model(**batch, labels=batch["input_ids"]).loss


def trained(model: Any, handle: sparsetrain.Handle | None, steps: int, total: int = 10, **options: Any) -> list[float]:
    """Losses of steps from the first one on, of the model without its weights outside of the method."""
    optimizer = optimizer_of(model, **options)
    found = []
    for step in range(steps):
        if handle is not None:
            handle.step(step, total)
        loss = loss_of(model.train(), step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def frozen_around(config: SaRA, model: Any = None) -> tuple[Any, sparsetrain.Handle]:
    model = LLAMA.model() if model is None else model
    model.requires_grad_(False)
    return model, sparsify(model, config)


def marked(places: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.bool).index_fill_(0, places.long(), True)


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_fifty_steps_are_those_of_adamw_with_masked_gradients_bit_for_bit(kind: str, decay: float) -> None:
    options = {**OPTIMIZERS[kind], "weight_decay": decay, "lr": 1e-3}
    model, handle = frozen_around(SaRA(fraction=0.15, adjust_at=None))
    dense = LLAMA.model().requires_grad_(False)
    weights = {name: dense.get_parameter(name).requires_grad_() for name in parts(handle)}
    start = {name: w.detach().clone() for name, w in weights.items()}
    masks = {
        name: torch.zeros(w.numel(), dtype=torch.bool)
        .index_fill_(0, parts(handle)[name].places.long(), True)
        .view_as(w)
        for name, w in weights.items()
    }
    optimizer = optimizer_of(dense, **({"fused": None} | options))
    for step in range(50):
        loss_of(dense, step).backward()
        for name, w in weights.items():
            assert w.grad is not None
            w.grad.mul_(masks[name])
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # decay acts on what trains alone
            for name, w in weights.items():
                w.copy_(torch.where(masks[name], w, start[name]))
    trained(model.train(), handle, 50, 50, **({"fused": None} | options))
    for name, w in weights.items():
        ours = model.get_parameter(name)
        # a fused step rounds the last entries of a tensor, below a vector's width, by a bit otherwise than the others
        tolerance = {"rtol": 1e-4, "atol": 1e-6} if kind == "fused" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(ours, w.detach(), **tolerance)
        assert torch.equal(ours[~masks[name]], start[name][~masks[name]])
        assert (ours != start[name]).any()


def test_state_has_two_numbers_an_entry_and_one_and_gradients_one() -> None:
    model, handle = frozen_around(SaRA(fraction=0.15))
    optimizer = optimizer_of(model)
    loss_of(model).backward()
    optimizer.step()
    weights = {id(model.get_parameter(name)) for name in parts(handle)}
    for part in parts(handle).values():
        count = part.places.numel()
        assert part.values.grad.numel() == count
        assert sum(t.numel() for t in optimizer.state[part.values].values()) == 2 * count + 1
    assert all(p.grad is None for p in model.parameters() if id(p) in weights)
    total = sum(model.get_parameter(name).numel() for name in parts(handle))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == int(0.15 * total)


def test_the_gradient_of_the_nuclear_norm() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(9, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(nuclear_norm(x), x)
    u, s, v = torch.linalg.svd(x.detach(), full_matrices=False)
    torch.testing.assert_close(found, u @ v, rtol=0, atol=1e-12)
    assert abs(float(nuclear_norm(x).detach() - s.sum())) < 1e-12
    deficient = torch.outer(torch.arange(5.0), torch.ones(4))
    for singular in (deficient, torch.zeros(5, 4), torch.eye(4)):
        y = singular.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(nuclear_norm(y), y)
        assert gradient.isfinite().all()
    half = torch.randn(8, 8, dtype=torch.bfloat16).requires_grad_()
    assert nuclear_norm(half).dtype == torch.float32


def test_the_function_is_unchanged_at_the_start_and_at_the_adjustment() -> None:
    model = LLAMA.model()
    batch = LLAMA.batch()
    expected = model(**batch).logits
    before = {name: w.clone() for name, w in model.state_dict().items()}
    model, handle = frozen_around(SaRA(), model)
    assert torch.equal(model(**batch).logits, expected)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items() if name in before)  # signs too
    trained(model, handle, 5)
    moved = model.eval()(**batch).logits
    assert not torch.equal(moved, expected)
    assert "still below" in handle.step(5, 10)[0]
    assert torch.equal(model(**batch).logits, moved) and handle.step(5, 10) == [] == handle.step(6, 10)


@pytest.mark.parametrize("keep_state", [False, True])
def test_what_an_adjustment_drops_never_moves_again(keep_state: bool) -> None:
    model, handle = frozen_around(SaRA(fraction=0.3, keep_state=keep_state))
    optimizer = optimizer_of(model, lr=3e-2)
    frozen: dict[str, Tensor] = {}
    for step in range(12):
        old = {name: (p.places.clone(), p.values.detach().clone()) for name, p in parts(handle).items()}
        moments = {name: copy.deepcopy(optimizer.state.get(p.values)) for name, p in parts(handle).items()}
        said = handle.step(step, 12)
        assert bool(said) == (step == 6)
        loss = loss_of(model.train(), step)  # the graph of the step before lives until here
        loss.backward()
        expected = {}
        for name, part in parts(handle).items() if said else ():
            places, values = old[name]
            below = values.abs() < float(sites(handle)[name.removesuffix(".weight")].theta)
            assert torch.equal(part.places, places[below]) and torch.equal(part.left, places[~below])
            frozen[name] = model.get_parameter(name).detach().flatten()[part.left.long()]
            expected[name] = updated(part, {k: t[below] if t.ndim else t for k, t in moments[name].items()}, keep_state)
        optimizer.step()  # the step of the adjustment makes its update
        for name, values in expected.items():
            assert torch.equal(parts(handle)[name].values, values)
        optimizer.zero_grad()
    assert sum(p.left.numel() for p in parts(handle).values()) > 50
    for name, part in parts(handle).items():
        assert torch.equal(model.get_parameter(name).flatten()[part.left.long()], frozen[name])


def updated(part: Any, moments: dict[str, Tensor], keep_state: bool) -> Tensor:
    """The values after one update from kept moments, or from none."""
    twin = nn.Parameter(part.values.detach().clone())
    twin.grad = part.values.grad.clone()
    optimizer = torch.optim.AdamW([twin], lr=3e-2, weight_decay=0.0, fused=True)
    if keep_state:
        optimizer.state[twin] = moments
    optimizer.step()
    return twin.detach()


def test_a_rank_term_makes_the_trained_part_smaller_in_rank() -> None:
    norms = {}
    for weight in (0.0, 1e-2):
        model, handle = frozen_around(SaRA(fraction=0.3, lambda_rank=weight, rank_mode="all", adjust_at=None), wide())
        losses = trained(model, handle, 8, lr=1e-3)
        norms[weight] = sum(float(nuclear_norm(p.as_matrix()).detach()) for p in parts(handle).values())
        assert all(map(math.isfinite, losses))
        assert any("rank_loss" in found for found in handle.report()["stats"].values()) == bool(weight)
    assert norms[1e-2] < norms[0.0]


def test_the_rank_term_is_the_written_formula_and_counts_once() -> None:
    model, handle = frozen_around(SaRA(fraction=0.3, lambda_rank=0.5, seed=3), wide())
    handle.step(4, 10, 1.0)
    (ranked,) = [(site, site.ranked) for site in sites(handle).values() if site.ranked]
    part = ranked[0].parts[ranked[1]]
    loss_of(model.train()).backward()
    found = part.values.grad.clone()
    ranked[0].ranked = None
    model.zero_grad()
    loss_of(model).backward()
    u, _, v = torch.linalg.svd(part.as_matrix().detach(), full_matrices=False)
    torch.testing.assert_close(
        found - part.values.grad, 0.5 * (u @ v).flatten()[part.places.long()], rtol=1e-4, atol=1e-5
    )
    drawn = []
    for step in [*range(8), *range(8)]:
        handle.step(step, 20)
        drawn.append(next(name for name, site in sites(handle).items() if site.ranked))
    assert drawn[:8] == drawn[8:] and len(set(drawn)) > 2


def test_small_matrices_have_no_rank_term() -> None:
    model, handle = frozen_around(SaRA(lambda_rank=0.1))  # 32 wide
    handle.step(0, 10)
    assert not any(site.ranked for site in sites(handle).values())
    assert all(map(math.isfinite, trained(model, handle, 2)))


@pytest.mark.parametrize("steps", [3, 8])
def test_saved_and_built_again_before_and_after_the_adjustment(steps: int, tmp_path: Path) -> None:
    batch = LLAMA.batch()
    model, handle = frozen_around(SaRA(fraction=0.3))
    trained(model, handle, steps, lr=3e-2)
    expected = model.eval()(**batch).logits
    again = sparsify(LLAMA.model(), *handle.configs, state=handle.state())
    assert torch.equal(again.model(**batch).logits, expected)
    assert handle.state().keys() == again.state().keys()
    path = save_delta(handle, tmp_path / "delta.safetensors")
    other = apply_delta(LLAMA.model(), path)
    assert torch.equal(other(**batch).logits, expected)
    assert torch.equal(handle.merge()(**batch).logits, expected)
    assert all(torch.equal(p, other.state_dict()[name]) for name, p in model.state_dict().items())
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_a_delta_is_small_and_goes_to_its_base_alone(tmp_path: Path) -> None:
    model, handle = frozen_around(SaRA())
    trained(model, handle, 3)
    path = save_delta(handle, tmp_path / "d.safetensors")
    file = load_file(path)
    count = sum(t.numel() for name, t in file.items() if name.endswith("/places"))
    assert count == sum(p.values.numel() for p in parts(handle).values()) and {t.dtype for t in file.values()} == {
        torch.int32,
        torch.float32,
    }
    other = LLAMA.model(seed=1)
    before = {name: w.clone() for name, w in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"made from other weights: model\.layers\.0.*force=True"):
        apply_delta(other, path)
    assert all(torch.equal(w, before[name]) for name, w in other.state_dict().items())
    apply_delta(other, path, force=True)
    assert not all(torch.equal(w, before[name]) for name, w in other.state_dict().items())
    with pytest.raises(CheckpointError, match="not in the model"):
        apply_delta(FAMILIES["gpt2"].model(), path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cannot be read as a delta"):
        apply_delta(LLAMA.model(), path)
    with pytest.raises(CheckpointError, match="cannot be read as a delta"):
        apply_delta(LLAMA.model(), tmp_path / "none")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_delta_of_a_base_stored_in_bf16_goes_to_either_copy(tmp_path: Path) -> None:
    rounded = LLAMA.model().bfloat16()
    model, handle = frozen_around(SaRA(), copy.deepcopy(rounded).float())
    trained(model, handle, 2)
    path = save_delta(handle, tmp_path / "d.safetensors")
    found = apply_delta(copy.deepcopy(rounded), path)
    name = next(iter(parts(handle)))
    assert torch.equal(found.get_parameter(name), model.get_parameter(name).bfloat16())
    assert torch.equal(apply_delta(copy.deepcopy(rounded).float(), path).get_parameter(name), model.get_parameter(name))


def test_of_bf16_weights_the_values_stay_in_fp32() -> None:
    model = LLAMA.model().bfloat16()
    model, handle = frozen_around(SaRA(adjust_at=None), model)
    assert {p.values.dtype for p in parts(handle).values()} == {torch.float32}
    optimizer = optimizer_of(model, lr=1e-6)  # far below what bf16 can add
    before = {name: p.values.detach().clone() for name, p in parts(handle).items()}
    for _ in range(3):
        loss_of(model.train()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, part in parts(handle).items():
        assert (part.values != before[name]).any()
        assert torch.equal(part.read(), part.values.detach().bfloat16())
    state = handle.state()
    key = next(iter(state))
    assert torch.equal(state[key]["weight.values"], parts(handle)[f"{key.removesuffix(':sara')}.weight"].values)
    model.half().float()
    assert {p.values.dtype for p in parts(handle).values()} == {torch.float32}


def test_any_loop_writes_after_the_optimizer_and_old_graphs_do_no_harm() -> None:
    model, handle = frozen_around(SaRA(adjust_at=0.5))
    optimizer = optimizer_of(model)
    kept = []  # graphs of all steps stay alive
    for step in range(4):
        handle.step(step, 4)
        loss = loss_of(model.train()) + loss_of(model, 2)  # every layer twice before one backward
        loss.backward()
        kept.append(loss)
        optimizer.step()
        assert all(torch.equal(p.read(), p.values.detach()) for p in parts(handle).values())
        optimizer.zero_grad()
    assert any(p.left.numel() for p in parts(handle).values())


def test_loaded_weights_win() -> None:
    model, handle = frozen_around(SaRA())
    trained(model, handle, 2)
    other = LLAMA.model(seed=5)
    model.load_state_dict(other.state_dict())
    batch = LLAMA.batch()
    assert torch.equal(model.eval()(**batch).logits, other(**batch).logits)
    assert all(torch.equal(p.read(), p.values.detach()) for p in parts(handle).values())


def test_a_copy_of_the_model_is_written_by_its_own_values() -> None:
    model, _ = frozen_around(SaRA())
    twin = copy.deepcopy(model)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    optimizer = optimizer_of(twin)
    loss_of(twin.train()).backward()
    optimizer.step()
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert any(not torch.equal(w, before[name]) for name, w in twin.state_dict().items())
    del twin, optimizer
    gc.collect()


@pytest.mark.parametrize("block", ["rows", "tiles"])
@pytest.mark.parametrize("make", [tiled, FAMILIES["gpt2"].model])
def test_blocks_train_whole_and_alone(block: str, make: Any) -> None:
    if block == "tiles" and make is not tiled:
        with pytest.raises(ValueError, match=r"does not divide into blocks of 64x64\. Choose rows"):
            sparsetrain.plan(make(), SaRA(block="tiles"))
        return
    model, handle = frozen_around(SaRA(block=block, fraction=0.25, adjust_at=0.5), make())
    before = {name: model.get_parameter(name).detach().clone() for name in parts(handle)}
    total = sum(w.numel() for w in before.values())
    count = sum(p.values.numel() for p in parts(handle).values())
    assert 0.2 * total < count <= 0.25 * total
    batch = LLAMA.batch(2, 20)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    plain = make().train()
    plain(**batch, labels=batch["input_ids"]).loss.backward()
    for name, part in parts(handle).items():
        expected = plain.get_parameter(name).grad
        places, _ = part.changed()
        mask = marked(places, expected.numel())
        found = torch.zeros(expected.numel())
        found[_flat_order(part)] = part.values.grad.flatten()
        torch.testing.assert_close(found[mask], expected.flatten()[mask], rtol=1e-4, atol=1e-7)
        theta = float(sites(handle)[name.removesuffix(".weight")].theta)
        assert part.below(theta).all()
    model.zero_grad()
    trained(model, handle, 6, 10)
    for name, part in parts(handle).items():
        places, _ = part.changed()
        same = ~marked(places, before[name].numel())
        assert torch.equal(model.get_parameter(name).flatten()[same], before[name].flatten()[same])
    again = sparsify(make(), *handle.configs, state=handle.state())
    assert torch.equal(again.model(**batch).logits, model.eval()(**batch).logits)


def _flat_order(part: Any) -> Tensor:
    from sparsetrain.ops.partial_weight import places_of_blocks

    return places_of_blocks(part.places, part.shape, tuple(part.weight.shape)).long()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_all_tensors_as_published(family: str) -> None:
    case = FAMILIES[family]
    model, batch = case.model(), case.batch(2, 20)
    expected = model(**batch).logits
    grads = {}
    model(**batch).logits.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    handle = sparsify(model, SaRA.faithful(theta=0.02, lambda_rank=0.0))
    assert torch.equal(model(**batch).logits, expected)
    model(**batch).logits.square().mean().backward()
    names = set(parts(handle))
    assert any("embed" in name or "wte" in name for name in names) and any(
        "norm" in n.lower() or "ln" in n for n in names
    )
    for name, part in parts(handle).items():
        if name in grads:
            expected_grad = grads[name].flatten()[part.places.long()]
            assert part.values.grad is not None, name
            torch.testing.assert_close(part.values.grad, expected_grad, rtol=1e-4, atol=1e-7)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n in names)


def test_tied_weights_share_one_vector_or_are_refused() -> None:
    from transformers import LlamaForCausalLM

    def make() -> Any:
        torch.manual_seed(0)
        return LlamaForCausalLM(llama_config(tie_word_embeddings=True))

    model = make()
    handle = sparsify(model, SaRA(scope="all"))
    own = sites(handle)
    assert own["lm_head"].parts["weight"] is own["model.embed_tokens"].parts["weight"]
    assert not own["lm_head"].own_parts
    loss_of(model.train()).backward()
    assert sum(p is own["lm_head"].parts["weight"].values for p in model.parameters()) == 1
    again = sparsify(make(), *handle.configs, state=handle.state())
    assert torch.equal(again.model.lm_head.weight, model.lm_head.weight)
    handle.restore()
    assert model.lm_head.weight.requires_grad
    with pytest.raises(ValueError, match=r"are one weight \(tied\), and only the first is taken"):
        sparsetrain.plan(make(), SaRA(scope="all", targets=("lm_head",)))
    model = make()
    first = model.model.layers[0].self_attn.q_proj
    model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(first.weight.data)
    with pytest.raises(ValueError, match="two parameters in one memory"):
        sparsetrain.plan(model, SaRA())
    model.model.layers[1].self_attn.q_proj.weight = first.weight
    handle = sparsify(model, SaRA())
    loss_of(model.train()).backward()
    shared = parts(handle)["model.layers.0.self_attn.q_proj.weight"]
    assert sites(handle)["model.layers.1.self_attn.q_proj"].parts["weight"] is shared
    assert shared.values.grad is not None


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"theta": 0.0}, r"theta=0\.0 is out of range\. It must be above 0"),
        ({"theta": -1.0}, "out of range"),
        ({"fraction": 0.0}, r"fraction=0\.0 is out of range\. It must lie in \(0, 1\]"),
        ({"fraction": 1.1}, r"fraction=1\.1 is out of range"),
        ({"theta": 0.1, "fraction": 0.1}, "both choose. Leave one out"),
        ({"block": "tile"}, r"block='tile' is unknown\. Did you mean 'tiles'\?"),
        ({"scope": "some"}, "Choose from"),
        ({"rank_mode": "two"}, "Choose from"),
        ({"adjust_at": 1.0}, r"adjust_at=1\.0 is out of range"),
        ({"lambda_rank": -1.0}, "out of range"),
        ({"block": "rows", "lambda_rank": 0.1}, "Leave one out"),
        ({"block": "rows", "scope": "all"}, "Leave one out"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SaRA(**values)


def test_what_cannot_be_selected_is_refused_and_nothing_has_changed() -> None:
    model = LLAMA.model()
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"theta=1e-30 selects no entry.*Raise it"):
        sparsify(model, SaRA(theta=1e-30))
    for p in model.parameters():
        p.data[p.abs() < p.abs().median()] = 0  # pruned
    with pytest.raises(ValueError, match=r"fraction=0\.1 selects no entry: none is below 0\..*give theta"):
        sparsify(model, SaRA())
    assert [type(m) for m in model.modules()] == before
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"up_proj\.weight: it is torch\.int8, and entries train in bf16"):
        sparsify(model, SaRA())


def test_the_published_learning_rates_and_the_half_of_a_run() -> None:
    assert [round(learning_rate(theta), 6) for theta in (2e-4, 8e-4, 2e-3)] == [9.32e-4, 7.56e-4, 4.97e-4]
    assert learning_rate(0.02) == learning_rate(2e-3)  # nothing is published beyond it
    _, handle = frozen_around(SaRA(theta=2e-2))
    assert method_of(SaRA).learning_rate(handle.configs[0], list(sites(handle).values())) == pytest.approx(  # type: ignore[misc]
        learning_rate(2e-2)
    )
    assert "theta = 0.02 and train" in handle.notes()[0]
    assert SaRA().adjustment_step(5000) == 2500 and SaRA(adjust_at=None).adjustment_step(10) is None
    assert SaRA.faithful().theta == 2e-3 and SaRA.faithful().scope == "all" and SaRA.faithful().lambda_rank == 5e-4


def test_a_merged_adapter_is_part_of_what_is_saved() -> None:
    model, handle = frozen_around(SaRA())
    wrapped: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["up_proj", "q_proj"], init_lora_weights=False))
    for site in sites(handle).values():
        site.requires_grad_(True)
    optimizer = optimizer_of(wrapped)
    names = {n for n, p in wrapped.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in wrapped.named_parameters() if n in names}
    batch = LLAMA.batch(2, 20)
    wrapped.train()(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    moved = {n for n, p in wrapped.named_parameters() if n in names and not torch.equal(p, before[n])}
    assert any(".sara." in n for n in moved) and any("lora_" in n for n in moved)
    expected = wrapped.eval()(**batch).logits
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    stored = {name: w.clone() for name, w in merged.state_dict().items()}
    state = handle.state()
    merged.train().eval()
    assert all(torch.equal(w, stored[name]) for name, w in merged.state_dict().items())
    handle.restore()
    again = sparsify(copy.deepcopy(merged), *handle.configs, state=state)
    assert torch.equal(again.model(**batch).logits, merged(**batch).logits)


def test_nothing_is_said_of_a_loop_that_calls_step(caplog: Any) -> None:
    model, handle = frozen_around(SaRA())
    with caplog.at_level(logging.WARNING, logger="sparsetrain"):
        trained(model, handle, 6)
    assert not caplog.records


def test_configs_survive_json() -> None:
    for config in (SaRA(), SaRA.faithful(), SaRA(block="rows", fraction=0.2, adjust_at=None)):
        assert SaRA.from_dict(json.loads(json.dumps(config.to_dict()))) == config
