"""Flags for what a recipe passes on to transformers and PEFT: `--set SECTION.KEY=VALUE`, and the usual ones by name."""

from __future__ import annotations

from typing import Any

from sparsetrain.cli.flags import FLAGS, FLOAT, KEEP, TRAIN, Flag, changes
from sparsetrain.recipes.passed_keys import LIBRARY, SHORT, VARIANTS

PASSED: dict[str, Flag] = {
    flag.key: flag
    for flag in (
        Flag("lora_variant", "|".join(VARIANTS), "lora", TRAIN, "How LoRA starts, or is scaled: as PEFT calls it."),
        Flag("lora_dropout", FLOAT, "0.0", TRAIN, "Share of LoRA's inputs that a step leaves out."),
        Flag("lora_bias", "none|all|lora_only", "none", TRAIN, "Biases that are trained beside LoRA."),
        Flag("optim", "NAME", "adamw_torch_fused", TRAIN, "Optimizer, by any name of transformers: adafactor, sgd, "
             "adamw_8bit (bitsandbytes) ..."),
        Flag("set", "SECTION.KEY=VALUE", "", TRAIN, "Any key of transformers' TrainingArguments or PEFT's "
             "LoraConfig: training.label_smoothing_factor=0.1, lora.rank_pattern='{q_proj: 8}'. Repeat for more.",
             list[str]),
        Flag("report_to", "NAME", "none", KEEP, "Dashboard beside the report: tensorboard, wandb, trackio, mlflow ..., "
             "if installed."),
        Flag("run_name", "NAME", "", KEEP, "What the dashboard calls the run."),
    )
}  # fmt: skip
FINETUNE_FLAGS: dict[str, Flag] = FLAGS | PASSED
PRETRAIN_PASSED: dict[str, Flag] = {
    key: flag for key, flag in PASSED.items() if key in SHORT and SHORT[key][0] == "training"
}


def passed(flags: dict[str, Any], sections: tuple[str, ...]) -> dict[str, Any]:
    """The flags that were given, as recipe entries (`flags.changes`), with those of `--set` in their sections.

    Where a recipe has a key `set` of its own, entries that begin with no section are for that.

    Raises:
        ValueError: an entry of `--set` that cannot be read.
    """
    from sparsetrain.recipes.passed import divided

    given = changes(flags)
    entries: list[str] = given.pop("set", [])
    own = [entry for entry in entries if entry.partition(".")[0] not in LIBRARY] if len(sections) == 1 else []
    if own:
        given["set"] = own
    return given | divided([entry for entry in entries if entry not in own], sections)
