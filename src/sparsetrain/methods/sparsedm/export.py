"""Leaving SparseDM: the plain model with the zeros written in, and its linears packed for 2:4 products on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from sparsetrain.core.anatomy import innermost, submodule
from sparsetrain.core.errors import Unsupported
from sparsetrain.ops.sparse24_linear.packing import compress, kernel_refusal
from sparsetrain.surgery.apply import Handle

KERNELS = ("cusparselt", "cutlass")


def to_dense(handle: Handle, *, force: bool = False) -> nn.Module:
    """Make the model plain, with W ∘ M as its weights: same outputs, exact zeros, no code of ours.

    Every masked weight is made, as a new tensor, before anything is changed.

    Args:
        force: also before the plan has come to its last ratio.

    Raises:
        ValueError: nothing is masked here; the plan has not ended; another method's site cannot be merged. Nothing has
            changed then.
    """
    sites = handle.sites("sparsedm")
    if not sites:
        raise ValueError("to_dense: no layer of this handle is masked by 'sparsedm'. It was exported, or keeps all.")
    for name, site in sites.items():
        if site.ratio != site.config.ratio and not force:
            raise ValueError(
                f"to_dense: {name} is at {site.ratio} and is to come to {site.config.ratio}. Train to the end of the "
                "plan, or give force=True."
            )
    for edit, module in handle.installed:
        if edit.method != "sparsedm" and (reason := module.merge_error()):
            raise ValueError(
                f"{edit.key} cannot be merged into a plain model: {reason}. Its own method must end first."
            )
    pruned = {name: site.pruned() for name, site in sites.items()}
    handle.restore()
    for name, weight in pruned.items():
        layer = innermost(submodule(handle.model, name))
        layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    return handle.model


def pack_24(model: nn.Module, names: Iterable[str], *, backend: str = "cusparselt") -> dict[str, str]:
    """Compress the weights of 2:4 linears of an exported model for the sparse tensor cores, in place, for inference.

    Args:
        model: of `to_dense`, in fp16 or bf16 on an NVIDIA GPU of compute capability 8.0 or more.
        names: of its linears; those of convolutions stay dense, as torch has no 2:4 convolution.
        backend: `cusparselt` or `cutlass`.

    Returns:
        name of each layer that stays dense -> why.

    Raises:
        Unsupported: no layer can be packed on this device; the reason is in the message.
        ValueError: a weight is not 2:4 along its inputs.
    """
    if backend not in KERNELS:
        raise ValueError(f"pack_24: backend={backend!r} is unknown. Choose from {KERNELS}.")
    left: dict[str, str] = {}
    fitting: dict[str, Any] = {}
    for name in names:
        layer: Any = submodule(model, name)
        if not isinstance(layer, nn.Linear):
            left[name] = f"torch multiplies no {type(layer).__name__} by 2:4 weights"
        elif reason := kernel_refusal(backend, tuple(layer.weight.shape), layer.weight.dtype, layer.weight.device):
            left[name] = reason
        else:
            _check_24(name, layer.weight)
            fitting[name] = layer
    if not fitting:
        raise Unsupported(
            f"pack_24: no layer can be packed: {'; '.join(dict.fromkeys(left.values())) or 'none given'}."
        )
    for layer in fitting.values():
        layer.weight = nn.Parameter(compress(layer.weight.detach(), backend), requires_grad=False)
    return left


def _check_24(name: str, weight: Any) -> None:
    if broken := int(((weight.detach() != 0).unflatten(-1, (-1, 4)).sum(-1) > 2).sum()):
        raise ValueError(f"pack_24: {broken} groups of four of {name} hold more than two non-zeros, so it is not 2:4.")
