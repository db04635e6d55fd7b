"""How the concept bottleneck meets a model: its head, what it reads of the encoder, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, Undo, innermost, submodule
from sparsetrain.core.cost import Cost
from sparsetrain.methods.concept_bottleneck.config import ConceptBottleneck
from sparsetrain.methods.concept_bottleneck.embedding import embed, own_scale, reads_mean, start, watch
from sparsetrain.methods.concept_bottleneck.explain import explain
from sparsetrain.methods.concept_bottleneck.module import ByConcepts, Concepts, SeesLabels
from sparsetrain.surgery.edits import edits_at, equip, nothing_to_do
from sparsetrain.surgery.method import Batch, Edit, Method, Progress, RowFacts, State, register_method
from sparsetrain.surgery.outermost import declass_model, reclass_model
from sparsetrain.surgery.site import Site


@dataclass(frozen=True)
class Head:
    """The linear that gives the logits: outside of the blocks."""

    name: str
    layer: int | None = None


def heads(anatomy: Anatomy) -> list[Head]:
    """The classifying linear of an encoder; none in a language model and in one without a head."""
    if any(attention.causal for attention in anatomy.attentions):
        return []
    found = [name for name, axes in anatomy.axes.items() if axes[0] == "labels" and name.endswith(".weight")]
    return [Head(name.removesuffix(".weight")) for name in found]


def edits(config: ConceptBottleneck, anatomy: Anatomy, model: nn.Module) -> list[Edit]:
    """One edit, at the head.

    Raises:
        ValueError: the model has no head that classifies; or the classes described are not as many as its labels.
    """
    found = heads(anatomy)
    if not found:
        raise ValueError(
            f"concept_bottleneck replaces the head of a classifier on an encoder, and {anatomy.model_class} has none. "
            "Load an encoder with --task classify (AutoModelForSequenceClassification), or CLIP with --task pair-image."
        )

    def check(head: Head) -> None:
        labels = _linear(model, head).weight.shape[0]
        if config.classes and not _is_empty(model) and len(config.classes) != labels:
            raise ValueError(
                f"concept_bottleneck: {len(config.classes)} classes are described, and {head.name} has {labels} "
                "labels. Describe each, in their order, or none."
            )

    return edits_at(
        config,
        anatomy,
        found,
        install,
        check=check,
        cost=lambda head, tokens: costs(config, _linear(model, head), tokens),
        blank=None if config.is_probe else lambda head: start(config, _linear(model, head).weight.shape, None),
        note=lambda _head: _note(config),
    )


def _is_empty(model: nn.Module) -> bool:
    """Without weights, a model's number of labels is not yet that of the data."""
    return next(model.parameters()).is_meta


def _linear(model: nn.Module, head: Head) -> Any:
    return innermost(submodule(model, head.name))


def costs(config: ConceptBottleneck, linear: Any, tokens: int) -> tuple[Cost, Cost]:
    """(the dense head, the two layers), per token of a row."""
    labels, width = linear.weight.shape
    dense = Cost(num_params=linear.weight.numel(), flops=2.0 * labels * width / tokens, saved_elements=width / tokens)
    if config.is_probe:
        return dense, dense
    d = len(config.concepts)
    added = d * d + labels * d
    return dense, Cost(
        num_params=dense.num_params + added,  # the dense head stays in the model
        flops=2.0 * (width * d + added) / tokens,
        saved_elements=(width + 2 * d) / tokens,
    )


def _note(config: ConceptBottleneck) -> str:
    if config.is_probe:
        return "no concepts: the head itself, on the frozen encoder"
    return f"{len(config.concepts)} concepts, loss={config.loss}; the encoder is frozen"


