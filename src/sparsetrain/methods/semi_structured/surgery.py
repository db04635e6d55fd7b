"""How 2:4 training meets a model: its edits and their costs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, FFNSite, Undo, innermost, submodule
from sparsetrain.core.cost import Cost, ffn_cost
from sparsetrain.core.pictures import Gallery, Picture
from sparsetrain.methods.semi_structured.config import SemiStructured
from sparsetrain.methods.semi_structured.export import to_24
from sparsetrain.methods.semi_structured.module import make_dense, make_sparse
from sparsetrain.methods.semi_structured.schedule import Schedule24
from sparsetrain.surgery.edits import edits_at
from sparsetrain.surgery.method import QUANTISED, Edit, Method, State, register_method
from sparsetrain.surgery.site import Site


def edits(config: SemiStructured, anatomy: Anatomy, model: nn.Module) -> list[Edit]:
    """One edit for each FFN the config takes; it holds the linears whose sizes divide by 4.

    Raises:
        ValueError: a mixture-of-experts FFN, or one of which no linear fits.
    """

    def names(site: FFNSite) -> list[str]:
        return fitting(config, site)[0]

    def check(site: FFNSite) -> None:
        if site.refused:
            raise ValueError(f"semi_structured cannot take {site.name}: {site.refused}. Leave it out with `targets`.")

    return edits_at(
        config,
        anatomy,
        anatomy.ffns,
        lambda m, t, _config, site: install(m, t, config, site, names(site)),
        check=check,
        cost=lambda site, _tokens: costs(config, site, names(site)),
        claims=lambda site: (f"{site.name}.{name}" for name in names(site)),
        note=lambda site: _note(config, model, site, fitting(config, site)[1]),
    )


def fitting(config: SemiStructured, site: FFNSite) -> tuple[list[str], list[str]]:
    """(linears of the FFN that go 2:4, linears that stay dense, with their sizes).

    Raises:
        ValueError: none fits.
    """
    sizes = {
        name: (site.hidden_size, site.ffn_size) if name == site.down else (site.ffn_size, site.hidden_size)
        for name in (site.gate, site.up, site.down)
        if name is not None
    }
    fits = {name: i % 4 == 0 and (o % 4 == 0 or not config.transposable) for name, (o, i) in sizes.items()}
    left = [f"{name} ({sizes[name][0]}x{sizes[name][1]})" for name in sizes if not fits[name]]
    if not any(fits.values()):
        raise ValueError(
            f"semi_structured cannot take {site.name}: none of {', '.join(left)} divides into groups of four "
            f"(mask_mode={config.mask_mode!r}). Leave it out with `targets`, or pad the FFN's width."
        )
    return [name for name in sizes if fits[name]], left


def costs(config: SemiStructured, site: FFNSite, names: list[str]) -> tuple[Cost, Cost]:
    """(dense, 2:4) per token: products with non-zero weights. Half a linear's, whatever the hardware makes of it."""
    matrices = 3 if site.gate else 2
    bias = (matrices - 1) * site.ffn_size + site.hidden_size if site.has_bias else 0
    dense = ffn_cost(site.hidden_size, site.ffn_size, site.gate is not None, bias)
    halved = 0 if config.tail_in_force == 1 else len(names)
    return dense, Cost(
        num_params=dense.num_params,
        flops=dense.flops - halved * site.hidden_size * site.ffn_size,
        saved_elements=dense.saved_elements,
    )


def install(
    model: nn.Module, tensors: dict[str, Tensor], config: SemiStructured, site: FFNSite, names: list[str]
) -> tuple[Undo, Site]:
    """Turn the linears 2:4 and give the owner their schedule."""
    owner: Any = submodule(model, site.name)
    done: dict[str, Any] = {}
    hooks = [owner.register_forward_pre_hook(_before), owner.register_forward_hook(_after)]

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        if "semi_structured" in owner._modules:
            del owner.semi_structured
        while done:
            make_dense(done.popitem()[1])

    try:
        for name in names:
            own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            done[name] = make_sparse(innermost(owner.get_submodule(name)), config, site.transposed, own)
        owner.semi_structured = Schedule24(config, dict(done), site.layer, tensors)
    except BaseException:
        undo()
        raise
    return undo, owner.semi_structured


def _before(owner: Any, _args: Any) -> None:
    owner.semi_structured.before_forward(owner)


def _after(owner: Any, _args: Any, _out: Any) -> None:
    owner.semi_structured.after_forward()


def _note(config: SemiStructured, model: nn.Module, site: FFNSite, left: list[str]) -> str:
    if config.tail_in_force == 1:
        return "dense throughout"
    device = next(submodule(model, site.name).parameters()).device.type
    speed = "timed when training begins" if device == "cuda" else "emulation, no speed"
    dense = f"; stays dense: {', '.join(left)}" if left else ""
    return f"2:4 {config.mask_mode}, {speed}{dense}"


def merge_adapter_error(config: SemiStructured, linears: list[str]) -> str | None:
    if not linears:
        return None
    return (
        "the update is dense and the weight runs 2:4, so merged outputs would differ. Use the adapter folder as it is, "
        "or train all weights (lora_r=0)"
    )


def pictures(state: State) -> Gallery | None:
    """Flip rates by step, averaged over an FFN's linears; None before the second refresh."""
    curves = {
        site: [(int(row[0]), sum(row[1:]) / len(row[1:])) for row in tensors["history"].tolist()]
        for site, tensors in state.items()
        if "history" in tensors
    }
    if not any(len(curve) > 1 for curve in curves.values()):
        return None
    title = "Share of the 2:4 mask that changed since the refresh before, by layer and in the mean"
    picture = Picture(title=title, curves=curves, y="share of mask entries that flipped")
    return Gallery(name="flips", heading="Flip rate of the 2:4 masks", pictures=[picture])


register_method(
    SemiStructured,
    Method(
        edits=edits,
        site_names=lambda anatomy: [site.name for site in anatomy.ffns if site.refused is None],
        exports={"24": to_24},
        merge_adapter_error=merge_adapter_error,
        pictures=pictures,
        limits={
            "cost": "without sparse tensor cores its products are emulated by dense ones",
            **dict.fromkeys(
                QUANTISED, "its quantised linears would be read as plain weights. Load the model in bf16 or fp32"
            ),
        },
    ),
)
