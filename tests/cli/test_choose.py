"""`finetune` without methods: it chooses what evidence, memory and timing allow, says why, and goes on with it.

The model is tiny, so its speeds mean nothing: steps are run as ever, and their times are given.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from sparsetrain import TokenSelection
from sparsetrain.hf.study import choose as choosing
from sparsetrain.hf.study import timed_ways
from sparsetrain.hf.study.choose import choose
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.planner.choosing import Asked
from sparsetrain.planner.forecast import MARGIN
from sparsetrain.planner.machines import RESERVE_BYTES
from sparsetrain.planner.quality import Deployed
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.runs.choice import recorded_choice
from tests.cli.conftest import Call

FEW = TokenSelection(keep_ratio=0.25, pool="targets")
FEW_LABEL = "token_selection:keep_ratio=0.25,pool=targets"
RECORD = Deployed(
    methods=(FEW,),
    where={"task": ["sft"], "trained": ["lora"], "target_share": [0.01, 0.2], "seq_len": [32, 128]},
    text="a tiny run",
    source="here",
    equal_steps=0.001,
    speedup=1.5,
)


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    """Prompts of some 80 tokens with completions of 6."""
    rows = [{"prompt": f"{i} " * 30, "completion": f"= {i}"} for i in range(10, 50)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "talks.jsonl"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (choosing, timed_ways):
        monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give the evidence, and how many times as fast as dense the other ways are."""

    def give(*records: Deployed, speedup: float = 1.5) -> None:
        def timed(functions: dict[str, Any], more: Any, **_: Any) -> dict[str, list[float]]:
            times = {key: [1.0 if key.startswith("dense") else 1 / speedup] * 3 for key in functions}
            for function in functions.values():
                function()
            assert not more(times)
            return times

        monkeypatch.setattr(choosing, "deployed_records", lambda: records)
        monkeypatch.setattr(timed_ways, "time_in_turns", timed)
        monkeypatch.setattr(timed_ways, "SHARE", 1e6)  # of a run that takes no time

    return give


def values(llama: Path, talks: Path, output: Path, **changes: Any) -> dict[str, Any]:
    given = {"model": str(llama), "data": str(talks), "task": "sft", "output": str(output), "seq_len": 128, "steps": 4}
    return given | {"save_every": 2, "lora_r": 2, "eval_tokens": 256, "threads": 1, "lr": 1e-2} | changes


def flags(llama: Path, talks: Path, output: Path, **changes: Any) -> list[str]:
    given = values(llama, talks, output, **changes)
    return [part for key, value in given.items() for part in (f"--{key.replace('_', '-')}", str(value))]


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in json.loads((output / "result.json").read_text())["run"]["steps"]]


def test_what_is_chosen_is_told_recorded_and_trained(
    call: Call, llama: Path, talks: Path, tmp_path: Path, recorded: Callable[..., None]
) -> None:
    recorded(RECORD)
    result = call("finetune", *flags(llama, talks, tmp_path / "auto"), "--json")
    assert result.code == 0, result.err
    assert result.json["choice"]["taken"] == FEW_LABEL
    assert "dense LoRA" in result.err and "1.50x dense (measured)" in result.err and "Chosen: " in result.err
    kept = Recipe.from_yaml(tmp_path / "auto" / "recipe.yaml")
    assert (kept.preset, kept.configs) == (None, (FEW,))
    choice = json.loads((tmp_path / "auto" / "choice.json").read_text())
    assert choice["taken"] == FEW_LABEL and [way["label"] for way in choice["options"]] == ["dense LoRA", FEW_LABEL]
    assert 0.01 < choice["facts"]["target_share"] < 0.2 and choice["options"][1]["evidence"] == ["a tiny run [here]"]
    method = "token_selection:keep_ratio=0.25,pool=targets"
    assert call("finetune", *flags(llama, talks, tmp_path / "named", method=method)).code == 0
    assert losses(tmp_path / "auto") == losses(tmp_path / "named")  # choosing leaves no trace in the run
    planned = call("plan", "--recipe", str(tmp_path / "auto" / "recipe.yaml"), "--memory", "64GB", "--json")
    ways = {row["candidate"]["label"]: row for row in planned.json["rows"]}
    assert planned.code == 0 and ways["token_selection"]["fits"] and ways["token_selection"]["refused"] is None


