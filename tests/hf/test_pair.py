"""A pair of encoders of images and texts, from a local folder of CLIP weights, with a concept bottleneck."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, CLIPConfig, CLIPImageProcessor, CLIPModel, SiglipConfig, SiglipModel

import sparsetrain
from bench.methods import small_pair
from sparsetrain import ConceptBottleneck
from sparsetrain.data.captions import CLOTHES, all_attributes, caption
from sparsetrain.data.collate import ImageCollator
from sparsetrain.data.images import FASHION_LABELS
from sparsetrain.data.picture import as_png, read_picture
from sparsetrain.hf.data import load_images
from sparsetrain.hf.model.io import load, save
from sparsetrain.hf.model.pair import PairClassifier, _width
from sparsetrain.hf.model.weights import load_weights
from sparsetrain.hf.study.explain import _pictures
from sparsetrain.hf.train.rows import reader
from tests.cli.conftest import Call, call  # noqa: F401

CONCEPTS = all_attributes(CLOTHES)


def clip_folder(folder: Path) -> CLIPModel:
    """Random CLIP weights with their tokenizer, as they are published: no head."""
    words = small_pair.tokenizer()
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(**small_pair.config(len(words), width=32, layers=1).to_dict()))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return model.eval()


def siglip_folder(folder: Path) -> SiglipModel:
    """Random SigLIP weights with a tokenizer: its width is that of the text tower's projection."""
    words = small_pair.tokenizer()
    torch.manual_seed(0)
    shared = {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"hidden_size": 16, "projection_size": 32, "vocab_size": len(words), "max_position_embeddings": 16, **shared}
    vision = {"hidden_size": 32, "image_size": 28, "patch_size": 7, "num_channels": 1, **shared}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    model = SiglipModel(SiglipConfig(text_config={**text, **ids}, vision_config=vision, num_labels=10))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return model.eval()


