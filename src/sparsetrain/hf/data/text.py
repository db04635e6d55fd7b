"""Text for language modelling: documents -> tokens -> rows of equal length, with held-out documents for evaluation."""

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sparsetrain.hf.data.bundle import (
    IGNORED_LABEL,
    Collator,
    DataBundle,
    Progress,
    check_length,
    check_ratio,
    padding_id,
)
from sparsetrain.hf.data.sources import Documents, HubChoice, Source, load_documents, source_name

# Characters tokenised in one call: long enough to keep the tokenizer busy, short enough to stop early and to report.
_BATCH_CHARS = 1 << 20
_PIECE_CHARS = 1 << 16


def load_text(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    *,
    pack: Literal["concat", "documents"] = "concat",
    eval_source: Source | None = None,
    eval_ratio: float = 0.05,
    max_tokens: int | None = None,
    max_eval_tokens: int | None = None,
    seed: int = 0,
    text_column: str = "text",
    dataset_config: str | None = None,
    split: str = "train",
    eval_split: str | None = None,
    max_position_embeddings: int | None = None,
    progress: Progress | None = None,
) -> DataBundle:
    """Rows of `seq_len` tokens for next-token prediction.

    Documents (files, or rows of JSONL, CSV, embedded and hub sets) are put in a seeded order, tokenised, each ended
    with the end-of-text token, joined, and cut into rows; the incomplete last row is counted, not used. Documents
    longer than 65,536 characters are tokenised in pieces that end at a line break.

    Held out are whole documents, the first `eval_ratio` of the seeded order (more if they do not fill one row); a
    training document with the text of a held-out one is dropped and counted. A source of one document is cut in two
    at a line break instead, its end held out.

    Labels equal the inputs, except -100 for the first token of a row, which nothing predicts: so the number of
    labels is the number of predictions, the loss's denominator.

    Args:
        source: a file, folder, glob, list of these, embedded name, `save_to_disk` folder or hub name.
        seq_len: tokens a row.
        pack: "concat": attention runs across documents. "documents": rows also carry `position_ids` that restart
            at each document, from which attention takes the boundaries, and no label crosses one.
        eval_source: a source of its own for evaluation, instead of a share of `source`.
        eval_ratio: share of documents held out; 0 for none.
        max_tokens: stop tokenising training documents here (rounded down to whole rows).
        max_eval_tokens: the same for evaluation; `eval_ratio * max_tokens` when only that is given.
        seed: of the document order, the split and the row order.
        text_column: the field with the text, for sources with rows.
        dataset_config, split: for hub data sets and saved folders.
        eval_split: a split of the same source to evaluate on.
        max_position_embeddings: the model's context, to check `seq_len` against.
        progress: called with one line now and then.

    Raises:
        ValueError: `seq_len` does not fit the model; the source is missing, empty, binary, not UTF-8 or malformed;
            either side has too few tokens for one row; the tokenizer has no end-of-text token.

    Cost: time of the tokenizer, for the tokens used and no more; the texts of JSONL and CSV files in memory.
    """
    if pack not in ("concat", "documents"):
        raise ValueError(f"pack={pack!r} is unknown. Use 'concat' or 'documents'.")
    check_length(seq_len, "seq_len", max_position_embeddings)
    check_ratio(eval_ratio)
    _check_limits(max_tokens, max_eval_tokens, seq_len)
    if max_tokens is not None and max_eval_tokens is None:
        max_eval_tokens = max(seq_len, int(eval_ratio * max_tokens))
    documents = load_documents(source, HubChoice(config=dataset_config, split=split), text_column)
    if eval_source is not None or eval_split is not None:
        held_out = load_documents(
            source if eval_source is None else eval_source,
            HubChoice(config=dataset_config, split=eval_split or split),
            text_column,
        )
        train_texts, eval_texts = _texts(documents, _order(documents, seed)), _texts(held_out, range(held_out.count))
        num_eval = held_out.count
    elif eval_ratio:
        train_texts, eval_texts, num_eval = _hold_out(documents, eval_ratio, seed)
    else:
        train_texts, eval_texts, num_eval = _texts(documents, _order(documents, seed)), iter(()), 0

    name = source_name(source)
    encoder = _Encoder(tokenizer, progress)
    counts = {"documents": documents.count, **documents.counts}
    rows_eval = None
    if num_eval:
        tokens = encoder.encode(eval_texts, max_eval_tokens, at_least=(num_eval, seq_len), side="eval")
        rows_eval = _rows(tokens, seq_len, pack, "eval", name, counts)
    tokens = encoder.encode(train_texts, max_tokens, at_least=None, side="train")
    rows_train = _rows(tokens, seq_len, pack, "train", name, counts)
    rows_train = rows_train.select(np.random.default_rng(seed).permutation(len(rows_train)), keep_in_memory=True)
    counts |= {"documents_empty": encoder.num_empty, "duplicates_of_eval": encoder.num_duplicates}
    return DataBundle(
        train=rows_train,
        eval=rows_eval,
        collate_fn=Collator(padding_id(tokenizer), attention_mask=False),
        description=_describe(name, documents.unit, seq_len, counts),
        counts=counts,
    )


