"""Frozen weights in 4 bits (NF4 of bitsandbytes, QLoRA, arXiv 2305.14314) or 8: what loads them, and whether it can
here."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

_DEVICES = ("cpu", "cuda")


def import_bitsandbytes() -> None:
    """Import bitsandbytes, as PEFT does wherever it is installed, and nothing from the hub with it.

    On a CPU with AVX512-BF16, 0.50 fetches a compiled kernel as it is imported, where the package `kernels` is
    installed. It is of a product without a gradient, which is not used here (`keep_unpacked`).
    """
    if "bitsandbytes" in sys.modules or find_spec("bitsandbytes") is None:
        return
    log, known = logging.getLogger("bitsandbytes.backends.cpu.ops"), sys.modules.get("kernels")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns where it has none
    sys.modules["kernels"] = None  # type: ignore[assignment]  # importing it is an ImportError now
    try:
        with suppress(ImportError):  # whoever needs it says so
            import_module("bitsandbytes")
    finally:
        log.setLevel(level)
        del sys.modules["kernels"]
        if known is not None:
            sys.modules["kernels"] = known


def check_bits(bits: int, device: torch.device) -> None:
    """Raise ValueError if bitsandbytes is not installed, or has no linears of 4 or 8 bits for the device."""
    key = f"load_in_{bits}bit"
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"{key} needs bitsandbytes, which is not installed (pip install bitsandbytes).")
    import_bitsandbytes()
    if device.type not in _DEVICES:
        raise ValueError(f"{key}: bitsandbytes has no {bits}-bit weights on {device.type}. Give device=cuda or cpu.")


def bit_options(bits: int | None, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told: NF4 with its scales quantised again, computed in `dtype`, or int8 by rows of the
    weight and of what comes in (LLM.int8, arXiv 2208.07339); not the head. None: nothing."""
    if bits is None:
        return {}
    if bits == 8:  # its products are of fp16, which it would say in every layer of every step
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}}
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def held_bits(source: str, about: Mapping[str, Any], flags: Mapping[str, Any], device: torch.device) -> int | None:
    """The bits in which a trained model is to be held, as asked, else as it was trained (about: its sidecar); None: as
    its files are.

    Args:
        flags: `load_in_4bit` and `load_in_8bit`: True, False, or None where nothing was asked.

    Raises:
        ValueError: it cannot be held so here; or it was asked of a model that was trained otherwise.
    """
    trained = next((bits for bits in (4, 8) if about.get(f"load_in_{bits}bit") is True), None)
    for bits in (4, 8):
        if flags[f"load_in_{bits}bit"] and trained != bits:
            raise ValueError(
                f"load_in_{bits}bit: {source} is no adapter that was trained on weights in {bits} bits. Leave it out."
            )
    if trained is None or flags[f"load_in_{trained}bit"] is False:
        return None
    try:
        check_bits(trained, device)
    except ValueError as error:
        off = "--no-load-in-4bit" if trained == 4 else "--no-load-in-8bit"
        raise ValueError(
            f"{source} was trained on weights in {trained} bits: {error} Or give {off}, to use the adapter on the "
            "weights of the model's files, where its loss is another."
        ) from None
    return trained


def keep_unpacked(model: nn.Module) -> None:
    """Let evaluation leave a model's 4-bit weights as they are.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks them at the first forward in evaluation mode, for a product
    that has no gradient: what is trained after an evaluation would get none through that layer, with a warning alone.
    That product is one of bf16, so that a run and its evaluation elsewhere would not come to one loss.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
