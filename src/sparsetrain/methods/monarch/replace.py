"""Which linears a config takes, the shapes of their factors, and putting these in place of a dense linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, LinearSite, Undo, submodule
from sparsetrain.core.backend import timed_on
from sparsetrain.methods.monarch.config import ROLES, Monarch
from sparsetrain.methods.monarch.module import MonarchLinear, MonarchSite, nearest
from sparsetrain.methods.monarch.shape import MonarchShape, shape_of
from sparsetrain.ops.monarch_linear.gain import break_even, gain_here
from sparsetrain.surgery.edits import nothing_to_do
from sparsetrain.surgery.lora import adapter_kind
from sparsetrain.surgery.site import Site

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def candidates(anatomy: Anatomy, roles: tuple[str, ...] = ROLES) -> list[LinearSite]:
    """The linears of some roles; a fused one has several."""
    return [site for site in anatomy.linears if any(role in roles for role in site.roles)]


def check(config: Monarch, site: LinearSite) -> None:
    """Raise ValueError if a linear cannot be taken, as `shapes_of`."""
    if config.replaces:
        shapes_of(config, site)


def shapes_of(config: Monarch, site: LinearSite) -> list[MonarchShape]:
    """The factors of each part of a linear.

    Raises:
        ValueError: some of a fused linear's roles are left out, or a size does not fit.
    """
    if left := [role for role in site.roles if role not in config.roles]:
        raise ValueError(
            f"{config.method}: {site.name} is one linear for {', '.join(site.roles)}, and roles={config.roles} leaves "
            f"out {', '.join(left)}. Take all of them or none."
        )
    widths = [width for _, width in site.parts] or [site.out_features]
    given: dict[str, Any] = {"keep_ratio": config.keep_ratio, "single_factor": config.single_factor, "name": site.name}
    return [shape_of(site.in_features, width, config.num_blocks, **given) for width in widths]


def install(
    model: nn.Module, tensors: dict[str, Tensor], config: Monarch, site: LinearSite
) -> tuple[Undo, Site | None]:
    """Put the factors in the place of a linear.

    Args:
        tensors: of an earlier conversion; without them the factors are projected or drawn.
    """
    if not config.replaces:
        return nothing_to_do()
    owner, _, name = site.name.rpartition(".")
    parent, dense = submodule(model, owner), submodule(model, site.name)
    _check_plain(config, site, dense, model)
    shapes = shapes_of(config, site)
    if not config.force:
        _check_pays(config, site, shapes, dense)
    parts, lost = _parts(config, site, shapes, dense, tensors)
    for part in parts:
        part.requires_grad_(dense.weight.requires_grad)  # type: ignore[arg-type]
    made = MonarchSite(dense, parts, lost, site.transposed, columns="up" in site.roles or "gate" in site.roles)
    setattr(parent, name, made.to(dense.weight.device).train(dense.training))  # type: ignore[arg-type]
    return lambda: setattr(parent, name, dense), made


def _parts(
    config: Monarch, site: LinearSite, shapes: list[MonarchShape], dense: Any, tensors: dict[str, Tensor]
) -> tuple[list[MonarchLinear], Tensor | None]:
    """The layers of the parts, and what projecting lost of each."""
    weight, parts, lost = dense.weight.detach(), [], []
    slices = (weight.t() if site.transposed else weight).split([shape.out_features for shape in shapes])
    for index, (shape, piece) in enumerate(zip(shapes, slices, strict=True)):
        if tensors:
            left = tensors.get(f"parts.{index}.left")
            factors = tensors[f"parts.{index}.right"].clone(), None if left is None else left.clone()
            _check_shapes(site, shape, *factors)
            parts.append(MonarchLinear.of(shape, *factors))
        elif config.init == "project":
            right, left, gone = nearest(piece, shape)
            parts.append(MonarchLinear.of(shape, right, left))
            lost.append(gone)
        else:
            empty = (None if size is None else weight.new_empty(size) for size in (shape.right, shape.left))
            parts.append(MonarchLinear.of(shape, *empty))  # type: ignore[arg-type]
            parts[-1].draw(config.init, piece.float().square().mean().sqrt().to(weight.dtype))
    return parts, tensors.get("lost") if tensors else torch.stack(lost).float() if lost else None


def _check_shapes(site: LinearSite, shape: MonarchShape, right: Tensor, left: Tensor | None) -> None:
    found = (tuple(right.shape), None if left is None else tuple(left.shape))
    if found != (shape.right, shape.left):
        raise ValueError(
            f"{site.name}: the state holds factors of {found[0]} and {found[1]}, and this config makes {shape.right} "
            f"and {shape.left}. Give the state of the same config."
        )


def _check_plain(config: Monarch, site: LinearSite, dense: Any, model: nn.Module) -> None:
    """Raise ValueError unless a linear can be taken out: nothing hangs on it that would be left behind."""
    kind = type(dense)
    found = None
    if not (kind is nn.Linear or kind.__name__ == "Conv1D"):
        found = f"is a {adapter_kind(dense)}; convert the model before an adapter or another method wraps it"
    elif "forward" in vars(dense) or any(vars(dense).get(name) for name in _HOOKS):
        found = "carries hooks or a forward of its own, which factors would not run. Convert the model first"
    elif sum(value is dense.weight for _, value in model.named_parameters(remove_duplicate=False)) > 1:
        found = "shares its weight with another module (tied). Leave it out with targets, or untie it first"
    if found:
        raise ValueError(f"{config.method} cannot take {site.name}: it {found}.")


def _check_pays(config: Monarch, site: LinearSite, shapes: list[MonarchShape], dense: Any) -> None:
    """Raise ValueError if a part is slower as Monarch than dense, on the device that it is on or planned for here."""
    weight = dense.weight
    if (device := timed_on(weight)) is None:
        return  # a plan for another machine
    for shape in dict.fromkeys(shapes):
        gain = gain_here(shape.right, shape.left, config.tokens, weight.dtype, device)
        if gain.pays:
            continue
        width = break_even(config.num_blocks, config.tokens, weight.dtype, device)
        raise ValueError(
            f"{config.method}: {site.name} would be slower here than dense: {gain}. With {config.num_blocks} blocks "
            f"square linears pay from width {width or 'none that was tried'}. Leave it out with roles or targets, take "
            "other num_blocks, or set force=true for its memory alone."
        )
