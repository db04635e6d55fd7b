"""profile_recipe() and bench() on tiny models: one command without data, refusals, and what is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsetrain.core.config import plain_values
from sparsetrain.hf.data.random_tokens import RANDOM, random_rows
from sparsetrain.hf.model.model_config import read_config
from sparsetrain.hf.study import bench_checks as checks
from sparsetrain.hf.study.bench import Outcome, bench, candidates
from sparsetrain.hf.study.bench_cut import cut_head
from sparsetrain.hf.study.profile import profile_recipe, profile_side
from sparsetrain.hf.study.training_step import build_step, open_measured_parts
from sparsetrain.hf.train.assemble import load_model
from sparsetrain.measure.memory import saved_activations
from sparsetrain.methods import Monarch, PQAttention, RoutedFFN
from sparsetrain.planner.machines import MachineRates
from sparsetrain.planner.measured import measured_speedup
from sparsetrain.planner.search import Question
from sparsetrain.recipes.finetune import Recipe
from tests.hf.runs import PQ, ROUTED, bert, llama


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(model: Path, **changes: Any) -> Recipe:
    values = {"model": str(model), "data": RANDOM, "methods": [], "seq_len": 64, "lora_r": 4, "device": "cpu"}
    return Recipe.from_values(values | changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("models") / "llama")


def test_random_rows_are_full_and_those_of_their_seed() -> None:
    rows = random_rows(3, 8, 20, classify=False, seed=1).train
    assert [len(row["input_ids"]) for row in rows] == [8, 8, 8]
    assert rows["input_ids"] == random_rows(3, 8, 20, classify=False, seed=1).train["input_ids"]
    found = random_rows(3, 8, 20, classify=True)
    assert found.num_labels == 2 and set(found.train["labels"]) == {0, 1}


def test_both_sides_are_profiled_in_processes_of_their_own_and_say_that_the_tokens_are_random(model: Path) -> None:
    found = profile_recipe(recipe(model, methods=[ROUTED]), compare=True)
    json.dumps(found.to_dict())
    sparse, dense = found.sides["sparse"], found.sides["dense"]
    assert sparse["saved"]["by_component"]["ffn"] < dense["saved"]["by_component"]["ffn"]
    assert sparse["static"]["parameters_trainable"] == dense["static"]["parameters_trainable"]  # what is added stays
    assert sparse["static"]["parameters_frozen"] > dense["static"]["parameters_frozen"]
    assert all(side["process"]["rss_peak_bytes"] >= side["resident_before"] > 0 for side in (sparse, dense))
    assert sparse["plan"] and not dense["plan"]
    assert "random tokens" in found.notes[0]


@pytest.mark.parametrize("kind", ["non-reentrant", "reentrant"])
def test_checkpointing_saves_less_at_the_price_of_the_backward(model: Path, kind: str) -> None:
    plain, again = (
        profile_side(asked, asked, 1)
        for asked in (recipe(model, methods=[PQ]), recipe(model, methods=[PQ], gradient_checkpointing=kind))
    )
    assert again["saved"]["total"] < 0.5 * plain["saved"]["total"]
    assert again["static"]["gradients"] == plain["static"]["gradients"]


def test_a_classifier_is_profiled(tmp_path: Path) -> None:
    found = profile_side(asked := recipe(bert(tmp_path / "bert"), task="classify", grad_accum=2), asked, 1)
    assert found["tokens_per_step"] == 128
    assert found["saved"]["by_component"]["head_and_loss"] > 0


def test_what_fails_in_the_process_is_the_callers_error(model: Path) -> None:
    with pytest.raises(ValueError, match="absent"):
        profile_recipe(recipe(model.parent / "absent"))
    with pytest.raises(ValueError, match="something to compare"):
        profile_recipe(recipe(model), compare=True)


def test_candidates_are_methods_presets_and_ones_own() -> None:
    assert {"routed_ffn", "pq_attention", "spt"} <= set(candidates("all")) and "masked_growth" not in candidates("all")
    assert list(candidates("masked_growth")) == ["masked_growth"]  # asked for by name, it is refused with the reason
    own = (RoutedFFN(),)
    assert candidates("", own) == {"yours": own}
    assert list(candidates("spt, routed_ffn")) == ["spt", "routed_ffn"]
    with pytest.raises(ValueError, match="unknown"):
        candidates("nonsense")


def test_every_candidate_is_checked_timed_or_refused_with_its_reason(model: Path) -> None:
    asked = {
        "routed_ffn": (RoutedFFN(),),
        "does not divide": (RoutedFFN(num_blocks=7),),
        "pq_attention": (PQAttention(num_keys=16, block_q=8, block_k=8, local_tokens=4),),
    }
    found = bench(recipe(model), asked, rounds=3, layers=1)
    json.dumps(found.to_dict())
    outcomes = {outcome.name: outcome for outcome in found.outcomes}
    assert outcomes["does not divide"].verdict == "refused" and "7" in outcomes["does not divide"].reason
    assert outcomes["does not divide"].step is None
    for name in ("routed_ffn", "pq_attention"):
        timed = outcomes[name]
        assert timed.verdict in ("win", "tie", "loss") and timed.step is not None and timed.part is not None
        assert len(timed.part.candidate_s) == len(timed.step.candidate_s) in (3, 6, 9)
        assert timed.verdict == timed.step.verdict
        assert sum(timed.part.candidate_s) < sum(timed.step.candidate_s)
        assert max(timed.checks.values()) < 1e-5 and len(timed.checks) == 2
    assert (found.layers, found.model_layers) == (1, 2) and "1 of 2 layers" in found.notes[-1]
    routed = outcomes["routed_ffn"]
    assert routed.saved_bytes is not None and routed.dense_saved_bytes is not None
    assert routed.saved_bytes < routed.dense_saved_bytes
    assert set(found.rates.methods) == {"routed_ffn", "pq_attention"}
    row = found.rates.methods["routed_ffn"][0]
    assert row["tokens"] == 64 and row["hidden"] == 32 and row["speedup"] > 0
    rates_read = MachineRates.from_dict(found.rates.to_dict())
    config = read_config(str(model))
    asked_same = recipe(model, methods=[plain_values(RoutedFFN())])
    for tokens, known in ((64, True), (128, True), (512, False)):
        timed = measured_speedup(
            asked_same, config.hidden_size, Question(tokens=tokens, batch=asked_same.batch_size, rates=rates_read)
        )
        assert (timed is not None) == known and (timed is None or timed[0] == row["step_speedup"])
    rates = found.rates.to_dict()
    assert rates["gemm_flops"].keys() == {"fp32", "bf16"} and rates["attention_flops"] > 0


def test_what_trains_without_lora_is_timed_without_against_all_weights(model: Path) -> None:
    asked = candidates("pst,sparsedm,sara") | {"monarch": (Monarch(num_blocks=2, force=True),)}
    asked |= {"routed_ffn": (RoutedFFN(num_blocks=4, num_active=2),)}
    found = bench(recipe(model, seq_len=32), asked, rounds=3, layers=1)
    outcomes = {outcome.name: outcome for outcome in found.outcomes}
    for name, outcome in outcomes.items():
        assert outcome.step is not None, (name, outcome.reason)
        assert outcome.against == ("the same LoRA" if name == "routed_ffn" else "all weights"), name
        (row,) = found.rates.methods[name]
        assert row["lora_r"] == (4 if name == "routed_ffn" else 0), name
    saved = {name: outcome.dense_saved_bytes for name, outcome in outcomes.items()}
    assert len(set(saved.values())) == 2 and saved["sara"] == saved["pst"] != saved["routed_ffn"]
    assert measured_speedup(  # what `plan` asks of it
        recipe(model, methods=["sara"], lora_r=0, seq_len=32),
        32,
        Question(tokens=32, batch=1, rates=MachineRates.from_dict(found.rates.to_dict())),
    )


def test_a_measured_step_selects_its_tokens_and_is_2_4_in_the_middle_of_a_run(model: Path) -> None:
    dense = build_step(open_measured_parts(recipe(model)))
    chosen = build_step(open_measured_parts(recipe(model, methods=["token_selection:keep_ratio=0.25"])))
    saved = [saved_activations(step.model, step.loss).total for step in (chosen, dense)]
    assert saved[0] < 0.6 * saved[1]
    pruned = build_step(open_measured_parts(recipe(model, methods=["semi_structured"], lora_r=0)))
    pruned()
    assert pruned.handle is not None
    assert all(site["dense_phase"] == 0 for site in pruned.handle.report()["stats"].values())


def test_with_fewer_layers_the_head_shrinks_in_proportion(model: Path) -> None:
    parts = open_measured_parts(recipe(model))
    base, _ = load_model(parts)
    whole = parts.config.vocab_size
    cut, note = cut_head(base, parts, 1, 2)
    if whole < 128:  # 64 is the least
        assert cut is parts and "weighs more" in note
    base.resize_token_embeddings(400)
    parts.config.vocab_size = 400
    cut, note = cut_head(base, parts, 1, 2)
    assert cut.config.vocab_size == base.get_output_embeddings().out_features == 192
    assert max(max(row["input_ids"]) for row in cut.bundle.train) < 192 and "192 of 400" in note


def test_a_red_check_gets_no_number(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "distance", lambda *_: 0.5)
    found = bench(recipe(model), {"routed_ffn": (RoutedFFN(),)}, rounds=3)
    (outcome,) = found.outcomes
    assert outcome.verdict == "refused" and outcome.step is None and "5.0e-01" in outcome.reason
    assert found.rates.methods == {}


def test_a_candidate_that_breaks_costs_the_others_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(PQAttention, "dense_limit", breaks)
    said: list[str] = []
    asked = {"broken": (PQAttention(),), "routed_ffn": (RoutedFFN(num_blocks=4, num_active=2),)}
    found = bench(recipe(model), asked, rounds=3, report=lambda event: said.append(event["text"]))
    broken, sound = found.outcomes
    assert broken.verdict == "refused" and broken.reason == "it failed here: RuntimeError: CUDA out of memory."
    assert sound.step is not None and any(broken.reason in line for line in said)


def test_bf16_is_checked_in_fp32(model: Path) -> None:
    asked = {"routed_ffn": (RoutedFFN(num_blocks=4, num_active=2),)}
    (outcome,) = bench(recipe(model, dtype="bf16"), asked, rounds=3).outcomes
    assert max(outcome.checks.values()) < 1e-5 and outcome.step is not None, outcome.reason


def test_the_distance_of_equal_numbers_is_zero_and_a_missing_gradient_is_an_error() -> None:
    a = {"logits": torch.ones(3), "w": torch.ones(2)}
    assert checks.distance(a, a) == 0
    assert checks.distance({"logits": torch.ones(3), "w": torch.full((2,), 1.5)}, a) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no gradient"):
        checks.distance({"logits": torch.ones(3)}, a)
    assert dataclasses.replace(Outcome(name="x", methods=[], verdict="win")).to_dict()["step"] is None
