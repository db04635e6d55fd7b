"""What every loader returns, the collator, and the split into training and held-out rows."""

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class DataBundle:
    """Training and held-out rows with their collator.

    `counts` says how many rows, documents and tokens were used, cut or dropped, and why; `description` is one line
    for a report. `label_names` is set by the classification loaders, in the order of the label ids.
    """

    train: Dataset
    eval: Dataset | None
    collate_fn: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
    description: str
    counts: dict[str, int] = field(default_factory=dict)
    label_names: tuple[str, ...] = ()

    @property
    def num_labels(self) -> int:
        """Number of classes; 0 where the task has none."""
        return len(self.label_names)


_PADDING = {"labels": IGNORED_LABEL, "attention_mask": 0, "position_ids": 0, "token_type_ids": 0}


@dataclass(frozen=True)
class Collator:
    """Rows -> a batch of tensors; lists of unequal length are padded on the right.

    Args:
        pad_token_id: fills `input_ids`.
        attention_mask: whether to add the mask of real tokens. Packed rows are full and must go without: a 2-D mask
            keeps transformers from seeing the document boundaries in `position_ids`.
        multiple_of: lengths are padded to a multiple of this.
    """

    pad_token_id: int
    attention_mask: bool = True
    multiple_of: int = 1

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self.multiple_of) * self.multiple_of
        batch = {}
        for key in rows[0]:
            values = [row[key] for row in rows]
            if isinstance(values[0], Sequence) or getattr(values[0], "ndim", 0):
                fill = self.pad_token_id if key == "input_ids" else _PADDING[key]
                values = [[*value, *[fill] * (length - len(value))] for value in values]
            batch[key] = torch.as_tensor(values, dtype=torch.long)
        if self.attention_mask:
            lengths_b = torch.tensor([len(row["input_ids"]) for row in rows])
            batch["attention_mask"] = (torch.arange(length) < lengths_b[:, None]).long()
        return batch


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills short rows: the padding token, else the end-of-text one (masked and unlabelled anyway).

    Raises:
        ValueError: the tokenizer has neither.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError(
        f"{type(tokenizer).__name__} has neither a padding nor an end-of-text token, so rows cannot be padded. "
        "Set tokenizer.pad_token."
    )


def check_length(length: int, argument: str, max_position_embeddings: int | None) -> None:
    """A row length a model can take.

    Raises:
        ValueError: shorter than 2 tokens, or longer than the model's context.
    """
    if length < 2:
        raise ValueError(f"{argument}={length}: a row needs at least 2 tokens, one to predict the other. Raise it.")
    if max_position_embeddings is not None and length > max_position_embeddings:
        raise ValueError(
            f"{argument}={length} is longer than the model's context: max_position_embeddings="
            f"{max_position_embeddings}. Use at most that, or a model with a longer context."
        )


def check_ratio(eval_ratio: float) -> None:
    """Raises ValueError unless the held-out share lies in [0, 1)."""
    if not 0 <= eval_ratio < 1:
        raise ValueError(f"eval_ratio={eval_ratio} is not a share of the data. Use a number in [0, 1).")


def split_rows(
    keys: Sequence[str], eval_ratio: float, seed: int, strata: Sequence[Hashable] | None = None
) -> tuple[list[int], list[int]]:
    """Indices of the training and the held-out rows, each in a seeded order that depends on the keys alone.

    Rows with equal keys always land on the same side, so no held-out text is trained on. Keys are ordered by
    sha256(seed, key) and the first round(eval_ratio * n) distinct ones, at least one and never all, are held out, in
    each stratum.
    """
    rank = {key: hashlib.sha256(f"{seed}\n{key}".encode()).digest() for key in set(keys)}
    held_out: set[str] = set()
    for stratum in set(strata) if strata is not None and eval_ratio else {None}:
        members = {key for i, key in enumerate(keys) if strata is None or strata[i] == stratum}
        # A lone row stays in training: a class seen only in evaluation could not be learnt.
        num_eval = min(max(1, round(eval_ratio * len(members))), len(members) - 1) if eval_ratio else 0
        held_out.update(sorted(members, key=rank.__getitem__)[:num_eval])
    order = sorted(range(len(keys)), key=lambda i: (rank[keys[i]], i))
    train = [i for i in order if keys[i] not in held_out]
    return train, [i for i in order if keys[i] in held_out]


def empty_side(side: str, asked: str, found: str) -> ValueError:
    """The error for a side of the split that no row is left for."""
    more = "more data, or another eval_ratio" if side == "eval" else "more data, or a smaller eval_ratio"
    return ValueError(f"No {side} rows are left of {asked}: found {found}. Give {more}.")
