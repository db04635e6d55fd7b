"""A sparse run beside the strongest dense one, in turns, step by step.

Each side is a process of its own that runs the ordinary `finetune` or `pretrain`, so each has its own peak of memory.
A callback waits at the start of every step for its turn; whatever comes before the next step (data, saving,
evaluation) belongs to the turn. So exactly one side computes at any time, both meet the same state of the machine, and
the order flips each round. The dense side begins, so that a first loss is seen while the sparse side has yet to convert
its model.

The dense side has the same LoRA or start, optimizer, seed, rows and order of rows, and SDPA attention.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsetrain.core.errors import CheckpointError, PlanError
from sparsetrain.hf.train.evaluate import Quality
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.hf.train.finetune import title as finetune_title
from sparsetrain.hf.train.pretrain import PretrainRecipe, pretrain
from sparsetrain.hf.train.pretrain import title as pretrain_title
from sparsetrain.measure.machine import describe_machine
from sparsetrain.measure.report import build_report, write_report
from sparsetrain.measure.schema import Report
from sparsetrain.measure.timing import ratio
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.checkpoints import check_output, checkpoints
from sparsetrain.runs.events import Event, silent
from sparsetrain.runs.events import Report as Tell
from sparsetrain.runs.layout import RESULT
from sparsetrain.runs.manifest import MANIFEST, read_json
from sparsetrain.runs.pictures import illustrate

_JOBS: dict[str, tuple[Any, Any, Any]] = {
    "finetune": (Recipe, finetune, finetune_title),
    "pretrain": (PretrainRecipe, pretrain, pretrain_title),
}
"""Job -> its recipe, function and title."""
SIDES = ("sparse", "dense")
REPORT = "report.json"
_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ValueError, PlanError, CheckpointError, RuntimeError)
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Both results as in their result.json, and the report that was written to `output`."""

    sparse: dict[str, Any]
    dense: dict[str, Any]
    report: Report
    output: Path


def compare(recipe: RunRecipe, *, report: Tell = silent) -> Comparison:
    """Train `recipe` and its dense counterpart in turns; write `report.json` and `report.html` into its output.

    Each side's own files are in `output/sparse` and `output/dense`. With `resume`, each goes on from its own newest
    whole checkpoint.

    Args:
        recipe: a recipe with methods.
        report: told the events of both sides; each event has a `side`.

    Raises:
        ValueError: the recipe has no methods; and as `finetune`. When one side fails, the other is stopped.
        RuntimeError: a side died (its last words are in the message), or the sides saw different rows.
    """
    if not recipe.methods:
        raise ValueError("compare=dense needs something to compare with dense: give --method or --preset.")
    output = Path(recipe.output)
    check_output(output, resume=recipe.resume)
    recipes = {side: _side_recipe(recipe, side) for side in SIDES}
    finished = [side for side in SIDES if recipe.resume and (output / side / RESULT).is_file()]
    if recipe.resume:
        _check_resumable(output, recipes, finished)
    with _leaving_nothing_useless(output, new=not recipe.resume), contextlib.ExitStack() as stack:
        sides = [stack.enter_context(_Side(side, recipes[side])) for side in SIDES if side not in finished]
        for side in sides:  # the sparse one first: it checks its recipe, and then asks how good the dense model is
            side.begin(recipe)
            _until_waiting(sides, side, report)
        _take_turns(sides, report)
    results = {side: read_json(Path(recipes[side].output) / RESULT) for side in SIDES}
    _check_same_rows(results)
    made = comparison_report(recipe, results)
    write_report(made, output)
    illustrate(output, recipe.configs)
    recipe.to_yaml(output / "recipe.yaml")
    return Comparison(sparse=results["sparse"], dense=results["dense"], report=made, output=output)


@contextlib.contextmanager
def _leaving_nothing_useless(output: Path, new: bool) -> Iterator[None]:
    """When a new comparison ends before a whole checkpoint or a finished side, remove what it wrote."""
    existed = output.exists()
    try:
        yield
    except BaseException:
        folders = [output / side for side in SIDES]
        useful = [path / MANIFEST for folder in folders for path in checkpoints(folder)]
        useful += [folder / RESULT for folder in folders]  # a side that is done
        if new and not any(path.is_file() for path in useful):
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
            if not existed:
                with contextlib.suppress(OSError):  # not there, or with something of another's in it
                    output.rmdir()
        raise


