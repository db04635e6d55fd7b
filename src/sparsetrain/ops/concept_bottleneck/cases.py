"""Sizes of a concept bottleneck, read by the tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Case:
    """Rows of classes that are sparse sets of concepts, embedded with noise."""

    name: str
    rows: int
    concepts: int
    classes: int
    width: int
    noise: float = 0.35
    concepts_of_class: int = 6

    def tensors(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(rows [b, w], concepts [d, w], classes [c, w], labels [b]); embeddings have length 1."""
        generator = torch.Generator().manual_seed(seed)
        concepts = F.normalize(torch.randn(self.concepts, self.width, generator=generator), dim=-1)
        chosen = torch.stack(
            [torch.randperm(self.concepts, generator=generator)[: self.concepts_of_class] for _ in range(self.classes)]
        )
        classes = F.normalize(concepts[chosen].sum(1), dim=-1)
        labels = torch.randint(self.classes, (self.rows,), generator=generator)
        noise = torch.randn(self.rows, self.width, generator=generator) * self.noise / self.width**0.5
        return F.normalize(classes[labels] + 2 * noise, dim=-1), concepts, classes, labels


TINY = (
    Case(name="ten_classes", rows=400, concepts=60, classes=10, width=64),
    Case(name="two_classes", rows=64, concepts=9, classes=2, width=16, noise=0.15, concepts_of_class=3),
)
REAL = (
    Case(name="minilm", rows=128, concepts=100, classes=2, width=384),
    Case(name="clip", rows=128, concepts=1000, classes=200, width=768),
)
