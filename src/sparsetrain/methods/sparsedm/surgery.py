"""How SparseDM meets a model: its edits and their costs."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, LinearSite, Undo, innermost, submodule
from sparsetrain.core.cost import Cost
from sparsetrain.methods.sparsedm.config import SparseDM
from sparsetrain.methods.sparsedm.export import to_dense
from sparsetrain.methods.sparsedm.macs import count_macs
from sparsetrain.methods.sparsedm.module import CHILD, Masked, MaskedWeight
from sparsetrain.methods.sparsedm.schedule import RatioSchedule
from sparsetrain.methods.sparsedm.targets import Layer, dense_layers, inputs_of, misfit, target_layers, told
from sparsetrain.methods.sparsedm.teacher import Teacher, install_teacher, teacher_weight
from sparsetrain.surgery.edits import edits_at, equip, nothing_to_do
from sparsetrain.surgery.method import QUANTISED, Batch, Edit, Method, RowFacts, register_method
from sparsetrain.surgery.site import Site


def edits(config: SparseDM, anatomy: Anatomy, model: nn.Module) -> list[Edit]:
    """One edit for each target layer that the config takes; one that does not divide stays dense, and says so.

    Raises:
        ValueError: no layer divides, or weights are integers.
    """
    sites = {site.name: site for site in target_layers(anatomy)}
    masked = {name for name, site in sites.items() if not config.is_dense and misfit(config, site) is None}
    first = next((n for n, s in sites.items() if n in masked and config.takes(n, s.layer or 0, _depth(anatomy))), None)

    def install_at(model: nn.Module, tensors: dict[str, Tensor], config: Any, site: Any) -> tuple[Undo, Site | None]:
        if site.name not in masked:
            return nothing_to_do()
        notes = _notes(config, anatomy, model) if site.name == first else None
        taught = None if notes is None else predictor_of(anatomy, model)
        return install(model, tensors, config, site, taught, notes or [])

    found = edits_at(
        config,
        anatomy,
        sites.values(),
        install_at,
        check=lambda site: _check(site, model),
        cost=lambda site, _tokens: costs(config, site),
        claims=lambda site: (site.name,) if config.is_dense or site.name in masked else (),
        note=lambda site: _note(config, site),
    )
    if found and first is None and not config.is_dense:
        sizes = ", ".join(sorted({str(inputs_of(sites[edit.site])) for edit in found}, key=int))
        raise ValueError(
            f"sparsedm: none of the {len(found)} layers that it would take has inputs that divide into groups of "
            f"{config.ratio.group}; they have {sizes}. Choose another pattern."
        )
    return found


def _depth(anatomy: Anatomy) -> int:
    return max(1, len(anatomy.blocks))


def _check(site: Layer, model: nn.Module) -> None:
    weight = innermost(submodule(model, site.name)).weight
    if not weight.is_floating_point():
        raise ValueError(
            f"sparsedm: {site.name} holds weights of {weight.dtype}, and masks are of plain ones. Load the model in "
            "bf16 or fp32."
        )


def costs(config: SparseDM, site: Layer) -> tuple[Cost, Cost]:
    """(dense, masked) per token: products with weights that are kept. Of a convolution, per position of its output."""
    if isinstance(site, LinearSite):
        numel = site.in_features * site.out_features
    else:
        numel = inputs_of(site) * site.out_channels * math.prod(site.kernel_size)
    kept = 1.0 if misfit(config, site) else config.ratio.keep / config.ratio.group
    dense = Cost(num_params=numel, flops=2.0 * numel, saved_elements=inputs_of(site))
    return dense, Cost(num_params=numel, flops=2.0 * numel * kept, saved_elements=dense.saved_elements)


def _note(config: SparseDM, site: Layer) -> str:
    if config.is_dense:
        return "keeps every weight"
    if reason := misfit(config, site):
        return f"stays dense: {reason}"
    ways = "".join(f"{ratio} from step {step}, " for step, ratio in config.stages[:-1])
    start = f"{ways}{config.ratio} from step {config.stages[-1][0]}" if config.plan else str(config.ratio)
    per = "" if isinstance(site, LinearSite) else ", cost per output position"
    return f"{start}, emulated by dense products{per}"


def _notes(config: SparseDM, anatomy: Anatomy, model: nn.Module) -> list[str]:
    return [f"sparsedm leaves dense: {told(dense_layers(config, anatomy, model))}."]


def predictor_of(anatomy: Anatomy, model: nn.Module) -> nn.Module:
    """What a teacher is a copy of."""
    return model if anatomy.predictor is None else anatomy.predictor(model)


def install(
    model: nn.Module,
    tensors: dict[str, Tensor],
    config: SparseDM,
    site: Layer,
    taught: nn.Module | None,
    notes: list[str],
) -> tuple[Undo, Site]:
    """Let a layer run masked; with the first one, the model is given its teacher.

    Args:
        taught: at the first layer, what a teacher is a copy of.
        notes: of the first layer: what it has to say for all.
    """
    teacher = None
    if taught is not None and teacher_weight(config, taught) > 0:
        teacher = Teacher(taught, config.teacher_dtype, tensors.get("start"))
    layer = innermost(submodule(model, site.name))
    transposed = isinstance(site, LinearSite) and site.transposed
    made = MaskedWeight(layer, config, 0 if transposed else 1, tensors)
    made.teacher, made.says = teacher, notes
    undo, _ = equip(layer, CHILD, made, Masked)
    if taught is None or teacher is None:
        return undo, made
    undo_teacher = install_teacher(taught, made)

    def undo_both() -> None:
        undo_teacher()
        undo()

    return undo_both, made


def refuse(config: SparseDM, facts: RowFacts) -> str | None:
    """Why rows cannot be trained on: a loss of every token is computed in chunks, and no logits are kept to compare."""
    if config.teacher_weight and facts.one_sequence and not facts.labelled:
        return (
            f"teacher_weight={config.teacher_weight} compares predictions, and task={facts.task} computes its loss in "
            "chunks of rows without keeping them. Set teacher_weight=0, or train with a loop of your own"
        )
    return None


def merge_adapter_error(config: SparseDM, linears: list[str]) -> str | None:
    if not linears or config.is_dense:
        return None
    return "the update is dense and the weight is masked, so merged outputs would differ. Train without LoRA (lora_r=0)"


def measure(handle: Any, model: nn.Module, batch: Batch, _saved: Any) -> list[str]:
    """The count of multiply-adds, for the report."""
    given = {name: value for name, value in batch.items() if name != "labels"}
    return [f"sparsedm, {count_macs(handle, model, given)}."]


register_method(
    SparseDM,
    Method(
        edits=edits,
        site_names=lambda anatomy: [site.name for site in target_layers(anatomy)],
        schedule=RatioSchedule,
        exports={"nm": to_dense},
        refuse=refuse,
        merge_adapter_error=merge_adapter_error,
        measure=measure,
        limits={
            "cost": "without sparse tensor cores its products are emulated by dense ones",
            **dict.fromkeys(QUANTISED, "its masks are of plain weights. Load the model in bf16 or fp32"),
        },
    ),
)
