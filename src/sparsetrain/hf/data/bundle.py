"""What every loader returns, and what the loaders ask of a tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass, field

from datasets import Dataset
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from sparsetrain.data.collate import Collate

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class DataBundle:
    """Training and held-out rows with their collator.

    `counts` says how many rows, documents and tokens were used, cut or dropped, and why; `description` is one line
    for a report. `label_names` is set by the classification loaders, in the order of the label ids. `stream`: what is
    trained on where the data is too large to hold; `train` are then its first rows.
    """

    train: Dataset
    eval: Dataset | None
    collate_fn: Collate
    description: str
    counts: dict[str, int] = field(default_factory=dict)
    label_names: tuple[str, ...] = ()
    stream: IterableDataset | None = None

    @property
    def trained_on(self) -> Dataset | IterableDataset:
        """What a trainer is given."""
        return self.train if self.stream is None else self.stream

    @property
    def num_labels(self) -> int:
        """Number of classes; 0 where the task has none."""
        return len(self.label_names)


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
