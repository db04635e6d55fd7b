"""TRL's own activation offloading beside each method.

Its bookkeeping ends a run whose saved tensors are read twice, and what is never read stays in it until the next step;
its copies go from a CPU to a CPU, without streams. GRPO has no such option in TRL 1.16: its training step runs inside
the context that the other trainers enter.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from bench.tables import trainers as table
from tests.hf import trainers
from tests.hf.trainers import Asked

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("default")  # the libraries' own


class Kept:
    """What went to the host, and the contexts that held it."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []
        self.contexts: list[Any] = []


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    from trl.models import activation_offloading as offloading

    found = Kept()

    class Offload(offloading.OffloadActivations):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"use_streams": False, "use_pin_memory": False})
            found.contexts.append(self)
            pack = self.pack_hook

            def note(tensor: Tensor) -> Any:
                number = pack(tensor)
                if self.tracker[number][1]:  # on the host, rather than where it was
                    found.shapes.append(tensor.shape)
                return number

            self.pack_hook = note

    monkeypatch.setattr(offloading, "OffloadActivations", Offload)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cpu"))
    monkeypatch.setattr(torch, "get_device_module", lambda *_: torch.cpu)
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    return found


def trained(name: str, asked: Asked) -> dict[str, Tensor]:
    """What was trained, by name."""
    AcceleratorState._reset_state(reset_partial_state=True)
    model = trainers.train(name, asked).model
    AcceleratorState._reset_state(reset_partial_state=True)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() and any(bool(x.any()) for name, x in ours.items() if "lora_B" in name)
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


def assert_all_read(kept: Kept) -> None:
    """Some went to the host, and nothing stayed there; labels and sums of metrics, which no backward reads, do not
    leave."""
    assert kept.shapes
    assert not [entry[0].shape for context in kept.contexts for entry in context.tracker.values() if entry[1]]


CELLS = [("sft", method) for method in table.METHODS] + [(name, table.METHODS[0]) for name in ("dpo", "kto", "reward")]
QUICK = (("sft", table.METHODS[0]), ("dpo", table.METHODS[0]))


@pytest.mark.parametrize(
    ("name", "method"), [cell if cell in QUICK else pytest.param(*cell, marks=pytest.mark.slow) for cell in CELLS]
)
def test_as_trl_offers_it_the_weights_end_the_same(name: str, method: str, tmp_path: Path, kept: Kept) -> None:
    """Two trainings, over two seconds on a busy machine."""
    options = {"gradient_checkpointing": True}
    plain = trained(name, Asked(tmp_path / "plain", method, options=options))
    assert not kept.contexts
    offloaded = trained(name, Asked(tmp_path / "off", method, options=options | {"activation_offloading": True}))
    assert_same(offloaded, plain)
    assert_all_read(kept)


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", [table.METHODS[0], pytest.param("routed_ffn", marks=pytest.mark.slow)])
def test_around_the_step_of_grpo_the_weights_end_the_same(
    method: str, checkpointing: bool, tmp_path: Path, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trainings with generation, over two seconds. Its answers are generated inside the context, too, and leave
    nothing there."""
    options = {"gradient_checkpointing": checkpointing}
    plain = trained("grpo", Asked(tmp_path / "plain", method, options=options))
    if "activation_offloading" in {field.name for field in dataclasses.fields(trl.GRPOConfig)}:
        options["activation_offloading"] = True
    else:
        _offload_steps(monkeypatch)
    offloaded = trained("grpo", Asked(tmp_path / "off", method, options=options))
    assert_same(offloaded, plain)
    assert_all_read(kept)


def _offload_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.models import get_act_offloading_ctx_manager

    contexts: dict[int, Any] = {}
    inner = trl.GRPOTrainer.training_step

    def training_step(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self) not in contexts:
            contexts[id(self)] = get_act_offloading_ctx_manager(model=self.model)
        with contexts[id(self)]:
            return inner(self, model, *args, **kwargs)

    monkeypatch.setattr(trl.GRPOTrainer, "training_step", training_step)
