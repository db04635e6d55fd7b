"""Runs with Monarch linears: resumed equal, saved plainly, multiplied out in mid-run and at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from sparsetrain.hf.model.io import export, load
from sparsetrain.hf.study.recipe_trace import outline
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.hf.train.pretrain import PretrainRecipe, pretrain
from tests.cli.conftest import Call, call, text, write_text  # noqa: F401
from tests.families import llama_config
from tests.hf import runs
from tests.hf.test_stages import Kill, losses, named, same_weights
from tests.hf.test_stages import recipe as staged

BLOCKS = {"num_blocks": 2, "force": True}
PROJECTED = {"method": "monarch", **BLOCKS}
DRAWN = {**PROJECTED, "init": "matched"}
SWITCHED = {"method": "monarch_then_dense", **BLOCKS, "dense_share": 0.5}


def recipe(folder: Path, method: dict[str, Any], **changes: Any) -> PretrainRecipe:
    return staged(folder, methods=[method], save_every=2, **changes)


def ids() -> torch.Tensor:
    return torch.arange(4, 18)[None]


@pytest.mark.parametrize("method", [DRAWN, SWITCHED], ids=["monarch", "then dense"])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(method: dict[str, Any], tmp_path: Path) -> None:
    """Five runs of up to twelve steps: some seconds."""
    whole = pretrain(named(recipe(tmp_path, method), "whole", save_every=0), write=False)
    for stop in (5, 7):  # before the switch and after it
        again = named(recipe(tmp_path, method), f"stopped at {stop}")
        with pytest.raises(KeyboardInterrupt):
            pretrain(again, callbacks=[Kill(stop)], write=False)
        resumed = pretrain(again.model_copy(update={"resume": True}), write=False)
        assert losses(resumed) == losses(whole) and same_weights(resumed, whole)


def test_what_is_saved_loads_plainly_and_as_it_was_trained(tmp_path: Path) -> None:
    done = pretrain(recipe(tmp_path, DRAWN), write=False)
    loaded, plain = load(done.saved), GPT2LMHeadModel.from_pretrained(done.saved).eval()
    assert loaded.handle is not None and len(loaded.handle.sites("monarch")) == 8
    with torch.no_grad():
        expected = loaded.model.eval()(input_ids=ids()).logits
        torch.testing.assert_close(plain(input_ids=ids()).logits, expected, rtol=1e-4, atol=1e-5)
        kept = load(export(done.saved, tmp_path / "sparse"))
        assert kept.handle is not None and torch.equal(kept.model.eval()(input_ids=ids()).logits, expected)
        out = export(done.saved, tmp_path / "plain", format="multiplied")
        assert load(out).handle is None
        written = AutoModelForCausalLM.from_pretrained(out).eval()
        torch.testing.assert_close(written(input_ids=ids()).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"cannot be merged.*multiplied"):
        export(done.saved, tmp_path / "dense", format="dense")


def test_a_run_frees_what_was_replaced_and_its_optimizer_holds_the_factors_alone(tmp_path: Path) -> None:
    done = pretrain(recipe(tmp_path, DRAWN), write=False)
    dense = pretrain(named(recipe(tmp_path, DRAWN), "dense", methods=[]), write=False)
    saved = -sum(row["added_params"] for row in done.plan)
    assert saved > 0 and dense.parameters - done.parameters == saved
    ours, theirs = (result.run["static_bytes"] for result in (done, dense))  # type: ignore[typeddict-item]
    steps = 4 * 16  # Adam counts steps for each tensor: q, k, v are six instead of one, other linears two
    assert theirs["optimizer_trainable"] - ours["optimizer_trainable"] == 8 * saved - steps
    assert theirs["parameters_trainable"] - ours["parameters_trainable"] == 4 * saved


def test_the_dense_half_is_a_dense_model_and_says_when_it_began(tmp_path: Path) -> None:
    done = pretrain(recipe(tmp_path, SWITCHED), write=False)
    stages = done.run["stages"]  # type: ignore[typeddict-item]
    assert [(stage["name"], stage["from_step"]) for stage in stages] == [("monarch", 0), ("dense", 6)]
    assert stages[0]["parameters"] < stages[1]["parameters"] == done.parameters
    assert load(done.saved).handle is None
    kinds = {type(module).__name__ for module in GPT2LMHeadModel.from_pretrained(done.saved).modules()}
    assert "MonarchSite" not in kinds


def test_a_trained_model_is_projected_and_trained_on(tmp_path: Path) -> None:
    done = finetune(runs.recipe(tmp_path, methods=[{**PROJECTED, "keep_ratio": 0.5}], lora_r=0), write=False)
    perplexity: Any = done.run["perplexity"]  # type: ignore[typeddict-item]
    assert perplexity["after_conversion"] != perplexity["dense"]
    assert perplexity["after_training"] < perplexity["after_conversion"]
    assert all(0 < stats["relative_error"] < 1 for stats in done.sparsity["stats"].values())
    whole = losses(done)  # type: ignore[arg-type]
    again = runs.recipe(tmp_path, methods=[{**PROJECTED, "keep_ratio": 0.5}], lora_r=0, output=str(tmp_path / "again"))
    with pytest.raises(KeyboardInterrupt):
        finetune(again, callbacks=[Kill(3)], write=False)
    assert losses(finetune(again.model_copy(update={"resume": True}), write=False)) == whole  # type: ignore[arg-type]


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="deploy=sparse"):
        finetune(runs.recipe(tmp_path, methods=[PROJECTED], lora_r=0, deploy="dense"))
    up = {**PROJECTED, "roles": ["up"]}
    with pytest.raises(ValueError, match=r"lora.*PEFT wraps none of its linears.*lora_r=0"):
        finetune(runs.recipe(tmp_path, methods=[up], lora_r=4))
    with pytest.raises(ValueError, match=r"monarch leaves no linear for LoRA\. Set lora_r=0"):
        outline(runs.recipe(tmp_path, methods=[PROJECTED], lora_r=4), llama_config(), bf16=False)
    with pytest.raises(ValueError, match="monarch_then_dense"):
        finetune(runs.recipe(tmp_path, methods=[SWITCHED], lora_r=0))


def test_from_the_command_line(call: Call, text: Path, tmp_path: Path) -> None:  # noqa: F811
    tiny = ("--model", "gpt2-nano", "--set", "n_layer=2", "--set", "n_embd=32", "--seq-len", 64, "--batch-size", 2)
    short = ("--steps", 3, "--eval-tokens", 512, "--device", "cpu", "--data", text)
    given = "num_blocks=2,force=true"
    for name, own in {"m": "monarch:init=matched", "s": "monarch_then_dense:dense_share=0.5"}.items():
        method = f"{own},{given}"
        done = call("pretrain", *tiny, *short, "--method", method, "--output", tmp_path / name)
        assert done.code == 0, done.err
        assert call("eval", tmp_path / name).code == 0
    flags = ("--output", tmp_path / "out", "--format", "multiplied")
    assert call("export", tmp_path / "m", *flags).code == 0
    refused = call("pretrain", *tiny, *short, "--method", "monarch:num_blocks=64", "--output", tmp_path / "no")
    assert refused.code == 2 and "It must lie between 1 and 32" in refused.err
