"""Which backend runs: names, the fall-back of `auto`, and the old name of `torch`."""

import warnings

import pytest

from sparsetrain.core import backend as module
from sparsetrain.core.backend import choose, use_backend
from sparsetrain.core.errors import Unsupported

CAN = {"torch": None, "reference": None, "triton": "no kernel is written for it yet"}


def test_auto_takes_the_first_that_can_and_a_named_one_never_falls_back() -> None:
    assert choose("op", "auto", CAN) == "torch"
    assert choose("op", "auto", CAN | {"torch": "it is Monday"}) == "reference"
    with use_backend("reference"):
        assert choose("op", "auto", CAN) == "reference"
        assert choose("op", "torch", CAN) == "torch"
    with pytest.raises(Unsupported, match="'op' was asked to run on 'triton': no kernel"):
        choose("op", "triton", CAN)


def test_an_unknown_name_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(ValueError, match="backend 'gpu' is unknown"):
        choose("op", "gpu", CAN)
    with pytest.raises(ValueError, match="unknown"), use_backend("gpu"):
        pass


def test_cpu_means_torch_and_says_so_once() -> None:
    module._say_cpu_is_torch.cache_clear()
    with pytest.warns(DeprecationWarning, match="'cpu' .* is now called 'torch'"):
        assert choose("op", "cpu", CAN) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("op", "cpu", CAN) == "torch"
        with use_backend("cpu"):
            assert choose("op", "auto", CAN) == "torch"
