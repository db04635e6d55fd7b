"""The frame carries all six kinds of edit. Two are methods of the package; here are small ones for the other four.

Recorded in docs/decisions/0001-frame.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsetrain
from sparsetrain.core import config as config_module
from sparsetrain.core.anatomy import Anatomy, submodule
from sparsetrain.core.config import MethodConfig
from sparsetrain.core.cost import Cost
from sparsetrain.surgery import method as method_module
from sparsetrain.surgery.auxiliary import attach_loss
from sparsetrain.surgery.method import Edit, Grown, Growth, Method, Origin, Stage, register_method
from sparsetrain.surgery.reclass import declass, dense_forward, reclass
from tests.families import FAMILIES


@pytest.fixture(autouse=True)
def leave_registries_as_they_were() -> Iterator[None]:
    yield
    registries: list[dict[str, Any]] = [config_module._REGISTRY, method_module._METHODS]
    for registry in registries:  # methods of the package stay, though a test was the first to ask for one
        for name in [name for name in registry if name.startswith("test_")]:
            del registry[name]


def free(_tokens: int) -> tuple[Cost, Cost]:
    return Cost(), Cost()


def test_what_flows_between_blocks() -> None:
    """Positions that are not selected go on without gradient: the block is re-classed, its forward runs unchanged."""

    class KeepFirstHalf:
        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            half = hidden.shape[1] // 2
            hidden = torch.cat([hidden[:, :half], hidden[:, half:].detach()], 1)
            return dense_forward(KeepFirstHalf, self, hidden, *args, **kwargs)

    @dataclass(frozen=True, kw_only=True)
    class Flow(MethodConfig, method="test_flow"):
        pass

    def edits(config: Flow, anatomy: Anatomy, model: nn.Module) -> list[Edit]:
        def install(model: nn.Module, _: Any, name: str) -> Any:
            block = submodule(model, name)
            reclass(block, KeepFirstHalf)
            return lambda: declass(block), None

        return [
            Edit(
                config=config,
                site=block.name,
                layer=block.layer,
                claims=frozenset({f"what flows into {block.name}"}),
                cost=free,
                install=lambda m, t, name=block.name: install(m, t, name),
            )
            for block in anatomy.blocks
            if config.takes(block.name, block.layer, len(anatomy.blocks))
        ]

    register_method(Flow, Method(edits=edits, site_names=lambda a: [b.name for b in a.blocks]))
    model, batch = FAMILIES["llama"].model(), FAMILIES["llama"].batch(1, 10)
    expected = model(**batch).logits
    expected.square().sum().backward()
    dense_grad = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    handle = sparsetrain.sparsify(model, Flow(layers=(1,)), sparsetrain.RoutedFFN(num_blocks=2, num_active=2))
    out = model(**batch).logits
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    assert not torch.allclose(model.model.layers[0].mlp.up_proj.weight.grad, dense_grad)
    handle.restore()
    assert torch.equal(model(**batch).logits, expected)


def test_which_parameter_entries_are_updated() -> None:
    """Only chosen entries of a weight receive gradient: the edit claims the parameter and hooks its gradient."""

    @dataclass(frozen=True, kw_only=True)
    class Entries(MethodConfig, method="test_entries"):
        pass

    def edits(config: Entries, anatomy: Anatomy, model: nn.Module) -> list[Edit]:
        def install(model: nn.Module, _: Any, name: str) -> Any:
            parameter = model.get_parameter(name)
            mask = parameter.detach().abs() > parameter.detach().abs().median()

            def keep_chosen(p: Tensor) -> None:
                assert p.grad is not None
                p.grad.mul_(mask)

            return parameter.register_post_accumulate_grad_hook(keep_chosen).remove, None

        names = [n for n, axes in anatomy.axes.items() if "ffn" in axes and config.takes(n, 0, 1)]
        return [
            Edit(
                config=config,
                site=name,
                layer=0,
                claims=frozenset({name}),
                cost=free,
                install=lambda m, t, name=name: install(m, t, name),
            )
            for name in names
        ]

    register_method(Entries, Method(edits=edits, site_names=lambda a: list(a.axes)))
    model, batch = FAMILIES["gpt2"].model(), FAMILIES["gpt2"].batch(1, 10)
    handle = sparsetrain.sparsify(model, Entries(targets=("*c_fc.weight",)))
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**batch).logits.square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = (parameter != before[name]).float().mean().item()
        assert (0.3 < moved <= 0.5) if name.endswith("c_fc.weight") else moved > 0, name
    handle.restore()


def test_a_new_model() -> None:
    """Wider FFNs that compute the same function, with the optimizer's moments carried over."""

    @dataclass(frozen=True, kw_only=True)
    class Widen(MethodConfig, method="test_widen"):
        ffn_size: int = 64

    def enter(config: Widen, stage: int, model: nn.Module, anatomy: Anatomy, kept: Any) -> Grown:
        if stage == 0:
            return Grown(model=model)
        new: Any = type(model)(type(model.config).from_dict({**model.config.to_dict(), "n_inner": config.ffn_size}))  # type: ignore[attr-defined]
        return Grown(model=new, origins={name: Origin(name) for name, _ in model.named_parameters()})

    halves = (Stage(name="narrow", share=0.5), Stage(name="wide", share=0.5))
    register_method(Widen, Method(growth=Growth(stages=lambda config: halves, enter=enter)))
    model, batch = FAMILIES["gpt2"].model(), FAMILIES["gpt2"].batch(1, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(**batch).logits.square().mean().backward()
    optimizer.step()
    step_before = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
    expected = model(**batch).logits
    wide = sparsetrain.grow(model, Widen(), optimizer).eval()
    torch.testing.assert_close(wide(**batch).logits, expected)
    assert wide.transformer.h[0].mlp.c_fc.weight.shape == (32, 64)  # type: ignore[union-attr, index]
    for name, parameter in wide.named_parameters():
        old = step_before[name]
        corner = optimizer.state[parameter]["exp_avg"][tuple(slice(0, s) for s in old.shape)]
        assert torch.equal(corner, old), name
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    wide(**batch).logits.square().mean().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="use sparsify"):
        sparsetrain.grow(model, sparsetrain.RoutedFFN())


