"""Which operations a recipe needs, and whether a GPU can run them well."""

from __future__ import annotations

from pathlib import Path

from sparsetrain.recipes.run import RunRecipe

OPS = Path(__file__).parents[1] / "ops"
GPU_BACKENDS = ("triton", "flex", "grouped")
"""Files of an op's folder that hold what runs well on a GPU."""


TIMES = "`sparsetrain bench` with the same model, methods and shape times them there, for `plan --gpu measured.json`"


def ops_of(recipe: RunRecipe) -> tuple[str, ...]:
    """The operations that a recipe's methods call, in alphabetical order."""
    return tuple(sorted({op for config in recipe.configs for op in config.called_ops()}))


def unable(ops: tuple[str, ...], *, gpu: bool) -> str | None:
    """Why what operations take on a GPU cannot be predicted, where no step with them is on record of that GPU: no
    kernel is written for them, or none of the kernels was timed there."""
    ours = [op for op in ops if gpu and _has(op, "torch")]
    missing = [op for op in ours if not any(_has(op, backend) for backend in GPU_BACKENDS)]
    if missing:
        return f"{' and '.join(missing)}: no GPU kernel in this version, and no step timed on that GPU; {TIMES}"
    return f"{' and '.join(ours)}: no step timed on that GPU at this shape; {TIMES}" if ours else None


def _has(op: str, backend: str) -> bool:
    return (OPS / op / f"{backend}.py").is_file()
