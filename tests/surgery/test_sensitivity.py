"""Losses of single layers equal those of converting each layer by hand, and the choice keeps within its budget."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparsetrain import RoutedFFN, sparsify
from sparsetrain.surgery.sensitivity import choose_layers, layer_losses
from tests.families import FAMILIES


def test_layers_are_chosen_by_what_they_save_for_their_loss() -> None:
    loss_l = {0: 0.4, 1: 0.05, 2: 0.02, 3: -0.01, 4: 0.01}
    even_l = dict.fromkeys(loss_l, 1.0)
    assert choose_layers(loss_l, even_l, 0.03) == [2, 3, 4]
    assert choose_layers(loss_l, even_l, 0.029) == [3, 4], "layer 3's gain is noise and buys no room"
    assert choose_layers(loss_l, {**even_l, 4: 0.0}, 1.0) == [0, 1, 2, 3]
    assert choose_layers(loss_l, {**even_l, 1: 10.0}, 0.05) == [1, 3]
    with pytest.raises(ValueError, match=r"layers \[4\]"):
        choose_layers({0: 0.1}, {0: 1.0, 4: 1.0}, 0.1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_loss_is_that_of_the_layer_converted_alone(family: str) -> None:
    model = FAMILIES[family].model().eval()
    torch.manual_seed(1)
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 60, (3, 2, 12))]
    config = RoutedFFN(num_blocks=4, num_active=1, layers=(1, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def mean_loss() -> float:
        with torch.no_grad():
            return sum(float(model(**batch).loss) for batch in batches) / 3

    dense = mean_loss()
    handle = sparsify(model, config, seed=3)
    state = {site: {name: value.clone() for name, value in found.items()} for site, found in handle.state().items()}
    handle.restore()
    found = layer_losses(model, config, batches, seed=3)
    assert list(found) == [1, 2]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for layer, loss in found.items():
        handle = sparsify(model, dataclasses.replace(config, layers=(layer,)), state=state)
        handle.step(1, 1)
        assert mean_loss() - dense == pytest.approx(loss, abs=1e-6)
        assert abs(loss) > 1e-4
        handle.restore()


def test_no_held_out_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="no held-out batch"):
        layer_losses(FAMILIES["llama"].model(), RoutedFFN(), [])
