"""Runs with a concept bottleneck: what trains, resumed equal, saved and loaded, planned, explained."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig

from sparsetrain.hf.model.io import load
from sparsetrain.hf.model.models import add_lora, empty_model, trained_of
from sparsetrain.hf.study.recipe_trace import outline
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.measure.memory import static_memory
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.surgery.apply import sparsify
from sparsetrain.surgery.method import blank_state
from sparsetrain.surgery.plan import plan
from tests.cli.conftest import Call, call  # noqa: F401
from tests.families import HIDDEN
from tests.hf import runs
from tests.hf.test_finetune import labelled
from tests.hf.test_stages import Kill, losses

CONCEPTS = ("sun", "moon", "red", "green")
METHOD = {"method": "concept_bottleneck", "concepts": list(CONCEPTS), "classes": ["sun", "moon"], "l1": 0.05}


def recipe(folder: Path, name: str = "out", **changes: Any) -> Recipe:
    if not (folder / "model").exists():
        runs.bert(folder / "model")
        labelled(folder / "day.csv")
    values = {"data": str(folder / "day.csv"), "task": "classify", "seq_len": 16, "batch_size": 8, "steps": 8}
    values |= {"methods": [METHOD], "lora_r": None, "lr": 1e-2, "output": str(folder / name), "dtype": "fp32"}
    values |= {"calibration_tokens": 128, "save_every": 3, "deploy": None}
    return runs.recipe(folder, **(values | changes))


def stripped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if "concept" not in name and "classifier" not in name}


def test_the_layers_alone_train_and_what_is_saved_is_what_was_trained(tmp_path: Path) -> None:
    asked = recipe(tmp_path, steps=20, save_every=0)
    done = finetune(asked, write=False)
    accuracy: Any = done.run["accuracy"]  # type: ignore[typeddict-item]
    assert done.trainable_parameters == 4 * 4 + 2 * 4
    assert accuracy["after_training"] > accuracy["after_conversion"] - 0.01
    loaded = load(tmp_path / "out")
    assert loaded.handle is not None
    (site,) = loaded.handle.sites("concept_bottleneck").values()
    assert site.config.concepts == CONCEPTS and site.center.any()
    base = load_file(tmp_path / "model" / "model.safetensors")
    kept = stripped(loaded.model.state_dict())
    ours = [name for name in kept if name in base]
    assert ours and all(torch.equal(kept[name], base[name]) for name in ours)


@pytest.mark.parametrize("loss", ["l1", "gumbel"])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(loss: str, tmp_path: Path) -> None:
    methods = [{**METHOD, "loss": loss}]
    whole = finetune(recipe(tmp_path, "whole", methods=methods), write=False)
    again = recipe(tmp_path, "again", methods=methods)
    with pytest.raises(KeyboardInterrupt):
        finetune(again, callbacks=[Kill(5)], write=False)
    resumed = finetune(again.model_copy(update={"resume": True}), write=False)
    assert losses(resumed) == losses(whole)  # type: ignore[arg-type]
    ours, theirs = (load_file(Path(result.saved) / "model.safetensors") for result in (resumed, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_plan_knows_its_bytes() -> None:
    config = BertConfig(
        vocab_size=97, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    asked = Recipe.from_values(
        {"model": "tiny", "data": "none", "task": "classify", "methods": [METHOD], "seq_len": 64, "lora_r": 0}
    )
    found = outline(asked, config, bf16=False, lengths=(64,)).static
    model: Any = AutoModelForSequenceClassification.from_config(config)
    handle = sparsify(model, *asked.configs, state=blank_state(plan(model, *asked.configs).edits))
    assert trained_of(model, asked, ["classifier"]) == [], "the new head is not what trains"
    model = add_lora(model, asked, handle, ["classifier"]).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids = torch.arange(4, 68)[None].repeat(2, 1)
    model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    real = static_memory(model, optimizer)
    assert found.parameters_trainable == real.parameters_trainable == 4 * (4 * 4 + 2 * 4)
    assert found.parameters_frozen == real.parameters_frozen
    assert found.gradients == real.gradients and found.optimizer == real.optimizer_trainable
    assert "concept_bottleneck" in str(plan(empty_model(config, "classify"), *asked.configs))


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_from_the_command_line(call: Call, tmp_path: Path) -> None:  # noqa: F811
    recipe(tmp_path)
    (tmp_path / "concepts.txt").write_text("\n".join(CONCEPTS))
    out = tmp_path / "run"
    shared = ("--model", tmp_path / "model", "--data", tmp_path / "day.csv", "--task", "classify", "--seq-len", 16)
    short = ("--steps", 3, "--batch-size", 8, "--device", "cpu", "--output", out)
    method = f"concept_bottleneck:concepts={tmp_path / 'concepts.txt'},loss=l1"
    done = call("finetune", *shared, *short, "--method", method)
    assert done.code == 0, done.err
    assert call("eval", out).code == 0
    evil = "the <script>alert(1)</script> sun & moon"
    said = call("explain", out, evil, "the red moon", "--top", 2)
    assert said.code == 0 and "sum: the lead" in said.out and "the other 2, together" in said.out, said.err
    page = Page((out / "explanation.html").read_text())
    assert "script" not in page.tags and "link" not in page.tags and not page.links and evil in page.words
    answer = json.loads(call("explain", out, "the red moon", "--json", "--output", tmp_path / "e.html").out)
    (each,) = answer["explanations"]
    assert each["decided"] in ("day", "night") and len(each["concepts"]) == 4
    assert sum(part["lead"] for part in each["concepts"]) + each["rest"] == pytest.approx(each["lead"])
    for part in each["concepts"]:
        assert set(part["contributions"]) == {"day", "night"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "lm", "seq_len": 64}, "has none. Load an encoder"),
        ({"lora_r": 2}, "lora.*Set lora_r=0"),
        ({"methods": ["concept_bottleneck"]}, "no concepts are given"),
        ({"deploy": "dense"}, "deploy=sparse"),
        ({"methods": [{**METHOD, "classes": ["a", "b", "c"]}]}, "3 classes are described"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    if changes.get("task") == "lm":
        runs.llama(tmp_path / "model")
        labelled(tmp_path / "day.csv")
    with pytest.raises(ValueError, match=message):
        finetune(recipe(tmp_path, **changes), write=False)


def test_what_cannot_be_explained_is_refused(call: Call, tmp_path: Path) -> None:  # noqa: F811
    finetune(recipe(tmp_path, methods=[], lora_r=0, steps=1, save_every=0, deploy="sparse"), write=False)
    said = call("explain", tmp_path / "out", "the sun")
    assert said.code == 2 and "was not trained with a method that explains" in said.err
    finetune(recipe(tmp_path, "run", steps=1, save_every=0), write=False)
    said = call("explain", tmp_path / "run", "the sun", "  ")
    assert said.code == 2 and "empty" in said.err
    said = call("explain", tmp_path / "run", "the sun", "--output", tmp_path / "page.pdf")
    assert said.code == 2 and ".html" in said.err
