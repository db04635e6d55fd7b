"""Files that appear whole or not at all, JSON for any reader, and what is swept away."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparsetrain.core.files import scratch_file, scratch_of, sweep, to_json, write_whole
from sparsetrain.core.process import Process


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may be longer than 1,000 bytes, as on a full disk."""
    before, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, action)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, small_files: None) -> None:
    write_whole(tmp_path / "a.txt", "first")
    with pytest.raises(OSError) as caught:
        write_whole(tmp_path / "a.txt", "x" * 5000)
    assert caught.value.filename == str(tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_what_a_library_writes_for_its_owner_alone_may_be_read_as_the_umask_says(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with scratch_file(tmp_path / "a.safetensors") as scratch:
            scratch.write_bytes(b"weights")
            scratch.chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o600 | (0o444 & ~umask)


def test_a_file_system_without_modes_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chmod(self: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    with scratch_file(tmp_path / "a.safetensors") as scratch:
        scratch.write_bytes(b"weights")
        os.chmod(scratch, 0o600)
        monkeypatch.setattr(Path, "chmod", chmod)
    assert (tmp_path / "a.safetensors").read_bytes() == b"weights"


def dead() -> Process:
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return Process(host=Process.this().host, pid=pid, started="1x2")


def test_only_what_dead_processes_left_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, alive, elsewhere = dead(), Process.this(), Process(host="node-a", pid=1, started="1x2")
    reused = Process(host=alive.host, pid=alive.pid, started="1x2")
    names = {}
    for which in (gone, alive, elsewhere, reused):
        monkeypatch.setattr(Process, "this", lambda which=which: which)
        names[which] = scratch_of(tmp_path / "model")
        names[which].mkdir()
        (names[which] / "weights").write_text("half")
    monkeypatch.undo()
    others = [tmp_path / name for name in (".model.tmp", "model", ".model.0-1-2.sparsetrain-tmp", ".x.sparsetrain-tmp")]
    for path in others:
        path.write_text("theirs")
    sweep(tmp_path)
    assert {path for path in tmp_path.iterdir()} == {names[alive], names[elsewhere], *others}


def test_what_was_moved_aside_comes_back_if_nothing_took_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = dead()
    monkeypatch.setattr(Process, "this", lambda: gone)
    for name in ("model", "adapter"):
        scratch_of(tmp_path / name, "old").mkdir()
    monkeypatch.undo()
    (tmp_path / "adapter").mkdir()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]


def test_json_has_no_number_that_is_none() -> None:
    value = {"a": math.nan, "b": [math.inf, torch.tensor(1.5), torch.tensor(-math.inf)], 3: Path("x")}
    assert json.loads(to_json(value), parse_constant=pytest.fail) == {"a": None, "b": [None, 1.5, None], "3": "x"}
    with pytest.raises(TypeError):
        to_json({"a": object()})
