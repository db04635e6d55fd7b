"""What every rank checks on the two-layer network of the page."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

from sparsetrain.parallel.dtensor import DTensorLinear
from sparsetrain.parallel.flow import Flow, Overlap
from sparsetrain.parallel.grid import ParallelGrid
from sparsetrain.parallel.linear import Mode, TPLinear
from sparsetrain.parallel.model import GridModel
from sparsetrain.parallel.reference import cut_input
from sparsetrain.parallel.shape import GridShape
from sparsetrain.parallel.volume import linear_volumes, total
from tests.parallel.mlp import BATCH, SIZES, serial


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def cut_mlp(grid: ParallelGrid, model: nn.Sequential, mode: Mode, bias: bool = True, **how: Any) -> GridModel:
    flow, found = Flow(grid, how.get("overlap", Overlap()), how.get("keep_weights", False)), {}
    layers: list[nn.Module] = list(model)
    for place, transposed in ((0, False), (2, True)):
        old: Any = model[place]
        weights = (old.weight, old.bias if bias else None)
        layers[place] = found[str(place)] = TPLinear(
            old.in_features,
            old.out_features,
            grid=grid,
            transposed=transposed,
            mode=mode,
            flow=flow,
            weights=weights,
        )
    return GridModel(nn.Sequential(*layers), grid, mode, flow, found, {})


def local(grid: ParallelGrid, whole: Tensor, mode: Mode) -> Tensor:
    """This rank's part of an input or output."""
    if mode == "plain":
        return whole.chunk(grid.shape.world)[grid.rank]
    return cut_input(whole, grid.shape, "x")[grid.rank]


def one_pass(cut: GridModel, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    own = local(cut.grid, x.detach(), cut.mode).clone().requires_grad_()
    y = cut.model(own)
    y.backward(local(cut.grid, dy, cut.mode))
    assert own.grad is not None
    return y.detach(), own.grad


def full_gradients(cut: GridModel) -> dict[str, Tensor]:
    return {
        name: cut.cut[name.partition(".")[0]].full(name.partition(".")[2], parameter.grad)  # type: ignore[arg-type]
        for name, parameter in cut.model.named_parameters()
    }


def equal_to_one_device(sizes: tuple[int, ...], mode: Mode) -> None:
    """Output, input gradient, weight and bias gradients, norm, clipping, ten optimizer steps."""
    model, x, dy = serial()
    with ParallelGrid(*sizes) as grid:
        cut = cut_mlp(grid, model, mode)
        plain = torch.optim.AdamW(model.parameters(), lr=0.01)
        own = torch.optim.AdamW(cut.model.parameters(), lr=0.01)
        for step in range(10):
            moved = dy.roll(step, 0)
            plain.zero_grad()
            own.zero_grad()
            x.grad = None
            wanted = model(x)
            wanted.backward(moved)
            y, dx = one_pass(cut, x, moved)
            norm = cut.finish_gradients(max_norm=5.0)
            assert_close(norm, torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0))
            assert norm > 5.0 and x.grad is not None
            assert_close(y, local(grid, wanted.detach(), mode))
            assert_close(dx, local(grid, x.grad, mode))
            gradients = full_gradients(cut)
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                assert_close(gradients[name], parameter.grad)
            plain.step()
            own.step()
        for name, parameter in cut.model.named_parameters():
            place, _, kind = name.partition(".")
            assert_close(cut.cut[place].full(kind, parameter.detach()), model.get_parameter(name).detach())


def moves_what_the_formulas_say(sizes: tuple[int, ...]) -> None:
    model, x, dy = serial()
    for overlap in (Overlap(), Overlap(False, False, False)):
        for keep in (False, True):
            with ParallelGrid(*sizes) as grid:
                cut = cut_mlp(grid, model, "expert", bias=False, overlap=overlap, keep_weights=keep)
                one_pass(cut, x, dy)
                for parameter in cut.model.parameters():  # without the three scalars of the norm
                    assert parameter.grad is not None
                    grid.all_reduce(parameter.grad, "data").wait()
                tokens = BATCH // grid.shape.data
                wanted = total(
                    [
                        linear_volumes(grid.shape, k, n, tokens, transposed=t, gathers=1 if keep else 2)
                        for (k, n), t in zip(SIZES, (False, True), strict=True)
                    ]
                )
                assert dict(grid.traffic.moved) == wanted


