"""What is known not to go together, as data: one row a package or setting, with what to do.

Looked up in September 2026. Which versions a package asks for is not written here: `doctor` reads it off what is
installed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """A package that is noted when it is installed in a version within [at_least, below) ("" = no bound)."""

    package: str
    effect: str
    do: str
    at_least: str = ""
    below: str = ""


KNOWN: tuple[Known, ...] = (
    Known("unsloth", "replaces forwards of transformers for the whole process", "keep it in another environment"),
    Known("axolotl", "pins a transformers of its own", "override its pin; our plugin: docs/others.md"),
    Known(
        "liger-kernel",
        "use_liger_kernel=True rebinds FFN forwards when training starts",
        "with a method on FFNs, switch its swiglu kernel off (liger_kernel_config)",
    ),
    Known(
        "bitsandbytes",
        "of the methods token selection and the concept bottleneck alone run on its 4-bit and 8-bit linears",
        "load the model in bf16 or fp32 for the others; its 8-bit AdamW is fine",
    ),
    Known(
        "deepspeed",
        "ZeRO's sharded weights have not been tried with any method, and its sparse attention needs triton 1.0.0",
        "train on one device",
    ),
)


@dataclass(frozen=True)
class Setting:
    """An environment variable that is noted when it has this value."""

    variable: str
    value: str
    effect: str
    do: str


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "TRITON_INTERPRET",
        "1",
        "kernels run in the interpreter, thousands of times slower, and bf16 products are wrong there",
        "unset it",
    ),
    Setting("CUDA_LAUNCH_BLOCKING", "1", "every kernel waits for the one before", "unset it, unless you are debugging"),
    Setting(
        "TORCH_USE_CUDA_DSA", "1", "device-side assertions slow kernels down", "unset it, unless you are debugging"
    ),
)
