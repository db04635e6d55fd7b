"""What a sidecar, or a config's `architectures`, may decide about the model that is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sparsetrain.core.errors import CheckpointError
from sparsetrain.core.quote import quoted
from sparsetrain.hf.model.models import ATTENTION_DROPOUT

_OPTIONS = (*ATTENTION_DROPOUT, "id2label", "label2id", "pad_token_id", "ignore_mismatched_sizes")
"""What `finetune` changes in a config. Whatever else a sidecar names is not of ours."""
_MOST_LABELS = 2**20


def set_options(config: Any, about: dict[str, Any], where: Path) -> None:
    """Set in a config what a sidecar's `model_options` record.

    Raises:
        CheckpointError: an option that no run writes, or a value that it cannot have.
    """
    options = about.get("model_options", {})
    if not isinstance(options, dict):
        raise CheckpointError(f"{where}: model_options={quoted(options)} is no table of options.")
    for key, value in options.items():
        if key not in _OPTIONS:
            raise CheckpointError(
                f"{where} sets the model option {quoted(key)}, which no run writes: it could run code. Allowed are "
                f"{', '.join(_OPTIONS)}."
            )
        if not _valid(key, value):
            raise CheckpointError(f"{where}: model option {key}={quoted(value, 80)} is out of range.")
    labels = options.get("id2label")
    if labels is not None:  # JSON has made its keys text
        config.id2label = {int(i): name for i, name in labels.items()}
    for key in options.keys() - {"id2label", "ignore_mismatched_sizes"}:
        setattr(config, key, options[key])


def own_classes(config: Any, name: str) -> list[str]:
    """The classes that a config names as its model's.

    Raises:
        ValueError: the model is for something else than any task here.
    """
    names: list[str] = list(config.architectures or ())
    for found in names:
        kind = re.search(r"For([A-Z]\w*)$", found)
        if kind and kind[1] in _ELSEWHERE:
            raise ValueError(
                f"{quoted(name)} is a {quoted(found)}, whose head does what no task here does. Give a causal language "
                "model, a sequence classifier or an image classifier."
            )
    return names


_ELSEWHERE = ("MaskedLM", "TokenClassification", "QuestionAnswering", "MultipleChoice", "NextSentencePrediction")


def _valid(key: str, value: Any) -> bool:
    if key in ATTENTION_DROPOUT:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
    if key == "pad_token_id":
        return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**24)
    if key == "ignore_mismatched_sizes":
        return isinstance(value, bool)
    if not isinstance(value, dict) or not 0 < len(value) <= _MOST_LABELS:
        return False
    numbers, names = (value.keys(), value.values()) if key == "id2label" else (value.values(), value.keys())
    return all(isinstance(name, str) for name in names) and {str(i) for i in numbers} == {
        str(i) for i in range(len(value))
    }
