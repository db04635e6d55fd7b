"""Why a classifier decided as it did, as plain values: a method says it, `measure` draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A decision that is a sum over named concepts.

    concepts: names [d]. scores: how well the input fits each [d]. activations: what the bottleneck makes of them [d].
    classes: names [c]. contributions: of each concept to each class's logit [c][d]; a logit is the sum of its row.
    also: other ways to decide -> the class that they choose.
    """

    subject: str
    concepts: Sequence[str]
    scores: Sequence[float]
    activations: Sequence[float]
    classes: Sequence[str]
    logits: Sequence[float]
    contributions: Sequence[Sequence[float]]
    also: dict[str, str]

    @property
    def decided(self) -> int:
        """The class with the largest logit."""
        return max(range(len(self.logits)), key=lambda c: self.logits[c])

    @property
    def runner_up(self) -> int:
        """The class with the next largest logit."""
        return max((c for c in range(len(self.logits)) if c != self.decided), key=lambda c: self.logits[c])

    @property
    def probabilities(self) -> list[float]:
        top = max(self.logits)
        powers = [math.exp(logit - top) for logit in self.logits]
        return [power / sum(powers) for power in powers]

    @property
    def lead(self) -> float:
        """The winner's logit over the runner-up's."""
        return self.logits[self.decided] - self.logits[self.runner_up]

    def leads(self) -> list[tuple[str, float]]:
        """(concept, what it adds to the lead), the largest first; they sum to `lead`."""
        won, lost = self.contributions[self.decided], self.contributions[self.runner_up]
        found = [(name, a - b) for name, a, b in zip(self.concepts, won, lost, strict=True)]
        return sorted(found, key=lambda pair: -abs(pair[1]))

    def counted(self) -> int:
        """Concepts that add anything at all."""
        return sum(value != 0 for _, value in self.leads())

    def effective(self) -> float:
        """exp(entropy) of the shares of |what each adds to the lead|: how many concepts carry the decision."""
        sizes = [abs(value) for _, value in self.leads()]
        total = sum(sizes)
        shares = [size / total for size in sizes if size > 0] if total else []
        return math.exp(-sum(share * math.log(share) for share in shares)) if shares else 0.0

    def to_dict(self, top: int | None = None) -> dict[str, Any]:
        """Plain values, with the `top` concepts that count most; `rest` is what all others add."""
        leads = self.leads()
        place = {name: i for i, name in enumerate(self.concepts)}
        kept = leads[:top]
        shown = [
            {
                "concept": name,
                "lead": value,
                "score": self.scores[place[name]],
                "activation": self.activations[place[name]],
                "contributions": {c: self.contributions[i][place[name]] for i, c in enumerate(self.classes)},
            }
            for name, value in kept
        ]
        return {
            "subject": self.subject,
            "decided": self.classes[self.decided],
            "probability": self.probabilities[self.decided],
            "runner_up": self.classes[self.runner_up],
            "lead": self.lead,
            "logits": dict(zip(self.classes, self.logits, strict=True)),
            "concepts": shown,
            "rest": sum(value for _, value in leads[len(kept) :]),
            "counted": self.counted(),
            "effective": self.effective(),
            "also": dict(self.also),
        }
