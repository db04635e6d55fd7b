"""The oracles of masked structural growth: what it preserves, what it must not, and what is there when it is over."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForMaskedLM

import sparsetrain
from sparsetrain import MaskedGrowth
from sparsetrain.core.anatomy import describe
from sparsetrain.hf.model.classifier import EncoderClassifier
from sparsetrain.methods.masked_growth.masks import Place, places
from sparsetrain.methods.masked_growth.module import MaskedNorm, RampSite
from sparsetrain.methods.masked_growth.own_steps import correct, settle
from sparsetrain.methods.masked_growth.resize import layer_sources
from sparsetrain.surgery.reclass import reclass
from sparsetrain.surgery.record import handles_of
from tests.families import FAMILIES

OWN_HEAD_SIZE = ("llama", "qwen3", "mistral")
"""Families whose hidden size and heads may grow apart."""
TOGETHER = "hidden/2 heads/2"


def plans(family: str) -> dict[str, tuple[str, str]]:
    """Name -> a plan of one growth."""
    found = {"ffn": ("ffn/2", "ffn*2"), "layers": ("layers=1", "layers=3")}
    if family in OWN_HEAD_SIZE or family == "gemma3":  # gemma3's embeddings are scaled by the hidden size
        found["heads"] = ("heads/2", "heads*2")
    if family in OWN_HEAD_SIZE:
        found["hidden"] = ("hidden=20", "hidden=32")
    if family == "gemma3":
        found["all"] = ("heads/2 ffn=20 layers=2", "heads*2 ffn=48 layers=3")
    else:
        found["hidden and heads"] = (TOGETHER, "hidden*2 heads*2")
        found["all"] = (f"{TOGETHER} ffn=20 layers=2", "hidden*2 heads*2 ffn=48 layers=3")
    return found


CASES = [(family, name) for family in FAMILIES for name in plans(family)]
every = pytest.mark.parametrize(("family", "name"), CASES)
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
in_both = pytest.mark.parametrize(
    ("family", "name", "dtype"),
    [
        pytest.param(*case, dtype, id=f"{'-'.join(case)}-{kind}", marks=() if (i + j) % 2 else pytest.mark.slow)
        for i, case in enumerate(CASES)
        for j, (kind, dtype) in enumerate(DTYPES.items())
    ],
)
"""Every case in one of the two dtypes, in turn; in the other it is slow."""


def config_of(family: str, name: str, **changes: Any) -> MaskedGrowth:
    return MaskedGrowth(plan=plans(family)[name], ramp_ratio=0.25, **changes)


def pair(family: str, config: MaskedGrowth, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """(the small model, the enlarged one in its ramp, its handle); weights large enough to be seen."""
    torch.manual_seed(0)
    small: Any = sparsetrain.grow(FAMILIES[family].model().to(dtype), config, stage=0).eval()
    for parameter in small.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.08)
    new: Any = sparsetrain.grow(small, config, stage=1)
    (handle,) = handles_of(new)
    return small, new, handle


@torch.no_grad()
def junk(site: RampSite) -> None:
    """N(0, 0.5) in every new entry."""
    for parameter, corner, parts in site.entries:
        noise = torch.randn_like(parameter) * 0.5
        if corner is not None:
            to, old = (t if parts is None else t.unflatten(parts[0], (parts[1], -1)) for t in (noise, parameter))
            where = tuple(slice(0, size) for size in corner)
            to[where] = old[where]
        parameter.copy_(noise)


def by_masked_norms(small: Any, found: list[Place]) -> None:
    """Compute the small model's norms by the code that the enlarged one has, with a mask of ones."""
    hidden = describe(small).ffns[0].hidden_size
    entry = [(next(small.parameters()), None, None)]
    site = RampSite(None, {"hidden": torch.ones(hidden, dtype=torch.bool)}, entry)  # type: ignore[arg-type]
    named = dict(small.named_modules())
    for place in found:
        if place.mixin is MaskedNorm and place.name in named:
            value = place.value(site, named[place.name])
            reclass(named[place.name], MaskedNorm)
            vars(named[place.name])["growth"] = value


