"""Recipe: everything one fine-tuning run is asked to do, as a YAML file whose keys equal the command line's flags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from sparsetrain.core.config import MethodConfig, registered_methods
from sparsetrain.core.fields import shown
from sparsetrain.recipes.entries import read_methods
from sparsetrain.recipes.presets import DEFAULT_PRESET, PRESETS
from sparsetrain.recipes.run import RunRecipe


class Recipe(RunRecipe):
    """One fine-tuning run. Build it with `Recipe.from_values`, `Recipe.from_yaml`, or keyword arguments."""

    job: ClassVar[str] = "finetune"
    presets: ClassVar[Mapping[str, tuple[MethodConfig, ...]]] = PRESETS
    default_preset: ClassVar[str | None] = DEFAULT_PRESET

    model: str
    """Model to fine-tune: an embedded asset (`sparsetrain models`), a local folder, or a name on the hub."""
    data: str
    """Training data: a text file, folder or glob; JSONL or a JSON array (text, messages, prompt/completion, or
    instruction/output); CSV; an embedded or `datasets` name."""
    output: str = "runs/finetune"
    """Folder for checkpoints, the trained adapter and the report. It must be empty or absent unless --resume."""
    task: Literal["lm", "sft", "classify"] = "lm"
    """lm: predict every token of packed text. sft: learn the completions only. classify: learn a label a text."""
    lr: float = Field(2e-4, gt=0, le=10)
    """Peak learning rate. LoRA: about 2e-4. Full fine-tuning: about 2e-5."""
    lora_r: int = Field(16, ge=0, le=2**16)
    """Rank of the LoRA factors; 0 trains all weights instead (full fine-tuning), or what a method adds, if it says that
    it trains nothing else."""
    lora_alpha: float = Field(16.0, gt=0, le=1e6)
    """LoRA's update is scaled by lora_alpha / lora_r."""
    lora_targets: Literal["all-linear"] | list[str] = "all-linear"
    """Linears that get LoRA: all-linear (all but the head), or endings of module names such as q_proj."""
    methods: tuple[MethodConfig, ...] = ()
    """Sparse methods, each {method: name, key: value}; on the command line name:key=value,key=value. Without methods
    and preset: the preset spt. An empty list: dense."""
    distill_steps: int = Field(0, ge=0, le=2**31 - 1)
    """Steps of layer-wise distillation between conversion and training: each routed FFN, with its LoRA, learns the
    output of its dense FFN."""
    distill_lr: float = Field(3e-4, gt=0, le=10)
    """Learning rate of the distillation at its first step; it falls to 0."""

    @field_validator("lora_targets", mode="before")
    @classmethod
    def _names(cls, given: Any) -> Any:
        """As a list of names, or text with commas between them."""
        names = [name.strip() for name in given.split(",")] if isinstance(given, str) else given
        if names == ["all-linear"]:
            return "all-linear"
        if not isinstance(names, list | tuple) or not names or not all(isinstance(n, str) and n.strip() for n in names):
            raise ValueError(f"lora_targets={shown(given)}: give all-linear, or names such as q_proj,v_proj.")
        return list(names)

    @model_validator(mode="after")
    def _can_distill(self) -> Self:
        if not self.distill_steps:
            return self
        from sparsetrain.surgery.method import method_of  # imports torch, which a plan need not wait for

        if not any(method_of(config).after_adapter for config in self.configs):
            able = [name for name, kind in registered_methods().items() if method_of(kind).after_adapter]
            raise ValueError(
                f"distill_steps={self.distill_steps} needs a {' or '.join(able)} among the methods. Add it, or 0."
            )
        return self

    @classmethod
    def _expanded(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = super()._expanded(values)
        methods = read_methods(values.get("methods", ()))
        if values.get("lora_r") is None and any(config.trains_own for config in methods):
            values["lora_r"] = 0
        return values

    @property
    def trains_all(self) -> bool:
        return self.lora_r == 0 and not self.trains_own
