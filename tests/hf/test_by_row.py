"""What an evaluation says of each row adds up to what it says of all, whatever the batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.data.collate import Collator
from sparsetrain.hf.train.evaluate import evaluate
from sparsetrain.runs.quality import Quality, columns_of

VOCAB = 11
collate = Collator(0)


class Tokens(nn.Module):
    """Logits of a table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCAB, VOCAB)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.table(input_ids))


class Labels(Tokens):
    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.table(input_ids).mean(1))


def text_rows() -> Dataset:
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, VOCAB, (length,), generator=draw).tolist() for length in (5, 9, 3, 7, 6)]
    labels = [[-100, -100, *row[2:]] for row in ids]
    return Dataset.from_list([{"input_ids": i, "labels": j} for i, j in zip(ids, labels, strict=True)])


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_rows_of_text_add_up_to_the_loss(batch_size: int) -> None:
    model, rows = Tokens(), text_rows()
    found = evaluate(model, rows, collate, task="sft", batch_size=batch_size)
    assert found.by_row["count"] == [3, 7, 1, 5, 4]  # by row: the tokens with a label
    for row, loss in zip(rows, found.by_row["loss"], strict=True):
        ids: Any = row["input_ids"]  # type: ignore[index]
        expected = F.cross_entropy(model.table(torch.tensor(ids[1:-1])), torch.tensor(ids[2:]), reduction="sum")
        assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert sum(found.by_row["loss"]) / 20 == pytest.approx(found.loss, rel=1e-6)
    assert Quality.from_dict(found.to_dict()) == found


def test_rows_with_a_label_say_their_loss_and_whether_it_was_right() -> None:
    rows = Dataset.from_list([{"input_ids": [i, i + 1, i + 2], "labels": i} for i in range(1, 8)])
    found = evaluate(Labels(), rows, collate, task="classify", batch_size=3)
    assert found.by_row["count"] == [1.0] * 7 and set(found.by_row["accuracy"]) <= {0.0, 1.0}
    assert sum(found.by_row["accuracy"]) / 7 == pytest.approx(found.metrics["accuracy"])
    assert sum(found.by_row["loss"]) / 7 == pytest.approx(found.loss, rel=1e-5)


def test_one_batch_without_rows_leaves_none() -> None:
    assert columns_of([{"loss": [1.0], "count": [2.0]}, {"loss": [3.0], "count": [4.0]}]) == {
        "loss": [1.0, 3.0],
        "count": [2.0, 4.0],
    }
    assert columns_of([{"loss": [1.0], "count": [2.0]}, None]) == {} and columns_of([]) == {}
