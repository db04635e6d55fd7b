"""The planner of grids: equal to brute force written again from the page's formulas, and to its worked example."""

from __future__ import annotations

import pytest

from sparsetrain.parallel.cost import GridLayer, GridTask, Network, cost, refusal
from sparsetrain.parallel.plan import grids_of, plan_grids
from sparsetrain.parallel.shape import GridShape

NETWORK = Network(devices_per_node=4, node_bytes_per_s=200e9, inter_bytes_per_s=100e9)
MODELS = [  # hidden, FFN, heads, key/value heads, layers, vocabulary, gated
    (768, 3072, 12, 12, 12, 50257, False),
    (1024, 4096, 16, 16, 24, 30522, False),
    (2048, 8192, 32, 8, 16, 128256, True),
    (2560, 9728, 32, 8, 36, 151936, True),
    (3584, 18944, 28, 4, 28, 152064, True),
    (4096, 14336, 32, 8, 32, 128256, True),
    (5120, 13824, 40, 40, 40, 32000, True),
    (8192, 28672, 64, 8, 80, 128256, True),
    (12288, 49152, 96, 96, 42, 51200, False),
    (16384, 53248, 128, 8, 126, 128256, True),
]
SIZES = (4, 8, 48, 64, 512, 1024)


def task(model: tuple[int, int, int, int, int, int, bool], rows: int = 2048, tokens: int = 2048) -> GridTask:
    h, f, heads, kv_heads, layers, vocab, gated = model
    kv = h // heads * kv_heads
    kinds = [("q", h, h), ("k", h, kv), ("v", h, kv), ("o", h, h), ("up", h, f), ("down", f, h)]
    kinds += [("gate", h, f)] if gated else []
    return GridTask(
        layers=tuple(
            GridLayer(name=name, k=k, n=n, transposed=name in ("o", "down"), count=layers) for name, k, n in kinds
        ),
        rows=rows,
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        whole_parameters=2 * vocab * h,
    )


