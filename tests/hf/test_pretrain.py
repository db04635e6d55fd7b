"""pretrain(): every kind of task and method from random weights, resumed across switches, and what it refuses."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from sparsetrain.core.errors import CheckpointError
from sparsetrain.hf.data import DataBundle
from sparsetrain.hf.data.byte_tokens import byte_tokenizer
from sparsetrain.hf.model.classifier import EncoderClassifier
from sparsetrain.hf.model.io import export, load
from sparsetrain.hf.study.compare import compare
from sparsetrain.hf.study.preview import preview
from sparsetrain.hf.train import pretrain_data
from sparsetrain.hf.train.pretrain import PretrainRecipe, pretrain
from sparsetrain.hf.train.run import Result
from sparsetrain.runs.pictures import read_galleries
from tests.hf import runs

FLOOD = {"method": "flood_fill_attention", "block_tokens": 8, "filter_edge": 5, "keep_ratio": 0.3, "probe_every": 1}
FLOOD |= {"change_threshold": 0, "max_dense_steps": 4}
TWO_FOUR = {"method": "semi_structured", "refresh_every": 1, "dense_tail_ratio": 0.5}
TINY = {
    "gpt2-nano": {"n_layer": 2, "n_embd": 32},
    "sequence-encoder": {"hidden_size": 32, "intermediate_size": 32},
    "vit-nano": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "image_size": 8, "patch_size": 2},
}


def recipe(folder: Path, model: str, /, **changes: Any) -> PretrainRecipe:
    values = {
        "model": model,
        "set": TINY.get(model, {}),
        "output": str(folder / "out"),
        "seq_len": 32,
        "batch_size": 4,
        "steps": 8,
        "eval_tokens": 256,
        "save_every": 0,
        "device": "cpu",
    }
    return PretrainRecipe.from_values(values | changes)


def text(folder: Path, **changes: Any) -> PretrainRecipe:
    return recipe(folder, "gpt2-nano", **{"data": str(runs.text(folder / "text", files=4, words=400))} | changes)


def labelled(folder: Path, **changes: Any) -> PretrainRecipe:
    """Texts whose label their first letters tell."""
    rows = [{"text": f"{'ab'[i % 2]}{'xy'[i % 2] * (i % 40)} {i}", "label": "ab"[i % 2]} for i in range(60)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    values = {"data": str(folder / "rows.jsonl"), "task": "classify"}
    return recipe(folder, "sequence-encoder", **values | changes)


def images(folder: Path, **changes: Any) -> PretrainRecipe:
    """Images of 8 x 8, as bright as their label says."""
    for prefix, count in (("train", 32), ("t10k", 8)):
        labels = (np.arange(count) % 2).astype(np.uint8)
        pixels = np.repeat(labels * 200, 64).reshape(count, 8, 8).astype(np.uint8)
        for name, array in ((f"{prefix}-images-idx3", pixels), (f"{prefix}-labels-idx1", labels)):
            header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return recipe(folder, "vit-nano", **{"data": str(folder), "task": "image", "output": str(folder / "out")} | changes)


def losses(result: Result) -> list[float | None]:
    return [row["loss"] for row in result.run["steps"]]


class StopAt(TrainerCallback):
    """Dies at the start of a step, as a run that is killed does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_language_model_on_bytes_learns_and_is_on_record(tmp_path: Path) -> None:
    asked = text(tmp_path, methods=[TWO_FOUR], eval_every=4, grad_accum=2, lr=1e-2, dtype="fp32")
    result = pretrain(asked)
    stages = result.run["perplexity"]  # type: ignore[typeddict-item]
    assert list(stages) == ["untrained", "after_training"] and 200 < stages["untrained"] < 400  # type: ignore[operator]
    assert stages["after_training"] < 0.5 * stages["untrained"]  # type: ignore[operator]
    assert [point["step"] for point in result.run["evals"]] == [0, 4, 8]  # type: ignore[typeddict-item]
    assert [row["tokens"] for row in result.run["steps"]] == [2 * 4 * 32] * 8
    assert PretrainRecipe.from_yaml(tmp_path / "out" / "recipe.yaml") == asked
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Random weights" in page and '<section id="flips">' in page
    flips = read_galleries(tmp_path / "out")[0].pictures[0].curves
    assert [step for step, _ in flips["transformer.h.0.mlp"]] == [0, 1, 2, 3]
    loaded = load(tmp_path / "out")
    assert loaded.task == "lm" and loaded.tokenizer.decode(loaded.tokenizer("sun é")["input_ids"]) == "sun é"


