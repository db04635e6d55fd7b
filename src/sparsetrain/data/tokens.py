"""Documents as a stream of tokens: tokenised as far as they are needed, divided in what is trained on and held out."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, Literal

import numpy as np

from sparsetrain.data.documents import Documents
from sparsetrain.data.packing import Tokens, cut_at_line, packed_rows, piece_end, take_chars, take_pieces
from sparsetrain.data.special_tokens import beginning_ids, end_id
from sparsetrain.data.split import num_held_out, share_of_text

Holdout = Literal["tokens", "documents"]
# Characters tokenised in one call: enough to keep the tokenizer busy, few enough to stop early.
_BATCH_CHARS = 1 << 20


class TokenStream:
    """Texts -> token streams; remembers the held-out texts, so that training drops its copies of them."""

    def __init__(self, tokenizer: Any, progress: Callable[[str], None] | None) -> None:
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

    def silent(self) -> TokenStream:
        """The same tokenizer and held-out texts, counting for itself."""
        made = TokenStream(self.tokenizer, None)
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


class Split:
    """Documents in their seeded order, divided in two; each way gives (tokens held out, texts left to train on)."""

    def __init__(self, tokenizer: Any, progress: Callable[[str], None] | None, documents: Documents, seed: int) -> None:
        self.stream = TokenStream(tokenizer, progress)
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
            self.stream = TokenStream(self.stream.tokenizer, self.stream.progress)
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


def later_rows(
    later: Callable[[], Iterator[str]], tokens: TokenStream, seq_len: int, pack: str
) -> Iterator[dict[str, Any]]:
    """Rows of texts that are read as they are asked for, in their order; tokens that fill no row wait for the next."""
    tokens, left = tokens.silent(), Tokens(np.empty(0, dtype=np.int32), np.empty(0, dtype=bool))
    texts = later()
    while some := take_chars(texts, _BATCH_CHARS):
        more = tokens.encode(some, None, "train")
        left = Tokens(np.append(left.ids_n, more.ids_n), np.append(left.starts_n, more.starts_n))
        used = len(left.ids_n) // seq_len * seq_len
        if used:
            columns = packed_rows(left, seq_len, pack, "train", "", {})
            for i in range(used // seq_len):
                yield {name: column[i].tolist() for name, column in columns.items()}
            left = Tokens(left.ids_n[used:], left.starts_n[used:])
