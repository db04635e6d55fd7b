"""The flags by which `--preset auto` chooses, and how they are read."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sparsetrain.cli.predict import parse_bytes
from sparsetrain.core.fields import shown

_CHOICE = "What --preset auto chooses by"
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        rich_help_panel=_CHOICE,
        help="Memory that training may use, such as 8GB; what is free if not given.",
    ),
]
Tolerance = Annotated[
    str | None,
    typer.Option(
        "--tolerance",
        metavar="SHARE",
        rich_help_panel=_CHOICE,
        show_default="1%",
        help="Perplexity that may be lost beside dense LoRA after as many steps, whatever it gains in as much time.",
    ),
]
GoalFlag = Annotated[
    str | None,
    typer.Option(
        "--goal",
        metavar="time|memory",
        rich_help_panel=_CHOICE,
        show_default="time",
        help="time: the fastest that fits. memory: the leanest whose step takes at most 1.5 times the fastest.",
    ),
]
Seconds = Annotated[
    str | None,
    typer.Option(
        "--choose-seconds",
        metavar="SECONDS",
        rich_help_panel=_CHOICE,
        show_default="30",
        help="Most of the time that timing takes; a twentieth of the expected run if that is less.",
    ),
]
Again = Annotated[
    bool, typer.Option("--choose-again", rich_help_panel=_CHOICE, help="Time again what an earlier run has timed.")
]


def choice_asked(recipe: Any, *, choose_again: bool, **flags: str | None) -> Any:
    """What the flags ask of the choice; None for a recipe whose methods are given.

    Raises:
        ValueError: one of them is out of range, or given where there is nothing to choose.
    """
    if recipe.preset is None:
        given_flags = [name for name, value in flags.items() if value is not None]
        given_flags += ["choose_again"] if choose_again else []
        if not given_flags:
            return None
        names = " + ".join(config.method for config in recipe.configs) or "dense training"
        raise ValueError(
            f"--{given_flags[0].replace('_', '-')} is for --preset auto, and {names} was asked for. Leave one out."
        )
    return _read(choose_again=choose_again, **flags)


def _read(
    memory: str | None, tolerance: str | None, goal: str | None, choose_seconds: str | None, choose_again: bool
) -> Any:
    from sparsetrain.core.config import suggest
    from sparsetrain.planner.choosing import GOALS, Asked

    given: dict[str, Any] = {"again": bool(choose_again)}
    if memory is not None:
        given["memory_bytes"] = parse_bytes(memory)
    if tolerance is not None:
        given["tolerance"] = share = _number(tolerance.removesuffix("%")) / (100 if tolerance.endswith("%") else 1)
        if not 0 <= share < 1:
            raise ValueError(
                f"--tolerance {shown(tolerance)} is out of range. Give a share such as 1% or 0.01, below 1."
            )
    if goal is not None and goal not in GOALS:
        raise ValueError(f"--goal {shown(goal)} is unknown.{suggest(goal, GOALS)} Choose from {', '.join(GOALS)}.")
    given |= {} if goal is None else {"goal": goal}
    if choose_seconds is not None:
        given["seconds"] = _number(choose_seconds)
        if not 0 <= given["seconds"] <= 3600:
            raise ValueError(
                f"--choose-seconds {shown(choose_seconds)} is out of range. Give 0 (predict only) to 3600."
            )
    return Asked(**given)


def _number(text: str) -> float:
    """Not a number for text that is none, which is outside of every range."""
    try:
        return float(text)
    except ValueError:
        return float("nan")
