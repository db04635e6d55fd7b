"""Keys of transformers' `TrainingArguments` and PEFT's `LoraConfig`, as data: those that a recipe says by a key of its
own, those that would break what a run promises, and those of them all that have a short name here. The others pass.
"""

from __future__ import annotations

from typing import Any

LIBRARY: dict[str, str] = {
    "training": "transformers' TrainingArguments",
    "lora": "PEFT's LoraConfig",
}
"""Section of a recipe -> whose keys it holds."""

OWNED: dict[str, dict[str, str]] = {
    "training": {
        "output_dir": "output",
        "max_steps": "steps",
        "num_train_epochs": "epochs",
        "per_device_train_batch_size": "batch_size",
        "per_device_eval_batch_size": "batch_size",
        "gradient_accumulation_steps": "grad_accum",
        "learning_rate": "lr",
        "warmup_steps": "warmup_steps",
        "weight_decay": "weight_decay",
        "max_grad_norm": "max_grad_norm",
        "seed": "seed",
        "data_seed": "seed",
        "bf16": "dtype",
        "use_cpu": "device",
        "activation_checkpointing": "gradient_checkpointing",
        "activation_checkpointing_kwargs": "gradient_checkpointing",
        "gradient_checkpointing": "gradient_checkpointing",
        "gradient_checkpointing_kwargs": "gradient_checkpointing",
        "save_strategy": "save_every",
        "save_steps": "save_every",
        "save_total_limit": "keep_checkpoints",
        "eval_strategy": "eval_every",
        "eval_steps": "eval_every",
        "load_best_model_at_end": "load_best_model_at_end",
        "metric_for_best_model": "metric_for_best_model",
        "greater_is_better": "greater_is_better",
        "resume_from_checkpoint": "resume",
        "adam_beta1": "beta1",
        "adam_beta2": "beta2",
        "adam_epsilon": "eps",
    },
    "lora": {
        "r": "lora_r",
        "lora_alpha": "lora_alpha",
        "target_modules": "lora_targets",
        "task_type": "task",
    },
}
"""Key of theirs -> ours, where the recipe has it."""

_RECORDED = "every step is recorded, and dashboards are told every logging_steps steps"
_OWN_EVALUATION = "the held-out loss is measured by us, and this would have no effect (see eval_every, eval_tokens)"
_ORDER = "a run that goes on must see the same rows in the same order"
_DDP = "each rank holds the whole model and trains with DDP, whose settings the methods rely on"
_LOADER = "rows are collated in this process, where their order is recorded; they are tokenised already"
_ADAPTER = "PEFT sets it itself"
_BASE = "the adapter would no longer stand on the model that recipe.yaml names"

