"""Which operations a recipe needs, and whether a GPU can run them well."""

from __future__ import annotations

from pathlib import Path

from sparsetrain.recipes.run import RunRecipe

OPS = Path(__file__).parents[1] / "ops"


def ops_of(recipe: RunRecipe) -> tuple[str, ...]:
    """The operations that a recipe's methods call, in alphabetical order."""
    return tuple(sorted({op for config in recipe.configs for op in config.ops}))


def unable(ops: tuple[str, ...], *, gpu: bool) -> str | None:
    """Why operations cannot run well on a GPU: they have a CPU kernel and no Triton one."""
    missing = [op for op in ops if gpu and _has(op, "torch") and not _has(op, "triton")]
    if not missing:
        return None
    return f"{' and '.join(missing)}: no GPU kernel in this version, and the reference form is slower than dense"


def _has(op: str, backend: str) -> bool:
    return (OPS / op / f"{backend}.py").is_file()
