"""Sharded training is refused whichever way it is asked for, and never replaced by something else in silence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import LlamaForCausalLM

from sparsetrain import RoutedFFN, SemiStructured, TokenSelection, sparsify
from sparsetrain.cli import run
from sparsetrain.surgery.method import method_of
from sparsetrain.surgery.support import sharding_asked
from tests.families import llama_config

ASKED = {
    "ACCELERATE_USE_FSDP": ("true", "fsdp"),
    "ACCELERATE_USE_DEEPSPEED": ("True", "deepspeed"),
    "ACCELERATE_USE_MEGATRON_LM": ("1", "tensor_parallel"),
    "PARALLELISM_CONFIG_TP_SIZE": ("2", "tensor_parallel"),
    "PARALLELISM_CONFIG_CP_SIZE": ("4", "context_parallel"),
    "PARALLELISM_CONFIG_SP_SIZE": ("2", "context_parallel"),
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": ("-1", "fsdp"),
}


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(llama_config())


@pytest.mark.parametrize("variable", ASKED)
def test_accelerates_environment(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    value, feature = ASKED[variable]
    monkeypatch.setenv(variable, value)
    model = llama()
    with pytest.raises(ValueError, match=f"asked for {feature} .* by {variable}={value}.*one device"):
        sparsify(model, TokenSelection())
    for verb in ("finetune", "pretrain"):  # with and without a method
        model_name = "gpt2-nano" if verb == "pretrain" else "m"
        flags = ["--model", model_name, "--data", "d", "--output", str(tmp_path / "run"), "--device", "cpu"]
        code, error = run([verb, *flags]), capsys.readouterr().err
        assert code == 2 and variable in error and "Unset" in error, error
    assert not (tmp_path / "run").exists()


def test_what_asks_for_nothing() -> None:
    assert (
        sharding_asked({"ACCELERATE_USE_FSDP": "false", "PARALLELISM_CONFIG_TP_SIZE": "1", "FSDP_VERSION": "2"}) == {}
    )
    assert sharding_asked({"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "bf16"}) == {}


@pytest.mark.parametrize(
    ("arguments", "feature"),
    [
        ({"fsdp": True}, "fsdp"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "deepspeed"),
        ({"parallelism_config": SimpleNamespace(tp_size=2)}, "tensor_parallel"),
        ({"parallelism_config": SimpleNamespace(cp_size=2, tp_size=None)}, "context_parallel"),
    ],
)
def test_the_trainers_arguments(arguments: dict, feature: str) -> None:
    callback = sparsify(llama(), RoutedFFN()).callback()
    args = SimpleNamespace(fp16=False, max_grad_norm=1.0, bf16=False, output_dir="", **arguments)
    with pytest.raises(ValueError, match=feature):
        callback.on_train_begin(args, SimpleNamespace(global_step=0, max_steps=1), SimpleNamespace())


def test_a_plugin_of_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    callback = sparsify(llama(), RoutedFFN()).callback()
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", SimpleNamespace(dp_shard_size=2))
    args = SimpleNamespace(fp16=False, max_grad_norm=1.0, bf16=False, output_dir="")
    with pytest.raises(ValueError, match="asked for fsdp "):
        callback.on_train_begin(args, SimpleNamespace(global_step=0, max_steps=1), SimpleNamespace())


def test_sharded_after_the_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """As FSDP does, and `fully_shard` with a method that needs whole weights: the first `handle.step` sees it."""
    monkeypatch.setitem(method_of(SemiStructured()).limits, "fsdp2", "whole weights. Train with DDP, or on one device")

    class FullyShardedDataParallel(nn.Module):
        pass

    class DTensor(nn.Parameter):
        pass

    for shard in ("wrapper", "parameter"):
        model = llama()
        handle = sparsify(model, SemiStructured())
        if shard == "wrapper":
            model.add_module("wrapped", FullyShardedDataParallel())
        else:
            model.lm_head.weight = DTensor(torch.zeros_like(model.lm_head.weight))
        with pytest.raises(ValueError, match=r"fsdp.*Train with DDP, or on one device"):
            handle.step(0, 10)


def test_an_ordinary_model_steps_on() -> None:
    handle = sparsify(llama(), RoutedFFN(warmup_ratio=0.1))
    handle.step(0, 10)
    assert all(site.warming_up for site in handle.sites("routed_ffn").values())
    handle.step(1, 10)
    assert not any(site.warming_up for site in handle.sites("routed_ffn").values())
