"""From exceptions to paragraphs and exit codes."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path

import pytest

from sparsetrain.cli import run
from sparsetrain.cli.answer import Answer, print_answer, to_json
from sparsetrain.cli.app import flags_of
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
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "torch", 1, "Lower --batch-size"),
        (RuntimeError("can't start new thread"), "threading", 1, "Out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "os", 1, "Out of memory"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 10_000), "os", 2, "too long"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "os", 2, "a/b"),
        (FileExistsError(errno.EEXIST, "File exists", "a"), "pathlib", 2, "another place"),
        (OSError(errno.EROFS, "Read-only file system", "/proc/x"), "os", 2, "/proc/x"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "a"), "os", 2, "symbolic"),
        (OSError(errno.EMFILE, "Too many open files", "a"), "os", 1, "ulimit"),
        (OSError(errno.EIO, "Input/output error", "a"), "os", 1, "Input/output"),
        (RecursionError("maximum recursion depth exceeded"), "json.decoder", 2, "too deep"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), "codecs", 2, "UTF-8"),
        (json.JSONDecodeError("Expecting value", "", 0), "json.decoder", 2, "damaged"),
        (ValueError("Unrecognized model"), "transformers.models.auto", 2, "transformers does not take"),
        (TypeError("ours"), "sparsetrain.hf", 1, "report it"),
        (IndexError("ours"), "sparsetrain.hf", 1, "report it"),
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


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, debug in ((["methods", "nope", "--debug"], ""), (["methods", "nope"], "1")):
        monkeypatch.setenv("SPARSETRAIN_DEBUG", debug)
        assert run(arguments) == 2
        error = capsys.readouterr().err
        assert "Traceback" in error and "method_config" in error and "sparsetrain: unknown method 'nope'" in error
    assert run(["methods", "nope", "--debug", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2
    assert run(["methods", "--nope", "--debug"]) == 2  # usage errors have no traceback worth showing
    assert "Traceback" not in capsys.readouterr().err


def test_advice_names_flags_that_the_command_has() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "a")
    for verb, error, there, absent in (
        ("finetune", MemoryError(), ["--batch-size", "--grad-accum", "--gradient-checkpointing"], []),
        ("eval", MemoryError(), ["--batch-size", "--seq-len"], ["--grad-accum", "--gradient-checkpointing"]),
        ("export", MemoryError(), ["more memory"], ["--"]),
        ("export", full, ["Free some space"], ["--resume"]),
        ("patterns", KeyboardInterrupt(), ["Interrupted"], ["--resume"]),
        ("finetune", KeyboardInterrupt(), ["--resume"], []),
    ):
        message = explain(error, flags_of([verb])).message
        assert all(word in message for word in there) and not any(word in message for word in absent), message


def test_keys_of_a_recipe_are_told_as_flags() -> None:
    error = thrown(ValueError("seq_len=9 and eval_tokens=1 do not fit. Lower seq_len."))
    message = explain(error, flags_of(["finetune"])).message
    assert message.endswith(" On the command line seq_len is --seq-len, eval_tokens is --eval-tokens.")
    assert explain(error, flags_of(["export"])).message == str(error)


def test_json_is_plain() -> None:
    nan = float("nan")
    written = json.loads(to_json({"a": nan, "b": [float("inf"), 1.5], "c": Path("x"), "d": (1,), 3: None}))
    assert written == {"a": None, "b": [None, 1.5], "c": "x", "d": [1], "3": None}


def test_brackets_are_not_markup() -> None:
    out = io.StringIO()
    print_answer(Answer(data={}, show=["[red] data[0] [/x]"]), out, as_json=False)
    assert out.getvalue() == "[red] data[0] [/x]\n"
