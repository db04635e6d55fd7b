"""Which trainer, with what, trains which method: data that tests/hf/test_every_trainer.py exercises cell by cell."""

from __future__ import annotations

TRAINERS: dict[str, str] = {
    "loop": "a loop of one's own, with `handle.step`",
    "accelerate": "a loop with accelerate",
    "trainer": "transformers' `Trainer`",
    "sft": "TRL's `SFTTrainer`",
    "sft_packing": "`SFTTrainer`, packed rows",
    "sft_padding_free": "`SFTTrainer`, `padding_free`",
    "sft_completion_only": "`SFTTrainer`, prompts and completions, loss on completions",
    "sft_assistant_only": "`SFTTrainer`, chats, `assistant_only_loss`",
    "sft_dft": '`SFTTrainer`, `loss_type="dft"`',
    "reward": "TRL's `RewardTrainer`",
    "dpo": "TRL's `DPOTrainer`, the reference is the model without its adapter",
    "dpo_all_weights": "`DPOTrainer`, all weights, the reference is a model of its own",
    "kto": "TRL's `KTOTrainer`",
    "grpo": "TRL's `GRPOTrainer`",
    "grpo_checkpointing": "`GRPOTrainer` with gradient checkpointing",
    "rloo": "TRL's `RLOOTrainer`",
}
FEATURES: dict[str, str] = {
    "accumulation": "gradient accumulation",
    "checkpointing": "gradient checkpointing",
    "checkpointing_reentrant": "gradient checkpointing, reentrant",
    "bf16": "bf16 autocast",
    "load_best": "`load_best_model_at_end`",
    "early_stopping": "early stopping",
    "neftune": "NEFTune",
    "label_smoothing": "label smoothing",
    "optim_fused": '`optim="adamw_torch_fused"`',
    "optim_adafactor": '`optim="adafactor"`',
    "optim_sgd": '`optim="sgd"`',
    "rslora": "LoRA: rsLoRA",
    "pissa": "LoRA: PiSSA",
    "olora": "LoRA: OLoRA",
    "lora_bias": 'LoRA: `bias="lora_only"`',
    "dora": "LoRA: DoRA",
    "adalora": "AdaLoRA, its ranks as they begin",
}
"""What is asked beside the plain training, with transformers' `Trainer`."""
WITH_LORA: tuple[str, ...] = ("dpo", "rslora", "pissa", "olora", "lora_bias", "dora", "adalora")
"""Of those, what there is with an adapter alone."""
METHODS: tuple[str, ...] = ("token_selection", "pq_attention", "routed_ffn", "flood_fill_attention")
WEIGHTS: tuple[str, ...] = ("semi_structured", "sparsedm", "pst", "sara", "monarch")
"""Methods of weights, which train without LoRA and are used as they are trained."""
_REFERENCE = (
    "trains it sparse: the method's error would count as what was learned. Train LoRA with "
    "precompute_ref_log_probs=False, whose reference is the sparse model without it"
)
REFUSED: dict[tuple[str, str], str] = {
    ("label_smoothing", "token_selection"): "lets the trainer compute the loss of all tokens, selected or not, from "
    "logits. Set it to 0",
    ("dora", "routed_ffn"): "a LoRA variant (DoraLinearVariant; DoRA is one), which is no product of two factors. Use "
    "plain LoRA",
    **{
        (
            name,
            "pst",
        ): "load_best_model_at_end compares checkpoints of unequal sparsity, and the least pruned one would "
        "win. Turn it off, and choose among those of the last 0.3 of the steps"
        for name in ("load_best", "early_stopping")
    },
    **{("dpo_all_weights", method): _REFERENCE for method in METHODS if method != "token_selection"},
}
"""(trainer or feature, method) -> words of the refusal."""


def trainers() -> list[str]:
    """The lines of the tables of methods that deploy dense, and why not."""
    return _tables(METHODS, {"trainer": TRAINERS, "with `Trainer` and LoRA": FEATURES})


def trainers_of_weights() -> list[str]:
    """The lines of the tables of methods of weights, and why not."""
    rows = {"trainer, all weights": TRAINERS, "with `Trainer`": FEATURES}
    without = {title: {n: m for n, m in found.items() if n not in WITH_LORA} for title, found in rows.items()}
    return _tables(WEIGHTS, without)


def _tables(methods: tuple[str, ...], tables: dict[str, dict[str, str]]) -> list[str]:
    lines = []
    for title, rows in tables.items():
        lines += ["", f"| {title} | {' | '.join(methods)} |", "| --- |" + " --- |" * len(methods)]
        lines += [
            f"| {meaning} | " + " | ".join("no" if (name, m) in REFUSED else "yes" for m in methods) + " |"
            for name, meaning in rows.items()
        ]
    names = TRAINERS | FEATURES
    why: dict[tuple[str, str], list[str]] = {}
    for (name, method), reason in REFUSED.items():
        if method in methods:
            why.setdefault((name, reason), []).append(method)
    return [*lines, "", *(f"- {names[n]}, {', '.join(found)}: {reason}." for (n, reason), found in why.items())]
