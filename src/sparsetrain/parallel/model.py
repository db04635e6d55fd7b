"""parallelize(): cut a model over a grid, family by family through its anatomy, and GridModel, what it is then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, Block, LinearSite, describe, submodule
from sparsetrain.parallel.exchange import all_features, own_features
from sparsetrain.parallel.flow import Flow, Overlap
from sparsetrain.parallel.gradients import Spread, finish
from sparsetrain.parallel.grid import ParallelGrid
from sparsetrain.parallel.linear import Mode, TPLinear
from sparsetrain.parallel.norm import AXIS, GridNorm
from sparsetrain.parallel.refuse import check_expert, check_plain, whole_linears
from sparsetrain.parallel.shape import TRANSPOSED_ROLES, GridShape

Cut = TPLinear | GridNorm


@dataclass(eq=False)
class GridModel:
    """A model that was cut over a grid; `model` is used as before.

    left: module -> why it is whole on every rank (data-parallel).
    """

    model: nn.Module
    grid: ParallelGrid
    mode: Mode
    flow: Flow
    cut: dict[str, Cut]
    left: dict[str, str]

    def spreads(self) -> Iterator[tuple[str, nn.Parameter, Spread]]:
        """(name, parameter, how it and its tokens lie on the grid), each parameter once."""
        shape = self.grid.shape
        whole = Spread(sums=("x", "y", "z", "data") if self.mode == "plain" else ("z", "data"), copies=shape.world)
        for name, parameter in self.model.named_parameters():
            owner, _, kind = name.rpartition(".")
            module = self.cut.get(owner)
            if module is None:
                yield name, parameter, whole
            elif kind == "weight" and isinstance(module, TPLinear):
                yield name, parameter, Spread(sums=("data",), copies=shape.data)
            else:
                axis = module.out_axis if isinstance(module, TPLinear) else AXIS
                yield name, parameter, Spread(sums=("z", "data"), copies=shape.world // shape.size(axis))

    def finish_gradients(self, max_norm: float | None = None) -> Tensor:
        """After the last backward of a step: sum gradients over every axis that splits tokens, and clip.

        Losses must be sums over this rank's tokens divided by the number of all ranks' tokens (`rows`), so that no
        size of the grid changes the gradient.

        Args:
            max_norm: scale gradients down to this norm; None: leave them.

        Returns:
            The norm of the whole model's gradient before clipping, equal to that on one device.
        """
        self.flow.settle()
        return finish(self.grid, [(p, spread) for _, p, spread in self.spreads()], max_norm)

    def rows(self, batch: Any) -> Any:
        """This rank's rows of a global batch: tensors, or a mapping of them.

        Raises:
            ValueError: the rows do not divide.
        """
        if isinstance(batch, dict):
            return {name: self.rows(value) for name, value in batch.items()}
        shape = self.grid.shape
        pieces = shape.world if self.mode == "plain" else shape.data * shape.z
        if batch.shape[0] % pieces:
            raise ValueError(
                f"grid {shape} in {self.mode} mode cuts a batch into {pieces} parts, and {batch.shape[0]} rows do not "
                f"divide by it. Take {max(pieces, batch.shape[0] // pieces * pieces)} rows."
            )
        return batch.chunk(pieces)[self.grid.rank * pieces // shape.world]

    def report(self) -> list[str]:
        """What was cut, and what stays whole on every rank and why."""
        linears = sum(isinstance(module, TPLinear) for module in self.cut.values())
        lines = [f"grid {self.grid.shape}, {self.mode} mode: {linears} linears cut."]
        return lines + [f"whole on every rank: {name} ({why})" for name, why in self.left.items()]


def parallelize(
    model: nn.Module,
    grid: ParallelGrid,
    *,
    mode: Mode = "plain",
    overlap: Overlap | None = None,
    keep_weights: bool = False,
) -> GridModel:
    """Cut the linears of a model's blocks over a grid, in place. Every rank must hold the same model.

    plain: every rank runs its own rows, and rows are exchanged for features around each linear; any model, LoRA and
    sparse methods included (what a method has replaced stays whole, and is reported).
    expert: between linears features stay cut, heads over y and the rest over x; no exchange, less memory, and every
    part of a block must be one that can be cut.

    Args:
        overlap: what runs beside the arithmetic; all three if not given.
        keep_weights: see `Flow`.

    Raises:
        ValueError: the grid cannot cut the model; on every rank, before anything is sent or edited.
        UnknownFamily: no adapter describes the model.
    """
    anatomy = describe(model)
    left = whole_linears(model, anatomy)
    sites = [site for site in anatomy.linears if site.name not in left]
    check_plain(grid.shape, anatomy, sites)
    if mode == "expert":
        check_expert(grid.shape, model, anatomy, left)
    grid.tell_methods(rows_everywhere=mode == "plain")
    flow = Flow(grid, overlap or Overlap(), keep_weights)
    cut: dict[str, Cut] = {}
    for site in sites:
        name, made = _linear(model, site, grid, mode, flow)
        cut[name] = made
    if mode == "expert":
        for block in anatomy.blocks:
            _enter_expert(model, block, grid, anatomy, cut)
        _cut_stream(model, anatomy, grid)
    for name, what in ((anatomy.embedding, "the embedding"), (anatomy.head, "the output head")):
        if name:
            left[name] = f"{what} is data-parallel"
    _describe_as_cut(model, anatomy, grid.shape, mode, {site.name for site in sites})
    return GridModel(model=model, grid=grid, mode=mode, flow=flow, cut=cut, left=left)


def _linear(model: nn.Module, site: LinearSite, grid: ParallelGrid, mode: Mode, flow: Flow) -> tuple[str, TPLinear]:
    """(name, what now stands there); inside PEFT's layer it is the layer's own linear that is cut."""
    name = site.name
    while hasattr(submodule(model, name), "base_layer"):
        name += ".base_layer"
    old: Any = submodule(model, name)
    made = TPLinear(
        site.in_features,
        site.out_features,
        grid=grid,
        transposed=site.role in TRANSPOSED_ROLES,
        mode=mode,
        parts=tuple(size for _, size in site.parts),
        stored_transposed=site.transposed,
        flow=flow,
        weights=(old.weight, getattr(old, "bias", None)),
        name=site.name,
    )
    made.weight.requires_grad_(old.weight.requires_grad)
    if made.bias is not None:
        made.bias.requires_grad_(old.bias.requires_grad)
    _put(model, name, made.train(old.training))
    return name, made


def _enter_expert(model: nn.Module, block: Block, grid: ParallelGrid, anatomy: Anatomy, cut: dict[str, Cut]) -> None:
    for name in block.norms:
        made = GridNorm(submodule(model, name), grid, anatomy.norm_offset)
        _put(model, name, made)
        cut[name] = made
    assert block.attention is not None
    attention: Any = submodule(model, block.attention.name)
    if hasattr(attention, "split_size"):  # GPT-2 splits its fused projection by a size of its own
        attention.split_size //= grid.shape.y


def _cut_stream(model: nn.Module, anatomy: Anatomy, grid: ParallelGrid) -> None:
    """Cut features over x before the first block, and join them behind the last."""

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (own_features(args[0], grid, AXIS), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": own_features(kwargs["hidden_states"], grid, AXIS)}

    def behind(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (all_features(output[0], grid, AXIS), *output[1:])
        return all_features(output, grid, AXIS)

    submodule(model, anatomy.blocks[0].name).register_forward_pre_hook(before, with_kwargs=True)
    submodule(model, anatomy.blocks[-1].name).register_forward_hook(behind)


def _describe_as_cut(model: nn.Module, anatomy: Anatomy, shape: GridShape, mode: Mode, gone: set[str]) -> None:
    """What is edited from now on finds no linear of the grid; in expert mode no attention either."""
    why = f"its linears are cut over the grid {shape}. Edit the model first, then parallelize() it"
    blocks = tuple(
        replace(
            block,
            linears=tuple(site for site in block.linears if site.name not in gone),
            ffn=None if block.ffn is None else replace(block.ffn, refused=block.ffn.refused or why),
            attention=block.attention if mode == "plain" else None,
        )
        for block in anatomy.blocks
    )
    described = replace(anatomy, blocks=blocks)
    model.anatomy = lambda: described  # type: ignore[assignment]


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(submodule(model, owner), leaf, module)
