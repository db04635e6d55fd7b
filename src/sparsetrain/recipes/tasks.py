"""The table of tasks: what is learned from rows, and what the rest of the house has to know of it.

To add a task, add a row, or call `register_task` from a package that brings one. Whatever needs torch or transformers
is named as "module:name" and imported when it is first used, so that the table costs nothing to read.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from sparsetrain.core.config import suggest
from sparsetrain.core.metrics import METRICS


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task: facts about its rows and its model, and the names of what carries it out.

    name: as recipes and the command line spell it. says: what is learned, for help texts, by job.
    jobs: the recipes that offer it, of `finetune` and `pretrain`: the keys of `says`.
    metric: the quality that a run is judged by, of `core.metrics`.

    Facts of a row:
    labelled: it has one label, and the model a head for these labels, which is new and trained.
    padded: rows differ in length, and a batch has a mask.
    images: it is an image and no sequence of tokens; the model's config gives its size.
    texts: the model reads texts beside such rows, by a tokenizer of its own.
    sequences: how many sequences one encoder reads of it.

    Facts of the model:
    causal: it predicts each token from those before.
    model: its class, with `from_pretrained` and `from_config` as transformers' auto classes have them.
    new_model: the class for random weights, where that is another.
    adapter: PEFT's name of the task; "" where it has none and the model takes any adapter.

    What carries it out (types in `hf.train.tasks`):
    rows: (RowsAsked) -> DataBundle; None: its data are built in.
    scores: (model, batch) -> Scores of a held-out batch.
    loss: (model, batch) -> the training loss of a batch, its mean; None: the model's own.
    shows: (model, parts, folder, report) -> entries of the run's record: what a trained model makes, beside its
        quality; None: nothing.
    average: decay of the average of the weights that is kept, where the recipe says none; 0: none is.
    """

    name: str
    says: dict[str, str]
    metric: str
    labelled: bool = False
    padded: bool = False
    images: bool = False
    texts: bool = False
    sequences: int = 1
    causal: bool = False
    model: str
    new_model: str | None = None
    adapter: str | None = None
    rows: str | None = None
    scores: str
    loss: str | None = None
    shows: str | None = None
    average: float = 0.0

    @property
    def jobs(self) -> tuple[str, ...]:
        return tuple(self.says)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of its models, as "module:class"."""
        return tuple(dict.fromkeys((self.model, self.new_model or self.model)))


_NEXT_TOKEN: dict[str, Any] = {
    "metric": "perplexity",
    "causal": True,
    "model": "transformers:AutoModelForCausalLM",
    "adapter": "CAUSAL_LM",
    "scores": "sparsetrain.hf.train.tasks:next_token_scores",
}
_LABEL: dict[str, Any] = {
    "metric": "accuracy",
    "labelled": True,
    "scores": "sparsetrain.hf.train.tasks:label_scores",
}
_ENCODER = "sparsetrain.hf.model.classifier:EncoderClassifier"

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="lm",
            says={"finetune": "lm learns every token of packed text", "pretrain": "lm learns every token"},
            rows="sparsetrain.hf.train.tasks:text_rows",
            **_NEXT_TOKEN,
        ),
        Task(
            name="sft",
            says={"finetune": "sft the completions only"},
            padded=True,
            rows="sparsetrain.hf.train.tasks:sft_rows",
            **_NEXT_TOKEN,
        ),
        Task(
            name="classify",
            says={"finetune": "classify a label a text", "pretrain": "classify a label a sequence"},
            padded=True,
            model="transformers:AutoModelForSequenceClassification",
            new_model=_ENCODER,
            adapter="SEQ_CLS",
            rows="sparsetrain.hf.train.tasks:classify_rows",
            **_LABEL,
        ),
        Task(
            name="mlm",
            says={"pretrain": "mlm the 15 % of the tokens that are hidden from an encoder"},
            metric="perplexity",
            model="transformers:AutoModelForMaskedLM",
            rows="sparsetrain.hf.train.tasks:text_rows",
            scores="sparsetrain.hf.train.masked_tokens:masked_scores",
            loss="sparsetrain.hf.train.masked_tokens:masked_loss",
        ),
        Task(
            name="pairs",
            says={"pretrain": "pairs a label two sequences"},
            padded=True,
            sequences=2,
            model=_ENCODER,
            **_LABEL,
        ),
        Task(
            name="image",
            says={"finetune": "image a label an image", "pretrain": "image a label an image"},
            images=True,
            model="transformers:AutoModelForImageClassification",
            adapter="",
            rows="sparsetrain.hf.train.tasks:image_rows",
            **_LABEL,
        ),
        Task(
            name="diffusion",
            says={
                "finetune": "diffusion removes noise from images",
                "pretrain": "diffusion removes noise from images",
            },
            images=True,
            metric="noise_loss",
            model="sparsetrain.hf.model.denoising:DiffusionModel",
            adapter="",
            rows="sparsetrain.hf.train.diffusion:rows",
            scores="sparsetrain.hf.train.diffusion:scores",
            shows="sparsetrain.hf.train.image_quality:shows",
            average=0.999,
        ),
        Task(
            name="pair-image",
            says={"finetune": "pair-image a label an image, by a pair of encoders (CLIP)"},
            images=True,
            texts=True,
            model="sparsetrain.hf.model.pair:PairClassifier",
            adapter="",
            rows="sparsetrain.hf.train.tasks:image_rows",
            **_LABEL,
        ),
    )
}


def register_task(task: Task) -> None:
    """Add a task to the table; an equal one again does nothing.

    Raises:
        ValueError: the name is taken by another, or the metric is in no table.
    """
    if task.metric not in METRICS:
        raise ValueError(f"task {task.name!r} is judged by {task.metric!r}, which is no metric. Register it first.")
    if TASKS.setdefault(task.name, task) != task:
        raise ValueError(f"a task {task.name!r} is in the table already. Give yours another name.")


def task_of(name: str) -> Task:
    """The row of a task.

    Raises:
        ValueError: no task has that name.
    """
    if name not in TASKS:
        raise ValueError(f"task={name!r} is unknown.{suggest(str(name), TASKS)} Tasks: {', '.join(TASKS)}.")
    return TASKS[name]


def offered(job: str) -> list[str]:
    """The tasks of a job, by name."""
    return [name for name, task in TASKS.items() if job in task.jobs]


def says(job: str) -> str:
    """What the tasks of a job learn, in a sentence."""
    return "; ".join(TASKS[name].says[job] for name in offered(job)) + "."


def named(place: str) -> Any:
    """What "module:name" names, imported."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
