"""SparseDM: masks, SR-STE, plan, teacher, export; what every method keeps is in the contract."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain
from sparsetrain import SparseDM
from sparsetrain.core.anatomy import Anatomy, Block, ConvolutionSite, LinearSite, describe, submodule
from sparsetrain.core.errors import Unsupported
from sparsetrain.hf.train.average import Average
from sparsetrain.methods.sparsedm.export import pack_24, to_dense
from sparsetrain.methods.sparsedm.macs import count_macs
from sparsetrain.methods.sparsedm.targets import dense_layers, target_layers
from tests.families import DIFFUSION, FAMILIES, UNET


class Net(nn.Module):
    """A grouped convolution and two linears, so that steps take milliseconds."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 12, 3, padding=1, groups=2, dtype=dtype)
        self.up, self.down = nn.Linear(12, 32, dtype=dtype), nn.Linear(32, 6, dtype=dtype)

    def forward(self, sample: Tensor) -> dict[str, Tensor]:
        return {"sample": self.down(F.gelu(self.up(self.conv(sample).mean((2, 3)))))}

    def anatomy(self) -> Anatomy:
        sizes = {"up": (12, 32), "down": (32, 6)}
        linears = tuple(
            LinearSite(name=name, layer=0, role=name, in_features=i, out_features=o) for name, (i, o) in sizes.items()
        )
        conv = ConvolutionSite(name="conv", layer=0, in_channels=16, out_channels=12, kernel_size=(3, 3), groups=2)
        block = Block(name="", layer=0, attention=None, ffn=None, linears=linears)
        return Anatomy(family="net", model_class="Net", blocks=(block,), convolutions=(conv,))


def net(config: SparseDM, dtype: torch.dtype = torch.float32) -> tuple[Any, sparsetrain.Handle]:
    torch.manual_seed(0)
    model: Any = Net(dtype)
    return model, sparsetrain.sparsify(model, config)


def train(model: Any, handle: Any, steps: range, optimizer: Any = None, total: int | None = 100) -> Any:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 16, 4, 4, generator=draw), torch.randn(32, 6, generator=draw)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for step in steps:
        if handle is not None:
            handle.step(step, total)
        optimizer.zero_grad()
        (model(x)["sample"] - y).square().mean().backward()
        if handle is not None:
            handle.adjust_gradients()
        optimizer.step()
    return optimizer


