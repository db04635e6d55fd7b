"""The 4-D algorithm with all ranks in one process equals one device, and moves what the formulas say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsetrain.parallel.reference import Simulated, SimulatedLinear, cut_input, join_output, squared_norm
from sparsetrain.parallel.shape import GridShape
from sparsetrain.parallel.volume import linear_volumes, total
from tests.parallel.mlp import BATCH, GRIDS, SIZES, serial

ONE_AXIS = [GridShape(data=4), GridShape(z=4), GridShape(x=4), GridShape(y=4), GridShape()]


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def linears(shape: GridShape, model: nn.Sequential, bias: bool = True) -> list[SimulatedLinear]:
    grid = Simulated(shape)
    return [
        SimulatedLinear(grid, layer.weight.detach(), layer.bias.detach() if bias else None, transposed)
        for layer, transposed in ((model[0], False), (model[2], True))
    ]


def forward_backward(layers: list[SimulatedLinear], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(output, input gradient) of linear, GELU, transposed linear; gradients are left in the layers."""
    shape, (up, down) = layers[0].grid.shape, layers
    hidden = [h.requires_grad_() for h in up.forward(cut_input(x, shape, "x"))]
    middle = [nn.functional.gelu(h) for h in hidden]
    y = down.forward([m.detach() for m in middle])
    d_middle = down.backward(cut_input(dy, shape, "x"))
    dh = [torch.autograd.grad(m, h, d)[0] for m, h, d in zip(middle, hidden, d_middle, strict=True)]
    dx = up.backward(dh)
    for layer in layers:
        layer.finish()
    return join_output(y, shape, "x"), join_output(dx, shape, "x")


@pytest.mark.parametrize("shape", GRIDS + ONE_AXIS, ids=str)
def test_outputs_and_every_gradient_equal_one_device(shape: GridShape) -> None:
    model, x, dy = serial()
    y = model(x)
    y.backward(dy)
    layers = linears(shape, model)
    found, dx = forward_backward(layers, x.detach(), dy)
    assert_close(found, y.detach())
    assert x.grad is not None
    assert_close(dx, x.grad)
    for layer, plain in zip(layers, (model[0], model[2]), strict=True):
        assert_close(layer.full(layer.w), plain.weight)
        assert_close(layer.full(layer.dw), plain.weight.grad)
        assert_close(layer.full_bias(layer.db), plain.bias.grad)
    norm = sum(p.grad.square().sum() for p in model.parameters())
    assert_close(squared_norm(layers), norm)


@pytest.mark.parametrize("shape", GRIDS, ids=str)
def test_ten_optimizer_steps_equal_one_device(shape: GridShape) -> None:
    model, x, dy = serial()
    layers = linears(shape, model)
    plain = torch.optim.AdamW(model.parameters(), lr=0.01)
    shards = [p.requires_grad_() for layer in layers for p in (*layer.w, *layer.b)]  # type: ignore[misc]
    own = torch.optim.AdamW(shards, lr=0.01)
    for step in range(10):
        moved = dy.roll(step, 0)
        plain.zero_grad()
        model(x.detach()).backward(moved)
        plain.step()
        with torch.no_grad():
            for layer in layers:
                layer.w, layer.b = [w.detach() for w in layer.w], [b.detach() for b in layer.b]  # type: ignore[union-attr]
        forward_backward(layers, x.detach(), moved)
        for p, grad in zip(shards, [g for layer in layers for g in (*layer.dw, *layer.db)], strict=True):
            p.grad = grad
        own.step()
    for layer, one in zip(layers, (model[0], model[2]), strict=True):
        assert_close(layer.full(layer.w), one.weight.detach())
        assert_close(layer.full_bias(layer.b), one.bias.detach())  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", GRIDS + ONE_AXIS, ids=str)
def test_what_is_moved_equals_the_formulas(shape: GridShape) -> None:
    model, x, dy = serial()
    layers = linears(shape, model, bias=False)
    forward_backward(layers, x.detach(), dy)
    tokens = BATCH // shape.data
    wanted = total([linear_volumes(shape, k, n, tokens, transposed=t) for (k, n), t in zip(SIZES, (False, True))])
    assert dict(layers[0].grid.moved) == wanted


def test_published_counts_of_the_page() -> None:
    def of(shape: GridShape) -> dict[str, float]:
        tokens = BATCH // shape.data
        return total([linear_volumes(shape, k, n, tokens, transposed=t) for (k, n), t in zip(SIZES, (False, True))])

    wanted = {"gather_z": 96, "reduce_x": 96, "scatter_z": 48, "reduce_data": 48}
    assert of(GridShape(data=2, z=2, x=2, y=1)) == wanted
    assert of(GridShape(data=1, z=1, x=1, y=4)) == {"reduce_y": 384}
    assert of(GridShape(data=1, z=8, x=1, y=1)) == {"gather_z": 336, "scatter_z": 168}


def test_a_grid_says_what_it_cannot_cut() -> None:
    with pytest.raises(ValueError, match=r"axis has a whole number"):
        GridShape(x=0)
    with pytest.raises(ValueError, match=r"8 ranks, and 4 were started"):
        GridShape(data=2, x=2, y=2).check_world(4)
    with pytest.raises(ValueError, match=r"6 inputs do not divide by x=4"):
        SimulatedLinear(Simulated(GridShape(x=4)), torch.zeros(8, 6))
    with pytest.raises(ValueError, match=r"3 rows do not divide"):
        GridShape(data=2).check_rows(3)
    with pytest.raises(ValueError, match=r"cannot read 'w=2'"):
        GridShape.from_text("data=2,w=2")
    assert GridShape.from_text("x=2,data=3") == GridShape(data=3, x=2)


def test_ranks_are_numbered_with_x_fastest() -> None:
    shape = GridShape(data=2, z=2, x=2, y=2)
    assert [shape.rank(shape.place(rank)) for rank in range(16)] == list(range(16))
    groups = {axis: shape.group(0, axis) for axis in ("x", "y", "z", "data")}
    assert groups == {"x": [0, 1], "y": [0, 2], "z": [0, 4], "data": [0, 8]}
