"""How PST meets a model: its edits and their costs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, LinearSite, Undo, innermost, submodule
from sparsetrain.core.cost import Cost
from sparsetrain.methods.pst.config import PST
from sparsetrain.methods.pst.export import to_pruned
from sparsetrain.methods.pst.module import CHILD, Pruned, PrunedLinear
from sparsetrain.methods.pst.schedule import PruningSchedule
from sparsetrain.ops.topk_mask import count_zeros
from sparsetrain.surgery.edits import edits_at, equip, nothing_to_do
from sparsetrain.surgery.method import QUANTISED, Edit, Method, register_method
from sparsetrain.surgery.site import Site


def edits(config: PST, anatomy: Anatomy, model: nn.Module) -> list[Edit]:
    """One edit for each linear of the blocks that the config takes.

    Raises:
        ValueError: a rank is above the smaller side of a matrix, or 2:4 does not divide its inputs.
    """
    return edits_at(
        config,
        anatomy,
        anatomy.linears,
        install,
        check=lambda site: check(config, site),
        cost=lambda site, _tokens: costs(config, site),
        blank=None if config.is_dense else lambda site: blank(config, site),
        note=lambda site: note(config, site),
    )


def sizes(site: LinearSite) -> list[int]:
    """Output features of each part."""
    return [size for _, size in site.parts] or [site.out_features]


def check(config: PST, site: LinearSite) -> None:
    if config.is_dense:
        return
    least = min(*sizes(site), site.in_features)
    for key in ("weight_rank", "score_rank"):
        if getattr(config, key) > least:
            raise ValueError(
                f"pst: {key}={getattr(config, key)} is more than {site.name} has: its smaller side is {least}. Lower "
                "it, or leave the linear out with `targets`."
            )
    if config.pattern == "2:4" and site.in_features % 4:
        raise ValueError(
            f"pst: {site.name} has {site.in_features} inputs, which do not divide into groups of four. Leave it out "
            "with `targets`, or use pattern='unstructured'."
        )


def costs(config: PST, site: LinearSite) -> tuple[Cost, Cost]:
    """(dense, pruned) per token: the product is the dense one, zeros included; what makes the mask costs no token."""
    matrix, i = site.in_features * site.out_features, site.in_features
    ranks = 0 if config.is_dense else config.weight_rank + config.score_rank + 1
    added = sum(ranks * (o + i) for o in sizes(site))
    dense = Cost(num_params=matrix, flops=2.0 * matrix, saved_elements=i)
    return dense, Cost(num_params=matrix + added, flops=2.0 * matrix, saved_elements=i)


def blank(config: PST, site: LinearSite) -> dict[str, Tensor]:
    """What a plan installs: the last phase of a run, in which it needs the most."""
    return {"num_zeros": torch.tensor([count_zeros(o * site.in_features, config.keep_ratio) for o in sizes(site)])}


def note(config: PST, site: LinearSite) -> str:
    if config.is_dense:
        return "keeps every weight"
    parts = f" in each of {', '.join(role for role, _ in site.parts)}" if site.parts else ""
    share = "of all linears together" if config.scope == "global" else f"of the weight{parts}"
    return f"{1 - config.keep_ratio:.0%} {share} are 0 at the end, {config.pattern}"


def install(model: nn.Module, tensors: dict[str, Tensor], config: PST, site: LinearSite) -> tuple[Undo, Site | None]:
    """Freeze the linear, and let it run pruned."""
    if config.is_dense:
        return nothing_to_do()
    linear = innermost(submodule(model, site.name))
    if not linear.weight.is_floating_point():
        raise ValueError(
            f"pst: {site.name} holds weights of {linear.weight.dtype}, and masks are of plain ones. Load the model in "
            "bf16 or fp32."
        )
    own = [parameter for parameter in (linear.weight, linear.bias) if parameter is not None]
    trained = [parameter.requires_grad for parameter in own]
    undo, made = equip(linear, CHILD, PrunedLinear(linear, site, config, tensors), Pruned)
    for parameter in own:
        parameter.requires_grad_(False)

    def restore() -> None:
        undo()
        for parameter, before in zip(own, trained, strict=True):
            parameter.requires_grad_(before)

    return restore, made


def trains(config: PST, anatomy: Anatomy, new: list[str]) -> list[str]:
    norms = [name for block in anatomy.blocks for name in block.norms] if config.train_norms else []
    return [*(new if config.train_head else []), *norms]


def merge_adapter_error(config: PST, linears: list[str]) -> str | None:
    if not linears or config.is_dense:
        return None
    return "the update is dense and the weight is pruned, so merged outputs would differ. Train without LoRA (lora_r=0)"


register_method(
    PST,
    Method(
        edits=edits,
        site_names=lambda anatomy: [site.name for site in anatomy.linears],
        schedule=PruningSchedule,
        trains=trains,
        exports={"pruned": to_pruned},
        merge_adapter_error=merge_adapter_error,
        limits={
            "cost": "zeros are multiplied too, and making a mask costs by the forward, not by the token",
            **dict.fromkeys(QUANTISED, "its masks are of plain weights. Load the model in bf16 or fp32"),
        },
    ),
)
