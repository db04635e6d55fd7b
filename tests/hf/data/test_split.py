"""Splitting rows and padding batches."""

from sparsetrain.data.collate import Collator
from sparsetrain.data.split import split_rows


def test_split_rows_shares_strata_and_lone_rows():
    keys = [str(i) for i in range(100)]
    train, held_out = split_rows(keys, 0.1, seed=0)
    assert len(held_out) == 10 and sorted(train + held_out) == list(range(100))
    assert split_rows(keys, 0, seed=0)[1] == []
    strata = ["common"] * 99 + ["rare"]
    train, held_out = split_rows(keys, 0.5, seed=0, strata=strata)
    assert 99 in train and len(held_out) == 50
    assert split_rows(["same"] * 5, 0.5, seed=0) == ([0, 1, 2, 3, 4], [])


def test_collator_pads_each_field_with_its_own_value():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "position_ids": [0, 1, 2]},
        {"input_ids": [8], "labels": [8], "position_ids": [0]},
    ]
    batch = Collator(9, multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9], [8, 9, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100], [8, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0], [0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert "attention_mask" not in Collator(9, attention_mask=False)(rows)
