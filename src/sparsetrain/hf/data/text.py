"""Text for language modelling: documents -> tokens -> rows of equal length, with held-out documents for evaluation."""

import hashlib
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sparsetrain.hf.data.bundle import (
    IGNORED_LABEL,
    Collator,
    DataBundle,
    Progress,
    beginning_ids,
    check_length,
    end_id,
    padding_id,
)
from sparsetrain.hf.data.sources import Documents, HubChoice, Source, load_documents, source_name
from sparsetrain.hf.data.split import check_ratio

# Characters tokenised in one call: enough to keep the tokenizer busy, few enough to stop early.
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
    longer than 65,536 characters are tokenised in pieces that end at a line break where there is one.

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
        max_eval_tokens: the same for evaluation; `eval_ratio * max_tokens` when only that is given (0.05 for a ratio
            of 0).
        seed: of the document order, the split and the row order.
        text_column: the field with the text, for sources with rows.
        dataset_config, split: for hub data sets and saved folders.
        eval_split: a split of the same source to evaluate on.
        max_position_embeddings: the model's context, to check `seq_len` against.
        progress: called with one line every quarter million tokens.

    Raises:
        ValueError: `seq_len` does not fit the model; the source is missing, empty, binary, not UTF-8 or malformed;
            either side has too few tokens for one row; the tokenizer has no end-of-text token.

    Cost: the tokenizer's time for the tokens used, and no more; the texts of JSONL and CSV files in memory.
    """
    if pack not in ("concat", "documents"):
        raise ValueError(f"pack={pack!r} is unknown. Use 'concat' or 'documents'.")
    check_length(seq_len, "seq_len", max_position_embeddings)
    check_ratio(eval_ratio)
    _check_limits(seq_len, max_tokens=max_tokens, max_eval_tokens=max_eval_tokens)
    if max_tokens is not None and max_eval_tokens is None:
        max_eval_tokens = max(seq_len, int((eval_ratio or 0.05) * max_tokens))
    documents = load_documents(source, HubChoice(config=dataset_config, split=split), text_column)
    others = None
    if eval_source is not None or eval_split is not None:
        choice = HubChoice(config=dataset_config, split=eval_split or split)
        others = load_documents(source if eval_source is None else eval_source, choice, text_column)

    stream = _TokenStream(tokenizer, progress)
    order = list(range(documents.count))
    random.Random(seed).shuffle(order)
    texts: Iterable[str] = map(documents.read, order)
    tokens_eval = None
    if others is not None:
        tokens_eval = stream.encode(map(others.read, range(others.count)), max_eval_tokens, "eval")
    elif eval_ratio and documents.count == 1:
        head, tail = _cut_at_line(documents.read(0), 1 - eval_ratio)
        texts = (head,)
        tokens_eval = stream.encode((tail,), max_eval_tokens, "eval")
    elif eval_ratio:
        tokens_eval, num_held_out = _encode_held_out(stream, documents, order, eval_ratio, max_eval_tokens, seq_len)
        texts = map(documents.read, order[num_held_out:])
    tokens_train = stream.encode(texts, max_tokens, "train")

    name = source_name(source)
    counts = {"documents": documents.count, **documents.counts, **stream.counts}
    rows_train = _rows(tokens_train, seq_len, pack, "train", name, counts)
    shuffled = np.random.default_rng(seed).permutation(len(rows_train["input_ids"]))
    rows_eval = None if tokens_eval is None else _rows(tokens_eval, seq_len, pack, "eval", name, counts)
    return DataBundle(
        train=Dataset.from_dict({key: value[shuffled] for key, value in rows_train.items()}),
        eval=None if rows_eval is None else Dataset.from_dict(rows_eval),
        collate_fn=Collator(padding_id(tokenizer), attention_mask=False),
        description=_describe(name, documents.unit, seq_len, counts),
        counts=counts,
    )


@dataclass(frozen=True)
class _Tokens:
    """A stream of token ids, and whether a document starts at each."""

    ids_n: np.ndarray
    starts_n: np.ndarray


class _TokenStream:
    """Texts -> token streams; remembers the held-out texts, so that training drops its copies of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, progress: Progress | None) -> None:
        end = end_id(tokenizer)
        if end is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no end-of-text token to put between documents. "
                "Set tokenizer.eos_token."
            )
        self.tokenizer = tokenizer
        self.progress = progress
        self.end_id = end
        self.begin_ids = beginning_ids(tokenizer)
        self.counts = {"documents_empty": 0, "duplicates_of_eval": 0}
        self._held_out: set[bytes] = set()

    def encode(self, texts: Iterable[str], limit: int | None, side: str) -> _Tokens:
        """Tokenise texts until they or the `limit` end; reads and tokenises little more than it returns."""
        pieces = self._pieces(texts, side)
        ids = array("i")  # 4 bytes a token; a list would take 36
        starts: list[int] = []
        reported = 0
        while limit is None or len(ids) < limit:
            # About 4 characters a token, so the last batch reaches little past the limit.
            batch = _take(pieces, _BATCH_CHARS if limit is None else min(_BATCH_CHARS, 4 * (limit - len(ids))))
            if not batch:
                break
            encoded = self.tokenizer([text for text, _, _ in batch], add_special_tokens=False, verbose=False)
            for piece_ids, (_, first, last) in zip(encoded["input_ids"], batch):
                if first:
                    starts.append(len(ids))
                    ids.extend(self.begin_ids)
                ids.extend(piece_ids)
                if last:
                    ids.append(self.end_id)
            if self.progress is not None and len(ids) - reported >= 250_000:
                reported = len(ids)
                self.progress(f"tokenised {reported:,} tokens" + (f" of {limit:,}" if limit else "") + f" ({side})")
        ids_n = np.array(ids[:limit], dtype=np.int32)
        starts_n = np.zeros(len(ids_n), dtype=bool)
        starts_n[[start for start in starts if start < len(ids_n)]] = True
        return _Tokens(ids_n, starts_n)

    def _pieces(self, texts: Iterable[str], side: str) -> Iterator[tuple[str, bool, bool]]:
        """(piece, is the first of its document, is the last); blank documents and copies are counted, not given."""
        for text in texts:
            if not text.strip():
                self.counts["documents_empty"] += 1
                continue
            digest = hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).digest()
            if side == "eval":
                self._held_out.add(digest)
            elif digest in self._held_out:
                self.counts["duplicates_of_eval"] += 1
                continue
            begin = 0
            while begin < len(text):
                end = _piece_end(text, begin)
                yield text[begin:end], begin == 0, end == len(text)
                begin = end