def prepare(model: nn.Module, edits: list[Edit], batches: list[Batch], progress: Progress) -> State:
    """Embed the concepts and the classes with the encoder itself; rows after them give the scores' center.

    Raises:
        ValueError: fewer rows than texts; embeddings that are not finite, or two concepts that have one.
    """
    (edit,) = edits
    config = edit.config
    assert isinstance(config, ConceptBottleneck)
    if config.is_probe:
        return {}
    wanted, linear = len(config.texts), _linear(model, Head(edit.site))
    rows: list[Tensor] = []
    for done, batch in enumerate(batches):
        progress("embedding the concepts", done / len(batches))
        rows.append(embed(model, config, linear, batch))
    found, others = torch.cat(rows or [torch.zeros(0, 1)]).tensor_split([wanted])
    if len(found) < wanted:
        raise ValueError(
            f"concept_bottleneck: {len(found)} rows for {len(config.concepts)} concepts and {len(config.classes)} "
            "classes. Give sparsify(read=...), which makes a batch of texts, or rows that stand for them, in their "
            "order, as calibration."
        )
    if not bool(found.isfinite().all()):
        raise ValueError("concept_bottleneck: the encoder's embeddings of the concepts are not finite.")
    return {edit.key: start(config, linear.weight.shape, found, own_scale(model), others)}


def install(
    model: nn.Module, tensors: dict[str, Tensor], config: ConceptBottleneck, head: Head
) -> tuple[Undo, Site | None]:
    """Put the layers at the head, and let the model tell them what they need."""
    if config.is_probe:
        return nothing_to_do()
    linear = _linear(model, head)
    _check_fits(config, linear, tensors)
    site = Concepts(config, tensors, reads_mean=reads_mean(config, model))
    if (device := linear.weight.device).type != "meta":
        site.to(device)
    hook = watch(model, site.seen) if site.reads_mean else None
    undo, _ = equip(linear, "concept_bottleneck", site, ByConcepts)
    vars(model)["concepts_seen"] = site.seen
    reclass_model(model, SeesLabels)

    def back() -> None:
        declass_model(model, SeesLabels)
        del vars(model)["concepts_seen"]
        undo()
        if hook is not None:
            hook.remove()

    return back, site


def _check_fits(config: ConceptBottleneck, linear: Any, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError if the tensors are of another list of concepts, another encoder or other labels."""
    if "vectors" not in tensors:
        raise ValueError(
            "concept_bottleneck starts from its concepts' embeddings. Give sparsify(read=...), or calibration rows "
            "that stand for the concepts."
        )
    labels, width = linear.weight.shape
    d = len(config.concepts)
    wanted = {"vectors": (d, width), "bottleneck": (d, d), "head": (labels, d)}
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"concept_bottleneck: {name} is {tuple(tensors[name].shape)}, and {d} concepts on {width} numbers for "
                f"{labels} labels make {shape}. Load it with the concepts, the encoder and the labels it was made for."
            )


def refuse(config: ConceptBottleneck, facts: RowFacts) -> str | None:
    if config.is_probe:
        return "no concepts are given. Write concepts=FILE, a text file with one a line"
    if not facts.labelled:
        return f"it classifies, and task={facts.task} has no label a row. Use task=classify, or pair-image for images"
    if not facts.reads_texts:
        return (
            "its concepts are texts, and this model reads none of them beside such rows. For images take a pair of "
            "encoders, such as CLIP, with task=pair-image"
        )
    return None


def trains(config: ConceptBottleneck, anatomy: Anatomy, new: list[str]) -> list[str]:
    """Nothing of the model itself; without concepts, its head."""
    return [head.name for head in heads(anatomy)] if config.is_probe else []


register_method(
    ConceptBottleneck,
    Method(
        edits=edits,
        site_names=lambda anatomy: [head.name for head in heads(anatomy)],
        prepare=prepare,
        texts=lambda config: config.texts,
        explain=explain,
        modules_to_save=("concept_layers",),
        trains=trains,
        refuse=refuse,
        limits={
            "mlm": "it classifies: a masked-token head has no labels to decide between",
            "lora": "PEFT trains a copy of a classifier's head, where the concepts are. Set lora_r=0",
        },
    ),
)
