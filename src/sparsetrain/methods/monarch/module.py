"""A linear whose weight is two block-diagonal factors, and what stands in a model in place of a dense one."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.core.config import one_of
from sparsetrain.methods.monarch.config import INITS
from sparsetrain.methods.monarch.shape import MonarchShape, shape_of
from sparsetrain.ops.monarch_linear import dense_of, monarch_linear, project, project_diagonal
from sparsetrain.surgery.site import Site

DRAWN = INITS[1:]


class MonarchLinear(nn.Module):
    """y = M x + bias with M [out, in] of two block-diagonal factors (arXiv 2204.00595, section 3).

    Inputs are padded with zeros up to whole blocks and outputs cropped. Parameters: right R [k, q, p] and left
    L [m, s, r] (`ops.monarch_linear`; no left with one factor), bias [out].

    Args:
        num_blocks: k = m.
        init: `matched`: the output variance of a dense layer with weights of `weight_std`. `fly`: Kaiming uniform,
            a = √5, by each factor's block fan-in, so 1/9 for unit inputs where nn.Linear has 1/3.
        rank: ρ of each pair of blocks; None: min(in, out) / num_blocks².
        single_factor: one block-diagonal factor.
        weight_std: None: 1 / √(3 in), that of nn.Linear.

    Raises:
        ValueError: sizes, blocks or rank that cannot be.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_blocks: int = 4,
        bias: bool = True,
        init: str = "matched",
        *,
        rank: int | None = None,
        single_factor: bool = False,
        weight_std: float | Tensor | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        one_of("MonarchLinear", "init", init, DRAWN)
        shape = shape_of(in_features, out_features, num_blocks, rank=rank, single_factor=single_factor)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        right = torch.empty(shape.right, **made)
        left = None if shape.left is None else torch.empty(shape.left, **made)
        self._hold(shape, right, left)
        self.bias = nn.Parameter(torch.zeros(out_features, **made)) if bias else None
        self.draw(init, 1 / math.sqrt(3 * in_features) if weight_std is None else weight_std)

    def _hold(self, shape: MonarchShape, right: Tensor, left: Tensor | None) -> None:
        self.shape = shape
        self.right = nn.Parameter(right)
        self.left = None if left is None else nn.Parameter(left)

    @torch.no_grad()
    def draw(self, init: str, weight_std: float | Tensor) -> None:
        """Draw the factors anew."""
        p = self.right.shape[2]
        factors = [(self.right, p)] + ([] if self.left is None else [(self.left, self.left.shape[2])])
        if init == "fly":
            for factor, fan_in in factors:
                factor.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
            return
        # a unit input gives p σ_R² = 1 in the middle, and r σ_L² = in σ² at the end
        last, fan_in = factors[-1]
        self.right.normal_(0, 1 / math.sqrt(p))
        last.normal_().mul_(weight_std * math.sqrt(self.shape.padded[0] / fan_in))

    @classmethod
    def from_dense(
        cls,
        weight_oi: Tensor,
        num_blocks: int = 4,
        bias: Tensor | None = None,
        *,
        rank: int | None = None,
        single_factor: bool = False,
    ) -> MonarchLinear:
        """The layer nearest to a dense weight [out, in] in the Frobenius norm; `lost` is ‖W − M‖² / ‖W‖².

        Raises:
            ValueError: no matrix, one that is not finite, or sizes, blocks or rank that cannot be.
        """
        if weight_oi.ndim != 2 or (bias is not None and bias.shape != weight_oi.shape[:1]):
            found = "" if bias is None else f" and a bias {tuple(bias.shape)}"
            raise ValueError(
                f"MonarchLinear.from_dense: a weight {tuple(weight_oi.shape)}{found}. Give [out, in] and [out]."
            )
        outputs, inputs = weight_oi.shape
        shape = shape_of(inputs, outputs, num_blocks, rank=rank, single_factor=single_factor)
        made = cls.of(shape, *nearest(weight_oi, shape)[:2])
        made.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return made

    @classmethod
    def of(cls, shape: MonarchShape, right: Tensor, left: Tensor | None) -> MonarchLinear:
        """The layer of given factors, without bias."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._hold(shape, right, left)
        made.bias = None
        return made

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None, columns: bool = False) -> Tensor:
        """y [..., out] of x [..., in] with a bias [out] of the caller's."""
        (inputs, outputs), shape = self.shape.padded, self.shape
        if inputs != shape.in_features:
            x = F.pad(x, (0, inputs - shape.in_features))
        if outputs == shape.out_features:
            return monarch_linear(x, self.right, self.left, bias, columns=columns)
        y = monarch_linear(x, self.right, self.left)[..., : shape.out_features]
        return y if bias is None else y + bias.to(y.dtype)

    def to_dense(self) -> Tensor:
        """The weight [out, in] that it multiplies by."""
        return dense_of(self.right, self.left)[: self.shape.out_features, : self.shape.in_features]

    def saving(self) -> dict[str, float]:
        """Stored parameters, multiply-adds a row and bytes, with the dense layer's beside them."""
        dense = self.shape.in_features * self.shape.out_features
        bias = 0 if self.bias is None else self.bias.numel()
        own = sum(parameter.numel() for parameter in (self.right, self.left) if parameter is not None)
        size = self.right.element_size()
        return {
            "params": own + bias,
            "dense_params": dense + bias,
            "macs": own,
            "dense_macs": dense,
            "bytes": (own + bias) * size,
            "dense_bytes": (dense + bias) * size,
        }

    def extra_repr(self) -> str:
        return f"{self.shape.in_features} -> {self.shape.out_features}, {self.shape}, bias={self.bias is not None}"


