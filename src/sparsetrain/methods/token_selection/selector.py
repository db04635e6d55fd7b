"""The selection of the forward that runs: drawn by the model, read by its blocks and its head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from sparsetrain.core.backend import Ran
from sparsetrain.core.host_memory import OnHost
from sparsetrain.methods.token_selection.config import TokenSelection
from sparsetrain.methods.token_selection.policies import Batch, draw, everything, segments_of
from sparsetrain.methods.token_selection.previous import Previous
from sparsetrain.methods.token_selection.step import StepMean
from sparsetrain.ops.selected_rows import KeyValues, Rows

Head = Callable[[Tensor], Tensor]


class Kept(NamedTuple):
    """What a block said on all rows before anything was selected: its output, keys and values; these with gradient to
    what made them, too, if that is asked for."""

    out: Any
    everything: KeyValues
    context: tuple[Tensor, Tensor] | None = None


class Selector:
    """Which tokens are selected: shared by a model, its blocks and its head, constant during a forward.

    Args:
        causal: position p predicts token p + 1.
        keep_last: a causal model without a language model's head reads its answer off the last token.

    Attributes:
        rows: the selection of the forward that runs or ran last; None before a training forward.
        running: a training forward runs now.
        dense: every token trains now; the loss head runs in chunks, as it does beside selection.
        reads_all: the trainer's loss reads the log-probability of every target, and is no sum over tokens.
        head: answers for the output head now; None: it computes its linear.
        loss: is the model's loss function now; None: it has its own.
        kept: what blocks have said already of the batch that trains, by their state, call by call.
        previous: scores of the samples' last visits.
        mean: the optimizer step that is being accumulated.
        ran: who runs attention and the loss of selected rows.
        waiting: the keys and values that went to the CPU's memory last in the forward that runs.
    """

    def __init__(self, config: TokenSelection, causal: bool, keep_last: bool) -> None:
        self.causal = causal
        if keep_last and "last" not in config.always_keep:
            config = replace(config, always_keep=(*config.always_keep, "last"))
        self.config = config
        self.step = 0
        self.rows: Rows | None = None
        self.running = self.dense = self.reads_all = False
        self.head: Head | None = None
        self.loss: Callable[..., Tensor] | None = None
        self.kept: dict[Any, list[Kept]] = {}
        self.previous = Previous()
        self.mean = StepMean()
        self.ran: Ran = {}
        self.waiting: OnHost | None = None
        self._forced: Rows | None = None
        self._draw: Callable[[int], Rows] | None = None

    def begin_step(self, step: int) -> None:
        """Optimizer step `step` is next; saying so again changes nothing."""
        if step != self.step:
            self.mean.begin()
        self.step = step

    @contextmanager
    def using(self, rows: Rows) -> Iterator[None]:
        """Train on exactly these rows inside the `with` block."""
        self._forced = rows
        try:
            yield
        finally:
            self._forced = None

    def choose(self, given: dict[str, Any], pad: int | None = None) -> Rows | None:
        """Select for a forward; None when its input tells no number of tokens (images): the first block selects then.

        Args:
            given: arguments of the model's forward, among them `input_ids` [b, t] or `inputs_embeds` [b, t, d] and, as
                far as there, `attention_mask`, `labels`, `position_ids`; and `token_scores`.
            pad: the model's token for padding.

        Raises:
            ValueError: the policy needs labels or scores that are not there.
        """
        self.rows, self._draw = self._forced, None
        if self.rows is not None:
            return self.rows
        if given.get("input_ids") is not None or given.get("inputs_embeds") is not None:
            self.rows = self._drawn(Batch.of(given, causal=self.causal, pad=pad))
            return self.rows
        images = next(value for value in given.values() if isinstance(value, Tensor)).detach().cpu()
        mask = given.get("attention_mask")

        def on_images(t: int) -> Rows:
            return self._drawn(Batch(segments_of(mask, (len(images), t)), images, by_row=True))

        self._draw = on_images
        return None

    def _drawn(self, batch: Batch) -> Rows:
        return everything(batch) if self.dense else draw(self.config, batch, step=self.step)

    @contextmanager
    def selecting(self, head: Head | None, loss: Callable[..., Tensor] | None) -> Iterator[None]:
        """A training forward on what was chosen runs inside."""
        self.running, self.loss = True, loss
        try:
            with self.head_is(head):
                yield
        finally:
            self.running, self.loss, self._draw, self.kept, self.waiting = False, None, None, {}, None

    @contextmanager
    def head_is(self, head: Head | None) -> Iterator[None]:
        """Inside, `head` answers for the output head."""
        self.head = head
        try:
            yield
        finally:
            self.head = None

    def take_kept(self, state: Any) -> Kept | None:
        """What the block with this state said in its next call, if it is known. It is given once, to be freed."""
        calls = self.kept.get(state)
        return calls.pop(0) if calls else None

    def rows_for(self, x_btd: Tensor) -> Rows | None:
        """The selection of the forward that runs, for a block's input; None when none runs."""
        if not self.running:
            return None
        if self.rows is None:
            assert self._draw is not None
            self.rows = self._draw(x_btd.shape[1])
        self.rows = rows = self.rows.to(x_btd.device)
        if rows.num_tokens != x_btd.shape[1] or len(rows.counts) != x_btd.shape[0]:
            raise ValueError(
                f"token_selection: the selection is for {len(rows.counts)} rows of {rows.num_tokens} tokens, "
                f"and a block was given {tuple(x_btd.shape[:2])}. Select for the batch that is trained on."
            )
        return rows
