"""Layer-wise distillation: after the closed-form conversion, each routed FFN learns its dense FFN's output by itself.

Per FFN, on inputs x that the model meets when all its FFNs are dense:

    minimise  sum_n w_n |routed(x_n) - dense(x_n)|^2 / sum_n w_n |dense(x_n) - mean|^2

over router, compensation and LoRA. No gradient crosses a layer, so nothing is kept for a backward pass of the model.
Legend: n tokens, d model width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.methods.routed_ffn.calibrate import ffn_weights
from sparsetrain.methods.routed_ffn.convert import default_weight
from sparsetrain.methods.routed_ffn.module import NotesPadding, Routed, Routing
from sparsetrain.surgery.calibration import blocks_only


def distill(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    *,
    steps: int,
    lr: float = 3e-4,
    progress: Callable[[str, float], None] = lambda name, share: None,
) -> list[float]:
    """Train router, compensation and LoRA of every routed FFN towards its dense FFN; base weights are left alone.

    Args:
        model: as `sparsify` left it, in PEFT's LoRA or not; other methods on it (sparse attention) stay in force.
        batches: keyword arguments of the model's forward, one a step; at least `steps`.
        steps: optimizer steps (AdamW); the learning rate falls from `lr` to 0 along a line.
        lr: at the first step.
        progress: told (phase, share done).

    Returns:
        The relative error above, mean of the FFNs, at each step.

    Raises:
        ValueError: the model has no routed FFN that drops blocks.
    """
    owners = [module for module in model.modules() if isinstance(module, Routed) and not module.routed.dense]
    if not owners:
        raise ValueError("distill: the model has no routed FFN that drops blocks. Add routed_ffn with sparsify first.")
    students = [Student(owner) for owner in owners]
    trained = [tensor for student in students for tensor in student.trained]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    blocks = [module for module in model.modules() if isinstance(module, NotesPadding)]
    errors: list[float] = []
    with teaching(students), blocks_only(model, blocks[-1]) as run:
        for batch in itertools.islice(batches, steps):
            progress("routed_ffn: distilling", len(errors) / steps)
            run(batch)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            errors.append(sum(student.error for student in students) / len(students))
    return errors


class Student:
    """One routed FFN that learns whenever the model's forward comes past, and passes the dense output on."""

    def __init__(self, owner: Any) -> None:
        self.routing: Routing = owner.routed
        site = self.routing.site
        linears = [owner.get_submodule(name) for name in (site.up, site.gate, site.down) if name]
        lora = [p for linear in linears for name, p in linear.named_parameters() if "lora_" in name]
        self.trained = [p for p in (*self.routing.parameters(), *lora) if p.requires_grad]
        self.error = 0.0

    def learn(self, owner: nn.Module, x: Tensor) -> Tensor:
        """What `Routing.forward` does for its owner, [..., d] -> [..., d], but dense; leaves gradients behind."""
        whole_nd = x.detach().reshape(-1, x.shape[-1])
        output_nd = ffn_weights(owner, self.routing.site).output(whole_nd.float())
        valid_bt = self.routing.valid_bt
        if valid_bt is not None and valid_bt.numel() == len(whole_nd):
            x_nd, dense_nd = whole_nd[valid_bt.reshape(-1)], output_nd[valid_bt.reshape(-1)]
        else:
            x_nd, dense_nd = whole_nd, output_nd
        weight_n = default_weight(dense_nd)
        spread_n = (dense_nd - dense_nd.mean(dim=0)).square().sum(dim=1)
        with torch.enable_grad():
            error_n = (Routing.forward(self.routing, owner, x_nd) - dense_nd).square().sum(dim=1)
            loss = weight_n @ error_n / (weight_n @ spread_n)
        grads = torch.autograd.grad(loss, self.trained, allow_unused=True)
        for tensor, grad in zip(self.trained, grads, strict=True):
            tensor.grad = grad
        self.error = loss.item()
        return output_nd.to(x.dtype).view_as(x)


@contextmanager
def teaching(students: list[Student]) -> Iterator[None]:
    """While it is open, each student's FFN is dense for the model, and learns."""
    try:
        for student in students:
            student.routing.forward = student.learn  # type: ignore[method-assign]
        yield
    finally:
        for student in students:
            del student.routing.forward