def test_a_tie_is_dense_and_a_second_run_times_nothing(
    call: Call, llama: Path, talks: Path, tmp_path: Path, recorded: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(RECORD, speedup=0.9)
    result = call("finetune", *flags(llama, talks, tmp_path / "a"), "--compare", "dense")
    assert result.code == 0, result.err
    assert "Dense LoRA is the best choice for this model, data and machine." in result.err
    assert "nothing to compare" in result.err
    assert not Recipe.from_yaml(tmp_path / "a" / "recipe.yaml").methods and (tmp_path / "a" / "adapter").is_dir()

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("timed again")

    monkeypatch.setattr(timed_ways, "time_in_turns", fail)
    again = Recipe(**values(llama, talks, tmp_path / "b"))
    found = choose(again)
    assert found.recipe.methods == () and found.values["options"][1]["speedup"]["how"] == "measured"
    with pytest.raises(AssertionError, match="timed again"):
        choose(again, Asked(again=True))


def test_a_run_goes_on_with_what_it_chose(
    call: Call, llama: Path, talks: Path, tmp_path: Path, recorded: Callable[..., None]
) -> None:
    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    recorded(RECORD)
    found = choose(Recipe(**values(llama, talks, tmp_path / "run")))
    with pytest.raises(KeyboardInterrupt):
        finetune(found.recipe, callbacks=[Stop()], choice=found.values, opened=found.opened)
    recorded()  # what would be chosen now is dense
    for lost in (False, True):  # the run was killed before it wrote its choice
        if lost:
            (tmp_path / "run" / "choice.json").unlink()
        known = recorded_choice(tmp_path / "run")
        assert known is not None and Recipe.from_values(
            {"model": "m", "data": "d", "methods": known["methods"]}
        ).configs == (FEW,)
    result = call("finetune", *flags(llama, talks, tmp_path / "run"), "--resume", "--json")
    assert result.code == 0, result.err
    assert "As chosen when the run began" in result.err
    assert result.json["resumed_from"] == 2 and result.json["recipe"]["methods"][0]["keep_ratio"] == 0.25


def test_a_way_that_fails_costs_the_run_nothing(
    llama: Path, talks: Path, tmp_path: Path, recorded: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(RECORD)
    whole = timed_ways.convert_step

    def convert(model: Any, new: Any, parts: Any, *rest: Any) -> Any:
        if parts.recipe.methods:
            raise RuntimeError("out of something")
        return whole(model, new, parts, *rest)

    monkeypatch.setattr(timed_ways, "convert_step", convert)
    found = choose(Recipe(**values(llama, talks, tmp_path / "run")))
    assert found.recipe.methods == ()
    assert found.values["options"][1]["refused"] == "it failed here: RuntimeError: out of something"


def test_a_dry_run_goes_by_the_record_and_writes_nothing(
    call: Call, llama: Path, talks: Path, tmp_path: Path, recorded: Callable[..., None]
) -> None:
    recorded(RECORD)
    result = call("finetune", *flags(llama, talks, tmp_path / "run"), "--dry-run", "--json")
    assert result.code == 0 and result.json["choice"]["options"][1]["speedup"]["how"] == "recorded"
    assert "nothing is timed" in result.err and not (tmp_path / "run").exists()


def test_what_does_not_fit_says_what_would(call: Call, llama: Path, talks: Path, tmp_path: Path) -> None:
    result = call("finetune", *flags(llama, talks, tmp_path / "run"), "--memory", "450.4MB")
    assert result.code == 2 and "no way to train fits in" in result.err and "Nearest: seq_len=" in result.err
    result = call("finetune", *flags(llama, talks, tmp_path / "run"), "--memory", "450.1MB")
    assert result.code == 2 and "No length fits" in result.err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--memory", "0"), "--memory '0' is no size"),
        (("--tolerance", "-1"), "--tolerance '-1' is out of range. Give a share such as 1%"),
        (("--tolerance", "much"), "--tolerance 'much' is out of range"),
        (("--goal", "speed"), "--goal 'speed' is unknown. Choose from time, memory"),
        (("--choose-seconds", "nan"), "--choose-seconds 'nan' is out of range"),
        (("--goal", "time", "--preset", "dense"), "--goal is for --preset auto, and dense training was asked for"),
        (("--choose-again", "--method", "token_selection"), "--choose-again is for --preset auto, and token_selection"),
        (("--preset", "auto", "--method", "token_selection"), "preset=auto chooses the methods"),
        (("--distill-steps", "3"), "distill_steps=3"),
    ],
)
def test_wrong_flags_are_named(
    call: Call, llama: Path, talks: Path, tmp_path: Path, given: tuple[str, ...], said: str
) -> None:
    result = call("finetune", *flags(llama, talks, tmp_path / "run"), *given)
    assert result.code == 2 and said in " ".join(result.err.split()) and not (tmp_path / "run").exists()