def test_an_added_head_and_its_loss() -> None:
    """A concept head on a block's output; its loss rides on the data path and counts once."""

    @dataclass(frozen=True, kw_only=True)
    class Concept(MethodConfig, method="test_concept"):
        pass

    class Head(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear = nn.Linear(width, 3)

        def forward(self, hidden: Tensor) -> Tensor:
            return attach_loss(hidden, self.linear(hidden).square().mean(), 0.5)

    def edits(config: Concept, anatomy: Anatomy, model: nn.Module) -> list[Edit]:
        block = anatomy.blocks[-1]

        def install(model: nn.Module, _: Any) -> Any:
            module = submodule(model, block.name)
            head = Head(anatomy.ffns[0].hidden_size)
            module.concept = head
            hook = module.register_forward_hook(lambda m, a, out: head(out))

            def undo() -> None:
                hook.remove()
                del module.concept

            return undo, None

        return [Edit(config=config, site=block.name, layer=block.layer, claims=frozenset(), cost=free, install=install)]

    register_method(Concept, Method(edits=edits, site_names=lambda a: [a.blocks[-1].name]))
    model, batch = FAMILIES["llama"].model(), FAMILIES["llama"].batch(1, 10)
    expected = model(**batch).logits
    handle = sparsetrain.sparsify(model, Concept())
    head = model.model.layers[-1].concept.linear
    hidden = []
    model.model.layers[-1].concept.register_forward_pre_hook(lambda m, args: hidden.append(args[0].detach()))
    out = model(**batch).logits
    assert torch.equal(out, expected)
    out.sum().backward()
    (wanted,) = torch.autograd.grad(0.5 * head(hidden[0]).square().mean(), head.weight)
    torch.testing.assert_close(head.weight.grad, wanted)
    handle.restore()
    assert not hasattr(model.model.layers[-1], "concept")
