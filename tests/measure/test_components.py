"""Which module belongs to which component, in the layouts that families have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsetrain.core.anatomy import Anatomy, AttentionSite, Block, FFNSite
from sparsetrain.measure.components import Place, places, running
from tests.measure.tiny import VOCAB, TinyModel


class Named(nn.Module):
    """Only names matter here."""

    def __init__(self, names: list[str], block: Block) -> None:
        super().__init__()
        for name in names:
            at: nn.Module = self
            for part in name.split("."):
                if not hasattr(at, part):
                    at.add_module(part, nn.LayerNorm(2) if "Norm" in part else nn.Identity())
                at = getattr(at, part)
        self.block = block

    def anatomy(self) -> Anatomy:
        return Anatomy(family="named", model_class="Named", blocks=(self.block,), embedding="words")


def _block(attention: str, owner: str, up: str, down: str, bypass: str, norms: tuple[str, ...] = ()) -> Block:
    return Block(
        name="layer",
        layer=0,
        norms=norms,
        attention=AttentionSite(name=attention, layer=0, num_heads=1, num_kv_heads=1, head_dim=2, causal=True),
        ffn=FFNSite(
            name=owner, layer=0, hidden_size=2, ffn_size=2, activation="relu", up=up, down=down, bypass=(bypass,)
        ),
    )


def test_bert_layout_gives_the_output_projection_to_attention() -> None:
    norm = "layer.attention.output.LayerNorm"
    names = ["layer.attention.self", norm, "layer.intermediate.dense", "layer.intermediate.act"]
    names += ["layer.output.dense", "layer.output.LayerNorm", "words", "LayerNorm"]
    block = _block(
        "layer.attention.self",
        "layer",
        "intermediate.dense",
        "output.dense",
        "intermediate.act",
        (norm, "layer.output.LayerNorm"),
    )
    assert places(Named(names, block)) == {
        "layer": Place("ffn", 0),
        "layer.attention": Place("attention", 0),
        "layer.intermediate": Place("ffn", 0),
        "layer.output": Place("ffn", 0),
        norm: Place("norms", 0),
        "layer.output.LayerNorm": Place("norms", 0),
        "words": Place("embedding"),
        "LayerNorm": Place("norms"),
    }


def test_opt_layout_gives_the_blocks_linears_to_the_ffn() -> None:
    names = ["layer.self_attn.q_norm.Norm", "layer.fc1", "layer.act", "layer.fc2", "words"]
    found = places(Named(names, _block("layer.self_attn", "layer", "fc1", "fc2", "act")))
    assert found == {
        "layer": Place("ffn", 0),
        "layer.self_attn": Place("attention", 0),
        "layer.fc1": Place("ffn", 0),
        "layer.act": Place("ffn", 0),
        "layer.fc2": Place("ffn", 0),
        "words": Place("embedding"),
    }


def test_a_child_that_holds_both_is_split_by_exact_names() -> None:
    names = ["layer.inner.attn", "layer.inner.mlp.up", "layer.inner.mlp.act", "layer.inner.mlp.down", "words"]
    found = places(Named(names, _block("layer.inner.attn", "layer.inner.mlp", "up", "down", "act")))
    assert found == {
        "layer": Place("other", 0),
        "layer.inner.attn": Place("attention", 0),
        "layer.inner.mlp": Place("ffn", 0),
        "words": Place("embedding"),
    }


def test_the_running_place_follows_the_modules() -> None:
    model, seen = TinyModel(num_layers=1), []
    spies = {"layers.0": model.layers[0], "layers.0.mlp.up": model.layers[0].mlp.up, "": model}  # type: ignore[union-attr]
    with running(model) as now:
        hooks = [module.register_forward_pre_hook(lambda *_: seen.append(now.place)) for module in spies.values()]
        hooks.append(model.final_norm.register_forward_hook(lambda *_: seen.append(now.place)))
        assert now.place == Place("head_and_loss")
        model(torch.zeros(2, dtype=torch.long))
        model(torch.zeros(2, dtype=torch.long))
        assert now.place == Place("head_and_loss")
    for hook in hooks:
        hook.remove()
    # the root before its blocks is "other", also in a second forward; spies run inside their module's place;
    # a spy added after the model's own hooks runs when the final norm has been left
    once = [Place("other"), Place("other", 0), Place("ffn", 0), Place("head_and_loss")]
    assert seen == once * 2


def test_between_two_blocks_it_is_the_place_of_the_block_to_come() -> None:
    model, seen = TinyModel(num_layers=3), []
    with running(model) as now:
        now.on_change = lambda: seen.append(now.place)
        for _ in range(2):
            seen.clear()
            model(torch.zeros(2, dtype=torch.long))
            outside = [place for place in dict.fromkeys(seen) if place.component == "other"]
            # the root before its blocks, then each block itself, which for the second and third begins one step earlier
            assert outside == [Place("other"), Place("other", 0), Place("other", 1), Place("other", 2)]
    first_of = {layer: seen.index(Place("other", layer)) for layer in (1, 2)}
    assert all(seen[i - 1].layer == layer - 1 for layer, i in first_of.items())


def test_an_error_inside_a_module_leaves_no_place_behind() -> None:
    model = TinyModel()
    with running(model) as now:
        with pytest.raises(IndexError):
            model(torch.tensor([VOCAB]))
        assert not now._stack
        model(torch.tensor([1]))
        assert not now._stack
