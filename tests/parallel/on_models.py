"""What every rank checks on whole models: losses, gradients and weights equal one device's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsetrain.parallel.checkpoint import full_weights, load, save
from sparsetrain.parallel.grid import ParallelGrid
from sparsetrain.parallel.linear import Mode
from sparsetrain.parallel.model import parallelize
from tests.families import FAMILIES, Family

ROWS = 8
EXACT = {"gpt2": 1e-11, "bert": 1e-11, "llama": 1e-6}
"""Llama's norms and rotations are in fp32 whatever the model is."""


def family(name: str) -> Family:
    return FAMILIES[name]


def build(name: str) -> Any:
    return family(name).model().double().train()


def batch(name: str, step: int) -> dict[str, Tensor]:
    found = family(name).batch(rows=ROWS, tokens=12, seed=step)
    found["labels"] = found["input_ids"] if family(name).causal else torch.arange(ROWS) % 2
    return found


def loss_of(model: Any, rows: dict[str, Tensor]) -> Tensor:
    """This rank's sum over the number of all ranks' targets; the rows are of one length."""
    tokens = rows["input_ids"].shape[1]
    if rows["labels"].ndim == 2:
        return model(**rows, num_items_in_batch=torch.tensor(ROWS * (tokens - 1))).loss
    return model(**rows).loss * rows["input_ids"].shape[0] / ROWS


def serial(name: str, steps: int) -> tuple[Any, list[Tensor]]:
    model, norms = build(name), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(name, step)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
    return model, norms


def trains_as_one_device(name: str, sizes: tuple[int, ...], mode: Mode, steps: int = 3) -> None:
    plain, norms = serial(name, steps)
    tolerance = EXACT[name]
    with ParallelGrid(*sizes) as grid:
        cut = parallelize(build(name), grid, mode=mode)
        optimizer = torch.optim.AdamW(cut.model.parameters(), lr=1e-3)
        for step in range(steps):
            optimizer.zero_grad()
            loss_of(cut.model, cut.rows(batch(name, step))).backward()
            norm = cut.finish_gradients(max_norm=1.0)
            torch.testing.assert_close(norm, norms[step].double(), rtol=tolerance, atol=tolerance)
            optimizer.step()
        found = full_weights(cut)
        if grid.rank == 0:
            for key, parameter in plain.named_parameters():
                torch.testing.assert_close(
                    found[key], parameter.detach(), rtol=0, atol=20 * tolerance, msg=lambda m, key=key: f"{key}: {m}"
                )


def checkpoints_move(folder: str, grids: list[tuple[tuple[int, ...], Mode]], name: str = "llama") -> None:
    """A step on each grid, each from the checkpoint of the one before, equal the same steps on one device."""
    plain, _ = serial(name, len(grids))
    for step, (sizes, mode) in enumerate(grids):
        with ParallelGrid(*sizes) as grid:
            cut = parallelize(build(name), grid, mode=mode)
            optimizer = torch.optim.AdamW(cut.model.parameters(), lr=1e-3)
            if step:
                load(cut, Path(folder) / str(step - 1), optimizer)
            loss_of(cut.model, cut.rows(batch(name, step))).backward()
            cut.finish_gradients(max_norm=1.0)
            optimizer.step()
            save(cut, Path(folder) / str(step), optimizer)
            # what was read again is what was written, to the bit
            before = [parameter.detach().clone() for parameter in cut.model.parameters()]
            load(cut, Path(folder) / str(step), optimizer)
            assert all(torch.equal(a, b) for a, b in zip(before, cut.model.parameters(), strict=True))
            found = full_weights(cut)
    if found:  # on rank 0: a plain model takes the last one's weights
        dense = build(name)
        dense.load_state_dict(found, strict=False)
        for key, parameter in plain.named_parameters():
            torch.testing.assert_close(dense.get_parameter(key), parameter, rtol=0, atol=20 * EXACT[name])


