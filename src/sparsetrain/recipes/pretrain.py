"""PretrainRecipe: everything one run from random weights is asked to do, as a YAML file or flags."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from sparsetrain.core.fields import shown
from sparsetrain.recipes.passed import read_pairs
from sparsetrain.recipes.run import MOST, RunRecipe


class PretrainRecipe(RunRecipe):
    """One run from random weights. Build it with `PretrainRecipe.from_values` or `from_yaml`."""

    job: ClassVar[str] = "pretrain"
    default_steps: ClassVar[int] = 1000

    model: str
    """Architecture: a built-in name (gpt2-nano, sequence-encoder, vit-nano, dit-nano, uvit-nano, unet-nano), or a
    config.json or a folder with one."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys of the model's config and their values, in place of the architecture's; on the command line key=value."""
    data: str
    """Training data: as for finetune (text files for lm, labelled CSV or JSONL for classify); a task's name (listops,
    text, retrieval, pixels, pathfinder, lra-...); fashion-mnist, digits, a folder of pictures (a class a
    subfolder) or with MNIST's four files, or a data set of `datasets` (image, diffusion)."""
    data_folder: str | None = None
    """Folder with the files of a task that is read rather than generated (lra-...)."""
    tokenizer: str | None = None
    """Folder or embedded model whose tokenizer reads text; bytes are the tokens if not given."""
    output: str = "runs/pretrain"
    """Folder for checkpoints, the trained model and the report. It must be empty or absent unless --resume."""
    task: Literal["lm", "classify", "mlm", "pairs", "image", "diffusion"] = "lm"
    """lm: predict every token of packed text. mlm: those that are hidden from an encoder. classify: a label a sequence.
    pairs: a label two sequences, read by one encoder. image: a label an image, read as patches. diffusion: remove noise
    from images."""
    seq_len: int = Field(256, ge=8, le=MOST)
    """Tokens in a sequence; at most the positions of the config. Images bring their own length."""
    batch_size: int = Field(16, ge=1, le=MOST)
    """Sequences in one forward and backward pass. Memory grows with it."""
    train_rows: int | None = Field(None, ge=1, le=2**40)
    """Use this many labelled training rows, chosen by seed; all if not given."""
    lr: float = Field(1e-3, gt=0, le=10)
    """Peak learning rate."""
    compare_lr: tuple[float, ...] = ()
    """With compare=dense: learning rates of the dense side. It is trained alone at each first, and compared at the one
    that ends with the lowest held-out loss."""
    find_switch: int = Field(0, ge=0, le=2**31 - 1)
    """With compare=dense and a method that trains a smaller model first: steps of two short runs, of the smallest model
    and the whole one, from whose losses is predicted when to go on to the larger; 0: as the method says."""
    weight_decay: float = Field(0.1, ge=0, le=1)
    """AdamW's decoupled weight decay; norms and biases are left out."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of AdamW's mean of gradients."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of AdamW's mean of squared gradients; 0.95 is usual for language models."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    min_lr_ratio: float = Field(0.0, ge=0, lt=1)
    """Where the cosine schedule ends, as a share of lr."""
    clip_value: float = Field(0.0, ge=0)
    """Entries of the gradient are cut to this size, after max_grad_norm; 0: not at all."""
    calibration_tokens: int = Field(2048, ge=0, le=2**40)
    """Training tokens from which a method that needs a conversion starts, run through the random model."""
    eval_tokens: int = Field(65536, ge=1, le=2**40)
    """Tokens of held-out data for each evaluation; labelled tasks use eval_tokens / seq_len rows."""

    @field_validator("set", mode="before")
    @classmethod
    def _pairs(cls, given: Any) -> dict[str, Any]:
        if isinstance(given, dict):
            return given
        if not isinstance(given, list | tuple):
            raise ValueError(f"set is {shown(given)}. Give {{key: value, ...}}.")
        return read_pairs("set", given)

    @field_validator("set")
    @classmethod
    def _finite(cls, given: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(given, allow_nan=False).encode()
        except (ValueError, TypeError):
            raise ValueError(f"set={shown(given)} holds what is no text, finite number or list of them.") from None
        return given

    @field_validator("compare_lr", mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        """Numbers, one alone, or as the command line gives them: each a text, or several with commas."""
        entries = given if isinstance(given, list | tuple) else [given]
        return [part for entry in entries for part in (entry.split(",") if isinstance(entry, str) else [entry])]

    @field_validator("compare_lr")
    @classmethod
    def _rates(cls, given: tuple[float, ...]) -> tuple[float, ...]:
        if wrong := [rate for rate in given if not 0 < rate <= 10]:
            raise ValueError(f"compare_lr holds {wrong[0]}. Give learning rates in (0, 10].")
        return given

    @model_validator(mode="after")
    def _schedule(self) -> Self:
        if own := [config.method for config in self.configs if config.trains_own]:
            raise ValueError(f"{own[0]} trains what it adds and no weight, so random weights would stay. Use finetune.")
        if self.min_lr_ratio and self.lr_schedule != "cosine":
            raise ValueError(f"min_lr_ratio={self.min_lr_ratio} goes with lr_schedule=cosine, not {self.lr_schedule}.")
        return self
