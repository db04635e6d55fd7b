"""The command line, `sparsetrain`: parse, call one public function, print. `main` is the console entry."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from typing import Any


def main() -> None:
    """Run the command of this process and leave with its exit code (see `sparsetrain.cli.failure.EXIT_CODES`)."""
    # Libraries read these when they are imported. Their progress bars and advice would drown ours.
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it tells of a kernel it lacks
    answer_to_interrupts()
    try:
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  (a name may be no text)
        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # in an import, or once more in what cleans up
        code = 130
    signal.signal(signal.SIGINT, lambda *_: os._exit(code))
    sys.exit(code)


def answer_to_interrupts() -> None:
    """Ctrl-C: the first two interrupt, the second also what cleans up after the first; a third ends the process."""
    signals = iter(range(2))

    def interrupt(*_: Any) -> None:
        if next(signals, None) is None:
            os._exit(130)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns its exit code. The result goes to stdout, everything else to stderr."""
    import typer

    from sparsetrain.cli.answer import Answer, print_answer, to_json
    from sparsetrain.cli.app import app_for, flags_of, help_asked
    from sparsetrain.cli.failure import FAILED, INTERRUPTED, check_arguments, explain
    from sparsetrain.core.launchers import as_torchrun_says

    stdout = sys.stdout
    as_json = "--json" in arguments
    debug = "--debug" in arguments or os.environ.get("SPARSETRAIN_DEBUG") == "1"
    try:
        # a library that prints must not break the one JSON document
        with contextlib.redirect_stdout(sys.stderr if as_json else stdout), warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
            check_arguments(arguments)
            if (text := help_asked(arguments)) is not None:
                print(text, end="")
                return 0
            as_torchrun_says(os.environ)
            command = typer.main.get_command(app_for(arguments))
            answer = command.main(args=list(arguments), prog_name="sparsetrain", standalone_mode=False)
        if isinstance(answer, Answer):
            print_answer(answer, stdout, as_json)
            return answer.code
        if answer == INTERRUPTED:  # typer has made a number of the KeyboardInterrupt
            raise KeyboardInterrupt
        return 0
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())  # or Python complains once more when it exits
        return FAILED
    except (Exception, KeyboardInterrupt) as error:
        if debug and isinstance(error, Exception) and not hasattr(error, "format_message"):
            traceback.print_exception(error)
        failure = explain(error, flags_of(arguments))
        if not _tells(error):
            return failure.code
        if as_json:
            print(to_json(failure.to_dict()), file=stdout)
        elif failure.message:
            print(f"sparsetrain{_rank(error)}: {failure.message}", file=sys.stderr)
        return failure.code


def _tells(error: BaseException) -> bool:
    """Of a launcher's processes one tells of an error: whoever failed, or before they are joined the first one.

    The launcher ends the others when that one exits; who is still here then has another error, and tells of it.
    """
    from sparsetrain.core.errors import RankFailed

    if isinstance(error, RankFailed):
        return False
    if not _rank(error) and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(5)
    return True


def _rank(error: BaseException) -> str:
    """Which of the joined ranks has failed, as `hf.train.launch` notes."""
    return "".join(f", {note}" for note in getattr(error, "__notes__", ()) if note.startswith("rank "))
