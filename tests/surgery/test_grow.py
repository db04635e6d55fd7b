"""grow(): weights and optimizer state go where the origins say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import sparsetrain
from sparsetrain.core import config as config_module
from sparsetrain.core.config import MethodConfig
from sparsetrain.surgery import method as method_module
from sparsetrain.surgery.grow import models_of_stages
from sparsetrain.surgery.method import Grown, Growth, Method, Origin, Stage, edits_of, growth_of, register_method
from tests.families import FAMILIES


def mean(*layers: Tensor) -> Tensor:
    return torch.stack(layers).mean(0)


def shallow(config: Any, stage: int, model: Any, anatomy: Any, kept: Any) -> Grown:
    """The first two blocks averaged into one; the norm at the end starts without its state."""
    if stage == 0:
        return Grown(model=model)
    kept["before"] = dict(model.named_parameters())
    sizes = {**model.config.to_dict(), "n_layer": model.config.n_layer - 1}
    new: Any = type(model)(type(model.config).from_dict(sizes))
    origins: dict[str, Origin] = {}
    for name, _ in new.named_parameters():
        if ".h.0." in name:
            origins[name] = Origin((name, name.replace("h.0.", "h.1.")), map=mean)
        elif ".h." in name:
            layer = int(name.split(".")[2])
            origins[name] = Origin(name.replace(f"h.{layer}.", f"h.{layer + 1}."))
        elif "wpe" not in name:
            origins[name] = Origin(name, carry="ln_f" not in name)
    return Grown(model=new, origins=origins, optimizer=config.optimizer)


@pytest.fixture(autouse=True)
def toy() -> Iterator[type[MethodConfig]]:
    @dataclass(frozen=True, kw_only=True)
    class Shallow(MethodConfig, method="test_shallow"):
        grows: ClassVar[bool] = True
        optimizer: str = "carry"

    stages = (Stage(name="deep", share=0.3), Stage(name="shallow", share=0.7))
    register_method(Shallow, Method(growth=Growth(stages=lambda config: stages, enter=shallow)))
    yield Shallow
    del config_module._REGISTRY["test_shallow"], method_module._METHODS["test_shallow"]


def trained() -> tuple[Any, torch.optim.AdamW]:
    """A GPT-2 after a step, norms and biases without decay."""
    model, batch = FAMILIES["gpt2"].model(), FAMILIES["gpt2"].batch(1, 10)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=1e-2)
    model(**batch).logits.square().mean().backward()
    optimizer.step()
    return model, optimizer


def test_several_parameters_become_one_with_their_moments(toy: Any) -> None:
    model, optimizer = trained()
    old = dict(model.named_parameters())
    state = {name: dict(optimizer.state[p]) for name, p in old.items()}
    kept: dict[str, Any] = {}
    new: nn.Module = sparsetrain.grow(model, toy(), optimizer, kept=kept)
    weights = dict(new.named_parameters())
    first, second = (f"transformer.h.{i}.mlp.c_fc.weight" for i in (0, 1))
    assert torch.equal(weights[first], mean(old[first], old[second]))
    moment = optimizer.state[weights[first]]
    assert torch.equal(moment["exp_avg"], mean(state[first]["exp_avg"], state[second]["exp_avg"]))
    assert torch.equal(moment["exp_avg_sq"], mean(state[first]["exp_avg_sq"], state[second]["exp_avg_sq"]))
    assert moment["step"] == 1 and torch.equal(weights[second], old["transformer.h.2.mlp.c_fc.weight"])
    norm = weights["transformer.ln_f.weight"]
    assert torch.equal(norm, old["transformer.ln_f.weight"]) and not optimizer.state.get(norm)
    groups = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    assert groups[0] | groups[1] == {id(p) for p in weights.values()} and not groups[0] & groups[1]
    assert id(weights["transformer.wpe.weight"]) in groups[0] and id(norm) in groups[1]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert kept["before"].keys() == old.keys()
    new(**FAMILIES["gpt2"].batch(1, 10)).logits.square().mean().backward()  # type: ignore[operator]
    optimizer.step()
    assert optimizer.state[weights[first]]["step"] == 2 and optimizer.state[norm]["step"] == 1


def test_a_fresh_optimizer_keeps_its_groups_only(toy: Any) -> None:
    model, optimizer = trained()
    new = sparsetrain.grow(model, toy(optimizer="fresh"), optimizer)
    assert not optimizer.state
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(new.parameters()))


def test_a_stage_may_go_on_with_the_model(toy: Any) -> None:
    model, optimizer = trained()
    assert sparsetrain.grow(model, toy(), optimizer, stage=0) is model and len(optimizer.state) > 0


def test_another_optimizer_is_refused(toy: Any) -> None:
    model, _ = trained()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    with pytest.raises(ValueError, match=r"keeps \['momentum_buffer'\]; only the state of Adam"):
        sparsetrain.grow(model, toy(), optimizer)


def test_shapes_of_all_stages_are_known_without_weights(toy: Any) -> None:
    model = FAMILIES["gpt2"].model().to("meta")
    found = list(models_of_stages(model, toy()))
    assert [m.config.n_layer for m in found] == [3, 2]  # type: ignore[union-attr]
    assert all(p.device.type == "meta" for m in found for p in m.parameters())


def test_edits_and_growth_share_a_recipe(toy: Any) -> None:
    routed, grown = sparsetrain.RoutedFFN(), toy()
    assert edits_of([routed, grown]) == (routed,) and growth_of([routed, grown]) is grown
    assert growth_of([routed]) is None
    with pytest.raises(ValueError, match=r"'test_shallow' and 'test_shallow' both make"):
        growth_of([grown, toy()])
    with pytest.raises(ValueError, match=r"Use grow\(model, config\)"):
        sparsetrain.plan(FAMILIES["gpt2"].model(), grown)
