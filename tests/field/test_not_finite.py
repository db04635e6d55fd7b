"""A number that is not finite stops a run at once, is named, and never comes into a checkpoint that is called good."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from sparsetrain.core.errors import CheckpointError, NotFinite
from sparsetrain.core.metrics import METRICS
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.hf.train.finite import FiniteCallback
from sparsetrain.runs.checkpoints import begin_checkpoint, checkpoints, complete_checkpoint, find_resumable
from sparsetrain.runs.finite import not_finite
from sparsetrain.runs.layout import PROGRESS
from sparsetrain.runs.manifest import write_json, write_manifest
from sparsetrain.runs.sidecar import STATE
from tests.hf import runs


class Break(TrainerCallback):
    """Does something to the training at the end of step 3, or before its update."""

    def __init__(self, spoil: Callable[..., None], before_update: bool = False) -> None:
        self.spoil, self.before_update = spoil, before_update

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == 2 and not self.before_update:
            self.spoil(given["model"], given["optimizer"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == 2 and self.before_update:
            self.spoil(given["model"], given["optimizer"])


def trained(model: nn.Module) -> tuple[str, nn.Parameter]:
    return next((name, p) for name, p in model.named_parameters() if p.requires_grad)


def spoiled_parameter(model: nn.Module, optimizer: Any) -> None:
    trained(model)[1].data.view(-1)[0] = -math.inf


def spoiled_gradient(model: nn.Module, optimizer: Any) -> None:
    trained(model)[1].register_hook(lambda grad: grad * math.nan)


def spoiled_moment(model: nn.Module, optimizer: Any) -> None:
    optimizer.state[trained(model)[1]]["exp_avg_sq"].view(-1)[0] = math.inf


@pytest.mark.parametrize(
    ("spoil", "before_update", "said"),
    [
        (spoiled_parameter, False, r"^parameter .*lora_A.* is not finite after step 3: .*checkpoint-2\.$"),
        (spoiled_parameter, True, r"^the loss is nan and the gradient's norm is nan and parameter .* after step 3: "),
        (spoiled_gradient, True, r"^the gradient's norm is nan and parameter .* after step 3: .*checkpoint-2\.$"),
        (spoiled_moment, False, r"^the optimizer's state in .*checkpoint-3.* after step 3: .*checkpoint-2\.$"),
    ],
)
def test_a_run_stops_at_the_step_and_what_was_good_stays(
    spoil: Any, before_update: bool, said: str, tmp_path: Path
) -> None:
    recipe = runs.recipe(tmp_path, save_every=1, eval_tokens=64, dtype="fp32")
    events: list[dict[str, Any]] = []
    with pytest.raises(NotFinite, match=said):
        finetune(recipe, callbacks=[Break(spoil, before_update)], report=events.append)
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-1", "checkpoint-2"]
    assert all(math.isfinite(event["loss"]) for event in events if event["event"] == "step")
    found = find_resumable(tmp_path / "out", recipe)
    assert found is not None and found.step == 2
    for file in (tmp_path / "out").rglob("*.json"):
        json.loads(file.read_text(), parse_constant=pytest.fail)


def test_a_model_that_is_broken_from_the_start_is_said_before_training(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(recipe.model)
    model.model.norm.weight.data.fill_(3e38)  # every weight is a number, and what comes out is none
    model.save_pretrained(recipe.model)
    with pytest.raises(NotFinite, match=r"dense model before training: the held-out loss is nan in rows 1 to 2"):
        finetune(recipe)
    assert not (tmp_path / "out").exists()


def test_auxiliary_losses_are_named_with_their_site() -> None:
    site = SimpleNamespace(stats=lambda: {"codebook_loss": math.inf, "load": math.nan})
    handle: Any = SimpleNamespace(installed=[(SimpleNamespace(key="layers.3/pq"), site)])
    model = nn.Linear(2, 2)
    logs = {"loss": 1.0, "grad_norm": math.inf}
    with pytest.raises(NotFinite, match=r"^the auxiliary loss codebook_loss of layers\.3/pq is inf and the gradient's"):
        FiniteCallback(handle).on_log(
            SimpleNamespace(output_dir="absent"),  # type: ignore[arg-type]
            SimpleNamespace(global_step=4),  # type: ignore[arg-type]
            SimpleNamespace(),  # type: ignore[arg-type]
            logs=logs,
            model=model,
        )


def written(folder: Path, recipe: Any, **tensors: dict[str, torch.Tensor]) -> Path:
    begin_checkpoint(folder, recipe)
    write_json(folder / PROGRESS, {})
    for name, values in tensors.items():
        save_file(values, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_checkpoint_with_such_a_tensor_is_never_whole(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    if dtype == torch.float8_e4m3fn and not math.isnan(value):
        return  # it has no infinity
    recipe = runs.recipe(tmp_path)
    tensors = {"fine": torch.ones(3), "bad": torch.tensor([1.0, value]).to(dtype), "ids": torch.arange(3)}
    folder = written(tmp_path / "checkpoint-2", recipe, model=tensors)
    with pytest.raises(NotFinite, match=r"^bad in .*No checkpoint was written before"):
        complete_checkpoint(folder, 2, data="d")
    assert not folder.exists()


def test_what_methods_keep_may_be_infinite_but_not_undefined(tmp_path: Path) -> None:
    folder = written(tmp_path / "checkpoint-2", runs.recipe(tmp_path))
    gaps = torch.tensor([[1.0, math.nan]], dtype=torch.float64)
    save_file({"site/least": torch.tensor([math.inf]), "site/history": gaps}, folder / STATE)
    assert not_finite(folder) is None
    save_file({"site/least": torch.tensor([math.nan])}, folder / STATE)
    assert str(not_finite(folder)).startswith("site/least in ")


def test_a_whole_checkpoint_that_is_not_finite_is_not_resumed(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path)
    folder = written(tmp_path / "out" / "checkpoint-2", recipe, model={"w": torch.ones(3)})
    about = {"fingerprint": recipe.fingerprint(), "training_values": recipe.training_values()}
    complete_checkpoint(folder, 2, data="d", **about)
    found = find_resumable(tmp_path / "out", recipe)
    assert found is not None and found.step == 2
    tensors = load_file(folder / "model.safetensors")
    tensors["w"][1] = math.nan
    save_file(tensors, folder / "model.safetensors")
    write_manifest(folder, step=2, data="d", **about)  # as an earlier version wrote it
    with pytest.raises(CheckpointError, match=r"w in .* is not finite.*Remove .*checkpoint-2 to resume"):
        find_resumable(tmp_path / "out", recipe)


def test_a_huge_finite_loss_has_a_perplexity_that_is_said_to_be_more() -> None:
    metric = METRICS["perplexity"]
    assert metric.of_loss is not None
    value = metric.of_loss(5000.0)
    assert math.isfinite(value) and metric.text(value) == "over 8.218e+307"
    assert metric.text(metric.of_loss(2.0)) == "7.389" and metric.text(metric.of_loss(60.0)) == "1.142e+26"
