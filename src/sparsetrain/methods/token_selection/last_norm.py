"""The norm before the head, on selected rows: of 256k rows in fp32 its backward would need more than a block's."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sparsetrain.methods.token_selection.recomputed import in_pieces
from sparsetrain.methods.token_selection.selector import Selector
from sparsetrain.ops.selected_rows import replace_rows, take_rows
from sparsetrain.surgery.reclass import dense_forward


class NormOnRows:
    """Mixed into the last norm, behind a last block whose output has gradient in its selected rows alone.

    A norm whose own weight trains runs as it is: there every row that the loss reads counts.
    """

    selector: Selector

    def forward(self, x: Tensor) -> Tensor:
        run, rows = partial(dense_forward, NormOnRows, self), self.selector.rows
        trains = any(parameter.requires_grad for parameter in self.parameters())  # type: ignore[attr-defined]
        if trains or rows is None or rows.everything or not (self.selector.running and torch.is_grad_enabled()):
            return run(x)
        if not x.requires_grad or x.shape[:2] != (len(rows.counts), rows.num_tokens):
            return run(x)
        rows = rows.to(x.device)
        with torch.no_grad():
            y = in_pieces(run, x)
        return replace_rows(y, run(take_rows(x, rows)), rows)
