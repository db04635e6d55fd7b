"""Reading LoRA factors off a linear that PEFT has wrapped, without importing PEFT.

A method that computes a linear itself (on some rows, some columns) has to add the adapter itself. PEFT keeps the
original under `base_layer` and the factors in `lora_A`, `lora_B`, `scaling`, `lora_dropout`, keyed by adapter name.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import innermost
from sparsetrain.ops.linear_parts import LinearParts as LinearParts


def linear_parts(module: nn.Module, transposed: bool = False) -> LinearParts:
    """Weight [out, in], bias and active LoRA factors of a linear, wrapped by PEFT or not.

    Several active adapters are stacked along the rank.

    Raises:
        ValueError: an adapter that is not plain LoRA (DoRA and other variants, a bias of its own).
    """
    inner = innermost(module)
    weight: Tensor = inner.weight.t() if transposed else inner.weight
    bias: Tensor | None = inner.bias
    if inner is module or getattr(module, "merged", False) or getattr(module, "disable_adapters", False):
        return LinearParts(weight, bias)
    if not hasattr(module, "lora_A"):
        raise ValueError(
            f"a linear is wrapped by {type(module).__name__}, whose update cannot be computed block by block. "
            "Use LoRA on this linear, or leave it out of target_modules."
        )
    a_parts, b_parts, dropout = [], [], 0.0
    for name in module.active_adapters:  # type: ignore[union-attr]
        if name not in module.lora_A:  # type: ignore[operator]
            continue
        if name in getattr(module, "lora_variant", {}):
            raise ValueError(
                f"adapter {name!r} uses a LoRA variant (such as DoRA), which changes the weight as a whole. "
                "Use plain LoRA (use_dora=False) on linears that a sparse method computes."
            )
        a_parts.append(module.lora_A[name].weight)  # type: ignore[index]
        b_parts.append(module.lora_B[name].weight * module.scaling[name])  # type: ignore[index]
        drop = module.lora_dropout[name]  # type: ignore[index]
        dropout = max(dropout, float(drop.p) if isinstance(drop, nn.Dropout) else 0.0)
    if not a_parts:
        return LinearParts(weight, bias)
    lora = (a_parts[0], b_parts[0]) if len(a_parts) == 1 else (torch.cat(a_parts, 0), torch.cat(b_parts, 1))
    return LinearParts(weight, bias, lora, dropout if module.training else 0.0)
