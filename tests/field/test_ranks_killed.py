"""Any of four ranks, killed at any moment: checkpoints are whole, and what goes on is the run never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import distributed

from tests.cli.conftest import save_llama, write_text
from tests.field.killed_ranks import Ranks, trials

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")


@pytest.mark.slow
def test_a_killed_rank_of_four(tmp_path: Path) -> None:
    """Nine launches of four processes. Thirty kills: `python -m tests.field.killed_ranks --times 30 --folder DIR`."""
    ranks = Ranks(tmp_path, save_llama(tmp_path / "llama"), write_text(tmp_path / "text.txt", 3000))
    done = trials(ranks, range(4))
    assert sum(each["killed"] for each in done) >= 2, "a kill comes too late where its moment is after the run's end"
