"""Pre-training by masked growth: a run's stages, its masks and rates, and what an interruption leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from sparsetrain.core.errors import CheckpointError, PlanError
from sparsetrain.hf.model.io import load
from sparsetrain.hf.study.preview import preview
from sparsetrain.hf.train.pretrain import PretrainRecipe, pretrain
from sparsetrain.runs.manifest import read_json
from sparsetrain.surgery.record import handles_of
from tests.hf.test_pretrain import images, labelled
from tests.hf.test_stages import Kill, losses, named, same_weights, tiny_gpt

ALL = ["hidden/2 heads/2 ffn/2 layers=1", "hidden*2 heads*2 ffn*2 layers=2"]
PLAN = {"method": "masked_growth", "plan": ALL, "ramp_ratio": 0.25}


def recipe(folder: Path, method: dict[str, Any] | None = None, **changes: Any) -> PretrainRecipe:
    """Twelve steps of a GPT-2 with four heads: six of a small one, three of a ramp, three of the whole."""
    return tiny_gpt(folder, {"n_head": 4, "n_inner": 32}, **{"methods": [method or PLAN], **changes})


class Watch(TrainerCallback):
    """Notes each step's masks, and where the classes of the model's modules are from."""

    def __init__(self) -> None:
        self.masks: list[float | None] = []
        self.modules: list[set[str]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = [site.value for handle in handles_of(kwargs["model"]) for _, site in handle.installed]
        self.masks.append(found[0] if found else None)
        self.modules.append({type(module).__module__.split(".")[0] for module in kwargs["model"].modules()})


def test_masks_rise_in_a_stage_of_their_own_and_are_gone_after_it(tmp_path: Path) -> None:
    seen = Watch()
    result = pretrain(recipe(tmp_path, save_every=0), callbacks=[seen], write=False)
    assert seen.masks == [None] * 6 + [0.0, 1 / 3, 2 / 3] + [None] * 3
    assert ["sparsetrain" in names for names in seen.modules] == [False] * 6 + [True] * 3 + [False] * 3
    told = [(s["name"], s["from_step"], s["to_step"]) for s in result.run["stages"]]  # type: ignore[typeddict-item]
    name = "hidden*2 heads*2 ffn*2 layers=2"
    assert told == [("start", 0, 6), (f"{name}, masked", 6, 9), (name, 9, 12)]
    assert read_json(Path(result.saved) / "sparsity_config.json")["configs"] == []
    plain = AutoModelForCausalLM.from_pretrained(result.saved)
    assert plain.config.n_embd == 16 and plain.num_parameters() == result.parameters
    rates = [row["learning_rate"] for row in result.run["steps"]]
    assert rates == sorted(rates, reverse=True)


ALSO = {"ramp_first": True, "rewind": "all", "new_layers": "interpolate", "new_entry_steps": "own"}


@pytest.mark.parametrize("changes", [{}, ALSO], ids=["as published", "otherwise"])
def test_killed_at_every_step_a_run_gives_the_same_losses(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Twelve runs of one step each, so it takes longer than other tests."""
    asked = recipe(tmp_path, PLAN | changes, grad_accum=2, warmup_steps=1)
    whole = pretrain(named(asked, "whole", save_every=0), write=False)
    assert len(set(losses(whole))) == 12
    for step in range(1, 12):
        with pytest.raises(KeyboardInterrupt):
            pretrain(named(asked, "parts", resume=step > 1), callbacks=[Kill(step)], write=False)
    last = pretrain(named(asked, "parts", resume=True), write=False)
    assert last.resumed_from == 11 and losses(last) == losses(whole) and same_weights(last, whole)
    rates = [[row["learning_rate"] for row in r.run["steps"]] for r in (last, whole)]  # type: ignore[typeddict-item]
    assert rates[0] == rates[1]


