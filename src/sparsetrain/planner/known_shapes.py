"""KnownShapes: what an operation on tensors of these shapes gives, asked of PyTorch once and then remembered.

A trace runs the same block at every length, in every piece of a tiled FFN, in forward and recomputation and for every
way to train. PyTorch's fake tensors take .2 to 8 ms for an operation, in Python; what is known takes a tenth of that.
Only operations are remembered that give new floating-point tensors, or write into one, and whose result follows from
shapes, strides and dtypes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def _overloads(names: str) -> set[Any]:
    packets = [getattr(_aten, name) for name in names.split()]
    return {getattr(packet, overload) for packet in packets for overload in packet.overloads()}


_WRITE = _overloads(
    "add_ sub_ mul_ div_ neg_ tanh_ copy_ fill_ zero_ masked_fill_ scatter_add_ addmm_ index_copy_ index_add_"
)
_MAKE = _overloads("""
    mm bmm addmm baddbmm add sub mul div neg pow rsqrt reciprocal exp log sqrt square mean sum amax rsub
    silu silu_backward gelu gelu_backward sigmoid sigmoid_backward tanh tanh_backward relu threshold_backward
    _softmax _softmax_backward_data _log_softmax _log_softmax_backward_data logsumexp softplus softplus_backward
    cat stack clone _to_copy masked_fill where gather scatter_add index_select embedding embedding_dense_backward
    slice_backward select_backward cos sin maximum minimum native_dropout native_dropout_backward
    native_layer_norm native_layer_norm_backward _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_flash_attention_for_cpu_backward
    empty empty_like empty_strided new_empty new_empty_strided zeros zeros_like new_zeros ones ones_like new_ones
    full full_like new_full
""")

Made = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, stride and dtype of a new tensor."""


class KnownShapes:
    """Results by operation, shapes and plain values."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[bool, tuple[Made, ...]]] = {}

    def key(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the result depends on; None for what is not remembered."""
        if func not in _MAKE and func not in _WRITE:
            return None
        key = func, torch.get_default_dtype(), _plain(args), _plain(tuple(kwargs.items())) if kwargs else ()
        try:
            hash(key)
        except TypeError:  # a generator
            return None
        return key

    def get(self, key: Any, args: tuple, tensor: Callable[[Tensor], Tensor]) -> Any:
        """What was remembered: new tensors, of which `tensor` makes one from a meta tensor, or the one written into;
        None if nothing was."""
        found = self._known.get(key)
        if found is None:
            return None
        single, parts = found
        if not parts:
            return args[0]
        made = [tensor(torch.empty_strided(size, step, dtype=dtype, device="meta")) for size, step, dtype in parts]
        return made[0] if single else tuple(made)

    def put(self, key: Any, args: tuple, given: list[Tensor], out: Any) -> None:
        """Remember a result: tensors that are new, each the whole of its storage, or the first argument."""
        if key[0] in _WRITE:
            if out is args[0] and out.is_floating_point():
                self._known[key] = True, ()
            return
        single = isinstance(out, Tensor)
        parts = (out,) if single else out
        if not isinstance(parts, tuple) or not all(map(_fills_its_storage, parts)):
            return
        theirs, new = ({x.untyped_storage()._cdata for x in tensors} for tensors in (given, parts))
        if len(new) == len(parts) and not theirs & new:
            self._known[key] = single, tuple((tuple(x.shape), x.stride(), x.dtype) for x in parts)


@cache
def known_shapes() -> KnownShapes:
    """Those of this process."""
    return KnownShapes()


def _plain(value: Any) -> Any:
    """Of a tensor its kind, shape, stride and dtype; of a value its type, too, since 1, 1.0 and True are equal."""
    if isinstance(value, Tensor):
        return type(value), value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_plain, value))
    return type(value), value


def _fills_its_storage(x: Any) -> bool:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.storage_offset():
        return False
    last = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return x.untyped_storage().nbytes() == (0 if 0 in x.shape else (last + 1) * x.element_size())