@pytest.mark.parametrize("method", [None, FLOOD, TWO_FOUR], ids=["dense", "flood", "2:4"])
@pytest.mark.parametrize("build", [labelled, images])
def test_classifiers_of_texts_and_images_reload_to_the_same_outputs(tmp_path: Path, build: Any, method: Any) -> None:
    result = pretrain(build(tmp_path, methods=[] if method is None else [method]), write=False)
    assert 0 <= result.run["accuracy"]["after_training"] <= 1  # type: ignore[typeddict-item, operator]
    loaded = load(tmp_path / "out")
    assert (loaded.handle is None) == (method is None)
    inputs = {"input_ids": torch.randint(2, 250, (2, 32))}
    if build is images:
        inputs = {"pixel_values": torch.randn(2, 1, 8, 8)}
        assert result.run["steps"][0]["tokens"] == 4 * 17
    before = loaded.model(**inputs).logits
    export(tmp_path / "out", tmp_path / "exported")
    assert torch.equal(before, load(tmp_path / "exported").model(**inputs).logits)


def test_a_dense_export_is_read_by_the_class_it_names(tmp_path: Path) -> None:
    pretrain(labelled(tmp_path), write=False)
    export(tmp_path / "out", tmp_path / "exported", format="dense")
    model = EncoderClassifier.from_pretrained(tmp_path / "exported").eval()
    ids = torch.randint(2, 250, (2, 32))
    assert torch.equal(model(ids).logits, load(tmp_path / "out").model(ids).logits)
    assert isinstance(load(tmp_path / "exported").model, EncoderClassifier)


