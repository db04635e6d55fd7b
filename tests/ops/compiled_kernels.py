"""Compiles our Triton kernels for GPUs that need not be here; run by test_kernels_compile.py, without the interpreter.

Prints one JSON line a kernel: its name, the channels of its heads where it is compiled for several, the capability, the
shared memory that it asks for, and the bytes of stack a thread: what registers did not hold.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsetrain.ops.block_sparse_attention import triton as attention
from sparsetrain.ops.monarch_linear import triton as monarch
from sparsetrain.ops.mvue24 import triton as draws
from sparsetrain.ops.nm_mask import triton as masks
from sparsetrain.ops.product_quantization import triton as codes
from sparsetrain.ops.selected_rows import triton as rows

TILES = {"BLOCK_Q": 128, "BLOCK_K": 128, "N": 64, "C": 128, "CAUSAL": True}
RULES = {"WINDOW": False, "PACKED": False}
CODES = {"ROWS": 64, "W": 8, "E": 16, "L1": True}
KERNELS: list[tuple[Any, dict[str, Any], int]] = [
    (attention._forward, TILES | RULES | {"M": 128}, 8),
    (attention._forward, TILES | {"WINDOW": True, "PACKED": True, "M": 128}, 8),
    (attention._backward_q, TILES | RULES | {"M": 128}, 8),
    (attention._backward_kv, TILES | RULES | {"M": 64}, 8),
    (attention._backward_kv, TILES | RULES | {"M": 32}, 8),
    (codes._encode, CODES, 4),
    (codes._histograms, CODES | {"MASKED": True}, 4),
    (monarch._products, {"ROWS": 128, "COLUMNS": 128, "INNER": 32, "BIAS": True, "PRECISION": "tf32"}, 8),
    (masks._transposable, {"TILES": 128}, 4),
    (masks._ranked, {"SIZE": 4, "PADDED": 4, "GROUPS": 256, "ABS": True}, 4),
    (draws._draw, {"WIDE": triton.language.float32, "GROUPS": 256}, 4),
]
SELECTED: list[tuple[Any, dict[str, Any]]] = [
    (rows._statistics_kernel, {"VALUES": True}),
    (rows._dq_kernel, {}),
    (rows._dkv_kernel, {"EVERYWHERE": False}),
]
POINTERS = {"lse": "fp32", "delta": "fp32", "book": "fp32", "codes": "u8", "valid": "i8", "mask": "u8"}
POINTERS |= {"row": "fp32", "column": "fp32", "offset": "fp32"}
HALF = ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "x", "w", "a_ptr", "b_ptr", "bias_ptr", "out_ptr")
NUMBERS = {"factor": "fp32", "scale": "fp32"}
LISTS = ("_counts", "_ids", "_offsets", "_rows", "segments")
STRIDE = re.compile("(q|k|v|o|do|dq|dk|dv)_[bhgks]")


def type_of(name: str, kernel: str) -> str:
    if name == "out" and kernel == "_histograms":
        return "*fp32"
    if name in POINTERS or name in HALF:
        return "*" + POINTERS.get(name, "bf16")
    return "*i32" if name.endswith(LISTS) else NUMBERS.get(name, "i32")


def type_of_selected(name: str) -> str:
    stem = name.removesuffix("_ptr")
    if stem == name:
        return NUMBERS.get(name, "i32")
    return "*i32" if stem in ("index", "count", "sequence", "looks") else "*" + POINTERS.get(stem, "bf16")


def compile_selected(capability: int, shared_bytes: int) -> None:
    """At the tiles that are launched; pointers and strides are multiples of 16, as of ordinary heads."""
    for width, looks in ((64, False), (128, False), (128, True)):
        num_rows, keys, num_warps, num_stages = rows._tiles(width, torch.bfloat16, shared_bytes)
        constants = {"ROWS": num_rows, "KEYS": keys, "D": width, "WIDTH": width, "PRECISION": "tf32", "CAUSAL": True}
        for kernel, more in SELECTED:
            given = constants | more | {"WINDOW": looks, "LOOKS": looks}
            names = kernel.arg_names
            types = {arg: "constexpr" if arg in given else type_of_selected(arg) for arg in names}
            even = [i for i, arg in enumerate(names) if arg.endswith("_ptr") or STRIDE.fullmatch(arg)]
            source = ASTSource(kernel, types, given, {(i,): [["tt.divisibility", 16]] for i in even})
            say(kernel, source, capability, {"num_warps": num_warps, "num_stages": num_stages}, channels=width)


def compile_others(capability: int) -> None:
    for kernel, constants, num_warps in KERNELS:
        name = kernel.fn.__name__
        types = {arg: "constexpr" if arg in constants else type_of(arg, name) for arg in kernel.arg_names}
        say(kernel, ASTSource(kernel, types, constants), capability, {"num_warps": num_warps, "num_stages": 2})


def say(kernel: Any, source: Any, capability: int, options: dict[str, int], **more: int) -> None:
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    line = {"kernel": kernel.fn.__name__, "capability": capability, "shared": found.metadata.shared}
    print(json.dumps(line | {"stack": stack_bytes(found.asm["cubin"])} | more), flush=True)


def stack_bytes(cubin: bytes) -> int:
    """Bytes a thread, as the object tells them."""
    reader: Any = triton.knobs.nvidia.cuobjdump
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        told = subprocess.run([reader.path, "-res-usage", str(path)], capture_output=True, text=True, check=True)
    return int(re.findall(r"STACK:(\d+)", told.stdout)[0])


if __name__ == "__main__":
    compile_selected(int(sys.argv[1]), int(sys.argv[2]))
    compile_others(int(sys.argv[1]))
