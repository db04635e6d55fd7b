"""Runs of several stages: a growth method makes the models, and nothing is lost or done twice between them."""

from __future__ import annotations

import io
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, TrainerCallback

from sparsetrain.core import config as config_module
from sparsetrain.core.anatomy import Anatomy
from sparsetrain.core.config import MethodConfig
from sparsetrain.core.errors import CheckpointError
from sparsetrain.hf.study.preview import preview
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.hf.train.pretrain import PretrainRecipe, Result, pretrain
from sparsetrain.runs.checkpoints import checkpoints
from sparsetrain.runs.manifest import read_json, verify_manifest
from sparsetrain.runs.progress import ProgressBar
from sparsetrain.surgery import method as method_module
from sparsetrain.surgery.method import Grown, Growth, Method, Origin, Stage, register_method
from tests.hf import runs

ROUTED = {"method": "routed_ffn", "num_blocks": 4, "num_active": 4, "partition": "clustered"}
TWO_FOUR = {"method": "semi_structured", "refresh_every": 1}


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    """Two growth methods, gone again afterwards."""
    _register()
    yield
    for name in ("test_widen", "test_v_cycle"):
        del config_module._REGISTRY[name], method_module._METHODS[name]


def _register() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Widen(MethodConfig, method="test_widen"):
        grows: ClassVar[bool] = True
        ffn_size: int = 32
        restart_lr: bool = False

    @dataclass(frozen=True, kw_only=True)
    class VCycle(MethodConfig, method="test_v_cycle"):
        grows: ClassVar[bool] = True
        alpha: float = 0.5

    halves = Stage(name="narrow", share=0.5)
    register_method(
        Widen,
        Method(
            growth=Growth(
                stages=lambda config: (halves, Stage(name="wide", share=0.5, restart_lr=config.restart_lr)),
                enter=_widen,
            )
        ),
    )
    thirds = tuple(Stage(name=name, share=1 / 3) for name in ("start", "small", "large"))
    register_method(VCycle, Method(growth=Growth(stages=lambda config: thirds, enter=_v_cycle)))


def _with_ffn(model: Any, ffn_size: int) -> nn.Module:
    return type(model)(type(model.config).from_dict({**model.config.to_dict(), "n_inner": ffn_size}))


def _widen(config: Any, stage: int, model: nn.Module, anatomy: Anatomy, kept: Any) -> Grown:
    """Half of the FFN at first; then new units with random inputs and silent outputs, so that the function stays."""
    new = _with_ffn(model, config.ffn_size * (stage + 1))
    fills = {name: None if "c_fc.weight" in name else 0.0 for name, _ in model.named_parameters()}
    return Grown(model=new, origins={name: Origin(name, fill) for name, fill in fills.items()})


