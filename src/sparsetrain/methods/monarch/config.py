"""Monarch, MonarchThenDense: what training with Monarch linears is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from sparsetrain.core.config import MethodConfig, in_range, one_of
from sparsetrain.core.fields import shown

INITS = ("project", "matched", "fly")
ROLES = ("q", "k", "v", "o", "up", "gate", "down")


@dataclass(frozen=True, kw_only=True)
class Monarch(MethodConfig, method="monarch"):
    """Replace linears by Monarch matrices (arXiv 2204.00595): fewer weights and operations, in plain products.

    Args:
        num_blocks: blocks of both factors; a multiple of a linear's features is reached by zeros. 1 leaves it dense.
        roles: which linears, among q, k, v, o (attention) and up, gate, down (FFN); fused ones are taken part by part.
        init: `project`: the factors nearest to the weight that is there (D2S), for a trained model. `matched`: drawn
            anew with the output variance of the weight that is there, for training from the start. `fly`: drawn as the
            authors' code does, a third of that variance of nn.Linear's.
        keep_ratio: weights kept of each linear, in (0, 1], as near below as whole ranks allow. None: as published,
            rank min(in, out) / num_blocks² a pair of blocks: 0.5 of a square linear at 4 blocks, 0.31 of d -> 4 d.
        single_factor: one block-diagonal factor, no permutation: 1 / num_blocks of the weights. Not a Monarch matrix;
            the plan and the report call it block-diagonal.
        tokens: rows of one forward (batch size times sequence length) at which it is timed whether a linear pays.
        force: take linears that are slower so here, rather than refuse.
    """

    about: ClassVar[str] = (
        "Replaces linears by two block-diagonal factors (num_blocks, roles; init=matched from random weights, "
        "init=project of trained ones), for fewer weights and faster steps at widths from some 512. A trained model "
        "loses quality and wants all its weights trained again (lora_r=0, deploy=sparse). Not for small layers."
    )
    ops: ClassVar[tuple[str, ...]] = ("monarch_linear",)
    stays_sparse: ClassVar[bool] = True
    refused_if_slower: ClassVar[bool] = True

    num_blocks: int = 4
    roles: tuple[str, ...] = ROLES
    init: str = "project"
    keep_ratio: float | None = None
    single_factor: bool = False
    tokens: int = 2048
    force: bool = False

    @classmethod
    def dense_limit(cls) -> Self:
        return cls(num_blocks=1)

    @classmethod
    def example(cls) -> Self:
        return cls(num_blocks=2, force=True)

    def recipe_defaults(self) -> dict[str, Any]:
        return {"lora_r": 0}

    @property
    def replaces(self) -> bool:
        """Whether anything is replaced."""
        return self.num_blocks > 1

    def check(self) -> None:
        super().check()
        name = self.method
        one_of(name, "init", self.init, INITS)
        if not self.roles:
            raise ValueError(f"{name}: roles is empty. Give some of {', '.join(ROLES)}.")
        for role in self.roles:
            one_of(name, "roles", role, ROLES)
        for key in ("num_blocks", "tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"{name}: {key}={getattr(self, key)}; it must be at least 1.")
        if self.keep_ratio is not None:
            in_range(name, "keep_ratio", self.keep_ratio, 0, 1, low_open=True)
            if self.single_factor:
                raise ValueError(
                    f"{name}: keep_ratio={shown(self.keep_ratio)} with single_factor, which keeps 1 / num_blocks. "
                    "Leave one out."
                )


@dataclass(frozen=True, kw_only=True)
class MonarchThenDense(Monarch, method="monarch_then_dense"):
    """Train with Monarch linears first, then multiply them out and go on dense (S2D), as two stages of a run.

    The product is a plain dense model. At the switch the loss stays what it is; Adam's state of the weights that were
    replaced starts anew (the paper is silent), that of all others and the learning rate go on.

    Args:
        dense_share: share of the steps that train dense, at the end: 0.1 for GPT-2 and 0.3 for BERT as published.
        restart_lr: warm up once more at the switch, and let the learning rate fall over the dense steps.
    """

    about: ClassVar[str] = (
        "Pre-trains with Monarch linears and goes on dense for the last dense_share of the steps: a plain dense model "
        "in less time, at widths from some 512. For training from random weights."
    )
    grows: ClassVar[bool] = True
    changes_outputs: ClassVar[bool] = False

    init: str = "matched"
    dense_share: float = 0.1
    restart_lr: bool = False

    def check(self) -> None:
        super().check()
        if not 0 < self.dense_share < 1:
            raise ValueError(
                f"{self.method}: dense_share={self.dense_share} is out of range. It must lie between 0 and 1; for a "
                "run that stays Monarch use monarch, for a dense one no method."
            )