class OneKernel(TorchFunctionMode):
    """All products have as many outputs: for another number, a BLAS takes a kernel that sums in another order."""

    OUTPUTS = 128

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.addmm:  # transformers' Conv1D
            bias, x, weight = args
            return self.padded(F.linear, x, weight.t(), bias, -1)
        if func is F.linear:
            return self.padded(F.linear, args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias"), -1)
        if func is torch.conv2d:
            return self.padded(lambda x, w: func(x, w, None, *args[3:], **kwargs), args[0], args[1], None, 1) + args[
                2
            ].view(-1, 1, 1)
        return func(*args, **kwargs)

    def padded(self, product: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dim: int) -> Tensor:
        wide = torch.cat([weight, weight.new_zeros(self.OUTPUTS - weight.shape[0], *weight.shape[1:])])
        y = product(x, wide).narrow(dim, 0, weight.shape[0]).contiguous()
        return y if bias is None else y + bias


def batch(family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    found = FAMILIES[family].batch(tokens=24)
    return {key: t.to(dtype) if t.is_floating_point() else t for key, t in found.items()}


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def rounding(family: str, dtype: torch.dtype) -> float:
    """How far the plain norms may be from ours; transformers computes RMSNorm in fp32 whatever the model is in."""
    layer_norm = any(isinstance(module, nn.LayerNorm) for module in FAMILIES[family].model().modules())
    return 1e-13 if dtype == torch.float64 and layer_norm else 2e-6


def site_of(handle: Any) -> RampSite:
    ((_, site),) = handle.installed
    return site


@in_both
def test_growth_changes_no_bit_of_the_outputs(family: str, name: str, dtype: torch.dtype) -> None:
    small, new, handle = pair(family, config_of(family, name), dtype)
    inputs = batch(family, dtype)
    junk(site_of(handle))
    found, plain = logits(new, inputs), logits(small, inputs)
    assert (found - plain).abs().max().item() <= rounding(family, dtype) * max(1.0, plain.abs().max().item())
    (ramp,) = handle.configs
    by_masked_norms(small, list(places(ramp, describe(new), new)))
    with OneKernel():
        assert torch.equal(logits(new, inputs), logits(small, inputs))


@every
def test_the_masks_are_what_preserves_it(family: str, name: str) -> None:
    """Negative control: a mask a little above 0 is seen, and all of it is seen well."""
    small, new, handle = pair(family, config_of(family, name), torch.float64)
    inputs, site = batch(family, torch.float64), site_of(handle)
    junk(site)
    expected = logits(small, inputs)

    def change(value: float) -> float:
        site.fill(value)
        return (logits(new, inputs) - expected).abs().max().item()

    little, much = change(1e-3), change(1.0)
    assert 1e-7 < little < much and much > 1e-2 and change(0.0) < rounding(family, torch.float64)


@every
def test_at_zero_new_entries_have_no_gradient(family: str, name: str) -> None:
    _, new, handle = pair(family, config_of(family, name), torch.float64)
    site = site_of(handle)
    junk(site)
    grads = {}
    for value in (0.0, 0.5):
        site.fill(value)
        new.zero_grad()
        new(**batch(family, torch.float64)).logits.square().mean().backward()
        grads[value] = [new_part(p.grad, corner, parts) for p, corner, parts in site.entries]
    assert all(grad is None or not grad.any() for grad in grads[0.0])
    assert sum(bool(grad is not None and grad.any()) for grad in grads[0.5]) > len(site.entries) / 2


def new_part(grad: Tensor | None, corner: Any, parts: Any) -> Tensor | None:
    if grad is None or corner is None:
        return grad
    rest = grad.clone()
    view = rest if parts is None else rest.unflatten(parts[0], (parts[1], -1))
    view[tuple(slice(0, size) for size in corner)] = 0
    return rest


@in_both
def test_after_the_ramp_it_is_the_plain_model(family: str, name: str, dtype: torch.dtype) -> None:
    _, new, handle = pair(family, config_of(family, name), dtype)
    kind, inputs = type(FAMILIES[family].model()), batch(family, dtype)
    with pytest.raises(ValueError, match="still growing: its mask is at 0"):
        handle.merge()
    handle.step(6, 8)
    masked = logits(new, inputs)
    assert site_of(handle).value == 1.0 and site_of(handle).gate.item() == 1.0  # type: ignore[operator]
    handle.merge()
    assert type(new) is kind and not any("mask" in name for name, _ in new.named_buffers())
    assert all(type(m).__module__.split(".")[0] in ("torch", "transformers") for m in new.modules())
    assert not any("growth" in vars(m) or "stream" in vars(m) or m._forward_hooks for m in new.modules())
    plain = kind(new.config).to(dtype).eval()
    plain.load_state_dict(new.state_dict())
    assert torch.equal(logits(plain, inputs), logits(new, inputs))
    atol = rounding(family, dtype) * max(1.0, masked.abs().max().item())
    torch.testing.assert_close(masked, logits(new, inputs), rtol=0, atol=atol)
    assert {n: p.shape for n, p in new.named_parameters()} == {
        n: p.shape for n, p in FAMILIES[family].model().named_parameters()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_state_of_old_entries_is_carried_and_the_rest_is_zero(family: str) -> None:
    config = config_of(family, "all")
    small: Any = sparsetrain.grow(FAMILIES[family].model(), config, stage=0).train()
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-3)
    small(**batch(family, torch.float32)).logits.square().mean().backward()
    optimizer.step()
    before = {n: (p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()})
              for n, p in small.named_parameters() if p in optimizer.state}  # fmt: skip
    new: Any = sparsetrain.grow(small, config, optimizer, stage=1)
    entries = {id(p): (corner, parts) for p, corner, parts in site_of(handles_of(new)[0]).entries}
    layers = {block.name for block in describe(small).blocks}
    fresh = tuple(f"{block.name}." for block in describe(new).blocks if block.name not in layers)
    for name, parameter in new.named_parameters():
        if name.startswith(fresh):
            assert not optimizer.state.get(parameter)
        elif name in before:
            old, state = before[name]
            corner, parts = entries.get(id(parameter), (None, None))
            for now, was in [
                (parameter, old),
                *((optimizer.state[parameter][k], state[k]) for k in ("exp_avg", "exp_avg_sq")),
            ]:
                if corner is None:
                    assert torch.equal(now, was)
                    continue
                now, was = (t if parts is None else t.unflatten(parts[0], (parts[1], -1)) for t in (now, was))
                assert torch.equal(now[tuple(slice(0, size) for size in corner)], was)
                if now.data_ptr() != parameter.data_ptr():
                    assert now.count_nonzero() == was.count_nonzero()
            assert optimizer.state[parameter]["step"] == state["step"]


def test_the_mask_rises_in_equal_steps_and_ends_at_one() -> None:
    _, _new, handle = pair("llama", MaskedGrowth(plan=("ffn/2", "ffn*2"), ramp_ratio=0.3), torch.float64)
    site = site_of(handle)
    found = []
    for step in range(10, 17):
        handle.step(step, 20)
        found.append((site.value, site.mask("ffn")[-1].item(), site.gate.item()))  # type: ignore[operator]
    assert found == [(k / 6,) * 3 for k in range(7)] and found[-1][0] == 1.0
    assert site.mask("ffn")[:24].eq(1).all()
    _, _, handle = pair("llama", MaskedGrowth(plan=("ffn/2", "ffn*2"), ramp_ratio=0.3, ramp_first=True), torch.float32)
    values = []
    for step in (9, 10, 15, 16):
        handle.step(step, 20)
        values.append(site_of(handle).value)
    assert values == [0.0, 1 / 6, 1.0, 1.0]


def test_a_mask_is_changed_where_it_is() -> None:
    _, new, handle = pair("gpt2", config_of("gpt2", "all"), torch.float32)
    before = {name: buffer.data_ptr() for name, buffer in new.named_buffers()}
    handle.step(5, 8)
    assert {name: buffer.data_ptr() for name, buffer in new.named_buffers()} == before
    assert not any("growth_ramp" in name for name in new.state_dict())


def test_a_mask_in_a_compiled_block_rises_without_another_compilation() -> None:
    """Compiling takes some seconds, so one block stands for the model: a new one, with every kind of mask."""
    _, new, handle = pair("gpt2", config_of("gpt2", "all"), torch.float32)
    block, x = new.transformer.h[-1], torch.randn(2, 24, 32)
    torch._dynamo.reset()
    counted = CompileCounter()
    compiled: Any = torch.compile(block, backend=counted, fullgraph=True)
    with torch.no_grad():
        handle.step(4, 8)
        assert torch.equal(compiled(x), x)
        handle.step(5, 8)
        found, expected = compiled(x), block(x)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, x) and counted.frame_count == 1


