"""What every loader returns, the collator, and what the loaders ask of a tokenizer."""

from collections.abc import Callable, Sequence
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
        if isinstance(token_id, int):
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


def beginning_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[the beginning-of-text token] when the tokenizer puts one before a text (Llama, Gemma), else []."""
    ids = tokenizer("")["input_ids"]
    begins = isinstance(ids, list) and len(ids) > 0 and ids[0] == tokenizer.bos_token_id
    return [ids[0]] if begins else []


def end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The end-of-text token, else the separator that BERT-like tokenizers have, else None."""
    for token_id in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if isinstance(token_id, int):
            return token_id
    return None
