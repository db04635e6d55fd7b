"""The keys of a pretraining recipe as flags: what finetune's rows say too, with other defaults, and its own rows."""

from __future__ import annotations

from dataclasses import replace

from sparsetrain.cli.flags import FLAGS, FLOAT, INT, KEEP, LENGTH, MAIN, SPARSE, Flag
from sparsetrain.recipes.tasks import offered, says

TRAIN = "Optimizer"
_NOT_HERE = {"preset", "distill_steps", "distill_lr", "lora_r", "lora_alpha", "lora_targets"}
_NOT_HERE |= {"model_revision", "trust_remote_code", "chat_template_path", "load_in_4bit", "load_in_8bit"}
_NOT_HERE |= {"packing", "deploy", "dense_first", "dense_last", "train_auxiliary"}
_NOT_HERE |= {"lora_dtype", "activation_offloading", "tiled_mlp"}
_OWN = (
    Flag("model", "NAME|FILE|DIR", "", MAIN, "Architecture: gpt2-nano (decoder), sequence-encoder (SPION's sizes), "
         "vit-nano, dit-nano, uvit-nano, unet-nano (28x28 images), or your config.json, or a folder with one."),
    Flag("set", "KEY=VALUE", "", MAIN, "A key of the model's config, in place of the architecture's; or "
         "training.KEY, of transformers' TrainingArguments. Repeat for more.", list[str]),
    Flag("data", "NAME|PATH", "", MAIN, "Text (lm), labelled CSV or JSONL (classify), an embedded set; a task: "
         "listops, text, retrieval, pixels, pathfinder, lra-...; fashion-mnist, digits or a folder of pictures (image, "
         "diffusion)."),
    Flag("data_folder", "DIR", "", MAIN, "Files of a task that is read, not generated (lra-...)."),
    Flag("tokenizer", "NAME|DIR", "bytes", MAIN, "Tokenizer of text."),
    Flag("task", "|".join(offered("pretrain")), "lm", MAIN, says("pretrain")),
    Flag("seq_len", INT, "256", LENGTH, "Tokens in a sequence; at most the config's positions. Images bring theirs."),
    Flag("steps", INT, "1000", LENGTH, "Optimizer steps."),
    Flag("train_rows", INT, "all", LENGTH, "Labelled training rows to use."),
    Flag("methods", "NAME:KEY=VALUE,...", "", SPARSE, "A sparse method; repeat for several. None: dense.", list[str],
         "--method"),
    Flag("calibration_tokens", INT, "2048", SPARSE, "Training tokens that a method's conversion starts from."),
    Flag("compare", "none|dense", "none", SPARSE, "dense: also train the dense twin, step by step in turns, and report "
         "the loss at equal steps and at equal time. Takes twice the time."),
    Flag("compare_lr", "FLOAT,...", "", SPARSE, "With --compare dense: learning rates of the dense twin, which trains "
         "at each first and is compared at the best.", list[str]),
    Flag("find_switch", INT, "0", SPARSE, "With --compare dense and a model that grows: steps of two short runs from "
         "which is predicted when to leave the small model; afterwards, how far off that was."),
    Flag("lr", FLOAT, "0.001", TRAIN, "Peak learning rate."),
    Flag("min_lr_ratio", FLOAT, "0.0", TRAIN, "Where cosine ends, as a share of lr."),
    Flag("weight_decay", FLOAT, "0.1", TRAIN, "AdamW's decoupled decay; norms and biases are left out."),
    Flag("beta1", FLOAT, "0.9", TRAIN, "Decay of the mean of gradients."),
    Flag("beta2", FLOAT, "0.999", TRAIN, "Decay of the mean of squared gradients; 0.95 is usual for text."),
    Flag("eps", FLOAT, "1e-08", TRAIN, "AdamW's epsilon."),
    Flag("clip_value", FLOAT, "0.0", TRAIN, "Entries of the gradient are cut to this size; 0: not at all."),
    Flag("output", "DIR", "runs/pretrain", MAIN, FLAGS["output"].help),
    Flag("batch_size", INT, "16", LENGTH, FLAGS["batch_size"].help),
    Flag("eval_tokens", INT, "65536", KEEP, "Held-out tokens an evaluation; labelled tasks: that by seq-len rows."),
)  # fmt: skip
_SHARED = {
    key: replace(flag, panel=TRAIN if flag.panel == FLAGS["lr"].panel else flag.panel)
    for key, flag in FLAGS.items()
    if key not in _NOT_HERE
}
PRETRAIN_FLAGS: dict[str, Flag] = _SHARED | {flag.key: flag for flag in _OWN}
