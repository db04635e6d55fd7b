"""What a candidate of `bench` must pass before it is timed: its dense limit is dense, its fast path the reference."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from sparsetrain.core.backend import use_backend
from sparsetrain.core.config import MethodConfig
from sparsetrain.hf.study.training_step import MIDDLE, STEPS
from sparsetrain.hf.train.parts import Parts
from sparsetrain.hf.train.rows import first_batch
from sparsetrain.surgery.apply import sparsify

CHECK_LAYERS, CHECK_TOKENS = 2, 256


def distances(dense: nn.Module, configs: tuple[MethodConfig, ...], parts: Parts) -> dict[str, float]:
    """Relative L2 distances: each method's dense limit to `dense`, and the fast path to the reference."""
    model = copy.deepcopy(dense).eval()
    batch = {name: tensor[:1, :CHECK_TOKENS] for name, tensor in first_batch(parts).items() if name != "labels"}
    batch = {name: tensor.to(parts.device) for name, tensor in batch.items()}
    expected = numbers(model, batch)
    found = {}
    for each in configs:
        limit = copy.deepcopy(model)
        sparsify(limit, type(each).dense_limit(), calibration=[batch]).step(MIDDLE, STEPS)
        found[f"{each.method}: dense limit"] = distance(numbers(limit, batch), expected)
    sparsify(model, *(config.sparse_at_once() for config in configs), calibration=[batch]).step(MIDDLE, STEPS)
    with use_backend("reference"):
        reference = numbers(model, batch)
    found["fast path against reference"] = distance(numbers(model, batch), reference)
    return found


def numbers(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits and every gradient of their mean square."""
    model.zero_grad()
    logits = model(**batch).logits
    logits.square().mean().backward()
    grads = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach().float(), **grads}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The larger of two relative L2 distances: of the logits, and of all gradients together."""
    off = float((found["logits"] - expected["logits"]).norm() / expected["logits"].norm())
    grads = [name for name in expected if name != "logits"]
    if missing := [name for name in grads if name not in found]:
        raise ValueError(f"{missing[0]} has no gradient in the sparse model, and one in the dense model.")
    squares = [((found[n] - expected[n]).square().sum(), expected[n].square().sum()) for n in grads]
    apart, size = (float(sum(column)) for column in zip(*squares, strict=True))
    return max(off, (apart / size) ** 0.5)
