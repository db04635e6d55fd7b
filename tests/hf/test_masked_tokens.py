"""Masked language modelling: what is hidden, the loss of it, and a run that learns."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

from sparsetrain.data.collate import IGNORED_LABEL
from sparsetrain.hf.train.masked_tokens import hidden, masked_loss, masked_scores
from sparsetrain.hf.train.pretrain import PretrainRecipe, pretrain
from tests.hf import runs

BERT = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
BERT |= {"max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def test_fifteen_of_a_hundred_are_asked_for_and_eight_in_ten_of_them_masked() -> None:
    ids_bt = torch.randint(2, 1000, (64, 512), generator=torch.Generator().manual_seed(0))
    seen_bt, asked_bt = hidden(ids_bt, ids_bt, mask_id=1, vocabulary=1000)
    assert asked_bt.float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert (seen_bt[~asked_bt] == ids_bt[~asked_bt]).all()
    asked = seen_bt[asked_bt]
    assert (asked == 1).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (asked == ids_bt[asked_bt]).float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_a_row_hides_the_same_in_any_company_and_no_padding() -> None:
    ids_bt = torch.arange(2, 130).reshape(2, 64)
    labels_bt = ids_bt.clone()
    labels_bt[1, 32:] = IGNORED_LABEL
    seen_bt, asked_bt = hidden(ids_bt, labels_bt, 1, 200)
    alone_bt, _ = hidden(ids_bt[1:], labels_bt[1:], 1, 200)
    assert torch.equal(alone_bt[0], seen_bt[1]) and not asked_bt[1, 32:].any()
    assert torch.equal(seen_bt[1, 32:], ids_bt[1, 32:])
    other_bt, _ = hidden(ids_bt.flip(1), labels_bt, 1, 200)
    assert not torch.equal(other_bt[0].flip(0), seen_bt[0])  # the order counts


def test_loss_and_scores_are_of_what_is_asked_for() -> None:
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**BERT, vocab_size=50, pad_token_id=0)).eval()
    ids_bt = torch.randint(1, 50, (3, 40))
    batch = {"input_ids": ids_bt, "labels": ids_bt}
    seen_bt, asked_bt = hidden(ids_bt, ids_bt, 0, 50)
    right = F.cross_entropy(model(input_ids=seen_bt).logits[asked_bt], ids_bt[asked_bt])
    assert masked_loss(model, batch).item() == pytest.approx(right.item(), rel=1e-6)
    with torch.no_grad():
        found = masked_scores(model, batch)
    assert found.count == int(asked_bt.sum()) and found.loss / found.count == pytest.approx(right.item(), rel=1e-6)
    assert found.by_row is not None and sum(found.by_row["loss"]) == pytest.approx(found.loss)
    model.config.mask_token_id = 7
    assert masked_loss(model, batch).item() != pytest.approx(right.item(), rel=1e-6)
    assert masked_loss(model, {"input_ids": ids_bt, "labels": torch.full_like(ids_bt, IGNORED_LABEL)}).item() == 0.0


def recipe(folder: Path, **changes: Any) -> PretrainRecipe:
    folder.joinpath("config.json").write_text(json.dumps({"model_type": "bert", **BERT}))
    values = {"model": str(folder), "task": "mlm", "data": str(runs.text(folder / "text", files=4, words=300))}
    values |= {
        "output": str(folder / "out"),
        "seq_len": 32,
        "batch_size": 8,
        "steps": 40,
        "lr": 1e-2,
        "eval_tokens": 512,
    }
    return PretrainRecipe.from_values({**values, "save_every": 0, "device": "cpu"} | changes)


@pytest.mark.parametrize(
    "method", [None, "multi_level:start_share=0.2,small_share=0.3", "masked_growth:plan=ffn/2|ffn*2"]
)
def test_an_encoder_learns_also_by_way_of_a_smaller_one(tmp_path: Path, method: str | None) -> None:
    sizes = {"num_hidden_layers": 2} if method else {}
    found: Any = pretrain(recipe(tmp_path, methods=[method] if method else [], set=sizes), write=False)
    evals = found.run["evals"]
    assert evals[-1]["loss"] < evals[0]["loss"] - 0.5 and found.run["metric"] == "perplexity"
    assert found.run["perplexity"]["after_training"] == pytest.approx(math.exp(evals[-1]["loss"]))


def test_a_decoder_has_no_such_head(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gpt2.* has no head for task=mlm"):
        pretrain(recipe(tmp_path, model="gpt2-nano"), write=False)
