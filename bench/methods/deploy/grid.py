"""The grid: which ways of training are run on which data and shapes, and which of them may be chosen automatically."""

from __future__ import annotations

import dataclasses
import functools
import json
import sysconfig
from pathlib import Path
from typing import Any

RATES = {"lr": 3e-4, "lr_schedule": "cosine", "lora_r": 16, "calibration_tokens": 16384, "save_every": 0}
SFT = {"model": "smollm2-135m", "task": "sft", **RATES}
GRID: dict[str, dict[str, Any]] = {
    "python-docstrings": {**SFT, "seq_len": 1024, "batch_size": 1, "eval_tokens": 24576},
    "gsm8k": {**SFT, "seq_len": 512, "batch_size": 4, "eval_tokens": 16384},
    "chitchat": {**SFT, "seq_len": 1024, "batch_size": 2, "eval_tokens": 24576},
    "python-stdlib": {**SFT, "task": "lm", "seq_len": 1024, "batch_size": 1, "eval_tokens": 16384},
    "movie-reviews": {**SFT, "model": "minilm", "task": "classify", "lr": 5e-4}
    | {"seq_len": 256, "batch_size": 8, "eval_tokens": 131072},
}
"""On which every arm is run."""
LONG, LONG_CONTEXT = "long-docstrings", 14_000
"""Rows of some 4,096 tokens: so many characters of the file stand before each function."""
SHAPES: dict[str, dict[str, Any]] = {
    LONG: {**GRID["python-docstrings"], "seq_len": 4096, "eval_tokens": 49152},
    "chitchat-256": {**GRID["chitchat"], "seq_len": 256, "batch_size": 8},
    "python-stdlib-512": {**GRID["python-stdlib"], "seq_len": 512, "batch_size": 2},
    "movie-reviews-smollm2": {**SFT, "task": "classify", "seq_len": 256, "batch_size": 4, "eval_tokens": 32768},
    "python-docstrings-2GB": GRID["python-docstrings"],
}
"""Further shapes, for the automatic choice: only what it may take is run on them."""
DATA = {**GRID, **SHAPES}
SOURCE = {"chitchat-256": "chitchat", "python-stdlib-512": "python-stdlib", "movie-reviews-smollm2": "movie-reviews"}
SOURCE |= {"python-docstrings-2GB": "python-docstrings"}
"""The data set of a shape that is not named after it."""
MEMORY = {"python-docstrings-2GB": 2 * 1024**3}
"""Bytes that a run may take, where they are fewer than the machine has."""
TIMES_STEPS = {"movie-reviews": 4, "movie-reviews-smollm2": 2}
"""A small model needs more steps until dense training has converged."""
USUAL_STEPS = 10
"""A user's run, beside one of the grid: the automatic choice may take a twentieth of it."""
SHARES = {"python-docstrings": (0.1, 0.15, 0.3), LONG: (0.05, 0.1, 0.15), "movie-reviews": (0.5, 0.3, 0.1)}
SHARES |= {"python-docstrings-2GB": SHARES["python-docstrings"], "movie-reviews-smollm2": SHARES["movie-reviews"]}
"""Tokens that are selected, by data; `OTHER_SHARES` elsewhere, where targets are more than those."""
OTHER_SHARES = (0.3, 0.5, 0.7)
CONTEXTS = (
    (1, "near", True, True),
    (1, "attended", True, True),
    (0, "attended", True, False),
    (1, "attended", False, False),
    (1, "random", False, False),
)
"""(which share, what fills it up after all targets, whether keys of other tokens train, whether it may be chosen)."""
LIGHT = (4, 6, 7, 14, 16, 17, 18, 20, 24, 27)  # the ten that cost least alone, of SmolLM2's 30 (docs/log.md)
DEMO = (*range(3, 8), *range(9, 19), *range(20, 25), *range(26, 29))  # the 23 of the recipe examples/spt.yaml
OF_MINILM = {LIGHT: (4, 5), DEMO: (1, 2, 3, 4, 5)}
PQ: dict[str, Any] = {"method": "pq_attention", "keep_ratio": 0.25, "block_q": 64, "block_k": 16, "from_depth": 0.7}


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to train.

    methods: none trains dense. recipe: what else its recipe has. chosen: the automatic choice may depend on it.
    timed_as: the arm whose step it has; None: its own.
    """

    methods: tuple[dict[str, Any], ...]
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    chosen: bool = False
    timed_as: str | None = None


def tokens(data: str, share: float, **more: Any) -> dict[str, Any]:
    """Targets first where there are prompts."""
    pool = {"pool": "targets"} if DATA[data]["task"] == "sft" else {}
    return {"method": "token_selection", "keep_ratio": share, **pool, **more}


def ffn(data: str, layers: tuple[int, ...]) -> dict[str, Any]:
    layers = OF_MINILM[layers] if DATA[data]["model"] == "minilm" else layers
    found = {"method": "routed_ffn", "num_blocks": 4, "num_active": 1, "shared_ratio": 0.5, "partition": "clustered"}
    return {**found, "compensation_rank": 96, "layers": list(layers)}


def arms(data: str) -> dict[str, Arm]:
    """Name -> what is trained on that data; the first ones matter most."""
    shares = SHARES.get(data, OTHER_SHARES)
    middle = tokens(data, shares[1])
    light, demo = ffn(data, LIGHT), ffn(data, DEMO)
    sft, chosen = DATA[data]["task"] == "sft", {shares[1]} if DATA[data]["task"] == "sft" else set(shares[:2])
    found = {f"tokens-{share}": Arm((tokens(data, share),), chosen=share in chosen) for share in shares}
    if sft:
        for share, context, keys, may in CONTEXTS:
            kept = tokens(data, shares[share], keep_all_targets=True, context=context, train_keys=keys)
            found[f"tokens-{shares[share]}-all-{context}{'-keys' * keys}"] = Arm((kept,), chosen=may)
    else:
        found |= {f"tokens-{r}-keys": Arm((tokens(data, r, train_keys=True),), chosen=True) for r in shares[:2]}
    if data in MEMORY:
        found["dense-checkpointing"] = Arm((), {"gradient_checkpointing": "non-reentrant"}, chosen=True)
    if data in SHAPES:
        return {name: arm for name, arm in found.items() if arm.chosen}
    found |= {"attention": Arm((PQ,)), "ffn-light": Arm((light,)), "ffn-demo": Arm((demo,)), "spt": Arm((PQ, demo))}
    found |= {"tokens+attention": Arm((middle, PQ)), "tokens+spt": Arm((middle, PQ, demo))}
    if sft:
        few = {"dense_tokens": "targets"}
        found |= {"attention-context": Arm(({**PQ, **few},)), "ffn-light-context": Arm(({**light, **few},))}
        found["tokens+attention-context"] = Arm((middle, {**PQ, **few}))
    if data in ("python-docstrings", "python-stdlib"):
        for name, methods in {"ffn-light": (light,), "spt": (PQ, demo)}.items():
            for first, last in ((0.0, 0.0), (0.0, 0.2), (0.05, 0.4)):
                phases = {"dense_first": first, "dense_last": last}
                found[f"{name} dense={first}+{last}"] = Arm(methods, phases, timed_as=name)
            found[f"{name} auxiliary=trained"] = Arm(methods, {"train_auxiliary": True})
        found["spt deploy=sparse"] = Arm((PQ, demo), {"deploy": "sparse"})
        found["tokens dense=0.0+0.2"] = Arm((middle,), {"dense_first": 0.0, "dense_last": 0.2})
    if data == "movie-reviews":
        found |= {f"dense lr={lr}": Arm((), {"lr": lr}) for lr in (2e-4, 1e-3)}
        for lr in (1e-3, 2e-3):  # at the first, dense LoRA stays at chance on a seed of three, and tokens learn best
            for name in (f"tokens-{shares[1]}", f"tokens-{shares[1]}-keys"):
                best = lr == 1e-3 and not name.endswith("keys")
                found[f"{name} lr={lr}"] = Arm(found[name].methods, {"lr": lr}, chosen=best, timed_as=name)
    return found


@functools.cache
def long_docstrings() -> str:
    """A file of prompts with completions whose rows are some 4,096 tokens: functions with more of their files before
    them, and no others."""
    from sparsetrain.core.files import write_whole
    from sparsetrain.core.remembered import cache_folder
    from sparsetrain.data.docstrings import docstring_rows

    rows = docstring_rows(Path(sysconfig.get_paths()["stdlib"]), context=LONG_CONTEXT)
    kept = [row for row in rows if len(row["prompt"]) > 0.9 * LONG_CONTEXT]
    path = cache_folder() / "bench" / "long-docstrings.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
    return str(path)


def recipe_of(data: str, arm: Arm | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The recipe's values, but for output, seed and steps."""
    source = long_docstrings() if data == LONG else SOURCE.get(data, data)
    values = {**DATA[data], "data": source, "methods": [], "dtype": settings["dtype"]}
    if settings["eval_tokens"] is not None:
        values["eval_tokens"] = settings["eval_tokens"]
    return values if arm is None else {**values, "methods": list(arm.methods), **arm.recipe}
