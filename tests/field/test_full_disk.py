"""A disk that fills up at any of a run's writes: a clear error, nothing half-written, what was whole stays whole."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from sparsetrain.cli.failure import explain
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.runs.checkpoints import checkpoints
from sparsetrain.runs.manifest import disk_errors, verify_manifest
from tests.hf import runs


def run_limited(recipe: Any, limit: int) -> dict[str, Any]:
    """Train in a fork that may write no file above `limit` bytes; what the command line would say."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        said: dict[str, Any] = {"ok": True}
        try:
            finetune(recipe)
        except BaseException as error:
            said = explain(error).to_dict()
        os.write(writer, json.dumps(said).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader) as pipe:
        return json.loads(pipe.read())


@pytest.mark.slow
def test_each_write_of_a_run(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"methods": [runs.ROUTED], "steps": 2, "save_every": 1, "eval_tokens": 64}
    finetune(runs.recipe(tmp_path, output=str(tmp_path / "whole"), **changes))
    sizes = sorted({path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()})
    good = 0
    for size in sorted({*sizes[::3], *sizes[-2:]}):
        output = tmp_path / f"below {size}"
        said = run_limited(runs.recipe(tmp_path, output=str(output), **changes), size - 1)
        assert not said["ok"] and said["error"]["exit_code"] == 1, said
        message = said["error"]["message"]
        assert message.startswith(f"Writing {output}") and "File too large" in message, message
        for path in checkpoints(output):
            assert verify_manifest(path)
            good += 1
        held = [path.name for path in output.rglob("*")] if output.exists() else []
        assert not [name for name in held if "sparsetrain-" in name or name.endswith(".lock")]
        assert not (output / "result.json").exists() and (not held or checkpoints(output))
        if (output / "adapter").exists():
            assert verify_manifest(output / "adapter")
    assert good


@pytest.mark.parametrize(
    "error",
    [
        Exception("No space left on device (os error 28)"),  # tokenizers
        RuntimeError("unexpected pos 64 vs 0"),  # torch.save
        OSError(28, "No space left on device"),
    ],
)
def test_every_library_s_way_of_saying_it(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left|File too large") as told, disk_errors(tmp_path):
        raise error
    assert told.value.filename == str(tmp_path) and explain(told.value).message.startswith(f"Writing {tmp_path}")


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="lost"), disk_errors(tmp_path):
        raise KeyError("lost")
