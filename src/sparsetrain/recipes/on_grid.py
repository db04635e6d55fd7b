"""Which keys of a pretraining recipe a grid of processes does not take: its loop is batches, AdamW and a schedule."""

from __future__ import annotations

from pathlib import Path

from sparsetrain.recipes.pretrain import PretrainRecipe

_UNEVALUATED = "a grid evaluates nothing while it trains, and takes all its steps. Leave it out"


def check_on_grid(recipe: PretrainRecipe) -> None:
    """Raise ValueError, with what to do, for the first key that would be ignored or that a grid cannot follow."""
    given = {
        "methods": (recipe.methods, "a grid trains dense models. Sparsify in Python, then parallelize() in plain mode"),
        "dtype": (recipe.dtype == "bf16", "a grid of processes on CPUs trains in fp32. Leave it out"),
        "task": (recipe.task != "lm" and recipe.task != "classify", "a grid trains lm and classify"),
        "training": (recipe.training, "a grid trains without transformers' Trainer. Leave it out"),
        "compare": (recipe.compare != "none", "a grid compares nothing. Leave it out"),
        "device": (recipe.device not in ("auto", "cpu"), "a grid has been tried on CPUs alone. Leave it out"),
        "output": (
            not recipe.resume and any(Path(recipe.output).glob("*")),
            "it holds something already. Give another folder, or --resume",
        ),
        "epochs": (recipe.epochs, "a grid counts steps. Give --steps"),
        "streaming": (recipe.streaming, "each process reads all rows. Leave it out"),
        "early_stopping": (recipe.early_stopping, _UNEVALUATED),
        "load_best_model_at_end": (recipe.load_best_model_at_end, _UNEVALUATED),
        "eval_every": (recipe.eval_every, _UNEVALUATED),
        "ema_decay": (recipe.ema_decay, "a grid keeps no average of the weights. Leave it out"),
        "clip_value": (recipe.clip_value, "a grid clips by max_grad_norm alone. Leave it out"),
        "min_lr_ratio": (recipe.min_lr_ratio, "a grid's learning rate falls to 0. Leave it out"),
        "gradient_checkpointing": (
            recipe.gradient_checkpointing != "none",
            "a grid recomputes nothing. Leave it out, or cut the model over more processes",
        ),
    }
    for key, (wrong, why) in given.items():
        if wrong:
            raise ValueError(f"{key}={getattr(recipe, key)!r} does not go with --grid: {why}.")
