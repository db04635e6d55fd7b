"""The machine's description is useful, and gives nothing private away."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from sparsetrain.measure import machine
from sparsetrain.measure.machine import describe_machine


def test_it_says_what_a_number_needs() -> None:
    found = describe_machine()
    assert found.cpu and 1 <= found.cores <= (os.cpu_count() or 1)
    assert found.threads == torch.get_num_threads()
    assert found.versions["python"] == platform.python_version()
    assert found.versions["torch"] == metadata.version("torch")
    assert found.versions.get("transformers") == metadata.version("transformers")
    assert len(found.gpus) == torch.cuda.device_count()
    if sys.platform == "linux":
        assert found.memory_bytes and found.memory_bytes > 2**28
        assert found.load_average and len(found.load_average) == 3


def test_it_holds_no_host_name_user_or_path() -> None:
    text = json.dumps(describe_machine().to_dict())
    assert platform.node() not in text or len(platform.node()) < 4
    assert str(Path.home()) not in text or str(Path.home()) == "/"
    assert str(Path(machine.__file__).parent) not in text and sys.prefix not in text
    assert f'"{getpass.getuser()}"' not in text


def test_versions_are_read_without_importing_the_packages() -> None:
    code = (
        "import sys; from sparsetrain.measure.machine import describe_machine; "
        "assert 'transformers' in describe_machine().versions; "
        "print([m for m in ('transformers', 'peft', 'datasets', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_the_commit_is_that_of_the_repository_that_tracks_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"ls-files": "machine.py", "rev-parse": "0123456789ab", "status": " M some.py"}
    monkeypatch.setattr(machine, "output_of", lambda *command: answers[command[3]])
    assert machine.commit_of_source() == ("0123456789ab", True)
    answers["status"] = ""
    assert machine.commit_of_source() == ("0123456789ab", False)


def test_an_installed_copy_or_a_machine_without_git_has_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "output_of", lambda *_: None)
    assert machine.commit_of_source() == (None, None)
    monkeypatch.undo()
    assert machine.output_of("a-command-that-does-not-exist") is None
    assert machine.output_of(sys.executable, "-c", "raise SystemExit(3)") is None
    assert machine.output_of(sys.executable, "-c", "print('yes')") == "yes"
