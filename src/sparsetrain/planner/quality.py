"""What each method was seen to cost in quality, from recorded results with their source (its evidence.json).

A record is of one setting. One with `ratio` says what converting costs before any training. One with `deployed` says
what training by it costs, and gains, where the product is the dense model:

    {"setting": {key: value}, "with": [{"method": name, key: value}], "text": …, "from": …,
     "deployed": {"task": ["sft"], "trained": ["lora"], "target_share": [low, high], …,
                  "equal_steps": 0.004, "equal_time": -0.05, "speedup": 1.5, "peak": 0.5, "seeds": 3}}

Keys of `deployed` that are `Facts` say where it holds: words, or a range. The rest are results beside dense LoRA.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import sparsetrain.methods  # noqa: F401  (enters every method in the registry)
from sparsetrain.core.config import MethodConfig, registered_methods


@dataclass(frozen=True, kw_only=True)
class Risk:
    """Quality risk of a recipe.

    ratio: perplexity before training, as a multiple of the dense model's (methods multiplied); None: not recorded.
    exact: outputs and gradients are those of the dense model.
    texts: one line a method, with the setting and the source.
    """

    ratio: float | None
    exact: bool
    texts: tuple[str, ...]

    @property
    def order(self) -> tuple[int, float, int]:
        """Sorts from safe to risky: exact; with a recorded ratio, by it and the number of methods; without."""
        return (0 if self.exact else 1 if self.ratio is not None else 2, self.ratio or 0.0, len(self.texts))


@cache
def _recorded(method: str) -> list[dict[str, Any]]:
    """The records beside a method's config; none for a method that brings none."""
    kind = registered_methods().get(method)
    source = None if kind is None else sys.modules[kind.__module__].__file__
    if source is None or not (path := Path(source).with_name("evidence.json")).is_file():
        return []
    return json.loads(path.read_text(encoding="utf-8"))


def risk_of(methods: list[dict[str, Any]]) -> Risk:
    """The recorded risk of a recipe's methods; the first record whose setting the method shares is taken.

    Args:
        methods: each {method: name, key: value}, with defaults filled in (`MethodConfig.to_dict`).
    """
    ratio: float | None = 1.0
    exact = True
    texts = []
    for method in methods:
        records = [record for record in _recorded(method["method"]) if "ratio" in record]
        found = next((r for r in records if _shares(method, r["setting"])), None)
        if found is None:
            ratio, exact = None, False
            texts.append(f"{method['method']}: no recorded result")
            continue
        ratio = None if ratio is None or found["ratio"] is None else ratio * found["ratio"]
        exact = exact and found.get("exact", False)
        texts.append(f"{method['method']}: {found['text']} [{found['from']}]")
    return Risk(ratio=ratio, exact=exact, texts=tuple(texts))


def _shares(method: dict[str, Any], setting: dict[str, Any]) -> bool:
    return all(method.get(key) == value for key, value in setting.items())


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of the data and the model of a run; None: not (yet).

    task: as in the recipe. trained: `lora` or `all weights`. deployed: `dense` or `sparse`, how the product is used.
    parameters: of the model. seq_len: tokens of the row that the average token is in. target_share: of targets among
    the tokens of the training rows.
    """

    task: str
    trained: str
    deployed: str = "dense"
    parameters: int | None = None
    seq_len: float | None = None
    target_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """A recorded training by some methods, deployed dense, beside dense LoRA.

    where: fact -> words, or (lowest, highest).
    equal_steps, equal_time: perplexity (for labels: error rate) over dense LoRA's, less 1, after as many steps, and
        after as much time; None: not recorded.
    speedup: dense step / its step, there. peak: its peak memory over the dense one.
    """

    methods: tuple[MethodConfig, ...]
    where: dict[str, list[Any]]
    text: str
    source: str
    equal_steps: float | None = None
    equal_time: float | None = None
    speedup: float | None = None
    peak: float | None = None
    seeds: int = 1
    seeds_time: int | None = None

    @property
    def seeds_text(self) -> str:
        """'1 seed', or '1 seed; 3 at equal time'."""
        more = "" if self.seeds_time is None else f"; {self.seeds_time} at equal time"
        return f"{self.seeds} seed{'s' if self.seeds > 1 else ''}{more}"

    def outside(self, facts: Facts, final: bool = True) -> list[str]:
        """The facts that this record doesn't reach to, in words.

        Args:
            final: a fact that isn't known is outside; else it may be learnt yet.
        """
        found = []
        for name, allowed in self.where.items():
            value = getattr(facts, name)
            words = isinstance(allowed[0], str)
            if not final if value is None else value in allowed if words else allowed[0] <= value <= allowed[1]:
                continue
            says = (" or " if words else " to ").join(map(_shown, allowed))
            found.append(f"{name.replace('_', ' ')} {_shown(value)} (on record: {says})")
        return found


def _shown(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or "unknown"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


@cache
def deployed_records() -> tuple[Deployed, ...]:
    """The records of all methods that say what training by them costs where the product is dense."""
    facts = set(Facts.__dataclass_fields__)
    found = []
    for name, kind in registered_methods().items():
        for record in _recorded(name):
            if (given := record.get("deployed")) is None:
                continue
            others = tuple(MethodConfig.from_dict(values) for values in record.get("with", []))
            found.append(
                Deployed(
                    methods=(kind.from_dict(record["setting"]), *others),
                    where={"deployed": ["dense"]} | {key: value for key, value in given.items() if key in facts},
                    text=record["text"],
                    source=record["from"],
                    **{key: value for key, value in given.items() if key not in facts},
                )
            )
    return tuple(found)
