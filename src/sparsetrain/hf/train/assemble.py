"""The parts of a run, made from its recipe: config, rows, model, LoRA, the Trainer's arguments.

Cheap checks come first: a context that is too short or a size that does not divide fails before weights are read.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from sparsetrain.core.anatomy import describe
from sparsetrain.core.config import MethodConfig
from sparsetrain.hf.assets import resolve_model
from sparsetrain.hf.model import models, opening
from sparsetrain.hf.model.architectures import check_images, check_patches, sequence_tokens, tokens_per_input
from sparsetrain.hf.model.checkpointing import check_offload, checkpointing_arguments, offloads
from sparsetrain.hf.model.four_bit import bit_options, check_bits
from sparsetrain.hf.model.model_config import check_context
from sparsetrain.hf.model.revision import at_revision
from sparsetrain.hf.model.weights import auto_class, load_weights
from sparsetrain.hf.model.whole import check_causal
from sparsetrain.hf.train.parts import Parts
from sparsetrain.hf.train.passed import check_passed, passed_on
from sparsetrain.hf.train.readers import check_trust, open_reader
from sparsetrain.hf.train.rows import first_batch, load_rows, refuse_rows
from sparsetrain.measure.rates import device_of
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.recipes.tasks import task_of
from sparsetrain.runs.events import Report
from sparsetrain.runs.launch import shared_step
from sparsetrain.surgery.apply import Handle
from sparsetrain.surgery.method import edits_of, growth_of, method_of
from sparsetrain.surgery.plan import Plan, plan
from sparsetrain.surgery.support import FEATURES, check_support, sharding_asked

_FEATURES = {"load_in_4bit": "four_bit", "load_in_8bit": "eight_bit", "packing": "packing"}
"""Switches of a recipe -> what they ask of its methods."""


def open_parts(
    recipe: Recipe, report: Report, like: Recipe | None = None, opened: Parts[Recipe] | None = None
) -> Parts[Recipe]:
    """Everything but the weights, in the order of what fails fastest.

    Args:
        like: a sparse recipe that this dense run is compared with; attention dropout is as there.
        opened: of a recipe that differs in its methods alone: its rows are taken.

    Raises:
        ValueError, PlanError: the recipe does not fit the machine, the model or the data.
    """
    if (growth := growth_of(recipe.configs)) is not None:
        raise ValueError(
            f"{growth.method!r} makes models of other sizes in training, and finetune starts from trained weights of "
            "one size. Use pretrain, or another method."
        )
    device = pick_device(recipe)
    say_device(recipe, device, report)
    check_passed(recipe, device)
    if recipe.bits is not None:
        check_bits(recipe.bits, device)
    path, config = open_config(recipe, report, (like or recipe).configs)
    check_offload(recipe, config, device, report)
    planned = check_and_plan(recipe, config, device)
    tokenizer = open_reader(recipe, path, config, report) if opened is None else opened.tokenizer
    refuse_rows(recipe)
    bundle = load_rows(recipe, tokenizer, config, report) if opened is None else opened.bundle
    refuse_rows(recipe, bundle)
    if task_of(recipe.task).images:
        check_images(config, recipe, bundle)
    return Parts(
        recipe=recipe,
        device=device,
        path=path,
        config=config,
        plan=planned,
        tokenizer=tokenizer,
        bundle=bundle,
        tokens_per_input=tokens_per_input(config, recipe),
    )


def check_and_plan(recipe: Recipe, config: Any, device: torch.device) -> Plan | None:
    """The recipe's plan on the empty model, after what it asks for was found supported; None for a dense recipe.

    Raises:
        ValueError, PlanError: a method cannot do what the recipe asks for, or does not fit the model; or that is
            no model of the task.
    """
    model = models.empty_model(config, recipe.task)
    check_causal(model, recipe.model)
    planned = plan_on(model, recipe, device, sequence_tokens(config, recipe)) if recipe.methods else None
    models.check_tools(model, recipe, pick_dtype(recipe, device), planned)
    return planned


def plan_on(
    model: Any, recipe: RunRecipe, device: torch.device, seq_tokens: int, first: tuple[MethodConfig, ...] = ()
) -> Plan | None:
    """The plan of a recipe with methods on an empty model, after what it asks for was found supported; None if no
    method changes a model in place.

    Args:
        first: edits that are made before the recipe's own.

    Raises:
        ValueError, PlanError: a method cannot do what the recipe asks for, or does not fit the model.
    """
    check_support((*first, *recipe.configs), describe(model), asked_features(recipe, device))
    edits = (*first, *edits_of(recipe.configs))
    return plan(model, *edits, seq_tokens=seq_tokens) if edits else None


def asked_features(recipe: RunRecipe, device: torch.device) -> list[str]:
    """What a run of this recipe asks of its methods, as `surgery.support` names it."""
    found = ["cpu" if device.type == "cpu" else "gpu", "export"]
    found += {
        "none": [],
        "non-reentrant": ["checkpointing"],
        "reentrant": ["checkpointing_reentrant"],
    }[recipe.gradient_checkpointing]
    if task_of(recipe.task).padded:  # packed, too: held-out rows are padded
        found.append("padding")
    if task_of(recipe.task).labelled:
        found.append("classify")
    if autocasts(recipe, device):
        found.append("autocast")
    if getattr(recipe, "lora_r", 0) > 0:
        found.append("lora")
    found += [feature for key, feature in _FEATURES.items() if getattr(recipe, key, False)]
    return found


def open_config(recipe: Recipe, report: Report, configs: tuple[MethodConfig, ...]) -> tuple[str, Any]:
    """(path, config) of the recipe's model, with attention dropout off where `configs` take attention.

    Raises:
        ValueError: no such model, or `seq_len` is longer than its context.
    """
    if recipe.model_revision is not None:
        path = at_revision(recipe.model, recipe.model_revision, trust=recipe.trust_remote_code)
    else:
        path = resolve_model(recipe.model, progress=lambda line: report({"event": "note", "text": line}))
    config = opening.open_config(path, recipe.model, trust=recipe.trust_remote_code)
    check_trust(recipe, config, report)
    if task_of(recipe.task).images:
        check_patches(config, recipe)
    else:
        check_context(recipe.seq_len, config, recipe.model)
    models.check_lora_targets(recipe, config)
    models.drop_attention_dropout(config, lambda: models.empty_model(config, recipe.task), configs, report)
    return path, config


def load_model(parts: Parts, *, cut: bool = False) -> tuple[Any, list[str]]:
    """The pretrained model on its device with SDPA attention, and the names of modules it had no weights for.

    Args:
        cut: the config was cut to fewer layers than the files hold.

    Raises:
        ValueError: weights that are missing or damaged; a language model without a trained head.
    """
    recipe, config, bundle = parts.recipe, parts.config, parts.bundle
    labelled = task_of(recipe.task).labelled
    if labelled:
        config.num_labels = bundle.num_labels
        config.id2label = dict(enumerate(bundle.label_names))
        config.label2id = {name: i for i, name in enumerate(bundle.label_names)}
        if not task_of(recipe.task).images and config.pad_token_id is None:
            config.pad_token_id = bundle.collate_fn.pad_token_id  # type: ignore[attr-defined]
    set_seed(recipe.seed)  # a new head is drawn here
    dtype = pick_dtype(recipe, parts.device)
    model, new = load_weights(
        parts.path,
        auto_class(recipe.task).__name__,
        dtype,
        config,
        name=recipe.model,
        new_head=labelled,
        cut=cut,
        options=bit_options(recipe.bits, parts.device, dtype),
    )
    if recipe.packing:  # with a cache, transformers does not see the boundaries of packed rows
        model.config.use_cache = False
    return model.to(parts.device), new


def pick_device(recipe: RunRecipe) -> torch.device:
    """The device that the recipe asks for.

    Raises:
        ValueError: it is not there, or accelerate is asked to share the work among several.
    """
    for feature, by in sharding_asked(os.environ).items():
        raise ValueError(
            f"{by} asks for {FEATURES[feature]}, and each rank of a run holds a whole model. Unset {by.split('=')[0]}: "
            "torchrun and accelerate launch then train with DDP."
        )
    device = device_of(recipe.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={recipe.device}: this machine has {torch.cuda.device_count()} GPUs. Use device=cpu.")
    if device.type == "cuda" and device.index:
        raise ValueError(
            f"device={recipe.device}: choose the GPU with CUDA_VISIBLE_DEVICES={device.index} and device=cuda."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device=mps: this machine has no MPS. Use device=cpu.")
    return device


_TILED = ("block_sparse_attention", "token_sparse_attention")
"""Operations whose fast forms are a CPU's tiles and CUDA's kernels."""


def say_device(recipe: RunRecipe, device: torch.device, report: Report) -> None:
    """Tell what runs as plain PyTorch alone on a device that is neither a CPU nor CUDA's (MPS)."""
    called = {op for config in recipe.configs for op in config.called_ops()}
    if device.type not in ("cpu", "cuda") and (slow := [op for op in _TILED if op in called]):
        text = f"device {device.type}: {' and '.join(slow)} as the reference, with scores of all pairs of tokens: "
        report({"event": "note", "text": f"{text}it saves neither time nor memory there. Or give device=cpu."})