def comparison_report(recipe: RunRecipe, results: dict[str, dict[str, Any]]) -> Report:
    """The measure report of two results."""
    times = {side: {row["step"]: row["step_time_s"] for row in results[side]["run"]["steps"]} for side in SIDES}
    both = sorted(times["sparse"].keys() & times["dense"].keys())[1:]  # the first step allocates
    timing = None
    if len(both) >= 3:
        timing = ratio([times["dense"][step] for step in both], [times["sparse"][step] for step in both]).to_dict()
    notes = [results["sparse"]["data"]]
    notes += [f"{side}: {note}" for side in SIDES for note in results[side]["notes"]]
    if results["sparse"]["data_order"]:
        notes.append(f"Both sides saw the same rows in the same order (hash {results['sparse']['data_order']}).")
    return build_report(
        title=_JOBS[_job_of(recipe)][2](recipe),
        runs={side: results[side]["run"] for side in SIDES},
        recipe=recipe.model_dump(mode="json"),
        machine=describe_machine().to_dict() | {"threads": results["sparse"]["machine"]["threads"]},
        plan=results["sparse"]["plan"],
        timing=timing,
        notes=notes,
    )


def _job_of(recipe: RunRecipe) -> str:
    return next(name for name, (kind, _, _) in _JOBS.items() if isinstance(recipe, kind))


def _side_recipe(recipe: RunRecipe, side: str) -> RunRecipe:
    """One side's recipe. A side that was killed before its first whole checkpoint starts again."""
    output = Path(recipe.output) / side
    changes: dict[str, Any] = {"output": str(output), "compare": "none"}
    if side == "dense":
        changes["methods"] = []
        if isinstance(recipe, Recipe):
            changes["distill_steps"] = 0
    if recipe.resume:
        changes["resume"] = any((path / MANIFEST).is_file() for path in checkpoints(output))
        if not changes["resume"] and not (output / RESULT).is_file():
            shutil.rmtree(output, ignore_errors=True)
    return recipe.model_copy(update=changes)


def _check_resumable(output: Path, recipes: dict[str, RunRecipe], finished: list[str]) -> None:
    if (output / REPORT).is_file():
        raise CheckpointError(f"{output} holds a finished comparison ({REPORT}). Choose another output.")
    if not finished and not any(recipe.resume for recipe in recipes.values()):
        raise CheckpointError(
            f"{output} holds no whole checkpoint of either side, so nothing can go on. Remove it, or choose another "
            "output."
        )
    for side in finished:
        earlier = read_json(output / side / RESULT)["recipe"]
        differences = recipes[side].differences(type(recipes[side])(**earlier).training_values())
        if differences:
            raise CheckpointError(f"the {side} side was finished with another recipe ({'; '.join(differences)}).")


def _take_turns(sides: list[_Side], report: Tell) -> None:
    """One step each, the order flipped each round, until both are done. The sparse side sets up in its first turn."""
    order = sides[::-1]
    while running := [side for side in order if not side.done]:
        for side in running:
            if side.asks:
                side.answer(next((other.dense_quality for other in sides if other is not side), None))
                _until_waiting(sides, side, report)
            side.go()
            _until_waiting(sides, side, report)
        order.reverse()


def _until_waiting(sides: list[_Side], active: _Side, report: Tell) -> None:
    """Pass events on until the active side waits for its next turn or is done; any side's death is an error."""
    active.waiting = False
    with selectors.DefaultSelector() as selector:
        for side in sides:
            if not side.done:
                selector.register(side.events, selectors.EVENT_READ, side)
        while not (active.waiting or active.done):
            for key, _ in selector.select():
                key.data.read(report)
                if key.data.done:
                    selector.unregister(key.fileobj)


