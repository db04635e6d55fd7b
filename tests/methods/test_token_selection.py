"""Token selection against its definition, on every family: the oracle cuts gradients by hooks on the plain model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsetrain
from sparsetrain.core.anatomy import describe
from sparsetrain.methods.token_selection import TokenSelection
from sparsetrain.ops.selected_rows import Rows, keep
from tests.families import FAMILIES, Family

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
def cut_by_hooks(model: Any, selected_bt: Tensor) -> Iterator[None]:
    """where(selected, x, x.detach()) at every block's input and output and at every K and V."""

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
        for name, child in model.get_submodule(block.attention.name).named_children():
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


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        scale = max(1.0, grad.abs().max().item())
        assert (found[name] - grad).abs().max() <= tolerance * scale, name


@every
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_equal_the_detach_oracle(family: str, backend: str) -> None:
    case = FAMILIES[family]
    model, batch = case.model().double().train(), case.batch()
    if case.vision:
        batch = {name: x.double() for name, x in batch.items()}
    rows = some_rows(2, tokens_of(case, batch))
    with cut_by_hooks(model, rows.selected_bt):
        logits, expected = gradients(model, batch, rows)
    sparsetrain.sparsify(model, TokenSelection())
    with sparsetrain.use_backend(backend):
        found_logits, found = selected_gradients(model, batch, rows)
    assert torch.equal(found_logits, logits) or backend == "reference"
    assert_same(found, expected)