def switches_change_nothing(sizes: tuple[int, ...], mode: Mode) -> None:
    """Each overlap switch, and keeping weights: gradients of two passes equal to the bit."""
    model, x, dy = serial()
    every = Overlap()
    ways: list[dict[str, Any]] = [{"overlap": every}, {"overlap": every, "keep_weights": True}]
    ways += [{"overlap": replace(every, **{field.name: False})} for field in fields(Overlap)]
    ways += [{"overlap": Overlap(False, False, False)}]
    with ParallelGrid(*sizes) as grid:
        found = []
        for way in ways:
            cut = cut_mlp(grid, model, mode, **way)
            for step in range(2):
                one_pass(cut, x, dy.roll(step, 0))
                with torch.no_grad():
                    for parameter in cut.model.parameters():  # weights gathered ahead must not outlive this
                        parameter.mul_(1.01)
            cut.finish_gradients()
            found.append(full_gradients(cut))
        for other in found[1:]:
            assert all(torch.equal(other[name], value) for name, value in found[0].items())


def accumulation_equals_one_batch(sizes: tuple[int, ...], mode: Mode) -> None:
    model, x, dy = serial()
    x = torch.cat([x.detach().roll(i, 1) for i in range(4)])
    dy = torch.cat([dy.roll(i, 1) for i in range(4)])
    with ParallelGrid(*sizes) as grid:
        whole, parts = cut_mlp(grid, model, mode), cut_mlp(grid, model, mode)
        one_pass(whole, x, dy)
        for piece, gradient in zip(x.chunk(4), dy.chunk(4), strict=True):
            one_pass(parts, piece, gradient)
        assert_close(whole.finish_gradients(), parts.finish_gradients())
        wanted = full_gradients(whole)
        for name, value in full_gradients(parts).items():
            assert_close(value, wanted[name])


def dtensor_equals(sizes: tuple[int, ...]) -> None:
    """The DTensor linears compute what TPLinear does: output, weight and bias gradients."""
    model, x, dy = serial()
    with ParallelGrid(*sizes) as grid:
        if 12 % (grid.shape.y * grid.shape.z):
            with pytest.raises(ValueError, match="TPLinear, which cuts the flat weight"):
                DTensorLinear((model[0].weight, None), grid=grid)  # type: ignore[arg-type]
            return
        cut = cut_mlp(grid, model, "expert")
        y, _ = one_pass(cut, x, dy)
        cut.finish_gradients()
        wanted = full_gradients(cut)
        up, down = (
            DTensorLinear((model[i].weight, model[i].bias), grid=grid, transposed=i == 2)  # type: ignore[arg-type]
            for i in (0, 2)
        )
        found = down(nn.functional.gelu(up(local(grid, x.detach(), "expert"))))
        assert_close(found.detach(), y)
        found.backward(local(grid, dy, "expert"))
        for name, layer in (("0", up), ("2", down)):
            for kind in ("weight", "bias"):
                gradient = getattr(layer, kind).grad.full_tensor()
                assert_close(grid.all_reduce(gradient, "data").wait(), wanted[f"{name}.{kind}"])


def dtensor_messages() -> None:
    """A forward of both: two gathers of weights and two sums; the backward scatters two weights."""
    model, x, dy = serial()
    with ParallelGrid(x=2, z=2) as grid:
        up, down = (
            DTensorLinear((model[i].weight, None), grid=grid, transposed=i == 2)  # type: ignore[arg-type]
            for i in (0, 2)
        )
        own = local(grid, x.detach(), "expert")
        with CommDebugMode() as forward:
            y = down(nn.functional.gelu(up(own)))
        with CommDebugMode() as backward:
            y.backward(local(grid, dy, "expert"))
    counts = [
        {str(key).rpartition(".")[2]: n for key, n in mode.get_comm_counts().items()} for mode in (forward, backward)
    ]
    assert counts[0]["all_gather_into_tensor"] == 2 and counts[1]["reduce_scatter_tensor"] == 2, counts


def refuses_another_world() -> None:
    try:
        ParallelGrid(data=3)
    except ValueError as error:
        assert "3 ranks, and" in str(error)
    else:
        raise AssertionError("a grid of 3 was made of another number of ranks")


def every_check(grids: list[GridShape]) -> None:
    refuses_another_world()
    for shape in grids:
        sizes = (shape.data, shape.z, shape.x, shape.y)
        moves_what_the_formulas_say(sizes)
        dtensor_equals(sizes)
        modes: tuple[Mode, ...] = ("expert", "plain")
        for mode in modes:
            equal_to_one_device(sizes, mode)
            switches_change_nothing(sizes, mode)
            accumulation_equals_one_batch(sizes, mode)