def _v_cycle(
    config: Any, stage: int, model: nn.Module, anatomy: Anatomy, kept: MutableMapping[str, dict[str, Tensor]]
) -> Grown:
    """The whole model a little; then with units merged in pairs; then the whole one again, mixed with its start."""
    if stage == 0:
        return Grown(model=model)
    units = anatomy.ffns[0].ffn_size
    if stage == 1:
        kept["start"] = dict(model.named_parameters())
        maps = {name: lambda w, name=name: _merged(name, w) for name, _ in model.named_parameters()}
        return Grown(model=_with_ffn(model, units // 2), origins={n: Origin(n, map=m) for n, m in maps.items()})
    start = kept["start"]

    def mixed(name: str, w: Tensor) -> Tensor:
        return (1 - config.alpha) * start[name].to(w.device) + config.alpha * _split(name, w)

    origins = {name: Origin(name, map=lambda w, name=name: mixed(name, w)) for name, _ in model.named_parameters()}
    return Grown(model=_with_ffn(model, units * 2), origins=origins, optimizer="fresh")


def _merged(name: str, w: Tensor) -> Tensor:
    if "c_fc" in name:  # (hidden, units): outputs are averaged
        return w.unflatten(-1, (2, -1)).mean(-2)
    return w.unflatten(0, (2, -1)).sum(0) if "mlp.c_proj.weight" in name else w


def _split(name: str, w: Tensor) -> Tensor:
    if "c_fc" in name:
        return torch.cat([w, w], -1)
    return torch.cat([w, w], 0) / 2 if "mlp.c_proj.weight" in name else w


def recipe(folder: Path, *methods: dict[str, Any], **changes: Any) -> PretrainRecipe:
    """Twelve steps of a GPT-2 whose FFNs are 64 wide in the end."""
    return tiny_gpt(folder, {"n_inner": 64}, **{"methods": [{"method": "test_widen"}, *methods], **changes})


def tiny_gpt(folder: Path, sizes: dict[str, int], **changes: Any) -> PretrainRecipe:
    """Twelve steps of a GPT-2 of two layers, with a checkpoint after each."""
    folder.mkdir(exist_ok=True)
    values: dict[str, Any] = {
        "model": "gpt2-nano",
        "set": {"n_layer": 2, "n_embd": 16, "resid_pdrop": 0.1, **sizes},
        "data": str(runs.text(folder / "text", files=3, words=200)),
        "output": str(folder / "out"),
        "seq_len": 16,
        "batch_size": 2,
        "steps": 12,
        "lr": 1e-2,
        "eval_tokens": 64,
        "save_every": 1,
        "device": "cpu",
    }
    return PretrainRecipe.from_values(values | changes)


def named(asked: PretrainRecipe, output: str, **changes: Any) -> PretrainRecipe:
    return asked.model_copy(update={"output": str(Path(asked.output).parent / output), **changes})


def losses(result: Result) -> list[float | None]:
    return [row["loss"] for row in result.run["steps"]]


class Kill(TrainerCallback):
    """Dies as step `at` begins; nothing is cleaned up but what the run itself does."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            raise KeyboardInterrupt


def same_weights(one: Result, other: Result) -> bool:
    a, b = (GPT2LMHeadModel.from_pretrained(result.saved).state_dict() for result in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Look(TrainerCallback):
    """Notes, at each stage's two ends: the loss on one batch, the optimizer's state by name."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.moments: list[dict[str, dict[str, Tensor]]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(kwargs)

    def _look(self, given: dict[str, Any]) -> None:
        model, state = given["model"].eval(), given["optimizer"].state
        ids = torch.arange(32).view(2, 16)
        with torch.no_grad():
            self.losses.append(model(input_ids=ids, labels=ids).loss.item())
        self.moments.append({n: {k: v.clone() for k, v in state[p].items()} for n, p in model.named_parameters()})
        model.train()


def test_a_model_grows_in_mid_run_and_nothing_is_lost(tmp_path: Path) -> None:
    seen, events = Look(), []
    asked = recipe(tmp_path, save_every=0, warmup_steps=2)
    result = pretrain(asked, callbacks=[seen], report=events.append)
    _, before, after, _ = seen.losses
    assert after == pytest.approx(before, abs=1e-6)
    _, narrow, wide, end = seen.moments
    assert narrow.keys() == wide.keys()
    for name, old in narrow.items():
        new = wide[name]
        corner = tuple(slice(0, size) for size in old["exp_avg"].shape)
        assert new["step"] == old["step"] == 6
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(new[key][corner], old[key])
            rest = new[key].clone()
            rest[corner] = 0
            assert not rest.any()
    assert any((end[name]["exp_avg"].shape != narrow[name]["exp_avg"].shape) for name in end)
    first, second = result.run["stages"]  # type: ignore[typeddict-item]
    assert (first["name"], first["from_step"], first["to_step"]) == ("narrow", 0, 6)
    assert (second["name"], second["from_step"], second["to_step"]) == ("wide", 6, 12)
    assert first["parameters"] + 2 * 32 * (16 + 16 + 1) == second["parameters"] == result.parameters
    told = [(e["name"], e["index"], e["of"]) for e in events if e["event"] == "stage"]
    assert told == [("narrow", 0, 2), ("wide", 1, 2)]
    assert [row["step"] for row in result.run["steps"]] == list(range(1, 13))
    assert {event["steps"] for event in events if event["event"] == "step"} == {12}
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == ["checkpoint-6", "model"]
    loaded = GPT2LMHeadModel.from_pretrained(result.saved)
    assert loaded.transformer.h[0].mlp.c_fc.weight.shape == (16, 64)
    assert read_json(tmp_path / "out" / "result.json")["run"]["stages"] == [first, second]
    plain = pretrain(named(asked, "plain", methods=[]), write=False)
    rates, rows = (
        [[row[key] for row in r.run["steps"]] for r in (result, plain)]  # type: ignore[literal-required]
        for key in ("learning_rate", "tokens")
    )
    assert rates[0] == rates[1] and rows[0] == rows[1]
    assert "stages" not in plain.run and "kept" not in plain.run


@pytest.mark.parametrize("method", ["test_widen", "test_v_cycle"])
def test_killed_at_every_step_a_run_gives_the_same_losses(tmp_path: Path, method: str) -> None:
    """Twelve runs of one step each, so it takes longer than other tests."""
    asked = recipe(tmp_path, methods=[{"method": method}], grad_accum=2)
    whole = pretrain(named(asked, "whole", save_every=0), write=False)
    assert len(set(losses(whole))) == 12
    entered: list[int] = []
    for step in range(1, 12):
        told: list[dict[str, Any]] = []
        again = named(asked, "parts", resume=step > 1)
        with pytest.raises(KeyboardInterrupt):
            pretrain(again, callbacks=[Kill(step)], write=False, report=told.append)
        newest = checkpoints(again.output)[-1]
        manifest, progress = verify_manifest(newest), read_json(newest / "progress.json")
        stages = 2 if method == "test_widen" else 3
        stage = (step - 1) * stages // 12
        assert (manifest["step"], manifest["stage"], manifest["stage_step"]) == (
            step,
            stage,
            step - stage * 12 // stages,
        )
        assert progress["stage"] == stage and len(progress["run"]["stages"]) == stage + 1
        entered += [event["index"] for event in told if event["event"] == "stage"]
    last = pretrain(named(asked, "parts", resume=True), write=False)
    assert last.resumed_from == 11 and losses(last) == losses(whole) and same_weights(last, whole)
    assert last.run["stages"] == whole.run["stages"]  # type: ignore[typeddict-item]
    assert entered == sorted(entered) and set(entered) == set(range(stages))
    assert not (Path(last.saved).parent / ".entering").exists()


def test_a_run_goes_on_between_stages_and_before_and_after(tmp_path: Path) -> None:
    asked = recipe(tmp_path, methods=[{"method": "test_v_cycle"}], save_every=3)
    whole = pretrain(named(asked, "whole"), write=False)
    for stop, found in ((5, 4), (11, 9)):
        again = named(asked, f"stopped at {stop}")
        with pytest.raises(KeyboardInterrupt):
            pretrain(again, callbacks=[Kill(stop)], write=False)
        resumed = pretrain(again.model_copy(update={"resume": True}), write=False)
        assert resumed.resumed_from == found and losses(resumed) == losses(whole) and same_weights(resumed, whole)


def test_what_a_stage_kept_is_found_by_its_hash(tmp_path: Path) -> None:
    asked = recipe(tmp_path, methods=[{"method": "test_v_cycle"}])
    with pytest.raises(KeyboardInterrupt):
        pretrain(asked, callbacks=[Kill(8)], write=False)
    (file,) = (tmp_path / "out" / "kept").iterdir()
    content = file.read_bytes()
    assert read_json(tmp_path / "out" / "checkpoint-8" / "progress.json")["run"]["kept"]["start"].startswith(
        file.stem.removeprefix("start-")
    )
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"start-.*its content has changed"):
        pretrain(asked.model_copy(update={"resume": True}), write=False)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"start-.*A later stage needs it"):
        pretrain(asked.model_copy(update={"resume": True}), write=False)


