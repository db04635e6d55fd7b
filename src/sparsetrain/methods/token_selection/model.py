"""Token selection as the model's own forward: it sees the labels, so whoever calls the model trains on selected tokens.

In training, with gradients enabled, the forward draws the selection, sets the labels of other tokens aside and runs the
dense forward, whose blocks, head and loss ask the selector. Otherwise it is the dense forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, Undo, submodule
from sparsetrain.core.shards import gradients_of
from sparsetrain.methods.token_selection.ahead import look_ahead, remembered
from sparsetrain.methods.token_selection.last_norm import NormOnRows
from sparsetrain.methods.token_selection.logits import LogitsOnDemand, cut_rows
from sparsetrain.methods.token_selection.loss import (
    Finish,
    HeadOnRows,
    OwnLoss,
    RowsLoss,
    Targets,
    as_if_all,
    has_usual_loss,
    head_of,
    of_every_target,
    only_selected,
    only_used,
    rows_head,
    takes_rows,
    targets_of,
)
from sparsetrain.methods.token_selection.selector import Head, Selector
from sparsetrain.methods.token_selection.step import leaves_of
from sparsetrain.surgery.outermost import declass_model, reclass_model
from sparsetrain.surgery.reclass import declass, reclass

_INPUTS = ("input_ids", "pixel_values")


class Chosen(NamedTuple):
    """What a training forward runs on: its arguments and targets, and what stands for its head, loss and logits."""

    given: dict[str, Any]
    targets: Targets | None = None
    head: Head | None = None
    loss: RowsLoss | OwnLoss | None = None
    logits: LogitsOnDemand | None = None
    note: Callable[[Tensor], None] | None = None  # takes what the head was given


class SelectsInTraining:
    """Mixed into a model, and into the backbone it contains, for whoever calls that alone."""

    selector: Selector
    extra_arguments = ("token_scores",)

    def around(self, forward: Callable[..., Any], *args: Any, token_scores: Tensor | None = None, **kwargs: Any) -> Any:
        """Run `forward`; see `surgery.outermost`."""
        selector, names = self.selector, self.argument_names()
        trains = self.training and torch.is_grad_enabled()  # type: ignore[attr-defined]
        if selector.running or not trains or len(args) > len(names):  # too many: the dense one says so
            return forward(*args, **kwargs)
        draw: Any = choose  # its decorator hides its signature
        chosen: Chosen = draw(self, dict(zip(names, args, strict=False)) | kwargs, token_scores)
        with selector.selecting(chosen.head, chosen.loss):
            out = forward(**chosen.given)
        loss = chosen.loss
        if (
            not (loss is not None and loss.ran and loss.weighs)
            and selector.rows is not None
            and selector.rows.weight_bk is not None
        ):
            raise ValueError(
                "token_selection: unbiased=True weighs the loss of each selected target, and the loss of "
                f"{type(self).__name__} with this trainer is not computed where it can be weighed. Use "
                "unbiased=False, or train a causal language model with transformers' Trainer."
            )
        return handed_on(self, out, chosen)

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
    selector: Selector = model.selector
    causal, config = selector.causal, selector.config
    policy = config.policy if scores is None and config.policy in ("loss", "gradient_norm") else None
    known = {"token_scores": scores}
    selector.kept, note = {}, None
    if config.recompute and "use_cache" in model.argument_names():
        given = {"use_cache": False} | given  # or a cache, which nobody asked for, holds what waits on the host
    if policy and config.scores == "previous" and not selector.dense:
        known["token_scores"], note = remembered(model, given, policy, _pad_token(model))
        policy = None
    if not selector.dense and (policy or config.context == "attended"):
        known |= look_ahead(model, given, policy=policy, attended=config.context == "attended")
    rows = selector.choose(given | known, _pad_token(model))
    if rows is not None and not rows.everything:
        _refuse_trained_cache(given)
    targets = None if rows is None else targets_of(given, rows, causal)
    if rows is None or targets is None:
        _refuse_loss_elsewhere(selector, given)
        return Chosen(given)
    if selector.reads_all:
        return Chosen(given, targets)
    given = only_selected(given, targets, causal)
    finish = _finish(model, given, targets, whole_step=given.get("num_items_in_batch") is not None)
    linear = head_of(model)
    own: Any = getattr(super(SelectsInTraining, model), "loss_function", None)
    if linear is None or not takes_rows(model) or (causal and not has_usual_loss(model, own)):
        return Chosen(given, targets, None, OwnLoss(own, not targets.counts[0], finish))
    logits = LogitsOnDemand(linear, rows)
    head = rows_head(linear, rows, causal, logits)
    if causal:
        return Chosen(given, targets, head, RowsLoss(linear, rows, finish, selector.ran), logits, note)
    # the losses of masked language models may be written into their forwards: they are given fewer rows of both
    given["labels"] = only_used(rows.to(given["labels"].device).gather(given["labels"]), rows)
    return Chosen(given, targets, head, OwnLoss(own, not targets.counts[0], finish), logits, note)


def handed_on(model: Any, out: Any, chosen: Chosen) -> Any:
    """A training forward's output as its caller expects it: his loss, and logits of all rows."""
    targets, rows = chosen.targets, model.selector.rows
    tells_each = getattr(out, "label_mask", None) is not None and getattr(out, "log_probs", None) is not None
    if targets is None or model.selector.reads_all:
        if targets is not None and tells_each:
            return of_every_target(out, targets)
        logits = _entry(out, "logits", 0)
        one_a_token = isinstance(logits, Tensor) and logits.ndim == 3
        if rows is None or not one_a_token or logits.shape[:2] != (len(rows.counts), rows.num_tokens):
            return out
        return _with_entry(out, "logits", 0, cut_rows(logits, rows))
    whole_step = chosen.given.get("num_items_in_batch") is not None
    if tells_each:
        # a trainer that knows its model to mean over a micro-batch means over micro-batches
        summed = whole_step or getattr(model, "accepts_loss_kwargs", True)
        return as_if_all(out, targets, _finish(model, chosen.given, targets, whole_step=True) if summed else None)
    loss = _entry(out, "loss", 0)
    if chosen.loss is not None and not chosen.loss.ran and isinstance(loss, Tensor):
        selected = targets.counts[0]
        if not selected:
            loss = _entry(out, "logits", 1).float().sum() * 0.0
        elif whole_step:
            loss = loss * (selected / chosen.given["num_items_in_batch"])
        out = _with_entry(out, "loss", 0, _finish(model, chosen.given, targets, whole_step)(loss))
    if chosen.logits is not None and chosen.logits.hidden_btd is not None:
        if chosen.note is not None:
            chosen.note(chosen.logits.hidden_btd.detach())
        out = _with_entry(out, "logits", 1, chosen.logits)
    return out