def _take(pieces: Iterator[tuple[str, bool, bool]], chars: int) -> list[tuple[str, bool, bool]]:
    batch = []
    while chars > 0 and (piece := next(pieces, None)) is not None:
        batch.append(piece)
        chars -= len(piece[0])
    return batch


def _piece_end(text: str, begin: int) -> int:
    if len(text) - begin <= _PIECE_CHARS:
        return len(text)
    return text.rfind("\n", begin, begin + _PIECE_CHARS) + 1 or begin + _PIECE_CHARS


def _encode_held_out(
    stream: _TokenStream, documents: Documents, order: list[int], eval_ratio: float, limit: int | None, seq_len: int
) -> tuple[_Tokens, int]:
    """Tokens of the first documents of `order`: the asked share, and more until they fill a row; and how many."""
    num_held_out = min(max(1, round(eval_ratio * len(order))), len(order) - 1)
    tokens = stream.encode(map(documents.read, order[:num_held_out]), limit, "eval")
    while len(tokens.ids_n) < seq_len and num_held_out < len(order) - 1:
        more = stream.encode((documents.read(order[num_held_out]),), limit, "eval")
        tokens = _Tokens(np.append(tokens.ids_n, more.ids_n), np.append(tokens.starts_n, more.starts_n))
        num_held_out += 1
    return tokens, num_held_out


def _cut_at_line(text: str, ratio: float) -> tuple[str, str]:
    """Two parts at the line break nearest before `ratio` of the text (at a character where there is none)."""
    middle = int(ratio * len(text))
    cut = text.rfind("\n", 0, middle) + 1 or middle
    return text[:cut], text[cut:]


def _rows(tokens: _Tokens, seq_len: int, pack: str, side: str, name: str, counts: dict[str, int]) -> dict[str, Any]:
    num_rows, left_over = divmod(len(tokens.ids_n), seq_len)
    if num_rows == 0:
        more = "" if side == "train" else " or hold out more (eval_ratio, eval_source)"
        raise ValueError(
            f"{name} is too little for one {side} row: seq_len={seq_len} tokens are asked, {left_over} were found. "
            f"Lower seq_len, give more text{more}."
        )
    kept = num_rows * seq_len
    ids_rt = tokens.ids_n[:kept].reshape(num_rows, seq_len)
    starts_rt = tokens.starts_n[:kept].reshape(num_rows, seq_len)
    labels_rt = ids_rt.copy()
    labels_rt[:, 0] = IGNORED_LABEL
    rows = {"input_ids": ids_rt, "labels": labels_rt}
    if pack == "documents":
        labels_rt[starts_rt] = IGNORED_LABEL
        columns_t = np.arange(seq_len, dtype=np.int32)
        rows["position_ids"] = columns_t - np.maximum.accumulate(np.where(starts_rt, columns_t, 0), axis=1)
    counts[f"{side}_documents"] = int(tokens.starts_n.sum())
    counts[f"{side}_rows"] = num_rows
    counts[f"{side}_tokens"] = kept
    counts[f"{side}_tokens_left_over"] = left_over
    return rows


def _check_limits(seq_len: int, **limits: int | None) -> None:
    for name, limit in limits.items():
        if limit is not None and limit < seq_len:
            raise ValueError(f"{name}={limit} is less than one row of seq_len={seq_len} tokens. Raise it.")


def _describe(name: str, unit: str, seq_len: int, counts: dict[str, int]) -> str:
    line = (
        f"{name}: {counts['train_rows']:,} rows of {seq_len:,} tokens "
        f"from {counts['train_documents']:,} of {counts['documents']:,} {unit}"
    )
    if "eval_rows" in counts:
        line += f"; held out: {counts['eval_rows']:,} rows from {counts['eval_documents']:,} {unit}"
    return line
