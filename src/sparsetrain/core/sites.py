"""Sites read off modules, whatever library they come from: linears, convolutions, and the model inside PEFT's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from sparsetrain.core.anatomy import AttentionSite, Block, ConvolutionSite, LinearSite, innermost

FUSED = {"qkv": ("q", "k", "v"), "up_gate": ("up", "gate"), "gate_up": ("gate", "up")}
"""Role of a fused projection -> the roles of its parts, in the order they lie along the outputs."""


def own_modules(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of all modules but those inside what PEFT has wrapped: an adapter's factors are no sites."""
    yield prefix, root
    if isinstance(getattr(root, "base_layer", None), nn.Module):
        return
    for name, child in root.named_children():
        yield from own_modules(child, f"{prefix}.{name}" if prefix else name)


def linear_site(
    name: str,
    module: nn.Module,
    layer: int,
    role: str,
    attention: AttentionSite | None = None,
    transposed: bool = False,
) -> LinearSite:
    """The site of a linear.

    Args:
        name, module: the linear, wrapped by PEFT or not.
        role: its role, or that of a fused projection in `FUSED`.
        attention: whose heads say how wide q, k and v of a fused projection are; the other kinds split evenly.
    """
    linear = innermost(module)
    if transposed:
        in_features, out_features = linear.weight.shape
    else:  # not the weight's shape: quantised weights are packed
        in_features, out_features = linear.in_features, linear.out_features
    return LinearSite(
        name=name,
        layer=layer,
        role=role,
        in_features=int(in_features),
        out_features=int(out_features),
        transposed=transposed,
        parts=_parts(role, int(out_features), attention),
    )


def _parts(role: str, out_features: int, attention: AttentionSite | None) -> tuple[tuple[str, int], ...]:
    roles = FUSED.get(role, ())
    widths = dict.fromkeys(roles, out_features // len(roles)) if roles else {}
    if attention is not None and "q" in widths:
        widths["k"] = widths["v"] = attention.num_kv_heads * attention.head_dim
        widths["q"] = out_features - widths["k"] - widths["v"]
    return tuple((part, widths[part]) for part in roles)


def convolution_sites(model: nn.Module, blocks: Iterable[Block]) -> tuple[ConvolutionSite, ...]:
    """Every convolution of the model, transposed ones left out: their weights lie the other way round."""
    layers = [(f"{block.name}.", block.layer) for block in blocks]
    return tuple(
        ConvolutionSite(
            name=name,
            layer=next((layer for prefix, layer in layers if name.startswith(prefix)), None),
            in_channels=convolution.in_channels,
            out_channels=convolution.out_channels,
            kernel_size=convolution.kernel_size,
            groups=convolution.groups,
        )
        for name, module in own_modules(model)
        if isinstance(convolution := innermost(module), _ConvNd) and not isinstance(convolution, _ConvTransposeNd)
    )


def model_inside(model: nn.Module) -> str:
    """Name of the library's model inside `model`: "" for that model itself; see `Anatomy.model`."""
    inner = model.get_base_model() if hasattr(type(model), "get_base_model") else model  # type: ignore[operator]
    return next(name for name, module in model.named_modules() if module is inner)