def converted(folder: Path, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, new = load_weights(str(folder), "PairClassifier", torch.float32, new_head=True)
    assert new == ["classifier"]
    config = ConceptBottleneck(concepts=CONCEPTS, classes=tuple(f"a {name}" for name in FASHION_LABELS), **options)
    read = reader(small_pair.tokenizer(), 16, "cpu")
    return model, sparsetrain.sparsify(model, config, read=read)


def test_both_towers_embed_as_clip_does_and_the_concepts_are_its_texts(tmp_path: Path) -> None:
    clip = clip_folder(tmp_path)
    model, handle = converted(tmp_path)
    (site,) = handle.sites("concept_bottleneck").values()
    pixels = torch.randn(3, 1, 28, 28)
    batch = reader(small_pair.tokenizer(), 16, "cpu")(CONCEPTS)
    with torch.no_grad():
        out = clip(**batch, pixel_values=pixels)
        torch.testing.assert_close(site.vectors, out.text_embeds)
        torch.testing.assert_close(site.scale, clip.logit_scale.exp())
        scores = site.scores(model.embed(pixels))
        torch.testing.assert_close(scores, out.logits_per_image, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(pixels).logits, site.layers(scores)[1], rtol=1e-4, atol=1e-4)


def test_a_siglip_is_read_as_it_was_trained(tmp_path: Path) -> None:
    """Texts at full length without a mask: one text has one embedding, whatever stands beside it."""
    siglip = siglip_folder(tmp_path)
    model, handle = converted(tmp_path)
    (site,) = handle.sites("concept_bottleneck").values()
    ids = small_pair.tokenizer()(list(CONCEPTS), padding="max_length", return_tensors="pt").input_ids
    pixels = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        out = siglip(input_ids=ids, pixel_values=pixels)
        torch.testing.assert_close(site.vectors, out.text_embeds)
        torch.testing.assert_close(torch.nn.functional.normalize(model.embed(pixels)), out.image_embeds)
        assert model.classifier.weight.shape[1] == 32 and model(pixels).logits.shape == (3, 10)
    with pytest.raises(ValueError, match="says in no place how wide"):
        _width(BertConfig())


def test_the_loss_trains_the_layers_and_what_is_saved_comes_back(tmp_path: Path) -> None:
    clip_folder(tmp_path / "clip")
    model, handle = converted(tmp_path / "clip", loss="contrastive")
    pixels, labels = torch.randn(8, 1, 28, 28), torch.arange(8)
    model.train()(pixels, labels=labels).loss.backward()
    (site,) = handle.sites("concept_bottleneck").values()
    assert site.layers.bottleneck.grad.any() and site.layers.head.grad.any()
    site.layers.head.data.mul_(1.5)
    expected = model.eval()(pixels).logits
    save(model, handle, tmp_path / "saved", tokenizer=small_pair.tokenizer(), task="pair-image")
    loaded = load(tmp_path / "saved")
    assert isinstance(loaded.model, PairClassifier) and loaded.task == "pair-image"
    assert torch.equal(loaded.model(pixels).logits, expected)
    (state,) = handle.state().values()
    changed = {**state, "vectors": state["vectors"][:-1]}
    with pytest.raises(ValueError, match="vectors is"):
        model, _ = load_weights(str(tmp_path / "clip"), "PairClassifier", torch.float32, new_head=True)
        sparsetrain.sparsify(model, *handle.configs, state={"classifier:concept_bottleneck": changed})


def test_an_image_is_explained_from_the_command_line(call: Call, tmp_path: Path) -> None:  # noqa: F811
    clip_folder(tmp_path / "clip")
    model, handle = converted(tmp_path / "clip")
    save(model, handle, tmp_path / "saved", tokenizer=small_pair.tokenizer(), task="pair-image")
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 1), dtype=np.uint8)
    (tmp_path / "shoe.png").write_bytes(as_png(image))
    assert np.array_equal(read_picture(tmp_path / "shoe.png", (1, 28, 28)), image)
    wide = np.pad(image, ((0, 0), (28, 28), (0, 0)))
    (tmp_path / "wide.png").write_bytes(as_png(wide))  # its middle is what it would be trained on
    assert np.array_equal(read_picture(tmp_path / "wide.png", (1, 28, 28)), image)
    said = call("explain", tmp_path / "saved", tmp_path / "shoe.png", "--output", tmp_path / "page.html")
    assert said.code == 0 and "sum: the lead" in said.out and "search of the concept matrix" in said.out, said.err
    page = (tmp_path / "page.html").read_text()
    assert 'src="data:image/png;base64,' in page and "http" not in page
    (tmp_path / "text.png").write_text("no picture")
    for wrong, message in (("none.png", "does not exist"), ("text.png", "no picture that can be read")):
        said = call("explain", tmp_path / "saved", tmp_path / wrong)
        assert said.code == 2 and message in said.err


def test_a_pair_is_trained_and_asked_from_the_command_line(call: Call, tmp_path: Path) -> None:  # noqa: F811
    clip_folder(tmp_path / "clip")
    generator = np.random.default_rng(0)
    for name, low in (("bright", 150), ("dark", 0)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(12):
            image = generator.integers(low, low + 100, (28, 28, 1), dtype=np.uint8)
            (tmp_path / "data" / name / f"{i}.png").write_bytes(as_png(image))
    (tmp_path / "concepts.txt").write_text("a collar\nlong sleeves\nthick and warm\n")
    method = f"concept_bottleneck:concepts={tmp_path / 'concepts.txt'},loss=contrastive"
    run = ("finetune", "--task", "pair-image", "--data", tmp_path / "data", "--device", "cpu", "--dtype", "fp32")
    given = (*run, "--method", method, "--steps", 4, "--batch-size", 4, "--save-every", 2)
    said = call(*given, "--model", tmp_path / "clip", "--output", tmp_path / "out", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["trainable_parameters"] == 3 * 3 + 2 * 3
    loaded = load(tmp_path / "out")
    assert isinstance(loaded.model, PairClassifier) and loaded.task == "pair-image" and loaded.tokenizer is not None
    before = CLIPModel.from_pretrained(tmp_path / "clip").state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in loaded.model.pair.state_dict().items())
    said = call("explain", tmp_path / "out", tmp_path / "data" / "dark" / "0.png")
    assert said.code == 0 and "long sleeves" in said.out and "sum: the lead" in said.out, said.err
    (tmp_path / "clip" / "tokenizer.json").unlink()
    (tmp_path / "clip" / "tokenizer_config.json").unlink()
    said = call(*given, "--model", tmp_path / "clip", "--output", tmp_path / "none")
    assert said.code == 2 and "holds no tokenizer" in said.err
    BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path / "b")
    said = call(*given, "--model", tmp_path / "b", "--output", tmp_path / "none")
    assert said.code == 2 and "is no pair of encoders" in said.err and not (tmp_path / "none").exists()


