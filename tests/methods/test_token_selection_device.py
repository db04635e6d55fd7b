"""Token selection on a device: what the host is asked in a step, how much is launched, and kernels inside a model."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from transformers import LlamaForCausalLM

from sparsetrain import TokenSelection, sparsify
from sparsetrain.measure.launches import CountLaunches
from sparsetrain.methods.token_selection import policies
from sparsetrain.ops.selected_rows import Rows, attention, choice
from tests.families import llama_config


def model_of(layers: int, **config: Any) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(num_hidden_layers=layers)).train()
    model.config.use_cache = False
    if config:
        sparsify(model, TokenSelection(**config))
    return model


def batch_of(padded: bool) -> dict[str, Any]:
    ids = torch.randint(3, 61, (2, 50), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 40:] = 0
    labels = ids.where(mask > 0, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "num_items_in_batch": torch.tensor(80)}


def step(model: Any, batch: dict[str, Any]) -> CountLaunches:
    model(**batch).loss.backward()
    with CountLaunches() as found:
        model(**batch).loss.backward()
    return found


@pytest.fixture
def drawn_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The draw, which is on the host with the batch, reads nothing of a device: it is left out of the counts."""
    rows = Rows.of([range(0, 48, 3), range(0, 36, 4)], 50)
    monkeypatch.setattr(policies, "draw", lambda *_, **__: rows)
    monkeypatch.setattr("sparsetrain.methods.token_selection.selector.draw", policies.draw)


@pytest.mark.usefixtures("drawn_before")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_no_layer_asks_the_device_for_a_value(padded: bool, checkpointed: bool) -> None:
    """What is read is read once a step: whether there is padding, how rows are packed, and which rows have a target."""
    found = []
    for layers in (1, 4):
        model = model_of(layers, keep_ratio=0.3)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(step(model, batch_of(padded)).reads)
    assert found[0] == found[1]
    assert sum(found[0].values()) <= 6, found[0]


@pytest.mark.usefixtures("drawn_before")
def test_launches_of_a_layer_stay_near_those_of_a_dense_one() -> None:
    """Two passes over a block and one backward: 197 beside 110, 42 of them the tiles of two samples (with our kernels
    153). Takes three seconds: four models run two steps."""

    def of_a_layer(**config: Any) -> float:
        two, four = (step(model_of(layers, **config), batch_of(False)).launches for layers in (2, 4))
        return (four - two) / 2

    assert of_a_layer(keep_ratio=0.3) <= 1.8 * of_a_layer()


@pytest.mark.slow  # tracing takes some ten seconds
@pytest.mark.filterwarnings("ignore")  # dynamo warns of what it leaves to eager
def test_a_compiled_model_trains_alike() -> None:
    """The two passes stay uncompiled: traced, they lost the gradient."""
    model, batch = model_of(1, keep_ratio=0.3), batch_of(False)
    found = []
    for run in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        loss = run(**batch).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_rows_that_move_to_a_device_are_known_to_the_host() -> None:
    rows = Rows.of([[1, 4], [2]], 6)
    moved = rows.to(torch.device("meta"))
    assert moved.positions == [[1, 4], [2]] and moved.index_bk.device.type == "meta"


@pytest.mark.interpret
@pytest.mark.parametrize("padded", [False, True])
def test_a_model_trains_alike_with_the_kernels(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer, the whole backward: every gradient is that of plain PyTorch."""
    triton: Any = pytest.importorskip("triton", reason="triton is not installed: the kernels are not run")
    old = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8)
    if old and int(numpy.__version__.split(".")[1]) >= 4:
        pytest.skip("the interpreter of triton before 3.8 cannot loop with numpy 2.4")
    gradients = []
    for name in ("torch", "triton"):
        model = model_of(1, keep_ratio=0.3)
        chosen: list[str] = []
        real = choice.available

        def only(*args: Any, name: str = name, chosen: list[str] = chosen, real: Any = real, **kwargs: Any) -> Any:
            found = real(*args, **kwargs)
            assert found[name] is None, found[name]
            chosen.append(name)
            return {name: None}

        with monkeypatch.context() as patched:
            patched.setattr(attention, "available", only)
            model(**batch_of(padded)).loss.backward()
        assert chosen == [name]
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=2e-4, atol=1e-6, msg=name)
