"""From exceptions to paragraphs and exit codes."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path

import pytest

from sparsetrain.cli import run
from sparsetrain.cli.answer import Answer, print_answer, to_json
from sparsetrain.cli.failure import explain
from sparsetrain.core.errors import Unsupported


def thrown(error: BaseException, module: str = "sparsetrain.somewhere") -> BaseException:
    """The error as it looks when code of `module` raised it."""
    try:
        exec("raise error", {"error": error, "__name__": module})
    except BaseException as caught:
        return caught
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "module", "code", "words"),
    [
        (ValueError("asked, found, do"), "sparsetrain.hf", 2, "asked, found, do"),
        (ValueError("bad shape"), "torch.nn", 1, "in torch"),
        (RuntimeError("the loss is nan"), "sparsetrain.hf", 1, "the loss is nan"),
        (Unsupported("no triton here"), "sparsetrain.ops", 1, "no triton here"),
        (AssertionError("ours"), "sparsetrain.ops", 1, "report it"),
        (KeyError("x"), "json", 1, "--debug"),
        (MemoryError(), "torch", 1, "--batch-size"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "torch", 1, "--gradient-checkpointing"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), "os", 1, "runs/a"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "gone"), "os", 2, "gone"),
        (PermissionError(errno.EACCES, "Permission denied", "/root"), "os", 2, "/root"),
        (OSError("x is not a valid model identifier\nmore"), "transformers.utils.hub", 2, "models list"),
        (ModuleNotFoundError("No module named 'peft'"), "sparsetrain.hf", 1, "doctor"),
        (KeyboardInterrupt(), "sparsetrain.hf", 130, "--resume"),
    ],
)
def test_exit_codes_and_words(error: BaseException, module: str, code: int, words: str) -> None:
    failure = explain(thrown(error, module))
    assert failure.code == code and words in failure.message and "Traceback" not in failure.message


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="nope"):
        run(["methods", "nope", "--debug"])
    monkeypatch.setenv("SPARSETRAIN_DEBUG", "1")
    with pytest.raises(ValueError, match="nope"):
        run(["methods", "nope"])
    assert run(["methods", "--nope", "--debug"]) == 2  # usage errors have no traceback worth showing


def test_json_is_plain() -> None:
    nan = float("nan")
    written = json.loads(to_json({"a": nan, "b": [float("inf"), 1.5], "c": Path("x"), "d": (1,), 3: None}))
    assert written == {"a": None, "b": [None, 1.5], "c": "x", "d": [1], "3": None}


def test_brackets_are_not_markup() -> None:
    out = io.StringIO()
    print_answer(Answer(data={}, show=["[red] data[0] [/x]"]), out, as_json=False)
    assert out.getvalue() == "[red] data[0] [/x]\n"
