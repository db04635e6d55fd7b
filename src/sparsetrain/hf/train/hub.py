"""Putting what was trained onto the hub: whether that can be done is known before training begins."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from sparsetrain.core.quote import quoted
from sparsetrain.hf.model.opening import told


def check_can_push(asked: str | None, output: str) -> str:
    """The repository that a run's model will be put into, `user/name`.

    Args:
        asked: its name, with or without a user; the output folder's name if None.

    Raises:
        ValueError: the hub is switched off or cannot be reached, nobody is logged in, or that is no name of one.
    """
    if constants.HF_HUB_OFFLINE:
        raise ValueError("push_to_hub: the hub is switched off (HF_HUB_OFFLINE). Unset it, or leave push_to_hub out.")
    if get_token() is None:
        raise ValueError("push_to_hub: nobody is logged in to the hub. Run `hf auth login`, or set HF_TOKEN.")
    name = asked or Path(output).name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"hub_model_id: {quoted(name)} is no name of a repository: {told(error)}") from None
    try:
        user = HfApi().whoami()["name"]
    except Exception as error:  # the client raises a dozen kinds
        raise ValueError(
            f"push_to_hub: the hub cannot be reached, or does not know this token ({told(error).rstrip('.')}). Leave "
            "push_to_hub out; `hf upload` takes the finished folder at any time."
        ) from None
    return name if "/" in name else f"{user}/{name}"


def push(folder: str | Path, name: str) -> str:
    """Upload a saved model, sidecar included, into a repository, made private where it is new; its address.

    Raises:
        RuntimeError: it failed; the folder is whole, and the message says how to go on.
    """
    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Trained with sparsetrain")
    except Exception as error:  # the client raises a dozen kinds
        raise RuntimeError(
            f"The run is finished, and uploading {folder} failed: {told(error)} Try `hf upload {name} {folder}`."
        ) from None
    return f"{constants.ENDPOINT}/{name}"