def test_padding_changes_no_pooled_output(tmp_path: Path) -> None:
    pretrain(labelled(tmp_path), write=False)
    model = load(tmp_path / "out").model
    ids = torch.randint(2, 250, (1, 20))
    padded = torch.cat([ids, torch.zeros(1, 12, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(padded, (padded > 0).long()).logits, model(ids, torch.ones_like(ids)).logits)


def test_pairs_are_read_by_one_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bundle(DataBundle):
        vocab_size, kind = 9, "pairs"

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
        masks = {
            key.replace("input_ids", "attention_mask"): torch.ones_like(batch[key]) for key in batch if "ids" in key
        }
        return batch | masks

    drawn = np.random.default_rng(0).integers(1, 9, (2, 24, 32))
    labels = [i % 2 for i in range(24)]
    rows = Dataset.from_dict({"input_ids": drawn[0], "input_ids_b": drawn[1], "labels": labels})
    bundle = Bundle(train=rows, eval=rows, collate_fn=collate, description="pairs", label_names=("no", "yes"))
    monkeypatch.setattr(pretrain_data, "load_task", lambda name, **options: bundle)
    result = pretrain(recipe(tmp_path, "sequence-encoder", data="retrieval", task="pairs"), write=False)
    model = load(tmp_path / "out").model
    assert model.head[0].in_features == 4 * 32 and result.run["steps"][0]["tokens"] == 2 * 4 * 32
    x, y = (torch.tensor(side[:3]) for side in drawn)
    forth, back = model._pool(x, None), model._pool(y, None)
    features = torch.cat([forth, back, forth * back, forth - back], dim=-1)
    torch.testing.assert_close(model(x, input_ids_b=y).logits, model.head(features))


@pytest.mark.parametrize(
    ("data", "seq_len"), [("listops", 60), ("text", 60), ("retrieval", 60), ("pixels", 196), ("pathfinder", 256)]
)
def test_every_task_trains_across_a_switch(tmp_path: Path, data: str, seq_len: int) -> None:
    """Most of these lengths are no multiple of the block: the last one is padded, as are the probe rows."""
    task = "pairs" if data == "retrieval" else "classify"
    options = {"seq_len": seq_len, "eval_tokens": 4 * seq_len, "train_rows": 200, "methods": [FLOOD]}
    result = pretrain(recipe(tmp_path, "sequence-encoder", data=data, task=task, **options), write=False)
    assert all(np.isfinite(loss) for loss in losses(result))  # type: ignore[arg-type]
    densities = [site["density"] for site in result.sparsity["stats"].values()]
    assert densities and all(0 < density <= 0.3 for density in densities)
    assert 0 <= result.run["accuracy"]["after_training"] <= 1  # type: ignore[typeddict-item, operator]


def test_a_model_that_is_saved_under_older_names_is_resumed(tmp_path: Path) -> None:
    asked = images(tmp_path, save_every=1, steps=4)
    whole = pretrain(asked.model_copy(update={"output": str(tmp_path / "whole"), "save_every": 0}), write=False)
    with pytest.raises(KeyboardInterrupt):
        pretrain(asked, callbacks=[StopAt(2)], write=False)
    resumed = pretrain(asked.model_copy(update={"resume": True}), write=False)
    assert resumed.resumed_from == 2 and losses(resumed) == losses(whole)
    weights = [load(tmp_path / name).model.state_dict() for name in ("out", "whole", "out/checkpoint-4")]
    assert all(torch.equal(weights[0][name], other[name]) for other in weights[1:] for name in weights[0])


@pytest.mark.parametrize("stop", [3, 4, 5], ids=["before the switch", "at it", "after it"])
@pytest.mark.parametrize("method", [FLOOD, TWO_FOUR], ids=["flood", "2:4"])
def test_resumed_runs_give_the_same_losses(tmp_path: Path, method: dict[str, Any], stop: int) -> None:
    asked = text(tmp_path, methods=[method], save_every=1, set=TINY["gpt2-nano"] | {"resid_pdrop": 0.1})
    whole = pretrain(asked.model_copy(update={"output": str(tmp_path / "whole"), "save_every": 0}), write=False)
    with pytest.raises(KeyboardInterrupt):
        pretrain(asked, callbacks=[StopAt(stop)], write=False)
    resumed = pretrain(asked.model_copy(update={"resume": True}), write=False)
    assert resumed.resumed_from == stop and losses(resumed) == losses(whole)
    changed = asked.model_copy(update={"resume": True, "lr": 0.5, "output": str(tmp_path / "other")})
    with pytest.raises(KeyboardInterrupt):
        pretrain(asked.model_copy(update={"output": str(tmp_path / "other")}), callbacks=[StopAt(2)], write=False)
    with pytest.raises(CheckpointError, match=r"lr: 0\.001 there, 0\.5 here"):
        pretrain(changed)


def test_compared_with_its_dense_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides are processes of their own: some ten seconds, which importing torch takes."""
    runs.time_nothing_more(monkeypatch)
    made = compare(text(tmp_path, methods=[FLOOD]))
    first = [[row["loss"] for row in side["run"]["steps"]][:4] for side in (made.sparse, made.dense)]
    assert first[0] == first[1]  # the same start, rows and order, until attention turns sparse
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert '<section id="patterns">' in page
    quantities = {judgement["quantity"] for judgement in made.report["judgements"]}
    assert {"loss_at_equal_steps", "loss_at_equal_time"} <= quantities
    assert len(read_galleries(tmp_path / "out")[0].pictures) == 2
    assert any("before the change" in note for note in made.report["notes"])


def test_optimizer_and_clipping_are_as_asked(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen["groups"] = kwargs["optimizer"].param_groups
            seen["largest"] = max(float(p.grad.abs().max()) for p in kwargs["model"].parameters())

    asked = labelled(tmp_path, beta2=0.95, eps=1e-6, weight_decay=0.1, clip_value=1e-4, max_grad_norm=0, steps=2)
    pretrain(asked, callbacks=[Look()], write=False)
    decayed, other = seen["groups"]
    assert decayed["betas"] == (0.9, 0.95) and decayed["eps"] == 1e-6
    assert decayed["weight_decay"] == 0.1 and other["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in other["params"])
    assert 0 < seen["largest"] <= 1e-4


def test_a_cosine_ends_where_it_is_told_to(tmp_path: Path) -> None:
    result = pretrain(text(tmp_path, lr=0.01, min_lr_ratio=0.1, steps=4), write=False)
    rates = [row["learning_rate"] for row in result.run["steps"]]  # type: ignore[typeddict-item]
    assert rates[0] == 0.01 and 0.001 < rates[-1] < 0.003 and rates == sorted(rates, reverse=True)


def test_bytes_are_the_tokens() -> None:
    made = byte_tokenizer()
    ids = made("naïve\n→")["input_ids"]
    assert len(ids) == len("naïve\n→".encode()) and made.decode(ids) == "naïve\n→" and len(made) == 258


def test_a_preview_writes_nothing(tmp_path: Path) -> None:
    found = preview(text(tmp_path, methods=[TWO_FOUR]))
    assert found.tokens_per_step == 4 * 32 and found.trainable_parameters == found.parameters
    assert any("all weights" in line for line in found.lines()) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gpt2-nan"}, "Did you mean 'gpt2-nano'"),
        ({"set": {"n_layr": 3}}, "Did you mean 'n_layer'"),
        ({"set": {"n_layer": "three"}}, "n_layer"),
        ({"seq_len": 2000}, "longer than the 1,024 positions"),
        ({"model": "sequence-encoder", "set": {}}, "no language model"),
        ({"model": "vit-nano", "set": {}}, "reads images"),
        ({"task": "image"}, "reads tokens"),
        ({"task": "pairs", "model": "sequence-encoder", "set": {}}, "has no pairs"),
        ({"data": "fashion-mnist"}, "data=pixels"),
        ({"data": "listops"}, "is for task=classify"),
        ({"data": "listops", "task": "classify", "tokenizer": "x"}, "is no text"),
        ({"task": "classify", "methods": ["token_selection:pool=targets"]}, "one a text"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pretrain(text(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_dekay": 1}, "Did you mean 'weight_decay'"),
        ({"preset": "spt"}, "unknown key 'preset'"),
        ({"set": ["n_layer"]}, "has no key and '='"),
        ({"min_lr_ratio": 0.1, "lr_schedule": "linear"}, "lr_schedule=cosine"),
    ],
)
def test_wrong_keys_are_named(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainRecipe.from_values({"model": "gpt2-nano", "data": "d"} | changes)


def test_a_held_out_row_past_the_pattern_is_refused_before_the_training(tmp_path: Path) -> None:
    options = {"data": "listops", "task": "classify", "seq_len": 60, "eval_tokens": 60 * 200, "train_rows": 4}
    with pytest.raises(ValueError, match="extend=diagonal"):
        pretrain(recipe(tmp_path, "sequence-encoder", methods=[FLOOD], **options))
    assert not (tmp_path / "out").exists()
    pretrain(recipe(tmp_path, "sequence-encoder", methods=[FLOOD | {"extend": "diagonal"}], **options), write=False)


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--set image_size=8"):
        pretrain(images(tmp_path, set={"image_size": 28}))
