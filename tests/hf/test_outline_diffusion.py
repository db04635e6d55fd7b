"""The prediction against steps that really run: diffusion models, and models that a teacher judges."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from sparsetrain import sparsify
from sparsetrain.hf.model.architectures import sequence_tokens
from sparsetrain.hf.model.checkpointing import recompute
from sparsetrain.hf.model.denoising import DiffusionModel
from sparsetrain.hf.model.diffusion_config import DiffusionConfig
from sparsetrain.hf.model.models import add_lora
from sparsetrain.hf.study.recipe_trace import example_batch, outline, training_step
from sparsetrain.measure.memory import saved_activations, static_memory
from sparsetrain.planner.step_tracer import trace_step
from sparsetrain.recipes.finetune import Recipe
from tests.families import llama_config

DIT: dict[str, Any] = {"denoiser": "DiTTransformer2DModel", "num_layers": 4, "num_attention_heads": 2,
                       "attention_head_dim": 16, "sample_size": 16, "patch_size": 2, "num_embeds_ada_norm": 10,
                       "out_channels": 1}  # fmt: skip
UNET: dict[str, Any] = {"denoiser": "UNet2DModel", "block_out_channels": [16, 32], "layers_per_block": 1,
                        "norm_num_groups": 4, "attention_head_dim": 8, "sample_size": 16, "out_channels": 1,
                        "num_class_embeds": 10, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
                        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}  # fmt: skip
MODELS = {"dit": DiffusionConfig(**DIT, in_channels=1), "unet": DiffusionConfig(**UNET, in_channels=1),
          "classifier": llama_config(num_hidden_layers=5, pad_token_id=0)}  # fmt: skip
TEACHER = {"method": "sparsedm", "teacher_weight": 0.1}
WAYS: dict[str, dict[str, Any]] = {
    "dense": {"lora_r": 0},
    "LoRA": {"lora_r": 4},
    "sara": {"lora_r": 0, "methods": [{"method": "sara"}]},
    "teacher": {"methods": [TEACHER]},
    "teacher in bf16, again": {
        "methods": [{**TEACHER, "teacher_dtype": "bf16"}],
        "gradient_checkpointing": "non-reentrant",
    },
}
CASES = [*((kind, way) for kind in ("dit", "unet") for way in WAYS), ("classifier", "teacher")]
OF_TEACHER = {"teacher": 4, "teacher in bf16, again": 2}
"""Bytes of one of its numbers."""


def recipe(kind: str, **values: Any) -> Recipe:
    task = "classify" if kind == "classifier" else "diffusion"
    return Recipe.from_values({"model": "tiny", "data": "none", "methods": [], "seq_len": 64, "task": task, **values})


def real(asked: Recipe, config: Any) -> tuple[nn.Module, Any]:
    """The model with weights, all layers and its teacher, and its step."""
    torch.manual_seed(0)
    kind: Any = AutoModelForSequenceClassification if asked.task == "classify" else DiffusionModel
    model = kind.from_config(config)
    for parameter in model.parameters():  # a DiT begins with zeros, among which SaRA chooses nothing
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    handle = sparsify(model, *asked.configs, deploy=asked.deployment) if asked.methods else None
    model = add_lora(model, asked, handle, []).train()
    if asked.gradient_checkpointing != "none":
        recompute(model)
    batch = example_batch(asked, config, sequence_tokens(config, asked), rows=1)
    return model, training_step(model, batch, False, asked.task)


def whole_step(model: nn.Module, step: Any, gradients: int) -> tuple[float, float]:
    """Of a real step: the most bytes that live beside parameters, buffers and optimizer, and FLOPs of its products."""
    trace = trace_step(model, step, None)
    segments = (trace.before, *trace.forward, trace.head, *reversed(trace.backward))
    live, most = 0.0, float(gradients)
    for segment in segments:
        most = max(most, live + segment.peak)
        live += segment.kept
    return most, sum(segment.work.get("gemm fp32", (0.0,))[0] for segment in segments)


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_a_diffusion_model_and_a_taught_one_are_predicted(kind: str, way: str) -> None:
    """A teacher is held whole once and runs whole, though one block of a kind is traced. Seconds: four whole steps."""
    asked, config = recipe(kind, **WAYS[way]), MODELS[kind]
    tokens = sequence_tokens(config, asked)
    found = outline(asked, copy.deepcopy(config), bf16=False, lengths=(tokens,))
    model, step = real(asked, copy.deepcopy(config))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    step().backward()
    optimizer.step()
    static, numbers = static_memory(model, optimizer), found.trained
    optimizer.zero_grad(set_to_none=True)
    own = found.static
    average = 4 * numbers if asked.averages else 0
    near = pytest.approx if way == "sara" else lambda value, **_: value  # how many lie below θ follows from the weights
    assert own.parameters_frozen == static.parameters_frozen
    assert own.parameters_trainable == near(static.parameters_trainable, rel=0.02)
    assert own.gradients == near(static.gradients, rel=0.02)
    assert own.optimizer == near(static.optimizer_trainable, rel=0.02)
    assert own.buffers - average == near(static.buffers, rel=0.02)
    if way in OF_TEACHER:
        assert static.buffers > numbers * OF_TEACHER[way]
    peak, within = found.peak(tokens), 0.04 if kind == "unet" else 0.001  # a UNet's blocks share tensors
    saved = saved_activations(model, step).total
    assert sum(peak.saved_in_full.values()) == pytest.approx(saved, rel=within)
    most, flops = whole_step(model, step, static.gradients)
    stays = own.parameters_trainable + own.parameters_frozen + own.buffers + own.optimizer
    assert peak.total - stays == pytest.approx(most, rel=max(within, 0.03))
    assert found.work(tokens)["gemm fp32"][0] == pytest.approx(flops, rel=1e-3)


def test_a_teacher_held_by_a_block_that_stands_for_others_counts_once() -> None:
    asked = recipe("classifier", methods=[{**TEACHER, "layers": [2, 3, 4]}])
    first = recipe("classifier", methods=[TEACHER])
    buffers = [outline(r, copy.deepcopy(MODELS["classifier"]), bf16=False, lengths=(64,)).static.buffers
               for r in (asked, first)]  # fmt: skip
    assert buffers[0] == buffers[1]
