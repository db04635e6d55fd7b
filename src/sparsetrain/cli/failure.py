"""Errors for people: every exception becomes one paragraph (asked / found / do) and an exit code; no traceback."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

from sparsetrain.core.errors import RankFailed
from sparsetrain.core.fields import shown
from sparsetrain.core.quote import quoted

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

LONGEST_MESSAGE = 4000
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", tidy(self.message))

    def to_dict(self) -> dict[str, Any]:
        return {"ok": False, "error": {"kind": self.kind, "exit_code": self.code, "message": self.message}}


def tidy(message: str) -> str:
    """A message for a terminal: what a user's input brought into it is cut to 200 characters, and prints."""
    lines = re.sub(r"\S{300,}", lambda found: quoted(found[0]), message[:LONGEST_MESSAGE]).splitlines()
    return "\n".join(quoted(line, LONGEST_MESSAGE) for line in lines)


MEMORY = re.compile(
    "out of memory|not enough memory|(can't|cannot) allocate memory|bad_alloc|failed to allocate|unable to allocate"
    "|can't start new thread|invalid buffer size|storage size calculation overflowed",
    re.IGNORECASE,
)
"""How libraries and systems say that memory is at its end, a limit of the process (RLIMIT) included."""
REFUSALS = ("transformers", "tokenizers", "safetensors", "peft", "huggingface_hub", "datasets")
"""Libraries whose ValueError is about what they were given: a model's folder, a tokenizer, data."""


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise ValueError for an argument that is empty, which a path would read as this folder, or no text."""
    for place, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if not (value if equals or not flag else flag).strip():
            after = flag or (arguments[place - 1] if place else "")
            raise ValueError(
                f"An argument is empty{quoted(f' ({after})') if after else ''}. Give a value, or leave it out."
            )
        if any("\ud800" <= character <= "\udfff" or character == "\0" for character in argument):
            raise ValueError(f"The argument {quoted(argument)} is no valid UTF-8 text. Rename what it names.")


def explain(error: BaseException, flags: Container[str] | None = None) -> Failure:
    """The paragraph and exit code of an exception.

    A ValueError of ours, and whatever is wrong with a file that was named, is bad input. What a library raises in the
    middle of a run is a failed run, and says which library. Only what is left after that may be a fault of ours.

    Args:
        flags: those of the command, so that advice names no other; None: any.
    """
    if isinstance(error, RankFailed):  # one line a run, not one a rank
        code = explain(error.__cause__).code if isinstance(error.__cause__, Exception) else FAILED
        return Failure(kind="failed", code=code, message="")
    has = lambda flag: flags is None or flag in flags  # noqa: E731
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt):
        goes_on = " A training run goes on from its last whole checkpoint: the same command with --resume."
        return Failure(
            kind="interrupted", code=INTERRUPTED, message=f"Interrupted.{goes_on if has('--resume') else ''}"
        )
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # typer's own, whichever click it carries
        return Failure(kind="usage", code=BAD_INPUT, message=_usage(error))
    library = _raised_in(error)
    text = str(error).strip() or type(error).__name__
    if _is_memory(error, text):
        return _failed(f"Out of memory ({_first_line(text)}) {_memory_advice(has)}")
    if isinstance(error, OSError):
        return _os_error(error, library, text, has("--resume"))
    if type(error).__module__.startswith("pydantic"):
        return _bad(_pydantic(error))
    if isinstance(error, ValueError) and library in ("sparsetrain", "pydantic", "yaml"):
        return _bad(text + _as_flags(text, flags or ()))
    if type(error).__module__.startswith("yaml"):
        return _bad(f"The recipe is not valid YAML: {' '.join(text.split())}. Correct the file at that place.")
    if isinstance(error, ImportError) and not (error.name or "").startswith("sparsetrain"):
        return _failed(f"A package is missing or too old: {text}. Run `sparsetrain doctor` to see what to install.")
    if (about := _about_input(error, library, text)) is not None:
        return _bad(about)
    if library == "sparsetrain" and isinstance(error, RuntimeError):
        return _failed(text)
    where = f" in {library}" if library else ""
    return _failed(
        f"The run stopped{where}: {type(error).__name__}: {_first_line(text)} "
        "Run again with --debug for the traceback; if the fault is ours, please report it with that."
    )


def _as_flags(text: str, flags: Container[str]) -> str:
    """How the command spells the recipe's keys that a message names."""
    keys = dict.fromkeys(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", text[:LONGEST_MESSAGE]))
    pairs = ((key, f"--{key.replace('_', '-')}") for key in keys)
    said = [f"{key} is {flag}" for key, flag in pairs if flag in flags and flag not in text]
    return f" On the command line {', '.join(said)}." if said else ""


def _is_memory(error: BaseException, text: str) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(MEMORY.search(text)))


