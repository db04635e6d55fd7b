"""Fine-tune a language model with sparse attention, routed FFNs and LoRA, in transformers' own Trainer.

python examples/finetune.py --steps 20
python examples/finetune.py --model ./my-llama --data 'notes/*.txt' --seq-len 2048
"""

from __future__ import annotations

import argparse

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import sparsetrain
from sparsetrain.hf.assets import resolve_model
from sparsetrain.hf.data import load_text
from sparsetrain.hf.model.io import load, save
from sparsetrain.hf.train.callbacks import SparsityCallback
from sparsetrain.hf.train.evaluate import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="python-stdlib")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="runs/example")
    args = parser.parse_args()

    path = resolve_model(args.model)  # an embedded model's folder; any other name passes through
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    rows = load_text(args.data, tokenizer, args.seq_len, max_tokens=args.steps * args.seq_len, max_eval_tokens=8192)

    def perplexity(when: str) -> None:
        quality = evaluate(model, rows.eval, rows.collate_fn, max_tokens=8192)
        print(f"perplexity {when}: {quality.perplexity:.2f}")

    perplexity("of the dense model")

    # 1. what to make sparse: plan() tells what it costs, sparsify() does it in place
    methods = (
        sparsetrain.PQAttention(keep_ratio=1 / 8),
        sparsetrain.RoutedFFN(
            num_blocks=16, num_active=8, shared_ratio=0.25, partition="clustered", compensation="mean"
        ),
    )
    print(sparsetrain.plan(model, *methods, seq_tokens=args.seq_len))
    calibration = [rows.collate_fn([rows.train[i]]) for i in range(min(4, len(rows.train)))]
    for batch in calibration:
        del batch["labels"]
    handle = sparsetrain.sparsify(model, *methods, calibration=calibration)
    perplexity("after conversion")

    # 2. LoRA on top; PEFT must train what the methods added
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", modules_to_save=handle.modules_to_save)
    model = get_peft_model(model, lora)

    # 3. the usual Trainer; the callback drives the methods' schedules
    arguments = TrainingArguments(
        args.output, max_steps=args.steps, per_device_train_batch_size=1, learning_rate=2e-4, logging_steps=5,
        save_strategy="no", report_to="none",
    )  # fmt: skip
    callback = SparsityCallback(handle, base_model=args.model)
    Trainer(model, arguments, rows.collate_fn, rows.train, callbacks=[callback]).train()
    perplexity("after training")

    # 4. the adapter, and beside it what rebuilds the sparse model
    folder = save(model, handle, f"{args.output}/adapter", tokenizer=tokenizer, base_model=args.model, task="lm")
    model = load(folder).model
    perplexity("of the saved adapter")


if __name__ == "__main__":
    main()
