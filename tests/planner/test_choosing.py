"""preset auto: what is admitted by evidence, and what is taken of it, with recorded qualities and given speeds."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sparsetrain import PQAttention, RoutedFFN, TokenSelection
from sparsetrain.planner.choosing import (
    BASELINE,
    Asked,
    Option,
    Speed,
    able,
    checkpointed,
    leaner,
    options,
    pick,
    settled,
    table,
    untried,
)
from sparsetrain.planner.quality import Deployed, Facts, deployed_records
from sparsetrain.planner.timings import key_of, load_speeds, store_speeds
from sparsetrain.planner.weighing import Weighed, with_speeds

MB = 10**6
SFT = Facts(task="sft", trained="lora", parameters=135 * MB, seq_len=900, target_share=0.06)
LM = replace(SFT, task="lm", seq_len=512, target_share=1.0)
FEW, HALF = TokenSelection(keep_ratio=0.15, pool="targets"), TokenSelection(keep_ratio=0.5)


def record(*methods: Any, task: str = "sft", share: tuple[float, float] = (0.02, 0.075), **results: Any) -> Deployed:
    where = {"deployed": ["dense"], "trained": ["lora"], "parameters": [3e7, 6e8]}
    where |= {"task": [task], "target_share": list(share), "seq_len": [256, 2048]}
    return Deployed(methods=methods, where=where, text="a run", source="here", **results)


RECORDS = (
    record(FEW, equal_steps=0.006, equal_time=-0.08, speedup=2.1),
    record(HALF, task="lm", share=(0.9, 1.0), equal_time=0.007, speedup=1.4),
    record(PQAttention(), RoutedFFN(), task="lm", share=(0.9, 1.0), equal_steps=0.037, speedup=1.12),
)


def measured(median: float, spread: float = 0.02) -> Speed:
    return Speed(median=median, low=median - spread, high=median + spread, how="measured")


def choose(
    facts: Facts,
    *,
    records: tuple[Deployed, ...] = RECORDS,
    speeds: dict[str, Speed] | None = None,
    peaks: dict[str, float] | None = None,
    usable: float = 8000 * MB,
    **asked: Any,
) -> tuple[Option | None, list[Option]]:
    """As `weigh` and `with_speeds` do, with given peaks and speeds; a way without is as fast as dense."""
    question = Asked(**asked)
    sizes = {"dense LoRA": 1500.0, "dense LoRA + checkpointing": 700.0} | (peaks or {})

    def weighed(way: Option) -> Option:
        peak = sizes.get(way.label, 600.0) * MB
        return way if way.refused else replace(way, peak_bytes=peak, fits=peak <= usable)

    found = [weighed(way) for way in options(records, facts, question)]
    found += [weighed(way) for way in checkpointed(found, question.goal)]
    given = {"dense LoRA": BASELINE, "dense LoRA + checkpointing": measured(0.75)} | (speeds or {})
    return pick([replace(way, speed=given.get(way.label, measured(1.0))) for way in found], question)


FEW_LABEL = "token_selection:keep_ratio=0.15,pool=targets"
BETTER = record(TokenSelection(keep_ratio=0.3, pool="targets"), share=(0.1, 0.3), equal_steps=0.006, speedup=1.5)
BETTER_LABEL = "token_selection:pool=targets"

TEN: dict[str, tuple[dict[str, Any], str | None]] = {
    "docstrings: few targets, faster by as much as on record": (
        {"facts": SFT, "speeds": {FEW_LABEL: measured(1.8)}},
        FEW_LABEL,
    ),
    "docstrings on a machine where selection gains nothing": (
        {"facts": SFT, "speeds": {FEW_LABEL: measured(1.01)}},
        "dense LoRA",
    ),
    "short chats: rows below what is on record": (
        {"facts": replace(SFT, seq_len=90), "speeds": {FEW_LABEL: measured(1.8)}},
        "dense LoRA",
    ),
    "chats in which every second token is a target": (
        {"facts": replace(SFT, target_share=0.57), "speeds": {FEW_LABEL: measured(1.8)}},
        "dense LoRA",
    ),
    "a fifth of the tokens are targets, within the tolerance on record": (
        {
            "facts": replace(SFT, target_share=0.2),
            "records": (*RECORDS, BETTER),
            "speeds": {BETTER_LABEL: measured(1.5)},
        },
        BETTER_LABEL,
    ),
    "packed text: nothing on record keeps to 1 %": ({"facts": LM, "speeds": {}}, "dense LoRA"),
    "long documents, tiny memory: dense only with checkpointing": (
        {"facts": replace(LM, seq_len=8192), "usable": 800 * MB},
        "dense LoRA + checkpointing",
    ),
    "docstrings in a memory that dense training does not fit, with checkpointing either": (
        {"facts": SFT, "usable": 650 * MB, "speeds": {FEW_LABEL: measured(1.8)}},
        FEW_LABEL,
    ),
    "labels: no evidence": ({"facts": replace(SFT, task="classify", target_share=None)}, "dense LoRA"),
    "all weights: no evidence": ({"facts": replace(SFT, trained="all weights")}, "dense all weights"),
}


@pytest.mark.parametrize("name", TEN)
def test_ten_shapes_of_data(name: str) -> None:
    given, expected = TEN[name]
    taken, found = choose(**given)
    assert taken is not None and taken.label == expected, table(found, taken)
    assert all(way.reason for way in found)


def test_memory_as_the_goal_takes_the_leanest_that_is_not_much_slower() -> None:
    fast = {"speeds": {FEW_LABEL: measured(1.8), f"{FEW_LABEL} + checkpointing": measured(1.3)}}
    lean = {"peaks": {FEW_LABEL: 600, f"{FEW_LABEL} + checkpointing": 400}}
    taken, _ = choose(SFT, goal="memory", **fast, **lean, records=(replace(RECORDS[0], equal_steps=0.004),))
    assert taken is not None and taken.label == f"{FEW_LABEL} + checkpointing"  # 1.8 / 1.3 < 1.5
    slow = {FEW_LABEL: measured(1.8), f"{FEW_LABEL} + checkpointing": measured(1.1)}
    taken, _ = choose(SFT, goal="memory", speeds=slow, **lean, records=(replace(RECORDS[0], equal_steps=0.004),))
    assert taken is not None and taken.label == FEW_LABEL  # 1.8 / 1.1 > 1.5
    taken, _ = choose(LM, goal="memory")
    assert taken is not None and taken.label == "dense LoRA + checkpointing"


def test_a_lead_at_equal_time_alone_is_told_and_not_taken() -> None:
    """The run has the steps that were asked for, and after those it is behind."""
    records = (record(FEW, equal_steps=0.018, equal_time=-0.004, speedup=1.82),)
    taken, found = choose(SFT, records=records, speeds={FEW_LABEL: measured(1.8)})
    assert taken is not None and not taken.methods
    assert "1 % is tolerated; it is ahead with 1.8 times the steps" in str(found[1].refused)
    taken, _ = choose(SFT, records=records, speeds={FEW_LABEL: measured(1.8)}, tolerance=0.02)
    assert taken is not None and taken.label == FEW_LABEL


def test_the_tolerance_decides() -> None:
    spt = "pq_attention + routed_ffn"
    taken, found = choose(LM, tolerance=0.04, speeds={spt: measured(1.12)})
    assert taken is not None and taken.label == spt
    taken, found = choose(LM, tolerance=0.03, speeds={spt: measured(1.12)})
    assert taken is not None and taken.label == "dense LoRA"
    assert next(way for way in found if way.label == spt).refused == (
        "3.7 % above dense LoRA at equal steps (1 seed), and 3 % is tolerated"
    )


def test_a_tie_is_dense_and_a_guess_must_be_clear() -> None:
    records = (replace(RECORDS[0], equal_steps=0.004),)
    for speed, expected in (
        (measured(1.02, 0.01), "dense LoRA"),
        (measured(1.2, 0.3), "dense LoRA"),  # the interval does not exclude a tie
        (measured(1.2, 0.1), FEW_LABEL),
        (replace(measured(1.08, 0), how="predicted"), "dense LoRA"),
        (replace(measured(1.5, 0), how="predicted"), FEW_LABEL),
    ):
        taken, _ = choose(SFT, records=records, speeds={FEW_LABEL: speed})
        assert taken is not None and taken.label == expected, speed


def test_of_ways_equally_fast_the_better_on_record_is_taken() -> None:
    other = TokenSelection(keep_ratio=0.2, pool="targets")
    records = (record(FEW, equal_steps=0.009), record(other, equal_steps=0.002))
    speeds = {FEW_LABEL: measured(1.82), "token_selection:keep_ratio=0.2,pool=targets": measured(1.80)}
    taken, _ = choose(SFT, records=records, speeds=speeds)
    assert taken is not None and taken.methods == (other,)


def test_evidence_that_contradicts_refuses() -> None:
    """Two records of one way hold for the data; the worse one counts."""
    taken, _ = choose(
        SFT, records=(record(FEW, equal_steps=0.004), record(FEW, equal_steps=0.05)), speeds={FEW_LABEL: measured(2.0)}
    )
    assert taken is not None and not taken.methods


def test_facts_that_are_not_known_yet_refuse_nothing_until_the_end() -> None:
    unread = replace(SFT, seq_len=None, target_share=None)
    asked = Asked()
    assert [way.methods for way in able(options(RECORDS, unread, asked, final=False))] == [(), (FEW,)]
    assert [way.methods for way in able(options(RECORDS, unread, asked))] == [()]
    refused = options(RECORDS, replace(SFT, deployed="sparse"), asked)[1].refused
    assert refused == "no evidence for deployed sparse (on record: dense)"


def test_a_model_of_another_size_is_told_what_to_try() -> None:
    large = replace(SFT, parameters=8000 * MB)
    told = untried(RECORDS, large, Asked())
    assert told and "2.1 times" in told and "--method token_selection:keep_ratio=0.15,pool=targets" in told
    assert untried(RECORDS, SFT, Asked()) is None  # on record, and weighed
    assert untried(RECORDS, replace(large, task="lm", target_share=1.0), Asked()) is None  # beyond the tolerance
    assert untried(RECORDS, replace(large, target_share=0.5), Asked()) is None  # other data, too


def test_nothing_fits() -> None:
    taken, found = choose(SFT, usable=10 * MB)
    assert taken is None and not any(way.fits for way in found if way.refused is None)


def test_the_table_names_every_way_once() -> None:
    taken, found = choose(SFT, speeds={FEW_LABEL: measured(1.8)})
    lines = table(found, taken)
    assert [line[:2] for line in lines] == ["  ", "* ", "  ", "  "]
    assert "1.80x dense (measured), 572 MiB; the fastest that fits; on record 0.6 % above" in lines[1]
    assert lines[2] == "  token_selection:keep_ratio=0.5: no evidence for task sft (on record: lm)"


def test_rounds_end_when_the_order_is_clear() -> None:
    base = {"dense": BASELINE}
    assert settled(base | {"a": measured(1.5)}) and settled(base | {"a": measured(0.7)})
    assert not settled(base | {"a": measured(1.02)})
    assert settled(base | {"a": measured(1.5), "b": measured(1.3)})
    assert not settled(base | {"a": measured(1.5), "b": measured(1.49)})


def test_what_ships_is_read_and_every_record_has_a_way() -> None:
    found = deployed_records()
    assert found and all(r.equal_steps is not None or r.equal_time is not None for r in found)
    assert {name for r in found for name in r.where} <= set(Facts.__dataclass_fields__)


def test_kept_speeds_are_read_back_and_damage_is_noticed(tmp_path: Any) -> None:
    place = tmp_path / "cache" / f"{key_of({'model': 'm', 'tokens': 8})}.json"
    assert load_speeds(place) == {}
    store_speeds({"dense": BASELINE, "a": measured(1.5)}, place)
    assert load_speeds(place) == {"dense": BASELINE, "a": measured(1.5)}
    place.write_text(place.read_text().replace("1.5", "2.5"))
    assert load_speeds(place) == {}
    assert key_of({"tokens": 8, "model": "m"}) == key_of({"model": "m", "tokens": 8}) != key_of({"model": "m"})


def test_exact_tools_follow_where_nothing_fits_and_never_else() -> None:
    dense, again = Option(fits=False), Option(fits=False, recomputes=True)
    sparse = Option(methods=(FEW,), fits=False, recomputes=True)
    cpu = leaner([dense, again, sparse], gpu=False)
    assert [way.label for way in cpu] == ["dense LoRA + checkpointing + tiled MLP"]
    gpu = leaner([dense, again, sparse], gpu=True)
    assert [way.label for way in gpu][1:] == ["dense LoRA + checkpointing + offload + tiled MLP"]
    keys = {"gradient_checkpointing": "non-reentrant", "activation_offloading": True, "tiled_mlp": 8}
    assert gpu[1].exact == keys and dense.exact == {}
    assert not leaner([dense, replace(again, fits=True)], gpu=True)
    assert not leaner([replace(dense, fits=True)], gpu=True)


def test_what_gained_nothing_on_record_is_not_timed() -> None:
    tie = record(HALF, equal_steps=0.002, speedup=1.03, peak=1.11)
    _, found = choose(SFT, records=(tie,))
    assert [way.refused for way in found if way.methods] == [
        "on record it gains nothing: a step 1.03x dense, 1.11x its peak memory"
    ]
    for gains in (replace(tie, peak=0.6), replace(tie, speedup=1.2)):
        assert [way.refused for way in choose(SFT, records=(gains,))[1] if way.methods] == [None]


class _Guesses:
    """A forecast that thinks every step is hardly faster than dense training's."""

    def __init__(self, gpu: bool) -> None:
        self.predictor = SimpleNamespace(gpu=gpu)

    def speed(self, way: Option, base: Option) -> Speed:
        return BASELINE if way == base else replace(measured(1.06, 0), how="predicted")


@pytest.mark.parametrize(
    ("gpu", "base", "how"), [(False, 0, "recorded"), (True, 0, "predicted"), (False, 1, "predicted")]
)
def test_where_nothing_could_be_timed_the_record_counts(gpu: bool, base: int, how: str) -> None:
    """Of a CPU's steps without checkpointing; a record says nothing of a GPU's, or of a baseline that recomputes."""
    dense = Option()
    ways = [
        replace(dense, fits=base == 0),
        Option(methods=(FEW,), records=RECORDS[:1]),
        replace(dense, recomputes=True),
    ]
    weighed: Any = Weighed(facts=SFT, forecast=_Guesses(gpu), ways=ways)  # type: ignore[arg-type]
    speeds = {way.label: way.speed for way in with_speeds(weighed, lambda _ways, _base: ({}, {}))}
    assert speeds[FEW_LABEL] is not None and speeds[FEW_LABEL].how == how
    assert speeds[FEW_LABEL].median == (2.1 if how == "recorded" else 1.06)
    timed = with_speeds(weighed, lambda ways, _base: ({way.label: measured(1.3) for way in ways}, {}))
    assert next(way for way in timed if way.methods).speed == measured(1.3)