def test_a_recipe_that_is_not_decided_is_not_trained(llama: Path, talks: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"preset=auto is chosen before training.*choose\(recipe\)\.recipe"):
        finetune(Recipe(**values(llama, talks, tmp_path / "run")))


def test_an_output_that_is_taken_is_refused_before_anything_is_timed(llama: Path, talks: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        choose(Recipe(**values(llama, talks, tmp_path / "run")))


@pytest.mark.slow  # loads a real model and trains some ten steps of it
@pytest.mark.assets
def test_docstrings_are_timed_on_a_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed_ways, "SHARE", 1e6)  # however slow the machine
    given = {"model": "smollm2-135m", "data": "python-docstrings", "task": "sft", "steps": 100}
    found = choose(Recipe(**given, output=str(tmp_path / "run")), Asked(seconds=1e6))
    speeds = {way["label"]: way["speedup"] for way in found.values["options"] if way["speedup"]}
    (label, speed), *_ = ((label, speed) for label, speed in speeds.items() if speed["how"] != "baseline")
    assert speed["how"] == "measured" and speed["low"] > 1, speeds
    assert found.values["taken"] == label
    assert found.opened is not None and found.recipe.preset is None


def test_what_is_taken_is_never_what_plan_refuses(
    call: Call, llama: Path, talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the same memory and data on the same machine what fits in the choice fits in the plan, and the plan finds
    nothing where there is nothing to choose. It traces some ways to train, in processes of their own."""
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path / "cache"))
    given = {"model": str(llama), "data": str(talks), "task": "sft", "lora_r": 4, "seq_len": 128, "batch_size": 8}
    shape = [part for key, value in given.items() for part in (f"--{key.replace('_', '-')}", str(value))]

    def planned(usable: float) -> dict[str, Any]:
        memory = int(RESERVE_BYTES["cpu"] + usable)
        return call("plan", *shape, "--preset", "dense", "--memory", memory, "--json").json

    (need,) = (row["peak"]["total"] for row in planned(8e9)["rows"] if row["candidate"]["label"] == "LoRA")
    asked = Recipe.from_values({**given, "output": str(tmp_path / "run")})
    tools = set()
    for usable in (need * share for share in (0.2, 0.45, 0.6, 0.8, 1.5)):
        try:
            by = Asked(memory_bytes=int(RESERVE_BYTES["cpu"] + usable))
            taken = choose(asked, by, timed=False).recipe
        except ValueError as error:
            assert "no way to train fits" in str(error) and planned(usable / MARGIN)["picked"] is None
            tools.add("nothing")
            continue
        told = planned(usable)
        mine = {"gradient_checkpointing": taken.gradient_checkpointing, "tiled_mlp": taken.tiled_mlp, "lora_r": 4}
        plain = {"gradient_checkpointing": "none", "tiled_mlp": 1, "lora_r": 4, "methods": []}
        same = [row for row in told["rows"] if plain | row["candidate"]["values"] == mine | {"methods": []}]
        assert same and all(row["fits"] and row["refused"] is None for row in same) and told["picked"] is not None
        tools.add(taken.gradient_checkpointing)
    assert len(tools) == 3, tools  # all of them were met: nothing fits, checkpointing, and plain LoRA
