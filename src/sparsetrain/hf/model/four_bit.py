"""Frozen weights in 4 bits (NF4 of bitsandbytes, QLoRA, arXiv 2305.14314): what loads them, and whether it can here."""

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


def check_four_bit(device: torch.device) -> None:
    """Raise ValueError if bitsandbytes is not installed, or has no 4-bit linears for the device."""
    if find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit needs bitsandbytes, which is not installed (pip install bitsandbytes).")
    import_bitsandbytes()
    if device.type not in _DEVICES:
        raise ValueError(f"load_in_4bit: bitsandbytes has no 4-bit weights on {device.type}. Give device=cuda or cpu.")


def four_bit_options(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told: NF4 with its scales quantised again, computed in `dtype`; not the head."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def held_in_four_bit(source: str, about: Mapping[str, Any], asked: bool | None, device: torch.device) -> bool:
    """Is a trained model to be held in 4 bits: as asked, else as it was trained (about: its sidecar).

    Raises:
        ValueError: it is, and cannot be here; or it was asked of a model that was trained otherwise.
    """
    trained = about.get("load_in_4bit") is True
    if asked and not trained:
        raise ValueError(f"load_in_4bit: {source} is no adapter that was trained on weights in 4 bits. Leave it out.")
    held = trained if asked is None else asked
    if held:
        try:
            check_four_bit(device)
        except ValueError as error:
            raise ValueError(
                f"{source} was trained on weights in 4 bits: {error} Or give --no-load-in-4bit, to use the adapter on "
                "the weights of the model's files, where its loss is another."
            ) from None
    return held


def keep_unpacked(model: nn.Module) -> None:
    """Let evaluation leave a model's 4-bit weights as they are.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks them at the first forward in evaluation mode, for a product
    that has no gradient: what is trained after an evaluation would get none through that layer, with a warning alone.
    That product is one of bf16, so that a run and its evaluation elsewhere would not come to one loss.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
