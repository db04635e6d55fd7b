"""Text for language modelling: documents -> tokens -> rows of equal length, with held-out documents for evaluation.

Documents (files, or rows of JSONL, CSV, embedded and hub sets) are put in a seeded order, tokenised, each ended with
the end-of-text token, joined, and cut into rows; the incomplete last row is counted, not used. Documents longer than
65,536 characters are tokenised in pieces that end at a line break where there is one.

Held out is a share of the text, more if it does not fill one row: whole documents, the first of that order, where these
are of about equal length; a document that alone would be too much of the text (a book among notes, or the only one) is
cut in two at a line break, its end held out (`share_of_text`). With `holdout="documents"` it is a share of the
documents, whatever their length. A training document with a held-out one's text is dropped and counted.

Documents may be packed in two ways. "concat": attention runs across them. "documents": rows also carry `position_ids`
that restart at each, from which attention takes the boundaries, and no label crosses one.

Cost: the tokenizer's time for the tokens used, and no more; the texts of JSONL and CSV files in memory.

Labels equal the inputs, except -100 for the first token of a row, which nothing predicts: so the number of labels is
the number of predictions, the loss's denominator.
"""

from functools import partial
from typing import Literal, get_args

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sparsetrain.data.collate import Collator, check_length
from sparsetrain.data.documents import Documents
from sparsetrain.data.packing import Tokens, describe, packed_rows
from sparsetrain.data.remarks import Remarks
from sparsetrain.data.special_tokens import padding_id
from sparsetrain.data.split import check_ratio
from sparsetrain.data.tokens import Holdout, Split, later_rows
from sparsetrain.hf.data.bundle import DataBundle, Progress
from sparsetrain.hf.data.sources import EvalChoice, HubChoice, Source, source_name
from sparsetrain.hf.data.streams import Ahead


def load_text(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    *,
    pack: Literal["concat", "documents"] = "concat",
    holdout: Holdout = "tokens",
    eval_source: Source | None = None,
    eval_ratio: float = 0.05,
    max_tokens: int | None = None,
    max_eval_tokens: int | None = None,
    seed: int = 0,
    text_column: str = "text",
    dataset_config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    eval_split: str | None = None,
    max_position_embeddings: int | None = None,
    progress: Progress | None = None,
    stream_ahead: int | None = None,
) -> DataBundle:
    """Rows of `seq_len` tokens for next-token prediction, made as described above.

    Args:
        source: a file, folder, glob, list of these, embedded name, `save_to_disk` folder or hub name.
        pack, holdout: as above; `eval_ratio` is a share of what `holdout` says.
        eval_source, eval_split: held-out documents of their own, instead of the share `eval_ratio` (0 for none).
        max_tokens: stop tokenising training documents here (rounded down to whole rows).
        max_eval_tokens: the same for evaluation; `eval_ratio * max_tokens` when only that is given (0.05 for 0).
        seed: of document order, split and row order. max_position_embeddings: the model's context, for `seq_len`.
        text_column; dataset_config, split, revision: for sources with rows; for hub data sets and saved folders.
        progress: called with one line every quarter million tokens.
        stream_ahead: read this many documents, and all others when training comes to them (`data.streams`).

    Raises:
        ValueError: `seq_len` does not fit the model; the source is missing, empty, binary, not UTF-8 or malformed;
            either side has too few tokens for one row; the tokenizer has no end-of-text token.
    """
    _check_asked(pack, holdout, seq_len, eval_ratio, max_tokens, max_eval_tokens, max_position_embeddings)
    limit = _most_held_out(seq_len, eval_ratio, max_tokens, max_eval_tokens)
    hub, ahead = HubChoice(config=dataset_config, split=split, revision=revision), Ahead(stream_ahead)
    documents = ahead.documents(source, hub, text_column, remarks := Remarks())
    choice = EvalChoice(source=eval_source, split=eval_split, ratio=eval_ratio)
    others = _own_eval(source, hub, choice, text_column, remarks, ahead)
    parts = Split(tokenizer, progress, documents, seed)
    tokens_eval, texts = parts.by_others(others, limit) if others else parts.by(holdout, eval_ratio, limit, seq_len)
    tokens_train = parts.stream.encode(texts, max_tokens, "train")
    counts = {"documents": documents.count, **documents.counts, **parts.stream.counts}
    train, held_out = _sides(tokens_train, tokens_eval, seq_len, pack, source_name(source), counts, seed)
    said = describe(source_name(source), documents.unit, seq_len, counts)
    later = partial(ahead.later_texts, source, hub, text_column)
    rest = partial(later_rows, later, parts.stream, seq_len, pack)
    return DataBundle(
        train=train,
        eval=held_out,
        collate_fn=Collator(padding_id(tokenizer), attention_mask=False),
        description=f"{said}{remarks.text()}{ahead.says(documents.count)}",
        counts=counts,
        stream=ahead.stream(train, rest, seed, progress),
    )


def _most_held_out(seq_len: int, eval_ratio: float, max_tokens: int | None, most: int | None) -> int | None:
    """Most tokens to evaluate: as asked, else the share of the most that are trained on."""
    return max(seq_len, int((eval_ratio or 0.05) * max_tokens)) if max_tokens and most is None else most


def _own_eval(
    source: Source,
    hub: HubChoice,
    choice: EvalChoice,
    text_column: str,
    remarks: Remarks,
    ahead: Ahead,
) -> Documents | None:
    """Documents of a source or split of their own for evaluation; None: a share of the training documents."""
    if choice.source is None and choice.split is None:
        return None
    other = source if choice.source is None else choice.source
    return ahead.documents(other, choice.part(hub), text_column, remarks)


def _sides(
    train: Tokens, held_out: Tokens | None, seq_len: int, pack: str, name: str, counts: dict[str, int], seed: int
) -> tuple[Dataset, Dataset | None]:
    """Training rows in a seeded order, and held-out rows."""
    rows = packed_rows(train, seq_len, pack, "train", name, counts)
    shuffled = np.random.default_rng(seed).permutation(len(rows["input_ids"]))
    rows_eval = None if held_out is None else packed_rows(held_out, seq_len, pack, "eval", name, counts)
    return (
        Dataset.from_dict({key: value[shuffled] for key, value in rows.items()}),
        None if rows_eval is None else Dataset.from_dict(rows_eval),
    )


def _check_asked(
    pack: str,
    holdout: str,
    seq_len: int,
    eval_ratio: float,
    max_tokens: int | None,
    max_eval_tokens: int | None,
    max_position_embeddings: int | None,
) -> None:
    if pack not in ("concat", "documents"):
        raise ValueError(f"pack={pack!r} is unknown. Use 'concat' or 'documents'.")
    if holdout not in get_args(Holdout):
        raise ValueError(f"holdout={holdout!r} is unknown. Use 'tokens' or 'documents'.")
    check_length(seq_len, "seq_len", max_position_embeddings)
    check_ratio(eval_ratio)
    for name, limit in (("max_tokens", max_tokens), ("max_eval_tokens", max_eval_tokens)):
        if limit is not None and limit < seq_len:
            raise ValueError(f"{name}={limit} is less than one row of seq_len={seq_len} tokens. Raise it.")
