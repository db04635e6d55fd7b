"""`sparsetrain chat`: say something to a trained model, on the terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from sparsetrain.cli.answer import Answer
from sparsetrain.cli.flags import Debug, Json, takes

Run = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's --output, a saved model's or adapter's folder, or any model.")
]
Prompt = Annotated[
    str | None, typer.Option("--prompt", metavar="TEXT", help="Answer this and end; else lines are read until /exit.")
]
System = Annotated[str, typer.Option("--system", metavar="TEXT", help="A message that stands before all others.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", metavar="INT", min=1, max=2**20, help="Of an answer.")]
Temperature = Annotated[
    float,
    typer.Option("--temperature", metavar="FLOAT", min=0, max=100, help="0: the likeliest token, else draws of them."),
]

_LINES = "/new begins anew, /history shows what was said, /exit ends."


@takes("trust_remote_code", "seed", "dtype", "load_in_4bit", "load_in_8bit", "device", "threads")
def chat(
    run: Run,
    prompt: Prompt = None,
    system: System = "",
    max_new_tokens: Tokens = 256,
    temperature: Temperature = 0.7,
    json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> Answer:
    """Talk to a model that was just trained, with its chat template; one without goes on with each text.

    What was said is kept, and the oldest is forgotten where it no longer fits. Ctrl-C ends an answer. With lines from a
    pipe, each is answered.

    \b
    Examples:
      sparsetrain chat runs/finetune
      sparsetrain chat runs/finetune --prompt "What is the capital of France?" --temperature 0
    """
    from sparsetrain.hf.model.talk import Talk

    if json and prompt is None:
        raise ValueError("--json prints one document, of one answer. Give --prompt too.")
    loaded = _loaded(run, flags)
    seed = int(flags["seed"] or 0)
    talk = Talk(loaded, system=system, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if prompt is not None:
        began = time.perf_counter()
        said = talk.answer(prompt, (lambda piece: None) if json else _printed)
        about = {"model": run, "prompt": prompt, "answer": said, "seed": seed, "chat": talk.chats}
        return Answer(data=about | {"seconds": time.perf_counter() - began, "sparse": bool(loaded.handle)}, show=[""])
    print(f"{run}: {'a chat' if talk.chats else 'no chat template, so it goes on with what you write'}. {_LINES}")
    for line in _lines():
        _reply(talk, line)
    return Answer(data={"model": run})


def _loaded(run: str, flags: dict[str, Any]) -> Any:
    import torch

    from sparsetrain.hf.model.four_bit import held_bits
    from sparsetrain.hf.model.io import load, sidecar_of
    from sparsetrain.hf.train.assemble import pick_device, pick_dtype
    from sparsetrain.hf.train.dtype import with_dtype
    from sparsetrain.recipes.finetune import Recipe

    given = {key: value for key, value in flags.items() if value is not None and not key.startswith("load_in_")}
    recipe = with_dtype(Recipe.from_values({"model": run, "data": "none", "methods": [], **given}), lambda event: None)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    device = pick_device(recipe)
    options: dict[str, Any] = {"trust_remote_code": recipe.trust_remote_code}
    options["bits"] = held_bits(run, sidecar_of(run), flags, device)
    return load(run, dtype=pick_dtype(recipe, device), device=device, **options)


def _reply(talk: Any, line: str) -> None:
    """Do what a line asks for."""
    if line == "/new":
        talk.forget()
        print("Begun anew.")
    elif line == "/history":
        for message in talk.messages:
            _printed(f"{message['role']}: {message['content']}\n")
    elif line.startswith("/"):
        print(f"{line.split()[0]} is no command. {_LINES}")
    elif line:
        try:
            talk.answer(line, _printed)
        except ValueError as error:
            print(error, end="")
        except KeyboardInterrupt:
            print(" …", end="")
        print()


def _lines() -> Iterator[str]:
    """What is typed, line by line, up to /exit or the end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then has earlier lines under the arrow keys)
    shown = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(shown).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line in ("/exit", "/quit"):
            return
        yield line


def _printed(piece: str) -> None:
    """What a model says, without what would steer the terminal."""
    print("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in piece), end="", flush=True)
