"""What is left for a process, of the machine and of its control group."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from sparsetrain.measure import machine


def group(folder: Path, most: str, used: int, cached: int = 0) -> Path:
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
    return folder


def test_a_groups_limit_counts_less_what_it_uses_without_its_cache(tmp_path: Path) -> None:
    assert machine._left_of_group(group(tmp_path, "1000", 600, cached=150)) == 550
    assert machine._left_of_group(group(tmp_path, "1000", 1200)) == 0
    assert machine._left_of_group(group(tmp_path, "max", 600)) is None
    assert machine._left_of_group(tmp_path / "none") is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_free_is_some_of_the_machines_memory() -> None:
    total = machine.describe_machine().memory_bytes
    free = machine.free_bytes(torch.device("cpu"))
    assert total is not None and free is not None and 0 < free < total
    assert machine._kib("/proc/meminfo", "NoSuchField:") is None and machine._kib("/no/file", "x") is None