def picture(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dit() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model: Any = DIFFUSION["dit"]().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    labels = {"timestep": torch.tensor([3, 40]), "class_labels": torch.tensor([0, 3])}
    return model, {"hidden_states": picture(2, 4, 8, 8), **labels}


def unet() -> tuple[Any, dict[str, Tensor]]:
    return UNET.model(), UNET.batch()


def uvit() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    return DIFFUSION["uvit"]().eval(), {"sample": picture(2, 1, 8, 8), "timestep": torch.tensor([3, 40])}


PICTURES: dict[str, Callable[[], tuple[Any, dict[str, Tensor]]]] = {"dit": dit, "unet2d": unet, "uvit": uvit}
pictures = pytest.mark.parametrize("name", list(PICTURES))


def predicted(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).sample


def test_two_of_four_are_kept_along_inputs_and_along_each_group_of_a_convolution() -> None:
    _, handle = net(SparseDM())
    for site in handle.sites("sparsedm").values():
        pruned = site.pruned()
        assert pruned.shape[1] % 4 == 0
        assert ((pruned != 0).unflatten(1, (-1, 4)).sum(2) == 2).all()
        kept = site.weight.abs().unflatten(1, (-1, 4)).topk(2, dim=2).values.sum(2)
        torch.testing.assert_close(pruned.abs().unflatten(1, (-1, 4)).sum(2), kept)
    assert handle.sites("sparsedm")["conv"].pruned().shape == (12, 8, 3, 3)  # 16 channels in two groups


@pytest.mark.parametrize("pattern", ["1:2", "3:4", "7:8", "2:4"])
def test_every_ratio_is_one_class_and_ties_go_by_index(pattern: str) -> None:
    config = SparseDM(pattern=pattern, targets=("down",))
    model, handle = net(config)
    model.down.weight.data.fill_(1.0)
    (site,) = handle.sites("sparsedm").values()
    keep, group = config.ratio
    found = site.pruned().view(6, -1, group)
    assert (found[..., :keep] == 1).all() and (found[..., keep:] == 0).all()


@pytest.mark.parametrize("lam", [0.0, 2e-4, 0.3])
def test_the_backward_is_the_written_one(lam: float) -> None:
    model, handle = net(SparseDM(lam=lam, teacher_weight=0.0), torch.float64)
    x = picture(5, 16, 4, 4).double()
    model(x)["sample"].square().sum().backward()
    plain = copy.deepcopy(model)
    for name, site in handle.sites("sparsedm").items():
        weight: Any = submodule(plain, name).weight
        weight.grad, weight.data = None, site.pruned()
    masks = {name: site.find_mask() for name, site in handle.sites("sparsedm").items()}
    handle_of_copy = plain._sparsity[0].handle
    with handle_of_copy.dense():  # the gradient at the masked weight
        plain(x)["sample"].square().sum().backward()
    for name in masks:
        found: Any = submodule(model, name)
        weight, at = found.weight, plain.get_submodule(name).weight
        assert torch.equal(weight.grad, at.grad + lam * weight.detach().masked_fill(masks[name], 0)), name


def test_lambda_comes_once_a_step_in_any_number_of_passes_and_is_scaled_as_the_loss_is() -> None:
    case, gradients = FAMILIES["llama"], []
    batch = case.batch(4, 20)
    batch |= {"labels": batch["input_ids"]}
    for rows, scale in ((4, 1.0), (1, 1.0), (2, 1024.0)):
        model = case.model().double().train()
        sparsetrain.sparsify(model, SparseDM(lam=0.3))
        for start in range(0, 4, rows):
            part = {name: tensor[start : start + rows] for name, tensor in batch.items()}
            (scale * model(**part, num_items_in_batch=torch.tensor(4 * 19)).loss).backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad / scale)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-6, atol=1e-7)


def test_lambda_is_live_and_a_decoupled_one_changes_weights() -> None:
    gradients = {}
    for lam in (0.0, 0.3):
        model, handle = net(SparseDM(lam=0.0, teacher_weight=0.0))
        for site in handle.sites("sparsedm").values():
            site.lam = lam
        model(picture(5, 16, 4, 4))["sample"].square().sum().backward()
        gradients[lam] = model.up.weight.grad.clone()
    assert not torch.equal(gradients[0.0], gradients[0.3])
    model, handle = net(SparseDM(lam=0.3, decoupled=True, teacher_weight=0.0))
    model(picture(5, 16, 4, 4))["sample"].square().sum().backward()
    assert torch.equal(model.up.weight.grad, gradients[0.0])
    before, mask = model.up.weight.detach().clone(), handle.sites("sparsedm")["up"].find_mask()
    handle.adjust_gradients()
    assert torch.equal(model.up.weight, torch.where(mask, before, before - 0.3 * before))


def flips(lam: float) -> int:
    """Mask entries that change in the second half of 400 SGD steps on a linear of 8 x 16, under noisy targets."""
    draw = torch.Generator().manual_seed(0)
    model, handle = net(SparseDM(lam=lam, teacher_weight=0.0, targets=("down",)))
    target = torch.randn(6, 32, generator=draw)
    optimizer = torch.optim.SGD(model.down.parameters(), lr=0.1)
    (site,) = handle.sites("sparsedm").values()
    found, before = 0, site.find_mask()
    for step in range(400):
        x = torch.randn(16, 32, generator=draw)
        optimizer.zero_grad()
        noise = torch.randn(16, 6, generator=draw) * 3
        (model.down(x) - x @ target.t() - noise).square().mean().backward()
        optimizer.step()
        after = site.find_mask()
        found += int((after != before).sum()) * (step >= 200)
        before = after
    return found


def test_a_large_lambda_settles_the_masks() -> None:
    assert flips(1.0) < 0.5 * flips(0.0)


def noise_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)
    )