def by_hand(asked: GridTask, gx: int, gy: int, gz: int, gd: int, per_node: int = 4) -> tuple[float, float] | None:
    """(seconds, bytes) of a grid as the page writes them, or None where it cannot run; nothing shared with `cost`."""

    def speed(size: int, inner: int) -> float:
        return 200e9 if size * inner <= per_node else 100e9 / min(per_node, inner)

    bx, by, bz, bd = speed(gx, 1), speed(gy, gx), speed(gz, gx * gy), speed(gd, gx * gy * gz)
    if asked.rows % (gd * gz) or asked.heads % gy or asked.kv_heads % gy:
        return None
    e, m, seconds, activations = 2, asked.rows * asked.tokens / gd, 0.0, 0.0
    for layer in asked.layers:
        k, n = layer.k, layer.n
        px, py, sx, sy = (gy, gx, by, bx) if layer.transposed else (gx, gy, bx, by)
        if k % px or n % py or (k * n // (gx * gy)) % gz:
            return None
        one = 2 * e * (gz - 1) * k * n / (gx * gy * gz) / bz + e * (gz - 1) / gz * k * n / (gx * gy) / bz
        one += 2 * e * (px - 1) / px * m * n / (gz * py) / sx + 2 * e * (py - 1) / py * m * k / (gz * px) / sy
        one += 2 * e * (gd - 1) / gd * k * n / (gx * gy * gz) / bd
        seconds += layer.count * one
        activations += layer.count * e * m * k / (gz * px)
    w = asked.whole_parameters
    seconds += 2 * e * w * ((gz - 1) / gz / bz + (gd - 1) / gd / bd)
    cut = sum(layer.count * layer.k * layer.n for layer in asked.layers) / (gx * gy * gz)
    return seconds, 16 * (cut + w) + activations


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model[0]}-{model[4]}")
@pytest.mark.parametrize("devices", SIZES)
def test_equals_brute_force(model: tuple[int, int, int, int, int, int, bool], devices: int) -> None:
    asked = task(model)
    found, ways = {}, 0
    for gx in range(1, devices + 1):
        for gy in range(1, devices // gx + 1):
            for gz in range(1, devices // (gx * gy) + 1):
                if devices % (gx * gy * gz) == 0:
                    ways += 1
                    grid = (devices // (gx * gy * gz), gz, gx, gy)
                    if (priced := by_hand(asked, gx, gy, gz, grid[0])) is not None:
                        found[grid] = priced
    plan = plan_grids(asked, devices, NETWORK)
    own = {(p.shape.data, p.shape.z, p.shape.x, p.shape.y): p for p in plan.grids}
    assert set(own) == set(found) and len(plan.grids) + len(plan.refused) == ways
    for grid, (seconds, memory) in found.items():
        assert own[grid].total_s == pytest.approx(seconds, rel=1e-12)
        assert own[grid].memory_bytes == pytest.approx(memory, rel=1e-12)
    if found:
        assert plan.grids[0].total_s == pytest.approx(min(seconds for seconds, _ in found.values()), rel=1e-12)
        assert [p.total_s for p in plan.grids] == sorted(p.total_s for p in plan.grids)
    limit = sorted(memory for _, memory in found.values())[len(found) // 2] if found else 1.0
    fits = {grid for grid, (_, memory) in found.items() if memory <= limit * (1 + 1e-9)}
    limited = plan_grids(asked, devices, NETWORK, limit * (1 + 1e-9))
    assert {(p.shape.data, p.shape.z, p.shape.x, p.shape.y) for p in limited.grids} == fits


def test_the_example_of_the_page() -> None:
    h = 8192
    kinds = ((h, 3 * h, False), (h, h, True), (h, 4 * h, False), (4 * h, h, True))
    layers = tuple(GridLayer(name=str(i), k=k, n=n, transposed=t) for i, (k, n, t) in enumerate(kinds))
    plan = plan_grids(GridTask(layers=layers, rows=512, tokens=2048), 64, NETWORK)
    best = [(p.shape.x, p.shape.y, p.shape.z, p.shape.data, round(p.total_s, 4)) for p in plan.grids[:4]]
    assert best == [(1, 1, 1, 64, 0.0317), (1, 2, 1, 32, 0.0419), (1, 1, 2, 32, 0.0433), (1, 2, 2, 16, 0.0470)]
    sharded = next(p for p in plan.grids if p.shape.z == 64)
    assert round(sharded.total_s, 4) == 0.0476
    assert round(plan.grids[0].state_bytes / 1e9, 1) == 12.9 and round(sharded.state_bytes / 1e9, 1) == 0.2


def test_every_grid_is_tried_once() -> None:
    shapes = list(grids_of(24))
    assert len(set(shapes)) == len(shapes) == 80 and all(shape.world == 24 for shape in shapes)


def test_refusals_say_why_and_terms_add_up() -> None:
    asked = task(MODELS[4], rows=64)
    assert refusal(GridShape(data=128), asked) == "64 rows do not divide by data * z = 128"
    assert refusal(GridShape(y=8), asked) == "28 heads do not divide by y=8"
    assert refusal(GridShape(x=3), asked) == "q: its 3584 inputs do not divide by x=3"
    priced = cost(GridShape(data=2, z=2, x=2, y=2), asked, NETWORK)
    assert priced.total_s == sum(priced.seconds.values()) and all(priced.seconds.values())
    plan = plan_grids(asked, 16, NETWORK, memory_bytes=1e9)
    assert not plan.grids and plan.leanest is not None
    assert plan.leanest.memory_bytes == min(p.memory_bytes for _, _, p in plan.refused if p is not None)
    with pytest.raises(ValueError, match="inter_bytes_per_s=0"):
        Network(devices_per_node=4, node_bytes_per_s=1.0, inter_bytes_per_s=0)