def test_weight_decay_waits_for_the_mask() -> None:
    _, new, handle = pair("gpt2", config_of("gpt2", "all"), torch.float32)
    new.train()
    site = site_of(handle)
    optimizer = torch.optim.AdamW(new.parameters(), lr=1e-2, weight_decay=0.5)

    def news() -> list[Tensor]:
        return [new_part(p.detach(), corner, parts) for p, corner, parts in site.entries]  # type: ignore[misc]

    def step(at: int) -> None:
        handle.step(at, 8)
        new.zero_grad()
        new(**batch("gpt2", torch.float32)).logits.square().mean().backward()
        optimizer.step()
        handle.updated()

    old, before = new.transformer.ln_f.weight[:16].detach().clone(), news()
    step(4)
    assert site.value == 0.0 and all(torch.equal(a, b) for a, b in zip(news(), before, strict=True))
    assert not torch.equal(new.transformer.ln_f.weight[:16], old)
    step(5)
    assert sum(not torch.equal(a, b) for a, b in zip(news(), before, strict=True)) > len(before) / 2


@pytest.mark.parametrize("amsgrad", [False, True])
def test_new_entries_may_count_their_own_steps(amsgrad: bool) -> None:
    """As an optimizer of their own, to rounding; after the ramp the parameter's count goes on where theirs was."""
    torch.manual_seed(0)
    options: Any = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "amsgrad": amsgrad}
    whole = nn.Parameter(torch.randn(6, dtype=torch.float64))
    optimizer = torch.optim.AdamW([whole], **options)
    for _ in range(2000):  # under way for long: 1 - beta^t is 1
        whole.grad = torch.cat([torch.randn(4).double(), torch.zeros(2).double()])
        optimizer.step()
    alone = nn.Parameter(whole.detach()[4:].clone())
    fresh, new = torch.optim.AdamW([alone], **options), torch.arange(6) >= 4
    for count in range(1, 21):
        gradient = torch.randn(6).double()
        whole.grad, alone.grad = gradient.clone(), gradient[4:].clone()
        optimizer.step()
        fresh.step()
        correct(whole, new, optimizer.state[whole], optimizer.param_groups[0], count)
        assert (whole.detach()[4:] - alone.detach()).abs().max() < 1e-9
    settle(new, optimizer.state[whole], optimizer.param_groups[0], 20)
    for name, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.99)):
        expected = fresh.state[alone][name] / (1 - beta**20)
        assert torch.allclose(optimizer.state[whole][name][4:], expected, rtol=1e-12)


