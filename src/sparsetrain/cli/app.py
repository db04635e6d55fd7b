"""The command line: one typer app, one command a file; every command returns an `Answer` and prints nothing itself."""

from __future__ import annotations

import typer

from sparsetrain.cli.doctor import doctor
from sparsetrain.cli.failure import EXIT_CODES
from sparsetrain.cli.models import models
from sparsetrain.cli.plan import methods, plan

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", epilog=EXIT_CODES)


@app.callback()
def sparsetrain() -> None:
    """Fine-tune Transformers with less memory and time, through sparsity.

    \b
    Is this machine ready?
      sparsetrain doctor
    Fetch a small language model (93 MB) and train it, beside dense LoRA:
      sparsetrain models fetch smollm2-135m
      sparsetrain finetune --model smollm2-135m --data python-stdlib --compare dense

    Every command takes --json (one document on stdout; all else goes to stderr) and --debug.
    """


for _command in (plan, methods, doctor):
    app.command(epilog=EXIT_CODES)(_command)
app.add_typer(models, name="models")
