"""Every trainer that a converted model may be given: real ones, on a tiny Llama. Each trains three steps and evaluates.

`TRAINERS` maps a name of `bench.tables.trainers` to what trains so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor
from transformers import EarlyStoppingCallback, LlamaForSequenceClassification, LlamaModel, Trainer, TrainingArguments

import sparsetrain
from sparsetrain import (
    PST,
    FloodFillAttention,
    Monarch,
    PQAttention,
    RoutedFFN,
    SaRA,
    SemiStructured,
    SparseDM,
    TokenSelection,
)
from tests.families import FAMILIES, VOCAB, llama_config
from tests.hf.test_trl import tokenizer

CONFIGS: dict[str, Any] = {
    "token_selection": TokenSelection(keep_ratio=0.4),
    "pq_attention": PQAttention(num_keys=8, block_q=8, block_k=8, local_tokens=4),
    "routed_ffn": RoutedFFN(num_blocks=4, num_active=2, warmup_ratio=0.0),
    "flood_fill_attention": FloodFillAttention(
        block_tokens=8, filter_edge=5, keep_ratio=0.15, change_threshold=0, max_dense_steps=0
    ),
}
WEIGHTS: dict[str, Any] = {
    "semi_structured": SemiStructured(dense_tail_ratio=0.0),
    "sparsedm": SparseDM(),
    "pst": PST.example(),
    "sara": SaRA(),
    "monarch": Monarch.example(),
}
"""Methods of weights: they train without LoRA, and are used as they are trained."""
STEPS, TOKENS = 3, 40


@dataclass
class Asked:
    """One training: how, and on what.

    method: None trains dense. options: of the trainer's arguments. lora: of the adapter's config; methods of weights
    train without one.
    """

    folder: Path
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    callbacks: tuple[Any, ...] = ()
    deploy: Any = "dense"

    @property
    def adapts(self) -> bool:
        return self.method not in WEIGHTS


@dataclass
class Trained:
    """A training as it ended.

    dense: makes the model that was converted and trained, as it was. watch: what the training did first.
    evaluate: the loss of evaluation now.
    """

    model: Any
    handle: sparsetrain.Handle | None
    dense: Callable[[], Any]
    watch: Watch
    evaluate: Callable[[], float]
    save: Callable[[Path], None]


class Watch:
    """The first training forward of a model, and what all of them save for their backward passes.

    Attributes:
        given: what its blocks were given: embedded tokens, mask and positions.
        hidden: what came out behind the last block and the norm.
        trained_rows: share of the first block's rows that got a gradient.
        saved_bytes: in all of the training.
    """

    def __init__(self, model: Any) -> None:
        backbone = next(m for m in model.modules() if isinstance(m, LlamaModel))
        self.given: dict[str, Any] = {}
        self.hidden: Tensor | None = None
        self.trained_rows, self.saved_bytes = 0.0, 0
        self._hooks = [
            backbone.register_forward_hook(self._note, with_kwargs=True),
            backbone.layers[0].register_forward_hook(self._note_block, with_kwargs=True),
        ]
        self._backbone = backbone

    def _trains(self) -> bool:
        return self._backbone.training and torch.is_grad_enabled() and self.hidden is None

    def _note_block(self, block: Any, args: Any, kwargs: Any, out: Any) -> None:
        if not self._trains() or "inputs_embeds" in self.given:
            return
        self.given["inputs_embeds"] = (args[0] if args else kwargs["hidden_states"]).detach()
        if out.requires_grad:
            out.register_hook(self._note_gradient)

    def _note_gradient(self, gradient: Tensor) -> None:
        self.trained_rows = float((gradient != 0).any(-1).float().mean())

    def _note(self, backbone: Any, args: Any, kwargs: Any, out: Any) -> None:
        if self._trains():
            self.given |= {name: kwargs.get(name) for name in ("attention_mask", "position_ids")}
            self.hidden = out.last_hidden_state.detach()

    def _pack(self, x: Tensor) -> Tensor:
        self.saved_bytes += x.numel() * x.element_size()
        return x

    @contextmanager
    def watching(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x):
            yield
        if self.hidden is not None:
            for hook in self._hooks:
                hook.remove()


def llama() -> Any:
    return FAMILIES["llama"].model()


def converted(asked: Asked, model: Any) -> sparsetrain.Handle | None:
    if asked.method is None:
        return None
    if asked.method in WEIGHTS:
        config = WEIGHTS[asked.method]
        return sparsetrain.sparsify(model.requires_grad_(not config.trains_own), config)
    calibration = [FAMILIES["llama"].batch(4, 96, seed=5)]
    deploy = sparsetrain.DeployDense(dense_first=0.0, dense_last=0.0) if asked.deploy == "dense" else asked.deploy
    return sparsetrain.sparsify(model, CONFIGS[asked.method], calibration=calibration, deploy=deploy)


def lora(handle: sparsetrain.Handle | None, asked: Asked, **more: Any) -> LoraConfig:
    names = handle.modules_to_save if handle else []
    given = {"target_modules": "all-linear", "modules_to_save": names or None} | asked.lora | more
    if given.pop("adalora", False):
        return AdaLoraConfig(init_r=6, target_r=4, total_step=STEPS, **given)
    return LoraConfig(r=4, **given)


def adapted(model: Any, handle: sparsetrain.Handle | None, asked: Asked) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, lora(handle, asked)) if asked.adapts else model


def callbacks(handle: sparsetrain.Handle | None, asked: Asked) -> list[Any]:
    """Those asked for, and the handle's own for what is done between gradients and optimizer."""
    return [*asked.callbacks, *([] if handle is None or asked.adapts else [handle.callback()])]