def _memory_advice(has: Callable[[str], bool]) -> str:
    keeps = " (raise --grad-accum to keep the tokens of a step)" if has("--grad-accum") else ""
    advice = {
        "--batch-size": f"lower --batch-size{keeps}",
        "--seq-len": "lower --seq-len",
        "--gradient-checkpointing": "set --gradient-checkpointing non-reentrant",
    }
    given = [words for flag, words in advice.items() if has(flag)]
    most = ", ".join(given[:-1])
    said = f"{most}, or {given[-1]}" if most else "".join(given)
    return f"{said or 'use a smaller model, or a machine with more memory'}.".capitalize()


def _about_input(error: BaseException, library: str, text: str) -> str | None:
    """What is said of errors that come of what was read, whichever library reads it; None for any other."""
    if isinstance(error, RecursionError):
        return "The input nests too deep to be read: a recipe, a model's config or a row of data. Flatten it."
    if isinstance(error, UnicodeError):
        return f"Text is not UTF-8, or holds characters that cannot be written: {_first_line(text)} Save it as UTF-8."
    if isinstance(error, json.JSONDecodeError) or type(error).__name__ in ("SafetensorError", "BadZipFile"):
        return (
            f"A file is damaged, or is not of the kind its name says: {_first_line(text)} Restore it, or name another."
        )
    if isinstance(error, ValueError) and library in REFUSALS:
        return f"{library} does not take this input: {_first_line(text)} With --debug you see where."
    return None


def _usage(error: Any) -> str:
    message = str(error.format_message()).strip()
    if not message:  # a command without arguments has printed its help
        return ""
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", "sparsetrain")
    return f"{message} See `{path} --help`."


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BUSY = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOLCK, errno.ESTALE)
"""What a machine runs into, rather than what was asked of it."""


def _os_error(error: OSError, library: str, text: str, resumes: bool) -> Failure:
    name = f" {quoted(str(error.filename))}" if error.filename else ""
    if error.errno in _FULL:
        again = " (with --resume if there is a checkpoint)" if resumes else ""
        return _failed(
            f"Writing{name} failed: {error.strerror}. Nothing half-written was kept; the checkpoints before it are "
            f"whole. Free some space, then run again{again}."
        )
    if library in ("transformers", "huggingface_hub") or type(error).__module__.startswith("huggingface_hub"):
        return _bad(
            f"A model or tokenizer could not be loaded: {_first_line(text)} Give a local folder, an embedded model "
            "(`sparsetrain models list`), or the name of a repository that can be reached on the hub."
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return _failed(f"{error.strerror}{name}. Raise the limit (`ulimit -n`), or run less beside it.")
    if error.filename and error.errno not in _BUSY:
        return _bad(f"{error.strerror}:{name}. Name another place, or change what is there.")
    return _failed(f"{type(error).__name__}{name}: {error.strerror or _first_line(text)}")


def _pydantic(error: Any) -> str:
    """One sentence a wrong field, without pydantic's own URLs."""
    parts = []
    for item in error.errors(include_url=False):
        place = ".".join(str(step) for step in item["loc"])
        message = re.sub(r"^Value error, ", "", item["msg"])
        parts.append(f"{place}={shown(item['input'])}: {message}" if place else message)
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
    line = quoted(text.strip().splitlines()[0].strip(), 400) if text.strip() else ""
    return line if line.endswith((".", "!", "?")) else f"{line}."


def _bad(message: str) -> Failure:
    return Failure(kind="bad_input", code=BAD_INPUT, message=message)


def _failed(message: str) -> Failure:
    return Failure(kind="failed", code=FAILED, message=message)