def lora_trains(sizes: tuple[int, ...]) -> None:
    """LoRA before the grid: the adapters' gradients and the norm equal one device's, the base stays as it was."""
    from peft import LoraConfig, get_peft_model

    def adapted() -> Any:
        torch.manual_seed(5)
        how = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
        return get_peft_model(build("llama"), how).double().train()

    plain = adapted()
    loss_of(plain, batch("llama", 0)).backward()
    wanted = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    with ParallelGrid(*sizes) as grid:
        cut = parallelize(adapted(), grid)
        before = {n: p.detach().clone() for n, p in cut.model.named_parameters() if "lora_" not in n}
        loss_of(cut.model, cut.rows(batch("llama", 0))).backward()
        torch.testing.assert_close(cut.finish_gradients(max_norm=1.0), norm.double(), rtol=1e-6, atol=1e-6)
        found = {n: p.grad for n, p in cut.model.named_parameters() if p.grad is not None}
        assert set(found) == set(wanted) and all("lora_" in name for name in found)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6)
        torch.optim.SGD([p for p in cut.model.parameters() if p.requires_grad], lr=0.1).step()
        assert all(torch.equal(before[n], p) for n, p in cut.model.named_parameters() if n in before)


def sparse_before(sizes: tuple[int, ...], how: str) -> None:
    """A method's edit, then the grid: what it holds stays whole and is reported; the rest trains as on one device."""
    from sparsetrain import sparsify
    from sparsetrain.core.config import method_config

    def edited() -> Any:
        model = build("llama")
        rows = {name: tensor for name, tensor in batch("llama", 9).items() if name != "labels"}
        sparsify(model, method_config(how).example(), calibration=[rows], seed=0)
        return model.train()

    plain = edited()
    loss_of(plain, batch("llama", 0)).backward()
    with ParallelGrid(*sizes) as grid:
        cut = parallelize(edited(), grid)
        loss_of(cut.model, cut.rows(batch("llama", 0))).backward()
        norm = cut.finish_gradients()
        wanted = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1e9)
        if how == "routed_ffn":  # its balance is that of a rank's own rows, as with DDP, so gradients differ
            wanted = norm
        torch.testing.assert_close(norm, wanted.double(), rtol=1e-5, atol=1e-6, msg=how)
        assert cut.report()[0].startswith("grid ")
        assert ("layers.0.mlp.up_proj" in str(cut.report())) == (how != "token_selection")


def left_nothing(sizes: tuple[int, ...]) -> None:
    """Methods that hold every linear leave a grid nothing to cut."""
    from sparsetrain import sparsify
    from sparsetrain.core.config import method_config

    with ParallelGrid(*sizes) as grid:
        for how in ("sara", "pst", "monarch"):
            model = build("llama")
            sparsify(model, method_config(how).example(), seed=0)
            with pytest.raises(ValueError, match="Every one belongs to a sparse method"):
                parallelize(model, grid)


def refusals(sizes: tuple[int, ...]) -> None:
    """What cannot be done is said on every rank, and the model is left as it was."""
    from sparsetrain import RoutedFFN, sparsify

    with ParallelGrid(*sizes) as grid:
        model = FAMILIES["qwen3"].model()
        why = (
            r"2 key/value heads .* do not divide by y=4" if grid.shape.y == 4 else r"does not know how to cut .*q_norm"
        )
        with pytest.raises(ValueError, match=why):
            parallelize(model, grid, mode="expert")
        assert not any("TPLinear" in type(module).__name__ for module in model.modules())
        cut = parallelize(model, grid)
        with pytest.raises(ValueError, match="Edit the model first"):
            sparsify(cut.model, RoutedFFN())
        with pytest.raises(ValueError, match="no linear left to cut"):
            parallelize(cut.model, grid)
        with pytest.raises(ValueError, match="3 rows do not divide by it"):
            cut.rows(torch.zeros(3, 2))