@dataclass
class _Side:
    """One side's process: turns go in through its stdin, events come out of a pipe, errors go to a file.

    asks: it waits for the dense model's quality, not for the turn of a step.
    """

    name: str
    recipe: RunRecipe
    waiting: bool = False
    asks: bool = False
    done: bool = False
    dense_quality: dict[str, Any] | None = None
    events: int = -1
    _buffer: bytes = b""
    _process: Any = field(default=None, repr=False)
    _errors: Any = field(default=None, repr=False)

    def __enter__(self) -> Self:
        self.events, writer = os.pipe()
        self._errors = tempfile.TemporaryFile()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        code = "from sparsetrain.hf.study.compare import run_side; run_side()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(writer)],
            stdin=subprocess.PIPE,
            stdout=self._errors,
            stderr=self._errors,
            pass_fds=(writer,),
            env=environment,
            start_new_session=True,  # Ctrl-C reaches us alone; we stop both sides
        )
        os.close(writer)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.events)
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        if not self.done:
            self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def begin(self, like: RunRecipe) -> None:
        """Hand over the job: load, and come to the first step, or to the question how good the dense model is."""
        job: dict[str, Any] = {
            "job": _job_of(like),
            "recipe": self.recipe.model_dump(mode="json"),
            "like": like.model_dump(mode="json"),
        }
        self._send(json.dumps(job))

    def answer(self, dense_quality: dict[str, Any] | None) -> None:
        """Give it the dense model's quality; None: it has to measure it."""
        self.asks = False
        self._send(json.dumps(dense_quality))

    def go(self) -> None:
        """Give it the turn."""
        self._send("go")

    def read(self, report: Tell) -> None:
        """Take what the pipe holds.

        Raises:
            whatever the side raised; RuntimeError if it died without a word.
        """
        data = os.read(self.events, 65536)
        if not data:
            raise RuntimeError(self._last_words())
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            event = json.loads(line)
            if event["event"] in ("turn", "asks"):
                self.waiting, self.asks = True, event["event"] == "asks"
            elif event["event"] == "done":
                self.done = True
            elif event["event"] == "failed":
                raise _error(event, self.name)
            else:
                if event["event"] == "quality" and event["stage"] in ("dense", "untrained"):
                    self.dense_quality = event["quality"]
                report({"side": self.name, **event})

    def _send(self, line: str) -> None:
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(self._last_words()) from None

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip().splitlines()[-5:]
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"the {self.name} side {how} before it was done, so both were stopped. " + " | ".join(words)


def _error(event: Event, side: str) -> Exception:
    """The side's exception, raised again here; its traceback is attached as a note."""
    if event["errno"] is not None:
        error: Exception = OSError(event["errno"], os.strerror(event["errno"]), event["filename"])
    else:
        error = _ERRORS.get(event["kind"], RuntimeError)(f"{side} side: {event['message']}")
    error.add_note(event["traceback"])
    return error


def _check_same_rows(results: dict[str, dict[str, Any]]) -> None:
    orders = [results[side]["data_order"] for side in SIDES]
    if None not in orders and orders[0] != orders[1]:
        raise RuntimeError(
            f"the sides saw different rows (hashes {orders[0]} and {orders[1]}), so they cannot be compared. "
            "Something drew random numbers on one side only."
        )


# ---- the side's own process ----


def run_side() -> None:
    """Entry of a side's process: a job on stdin, the number of the event pipe in argv."""
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as pipe:

        def tell(event: Event) -> None:
            pipe.write(json.dumps(event, default=str) + "\n")
            pipe.flush()

        turns = _lines()
        job = json.loads(next(turns))

        def ask() -> Quality | None:
            tell({"event": "asks"})
            known = json.loads(next(turns))
            return None if known is None else Quality.from_dict(known)

        try:
            kind, train, _ = _JOBS[job["job"]]
            train(
                kind(**job["recipe"]),
                report=tell,
                callbacks=[_TurnCallback(tell, turns)],
                like=kind(**job["like"]),
                dense_quality=ask if job["recipe"]["methods"] else None,
                write=False,
            )
        except Exception as error:
            kind = next((k.__name__ for k in type(error).__mro__ if k.__name__ in _ERRORS), "")
            event = {
                "event": "failed",
                "kind": kind,
                "message": str(error) if kind else f"{type(error).__name__}: {error}",
                "errno": getattr(error, "errno", None),
                "filename": getattr(error, "filename", None),
                "traceback": traceback.format_exc(),
            }
            tell(event)
        else:
            tell({"event": "done"})


def _lines() -> Iterator[str]:
    """Lines of stdin; the end of it means that the parent is gone, and so are we."""
    while line := sys.stdin.readline():
        yield line
    raise SystemExit(1)


class _TurnCallback(TrainerCallback):
    """Gives the turn back at the start of each step, and waits for the next one. It must be the first callback."""

    def __init__(self, tell: Tell, turns: Iterator[str]) -> None:
        self.tell, self.turns = tell, turns

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tell({"event": "turn"})
        next(self.turns)