@pytest.mark.parametrize("edit", [TWO_FOUR, ROUTED], ids=["2:4", "routed"])
def test_each_stage_is_converted_anew(tmp_path: Path, edit: dict[str, Any]) -> None:
    asked = recipe(tmp_path, edit, calibration_tokens=64)
    whole = pretrain(named(asked, "whole", save_every=0), write=False)
    sites = whole.sparsity["edits"]
    assert len(sites) == 2 and {row["method"] for row in sites} == {edit["method"]} and whole.plan == sites
    for stop in (6, 9):
        again = named(asked, f"stopped at {stop}")
        with pytest.raises(KeyboardInterrupt):
            pretrain(again, callbacks=[Kill(stop)], write=False)
        resumed = pretrain(again.model_copy(update={"resume": True}), write=False)
        assert resumed.resumed_from == stop and losses(resumed) == losses(whole)


def test_moments_of_units_that_a_conversion_had_moved_are_not_carried(tmp_path: Path) -> None:
    seen = Look()
    pretrain(recipe(tmp_path, ROUTED, calibration_tokens=64, save_every=0), callbacks=[seen], write=False)
    wide = seen.moments[2]
    assert wide["transformer.h.0.attn.c_attn.weight"]["step"] == 6
    assert not wide["transformer.h.0.mlp.c_fc.weight"]


