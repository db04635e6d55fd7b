"""ConceptBottleneck: what a classifier by concepts is asked to do, and the list of its concepts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from sparsetrain.core.config import MethodConfig, in_range, one_of
from sparsetrain.core.fields import MOST, shown

LOSSES = ("none", "l1", "contrastive", "gumbel")
FORMS = ("paper", "official")
SCORES = ("logits", "log_softplus")
POOLINGS = ("auto", "mean", "head")
ENDING = ".txt"


@dataclass(frozen=True, kw_only=True)
class ConceptBottleneck(MethodConfig, method="concept_bottleneck"):
    """Decide by named concepts on a frozen encoder (Sparse-CBM, arXiv 2404.03323).

    An input is described by its match with each concept, ψ; one linear layer weighs the concepts, z = W ψ; a second
    one gives the logits, so that a logit is the sum of what the concepts contribute.

    Args:
        concepts: a text file (.txt) with a concept a line, or the concepts themselves. What is stored is the list.
        classes: a description of each label, in the labels' order. With them the contrastive losses pair a row with the
            profile of its class, and `explain` tells what the search of the concept matrix says.
        loss: of the bottleneck, beside the cross-entropy: `l1`, `contrastive`, `gumbel`, or `none`: a dense bottleneck.
        l1: λ of l1. With `prox` W's entries go towards 0 by λ times the learning rate after each step; without, the
            loss is λ / concepts · ‖W‖₁. None: 0.5 with prox, else 1e-3.
        prox: give real zeros, by the soft threshold. Without it l1 gives small numbers.
        weight: of the contrastive and the Gumbel loss.
        temperature: τ of the Gumbel loss.
        score: what its noise is added to: `logits`, or `log_softplus` of them.
        gumbel_form: `paper`; `official` is that of the authors' code, which flattens scores, to compare with.
        ce_to_cbl: the cross-entropy trains the bottleneck too.
        scale: cosines are multiplied by it. None: the encoder's own exp(logit_scale) if it has one (a CLIP's), else 20.
        center: a score is counted from its mean over the calibration rows, as if the layers had a bias (ours). Texts
            share much of their direction, and what all rows have decides nothing. Without rows, or off: as published.
        pooling: what stands for an input: `mean` of its tokens' states, or what the `head` of the dense model reads.
            auto: mean for tokens, head for images.
        seed: of the Gumbel noise, with the step.
    """

    about: ClassVar[str] = (
        "Replaces a classifier's head by two layers over named concepts (concepts=FILE, one a line), so that each "
        "decision is a sum of contributions (`sparsetrain explain`). The encoder stays frozen. For explanations: a "
        "plain head or LoRA classifies better. Not for language models."
    )
    trains_own: ClassVar[bool] = True
    stays_sparse: ClassVar[bool] = True
    ops: ClassVar[tuple[str, ...]] = ("concept_bottleneck",)

    concepts: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    loss: str = "l1"
    l1: float | None = None
    prox: bool = True
    weight: float = 0.1
    temperature: float = 1.0
    score: str = "logits"
    gumbel_form: str = "paper"
    ce_to_cbl: bool = True
    scale: float | None = None
    center: bool = True
    pooling: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        given = (self.concepts,) if isinstance(self.concepts, str) else self.concepts
        if isinstance(given, list | tuple) and len(given) == 1 and str(given[0]).endswith(ENDING):
            object.__setattr__(self, "concepts", read_concepts(given[0]))
        super().__post_init__()

    @classmethod
    def dense_limit(cls) -> Self:
        """No concepts to go through: the model's own head on the frozen encoder, which is the linear probe."""
        return cls()

    @classmethod
    def example(cls) -> Self:
        return cls(concepts=tuple(f"concept {i}" for i in range(5)), classes=("one", "two"), loss="gumbel", weight=1.0)

    @property
    def is_probe(self) -> bool:
        """Without concepts the dense head stays."""
        return not self.concepts

    @property
    def l1_in_force(self) -> float:
        """λ."""
        return self.l1 if self.l1 is not None else 0.5 if self.prox else 1e-3

    @property
    def texts(self) -> tuple[str, ...]:
        """What the encoder has to read: the concepts, then the classes."""
        return (*self.concepts, *self.classes)

    def recipe_defaults(self) -> dict[str, Any]:
        return {"lr": 1e-3}

    def check(self) -> None:
        super().check()
        name = self.method
        check_texts(name, "concepts", self.concepts, "Write each once.")
        check_texts(name, "classes", self.classes, "Describe each label in its own words.")
        for key, choices in (
            ("loss", LOSSES),
            ("gumbel_form", FORMS),
            ("score", SCORES),
            ("pooling", POOLINGS),
        ):
            one_of(name, key, getattr(self, key), choices)
        in_range(name, "l1", self.l1_in_force, 0, 1e6)
        in_range(name, "weight", self.weight, 0, 1e6)
        in_range(name, "temperature", self.temperature, 0, 1e6, low_open=True)
        if self.scale is not None:
            in_range(name, "scale", self.scale, 0, 1e6, low_open=True)
        if not self.ce_to_cbl and self.loss in ("none", "l1"):
            raise ValueError(
                f"{name}: ce_to_cbl=false with loss={self.loss!r}: the bottleneck would learn nothing of the data. "
                "Leave ce_to_cbl on, or take loss='contrastive' or 'gumbel'."
            )


def check_texts(method: str, key: str, texts: tuple[str, ...], do: str) -> None:
    """Raise ValueError if a text is blank or there twice (upper and lower case are the same)."""
    seen: dict[str, int] = {}
    for place, text in enumerate(texts, 1):
        if not text.strip():
            raise ValueError(f"{method}: {key}: entry {place} of {len(texts)} is blank. Leave it out.")
        if (first := seen.setdefault(text.strip().lower(), place)) != place:
            raise ValueError(f"{method}: {key}: {shown(text)} is there twice (entries {first} and {place}). {do}")


def read_concepts(path: str | Path) -> tuple[str, ...]:
    """The concepts of a text file: one a line; blank lines, and lines that begin with #, are left out.

    Raises:
        ValueError: the file is missing, no text, or empty; too many, or a concept twice (the message names its lines).
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(
            f"concept_bottleneck: the concepts file {shown(str(path))} cannot be read: {why}. Give a text file with "
            "one concept a line."
        ) from None
    found: dict[str, int] = {}
    concepts = []
    for number, line in enumerate(lines, 1):
        concept = line.strip()
        if not concept or concept.startswith("#"):
            continue
        if (first := found.setdefault(concept.lower(), number)) != number:
            raise ValueError(
                f"concept_bottleneck: {shown(str(path))} has {shown(concept)} twice (lines {first} and {number}). "
                "Write each concept once."
            )
        concepts.append(concept)
    if not concepts:
        raise ValueError(f"concept_bottleneck: {shown(str(path))} holds no concept. Write one a line.")
    if len(concepts) > MOST:
        raise ValueError(
            f"concept_bottleneck: {shown(str(path))} holds {len(concepts):,} concepts, and {MOST:,} are taken: the "
            "bottleneck has their number squared of weights. Keep those that matter."
        )
    return tuple(concepts)