class Noise(nn.Module):
    """The noise of points on a ring, from a noisy point and its time; two linears of 128 x 128 are targets."""

    def __init__(self) -> None:
        super().__init__()
        self.net = noise_model()

    def forward(self, sample: Tensor) -> dict[str, Tensor]:
        return {"sample": self.net(sample)}

    def anatomy(self) -> Anatomy:
        linears = tuple(
            LinearSite(name=f"net.{i}", layer=0, role="up", in_features=128, out_features=128) for i in (2, 4)
        )
        block = Block(name="", layer=0, attention=None, ffn=None, linears=linears)
        return Anatomy(family="noise", model_class="Noise", blocks=(block,))


def noisy(draw: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    angle, t = torch.rand(count, generator=draw) * 6.2832, torch.rand(count, generator=draw)
    clean = torch.stack([angle.cos(), angle.sin()], 1) * 2
    noise = torch.randn(count, 2, generator=draw)
    a = (t * 1.5708).cos()[:, None]
    return torch.cat([a * clean + (1 - a * a).sqrt() * noise, t[:, None]], 1), noise


def fit(model: nn.Module, steps: int) -> float:
    """Trains on, and gives the error on held-out points."""
    draw = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(steps):
        x, noise = noisy(draw, 256)
        optimizer.zero_grad()
        F.mse_loss(model(x)["sample"], noise).backward()
        optimizer.step()
    model.eval()
    x, noise = noisy(torch.Generator().manual_seed(2), 20_000)
    with torch.no_grad():
        return float(F.mse_loss(model(x)["sample"], noise))


@pytest.mark.slow
def test_training_on_brings_back_what_pruning_at_once_loses() -> None:
    """Some 4,000 steps of a small network: fewer do not train the dense one to its end."""
    start = Noise()
    fit(start, 1000)
    dense = fit(copy.deepcopy(start), 700)
    at_once = copy.deepcopy(start)
    sparsetrain.sparsify(at_once, SparseDM())
    lost = fit(at_once, 0)
    assert lost > 1.15 * dense
    for config in (SparseDM.ste(), SparseDM(teacher_weight=0.0), SparseDM()):
        model = copy.deepcopy(start)
        sparsetrain.sparsify(model, config).step(0, 700)
        assert fit(model, 700) <= 1.02 * dense, config


@pictures
def test_masks_off_are_the_dense_path_bit_for_bit_and_masks_follow_the_weights(name: str) -> None:
    model, batch = PICTURES[name]()
    expected = predicted(model, batch)
    handle = sparsetrain.sparsify(model, SparseDM())
    masked = predicted(model, batch)
    assert not torch.equal(masked, expected)
    with handle.dense():
        assert torch.equal(predicted(model, batch), expected)
    assert torch.equal(predicted(model.eval(), batch), masked)
    for site in handle.sites("sparsedm").values():  # evaluation has the masks of training
        mask = site.find_mask()
        site.train()
        assert torch.equal(site.find_mask(), mask)
        site.eval()
    # an average that is written past autograd has its own masks at once
    average = {name: p.detach() * 0.5 + 0.01 * torch.randn_like(p) for name, p in model.named_parameters()}
    for parameter, value in zip(model.parameters(), average.values(), strict=True):
        parameter.data.copy_(value)
    again = PICTURES[name]()[0]
    again.load_state_dict(average, strict=False)
    sparsetrain.sparsify(again, SparseDM())
    assert torch.equal(predicted(model, batch), predicted(again, batch))


@pictures
def test_to_dense_has_the_outputs_of_the_masked_model_and_exact_zeros(name: str) -> None:
    model, batch = PICTURES[name]()
    handle = sparsetrain.sparsify(model, SparseDM())
    masked, names = predicted(model, batch), list(handle.sites("sparsedm"))
    kinds = {type(module).__name__ for module in to_dense(handle).modules()}
    assert torch.equal(predicted(model, batch), masked)
    assert not handle.active and not any(kind.startswith("Masked") for kind in kinds)
    for layer in names:
        weight: Any = submodule(model, layer).weight
        assert ((weight != 0).unflatten(1, (-1, 4)).sum(2) <= 2).all()
    with pytest.raises(Unsupported, match="2:4 products need an NVIDIA GPU"):
        pack_24(model, names)
    with pytest.raises(ValueError, match="no layer of this handle"):
        to_dense(handle)


def test_the_target_list_is_the_published_one() -> None:
    uvit_model, dit_model, unet_model = (DIFFUSION[name]() for name in ("uvit", "dit", "unet2d"))
    ends = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
    for model, count in ((uvit_model, 18), (dit_model, 18)):
        names = [site.name for site in target_layers(describe(model))]
        assert len(names) == count and all(name.endswith(ends) for name in names)
    left = dense_layers(SparseDM(), describe(uvit_model), uvit_model)
    assert {"skips.0", "decode", "time.linear_1", "patch_embed.proj", "final"} == set(left) - {"time.linear_2"}
    left = dense_layers(SparseDM(), describe(dit_model), dit_model)
    assert left["transformer_blocks.0.norm1.linear"] == "time or modulation"
    assert left["pos_embed.proj"] == "reads or writes the picture"
    assert left["proj_out_2"] == "outside of the blocks"
    names = [site.name for site in target_layers(describe(unet_model))]
    assert "down_blocks.0.downsamplers.0.conv" in names and "up_blocks.1.resnets.1.conv_shortcut" in names
    left = dense_layers(SparseDM(), describe(unet_model), unet_model)
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} <= set(left)


