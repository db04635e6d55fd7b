"""Measured against the formula: what blocks save for their backward, as a share of what dense blocks save."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsetrain.ops.selected_rows import Rows

SHORT = 256
"""Tokens that are measured."""


@dataclass(frozen=True, kw_only=True)
class SavedShare:
    """Saved activation bytes of the blocks as a share of the dense blocks', measured and by the formula.

    formula = r + (1 - r)·κ; `ratio` is r, what is selected; `kv_share` is κ, keys and values in the dense bytes.
    """

    found: float
    formula: float
    ratio: float
    kv_share: float

    def __str__(self) -> str:
        return (
            f"Token selection: blocks save {self.found:.3f} of what dense blocks save; the formula r + (1 - r)κ gives "
            f"{self.formula:.3f} with r = {self.ratio:.3f} of the tokens selected and κ = {self.kv_share:.3f} "
            "the share of keys and values."
        )


def saved_share(
    handle: Any, model: Any, batch: dict[str, Tensor], saved_activations: Callable[..., Any]
) -> SavedShare | None:
    """Measure a converted model against the formula, on the 256 first tokens of one row.

    Args:
        handle: of the conversion.
        model: the model as it is trained, with its adapter.
        batch: of a training step.
        saved_activations: as in `measure.memory`.

    Returns: None where the formula does not speak: other methods beside token selection, checkpointed blocks, a row
        that begins with padding.
    """
    sites = list(handle.sites("token_selection").values())
    if (
        sites[0].selector.config.recompute
        or len(handle.configs) > 1
        or any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    ):
        return None
    selector, t = sites[0].selector, batch["input_ids"].shape[1]
    short = {n: x[:1, :SHORT] if x.shape[1:] == (t,) else x[:1] for n, x in batch.items()}
    if "attention_mask" in short and not short["attention_mask"][0, 0]:
        return None

    def blocks(rows: Rows | None) -> float:
        with nullcontext() if rows is None else selector.using(rows):
            saved = saved_activations(model, lambda: model(**short).loss)
        return float(sum(sum(layer.values()) for layer in saved.by_layer.values()))

    length = short["input_ids"].shape[1]
    selected = blocks(None)
    floor = sum(site.stats()["key_value_bytes"] for site in sites)
    assert selector.rows is not None
    r = selector.rows.shape[1] / length
    dense = blocks(Rows.of([torch.arange(length)], length))
    kv = floor / dense
    return SavedShare(found=selected / dense, formula=r + (1 - r) * kv, ratio=r, kv_share=kv)


def measure(handle: Any, model: Any, batch: dict[str, Tensor], saved_activations: Callable[..., Any]) -> list[str]:
    """The report's line on it."""
    share = saved_share(handle, model, batch, saved_activations)
    return [] if share is None else [str(share)]