def test_a_stage_may_begin_its_learning_rate_anew(tmp_path: Path) -> None:
    asked = recipe(tmp_path, methods=[{"method": "test_widen", "restart_lr": True}], warmup_steps=2)
    whole = pretrain(named(asked, "whole"), write=False)
    with pytest.raises(KeyboardInterrupt):
        pretrain(asked, callbacks=[Kill(8)], write=False)
    resumed = pretrain(asked.model_copy(update={"resume": True}), write=False)
    rates = [row["learning_rate"] for row in whole.run["steps"]]  # type: ignore[typeddict-item]
    short = pretrain(named(asked, "short", methods=[], steps=6), write=False)
    assert rates[6:] == [row["learning_rate"] for row in short.run["steps"]]  # type: ignore[typeddict-item]
    assert losses(resumed) == losses(whole)


def test_epochs_are_counted_over_the_whole_run(tmp_path: Path) -> None:
    asked = recipe(tmp_path, steps=None, epochs=1.5, batch_size=16, data=str(runs.text(tmp_path / "more", 4, 300)))
    whole = pretrain(named(asked, "whole"), write=False)
    steps = len(whole.run["steps"])
    assert whole.run["stages"][-1]["to_step"] == steps == preview(named(asked, "none")).steps  # type: ignore[typeddict-item]
    middle = whole.run["stages"][0]["to_step"]  # type: ignore[typeddict-item]
    for stop in (middle, steps - 1):
        again = named(asked, f"stopped at {stop}")
        with pytest.raises(KeyboardInterrupt):
            pretrain(again, callbacks=[Kill(stop)], write=False)
        assert losses(pretrain(again.model_copy(update={"resume": True}), write=False)) == losses(whole)


def test_a_preview_lists_the_stages(tmp_path: Path) -> None:
    asked = recipe(tmp_path)
    found = preview(asked)
    trained = pretrain(asked, write=False)
    assert found.stages == trained.run["stages"]  # type: ignore[typeddict-item]
    assert found.parameters == trained.parameters
    assert any(line.startswith("Stage   1 of 2, narrow: ") and "steps 1 to 6" in line for line in found.lines())
    assert any(line.startswith("Stage   2 of 2, wide: ") and "steps 7 to 12" in line for line in found.lines())


def test_a_run_without_growth_says_nothing_of_stages(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    pretrain(recipe(tmp_path, methods=[], steps=2), write=False, report=events.append)
    manifest = verify_manifest(tmp_path / "out" / "checkpoint-2")
    assert "stage" not in manifest and "stage" not in read_json(tmp_path / "out" / "checkpoint-2" / "progress.json")
    assert not any(event["event"] == "stage" for event in events)
    assert preview(recipe(tmp_path, methods=[], output=str(tmp_path / "new"))).stages == []


def test_what_cannot_grow_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'test_widen' and 'test_v_cycle' both make the models"):
        pretrain(recipe(tmp_path, {"method": "test_v_cycle"}))
    with pytest.raises(ValueError, match=r"stage 'narrow' gets 0 of steps=1"):
        pretrain(recipe(tmp_path, steps=1))
    with pytest.raises(ValueError, match=r"'wide' gets 6 of steps=12 and needs more than 7"):
        pretrain(recipe(tmp_path, methods=[{"method": "test_widen", "restart_lr": True}], warmup_steps=7))
    with pytest.raises(ValueError, match=r"'test_widen' makes models of other sizes.*Use pretrain"):
        finetune(runs.recipe(tmp_path / "fine", methods=[{"method": "test_widen"}]))
    assert not (tmp_path / "out").exists() and not (tmp_path / "fine" / "out").exists()


def test_a_bar_names_the_stage() -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    bar = ProgressBar(console)
    bar({"event": "stage", "name": "large", "index": 1, "of": 3})
    bar({"event": "step", "step": 5, "steps": 9, "loss": 1.0, "tokens": 8, "step_time_s": 1.0, "memory_bytes": None})
    assert "training, stage 2 of 3: large" in console.file.getvalue()  # type: ignore[attr-defined]
    (task,) = bar._progress.tasks
    assert task.description == "training, stage 2 of 3: large"
