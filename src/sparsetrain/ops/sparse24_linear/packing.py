"""The pruned weight in the form its products want: dense for `emulate`, compressed by torch core for the others.

`cusparselt` and `cutlass` are torch core's semi-structured tensors: half of the values and two bits of place for each.
The input gradient multiplies by W̃, which is sparse along its other dimension, so a transposable weight is packed twice.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.core.backend import choose
from sparsetrain.core.errors import Unsupported

_KERNELS = {"cusparselt": "SparseSemiStructuredTensorCUSPARSELT", "cutlass": "SparseSemiStructuredTensorCUTLASS"}


@dataclass(frozen=True)
class Packed:
    """A pruned weight ready to multiply. It is made once an optimizer step, not once a forward.

    forward: W̃ in the layout of the dense weight, or compressed [out, in].
    backward: what dY meets for the input gradient: the same dense tensor, or W̃ᵀ compressed [in, out].
    transposed: the dense tensors are stored [in, out], as in GPT-2's Conv1D.
    """

    backend: str
    forward: Tensor
    backward: Tensor
    transposed: bool
    compressed_backward: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.forward.dtype

    def parts(self) -> list[Tensor]:
        """The tensors that hold the packed copies, each once."""
        found = {id(part): part for operand in (self.forward, self.backward) for part in _storage_of(operand)}
        return list(found.values())

    def nbytes(self) -> int:
        """Memory of the packed copies, in bytes."""
        return sum(part.numel() * part.element_size() for part in self.parts())


def pack(
    pruned: Tensor, *, transposed: bool = False, transposable: bool = False, algorithm: int = 0, backend: str = "auto"
) -> Packed:
    """Pack W̃ for `sparse24_linear`.

    Args:
        pruned: W̃ [out, in] ([in, out] with `transposed`), 2:4 along in. `emulate` keeps this very tensor.
        transposable: W̃ is 2:4 along out as well, so the input gradient can be a sparse product too.
        algorithm: cuSPARSELt's algorithm, from `torch._cslt_sparse_mm_search`.
        backend: auto and emulate (torch and reference are the same): dense matmuls of W̃, on any device and dtype.
            cusparselt, cutlass: sparse tensor cores; they never fall back.

    Raises:
        Unsupported: the named backend cannot run this weight on this device; the reason is in the message.
    """
    name = choose("sparse24_linear", backend, available(pruned, transposed))
    if name not in _KERNELS:
        return Packed("emulate", pruned, pruned, transposed)
    w_oi = pruned.t() if transposed else pruned
    forward = compress(w_oi, name, algorithm)
    if not transposable:
        return Packed(name, forward, pruned, transposed)
    return Packed(name, forward, compress(w_oi.t(), name, algorithm), transposed, compressed_backward=True)


def available(pruned: Tensor, transposed: bool = False) -> dict[str, str | None]:
    """Backend -> None, or why it cannot multiply this weight. `auto` is emulation: kernels are a measured choice."""
    shape = tuple(pruned.t().shape if transposed else pruned.shape)
    emulated = dict.fromkeys(("emulate", "torch", "reference"), None)
    kernels = {name: kernel_refusal(name, shape, pruned.dtype, pruned.device) for name in _KERNELS}
    return {**emulated, **kernels, "triton": "sparse tensor cores are reached through torch core's operators"}


def kernel_refusal(name: str, shape_oi: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why torch core's 2:4 operators cannot multiply a weight of that shape there; None if they can."""
    if device.type != "cuda":
        return f"the weight is on {device.type}, and 2:4 products need an NVIDIA GPU. Use backend='emulate'"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU is there, or torch was built without CUDA"
    found = torch.cuda.get_device_capability(device)
    if found < (8, 0):
        return f"compute capability {found[0]}.{found[1]} was found, and 2:4 products need at least 8.0"
    if name == "cutlass" and found[0] != 8:
        return f"compute capability {found[0]}.{found[1]} was found, and torch's CUTLASS products need 8.x"
    if name == "cusparselt" and not torch.backends.cusparselt.is_available():
        return "this build of torch has no cuSPARSELt"
    kind: Any = getattr(torch.sparse, _KERNELS[name], None)
    if kind is None:
        return f"torch {torch.__version__} has no torch.sparse.{_KERNELS[name]}"
    limits = kind._DTYPE_SHAPE_CONSTRAINTS.get(dtype)
    if dtype not in (torch.float16, torch.bfloat16) or limits is None:
        return f"the weight is {dtype}, and 2:4 training products take float16 and bfloat16"
    rows, columns = limits.sparse_min_rows, limits.sparse_min_cols
    step = max(rows, columns)  # packed in both orientations
    if any(size % step for size in shape_oi):
        return f"the weight is {shape_oi[0]}x{shape_oi[1]}, and both sizes must be multiples of {step}"
    return None


def compress(w: Tensor, name: str, algorithm: int = 0) -> Tensor:
    """A 2:4 matrix as torch core's semi-structured tensor.

    Raises:
        Unsupported: torch refuses it.
    """
    kind: Any = getattr(torch.sparse, _KERNELS[name])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "prototype stage", once a process
            packed = kind.from_dense(w.contiguous())
    except RuntimeError as error:
        raise Unsupported(f"{name!r} cannot pack a {tuple(w.shape)} weight: {str(error).splitlines()[0]}.") from None
    if algorithm:
        packed.alg_id_cusparselt = algorithm  # from_dense takes it since torch 2.13 only
    return packed


def multiply_forward(x_ti: Tensor, packed: Packed, operand: Tensor, bias: Tensor | None) -> Tensor:
    """x W̃ᵀ + b."""
    if packed.backend == "emulate" and packed.transposed:
        return x_ti @ operand if bias is None else torch.addmm(bias, x_ti, operand)
    return F.linear(x_ti, operand, bias)


def multiply_backward(dy_to: Tensor, packed: Packed, operand: Tensor) -> Tensor:
    """dY W̃."""
    if packed.compressed_backward or packed.transposed:
        return F.linear(dy_to, operand)
    return dy_to @ operand


def _storage_of(operand: Tensor) -> list[Tensor]:
    parts = [getattr(operand, name, None) for name in ("packed", "meta")]
    return [part for part in parts if isinstance(part, Tensor)] or [operand]
