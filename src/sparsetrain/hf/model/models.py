"""Models of a recipe: empty ones that show shapes, LoRA around them, attention dropout out of them.

Nothing here reads data, so that a plan imports no more than it needs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import set_seed
from transformers.pytorch_utils import Conv1D

from sparsetrain.core.anatomy import describe
from sparsetrain.core.config import MethodConfig, suggest
from sparsetrain.core.fields import shown
from sparsetrain.hf.model.four_bit import import_bitsandbytes
from sparsetrain.hf.model.passed import lora_config
from sparsetrain.hf.model.weights import auto_class, empty_of, fitting_class
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.tasks import task_of
from sparsetrain.surgery.apply import Handle
from sparsetrain.surgery.chunked_loss import use_chunked_loss
from sparsetrain.surgery.method import method_of
from sparsetrain.surgery.plan import Plan
from sparsetrain.surgery.tiled import check_tiled, use_tiled_mlp

if TYPE_CHECKING:
    from sparsetrain.runs.events import Report

ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")

MAMBA, LEFT_OUT = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), ("out_proj", "conv1d")
"""Model types of which PEFT refuses these layers: their kernels read weights past a module's forward."""


def drop_attention_dropout(
    config: Any, empty: Callable[[], Any], configs: tuple[MethodConfig, ...], report: Report
) -> None:
    """Set the config's attention dropout to 0, with a note, where `configs` take attention of the `empty` model."""
    dropped = [name for name in ATTENTION_DROPOUT if getattr(config, name, 0)]
    if dropped and attention_is_taken(empty, configs):
        for name in dropped:
            why = f"attention has no dropout under {', '.join(method.method for method in configs)}"
            report({"event": "note", "text": f"{name} {getattr(config, name)} -> 0: {why}."})
            setattr(config, name, 0.0)


def attention_is_taken(empty: Callable[[], Any], configs: tuple[MethodConfig, ...]) -> bool:
    """Does a method take an attention, or a block with the attention in it?"""
    if not configs:
        return False
    anatomy = describe(empty())
    sites = [site for method in configs for site in method_of(method).site_names(anatomy)]
    return any(f"{attention.name}.".startswith(f"{site}.") for attention in anatomy.attentions for site in sites)


def empty_model(config: Any, task: str) -> Any:
    """The model on the meta device in fp32: its modules and shapes without its weights.

    Raises:
        ValueError: none can be built of this config, or it is no model of the task.
    """
    name = str(getattr(config, "name_or_path", "") or config.model_type)
    return empty_of(fitting_class(auto_class(task).__name__, config, name), config, name)


def check_lora_targets(recipe: Recipe, config: Any) -> None:
    """Raise ValueError if a name among the LoRA targets is the ending of no linear's name; reads no weights."""
    if recipe.lora_r == 0 or recipe.lora_targets == "all-linear":
        return
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, Conv1D)
    names = [n for n, module in empty_model(config, recipe.task).named_modules() if isinstance(module, kinds)]
    for target in recipe.lora_targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            endings = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise ValueError(
                f"lora_targets (--lora-targets): {shown(target)} matches no linear of {recipe.model}."
                f"{suggest(target, endings)} Their names end in {', '.join(endings[:20])}. Or give all-linear."
            )


def check_tools(model: Any, recipe: Recipe, weights: torch.dtype, planned: Plan | None) -> None:
    """Raise ValueError if PEFT does not take LoRA's keys, its dtype does not go with that of the weights, or an FFN
    cannot run in the pieces asked for."""
    if recipe.lora_r > 0:
        lora_config(recipe)
    if recipe.lora_dtype == "bf16" and weights == torch.float32:
        raise ValueError("lora_dtype=bf16 goes with a model in bf16, and this run is in fp32. Give dtype=bf16 too.")
    check_tiled(model, recipe.tiled_mlp, () if planned is None else planned.edits)


def trained_of(model: Any, recipe: Recipe, new_modules: list[str]) -> list[str]:
    """Of the modules that a model had no weights for, those that train; and what else of its own a method trains."""
    for config in recipe.configs:
        if config.trains_own:
            new_modules = method_of(config).trains(config, describe(model), new_modules)
    return new_modules


def add_lora(model: Any, recipe: Recipe, handle: Handle | None, new_modules: list[str]) -> Any:
    """The model as it is trained: inside PEFT with LoRA and with everything new trainable; the model itself if `lora_r`
    is 0, with its own weights frozen where the recipe's methods train nothing but what they add. A language model's
    loss is computed in chunks.

    Raises:
        ValueError: `lora_targets` matches nothing; an FFN that cannot run in the pieces asked for; an adapter that a
            method would compute wrongly.
    """
    use_tiled_mlp(model, recipe.tiled_mlp, () if handle is None else handle.plan.edits)
    new_modules = trained_of(model, recipe, new_modules)
    if recipe.lora_r > 0:
        plain, model = model, _with_lora(model, recipe, handle, new_modules)
        owners = dict(plain.named_modules())
        for edit, module in handle.installed if handle is not None else ():
            if edit.site in owners:  # a plan keeps a block of each kind
                module.check_adapters(owners[edit.site])
    if recipe.trains_own:
        if recipe.lora_r == 0:
            model.requires_grad_(False)
            if recipe.gradient_checkpointing == "reentrant":  # a block whose inputs need no gradient passes none on
                model.enable_input_require_grads()
            for name in new_modules:
                model.get_submodule(name).requires_grad_(True)
        for edit, module in handle.installed if handle is not None else ():
            if edit.config.trains_own:
                module.requires_grad_(True)
    task = task_of(recipe.task)
    if task.causal and task.loss is None:
        use_chunked_loss(model)
    return model


def _with_lora(model: Any, recipe: Recipe, handle: Handle | None, new_modules: list[str]) -> Any:
    trained = [*(handle.modules_to_save if handle is not None else []), *new_modules]
    conv1d = any(isinstance(module, Conv1D) for module in model.modules())
    config = lora_config(recipe, modules_to_save=trained, fan_in_fan_out=conv1d)
    if model.config.model_type in MAMBA and recipe.lora_targets == "all-linear" and config.exclude_modules is None:
        config.exclude_modules = list(LEFT_OUT)
    if any(parameter.is_meta for parameter in model.parameters()):
        config.init_lora_weights = True  # there are no weights to start from
    import_bitsandbytes()
    set_seed(recipe.seed)  # the same LoRA start for every recipe of the same seed
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 by a name that is deprecated there
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        try:
            # PEFT makes empty factors in fp32, whatever the weights are
            fp32 = recipe.lora_dtype == "fp32"
            empty = fp32 and all(p.is_meta for p in model.parameters())
            model = get_peft_model(model, config, autocast_adapter_dtype=fp32, low_cpu_mem_usage=empty)
        except ValueError as error:
            if recipe.lora_targets != "all-linear" or "No `target_modules`" not in str(error):
                raise
            names = " and ".join(config.method for config in recipe.configs) or "the model"
            raise ValueError(f"{names} leaves no linear for LoRA. Set lora_r=0, or narrow its targets.") from None
    if recipe.model_revision is not None:  # PEFT would name the folder of its snapshot
        config.base_model_name_or_path, config.revision = recipe.model, recipe.model_revision
    return model


def num_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters; tied ones once, and a module that PEFT keeps beside its trained copy not at all."""
    found = [p for name, p in model.named_parameters() if "original_module" not in name.split(".")]
    return sum(map(_numel, found)), sum(_numel(p) for p in found if p.requires_grad)


def _numel(parameter: nn.Parameter) -> int:
    """Numbers that it stands for: of those in 4 bits, two share a byte."""
    return parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)
