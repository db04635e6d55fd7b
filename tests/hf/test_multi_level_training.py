"""The V-cycle as one run: resumed at any step to the same bits, its models mixed with their own start alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from sparsetrain import MaskedGrowth, MultiLevel
from sparsetrain.core.anatomy import describe
from sparsetrain.hf.model.io import load
from sparsetrain.hf.study.compare import compare
from sparsetrain.hf.study.preview import preview
from sparsetrain.hf.train.pretrain import PretrainRecipe, pretrain
from sparsetrain.measure import render_text
from sparsetrain.measure.ledger import charged, ledger, size_of, size_text
from sparsetrain.methods.multi_level.module import decoalesce, interpolate
from sparsetrain.runs.manifest import read_json
from sparsetrain.surgery.grow import fill, growth_method
from tests.families import FAMILIES
from tests.hf import runs
from tests.hf.test_pretrain import images
from tests.hf.test_stages import Kill, losses, named, same_weights, tiny_gpt


def recipe(folder: Path, method: str = "multi_level:start_share=0.2,small_share=0.4", **changes: Any) -> PretrainRecipe:
    """Ten steps: two of a GPT-2 of two layers, four of a half of it, four of the whole."""
    return tiny_gpt(folder, {"n_head": 2}, **{"methods": [method], "steps": 10, **changes})


def test_killed_at_every_step_it_gives_the_same_bits(tmp_path: Path) -> None:
    """Ten runs of one step each, so it takes longer than other tests."""
    asked = recipe(tmp_path)
    whole = pretrain(named(asked, "whole", save_every=0), write=False)
    assert len(set(losses(whole))) == 10
    for step in range(1, 10):
        with pytest.raises(KeyboardInterrupt):
            pretrain(named(asked, "parts", resume=step > 1), callbacks=[Kill(step)], write=False)
    last = pretrain(named(asked, "parts", resume=True), write=False)
    assert last.resumed_from == 9 and losses(last) == losses(whole) and same_weights(last, whole)
    assert last.run["stages"] == whole.run["stages"] and last.run["kept"] == whole.run["kept"]  # type: ignore
    names = [(row["name"], row["to_step"], row["layers"], row["width"]) for row in whole.run["stages"]]  # type: ignore
    assert names == [("level 1, start", 2, 2, 16), ("level 2", 6, 1, 8), ("level 1", 10, 2, 16)]
    assert whole.run["switch_s"] > 0  # type: ignore[typeddict-item]
    gaps = [b["wall_s"] - a["wall_s"] - b["step_time_s"] for a, b in pairwise(whole.run["steps"])]
    assert [i + 2 for i, gap in enumerate(gaps) if gap > 1e-6] == [3, 7]  # first steps of later stages
    assert sum(gaps) == pytest.approx(whole.run["switch_s"], abs=1e-6)  # type: ignore[typeddict-item]


def test_three_levels_stopped_between_and_inside_stages(tmp_path: Path) -> None:
    """Five runs of five stages, each of which loads and saves a model: some ten seconds."""
    method = "multi_level:levels=3,start_share=0.1,small_share=0.4"
    asked = recipe(tmp_path, method, set={"n_layer": 4, "n_embd": 16, "n_head": 4}, save_every=3)
    whole = pretrain(named(asked, "whole"), write=False)
    for stop in (2, 7):
        with pytest.raises(KeyboardInterrupt):
            pretrain(named(asked, f"stopped at {stop}"), callbacks=[Kill(stop)], write=False)
        again = pretrain(named(asked, f"stopped at {stop}", resume=True), write=False)
        assert losses(again) == losses(whole) and same_weights(again, whole)


@pytest.mark.parametrize("kind", ["vit", "encoder"])
def test_other_families_go_on_inside_and_between_stages(tmp_path: Path, kind: str) -> None:
    """Five short runs: seconds, of which most go into making Trainers."""
    method = ["multi_level:start_share=0.2,small_share=0.4"]
    shared = {"methods": method, "steps": 5, "save_every": 1, "lr": 1e-2, "batch_size": 2, "device": "cpu"}
    if kind == "vit":
        sizes = {"image_size": 8, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
        asked = images(tmp_path, **{**shared, "set": {**sizes, "intermediate_size": 32}})
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 32}
        rows = {"data": "listops", "task": "classify", "seq_len": 60, "train_rows": 16, "eval_tokens": 240}
        asked = recipe(tmp_path, method[0], model="sequence-encoder", **{**shared, **rows, "set": sizes})
    whole = pretrain(named(asked, "whole", save_every=0), write=False)
    for stop in (3, 4):  # after one step of the small model's two, and at its end
        with pytest.raises(KeyboardInterrupt):
            pretrain(named(asked, f"stopped at {stop}"), callbacks=[Kill(stop)], write=False)
        again = pretrain(named(asked, f"stopped at {stop}", resume=True), write=False)
        assert again.resumed_from == stop and losses(again) == losses(whole)
        tensors = [load(result.saved).model.state_dict() for result in (again, whole)]
        assert all(torch.equal(weight, tensors[1][name]) for name, weight in tensors[0].items())


def test_the_large_model_goes_on_from_its_own_start_and_the_small_one_alone(tmp_path: Path) -> None:
    """What the last stage begins with is (1 - alpha) · start + alpha · D(small), from the files that the run wrote."""
    asked = recipe(tmp_path, keep_checkpoints=20, warmup_steps=0)
    with pytest.raises(KeyboardInterrupt):
        pretrain(asked, callbacks=[Kill(7)], write=False)
    out = tmp_path / "out"
    (kept,) = (out / "kept").iterdir()
    start = load_file(kept)
    assert set(start) == {name for name, _ in GPT2LMHeadModel.from_pretrained(out / "checkpoint-2").named_parameters()}
    for name, weight in GPT2LMHeadModel.from_pretrained(out / "checkpoint-2").named_parameters():
        assert torch.equal(start[name], weight)
    small: Any = GPT2LMHeadModel.from_pretrained(out / "checkpoint-6")
    assert describe(small).sizes == {"heads": 1, "kv_heads": 1, "embed": 8, "ffn": 32, "layers": 1}
    config = MultiLevel(start_share=0.2, small_share=0.4)
    mixed = fill(interpolate(decoalesce(small, config), start, config.alpha), small)
    after: Any = GPT2LMHeadModel.from_pretrained(out / "checkpoint-7")
    moved = {n: (p - dict(mixed.named_parameters())[n]).abs().max() for n, p in after.named_parameters()}
    assert max(moved.values()) <= 1.1e-2 and max(moved.values()) > 1e-3  # one step of Adam at 1e-2
    first, second = (read_json(out / f"checkpoint-{step}" / "config.json") for step in (2, 7))
    assert first == second and "resized_from" not in first


def test_each_stage_has_its_own_schedule_and_rate(tmp_path: Path) -> None:
    method = "multi_level:start_share=0.2,small_share=0.4,small_lr=2,warmup_steps=1"
    run = pretrain(recipe(tmp_path, method, warmup_steps=2), write=False).run
    rates = [row["learning_rate"] for row in run["steps"]]  # type: ignore[typeddict-item]
    small = pretrain(recipe(tmp_path / "s", methods=[], steps=4, lr=2e-2, warmup_steps=1), write=False).run["steps"]
    large = pretrain(recipe(tmp_path / "l", methods=[], steps=4, lr=1e-2, warmup_steps=1), write=False).run["steps"]
    assert rates[2:6] == pytest.approx([row["learning_rate"] for row in small])  # type: ignore[typeddict-item]
    assert rates[6:] == pytest.approx([row["learning_rate"] for row in large])  # type: ignore[typeddict-item]
    assert rates[:2] == [0.0, 5e-3]  # as the run's own begin


def test_the_ledger_is_the_count_by_hand(tmp_path: Path) -> None:
    asked = recipe(tmp_path, eval_every=2)
    result = pretrain(asked, write=False)
    norms, wide = 2 * 16, 16 * 48 + 48 + 16 * 16 + 16 + 16 * 64 + 64 + 64 * 16 + 16
    narrow = 8 * 24 + 24 + 8 * 8 + 8 + 8 * 32 + 32 + 32 * 8 + 8
    large = 6 * (2 * (wide + 2 * norms) + norms) + 12 * 2 * 16 * 16
    small = 6 * (narrow + 2 * norms // 2 + norms // 2) + 12 * 1 * 8 * 16
    assert [row["flops_per_token"] for row in result.run["stages"]] == [large, small, large]  # type: ignore
    tokens = 2 * 16
    spent = [row["flops"] for row in charged({"sparse": result.run})["sparse"]["steps"]]  # type: ignore
    assert spent[1] == 2 * tokens * large and spent[5] == spent[1] + 4 * tokens * small
    assert spent[9] == spent[5] + 4 * tokens * large
    dense = pretrain(recipe(tmp_path / "d", methods=[], eval_every=2), write=False)
    found = ledger({"dense": dense.run, "sparse": result.run})
    assert found is not None and found["dense_flops"] == 10 * tokens * large and found["sparse_flops"] == spent[9]
    assert 0 < found["switch_share"] < 1 and ledger({"dense": dense.run, "sparse": dense.run}) is None


def test_where_the_loss_of_the_dense_run_is_reached() -> None:
    size = {"parameters": 1, "layers": 1, "width": 1}

    def run(losses: list[float], stages: list[dict[str, Any]]) -> Any:
        steps = [{"step": i, "loss": 1.0, "step_time_s": 2.0, "tokens": 10, "wall_s": 2.0 * i} for i in range(1, 5)]
        evals = [{"step": i, "wall_s": 2.0 * i, "loss": loss} for i, loss in enumerate(losses)]
        return {"steps": steps, "evals": evals, **({"stages": stages} if stages else {})}

    small = {"name": "a", "from_step": 0, "to_step": 2, **size, "flops_per_token": 1}
    large = {"name": "b", "from_step": 2, "to_step": 4, **size, "flops_per_token": 5}
    dense = run([9, 8, 7, 6, 5], [])
    found = ledger({"dense": dense, "sparse": run([9, 8, 7, 6, 4], [small, large])})
    assert found is not None and (found["dense_flops"], found["sparse_flops"]) == (200, 120)
    assert found["flops_ratio"] == (70 + 0.5 * 50) / 200 and found["time_ratio"] == 7 / 8
    assert "Reaches dense's held-out loss of 5" in found["text"]
    never = ledger({"dense": dense, "sparse": run([9, 8, 7, 6, 5.5], [small, large])})
    assert never is not None and never["flops_ratio"] is None and "does not come down to dense's 5" in never["text"]


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_of_every_family(family: str) -> None:
    model = FAMILIES[family].model()
    found = size_of(model, 10)
    matrices = sum(
        p.numel() for n, p in model.named_parameters() if p.ndim == 2 and describe(model).blocks[0].name in n
    )
    assert found["layers"] == 3 and found["width"] == 32
    assert 6 * 3 * matrices < found["flops_per_token"] < 6 * found["parameters"] + 12 * 3 * 32 * 10


def test_what_does_not_fit_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layers \(depth\): 3 cannot be merged 2 to one"):
        pretrain(recipe(tmp_path, set={"n_layer": 3, "n_embd": 16, "n_head": 2}))
    with pytest.raises(ValueError, match=r"stage 'level 1, start' gets 0 of steps=10"):
        pretrain(recipe(tmp_path, "multi_level"))
    assert not (tmp_path / "out").exists()


def test_a_preview_says_what_each_stage_takes(tmp_path: Path) -> None:
    asked = recipe(tmp_path, dtype="fp32")
    found, run = preview(asked), pretrain(asked, write=False).run
    assert found.stages == run["stages"]  # type: ignore[typeddict-item]
    spent = [row["flops"] for row in charged({"sparse": run})["sparse"]["steps"]]  # type: ignore
    ends = [0.0, *(spent[stage["to_step"] - 1] for stage in found.stages)]
    assert [cost["flops"] for cost in found.forecasts] == [b - a for a, b in pairwise(ends)]
    for stage, cost in zip(found.stages, found.forecasts, strict=True):
        least = 16 * stage["parameters"]  # weights, gradients, two moments
        kept = sum(run["saved_activation_bytes"].values())  # of the largest model
        assert least < cost["peak_bytes"] < least + 4 * kept + 100_000
        assert cost["time_s"] == pytest.approx(cost["step_s"] * (stage["to_step"] - stage["from_step"]))
    assert found.forecasts[1]["peak_bytes"] < found.forecasts[0]["peak_bytes"] == found.forecasts[2]["peak_bytes"]
    text = "\n".join(found.lines())
    assert "Stage   2 of 3, level 2: 1 layers x 8" in text and "as many steps of the last model alone" in text


def test_beside_the_ordinary_run_at_its_best_rate_switched_when_two_short_runs_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four short runs, then both sides in processes of their own: ten seconds, which importing torch takes."""
    runs.time_nothing_more(monkeypatch)
    told: list[dict[str, Any]] = []
    searched = {"compare_lr": ["1e-4,3e-2"], "find_switch": 24}
    asked = recipe(tmp_path, compare="dense", **searched, eval_every=5, save_every=0, lr=1e-2, steps=40)
    made = compare(asked, report=told.append)
    out, notes = tmp_path / "out", made.report["notes"]

    assert made.dense["recipe"]["lr"] == 3e-2 and made.sparse["recipe"]["lr"] == 1e-2
    alone = {path.name: read_json(path / "result.json") for path in (out / "dense-lr").iterdir()}
    assert set(alone) == {"0.0001", "0.03"}
    rates = {name: result["run"]["evals"][-1]["loss"] for name, result in alone.items()}
    assert rates["0.03"] < rates["0.0001"]
    again = [[row["loss"] for row in result["run"]["steps"]][:10] for result in (alone["0.03"], made.dense)]
    assert again[0] == pytest.approx(again[1], rel=1e-4)  # other processes may have other threads
    assert any("it is compared at lr=0.03, the other side at 0.01" in note for note in notes)

    said = read_json(out / "switch" / "found.json")
    tried = {name: read_json(out / "switch" / f"{name}-config" / "config.json") for name in ("small", "large")}
    assert (tried["small"]["n_layer"], tried["large"]["n_layer"]) == (1, 2) and said["steps"] == 24
    taken = made.sparse["recipe"]["methods"][0]["small_share"]
    assert taken == (pytest.approx(min(said["small_share"], 0.7), abs=1e-4) if said["small_flops"] else 0.4)
    assert said["text"] in notes and any("The ordinary run ended at" in note for note in notes)
    assert "find_switch" not in made.dense["recipe"] or not made.dense["recipe"]["find_switch"]

    sizes = [event["size"] for event in told if event["event"] == "stage"]
    assert sizes == [size_text(stage) for stage in made.sparse["run"]["stages"]]
    page = (out / "report.html").read_text()
    assert all(f"Loss by {what}" in page for what in ("FLOPs", "tokens", "time")) and "Stages of grown" in page
    assert (found := made.report.get("ledger")) is not None and found["sparse_flops"] < found["dense_flops"]
    assert found["text"] in " ".join(render_text(made.report))
    time = made.report["judgements"][0]
    assert "all steps of all models and the switches" in time["text"]


