"""What stands for an input and for a concept: the model's own embeddings, and the tensors that a site starts from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.core.modes import evaluating
from sparsetrain.methods.concept_bottleneck.config import ConceptBottleneck
from sparsetrain.methods.concept_bottleneck.module import Seen, pooled
from sparsetrain.surgery.method import Batch

DEFAULT_SCALE = 20.0


def start(
    config: ConceptBottleneck,
    shape: Sequence[int],
    embedded: Tensor | None,
    scale: float | None = None,
    rows: Tensor | None = None,
) -> dict[str, Tensor]:
    """Tensors of a site before training, with meaningless concepts for None.

    Args:
        shape: labels, and width of the embeddings.
        embedded: [concepts + classes, e], the embeddings of the config's texts.
        scale: the encoder's own.
        rows: [n, e], embeddings of inputs, whose mean scores are the center.
    """
    labels, width = shape
    d = len(config.concepts)
    if embedded is None:
        embedded = torch.zeros(len(config.texts), width)
    vectors, classes = F.normalize(embedded.float(), dim=-1).split([d, len(config.classes)])
    bound = d**-0.5
    factor = torch.tensor(next(s for s in (config.scale, scale, DEFAULT_SCALE) if s is not None))
    center = torch.zeros(d, device=embedded.device)
    if config.center and rows is not None and len(rows):
        center = factor * (F.normalize(rows.float(), dim=-1) @ vectors.t()).mean(0)
    return {
        "vectors": vectors,
        "profiles": classes @ vectors.t(),
        "scale": factor,
        "center": center,
        "bottleneck": torch.eye(d, device=embedded.device),
        "head": torch.empty(labels, d, device=embedded.device).uniform_(-bound, bound),
    }


def own_scale(model: nn.Module) -> float | None:
    """exp(logit_scale) of an encoder that has learned one."""
    found = [p for name, p in model.named_parameters() if name.rpartition(".")[2] == "logit_scale"]
    return float(found[0].detach().exp()) if found else None


def embed(model: nn.Module, config: ConceptBottleneck, linear: nn.Module, batch: Batch) -> Tensor:
    """What stands for each row of a batch, [b, e], in fp32: see `pooling`."""
    found: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _module, args: found.append(args[0].float()))
    try:
        with _watched(model, config) as seen, evaluating(model), torch.no_grad():
            model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
            return pooled(seen.states_bte, seen.mask_bt) if seen.states_bte is not None else found[0]
    finally:
        hook.remove()


@contextmanager
def _watched(model: nn.Module, config: ConceptBottleneck) -> Iterator[Seen]:
    seen = Seen()
    hook = watch(model, seen) if reads_mean(config, model) else None
    try:
        yield seen
    finally:
        if hook is not None:
            hook.remove()


def reads_mean(config: ConceptBottleneck, model: nn.Module) -> bool:
    """Whether the mean of the tokens' states stands for an input."""
    if config.pooling == "auto":
        return getattr(model, "main_input_name", "input_ids") == "input_ids"
    return config.pooling == "mean"


def watch(model: nn.Module, seen: Seen) -> Any:
    """Let the encoder leave its tokens' states, and which are real, for the head."""

    def keep(_module: Any, _args: Any, kwargs: dict[str, Any], out: Any) -> None:
        seen.states_bte = out[0] if isinstance(out, tuple) else out.last_hidden_state
        seen.mask_bt = kwargs.get("attention_mask")

    encoder: Any = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if not isinstance(encoder, nn.Module):
        raise ValueError(
            f"concept_bottleneck: pooling='mean' reads the encoder's states, and {type(model).__name__} names no "
            "encoder (base_model_prefix). Choose pooling='head'."
        )
    return encoder.register_forward_hook(keep, with_kwargs=True)
