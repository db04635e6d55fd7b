"""The lock of an output folder: who holds it, when it is stale, and that it is released."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsetrain.core.errors import InUse
from sparsetrain.core.process import Process
from sparsetrain.runs.lock import LOCK, locked

_HOLDER = """
import sys, time
from sparsetrain.runs.lock import locked
with locked(sys.argv[1], "it"):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(path: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_live_holder_is_named_and_a_killed_one_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    with hold(path) as holder:
        with pytest.raises(InUse, match=rf"it is in use by process {holder.pid} of this machine.*since 20"):
            locked(path, "it").__enter__()
        assert path.exists()
        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet waited for
        with locked(path, "it"):
            assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_it_is_released_in_every_ending(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), locked(tmp_path / LOCK, "it"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_the_same_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    with locked(tmp_path / LOCK, "it"):
        with pytest.raises(InUse, match=f"process {os.getpid()}"):
            locked(tmp_path / LOCK, "it").__enter__()
        assert (tmp_path / LOCK).exists()


def test_a_fork_that_ends_does_not_release_it(tmp_path: Path) -> None:
    with locked(tmp_path / LOCK, "it"):
        if (pid := os.fork()) == 0:
            try:
                raise SystemExit
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert (tmp_path / LOCK).exists()


def test_a_number_that_is_used_again_is_stale_and_another_machine_s_is_never_taken(tmp_path: Path) -> None:
    path, me = tmp_path / LOCK, Process.this()
    path.write_text(json.dumps({"host": me.host, "pid": me.pid, "started": "12x34", "since": 0}))
    with locked(path, "it"):
        pass
    path.write_text(json.dumps({"host": "node-a", "pid": 7, "started": "12x34", "since": 0}))
    with pytest.raises(InUse, match=r"process 7 of another machine, node-a, since 1970.*remove .*lock"):
        locked(path, "it").__enter__()
    assert json.loads(path.read_text())["host"] == "node-a"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}', "\x00"])
def test_a_file_that_names_nobody_is_taken(content: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(content)
    with locked(tmp_path / LOCK, "it"):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_link_and_a_pipe_are_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError):
        locked(tmp_path / LOCK, "it").__enter__()
    assert (tmp_path / "precious").read_text() == "kept"
    (tmp_path / LOCK).unlink()
    os.mkfifo(tmp_path / LOCK)
    with pytest.raises(OSError, match="no plain file"):
        locked(tmp_path / LOCK, "it").__enter__()