@torch.compiler.disable()
def _finish(model: Any, given: dict[str, Any], targets: Targets, whole_step: bool) -> Finish:
    """Makes the loss of selected targets over all targets of the step that over the selected ones."""
    mean, (selected, all_of_them) = model.selector.mean, targets.counts
    outside = leaves_of(given.get("inputs_embeds")) if whole_step else []
    if whole_step:
        mean.begin_if_fresh(gradients_of(model, outside))

    def finish(loss: Tensor, weight: Tensor | None = None, spread: Tensor | None = None) -> Tensor:
        if not whole_step:
            return loss
        counted = float(selected if weight is None else weight.sum())
        return mean.add(loss, counted, all_of_them, lambda: gradients_of(model, outside), spread)

    return finish


def _refuse_loss_elsewhere(selector: Selector, given: dict[str, Any]) -> None:
    """A trainer that counts targets and keeps the labels to itself divides a loss of all tokens by all of them."""
    labelled = given.get("labels") is not None
    everything = selector.dense or selector.config.keep_ratio == 1
    if given.get("num_items_in_batch") is None or labelled or everything:
        return
    raise ValueError(
        "token_selection: the trainer keeps the labels from the model and computes the loss itself, of all tokens "
        "(compute_loss_func or label_smoothing_factor), so neither the selected ones nor their number are known. "
        "Let the model compute its loss, or override compute_loss, where outputs.logits has all rows and gradient "
        "flows through selected ones."
    )


def _refuse_trained_cache(given: dict[str, Any]) -> None:
    for layer in getattr(given.get("past_key_values"), "layers", ()):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.requires_grad:
            raise ValueError(
                "token_selection: past_key_values hold keys that are trained (prefix tuning), and keys of tokens that "
                "are not selected get no gradient. Use LoRA or prompt tuning, or keep_ratio=1."
            )


def _pad_token(model: Any) -> int | None:
    config = getattr(model, "config", None)
    return None if config is None else getattr(config.get_text_config(), "pad_token_id", None)


def _entry(out: Any, name: str, place: int) -> Any:
    if isinstance(out, tuple):
        return out[place] if place < len(out) else None
    return getattr(out, name, None)


def _with_entry(out: Any, name: str, place: int, value: Any) -> Any:
    if isinstance(out, tuple):
        return (*out[:place], value, *out[place + 1 :])
    if getattr(out, name, None) is not None:
        out[name] = value
    return out


@cache
def _argument_names(kind: Any) -> tuple[str, ...]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in named and p.name not in kind.extra_arguments)


def install_model(model: nn.Module, anatomy: Anatomy, selector: Selector, *, cuts_last: bool) -> Undo:
    """Let a described model select when it is called, and its backbone when that is called alone; its head follows, and
    behind a last block that is cut (`cuts_last`) the norm before the head."""
    outer: Any = submodule(model, anatomy.model)
    models = [outer, *_backbones(outer, anatomy)]
    head = outer.get_output_embeddings() if hasattr(outer, "get_output_embeddings") else None
    head = head if type(head) is nn.Linear and not {"forward", "_hf_hook"} & vars(head).keys() else None
    for module in models:
        reclass_model(module, SelectsInTraining)
        vars(module)["selector"] = selector
    norm = submodule(model, anatomy.last_norm) if cuts_last and anatomy.last_norm else None
    norm = norm if norm is not None and not {"forward", "_hf_hook"} & vars(norm).keys() else None
    follow = [(module, kind) for module, kind in ((head, HeadOnRows), (norm, NormOnRows)) if module is not None]
    for module, kind in follow:
        reclass(module, kind)
        vars(module)["selector"] = selector

    def undo() -> None:
        for module, kind in follow:
            del vars(module)["selector"]
            declass(module, kind)
        for module in reversed(models):
            del vars(module)["selector"]
            declass_model(module, SelectsInTraining)

    return undo


def _backbones(outer: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    """What lies between a model and its blocks and takes the model's input."""
    inside = anatomy.blocks[0].name.removeprefix(f"{anatomy.model}." if anatomy.model else "").split(".")
    between = [outer.get_submodule(".".join(inside[:depth])) for depth in range(1, len(inside))]
    return [m for m in between if set(_INPUTS) & set(inspect.signature(type(m).forward).parameters)]
