"""Which layers can be converted at what loss: measured one layer at a time, then chosen within a budget.

Works for every method: it only calls `sparsify` on one layer after another, and the model on held-out batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import describe, submodule
from sparsetrain.core.config import MethodConfig
from sparsetrain.core.modes import evaluating
from sparsetrain.surgery.apply import sparsify
from sparsetrain.surgery.method import Progress, State
from sparsetrain.surgery.plan import plan

Batch = dict[str, Tensor]
Key = TypeVar("Key", bound=Hashable)


@torch.no_grad()
def layer_losses(
    model: nn.Module,
    config: MethodConfig,
    held_out: Sequence[Batch],
    *,
    calibration: Sequence[Batch] | None = None,
    state: State | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    loss: Callable[[Any, Batch], Tensor] = lambda model, batch: model(**batch).loss,
) -> dict[int, float]:
    """Layer -> rise of the mean held-out loss when `config` converts that layer alone. The model is left as it was.

    `held_out` must not overlap `calibration`: a conversion fits the rows it was made from better than others. The same
    rows are used for every layer, so a few thousand tokens order the layers well although the loss itself is noisy.

    Args:
        model: the dense model, before PEFT.
        config: what one layer would get; `layers` and `from_depth` say which layers are tried.
        held_out: batches with labels.
        calibration: batches from which the method finds its start, once for all layers.
        state: an earlier conversion of all those layers, instead of calibrating.
        seed, progress: as for `sparsify`.
        loss: (model, batch) -> its mean loss.

    Returns:
        Nats (for a cross-entropy); a negative entry is noise, or a layer that is better off sparse.

    Raises:
        PlanError, ValueError: as `plan`; no held-out batch.

    Cost: one conversion, and for L layers about L/2 forwards over `held_out`: blocks before the one in question are
    not computed again. Holds L x tokens x width numbers.
    """
    if not held_out:
        raise ValueError("layer_losses() was given no held-out batch. Give at least one, with labels.")
    report = progress or (lambda _name, _share: None)
    layers = sorted({edit.layer for edit in plan(model, config).edits})
    if state is None:
        handle = sparsify(model, config, calibration=calibration, seed=seed, progress=progress)
        state = {site: {name: value.clone() for name, value in found.items()} for site, found in handle.state().items()}
        handle.restore()
    with evaluating(model):
        dense, outputs = _dense_pass(model, held_out, loss)
        losses = {}
        for done, layer in enumerate(layers):
            report(f"{config.method}: trying layers", done / len(layers))
            handle = sparsify(model, dataclasses.replace(config, layers=(layer,)), state=state, seed=seed)
            handle.step(1, 1)  # past any warm-up
            try:
                found = [_loss_from(model, layer, outputs[i], batch, loss) for i, batch in enumerate(held_out)]
            finally:
                handle.restore()
            losses[layer] = sum(found) / len(found) - dense
    return losses


def choose_layers(losses: Mapping[Key, float], saved: Mapping[Key, float], max_loss: float) -> list[Key]:
    """What to convert: most saved for each nat lost first, while the losses add up to at most `max_loss`.

    Losses of single layers are taken as additive. On SmolLM2-135M, layers 14..29 at half the units, they add up to
    0.126 nats and cost 0.144 together: leave a fifth of the budget for that.

    Args:
        losses: layer (or method and layer) -> rise of the loss when it alone is converted, as from `layer_losses`.
            A conversion's `relative_error` cannot stand in for it: SmolLM2's layer 29 has the smallest (0.005) and
            costs most (0.0215 nats).
        saved: the same keys -> what the conversion saves, in any unit.
        max_loss: nats; log(1.25) is a perplexity 1.25 times the dense one.

    Raises:
        ValueError: the two name different layers.
    """
    if losses.keys() != saved.keys():
        odd = list(losses.keys() ^ saved.keys())
        raise ValueError(f"layers {odd} have a loss or a saving, not both. Give both for each layer.")
    useful = [key for key in losses if saved[key] > 0]
    chosen, total = set(), 0.0
    for key in sorted(useful, key=lambda key: max(losses[key], 1e-6) / saved[key]):
        # a layer that seems to help (noise of the measurement) must not buy room for another
        if total + max(losses[key], 0.0) <= max_loss:
            chosen.add(key)
            total += max(losses[key], 0.0)
    return [key for key in losses if key in chosen]


def _dense_pass(
    model: Any, held_out: Sequence[Batch], loss: Callable[[Any, Batch], Tensor]
) -> tuple[float, list[list[Any]]]:
    """(mean loss, for each batch the output of every block)."""
    blocks = [submodule(model, block.name) for block in describe(model).blocks]
    kept: list[Any] = []
    hooks = [block.register_forward_hook(lambda _module, _args, out: kept.append(out)) for block in blocks]
    losses, outputs = [], []
    try:
        for batch in held_out:
            kept.clear()
            losses.append(float(loss(model, batch)))
            outputs.append(list(kept))
    finally:
        for hook in hooks:
            hook.remove()
    return sum(losses) / len(losses), outputs


def _loss_from(model: Any, layer: int, outputs: list[Any], batch: Batch, loss: Callable[[Any, Batch], Tensor]) -> float:
    """The loss, with the blocks before `layer` replaced by what they gave before."""
    with _skipped(model, layer, outputs):
        return float(loss(model, batch))


@contextmanager
def _skipped(model: nn.Module, layer: int, outputs: list[Any]) -> Iterator[None]:
    blocks = [submodule(model, block.name) for block in describe(model).blocks[:layer]]

    def given(output: Any) -> Callable[..., Any]:
        return lambda *_args, **_kwargs: output

    try:
        for block, output in zip(blocks, outputs, strict=False):
            vars(block)["forward"] = given(output)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
