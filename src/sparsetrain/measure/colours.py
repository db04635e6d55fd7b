"""The colours of reports and plots: one a meaning, wherever it is drawn; each for a light ground and for a dark one."""

from __future__ import annotations

COLOURS: dict[str, tuple[str, str]] = {
    # sides of a comparison
    "dense": ("#6b7280", "#9aa5b4"),
    "checkpointing": ("#a16207", "#d3a13b"),
    "sparse": ("#0b66c3", "#5aa9f8"),
    "setup": ("#93c1ee", "#2f5f8f"),
    "before": ("#d0d5db", "#4a5563"),
    # components of a model
    "attention": ("#7c3aed", "#a78bfa"),
    "ffn": ("#e07a1f", "#f2994a"),
    "norms": ("#7a9e3e", "#a3c765"),
    "embedding": ("#c2407d", "#ec7fb0"),
    "head_and_loss": ("#b3261e", "#f28b82"),
    "adapters": ("#14919b", "#4fc4cd"),
    "other": ("#bfa98a", "#8c7b63"),
    # parts of a process's memory
    "libraries and data": ("#a8b5a2", "#5d6b57"),
    "weights": ("#34495e", "#7d93aa"),
    "gradients": ("#65a30d", "#a3e635"),
    "optimizer": ("#b794f4", "#6d4fb0"),
    "saved activations": ("#f2c037", "#f6d873"),
    "rest": ("#e1e5ea", "#2c3642"),
}
INK, FAINT = "#1f2933", "#e4e7eb"
"""Text and rules of plots on a light ground."""


def light(name: str) -> str:
    """The colour of a meaning on a light ground."""
    return COLOURS[name][0]


def css_name(name: str) -> str:
    """A meaning as the name of a class and of a variable."""
    return name.replace(" ", "-").replace("_", "-")


def part_name(part: str) -> str:
    """A meaning as a reader sees it."""
    return "FFN" if part == "ffn" else part.replace("_", " ")
