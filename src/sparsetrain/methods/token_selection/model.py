"""Token selection as the model's own forward: it sees the labels, so whoever calls the model trains on selected tokens.

In training, with gradients enabled, the forward draws the selection, sets the labels of other tokens aside, scales the
number of targets that a trainer has counted, and runs the dense forward, whose blocks and head ask the selector for the
rows. Otherwise it is the dense forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, Undo, submodule
from sparsetrain.methods.token_selection.loss import (
    HeadOnRows,
    RowsLoss,
    as_if_all,
    head_of,
    only_used,
    rows_head,
    selected_labels,
    takes_rows,
)
from sparsetrain.methods.token_selection.scores import token_scores
from sparsetrain.methods.token_selection.selector import Head, Selector
from sparsetrain.surgery.outermost import declass_model, reclass_model
from sparsetrain.surgery.reclass import declass, reclass

_INPUTS = ("input_ids", "pixel_values")


class Chosen(NamedTuple):
    """What a training forward runs on: its arguments, what the head and the loss are, which labels were targets."""

    given: dict[str, Any]
    head: Head | None = None
    loss: RowsLoss | None = None
    had_bt: Tensor | None = None
    share: float = 1.0


class SelectsInTraining:
    """Mixed into a model, and into the backbone it contains, for whoever calls that alone."""

    selector: Selector
    extra_arguments = ("token_scores",)

    def around(self, forward: Callable[..., Any], *args: Any, token_scores: Tensor | None = None, **kwargs: Any) -> Any:
        """Run `forward`; see `surgery.outermost`."""
        selector, names = self.selector, self.argument_names()
        trains = self.training and torch.is_grad_enabled()  # type: ignore[attr-defined]
        if (
            selector.running or selector.dense or not trains or len(args) > len(names)
        ):  # too many: the dense one says so
            return forward(*args, **kwargs)
        draw: Any = choose  # its decorator hides its signature
        chosen: Chosen = draw(self, dict(zip(names, args, strict=False)) | kwargs, token_scores)
        with selector.selecting(chosen.head, chosen.loss):
            out = forward(**chosen.given)
        weighed = chosen.loss is not None and chosen.loss.ran
        if not weighed and selector.rows is not None and selector.rows.weight_bk is not None:
            raise ValueError(
                "token_selection: unbiased=True weighs the loss of each selected target, and the loss of "
                f"{type(self).__name__} with this trainer is not computed where it can be weighed. Use "
                "unbiased=False, or train a causal language model with transformers' Trainer."
            )
        return out if chosen.had_bt is None else as_if_all(out, chosen.had_bt, chosen.share)

    @property
    def loss_function(self) -> Any:
        """The model's own, but for a training forward whose head hands on selected rows."""
        ours = self.selector.loss
        return super().loss_function if ours is None else ours  # type: ignore[misc]

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        super(SelectsInTraining, type(self)).loss_function.fset(self, value)  # type: ignore[misc]

    @classmethod
    def argument_names(cls) -> tuple[str, ...]:
        """The arguments that the dense forward names."""
        return _argument_names(cls)


@torch.compiler.disable()  # what it does is on the CPU, with bytes and generators
def choose(model: Any, given: dict[str, Any], scores: Tensor | None) -> Chosen:
    """Draw the selection of a forward with these arguments, and make them those of selected tokens."""
    selector, labels = model.selector, given.get("labels")
    policy = selector.config.policy
    if scores is None and policy in ("loss", "gradient_norm"):
        scores = token_scores(model, given, policy)
    rows = selector.choose(given | {"token_scores": scores})
    if rows is None or labels is None or labels.shape != (len(rows.counts), rows.num_tokens):
        return Chosen(given)
    kept, had_bt, share = selected_labels(labels, rows, selector.causal)
    given = given | {"labels": kept}
    if given.get("num_items_in_batch") is not None:
        given["num_items_in_batch"] = given["num_items_in_batch"] * share
    linear = head_of(model)
    if linear is None or not takes_rows(model):
        return Chosen(given, None, None, had_bt, share)
    if selector.causal:
        return Chosen(given, rows_head(linear, rows, causal=True), RowsLoss(linear, rows), had_bt, share)
    # the losses of masked language models are written into their forwards: they are given fewer rows of both
    given["labels"] = only_used(rows.to(labels.device).gather(kept), rows)
    return Chosen(given, rows_head(linear, rows, causal=False), None, had_bt, share)


@cache
def _argument_names(kind: Any) -> tuple[str, ...]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in named and p.name not in kind.extra_arguments)


def install_model(model: nn.Module, anatomy: Anatomy, selector: Selector) -> Undo:
    """Let a described model select when it is called, and its backbone when that is called alone; its head follows."""
    outer: Any = submodule(model, anatomy.model)
    models = [outer, *_backbones(outer, anatomy)]
    head = outer.get_output_embeddings() if hasattr(outer, "get_output_embeddings") else None
    head = head if type(head) is nn.Linear and not {"forward", "_hf_hook"} & vars(head).keys() else None
    for module in models:
        reclass_model(module, SelectsInTraining)
        vars(module)["selector"] = selector
    if head is not None:
        reclass(head, HeadOnRows)
        vars(head)["selector"] = selector

    def undo() -> None:
        if head is not None:
            del vars(head)["selector"]
            declass(head)
        for module in reversed(models):
            del vars(module)["selector"]
            declass_model(module)

    return undo


def _backbones(outer: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    """What lies between a model and its blocks and takes the model's input."""
    inside = anatomy.blocks[0].name.removeprefix(f"{anatomy.model}." if anatomy.model else "").split(".")
    between = [outer.get_submodule(".".join(inside[:depth])) for depth in range(1, len(inside))]
    return [m for m in between if set(_INPUTS) & set(inspect.signature(type(m).forward).parameters)]
