"""Whether adapters can be folded into the weights they stand on."""

from __future__ import annotations

from peft import PeftModel

from sparsetrain.core.anatomy import innermost
from sparsetrain.surgery.apply import Handle
from sparsetrain.surgery.lora import adapter_kind
from sparsetrain.surgery.method import method_of


def check_merge(model: PeftModel, handle: Handle | None) -> None:
    """Raise ValueError if folding adapters into the weights would change the outputs."""
    base = model.get_base_model()
    adapted = {name: module for name, module in base.named_modules() if hasattr(module, "base_layer")}
    owners: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.replace(".base_layer", ""))
    for name, module in adapted.items():
        others = [
            owner
            for owner in owners.get(id(getattr(innermost(module), "weight", None)), [])
            if owner != f"{name}.weight"
        ]
        if others and not adapter_kind(module).startswith("trainable_tokens."):  # which PEFT ties itself
            raise ValueError(
                f"{adapter_kind(module)} on {name} cannot be merged: its weight is also {others[0]} (tied), which "
                "would change with it. Use the adapter folder as it is, or train with tie_word_embeddings=False."
            )
    for edit in handle.plan.edits if handle is not None else ():
        linears = sorted(adapted.keys() & edit.claims)
        if reason := method_of(edit.config).merge_adapter_error(edit.config, linears):
            raise ValueError(f"{adapter_kind(adapted[linears[0]])} on {linears[0]} cannot be merged: {reason}.")
