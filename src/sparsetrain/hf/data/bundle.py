"""What every loader returns."""

from collections.abc import Callable
from dataclasses import dataclass, field

from datasets import Dataset
from torch.utils.data import IterableDataset

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
