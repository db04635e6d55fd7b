"""How SaRA meets a model: its places, what is chosen there, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sparsetrain.core.anatomy import Anatomy, Undo, innermost, submodule
from sparsetrain.core.cost import Cost
from sparsetrain.core.errors import CheckpointError
from sparsetrain.core.units import bytes_text
from sparsetrain.methods.sara.choice import Choice
from sparsetrain.methods.sara.config import SaRA, learning_rate
from sparsetrain.methods.sara.delta import save_delta, weight_digest
from sparsetrain.methods.sara.module import Entries, TrainsEntries, tensors_of
from sparsetrain.methods.sara.part import Part, read_at
from sparsetrain.methods.sara.schedule import Schedule
from sparsetrain.ops.partial_weight import blocks_of
from sparsetrain.surgery.apply import Handle
from sparsetrain.surgery.edits import edits_at, equip, nothing_to_do
from sparsetrain.surgery.method import QUANTISED, Batch, Edit, Method, Progress, RowFacts, State, register_method
from sparsetrain.surgery.site import Site

DELTA = "delta.safetensors"


@dataclass(frozen=True)
class Place:
    """A module with tensors of which entries may train. owned: those that no place before it holds too (tied)."""

    name: str
    layer: int | None
    tensors: tuple[str, ...]
    owned: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class SaraEdit(Edit):
    """choice: of the whole model; found when it is asked."""

    choice: Choice
    place: Place


def edits(config: SaRA, anatomy: Anatomy, model: nn.Module) -> list[Edit]:
    """One edit for each module the config takes.

    Raises:
        ValueError: weights that are no plain floating-point ones or do not divide into blocks; a tied weight that is
            taken in one place and not in the other.
    """
    depth = max(1, len(anatomy.blocks))
    taken = [p for p in _places(config, anatomy, model) if config.takes(p.name, p.layer or 0, depth)]
    weights = {f"{p.name}.{name}": _tensor(model, p, name) for p in taken for name in p.owned}
    transposed = frozenset(f"{p.name}.{name}" for p in taken for name in p.owned if p.transposed)
    _refuse_half_tied(model, taken)
    choice = Choice(config, weights, transposed)
    for name, weight in weights.items():
        _check(name, weight, choice.shapes[name])
    made: dict[int, Part] = {}  # a tied weight has one part

    def install_one(_model: nn.Module, tensors: dict[str, Tensor], _config: Any, place: Place) -> Any:
        return install(_model, tensors, config, place, choice, made)

    def cost(place: Place, _tokens: int) -> tuple[Cost, Cost]:
        added = 0 if config.is_dense else sum(choice.entries(f"{place.name}.{name}") for name in place.owned)
        return Cost(), Cost(num_params=added)

    found = edits_at(
        config, anatomy, taken, install_one, cost=cost, blank=lambda p: _blank(choice, p), note=lambda _p: _note(config)
    )
    return [SaraEdit(**vars(edit), choice=choice, place=place) for edit, place in zip(found, taken, strict=True)]


def _places(config: SaRA, anatomy: Anatomy, model: nn.Module) -> list[Place]:
    if config.scope == "linears":
        held = [(site.name, site.layer, ("weight",), site.transposed) for site in anatomy.linears]
    else:
        layers = {f"{block.name}.": block.layer for block in anatomy.blocks}
        held = [
            (name.replace(".base_layer", ""), next((layers[b] for b in layers if name.startswith(b)), None), own, False)
            for name, module in model.named_modules()
            if name and (own := tuple(key for key, p in module._parameters.items() if p is not None))
        ]
    known: set[int] = set()
    places = []
    for name, layer, tensors, transposed in held:
        module = innermost(submodule(model, name))
        owned = tuple(key for key in tensors if id(module._parameters[key]) not in known)
        known |= {id(module._parameters[key]) for key in owned}
        places.append(Place(name, layer, tensors, owned, transposed))
    return places


def _tensor(model: nn.Module, place: Place, name: str) -> Tensor:
    return getattr(innermost(submodule(model, place.name)), name)


def _check(name: str, weight: Tensor, shape: tuple[int, int] | None) -> None:
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(
            f"sara cannot take {name}: it is {weight.dtype}, and entries train in bf16, fp16 or fp32. Load the model "
            "in one of them, or leave it out with `targets`."
        )
    if not weight.is_contiguous():
        raise ValueError(f"sara cannot take {name}: its memory is not contiguous. Call .contiguous() on it first.")
    if shape is not None:
        try:
            blocks_of(weight, shape)
        except ValueError as error:
            raise ValueError(f"sara cannot take {name}: {error}") from None


def _refuse_half_tied(model: nn.Module, taken: list[Place]) -> None:
    """Raise ValueError if a weight is taken under one of its names alone, or two parameters lie in the same memory."""
    names = {f"{place.name}.{name}" for place in taken for name in place.tensors}
    holders: dict[int, list[str]] = {}
    memory: dict[int, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        name = name.replace(".base_layer", "")
        holders.setdefault(id(parameter), []).append(name)
        if name in names and not parameter.is_meta and parameter.numel():
            other = memory.setdefault(parameter.data_ptr(), id(parameter))
            if other != id(parameter):
                raise ValueError(
                    f"sara: {holders[other][0]} and {name} are two parameters in one memory, and would be written by "
                    "two vectors. Tie them (one parameter), or clone one."
                )
    for shared in holders.values():
        inside, outside = [n for n in shared if n in names], [n for n in shared if n not in names]
        if inside and outside:
            raise ValueError(
                f"sara: {inside[0]} and {outside[0]} are one weight (tied), and only the first is taken. Take both "
                "(`targets`, `scope`), or neither."
            )


def _note(config: SaRA) -> str:
    if config.is_dense:
        return "all entries train, as without it"
    chosen = f"theta={config.theta}" if config.theta is not None else f"{config.fraction_in_force:.0%}"
    if config.block == "entries":
        return f"entries: {chosen}; state and gradients of these, products as dense"
    saved = (1 - config.fraction_in_force) / 3
    return f"{config.block}: {chosen}; {saved:.0%} fewer products in a step of its linears"


def _blank(choice: Choice, place: Place) -> dict[str, Tensor]:
    """A state of the right sizes; without weights, the asked share of each tensor."""
    found: dict[str, Tensor] = {}
    for name in place.owned if not choice.config.is_dense else ():
        places = torch.arange(choice.count(f"{place.name}.{name}"), dtype=torch.int32)
        found |= _start(name, places, torch.zeros(32, dtype=torch.uint8))
    return found


def _start(name: str, places: Tensor, base: Tensor) -> dict[str, Tensor]:
    left = torch.zeros(0, dtype=torch.int32, device=places.device)
    return {f"{name}.places": places, f"{name}.left": left, f"{name}.base": base}


def prepare(_model: nn.Module, edits: list[Edit], _batches: list[Batch], progress: Progress) -> State:
    """Find θ, and what is below it in each tensor.

    Raises:
        ValueError: nothing is.
    """
    found: State = {}
    count = 0
    for done, edit in enumerate(edits):
        assert isinstance(edit, SaraEdit)
        choice, place = edit.choice, edit.place
        if choice.config.is_dense:
            return {}
        progress("choosing the entries that train", done / len(edits))
        found[edit.key] = {"theta": torch.tensor(choice.theta)}
        for name in place.owned:
            key = f"{place.name}.{name}"
            places, weight = choice.places(key), choice.weights[key]
            found[edit.key] |= _start(name, places, weight_digest(weight))
            count += places.numel()
    if not count:
        config = edits[0].config
        assert isinstance(config, SaRA) and isinstance(edits[0], SaraEdit)
        asked = f"theta={config.theta}" if config.theta is not None else f"fraction={config.fraction_in_force}"
        raise ValueError(
            f"sara: {asked} selects no entry: none is below {edits[0].choice.theta:.3g}. Raise it; where many weights "
            "are 0 (pruned), give theta."
        )
    return found


def install(
    model: nn.Module, tensors: dict[str, Tensor], config: SaRA, place: Place, choice: Choice, made: dict[int, Part]
) -> tuple[Undo, Site | None]:
    """Give a module its trained entries, and freeze the rest of it."""
    module: Any = innermost(submodule(model, place.name))
    if config.is_dense or isinstance(module, TrainsEntries):  # one module under two names
        return nothing_to_do()
    trained = {name: module._parameters[name].requires_grad for name in place.tensors}
    parts: dict[str, Part] = {}
    for name in place.tensors:
        weight = module._parameters[name]
        if name in place.owned:
            shape, own = choice.shapes[f"{place.name}.{name}"], tensors_of(name, tensors)
            _check_base(f"{place.name}.{name}", weight.detach(), shape, own)
            made[id(weight)] = Part(module, name, shape, own)
        parts[name] = made[id(weight)]
    site = Entries(config, place.transposed, parts, place.owned)
    if (device := module._parameters[place.tensors[0]].device).type != "meta":
        site.to(device)
    site.begin(tensors)
    undo, _ = equip(module, "sara", site, TrainsEntries)
    _set_trained(module, dict.fromkeys(trained, False))

    def back() -> None:
        site.settle()
        undo()
        _set_trained(module, trained)

    return back, site


def _check_base(name: str, weight: Tensor, shape: tuple[int, int] | None, tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError if saved values meet another weight than they were trained in: neither its base nor one
    that holds them already (all weights were saved). In a narrower dtype than that of training it cannot be told."""
    if "values" not in tensors or weight.is_meta or isinstance(weight, FakeTensor):
        return
    trained_in = tensors["left_values"].dtype
    if weight.element_size() < trained_in.itemsize:
        return
    if torch.equal(weight_digest(weight.to(trained_in)), tensors["base"].cpu()):
        return
    places, values = tensors["places"].to(weight.device), tensors["values"].to(weight.device, weight.dtype)
    if not torch.equal(read_at(weight, places, shape), values):
        raise CheckpointError(
            f"sara: what was trained of {name} belongs to other weights than this model's. Load the base model that it "
            "was trained on, at the same revision and unchanged."
        )


def _set_trained(module: nn.Module, trained: dict[str, bool]) -> None:
    for name, is_trained in trained.items():
        module._parameters[name].requires_grad_(is_trained)  # type: ignore[union-attr]


def leave(handle: Handle, folder: Path) -> list[str]:
    """The difference to the base model, in a file."""
    path = save_delta(handle, folder / DELTA)
    return [f"{path}: what was trained, {bytes_text(path.stat().st_size)}, for any copy of the base model."]


def refuse(config: SaRA, _facts: RowFacts) -> str | None:
    if config.is_dense:
        return "fraction=1 trains every entry. Leave the method out, and set lora_r=0"
    return None


register_method(
    SaRA,
    Method(
        edits=edits,
        site_names=lambda anatomy: [site.name for site in anatomy.linears],
        prepare=prepare,
        schedule=Schedule,
        learning_rate=lambda _config, sites: learning_rate(float(sites[0].theta)),
        leave=leave,
        refuse=refuse,
        limits={
            **dict.fromkeys(QUANTISED, "it writes into the weights. Load the model in bf16 or fp32"),
        },
    ),
)
