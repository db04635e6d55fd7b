"""explain(): what each concept adds to each logit of a row, beside what the search of the concept matrix says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.explanation import Explanation
from sparsetrain.methods.concept_bottleneck.module import Concepts
from sparsetrain.ops.concept_bottleneck import concept_matrix_search
from sparsetrain.surgery.method import Batch

SEARCH = "search of the concept matrix, without training"


def explain(
    handle: Any, model: nn.Module, batch: Batch, subjects: Sequence[str], classes: Sequence[str]
) -> list[Explanation]:
    """One explanation a row: contributions W_F[c, j] · z_j, whose sum over concepts is the logit.

    Args:
        batch: the rows, as the model takes them. subjects: a name for each. classes: names of the labels.
    """
    (site,) = handle.sites("concept_bottleneck").values()
    caught: list[tuple[Tensor, Tensor]] = []
    hook = site.layers.register_forward_hook(lambda _m, args, out: caught.append((args[0], out[0])))
    try:
        with torch.no_grad():
            model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
    finally:
        hook.remove()
    psi_bd, z_bd = caught[0]
    return [
        explained(site, psi_d, z_d, subject, classes)
        for psi_d, z_d, subject in zip(psi_bd, z_bd, subjects, strict=True)
    ]


def explained(site: Concepts, psi_d: Tensor, z_d: Tensor, subject: str, classes: Sequence[str]) -> Explanation:
    """The explanation of one row, of its scores and activations. Sums are taken in fp64."""
    classes = site.config.classes or classes  # in words, where they were described
    parts_cd = site.layers.head.detach().double() * z_d.double()
    also = {}
    if len(site.profiles):
        also[SEARCH] = classes[int(concept_matrix_search((psi_d + site.center)[None], site.profiles))]
    return Explanation(
        subject=subject,
        concepts=site.config.concepts,
        scores=psi_d.tolist(),
        activations=z_d.tolist(),
        classes=tuple(classes),
        logits=parts_cd.sum(1).tolist(),
        contributions=parts_cd.tolist(),
        also=also,
    )
