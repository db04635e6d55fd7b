"""A linear that multiplies by its pruned weight and trains its dense one; mixed into nn.Linear or GPT-2's Conv1D.

y = x W̃ᵀ + b with W̃ = M ∘ W (FST, arXiv 2404.01847, section 3) or β S(W) (S-STE, arXiv 2409.09099, section 4).
`weight` and `bias` keep their names and stay dense. W̃ is made outside the forward: once an optimizer step, and where
the weights change otherwise (loading, moving, leaving training), so the forward has no state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sparsetrain.core.shards import as_shard, is_shard, whole
from sparsetrain.methods.semi_structured.config import SemiStructured
from sparsetrain.ops.nm_mask import flip_rate, nm_mask, transposable_mask
from sparsetrain.ops.soft_threshold24 import soft_scale24, soft_threshold24
from sparsetrain.ops.sparse24_linear import Packed, pack, sparse24_linear
from sparsetrain.surgery.reclass import declass, dense_forward, reclass

BUFFERS = ("mask", "beta", "flip_rate")
_ATTRIBUTES = (
    "config24",
    "transposed",
    "dense",
    "kernel",
    "algorithm",
    "packed",
    "generator",
    "awaited",
    "seen",
    "called",
)

_SAMPLE = 4096
"""Entries of a weight by which a merged adapter is noticed: its update is dense, so it changes them all."""


class Sparse24:
    """The 2:4 part of a linear. Buffers, none of them in the state dict: mask (bool, laid out as the weight), β and
    flip rate (fp32 scalars).

    Attributes:
        algorithm: cuSPARSELt's, from the measurement that chose the kernel; 0 is its own default.
        awaited: on the meta device, what mask and β are made from when the weight comes (`begin`); else None.
        seen: the weight's id and version when it was packed, and a sample of its entries. An optimizer and `copy_`
            raise the version; an adapter that is merged through `.data` changes entries alone.
        called: whether the forward has run since `Schedule24` asked.
    """

    weight: nn.Parameter
    bias: Tensor | None
    mask: Tensor
    beta: Tensor
    flip_rate: Tensor
    config24: SemiStructured
    transposed: bool
    dense: bool
    kernel: str
    algorithm: int
    packed: Packed | None
    generator: torch.Generator | None
    awaited: dict[str, Tensor] | None
    seen: tuple[int, int, Tensor] | None
    called: bool

    def forward(self, x: Tensor) -> Tensor:
        vars(self)["called"] = True
        if self.awaited is not None and not self.weight.is_meta:
            raise ValueError(
                f"semi_structured: a weight {tuple(self.weight.shape)} left the meta device without load_state_dict, "
                "so it has no mask. Fill the weights, then call handle.settle()."
            )
        if self.packed is None:
            return dense_forward(Sparse24, self, x)
        wgrad = self.config24.wgrad
        return sparse24_linear(x, self.weight, self.packed, self.bias, wgrad=wgrad, generator=self.generator)

    @property
    def groups_dim(self) -> int:
        """The dimension of the weight that runs along the inputs."""
        return 0 if self.transposed else 1

    def begin(self, tensors: dict[str, Tensor]) -> None:
        """Make the buffers: mask and β come from `tensors`, or from the weight as it is; on the meta device, later."""
        weight = self.weight.detach()
        module: Any = self
        module.register_buffer("mask", torch.zeros_like(weight, dtype=torch.bool), persistent=False)
        for name in ("beta", "flip_rate"):
            module.register_buffer(name, torch.zeros((), device=weight.device), persistent=False)
        self.beta.fill_(1.0)
        self.awaited = tensors if weight.is_meta else None
        if weight.is_meta:
            return
        if tensors:
            for name in BUFFERS:
                getattr(self, name).copy_(tensors[name])
            return
        if self.config24.mask_mode == "soft":
            self.beta.copy_(soft_scale24(weight, soft_threshold24(weight, self.groups_dim)))
        self.refresh(first=True)

    def find_mask(self) -> Tensor:
        """The mask that the present weights would have."""
        config, weight = self.config24, whole(self.weight.detach())
        if config.mask_mode == "row":
            return nm_mask(weight, dim=self.groups_dim)
        if config.mask_mode == "soft":
            return soft_threshold24(weight, self.groups_dim) != 0
        search = "greedy" if config.mask_mode == "greedy" else "exact"
        # searched as [out, in], so that ties fall alike however the weight is stored
        found = transposable_mask(weight.t() if self.transposed else weight, search=search)
        return found.t().contiguous() if self.transposed else found

    def refresh(self, *, first: bool) -> None:
        """Search the mask anew, and note the share of its entries that changed; 0 at the first."""
        found = self.find_mask()
        self.flip_rate.copy_(flip_rate(found, found if first else self.mask))
        self.mask.copy_(found)

    @torch.no_grad()
    def pruned(self) -> Tensor:
        """W̃ of the present weights, in the layout of the weight."""
        weight = whole(self.weight)
        if self.config24.mask_mode == "soft":
            return soft_threshold24(weight, self.groups_dim).mul_(self.beta.to(weight.dtype))
        # bytes convert four times as fast as bools on a CPU
        return self.mask.view(torch.uint8).to(weight.dtype).mul_(weight)

    def repack(self) -> None:
        """Make W̃ of the present weights; in the dense phase there is none."""
        if self.awaited is not None and not self.weight.is_meta:
            self.begin(self.awaited)
        if self.dense:
            self.packed = None
            return
        pruned = self.pruned()
        if self.kernel != "emulate" and pruned.dtype == torch.float32:
            pruned = pruned.to(torch.bfloat16)  # sparse tensor cores take no fp32; the master weight stays fp32
        transposable = self.config24.transposable
        form: Any = {"transposed": self.transposed, "transposable": transposable, "algorithm": self.algorithm}
        self.packed = pack(pruned, **form, backend=self.kernel)
        has_values = not (self.weight.is_meta or isinstance(self.weight, FakeTensor) or is_shard(self.weight))
        self.seen = (id(self.weight), self.weight._version, self._sample()) if has_values else None

    def _sample(self) -> Tensor:
        entries = self.weight.detach().reshape(-1)
        return entries[:: max(1, entries.numel() // _SAMPLE)].clone()

    def check_unchanged(self, *, repacks: bool) -> None:
        """Raise ValueError if the weight is another than it was packed from.

        Args:
            repacks: it is about to be packed anew, so only a change that nothing owns up to is an error: one through
                `.data`. In training too, where an optimizer may have gone on without `handle.step`.
        """
        # of a weight that is trained nothing is known: a fused optimizer moves it without counting that as a change
        if self.seen is None or self.weight.is_meta or self.weight.requires_grad:
            return
        owned_up = self.seen[:2] != (id(self.weight), self.weight._version)
        if owned_up and (repacks or self.training):  # type: ignore[attr-defined]
            return
        if not torch.allclose(self._sample(), self.seen[2], rtol=0, atol=0, equal_nan=True):
            raise ValueError(
                f"semi_structured: a weight {tuple(self.weight.shape)} was changed after it was packed as 2:4. An "
                "adapter merged into it (merge_adapter, merge_and_unload) is dense, so outputs would differ: unmerge, "
                "and use the adapter folder as it is. If the change is meant, call handle.settle()."
            )

    def reseed(self, seed: int) -> None:
        """Start the stream of MVUE draws that this step's backward passes take from."""
        if self.config24.wgrad == "mvue":
            device = self.weight.device
            self.generator = torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)

    @torch.no_grad()
    def add_masked_decay(self, decay: float) -> None:
        """g ← g + λ (1 − M) ∘ w.

        Raises:
            ValueError: the weight is frozen, so there is no gradient to add to.
        """
        if not self.weight.requires_grad:
            raise ValueError(
                f"semi_structured: decay={decay} acts on gradients, and a weight {tuple(self.weight.shape)} is frozen "
                "(LoRA?), so its mask is fixed. Set decay=0, or train the weight."
            )
        if self.weight.grad is not None:
            dropped = self.mask.logical_not().view(torch.uint8).to(self.weight.dtype)
            # masked_fill takes ten times as long
            self.weight.grad.addcmul_(as_shard(dropped, self.weight.grad), self.weight, value=decay)

    # ---- nn.Module's own: where weights change outside the optimizer ----

    def train(self, mode: bool = True) -> Self:
        if self.training and not mode:  # type: ignore[has-type]
            if self.packed is not None:
                self.check_unchanged(repacks=True)
            self.repack()  # the optimizer has moved the weights since the step's packing
        return super().train(mode)  # type: ignore[misc]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        if self.packed is not None:
            self.check_unchanged(repacks=True)
        kept = {} if self.awaited is not None else {name: getattr(self, name) for name in ("beta", "flip_rate")}
        super()._apply(fn, recurse)  # type: ignore[misc]
        if self.awaited is not None:
            return self  # to_empty: the weight holds nothing yet
        for name, value in kept.items():  # half precision would round β, which stays frozen
            setattr(self, name, value.to(self.weight.device))
        self.seen = None
        if self.weight.device.type != "meta":
            self.repack()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
        self.seen = None
        self.repack()


def make_sparse(linear: nn.Module, config: SemiStructured, transposed: bool, tensors: dict[str, Tensor]) -> Any:
    """Turn a linear into a 2:4 one in place; mask and β come from `tensors`, or from the weights as they are."""
    reclass(linear, Sparse24)
    made: Any = linear
    kernel = config.backend if config.backend not in ("auto", "emulate") else "emulate"
    vars(made).update(
        zip(_ATTRIBUTES, (config, transposed, False, kernel, 0, None, None, None, None, False), strict=True)
    )
    try:
        made.begin(tensors)
    except BaseException:
        make_dense(made)
        raise
    return made


def make_dense(linear: Any) -> None:
    """Undo `make_sparse`."""
    for name in BUFFERS:
        linear._buffers.pop(name, None)
        linear._non_persistent_buffers_set.discard(name)
    for name in _ATTRIBUTES:
        del vars(linear)[name]
    declass(linear)
