"""The task `diffusion`: trained, averaged, resumed, sampled from, read by diffusers, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sparsetrain.core.anatomy import describe
from sparsetrain.core.errors import CheckpointError
from sparsetrain.hf.model.checkpointing import recompute
from sparsetrain.hf.model.denoising import DiffusionModel
from sparsetrain.hf.model.diffusion_config import DiffusionConfig, num_labels
from sparsetrain.hf.model.io import export, load
from sparsetrain.hf.model.sampling import label_of, sample
from sparsetrain.hf.model.uvit import UViT
from sparsetrain.hf.study.compare import compare
from sparsetrain.hf.study.preview import preview
from sparsetrain.hf.train import image_quality
from sparsetrain.hf.train.average import FILE, Average
from sparsetrain.hf.train.diffusion import PASSES, scores
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.hf.train.pretrain import pretrain
from sparsetrain.measure import image_features
from sparsetrain.measure.image_features import features_of
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.pretrain import PretrainRecipe

DIT = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "patch_size": 2}
UNET = {"block_out_channels": [8, 16], "norm_num_groups": 4, "sample_size": 8, "attention_head_dim": 8}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"GRID": 4, "NUM": 8, "STEPS": 2}.items():
        monkeypatch.setattr(image_quality, name, value)
    monkeypatch.setattr(image_features, "_STEPS", 5)
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path / "cache"))


def pictures(folder: Path, count: int = 12) -> str:
    """Pictures of 8 x 8 in two folders, bright and dark."""
    random = np.random.default_rng(0)
    for name, low in (("bright", 150), ("dark", 0)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = random.integers(low, low + 100, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return str(folder)


def recipe(folder: Path, **changes: Any) -> PretrainRecipe:
    values = {"model": "dit-nano", "set": DIT, "data": pictures(folder / "pictures"), "task": "diffusion"}
    values |= {"output": str(folder / "out"), "batch_size": 4, "steps": 4, "eval_tokens": 32, "save_every": 0}
    return PretrainRecipe.from_values({**values, "device": "cpu", "dtype": "fp32", **changes})


def tuned(folder: Path, model: str, **changes: Any) -> Recipe:
    values = {"model": model, "data": pictures(folder / "pictures"), "task": "diffusion", "methods": []}
    values |= {"output": str(folder / "tuned"), "batch_size": 4, "steps": 3, "eval_tokens": 32, "save_every": 0}
    return Recipe.from_values({**values, "device": "cpu", "dtype": "fp32", **changes})


def dit(**changes: Any) -> DiffusionModel:
    torch.manual_seed(0)
    config = DiffusionConfig(**{**DIT, "norm_num_groups": 1, "num_embeds_ada_norm": 3, **changes})
    model = DiffusionModel.from_config(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def test_noise_is_added_by_the_schedule_and_the_loss_is_its_square() -> None:
    model = dit().eval()
    x, noise = torch.randn(2, 2, 1, 8, 8).unbind(0)
    t, labels = torch.tensor([10, 900]), torch.tensor([0, 2])
    out = model(x, labels, noise=noise, timesteps=t)
    from diffusers import DDPMScheduler

    scheduler: Any = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    noisy = scheduler.add_noise(x, noise, t)
    predicted = model.denoiser(noisy, t, class_labels=labels, return_dict=False)[0]
    torch.testing.assert_close(out.predicted, predicted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss, (predicted - noise).square().mean(), rtol=1e-5, atol=1e-6)
    v = dit(prediction_type="v_prediction").eval()(x, labels, noise=noise, timesteps=t)
    torch.testing.assert_close(v.target, scheduler.get_velocity(x, noise, t), rtol=1e-5, atol=1e-5)


def test_modules_are_the_denoisers_own() -> None:
    model = dit()
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in model.denoiser.named_parameters()}
    model.proj_out_2 = torch.nn.Linear(16, 4)  # exchanged in one of them, it is in the other
    assert model.denoiser.proj_out_2 is model.proj_out_2
    assert describe(model).family == "DiTTransformer2DModel" and len(describe(model).blocks) == 2


def test_a_new_dit_begins_by_predicting_nothing() -> None:
    model = DiffusionModel.from_config(DiffusionConfig(**DIT, norm_num_groups=1, num_embeds_ada_norm=3))
    with torch.no_grad():
        out = model(torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))
    assert float(out.predicted.abs().max()) == 0.0


def test_labels_are_hidden_in_training_alone() -> None:
    model = dit(label_dropout=0.5)
    seen: list[Any] = []
    model.transformer_blocks[0].register_forward_hook(
        lambda _m, _a, given, _o: seen.append(given["class_labels"]), with_kwargs=True
    )
    x, labels = torch.randn(64, 1, 8, 8), torch.zeros(64, dtype=torch.long)
    model.train()(x, labels)
    model.eval()(x, labels)
    hidden = int((seen[0] == 3).sum())
    assert 15 < hidden < 49 and hidden + int((seen[0] == 0).sum()) == 64
    assert torch.equal(seen[1], labels)


def test_held_out_noise_follows_from_the_row() -> None:
    model = dit().eval()
    batch = {"pixel_values": torch.randn(5, 1, 8, 8), "labels": torch.tensor([0, 1, 2, 0, 1]), "row": torch.arange(5)}
    with torch.no_grad():
        whole = scores(model, batch)
        torch.manual_seed(7)
        parts = [scores(model, {name: value[i : i + 1] for name, value in batch.items()}) for i in range(5)]
    assert whole.by_row is not None and whole.count == 5 and PASSES == 4
    assert whole.loss == pytest.approx(sum(part.loss for part in parts), rel=1e-5)
    assert len({round(loss, 6) for loss in whole.by_row["loss"]}) == 5


@pytest.mark.slow  # two runs, one of them twice
def test_pretrain_averages_resumes_and_is_read_by_diffusers(tmp_path: Path) -> None:
    asked = recipe(tmp_path, steps=6, save_every=3, keep_checkpoints=4, eval_every=2)
    result: Any = pretrain(asked)
    assert result.run["metric"] == "noise_loss" and result.run["images"]["num"] == 8
    assert "trained here on the same images" in result.run["images"]["features"]
    assert [point["step"] for point in result.run["evals"]] == [0, 2, 4, 6]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "What the trained models make" in page and (tmp_path / "out" / "samples.png").is_file()
    saved = load_file(str(result.saved / "diffusion_pytorch_model.safetensors"))
    last = tmp_path / "out" / "checkpoint-6"
    average, weights = load_file(str(last / FILE)), load_file(str(last / "model.safetensors"))
    assert all(torch.equal(saved[name], average[name]) for name in average)
    assert any(not torch.equal(weights[name], average[name]) for name in average)
    from diffusers import DiTTransformer2DModel

    plain: Any = DiTTransformer2DModel.from_pretrained(str(result.saved))
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 500]), torch.tensor([0, 1])
    ours = load(tmp_path / "out").model
    with torch.no_grad():
        expected = plain.eval()(x, t, class_labels=labels, return_dict=False)[0]
        torch.testing.assert_close(ours.denoise(x, t, labels), expected, rtol=0, atol=0)
    assert label_of(ours, "dark") == label_of(ours, "1") == 1

    shutil.copytree(tmp_path / "out", tmp_path / "again")
    for name in ("checkpoint-6", "model"):
        shutil.rmtree(tmp_path / "again" / name)
    (tmp_path / "again" / "result.json").unlink()
    again: Any = pretrain(asked.model_copy(update={"output": str(tmp_path / "again"), "resume": True}))
    resumed = load_file(str(again.saved / "diffusion_pytorch_model.safetensors"))
    assert again.resumed_from == 3 and all(torch.equal(resumed[name], saved[name]) for name in saved)
    assert again.run["noise_loss"] == result.run["noise_loss"]


def test_finetune_a_folder_of_diffusers_with_lora_and_with_a_method(tmp_path: Path) -> None:
    model = dit(num_embeds_ada_norm=2)
    model.denoiser.save_pretrained(tmp_path / "plain")
    result: Any = finetune(tuned(tmp_path, str(tmp_path / "plain"), lora_r=2, lora_targets=["to_q", "to_v"]))
    assert (result.saved / "adapter_model.safetensors").is_file() and "dense" in result.run["noise_loss"]
    loaded = load(tmp_path / "tuned")
    first, again = (sample(loaded.model, 3, steps=2) for _ in range(2))
    assert first.shape == (3, 8, 8, 1) and np.array_equal(first, again)
    merged = load(export(tmp_path / "tuned", tmp_path / "merged", format="dense"))
    assert np.abs(sample(merged.model, 3, steps=2).astype(int) - first).max() <= 1
    sara = {"methods": [{"method": "sara"}], "output": str(tmp_path / "sara")}
    result = finetune(tuned(tmp_path, str(tmp_path / "plain"), **sara))
    assert result.trainable_parameters < result.parameters / 4


def test_sampling_is_the_same_for_any_number_and_follows_the_label() -> None:
    model = dit().eval()
    some, more = sample(model, 2, labels=[1, 1], steps=3, seed=4), sample(model, 5, labels=[1] * 5, steps=3, seed=4)
    assert np.abs(some.astype(int) - more[:2]).max() <= 1
    assert not np.array_equal(more, sample(model, 5, labels=[2] * 5, steps=3, seed=4))
    assert not np.array_equal(more, sample(model, 5, labels=[1] * 5, steps=3, seed=5))
    plain, guided = (sample(model, 2, labels=[1, 1], steps=3, guidance=g) for g in (1.0, 4.0))
    assert not np.array_equal(plain, guided)
    for wrong, match in (
        ({"labels": [3, 0]}, "2 labels up to 3 for 2 images of 3 classes"),
        ({"steps": 1001}, "knows 1000 steps of noise"),
    ):
        with pytest.raises(ValueError, match=match):
            sample(model, 2, **wrong)
    with pytest.raises(ValueError, match=r"class fish is none of the model's\. Its classes: 0 to 2"):
        label_of(model, "fish")


def test_a_perfect_denoiser_draws_the_image_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """ε̂ = (x_t − √ᾱ x) / √(1 − ᾱ) of one image x: DDIM must end at x, whatever the noise."""
    model = dit()
    image = torch.rand(1, 8, 8) * 1.8 - 0.9

    def denoise(noisy: torch.Tensor, t: torch.Tensor, labels: Any = None) -> torch.Tensor:
        signal = model.signal_t[t][:, None, None, None]
        return (noisy - signal.sqrt() * image) / (1 - signal).sqrt()

    monkeypatch.setattr(model, "denoise", denoise)
    made = sample(model, 4, steps=20)
    expected = ((image + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(made.astype(float) - expected).max() <= 2


def test_a_uvit_from_random_weights_to_samples(tmp_path: Path) -> None:
    sizes = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "patch_size": 2}
    result: Any = pretrain(recipe(tmp_path, model="uvit-nano", set=sizes, steps=2))
    model = load(result.saved).model
    assert describe(model).family == "UViT" and len(describe(model).blocks) == 3 and num_labels(model.config) == 2
    drawn = [sample(model, 2, labels=labels, steps=2) for labels in ([0, 0], [1, 1])]
    assert drawn[0].shape == (2, 8, 8, 1) and not np.array_equal(*drawn)
    plain: Any = UViT.from_pretrained(str(result.saved))
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 500]), torch.tensor([0, 1])
    with torch.no_grad():
        assert torch.equal(plain.eval()(x, t, labels).sample, model.denoise(x, t, labels))
    tuned_result: Any = finetune(tuned(tmp_path, str(result.saved), lora_r=0, methods=[{"method": "sparsedm"}]))
    assert tuned_result.sparsity["edits"] and any("skips.*" in note for note in tuned_result.sparsity["notes"])
    with pytest.raises(ValueError, match="an odd number of blocks"):
        pretrain(recipe(tmp_path / "even", model="uvit-nano", set=sizes | {"num_layers": 2}))
    bright = str(Path(pictures(tmp_path / "pictures")) / "bright")
    unconditional = {"set": sizes | {"num_class_embeds": 0}, "steps": 2, "data": bright}
    unlabelled: Any = pretrain(recipe(tmp_path / "none", model="uvit-nano", **unconditional))
    assert num_labels(load(unlabelled.saved).model.config) == 0
    assert "by how many quarters they were turned" in unlabelled.run["images"]["features"]


def test_a_unet_with_and_without_labels(tmp_path: Path) -> None:
    result: Any = pretrain(recipe(tmp_path, model="unet-nano", set=UNET, steps=2))
    model = load(result.saved).model
    assert num_labels(model.config) == 2 and sample(model, 2, steps=2).shape == (2, 8, 8, 1)
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    config = DiffusionConfig(**UNET, **blocks, denoiser="UNet2DModel", in_channels=1, out_channels=1)
    plain = DiffusionModel.from_config(config)
    assert num_labels(config) == 0 and sample(plain, 2, steps=2).shape == (2, 8, 8, 1)
    with pytest.raises(ValueError, match="the model takes none"):
        sample(plain, 2, labels=[0, 0])


@pytest.mark.slow  # two processes that import everything
def test_compare_and_preview(tmp_path: Path) -> None:
    method = {"methods": [{"method": "semi_structured", "refresh_every": 1}]}
    seen = preview(recipe(tmp_path, **method))
    assert seen.plan is not None and seen.tokens_per_step == 4 * 16
    asked = recipe(tmp_path, **method, compare="dense", steps=3)
    compare(asked)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "sparse: " in page and "dense: " in page and "What the trained models make" in page


def test_the_average_is_that_of_its_formula(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    average = Average(0.9)
    average.begin(model, None, None)
    expected, history = model.weight.detach().clone(), []
    for step in range(1, 30):
        with torch.no_grad():
            model.weight += step
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        average.on_step_end(None, type("S", (), {"global_step": step}), None, model=model)  # type: ignore[arg-type]
        history.append(decay)
    torch.testing.assert_close(average.weights["weight"], expected)
    assert history[0] < 0.2 and history[-1] < 0.9
    own = model.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"has no average\.safetensors, which ema_decay=0\.9 goes on from"):
        average.begin(model, None, tmp_path)
    save_file({"other": torch.zeros(1)}, str(tmp_path / FILE))
    with pytest.raises(CheckpointError, match="is of another model"):
        average.begin(model, None, tmp_path)
    average.weights = {"weight": expected}
    with average.taken(model):
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight, own)


def test_features_are_the_same_in_any_order_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    pixels, labels = random.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8), np.arange(40) % 2
    first = features_of("trained", (pixels, labels), (pixels, labels))
    found = first.features(pixels)
    assert found.shape == (40, image_features.WIDTH) and "trained here on the same images" in first.says
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-4)
    monkeypatch.setattr(image_features, "_train", None)  # it is read, not trained anew
    again = features_of("trained", (pixels[::-1].copy(), labels[::-1].copy()), (pixels, labels))
    np.testing.assert_array_equal(again.features(pixels), found)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ValueError, match="torchmetrics', which is not installed"):
        features_of("inception", (pixels, labels), (pixels, labels))


def test_images_of_one_label_are_measured_by_how_they_are_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    pixels = np.zeros((40, 8, 8, 1), dtype=np.uint8)
    pixels[:, :4] = random.integers(100, 255, (40, 4, 8, 1))  # bright above, dark below
    one = np.zeros(40, dtype=np.int64)
    monkeypatch.setattr(image_features, "_STEPS", 150)
    found = features_of("trained", (pixels, one), (pixels[:20], one[:20]))
    assert "by how many quarters they were turned (100.0% of the held-out ones right)" in found.says
    mean, spread = found.features(pixels).mean(0), found.features(pixels).std(0)
    assert np.abs(mean).max() < 1e-3 and spread.max() < 1.1
    images, quarters = image_features.turned(pixels)
    assert images.shape == (160, 8, 8, 1) and np.bincount(quarters).tolist() == [40] * 4
    assert np.array_equal(images[40], np.rot90(pixels[0]))
    with pytest.raises(ValueError, match="are 8x4: features would come from telling how they are turned"):
        features_of("trained", (pixels[:, :, :4], one), (pixels[:, :, :4], one))


def test_inceptions_features_are_read_off_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the names of torchmetrics': what is given to its network, and what is told without weights."""
    given: list[torch.Tensor] = []

    class FrechetInceptionDistance:
        def __init__(self, feature: int) -> None:
            if not weights:
                raise RuntimeError("no route to host")
            self.inception = lambda x: (
                given.append(x) or x.float().mean((2, 3)).repeat(1, feature // 3 + 1)[:, :feature]
            )

    weights = True
    module = type(sys)("torchmetrics.image.fid")
    vars(module)["FrechetInceptionDistance"] = FrechetInceptionDistance
    monkeypatch.setitem(sys.modules, "torchmetrics", type(sys)("torchmetrics"))
    monkeypatch.setitem(sys.modules, "torchmetrics.image", type(sys)("torchmetrics.image"))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", module)
    pixels, labels = np.full((70, 4, 4, 1), 9, dtype=np.uint8), np.zeros(70, dtype=np.int64)
    found = features_of("inception", (pixels, labels), (pixels, labels))
    assert found.features(pixels).shape == (70, 2048) and "Inception" in found.says
    assert given[0].shape == (64, 3, 4, 4) and given[0].dtype == torch.uint8
    weights = False
    with pytest.raises(ValueError, match=r"weights of Inception could not be had \(RuntimeError: no route to host\)"):
        features_of("inception", (pixels, labels), (pixels, labels))


def test_what_does_not_fit_is_told_before_training(tmp_path: Path) -> None:
    for changes, match in (
        ({"set": {key: DIT[key] for key in DIT if key != "sample_size"}}, r"images of \(1, 8, 8\).*--set image_size=8"),
        ({"set": DIT | {"num_embeds_ada_norm": 1}}, "the data have 2 labels, and the model takes 1"),
        ({"model": "vit-nano", "set": {"image_size": 8}}, "removes no noise"),
        ({"model": "gpt2-nano", "set": {}}, "reads tokens"),
        ({"tokenizer": "minilm"}, "is no text"),
        ({"set": DIT | {"denoiser": "UNet1DModel"}}, "denoiser=UNet1DModel is no class that can be trained here"),
    ):
        with pytest.raises(ValueError, match=match):
            pretrain(recipe(tmp_path, **changes))
    model = dit(num_embeds_ada_norm=1)
    model.denoiser.save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="the data have 2 labels, and the model takes 1"):
        finetune(tuned(tmp_path, str(tmp_path / "one")))
    dit(num_embeds_ada_norm=2).denoiser.save_pretrained(tmp_path / "two")
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    (tmp_path / "two" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model that can be read"):
        finetune(tuned(tmp_path, str(tmp_path / "two")))
    (tmp_path / "two" / "config.json").write_text(json.dumps(config | {"_class_name": "Kandinsky3UNet"}))
    with pytest.raises(ValueError, match="is no class that can be trained here"):
        finetune(tuned(tmp_path, str(tmp_path / "two")))


@pytest.mark.parametrize("kind", ["dit", "unet", "uvit"])
def test_recomputed_blocks_give_the_same_gradients(kind: str) -> None:
    blocks = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    unet = {**UNET, **blocks, "denoiser": "UNet2DModel", "in_channels": 1, "out_channels": 1, "num_class_embeds": 4}
    uvit = {"denoiser": "UViT", "sample_size": 8, "patch_size": 2, "num_layers": 3, "num_class_embeds": 4}
    config = DiffusionConfig(**(unet if kind == "unet" else uvit))
    model = dit() if kind == "dit" else DiffusionModel.from_config(config)
    x, noise = torch.randn(2, 3, 1, 8, 8).unbind(0)
    given = {"labels": torch.tensor([0, 1, 2]), "noise": noise, "timesteps": torch.tensor([5, 300, 900])}
    model.config.label_dropout = 0.0
    found, ran = [], list[int]()
    block = {"dit": "transformer_blocks.0.ff", "unet": "down_blocks.0.resnets.0.conv1", "uvit": "blocks.0.attn1"}[kind]
    part = model.get_submodule(block)
    part.register_forward_hook(lambda *_: ran.append(1))
    for again in (False, True):
        if again:
            recompute(model)
        model.train().zero_grad()
        model(x, **given).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert len(ran) == 1 + 2, "the block ran once more in the backward pass"
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-7)
