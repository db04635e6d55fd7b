"""Text for language modelling: documents -> tokens -> rows of equal length, with held-out documents for evaluation.

Documents (files, or rows of JSONL, CSV, embedded and hub sets) are put in a seeded order, tokenised, each ended with
the end-of-text token, joined, and cut into rows; the incomplete last row is counted, not used. Documents longer than
65,536 characters are tokenised in pieces that end at a line break where there is one.

Held out is a share of the text, more if it does not fill one row: whole documents, the first of that order, where these
are of about equal length; a document that alone would be too much of the text (a book among notes, or the only one) is
cut in two at a line break, its end held out (`share_of_text`). With `holdout="documents"` it is a share of the
documents, whatever their length. A training document with a held-out one's text is dropped and counted.

Labels equal the inputs, except -100 for the first token of a row, which nothing predicts: so the number of labels is
the number of predictions, the loss's denominator.
"""

import hashlib
import random
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from typing import Literal, get_args

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sparsetrain.data.collate import Collator, check_length
from sparsetrain.data.documents import Documents
from sparsetrain.data.packing import Tokens, cut_at_line, describe, packed_rows, piece_end, take_chars, take_pieces
from sparsetrain.data.remarks import Remarks
from sparsetrain.data.split import check_ratio, num_held_out, share_of_text
from sparsetrain.hf.data.bundle import (
    DataBundle,
    Progress,
    beginning_ids,
    end_id,
    padding_id,
)
from sparsetrain.hf.data.sources import EvalChoice, HubChoice, Source, load_documents, source_name
from sparsetrain.hf.data.streams import Encoded, Stream, ahead, first_documents, stream_texts

Holdout = Literal["tokens", "documents"]
# Characters tokenised in one call: enough to keep the tokenizer busy, few enough to stop early.
_BATCH_CHARS = 1 << 20


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
    eval_split: str | None = None,
    max_position_embeddings: int | None = None,
    progress: Progress | None = None,
    stream_ahead: int | None = None,
) -> DataBundle:
    """Rows of `seq_len` tokens for next-token prediction, made as described above.

    Args:
        source: a file, folder, glob, list of these, embedded name, `save_to_disk` folder or hub name.
        pack: "concat": attention runs across documents. "documents": rows also carry `position_ids` that restart
            at each document, from which attention takes the boundaries, and no label crosses one.
        holdout: what `eval_ratio` is a share of: "tokens", or "documents", which stay whole unless there is one alone.
        eval_source, eval_split: held-out documents of their own, instead of the share `eval_ratio` (0 for none).
        max_tokens: stop tokenising training documents here (rounded down to whole rows).
        max_eval_tokens: the same for evaluation; `eval_ratio * max_tokens` when only that is given (0.05 for 0).
        seed: of the document order, the split and the row order.
        text_column: the field with the text, for sources with rows.
        dataset_config, split: for hub data sets and saved folders.
        max_position_embeddings: the model's context, to check `seq_len` against.
        progress: called with one line every quarter million tokens.
        stream_ahead: read this many documents, and all others when training comes to them (`hf.data.streams`); long
            text files are then cut into several.

    Raises:
        ValueError: `seq_len` does not fit the model; the source is missing, empty, binary, not UTF-8 or malformed;
            either side has too few tokens for one row; the tokenizer has no end-of-text token.

    Cost: the tokenizer's time for the tokens used, and no more; the texts of JSONL and CSV files in memory.
    """
    _check_asked(pack, holdout, seq_len, eval_ratio, max_tokens, max_eval_tokens, max_position_embeddings)
    if max_tokens is not None and max_eval_tokens is None:
        max_eval_tokens = max(seq_len, int((eval_ratio or 0.05) * max_tokens))
    hub = HubChoice(config=dataset_config, split=split)
    read = load_documents if stream_ahead is None else partial(first_documents, count=stream_ahead)
    documents = read(source, hub, text_column, remarks := Remarks())
    choice = EvalChoice(source=eval_source, split=eval_split, ratio=eval_ratio)
    others = _own_eval(source, hub, choice, text_column, remarks, read)
    parts, limit = _Split(tokenizer, progress, documents, seed), max_eval_tokens
    tokens_eval, texts = parts.by_others(others, limit) if others else parts.by(holdout, eval_ratio, limit, seq_len)
    tokens_train = parts.stream.encode(texts, max_tokens, "train")
    counts = {"documents": documents.count, **documents.counts, **parts.stream.counts}
    train, held_out = _sides(tokens_train, tokens_eval, seq_len, pack, source_name(source), counts, seed)
    stream = None
    if stream_ahead is not None:

        def rest() -> Iterator[Encoded]:
            texts = islice(stream_texts(source, hub, text_column, Remarks()), stream_ahead, None)
            return _later_rows(texts, parts.stream, seq_len, pack)

        stream = Stream(train, rest, seed, progress)
    return DataBundle(
        train=train,
        eval=held_out,
        collate_fn=Collator(padding_id(tokenizer), attention_mask=False),
        description=describe(source_name(source), documents.unit, seq_len, counts)
        + remarks.text()
        + ahead(stream_ahead, documents.count),
        counts=counts,
        stream=stream,
    )


