"""Errors for people: every exception becomes one paragraph (asked / found / do) and an exit code; no traceback."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import Any

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

EXIT_CODES = (
    "Exit codes: 0 done · 1 the run failed (disk full, out of memory, a check did not hold) · "
    "2 wrong usage or bad input · 130 interrupted."
)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """kind: `usage`, `bad_input`, `failed` or `interrupted`."""

    kind: str
    code: int
    message: str

    def to_dict(self) -> dict[str, Any]:
        return {"ok": False, "error": {"kind": self.kind, "exit_code": self.code, "message": self.message}}


def explain(error: BaseException) -> Failure:
    """The paragraph and exit code of an exception.

    A ValueError of ours, and whatever is wrong with a file that was named, is bad input. What a library raises in the
    middle of a run is a failed run, and says which library.
    """
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt):
        message = "Interrupted. A training run goes on from its last whole checkpoint: the same command with --resume."
        return Failure(kind="interrupted", code=INTERRUPTED, message=message)
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # typer's own, whichever click it carries
        return Failure(kind="usage", code=BAD_INPUT, message=_usage(error))
    library = _raised_in(error)
    text = str(error).strip() or type(error).__name__
    if isinstance(error, OSError):
        return _os_error(error, library, text)
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        return _failed(
            f"Out of memory ({_first_line(text)}). Lower --batch-size (raise --grad-accum to keep the tokens of a "
            "step), lower --seq-len, or set --gradient-checkpointing non-reentrant."
        )
    if type(error).__module__.startswith("pydantic"):
        return _bad(_pydantic(error))
    if isinstance(error, ValueError) and library in ("sparsetrain", "pydantic", "yaml"):
        return _bad(text)
    if type(error).__module__.startswith("yaml"):
        return _bad(f"The recipe is not valid YAML: {' '.join(text.split())}. Correct the file at that place.")
    if isinstance(error, ImportError) and not (error.name or "").startswith("sparsetrain"):
        return _failed(f"A package is missing or too old: {text}. Run `sparsetrain doctor` to see what to install.")
    if library == "sparsetrain" and not isinstance(error, AssertionError | ImportError):
        return _failed(text)
    where = f" in {library}" if library else ""
    return _failed(
        f"The run stopped{where}: {type(error).__name__}: {_first_line(text)} "
        "Run again with --debug for the traceback; if the fault is ours, please report it with that."
    )


def _usage(error: Any) -> str:
    message = str(error.format_message()).strip()
    if not message:  # a command without arguments has printed its help
        return ""
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", "sparsetrain")
    return f"{message} See `{path} --help`."


def _os_error(error: OSError, library: str, text: str) -> Failure:
    name = f" {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return _failed(
            f"Writing{name} failed: {error.strerror}. Nothing half-written was kept; the checkpoints before it are "
            "whole. Free some space, then run again (with --resume if there is a checkpoint)."
        )
    if library in ("transformers", "huggingface_hub") or type(error).__module__.startswith("huggingface_hub"):
        return _bad(
            f"A model or tokenizer could not be loaded: {_first_line(text)} Give a local folder, an embedded model "
            "(`sparsetrain models list`), or the name of a repository that can be reached on the hub."
        )
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError | PermissionError):
        return _bad(f"{error.strerror}:{name}." if error.filename else text)
    return _failed(f"{type(error).__name__}{name}: {error.strerror or _first_line(text)}")


def _pydantic(error: Any) -> str:
    """One sentence a wrong field, without pydantic's own URLs."""
    parts = []
    for item in error.errors(include_url=False):
        place = ".".join(str(step) for step in item["loc"])
        message = re.sub(r"^Value error, ", "", item["msg"])
        parts.append(f"{place}={item['input']!r}: {message}" if place else message)
    return ". ".join(part.rstrip(".") for part in parts) + "."


def _raised_in(error: BaseException) -> str:
    """The top-level package whose code raised the error ("" when there is no traceback)."""
    frame = error.__traceback__
    name = ""
    while frame is not None:
        name = frame.tb_frame.f_globals.get("__name__", "").partition(".")[0]
        frame = frame.tb_next
    return name


def _first_line(text: str) -> str:
    line = text.strip().splitlines()[0].strip() if text.strip() else ""
    return line if line.endswith((".", "!", "?")) else f"{line}."


def _bad(message: str) -> Failure:
    return Failure(kind="bad_input", code=BAD_INPUT, message=message)


def _failed(message: str) -> Failure:
    return Failure(kind="failed", code=FAILED, message=message)
