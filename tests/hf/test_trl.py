"""TRL's SFTTrainer, with and without packing, takes a converted model and a peft_config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sparsetrain
from sparsetrain import PQAttention, RoutedFFN
from tests.families import FAMILIES, VOCAB

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("default")


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCAB))]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<bos>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.mark.parametrize("packing", [False, True])
def test_two_steps(packing: bool, tmp_path: Any) -> None:
    case = FAMILIES["llama"]
    model = case.model()
    handle = sparsetrain.sparsify(model, RoutedFFN.example(), PQAttention.example(), calibration=[case.batch(4)])
    rows = [" ".join(f"w{3 + (i * j) % 57}" for j in range(1, 40 + 7 * i)) for i in range(1, 9)]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            max_length=96,
            packing=packing,
            report_to=[],
            use_cpu=True,
            logging_steps=1,
            learning_rate=1e-3,
        ),
        train_dataset=Dataset.from_dict({"text": rows}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=2, target_modules="all-linear", modules_to_save=handle.modules_to_save),
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("router" in n for n in before) and any("codebook" in n for n in before)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(torch.isfinite(torch.tensor(losses)))
    moved = [n for n, p in trainer.model.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert any("router" in n for n in moved) and any("lora_B" in n for n in moved)
