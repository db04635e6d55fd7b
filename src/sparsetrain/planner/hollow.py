"""Hollow tensors: floating-point tensors have shapes and no values, integers and booleans are real.

PyTorch's fake tensors alone cannot trace what chooses: a router's loads, a list of key blocks, a selected token are
read on the host. So here integer and boolean tensors are computed. Where an integer would follow from floating-point
values (the indices of a sort or a top-k, an arg-max) it is drawn: sorts give random permutations, so every choice is as
if the scores were random, loads are about even and lists are full. A comparison of floating-point values is False. That
is what a memory or FLOP count wants to know of a choice, and no method needs a table of its own.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from sparsetrain.planner.known_shapes import known_shapes

try:
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
        in_kernel_invocation_manager,
    )
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only
except ImportError as error:
    raise ValueError(
        f"plan follows a step on PyTorch's own fake tensors, and torch {torch.__version__} has them in another place "
        f"({error}). It is known to work with torch 2.11 to 2.13. Training needs no plan: give --preset dense, or a "
        "method."
    ) from error

MOST_VALUES = 2**22
"""Integer tensors above this size (4 M values) are hollow too: at 32k tokens a dense mask would be 1 GiB."""

_aten = torch.ops.aten
_SORTS = {_aten.sort.default, _aten.sort.stable, _aten.topk.default, _aten.argsort.default, _aten.argsort.stable}
_ARGS = {_aten.argmax.default, _aten.argmin.default, _aten.max.dim, _aten.min.dim}
_GROUPED = _aten._grouped_mm.default
_READS = (DynamicOutputShapeException, DataDependentOutputException)
_PLAIN_NAMES = """
    mm bmm addmm baddbmm add add_ sub mul mul_ div div_ neg pow rsqrt reciprocal exp log sqrt square mean sum amax
    silu silu_backward gelu gelu_backward sigmoid sigmoid_backward tanh tanh_backward relu threshold_backward
    _softmax _softmax_backward_data _log_softmax _log_softmax_backward_data logsumexp
    t transpose permute view _unsafe_view expand slice select unsqueeze squeeze as_strided split split_with_sizes
    cat clone detach copy_ fill_ zero_ masked_fill masked_fill_
"""
_PLAIN = {
    getattr(getattr(_aten, name), overload)
    for name in _PLAIN_NAMES.split()
    for overload in getattr(_aten, name).overloads()
}
"""Operations whose meta kernel says all there is to say; asking it directly takes a third of the fake mode's time."""
_CPU = torch.device("cpu")


