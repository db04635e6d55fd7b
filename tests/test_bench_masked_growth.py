"""The runner of masked growth: a run on tiny models, and its arithmetic of equal FLOPs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.methods import masked_growth
from bench.runner import asked_of

SIZES = {"hidden": 16, "heads": 4, "ffn": 32, "layers": 2}
SETTINGS = {"steps": 24, "evals": 4, "eval_batches": 1, "shares": [0.5, 1.0], "sizes": SIZES}


@pytest.fixture(autouse=True)
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    draw = np.random.default_rng(0)
    words = draw.integers(97, 105, 4096).astype(np.uint8)
    images = {"pixel_values": draw.integers(0, 255, (32, 28, 28)).astype(np.uint8), "labels": draw.integers(0, 10, 32)}
    monkeypatch.setattr(masked_growth, "_bytes", lambda: (words, words))
    monkeypatch.setattr(masked_growth, "_images", lambda: (images, images))
    monkeypatch.setattr(masked_growth, "BATCHES", {"gpt2": (2, 16), "bert": (2, 16), "vit": (2, 50)})


@pytest.mark.parametrize("model", ["gpt2", "bert", "vit"])
def test_arms_cost_what_they_are_given(model: str) -> None:
    threads = torch.get_num_threads()
    ordinary = masked_growth.train(model, "ordinary", 1.0, 0, SETTINGS, threads)
    assert ordinary["steps"] == 24 and [point["step"] for point in ordinary["evals"]] == [0, 6, 12, 18, 24]
    for name, share in (("grown", 0.5), ("no mask", 0.5), ("small alone", 1.0)):
        ours = masked_growth.train(model, name, share, 0, SETTINGS, threads)
        assert ours["flops"] == pytest.approx(share * ordinary["flops"], rel=0.1)
        assert ours["steps"] > 24 * share and ours["loss"] < 10
        beside = masked_growth.against(ours, ordinary)
        assert beside["of_its"]["flops"] == pytest.approx(share, rel=0.1)


def test_the_main_controls_have_every_seed_after_the_telling_cells() -> None:
    keys = [cell.key for cell in masked_growth.cells(asked_of(masked_growth.BENCHMARKS[0]))]
    assert len(keys) == len(set(keys))
    for model in ("gpt2", "bert"):
        for name in ("no mask", "small alone", "stacked"):
            assert {f"{model} {name} 0.65 {seed}" for seed in (0, 1, 2)} <= set(keys)
    assert keys.index("gpt2 no mask 0.65 1") > max(i for i, key in enumerate(keys) if " grown " in key)


def test_the_rate_rises_falls_and_goes_back() -> None:
    found = [masked_growth.rate(step, 20, 2, 10 if step >= 10 else None) for step in range(20)]
    assert found[0] == 0.5 and found[2] == 1.0 and found[10] == 1.0 and found[9] == pytest.approx(1 - 0.9 * 7 / 18)
    assert found[19] == pytest.approx(1 - 0.9 * 9 / 18)


def test_when_an_arm_had_the_ordinary_loss() -> None:
    costs = {"switch_s": 0.1, "ramp_extra_s": -1.0, "stages": [["half", 2, 1.0], ["whole", 1, 0.9]]}

    def run(*losses: float) -> dict[str, Any]:
        evals = [{"loss": x, "flops": i + 1.0, "wall_s": i + 1.0, "cpu_s": i + 1.0} for i, x in enumerate(losses)]
        return {**evals[-1], **costs, "evals": evals}

    found = masked_growth.against(run(5.0, 3.0, 2.0), run(6.0, 5.0, 4.0, 3.0))
    assert found["loss_less_ordinary"] == -1.0 and found["reached_at"] == {"flops": 0.5, "wall_s": 0.5, "cpu_s": 0.5}
    assert masked_growth.against(run(5.0, 4.0), run(3.0))["reached_at"] is None
    assert found["growing_share"] == pytest.approx(0.1 / 3.0)


def test_cells_come_in_order_of_what_matters() -> None:
    (benchmark,) = masked_growth.BENCHMARKS
    keys = [cell.key for cell in benchmark.cells(asked_of(benchmark))]
    assert keys[:3] == ["gpt2 ordinary 1 0", "gpt2 grown 0.65 0", "gpt2 grown 1 0"] and len(set(keys)) == len(keys)
    assert "vit grown 0.65 0" in keys and "bert no mask 0.65 0" in keys