@pytest.mark.parametrize("steps", ["kept", "own"])
def test_the_first_update_of_new_entries(steps: str) -> None:
    """3.16 learning rates by the weight's own count, and one by theirs; of new layers one in any case."""
    config = config_of("gpt2", "all", new_entry_steps=steps)
    small, _, _ = pair("gpt2", config, torch.float64)
    small.train()
    optimizer = torch.optim.Adam(small.parameters(), lr=1e-4)
    inputs = batch("gpt2", torch.float64)
    for _ in range(3):
        small(**inputs).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for state in optimizer.state.values():
        state["step"].fill_(100_000.0)
    model: Any = sparsetrain.grow(small, config, optimizer, stage=1).train()
    (handle,) = handles_of(model)
    site = site_of(handle)
    handle.step(5, 8)  # the second step of the ramp: c is above 0
    model(**inputs).logits.square().mean().backward()
    before = [new_part(p.detach().clone(), corner, parts) for p, corner, parts in site.entries]
    optimizer.step()
    moved = {"old weights": 0.0, "new layers": 0.0}
    for (p, corner, parts), old in zip(site.entries, before, strict=True):
        name = "new layers" if corner is None else "old weights"
        moved[name] = max(moved[name], float((new_part(p.detach(), corner, parts) - old).abs().max()))
    assert moved["old weights"] == pytest.approx(1e-4 * (1.0 if steps == "own" else 10**0.5), rel=2e-2)
    assert moved["new layers"] == pytest.approx(1e-4, rel=2e-2)