def test_layers_that_do_not_divide_stay_dense_and_are_named() -> None:
    model: Any = Net()
    model.conv = nn.Conv2d(12, 12, 3, groups=2)  # six channels a group
    own = model.anatomy
    conv = ConvolutionSite(name="conv", layer=0, in_channels=12, out_channels=12, kernel_size=(3, 3), groups=2)
    model.anatomy = lambda: Anatomy(family="net", model_class="Net", blocks=own().blocks, convolutions=(conv,))
    handle = sparsetrain.sparsify(model, SparseDM())
    assert set(handle.sites("sparsedm")) == {"up", "down"}
    rows = {row["site"]: row["note"] for row in handle.report()["edits"]}
    assert rows["conv"] == "stays dense: 6 inputs do not divide by 4"
    assert "conv (6 inputs do not divide by 4)" in handle.report()["notes"][0]
    handle.restore()
    with pytest.raises(ValueError, match=r"none of the 1 layers .* they have 6"):
        sparsetrain.plan(model, SparseDM(targets=("conv",)))


@pictures
def test_multiply_adds_of_the_targets_are_halved_and_the_whole_models_are_told(name: str) -> None:
    model, batch = PICTURES[name]()
    handle = sparsetrain.sparsify(model, SparseDM())
    found = count_macs(handle, model, batch)
    dense, masked = found.targets
    assert masked == dense / 2 and found.layers.keys() == handle.sites("sparsedm").keys()
    assert found.whole == (found.model, found.model - dense / 2) and 0 < dense < found.model
    if name == "uvit":  # 2 rows of 17 tokens, three blocks of 12 · 16² weights; q kᵀ and its product with v are dense
        tokens = 2 * 17
        assert dense == tokens * 3 * 12 * 16 * 16
        outside = tokens * (2 * 16 * 16) + tokens * 16 * 4 + 2 * 2 * 16 * 16 + 2 * 64 * 9 + 2 * 16 * 16 * 4
        assert found.model == dense + 3 * tokens * 2 * 17 * 16 + outside
    assert "-50.0%" in str(found) and "whole model" in str(found)


PLAN = SparseDM(plan=("10:7:8", "20:4:8", "30:2:4"), teacher_weight=0.0)
WITH_TEACHER = dataclasses.replace(PLAN, teacher_weight=0.1, freeze_mask_after=32)