def test_a_checkpoint_of_a_ramp_is_loaded_with_its_masks_and_not_exported(tmp_path: Path) -> None:
    asked = recipe(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        pretrain(asked, callbacks=[Kill(9 - 1)], write=False)
    folder = tmp_path / "out" / "checkpoint-8"
    loaded = load(str(folder))
    ids = torch.arange(16).view(1, 16)
    (site,) = (site for _, site in loaded.handle.installed)
    assert site.value == pytest.approx(1 / 3)
    with torch.no_grad():
        masked = loaded.model.eval()(input_ids=ids).logits
        with pytest.raises(ValueError, match=r"still growing: its mask is at 0.333"):
            loaded.handle.merge()
        with loaded.handle.dense():
            assert (loaded.model(input_ids=ids).logits - masked).abs().max() > 1e-4
        assert torch.equal(loaded.model(input_ids=ids).logits, masked)


@pytest.mark.parametrize("rewind", ["none", "official", "all"])
def test_the_rate_goes_back_to_its_peak(tmp_path: Path, rewind: str) -> None:
    """t_g are 5, 10 and 15 of 20 steps, t_w = 2; the schedule is linear."""
    method = {"method": "masked_growth", "ramp_ratio": 0.1, "rewind": rewind}
    plan = ["ffn/2 layers=1 hidden/2 heads/2", "ffn*2", "layers=2", "hidden*2 heads*2"]
    asked = recipe(tmp_path, method | {"plan": plan}, steps=20, warmup_steps=2, save_every=0, lr_schedule="linear")
    result = pretrain(asked, write=False)
    rates = [row["learning_rate"] / 1e-2 for row in result.run["steps"]]  # type: ignore[typeddict-item]
    rewound = {"none": [], "official": [5, 10], "all": [5, 10, 15]}[rewind]
    for step, rate in enumerate(rates):
        back = max((t - 2 for t in rewound if t <= step), default=0)
        at = step - back
        assert rate == pytest.approx(at / 2 if at < 2 else (20 - at) / 18), step
    assert all(rates[t] == pytest.approx(1.0) for t in rewound)


def llama(folder: Path) -> PretrainRecipe:
    values = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return recipe(folder, model=str(folder / "llama"), set={})


OTHERS = {
    "llama": (llama, ALL),
    "vit": (images, ["hidden/2 heads/2 layers=1", "hidden*2 heads*2 layers=2"]),
    "classifier": (labelled, ["hidden/2 heads/2 layers=1", "hidden*2 heads*2 layers=2"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_and_tasks_grow_without_a_jump_and_resume(tmp_path: Path, name: str) -> None:
    make, plan = OTHERS[name]
    changes = {"methods": [PLAN | {"plan": plan}], "steps": 8, "save_every": 1, "dtype": "fp32"}
    asked = PretrainRecipe.from_values(make(tmp_path).model_dump() | changes)
    whole = pretrain(named(asked, "whole", save_every=0), write=False)
    assert [stage["from_step"] for stage in whole.run["stages"]] == [0, 4, 6]  # type: ignore[typeddict-item]
    for stop in (4, 5, 6):  # before, inside and after the ramp
        with pytest.raises(KeyboardInterrupt):
            pretrain(named(asked, "parts", resume=stop > 4), callbacks=[Kill(stop)], write=False)
    resumed = pretrain(named(asked, "parts", resume=True), write=False)
    assert resumed.resumed_from == 6 and losses(resumed) == losses(whole)
    assert load(str(Path(whole.saved).parent)).handle is None


def test_a_preview_lists_the_sizes_of_all_stages(tmp_path: Path) -> None:
    found = preview(recipe(tmp_path))
    assert [stage["name"].rpartition(", ")[2] for stage in found.stages] == ["start", "masked", ALL[1]]
    assert found.stages[0]["parameters"] < found.stages[1]["parameters"] == found.stages[2]["parameters"]


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Their size cannot grow"):
        pretrain(recipe(tmp_path, {"method": "masked_growth", "plan": ["hidden/2", "hidden*2"]}))
    with pytest.raises(ValueError, match=r"masked' gets 0 of steps=12"):
        pretrain(recipe(tmp_path, PLAN | {"ramp_ratio": 0.01}))
    routed = {"method": "routed_ffn", "num_blocks": 4, "num_active": 2}
    with pytest.raises(PlanError, match=r"both claim"):
        pretrain(recipe(tmp_path, methods=[PLAN, routed]))
    assert not (tmp_path / "out").exists()


def test_another_plan_does_not_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    asked = recipe(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        pretrain(asked, callbacks=[Kill(8)], write=False)
    with pytest.raises(CheckpointError):
        pretrain(recipe(tmp_path, PLAN | {"ramp_ratio": 1 / 6}, resume=True), write=False)
