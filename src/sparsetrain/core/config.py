"""MethodConfig: what a method is asked to do, as plain values.

Every method's config is a frozen, keyword-only dataclass. It round-trips through JSON, knows its method's name, and
checks itself when it is made, so a wrong value fails before a model is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self

from sparsetrain.core.fields import checked, field_hints, kind_of, shown

DENSE_TOKENS = ("none", "targets")
"""What `dense_tokens` of a method that approximates the forward may say: which tokens of a training row run dense."""

_REGISTRY: dict[str, type[MethodConfig]] = {}


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What every config shares.

    Args:
        targets: patterns (`*` and `?`) on the names of sites, e.g. `model.layers.3.*`. A site is taken if any matches.
        layers: indices of the blocks to take, counted from 0; None takes all that `targets` match.
        from_depth: blocks before this share of the depth stay dense; the last block is always taken. In what we
            measured, early blocks cost the most quality.
    """

    method: ClassVar[str]
    about: ClassVar[str] = ""
    """What the method does, with its main keys, and where not to use it; for a person who chooses."""
    changes_outputs: ClassVar[bool] = True
    """Does the forward compute something else than the dense one? A method that changes gradients alone says False."""
    ops: ClassVar[tuple[str, ...]] = ()
    """The operations (folders of `sparsetrain.ops`) that the method's modules call, for a plan that imports none."""
    own_dropout: ClassVar[bool] = False
    """Does the method draw the dropout masks of the blocks itself, in bytes, as a GPU's kernels do?"""
    frees_inputs: ClassVar[bool] = False
    """Do blocks keep none of their inputs whole? A caller holds them for a block longer, so a plan traces a third."""
    listed: ClassVar[bool] = True
    """May a user ask for it? A config that a method makes for itself says False."""
    trains_own: ClassVar[bool] = False
    """Is what the method adds all that a run trains? Then there is no LoRA unless it is asked for."""
    stays_sparse: ClassVar[bool] = False
    """Is the sparse model what a run is for? Then it is not deployed dense."""
    grows: ClassVar[bool] = False
    """Does it train several models, each out of the one before, from random weights? Then it fine-tunes nothing."""
    refused_if_slower: ClassVar[bool] = False
    """Does a run time it first, and refuse what is slower than dense? A plan for this machine does so too."""
    targets: tuple[str, ...] = ("*",)
    layers: tuple[int, ...] | None = None
    from_depth: float = 0.0

    def __init_subclass__(cls, method: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if method:
            cls.method = method
            _REGISTRY[method] = cls

    def __post_init__(self) -> None:
        # JSON and YAML give lists; a frozen config is hashable, so it holds tuples.
        hints = {field.name: field_hints(type(self))[field.name] for field in dataclasses.fields(self)}
        texts = {name: hint for name, hint in hints.items() if kind_of(hint) is str}
        self._check_types({name: hint for name, hint in hints.items() if name not in texts})
        self.check()  # says which words a text may be
        self._check_types(texts)

    def _check_types(self, hints: dict[str, Any]) -> None:
        for name, hint in hints.items():
            object.__setattr__(self, name, checked(f"{self.method}: {name}", hint, getattr(self, name)))

    def check(self) -> None:
        """Raise ValueError if a value is out of range. Methods extend this."""
        if not self.targets:
            raise ValueError(f"{self.method}: targets is empty. Give at least one pattern, or leave it out for all.")
        if self.layers is not None and min(self.layers, default=-1) < 0:
            raise ValueError(
                f"{self.method}: layers={shown(list(self.layers))}. Give blocks, counted from 0, or leave it out."
            )
        if not 0 <= self.from_depth < 1:
            raise ValueError(f"{self.method}: from_depth={self.from_depth} is out of range. It must lie in [0, 1).")

    @classmethod
    def dense_limit(cls) -> Self:
        """The config that keeps everything: the model behaves as the dense one. Every method has it."""
        raise NotImplementedError(f"{cls.__name__} does not say what its dense limit is")

    @classmethod
    def example(cls) -> Self:
        """A config that changes a tiny model (heads of 8 channels, 48 hidden units, 100 tokens), for contract tests:
        the defaults, if a method names no other."""
        return cls()

    def called_ops(self) -> tuple[str, ...]:
        """Those of `ops` that this very config calls."""
        return self.ops

    def shortest_trace(self) -> float:
        """Tokens from which on a step grows smoothly with its length: below, a floor of the method hides the growth."""
        return 0.0

    def recipe_defaults(self) -> dict[str, Any]:
        """Keys of a fine-tuning recipe that have another default with this method, and that; `lr` None: what it says
        of the converted model (`Method.learning_rate`)."""
        return {}

    @property
    def begins_dense(self) -> bool:
        """Does a run train dense first, and turn sparse later?"""
        return False

    def sparse_at_once(self) -> Self:
        """The config without a dense phase at the beginning, to measure sparse steps; itself where there is none."""
        return self

    def takes(self, site_name: str, layer: int, num_layers: int) -> bool:
        """Does this config ask for that site, in block `layer` of `num_layers`?"""
        if layer < self.from_depth * (num_layers - 1) or (self.layers is not None and layer not in self.layers):
            return False
        return any(fnmatchcase(site_name, p) or fnmatchcase(site_name, f"{p}.*") for p in self.targets)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the method's name under `method`."""
        return {"method": self.method, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a config. Unknown keys are an error with the nearest known key.

        Raises:
            ValueError: unknown method, unknown key, or a value out of range.
        """
        values = dict(values)
        name = values.pop("method", getattr(cls, "method", None))
        kind = method_config(name) if cls is MethodConfig else cls
        known = {field.name for field in dataclasses.fields(kind)}
        for key in values:
            if key not in known:
                raise ValueError(f"{name}: {unknown('key', key, sorted(known))}")
        return kind(**values)  # type: ignore[return-value]


def plain_values(config: MethodConfig) -> dict[str, Any]:
    """A config as JSON and YAML give it back: `to_dict` with lists for tuples."""
    return lists_for_tuples(config.to_dict())


def lists_for_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """The same values, as JSON has them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def method_config(name: Any) -> type[MethodConfig]:
    """The config class of a method.

    Raises:
        ValueError: no method has that name.
    """
    if not isinstance(name, str) or name not in _REGISTRY:
        raise ValueError(unknown("method", name, _REGISTRY))
    return _REGISTRY[name]


def registered_methods() -> dict[str, type[MethodConfig]]:
    """Method name -> config class, in the order of the table of contents; what a user may ask for."""
    return {name: kind for name, kind in _REGISTRY.items() if kind.listed}


def suggest(word: Any, known: Any) -> str:
    """' Did you mean X?' or nothing."""
    near = difflib.get_close_matches(word[:100], list(known), n=1) if isinstance(word, str) else []
    return f" Did you mean {near[0]!r}?" if near else ""


def unknown(what: str, name: Any, known: Any) -> str:
    """'unknown WHAT NAME. Did you mean X? WHATs: …'"""
    return f"unknown {what} {shown(name)}.{suggest(name, known)} {what.capitalize()}s: {', '.join(known)}."


def in_range(method: str, name: str, value: float, low: float, high: float, low_open: bool = False) -> None:
    """Raise ValueError unless low <= value <= high (low < value with `low_open`)."""
    if not (low < value if low_open else low <= value) or value > high:
        bracket = "(" if low_open else "["
        raise ValueError(f"{method}: {name}={value} is out of range. It must lie in {bracket}{low}, {high}].")


def one_of(method: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{method}: {name}={shown(value)} is unknown.{suggest(value, choices)} Choose from {choices}.")
