"""Compiles our Triton kernels for GPUs that need not be here; run by test_kernels_compile.py, without the interpreter.

Prints one JSON line a kernel: its name, the capability, and the shared memory that it asks for.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsetrain.ops.block_sparse_attention import triton as attention
from sparsetrain.ops.monarch_linear import triton as monarch
from sparsetrain.ops.product_quantization import triton as codes

TILES = {"BLOCK_Q": 128, "BLOCK_K": 128, "N": 64, "C": 128, "CAUSAL": True}
RULES = {"WINDOW": False, "PACKED": False}
CODES = {"ROWS": 64, "W": 8, "E": 16, "L1": True}
KERNELS = [
    (attention._forward, TILES | RULES | {"M": 128}, 8),
    (attention._forward, TILES | {"WINDOW": True, "PACKED": True, "M": 128}, 8),
    (attention._backward_q, TILES | RULES | {"M": 128}, 8),
    (attention._backward_kv, TILES | RULES | {"M": 64}, 8),
    (codes._encode, CODES, 4),
    (codes._histograms, CODES | {"MASKED": True}, 4),
    (monarch._products, {"ROWS": 128, "COLUMNS": 128, "INNER": 32, "BIAS": True, "PRECISION": "tf32"}, 8),
]
POINTERS = {"lse": "fp32", "delta": "fp32", "book": "fp32", "codes": "u8", "valid": "i8"}
HALF = ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "x", "a_ptr", "b_ptr", "bias_ptr", "out_ptr")
NUMBERS = {"factor": "fp32", "scale": "fp32"}
LISTS = ("_counts", "_ids", "_offsets", "_rows", "segments")


def type_of(name: str, kernel: str) -> str:
    if name == "out" and kernel == "_histograms":
        return "*fp32"
    if name in POINTERS or name in HALF:
        return "*" + POINTERS.get(name, "bf16")
    return "*i32" if name.endswith(LISTS) else NUMBERS.get(name, "i32")


def compile_for(capability: int) -> None:
    for kernel, constants, num_warps in KERNELS:
        name: Any = kernel.fn.__name__  # type: ignore[attr-defined]
        names = kernel.arg_names  # type: ignore[attr-defined]
        types = {arg: "constexpr" if arg in constants else type_of(arg, name) for arg in names}
        source = ASTSource(kernel, types, constants)  # type: ignore[arg-type]
        options = {"num_warps": num_warps, "num_stages": 2}
        found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        print(json.dumps({"kernel": name, "capability": capability, "shared": found.metadata.shared}), flush=True)


if __name__ == "__main__":
    compile_for(int(sys.argv[1]))
