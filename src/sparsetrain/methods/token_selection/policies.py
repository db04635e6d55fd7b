"""How tokens are chosen: a score for every token, the highest are selected. Small pure functions on the CPU.

A draw is a function of (seed, step, token ids of the document), without padding and whatever else a row or batch holds:
resuming, loader workers, ranks, batch sizes and packing change nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsetrain.methods.token_selection.config import TokenSelection
from sparsetrain.ops.selected_rows import Rows
from sparsetrain.surgery.targets import IGNORED, predicted


@dataclass(frozen=True, eq=False)
class Batch:
    """What a draw may look at; all on the CPU.

    Attributes:
        segments_bt: int [b, t], 0 = padding, equal neighbours = one document.
        content: what names a sample: one entry a token, [b, t, ...], of which a document's own count; or whatever
            stands for a whole row, [b, ...], where `by_row`.
        targets_bt: bool [b, t], positions whose prediction has a loss; None = not known.
        scores_bt: a score of every token; None = none given.
        attended_bt: the attention that every token receives from targets; None = not known.
        causal: a token is seen by later ones alone.
    """

    segments_bt: Tensor
    content: Tensor
    targets_bt: Tensor | None = None
    scores_bt: Tensor | None = None
    by_row: bool = False
    causal: bool = False
    attended_bt: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.segments_bt.shape[1]

    @classmethod
    def of(cls, batch: dict[str, Tensor], *, causal: bool, pad: int | None = None) -> Batch:
        """From the arguments of a model's forward.

        Without token ids the embedded tokens name the samples. Without a mask, padding is what begins or ends a row
        with the token `pad` and no label.

        Raises:
            ValueError: `token_scores` of the wrong shape or with NaN.
        """
        ids = batch.get("input_ids")
        content = (batch["inputs_embeds"][:, :, :4].float() if ids is None else ids.long()).detach().cpu()
        shape = (content.shape[0], content.shape[1])
        segments = segments_of(batch.get("attention_mask"), shape)
        labels, targets = batch.get("labels"), predicted(batch, causal)
        unmasked = batch.get("attention_mask") is None and ids is not None and pad is not None
        if unmasked and labels is not None and labels.shape == shape:
            segments = segments * ~_runs_at_ends((content == pad) & (labels.cpu() == IGNORED))
        positions = batch.get("position_ids")
        if positions is not None and positions.ndim == 2:
            positions = positions.cpu()
            starts = positions[:, 1:] != positions[:, :-1] + 1
            segments = segments * (1 + torch.nn.functional.pad(starts.cumsum(1), (1, 0)).to(torch.int32))
        if targets is not None:
            targets = None if targets.shape != shape else targets.cpu() != IGNORED
        if targets is not None and causal:  # the last token of a document predicts none of it
            same = torch.nn.functional.pad(segments[:, 1:] == segments[:, :-1], (0, 1), value=True)
            targets = targets & same & (segments > 0)
        scores = batch.get("token_scores")
        if scores is not None:
            if scores.shape != shape or scores.isnan().any():
                raise ValueError(
                    f"token_scores must hold one number a token, shape {shape}; it has shape "
                    f"{tuple(scores.shape)} and {int(scores.isnan().sum())} NaN."
                )
            scores = scores.to("cpu", torch.float32)
        return cls(segments, content, targets, scores, causal=causal, attended_bt=batch.get("token_attention"))

    def name(self, row: int, positions: Tensor) -> int:
        """A number that names a document by its content, wherever it stands and whatever stands beside it."""
        content = self.content[row] if self.by_row else self.content[row, positions]
        return zlib.crc32(content.contiguous().view(torch.uint8).numpy().tobytes())


def _runs_at_ends(is_pad_bt: Tensor) -> Tensor:
    """bool [b, t]: tokens of the run that begins a row, and of the one that ends it."""
    pad = is_pad_bt.to(torch.int32)
    return (pad.cumprod(1) + pad.flip(1).cumprod(1).flip(1)) > 0


def segments_of(mask: object, shape: tuple[int, int]) -> Tensor:
    """int [b, t] on the CPU from an attention mask, [b, t] or [b, 1, t, t]: 0 = padding, equal = one document."""
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        return torch.ones(shape, dtype=torch.int32)
    if mask.ndim == 4:
        diagonal = mask[:, 0, :, -shape[1] :].diagonal(dim1=1, dim2=2)
        mask = diagonal if diagonal.dtype == torch.bool else diagonal == 0
    # a mask that is longer begins with what a cache holds
    return mask[:, -shape[1] :].expand(shape).to("cpu", torch.int32)


def random(positions: Tensor, scores: Tensor | None, generator: torch.Generator) -> Tensor:
    """Uniform without replacement (published)."""
    return torch.rand(len(positions), generator=generator)


def prefix(positions: Tensor, scores: Tensor | None, generator: torch.Generator) -> Tensor:
    """The first tokens."""
    return 1 - torch.arange(len(positions)) / max(1, len(positions))


def scored(positions: Tensor, scores: Tensor | None, generator: torch.Generator) -> Tensor:
    """The highest scores; equal ones in random order."""
    assert scores is not None
    order = torch.rand(len(positions), generator=generator).argsort()
    rank = torch.empty(len(positions))
    rank[order[scores[order].argsort(stable=True)]] = torch.arange(len(positions)) / max(1, len(positions))
    return rank


def near(is_target: Tensor, causal: bool) -> Tensor:
    """1 at a target, less with the distance to the next target that sees the token, 0 where none does.

    A causal model's tokens after the last target are seen by none: no gradient of the loss reaches them.
    """
    n = len(is_target)
    places = torch.arange(n)
    after = torch.where(is_target, places, 2 * n).flip(0).cummin(0).values.flip(0) - places
    before = places - torch.where(is_target, places, -n).cummax(0).values
    return 1 - (after if causal else torch.minimum(after, before)).clamp(max=n) / n


POLICIES: dict[str, Callable[[Tensor, Tensor | None, torch.Generator], Tensor]] = {
    "random": random,
    "prefix": prefix,
    "loss": scored,
    "gradient_norm": scored,
}


def everything(batch: Batch) -> Rows:
    """Every row of a batch."""
    return Rows.of([torch.arange(batch.num_tokens)] * len(batch.segments_bt), batch.num_tokens)


def draw(config: TokenSelection, batch: Batch, *, step: int) -> Rows:
    """The selected rows of a batch.

    Raises:
        ValueError: the config needs labels or scores that the batch has not.
    """
    if config.pool == "targets" and batch.targets_bt is None:
        raise ValueError(
            "token_selection: pool='targets' selects positions that have a label, and the batch came without labels. "
            "Call the model with its labels, or use pool='all'."
        )
    if config.needs_scores and batch.scores_bt is None:
        raise ValueError(
            f"token_selection: pool={config.pool!r}, policy={config.policy!r} need `token_scores` with every batch, "
            "and there are none. Let the collator add them to the batch, or use policy='random'."
        )
    if config.keep_ratio == 1:  # padding too: the row before a first token may predict it, and a first row be read
        return everything(batch)
    chosen, weights = [], []
    for row, segments_t in enumerate(batch.segments_bt):
        found = []
        for positions in documents(segments_t):
            state = f"{config.seed} {step} {batch.name(row, positions)}"
            generator = torch.Generator().manual_seed(zlib.crc32(state.encode()))
            found.append(_draw_document(config, batch, row, positions, generator))
        chosen.append(torch.cat([p for p, _ in found]) if found else torch.empty(0, dtype=torch.int64))
        weights.append(torch.cat([w for _, w in found]) if found else torch.empty(0))
    rows = Rows.of(chosen, batch.num_tokens)
    if config.unbiased:
        weight = torch.zeros(rows.shape)
        for row, (p, w) in enumerate(zip(chosen, weights, strict=True)):
            weight[row, : len(p)] = w[p.argsort()]
        rows = Rows(rows.index_bk, rows.counts, rows.num_tokens, weight)
    return rows


def documents(segments_t: Tensor) -> list[Tensor]:
    """Positions of every document of a row, padding left out."""
    positions = segments_t.nonzero().flatten()
    if not len(positions):
        return []
    values = segments_t[positions]
    lengths = torch.unique_consecutive(values, return_counts=True)[1]
    return list(positions.split(lengths.tolist()))


def _draw_document(
    config: TokenSelection, batch: Batch, row: int, positions: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(selected positions, importance weight of each) of one document."""
    n = len(positions)
    count = config.count(n)
    scores = None if batch.scores_bt is None else batch.scores_bt[row, positions]
    targets = None if batch.targets_bt is None else batch.targets_bt[row, positions]
    policy = scored if config.pool == "scored" else POLICIES[config.policy]
    score = policy(positions, scores, generator)
    if config.pool == "targets" and targets is not None:
        score = torch.where(targets, score, _context(config, batch, row, positions, targets, score, generator))
        score = score + targets  # every target comes before every other token
    forced = [i for i, name in ((0, "first"), (n - 1, "last")) if name in config.always_keep]
    score[forced] = 4.0
    sure = score == 4
    if config.keep_all_targets and targets is not None:
        sure = sure | targets
    count = max(count, int(sure.sum()))
    order = score.argsort(descending=True, stable=True)
    chosen = order[:count]
    if config.ensure_target and targets is not None and targets.any() and not targets[chosen].any():
        best = order[targets[order]][0]
        chosen = torch.cat([chosen[: count - 1], best[None]])
    return positions[chosen], _weights(config, chosen, forced, targets, n, count)


def _context(
    config: TokenSelection, batch: Batch, row: int, positions: Tensor, targets: Tensor, score: Tensor, generator: Any
) -> Tensor:
    """In [0, 1]: which tokens without a target come first."""
    if config.context == "near":
        return near(targets, batch.causal)
    if config.context == "attended":
        assert batch.attended_bt is not None, "the model looks before it draws"
        return scored(positions, batch.attended_bt[row, positions], generator)
    return score


def _weights(
    config: TokenSelection, chosen: Tensor, forced: list[int], targets: Tensor | None, n: int, count: int
) -> Tensor:
    """1 / probability of selection of each chosen token; a target that was put in by force counts as drawn."""
    drawn = count - len(set(forced))
    probability = torch.full((n,), drawn / max(1, n - len(set(forced))))
    if config.pool == "targets" and targets is not None:
        free = torch.ones(n, dtype=torch.bool)
        free[forced] = False
        first, rest = int((targets & free).sum()), int((~targets & free).sum())
        probability[targets] = min(1.0, drawn / max(1, first))
        probability[~targets] = max(0.0, drawn - first) / max(1, rest)
    probability[forced] = 1.0
    return 1 / probability[chosen].clamp(min=1e-6)