def test_layers_are_stacked_or_interpolated() -> None:
    assert layer_sources(3, 6, "stack") == [0, 1, 2, 0, 1, 2]
    assert layer_sources(4, 6, "stack") == [0, 1, 2, 3, 2, 3]
    assert layer_sources(3, 8, "stack") == [0, 1, 2, 0, 1, 2, 1, 2]
    assert layer_sources(3, 6, "interpolate") == [0, 0, 1, 1, 2, 2]
    assert layer_sources(2, 5, "interpolate") == [0, 0, 0, 1, 1]
    config = MaskedGrowth(plan=("layers=1", "layers=3"), new_layers="interpolate", ramp_ratio=0.25)
    small, new, _handle = pair("llama", config, torch.float64)
    inputs = batch("llama", torch.float64)
    assert torch.equal(logits(small, inputs), logits(new, inputs))
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(new.get_parameter(name.format(2)), small.get_parameter(name.format(0)))


@pytest.mark.parametrize("family", ["gpt2", "bert", "vit", "llama"])
def test_masks_as_published_preserve_it_too(family: str) -> None:
    config = config_of(family, "all", faithful=True, new_layers="interpolate", rewind="none")
    assert config.depth_in_force == "stack" and config.rewind_in_force == "official"
    small, new, handle = pair(family, config, torch.float64)
    inputs = batch(family, torch.float64)
    junk(site_of(handle))
    torch.testing.assert_close(logits(new, inputs), logits(small, inputs), rtol=0, atol=rounding(family, torch.float64))
    (ramp,) = handle.configs
    found = {place.name.rpartition(".")[2] for place in places(ramp, describe(new), new)}
    assert found & {"c_attn", "query", "q_proj"} and found & {"c_fc", "dense", "fc1", "up_proj"}


BAD = {
    ("widht/2", "widht*2"): r"unknown axis 'widht'\. Axes: hidden",
    ("hiden/2", "hiden*2"): r"unknown axis 'hiden'\. Did you mean 'hidden'",
    ("layers",): r"'layers' is no size\. Write sizes as",
    ("layers/0",): r"'layers/0' is no size",
    ("50%", "50% ffn*2"): r"plan='50%': no size",
    ("ffn/2 ffn/2", "ffn*4"): r"one twice",
    ("70% ffn/2", "60% ffn*2"): r"plan gives away 130% of the steps",
    ("60% ffn/2", "40% ffn*2", "layers*1"): r"parts without a share are left",
    (): r"plan=\(\) has no part",
}


@pytest.mark.parametrize("plan", BAD, ids=str)
def test_a_plan_that_cannot_be_read_is_refused(plan: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=BAD[plan]):
        MaskedGrowth(plan=plan)


def test_a_ramp_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ramp_ratio=0.5 and a growth has 0.5 of the steps.*Take a shorter ramp"):
        MaskedGrowth(plan=("ffn/2", "ffn*2"), ramp_ratio=0.5)
    with pytest.raises(ValueError, match=r"ramp_ratio=0.0 is out of range"):
        MaskedGrowth(ramp_ratio=0.0)


MISFITS = [
    ("gpt2", ("ffn/2", "ffn*4"), r"plan ends with ffn=96, and the model that is asked for has ffn=48"),
    ("gpt2", ("ffn/5", "ffn*5"), r"plan asks for ffn/5, and ffn is 48 there"),
    ("gpt2", ("ffn/2", "ffn=20", "ffn=48"), r"plan part 2 takes ffn from 24 to 20, which is no growth"),
    ("gpt2", ("hidden/2", "hidden*2"), r"hidden=16 with heads=4.*Their size cannot grow.*or heads=2"),
    ("bert", ("heads/2", "heads*2"), r"hidden=32 with heads=2.*hidden=16"),
    ("llama", ("heads=3", "heads=4"), r"heads=3, and LlamaForCausalLM shares each key/value head among 2 heads"),
    ("gemma3", ("hidden/2", "hidden*2"), r"multiplies its embeddings by a factor"),
]


