"""Saved bytes against counts made by hand, and the static and peak figures against known allocations."""

from __future__ import annotations

import gc
from mmap import PAGESIZE, mmap
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparsetrain.core.anatomy import Anatomy
from sparsetrain.measure import memory
from sparsetrain.measure.memory import peak_memory, record_saved, reset_peak, saved_activations, static_memory
from tests.measure.tiny import FFN, FLOAT, VOCAB, WIDTH, Adapted, TinyModel

T = 7


class Plain(nn.Module):
    """Runs any function of its weight; a model without blocks."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))
        self.register_buffer("scale", torch.ones(3))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)

    def anatomy(self) -> Anatomy:
        return Anatomy(family="plain", model_class="Plain", blocks=())


def _total(function: Any, x: Tensor) -> int:
    model = Plain(function)
    return saved_activations(model, lambda: model(x)).total


def test_every_component_of_a_layer_equals_the_count_by_hand() -> None:
    model, ids_t = TinyModel(num_layers=2), torch.randint(0, VOCAB, (T,))
    found = saved_activations(model, lambda: model(ids_t, ids_t))

    stream, hidden, scores = T * WIDTH * FLOAT, T * FFN * FLOAT, T * T * FLOAT
    statistics = 2 * T * FLOAT  # a LayerNorm keeps mean and reciprocal deviation
    # the norm's output, q k v in one storage, the softmax, its product with v
    attention = stream + 3 * stream + scores + stream
    # the FFN's input, and one hidden storage: relu keeps its result, which is also what `down` keeps
    ffn = stream + hidden
    norm = stream + statistics
    assert found.by_layer == {layer: {"norms": norm, "attention": attention, "ffn": ffn} for layer in (0, 1)}
    # the embedding keeps the ids (int64), and the last norm its input
    assert found.by_component["embedding"] == T * 8
    assert found.by_component["norms"] == 3 * norm
    # the head's input, log-probabilities; the labels are the ids, counted already
    log_probabilities, denominator = T * VOCAB * FLOAT, FLOAT
    assert found.by_component["head_and_loss"] == stream + log_probabilities + denominator
    assert found.by_component["adapters"] == found.by_component["other"] == 0
    assert found.total == sum(found.by_component.values())
    assert found.to_dict()["total"] == found.total


def test_views_of_one_storage_count_once_and_in_full() -> None:
    x = torch.randn(4, 3)

    def two_views(model: Plain, x: Tensor) -> Tensor:
        big = torch.cat([x, x]) * model.weight[:1]  # keeps the concatenation, 8 x 3
        head, tail = big[:2], big[2:3]  # exp of a view keeps its own result; mul keeps the views
        return (head * head).sum() + (tail * tail).sum()

    concatenation, big = 8 * 3 * FLOAT, 8 * 3 * FLOAT
    assert _total(two_views, x) == concatenation + big


def test_parameters_and_buffers_are_excluded_by_storage() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    assert _total(lambda model, x: (x @ model.weight.t()).sum(), x) == x.nbytes
    assert _total(lambda model, x: (x * model.scale).sum(), x) == 0


def test_a_buffer_that_the_forward_replaces_is_kept_by_the_graph_alone() -> None:
    def replace(model: Plain, x: Tensor) -> Tensor:
        y = (x * model.scale).sum()
        model.scale = torch.zeros(3)
        return y

    assert _total(replace, torch.randn(4, 3, requires_grad=True)) == 3 * FLOAT


def test_what_the_graph_drops_is_not_counted() -> None:
    x = torch.randn(4, 3, requires_grad=True)

    def discard(_model: Plain, x: Tensor) -> Tensor:
        x.exp().sum()
        return x.sum()

    assert _total(discard, x) == 0
    assert _total(lambda _model, x: x.exp().sum(), x) == x.nbytes


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_zeros(100))
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, _ = ctx.saved_tensors
        return 2 * x * grads[0]


def test_own_autograd_functions_are_seen() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    assert _total(lambda _model, x: Square.apply(x).sum(), x) == x.nbytes + 100 * FLOAT


def test_sparse_and_meta_tensors_have_bytes() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    coo = torch.eye(3).to_sparse_coo()
    indices, values = 2 * 3 * 8, 3 * FLOAT
    assert _total(lambda _model, x: torch.sparse.mm(coo, x).sum(), x) == indices + values
    model = TinyModel().to("meta")
    ids_t = torch.zeros(T, dtype=torch.long, device="meta")
    real = TinyModel()
    expected = saved_activations(real, lambda: real(torch.zeros(T, dtype=torch.long)).sum())
    assert saved_activations(model, lambda: model(ids_t).sum()) == expected


def test_loss_inside_and_outside_the_model_count_alike() -> None:
    model, ids_t = TinyModel(), torch.randint(0, VOCAB, (T,))
    inside = saved_activations(model, lambda: model(ids_t, ids_t))
    outside = saved_activations(model, lambda: F.cross_entropy(model(ids_t), ids_t))
    assert inside == outside


def test_adapters_get_what_they_keep_and_the_layer_they_are_in() -> None:
    model, ids_t, rank = TinyModel(), torch.randint(0, VOCAB, (T,)), 2
    model.requires_grad_(False)
    layer: Any = model.layers[1]
    layer.mlp.up = Adapted(layer.mlp.up, rank)
    found = saved_activations(model, lambda: model(ids_t, ids_t))
    # A's input (the residual stream) and B's input; nothing before the adapter needs a gradient
    assert found.by_component["adapters"] == T * WIDTH * FLOAT + T * rank * FLOAT
    assert found.by_layer[1]["adapters"] == found.by_component["adapters"]
    assert 0 not in found.by_layer


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_the_kept_inputs_only(reentrant: bool) -> None:
    model, ids_t = TinyModel(), torch.randint(0, VOCAB, (T,))
    plain = saved_activations(model, lambda: model(ids_t, ids_t))
    for layer in model.layers:
        run = layer.forward
        layer.forward = lambda x, run=run: checkpoint(run, x, use_reentrant=reentrant)  # type: ignore[method-assign]
    found = saved_activations(model, lambda: model(ids_t, ids_t))
    inputs = 2 * T * WIDTH * FLOAT
    assert sum(sum(row.values()) for row in found.by_layer.values()) == inputs
    assert found.total == plain.total - sum(sum(row.values()) for row in plain.by_layer.values()) + inputs


def test_gradients_are_those_of_an_unmeasured_step() -> None:
    model, ids_t = TinyModel(), torch.randint(0, VOCAB, (T,))
    model(ids_t, ids_t).backward()
    expected = [param.grad.clone() for param in model.parameters() if param.grad is not None]
    model.zero_grad()
    with record_saved(model) as record:
        loss = model(ids_t, ids_t)
        running_total = record.result().total
    loss.backward()
    assert running_total == record.result().total > 0
    for param, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(param.grad, grad, rtol=0, atol=0)


def test_hooks_are_gone_also_after_an_error_and_the_graph_is_freed() -> None:
    model, ids_t = TinyModel(), torch.randint(0, VOCAB, (T,))
    with pytest.raises(IndexError):
        saved_activations(model, lambda: model(torch.tensor([VOCAB + 5])))
    saved_activations(model, lambda: model(ids_t, ids_t))
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is memory.Saved]


def test_errors_say_what_to_do() -> None:
    model, ids_t = TinyModel(), torch.randint(0, VOCAB, (T,))
    with torch.no_grad(), pytest.raises(ValueError, match="Return the loss"):
        saved_activations(model, lambda: model(ids_t, ids_t))


def test_a_model_that_no_anatomy_knows_is_measured_without_its_parts() -> None:
    linear, x = nn.Linear(2, 2), torch.ones(5, 2)
    found = saved_activations(linear, lambda: linear(x).sum())
    assert found.total == 5 * 2 * FLOAT


def test_static_memory_counts_the_real_objects_once() -> None:
    model = TinyModel(num_layers=1)
    model.head.weight = model.embed.weight  # tied: once
    model.embed.requires_grad_(False)
    model.register_buffer("table", torch.zeros(9, dtype=torch.float64))
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad])
    before = static_memory(model, optimizer)
    assert before.gradients == before.optimizer_trainable == 0
    ids_t = torch.randint(0, VOCAB, (T,))
    model(ids_t, ids_t).backward()
    optimizer.step()
    after = static_memory(model, optimizer)
    trainable = [param for param in model.parameters() if param.requires_grad]
    num = sum(param.numel() for param in trainable)
    assert after.parameters_frozen == VOCAB * WIDTH * FLOAT
    assert after.parameters_trainable == after.gradients == num * FLOAT
    assert after.optimizer_trainable == 2 * num * FLOAT + len(trainable) * FLOAT  # two moments and a step count
    assert after.optimizer_frozen == 0
    assert after.buffers == 9 * 8
    everything = 4 * num * FLOAT + len(trainable) * FLOAT + 9 * 8 + VOCAB * WIDTH * FLOAT
    assert after.to_dict()["total"] == after.total == everything
    trainable[0].requires_grad_(False)
    assert static_memory(model, optimizer).optimizer_frozen == 2 * trainable[0].nbytes + FLOAT


def test_resident_peak_sees_an_allocation_and_can_be_reset() -> None:
    before = peak_memory()
    if before.rss_peak_bytes is None:
        pytest.skip("no /proc/self/status on this system")
    size = 64 * 1024**2
    block = mmap(-1, size)  # an allocator may have as much free already
    for page in range(0, size, PAGESIZE):
        block[page] = 1
    held = peak_memory()
    assert held.rss_bytes is not None and before.rss_bytes is not None and held.rss_peak_bytes is not None
    assert held.rss_bytes > before.rss_bytes + size * 0.9
    assert held.rss_peak_bytes >= held.rss_bytes
    assert held.gpu_allocated_peak_bytes is None and held.to_dict()["rss_peak_bytes"] == held.rss_peak_bytes
    block.close()
    if reset_peak():
        after = peak_memory()
        assert after.rss_peak_bytes is not None and after.rss_peak_bytes < held.rss_peak_bytes - size * 0.5


def test_figures_are_none_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        def __init__(self, *_: Any) -> None: ...

        def read_text(self) -> str:
            raise OSError

        def write_text(self, _: str) -> None:
            raise OSError

    monkeypatch.setattr(memory, "Path", Missing)
    assert peak_memory() == memory.PeakMemory()
    assert reset_peak() is False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_count_is_that_of_the_cpu_and_the_peak_is_pytorchs() -> None:
    model, ids_t = TinyModel(), torch.randint(0, VOCAB, (T,))
    expected = saved_activations(model, lambda: model(ids_t).sum())
    model, ids_t = model.cuda(), ids_t.cuda()
    reset_peak("cuda")
    assert saved_activations(model, lambda: model(ids_t).sum()) == expected
    found = peak_memory("cuda")
    assert found.gpu_allocated_peak_bytes == torch.cuda.max_memory_allocated()
    assert (found.gpu_reserved_peak_bytes or 0) >= (found.gpu_allocated_peak_bytes or 0) > 0
