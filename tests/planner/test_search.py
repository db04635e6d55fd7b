from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sparsetrain.planner.machines import MachineRates, known_machines, machine_rates
from sparsetrain.planner.memory import Layout
from sparsetrain.planner.nearest import nearest, nearest_in_bf16
from sparsetrain.planner.outline import Outline
from sparsetrain.planner.quality import risk_of
from sparsetrain.planner.roofline import faster_at, work_seconds
from sparsetrain.planner.search import Answer, Candidate, Question, answer, most
from tests.planner.test_memory import static, step

RATES = MachineRates(machine="toy", gemm_flops={"fp32": 100.0}, copy_bytes_per_s=1000.0, attention_flops=1.0)
DENSE = Candidate(label="LoRA", values={"methods": []})
TOKENS = Candidate(label="token_selection", values={"methods": [{"method": "token_selection"}]})
UNKNOWN = Candidate(label="novel", values={"methods": [{"method": "novel"}]})


def outline(scale: float = 1.0, ops: tuple[str, ...] = ()) -> Outline:
    traces = {n: step(n * scale) for n in (64, 128, 256)}
    return Outline(
        traces=traces, layout=Layout(of_block=(0, 1)), static=static(blocks=2), ops=ops, parameters=1, trained=1
    )


def ask(memory: int | None, goal: str = "fit", fit: str | None = None, **outlines: Any) -> Answer:
    found = {"LoRA": outline(), "token_selection": outline(0.5), "novel": outline(0.25), **outlines}

    def outline_of(candidate: Candidate) -> Outline:
        if found[candidate.label] is None:
            raise ValueError("it matches nothing")
        return found[candidate.label]

    question = Question(tokens=128, memory_bytes=memory, goal=goal, rates=RATES)
    candidates = [DENSE, TOKENS, UNKNOWN]
    return answer(
        question, candidates, outline_of, lambda c: c.values["methods"], lambda o: o.ops[0] if o.ops else None, fit
    )


def test_a_way_is_compared_with_the_one_that_it_names() -> None:
    sara = Candidate(label="sara", values={"methods": [{"method": "sara"}]}, beside="all weights")
    found = {"LoRA": outline(0.5), "all weights": outline(2.0), "sara": outline(), "token_selection": outline()}
    asked = [DENSE, Candidate(label="all weights", values={"methods": []}, pickable=False), sara, TOKENS]
    rows = answer(
        Question(tokens=128, rates=RATES),
        asked,
        lambda candidate: found[candidate.label],
        lambda candidate: candidate.values["methods"],
        lambda _outline: None,
    ).rows
    assert [row.than for row in rows] == ["LoRA", "LoRA", "all weights", "LoRA"]
    assert rows[2].faster_at and not rows[3].faster_at  # as long as each other: between the two they are beside


def test_fit_takes_the_safest_that_fits_and_says_what_it_passed_over() -> None:
    need = {row.candidate.label: row.peak.total for row in ask(None).rows if row.peak}
    roomy = ask(int(need["LoRA"]) + 1)
    assert roomy.picked and roomy.picked.candidate is DENSE
    tight = ask(int(need["token_selection"]) + 1)
    assert tight.picked and tight.picked.candidate is TOKENS
    assert any("LoRA would be safer" in line for line in tight.reasons)


def test_goals_speed_and_memory() -> None:
    fast = ask(None, "speed").picked
    assert fast and fast.candidate is UNKNOWN
    assert (lean := ask(None, "memory").picked) and lean.candidate is UNKNOWN
    tie = ask(None, "speed", token_selection=outline(0.999), novel=None)
    assert tie.picked and tie.picked.candidate is DENSE and "exact" in tie.reasons[0]


def test_what_cannot_be_planned_is_refused_with_its_reason() -> None:
    found = ask(None, novel=None, token_selection=outline(0.5, ops=("no GPU kernel",)))
    reasons = {row.candidate.label: row.refused for row in found.rows}
    assert reasons == {"LoRA": None, "token_selection": "no GPU kernel", "novel": "it matches nothing"}


def test_an_impossible_goal_names_the_nearest_possible_one() -> None:
    found = ask(4000)
    assert found.picked is None
    text = " ".join(nearest(found.rows, found.question))
    assert "tokens at batch 1" in text and "GB for what was asked" in text
    tight = ask(900)
    assert "no length" in nearest(tight.rows, tight.question)[0]


