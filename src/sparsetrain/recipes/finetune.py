"""Recipe: everything one fine-tuning run is asked to do, as a YAML file whose keys equal the command line's flags."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from sparsetrain.core.config import MethodConfig, registered_methods
from sparsetrain.core.fields import shown
from sparsetrain.core.quote import quoted
from sparsetrain.recipes.entries import read_methods
from sparsetrain.recipes.presets import AUTO, DEFAULT_PRESET, PRESETS
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.recipes.tasks import TASKS
from sparsetrain.surgery.deploy import Deploy, DeployDense


def without_lora(methods: Iterable[MethodConfig]) -> bool:
    """Do runs of these methods train without LoRA unless it is asked for?"""
    return any(config.trains_own or config.recipe_defaults().get("lora_r") == 0 for config in methods)


class Recipe(RunRecipe):
    """One fine-tuning run. Build it with `Recipe.from_values`, `Recipe.from_yaml`, or keyword arguments."""

    job: ClassVar[str] = "finetune"
    presets: ClassVar[Mapping[str, tuple[MethodConfig, ...]]] = PRESETS
    default_preset: ClassVar[str | None] = DEFAULT_PRESET
    sections: ClassVar[tuple[str, ...]] = ("training", "lora")

    model: str
    """Model to fine-tune: an embedded asset (`sparsetrain models`), a local folder, or a name on the hub."""
    model_revision: str | None = None
    """Branch, tag or commit of a model on the hub; its newest if not given."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model, which may do anything: read it before. A recipe file cannot say so: it
    takes the flag at each run."""
    load_in_4bit: bool = False
    """Hold the frozen weights in 4 bits (QLoRA's NF4, by bitsandbytes). Half-precision weights are what is loaded
    afterwards, so a later evaluation differs a little."""
    load_in_8bit: bool = False
    """Hold them in 8 bits (LLM.int8, by bitsandbytes), as `load_in_4bit`; products are of int8."""
    data: str
    """Training data: a text file, folder or glob; JSONL or a JSON array (text, messages, prompt/completion, or
    instruction/output); CSV; Parquet; texts also as .gz; an embedded or `datasets` name."""
    packing: bool = False
    """sft: several training examples in a row, as many as seq_len holds, none of which sees another. lm: rows are
    packed in any case; with this, none of a row's documents sees another."""
    chat_template_path: str | None = None
    """sft: a chat template in place of the tokenizer's: a Jinja file, the folder or name of a model that has it, or its
    text. It is saved with the tokenizer."""
    output: str = "runs/finetune"
    """Folder for checkpoints, the trained adapter and the report. It must be empty or absent unless --resume."""
    task: Literal["lm", "sft", "classify", "image", "diffusion", "pair-image"] = "lm"
    """lm: predict every token of packed text. sft: learn the completions only. classify: learn a label a text. image: a
    label a picture. diffusion: remove noise from images. pair-image: a label an image, by a pair of encoders (CLIP)."""
    lr: float | None = Field(2e-4, gt=0, le=10)
    """Peak learning rate. LoRA: about 2e-4. Full fine-tuning: about 2e-5. A method may say another where none is
    given."""
    lora_r: int = Field(16, ge=0, le=2**16)
    """Rank of the LoRA factors; 0 trains all weights instead (full fine-tuning), or what a method adds, if it says that
    it trains nothing else."""
    lora_alpha: float = Field(16.0, gt=0, le=1e6)
    """LoRA's update is scaled by lora_alpha / lora_r."""
    lora_targets: Literal["all-linear"] | list[str] = "all-linear"
    """Linears that get LoRA: all-linear (all but the head), or endings of module names such as q_proj."""
    lora_dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format of the LoRA factors. bf16, beside a model in bf16: less memory, and a step smaller than half a
    rounding of a weight is lost."""
    activation_offloading: bool = False
    """With gradient checkpointing: keep the blocks' inputs in the CPU's memory until the backward. Exact; takes the
    time of copying them there and back. On a CPU it does nothing."""
    tiled_mlp: int = Field(1, ge=1, le=2**16)
    """Pieces of a row's tokens in which each FFN is computed, and computed again in the backward: its wide activations
    are then those of one piece. Exact; takes the time of one more forward of the FFN. 1: in one piece."""
    lora: dict[str, Any] = Field(default_factory=dict)
    """Keys of PEFT's LoraConfig that no key here stands for, such as use_rslora; lora_dropout, lora_bias and
    lora_variant may stand outside."""
    preset: Literal["auto"] | None = None
    """auto: the methods are chosen when the run begins (`hf.study.choose`). It is so without methods and preset, and
    dense for images. Other presets stand for methods, and are replaced by them."""
    methods: tuple[MethodConfig, ...] = ()
    """Sparse methods, each {method: name, key: value}; on the command line name:key=value,key=value. An empty list:
    dense."""
    deploy: Literal["dense", "sparse"] = "dense"
    """How the trained model is used. dense: methods make training cheaper, and what is evaluated, saved and exported is
    the plain model with a plain adapter. sparse: it runs as it was trained; so it is not given, with methods that
    prune."""
    dense_first: float | None = Field(None, ge=0, lt=1)
    """With deploy=dense: share of the steps that train dense at the beginning. Not given: 0.05 for methods that change
    what the forward computes, 0 for others."""
    dense_last: float | None = Field(None, ge=0, lt=1)
    """With deploy=dense: the same at the end. Not given: 0.2, or 0."""
    train_auxiliary: bool = False
    """With deploy=dense: train what methods add (routers, codebooks) too, instead of leaving it as it was fitted."""
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
    def _packs(self) -> Self:
        if self.chat_template_path is not None and self.task != "sft":
            raise ValueError(
                f"chat_template_path is for conversations, and task={self.task} has none. Give task=sft, or leave it "
                "out."
            )
        if self.packing and self.task not in ("lm", "sft"):
            raise ValueError(
                f"packing is for tasks that learn tokens, and task={self.task} has a label or image a row."
            )
        if self.packing and self.streaming and self.task == "sft":
            raise ValueError(
                "streaming: rows are read while it trains, and packing puts rows together by their lengths, all at "
                "once. Leave one out."
            )
        return self

    @property
    def bits(self) -> int | None:
        """Those in which the frozen weights are held; None: as they are loaded."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    @model_validator(mode="after")
    def _deploys(self) -> Self:
        given = [key for key in ("dense_first", "dense_last") if getattr(self, key) is not None]
        given += ["train_auxiliary"] if self.train_auxiliary else []
        if self.deploy == "dense" and (kept := [config.method for config in self.configs if config.stays_sparse]):
            raise ValueError(f"deploy=dense, and {kept[0]} trains a model to be used sparse. Give deploy=sparse.")
        if self.deploy == "sparse" and given:
            raise ValueError(f"{given[0]} is for deploy=dense, and deploy=sparse was given. Leave one out.")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit: weights are held in one of them. Leave one out.")
        if self.bits is not None and self.lora_r == 0:
            raise ValueError(
                f"load_in_{self.bits}bit: weights in {self.bits} bits are not trained, and lora_r=0 trains nothing "
                "else. Set it."
            )
        if self.lora and self.lora_r == 0:
            raise ValueError(f"lora.{next(iter(self.lora))} is given, and lora_r=0 trains without LoRA. Leave one out.")
        if self.deploy == "dense" and self.lora_r > 0 and self.trains_own:
            own = next(config.method for config in self.configs if config.trains_own)
            raise ValueError(
                f"deploy=dense with lora_r={self.lora_r} and {own}: the adapter would be saved for the plain model, "
                f"and it stands on weights that {own} has trained. Give deploy=sparse, or lora_r=0."
            )
        _ = self.deployment  # shares that leave no step between them
        return self

    @model_validator(mode="after")
    def _offloads(self) -> Self:
        if self.activation_offloading and self.gradient_checkpointing == "none":
            raise ValueError(
                "activation_offloading=true moves what gradient checkpointing keeps, and gradient_checkpointing=none. "
                "Give gradient_checkpointing=non-reentrant, or leave it out."
            )
        if self.lora_dtype == "bf16" and (self.lora_r == 0 or self.dtype == "fp32"):
            found = "lora_r=0: there are none" if self.lora_r == 0 else "dtype=fp32: the model's weights are in fp32"
            raise ValueError(f"lora_dtype=bf16 stores LoRA factors as bf16, and {found}. Leave it out.")
        return self

    @property
    def deployment(self) -> Deploy:
        """How the trained model is used, as `sparsify` takes it."""
        if self.deploy == "sparse":
            return "sparse"
        return DeployDense(
            dense_first=self.dense_first, dense_last=self.dense_last, train_auxiliary=self.train_auxiliary
        )

    @model_validator(mode="after")
    def _can_distill(self) -> Self:
        if not self.distill_steps:
            return self
        if self.deploy == "dense" and not self.train_auxiliary:
            raise ValueError(
                f"distill_steps={self.distill_steps} teaches what methods add to imitate the dense FFN, and with "
                "deploy=dense that stays as it was fitted. Set train_auxiliary=true, or deploy=sparse."
            )
        from sparsetrain.surgery.method import method_of  # imports torch, which a plan need not wait for

        if not any(method_of(config).after_adapter for config in self.configs):
            able = [name for name, kind in registered_methods().items() if method_of(kind).after_adapter]
            raise ValueError(
                f"distill_steps={self.distill_steps} needs a {' or '.join(able)} among the methods. Add it, or 0."
            )
        return self

    @classmethod
    def _expanded(cls, values: dict[str, Any]) -> dict[str, Any]:
        task = TASKS.get(str(values.get("task")))
        if task is not None and task.images and values.get("preset") in (None, AUTO) and not values.get("methods"):
            values |= {"preset": None, "methods": []}  # no way has been seen to pay on images: dense
        preset = values.get("preset") or (cls.default_preset if values.get("methods") is None else None)
        values = super()._expanded(values)
        methods = read_methods(values.get("methods", ()))
        if preset == AUTO and methods:
            raise ValueError(f"preset=auto chooses the methods, and {methods[0].method} is given. Leave one out.")
        values["preset"] = AUTO if preset == AUTO else None
        if any(config.trains_own for config in methods):
            if values.get("lora_r") is None:
                values["lora_r"] = 0
            elif values.get("deploy") is None and values["lora_r"] not in (0, "0"):
                values["deploy"] = "sparse"  # the adapter stands on what the method has trained
        if values.get("deploy") is None and any(config.stays_sparse for config in methods):
            values["deploy"] = "sparse"
        if values.get("lr") is None:
            values.pop("lr", None)
        for key, value in [item for config in methods for item in config.recipe_defaults().items()]:
            if values.get(key) is None:
                values[key] = value
        return values

    @classmethod
    def from_yaml(cls, path: str | Path, changes: Mapping[str, Any] | None = None) -> Self:
        """As of `RunRecipe`; a file that would run a model's code takes a change that says so, too.

        Raises:
            ValueError: as of `RunRecipe`; or that change is missing.
        """
        made = super().from_yaml(path, changes)
        if made.trust_remote_code and not (changes or {}).get("trust_remote_code"):
            raise ValueError(
                f"recipe {quoted(str(path))} runs Python code that comes with {quoted(made.model)}, and no file "
                "decides that. Read that code, and give --trust-remote-code too (in Python: trust_remote_code=True)."
            )
        return made

    def decided(self, methods: tuple[MethodConfig, ...], **changes: Any) -> Self:
        """The recipe with these methods in place of the preset auto, and other keys changed."""
        values = self.model_dump(exclude={"methods", "preset"})
        return type(self).from_values({**values, "methods": methods, **changes})

    @property
    def trains_all(self) -> bool:
        return self.lora_r == 0 and not self.trains_own