@dataclass
class _Tokens:
    """A stream of token ids, with True where a document starts."""

    ids: np.ndarray
    starts: np.ndarray
    num_documents: int


class _Encoder:
    """Texts -> token streams; remembers what it saw, so that the training side drops copies of held-out texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, progress: Progress | None) -> None:
        self.tokenizer = tokenizer
        self.progress = progress
        self.end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if self.end is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no end-of-text token to put between documents. "
                "Set tokenizer.eos_token."
            )
        self.begin = beginning_ids(tokenizer)
        self.num_empty = 0
        self.num_duplicates = 0
        self._held_out: set[bytes] = set()

    def encode(
        self, texts: Iterator[str], limit: int | None, at_least: tuple[int, int] | None, side: str
    ) -> _Tokens:
        """Tokenise until `limit` tokens, or until `at_least` = (documents, tokens) are reached, or to the end."""
        ids: list[int] = []
        starts: list[int] = []
        reported = 0
        while limit is None or len(ids) < limit:
            if at_least is not None and len(starts) >= at_least[0] and len(ids) >= at_least[1]:
                break
            # About 4 characters a token: no batch reaches far past the limit.
            wanted = _BATCH_CHARS if limit is None else min(_BATCH_CHARS, 4 * (limit - len(ids)) + 256)
            most = None if at_least is None else max(1, at_least[0] - len(starts))
            batch = self._take(texts, wanted, most, side)
            if not batch:
                break
            pieces, owners = _pieces(batch, wanted)
            encoded = self.tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
            for piece_ids, (first, last) in zip(encoded, owners):
                if first:
                    starts.append(len(ids))
                    ids += self.begin
                ids += piece_ids
                if last:
                    ids.append(self.end)
            if self.progress is not None and len(ids) - reported >= 250_000:
                reported = len(ids)
                self.progress(f"{side}: {reported:,} tokens" + (f" of {limit:,}" if limit else ""))
        kept = np.asarray(ids[:limit], dtype=np.int32)
        is_start = np.zeros(len(kept), dtype=bool)
        is_start[[start for start in starts if start < len(kept)]] = True
        return _Tokens(ids=kept, starts=is_start, num_documents=int(is_start.sum()))

    def _take(self, texts: Iterator[str], chars: int, most: int | None, side: str) -> list[str]:
        """The next documents, up to about `chars` characters; blank ones and copies of held-out ones are counted."""
        batch: list[str] = []
        size = 0
        for text in texts:
            if not text.strip():
                self.num_empty += 1
                continue
            digest = hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).digest()
            if side == "eval":
                self._held_out.add(digest)
            elif digest in self._held_out:
                self.num_duplicates += 1
                continue
            batch.append(text)
            size += len(text)
            if size >= chars or len(batch) == most:
                break
        return batch
