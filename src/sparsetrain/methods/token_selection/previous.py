"""Scores from a sample's last visit, for `scores=previous`: no forward is paid to rank its tokens.

The forward that trains computes the hidden states of all rows, so the head alone has to run on all targets, without
gradient. What is kept is four bytes a token on the CPU, by the content that names a document in its draw; the documents
that were not seen for longest are forgotten first. It is not in checkpoints, and each rank remembers what it has seen:
a resumed run, as a new one, draws at random at its first visit of a document.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from sparsetrain.methods.token_selection.policies import Batch, documents

MOST_TOKENS = 2**24
"""Scores of that many tokens are kept: 64 MiB."""


class Previous:
    """What is remembered.

    Args:
        most_tokens: scores kept at most; the newest document is always kept.
    """

    def __init__(self, most_tokens: int = MOST_TOKENS) -> None:
        self.most_tokens, self.num_tokens = most_tokens, 0
        self._scores: OrderedDict[tuple[int, int], Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._scores)

    def note(self, batch: Batch, scores_bt: Tensor) -> None:
        """The scores [b, t] of a batch's tokens are these now."""
        scores_bt = scores_bt.to("cpu", torch.float32)
        for row, segments_t in enumerate(batch.segments_bt):
            for positions in documents(segments_t):
                name = (batch.name(row, positions), len(positions))
                if self._scores.pop(name, None) is None:
                    self.num_tokens += len(positions)
                self._scores[name] = scores_bt[row, positions]
        while self.num_tokens > self.most_tokens and len(self) > 1:
            (_, length), _ = self._scores.popitem(last=False)
            self.num_tokens -= length

    def of(self, batch: Batch) -> Tensor:
        """fp32 [b, t]; the tokens of a document that was not seen score alike, and are drawn at random."""
        scores_bt = torch.zeros(batch.segments_bt.shape)
        for row, segments_t in enumerate(batch.segments_bt):
            for positions in documents(segments_t):
                found = self._scores.get((batch.name(row, positions), len(positions)))
                if found is not None:
                    scores_bt[row, positions] = found
        return scores_bt
