"""finetune on pictures: a vision transformer and its image processor, PNG and JPEG of any size, a class a folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from sparsetrain.cli import run
from sparsetrain.hf.data import load_images
from sparsetrain.hf.model.io import load
from tests.hf import runs

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def vit(folder: Path, channels: int = 3) -> Path:
    """A random ViT of two layers for pictures of 16 x 16, with an image processor of its own mean and deviation."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = ViTConfig(**sizes, image_size=16, patch_size=4, num_channels=channels, num_labels=3)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return folder


def pictures(folder: Path, count: int = 14, parts: tuple[str, ...] = ("",)) -> Path:
    """Red and blue pictures of many sizes, PNG and JPEG, in a folder a class, below each of the parts."""
    draw = np.random.default_rng(0)
    for part in parts:
        for channel, name in ((0, "red"), (2, "blue")):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 90, (17 + i, 30 - i, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / part / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    return folder


def arguments(place: Path, *more: str) -> list[str]:
    asked = {"model": place / "vit", "data": place / "data", "output": place / "out", "steps": 30, "batch_size": 4}
    pairs = [word for key, value in asked.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return ["finetune", "--task", "image", "--device", "cpu", "--lr", "0.01", *pairs, *more]


def test_a_vision_transformer_learns_two_colours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vit(tmp_path / "vit")
    pictures(tmp_path / "data")
    assert run(arguments(tmp_path, "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["run"]["evals"][-1]["accuracy"] == 1.0 and result["recipe"]["methods"] == []
    out = str(tmp_path / "out")
    assert run(["eval", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(result["run"]["evals"][-1]["loss"], rel=1e-4)
    assert run(["eval", out, "--all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 28
    loaded = load(out)
    with Image.open(tmp_path / "data" / "red" / "3.png") as picture:
        seen = loaded.tokenizer(picture, return_tensors="pt")
    assert loaded.model.config.id2label[int(loaded.model(**seen).logits.argmax())] == "red"
    assert (tmp_path / "out" / "adapter" / "preprocessor_config.json").is_file()


def test_a_picture_is_seen_as_its_processor_shows_it(tmp_path: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(vit(tmp_path / "vit"), backend="pil")
    bundle = load_images(str(pictures(tmp_path / "data", parts=("train", "test"))), processor=processor)
    assert (len(bundle.train), len(bundle.eval or ())) == (28, 28) and bundle.label_names == ("blue", "red")
    files = [path for name in ("blue", "red") for path in sorted((tmp_path / "data" / "train" / name).iterdir())]
    made = bundle.collate_fn(list(bundle.train))["pixel_values"]
    for path in files[::9]:
        with Image.open(path) as picture:
            shown = processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
        assert min(float((each - shown[0]).abs().max()) for each in made) < 1e-5


def test_classes_of_metadata_and_a_split_are_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vit(tmp_path / "vit")
    pictures(tmp_path / "by", parts=("train", "validation"))
    lines = ["file_name,label"]
    for part in ("train", "validation"):  # all in one folder, as exported by a tool for labels
        (tmp_path / "data" / part).mkdir(parents=True)
        for path in sorted((tmp_path / "by" / part).rglob("*.*")):
            path.rename(tmp_path / "data" / part / f"{path.parent.name}-{path.name}")
            lines.append(f"{part}/{path.parent.name}-{path.name},{path.parent.name}")
    (tmp_path / "data" / "metadata.csv").write_text("\n".join(lines))
    assert run(arguments(tmp_path, "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["run"]["evals"][-1]["accuracy"] == 1.0 and "28 images of 16x16; held out: 28" in result["data"]
    assert load(str(tmp_path / "out")).model.config.label2id == {"blue": 0, "red": 1}


def test_pictures_of_many_sizes_are_brought_to_the_size_that_was_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "data")
    common = ["--data", str(tmp_path / "data"), "--steps", "2", "--batch-size", "4", "--device", "cpu", "--json"]
    sizes = ["--set", "image_size=8", "--set", "num_channels=3"]
    words = ["pretrain", "--task", "image", "--model", "vit-nano", *common, "--output", str(tmp_path / "run")]
    assert run([*words, *sizes]) == 0
    first = json.loads(capsys.readouterr().out)
    assert "images of 8x8" in first["data"]
    assert run(["eval", str(tmp_path / "run"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["loss"] == pytest.approx(first["run"]["evals"][-1]["loss"], rel=1e-5)
    # a run's folder is named as a model: the whole model in it is meant, and its size counts
    more = ["finetune", "--task", "image", "--model", str(tmp_path / "run"), *common]
    assert run([*more, "--output", str(tmp_path / "tuned")]) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert tuned["run"]["evals"][0]["loss"] == pytest.approx(first["run"]["evals"][-1]["loss"], rel=1e-5)
    assert run([*more[:4], str(tmp_path / "tuned"), *common, "--output", str(tmp_path / "third")]) == 2
    assert "is a run that left an adapter, and a whole model was asked for" in capsys.readouterr().out


def test_an_architecture_s_own_size_is_no_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 256, (12, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    words = ["pretrain", "--task", "image", "--model", "vit-nano", "--data", str(tmp_path / "data"), "--dry-run"]
    assert run([*words, "--output", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "has images of (3, 12, 20)" in said and "--set image_size=12 --set num_channels=3; pictures of other" in said
    assert run([*words, "--output", str(tmp_path / "run"), "--set", "image_size=12", "--set", "num_channels=3"]) == 0


def test_what_cannot_be_trained_on_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vit(tmp_path / "vit")
    pictures(tmp_path / "data", count=2)

    def refused(*more: str) -> str:
        assert run(arguments(tmp_path, *more)) == 2
        return capsys.readouterr().err

    runs.llama(tmp_path / "llama")
    assert "(llama) does not cut images of one size into patches" in refused("--model", str(tmp_path / "llama"))
    assert "no image processor reads" in refused("--data", "digits")
    (tmp_path / "empty").mkdir()
    assert "holds no images: no picture" in refused("--data", str(tmp_path / "empty"))
    assert "eval_data is for data of text" in refused("--eval-data", str(tmp_path / "data"))
    (tmp_path / "data" / "red" / "bad.png").write_bytes(b"no picture")
    assert "bad.png cannot be read as a picture" in refused()
    (tmp_path / "data" / "red" / "bad.png").unlink()
    large = ViTImageProcessorPil(size={"height": 24, "width": 24})
    large.save_pretrained(tmp_path / "vit")
    assert "has images of (3, 24, 24) (channels, height, width)" in refused()
    assert "of one class, 'image', and to classify takes two" in refused("--data", str(tmp_path / "data" / "red"))
    pictures(tmp_path / "divided", count=2, parts=("train", "test"))
    (tmp_path / "divided" / "test" / "red").rename(tmp_path / "divided" / "test" / "green")
    assert "is of class 'green', and those trained on are blue, red" in refused("--data", str(tmp_path / "divided"))
