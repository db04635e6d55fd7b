"""`--push-to-hub`: refused before training where it cannot be done, and in the end all of the saved folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparsetrain.hf.train import hub
from tests.cli.conftest import Call


class Hub:
    """Stands in for the hub's client: keeps what it is given."""

    def __init__(self, user: str | None = "ann", full: bool = False) -> None:
        self.user, self.full, self.files = user, full, dict[str, list[str]]()

    def __call__(self) -> Hub:
        return self

    def whoami(self) -> dict[str, Any]:
        if self.user is None:
            raise ConnectionError("no route to host")
        return {"name": self.user}

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        assert private and exist_ok

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        if self.full:
            raise OSError("storage is full")
        self.files[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())


@pytest.fixture
def train(call: Call, llama: Path, text: Path, tmp_path: Path):
    def run(*extra: str) -> Any:
        usual = ["--model", llama, "--data", text, "--output", tmp_path / "run", "--preset", "dense", "--seq-len", 32]
        usual += ["--steps", 1, "--device", "cpu", "--dtype", "fp32", "--eval-tokens", 64, "--save-every", 0]
        return call("finetune", *usual, *extra)

    return run


def reach(monkeypatch: pytest.MonkeyPatch, client: Hub, token: str | None = "t", offline: bool = False) -> None:
    monkeypatch.setattr(hub, "HfApi", client)
    monkeypatch.setattr(hub, "get_token", lambda: token)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", offline)


def test_what_is_saved_is_uploaded_with_its_sidecar(train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Hub()
    reach(monkeypatch, client)
    result = train("--push_to_hub", "--json")
    assert result.code == 0, result.err
    assert result.json["hub"].endswith("/ann/run")
    assert client.files == {"ann/run": sorted(path.name for path in (tmp_path / "run/adapter").iterdir())}
    assert {"adapter_model.safetensors", "sparsity_config.json"} <= set(client.files["ann/run"])


@pytest.mark.parametrize(
    ("given", "flags", "words"),
    [
        ({"offline": True}, [], "HF_HUB_OFFLINE"),
        ({"token": None}, [], "hf auth login"),
        ({"client": Hub(user=None)}, [], "no route to host"),
        ({}, ["--hub-model-id", "a/b/c"], "no name of a repository"),
        ({}, ["--compare", "dense"], "trains two"),
    ],
)
def test_it_is_refused_before_training(
    train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], flags: list[str], words: str
) -> None:
    reach(monkeypatch, **({"client": Hub()} | given))
    result = train("--push-to-hub", *flags)
    assert result.code == 2 and words in result.err and not (tmp_path / "run").exists(), result.err


def test_a_failed_upload_leaves_the_run(train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reach(monkeypatch, Hub(full=True))
    result = train("--push-to-hub", "--hub-model-id", "bob/x")
    assert result.code == 1 and "hf upload bob/x" in result.err and (tmp_path / "run/result.json").is_file()


def test_a_name_alone_asks_for_nothing(train) -> None:
    assert "is for --push-to-hub" in train("--hub-model-id", "bob/x").err