def test_bf16_comes_before_a_smaller_model() -> None:
    (line,) = nearest_in_bf16(ask(100_000))
    assert line == "--dtype bf16: LoRA fits, in 0.0 GB."
    tight = ask(900)
    lines = nearest_in_bf16(replace(tight, nearest=nearest(tight.rows, tight.question)))
    assert lines[0].startswith("with --dtype bf16: no length") and len(lines) == 2


def test_the_longest_sequence_and_largest_batch_fit_and_the_next_do_not() -> None:
    found = ask(60_000, fit="seq")
    assert found.picked and found.shape[0] == found.picked.longest
    longest = found.picked.longest or 0
    assert outline(0.25).peak(longest).total <= 60_000 < outline(0.25).peak(longest + 64).total
    assert most(float, 7.5, unit=1, ceiling=None) == 7 and most(float, 7.5, unit=2, ceiling=4) == 4
    assert most(float, 0.5, unit=1, ceiling=None) == 0


def test_roofline_takes_the_longer_of_arithmetic_and_bytes() -> None:
    work = {"gemm": (200.0, 100.0, 2.0), "copy": (0.0, 3000.0, 1.0)}
    assert work_seconds(work, RATES, "fp32") == pytest.approx(2 + 3)
    assert work_seconds(work, replace(RATES, call_s=1.0), "fp32") == pytest.approx(8)


def test_where_sparse_is_faster() -> None:
    times = {256: 2.0, 512: 0.9, 1024: 1.1, 2048: 0.8, 4096: 0.7}
    assert faster_at(times.__getitem__, lambda _: 1.0, tuple(times)) == ((512, 512), (2048, 4096))
    assert faster_at(lambda n: 0.9 if n < 4096 else 1.0, lambda _: 1.0, tuple(times)) == ((256, 2048),)
    assert faster_at(lambda _: 0.98, lambda _: 1.0, tuple(times)) == ()  # a tie


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_the_table_and_the_lengths_agree(ratio: float) -> None:
    """A way is faster than dense at the asked length if and only if that length is in one of its stretches; measured
    speed-ups, which hold near their own length alone, count in both."""
    found = {"LoRA": outline(), "token_selection": outline(1.0)}
    for tokens in (300, 1000, 5000):
        answered = answer(
            Question(tokens=tokens, rates=RATES),
            [DENSE, TOKENS],
            lambda candidate: found[candidate.label],
            lambda candidate: candidate.values["methods"],
            lambda _outline: None,
            speedup=lambda _candidate, n: (ratio, "measured") if 500 <= n <= 2000 else None,
        )
        dense, sparse = answered.rows
        assert dense.step_s and sparse.step_s and dense.timed == ""
        inside = any(first <= tokens <= last for first, last in sparse.faster_at)
        assert inside == (sparse.step_s < 0.97 * dense.step_s) == (ratio > 1 and tokens == 1000)
        assert sparse.faster_at == (((512, 1024),) if ratio > 1 else ())


def test_risks_are_recorded_results_and_multiply() -> None:
    assert risk_of([]).exact and risk_of([]).ratio == 1.0
    routed = {"method": "routed_ffn", "partition": "clustered"}
    attention = {"method": "pq_attention", "keep_ratio": 0.25}
    spt, ratios = risk_of([attention, routed]), [risk_of([method]).ratio or 0.0 for method in (attention, routed)]
    assert min(ratios) > 1 and spt.ratio == pytest.approx(ratios[0] * ratios[1])
    assert not spt.exact and all("docs/" in text for text in spt.texts)
    assert risk_of([{"method": "novel"}]).ratio is None
    assert risk_of([{"method": "token_selection", "keep_ratio": 1.0}]).exact
    order = [[], [{"method": "token_selection", "keep_ratio": 0.3}], [routed], [{"method": "novel"}]]
    assert [risk_of(m).order for m in order] == sorted(risk_of(m).order for m in order)


def test_machines_are_built_in_or_a_measured_file(tmp_path) -> None:
    assert set(known_machines()) == {"h200", "h100", "a100", "4090", "cpu"}
    assert all(rates.source for rates in known_machines().values())
    path = tmp_path / "measured.json"
    replace(RATES, measured=True).save(path)
    assert machine_rates(str(path)) == replace(RATES, measured=True)
    with pytest.raises(ValueError, match="Did you mean 'h200'"):
        machine_rates("h20")
    path.write_text('{"machine": "x"}')
    with pytest.raises(ValueError, match="lack attention_flops"):
        machine_rates(str(path))
    with pytest.raises(ValueError, match="must be positive"):
        replace(RATES, attention_flops=0)
