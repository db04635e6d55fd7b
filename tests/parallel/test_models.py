"""Llama, GPT-2 and BERT on a grid train as on one device, and their checkpoints move between grids."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import distributed

from sparsetrain.parallel.linear import Mode
from tests.parallel.on_models import (
    checkpoints_move,
    left_nothing,
    lora_trains,
    refusals,
    sparse_before,
    trains_as_one_device,
)
from tests.parallel.ranks import assert_on_ranks

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
NAMES = ("llama", "gpt2", "bert")
MODES: tuple[Mode, ...] = ("plain", "expert")


def two(folder: str) -> None:
    for name in NAMES:
        for mode in MODES:
            for sizes in ((1, 1, 2, 1), (1, 1, 1, 2)):
                trains_as_one_device(name, sizes, mode)
    checkpoints_move(folder, [((1, 1, 2, 1), "expert"), ((1, 2, 1, 1), "plain"), ((2, 1, 1, 1), "expert")])


def edited() -> None:
    lora_trains((1, 1, 2, 1))
    lora_trains((1, 2, 1, 1))
    for method in ("token_selection", "routed_ffn", "semi_structured"):
        sparse_before((1, 1, 1, 2), method)
    left_nothing((1, 1, 2, 1))
    refusals((1, 1, 1, 2))


def four(folder: str, name: str) -> None:
    for mode, sizes in (
        ("expert", (1, 1, 2, 2)),
        ("expert", (2, 1, 1, 2)),
        ("plain", (1, 2, 2, 1)),
        ("plain", (1, 4, 1, 1)),
    ):
        trains_as_one_device(name, sizes, mode)
    grids: list[tuple[tuple[int, ...], Mode]] = [((1, 1, 2, 2), "expert"), ((1, 2, 2, 1), "plain")]
    checkpoints_move(folder, [*grids, ((2, 1, 1, 2), "expert"), ((1, 1, 4, 1), "plain")], name)
    refusals((1, 1, 1, 4))


def test_two_ranks(tmp_path: Path) -> None:
    """Two processes: some fifteen seconds, half of them imports."""
    assert_on_ranks(two, 2, str(tmp_path))


def test_lora_and_sparse_models_on_two_ranks() -> None:
    """Two processes, as above."""
    assert_on_ranks(edited, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_four_ranks(name: str, tmp_path: Path) -> None:
    assert_on_ranks(four, 4, str(tmp_path), name)
