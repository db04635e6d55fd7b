"""How far a flood-fill pattern reaches: as far as the longest row that it was cut from."""

from __future__ import annotations

from sparsetrain.hf.data import DataBundle
from sparsetrain.methods import FloodFillAttention
from sparsetrain.recipes.run import RunRecipe


def cuts_patterns(recipe: RunRecipe) -> bool:
    """Whether a run cuts patterns from rows that may differ in length."""
    finds = any(isinstance(config, FloodFillAttention) and not config.is_dense for config in recipe.configs)
    return finds and recipe.task not in ("lm", "image")


def longest_row(bundle: DataBundle) -> int:
    """Where the longest training row lies."""
    lengths = list(map(len, bundle.train["input_ids"]))
    return lengths.index(max(lengths))


def check_reach(recipe: RunRecipe, bundle: DataBundle) -> None:
    """Raise ValueError if a sequence is longer than patterns will be; it would fail late, in the evaluation."""
    if not cuts_patterns(recipe) or bundle.eval is None:
        return
    probed = max(map(len, bundle.train["input_ids"]))
    others = [(part, name) for part in (bundle.train, bundle.eval) for name in ("input_ids", "input_ids_b")]
    longest = max(len(ids) for part, name in others if name in part.column_names for ids in part[name])
    for config in recipe.configs:
        if not isinstance(config, FloodFillAttention) or config.is_dense or config.extend != "error":
            continue
        block = config.block_tokens
        if -(-longest // block) > -(-probed // block):
            raise ValueError(
                f"flood_fill_attention: patterns are cut from training rows of at most {probed} tokens, and another "
                f"sequence has {longest}, which is past their last block of {block}. Use more training rows, or set "
                "extend=diagonal."
            )