def pick_dtype(recipe: RunRecipe, device: torch.device) -> torch.dtype:
    """The dtype of the weights: as the recipe says, but fp32 masters where all weights are trained."""
    return torch.bfloat16 if computes_bf16(recipe, device) and not recipe.trains_all else torch.float32


def computes_bf16(recipe: RunRecipe, device: torch.device) -> bool:
    """Is it computed in bf16? An auto that is left (see `dtype.with_dtype`) is that of before it was measured."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return recipe.dtype == "bf16" or (recipe.dtype == "auto" and able)


def autocasts(recipe: RunRecipe, device: torch.device) -> bool:
    """Frozen bf16 weights compute in bf16 by themselves; do fp32 masters, under autocast?"""
    return computes_bf16(recipe, device) and recipe.trains_all


def learning_rate(recipe: RunRecipe, handle: Handle | None) -> float:
    """The recipe's, or what a method says of the converted model, or the default of what is dense."""
    if recipe.lr is not None:
        return recipe.lr
    if handle is not None:
        for config in handle.configs:
            if (says := method_of(config).learning_rate) is not None:
                return says(config, [site for edit, site in handle.installed if edit.config is config])
    return type(recipe).model_fields["lr"].default


def training_arguments(parts: Parts, **changes: Any) -> TrainingArguments:
    """The Trainer's arguments, with what the recipe passes on; what the checkpoint protocol and the records need is
    fixed here, and no recipe can name it.

    Args:
        changes: further arguments of a job, or others in place of these.
    """
    recipe, device = parts.recipe, parts.device
    rows, passes = shared_step(recipe)
    everywhere: dict[str, Any] = {"logging_steps": 1}  # what a recipe says of it is for dashboards
    values: dict[str, Any] = dict(
        output_dir=recipe.output,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=passes,
        max_steps=recipe.steps or -1,
        num_train_epochs=recipe.epochs or 1.0,
        optim="adamw_torch_fused",
        learning_rate=learning_rate(recipe, None),
        weight_decay=recipe.weight_decay,
        warmup_steps=recipe.warmup_steps,
        lr_scheduler_type="constant_with_warmup" if recipe.lr_schedule == "constant" else recipe.lr_schedule,
        max_grad_norm=recipe.max_grad_norm,
        logging_strategy="steps",
        logging_nan_inf_filter=False,
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or 1,
        save_total_limit=None,
        seed=recipe.seed,
        data_seed=recipe.seed,
        use_cpu=device.type == "cpu",
        bf16=autocasts(recipe, device),
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        include_num_input_tokens_seen="non_padding" if "attention_mask" in first_batch(parts) else "all",
        report_to="none",
        ddp_find_unused_parameters=False,  # what has no gradient in a step gets zeros (surgery.idle)
        ddp_broadcast_buffers=False,  # what ranks record of their own rows is summed where it is used
        disable_tqdm=True,
        accelerator_config={"dispatch_batches": False},  # of streamed rows too: the process that reads them trains
        **checkpointing_arguments(recipe.gradient_checkpointing, offloads(recipe, device)),
    )
    arguments = TrainingArguments(**values | changes | passed_on(recipe) | everywhere)
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process, one GPU: no DataParallel
    return arguments
