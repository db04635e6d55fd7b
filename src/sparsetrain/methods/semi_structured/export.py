"""Leaving 2:4 training: as a 2:4 model whose zeros are written into the weights, or as a dense one."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from sparsetrain.methods.semi_structured.flips import schedules
from sparsetrain.surgery.apply import Handle


def to_24(handle: Handle) -> nn.Module:
    """Write W̃ (M∘W, or β·S(W)) into the weights and make the model plain again: same outputs, ≥ half of them zeros.

    The dense master weights are gone then; the model is for inference, or for torch's 2:4 kernels.

    Raises:
        ValueError: a site trains its dense weights now (the dense tail), so it is no 2:4 model; a weight that breaks
            the pattern; or another method's site that cannot be merged. Nothing has changed then.
    """
    sites = _sites(handle, "to_24")
    dense = [site for site, schedule in sites.items() if schedule.dense]
    if dense:
        raise ValueError(
            f"to_24: {dense[0]} is in its dense phase, so its weights are no 2:4 weights any more. Use to_dense, or "
            "train with dense_tail_ratio=0."
        )
    return _write(handle)


def to_dense(handle: Handle) -> nn.Module:
    """The dense model: the trained weights after the dense tail. Before it, M∘W with a warning, as W was not trained
    to run dense.

    Raises:
        ValueError: as `to_24`, for other methods' sites.
    """
    sites = _sites(handle, "to_dense")
    if all(schedule.dense for schedule in sites.values()):
        return handle.merge()
    warnings.warn(
        "to_dense before the dense tail: the weights were trained to run 2:4, so the zeros are written in. "
        "Train to the end of the run for a dense model.",
        UserWarning,
        stacklevel=2,
    )
    return _write(handle)


def _sites(handle: Handle, verb: str) -> dict:
    sites = schedules(handle)
    if not sites:
        raise ValueError(f"{verb}: no site of this handle is 'semi_structured'. It was merged, or never converted.")
    return sites


def _write(handle: Handle) -> nn.Module:
    sites = schedules(handle)
    ours = {id(schedule) for schedule in sites.values()}
    for edit, module in handle.installed:
        reason = None if id(module) in ours else module.merge_error()
        if reason:
            raise ValueError(
                f"{edit.key} cannot be merged into a plain model: {reason}. Its own method must end first."
            )
    pruned: list[tuple[Tensor, Tensor]] = []
    for site, schedule in sites.items():
        for name, linear in () if schedule.dense else schedule.linears.items():
            found = linear.pruned()
            check_pattern(f"{site}.{name}", found, linear.groups_dim)
            pruned.append((linear.weight, found))
    with torch.no_grad():
        for weight, found in pruned:
            weight.copy_(found)
    for schedule in sites.values():
        schedule.dense = True  # the weights are W̃ now, so the dense class gives the same outputs
    return handle.merge()


def check_pattern(name: str, weight: Tensor, dim: int = -1) -> None:
    """Raise ValueError unless every four entries along `dim` hold at most two non-zeros."""
    counts = (weight != 0).movedim(dim, -1).unflatten(-1, (-1, 4)).sum(-1)
    broken = int((counts > 2).sum())
    if broken:
        raise ValueError(
            f"{name}: {broken} of {counts.numel()} groups of four hold more than two non-zeros, so it is not 2:4."
        )
