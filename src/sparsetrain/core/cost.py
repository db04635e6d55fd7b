"""What a part of a model costs, counted the same way for every method.

Counts are per token of one forward pass. One multiply-add is 2 FLOPs. `saved_elements` counts the numbers kept for the
backward pass by the part itself, in the dtype of its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Parameters, forward FLOPs per token, and elements saved for backward per token."""

    num_params: int = 0
    flops: float = 0.0
    saved_elements: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            num_params=self.num_params + other.num_params,
            flops=self.flops + other.flops,
            saved_elements=self.saved_elements + other.saved_elements,
        )


def ffn_cost(hidden: int, width: int, gated: bool, biases: int = 0) -> Cost:
    """A dense FFN as transformers runs it: `width` hidden units on a model of `hidden` channels.

    Saved: the input, and per hidden unit the pre-activation and the activation (gated: gate, up, act(gate), product).
    """
    matrices = 3 if gated else 2
    return Cost(
        num_params=matrices * hidden * width + biases,
        flops=2.0 * matrices * hidden * width,
        saved_elements=hidden + (4 if gated else 2) * width,
    )


def attention_cost(heads: int, kv_heads: int, head_dim: int, num_keys: float) -> Cost:
    """Attention over `num_keys` keys a query (the mean over queries): two products, softmax not counted.

    Saved: q, k, v, output and one log-sum-exp a head, as a fused attention keeps them.
    """
    return Cost(
        flops=4.0 * heads * head_dim * num_keys,
        saved_elements=2 * heads * head_dim + 2 * kv_heads * head_dim + heads,
    )


def mean_visible_keys(num_tokens: int, causal: bool, window: int | None = None) -> float:
    """Mean number of keys a query sees in dense attention over `num_tokens` tokens."""
    reach = num_tokens if window is None else min(window, num_tokens)
    if causal:
        return reach - reach * (reach - 1) / (2.0 * num_tokens)
    return float(num_tokens if window is None else min(num_tokens, 2 * reach - 1))