def _later_rows(texts: Iterator[str], tokens: "_TokenStream", seq_len: int, pack: str) -> Iterator[Encoded]:
    """Rows of texts that are read as they are asked for, in their order; tokens that fill no row wait for the next."""
    tokens, left = tokens.silent(), Tokens(np.empty(0, dtype=np.int32), np.empty(0, dtype=bool))
    while some := take_chars(texts, _BATCH_CHARS):
        more = tokens.encode(some, None, "train")
        left = Tokens(np.append(left.ids_n, more.ids_n), np.append(left.starts_n, more.starts_n))
        used = len(left.ids_n) // seq_len * seq_len
        if used:
            columns = packed_rows(left, seq_len, pack, "train", "", {})
            for i in range(used // seq_len):
                yield {name: column[i].tolist() for name, column in columns.items()}
            left = Tokens(left.ids_n[used:], left.starts_n[used:])


def _own_eval(
    source: Source,
    hub: HubChoice,
    choice: EvalChoice,
    text_column: str,
    remarks: Remarks,
    read: Callable[[Source, HubChoice, str, Remarks], Documents],
) -> Documents | None:
    """Documents of a source or split of their own for evaluation; None: a share of the training documents."""
    if choice.source is None and choice.split is None:
        return None
    other = source if choice.source is None else choice.source
    return read(other, HubChoice(config=hub.config, split=choice.split or hub.split), text_column, remarks)


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

    def encode(self, texts: Iterable[str], limit: int | None, side: str) -> Tokens:
        """Tokenise texts until they or the `limit` end; reads and tokenises little more than it returns."""
        pieces = self._pieces(texts, side)
        ids = array("i")  # 4 bytes a token; a list would take 36
        starts: list[int] = []
        reported = 0
        while limit is None or len(ids) < limit:
            # About 4 characters a token, so the last batch reaches little past the limit.
            batch = take_pieces(pieces, _BATCH_CHARS if limit is None else min(_BATCH_CHARS, 4 * (limit - len(ids))))
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
        return Tokens(ids_n, starts_n)

    def silent(self) -> "_TokenStream":
        """The same tokenizer and held-out texts, counting for itself."""
        made = _TokenStream(self.tokenizer, None)
        made._held_out = self._held_out
        return made

    def keep_out(self, text: str) -> None:
        """Drop training documents with this text from now on."""
        self._held_out.add(_digest(text))

    def _pieces(self, texts: Iterable[str], side: str) -> Iterator[tuple[str, bool, bool]]:
        """(piece, is the first of its document, is the last); blank documents and copies are counted, not given."""
        for text in texts:
            if not text.strip():
                self.counts["documents_empty"] += 1
                continue
            if side == "eval":
                self.keep_out(text)
            elif _digest(text) in self._held_out:
                self.counts["duplicates_of_eval"] += 1
                continue
            begin = 0
            while begin < len(text):
                end = piece_end(text, begin)
                yield text[begin:end], begin == 0, end == len(text)
                begin = end


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).digest()


class _Split:
    """Documents in their seeded order, divided in two; each way gives (tokens held out, texts left to train on)."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, progress: Progress | None, documents: Documents, seed: int
    ) -> None:
        self.stream = _TokenStream(tokenizer, progress)
        self.documents = documents
        self.order = list(range(documents.count))
        random.Random(seed).shuffle(self.order)

    def texts(self, order: Iterable[int]) -> Iterator[str]:
        return map(self.documents.read, order)

    def by_others(self, others: Documents, limit: int | None) -> tuple[Tokens, Iterable[str]]:
        """Held out: documents that are no part of the source."""
        return self.stream.encode(map(others.read, range(others.count)), limit, "eval"), self.texts(self.order)

    def by(
        self, holdout: Holdout, ratio: float, limit: int | None, seq_len: int
    ) -> tuple[Tokens | None, Iterable[str]]:
        """Held out: a share of the documents, or of their tokens; None where it is 0."""
        if not ratio:
            return None, self.texts(self.order)
        if holdout == "tokens" or self.documents.count == 1:
            return self.by_tokens(ratio, limit, seq_len)
        return self.by_documents(ratio, limit, seq_len)

    def by_documents(self, ratio: float, limit: int | None, seq_len: int) -> tuple[Tokens, Iterable[str]]:
        """Held out: the first documents of the order, the asked share, and more until they fill a row."""
        count = num_held_out(len(self.order), ratio)
        tokens = self.stream.encode(self.texts(self.order[:count]), limit, "eval")
        while len(tokens.ids_n) < seq_len and count < len(self.order) - 1:
            more = self.stream.encode(self.texts(self.order[count : count + 1]), limit, "eval")
            tokens = Tokens(np.append(tokens.ids_n, more.ids_n), np.append(tokens.starts_n, more.starts_n))
            count += 1
        return tokens, self.texts(self.order[count:])

    def by_tokens(self, ratio: float, limit: int | None, seq_len: int) -> tuple[Tokens, Iterable[str]]:
        """Held out: the asked share of the text, and more, up to half of it, until it fills a row."""
        sizes = [self.documents.size(i) for i in self.order]
        grown, most = 1.0, max(1.0, 0.5 / ratio)
        while True:
            self.stream = _TokenStream(self.stream.tokenizer, self.stream.progress)
            count, end = share_of_text(sizes, ratio, grown)
            held_out, rest = self.texts(self.order[:count]), self.texts(self.order[count:])
            if end:
                whole = self.documents.read(self.order[count])
                head, tail = cut_at_line(whole, 1 - end)
                self.stream.keep_out(whole)  # its copies: they hold the tail too
                self.stream.counts["documents_cut"] = 1
                held_out, rest = chain(held_out, [tail]), chain([head], self.texts(self.order[count + 1 :]))
            tokens = self.stream.encode(held_out, limit, "eval")
            if len(tokens.ids_n) >= seq_len or grown >= most:
                return tokens, rest
            grown = min(2 * grown, most)


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
