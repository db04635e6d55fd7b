"""The pruned linear: a child of ours on nn.Linear or GPT-2's Conv1D, which keeps its weight, bias and names, frozen.

A fused projection (q, k, v in one weight) has factors and a mask for each of its parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import LinearSite
from sparsetrain.methods.pst.config import PST
from sparsetrain.ops.masked_linear import Factors, Rule, masked_linear, masked_scores, masked_weight
from sparsetrain.ops.topk_mask import count_zeros
from sparsetrain.surgery.fingerprint import fingerprint
from sparsetrain.surgery.reclass import dense_forward
from sparsetrain.surgery.site import Site

CHILD = "pst"


class Part(nn.Module):
    """The factors of one matrix [out, in]: `ops.masked_linear.Factors`, in fp32 at least, and its number of zeros."""

    def __init__(self, weight: Tensor, config: PST) -> None:
        super().__init__()
        wide = torch.promote_types(weight.dtype, torch.float32)
        shapes = Factors.shapes(weight.shape[0], weight.shape[1], config.weight_rank, config.score_rank)
        for name, shape in zip(Factors._fields, shapes, strict=True):
            # drawn on the CPU: the same factors on every device
            drawn = torch.randn(shape, dtype=wide) if name in ("u", "a") else torch.zeros(shape, dtype=wide)
            self.register_parameter(name, nn.Parameter(drawn.to(weight.device)))
        self.zeros = count_zeros(weight.numel(), config.initial_keep_ratio)

    @property
    def factors(self) -> Factors:
        return Factors(*(getattr(self, name) for name in Factors._fields))


class PrunedLinear(Site):
    """What stands on one linear.

    Attributes:
        keep_ratio: the share of its entries that is kept now.
        allotted: the parts' zeros are those of a schedule; the first ones are made without one.
    """

    def __init__(self, linear: nn.Module, site: LinearSite, config: PST, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.config, self.transposed = config, site.transposed
        self.rule = Rule(
            weight_scale=config.weight_scale,
            score_scale=config.score_scale,
            line_scale=config.line_scale,
            detach_magnitude=config.detach_magnitude,
            pattern=config.pattern,
        )
        self._linear: list[Any] = [linear]  # in a list, or it would be a child of its own child
        self._cached: Tensor | None = None
        self.names = [role for role, _ in site.parts] or [site.role]
        self.sizes = [size for _, size in site.parts] or [site.out_features]
        for name, weight in zip(self.names, self.weights(), strict=True):
            self.add_module(name, Part(weight, config))
        self.keep_ratio, self.allotted = config.initial_keep_ratio, False
        self.base = fingerprint(self._linear[0].weight)
        if tensors:
            self.take(linear, tensors)

    @property
    def parts(self) -> list[Part]:
        return [self._modules[name] for name in self.names]  # type: ignore[misc]

    def weights(self) -> Sequence[Tensor]:
        """W [out, in] of each part, views of the linear's own weight."""
        weight = self._linear[0].weight.detach()
        return (weight.t() if self.transposed else weight).split(self.sizes)

    def scores(self) -> Iterator[Tensor]:
        """S of each part, as its mask ranks it."""
        for part, weight in zip(self.parts, self.weights(), strict=True):
            yield masked_scores(weight, part.factors, self.rule)

    @torch.compiler.disable  # the number of zeros is an argument of the selection and changes with the step
    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y = x (M ∘ W̃)ᵀ + b of all parts; without gradient, in evaluation, from a weight that is kept."""
        if not self.training and not torch.is_grad_enabled():
            if self._cached is None:
                self._cached = self.pruned()
            return nn.functional.linear(x, self._cached, bias)
        self._cached = None  # whoever trains in evaluation mode moves the factors
        biases = [None] * len(self.sizes) if bias is None else bias.split(self.sizes)
        found = [
            masked_linear(x, weight, b, part.factors, part.zeros, self.rule)
            for part, weight, b in zip(self.parts, self.weights(), biases, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def pruned(self) -> Tensor:
        """M ∘ W̃ [out, in] of the factors as they are.

        Raises:
            ValueError: as `check_base`.
        """
        self.check_base()
        found = [
            masked_weight(weight, part.factors, part.zeros, self.rule)
            for part, weight in zip(self.parts, self.weights(), strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def check_base(self) -> None:
        """Raise ValueError if the linear's weight is another than it was converted with, or than was loaded since."""
        if not self.base.is_meta and not torch.equal(self.base, fingerprint(self._linear[0].weight)):
            raise ValueError(
                f"pst: a weight {tuple(self._linear[0].weight.shape)} was changed after the conversion. An adapter "
                "merged into it (merge_adapter, merge_and_unload) is dense, so outputs would differ: unmerge, and use "
                "the adapter folder as it is."
            )

    def rebase(self) -> None:
        """The linear's weight is rightly another now: loaded, or in another format."""
        self._cached, self.base = None, fingerprint(self._linear[0].weight)

    def allot(self, keep_ratio: float, zeros: Sequence[int]) -> None:
        """Keep so much from now on; the number of zeros of each part."""
        self.keep_ratio, self.allotted, self._cached = keep_ratio, True, None
        for part, count in zip(self.parts, zeros, strict=True):
            part.zeros = count

    # ---- what a site is asked ----

    def train(self, mode: bool = True) -> Self:
        self._cached = None
        return super().train(mode)

    def settle(self) -> None:
        """For evaluation and export: the share that training has come to, of the factors as they are."""
        self._cached = None

    def held_tensors(self) -> list[Tensor]:
        return [] if self._cached is None else [self._cached]

    def undecayed(self) -> list[nn.Parameter]:
        spared = Factors._fields[2:] if self.config.decay_weight_factors else Factors._fields
        return [getattr(part, name) for part in self.parts for name in spared]

    def tensors(self) -> dict[str, Tensor]:
        found = {name: parameter.detach() for name, parameter in self.named_parameters()}
        found["num_zeros"] = torch.tensor([part.zeros for part in self.parts])
        found["keep_ratio"] = torch.tensor(self.keep_ratio, dtype=torch.float64)
        return found | {"base": self.base}

    @torch.no_grad()
    def take(self, owner: nn.Module, tensors: dict[str, Tensor]) -> None:
        own, given = dict(self.named_parameters()), dict(tensors)
        base = given.pop("base", self.base)
        if not (base.is_meta or self.base.is_meta) and int(base) != int(self.base):
            raise ValueError(
                f"its factors were trained on other weights than these {tuple(self._linear[0].weight.shape)}. Load "
                "the base model that they were trained on"
            )
        zeros = given.pop("num_zeros").tolist()
        keep_ratio = float(given.pop("keep_ratio", self.config.keep_ratio))
        for name in given:  # none, in a plan
            if given[name].shape != own[name].shape:
                raise ValueError(f"{name} is {tuple(given[name].shape)} and should be {tuple(own[name].shape)}")
            own[name].copy_(given[name])
        self.allot(keep_ratio, zeros)

    def stats(self) -> dict[str, float]:
        numel = self._linear[0].weight.numel()
        return {"keep_ratio": self.keep_ratio, "zero_ratio": sum(part.zeros for part in self.parts) / numel}

    def refuses(self, arguments: Any) -> str | None:
        if getattr(arguments, "load_best_model_at_end", False):
            return (
                "load_best_model_at_end compares checkpoints of unequal sparsity, and the least pruned one would win. "
                f"Turn it off, and choose among those of the last {self.config.last_ratio:g} of the steps"
            )
        return None

    def merge_error(self) -> str:
        return "its weights are masked and are stored dense (to_pruned writes the zeros in; so does `--format pruned`)"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.rebase()  # the linear's own weight is loaded before its children


class Pruned:
    """Mixed into a linear."""

    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        site: Any = getattr(self, CHILD)
        return dense_forward(Pruned, self, x) if site.runs_dense else site.run(x, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        site: PrunedLinear = getattr(self, CHILD)
        site.check_base()  # before a change of format would hide it
        super()._apply(fn, recurse)  # type: ignore[misc]
        site.rebase()
        return self
