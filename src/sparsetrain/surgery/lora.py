"""Reading an adapter off a linear that PEFT has wrapped, without importing PEFT.

A method that computes a linear itself (on some rows, some columns) has to add the adapter itself. Known is what LoRA
and AdaLoRA compute; every other adapter is refused by name, since it would be left out without a word. PEFT keeps the
original under `base_layer` and the factors in `lora_A`, `lora_B`, `scaling`, `lora_dropout`, keyed by adapter name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import innermost
from sparsetrain.ops.linear_parts import LinearParts as LinearParts

_KNOWN = ("lora.Linear", "adalora.SVDLinear")


def linear_parts(module: nn.Module, transposed: bool = False) -> LinearParts:
    """Weight [out, in], bias and active LoRA factors of a linear, wrapped by PEFT or not.

    Several active adapters are stacked along the rank; their biases are part of the bias.

    Raises:
        ValueError: an adapter that is neither LoRA nor AdaLoRA, or a linear of another class (`refused_adapter`).
    """
    if reason := refused_adapter(module):
        raise ValueError(f"a linear that a sparse method computes itself {reason}")
    return _parts(_copy_in_use(module), transposed)


def _parts(wrapped: Any, transposed: bool) -> LinearParts:
    inner = innermost(wrapped)
    weight: Tensor = inner.weight.t() if transposed else inner.weight
    bias: Tensor | None = inner.bias
    if _is_bare(wrapped):
        return LinearParts(weight, bias)
    factors = [_factors(wrapped, name) for name in active_adapters(wrapped)]
    for name in active_adapters(wrapped):
        added = getattr(wrapped.lora_B[name], "bias", None)
        if added is not None:
            added = added * wrapped.scaling[name]
            bias = added if bias is None else bias + added.to(bias.dtype)
    if not factors:
        return LinearParts(weight, bias)
    a, b = zip(*factors, strict=True)
    lora = (a[0], b[0]) if len(factors) == 1 else (torch.cat(a, 0), torch.cat(b, 1))
    return LinearParts(weight, bias, lora, max(_dropouts(wrapped)))


def _factors(wrapped: Any, name: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] with the scale, of one adapter."""
    a, b, scale = wrapped.lora_A[name], wrapped.lora_B[name], wrapped.scaling[name]
    if adapter_kind(wrapped) == "adalora.SVDLinear":
        return a * wrapped.lora_E[name], b * (scale / (wrapped.ranknum[name] + 1e-5))
    return a.weight, b.weight if scale == 1 else b.weight * scale


def refused_adapter(module: nn.Module) -> str | None:
    """Why `linear_parts` cannot read a linear as it is about to run ("is wrapped by …"), or None."""
    wrapped: Any = _copy_in_use(module)
    inner = innermost(wrapped)
    if gives_each_sample_its_adapter(module):
        return "is called with adapter_names, another adapter for each sample. Use one adapter for the whole batch."
    kind = type(inner)
    if _is_patched(inner) or not (kind.forward is nn.Linear.forward or kind.__name__ == "Conv1D"):
        found = "carries a forward of its own" if _is_patched(inner) else f"is a {kind.__name__}"
        return f"{found}, and nn.Linear or Conv1D is known. Leave this FFN out with `targets`."
    if _is_bare(wrapped):
        return None
    found = adapter_kind(wrapped)
    if found not in _KNOWN or wrapped.base_layer is not inner or _is_patched(wrapped):
        if found in _KNOWN:
            found += " whose forward is patched" if wrapped.base_layer is inner else " around another adapter"
        return (
            f"is wrapped by {found}, whose update cannot be computed block by block. Use LoRA or AdaLoRA on this "
            "linear, or leave it out of target_modules."
        )
    for name in active_adapters(wrapped):
        if variant := getattr(wrapped, "lora_variant", {}).get(name):
            return (
                f"has an adapter {name!r} of a LoRA variant ({type(variant).__name__}; DoRA is one), which is no "
                "product of two factors. Use plain LoRA (use_dora=False) on it."
            )
    if len(active_adapters(wrapped)) > 1 and any(_dropouts(wrapped)):
        return (
            "has several active adapters with dropout, each with a mask of its own. Train one, or set lora_dropout=0."
        )
    return None


def plain_lora(block: nn.Module) -> dict[nn.Module, LinearParts]:
    """The linears of a block that run with LoRA and nothing else: frozen, no dropout, bias, variant or own forward.

    It is asked of every block in every step, so it reads modules' dictionaries: an attribute that is not there costs
    an nn.Module 3 us, and 7 linears had cost 1.1 ms.
    """
    found = ((module, _plain_parts(module)) for module in _lora_linears(block))
    return {module: parts for module, parts in found if parts is not None}


