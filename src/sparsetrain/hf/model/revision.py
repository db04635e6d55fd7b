"""A hub model at a revision (a branch, a tag or a commit), as the folder of that snapshot."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from sparsetrain.core.quote import quoted
from sparsetrain.hf.assets import ASSETS
from sparsetrain.hf.model.opening import model_not_found, quiet

_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
"""What is read of a model; no pickles, and no code unless it may run."""


@quiet()
def at_revision(name: str, revision: str, *, trust: bool = False) -> str:
    """The folder of a hub model's files at a revision, fetched where they are not in the hub's cache.

    Args:
        trust: fetch its Python code, too.

    Raises:
        ValueError: the model is no hub's, or there is no such revision, or it cannot be had.
    """
    if name in ASSETS or Path(name).exists():
        raise ValueError(
            f"model_revision={quoted(revision)}: {quoted(name)} is on this machine, and revisions are of models on the "
            "hub. Leave it out."
        )
    try:
        return snapshot_download(name, revision=revision, allow_patterns=[*_FILES, *(["*.py"] if trust else [])])
    except Exception as error:  # the hub client raises a dozen kinds
        raise ValueError(f"at revision {quoted(revision)}: {model_not_found(name, error)}") from None
