"""The small world that each case gets a copy of: models, data, recipes, runs that ended and runs that were stopped."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from tests.cli.conftest import byte_tokenizer, save_llama, write_text
from tests.torture.fork import Job, run_one

SMALL = ("--seq-len", "32", "--threads", "1", "--device", "cpu")
TRAIN = (*SMALL, "--eval-tokens", "64", "--calibration-tokens", "64", "--save-every", "1")
ROUTED = "routed_ffn:num_blocks=4,num_active=2"
TOKENS = "token_selection:keep_ratio=0.5"
PQ = "pq_attention:num_keys=16,block_q=8,block_k=8,local_tokens=4"
FLOOD = "flood_fill_attention:block_tokens=8,filter_edge=3,max_dense_steps=2,change_threshold=0"

FINETUNES = {
    "lora": ("--method", TOKENS, "--preset", "dense"),
    "routed": ("--method", ROUTED),
    "pq": ("--method", PQ),
    "both": ("--method", PQ, "--method", ROUTED),
    "tokens": ("--method", TOKENS),
    "full": ("--method", ROUTED, "--lora-r", "0"),
    "accumulated": ("--method", TOKENS, "--grad-accum", "2"),
}


def finetune(*extra: str) -> tuple[str, ...]:
    return ("finetune", "--model", "llama", "--data", "text.txt", "--output", "out", *TRAIN, *extra)


def pretrain(*extra: str) -> tuple[str, ...]:
    return ("pretrain", "--model", "llama/config.json", "--tokenizer", "llama", "--data", "text.txt", "--output", "out",
            *TRAIN, *extra)  # fmt: skip


def make(folder: Path) -> None:
    """Write the world into an empty folder."""
    folder.mkdir(parents=True)
    save_llama(folder / "llama")
    _encoder(folder / "encoder")
    write_text(folder / "text.txt", 3000)
    draw = random.Random(0)
    words = ["red", "green", "blue", "sun", "moon", "star", "over", "under"]
    said = [" ".join(draw.choices(words, k=8)) for _ in range(24)]
    rows = [{"prompt": text, "completion": text[::-1]} for text in said]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "labels.csv").write_text("text,label\n" + "".join(f"{text},{i % 2}\n" for i, text in enumerate(said)))
    (folder / "rows.json").write_text(json.dumps(rows))
    foreign = folder / "foreign" / "checkpoint-5"
    foreign.mkdir(parents=True)
    (foreign / "model.safetensors").write_bytes(b"someone's weights")
    (folder / "foreign" / "trainer_state.json").write_text("{}")
    for name, command in {
        "run": finetune("--steps", "2", "--method", PQ, "--method", ROUTED),
        "full": finetune("--steps", "2", "--method", ROUTED, "--lora-r", "0"),
    }.items():
        ended = run_one(Job(command, folder, name))
        if ended.code:
            raise RuntimeError(f"the world's {name!r} could not be trained: {ended.err}")
        (folder / "out").rename(folder / name)
    shutil.copytree(folder / "run", folder / "stopped")
    for name in ("result.json", "report.json", "report.html"):
        (folder / "stopped" / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "stopped" / "adapter", ignore_errors=True)
    (folder / "recipe.yaml").write_text((folder / "run" / "recipe.yaml").read_text())
    for left in (".yes", ".out", ".err"):
        (folder / left).unlink()


def _encoder(folder: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel

    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
