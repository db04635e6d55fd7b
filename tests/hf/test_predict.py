from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsetrain.hf.model.model_config import built_in_configs, read_config
from sparsetrain.hf.study.predict import predictor_of
from sparsetrain.planner.candidates import candidates, recipe_yaml
from sparsetrain.planner.kernels import unable
from sparsetrain.planner.machines import known_machines
from sparsetrain.planner.predictor import Predictor, predict
from sparsetrain.planner.search import Candidate, Question
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.presets import PRESETS
from tests.hf.test_outline import llama

CPU = known_machines()["cpu"]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(llama().to_dict(), default=str))
    return path


def test_configs_are_found_by_file_folder_short_and_hub_name(config_file: Path) -> None:
    assert read_config(str(config_file)).values == read_config(str(config_file.parent)).values
    assert read_config("llama-3-8b").name == "meta-llama/Meta-Llama-3-8B"
    assert read_config("Qwen/Qwen2.5-7B").values["num_hidden_layers"] == 28
    assert read_config("qwen2.5-7b").context == 131072
    config_file.write_text("{}")
    with pytest.raises(ValueError, match="no model_type"):
        read_config(str(config_file))


def test_built_in_configs_make_models_of_the_known_sizes() -> None:
    from transformers import AutoConfig

    from sparsetrain.hf.model.models import empty_model, num_parameters

    billions = {"llama-3-8b": 8.03, "llama-3-70b": 70.55, "qwen2.5-7b": 7.62, "gemma-3-12b": 11.77, "qwen2.5-0.5b":
                0.494, "llama-3.1-8b": 8.03, "llama-3.2-1b": 1.236, "mistral-7b": 7.24}  # fmt: skip
    assert set(built_in_configs()) == set(billions)
    for name, size in billions.items():
        model = empty_model(AutoConfig.for_model(**read_config(name).values), "lm")
        assert num_parameters(model)[0] / 1e9 == pytest.approx(size, rel=0.01), name


def predictor(config_file: Path, cache: Path | None) -> Predictor:
    base: dict[str, Any] = {"lora_r": 4, "seq_len": 128, "batch_size": 2, "grad_accum": 1}
    return predictor_of(read_config(str(config_file)), base, bf16=False, cache=cache)


def test_a_plan_is_cached_and_its_recipe_is_one_that_finetune_takes(config_file: Path, tmp_path: Path) -> None:
    first = predictor(config_file, tmp_path / "cache")
    some = [c for c in candidates(first.base) if c.label in ("LoRA", "LoRA + checkpointing", "token_selection")]
    question = Question(tokens=128, batch=2, rates=CPU)
    made = predict(first, question, some)
    again = predictor(config_file, tmp_path / "cache")
    assert predict(again, question, some).rows == made.rows
    assert first.traced == 3 and again.traced == 0
    path = tmp_path / "plan.yaml"
    assert made.picked
    path.write_text(recipe_yaml(made, first.recipe(made.picked.candidate), data=None))
    recipe = Recipe.from_yaml(path, {"data": "text.txt"})
    assert recipe.seq_len == 128 and recipe.batch_size == 2 and recipe.lora_r == 4
    assert made.picked.risk.exact


def test_every_method_is_a_candidate_and_none_is_dropped_without_a_reason(config_file: Path) -> None:
    from sparsetrain.core.config import registered_methods

    labels = {c.label for c in candidates({"lora_r": 4})}
    growing = {name for name, kind in registered_methods().items() if kind.grows}
    assert growing and not growing & labels  # they start from random weights
    assert set(registered_methods()) - growing <= labels and {"LoRA", "all weights", "spt"} <= labels
    assert all(c.label != "LoRA" for c in candidates({"lora_r": 0}))


def test_a_method_that_trains_without_lora_is_planned_without_and_beside_all_weights(config_file: Path) -> None:
    from sparsetrain.core.config import registered_methods

    planner = predictor(config_file, None)
    asked = {c.label: c for c in candidates(planner.base)}
    for name, kind in registered_methods().items():
        if kind.grows:
            continue
        own = Recipe.from_values({"model": "m", "data": "d", "methods": [kind()]}).lora_r == 0
        assert planner.recipe(asked[name]).lora_r == (0 if own else 4), name
        assert asked[name].beside == ("all weights" if own else ""), name
        assert own == (name in ("sara", "pst", "monarch", "sparsedm", "concept_bottleneck")), name
    some = [asked[label] for label in ("LoRA", "all weights", "sara")]
    lora, full, sara = predict(planner, Question(tokens=128, batch=2, rates=CPU), some).rows
    assert sara.than == "all weights" and sara.peak and full.peak and lora.peak
    assert sara.peak.optimizer == pytest.approx(0.1 * 8 * linears(config_file), rel=0.01)  # two moments of each chosen
    assert sara.peak.optimizer < full.peak.optimizer
    assert not any(c.beside for c in candidates(planner.base | {"lora_r": 0}))  # the first is all weights then


def linears(config_file: Path) -> int:
    """Weights of the linears of the blocks."""
    from sparsetrain.hf.model.models import empty_model

    blocks = empty_model(llama(), "lm").model.layers
    return sum(p.numel() for p in blocks.parameters() if p.ndim == 2)