def test_pictures_of_any_size_as_the_pair_s_processor_prepares_them(call: Call, tmp_path: Path) -> None:  # noqa: F811
    clip_folder(tmp_path / "clip")
    size = {"height": 28, "width": 28}
    mean, std = [0.4], [0.2]
    processor = CLIPImageProcessor(
        size=size, do_center_crop=False, image_mean=mean, image_std=std, do_convert_rgb=False
    )
    processor.save_pretrained(tmp_path / "clip")
    generator = np.random.default_rng(0)
    for name, low in (("bright", 150), ("dark", 0)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(6):
            image = generator.integers(low, low + 100, (30 + i, 40, 1), dtype=np.uint8)
            (tmp_path / "data" / name / f"{i}.png").write_bytes(as_png(image))
    (tmp_path / "concepts.txt").write_text("a collar\nlong sleeves\n")
    method = f"concept_bottleneck:concepts={tmp_path / 'concepts.txt'}"
    given = ("finetune", "--task", "pair-image", "--data", tmp_path / "data", "--device", "cpu", "--dtype", "fp32")
    given = (*given, "--method", method, "--steps", 2, "--batch-size", 4, "--model", tmp_path / "clip")
    said = call(*given, "--output", tmp_path / "out")
    assert said.code == 0, said.err
    picture = tmp_path / "data" / "dark" / "3.png"
    explained = _pictures(load(tmp_path / "out"), [str(picture)])[0]["pixel_values"]
    with Image.open(picture) as opened:
        pixels = np.asarray(opened.convert("L").resize((28, 28), Image.Resampling.BICUBIC), dtype=np.float32)
    expected = (torch.from_numpy(pixels)[None, None] / 255 - mean[0]) / std[0]
    assert (explained - expected).abs().max() < 0.03  # a byte
    rows = load_images(str(tmp_path / "data"), processor=load(tmp_path / "out").tokenizer.pictures, image=(1, 28, 28))
    assert rows.collate_fn([rows.train[0]])["pixel_values"].shape == (1, 1, 28, 28)


def test_pixels_are_scaled_as_for_training() -> None:
    image = np.array([[[0], [255]], [[128], [64]]], dtype=np.uint8)
    found = ImageCollator()([{"pixel_values": image}])["pixel_values"]
    assert found.shape == (1, 1, 2, 2)
    assert found.flatten().tolist() == pytest.approx([-1, 1, 128 / 127.5 - 1, 64 / 127.5 - 1], abs=1e-6)


def test_a_small_pair_learns_to_match_images_with_captions() -> None:
    """Takes some seconds: it must train. Each label's image is a bright square of its own."""
    labels = torch.arange(10).repeat(20)
    pixels = torch.rand(200, 1, 28, 28) * 0.2 - 1
    for i, label in enumerate(labels.tolist()):
        at, down = 5 * (label % 5), 14 * (label // 5)
        pixels[i, :, down : down + 12, at : at + 5] = 1
    model = small_pair.train(pixels, labels, epochs=20, seed=0, batch=50, lr=3e-3, width=32, layers=1)
    read = reader(small_pair.tokenizer(), 16, "cpu")
    with torch.no_grad():
        images = torch.nn.functional.normalize(model.embed(pixels), dim=-1)
        texts = torch.nn.functional.normalize(model.embed(**read([f"a {name}" for name in FASHION_LABELS])), dim=-1)
    assert ((images @ texts.t()).argmax(1) == labels).float().mean() > 0.5  # by chance 0.1


def test_captions_are_of_the_label() -> None:
    from random import Random

    for label in FASHION_LABELS:
        for seed in range(5):
            text = caption(label, CLOTHES, Random(seed))
            assert label in text or any(attribute in text for attribute in CLOTHES[label])
    with pytest.raises(ValueError, match="no attributes"):
        caption("hat", CLOTHES, Random(0))


def test_what_is_no_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="is no pair of encoders"):
        PairClassifier.from_config(BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    model = PairClassifier.from_config(small_pair.config(30, width=32, layers=1))
    with pytest.raises(ValueError, match="images or texts"):
        model()
