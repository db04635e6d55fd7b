"""Leaving PST: the pruned model as plain linears, with the zeros written in."""

from __future__ import annotations

from torch import nn

from sparsetrain.core.anatomy import innermost, submodule
from sparsetrain.surgery.apply import Handle


def to_pruned(handle: Handle, *, force: bool = False) -> nn.Module:
    """Make the model plain, with M ∘ W̃ as its weights and biases as they were: same outputs, exact zeros.

    Every pruned weight is made, as a new tensor, before anything is changed; the base's own weights are not written to.

    Args:
        force: also before the ramp has come to `keep_ratio`.

    Raises:
        ValueError: nothing is pruned here; the ramp has not ended; another method's site cannot be merged, or a weight
            was changed since the conversion. Nothing has changed then.
    """
    sites = handle.sites("pst")
    if not sites:
        raise ValueError("to_pruned: no linear of this handle is pruned by 'pst'. It was exported, or keeps all.")
    for name, site in sites.items():
        if site.keep_ratio != site.config.keep_ratio and not force:
            raise ValueError(
                f"to_pruned: {name} keeps {site.keep_ratio:.3g} of its weights and is to keep "
                f"{site.config.keep_ratio:g}. Train to the end of the ramp, or give force=True."
            )
    for edit, module in handle.installed:
        if edit.method != "pst" and (reason := module.merge_error()):
            raise ValueError(
                f"{edit.key} cannot be merged into a plain model: {reason}. Its own method must end first."
            )
    pruned = {name: site.pruned().t() if site.transposed else site.pruned() for name, site in sites.items()}
    handle.restore()
    for name, weight in pruned.items():
        linear = innermost(submodule(handle.model, name))
        linear.weight = nn.Parameter(weight.contiguous(), requires_grad=linear.weight.requires_grad)
    return handle.model