def _lora_linears(module: nn.Module) -> Iterator[nn.Module]:
    for child in module._modules.values():
        if child is None or isinstance(child, nn.ModuleDict):
            continue
        if adapter_kind(child) == "lora.Linear":
            yield child
        else:
            yield from _lora_linears(child)


def _plain_parts(wrapped: Any) -> LinearParts | None:
    """The parts of a linear with LoRA, None unless it is a plain one. The scale of one adapter stands beside B."""
    inner, a, b = (wrapped._modules[name] for name in ("base_layer", "lora_A", "lora_B"))
    kind, transposed = type(inner), type(inner).__name__ == "Conv1D"
    if not (transposed or kind.forward is nn.Linear.forward) or _is_patched(inner):
        return None
    names = [name for name in wrapped.active_adapters if name in a._modules]
    if not names or wrapped.disable_adapters or wrapped.merged or _is_patched(wrapped):
        return None
    if "base_layer" in inner._modules or gives_each_sample_its_adapter(wrapped):
        return None
    if any(wrapped.lora_variant.get(name) for name in names):
        return None
    weight, bias = inner.weight, inner.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if any(b._modules[name].bias is not None for name in names) or any(_dropouts(wrapped)):
        return None
    if len(names) > 1:
        return _parts(wrapped, transposed)
    factors = a._modules[names[0]].weight, b._modules[names[0]].weight
    return LinearParts(weight.t() if transposed else weight, bias, factors, lora_scale=wrapped.scaling[names[0]])


class _RunsAs:
    """A forward that stands in for a linear's own; what reads the linear may go on as if it were not there."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self.forward = forward

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)


def _is_patched(module: nn.Module) -> bool:
    return not isinstance(vars(module).get("forward"), _RunsAs | None)


@contextmanager
def runs_as(forwards: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside, each linear computes what its entry says."""
    for module, forward in forwards.items():
        vars(module)["forward"] = _RunsAs(forward)
    try:
        yield
    finally:
        for module in forwards:
            del vars(module)["forward"]


def has_lora_bias(module: nn.Module) -> bool:
    """Whether an active adapter of the linear adds a bias."""
    wrapped: Any = _copy_in_use(module)
    if _is_bare(wrapped) or not hasattr(wrapped, "lora_B"):
        return False
    return any(getattr(wrapped.lora_B[name], "bias", None) is not None for name in active_adapters(wrapped))


def adapter_kind(module: nn.Module) -> str:
    """An adapter's layer by PEFT's package and class (`lora.Linear`, `vera.Linear`); other classes by their name."""
    return _name_of(type(module))


@cache
def _name_of(kind: type) -> str:
    place = kind.__module__.split(".")
    return f"{place[2]}.{kind.__name__}" if place[:2] == ["peft", "tuners"] else kind.__name__


def gives_each_sample_its_adapter(module: nn.Module) -> bool:
    """Whether PEFT is about to call a module with `adapter_names`, by a hook that only the module's own call runs."""
    return any("adapter_names" in getattr(hook, "keywords", {}) for hook in module._forward_pre_hooks.values())


def _copy_in_use(module: nn.Module) -> Any:
    """Of a linear in `modules_to_save`, the copy that its call would run."""
    copies: Any = module._modules.get("modules_to_save")
    if not isinstance(copies, nn.ModuleDict):
        return module
    used = [] if module.disable_adapters else [name for name in module.active_adapters if name in copies]  # type: ignore[union-attr]
    return copies[used[0]] if used else module.original_module


def _is_bare(wrapped: Any) -> bool:
    """Whether the innermost linear is all that counts: no adapter, or one that is merged or disabled."""
    if "base_layer" not in wrapped._modules:
        return True
    if wrapped.disable_adapters and wrapped.merged:
        wrapped.unmerge()  # as the adapter's own forward does
    return bool(wrapped.disable_adapters or wrapped.merged)


def active_adapters(wrapped: Any) -> list[str]:
    """Names of the adapters that a wrapped linear adds."""
    return [name for name in wrapped.active_adapters if name in wrapped.lora_A]


def _dropouts(wrapped: Any) -> list[float]:
    """The probability in force, of each active adapter."""
    layers = [wrapped.lora_dropout[name] for name in active_adapters(wrapped)]
    return [float(drop.p) if isinstance(drop, nn.Dropout) and drop.training else 0.0 for drop in layers]