class Hollow(TorchDispatchMode):
    """Inside this mode new floating-point tensors are hollow; `with Hollow(): ...` traces a training step.

    `after`, if set, is called with every op and its results. `to_host`: bytes that were moved to the CPU's memory and
    back (`planner.host`). `most_calls`: more operations than this are a ValueError.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.seed = seed
        self.random = torch.Generator()
        self.after: Any = None
        self.to_host = 0
        self.calls, self.most_calls = 0, 0
        self.known = known_shapes()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here, and guarding each of 10,000 calls against it takes a tenth

    def moved(self, size: int) -> None:
        """So many bytes went to the CPU's memory, or came back."""
        self.to_host += size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if 0 < self.most_calls < self.calls:
            raise ValueError(
                f"its step takes more than {self.most_calls:,} operations, token by token: what it keeps is not known"
            )
        out = self._run(func, args, kwargs or {})
        if self.after is not None:
            self.after(func, args, kwargs or {}, out)
        return out

    def _run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.prim.device.default:  # a third of all calls
            return _CPU
        key = self.known.key(func, args, kwargs)
        if key is not None and (known := self.known.get(key, args, self._hollow)) is not None:
            return known
        out = self._asked(func, args, kwargs)
        if key is not None:
            self.known.put(key, args, tensors_in((args, kwargs)), out)
        return out

    def _asked(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        given = tensors_in((args, kwargs))
        hollow = sum(isinstance(x, FakeTensor) for x in given)
        if hollow and hollow == len(given) and func in _PLAIN:
            return self._by_meta_kernel(func, args, kwargs)
        real = not hollow
        if func is _aten._local_scalar_dense.default and not real:
            return _a_value(args[0].dtype)
        if real and given and _stays_small(given):
            out = func(*args, **kwargs)
            if not any(x.is_floating_point() for x in tensors_in(out)):
                return out
        if not real and func is _aten.index.Tensor:
            args = (args[0], [_positions(x) for x in args[1]])
        # made outside the fake mode, in which a meta tensor is one of a meta device
        shapes = tree_map_only(Tensor, self._without_values, (args, kwargs)) if real and func in _PLAIN else ((), {})
        try:
            with self.fake:
                if func is _GROUPED:
                    out = self._as_bf16(func, args, kwargs)
                elif real and func in _PLAIN:  # given values, the fake mode computes with them: a mask of 16 M in .1 s
                    out = func(*shapes[0], **shapes[1])
                else:
                    out = func(*args, **kwargs)
        except _READS:
            if not real:
                raise
            out = None
        results = tensors_in(out)
        if real and all(_has_values(x) for x in results):
            return func(*args, **kwargs)
        if all(x.is_floating_point() for x in results):
            return out
        return tree_map_only(FakeTensor, lambda x: self._drawn(func, args, kwargs, x), out)

    def _as_bf16(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """A product by groups (a mixture of experts): its meta kernel knows bf16 alone, real ones know fp32 too."""
        halves = tree_map_only(Tensor, lambda x: x.bfloat16() if x.is_floating_point() else x, (args, kwargs))
        return func(*halves[0], **halves[1]).to(args[0].dtype)

    def _by_meta_kernel(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        with in_kernel_invocation_manager(self.fake):
            out = func(*args, **kwargs)
        if isinstance(out, (tuple, list)):
            return type(out)(self._hollow(x) for x in out)
        return self._hollow(out)

    def _without_values(self, x: Tensor) -> Any:
        return self._hollow(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"))

    def _hollow(self, x: Any) -> Any:
        return FakeTensor(self.fake, x, _CPU) if isinstance(x, Tensor) and not isinstance(x, FakeTensor) else x

    def _drawn(self, func: Any, args: Any, kwargs: dict[str, Any], like: Tensor) -> Tensor:
        """Values for an integer result that follows from floating-point ones."""
        if not _has_values(like):
            return like
        shape = like.shape
        # the same draw for the same question, so that a recomputed block chooses as it did in its forward
        self.random.manual_seed(zlib.crc32(f"{self.seed} {func} {tuple(shape)}".encode()))
        if like.dtype == torch.bool:
            return torch.zeros(shape, dtype=torch.bool)
        if func in _SORTS:
            return self._permutations(func, args, kwargs, shape).to(like.dtype)
        if func in _ARGS:
            size = args[0].numel() if len(args) < 2 or args[1] is None else args[0].shape[args[1]]
            return torch.randint(max(1, size), shape, generator=self.random, dtype=torch.int64).to(like.dtype)
        if func is _aten.view.dtype:
            return torch.randint(2**30, shape, generator=self.random, dtype=torch.int64).to(like.dtype)
        return torch.zeros(shape, dtype=like.dtype)

    def _permutations(self, func: Any, args: tuple, kwargs: dict[str, Any], shape: torch.Size) -> Tensor:
        """Random orders along the sorted dimension; for a top-k their first k."""
        if not shape:
            return torch.zeros(shape, dtype=torch.int64)
        named = {argument.name: args[i] for i, argument in enumerate(func._schema.arguments[: len(args)])} | kwargs
        dim = named.get("dim", -1)
        size = list(shape)
        size[dim] = args[0].shape[dim]
        if torch.Size(size).numel() > 8 * MOST_VALUES:  # 32 M random numbers take a second: here order is not needed
            return torch.randint(size[dim], shape, generator=self.random)
        return torch.rand(size, generator=self.random).argsort(dim).narrow(dim, 0, shape[dim])


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among an operation's arguments or results, in order."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (tuple, list)):
        return []
    found = []
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (tuple, list, dict)):
            found += tensors_in(x)
    return found


def _has_values(x: Tensor) -> bool:
    return not x.is_floating_point() and not x.is_complex() and x.numel() <= MOST_VALUES


def _stays_small(given: list[Tensor]) -> bool:
    """Whether an op on these integers can be run before the size of its result is known."""
    bound = 1
    for x in given:
        if x.is_floating_point():
            return False
        bound *= max(1, x.numel())
    return bound <= MOST_VALUES


def _positions(index: Any) -> Any:
    """A boolean index of real values as integers, so that the result's shape is known."""
    if not isinstance(index, Tensor) or index.dtype != torch.bool or isinstance(index, FakeTensor):
        return index
    return index.nonzero().squeeze(1) if index.ndim == 1 else index


def _a_value(dtype: torch.dtype) -> Any:
    if dtype.is_floating_point:
        return 1.0
    return False if dtype == torch.bool else 0