def words(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(3, VOCAB, (count,), generator=generator).tolist())


def ids(rows: int, seed: int) -> list[dict[str, Any]]:
    batch = FAMILIES["llama"].batch(rows, TOKENS, seed)["input_ids"]
    return [{"input_ids": row, "labels": row} for row in batch]


def loop(asked: Asked, accelerator: Accelerator | None = None) -> Trained:
    """A loop of one's own, with accelerate or without."""
    model = llama()
    handle = converted(asked, model)
    model = adapted(model, handle, asked)
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run: Any = model
    if accelerator is not None:
        run, optimizer = accelerator.prepare(model, optimizer)

    def evaluate() -> float:
        run.eval()
        with torch.no_grad():
            return float(run(**_stacked(ids(4, 77))).loss)

    watch = Watch(model)
    for step in range(STEPS):
        run.train()
        if handle is not None:
            handle.step(step, STEPS)
        with watch.watching():
            loss = run(**_stacked(ids(2, step))).loss
            loss.backward() if accelerator is None else accelerator.backward(loss)
        if handle is not None:
            handle.adjust_gradients()
        optimizer.step()
        if handle is not None:
            handle.updated()
        optimizer.zero_grad()
    return Trained(model, handle, llama, watch, evaluate, lambda to: model.save_pretrained(str(to)))


def _stacked(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def accelerated(asked: Asked) -> Trained:
    return loop(asked, Accelerator(cpu=True))


def _arguments(kind: Any, asked: Asked, **more: Any) -> Any:
    defaults: dict[str, Any] = {
        "output_dir": str(asked.folder), "max_steps": STEPS, "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2, "use_cpu": True, "report_to": [], "logging_steps": 1, "save_strategy": "no",
        "learning_rate": 1e-2, "disable_tqdm": True, "dataloader_pin_memory": False, "bf16": False,
        "gradient_checkpointing": False, "seed": 3,
    }  # fmt: skip
    return kind(**(defaults | more | asked.options))


def _run(trainer: Any, handle: Any, dense: Callable[[], Any]) -> Trained:
    def evaluate() -> float:
        torch.manual_seed(9)  # a trainer may draw what it evaluates
        return trainer.evaluate()["eval_loss"]

    watch = Watch(trainer.model)
    with watch.watching():
        trainer.train()
    return Trained(trainer.model, handle, dense, watch, evaluate, lambda to: trainer.save_model(str(to)))


def plain(asked: Asked) -> Trained:
    """transformers' Trainer."""
    model = llama()
    handle = converted(asked, model)
    model = adapted(model, handle, asked)
    trainer = Trainer(
        model=model,
        args=_arguments(TrainingArguments, asked, label_names=["labels"]),
        train_dataset=ids(2 * STEPS, 1),  # type: ignore[arg-type]
        eval_dataset=ids(4, 77),  # type: ignore[arg-type]
        callbacks=callbacks(handle, asked),
    )
    return _run(trainer, handle, llama)


def _trl(kind: str, asked: Asked, rows: Callable[..., list[Any]], dense: Any = llama, **more: Any) -> Trained:
    import trl

    model = dense()
    handle = converted(asked, model)
    given = more.pop("given", {})
    own = {"task_type": "SEQ_CLS"} if kind == "Reward" else {}
    torch.manual_seed(0)
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        args=_arguments(getattr(trl, f"{kind}Config"), asked, **more),
        train_dataset=Dataset.from_list(rows(1)),
        eval_dataset=Dataset.from_list(rows(77)[:2]),
        callbacks=callbacks(handle, asked),
        **({"peft_config": lora(handle, asked, **own) if asked.adapts else None} | given),
    )
    return _run(trainer, handle, dense)


def _texts(seed: int) -> list[Any]:
    return [{"text": words(20 + 3 * i, seed + i)} for i in range(8)]


def _answers(seed: int) -> list[Any]:
    return [{"prompt": words(10, seed + i), "completion": " " + words(12 + 2 * i, seed + 50 + i)} for i in range(8)]


def _chats(seed: int) -> list[Any]:
    def talk(i: int) -> list[dict[str, str]]:
        said = [words(6 + i, seed + 10 * i + turn) for turn in range(4)]
        return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(said)]

    return [{"messages": talk(i)} for i in range(8)]


def _pairs(seed: int) -> list[Any]:
    return [
        {
            "prompt": words(8, seed + i),
            "chosen": " " + words(14 + i, seed + 50 + i),
            "rejected": " " + words(12 + i, seed + 90 + i),
        }
        for i in range(8)
    ]


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}w9 {% generation %}{{ m.content }} <eos>{% endgeneration %}"
    " {% else %}w8 {{ m.content }} {% endif %}{% endfor %}"
)


