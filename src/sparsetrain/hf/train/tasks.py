"""What carries out the tasks of `recipes.tasks`: their rows, the scores of a held-out batch, the loss of training."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.data.collate import IGNORED_LABEL, PackedCollator
from sparsetrain.data.packing import pack_whole
from sparsetrain.hf.data import DataBundle, load_classify, load_images, load_sft, load_text
from sparsetrain.hf.data.bundle import Progress
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.recipes.tasks import named, task_of

PIECE = 2**22
"""Logits of which the loss is computed at once: small enough that a buffer is used again and not mapped anew."""

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class RowsAsked:
    """What a run asks of its rows.

    source: a file, folder or name, as `hf.data` takes it. tokenizer: of text; of pictures the image processor of a
        trained model; else None.
    image: (channels, height, width) to which pictures without such a processor are brought; None: they stay.
    step_rows: rows that the steps read; None: all there are. step_tokens: the same where text is cut into rows.
    max_rows, max_eval_rows: labelled rows to use, as the recipe limits them; None: all.
    context: tokens that the model takes; None: unknown, or checked already.
    eval_source, eval_split: what is held out, in place of a share: a source, a split of it; None: a share.
    hub: which part and split of a data set of the hub is read, as the loaders of text take it.
    eval_ratio: share that is held out; None: as the loader has it.
    progress: called with a line now and then.
    """

    recipe: RunRecipe
    source: Any
    tokenizer: Any = None
    image: tuple[int, int, int] | None = None
    step_rows: int | None = None
    step_tokens: int | None = None
    max_rows: int | None = None
    max_eval_rows: int | None = None
    context: int | None = None
    eval_source: Any = None
    eval_split: str | None = None
    hub: Mapping[str, Any] = field(default_factory=dict)
    eval_ratio: float | None = None
    progress: Progress | None = None

    @property
    def of_text(self) -> dict[str, Any]:
        """What all loaders of text are told."""
        ratio = {} if self.eval_ratio is None else {"eval_ratio": self.eval_ratio}
        told = {"seed": self.recipe.seed, "max_position_embeddings": self.context, "progress": self.progress}
        return {**told, **ratio, **self.hub, "eval_source": self.eval_source, "eval_split": self.eval_split}

    @property
    def streamed(self) -> dict[str, Any]:
        """What loaders of text are told beside, where rows are read while it trains."""
        return {"stream_ahead": self.recipe.stream_rows} if self.recipe.streaming else {}


def load_asked(asked: RowsAsked) -> DataBundle:
    """The rows of a recipe's task.

    Raises:
        ValueError: the task's data are built in, and no source was one of them; or as the loader.
    """
    place = task_of(asked.recipe.task).rows
    if place is None:
        raise ValueError(f"task={asked.recipe.task} reads no files, and data={asked.source} was given.")
    return named(place)(asked)


def text_rows(asked: RowsAsked) -> DataBundle:
    """Packed text; no more is tokenised than the steps need."""
    recipe = asked.recipe
    return load_text(
        asked.source,
        asked.tokenizer,
        recipe.seq_len,
        pack="documents" if _packs(recipe) else "concat",
        text_column=recipe.text_column,
        holdout=recipe.holdout,
        max_tokens=asked.step_tokens,
        max_eval_tokens=max(recipe.eval_tokens, recipe.seq_len),
        **asked.of_text,
        **asked.streamed,
    )


def sft_rows(asked: RowsAsked) -> DataBundle:
    """Conversations, with labels on what the assistant says."""
    recipe, packs = asked.recipe, _packs(asked.recipe)
    rows = None if packs else asked.step_rows  # how many a packed row holds is known when they are packed
    options = asked.of_text | asked.streamed
    bundle = load_sft(asked.source, asked.tokenizer, recipe.seq_len, max_rows=rows, **options)
    return _packed(bundle, recipe.seq_len) if packs else bundle


def _packed(bundle: DataBundle, seq_len: int) -> DataBundle:
    """Several training rows in one, with `position_ids` that restart at each; held-out rows stay apart."""
    train = Dataset.from_dict(pack_whole(bundle.train["input_ids"], bundle.train["labels"], seq_len))  # type: ignore
    said = f"{bundle.description}; packed into {len(train):,} rows of at most {seq_len:,} tokens"
    counts = {**bundle.counts, "train_packed_rows": len(train)}
    collate: Any = bundle.collate_fn
    return replace(
        bundle, train=train, description=said, counts=counts, collate_fn=PackedCollator(collate.pad_token_id)
    )


def _packs(recipe: RunRecipe) -> bool:
    return bool(getattr(recipe, "packing", False))


def classify_rows(asked: RowsAsked) -> DataBundle:
    """Texts with a label each."""
    return load_classify(
        asked.source,
        asked.tokenizer,
        asked.recipe.seq_len,
        text_column=asked.recipe.text_column,
        max_rows=asked.max_rows,
        max_eval_rows=asked.max_eval_rows,
        **asked.of_text,
    )


def image_rows(asked: RowsAsked) -> DataBundle:
    """Images with a label each; those of a trained model as its processor makes them."""
    bundle = load_images(
        asked.source,
        max_rows=asked.max_rows,
        max_eval_rows=asked.max_eval_rows,
        seed=asked.recipe.seed,
        processor=getattr(asked.tokenizer, "pictures", asked.tokenizer),  # of a pair's reader
        image=asked.image,
        eval_split=asked.eval_split,
        **asked.hub,
    )
    if bundle.num_labels < 2:
        raise ValueError(
            f"data={asked.source} has pictures of one class, {bundle.label_names[0]!r}, and to classify takes two. "
            "Give a folder a class, or name each picture's in the column label of a metadata.csv."
        )
    return bundle


class Scores(NamedTuple):
    """What a held-out batch gave: the summed loss, over how many targets, and other sums over these by metric.

    by_row: `loss`, `count` and the metrics -> one number a row, from which two models are told apart; may be left out.
    """

    loss: float
    count: int
    sums: dict[str, float]
    by_row: dict[str, list[float]] | None = None


def next_token_scores(model: Any, batch: Batch) -> Scores:
    """Negative log-likelihood of the labelled tokens; in pieces, as logits are large, and of few where few are asked
    for: the head is a fifth of a small model."""
    inputs: dict[str, Any] = dict(batch)
    if "position_ids" in inputs:  # with a cache, transformers does not see the boundaries in them
        inputs["use_cache"] = False
    target_bt = inputs.pop("labels")[:, 1:]
    asked_k = (target_bt != IGNORED_LABEL).any(0).nonzero()[:, 0]
    if 2 * len(asked_k) <= target_bt.shape[1] and _keeps_logits(model):
        logits_bkv, target_bk = model(**inputs, logits_to_keep=asked_k).logits, target_bt[:, asked_k]
    else:
        logits_bkv, target_bk = model(**inputs).logits[:, :-1], target_bt
    piece, rows = max(1, PIECE // logits_bkv.shape[-1]), list[float]()
    for logits_kv, target_k in zip(logits_bkv, target_bk, strict=True):
        rows.append(0.0)
        for logits_pv, target_p in zip(logits_kv.split(piece), target_k.split(piece), strict=True):
            losses = F.cross_entropy(logits_pv.float(), target_p, ignore_index=IGNORED_LABEL, reduction="sum")
            rows[-1] += losses.item()
    counts_b = (target_bt != IGNORED_LABEL).sum(-1)
    return Scores(sum(rows), int(counts_b.sum()), {}, {"loss": rows, "count": counts_b.tolist()})


def _keeps_logits(model: Any) -> bool:
    """Can it be told for which positions logits are wanted?"""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # an adapter takes anything
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def label_scores(model: Any, batch: Batch) -> Scores:
    """Cross-entropy of the rows' labels, and how many were the likeliest."""
    inputs = dict(batch)
    labels_b = inputs.pop("labels")
    logits_bc = model(**inputs).logits
    loss = F.cross_entropy(logits_bc.float(), labels_b, reduction="sum").item()
    right_b = logits_bc.argmax(-1) == labels_b
    by_row = {
        "loss": F.cross_entropy(logits_bc.float(), labels_b, reduction="none").tolist(),
        "count": [1.0] * len(labels_b),
        "accuracy": right_b.float().tolist(),
    }
    return Scores(loss, len(labels_b), {"accuracy": right_b.sum().item()}, by_row)


def training_loss(model: Any, batch: Batch, task: str) -> Tensor:
    """The loss of a training batch, a mean: the task's own, or what the model says."""
    own = task_of(task).loss
    return model(**batch).loss if own is None else named(own)(model, batch)


def use_task_loss(trainer: Any, task: str) -> None:
    """Let a Trainer train on the task's own loss, if it has one; call it once the trainer is made."""
    if task_of(task).loss is None:
        return

    def compute_loss(model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        loss = training_loss(model, inputs, task)
        return (loss, {}) if return_outputs else loss

    trainer.compute_loss = compute_loss
    trainer.model_accepts_loss_kwargs = False  # it is a mean of the batch: accumulation divides it