def nearest(weight_oi: Tensor, shape: MonarchShape) -> tuple[Tensor, Tensor | None, Tensor]:
    """R, L and the lost share of ‖W‖² of the factors of a shape that are nearest to a weight."""
    (inputs, outputs), n = shape.padded, shape.num_blocks
    padded = F.pad(weight_oi.detach(), (0, inputs - shape.in_features, 0, outputs - shape.out_features))
    if not shape.rank:
        right, lost = project_diagonal(padded, n)
        return right, None, lost
    return project(padded, n, n, shape.rank)


class MonarchSite(Site):
    """In place of a dense linear: one `MonarchLinear` for each of its parts, and the dense one's own bias.

    lost [parts]: share of ‖W‖² that the projection lost; None where factors were drawn.
    """

    lost: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self, dense: Any, parts: list[MonarchLinear], lost: Tensor | None, transposed: bool, columns: bool
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.register_parameter("bias", dense.bias)
        self.register_buffer("lost", lost, persistent=False)
        self.transposed, self.columns = transposed, columns and len(parts) == 1
        self._shell = (_without_values(dense),)  # in a tuple: it is no part of the model

    @property
    def in_features(self) -> int:
        return self._each[0].shape.in_features

    @property
    def out_features(self) -> int:
        return sum(self._widths)

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the weight that it stands for, without values."""
        return self._shell[0].weight

    @property
    def _each(self) -> list[MonarchLinear]:
        return list(self.parts)  # type: ignore[arg-type]

    @property
    def _widths(self) -> list[int]:
        return [part.shape.out_features for part in self._each]

    def forward(self, x: Tensor) -> Tensor:
        if len(self.parts) == 1:
            return self._each[0].multiply(x, self.bias, self.columns)
        biases = [None] * len(self.parts) if self.bias is None else self.bias.split(self._widths)
        return torch.cat([part.multiply(x, bias) for part, bias in zip(self._each, biases, strict=True)], -1)

    def tensors(self) -> dict[str, Tensor]:
        factors = {f"parts.{name}": value.detach() for name, value in self.parts.named_parameters()}
        return factors if self.lost is None else {**factors, "lost": self.lost}

    def dense_weight(self) -> Tensor:
        """The weight that it multiplies by, laid out as the dense linear's."""
        return joined([part.to_dense() for part in self._each], self.transposed)

    def dense_weights(self) -> dict[str, Tensor]:
        bias = {} if self.bias is None else {"bias": self.bias.detach()}
        return {"weight": self.dense_weight().detach(), **bias}

    def plain(self) -> Any:
        """A dense linear of the class that was replaced, with the same bias and a weight that is yet to be filled."""
        made: Any = copy.copy(self._shell[0])
        made._parameters = dict(made._parameters)
        shape, factor = self.weight.shape, self._each[0].right
        made.weight = nn.Parameter(torch.empty(shape, dtype=factor.dtype, device=factor.device))
        made.bias = self.bias
        return made.train(self.training)

    def stats(self) -> dict[str, float]:
        """‖W − M‖ / ‖W‖ of each part that was projected."""
        if self.lost is None:
            return {}
        names = ["relative_error"] if len(self.lost) == 1 else [f"relative_error_{i}" for i in range(len(self.lost))]
        return dict(zip(names, self.lost.sqrt().tolist(), strict=True))

    def refuses(self, arguments: Any) -> str | None:
        if self._each[0].right.requires_grad:
            return None
        return (
            "its factors are frozen, as an adapter freezes all it does not wrap, and no adapter of PEFT's wraps them. "
            "Train all weights (lora_r=0)"
        )

    def merge_error(self) -> str:
        return (
            "its dense weights were replaced by factors (export it with format 'multiplied', which multiplies them out)"
        )


def joined(parts: list[Tensor], transposed: bool) -> Tensor:
    """The dense weight of a linear of its parts' [out, in]."""
    weight = parts[0] if len(parts) == 1 else torch.cat(parts)
    return (weight.t() if transposed else weight).contiguous()


def _without_values(dense: Any) -> Any:
    """A linear of the same class and attributes, its parameters on the meta device."""
    shell = copy.copy(dense)
    shell._parameters = {
        name: None if value is None else nn.Parameter(value.detach().to("meta"))
        for name, value in dense._parameters.items()
    }
    return shell