def _words(template: str | None = None) -> Any:
    made = tokenizer()
    made.chat_template = template
    return {"processing_class": made}


def sft(asked: Asked) -> Trained:
    return _trl("SFT", asked, _texts, given=_words(), max_length=64)


def packing(asked: Asked) -> Trained:
    return _trl("SFT", asked, _texts, given=_words(), max_length=64, packing=True)


def padding_free(asked: Asked) -> Trained:
    return _trl("SFT", asked, _texts, given=_words(), max_length=None, padding_free=True)


def completion_only(asked: Asked) -> Trained:
    return _trl("SFT", asked, _answers, given=_words(), max_length=64)


def assistant_only(asked: Asked) -> Trained:
    return _trl("SFT", asked, _chats, given=_words(TEMPLATE), max_length=96, assistant_only_loss=True)


def dpo(asked: Asked) -> Trained:
    return _trl("DPO", asked, _pairs, given=_words(), max_length=64)


def dft(asked: Asked) -> Trained:
    return _trl("SFT", asked, _answers, given=_words(), max_length=64, loss_type="dft")


def dpo_all_weights(asked: Asked) -> Trained:
    reference = llama()
    return _trl("DPO", asked, _pairs, given=_words() | {"ref_model": reference, "peft_config": None}, max_length=64)


def kto(asked: Asked) -> Trained:
    def rows(seed: int) -> list[Any]:
        return [row | {"label": i % 2 == 0} for i, row in enumerate(_answers(seed))]

    reference = {} if asked.adapts else {"ref_model": llama()}
    return _trl("KTO", asked, rows, given=_words() | reference, max_length=64)


def scorer() -> Any:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(llama_config(num_labels=1))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.08)
    return model.eval()


def reward(asked: Asked) -> Trained:
    def rows(seed: int) -> list[Any]:
        return [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in _pairs(seed)]

    return _trl("Reward", asked, rows, scorer, given=_words(), max_length=64)


def _scored(completions: list[Any], **_: Any) -> list[float]:
    return [float(sum(int(word[1:]) % 2 for word in text.split() if word[0] == "w")) for text in completions]


def grpo(asked: Asked, kind: str = "GRPO", **more: Any) -> Trained:
    given = _words() | {"reward_funcs": _scored}
    sizes = {"num_generations": 2, "max_completion_length": 8, "num_generations_eval": 2}
    return _trl(kind, asked, lambda seed: [{"prompt": words(32, seed + i)} for i in range(8)], given=given,
                **(sizes | more))  # fmt: skip


def grpo_offload(asked: Asked) -> Trained:
    return grpo(asked, gradient_checkpointing=True)


def rloo(asked: Asked) -> Trained:
    return grpo(asked, "RLOO", **({} if asked.adapts else {"beta": 0.0}))


TRAINERS: dict[str, Callable[[Asked], Trained]] = {
    "loop": loop,
    "accelerate": accelerated,
    "trainer": plain,
    "sft": sft,
    "sft_packing": packing,
    "sft_padding_free": padding_free,
    "sft_completion_only": completion_only,
    "sft_assistant_only": assistant_only,
    "dpo": dpo,
    "dpo_all_weights": dpo_all_weights,
    "kto": kto,
    "sft_dft": dft,
    "reward": reward,
    "grpo": grpo,
    "grpo_checkpointing": grpo_offload,
    "rloo": rloo,
}


def _saving() -> dict[str, Any]:
    often = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    return often | {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}


FEATURES: dict[str, dict[str, Any]] = {
    "label_smoothing": {"options": {"label_smoothing_factor": 0.1}},
    "neftune": {"options": {"neftune_noise_alpha": 5.0}},
    "load_best": {"options": _saving()},
    "early_stopping": {"options": _saving(), "callbacks": (EarlyStoppingCallback(early_stopping_patience=1),)},
    "accumulation": {"options": {"gradient_accumulation_steps": 2}},
    "bf16": {"options": {"bf16": True}},
    "checkpointing": {"options": {"gradient_checkpointing": True}},
    "checkpointing_reentrant": {
        "options": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    },
    "optim_fused": {"options": {"optim": "adamw_torch_fused"}},
    "optim_adafactor": {"options": {"optim": "adafactor"}},
    "optim_sgd": {"options": {"optim": "sgd"}},
    "dora": {"lora": {"use_dora": True}},
    "rslora": {"lora": {"use_rslora": True}},
    "pissa": {"lora": {"init_lora_weights": "pissa"}},
    "olora": {"lora": {"init_lora_weights": "olora"}},
    "adalora": {"lora": {"adalora": True}},
    "lora_bias": {"lora": {"bias": "lora_only"}},
}
"""What is asked of a training beyond the plain one, with transformers' Trainer: changes of `Asked`."""


def train(name: str, asked: Asked) -> Trained:
    """Train so; whoever calls resets accelerate's state when he is done with the trainer."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    return TRAINERS[name](asked)
