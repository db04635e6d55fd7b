"""Speed-ups that `bench` measured on the machine, where they answer for the recipe that is asked about."""

from __future__ import annotations

from sparsetrain.core.config import plain_values
from sparsetrain.planner.search import Question
from sparsetrain.recipes.finetune import Recipe


def measured_speedup(recipe: Recipe, hidden_size: int | None, question: Question) -> tuple[float, str] | None:
    """Dense step / this recipe's step, where `bench` timed the same methods on blocks as wide; and where that was.

    The nearest length counts, within a factor of two of what is asked. A method that begins dense was timed after its
    dense phase, which is not what most of its steps are.

    Args:
        hidden_size: width of the model's blocks.
    """
    configs = [plain_values(config) for config in recipe.configs]
    asked = {
        "configs": configs,
        "hidden": hidden_size,
        "lora_r": recipe.lora_r,
        "checkpointing": recipe.gradient_checkpointing != "none",
        "batch_size": question.batch,
    }
    rows = question.rates.methods.get("+".join(config["method"] for config in configs), [])
    same = [row for row in rows if all(row.get(key) == value for key, value in asked.items())]
    near = [row for row in same if 0.5 <= row["tokens"] / question.tokens <= 2 and row.get("step_speedup")]
    if not near or any(config.begins_dense for config in recipe.configs):
        return None
    best = min(near, key=lambda row: abs(row["tokens"] - question.tokens))
    return best["step_speedup"], f"{best['step_speedup']:.2f}x dense, measured at {best['tokens']:,} tokens"