@pytest.mark.parametrize(("family", "plan", "text"), MISFITS)
def test_a_plan_that_does_not_fit_the_model_is_refused(family: str, plan: tuple[str, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        sparsetrain.grow(FAMILIES[family].model(), MaskedGrowth(plan=plan), stage=0)


def test_growth_during_growth_is_refused() -> None:
    _, new, handle = pair("gpt2", config_of("gpt2", "ffn"), torch.float32)
    handle.step(5, 8)
    with pytest.raises(ValueError, match=r"still growing: its mask is at 0.5"):
        sparsetrain.grow(new, config_of("gpt2", "ffn"), stage=2)


def test_an_initialization_that_is_not_finite_is_refused() -> None:
    config = config_of("gpt2", "ffn")
    small: Any = sparsetrain.grow(FAMILIES["gpt2"].model(), config, stage=0)
    small.config.initializer_range = float("inf")
    with pytest.raises(ValueError, match=r"is not finite as it was made"):
        sparsetrain.grow(small, config, stage=1)


MLM = ("bert", "roberta-prelayernorm", "distilbert")


@pytest.mark.parametrize("family", MLM)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_masked_token_heads_grow_too(family: str, dtype: torch.dtype) -> None:
    full = AutoModelForMaskedLM.from_config(FAMILIES[family].model().config).to(dtype)
    config = config_of(family, "all")
    small: Any = sparsetrain.grow(full, config, stage=0).eval()
    for parameter in small.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.08)
    new: Any = sparsetrain.grow(small, config, stage=1)
    (handle,) = handles_of(new)
    inputs = batch(family, dtype)
    junk(site_of(handle))
    expected = logits(small, inputs)
    torch.testing.assert_close(logits(new, inputs), expected, rtol=0, atol=rounding(family, dtype) * 10)
    handle.step(6, 8)
    masked = logits(new, inputs)
    handle.merge()
    torch.testing.assert_close(masked, logits(new, inputs), rtol=0, atol=rounding(family, dtype) * 100)
    assert (masked - expected).abs().max() > 1e-2


@pytest.mark.parametrize("pairs", [False, True])
def test_a_head_that_reads_the_channels_several_times_grows_each_time(pairs: bool) -> None:
    config: Any = FAMILIES["bert"].model().config
    config.classifier_pairs = pairs
    full = EncoderClassifier.from_config(config).double()
    growth = config_of("bert", "all")
    small: Any = sparsetrain.grow(full, growth, stage=0).eval()
    for parameter in small.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.08)
    new: Any = sparsetrain.grow(small, growth, stage=1)
    (handle,) = handles_of(new)
    junk(site_of(handle))
    inputs = batch("bert", torch.float64)
    inputs |= {f"{key}_b": value.roll(1, -1) for key, value in inputs.items()} if pairs else {}
    torch.testing.assert_close(logits(new, inputs), logits(small, inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "vit"])
def test_copies_checkpointed_blocks_and_autocast_have_the_masks(family: str) -> None:
    _, new, handle = pair(family, config_of(family, "all"), torch.float32)
    handle.step(5, 8)
    inputs = batch(family, torch.float32)

    def gradients(model: Any) -> dict[str, Tensor]:
        model.zero_grad()
        model.train()(**inputs).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(new)
    twin = copy.deepcopy(new)
    site_of(handle).fill(0.0)  # the copy has masks of its own
    found = gradients(twin)
    handle.step(5, 8)
    new.gradient_checkpointing_enable({"use_reentrant": False})
    for each in (found, gradients(new)):
        assert each.keys() == expected.keys()
        assert all(torch.allclose(each[name], expected[name], atol=1e-6) for name in expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(grad.isfinite().all() for grad in gradients(new).values())
