from __future__ import annotations

import pytest
from torch import nn

from sparsetrain.core.modes import evaluating


def test_each_module_has_its_own_mode_again_also_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()  # a frozen part
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False, False]
