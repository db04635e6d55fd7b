"""Train sparse, deploy dense: the product of a run is the dense model, and sparsity is how it was trained.

In evaluation mode every site computes what the dense model computes, so whatever evaluates, generates or exports has
the deployed model before it. What a method added (routers, codebooks) is fitted before training and then stays: it is
not part of the product, and training it would only repair a forward that is thrown away.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sparsetrain.core.config import MethodConfig

if TYPE_CHECKING:
    from sparsetrain.surgery.method import Edit
    from sparsetrain.surgery.site import Site


@dataclass(frozen=True, kw_only=True)
class DeployDense:
    """How a model is trained that will be used dense.

    Args:
        dense_first: share of the run's steps, in [0, 1), that train dense at its beginning. None: .05 for a method that
            changes what the forward computes, 0 for one that changes gradients alone.
        dense_last: the same at its end. None: .2, or 0.
        train_auxiliary: train what the methods added too, instead of leaving it as it was fitted.

    Raises:
        ValueError: a share is out of range, or nothing is left between the two.
    """

    dense_first: float | None = None
    dense_last: float | None = None
    train_auxiliary: bool = False

    def __post_init__(self) -> None:
        for name, value in (("dense_first", self.dense_first), ("dense_last", self.dense_last)):
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name}={value} is out of range. It is a share of the steps, in [0, 1).")
        if (self.dense_first or 0) + (self.dense_last or 0) >= 1:
            raise ValueError(
                f"dense_first={self.dense_first} and dense_last={self.dense_last} leave no step to train sparse. "
                "Lower one, or train without the method."
            )

    def begin(self, installed: Iterable[tuple[Edit, Site]]) -> None:
        """Let evaluation be dense, and what was added stay as it was fitted unless it is to be trained."""
        from sparsetrain.surgery.method import method_of  # imports torch, which a plan need not wait for

        for edit, module in installed:
            module.deploys_dense = True
            module.train(module.training)
            for name in () if self.train_auxiliary else method_of(edit.config).modules_to_save:
                module.get_submodule(name).requires_grad_(False)

    def is_dense(self, config: MethodConfig, step: int, total_steps: int | None) -> bool:
        """Is the step after `step` steps of `total_steps` a dense one for a method? A pure function of its arguments:
        a run that goes on is where it was. Without a known length no step is."""
        if not total_steps:
            return False
        first = self.dense_first if self.dense_first is not None else 0.05 * config.changes_outputs
        last = self.dense_last if self.dense_last is not None else 0.2 * config.changes_outputs
        return step < round(first * total_steps) or step >= total_steps - round(last * total_steps)


Deploy = Literal["sparse", "dense"] | DeployDense


def deployment(deploy: Deploy) -> DeployDense | None:
    """How a model is deployed dense; None for sparse.

    Raises:
        ValueError: neither `sparse` nor `dense`.
    """
    if isinstance(deploy, DeployDense) or deploy == "sparse":
        return deploy if isinstance(deploy, DeployDense) else None
    if deploy != "dense":
        raise ValueError(f"deploy={deploy!r} is unknown. Choose 'dense', 'sparse', or a DeployDense.")
    return DeployDense()