def test_monarch_is_refused_with_its_number_where_a_run_here_would_refuse_it(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a plan for another machine nothing is timed."""
    from sparsetrain.methods.monarch import replace
    from sparsetrain.ops.monarch_linear.gain import Gain

    def gain(right: tuple[int, ...], _left: Any, tokens: int, dtype: Any, device: Any) -> Gain:
        return Gain(
            in_features=32, out_features=32, num_blocks=right[0], tokens=tokens, dtype="float32", device=str(device),
            dense_ms=1.0, monarch_ms=2.0, ratio=0.5,
        )  # fmt: skip

    monkeypatch.setattr(replace, "gain_here", gain)
    monkeypatch.setattr(replace, "break_even", lambda *_: 256)
    base: dict[str, Any] = {"lora_r": 4, "seq_len": 128, "batch_size": 2, "grad_accum": 1}
    made: dict[str, Any] = {"bf16": False, "cache": None}
    here = predictor_of(read_config(str(config_file)), base, **made, here=True)
    (monarch,) = (c for c in candidates(base) if c.label == "monarch")
    with pytest.raises(ValueError, match=r"slower here than dense: .* 0\.50x .* pay from width 256"):
        here.outline(monarch)
    elsewhere = predictor_of(read_config(str(config_file)), base, **made)
    assert elsewhere.outline(monarch).trained > 0
    assert here._key(here.recipe(monarch)) != elsewhere._key(elsewhere.recipe(monarch))


def test_a_gpu_refuses_what_no_gpu_has_timed_and_names_what_times_it(config_file: Path) -> None:
    refused = unable(("routed_ffn", "token_selection"), gpu=True) or ""
    assert "routed_ffn: no step timed on that GPU" in refused and "`sparsetrain bench`" in refused
    assert "topk_mask: no GPU kernel" in (unable(("topk_mask", "routed_ffn"), gpu=True) or "")
    assert unable(("routed_ffn",), gpu=False) is None
    planner = predictor_of(read_config(str(config_file)), {"lora_r": 4}, bf16=True, cache=None, gpu=True)
    known = {candidate.label: candidate for candidate in candidates(planner.base)}
    for label, reason in {
        "spt": "block_sparse_attention and product_quantization and routed_ffn: no step timed",
        "spt-paper": "token_sparse_attention: no GPU kernel",
        "monarch": "monarch_linear: no step timed",
    }.items():
        with pytest.raises(ValueError, match=reason) as error:
            planner.outline(known.get(label) or Candidate(label=label, values={"methods": list(PRESETS[label])}))
        assert "token_sparse" not in str(error.value) or label == "spt-paper"
    assert planner.traced == 0
    assert CPU.usable_bytes(10**9) == 550_000_000 and CPU.usable_bytes(1) == 0


def test_a_step_timed_on_a_gpu_makes_its_method_plannable_at_that_shape(config_file: Path) -> None:
    base: dict[str, Any] = {"lora_r": 4, "seq_len": 128, "batch_size": 2, "grad_accum": 1}
    model = read_config(str(config_file))
    asked = [c for c in candidates(base, gpu=True) if c.label in ("LoRA", "pq_attention", "routed_ffn")]

    def rows(tokens: int, timed: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        rates = replace(known_machines()["h200"], methods=timed)
        planner = predictor_of(model, base, bf16=True, cache=None, gpu=True, timed=tuple(timed))
        found = predict(planner, Question(tokens=tokens, batch=2, dtype="bf16", rates=rates), asked)
        return {row.candidate.label: row for row in found.rows}

    assert all("no step timed" in rows(128, {})[name].refused for name in ("pq_attention", "routed_ffn"))
    planner = predictor_of(model, base, bf16=True, cache=None, gpu=True)
    (pq,) = (planner.methods(c) for c in asked if c.label == "pq_attention")
    row = {"tokens": 128, "step_speedup": 1.5, "configs": pq, "hidden": model.hidden_size, "lora_r": 4,
           "checkpointing": False, "batch_size": 2}  # fmt: skip
    found = rows(128, {"pq_attention": [row]})
    ours, dense = found["pq_attention"], found["LoRA"]
    assert ours.refused is None and ours.step_s == pytest.approx(dense.step_s / 1.5)
    assert "measured at 128 tokens" in ours.timed and ours.faster_at is None
    assert "no step timed" in found["routed_ffn"].refused
    assert "at this shape" in rows(1024, {"pq_attention": [row]})["pq_attention"].refused


def test_eight_bits_are_refused_by_a_plan_that_cannot_count_them(config_file: Path) -> None:
    base: dict[str, Any] = {"lora_r": 4, "seq_len": 128, "batch_size": 1, "grad_accum": 1, "load_in_8bit": True}
    planner = predictor_of(read_config(str(config_file)), base, bf16=False, cache=None)
    dense = [candidate for candidate in candidates(base) if candidate.label == "LoRA"]
    with pytest.raises(ValueError, match=r"load_in_8bit.*Plan load_in_4bit"):
        predict(planner, Question(tokens=128, rates=CPU), dense)
