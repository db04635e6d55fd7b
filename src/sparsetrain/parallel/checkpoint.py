"""Full-shape checkpoints: what any grid has written, any other reads, and so does a plain model.

`model.safetensors` holds dense weights under dense names, `optimizer.safetensors` the optimizer's tensors in the same
shapes, as `<parameter>/<what>`. Rank 0 writes; every rank takes part in the gathering, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from sparsetrain.core.errors import CheckpointError
from sparsetrain.core.files import scratch_file
from sparsetrain.parallel.model import GridModel

WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.safetensors"


def full_weights(cut: GridModel) -> dict[str, Tensor]:
    """Dense state of the model, on the CPU of rank 0; empty elsewhere. Tied weights come once."""
    found = {}
    for name, tensor in _tensors(cut.model):
        full = _full(cut, name, tensor.detach())
        if cut.grid.rank == 0:
            found[name.replace(".base_layer.", ".")] = full.cpu().clone()
    return found


def full_optimizer(cut: GridModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors in full shapes, on the CPU of rank 0; empty elsewhere."""
    found = {}
    for name, parameter in cut.model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensor = torch.as_tensor(value)
            full = _full(cut, name, tensor) if tensor.shape == parameter.shape else tensor
            if cut.grid.rank == 0:
                found[f"{name}/{key}"] = full.cpu().clone()
    return found


def save(cut: GridModel, folder: str | Path, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Write weights, and the optimizer's state, into a folder; whole files or none."""
    folder = Path(folder)
    states = {WEIGHTS: full_weights(cut)}
    if optimizer is not None:
        states[OPTIMIZER] = full_optimizer(cut, optimizer)
    if cut.grid.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for name, state in states.items():
            with scratch_file(folder / name) as part:
                save_file({key: value.contiguous() for key, value in state.items()}, part, metadata={"format": "pt"})
    distributed.barrier()


def load(cut: GridModel, folder: str | Path, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Read what `save` wrote on this or any other grid, or the dense weights of a plain model.

    Raises:
        CheckpointError: a file is missing, or holds other names or shapes than the model.
    """
    folder = Path(folder)
    own = {name.replace(".base_layer.", "."): (name, tensor) for name, tensor in _tensors(cut.model)}
    with _opened(folder / WEIGHTS) as file:
        if odd := sorted(set(file.keys()) ^ set(own)):
            raise CheckpointError(f"{folder / WEIGHTS}: {odd[0]!r} is not in both the file and the model.")
        for key, (name, tensor) in own.items():
            _copy(cut, name, tensor, file.get_tensor(key), folder / WEIGHTS)
    cut.flow.drop()
    if optimizer is None:
        return
    with _opened(folder / OPTIMIZER) as file:
        parameters = dict(cut.model.named_parameters())
        for key in file.keys():  # noqa: SIM118  (no mapping)
            name, _, what = key.rpartition("/")
            if name not in parameters:
                raise CheckpointError(f"{folder / OPTIMIZER}: {name!r} is no parameter of the model.")
            full = file.get_tensor(key)
            parameter = parameters[name]
            state = optimizer.state[parameter]
            state[what] = full.clone()
            if full.ndim:
                state[what] = torch.empty_like(parameter)
                _copy(cut, name, state[what], full, folder / OPTIMIZER)


def _opened(path: Path):
    if not path.is_file():
        raise CheckpointError(f"{path} is missing. Give a folder that `parallel.checkpoint.save` wrote.")
    return safe_open(path, "pt")


@torch.no_grad()
def _copy(cut: GridModel, name: str, to: Tensor, full: Tensor, path: Path) -> None:
    owner, _, kind = name.rpartition(".")
    module = cut.cut.get(owner)
    part = full if module is None else module.cut(kind, full)
    if part.shape != to.shape:
        raise CheckpointError(f"{path}: {name} is {tuple(full.shape)}, which does not fit the model. Use its own.")
    to.copy_(part)


def _full(cut: GridModel, name: str, tensor: Tensor) -> Tensor:
    owner, _, kind = name.rpartition(".")
    module = cut.cut.get(owner)
    return tensor if module is None else module.full(kind, tensor)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters once each, then buffers that a dense checkpoint holds."""
    yield from model.named_parameters()
    kept = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)
