from __future__ import annotations

import dataclasses

import pytest

from sparsetrain.planner.memory import Layout, StaticBytes, fit, peak_bytes, total_work
from sparsetrain.planner.outline import Outline, load_outline, store_outline
from sparsetrain.planner.step_tracer import Segment, StepTrace


def step(tokens: float = 1.0) -> StepTrace:
    """Blocks keep 10 bytes a token; the head needs 100 more; each backward frees its block and leaves 3 of gradient."""
    work = {"gemm": (100.0 * tokens, 10.0 * tokens, 4.0), "attention": (tokens * tokens, 0.0, 1.0)}
    block = Segment(10 * tokens, 12 * tokens, work)
    back = Segment(3 - 10 * tokens, 5 * tokens, work)
    saved = {"attention": 10 * tokens}
    return StepTrace(
        before=Segment(0.0, 1.0),
        forward=(block, block),
        head=Segment(0.0, 100.0 * tokens),
        backward=(back, back),
        saved={"head_and_loss": 50 * tokens},
        block_saved=(saved, saved),
    )


def static(grads: int = 3, blocks: int = 4) -> StaticBytes:
    return StaticBytes(
        parameters_trainable=grads * blocks,
        parameters_frozen=1000,
        buffers=7,
        gradients=grads * blocks,
        optimizer=2 * grads * blocks,
        grads_by_block=(grads,) * blocks,
    )


def test_the_walk_repeats_blocks_and_finds_the_peak() -> None:
    peak = peak_bytes(step(), Layout(of_block=(0, 1, 1, 1)), static())
    assert peak.phase == "head and loss"
    assert peak.total == 12 + 1000 + 7 + 24 + 40 + 100
    assert peak.saved["attention"] == 40 and peak.saved["head_and_loss"] == 50 and peak.temporary == 50


def test_large_gradients_move_the_peak_into_the_optimizer_step() -> None:
    peak = peak_bytes(step(), Layout(of_block=(0, 1, 1, 1)), static(grads=1000))
    assert peak.phase == "optimizer" and peak.gradients == 4000 and peak.temporary == 0
    more = peak_bytes(step(), Layout(of_block=(0, 1, 1, 1)), static(grads=1000), accumulates=True)
    assert more.phase == "head and loss" and more.total == peak.total + 140


def test_lengths_and_batches_are_fitted() -> None:
    traces = {n: step(n) for n in (2, 4, 8)}
    assert fit(traces, 4) is traces[4]
    longer = fit(traces, 32)
    assert longer.forward[1].kept == pytest.approx(320) and longer.saved["head_and_loss"] == pytest.approx(1600)
    assert longer.forward[0].work["attention"][0] == pytest.approx(1024)
    two = fit(traces, 8, batch=2)
    assert two.backward[0].kept == pytest.approx(3 - 160), "what does not grow with tokens is there once"
    assert two.forward[0].work["attention"][0] == pytest.approx(128)
    with pytest.raises(ValueError, match="three lengths"):
        fit({4: step(4)}, 5)


def test_a_peak_whose_moment_changes_with_the_length_is_no_parabola() -> None:
    def fixed_then_tokens(n: int) -> StepTrace:
        return dataclasses.replace(step(n), before=Segment(0.0, max(100.0, 50.0 * n)))

    traces = {n: fixed_then_tokens(n) for n in (1, 2, 4)}
    assert fit(traces, 1000).before.peak == pytest.approx(50_000)
    squares = {n: dataclasses.replace(step(n), before=Segment(0.0, 7.0 + n * n)) for n in (1, 2, 4)}
    assert fit(squares, 1000).before.peak == pytest.approx(1_000_007)


def test_bytes_that_bend_down_are_a_line() -> None:
    """Falcon-H1 runs in chunks of 256 and the first carries no state: 32k tokens were said to take less than 1,024."""
    kept = {256: 94.0, 512: 210.0, 1024: 416.0}
    traces = {
        n: dataclasses.replace(
            step(n), saved={"other": size}, before=Segment(size, size), head=Segment(-size, 2.0 * size)
        )
        for n, size in kept.items()
    }
    found, line = fit(traces, 32768), 416.0 + (416.0 - 210.0) / 512 * (32768 - 1024)
    assert found.saved["other"] == found.before.kept == -found.head.kept == pytest.approx(line)
    assert fit(traces, 1024, batch=3).saved["other"] == pytest.approx(3 * 416.0 - 2 * 4.0)


def test_work_is_summed_over_all_blocks() -> None:
    assert total_work(step(), Layout(of_block=(0, 1, 1)))["gemm"] == (600.0, 60.0, 24.0)


def test_an_outline_is_stored_and_a_damaged_one_is_not_read(tmp_path) -> None:
    made = Outline(
        traces={n: step(n) for n in (2, 4, 8)},
        layout=Layout(of_block=(0, 1)),
        static=static(blocks=2),
        ops=("routed_ffn",),
        parameters=5,
        trained=6,
    )
    path = tmp_path / "outlines" / "one.json"
    store_outline(made, path)
    assert load_outline(path) == made
    path.write_text(path.read_text()[:40])
    assert load_outline(path) is None and load_outline(tmp_path / "none.json") is None