REFUSED: dict[str, dict[str, str]] = {
    "training": {
        "remove_unused_columns": "rows hold what the model takes and nothing else, and some of it only methods read",
        "label_names": _OWN_EVALUATION,
        "logging_strategy": _RECORDED,
        "logging_nan_inf_filter": "a loss that is not finite ends the run, and must not be hidden",
        "include_num_input_tokens_seen": "tokens of each step are counted by it",
        "disable_tqdm": "progress is shown by us",
        "skip_memory_metrics": "memory is measured by us, and is in the report",
        "fp16": "fp16 needs a scaled loss, which no run here has tried. Use dtype=bf16",
        "bf16_full_eval": _OWN_EVALUATION,
        "fp16_full_eval": _OWN_EVALUATION,
        "eval_delay": _OWN_EVALUATION,
        "eval_on_start": _OWN_EVALUATION,
        "eval_accumulation_steps": _OWN_EVALUATION,
        "eval_do_concat_batches": _OWN_EVALUATION,
        "eval_use_gather_object": _OWN_EVALUATION,
        "prediction_loss_only": _OWN_EVALUATION,
        "batch_eval_metrics": _OWN_EVALUATION,
        "include_for_metrics": _OWN_EVALUATION,
        "do_train": "it would have no effect",
        "do_eval": "it would have no effect",
        "do_predict": "it would have no effect",
        "auto_find_batch_size": "rows a step are part of what a recipe says, and its dense counterpart has as many",
        "average_tokens_across_devices": "the same recipe gives the same losses on any number of ranks",
        "use_cache": "packed rows would see each other",
        "save_only_model": "a run goes on with the state of its optimizer",
        "save_on_each_node": "the first rank writes for all",
        "enable_jit_checkpoint": "checkpoints are whole or not there, which this would not keep to",
        "ignore_data_skip": _ORDER,
        "accelerator_config": _ORDER,
        "restore_callback_states_from_checkpoint": "it makes new callbacks, and the methods would be left without",
        "dataloader_drop_last": "the steps of an epoch are counted with the last, shorter one",
        "dataloader_num_workers": _LOADER,
        "dataloader_persistent_workers": _LOADER,
        "dataloader_prefetch_factor": _LOADER,
        "dataloader_multiprocessing_context": _LOADER,
        "dataloader_in_order": _LOADER,
        "dataloader_pin_memory": "it follows from the device",
        "ddp_find_unused_parameters": _DDP,
        "ddp_broadcast_buffers": _DDP,
        "ddp_static_graph": _DDP,
        "ddp_backend": _DDP,
        "ddp_timeout": _DDP,
        "fsdp": _DDP,
        "fsdp_config": _DDP,
        "deepspeed": _DDP,
        "parallelism_config": _DDP,
        "local_rank": _DDP,
        "push_to_hub": "uploads would begin before the sidecar is there. Give --push-to-hub, which waits for the end",
        "hub_model_id": "nothing is pushed while a run trains",
        "hub_token": "nothing is pushed while a run trains, and recipe.yaml is no place for a token",
        "hub_strategy": "nothing is pushed while a run trains",
        "hub_private_repo": "nothing is pushed while a run trains",
        "hub_always_push": "nothing is pushed while a run trains",
        "hub_revision": "nothing is pushed while a run trains",
    },
    "lora": {
        "peft_type": _ADAPTER,
        "auto_mapping": _ADAPTER,
        "peft_version": _ADAPTER,
        "base_model_name_or_path": "the model is the recipe's",
        "revision": "the model is the recipe's",
        "inference_mode": "it is trained",
        "runtime_config": "it is not kept with an adapter",
        "fan_in_fan_out": "it follows from the model's class",
        "megatron_config": "tensor parallelism has not been tried",
        "megatron_core": "tensor parallelism has not been tried",
        "layer_replication": f"it makes a deeper model, and {_BASE}",
        "loftq_config": f"LoftQ puts quantised weights in place of the model's, and {_BASE}",
        "eva_config": "EVA starts from activations of the training rows, which PEFT must be given by a program",
        "corda_config": "CorDA starts from activations of the training rows, which PEFT must be given by a program",
        "lora_ga_config": "LoRA-GA starts from gradients on the training rows, which PEFT must be given by a program",
        "velora_config": "it changes what is kept for the backward pass, which no run here has tried",
        "alora_invocation_tokens": "an activated LoRA trains on the tokens after an invocation, which no task here has",
        "use_qalora": "it needs a base model quantised by GPTQ, which no run here has tried",
        "qalora_group_size": "it needs a base model quantised by GPTQ, which no run here has tried",
        "monteclora_config": "it adds a loss of its own, which no run here has tried",
        "use_bdlora": "it is for serving by blocks, which no run here has tried",
        "arrow_config": "Arrow chooses among adapters that are trained already",
        "kasa_config": f"it cuts small singular values off the model's weights, and {_BASE}",
    },
}
"""Key of theirs -> why it is not taken."""

SHORT: dict[str, tuple[str, str]] = {
    "optim": ("training", "optim"),
    "report_to": ("training", "report_to"),
    "run_name": ("training", "run_name"),
    "lora_dropout": ("lora", "lora_dropout"),
    "lora_bias": ("lora", "bias"),
}
"""Keys that a recipe may have by themselves, for keys of a section."""

WATCHING = frozenset(
    {"report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"}
    | {
        "logging_steps",
        "logging_first_step",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "debug",
        "torch_empty_cache_steps",
    }
)
"""Keys of `training` that change how a run is watched, and not what it trains."""

_LOFTQ = f"it puts quantised weights in place of the model's, and {_BASE}"
_ROWS = "PEFT must be given activations or gradients on the training rows by a program"
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}
"""lora_variant -> keys of `lora`."""
NO_VARIANTS: dict[str, str] = {
    "loftq": _LOFTQ,
    "pissa_niter": "its start is drawn, and whoever loads the adapter would draw another. Give pissa",
    "eva": _ROWS,
    "corda": _ROWS,
    "lora_ga": _ROWS,
    "mica": "no run here has tried it",
    "adalora": "its ranks change as it trains, by calls of its own after each step and a loss of its own",
    "vera": "it is no LoraConfig, and the methods read LoRA's factors",
}
"""Other variants that people ask for -> why there are none."""