def test_nothing_to_switch_from(tmp_path: Path) -> None:
    asked = tiny_gpt(tmp_path, {"n_head": 2}, methods=["semi_structured"], steps=10, compare="dense", find_switch=5)
    with pytest.raises(ValueError, match="no method here trains one"):
        compare(asked)
    assert not (tmp_path / "out" / "sparse").exists()


def test_shares_of_the_smaller_models() -> None:
    def shared(config: Any, share: float) -> Any:
        change = growth_method(config).with_small_share
        assert change is not None
        return change(config, share)

    assert shared(MultiLevel(), 0.3).small_share == 0.3 and shared(MultiLevel(), 0.99).small_share == 0.85
    assert shared(MultiLevel(levels=3), 0.99).final_share == pytest.approx(0.1)
    grown = MaskedGrowth(plan=("30% ffn/2 layers/2", "10% ffn*2", "layers*2"))
    assert shared(grown, 0.6).plan == ("45% ffn/2 layers/2", "15% ffn*2", "40% layers*2")
    assert shared(grown, 0.05).plan == ("3.75% ffn/2 layers/2", "4% ffn*2", "92.25% layers*2")  # twice a ramp at least


@pytest.mark.parametrize(
    ("rates", "says"), [([0.0], r"compare_lr holds 0\.0"), (["fast"], "compare_lr"), ([11], r"compare_lr holds 11")]
)
def test_rates_that_are_none(tmp_path: Path, rates: list[Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        recipe(tmp_path, compare="dense", compare_lr=rates)