def test_a_plan_changes_ratios_alone() -> None:
    model, handle = net(PLAN)
    dense_model = Net()
    dense_model.load_state_dict({name: value for name, value in model.state_dict().items()})
    lines: list[str] = []
    optimizer, dense_optimizer = train(model, handle, range(10)), train(dense_model, None, range(10))
    for (name, found), expected in zip(model.named_parameters(), dense_model.parameters(), strict=True):
        assert torch.equal(found, expected), name  # N = M is the dense layer
    assert dense_optimizer is not None
    ids = [id(p) for p in model.parameters()]
    states = {id(p): optimizer.state[p] for p in model.parameters()}
    moments = {id(p): optimizer.state[p]["exp_avg"].clone() for p in model.parameters()}
    before = {name: p.clone() for name, p in model.named_parameters()}
    average = Average(0.9)
    average.begin(model, None, None)
    averaged = {name: (tensor, tensor.clone()) for name, tensor in average.weights.items()}
    for step, ratio in ((10, "7:8"), (19, "7:8"), (20, "4:8"), (30, "2:4"), (99, "2:4")):
        lines += handle.step(step, 100)
        assert {str(site.ratio) for site in handle.sites("sparsedm").values()} == {ratio}
    assert [id(p) for p in model.parameters()] == ids
    assert all(optimizer.state[p] is states[id(p)] for p in model.parameters())
    assert all(torch.equal(optimizer.state[p]["exp_avg"], moments[id(p)]) for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert averaged.keys() == before.keys()
    assert all(average.weights[name] is own and torch.equal(own, value) for name, (own, value) in averaged.items())
    assert len(lines) == 3 and lines[0] == "sparsedm: from step 10 on 7:8 of the weights are kept, after 8:8."


@pytest.mark.parametrize("at", [5, 10, 11, 20, 30, 33])
def test_a_run_that_goes_on_repeats_the_whole_one(at: int) -> None:
    config = WITH_TEACHER
    whole, handle = net(config)
    train(whole, handle, range(40))
    model, handle = net(config)
    optimizer = train(model, handle, range(at))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(handle.state())
    saved = copy.deepcopy(optimizer.state_dict())
    again, rebuilt = net(config)  # the start model, as a resumed run has it
    again.load_state_dict(weights)
    for edit, site in rebuilt.installed:
        site.take(again, state[edit.key])
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    optimizer.load_state_dict(saved)
    train(again, rebuilt, range(at, 40), optimizer)
    for (name, found), expected in zip(again.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_a_saved_ratio_and_frozen_masks_hold_when_a_model_is_rebuilt() -> None:
    config = dataclasses.replace(WITH_TEACHER, freeze_mask_after=30)
    model, handle = net(config)
    train(model, handle, range(35))
    masks = {name: site.find_mask() for name, site in handle.sites("sparsedm").items()}
    x = picture(3, 16, 4, 4)
    expected = model.eval()(x)["sample"]
    again: Any = Net()
    again.load_state_dict(model.state_dict())
    rebuilt = sparsetrain.sparsify(again.eval(), config, state=copy.deepcopy(handle.state()))
    assert torch.equal(again(x)["sample"], expected)
    assert all(torch.equal(site.find_mask(), masks[name]) for name, site in rebuilt.sites("sparsedm").items())
    rebuilt.step(3, 100)  # masks are free again before the step at which they freeze
    assert all(site.mask is None for site in rebuilt.sites("sparsedm").values())
    with pytest.raises(ValueError, match="rebuilt from weights that were trained since"):
        again.train()(x)


def test_before_the_plan_has_ended_nothing_is_exported() -> None:
    model, handle = net(PLAN)
    handle.step(20, 100)
    with pytest.raises(ValueError, match="is at 4:8 and is to come to 2:4"):
        to_dense(handle)
    assert handle.active
    assert isinstance(to_dense(handle, force=True), Net) and ((model.down.weight == 0).float().mean() == 0.5)


def test_the_teacher_is_the_start_model_and_its_loss_is_added() -> None:
    for weight in (0.1, 0.5):
        model, handle = net(SparseDM(teacher_weight=weight, lam=0.0), torch.float64)
        teacher = copy.deepcopy(Net(torch.float64))
        with handle.dense():
            teacher.load_state_dict(model.state_dict())
        x, y = picture(4, 16, 4, 4).double(), picture(4, 6).double()
        F.mse_loss(model.train()(x)["sample"], y).backward()
        found = model.up.weight.grad.clone()
        plain, plain_handle = net(SparseDM(teacher_weight=0.0, lam=0.0), torch.float64)
        assert plain_handle.sites("sparsedm")["up"].teacher is None
        prediction = plain(x)["sample"]
        (F.mse_loss(prediction, y) + weight * F.mse_loss(prediction, teacher(x)["sample"].detach())).backward()
        torch.testing.assert_close(found, plain.up.weight.grad, rtol=1e-6, atol=1e-9)  # the difference is fp32


def test_the_teacher_is_frozen_stands_in_evaluation_mode_and_is_saved_nowhere() -> None:
    model, handle = net(SparseDM(teacher_dtype="bf16"))
    first = next(iter(handle.sites("sparsedm").values()))
    teacher: Any = first.teacher.model
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert model.state_dict().keys() == Net().state_dict().keys()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in Net().parameters())
    assert max(value.numel() for value in handle.state()["up:sparsedm"].values()) == 2
    before = [p.clone() for p in teacher.parameters()]
    train(model, handle, range(5))
    assert not teacher.training and all(map(torch.equal, teacher.parameters(), before))
    assert {id(p) for p in teacher.parameters()} <= {id(t) for t in first.held_tensors()}
    model.to(torch.float64)
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    calls: list[int] = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model.eval()(picture(2, 16, 4, 4).double())
    assert not calls, "evaluation needs no teacher"


def test_a_teacher_of_another_shape_is_an_error() -> None:
    model, handle = net(SparseDM())
    model.down = nn.Linear(32, 7)
    with pytest.raises(ValueError, match=r"the teacher gives \(4, 6\) and the student \(4, 7\)"):
        model.train()(picture(4, 16, 4, 4))
    assert handle.active


def test_a_model_with_labels_has_a_teacher_if_it_is_asked_for() -> None:
    case = FAMILIES["llama"]
    model, batch = case.model().train(), case.batch()
    handle = sparsetrain.sparsify(model, SparseDM())
    assert all(site.teacher is None for site in handle.sites("sparsedm").values())
    labels = batch["input_ids"]
    task = model(**batch, labels=labels).loss
    task.backward()
    plain = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    handle.restore()
    model.zero_grad()
    handle = sparsetrain.sparsify(model, SparseDM(teacher_weight=0.5))
    out = model(**batch, labels=labels)
    assert torch.equal(out.loss, task)  # what is reported is the task's loss
    out.loss.backward()
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight.grad, plain)
    handle.restore()
    assert type(model).__name__ == "LlamaForCausalLM" and model(**batch).logits.isfinite().all()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"pattern": "0:4"}, "N=0"),
        ({"pattern": "5:4"}, "N=5"),
        ({"pattern": "1:1"}, "M=1"),
        ({"pattern": "half"}, "is no ratio"),
        ({"plan": ("0:7:8", "0:2:4")}, "do not increase"),
        ({"plan": ("9:7:8", "5:2:4")}, "do not increase"),
        ({"plan": ("5:6:8",)}, "plan ends at 6:8"),
        ({"plan": ("6:8",)}, "Give STEP:N:M"),
        ({"plan": ("5:9:8", "9:2:4")}, "N=9"),
        ({"plan": ("5:2:4",), "freeze_mask_after": 4}, "before step 5"),
        ({"lam": -1.0}, "lam"),
        ({"teacher_dtype": "int8"}, "teacher_dtype"),
        ({"teacher_weight": -0.1}, "teacher_weight"),
    ],
)
def test_what_cannot_be_asked_for(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SparseDM(**values)


def test_integer_weights_are_refused() -> None:
    model: Any = Net()
    model.up.weight = nn.Parameter(torch.ones(32, 12, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"up holds weights of torch\.int8"):
        sparsetrain.sparsify(model, SparseDM())


def test_the_published_plan() -> None:
    config = SparseDM.stepwise()
    assert [str(config.ratio_at(step)) for step in (0, 99_999, 100_000, 200_000, 300_000, 400_000)] == [
        "7:8", "7:8", "6:8", "5:8", "4:8", "2:4",
    ]  # fmt: skip
