"""What is refused before a Trainer trains a converted model."""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState
from transformers import TrainingArguments

from sparsetrain.core.anatomy import submodule
from sparsetrain.surgery.apply import Handle
from sparsetrain.surgery.method import method_of


def asked_of_trainer(args: TrainingArguments) -> dict[str, str]:
    """What the Trainer's arguments, or the accelerate that it made, ask for: feature -> what asks."""
    found = {
        feature: f"TrainingArguments({name}=…)"
        for name, feature in (("fsdp", "fsdp"), ("deepspeed", "deepspeed"))
        if getattr(args, name, None)
    }
    made = getattr(args, "parallelism_config", None), AcceleratorState._shared_state.get("parallelism_config")
    for config in filter(None, made):
        for name, feature in (
            ("dp_shard_size", "fsdp"),
            ("tp_size", "tensor_parallel"),
            ("cp_size", "context_parallel"),
            ("sp_size", "context_parallel"),
        ):
            if (getattr(config, name, None) or 1) > 1:
                found[feature] = f"ParallelismConfig({name}={getattr(config, name)})"
    return found


def check_forwards(handle: Handle) -> None:
    """Raise ValueError if something has bound another forward over one of ours since the conversion.

    Kernel patches (Liger) and offload hooks assign `module.forward` on the instance, which then wins over the class.
    """
    for edit in handle.plan.edits:
        module = submodule(handle.model, edit.site)
        if "forward" in vars(module) or hasattr(module, "_hf_hook"):
            found = "an offload hook" if hasattr(module, "_hf_hook") else "a forward patched on the instance"
            raise ValueError(
                f"{edit.site} was converted by {edit.method!r} and now carries {found}, so the sparse forward would "
                "never run. Turn kernel patches off for it (liger_kernel_config) and load without device_map."
            )


def check_trainable(handle: Handle) -> None:
    """Raise ValueError if a parameter that a method added is frozen: PEFT freezes what it is not told about."""
    if not handle.trains_auxiliary:
        return
    for edit, module in handle.installed:
        for name, parameter in module.named_parameters():
            # PEFT keeps a frozen original beside the copy that it trains
            if not parameter.requires_grad and "original_module" not in name.split("."):
                tell = f"Tell PEFT about it: LoraConfig(modules_to_save={handle.modules_to_save!r})."
                if not method_of(edit.config).modules_to_save:
                    tell = f"Call handle.sites({edit.method!r})[{edit.site!r}].requires_grad_(True), for every site."
                raise ValueError(f"{name} of {edit.key} is frozen, so it would keep its first values. {tell}")


def check_arguments(handle: Handle, arguments: TrainingArguments) -> None:
    """Raise ValueError if a method cannot be trained with a trainer's arguments."""
    for edit, module in handle.installed:
        if reason := module.refuses(arguments):
            raise ValueError(f"{edit.method} cannot be trained with these arguments: {reason}.")


def check_reference(handle: Handle, arguments: TrainingArguments, model: Any) -> None:
    """Raise ValueError if a trainer (TRL's DPO, KTO, GRPO) would compare a sparse forward with a dense model's."""
    ahead = getattr(arguments, "precompute_ref_log_probs", None)
    has_reference = ahead is not None or (hasattr(arguments, "sync_ref_model") and getattr(arguments, "beta", 0))
    within = getattr(model, "peft_config", None) is not None and not ahead
    sparse = [config.method for config in handle.configs if config.changes_outputs]
    if has_reference and sparse and handle.deploys_dense and not within:
        raise ValueError(
            f"{type(arguments).__name__} compares the model with a reference of its own, which runs dense, and "
            f"{', '.join(sparse)} with deploy='dense' trains it sparse: the method's error would count as what was "
            "learned. Train LoRA with precompute_ref_log_probs=False, whose reference is the sparse model without it."
        )
